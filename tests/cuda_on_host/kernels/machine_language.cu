// CUDA's language on the machine: built-in variables, barriers, shuffles, votes, atomics, intrinsics, order of threads.
#include "machine_entry.cuh"

// Every thread writes where it is, at its place in the grid; `in` is not looked at.
__global__ void places(int *out, const int *, int n) {
    const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    int *mine = out + (block * static_cast<int>(blockDim.x * blockDim.y * blockDim.z) + thread) * n;
    mine[0] = blockIdx.x, mine[1] = blockIdx.y, mine[2] = blockIdx.z;
    mine[3] = threadIdx.x, mine[4] = threadIdx.y, mine[5] = threadIdx.z;
    mine[6] = warpSize;
}
MACHINE_ENTRY(places, int)

// Arguments are copied for every thread: none sees what another made of its own.
struct Values {
    int a[20];
};
__global__ void own_arguments(int *out, Values values) {
    values.a[3] += threadIdx.x;
    __syncthreads();
    out[threadIdx.x] = values.a[3];
}
extern "C" const char *run_own_arguments(const uint32_t *shape, int *out, const int *in, int) {
    Values values = {};
    values.a[3] = in[0];
    return NF4LORA_LAUNCH(own_arguments, shape[0], shape[3], shape[6], nullptr, out, values);
}

__global__ void reversed_blocks(int *out, const int *in, int n) {
    NF4LORA_SHARED(int, values);
    const int first = blockIdx.x * blockDim.x, me = threadIdx.x, last = blockDim.x - 1;
    for (int round = 0; round < n; ++round) {
        values[me] = round ? out[first + me] : in[first + me];
        __syncthreads();
        out[first + me] = values[last - me];
        __syncthreads();
    }
}
MACHINE_ENTRY(reversed_blocks, int)

// Threads from n on leave before the barrier, which then waits for the others only.
__global__ void some_leave(int *out, const int *in, int n) {
    NF4LORA_SHARED(int, values);
    const int me = threadIdx.x;
    if (me >= n)
        return;
    values[me] = in[me];
    __syncthreads();
    out[me] = values[n - 1 - me];
}
MACHINE_ENTRY(some_leave, int)

template <class T>
__device__ int shuffled(T me, int n, int *out) {
    out[0] = static_cast<int>(static_cast<float>(__shfl_sync(~0u, me, n)));
    out[1] = static_cast<int>(static_cast<float>(__shfl_up_sync(~0u, me, n, 16)));
    out[2] = static_cast<int>(static_cast<float>(__shfl_down_sync(~0u, me, n, 8)));
    out[3] = static_cast<int>(static_cast<float>(__shfl_xor_sync(~0u, me, n)));
    return 4;
}
__global__ void shuffles(int *out, const int *, int n) {
    const int me = threadIdx.x;
    int *mine = out + me * 28;
    mine += shuffled(me, n, mine);
    mine += shuffled(static_cast<unsigned>(me), n, mine);
    mine += shuffled(static_cast<float>(me), n, mine);
    mine += shuffled(static_cast<double>(me), n, mine);
    mine += shuffled(static_cast<long long>(me), n, mine);
    mine += shuffled(__float2half_rn(static_cast<float>(me)), n, mine);
    shuffled(__float2bfloat16_rn(static_cast<float>(me)), n, mine);
}
MACHINE_ENTRY(shuffles, int)

// Lanes below n and the others vote apart; then the block votes, of which those from 3n on have left.
__global__ void votes(int *out, const int *in, int n) {
    const int me = threadIdx.x, lane = me % 32;
    const unsigned low = (1u << n) - 1, mine = lane < n ? low : ~low;
    out[me * 6 + 0] = lane < n ? __ballot_sync(low, in[me]) : __ballot_sync(~low, in[me]);
    out[me * 6 + 1] = __any_sync(mine, in[me]);
    out[me * 6 + 2] = __all_sync(mine, in[me]);
    if (me >= 3 * n)
        return;
    out[me * 6 + 3] = __syncthreads_count(in[me]);
    out[me * 6 + 4] = __syncthreads_or(in[me]);
    out[me * 6 + 5] = __syncthreads_and(in[me]);
}
MACHINE_ENTRY(votes, int)

__global__ void intrinsics(uint32_t *out, const uint32_t *in, int n) {
    const int me = threadIdx.x;
    const uint32_t a = in[3 * me], b = in[3 * me + 1], c = in[3 * me + 2];
    uint32_t *mine = out + me * n;
    mine[0] = __byte_perm(a, b, c);
    mine[1] = __popc(a);
    mine[2] = __clz(static_cast<int>(a));
    mine[3] = __ffs(static_cast<int>(a));
    mine[4] = __brev(a);
    mine[5] = __umulhi(a, b);
    mine[6] = __float_as_uint(__uint_as_float(a & 0x7f7fffffu));
    mine[7] = __float_as_uint(__fmaf_rn(1.0f + 0x1p-12f, 1.0f + 0x1p-12f, -1.0f));
    mine[8] = __float_as_uint(__fadd_rn(__fmul_rn(1.0f + 0x1p-12f, 1.0f + 0x1p-12f), -1.0f));
    mine[9] = __float_as_uint(__frcp_rn(static_cast<float>(b | 1)));
    mine[10] = __ldg(in + 3 * me);
    mine[11] = __float_as_uint(__fdiv_rn(1.0f, 3.0f));
}
MACHINE_ENTRY(intrinsics, uint32_t)

__global__ void atomics(int *out, const int *in, int n) {
    const int v = in[blockIdx.x * blockDim.x + threadIdx.x];
    atomicAdd(out + 0, v);
    atomicMax(out + 1, v);
    atomicMin(out + 2, v);
    atomicOr(reinterpret_cast<unsigned *>(out + 3), 1u << (v & 31));
    atomicAdd(reinterpret_cast<float *>(out + 4), static_cast<float>(v));
    atomicAdd(reinterpret_cast<unsigned long long *>(out + 6), 1ull << 33);
    if (atomicCAS(out + 5, 0, n) == 0)
        atomicExch(out + 8, n);
}
MACHINE_ENTRY(atomics, int)

// The order in which threads ran, n times over: out[0] counts.
__global__ void order(int *out, const int *, int n) {
    for (int round = 0; round < n; ++round) {
        out[1 + atomicAdd(out, 1)] = threadIdx.x;
        __syncthreads();
    }
}
MACHINE_ENTRY(order, int)

__global__ void elementwise(float *out, const float *in, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n)
        out[i] = in[i] + 1.0f;
}
MACHINE_ENTRY(elementwise, float)
