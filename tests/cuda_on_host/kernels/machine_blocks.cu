// Blocks that wait for one another, or add up what all have written.
#include "machine_entry.cuh"

using namespace nf4lora;

// The last block to arrive adds up the sums of all. out: sums by block, then the total, then the counter (0 before).
// in[0] is the bug: 0 none, 1 no barrier before the arrival, 2 the sums are not waited for
__global__ void last_arriver(int *out, const int *in, int n) {
    NF4LORA_SHARED(int, values);
    const int me = threadIdx.x, blocks = gridDim.x, bug = in[0];
    int *sums = out, *total = out + blocks * blockDim.x;
    unsigned *counter = reinterpret_cast<unsigned *>(total + 1);
    sums[blockIdx.x * blockDim.x + me] = in[1 + (blockIdx.x * blockDim.x + me) % n];
    __threadfence();
    if (bug != 1)
        __syncthreads();
    if (me == 0)
        values[0] = bug == 2 || atomicAdd(counter, 1u) == gridDim.x - 1;
    __syncthreads();
    if (!values[0])
        return;
    __threadfence();
    int sum = 0;
    for (int i = me; i < blocks * static_cast<int>(blockDim.x); i += blockDim.x)
        sum += sums[i];
    atomicAdd(total, sum);
}
MACHINE_ENTRY(last_arriver, int)

// Block b adds 1 to what block b - 1 hands over through out[b] and the flag flags[b]. n: how the flag is waited for.
__global__ void chain(int *out, const int *, int n) {
    volatile int *flags = out + gridDim.x;
    const unsigned b = blockIdx.x;
    if (threadIdx.x == 0) {
        if (b > 0) {
            if (n == 0)
                wait_acquire(reinterpret_cast<const uint32_t *>(out + gridDim.x + b - 1), 1);
            else if (n == 1)
                while (atomicAdd(out + gridDim.x + b - 1, 0) == 0) {
                }
            else if (n == 2)
                while (flags[b - 1] == 0)
                    __nanosleep(20);
            else if (n == 3)
                while (load_acquire(reinterpret_cast<const uint32_t *>(out + gridDim.x + b - 1)) == 0) {
                }
            __threadfence();
        }
        out[b] = b ? out[b - 1] + 1 : 1;
        __threadfence();
        if (n == 0 || n == 3)
            store_release(reinterpret_cast<uint32_t *>(out + gridDim.x + b), 1);
        else if (n == 1)
            atomicExch(out + gridDim.x + b, 1);
        else
            flags[b] = 1;
    }
}
MACHINE_ENTRY(chain, int)

// Every block waits until all have arrived: a grid barrier, n times.
__global__ void grid_barrier(int *out, const int *, int n) {
    unsigned *arrived = reinterpret_cast<unsigned *>(out) + gridDim.x * blockDim.x;
    const int me = blockIdx.x * blockDim.x + threadIdx.x, all = gridDim.x * blockDim.x;
    for (int round = 0; round < n; ++round) {
        const int other = (me + blockDim.x) % all;
        const int v = round ? out[other] : me;
        for (int phase = 0; phase < 2; ++phase) {
            __syncthreads();
            if (threadIdx.x == 0) {
                atomicAdd(arrived, 1u);
                while (atomicAdd(arrived, 0u) < gridDim.x * (2 * round + phase + 1))
                    __nanosleep(50);
            }
            __syncthreads();
            if (phase == 0)
                out[me] = v + 1;
        }
    }
}
MACHINE_ENTRY(grid_barrier, int)
