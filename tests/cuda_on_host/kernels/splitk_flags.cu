// y[n] = sum over k of x[k] w[k, n], the reduction split over blocks; fp32, w [K, N]. Two ways to add up the parts:
//   splitk_ordered: block s waits for block s - 1 of its columns, so that y is summed in one order without a workspace
//   splitk_last_arriver: parts go to workspace [splits, N]; the block that comes last adds them up, in order
// Grid: (ceil(N / 64), splits), 64 threads. flags: uint32 [ceil(N / 64)], zero before the launch and after it.
// splitk_ordered needs all its blocks on the card at once.
#include "ptx.cuh"

namespace nf4lora {
namespace {

constexpr int kThreads = 64;

// The part of one column that split s of `splits` covers.
NF4LORA_DEVICE float part_of(const float *x, const float *w, int64_t column, int64_t N, int64_t K, int64_t s,
                             int64_t splits) {
    float sum = 0.0f;
    if (column < N)
        for (int64_t k = K * s / splits; k < K * (s + 1) / splits; ++k)
            sum += x[k] * w[k * N + column];
    return sum;
}

__global__ void __launch_bounds__(kThreads) ordered_kernel(const float *x, const float *w, float *y, uint32_t *flags,
                                                           int64_t N, int64_t K) {
    const int64_t column = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    const uint32_t split = blockIdx.y, splits = gridDim.y;
    const float part = part_of(x, w, column, N, K, split, splits);
    if (threadIdx.x == 0)
        wait_acquire(flags + blockIdx.x, split);
    __syncthreads();  // what thread 0 has acquired, all have
    if (column < N)
        y[column] = split == 0 ? part : y[column] + part;
    __syncthreads();  // all have stored before thread 0 releases
    if (threadIdx.x == 0)
        store_release(flags + blockIdx.x, split + 1 < splits ? split + 1 : 0);
}

__global__ void __launch_bounds__(kThreads) last_arriver_kernel(const float *x, const float *w, float *y,
                                                                float *workspace, uint32_t *flags, int64_t N,
                                                                int64_t K) {
    NF4LORA_SHARED(uint32_t, arrived_before);
    const int64_t column = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    const uint32_t split = blockIdx.y, splits = gridDim.y;
    const float part = part_of(x, w, column, N, K, split, splits);
    if (column < N)
        workspace[split * N + column] = part;
    __syncthreads();
    if (threadIdx.x == 0)
        *arrived_before = atomic_add_acq_rel(flags + blockIdx.x, 1);
    __syncthreads();
    if (*arrived_before + 1 < splits)
        return;
    float sum = 0.0f;
    for (uint32_t s = 0; s < splits && column < N; ++s)
        sum += workspace[s * N + column];
    if (column < N)
        y[column] = sum;
    if (threadIdx.x == 0)
        store_release(flags + blockIdx.x, 0);
}

}  // namespace
}  // namespace nf4lora

extern "C" const char *splitk_ordered(const float *x, const float *w, float *y, uint32_t *flags, int64_t N, int64_t K,
                                      int32_t splits, void *stream) {
    using namespace nf4lora;
    const dim3 grid(static_cast<unsigned>((N + kThreads - 1) / kThreads), splits);
    return NF4LORA_LAUNCH(ordered_kernel, grid, kThreads, 0, stream, x, w, y, flags, N, K);
}

extern "C" const char *splitk_last_arriver(const float *x, const float *w, float *y, float *workspace, uint32_t *flags,
                                           int64_t N, int64_t K, int32_t splits, void *stream) {
    using namespace nf4lora;
    const dim3 grid(static_cast<unsigned>((N + kThreads - 1) / kThreads), splits);
    return NF4LORA_LAUNCH(last_arriver_kernel, grid, kThreads, sizeof(uint32_t), stream, x, w, y, workspace, flags, N,
                          K);
}
