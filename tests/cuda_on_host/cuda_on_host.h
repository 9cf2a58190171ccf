// What kernel text sees instead of CUDA: its qualifiers, built-in variables, intrinsics and launches, on top of
// runtime.h. Host compilers only; csrc/ptx.cuh includes this where it is not compiled by nvcc. verbs.h, at the end, has
// the PTX.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>

#include <vector_functions.h>
#include <vector_types.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "runtime.h"

// ---- qualifiers
#undef __global__
#undef __device__
#undef __host__
#undef __constant__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

#define NF4LORA_DEVICE __device__ __forceinline__
#define NF4LORA_SHARED(T, name) T *name = reinterpret_cast<T *>(::cuda_on_host::shared_memory())
#define NF4LORA_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
    ::cuda_on_host::launch_kernel(#kernel, (kernel), dim3(grid), dim3(block), (shared_bytes), (stream), __VA_ARGS__)

// ---- built-in variables
#define threadIdx (::cuda_on_host::thread_index())
#define blockIdx (::cuda_on_host::block_index())
#define blockDim (::cuda_on_host::block_dim())
#define gridDim (::cuda_on_host::grid_dim())
#define warpSize 32

// ---- what waits, and so needs to know where it is called: an object made there
#define __syncthreads() ::cuda_on_host::barrier_sync(0, 0, CUDA_ON_HOST_SITE)
#define __syncthreads_count(predicate) \
    static_cast<int>(::cuda_on_host::barrier_vote((predicate), CUDA_ON_HOST_SITE).in_favour)
#define __syncthreads_or(predicate) static_cast<int>(::cuda_on_host::barrier_vote((predicate), CUDA_ON_HOST_SITE).any())
#define __syncthreads_and(predicate) \
    static_cast<int>(::cuda_on_host::barrier_vote((predicate), CUDA_ON_HOST_SITE).all())
#define __syncwarp \
    ::cuda_on_host::SyncWarp { CUDA_ON_HOST_SITE }
#define __shfl_sync \
    ::cuda_on_host::Shuffle<::cuda_on_host::From::kLane> { CUDA_ON_HOST_SITE }
#define __shfl_up_sync \
    ::cuda_on_host::Shuffle<::cuda_on_host::From::kLower> { CUDA_ON_HOST_SITE }
#define __shfl_down_sync \
    ::cuda_on_host::Shuffle<::cuda_on_host::From::kHigher> { CUDA_ON_HOST_SITE }
#define __shfl_xor_sync \
    ::cuda_on_host::Shuffle<::cuda_on_host::From::kXor> { CUDA_ON_HOST_SITE }
#define __ballot_sync(mask, predicate) ::cuda_on_host::ballot((mask), (predicate), CUDA_ON_HOST_SITE)
#define __any_sync(mask, predicate) \
    static_cast<int>(::cuda_on_host::ballot((mask), (predicate), CUDA_ON_HOST_SITE) != 0)
#define __all_sync(mask, predicate) \
    static_cast<int>(::cuda_on_host::ballot((mask), !(predicate), CUDA_ON_HOST_SITE) == 0)
#define __nanosleep(nanoseconds) ((void)(nanoseconds), ::cuda_on_host::yield(CUDA_ON_HOST_SITE))
#define atomicAdd \
    ::cuda_on_host::Atomic<::cuda_on_host::Add> { CUDA_ON_HOST_SITE }
#define atomicSub \
    ::cuda_on_host::Atomic<::cuda_on_host::Subtract> { CUDA_ON_HOST_SITE }
#define atomicMax \
    ::cuda_on_host::Atomic<::cuda_on_host::Max> { CUDA_ON_HOST_SITE }
#define atomicMin \
    ::cuda_on_host::Atomic<::cuda_on_host::Min> { CUDA_ON_HOST_SITE }
#define atomicAnd \
    ::cuda_on_host::Atomic<::cuda_on_host::And> { CUDA_ON_HOST_SITE }
#define atomicOr \
    ::cuda_on_host::Atomic<::cuda_on_host::Or> { CUDA_ON_HOST_SITE }
#define atomicExch \
    ::cuda_on_host::Atomic<::cuda_on_host::Exchange> { CUDA_ON_HOST_SITE }
#define atomicCAS \
    ::cuda_on_host::CompareAndSwap { CUDA_ON_HOST_SITE }

// The machine's own work on other threads' values is no access of the kernel.
#define CUDA_ON_HOST_UNCHECKED __attribute__((noinline, no_sanitize("thread")))

namespace cuda_on_host {

struct SyncWarp {
    const char *site;
    void operator()(unsigned mask = ~0u) const { warp_meet(mask, nullptr, nullptr, site, true); }
};

// ---- shuffles and votes
template <class T>
struct Shuffled {
    T value, result;
    unsigned from;
};

// A source outside the mask has no defined value: all ones, which is NaN.
template <class T>
CUDA_ON_HOST_UNCHECKED void shuffle_lanes(void **lanes, unsigned mask) {
    for (unsigned lane = 0; lane < 32; ++lane) {
        if (!(mask >> lane & 1))
            continue;
        Shuffled<T> *mine = static_cast<Shuffled<T> *>(lanes[lane]);
        if (mask >> mine->from & 1)
            memcpy(static_cast<void *>(&mine->result), &static_cast<Shuffled<T> *>(lanes[mine->from])->value,
                   sizeof(T));
        else
            memset(static_cast<void *>(&mine->result), 0xFF, sizeof(T));
    }
}

enum class From { kLane, kLower, kHigher, kXor };

template <From kFrom>
struct Shuffle {
    const char *site;

    template <class T>
    T operator()(unsigned mask, T value, unsigned by, int width = 32) const {
        static_assert(std::is_trivially_copyable<T>::value && (sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8),
                      "16, 32 or 64 bits");
        if (width < 1 || width > 32 || (width & (width - 1)))
            fail("bad shuffle", site, "a width of %d lanes", width);
        const unsigned me = lane(), lanes = static_cast<unsigned>(width), first = me & ~(lanes - 1),
                       last = first + lanes - 1;
        unsigned from = me;
        if (kFrom == From::kLane)
            from = first + by % lanes;
        else if (kFrom == From::kLower)
            from = by <= me - first ? me - by : me;
        else if (kFrom == From::kHigher)
            from = by <= last - me ? me + by : me;
        else
            from = (me ^ by) <= last ? me ^ by : me;
        Shuffled<T> mine{value, value, from};
        warp_meet(mask, &mine, shuffle_lanes<T>, site, false);
        return mine.result;
    }
};

struct Ballot {
    bool predicate;
    unsigned result;
};

CUDA_ON_HOST_UNCHECKED inline void count_ballot(void **lanes, unsigned mask) {
    unsigned result = 0;
    for (unsigned lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1 && static_cast<Ballot *>(lanes[lane])->predicate)
            result |= 1u << lane;
    for (unsigned lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1)
            static_cast<Ballot *>(lanes[lane])->result = result;
}

inline unsigned ballot(unsigned mask, bool predicate, const char *site) {
    Ballot mine{predicate, 0};
    warp_meet(mask, &mine, count_ballot, site, false);
    return mine.result;
}

// ---- atomics: those of the compiler, which a checker build hears of; floats go through their bits
template <size_t kBytes>
struct BitsOf;
template <>
struct BitsOf<4> {
    typedef uint32_t Type;
};
template <>
struct BitsOf<8> {
    typedef uint64_t Type;
};

struct Add {
    template <class T>
    static T apply(T a, T b) {
        return a + b;
    }
};
struct Subtract {
    template <class T>
    static T apply(T a, T b) {
        return a - b;
    }
};
struct Max {
    template <class T>
    static T apply(T a, T b) {
        return a > b ? a : b;
    }
};
struct Min {
    template <class T>
    static T apply(T a, T b) {
        return a < b ? a : b;
    }
};
struct And {
    template <class T>
    static T apply(T a, T b) {
        return a & b;
    }
};
struct Or {
    template <class T>
    static T apply(T a, T b) {
        return a | b;
    }
};
struct Exchange {
    template <class T>
    static T apply(T, T b) {
        return b;
    }
};

// One thread of the machine runs at a time, so that a load and an exchange make an atomic.
template <class Operation>
struct Atomic {
    const char *site;

    template <class T>
    T operator()(T *p, std::common_type_t<T> v) const {
        typedef typename BitsOf<sizeof(T)>::Type Bits;
        T before, after;
        Bits bits = __atomic_load_n(reinterpret_cast<Bits *>(p), __ATOMIC_RELAXED);
        memcpy(&before, &bits, sizeof bits);
        after = Operation::apply(before, v);
        memcpy(&bits, &after, sizeof bits);
        __atomic_exchange_n(reinterpret_cast<Bits *>(p), bits, __ATOMIC_ACQ_REL);
        poll(site);
        return before;
    }
};

struct CompareAndSwap {
    const char *site;

    template <class T>
    T operator()(T *p, std::common_type_t<T> expected, std::common_type_t<T> desired) const {
        T before = expected;
        __atomic_compare_exchange_n(p, &before, desired, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
        poll(site);
        return before;
    }
};

// ---- launching
template <class... Params>
struct Call {
    void (*kernel)(Params...);
    std::tuple<std::decay_t<Params>...> arguments;
    std::function<void()> body;
};

template <class... Params, class... Args>
const char *launch_kernel(const char *name, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                          const void *, const Args &...args) {
    Call<Params...> call{kernel, {args...}, nullptr};
    call.body = [&call] { std::apply(call.kernel, call.arguments); };
    return launch(grid, block, shared_bytes, call.body, name, &call, sizeof call);
}

}  // namespace cuda_on_host

// ---- intrinsics that are plain C++ on a host
template <class T>
inline T __ldg(const T *p) {
    return *p;
}

inline void __threadfence() { asm volatile("" ::: "memory"); }
inline void __threadfence_block() { __threadfence(); }
inline void __threadfence_system() { __threadfence(); }

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __clz(int v) { return v ? __builtin_clz(static_cast<unsigned>(v)) : 32; }
inline int __clzll(long long v) { return v ? __builtin_clzll(static_cast<unsigned long long>(v)) : 64; }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __ffsll(long long v) { return __builtin_ffsll(v); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }

inline unsigned __brev(unsigned v) {
    unsigned reversed = 0;
    for (int bit = 0; bit < 32; ++bit)
        reversed |= (v >> bit & 1) << (31 - bit);
    return reversed;
}

// Byte i of the result is byte (selector >> 4 i) & 7 of the eight in b:a, or, with bit 3 set, its sign eight times.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const uint64_t bytes = uint64_t{b} << 32 | a;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned choice = selector >> (4 * i) & 15,
                       byte = static_cast<unsigned>(bytes >> (8 * (choice & 7))) & 0xFF;
        result |= (choice & 8 ? (byte & 0x80 ? 0xFFu : 0u) : byte) << (8 * i);
    }
    return result;
}

