// The only file with inline PTX: one instruction, one named function. Where nvcc compiles, these are the device bodies;
// where a host compiler does, tests/cuda_on_host/cuda_on_host.h gives the same names their meaning on the CPU.
#pragma once
#include <cstdint>

#if !defined(__CUDACC__)
#include "cuda_on_host.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define NF4LORA_DEVICE __device__ __forceinline__

// All shared memory of a kernel, as T*: NF4LORA_SHARED(uint32_t, table). There is no static __shared__ in csrc.
#define NF4LORA_SHARED(T, name)                                   \
    extern __shared__ __align__(1024) unsigned char name##_raw[]; \
    T *name = reinterpret_cast<T *>(name##_raw)

// Launches on a stream, never on the default one unless it is named; null on success, else the error's text.
// A kernel with commas in its template arguments goes in parentheses.
#define NF4LORA_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
    ::nf4lora::launch_kernel((kernel), dim3(grid), dim3(block), (shared_bytes), static_cast<cudaStream_t>(stream), __VA_ARGS__)

namespace nf4lora {

template <class... Params, class... Args>
const char *launch_kernel(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, Args... args) {
    constexpr size_t kWithoutAsking = 48 << 10;
    cudaError_t error = cudaSuccess;
    if (shared_bytes > kWithoutAsking)
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error == cudaSuccess) {
        kernel<<<grid, block, shared_bytes, stream>>>(args...);
        error = cudaGetLastError();
    }
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Loads through the read-only path, not kept in L1: for operands read once.
NF4LORA_DEVICE uint32_t load_stream(const uint32_t *p) {
    uint32_t v;
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}

NF4LORA_DEVICE uint4 load_stream(const uint4 *p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

// max(m, |v|), a NaN winning over everything.
NF4LORA_DEVICE float max_magnitude(float m, float v) {
#if __CUDA_ARCH__ >= 800
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(m) : "f"(fabsf(v)));
    return m;
#else
    const unsigned a = __float_as_uint(m), b = __float_as_uint(v) & 0x7fffffffu;
    return __uint_as_float(a > b ? a : b);
#endif
}

}  // namespace nf4lora
#endif
