// Small kernels on int32 [numel], any numel: shuffles, votes, atomics, exchange within a warp, named barriers.
//   reduce_summary: sum, maximum and negatives of all values, how many have each value of their low four bits, and in
//     how many runs of 32 of a block's share some value is less than the one before it
//   reduce_reverse: y = x with each run of 32 reversed (the last run as long as it is)
//   reduce_handoff: y = 2 x + 1, by two warps that load and two that store
#include "ptx.cuh"

namespace nf4lora {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kBins = 16;
constexpr int kHalf = kThreads / 2;
constexpr unsigned kAllLanes = ~0u;
// Named barriers of reduce_handoff, two of each
constexpr int kFull = 1, kEmpty = 3;

struct Summary {
    int32_t sum, maximum, negatives, falling, bins[kBins];
};

struct Partial {
    int32_t sum, maximum, negatives, falling;
};

NF4LORA_DEVICE Partial combined(Partial mine, unsigned lanes, int count) {
    for (int step = count / 2; step > 0; step /= 2) {
        mine.sum += __shfl_xor_sync(lanes, mine.sum, step);
        const int other = __shfl_xor_sync(lanes, mine.maximum, step);
        mine.maximum = other > mine.maximum ? other : mine.maximum;
    }
    return mine;
}

// Each block takes an equal share of the values.
__global__ void __launch_bounds__(kThreads) summary_kernel(const int32_t *x, Summary *summary, int64_t numel) {
    NF4LORA_SHARED(int32_t, bins);
    Partial *const partials = reinterpret_cast<Partial *>(bins + kBins);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (threadIdx.x < kBins)
        bins[threadIdx.x] = 0;
    __syncthreads();

    const int64_t begin = numel * blockIdx.x / gridDim.x, end = numel * (blockIdx.x + 1) / gridDim.x;
    Partial mine{0, INT32_MIN, 0, 0};
    for (int64_t i = begin + warp * 32; i < end; i += kThreads) {
        const bool inside = i + lane < end;
        const int32_t v = inside ? x[i + lane] : 0;
        const unsigned negative = __ballot_sync(kAllLanes, inside && v < 0);
        mine.negatives += __popc(negative);
        const int32_t before = __shfl_up_sync(kAllLanes, v, 1);
        mine.falling += !__all_sync(kAllLanes, !inside || lane == 0 || before <= v);
        if (!inside)
            continue;
        mine.sum += v;
        mine.maximum = v > mine.maximum ? v : mine.maximum;
        atomicAdd(bins + (v & (kBins - 1)), 1);
    }
    mine = combined(mine, kAllLanes, 32);
    if (lane == 0)
        partials[warp] = mine;
    __syncthreads();

    if (threadIdx.x < kBins && bins[threadIdx.x] != 0)
        atomicAdd(summary->bins + threadIdx.x, bins[threadIdx.x]);
    if (threadIdx.x < kWarps) {
        mine = combined(partials[threadIdx.x], (1u << kWarps) - 1, kWarps);
        atomicAdd(&summary->negatives, partials[threadIdx.x].negatives);
        atomicAdd(&summary->falling, partials[threadIdx.x].falling);
        if (threadIdx.x == 0) {
            atomicAdd(&summary->sum, mine.sum);
            atomicMax(&summary->maximum, mine.maximum);
        }
    }
}

__global__ void __launch_bounds__(kThreads) reverse_kernel(const int32_t *x, int32_t *y, int64_t numel) {
    NF4LORA_SHARED(int32_t, shared);
    const int lane = threadIdx.x % 32;
    int32_t *const mine = shared + threadIdx.x - lane;
    const int64_t runs = (numel + 31) / 32;
    const int64_t stride = int64_t(gridDim.x) * kWarps;
    for (int64_t run = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; run < runs; run += stride) {
        const int length = numel - run * 32 < 32 ? static_cast<int>(numel - run * 32) : 32;
        if (lane < length)
            mine[lane] = x[run * 32 + lane];
        __syncwarp();
        if (lane < length)
            y[run * 32 + lane] = mine[length - 1 - lane];
        __syncwarp();
    }
}

__global__ void __launch_bounds__(kThreads) handoff_kernel(const int32_t *x, int32_t *y, int64_t numel) {
    NF4LORA_SHARED(int32_t, buffers);
    const int thread = threadIdx.x % kHalf;
    const int64_t rounds = (numel + kHalf - 1) / kHalf;
    if (threadIdx.x < kHalf) {
        for (int64_t round = 0; round < rounds; ++round) {
            const int b = round % 2;
            if (round >= 2)
                bar_sync(kEmpty + b, kThreads);
            const int64_t i = round * kHalf + thread;
            buffers[b * kHalf + thread] = i < numel ? x[i] : 0;
            bar_arrive(kFull + b, kThreads);
        }
        return;
    }
    for (int64_t round = 0; round < rounds; ++round) {
        const int b = round % 2;
        bar_sync(kFull + b, kThreads);
        const int slot = kHalf - 1 - thread;  // another thread's
        const int64_t i = round * kHalf + slot;
        const int32_t v = buffers[b * kHalf + slot];
        if (round + 2 < rounds)
            bar_arrive(kEmpty + b, kThreads);
        if (i < numel)
            y[i] = 2 * v + 1;
    }
}

}  // namespace
}  // namespace nf4lora

extern "C" const char *reduce_summary(const int32_t *x, void *summary, int64_t numel, int32_t blocks, void *stream) {
    using namespace nf4lora;
    constexpr size_t kShared = kBins * sizeof(int32_t) + kWarps * sizeof(Partial);
    return NF4LORA_LAUNCH(summary_kernel, blocks, kThreads, kShared, stream, x, static_cast<Summary *>(summary), numel);
}

extern "C" const char *reduce_reverse(const int32_t *x, int32_t *y, int64_t numel, int32_t blocks, void *stream) {
    using namespace nf4lora;
    return NF4LORA_LAUNCH(reverse_kernel, blocks, kThreads, kThreads * sizeof(int32_t), stream, x, y, numel);
}

extern "C" const char *reduce_handoff(const int32_t *x, int32_t *y, int64_t numel, void *stream) {
    using namespace nf4lora;
    return NF4LORA_LAUNCH(handoff_kernel, 1, kThreads, 2 * kHalf * sizeof(int32_t), stream, x, y, numel);
}