template <class To, class T>
inline To cuda_on_host_bits_as(T v) {
    static_assert(sizeof(To) == sizeof(T), "the same bits");
    To to;
    memcpy(&to, &v, sizeof to);
    return to;
}
inline unsigned __float_as_uint(float v) { return cuda_on_host_bits_as<unsigned>(v); }
inline int __float_as_int(float v) { return cuda_on_host_bits_as<int>(v); }
inline float __uint_as_float(unsigned v) { return cuda_on_host_bits_as<float>(v); }
inline float __int_as_float(int v) { return cuda_on_host_bits_as<float>(v); }
inline long long __double_as_longlong(double v) { return cuda_on_host_bits_as<long long>(v); }
inline double __longlong_as_double(long long v) { return cuda_on_host_bits_as<double>(v); }

// Compiled with -ffp-contract=off, so that each is rounded on its own.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float v) { return 1.0f / v; }
inline float __fsqrt_rn(float v) { return std::sqrt(v); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }

#include "verbs.h"

// The compiler's instrumentation looks into copies of 1, 2, 4, 8 and 16 bytes only: checker.cpp does into the others.
// For the text after this header, in which a macro also reaches std::memcpy.
#if defined(__SANITIZE_THREAD__)
extern "C" void *cuda_on_host_copy(void *to, const void *from, size_t bytes);
extern "C" void *cuda_on_host_fill(void *to, int byte, size_t bytes);

__attribute__((always_inline)) inline void *cuda_on_host_memcpy(void *to, const void *from, size_t bytes) {
    if (__builtin_constant_p(bytes) && bytes <= 16 && (bytes & (bytes - 1)) == 0)
        return __builtin_memcpy(to, from, bytes);
    return cuda_on_host_copy(to, from, bytes);
}
namespace std {
using ::cuda_on_host_copy;
using ::cuda_on_host_fill;
using ::cuda_on_host_memcpy;
}  // namespace std

#define memcpy(to, from, bytes) cuda_on_host_memcpy((to), (from), (bytes))
#define memmove(to, from, bytes) cuda_on_host_copy((to), (from), (bytes))
#define memset(to, byte, bytes) cuda_on_host_fill((to), (byte), (bytes))
#endif
