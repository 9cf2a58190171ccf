// y = x W^T + bias + scaling * xa lora_B^T,  xa = dropout(x) lora_A^T
// Operands:      W 4-bit [N, K]; x x_dtype [M, K]; lora_A A_dtype [r, K]; lora_B B_dtype [N, r]; bias bias_dtype [N]
//                -> xa x_dtype [M, r], y x_dtype [M, N], whose rows may lie further apart
// Rounding:      all sums in fp32; W decoded to fp32, or where bf16 is multiplied as such (gemm.h, planes.h) rounded to it; xa
//                rounds to x_dtype and is used rounded; y rounds once, the LoRA part is summed before the base product
// Preconditions: ops.py checks the operands; r = 0 or a null lora_A is a plain 4-bit linear; dropout leaves x W^T alone
// Memory:        the scratch of gemm.h, or few.h; nothing of size [N, K]
#include "dots.h"
#if defined(__AVX2__)
#include "few.h"
#endif
#include "ops.h"

namespace nf4lora {
namespace NF4LORA_ISA {

static void add_bias(const LinearFwdParams &p, const Area &area, const Scratch &s) {
    load_elements(p.bias, p.bias_dtype, area.n0, area.cols, s.lines);
    for (int64_t m = 0; m < area.rows; ++m)
        for (int64_t n = 0; n < area.cols; ++n)
            s.tile[m * s.tile_stride + n] += s.lines[n];
}

const char *linear_fwd(const LinearFwdParams &p) {
    const int64_t N = p.w.rows, K = p.w.cols, r = p.r;
    const DropoutMask mask = dropout_mask(p.dropout);
    const bool panels = p.config.path == kPanels;
#if defined(__AVX2__)
    if (!panels && valid(p.config) && few_tokens_apply(p)) {
#if defined(__AVX512BF16__)
        if (p.x_dtype == kBFloat16)
            return few_tokens<HalfPlanes>(p);
#endif
        return few_tokens<FloatPlanes>(p);
    }
#endif
    const auto sum = panels ? accumulate : accumulate_dots;

    const auto forward = [&](Span span, Product &base) {
        Product down = {dropped(p.x, p.x_dtype, K, mask), kAsUsed, dense(p.lora_A, p.A_dtype, K), kTransposed, K};
        share_packed(base, down);
        LinearConfig down_config = p.config;
        if (!panels) {  // few rows: the threads share the r columns instead
            const int64_t share = ceil_div(max_of(r, 1), max_of(p.config.threads, 1));
            down_config.block_n = static_cast<int32_t>(min_of(p.config.block_n, share));
        }
        const char *error = for_tiles(span, r, K, panels, down_config, [&](const Scratch &s, const Area &area) {
            sum(down, area, s);
            store_tile(s, area, p.xa, p.x_dtype, p.ld_xa);
        });
        if (error)
            return error;
        const Product up = {dense(p.xa, p.x_dtype, p.ld_xa), kAsUsed, dense(p.lora_B, p.B_dtype, r), kTransposed, r};
        return for_tiles(span, N, max_of(K, r), panels, p.config, [&](const Scratch &s, const Area &area) {
            sum(up, area, s);
            if (r > 0)
                scale_tile(s, area, p.scaling);
            sum(base, area, s);
            if (p.bias)
                add_bias(p, area, s);
            store_tile(s, area, p.y, p.x_dtype, p.ld_y);
        });
    };
    Product base = {dense(p.x, p.x_dtype, K), kAsUsed, decoded(p.w), kTransposed, K};
    if (!panels)
        return forward({0, p.M}, base);
    return for_spans(p.M, &base, 1, p.config.threads, [&](Span span) { return forward(span, base); });
}

}  // namespace NF4LORA_ISA
}  // namespace nf4lora
