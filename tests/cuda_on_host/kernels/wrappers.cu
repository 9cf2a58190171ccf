// One kernel for each verb or intrinsic whose result is data: input buffer -> output buffer, one block. golden.py knows
// the sizes and what the manuals say each must give, and records what a card gives.
#include "ptx.cuh"

namespace nf4lora {
namespace {

constexpr int kSteps = 4;  // of 16, in the 64 columns of a wgmma tile

// ---- fragments. in: 32 rows of 16 bytes, then the row that each lane names.
template <int kMatrices, bool kTransposed>
__global__ void ldmatrix_kernel(const uint4 *in, uint32_t *out) {
    NF4LORA_SHARED(uint4, rows);
    rows[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    const uint4 *row = rows + reinterpret_cast<const uint32_t *>(in + 32)[threadIdx.x];
    uint32_t r[kMatrices];
    if constexpr (kMatrices == 1)
        kTransposed ? ldmatrix_x1_trans(r, row) : ldmatrix_x1(r, row);
    else if constexpr (kMatrices == 2)
        kTransposed ? ldmatrix_x2_trans(r, row) : ldmatrix_x2(r, row);
    else
        kTransposed ? ldmatrix_x4_trans(r, row) : ldmatrix_x4(r, row);
    for (int m = 0; m < kMatrices; ++m)
        out[threadIdx.x * kMatrices + m] = r[m];
}

// in: of each lane a[4], b[2], d[4]
template <class T>
__global__ void mma_kernel(const uint32_t *in, float *out) {
    const uint32_t *mine = in + threadIdx.x * 10;
    const uint32_t a[4] = {mine[0], mine[1], mine[2], mine[3]}, b[2] = {mine[4], mine[5]};
    float d[4];
    for (int i = 0; i < 4; ++i)
        d[i] = __uint_as_float(mine[6 + i]);
    mma_m16n8k16<T>(d, a, b);
    for (int i = 0; i < 4; ++i)
        out[threadIdx.x * 4 + i] = d[i];
}

// ---- copies. in: a piece for each lane, then a predicate for each.
template <int kBytes>
__global__ void cp_async_kernel(const char *in, char *out) {
    NF4LORA_SHARED(char, shared);
    const bool pred = reinterpret_cast<const uint32_t *>(in + 32 * kBytes)[threadIdx.x] != 0;
    cp_async<kBytes>(shared + threadIdx.x * kBytes, in + threadIdx.x * kBytes, pred);
    cp_async_commit();
    cp_async_wait<0>();
    for (int i = 0; i < kBytes; ++i)
        out[threadIdx.x * kBytes + i] = shared[threadIdx.x * kBytes + i];
}

// in: 64 rows of 128 bytes; out: the same as a swizzled tile
__global__ void bulk_copy_kernel(const char *in, uint4 *out) {
    NF4LORA_SHARED(char, tile);
    uint64_t *const landed = reinterpret_cast<uint64_t *>(tile + 8192);
    if (threadIdx.x == 0) {
        mbarrier_init(landed, 1);
        fence_mbarrier_init();
        mbarrier_arrive_expect_tx(landed, 8192);
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x * 16; i < 8192; i += 32 * 16)
        bulk_copy(tile + swizzle128(i), in + i, 16, landed);
    mbarrier_wait(landed, 0);
    for (int i = threadIdx.x; i < 512; i += 32)
        out[i] = reinterpret_cast<const uint4 *>(tile)[i];
}

// out: what tests of both parities say of a fresh barrier of two arrivals, and after each of four
__global__ void mbarrier_kernel(uint32_t *out) {
    NF4LORA_SHARED(uint64_t, b);
    mbarrier_init(b, 2);
    for (int arrivals = 0; arrivals < 5; ++arrivals) {
        out[2 * arrivals] = mbarrier_test(b, 0);
        out[2 * arrivals + 1] = mbarrier_try_wait(b, 1);
        mbarrier_arrive(b);
    }
    mbarrier_inval(b);
}

// ---- wgmma. in: A [64, 64], or of each thread a[4] for each of four steps; then B [kColumns, 64]; then a first d.
NF4LORA_DEVICE void load_tile(char *tile, const uint4 *rows, int count) {
    for (int i = threadIdx.x; i < count * 8; i += 128)
        *reinterpret_cast<uint4 *>(tile + swizzle128(i * 16)) = rows[i];
}

template <class T>
NF4LORA_DEVICE void product(float (&d)[32], uint64_t a, uint64_t b, bool accumulate) {
    wgmma_m64n64k16<T>(d, a, b, accumulate);
}
template <class T>
NF4LORA_DEVICE void product(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    wgmma_m64n64k16<T>(d, a, b, accumulate);
}
template <class T>
NF4LORA_DEVICE void product(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
    wgmma_m64n128k16<T>(d, a, b, accumulate);
}
template <class T>
NF4LORA_DEVICE void product(float (&d)[64], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    wgmma_m64n128k16<T>(d, a, b, accumulate);
}

template <class T, int kColumns, bool kFromRegisters, bool kAccumulate>
__global__ void __launch_bounds__(128) wgmma_kernel(const uint4 *in, float *out) {
    NF4LORA_SHARED(char, tile_a);
    char *const tile_b = tile_a + 8192;
    load_tile(tile_a, in, 64);
    load_tile(tile_b, in + 512, kColumns);
    fence_proxy_async();
    __syncthreads();
    const float *first = reinterpret_cast<const float *>(in + 512 + kColumns * 8) + threadIdx.x * (kColumns / 2);
    float d[kColumns / 2];
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i)
        d[i] = first[i];
    uint32_t a[kSteps][4];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
        const uint4 registers = in[threadIdx.x * kSteps + step];
        a[step][0] = registers.x, a[step][1] = registers.y, a[step][2] = registers.z, a[step][3] = registers.w;
    }
    wgmma_fence(d);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
        const uint64_t b = wgmma_descriptor(tile_b + step * 32);
        const bool accumulate = kAccumulate || step > 0;
        if constexpr (kFromRegisters)
            product<T>(d, a[step], b, accumulate);
        else
            product<T>(d, wgmma_descriptor(tile_a + step * 32), b, accumulate);
    }
    wgmma_commit();
    wgmma_wait<0>(d);
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i)
        out[threadIdx.x * (kColumns / 2) + i] = d[i];
}

