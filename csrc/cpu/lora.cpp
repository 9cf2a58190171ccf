// dyb = scaling * dy lora_B;  dB = scaling * dy^T xa;  dA = dyb^T dropout(x)
// Operands:      dy dtype [M, N]; x dtype [M, K]; xa dtype [M, r]; lora_B B_dtype [N, r]
//                -> dyb dtype [M, r]; dA A_dtype [r, K]; dB B_dtype [N, r]; rows of dy, xa and dyb may lie further apart
// Rounding:      sums and scaling in fp32, one rounding to each output's dtype; dA uses the rounded dyb.
// Preconditions: ops.py checks the operands; a null dA or dB is skipped; M = 0 gives zero gradients
// Memory:        the scratch of gemm.h
#include "gemm.h"
#include "ops.h"

namespace nf4lora {
namespace NF4LORA_ISA {

// out [M, N] = factor * product, rows of out `stride` elements apart
static const char *scaled_product(const Product &product, int64_t M, int64_t N, float factor, void *out, int32_t dtype,
                                  int64_t stride, const LinearConfig &config) {
    return for_tiles({0, M}, N, product.depth, true, config, [&](const Scratch &s, const Area &area) {
        accumulate(product, area, s);
        scale_tile(s, area, factor);
        store_tile(s, area, out, dtype, stride);
    });
}

const char *lora_bwd(const LoraBwdParams &p) {
    const DropoutMask mask = dropout_mask(p.dropout);
    const Matrix dy = dense(p.dy, p.dtype, p.ld_dy), dyb = dense(p.dyb, p.dtype, p.ld_dyb);
    const char *error = scaled_product({dy, kAsUsed, dense(p.lora_B, p.B_dtype, p.r), kAsUsed, p.N}, p.M, p.r,
                                       p.scaling, p.dyb, p.dtype, p.ld_dyb, p.config);
    if (!error && p.dB)
        error = scaled_product({dy, kTransposed, dense(p.xa, p.dtype, p.ld_xa), kAsUsed, p.M}, p.N, p.r, p.scaling, p.dB,
                               p.B_dtype, p.r, p.config);
    if (!error && p.dA)
        error = scaled_product({dyb, kTransposed, dropped(p.x, p.dtype, p.K, mask), kAsUsed, p.M}, p.r, p.K, 1.0f, p.dA,
                               p.A_dtype, p.K, p.config);
    return error;
}

}  // namespace NF4LORA_ISA
}  // namespace nf4lora
