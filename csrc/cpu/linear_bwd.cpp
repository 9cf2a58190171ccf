// dx = dy W + dropout_mask * (dyb lora_A); dyb already carries scaling
// Operands:      W 4-bit [N, K]; dy dtype [M, N]; dyb dtype [M, r]; lora_A A_dtype [r, K] -> dx dtype [M, K]
// Rounding:      W decoded to fp32, all sums in fp32, one rounding to dtype; the LoRA part is summed into the tile
//                first and masked there, so dx is written once
// Preconditions: ops.py checks the operands. config.path is not read: W is used as it is stored, so the panels that
//                serve many rows cost one row no transposition either
// Memory:        the scratch of gemm.h; nothing of size [M, K] or [N, K]
#include "gemm.h"
#include "ops.h"

namespace nf4lora {
namespace NF4LORA_ISA {

const char *linear_bwd(const LinearBwdParams &p) {
    const int64_t N = p.w.rows, K = p.w.cols, r = p.dyb ? p.r : 0;
    const DropoutMask mask = dropout_mask(p.dropout);
    const Product base = {dense(p.dy, p.dy_dtype, N), kAsUsed, decoded(p.w), kAsUsed, N};
    const Product lora = {dense(p.dyb, p.dy_dtype, r), kAsUsed, dense(p.lora_A, p.A_dtype, K), kAsUsed, r};
    return for_tiles(p.M, K, max_of(N, r), true, p.config, [&](const Scratch &s, const Area &area) {
        accumulate(lora, area, s);
        if (mask.active && r > 0)
            for (int64_t m = 0; m < area.rows; ++m)
                apply_dropout(mask, (area.m0 + m) * K + area.n0, area.cols, s.tile + m * s.tile_stride);
        accumulate(base, area, s);
        store_tile(s, area, p.dx, p.dy_dtype, K);
    });
}

}  // namespace NF4LORA_ISA
}  // namespace nf4lora