// ---- warps. in: of each lane a value, then another lane's number. out: of each lane eight shuffles.
__global__ void shuffle_kernel(const uint32_t *in, uint32_t *out) {
    const uint32_t v = in[threadIdx.x], by = in[32 + threadIdx.x];
    uint32_t *mine = out + threadIdx.x * 8;
    mine[0] = __shfl_sync(~0u, v, by);
    mine[1] = __shfl_sync(~0u, v, by, 8);
    mine[2] = __shfl_up_sync(~0u, v, in[32]);
    mine[3] = __shfl_up_sync(~0u, v, 3, 8);
    mine[4] = __shfl_down_sync(~0u, v, in[32]);
    mine[5] = __shfl_down_sync(~0u, v, 5, 16);
    mine[6] = __shfl_xor_sync(~0u, v, in[32]);
    mine[7] = __shfl_xor_sync(~0u, v, 3, 4);
}

// in: a predicate for each lane. out: of each lane ballot, any and all, of all lanes and of those with its parity.
__global__ void vote_kernel(const uint32_t *in, uint32_t *out) {
    const bool predicate = in[threadIdx.x] != 0;
    uint32_t *mine = out + threadIdx.x * 6;
    mine[0] = __ballot_sync(~0u, predicate);
    mine[1] = __any_sync(~0u, predicate) != 0;
    mine[2] = __all_sync(~0u, predicate) != 0;
    const unsigned alike = threadIdx.x % 2 != 0 ? 0xaaaaaaaau : 0x55555555u;
    mine[3] = __ballot_sync(alike, predicate);
    mine[4] = __any_sync(alike, predicate) != 0;
    mine[5] = __all_sync(alike, predicate) != 0;
}

// ---- arithmetic, a thread an element
__global__ void max_magnitude_kernel(const float2 *in, float *out) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    out[i] = max_magnitude(in[i].x, in[i].y);
}

__global__ void narrow_kernel(const float *in, uint32_t *out) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    const uint32_t bf16 = __bfloat16_as_ushort(__float2bfloat16_rn(in[i]));
    const uint32_t half = __half_as_ushort(__float2half_rn(in[i]));
    out[i] = bf16 | half << 16;
}

__global__ void widen_kernel(const uint16_t *in, float2 *out) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    out[i] = make_float2(__bfloat162float(__ushort_as_bfloat16(in[i])), __half2float(__ushort_as_half(in[i])));
}

__global__ void reciprocal_kernel(const float *in, float *out) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    out[i] = __frcp_rn(in[i]);
}

__global__ void byte_perm_kernel(const uint4 *in, uint32_t *out) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    out[i] = __byte_perm(in[i].x, in[i].y, in[i].z);
}

