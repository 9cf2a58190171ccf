// Inverted dropout. Philox4x32-10: key = (low, high) words of the seed, counter = (low, high) words of i / 4 and two
// zeros; output word i % 4 belongs to flat index i of the [M, K] input. Kept where (word >> 8) >= ceil(p * 2^24), and
// then multiplied by the fp32 1 / (1 - p).
#pragma once
#include "convert.h"

namespace nf4lora {
namespace NF4LORA_ISA {

struct DropoutMask {
    bool active;
    uint32_t key[2];
    uint32_t threshold;
    float scale;
};

static inline DropoutMask dropout_mask(const Dropout &dropout) {
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

// The words of counters [first, first + kPhiloxLanes), by word then counter. Lanes outside, rounds unrolled inside: the
// compiler then vectorizes over the lanes.
static void philox(const uint32_t (&seed)[2], uint64_t first, uint32_t (&words)[4][kPhiloxLanes]) {
    constexpr uint32_t kMul0 = 0xD2511F53, kMul1 = 0xCD9E8D57, kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;
    const uint32_t low = static_cast<uint32_t>(first), high = static_cast<uint32_t>(first >> 32);
    const uint32_t key0 = seed[0], key1 = seed[1];
    for (uint32_t l = 0; l < kPhiloxLanes; ++l) {
        uint32_t c0 = low + l, c1 = high + (c0 < low), c2 = 0, c3 = 0;
        NF4LORA_UNROLL
        for (uint32_t round = 0; round < 10; ++round) {
            const uint64_t p0 = static_cast<uint64_t>(kMul0) * c0, p1 = static_cast<uint64_t>(kMul1) * c2;
            c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ (key0 + round * kWeyl0);
            c1 = static_cast<uint32_t>(p1);
            c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ (key1 + round * kWeyl1);
            c3 = static_cast<uint32_t>(p0);
        }
        words[0][l] = c0;
        words[1][l] = c1;
        words[2][l] = c2;
        words[3][l] = c3;
    }
}

// Applies the mask to `count` values that stand at flat indices first, first + 1, ...
static inline void apply_dropout(const DropoutMask &mask, int64_t first, int64_t count, float *values) {
    constexpr int64_t kSpan = 4 * kPhiloxLanes;
    for (int64_t base = first / 4 * 4; base < first + count; base += kSpan) {
        uint32_t words[4][kPhiloxLanes], word[kSpan];
        philox(mask.key, static_cast<uint64_t>(base) / 4, words);
        for (int l = 0; l < kPhiloxLanes; ++l)
            for (int w = 0; w < 4; ++w)
                word[4 * l + w] = words[w][l];
        const int64_t begin = max_of(base, first), end = min_of(base + kSpan, first + count);
        for (int64_t i = begin; i < end; ++i) {
            const float scaled = values[i - first] * mask.scale;
            values[i - first] = float_of(select(word[i - base] >> 8 >= mask.threshold, bits_of(scaled), 0));
        }
    }
}

}  // namespace NF4LORA_ISA
}  // namespace nf4lora
