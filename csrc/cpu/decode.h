// Decoding of a run of a 4-bit weight: codebook[code] * absmax, one fp32 rounding and one to the dtype; a nested absmax is
// dynamic[code] * nested_absmax + offset, two roundings (never an fma: compile with -ffp-contract=off).
// The 16 values of a block are made once, in the dtype that is written, and its codes pick among them.
#pragma once
#include "../nf4.h"
#include "convert.h"
#include "intrinsics.h"

namespace nf4lora {
namespace NF4LORA_ISA {

// Scale of the 8-bit absmax around a block.
struct Nested {
    float absmax;
    int64_t end;  // of the blocks it is for
};

NF4LORA_INLINE Nested nested_of(const Weight &w, int64_t block) {
    const int64_t nested_block = block / w.nested_blocksize;
    return {w.nested_absmax[nested_block], (nested_block + 1) * w.nested_blocksize};
}

NF4LORA_INLINE float block_absmax(const Weight &w, int64_t block, Nested &nested) {
    if (!w.nested_absmax)
        return static_cast<const float *>(w.absmax)[block];
    if (block >= nested.end)
        nested = nested_of(w, block);
    const float scaled = kDynamicCodebook[static_cast<const uint8_t *>(w.absmax)[block]] * nested.absmax;
    return scaled + *w.offset;
}

NF4LORA_INLINE float block_absmax(const Weight &w, int64_t block) {
    Nested any{};
    return block_absmax(w, block, any);
}

// ---- Values<dtype>: those of a block, which make_values makes; decode_run<dtype, stream> decodes kRun elements, which begin
// on a byte, and decode_some at most as many. `stream` goes past the caches, to an address that is a multiple of 64.

constexpr int kRun = 32;

#if defined(__AVX512BW__)
// Of 32 bits each; 16-bit values twice, since a code is looked up with its upper neighbour's lowest bit below it.
template <int32_t dtype>
struct Values {
    __m512i of_code;
};

template <int32_t dtype>
NF4LORA_INLINE Values<dtype> make_values(const Codebook &book, float absmax) {
    const __m512 v = _mm512_mul_ps(_mm512_loadu_ps(book.value), _mm512_set1_ps(absmax));
    const __m512i u = _mm512_castps_si512(v);
    if constexpr (dtype == kFloat32)
        return {u};
    if constexpr (dtype == kFloat16) {
        const __m512i half = _mm512_cvtepu16_epi32(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
        return {_mm512_or_si512(half, _mm512_slli_epi32(half, 16))};
    }
    // Not vcvtneps2bf16, which takes denormals for 0.
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i bits = _mm512_mask_or_epi32(rounded, nan, u, _mm512_set1_epi32(0x400000));
    return {_mm512_shuffle_epi8(bits, _mm512_set4_epi32(0x0f0e0f0e, 0x0b0a0b0a, 0x07060706, 0x03020302))};
}

// Vector `half` of the run's values: two of them where they have 32 bits.
template <int32_t dtype>
NF4LORA_INLINE __m512i look_up(const Values<dtype> &values, __m128i bytes, int half) {
    const __m512i all = _mm512_broadcast_i32x4(bytes);
    if constexpr (dtype == kFloat32) {
        const __m512i lane = _mm512_setr_epi32(0, 0, 0x01010101, 0x01010101, 0x02020202, 0x02020202, 0x03030303, 0x03030303,
                                               0x04040404, 0x04040404, 0x05050505, 0x05050505, 0x06060606, 0x06060606,
                                               0x07070707, 0x07070707);
        const __m512i spread = _mm512_shuffle_epi8(all, _mm512_add_epi8(lane, _mm512_set1_epi8(static_cast<char>(8 * half))));
        const __m512i codes = _mm512_srlv_epi32(spread, _mm512_set1_epi64(4));  // their upper bits are not looked at
        return _mm512_permutexvar_epi32(codes, values.of_code);
    }
    const __m512i lane = _mm512_setr_epi32(0, 0x01010101, 0x02020202, 0x03030303, 0x04040404, 0x05050505, 0x06060606,
                                           0x07070707, 0x08080808, 0x09090909, 0x0a0a0a0a, 0x0b0b0b0b, 0x0c0c0c0c, 0x0d0d0d0d,
                                           0x0e0e0e0e, 0x0f0f0f0f);
    const __m512i codes = _mm512_srlv_epi16(_mm512_shuffle_epi8(all, lane), _mm512_set1_epi32(7 << 16 | 3));
    return _mm512_permutexvar_epi16(codes, values.of_code);
}

template <int32_t dtype, bool stream>
NF4LORA_INLINE void decode_run(const Values<dtype> &values, const uint8_t *packed, Element<dtype> *dst) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(packed));
    constexpr int kEach = 64 / sizeof *dst;
    NF4LORA_UNROLL
    for (int half = 0; half < kRun / kEach; ++half) {
        const __m512i found = look_up<dtype>(values, bytes, half);
        if constexpr (stream)
            _mm512_stream_si512(reinterpret_cast<__m512i *>(dst + half * kEach), found);
        else
            _mm512_storeu_si512(dst + half * kEach, found);
    }
}

template <int32_t dtype>
NF4LORA_INLINE void decode_some(const Values<dtype> &values, const uint8_t *packed, int count, Element<dtype> *dst) {
    const auto first = [](int n) { return static_cast<uint32_t>((uint64_t{1} << n) - 1); };
    const __m128i bytes = _mm_maskz_loadu_epi8(static_cast<__mmask16>(first((count + 1) / 2)), packed);
    if constexpr (dtype == kFloat32) {
        const uint32_t mask = first(count);
        _mm512_mask_storeu_epi32(dst, static_cast<__mmask16>(mask), look_up<dtype>(values, bytes, 0));
        _mm512_mask_storeu_epi32(dst + 16, static_cast<__mmask16>(mask >> 16), look_up<dtype>(values, bytes, 1));
    } else {
        _mm512_mask_storeu_epi16(dst, first(count), look_up<dtype>(values, bytes, 0));
    }
}
#else
#if defined(__AVX2__)
// fp32: of codes 0 to 7 and 8 to 15. 16 bits: the low bytes of all, and the high ones, in each half.
template <int32_t dtype>
struct Values {
    __m256i part[2];
};

NF4LORA_INLINE __m256i to_bf16(__m256 v) {
    const __m256i u = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
}

template <int32_t dtype>
NF4LORA_INLINE Values<dtype> make_values(const Codebook &book, float absmax) {
    const __m256 scale = _mm256_set1_ps(absmax);
    const __m256 low = _mm256_mul_ps(_mm256_loadu_ps(book.value), scale);
    const __m256 high = _mm256_mul_ps(_mm256_loadu_ps(book.value + 8), scale);
    if constexpr (dtype == kFloat32)
        return {{_mm256_castps_si256(low), _mm256_castps_si256(high)}};
    __m256i words;
    if constexpr (dtype == kFloat16)
        words = _mm256_set_m128i(_mm256_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT), _mm256_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT));
    else
        words = _mm256_permute4x64_epi64(_mm256_packus_epi32(to_bf16(low), to_bf16(high)), 0xd8);
    const __m256i low_bytes = _mm256_and_si256(words, _mm256_set1_epi16(0xff)), high_bytes = _mm256_srli_epi16(words, 8);
    const __m256i planes = _mm256_permute4x64_epi64(_mm256_packus_epi16(low_bytes, high_bytes), 0xd8);
    return {{_mm256_permute4x64_epi64(planes, 0x44), _mm256_permute4x64_epi64(planes, 0xee)}};
}

