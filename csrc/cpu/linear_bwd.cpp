// dx = sum over members of dy_i W_i + dropout_mask * (dyb_i lora_A_i); dyb already carries scaling
// Operands:      of each member W 4-bit [N, K], dy dtype [M, N] and lora_A A_dtype [r, K]; dyb dtype [M, sum r], a member's
//                columns after those before it -> dx dtype [M, K]
// Rounding:      all sums in fp32, one rounding to dtype; the LoRA parts are summed into the tile first and masked there, so
//                dx is written once. W decoded to fp32, or where bf16 is multiplied as such (gemm.h) rounded to it
// Preconditions: ops.py checks the operands. config.path is not read: W is used as it is stored, so the panels that
//                serve many rows cost one row no transposition either
// Memory:        the scratch of gemm.h; nothing of size [N, K]
#include "gemm.h"
#include "ops.h"

namespace nf4lora {
namespace NF4LORA_ISA {

const char *linear_bwd(const LinearBwdParams &p) {
    const int64_t K = p.member[0].w.cols;
    const DropoutMask mask = dropout_mask(p.dropout);
    Product base[kMaxGroup], lora[kMaxGroup];
    int64_t depth = 0, ranks = 0;
    for (int64_t i = 0; i < p.count; ++i)
        ranks += p.dyb ? p.member[i].r : 0;
    int64_t before = 0;
    for (int64_t i = 0; i < p.count; ++i) {
        const Member &of = p.member[i];
        const int64_t N = of.w.rows, r = p.dyb ? of.r : 0;
        base[i] = {dense(of.dy, p.dy_dtype, of.ld_dy), kAsUsed, decoded(of.w), kAsUsed, N};
        const void *const dyb = element(p.dyb, p.dy_dtype, before);
        lora[i] = {dense(dyb, p.dy_dtype, ranks), kAsUsed, dense(of.lora_A, p.A_dtype, K), kAsUsed, r};
        depth = max_of(depth, max_of(N, r));
        before += r;
    }
    return for_spans(p.M, base, p.count, p.config.threads, [&](Span span) {
        return for_tiles(span, K, depth, true, p.config, [&](const Scratch &s, const Area &area) {
            for (int64_t i = 0; i < p.count; ++i)
                accumulate(lora[i], area, s);
            if (mask.active && ranks > 0)
                for (int64_t m = 0; m < area.rows; ++m)
                    apply_dropout(mask, (area.m0 + m) * K + area.n0, area.cols, s.tile + m * s.tile_stride);
            for (int64_t i = 0; i < p.count; ++i)
                accumulate(base[i], area, s);
            store_tile(s, area, p.dx, p.dy_dtype, K);
        });
    });
}

}  // namespace NF4LORA_ISA
}  // namespace nf4lora
