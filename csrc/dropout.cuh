// The mask of inverted dropout, regenerated from its seed where a kernel needs it: the bits of reference.py::dropout.
//   Philox4x32-10: key = (low, high) words of the seed, counter = (low, high) words of i / 4 and two zeros; output word
//   i % 4 belongs to flat index i of the [M, K] input. Kept where (word >> 8) >= ceil(p * 2^24), and then multiplied by
//   the fp32 1 / (1 - p); a dropped element is 0 whatever it was.
// Four indices cost about 90 instructions, so ask for them together: counters where a thread holds four in a row.
#pragma once
#include "params.h"
#include "ptx.cuh"

namespace nf4lora {

struct Philox {
    uint32_t key0, key1;

    // The words of a counter, whose two upper words are zeros.
    NF4LORA_DEVICE uint4 words(uint64_t counter) const {
        constexpr uint32_t kMul0 = 0xD2511F53, kMul1 = 0xCD9E8D57, kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;
        uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = 0, c3 = 0;
#pragma unroll
        for (uint32_t round = 0; round < 10; ++round) {
            const uint64_t product0 = static_cast<uint64_t>(kMul0) * c0, product1 = static_cast<uint64_t>(kMul1) * c2;
            c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ (key0 + round * kWeyl0);
            c1 = static_cast<uint32_t>(product1);
            c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ (key1 + round * kWeyl1);
            c3 = static_cast<uint32_t>(product0);
        }
        return make_uint4(c0, c1, c2, c3);
    }
};

struct DropoutMask {
    bool active;
    float scale;  // 1 / (1 - p), 1 where there is no dropout
    uint32_t threshold;
    Philox philox;

    NF4LORA_DEVICE explicit DropoutMask(const Dropout &dropout)
        : active(dropout.seed != nullptr), scale(1.0f), threshold(0), philox{0, 0} {
        if (!active)
            return;
        const uint64_t seed = static_cast<uint64_t>(*dropout.seed);
        philox.key0 = static_cast<uint32_t>(seed);
        philox.key1 = static_cast<uint32_t>(seed >> 32);
        threshold = static_cast<uint32_t>(ceilf(__fmul_rn(dropout.p, 16777216.0f)));  // a product without rounding
        scale = __fdiv_rn(1.0f, __fsub_rn(1.0f, dropout.p));
    }

    // Bit i: is flat index 4 * counter + i kept? All are where there is no dropout.
    NF4LORA_DEVICE uint32_t kept(int64_t counter) const {
        const uint4 word = philox.words(static_cast<uint64_t>(counter));
        return uint32_t{word.x >> 8 >= threshold} | uint32_t{word.y >> 8 >= threshold} << 1 |
               uint32_t{word.z >> 8 >= threshold} << 2 | uint32_t{word.w >> 8 >= threshold} << 3;
    }

    // Is this one flat index kept? As dear as four.
    NF4LORA_DEVICE bool keeps(int64_t index) const { return kept(index / 4) >> index % 4 & 1; }

    // Of flat indices 4 * counter … 4 * counter + 3: `scale`, or 0 where dropped.
    NF4LORA_DEVICE float4 factors(int64_t counter) const {
        const uint4 word = philox.words(static_cast<uint64_t>(counter));
        return make_float4(factor_of(word.x), factor_of(word.y), factor_of(word.z), factor_of(word.w));
    }

    // Of flat indices `even` and even + 1, two neighbours of one counter.
    NF4LORA_DEVICE float2 factors_of_pair(int64_t even) const {
        const uint4 word = philox.words(static_cast<uint64_t>(even) / 4);
        const bool upper = even & 2;
        return make_float2(factor_of(upper ? word.z : word.x), factor_of(upper ? word.w : word.y));
    }

  private:
    NF4LORA_DEVICE float factor_of(uint32_t word) const { return word >> 8 >= threshold ? scale : 0.0f; }
};

// v under a factor of the mask: exactly 0 where dropped, even if v is NaN or infinite.
NF4LORA_DEVICE float under_mask(float v, float factor) { return factor == 0.0f ? 0.0f : __fmul_rn(v, factor); }

}  // namespace nf4lora
