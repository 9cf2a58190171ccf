// x W^T for few tokens, without W decoded to memory: lanes run over K, and x is put once a call into the order in which
// codes come out of registers. A word of the packed bytes holds kPlanes codes; plane j of a group of words is made of
// nibble j of each, which is element j ^ 1 of those the word holds.
//   FloatPlanes: words of 32 bits, decoded to code * absmax in fp32.
//   HalfPlanes:  words of 16 bits, decoded to RN(code * absmax) in bf16, for x in bf16.
// Up to kFewTokens tokens meet the codes in registers, kFewRows rows of W at a time; more meet kRows rows, kTokens at a time:
// in registers too, or where that is dear decoded to a scratch before (kScratch). Where kSpan is not 0, a lane sums so many
// groups before they join the total.
// Neither tokens nor rows that are done beside one change its sums, but that AMX tiles (few.h) have an order of their own.
#pragma once
#include "codes.h"
#include "decode.h"
#include "intrinsics.h"

namespace nf4lora {
namespace NF4LORA_ISA {

constexpr int64_t kAbsmaxRun = 64;  // weights sure to have one absmax

#if defined(__AVX512F__)
struct FloatPlanes {
    using Element = float;
    using Table = __m512;
    using Plane = __m512;
    struct Codes {
        __m512i words;
        __m512 absmax;
    };
    static constexpr int kPlanes = 8, kSpan = kPartial / kPlanes;
    static constexpr int kTokens = 8, kRows = 3, kFewTokens = 4, kFewRows = 4;
    static constexpr bool kScratch = true;

    NF4LORA_INLINE Table table(const Codebook &book) { return _mm512_loadu_ps(book.value); }

    NF4LORA_INLINE Codes codes(const Table &, const uint8_t *packed, const float *absmax) {
        return {_mm512_loadu_si512(packed), _mm512_mask_mov_ps(_mm512_set1_ps(absmax[0]), 0xff00, _mm512_set1_ps(absmax[1]))};
    }

    template <int j>
    NF4LORA_INLINE Plane plane(const Table &table, const Codes &codes) {
        return _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(codes.words, 4 * j), table), codes.absmax);
    }

    NF4LORA_INLINE Plane load_plane(const float *x) { return _mm512_loadu_ps(x); }
    NF4LORA_INLINE void store_plane(float *w, Plane plane) { _mm512_storeu_ps(w, plane); }
    NF4LORA_INLINE Vec add_product(Plane x, Plane w, Vec sum) { return (Vec)_mm512_fmadd_ps(x, w, (__m512)sum); }
    NF4LORA_INLINE void take(const void *x, int32_t dtype, int64_t first, int64_t count, float *dst) {
        load_elements(x, dtype, first, count, dst);
    }
};
#else
struct FloatPlanes {
    using Element = float;
    struct Table {
        __m256 low, high;
    };
    using Plane = __m256;
    struct Codes {
        __m256i words;
        Table table;
    };
    static constexpr int kPlanes = 8, kSpan = kPartial / kPlanes;
    static constexpr int kTokens = 4, kRows = 3, kFewTokens = 2, kFewRows = 2;
    static constexpr bool kScratch = true;

    NF4LORA_INLINE Table table(const Codebook &book) {
        return {_mm256_loadu_ps(book.value), _mm256_loadu_ps(book.value + kCodes / 2)};
    }

    NF4LORA_INLINE Codes codes(const Table &table, const uint8_t *packed, const float *absmax) {
        const __m256 scale = _mm256_set1_ps(*absmax);
        return {_mm256_loadu_si256(reinterpret_cast<const __m256i *>(packed)),
                {_mm256_mul_ps(table.low, scale), _mm256_mul_ps(table.high, scale)}};
    }

    template <int j>
    NF4LORA_INLINE Plane plane(const Table &, const Codes &codes) {
        const __m256i code = _mm256_srli_epi32(codes.words, 4 * j), top = _mm256_slli_epi32(codes.words, 28 - 4 * j);
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(codes.table.low, code),
                                _mm256_permutevar8x32_ps(codes.table.high, code), _mm256_castsi256_ps(top));
    }

    NF4LORA_INLINE Plane load_plane(const float *x) { return _mm256_loadu_ps(x); }
    NF4LORA_INLINE void store_plane(float *w, Plane plane) { _mm256_storeu_ps(w, plane); }
    NF4LORA_INLINE Vec add_product(Plane x, Plane w, Vec sum) { return (Vec)_mm256_fmadd_ps(x, w, (__m256)sum); }
    NF4LORA_INLINE void take(const void *x, int32_t dtype, int64_t first, int64_t count, float *dst) {
        load_elements(x, dtype, first, count, dst);
    }
};
#endif

