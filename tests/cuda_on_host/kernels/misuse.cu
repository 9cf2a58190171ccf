// What the verbs refuse on the CPU, one misuse a case; test_ptx_verbs.py knows what each must say. Not for a card.
#include "ptx.cuh"

namespace nf4lora {
namespace {

enum Misuse {
    kLdmatrixMisaligned,
    kLdmatrixOutside,
    kLdmatrixPartialWarp,
    kMmaPartialWarp,
    kMmaInBranch,
    kCopyMisalignedShared,
    kCopyMisalignedGlobal,
    kCopyOutside,
    kBulkMisaligned,
    kBulkSize,
    kBulkWithoutBarrier,
    kWgmmaPartialGroup,
    kWgmmaOutside,
    kWgmmaMisaligned,
    kWgmmaNoSwizzle,
    kWgmmaInFlight,
    kBulkInFlight,
};

__global__ void misuse_kernel(int32_t which, const char *global, float *out) {
    NF4LORA_SHARED(char, shared);
    uint64_t *const barrier = reinterpret_cast<uint64_t *>(shared + 16384);
    uint32_t a[4] = {0, 0, 0, 0}, b[2] = {0, 0};
    float d[4] = {0, 0, 0, 0}, sum[32] = {};
    if (threadIdx.x == 0)
        mbarrier_init(barrier, 1);
    for (int i = threadIdx.x; i < 16384 / 4; i += blockDim.x)
        reinterpret_cast<uint32_t *>(shared)[i] = 0;
    __syncthreads();
    if (which == kLdmatrixMisaligned)
        ldmatrix_x4(a, shared + threadIdx.x * 16 + 8);
    if (which == kLdmatrixOutside)
        ldmatrix_x2(b, shared + 16384 + threadIdx.x * 16);
    if (which == kLdmatrixPartialWarp)
        ldmatrix_x4(a, shared);
    if (which == kMmaPartialWarp)
        mma_m16n8k16<__half>(d, a, b);
    if (which == kMmaInBranch) {
        if (threadIdx.x < 16)
            mma_m16n8k16<__half>(d, a, b);
        else
            __syncthreads();
    }
    if (which == kCopyMisalignedShared)
        cp_async<16>(shared + 8, global);
    if (which == kCopyMisalignedGlobal)
        cp_async<8>(shared, global + 4);
    if (which == kCopyOutside)
        cp_async<16>(shared + (1 << 20), global);
    if (which == kBulkMisaligned && threadIdx.x == 0)
        bulk_copy(shared + 8, global, 16, barrier);
    if (which == kBulkSize && threadIdx.x == 0)
        bulk_copy(shared, global, 24, barrier);
    if (which == kBulkWithoutBarrier && threadIdx.x == 0)
        bulk_copy(shared, global, 16, barrier + 1);
    if (which == kBulkInFlight && threadIdx.x == 0) {
        mbarrier_arrive_expect_tx(barrier, 16);
        bulk_copy(shared, global, 16, barrier);
    }
    if (which >= kWgmmaPartialGroup && which <= kWgmmaInFlight) {
        const uint64_t good = wgmma_descriptor(shared);
        const uint64_t tile = which == kWgmmaOutside      ? wgmma_descriptor(shared + 15360)
                              : which == kWgmmaMisaligned ? wgmma_descriptor(shared + 128)
                              : which == kWgmmaNoSwizzle  ? good & ~(uint64_t(3) << 62)
                                                          : good;
        wgmma_fence(sum);
        wgmma_m64n64k16<__half>(sum, tile, good);
        wgmma_commit();
        if (which != kWgmmaInFlight)
            wgmma_wait<0>(sum);
    }
    out[threadIdx.x] = d[0] + sum[0] + static_cast<float>(a[0] + b[0]);
}

}  // namespace
}  // namespace nf4lora

extern "C" const char *misuse(int32_t which, const void *global, float *out, int32_t threads, void *stream) {
    return NF4LORA_LAUNCH(nf4lora::misuse_kernel, 1, threads, 16384 + 16, stream, which,
                          static_cast<const char *>(global), out);
}
