// C = A B^T + bias with tensor cores of sm_80: A [M, K], B [N, K] or (transposed) [K, N], bias fp32 [N], C [M, N].
// A and B are bf16 or fp16, sums are fp32, C is fp32 or rounded once to A's type. Rows of A and B are a multiple of 8
// elements.
// Grid: (ceil(N / 64), ceil(M / 64)), 128 threads; shared memory: kSharedBytes. Two stages of cp.async, swizzled tiles.
#include "ptx.cuh"

namespace nf4lora {
namespace {

constexpr int kTile = 64;         // rows of A, columns of C and reduction steps of a tile: 128 bytes a row
constexpr int kThreads = 128;     // 2 x 2 warps of 32 x 32
constexpr int kTileBytes = kTile * kTile * 2;
constexpr int kPiece = 8;         // elements of one 16-byte copy
constexpr size_t kSharedBytes = 4 * kTileBytes + kTile * sizeof(float);

struct Operand {
    const void *p;  // [rows, columns], row-major
    int64_t rows, columns;
};

// Starts the copy of a tile; what lies outside of the operand is zero.
NF4LORA_DEVICE void load_tile(char *tile, Operand from, int64_t row0, int64_t column0) {
    for (int i = threadIdx.x; i < kTile * kTile / kPiece; i += kThreads) {
        const int row = i / (kTile / kPiece), column = i % (kTile / kPiece) * kPiece;
        const bool inside = row0 + row < from.rows && column0 + column < from.columns;
        const int64_t at = inside ? (row0 + row) * from.columns + column0 + column : 0;
        cp_async<16>(tile + swizzle128(row * 128 + column * 2), static_cast<const uint16_t *>(from.p) + at, inside);
    }
}

NF4LORA_DEVICE const char *at(const char *tile, int row, int column) {
    return tile + swizzle128(row * 128 + column * 2);
}

NF4LORA_DEVICE void store(float *p, float v) { *p = v; }
NF4LORA_DEVICE void store(__nv_bfloat16 *p, float v) { *p = __float2bfloat16_rn(v); }
NF4LORA_DEVICE void store(__half *p, float v) { *p = __float2half_rn(v); }

template <class T, class Out, bool kTransposed>
__global__ void __launch_bounds__(kThreads) gemm_kernel(const T *a, const T *b, const float *bias, Out *c, int64_t M,
                                                        int64_t N, int64_t K) {
    NF4LORA_SHARED(char, shared);
    char *const tiles_a = shared, *const tiles_b = shared + 2 * kTileBytes;  // of two stages
    float *const tile_bias = reinterpret_cast<float *>(shared + 4 * kTileBytes);
    const int64_t m0 = int64_t(blockIdx.y) * kTile, n0 = int64_t(blockIdx.x) * kTile;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int warp_m = warp % 2 * 32, warp_n = warp / 2 * 32;
    const Operand operand_a{a, M, K}, operand_b{b, kTransposed ? K : N, kTransposed ? N : K};

    const auto load = [&](int64_t step) {
        const int64_t k0 = step * kTile;
        load_tile(tiles_a + step % 2 * kTileBytes, operand_a, m0, k0);
        load_tile(tiles_b + step % 2 * kTileBytes, operand_b, kTransposed ? k0 : n0, kTransposed ? n0 : k0);
    };

    const int64_t steps = (K + kTile - 1) / kTile;
    if (threadIdx.x < kTile)
        cp_async<4>(tile_bias + threadIdx.x, bias + n0 + threadIdx.x, n0 + threadIdx.x < N);
    load(0);
    cp_async_commit();

    float sum[2][4][4] = {};
    for (int64_t step = 0; step < steps; ++step) {
        if (step + 1 < steps)
            load(step + 1);
        cp_async_commit();  // empty after the last tile, so that one group may always be under way
        cp_async_wait<1>();
        __syncthreads();  // everyone's copies of this step have landed
        const char *ta = tiles_a + step % 2 * kTileBytes, *tb = tiles_b + step % 2 * kTileBytes;
#pragma unroll
        for (int k = 0; k < kTile; k += 16) {
            uint32_t fa[2][4], fb[4][2];
#pragma unroll
            for (int i = 0; i < 2; ++i)
                ldmatrix_x4(fa[i], at(ta, warp_m + i * 16 + lane % 16, k + lane / 16 * 8));
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if constexpr (kTransposed)
                    ldmatrix_x2_trans(fb[j], at(tb, k + lane % 16, warp_n + j * 8));
                else
                    ldmatrix_x2(fb[j], at(tb, warp_n + j * 8 + lane % 8, k + lane / 8 % 2 * 8));
            }
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    mma_m16n8k16<T>(sum[i][j], fa[i], fb[j]);
        }
        __syncthreads();  // the next step's copies overwrite this tile
    }

#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int row = warp_m + i * 16 + lane / 4 + e / 2 * 8, column = warp_n + j * 8 + lane % 4 * 2 + e % 2;
                if (m0 + row < M && n0 + column < N)
                    store(c + (m0 + row) * N + n0 + column, sum[i][j][e] + tile_bias[column]);
            }
}

template <class T, class Out>
const char *gemm(const void *a, const void *b, const float *bias, void *c, int64_t M, int64_t N, int64_t K,
                 int32_t transposed, void *stream) {
    const dim3 grid(static_cast<unsigned>((N + kTile - 1) / kTile), static_cast<unsigned>((M + kTile - 1) / kTile));
    const T *ta = static_cast<const T *>(a), *tb = static_cast<const T *>(b);
    Out *out = static_cast<Out *>(c);
    const auto kernel = transposed != 0 ? gemm_kernel<T, Out, true> : gemm_kernel<T, Out, false>;
    return NF4LORA_LAUNCH(kernel, grid, kThreads, kSharedBytes, stream, ta, tb, bias, out, M, N, K);
}

}  // namespace
}  // namespace nf4lora

extern "C" const char *gemm_mma(const void *a, const void *b, const float *bias, void *c, int64_t M, int64_t N,
                                int64_t K, int32_t half, int32_t round_output, int32_t transposed, void *stream) {
    using namespace nf4lora;
    const auto run = half != 0 ? (round_output != 0 ? gemm<__half, __half> : gemm<__half, float>)
                               : (round_output != 0 ? gemm<__nv_bfloat16, __nv_bfloat16> : gemm<__nv_bfloat16, float>);
    return run(a, b, bias, c, M, N, K, transposed, stream);
}
