// Vectors as wide as the instruction set the file is compiled for, written with the compiler's vector types only.
// Everything is static or always inlined: the linker must never share code between instruction sets.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>

#define NF4LORA_INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define NF4LORA_UNROLL _Pragma("unroll")
#else
#define NF4LORA_UNROLL _Pragma("GCC unroll 16")
#endif

namespace nf4lora {
namespace NF4LORA_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
constexpr int kMicroRows = 8;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
constexpr int kMicroRows = 6;
#else
constexpr int kWidth = 4;
constexpr int kMicroRows = 6;
#endif
constexpr int kMicroVecs = 2;
constexpr int kMicroCols = kMicroVecs * kWidth;
constexpr int kPartial = 64;  // products summed on their own before they join the running total

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef int32_t IVec __attribute__((vector_size(4 * kWidth)));
typedef uint32_t UVec __attribute__((vector_size(4 * kWidth)));
using Lanes = std::make_integer_sequence<int, kWidth>;

NF4LORA_INLINE Vec load(const float *p) {
    Vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

NF4LORA_INLINE void store(float *p, Vec v) { memcpy(p, &v, sizeof v); }

// Subtracting +0 keeps every value, -0 included, so this folds into a plain broadcast.
NF4LORA_INLINE Vec broadcast(float s) { return s - Vec{}; }

NF4LORA_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#if defined(__clang__)
    return __builtin_elementwise_fma(a, b, c);
#else
    Vec r;
    for (int l = 0; l < kWidth; ++l)
        r[l] = __builtin_fmaf(a[l], b[l], c[l]);
    return r;
#endif
#else
    return a * b + c;
#endif
}

// Lanes of a and b picked by constant indices; b's lanes are numbered from kWidth.
template <class V, int... L>
NF4LORA_INLINE V pick(V a, V b, std::integer_sequence<int, L...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, L...);
#else
    return __builtin_shuffle(a, b, IVec{L...});
#endif
}

// Exchanges the off-diagonal d x d blocks of each 2d x 2d block: doing so for every power of two transposes.
template <int d, int... L>
NF4LORA_INLINE void swap_blocks(Vec (&rows)[kWidth], std::integer_sequence<int, L...>) {
    NF4LORA_UNROLL
    for (int i = 0; i < kWidth; ++i) {
        if (i & d)
            continue;
        const Vec a = rows[i], b = rows[i + d];
        rows[i] = pick(a, b, std::integer_sequence<int, (L & d ? kWidth + (L ^ d) : L)...>{});
        rows[i + d] = pick(a, b, std::integer_sequence<int, (L & d ? kWidth + L : (L ^ d))...>{});
    }
    if constexpr (2 * d < kWidth)
        swap_blocks<2 * d>(rows, std::integer_sequence<int, L...>{});
}

NF4LORA_INLINE void transpose(Vec (&rows)[kWidth]) { swap_blocks<1>(rows, Lanes{}); }

NF4LORA_INLINE float sum_lanes(Vec v) {
    float s[kWidth];
    memcpy(s, &v, sizeof s);
    for (int n = kWidth / 2; n > 0; n /= 2)
        for (int l = 0; l < n; ++l)
            s[l] += s[l + n];
    return s[0];
}

NF4LORA_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
NF4LORA_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
NF4LORA_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
NF4LORA_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace NF4LORA_ISA
}  // namespace nf4lora
