// fp32 <-> bf16, fp16 over contiguous elements, without branches so that the loops vectorize. Narrowing rounds to
// nearest even with denormals kept; NaN stays a (quiet) NaN.
#pragma once
#include <type_traits>

#include "../params.h"
#include "simd.h"

namespace nf4lora {
namespace NF4LORA_ISA {

template <int32_t dtype>
using Element = std::conditional_t<dtype == kFloat32, float, uint16_t>;

NF4LORA_INLINE uint32_t bits_of(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

NF4LORA_INLINE float float_of(uint32_t u) {
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

// A choice the compiler cannot turn back into a branch, which would keep the loop scalar.
NF4LORA_INLINE uint32_t select(bool condition, uint32_t yes, uint32_t no) {
    const uint32_t mask = 0u - static_cast<uint32_t>(condition);
    return (yes & mask) | (no & ~mask);
}

NF4LORA_INLINE float from_bf16(uint16_t h) { return float_of(static_cast<uint32_t>(h) << 16); }

NF4LORA_INLINE uint16_t to_bf16(float f) {
    const uint32_t u = bits_of(f);
    const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    const uint32_t quiet = (u >> 16) | 0x40;
    return static_cast<uint16_t>((u & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
}

constexpr uint32_t kHalfToFloatBias = (127 - 15) << 23;

NF4LORA_INLINE float from_fp16(uint16_t h) {
    constexpr uint32_t kSmallestNormal = (127 - 14) << 23;
    const uint32_t magnitude = (h & 0x7fffu) << 13;
    const uint32_t normal = magnitude + kHalfToFloatBias;
    const uint32_t special = normal + kHalfToFloatBias;
    const uint32_t denormal = bits_of(float_of(magnitude + kSmallestNormal) - float_of(kSmallestNormal));
    const uint32_t u = select(magnitude >= (31u << 23), special, select(magnitude < (1u << 23), denormal, normal));
    return float_of(u | (static_cast<uint32_t>(h & 0x8000u) << 16));
}

NF4LORA_INLINE uint16_t to_fp16(float f) {
    constexpr uint32_t kOverflow = (127 + 16) << 23;
    constexpr uint32_t kSmallestNormal = (127 - 14) << 23;
    constexpr uint32_t kDenormalMagic = ((127 - 15) + (23 - 10) + 1) << 23;  // its ulp is the smallest fp16 denormal
    const uint32_t u = bits_of(f) & 0x7fffffff;
    const uint32_t normal = (u - kHalfToFloatBias + 0xfff + ((u >> 13) & 1)) >> 13;
    const uint32_t denormal = bits_of(float_of(u) + float_of(kDenormalMagic)) - kDenormalMagic;
    const uint32_t special = select(u > 0x7f800000, 0x7e00, 0x7c00);
    const uint32_t h = select(u >= kOverflow, special, select(u < kSmallestNormal, denormal, normal));
    return static_cast<uint16_t>(h | ((bits_of(f) >> 16) & 0x8000));
}

NF4LORA_INLINE void load_elements(const void *src, int32_t dtype, int64_t first, int64_t count, float *__restrict dst) {
    if (dtype == kFloat32) {
        memcpy(dst, static_cast<const float *>(src) + first, count * sizeof(float));
        return;
    }
    const uint16_t *half = static_cast<const uint16_t *>(src) + first;
    if (dtype == kBFloat16)
        for (int64_t i = 0; i < count; ++i)
            dst[i] = from_bf16(half[i]);
    else
        for (int64_t i = 0; i < count; ++i)
            dst[i] = from_fp16(half[i]);
}

// Where element i is.
NF4LORA_INLINE const void *element(const void *data, int32_t dtype, int64_t i) {
    return data ? static_cast<const char *>(data) + i * (dtype == kFloat32 ? 4 : 2) : nullptr;
}

NF4LORA_INLINE float load_element(const void *src, int32_t dtype, int64_t i) {
    float v;
    load_elements(src, dtype, i, 1, &v);
    return v;
}

NF4LORA_INLINE void store_elements(void *dst, int32_t dtype, int64_t first, int64_t count,
                                   const float *__restrict src) {
    if (dtype == kFloat32) {
        memcpy(static_cast<float *>(dst) + first, src, count * sizeof(float));
        return;
    }
    uint16_t *half = static_cast<uint16_t *>(dst) + first;
    if (dtype == kBFloat16)
        for (int64_t i = 0; i < count; ++i)
            half[i] = to_bf16(src[i]);
    else
        for (int64_t i = 0; i < count; ++i)
            half[i] = to_fp16(src[i]);
}

}  // namespace NF4LORA_ISA
}  // namespace nf4lora
