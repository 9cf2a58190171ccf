// One error a case, n says which; the machine must name it and go on.
#include "machine_entry.cuh"

NF4LORA_DEVICE bool never(void *) { return false; }

// Grows the stack until it is full.
__device__ __attribute__((noinline)) int deep(volatile int *seed, int n) {
    volatile int local[256];
    local[n & 255] = *seed;
    return n < 0 ? local[3] : deep(seed, n + 1) + local[n & 255];
}

__global__ void errors(int *out, const int *in, int n) {
    const int me = threadIdx.x;
    const unsigned lane = threadIdx.x % 32;
    switch (n) {
        case 0:
            if (me < 96)
                __syncthreads();  // first half of: divergent barrier
            else
                __syncthreads();  // second half
            break;
        case 1:
            if (me < 64)
                cuda_on_host::barrier_sync(1, 64, CUDA_ON_HOST_SITE);
            if (me >= 64)
                cuda_on_host::barrier_sync(2, 128, CUDA_ON_HOST_SITE);  // 64 more than come
            break;
        case 2: __syncwarp(1u << (lane ^ 1)); break;
        case 3:
            if (lane < 16)
                return;
            if (me < 32)
                __syncwarp();
            break;
        case 4:
            if (lane < 31)
                __syncwarp();
            break;
        case 5:
            if (lane < 16)
                __syncwarp();
            else
                __ballot_sync(~0u, me);
            break;
        case 6: cuda_on_host::barrier_sync(3, me < 32 ? 64 : 96, CUDA_ON_HOST_SITE); break;
        case 7: cuda_on_host::barrier_sync(3, 33, CUDA_ON_HOST_SITE); break;
        case 8: cuda_on_host::wait_until(never, nullptr, CUDA_ON_HOST_SITE); break;
        case 9:
            while (atomicAdd(out, 0) == 0) {
            }
            break;
        case 10:
            out[me] = *reinterpret_cast<const volatile int *>(in[0] + sizeof(int) * (me + 1));  // a null pointer
            break;
        case 11: out[me] = 7 / in[0]; break;
        case 12: out[me] = deep(out, me); break;
        case 13: out[me] = __shfl_sync(~0u, me, 0, 5); break;
        case 14: cuda_on_host::barrier_sync(16, 128, CUDA_ON_HOST_SITE); break;
        case 15:
            while (atomicAdd(out, 0) == 0)
                __nanosleep(100);
            break;
        case 16:
            if (me != 5)
                __syncthreads();  // in a loop that thread 5 never leaves
            else
                cuda_on_host::wait_until(never, nullptr, CUDA_ON_HOST_SITE);
            break;
        default: out[blockIdx.x * blockDim.x + me] = me;
    }
}
MACHINE_ENTRY(errors, int)