// ---- loads and stores. in: 32 times 16 bytes, then 32 words; out: the same, a count, and the counts seen, in order
__global__ void memory_kernel(const uint4 *in, uint4 *out) {
    NF4LORA_SHARED(uint32_t, seen);
    store_stream(out + threadIdx.x, load_stream(in + threadIdx.x));
    const uint32_t *words = reinterpret_cast<const uint32_t *>(in + 32);
    uint32_t *copies = reinterpret_cast<uint32_t *>(out + 32), *count = copies + 32;
    if (threadIdx.x == 0)
        store_release(count, load_acquire(words));
    __syncthreads();
    store_stream(copies + threadIdx.x, load_stream(words + threadIdx.x));
    const uint32_t before = atomic_add_acq_rel(count, 3) - load_stream(words);
    seen[before / 3] = before;
    __syncthreads();
    count[1 + threadIdx.x] = seen[threadIdx.x];
}

constexpr int kElements = 256;  // a block of the elementwise kernels

template <class In, class Out>
const char *launch(void (*kernel)(const In *, Out *), const void *in, void *out, unsigned blocks, unsigned threads,
                   size_t shared, void *stream) {
    return NF4LORA_LAUNCH(kernel, blocks, threads, shared, stream, static_cast<const In *>(in),
                          static_cast<Out *>(out));
}

template <class T>
const char *launch_wgmma(int32_t variant, const void *in, void *out, void *stream) {
    constexpr size_t kShared64 = 16384, kShared128 = 24576;
    switch (variant) {
        case 0: return launch(wgmma_kernel<T, 64, false, true>, in, out, 1, 128, kShared64, stream);
        case 1: return launch(wgmma_kernel<T, 64, true, false>, in, out, 1, 128, kShared64, stream);
        case 2: return launch(wgmma_kernel<T, 128, false, false>, in, out, 1, 128, kShared128, stream);
        default: return launch(wgmma_kernel<T, 128, true, true>, in, out, 1, 128, kShared128, stream);
    }
}

}  // namespace
}  // namespace nf4lora

// The order of golden.py's WRAPPERS. `elements`: of the elementwise kernels, a multiple of 256.
extern "C" const char *wrapper(int32_t which, const void *in, void *out, int64_t elements, void *stream) {
    using namespace nf4lora;
    const unsigned blocks = static_cast<unsigned>(elements / kElements);
    switch (which) {
        case 0: return launch(ldmatrix_kernel<1, false>, in, out, 1, 32, 512, stream);
        case 1: return launch(ldmatrix_kernel<1, true>, in, out, 1, 32, 512, stream);
        case 2: return launch(ldmatrix_kernel<2, false>, in, out, 1, 32, 512, stream);
        case 3: return launch(ldmatrix_kernel<2, true>, in, out, 1, 32, 512, stream);
        case 4: return launch(ldmatrix_kernel<4, false>, in, out, 1, 32, 512, stream);
        case 5: return launch(ldmatrix_kernel<4, true>, in, out, 1, 32, 512, stream);
        case 6: return launch(mma_kernel<__nv_bfloat16>, in, out, 1, 32, 0, stream);
        case 7: return launch(mma_kernel<__half>, in, out, 1, 32, 0, stream);
        case 8: return launch(cp_async_kernel<4>, in, out, 1, 32, 32 * 4, stream);
        case 9: return launch(cp_async_kernel<8>, in, out, 1, 32, 32 * 8, stream);
        case 10: return launch(cp_async_kernel<16>, in, out, 1, 32, 32 * 16, stream);
        case 11: return launch(bulk_copy_kernel, in, out, 1, 32, 8192 + 8, stream);
        case 12: return NF4LORA_LAUNCH(mbarrier_kernel, 1, 1, 8, stream, static_cast<uint32_t *>(out));
        case 13: case 14: case 15: case 16: return launch_wgmma<__nv_bfloat16>(which - 13, in, out, stream);
        case 17: case 18: case 19: case 20: return launch_wgmma<__half>(which - 17, in, out, stream);
        case 21: return launch(shuffle_kernel, in, out, 1, 32, 0, stream);
        case 22: return launch(vote_kernel, in, out, 1, 32, 0, stream);
        case 23: return launch(max_magnitude_kernel, in, out, blocks, kElements, 0, stream);
        case 24: return launch(narrow_kernel, in, out, blocks, kElements, 0, stream);
        case 25: return launch(widen_kernel, in, out, blocks, kElements, 0, stream);
        case 26: return launch(reciprocal_kernel, in, out, blocks, kElements, 0, stream);
        case 27: return launch(byte_perm_kernel, in, out, blocks, kElements, 0, stream);
        case 28: return launch(memory_kernel, in, out, 1, 32, 32 * 4, stream);
        default: return "no such wrapper";
    }
}
