// y = x W^T + bias + scaling * xa lora_B^T,  xa = dropout(x) lora_A^T
// Operands:      W 4-bit [N, K]; x x_dtype [M, K]; lora_A A_dtype [r, K]; lora_B B_dtype [N, r]; bias bias_dtype [N]
//                -> xa x_dtype [M, r], y x_dtype [M, N]
// Rounding:      W decoded to fp32, all sums in fp32; xa rounds to x_dtype and is used rounded; y rounds once, with the
//                LoRA part summed into the tile before the base product
// Preconditions: ops.py checks the operands; r = 0 or a null lora_A is a plain 4-bit linear; dropout does not touch x W^T
// Memory:        the scratch of gemm.h; nothing of size [N, K] or [M, K]
#include "dots.h"
#include "ops.h"

namespace nf4lora {
namespace NF4LORA_ISA {

static void add_bias(const LinearFwdParams &p, int64_t rows, int64_t n0, int64_t cols, const Scratch &s) {
    load_elements(p.bias, p.bias_dtype, n0, cols, s.lines);
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t n = 0; n < cols; ++n)
            s.tile[m * s.tile_stride + n] += s.lines[n];
}

const char *linear_fwd(const LinearFwdParams &p) {
    const int64_t N = p.w.rows, K = p.w.cols, r = p.lora_A ? p.r : 0;
    const DropoutMask mask = dropout_mask(p.dropout);
    const auto sum = p.config.path == kRows ? accumulate_dots : accumulate;

    const Product down = {dropped(p.x, p.x_dtype, K, mask), kAsUsed, dense(p.lora_A, p.A_dtype, K), kTransposed, K};
    LinearConfig down_config = p.config;
    if (p.config.path == kRows)
        down_config.block_n = static_cast<int32_t>(min_of(p.config.block_n, ceil_div(max_of(r, 1), max_of(p.config.threads, 1))));
    const char *error = for_tiles(p.M, r, K, down_config, [&](const Scratch &s, int64_t m0, int64_t rows, int64_t n0, int64_t cols) {
        sum(down, m0, rows, n0, cols, s);
        store_tile(s, m0, rows, n0, cols, p.xa, p.x_dtype, r);
    });
    if (error)
        return error;

    const Product up = {dense(p.xa, p.x_dtype, r), kAsUsed, dense(p.lora_B, p.B_dtype, r), kTransposed, r};
    const Product base = {dense(p.x, p.x_dtype, K), kAsUsed, decoded(p.w), kTransposed, K};
    return for_tiles(p.M, N, K > r ? K : r, p.config, [&](const Scratch &s, int64_t m0, int64_t rows, int64_t n0, int64_t cols) {
        sum(up, m0, rows, n0, cols, s);
        if (r > 0)
            scale_tile(s, rows, p.scaling);
        sum(base, m0, rows, n0, cols, s);
        if (p.bias)
            add_bias(p, rows, n0, cols, s);
        store_tile(s, m0, rows, n0, cols, p.y, p.x_dtype, N);
    });
}

}  // namespace NF4LORA_ISA
}  // namespace nf4lora