#if defined(__AVX512BF16__)
struct HalfPlanes {
    using Element = uint16_t;
    using Table = __m512;
    using Plane = __m512i;
    struct Codes {
        __m512i words, table;
    };
    static constexpr int kPlanes = 4, kSpan = 0;
    static constexpr int kTokens = 8, kRows = 2, kFewTokens = 4, kFewRows = 4;
    static constexpr bool kScratch = false;

    NF4LORA_INLINE Table table(const Codebook &book) { return _mm512_loadu_ps(book.value); }

    NF4LORA_INLINE Codes codes(const Table &table, const uint8_t *packed, const float *absmax) {
        const __m512 low = _mm512_mul_ps(table, _mm512_set1_ps(absmax[0]));
        const __m512 high = _mm512_mul_ps(table, _mm512_set1_ps(absmax[1]));
        return {_mm512_loadu_si512(packed), (__m512i)_mm512_cvtne2ps_pbh(high, low)};
    }

    // The upper 16 words have the second block's half of the table.
    template <int j>
    NF4LORA_INLINE Plane plane(const Table &, const Codes &codes) {
        const __m512i upper = _mm512_maskz_set1_epi16(0xffff0000, 16);
        const __m512i code = _mm512_and_si512(_mm512_srli_epi16(codes.words, 4 * j), _mm512_set1_epi16(15));
        return _mm512_permutexvar_epi16(_mm512_or_si512(code, upper), codes.table);
    }

    NF4LORA_INLINE Plane load_plane(const uint16_t *x) { return _mm512_loadu_si512(x); }
    NF4LORA_INLINE void store_plane(uint16_t *w, Plane plane) { _mm512_storeu_si512(w, plane); }
    NF4LORA_INLINE Vec add_product(Plane x, Plane w, Vec sum) {
        return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
    }
    NF4LORA_INLINE void take(const void *x, int32_t, int64_t first, int64_t count, uint16_t *dst) {
        memcpy(dst, static_cast<const uint16_t *>(x) + first, count * sizeof *dst);
    }
};
#endif

template <class P>
constexpr int kPlaneLanes = 4 * kWidth / sizeof(typename P::Element);
template <class P>
constexpr int64_t kWords = P::kPlanes *kPlaneLanes<P>;  // weights of a group, in as many bytes as a vector has

// x [first, first + cols) in the order of the planes, those of a group `stride` lines apart; zeros fill the last group.
template <class P>
static void put_planes(const void *x, int32_t dtype, int64_t first, int64_t cols, int64_t stride, typename P::Element *dst) {
    constexpr int kLanes = kPlaneLanes<P>;
    typename P::Element group[kWords<P>] = {};
    for (int64_t k = 0; k < cols; k += kWords<P>) {
        const int64_t count = min_of(kWords<P>, cols - k);
        P::take(x, dtype, first + k, count, group);
        memset(group + count, 0, (kWords<P> - count) * sizeof *group);
        for (int j = 0; j < P::kPlanes; ++j, dst += stride * kLanes)
            for (int l = 0; l < kLanes; ++l)
                dst[l] = group[l * P::kPlanes + (j ^ 1)];
    }
}

// absmax of `count` runs from `first` on; dst has room for a multiple of kGroup.
static void load_absmax(const Weight &w, int64_t first, int64_t count, float *dst) {
    const int64_t runs = w.blocksize / kAbsmaxRun;
    if (runs > 1) {
        for (int64_t i = 0; i < count;) {
            const int64_t block = (first + i) / runs, end = min_of(count, (block + 1) * runs - first);
            for (const float absmax = block_absmax(w, block); i < end; ++i)
                dst[i] = absmax;
        }
        return;
    }
    if (!w.nested_absmax) {
        memcpy(dst, static_cast<const float *>(w.absmax) + first, count * sizeof *dst);
        return;
    }
    const uint8_t *codes = static_cast<const uint8_t *>(w.absmax) + first;
    for (int64_t i = 0; i < count; i += kGroup) {
        uint8_t last[kGroup] = {};
        const bool whole = i + kGroup <= count;
        if (!whole)
            memcpy(last, codes + i, count - i);
        Vec values[kGroupVecs];
        decode_group(kSignedMap, whole ? codes + i : last, values);
        memcpy(dst + i, values, sizeof values);
    }
    const float offset = *w.offset;
    for (int64_t i = 0; i < count;) {
        const int64_t nested = (first + i) / w.nested_blocksize, end = min_of(count, (nested + 1) * w.nested_blocksize - first);
        for (const float scale = w.nested_absmax[nested]; i < end; ++i)
            dst[i] = dst[i] * scale + offset;
    }
}

struct Rest {
    uint8_t packed[sizeof(Vec)];
    float absmax[2];
};

// R rows of W as they are stored; those past the last row are the last.
template <class P, int R>
struct Coded {
    typename P::Table table;
    int64_t ahead;  // bytes to the next rows, which come into the L2 cache meanwhile
    const uint8_t *packed[R];
    const float *absmax[R];

