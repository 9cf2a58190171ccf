// Products with 4-bit codes on sm_90a: one producer warp (bulk copies), one consumer warpgroup (wgmma), a ring between.
//   gemm_wgmma_ss: y[m, n] = sum over k of x[m, k] w[n, k], W decoded into shared memory
//   gemm_wgmma_rs: the same transposed, W decoded into registers: y^T = W x^T
// x is bf16 [M, K] stored as tiles [ceil(M / 64)][K / 64][64 x 64], each as swizzle128 has it in shared memory, zeros
// beyond M; w is [N, K] codes of value + 8, two a byte, the even element in the high nibble; y is fp32 [M, N]. K is a
// multiple of 64.
// Grid: (ceil(N / 64), ceil(M / 64)), 160 threads; shared memory: kSharedBytes.
#include "ptx.cuh"

namespace nf4lora {
namespace {

constexpr int kTile = 64;
constexpr int kTileBytes = kTile * kTile * 2;
constexpr int kCodeBytes = kTile * kTile / 2;
constexpr int kRowBytes = kTile / 2;  // of codes
constexpr int kStages = 3;
constexpr int kConsumers = 128;
constexpr int kThreads = kConsumers + 32;
constexpr int kConsumersMet = 1;  // named barrier

struct Shared {
    char x[kStages][kTileBytes];
    char w[2][kTileBytes];  // decoded; the product of one is under way while the other is made
    uint8_t codes[kStages][kCodeBytes];
    uint64_t full[kStages], empty[kStages];
};
constexpr size_t kSharedBytes = sizeof(Shared);
static_assert(kTileBytes % 1024 == 0, "every tile starts where the swizzle pattern does");

// bf16 of code - 8, two of them, the even element in the low half: 128 + code exactly, then the subtraction.
NF4LORA_DEVICE uint32_t decode_pair(uint32_t even, uint32_t odd) {
    __nv_bfloat162_raw shifted;  // 0x4300 is 128, and the last bit of its mantissa is worth 1
    shifted.x = static_cast<unsigned short>(0x4300u | even);
    shifted.y = static_cast<unsigned short>(0x4300u | odd);
    const __nv_bfloat162 pair = __hsub2(shifted, __floats2bfloat162_rn(136.0f, 136.0f));
    uint32_t bits;
    memcpy(&bits, &pair, sizeof bits);
    return bits;
}

// The producer's only lane keeps the ring full; rows of codes beyond N are left alone.
NF4LORA_DEVICE void produce(Shared *shared, const char *x_tiles, const uint8_t *w, int64_t n0, int64_t rows,
                            int64_t steps) {
    for (int64_t step = 0; step < steps; ++step) {
        const int stage = step % kStages;
        if (step >= kStages)
            mbarrier_wait(shared->empty + stage, (step / kStages - 1) % 2);
        mbarrier_arrive_expect_tx(shared->full + stage, kTileBytes + static_cast<uint32_t>(rows) * kRowBytes);
        bulk_copy(shared->x[stage], x_tiles + step * kTileBytes, kTileBytes, shared->full + stage);
        for (int64_t row = 0; row < rows; ++row)
            bulk_copy(shared->codes[stage] + row * kRowBytes, w + ((n0 + row) * steps + step) * kRowBytes, kRowBytes,
                      shared->full + stage);
    }
}

NF4LORA_DEVICE void start_ring(Shared *shared) {
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < kStages; ++stage) {
            mbarrier_init(shared->full + stage, 1);
            mbarrier_init(shared->empty + stage, kConsumers);
        }
        fence_mbarrier_init();
    }
    __syncthreads();
}

NF4LORA_DEVICE void end_ring(Shared *shared) {
    __syncthreads();
    if (threadIdx.x == 0)
        for (int stage = 0; stage < kStages; ++stage) {
            mbarrier_inval(shared->full + stage);
            mbarrier_inval(shared->empty + stage);
        }
}

// Two threads a row: each 16 bytes of codes to 32 values.
NF4LORA_DEVICE void decode_tile(char *tile, const uint8_t *codes, int64_t rows) {
    const int row = threadIdx.x / 2, half = threadIdx.x % 2;
    for (int piece = 0; piece < 4; ++piece) {
        uint32_t word = 0x88888888u;  // beyond N: zeros
        if (row < rows)
            word = *reinterpret_cast<const uint32_t *>(codes + row * kRowBytes + half * 16 + piece * 4);
        uint4 values;
        values.x = decode_pair(word >> 4 & 15, word & 15);
        values.y = decode_pair(word >> 12 & 15, word >> 8 & 15);
        values.z = decode_pair(word >> 20 & 15, word >> 16 & 15);
        values.w = decode_pair(word >> 28 & 15, word >> 24 & 15);
        *reinterpret_cast<uint4 *>(tile + swizzle128(row * 128 + half * 64 + piece * 16)) = values;
    }
}