template <int32_t dtype, bool stream>
NF4LORA_INLINE void put(Element<dtype> *dst, __m256i v) {
    if constexpr (stream)
        _mm256_stream_si256(reinterpret_cast<__m256i *>(dst), v);
    else
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(dst), v);
}

template <int32_t dtype, bool stream>
NF4LORA_INLINE void decode_run(const Values<dtype> &values, const uint8_t *packed, Element<dtype> *dst) {
    if constexpr (dtype == kFloat32) {
        NF4LORA_UNROLL
        for (int i = 0; i < kRun; i += 8) {
            int32_t bytes;
            memcpy(&bytes, packed + i / 2, sizeof bytes);
            const __m256i codes = _mm256_srlv_epi32(_mm256_set1_epi32(bytes), _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24));
            const __m256 low = _mm256_permutevar8x32_ps(_mm256_castsi256_ps(values.part[0]), codes);
            const __m256 high = _mm256_permutevar8x32_ps(_mm256_castsi256_ps(values.part[1]), codes);
            const __m256 above_7 = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));
            put<dtype, stream>(dst + i, _mm256_castps_si256(_mm256_blendv_ps(low, high, above_7)));
        }
    } else {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(packed)), mask = _mm_set1_epi8(15);
        const __m128i even = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask), odd = _mm_and_si128(bytes, mask);
        const __m256i codes = _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
        const __m256i low = _mm256_shuffle_epi8(values.part[0], codes), high = _mm256_shuffle_epi8(values.part[1], codes);
        const __m256i a = _mm256_unpacklo_epi8(low, high), b = _mm256_unpackhi_epi8(low, high);
        put<dtype, stream>(dst, _mm256_permute2x128_si256(a, b, 0x20));
        put<dtype, stream>(dst + 16, _mm256_permute2x128_si256(a, b, 0x31));
    }
}
#else
template <int32_t dtype>
struct Values {
    Element<dtype> of_code[kCodes];
};