    struct Group {
        const typename P::Table &table;
        typename P::Codes codes[R];
        template <int j>
        __attribute__((always_inline)) typename P::Plane plane(int n) const {
            return P::template plane<j>(table, codes[n]);
        }
    };

    __attribute__((always_inline)) Group group(int64_t g) const {
        Group found{table, {}};
        NF4LORA_UNROLL
        for (int n = 0; n < R; ++n)
            __builtin_prefetch(packed[n] + ahead + g * sizeof(Vec), 0, 3);
        NF4LORA_UNROLL
        for (int n = 0; n < R; ++n)
            found.codes[n] = P::codes(table, packed[n] + g * sizeof(Vec), absmax[n] + g * (kWords<P> / kAbsmaxRun));
        return found;
    }

    // Its last group, of which only one run is there: what follows has an absmax of 0, not that of another row.
    Coded last(int64_t g, Rest (&copy)[R]) const {
        Coded rest = *this;
        for (int n = 0; n < R; ++n) {
            copy[n] = {{}, {absmax[n][g * (kWords<P> / kAbsmaxRun)], 0}};
            memcpy(copy[n].packed, packed[n] + g * sizeof(Vec), kAbsmaxRun / 2);
            rest.packed[n] = copy[n].packed;
            rest.absmax[n] = copy[n].absmax;
        }
        return rest;
    }
};

// The same, decoded before.
template <class P, int R>
struct Decoded {
    const typename P::Element *planes;  // [groups, kPlanes, R, lanes]

    struct Group {
        const typename P::Element *planes;
        template <int j>
        __attribute__((always_inline)) typename P::Plane plane(int n) const {
            return P::load_plane(planes + (j * R + n) * kPlaneLanes<P>);
        }
    };

    __attribute__((always_inline)) Group group(int64_t g) const { return {planes + g * R * kWords<P>}; }
};

template <class P, int R, int... J>
NF4LORA_INLINE void decode_groups(const Coded<P, R> &rows, int64_t groups, typename P::Element *planes,
                                  std::integer_sequence<int, J...>) {
    constexpr int kLanes = kPlaneLanes<P>;
    for (int64_t g = 0; g < groups; ++g, planes += R * kWords<P>) {
        const auto group = rows.group(g);
        NF4LORA_UNROLL
        for (int n = 0; n < R; ++n)
            (P::store_plane(planes + (J * R + n) * kLanes, group.template plane<J>(n)), ...);
    }
}

// Of one plane.
template <class P, int T, int R>
NF4LORA_INLINE void add_products(const typename P::Element *x, const typename P::Plane (&w)[R], Vec (&acc)[T][R]) {
    NF4LORA_UNROLL
    for (int t = 0; t < T; ++t) {
        const typename P::Plane xt = P::load_plane(x + t * kPlaneLanes<P>);
        NF4LORA_UNROLL
        for (int n = 0; n < R; ++n)
            acc[t][n] = P::add_product(xt, w[n], acc[t][n]);
    }
}

template <class P, int T, int R, class Rows, int... J>
NF4LORA_INLINE void add_group(const Rows &rows, int64_t g, const typename P::Element *x, Vec (&acc)[T][R],
                              std::integer_sequence<int, J...>) {
    const auto group = rows.group(g);
    const auto add_plane = [&](auto plane) __attribute__((always_inline)) {
        constexpr int j = decltype(plane)::value;
        typename P::Plane w[R];
        NF4LORA_UNROLL
        for (int n = 0; n < R; ++n)
            w[n] = group.template plane<j>(n);
        add_products<P, T, R>(x + j * T * kPlaneLanes<P>, w, acc);
    };
    (add_plane(std::integral_constant<int, J>{}), ...);
}

// totals [T, R, kWidth] += x W^T of T tokens and R rows of W over `groups` groups.
template <class P, int T, int R, class Rows>
NF4LORA_INLINE void add_groups(const Rows &rows, int64_t groups, const typename P::Element *x, float *totals) {
    constexpr auto kEach = std::make_integer_sequence<int, P::kPlanes>{};
    for (int64_t g = 0; g < groups;) {
        Vec acc[T][R];
        NF4LORA_UNROLL
        for (int t = 0; t < T; ++t)
            NF4LORA_UNROLL
            for (int n = 0; n < R; ++n)
                acc[t][n] = P::kSpan ? Vec{} : load(totals + (t * R + n) * kWidth);
        for (const int64_t end = P::kSpan ? min_of(g + P::kSpan, groups) : groups; g < end; ++g, x += T * kWords<P>)
            add_group<P, T, R>(rows, g, x, acc, kEach);
        NF4LORA_UNROLL
        for (int t = 0; t < T; ++t)
            NF4LORA_UNROLL
            for (int n = 0; n < R; ++n) {
                float *const at = totals + (t * R + n) * kWidth;
                store(at, P::kSpan ? load(at) + acc[t][n] : acc[t][n]);
            }
    }
}

