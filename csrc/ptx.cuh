// The only file with inline PTX: one instruction, one named function. Where nvcc compiles, these are the device bodies;
// where a host compiler does, tests/cuda_on_host/cuda_on_host.h gives the same names their meaning on the CPU.
#pragma once
#include <cstdint>

#if !defined(__CUDACC__)
#include "cuda_on_host.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#define NF4LORA_DEVICE __device__ __forceinline__

// A verb that the target lacks compiles to a trap, so that kernels carry no #ifdef: who launches chooses a kernel that
// the card can run. (The host pass of nvcc has no __CUDA_ARCH__ and only parses.)
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define NF4LORA_ASM_SM80(...) asm volatile(__VA_ARGS__)
#else
#define NF4LORA_ASM_SM80(...) __trap()
#endif
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define NF4LORA_ASM_SM90(...) asm volatile(__VA_ARGS__)
#else
#define NF4LORA_ASM_SM90(...) __trap()
#endif
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define NF4LORA_ASM_SM90A(...) asm volatile(__VA_ARGS__)
#else
#define NF4LORA_ASM_SM90A(...) __trap()
#endif

// All shared memory of a kernel, as T*: NF4LORA_SHARED(uint32_t, table). There is no static __shared__ in csrc.
#define NF4LORA_SHARED(T, name)                                   \
    extern __shared__ __align__(1024) unsigned char name##_raw[]; \
    T *name = reinterpret_cast<T *>(name##_raw)

// Launches on a stream, never on the default one unless it is named; null on success, else the error's text.
// A kernel with commas in its template arguments goes in parentheses.
#define NF4LORA_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                                 \
    ::nf4lora::launch_kernel((kernel), dim3(grid), dim3(block), (shared_bytes), static_cast<cudaStream_t>(stream),     \
                             __VA_ARGS__)

namespace nf4lora {

template <class... Params, class... Args>
const char *launch_kernel(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                          Args... args) {
    constexpr size_t kWithoutAsking = 48 << 10;
    cudaError_t error = cudaSuccess;
    if (shared_bytes > kWithoutAsking)
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     static_cast<int>(shared_bytes));
    if (error == cudaSuccess) {
        kernel<<<grid, block, shared_bytes, stream>>>(args...);
        error = cudaGetLastError();
    }
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// The 32-bit address that shared-memory instructions take.
NF4LORA_DEVICE uint32_t shared_address(const void *p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// ---- loads and stores

// Loads through the read-only path, not kept in L1: for operands read once.
NF4LORA_DEVICE uint32_t load_stream(const uint32_t *p) {
    uint32_t v;
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}

NF4LORA_DEVICE uint2 load_stream(const uint2 *p) {
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
}

NF4LORA_DEVICE uint4 load_stream(const uint4 *p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

// Brings the 128-byte line of p to L2. The address need not be one of an allocation.
NF4LORA_DEVICE void prefetch_l2(const void *p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Stores first to be evicted from L2: for results larger than it, read by a later kernel if at all.
NF4LORA_DEVICE void store_stream(uint32_t *p, uint32_t v) {
    asm volatile("st.global.cs.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

NF4LORA_DEVICE void store_stream(uint4 *p, uint4 v) {
    asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

// ---- memory order between blocks, on flags in global memory

NF4LORA_DEVICE uint32_t load_acquire(const uint32_t *p) {
    uint32_t v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}

NF4LORA_DEVICE void store_release(uint32_t *p, uint32_t v) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

// Returns the value before the addition.
NF4LORA_DEVICE uint32_t atomic_add_acq_rel(uint32_t *p, uint32_t v) {
    uint32_t before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(p), "r"(v) : "memory");
    return before;
}

// Adds, and orders nothing else.
NF4LORA_DEVICE void add_relaxed(uint32_t *p, uint32_t v) {
    asm volatile("red.relaxed.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

// Adds one, or from `last` on starts at zero again. Returns the value before.
NF4LORA_DEVICE uint32_t atomic_inc_acq_rel(uint32_t *p, uint32_t last) {
    uint32_t before;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(p), "r"(last) : "memory");
    return before;
}

// Waits until *p is v. The block that stores v must be running or finished: launch no more blocks than the card holds,
// or let blocks wait only for lower block indices.
NF4LORA_DEVICE void wait_acquire(const uint32_t *p, uint32_t v) {
    while (load_acquire(p) != v)
        __nanosleep(32);
}

// ---- arithmetic

// v, which the compiler then keeps in a register: what it is made of it cannot see, so cannot work out again in a loop.
NF4LORA_DEVICE int pinned(int v) {
    asm volatile("" : "+r"(v));
    return v;
}

// 1 / v within one ulp, v normal; one Newton step rounds it correctly.
NF4LORA_DEVICE float reciprocal_approx(float v) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
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

// ---- asynchronous copies global -> shared, sm_80 on

// kBytes (4, 8 or 16, and both addresses aligned to it) of this thread; zeros, without touching global, where pred is
// false. 16 bytes go past L1 (.cg); only .ca has the smaller sizes.
template <int kBytes>
NF4LORA_DEVICE void cp_async(void *shared, const void *global, bool pred = true) {
    static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
    if constexpr (kBytes == 16)
        NF4LORA_ASM_SM80("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                         "r"(pred ? 16 : 0)
                         : "memory");
    else
        NF4LORA_ASM_SM80("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global),
                         "n"(kBytes), "r"(pred ? kBytes : 0)
                         : "memory");
}

// Closes a group of this thread's copies.
NF4LORA_DEVICE void cp_async_commit() { NF4LORA_ASM_SM80("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kGroups of this thread's youngest groups are under way. Other threads' copies need a barrier too.
template <int kGroups>
NF4LORA_DEVICE void cp_async_wait() {
    NF4LORA_ASM_SM80("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// ---- warp matrix fragments

// 8x8 matrices of 16-bit elements. Lanes 8m..8m+7 give the addresses of matrix m's rows (16 bytes, 16-byte aligned);
// r[m] of lane l receives elements 2(l%4), 2(l%4)+1 of row l/4.
NF4LORA_DEVICE void ldmatrix_x1(uint32_t (&r)[1], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(r[0])
                 : "r"(shared_address(row))
                 : "memory");
}

NF4LORA_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}

NF4LORA_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// The same with each matrix transposed: r[m] of lane l receives elements l/4 of rows 2(l%4), 2(l%4)+1.
NF4LORA_DEVICE void ldmatrix_x1_trans(uint32_t (&r)[1], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(r[0])
                 : "r"(shared_address(row))
                 : "memory");
}

NF4LORA_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}

NF4LORA_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// d[16, 8] += a[16, 16] b[16, 8] with fp32 sums; T is __nv_bfloat16 or __half. sm_80 on.
// With g = lane / 4 and t = 2 (lane % 4), pairs of columns c, c+1 (of rows in b) sit in one register:
//   a[0..3]: (g, t), (g+8, t), (g, t+8), (g+8, t+8);  b[0..1]: rows t and t+8 of column g
//   d[0..3]: (g, t), (g, t+1), (g+8, t), (g+8, t+1)
template <class T>
NF4LORA_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>, "bf16 or fp16 operands");
#define NF4LORA_MMA(type)                                                                   \
    NF4LORA_ASM_SM80("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
                     ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
    if constexpr (std::is_same_v<T, __half>)
        NF4LORA_MMA("f16");
    else
        NF4LORA_MMA("bf16");
#undef NF4LORA_MMA
}

// ---- named barriers: id 1..15 (0 is __syncthreads), threads a multiple of 32

NF4LORA_DEVICE void bar_sync(uint32_t id, uint32_t threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Counts as having come, does not wait.
NF4LORA_DEVICE void bar_arrive(uint32_t id, uint32_t threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- mbarriers in shared memory, sm_80 on; bytes and bulk copies, sm_90 on
// A phase ends when `count` arrivals have come and every expected byte has landed. Phases are numbered 0, 1, 0, …;
// waiting for parity p returns once the phase of parity p has ended, so that a fresh barrier passes a wait for parity
// 1.

NF4LORA_DEVICE void mbarrier_init(uint64_t *b, uint32_t count) {
    NF4LORA_ASM_SM80("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(count) : "memory");
}

NF4LORA_DEVICE void mbarrier_inval(uint64_t *b) {
    NF4LORA_ASM_SM80("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(shared_address(b)) : "memory");
}

// Makes the initialisation visible to the copy engine; a __syncthreads must still follow for the other threads.
NF4LORA_DEVICE void fence_mbarrier_init() { NF4LORA_ASM_SM90("fence.mbarrier_init.release.cluster;" ::: "memory"); }

NF4LORA_DEVICE void mbarrier_arrive(uint64_t *b) {
    NF4LORA_ASM_SM80("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}" ::"r"(shared_address(b))
                     : "memory");
}

NF4LORA_DEVICE void mbarrier_arrive_expect_tx(uint64_t *b, uint32_t bytes) {
    NF4LORA_ASM_SM90("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes)
                     : "memory");
}

// Has the phase of this parity ended?
NF4LORA_DEVICE bool mbarrier_test(const uint64_t *b, uint32_t parity) {
    uint32_t done = 0;
    NF4LORA_ASM_SM80("{\n.reg .pred p;\n"
                     "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done)
                     : "r"(shared_address(b)), "r"(parity)
                     : "memory");
    return done != 0;
}

// The same, sleeping for a while in hardware before it says no.
NF4LORA_DEVICE bool mbarrier_try_wait(const uint64_t *b, uint32_t parity) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    uint32_t done;
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(shared_address(b)), "r"(parity)
                 : "memory");
    return done != 0;
#else
    return mbarrier_test(b, parity);
#endif
}

NF4LORA_DEVICE void mbarrier_wait(const uint64_t *b, uint32_t parity) {
    while (!mbarrier_try_wait(b, parity)) {
    }
}

// Makes this thread's stores to shared memory visible to wgmma and bulk copies that any thread issues after a barrier.
NF4LORA_DEVICE void fence_proxy_async() { NF4LORA_ASM_SM90("fence.proxy.async.shared::cta;" ::: "memory"); }

// One thread copies a whole span; its bytes count against b. Both addresses 16-byte aligned, bytes a multiple of 16.
NF4LORA_DEVICE void bulk_copy(void *shared, const void *global, uint32_t bytes, uint64_t *b) {
    NF4LORA_ASM_SM90("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                         shared_address(shared)),
                     "l"(global), "r"(bytes), "r"(shared_address(b))
                     : "memory");
}

// ---- warpgroup products, sm_90a only: four warps (the first a multiple of 4) run them together

// Registers a thread of this warpgroup may use from here on, a multiple of 8: some give away what others then take. All
// its warps call; those that take wait until there is enough.
template <int kRegisters>
NF4LORA_DEVICE void give_registers() {
    NF4LORA_ASM_SM90A("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
NF4LORA_DEVICE void take_registers() {
    NF4LORA_ASM_SM90A("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Before the first product of a warpgroup, and again once its registers d have been touched by anything else.
template <int kCount>
NF4LORA_DEVICE void wgmma_fence(float (&d)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
        asm volatile("" : "+f"(d[i])::"memory");  // no arithmetic on d moves past this point
    NF4LORA_ASM_SM90A("wgmma.fence.sync.aligned;" ::: "memory");
}

// Closes a group of products.
NF4LORA_DEVICE void wgmma_commit() { NF4LORA_ASM_SM90A("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kGroups of the youngest groups are under way: the others' d holds its sums, and their operands
// may be overwritten.
template <int kGroups, int kCount>
NF4LORA_DEVICE void wgmma_wait(float (&d)[kCount]) {
    NF4LORA_ASM_SM90A("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
#pragma unroll
    for (int i = 0; i < kCount; ++i)
        asm volatile("" : "+f"(d[i])::"memory");
}

// Describes a matrix of rows of 64 16-bit elements (128 bytes), stored with swizzle128, whose first row is 1024-byte
// aligned. Its columns from 16 on are described by an address 32 bytes further, those from 32 on by 64, …
NF4LORA_DEVICE uint64_t wgmma_descriptor(const void *tile) {
    constexpr uint64_t kStride = 1024 >> 4;  // from eight rows to the next eight
    constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;
    return uint64_t((shared_address(tile) & 0x3ffff) >> 4) | uint64_t(1) << 16 | kStride << 32 | kSwizzle128;
}

// d[64, n] = a[64, 16] b[n, 16]^T, added to what d holds if `accumulate`; fp32 sums; T is __nv_bfloat16 or __half.
// Warp w of the group holds rows 16w..16w+15 in mma_m16n8k16's order: d[4j..4j+3] for columns 8j..8j+7, and a where it
// is in registers.
#define NF4LORA_R32 \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define NF4LORA_R64 \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"
#define NF4LORA_R128 \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}"
#define NF4LORA_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define NF4LORA_D16(i) NF4LORA_D4(i), NF4LORA_D4(i + 4), NF4LORA_D4(i + 8), NF4LORA_D4(i + 12)
#define NF4LORA_D32 NF4LORA_D16(0), NF4LORA_D16(16)
#define NF4LORA_D64 NF4LORA_D32, NF4LORA_D16(32), NF4LORA_D16(48)
#define NF4LORA_D128 NF4LORA_D64, NF4LORA_D16(64), NF4LORA_D16(80), NF4LORA_D16(96), NF4LORA_D16(112)
#define NF4LORA_WGMMA_OF(type, shape, operands, accumulate, transposed, ...)                               \
    NF4LORA_ASM_SM90A("{\n.reg .pred p;\nsetp.ne.b32 p, " accumulate ", 0;\n"                             \
                      "wgmma.mma_async.sync.aligned." shape ".f32." type "." type " " operands             \
                      ", p, 1, 1, " transposed ";\n}"                                                      \
                      : __VA_ARGS__)
#define NF4LORA_WGMMA(...)                                                                                 \
    static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>, "bf16 or fp16 operands"); \
    if constexpr (std::is_same_v<T, __half>)                                                               \
        NF4LORA_WGMMA_OF("f16", __VA_ARGS__);                                                              \
    else                                                                                                   \
        NF4LORA_WGMMA_OF("bf16", __VA_ARGS__)

template <class T>
NF4LORA_DEVICE void wgmma_m64n64k16(float (&d)[32], uint64_t a, uint64_t b, bool accumulate = true) {
    NF4LORA_WGMMA("m64n64k16", NF4LORA_R32 ", %32, %33", "%34", "0, 0", NF4LORA_D32
                  : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
}

template <class T>
NF4LORA_DEVICE void wgmma_m64n64k16(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool accumulate = true) {
    NF4LORA_WGMMA("m64n64k16", NF4LORA_R32 ", {%32, %33, %34, %35}, %36", "%37", "0", NF4LORA_D32
                  : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));
}

template <class T>
NF4LORA_DEVICE void wgmma_m64n128k16(float (&d)[64], uint64_t a, uint64_t b, bool accumulate = true) {
    NF4LORA_WGMMA("m64n128k16", NF4LORA_R64 ", %64, %65", "%66", "0, 0", NF4LORA_D64
                  : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
}

template <class T>
NF4LORA_DEVICE void wgmma_m64n128k16(float (&d)[64], const uint32_t (&a)[4], uint64_t b, bool accumulate = true) {
    NF4LORA_WGMMA("m64n128k16", NF4LORA_R64 ", {%64, %65, %66, %67}, %68", "%69", "0", NF4LORA_D64
                  : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));
}

template <class T>
NF4LORA_DEVICE void wgmma_m64n256k16(float (&d)[128], const uint32_t (&a)[4], uint64_t b, bool accumulate = true) {
    NF4LORA_WGMMA("m64n256k16", NF4LORA_R128 ", {%128, %129, %130, %131}, %132", "%133", "0", NF4LORA_D128
                  : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));
}

#undef NF4LORA_R32
#undef NF4LORA_R64
#undef NF4LORA_R128
#undef NF4LORA_D4
#undef NF4LORA_D16
#undef NF4LORA_D32
#undef NF4LORA_D64
#undef NF4LORA_D128
#undef NF4LORA_WGMMA
#undef NF4LORA_WGMMA_OF
#undef NF4LORA_ASM_SM80
#undef NF4LORA_ASM_SM90
#undef NF4LORA_ASM_SM90A

}  // namespace nf4lora
#endif

namespace nf4lora {

// Where a byte of a tile of 128-byte rows lies, in a tile whose start is 1024-byte aligned: 16-byte pieces change
// places within their row, so that eight rows of one column fall in eight different groups of banks.
NF4LORA_DEVICE constexpr uint32_t swizzle128(uint32_t offset) { return offset ^ (offset >> 7 & 7) << 4; }

}  // namespace nf4lora
