// Inverted dropout. Philox4x32-10: key = (low, high) words of the seed, counter = (low, high) words of i / 4 and two
// zeros; output word i % 4 belongs to flat index i of the [M, K] input. Kept where (word >> 8) >= ceil(p * 2^24), and
// then multiplied by the fp32 1 / (1 - p).
#pragma once
#include "../params.h"
#include "simd.h"

namespace nf4lora {
namespace NF4LORA_ISA {

struct DropoutMask {
    bool active;
    uint32_t key[2];
    uint32_t threshold;
    float scale;
};

static DropoutMask dropout_mask(const Dropout &dropout) {
    if (!dropout.seed)
        return {};
    const uint64_t seed = static_cast<uint64_t>(*dropout.seed);
    const double scaled = static_cast<double>(dropout.p) * (1 << 24);
    const uint32_t floor = static_cast<uint32_t>(scaled);
    return {true,
            {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
            floor + (scaled > floor),
            1.0f / (1.0f - dropout.p)};
}

constexpr int kPhiloxLanes = 16;

// The words of counters [first, first + kPhiloxLanes), by word then counter.
static void philox(const uint32_t (&seed)[2], uint64_t first, uint32_t (&words)[4][kPhiloxLanes]) {
    constexpr uint32_t kMul0 = 0xD2511F53, kMul1 = 0xCD9E8D57, kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;
    for (int l = 0; l < kPhiloxLanes; ++l) {
        words[0][l] = static_cast<uint32_t>(first + l);
        words[1][l] = static_cast<uint32_t>((first + l) >> 32);
        words[2][l] = words[3][l] = 0;
    }
    uint32_t key0 = seed[0], key1 = seed[1];
    for (int round = 0; round < 10; ++round, key0 += kWeyl0, key1 += kWeyl1)
        for (int l = 0; l < kPhiloxLanes; ++l) {
            const uint64_t p0 = static_cast<uint64_t>(kMul0) * words[0][l];
            const uint64_t p1 = static_cast<uint64_t>(kMul1) * words[2][l];
            words[0][l] = static_cast<uint32_t>(p1 >> 32) ^ words[1][l] ^ key0;
            words[1][l] = static_cast<uint32_t>(p1);
            words[2][l] = static_cast<uint32_t>(p0 >> 32) ^ words[3][l] ^ key1;
            words[3][l] = static_cast<uint32_t>(p0);
        }
}

// Applies the mask to `count` values that stand at flat indices first, first + 1, ...
static void apply_dropout(const DropoutMask &mask, int64_t first, int64_t count, float *__restrict values) {
    constexpr int64_t kSpan = 4 * kPhiloxLanes;
    for (int64_t base = first / 4 * 4; base < first + count; base += kSpan) {
        uint32_t words[4][kPhiloxLanes];
        philox(mask.key, static_cast<uint64_t>(base) / 4, words);
        float factor[kSpan];
        for (int l = 0; l < kPhiloxLanes; ++l)
            for (int word = 0; word < 4; ++word)
                factor[4 * l + word] = (words[word][l] >> 8) >= mask.threshold ? mask.scale : 0.0f;
        const int64_t begin = max_of(base, first), end = min_of(base + kSpan, first + count);
        for (int64_t i = begin; i < end; ++i)
            values[i - first] = factor[i - base] != 0.0f ? values[i - first] * factor[i - base] : 0.0f;
    }
}

}  // namespace NF4LORA_ISA
}  // namespace nf4lora