// The same over one group or more, without spans, where products take most of the time: a plane comes out of the codes two
// planes before its products, among those of the others, which leave the units that it needs idle. next_packed, which a
// later call reads, comes into the L2 cache meanwhile.
template <class P, int T, int R, int... J>
NF4LORA_INLINE void add_planes(const Coded<P, R> &rows, int64_t groups, const uint8_t *const (&next_packed)[R],
                               const typename P::Element *x, float *totals, std::integer_sequence<int, J...>) {
    static_assert(P::kSpan == 0);
    Vec acc[T][R];
    NF4LORA_UNROLL
    for (int t = 0; t < T; ++t)
        NF4LORA_UNROLL
        for (int n = 0; n < R; ++n)
            acc[t][n] = load(totals + (t * R + n) * kWidth);
    typename P::Codes codes[R];
    typename P::Plane w[R], next[R];
    const auto take = [&](int n, int64_t g) __attribute__((always_inline)) {
        codes[n] = P::codes(rows.table, rows.packed[n] + g * sizeof(Vec), rows.absmax[n] + g * (kWords<P> / kAbsmaxRun));
    };
    NF4LORA_UNROLL
    for (int n = 0; n < R; ++n) {
        take(n, 0);
        w[n] = P::template plane<0>(rows.table, codes[n]);
        next[n] = P::template plane<1>(rows.table, codes[n]);
    }
    int64_t g = 0;
    do {
        const int64_t then = min_of(g + 1, groups - 1);
        const auto add_plane = [&](auto plane) __attribute__((always_inline)) {
            constexpr int j = decltype(plane)::value, ahead = (j + 2) % P::kPlanes;
            typename P::Plane after[R];
            NF4LORA_UNROLL
            for (int n = 0; n < R; ++n) {
                if (ahead == 0) {
                    __builtin_prefetch(next_packed[n] + g * sizeof(Vec), 0, 2);
                    take(n, then);
                }
                after[n] = P::template plane<ahead>(rows.table, codes[n]);
            }
            add_products<P, T, R>(x + j * T * kPlaneLanes<P>, w, acc);
            NF4LORA_UNROLL
            for (int n = 0; n < R; ++n) {
                w[n] = next[n];
                next[n] = after[n];
            }
        };
        (add_plane(std::integral_constant<int, J>{}), ...);
        x += T * kWords<P>;
    } while (++g < groups);
    NF4LORA_UNROLL
    for (int t = 0; t < T; ++t)
        NF4LORA_UNROLL
        for (int n = 0; n < R; ++n)
            store(totals + (t * R + n) * kWidth, acc[t][n]);
}

// ---- Sums of the lanes of many vectors at once, each as sum_lanes has it.

template <int d, int... L>
NF4LORA_INLINE Vec fold(Vec a, Vec b, std::integer_sequence<int, L...>) {
    return pick(a, b, std::integer_sequence<int, (L & d ? kWidth + (L ^ d) : L)...>{}) +
           pick(a, b, std::integer_sequence<int, (L & d ? kWidth + L : (L ^ d))...>{});
}

// Up to kWidth vectors: bit i of a vector's number is bit i from above of the lane its sum is in.
template <int count, int d = kWidth / 2>
NF4LORA_INLINE Vec folded(const float *v) {
    constexpr int half = (count + 1) / 2;
    float sums[half * kWidth];
    NF4LORA_UNROLL
    for (int i = 0; i < half; ++i)
        store(sums + i * kWidth, fold<d>(load(v + 2 * i * kWidth), load(v + (2 * i + (2 * i + 1 < count)) * kWidth), Lanes{}));
    if constexpr (d > 1)
        return folded<half, d / 2>(sums);
    else
        return load(sums);
}

constexpr int folded_lane(int i) {
    int lane = 0;
    for (int d = kWidth / 2; d > 0; d /= 2, i /= 2)
        lane += i % 2 * d;
    return lane;
}

template <int... L>
NF4LORA_INLINE Vec in_order(Vec sums, std::integer_sequence<int, L...>) {
    return pick(sums, sums, std::integer_sequence<int, folded_lane(L)...>{});
}

// sums has room for a multiple of kWidth.
template <int count>
NF4LORA_INLINE void sum_all(const float *v, float *sums) {
    constexpr int now = count < kWidth ? count : kWidth;
    store(sums, in_order(folded<now>(v), Lanes{}));
    if constexpr (count > now)
        sum_all<count - now>(v + now * kWidth, sums + now);
}

}  // namespace NF4LORA_ISA
}  // namespace nf4lora
