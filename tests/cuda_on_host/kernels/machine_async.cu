// Asynchronous copies, mbarriers, bulk copies and named barriers.
#include "machine_entry.cuh"

using namespace nf4lora;

constexpr int kVector = 4;  // ints of 16 bytes

// Each thread copies its own 16 bytes, n tiles through two stages, and reads its neighbour's.
__global__ void two_stages(int *out, const int *in, int n) {
    NF4LORA_SHARED(int, stages);
    const int me = threadIdx.x, threads = blockDim.x, tile = threads * kVector;
    auto load = [&](int t) {
        cp_async<16>(stages + t % 2 * tile + me * kVector, in + t * tile + me * kVector, t < n);
        cp_async_commit();
    };
    load(0);
    for (int t = 0; t < n; ++t) {
        load(t + 1);
        cp_async_wait<1>();
        __syncthreads();
        for (int i = 0; i < kVector; ++i)
            out[t * tile + me * kVector + i] = stages[t % 2 * tile + (me ^ 1) * kVector + i];
        __syncthreads();
    }
    cp_async_wait<0>();
}
MACHINE_ENTRY(two_stages, int)

// n: what is wrong. 0 nothing, 1 no wait, 2 a wait for the first of two groups only, 3 in flight at the end, 4
// misaligned, 5 past the end of shared memory (which the launch makes too small), 6 a group that is not committed is
// not waited for
__global__ void copy_errors(int *out, const int *in, int n) {
    NF4LORA_SHARED(int, tile);
    const int me = threadIdx.x, second = blockDim.x * kVector;
    cp_async<16>(tile + me * kVector, in + me * kVector + (n == 4));
    if (n != 6)
        cp_async_commit();
    cp_async<16>(tile + second + me * kVector, in + second + me * kVector);
    if (n != 6)
        cp_async_commit();
    if (n == 0 || n == 4 || n == 5 || n == 6)
        cp_async_wait<0>();
    if (n == 2)
        cp_async_wait<1>();
    out[me] = tile[me * kVector];
    out[blockDim.x + me] = tile[second + me * kVector];
    if (n == 1 || n == 2)
        cp_async_wait<0>();
}
MACHINE_ENTRY(copy_errors, int)

// Warp 0 fills a ring of two stages with bulk copies, the other warps add up what lands. n tiles of 256 ints; in[0] is
// the bug: 0 none, 1 the producer does not wait for a free stage, 2 the consumers do not wait for a full one.
constexpr int kTile = 256, kStages = 2;
__global__ void ring(int *out, const int *in, int n) {
    NF4LORA_SHARED(int, tiles);
    uint64_t *full = reinterpret_cast<uint64_t *>(tiles + kStages * kTile), *free = full + kStages;
    const int bug = in[0], me = threadIdx.x, consumers = blockDim.x - 32;
    if (bug)  // what a missing wait reads has been written then, though not in order
        for (int i = me; i < kStages * kTile; i += blockDim.x)
            tiles[i] = 0;
    const int *tile_of_block = in + kVector + blockIdx.x * n * kTile;
    if (me == 0) {
        for (int s = 0; s < kStages; ++s) {
            mbarrier_init(full + s, 1);
            mbarrier_init(free + s, consumers);
        }
        fence_mbarrier_init();
    }
    __syncthreads();
    if (me == 0) {
        for (int t = 0; t < n; ++t) {
            const int s = t % kStages;
            if (t >= kStages && bug != 1)
                mbarrier_wait(free + s, (t / kStages - 1) & 1);
            mbarrier_arrive_expect_tx(full + s, kTile * sizeof(int));
            bulk_copy(tiles + s * kTile, tile_of_block + t * kTile, kTile * sizeof(int), full + s);
        }
    } else if (me >= 32) {
        int sum = 0;
        for (int t = 0; t < n; ++t) {
            const int s = t % kStages;
            if (bug != 2)
                mbarrier_wait(full + s, (t / kStages) & 1);
            for (int i = me - 32; i < kTile; i += consumers)
                sum += tiles[s * kTile + i];
            mbarrier_arrive(free + s);
        }
        out[blockIdx.x * consumers + me - 32] = sum;
    }
}
MACHINE_ENTRY(ring, int)

// n: 1 too many arrivals, 2 not initialised, 3 waits for ever, 4 a bulk copy in flight at the end, 5 misaligned, 6 not
// a multiple of 16 bytes, 7 used after invalidation, 8 outside shared memory, 9 lands on an mbarrier that was
// invalidated
__global__ void mbarrier_errors(int *out, const int *in, int n) {
    NF4LORA_SHARED(int, tile);
    uint64_t *b = reinterpret_cast<uint64_t *>(tile + kTile);
    if (n == 8)
        mbarrier_init(reinterpret_cast<uint64_t *>(out), 1);
    if (n != 2)
        mbarrier_init(b, 2);
    if (n == 7)
        mbarrier_inval(b);
    mbarrier_arrive(b);
    if (n == 3)
        mbarrier_wait(b, 0);
    if (n == 1)
        mbarrier_arrive_expect_tx(b, 16), mbarrier_arrive(b);
    bulk_copy(tile + (n == 5), in, n == 6 ? 24 : 16, b);
    if (n == 9)
        mbarrier_inval(b), __nanosleep(1);
    if (n == 4)
        return;
    mbarrier_arrive_expect_tx(b, 16);
    mbarrier_wait(b, 0);
    out[0] = tile[0];
}
MACHINE_ENTRY(mbarrier_errors, int)

// Warps 0 and 1 hand a buffer to and fro: full is barrier 1, free is barrier 2. n rounds.
__global__ void handed_over(int *out, const int *in, int n) {
    NF4LORA_SHARED(int, buffer);
    const int me = threadIdx.x % 32;
    for (int round = 0; round < n; ++round)
        if (threadIdx.x < 32) {
            if (round)
                bar_sync(2, 64);
            buffer[me] = in[round * 32 + me];
            bar_arrive(1, 64);
        } else {
            bar_sync(1, 64);
            out[round * 32 + me] = buffer[me ^ 5];
            if (round + 1 < n)
                bar_arrive(2, 64);
        }
}
MACHINE_ENTRY(handed_over, int)

// Work of a whole warp: n 0 waited for, 1 not.
__device__ int g_landed;
__global__ void matrix_queue(int *out, const int *, int n) {
    using namespace cuda_on_host;
    warp_meet(
        ~0u, nullptr,
        [](void **, unsigned) {
            g_landed = 0;
            async_issue(Queue::kMatrix, [] { ++g_landed; }, CUDA_ON_HOST_SITE);
            async_commit(Queue::kMatrix, CUDA_ON_HOST_SITE);
        },
        CUDA_ON_HOST_SITE, true);
    if (threadIdx.x == 0)
        out[0] = g_landed;
    __syncwarp();
    if (n == 0)
        warp_meet(
            ~0u, nullptr, [](void **, unsigned) { async_wait(Queue::kMatrix, 0, CUDA_ON_HOST_SITE); },
            CUDA_ON_HOST_SITE, true);
    if (threadIdx.x == 0)
        out[1] = g_landed;
}
MACHINE_ENTRY(matrix_queue, int)