template <int32_t dtype>
NF4LORA_INLINE Values<dtype> make_values(const Codebook &book, float absmax) {
    float v[kCodes];
    for (int i = 0; i < kCodes; ++i)
        v[i] = decode(book, i, absmax);
    Values<dtype> values;
    store_elements(values.of_code, dtype, 0, kCodes, v);
    return values;
}

template <int32_t dtype, bool stream>
NF4LORA_INLINE void decode_run(const Values<dtype> &values, const uint8_t *packed, Element<dtype> *dst) {
    for (int i = 0; i < kRun / 2; ++i) {
        dst[2 * i] = values.of_code[packed[i] >> 4];
        dst[2 * i + 1] = values.of_code[packed[i] & 15];
    }
}
#endif

template <int32_t dtype>
NF4LORA_INLINE void decode_some(const Values<dtype> &values, const uint8_t *packed, int count, Element<dtype> *dst) {
    uint8_t bytes[kRun / 2] = {};
    Element<dtype> found[kRun];
    memcpy(bytes, packed, (count + 1) / 2);
    decode_run<dtype, false>(values, bytes, found);
    memcpy(dst, found, count * sizeof *dst);
}
#endif

// Before other threads may read what was streamed.
NF4LORA_INLINE void end_stream() {
#if defined(__AVX2__)
    _mm_sfence();
#endif
}

// ---- Elements [first, first + count) of the flattened weight, whose blocks begin on a byte.

template <int32_t dtype, bool stream = false>
static void decode_as(const Weight &w, int64_t first, int64_t count, Element<dtype> *dst) {
    const Codebook &book = codebook(w.quant_type);
    const uint8_t *packed = w.packed + first / 2;
    int64_t block = first / w.blocksize, left_of_block = (block + 1) * w.blocksize - first;
    Nested nested{};
    bool second = first & 1;  // of its byte
    for (; count > 0; ++block, left_of_block = w.blocksize) {
        const float absmax = block_absmax(w, block, nested);
        int64_t left = min_of(count, left_of_block);
        count -= left;
        if (second) {
            const float v = decode(book, *packed++ & 15, absmax);
            store_elements(dst++, dtype, 0, 1, &v);
            --left;
        }
        const Values<dtype> values = make_values<dtype>(book, absmax);
        for (; left >= 2 * kRun; left -= 2 * kRun, packed += kRun, dst += 2 * kRun) {
            decode_run<dtype, stream>(values, packed, dst);
            decode_run<dtype, stream>(values, packed + kRun / 2, dst + kRun);
        }
        for (; left >= kRun; left -= kRun, packed += kRun / 2, dst += kRun)
            decode_run<dtype, stream>(values, packed, dst);
        if (left > 0)
            decode_some<dtype>(values, packed, static_cast<int>(left), dst);
        dst += left;
        packed += left / 2;
        second = false;
    }
}

[[maybe_unused]] static void decode_elements(const Weight &w, int64_t first, int64_t count, float *__restrict dst) {
    decode_as<kFloat32>(w, first, count, dst);
}

// bf16 or fp16.
[[maybe_unused]] static void decode_halves(const Weight &w, int64_t first, int64_t count, int32_t dtype, uint16_t *dst) {
    if (dtype == kBFloat16)
        decode_as<kBFloat16>(w, first, count, dst);
    else
        decode_as<kFloat16>(w, first, count, dst);
}

}  // namespace NF4LORA_ISA
}  // namespace nf4lora
