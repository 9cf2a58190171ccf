// The 4-bit code: codebooks read from the .csv files, decision boundaries derived from them, encode and decode.
//   encode: code of v = x * (1 / max(absmax, kMinAbsmax)); a value on a boundary takes the lower code, NaN the highest.
//   decode: codebook[code] * absmax, one fp32 rounding.
// Everything here has internal linkage, so each instruction set keeps its own copy.
#pragma once
#include <cstdint>

#include "params.h"

#if defined(__CUDACC__)
#define NF4LORA_HD __host__ __device__ static __forceinline__
#else
#define NF4LORA_HD static inline __attribute__((always_inline))
#endif

namespace nf4lora {

constexpr int kCodes = 16;
constexpr int kDynamicCodes = 256;
constexpr float kMinAbsmax = 1e-38f;

constexpr float kNF4Codebook[] = {
#include "nf4_codebook.csv"
};
constexpr float kFP4Codebook[] = {
#include "fp4_codebook.csv"
};
constexpr float kDynamicCodebook[] = {
#include "dynamic_codebook.csv"
};
constexpr float kUnsignedDynamicCodebook[] = {
#include "unsigned_dynamic_codebook.csv"
};
static_assert(sizeof(kNF4Codebook) == kCodes * sizeof(float), "a 4-bit code has 16 entries");
static_assert(sizeof(kFP4Codebook) == kCodes * sizeof(float), "a 4-bit code has 16 entries");
static_assert(sizeof(kDynamicCodebook) == kDynamicCodes * sizeof(float), "an 8-bit code has 256 entries");
static_assert(sizeof(kUnsignedDynamicCodebook) == kDynamicCodes * sizeof(float), "an 8-bit code has 256 entries");

// One 4-bit code, with what the kernels derive from its 16 values.
struct Codebook {
    float value[kCodes];             // by code
    float boundary[kCodes - 1];      // fp32 midpoints of the values in ascending order
    uint8_t code_of_rank[kCodes];    // ascending order of the values; equal values (FP4's two zeros) in code order
    uint8_t zero;                    // the code of 0.0, which pads an odd element count
};

static constexpr Codebook derive_codebook(const float (&code)[kCodes]) {
    Codebook book{};
    for (int i = 0; i < kCodes; ++i) {
        book.value[i] = code[i];
        int rank = i;
        for (; rank > 0 && code[book.code_of_rank[rank - 1]] > code[i]; --rank)
            book.code_of_rank[rank] = book.code_of_rank[rank - 1];
        book.code_of_rank[rank] = static_cast<uint8_t>(i);
    }
    int zero_rank = 0;
    for (int i = 0; i < kCodes - 1; ++i) {
        book.boundary[i] = 0.5f * (code[book.code_of_rank[i]] + code[book.code_of_rank[i + 1]]);
        zero_rank += 0.0f > book.boundary[i];
    }
    book.zero = book.code_of_rank[zero_rank];
    return book;
}

constexpr Codebook kNF4Book = derive_codebook(kNF4Codebook);
constexpr Codebook kFP4Book = derive_codebook(kFP4Codebook);

// Of a dynamic 8-bit map, ascending: the signed one is that of the nested absmax. The boundary is the largest fp32 not above the exact
// midpoint, so that v <= boundary holds for an fp32 v exactly when v <= midpoint.
struct DynamicBoundaries {
    float at[kDynamicCodes - 1];
};

static constexpr DynamicBoundaries derive_dynamic_boundaries(const float (&code)[kDynamicCodes]) {
    DynamicBoundaries boundaries{};
    for (int i = 0; i < kDynamicCodes - 1; ++i) {
        const double midpoint = 0.5 * (static_cast<double>(code[i]) + code[i + 1]);
        double below = midpoint;
        while (static_cast<float>(below) > midpoint)
            below -= static_cast<float>(below) - midpoint;
        boundaries.at[i] = static_cast<float>(below);
    }
    return boundaries;
}

constexpr DynamicBoundaries kDynamicBoundaries = derive_dynamic_boundaries(kDynamicCodebook);

#if !defined(__CUDACC__)
NF4LORA_HD const Codebook &codebook(int32_t quant_type) { return quant_type == kFP4 ? kFP4Book : kNF4Book; }
#endif

// IEEE division on purpose: the reciprocal must be correctly rounded. A NaN absmax gives NaN.
NF4LORA_HD float reciprocal(float absmax) { return 1.0f / (absmax < kMinAbsmax ? kMinAbsmax : absmax); }

NF4LORA_HD uint8_t encode(const Codebook &book, float v) {
    int rank = 0;
    for (int i = 0; i < kCodes - 1; ++i)
        rank += !(v <= book.boundary[i]);
    return book.code_of_rank[rank];
}

NF4LORA_HD uint8_t encode_dynamic(const float *boundaries, float v) {
    int code = 0;
    for (int step = kDynamicCodes / 2; step > 0; step /= 2)
        code += !(v <= boundaries[code + step - 1]) ? step : 0;
    return static_cast<uint8_t>(code);
}

NF4LORA_HD float decode(const Codebook &book, int code, float absmax) { return book.value[code] * absmax; }

}  // namespace nf4lora