__global__ void __launch_bounds__(kThreads) ss_kernel(const char *x_tiles, const uint8_t *w, float *y, int64_t M,
                                                      int64_t N, int64_t steps) {
    NF4LORA_SHARED(Shared, shared);
    const int64_t m0 = int64_t(blockIdx.y) * kTile, n0 = int64_t(blockIdx.x) * kTile;
    const int64_t rows = N - n0 < kTile ? N - n0 : kTile;
    start_ring(shared);
    if (threadIdx.x >= kConsumers) {
        if (threadIdx.x == kConsumers)
            produce(shared, x_tiles + blockIdx.y * steps * kTileBytes, w, n0, rows, steps);
    } else {
        float sum[32] = {};
        for (int64_t step = 0; step < steps; ++step) {
            const int stage = step % kStages;
            char *decoded = shared->w[step % 2];
            mbarrier_wait(shared->full + stage, step / kStages % 2);
            decode_tile(decoded, shared->codes[stage], rows);
            fence_proxy_async();
            bar_sync(kConsumersMet, kConsumers);
            wgmma_fence(sum);
#pragma unroll
            for (int k = 0; k < kTile; k += 16)
                wgmma_m64n64k16<__nv_bfloat16>(sum, wgmma_descriptor(shared->x[stage] + k * 2),
                                               wgmma_descriptor(decoded + k * 2));
            wgmma_commit();
            wgmma_wait<0>(sum);
            mbarrier_arrive(shared->empty + stage);
        }
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        for (int i = 0; i < 32; ++i) {
            const int64_t row = m0 + warp * 16 + lane / 4 + i % 4 / 2 * 8;
            const int64_t column = n0 + i / 4 * 8 + lane % 4 * 2 + i % 2;
            if (row < M && column < N)
                y[row * N + column] = sum[i];
        }
    }
    end_ring(shared);
}

// This lane's fragment of 16 steps: rows g and g + 8, columns t, t + 1 and t + 8, t + 9 (mma_m16n8k16 in ptx.cuh).
NF4LORA_DEVICE void decode_fragment(uint32_t (&a)[4], const uint8_t *codes, int row, int k, int64_t rows) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int r = row + i % 2 * 8;
        const uint32_t byte = r < rows ? codes[r * kRowBytes + (k + i / 2 * 8) / 2] : 0x88u;
        a[i] = decode_pair(byte >> 4, byte & 15);
    }
}

__global__ void __launch_bounds__(kThreads) rs_kernel(const char *x_tiles, const uint8_t *w, float *y, int64_t M,
                                                      int64_t N, int64_t steps) {
    NF4LORA_SHARED(Shared, shared);
    const int64_t m0 = int64_t(blockIdx.y) * kTile, n0 = int64_t(blockIdx.x) * kTile;
    const int64_t rows = N - n0 < kTile ? N - n0 : kTile;
    start_ring(shared);
    if (threadIdx.x >= kConsumers) {
        if (threadIdx.x == kConsumers)
            produce(shared, x_tiles + blockIdx.y * steps * kTileBytes, w, n0, rows, steps);
    } else {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        float sum[32];
        for (int64_t step = 0; step < steps; ++step) {
            const int stage = step % kStages;
            while (!mbarrier_try_wait(shared->full + stage, step / kStages % 2)) {
            }
            uint32_t a[4][4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
                decode_fragment(a[i], shared->codes[stage], warp * 16 + lane / 4, i * 16 + lane % 4 * 2, rows);
            wgmma_fence(sum);
#pragma unroll
            for (int i = 0; i < 4; ++i)
                wgmma_m64n64k16<__nv_bfloat16>(sum, a[i], wgmma_descriptor(shared->x[stage] + i * 32),
                                               step > 0 || i > 0);
            wgmma_commit();
            wgmma_wait<0>(sum);
            mbarrier_arrive(shared->empty + stage);
        }
        for (int i = 0; i < 32; ++i) {
            const int64_t column = n0 + warp * 16 + lane / 4 + i % 4 / 2 * 8;
            const int64_t row = m0 + i / 4 * 8 + lane % 4 * 2 + i % 2;
            if (row < M && column < N)
                y[row * N + column] = sum[i];
        }
    }
    end_ring(shared);
}

}  // namespace
}  // namespace nf4lora

extern "C" const char *gemm_wgmma(const void *x_tiles, const uint8_t *w, float *y, int64_t M, int64_t N, int64_t K,
                                  int32_t from_registers, void *stream) {
    using namespace nf4lora;
    const dim3 grid(static_cast<unsigned>((N + kTile - 1) / kTile), static_cast<unsigned>((M + kTile - 1) / kTile));
    const auto kernel = from_registers != 0 ? rs_kernel : ss_kernel;
    return NF4LORA_LAUNCH(kernel, grid, kThreads, kSharedBytes, stream, static_cast<const char *>(x_tiles), w, y, M, N,
                          K / kTile);
}
