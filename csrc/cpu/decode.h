// Decoding of a run of a 4-bit weight to fp32: codebook[code] * absmax, one rounding; a nested absmax is
// dynamic[code] * nested_absmax + offset, two roundings (never an fma: compile with -ffp-contract=off).
#pragma once
#include "../nf4.h"
#include "simd.h"

namespace nf4lora {
namespace NF4LORA_ISA {

NF4LORA_INLINE float block_absmax(const Weight &w, int64_t block) {
    if (!w.nested_absmax)
        return static_cast<const float *>(w.absmax)[block];
    const float scaled = kDynamicCodebook[static_cast<const uint8_t *>(w.absmax)[block]] *
                         w.nested_absmax[block / w.nested_blocksize];
    return scaled + *w.offset;
}

#if defined(__AVX2__) && !defined(__clang__)
// Lane l takes nibble l of the kWidth / 2 bytes, the high nibble of a byte first.
template <int... L>
NF4LORA_INLINE UVec nibbles(const uint8_t *bytes, std::integer_sequence<int, L...>) {
    uint32_t words[kWidth / 8];
    memcpy(words, bytes, sizeof words);
    UVec v = words[0] - UVec{};
    if constexpr (kWidth == 16)
        v = __builtin_shuffle(v, words[kWidth / 8 - 1] - UVec{}, UVec{(L < 8 ? L : kWidth + L)...});
    return (v >> UVec{((L % 8) ^ 1) * 4 ...}) & 15;
}

struct Lookup {
    Vec low, high;  // codes 0.. and, where a vector holds only 8, codes 8..15
};

NF4LORA_INLINE Lookup lookup(const Codebook &book) { return {load(book.value), load(book.value + kCodes - kWidth)}; }

NF4LORA_INLINE Vec decode_vec(const Lookup &table, const Codebook &, const uint8_t *bytes) {
    const UVec code = nibbles(bytes, Lanes{});
    if constexpr (kWidth == kCodes)
        return __builtin_shuffle(table.low, code);
    const Vec low = __builtin_shuffle(table.low, code & 7), high = __builtin_shuffle(table.high, code & 7);
    return code > 7 ? high : low;
}
#else
struct Lookup {};

NF4LORA_INLINE Lookup lookup(const Codebook &) { return {}; }

NF4LORA_INLINE Vec decode_vec(const Lookup &, const Codebook &book, const uint8_t *bytes) {
    float v[kWidth];
    for (int i = 0; i < kWidth / 2; ++i)
        memcpy(v + 2 * i, book.byte_values[bytes[i]], sizeof book.byte_values[0]);
    return load(v);
}
#endif

// Elements [first, first + count) of the flattened weight.
static void decode_elements(const Weight &w, int64_t first, int64_t count, float *__restrict dst) {
    const Codebook &book = codebook(w.quant_type);
    const Lookup table = lookup(book);
    const uint8_t *const packed = w.packed;
    const int64_t last = first + count;
    int64_t block = first / w.blocksize;
    int64_t block_end = (block + 1) * w.blocksize;
    for (int64_t i = first; i < last; ++block, block_end += w.blocksize) {
        const float absmax = block_absmax(w, block);
        const int64_t end = min_of(last, block_end);
        if (i & 1) {
            *dst++ = decode(book, packed[i / 2] & 15, absmax);
            ++i;
        }
        for (; i + kWidth <= end; i += kWidth, dst += kWidth)
            store(dst, decode_vec(table, book, packed + i / 2) * broadcast(absmax));
        for (; i < end; ++i)
            *dst++ = decode(book, i & 1 ? packed[i / 2] & 15 : packed[i / 2] >> 4, absmax);
    }
}

}  // namespace NF4LORA_ISA
}  // namespace nf4lora
