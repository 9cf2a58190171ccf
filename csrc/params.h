// Argument structs of every kernel, host and device. Plain data: no torch, no allocation, no defaults.
// nf4lora/native.py mirrors them field by field (tests/test_native.py compares the two).
#pragma once
#include <cstdint>

namespace nf4lora {

enum Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
enum QuantType : int32_t { kNF4 = 0, kFP4 = 1 };
enum LinearPath : int32_t { kRows = 0, kPanels = 1 };
enum OptimKind : int32_t { kAdamW = 0, kLion = 1 };

// A frozen 4-bit matrix, row-major [rows, cols]. Blocks run over the flattened matrix and may straddle rows.
struct Weight {
    const uint8_t *packed;       // uint8 [ceil(rows*cols/2)]; even element in the high nibble
    const void *absmax;          // float32 [nblocks], or uint8 [nblocks] where nested_absmax is given; nblocks = ceil(rows*cols/blocksize)
    const float *nested_absmax;  // float32 [ceil(nblocks/nested_blocksize)], may be null
    const float *offset;         // float32 [1], null together with nested_absmax
    int64_t rows;                // out_features N
    int64_t cols;                // in_features K
    int64_t blocksize;           // elements per absmax
    int64_t nested_blocksize;    // absmax per nested_absmax
    int32_t quant_type;          // QuantType
};

struct QuantizeParams {
    const void *a;      // dtype [numel]
    uint8_t *packed;    // uint8 [ceil(numel/2)], out
    float *absmax;      // float32 [ceil(numel/blocksize)], out
    int64_t numel;
    int64_t blocksize;
    int32_t dtype;      // Dtype of a
    int32_t quant_type; // QuantType
    int32_t workers;    // host: threads; CUDA: thread blocks
};

struct QuantizeAbsmaxParams {
    const float *absmax;   // float32 [nblocks]
    const float *offset;   // float32 [1]
    uint8_t *codes;        // uint8 [nblocks], out
    float *nested_absmax;  // float32 [ceil(nblocks/nested_blocksize)], out
    int64_t nblocks;
    int64_t nested_blocksize;
};

struct DequantizeParams {
    Weight w;
    void *out;        // dtype [rows*cols]
    int32_t dtype;    // Dtype of out
    int32_t workers;  // host: threads; CUDA: thread blocks
};

// Inverted dropout regenerated from its seed: Philox4x32-10, key = seed, counter = flat index / 4 of the [M, K] input.
struct Dropout {
    const int64_t *seed;  // int64 [1], null: no dropout
    float p;              // probability of zeroing, in [0, 1)
};

// Tile sizes and threads, chosen by nf4lora/heuristics.py.
struct LinearConfig {
    int32_t path;     // LinearPath
    int32_t block_m;  // rows of the output per tile
    int32_t block_n;  // columns of the output per tile
    int32_t block_k;  // of W, reduction steps decoded at a time, twice as many where they are pairs of bf16; a multiple of 64
    int32_t threads;
};

// ---- linears that read one x, as one: each with its own weight and adapter. A single linear is a group of one.

constexpr int kMaxGroup = 3;

struct Member {
    Weight w;            // [N_i, K]
    const void *bias;    // bias_dtype [N_i], null for all or for none
    const void *lora_A;  // A_dtype [r_i, K], null for all or for none (then r_i = 0)
    const void *lora_B;  // B_dtype [N_i, r_i], likewise
    void *dA;            // A_dtype [r_i, K], out of lora_bwd, null for all or for none
    void *dB;            // B_dtype [N_i, r_i], likewise
    const void *dy;      // lora_bwd, and linear_bwd on the host: dtype [M, N_i], rows ld_dy elements apart
    int64_t ld_dy;
    int64_t r;
    float scaling;
};

// y = x W^T + bias + scaling * xa lora_B^T,  xa = dropout(x) lora_A^T rounded to x's dtype
struct LinearFwdParams {
    Weight w;              // [N, K]
    const void *x;         // x_dtype [M, K]
    const void *bias;      // bias_dtype [N], may be null
    const void *lora_A;    // A_dtype [r, K], may be null (then r = 0)
    const void *lora_B;    // B_dtype [N, r], null together with lora_A
    void *y;               // x_dtype [M, N], rows ld_y elements apart, out
    void *xa;              // x_dtype [M, r], rows ld_xa apart, out
    int64_t M;
    int64_t r;
    int64_t ld_y;
    int64_t ld_xa;
    float scaling;
    int32_t x_dtype;
    int32_t bias_dtype;
    int32_t A_dtype;
    int32_t B_dtype;
    Dropout dropout;
    LinearConfig config;
};

// dx = sum over members of dy_i W_i + dropout_mask * (dyb_i A_i); dyb already carries scaling
struct LinearBwdParams {
    Member member[kMaxGroup];  // of which w, lora_A, dy, ld_dy and r are read
    const void *dyb;       // dy_dtype [M, sum r_i], may be null (then all r_i = 0)
    void *dx;              // dy_dtype [M, K], out
    int64_t count;         // members, 1 to kMaxGroup
    int64_t M;
    int32_t dy_dtype;
    int32_t A_dtype;
    Dropout dropout;
    LinearConfig config;
};

// dyb = scaling * dy lora_B (rounded to dy's dtype);  dB = scaling * dy^T xa;  dA = dyb^T dropout(x)
struct LoraBwdParams {
    const void *dy;      // dtype [M, N], rows ld_dy elements apart
    const void *x;       // dtype [M, K], null where dA is
    const void *xa;      // dtype [M, r], rows ld_xa apart, null where dB is
    const void *lora_B;  // B_dtype [N, r]
    void *dyb;           // dtype [M, r], rows ld_dyb apart, out
    void *dA;            // A_dtype [r, K], out, may be null
    void *dB;            // B_dtype [N, r], out, may be null
    int64_t M;
    int64_t N;
    int64_t K;
    int64_t r;
    int64_t ld_dy;
    int64_t ld_xa;
    int64_t ld_dyb;
    float scaling;
    int32_t dtype;       // of dy, x, xa, dyb
    int32_t A_dtype;
    int32_t B_dtype;
    Dropout dropout;
    LinearConfig config;
};

// forward: h = gate * sigmoid(gate) * up;  backward: d_gate_up from dh; fp32 arithmetic, each result rounded once
struct SwigluParams {
    const void *gate_up;  // dtype [M, 2 N], the gate's columns first
    const void *dh;       // dtype [M, N], null in the forward
    void *out;            // dtype [M, N], or [M, 2 N] in the backward
    int64_t M;
    int64_t N;
    int32_t dtype;
    int32_t workers;      // host: threads; CUDA: thread blocks
};

// ---- CUDA: one launch computes a group, whose outputs stand side by side.

constexpr int64_t kCounters = 1 << 14;

// SMALL streams the codes once for up to 64 tokens a tile, MMA and WGMMA are tiled products with decoded fragments,
// DENSE decodes the whole weight into memory of the caller, who multiplies.
enum CudaPath : int32_t { kSmall = 0, kMma = 1, kWgmma = 2, kDense = 3 };

// How a product is cut into tiles, chosen by nf4lora/heuristics.py.
struct CudaConfig {
    int32_t path;    // CudaPath
    int32_t tokens;  // of M a tile covers; a multiple of 8
    int32_t rows;    // of the weight (forward), or columns (backward), a tile covers
    int32_t split;   // parts the reduction is cut into, summed in order; DENSE: thread blocks that decode
};

// Columns of y (N_0 of the first member, then N_1 of the second, …) and of xa (r_0, r_1, …) stand side by side.
// xa = dropout(x) A^T rounded to x's dtype, y_i = x W_i^T + bias_i + scaling_i * xa_i B_i^T
struct GroupFwdParams {
    Member member[kMaxGroup];
    const void *x;    // x_dtype [M, K]
    void *y;          // x_dtype [M, N], out; DENSE leaves it alone
    void *xa;         // x_dtype [M, r], out
    void *x_ext;      // DENSE, may be null: x_dtype [M, ld], out: columns x | xa | zeros
    void *decoded;    // DENSE: x_dtype [N, ld], out: columns W | scaling_i * B_i in member i's columns of xa, else zeros
    void *workspace;  // nf4lora_cuda_linear_fwd_workspace(p) bytes, 256-byte aligned, of any content; null for 0
    uint32_t *counters;  // kCounters zeros, which every launch leaves as zeros
    int64_t count;    // members, 1 to kMaxGroup
    int64_t M;
    int64_t N;        // sum of the members' rows
    int64_t K;
    int64_t r;        // sum of the members' r
    int64_t ld;       // DENSE: K, or where x_ext is given K + r rounded up to a multiple of 8
    int32_t x_dtype;
    int32_t bias_dtype;
    int32_t A_dtype;
    int32_t B_dtype;
    Dropout dropout;
    CudaConfig config;
};

// dx = sum over members of dy_i W_i + dropout_mask * (dyb_i A_i); dyb already carries scaling
struct GroupBwdParams {
    Member member[kMaxGroup];
    const void *dy;   // dy_dtype [M, N]
    const void *dyb;  // dy_dtype [M, r], may be null (then r = 0)
    void *dx;         // dy_dtype [M, K], out; DENSE: dropout_mask * (dyb A) where r > 0 and ld is N, else left alone
    void *decoded;    // DENSE: dy_dtype [ld, K], out: rows W | A | zeros
    void *workspace;  // nf4lora_cuda_linear_bwd_workspace(p) bytes, 256-byte aligned, of any content; null for 0
    uint32_t *counters;  // as in GroupFwdParams
    int64_t count;
    int64_t M;
    int64_t N;
    int64_t K;
    int64_t r;
    int64_t ld;       // DENSE: N, or N + r rounded up to a multiple of 8
    int32_t dy_dtype;
    int32_t A_dtype;
    Dropout dropout;
    CudaConfig config;
};

// dyb_i = scaling_i * dy_i B_i (rounded to dy's dtype);  dB_i = scaling_i * dy_i^T xa_i;  dA_i = dyb_i^T dropout(x)
struct GroupLoraBwdParams {
    Member member[kMaxGroup];
    const void *x;    // dtype [M, K], null where dA is
    const void *xa;   // dtype [M, r], null where dB is
    void *dyb;        // dtype [M, r], out
    void *dy_ext;     // may be null: dtype [M, ld], out: columns dy_0 | dy_1 | …, and where ld > N dyb and zeros
    void *dx;         // may be null: dtype [M, K], out: sum of dropout_mask * (dyb_i A_i); needs dA
    void *workspace;  // nf4lora_cuda_lora_bwd_workspace(p) bytes, 256-byte aligned, of any content; null for 0
    uint32_t *counters;  // as in GroupFwdParams
    int64_t count;
    int64_t M;
    int64_t N;
    int64_t K;
    int64_t r;
    int64_t ld;       // N, or N + r rounded up to a multiple of 8
    int32_t dtype;
    int32_t A_dtype;
    int32_t B_dtype;
    int32_t split;    // parts the reductions over M are cut into, summed in order
    Dropout dropout;
};

// ---- optimizers: every parameter in one call. Their states lie in arenas of one index space, in which each parameter has
// a range of its own.

struct OptimTensor {
    void *param;       // dtype [numel]; optim_check leaves it alone
    const void *grad;  // dtype [numel]
    int64_t numel;
    int64_t offset;    // of its first element in the arenas, a multiple of 256
    int32_t hyper;     // which OptimHyper
    int32_t slot;      // which of steps
};

struct OptimHyper {
    double lr;
    double beta1;
    double beta2;
    double eps;
    double weight_decay;
    int64_t step;  // counts this one, 1 for the first; unread where steps are given
};

struct OptimParams {
    const OptimTensor *tensors;  // [count], in the host's memory
    const OptimHyper *hypers;    // [hyper_count], in the host's memory
    void *state1;                // float32 [any], or uint8 codes of the signed dynamic map where absmax1 is given
    void *state2;                // likewise, of the unsigned map; null for kLion
    float *absmax1;              // float32, one for each 256 elements of state1; may be null
    float *absmax2;              // likewise; null together with absmax1, and for kLion
    const int32_t *steps;        // int32 [any], may be null
    const int32_t *flag;         // int32 [1]: nothing changes where it is not 0; null together with steps
    int64_t count;
    int64_t hyper_count;
    int64_t seed;                // read where stochastic
    int64_t origin;              // where the arenas begin in the index that stochastic rounding counts by, a multiple of 256
    int32_t stochastic;          // 1: rounds parameters of kBFloat16 stochastically
    int32_t dtype;               // Dtype of params and grads
    int32_t kind;                // OptimKind
    int32_t workers;             // host: threads; CUDA: thread blocks
};

// flag = whether an element of any grad is NaN or Inf; where it is not, steps[slot] + 1 for each tensor
struct OptimCheckParams {
    const OptimTensor *tensors;  // [count], in the host's memory; of which grad, numel and slot are read
    int32_t *steps;              // int32 [any], in and out
    int32_t *flag;               // int32 [1], out
    uint32_t *counters;          // CUDA: kCounters zeros, which every launch leaves as zeros
    int64_t count;
    int32_t dtype;               // Dtype of grads
    int32_t workers;             // host: threads; CUDA: thread blocks
};

}  // namespace nf4lora
