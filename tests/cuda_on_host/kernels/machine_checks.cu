// What the checker build finds, one access a case, and what it counts.
#include "machine_entry.cuh"

struct Twelve {
    int a, b, c;
};
struct Large {
    int a[10];
};
static __constant__ int kConstants[4] = {1, 2, 3, 4};

NF4LORA_DEVICE Twelve twelve(int v) { return {v, v + 1, v + 2}; }
__device__ __attribute__((noinline)) float doubled(float v) { return 2 * v; }

// Threads 0 and 32 race for the first bytes of shared memory; n is the form of the store.
__global__ void store_forms(int *out, const int *in, int n) {
    NF4LORA_SHARED(int, shared);
    const int me = threadIdx.x;
    const float v = static_cast<float>(in[me]);
    shared[me] = 0;
    __syncthreads();
    if (me % 32 == 0)
        switch (n) {
            case 0: shared[0] = in[me]; break;
            case 1: reinterpret_cast<uint4 *>(shared)[0] = make_uint4(in[0], in[1], in[2], me); break;
            case 2: reinterpret_cast<Twelve *>(shared)[0] = Twelve{me, in[0], 3}; break;
            case 3: reinterpret_cast<float *>(shared)[0] = doubled(v); break;
            case 4: shared[0] += in[me]; break;
            case 5: reinterpret_cast<__half *>(shared)[0] = __float2half_rn(v); break;
            case 6: reinterpret_cast<__nv_bfloat16 *>(shared)[0] = __float2bfloat16_rn(v); break;
            case 7: memcpy(shared, in + me, 4); break;
            case 8: memcpy(shared, in + me, in[me] ? 40 : 20); break;
            case 9: reinterpret_cast<__nv_bfloat162 *>(shared)[0] = __floats2bfloat162_rn(v, 1.0f); break;
            case 10: reinterpret_cast<Large *>(shared)[0] = *reinterpret_cast<const Large *>(in + me); break;
            case 11: memset(shared, me, in[me] ? 40 : 20); break;
            case 12: reinterpret_cast<uint8_t *>(shared)[1] = static_cast<uint8_t>(me); break;
            case 13: reinterpret_cast<double *>(shared)[0] = v; break;
            case 14: reinterpret_cast<float2 *>(shared)[0] = make_float2(v, v); break;
            case 15: reinterpret_cast<float *>(shared)[0] = std::fmax(v, doubled(1.0f)); break;
            case 16: reinterpret_cast<uint16_t *>(shared)[0] |= 1; break;
            case 17: std::memcpy(shared, in + me, 12); break;
            case 18: memmove(shared, in + me, 7); break;
            case 19: reinterpret_cast<Twelve *>(shared)[0] = twelve(me); break;
        }
    __syncthreads();
    if (me == 0)
        out[0] = reinterpret_cast<const uint8_t *>(shared)[1];
}
MACHINE_ENTRY(store_forms, int)

// n: 0..9 nothing wrong, others one error each. 64 threads, 64 ints of shared memory, `in` and `out` of 64.
__global__ void accesses(int *out, const int *in, int n) {
    NF4LORA_SHARED(int, shared);
    const int me = threadIdx.x, other = me ^ 1, far = (me + 32) % 64;
    if (n >= 30) {  // as n - 30, in memory that has been written
        shared[me] = 0;
        __syncthreads();
        n -= 30;
    }
    switch (n) {
        case 0:
            shared[me] = in[me] + kConstants[me % 4];
            __syncthreads();
            out[me] = shared[far];
            break;
        case 1:
            shared[me] = in[me];
            __syncwarp();
            out[me] = shared[other];
            break;
        case 2: atomicAdd(out, in[me]); break;
        case 3: {
            const unsigned half = me % 32 < 16 ? 0xffffu : 0xffff0000u;
            shared[me] = in[me];
            __syncwarp(half);
            out[me] = shared[other];
            break;
        }
        case 10: out[me + 1] = me; break;
        case 11: out[me] = in[me - 1]; break;
        case 12: shared[me + (me == 63)] = me; break;
        case 13: out[me] = *reinterpret_cast<const int *>(reinterpret_cast<const char *>(in) + 2 + 4 * (me / 2)); break;
        case 14: out[me] = shared[me]; break;
        case 15: out[me] = out[me] + 1; break;
        case 16:
            shared[me] = in[me];
            out[me] = shared[far];
            break;
        case 17:
            shared[me] = in[me];
            __syncwarp();
            out[me] = shared[far];
            break;
        case 18:
            shared[me] = in[me];
            out[me] = shared[other];
            break;
        case 19: out[me / 2] = me; break;
        case 20:
            atomicAdd(out, 1);
            if (me == 40)
                out[0] = 3;
            break;
        case 21: const_cast<int *>(kConstants)[0] = me; break;
        case 22: {
            int local = me;
            const int *p = &local + (in[0] << 20);
            out[me] = *p;  // another thread's stack, or nobody's memory
            break;
        }
        case 23: {
            const unsigned half = me % 32 < 16 ? 0xffffu : 0xffff0000u;
            shared[me] = in[me];
            __syncwarp(half);
            out[me] = shared[me ^ 16];
            break;
        }
        case 24:
            shared[me] = in[me];
            __syncthreads();
            shared[me] = shared[other];  // read and written in one interval
            break;
        case 25: reinterpret_cast<uint4 *>(shared)[0] = *reinterpret_cast<const uint4 *>(in + 1); break;
        case 26:
            if (me >= 32)
                cuda_on_host::barrier_sync(1, 32, CUDA_ON_HOST_SITE);
            shared[me % 32] = me;
            break;
        case 27: memcpy(shared, in, in[0] ? 260 : 20); break;
        default: out[me] = in[me];
    }
}
MACHINE_ENTRY(accesses, int)

// Blocks of one launch: n 0 write apart, 1 write the same element, 2 read what a neighbour writes.
__global__ void between_blocks(int *out, const int *, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    out[n == 1 ? threadIdx.x : i] = i;
    if (n == 2)
        out[i + gridDim.x * blockDim.x] = out[(i + blockDim.x) % (gridDim.x * blockDim.x)];
}
MACHINE_ENTRY(between_blocks, int)

// Warp accesses of known cost: lanes are n elements apart. 64 threads; in and shared memory of 64 n int4, out of 64
// ints.
__global__ void strides(int *out, const int *in, int n) {
    NF4LORA_SHARED(int, shared);
    const int me = threadIdx.x;
    for (int i = me; i < 256 * n; i += blockDim.x)
        shared[i] = 0;
    __syncthreads();
    const int v = in[me * n];                                                        // global int
    const int4 four = reinterpret_cast<const int4 *>(in)[me * n];                    // global int4
    const __nv_bfloat16 half = reinterpret_cast<const __nv_bfloat16 *>(in)[me * n];  // global bfloat16
    const int all = in[n];                                                           // global broadcast
    shared[me * n] = v + all;                                                        // shared int
    __syncthreads();
    const int2 two = reinterpret_cast<const int2 *>(shared)[me * n];  // shared int2
    __syncthreads();
    reinterpret_cast<int4 *>(shared)[me * n] = four;  // shared int4
    __syncthreads();
    const int same = shared[n];                                                      // shared broadcast
    const __nv_bfloat16 byte = reinterpret_cast<const __nv_bfloat16 *>(shared)[me];  // shared bfloat16
    out[me] = two.x + two.y + same + (__bfloat162float(half) > 0.0f) + (__bfloat162float(byte) > 0.0f);  // global store
}
MACHINE_ENTRY(strides, int)
