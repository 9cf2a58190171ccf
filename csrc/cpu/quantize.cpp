// quantize:        packed[i] = code(a[i] * (1 / max(absmax, 1e-38))), absmax = max |a| over the block
// quantize_absmax: codes[i] = nearest of the dynamic map to (absmax[i] - offset) * (1 / max(nested_absmax, 1e-38))
// Operands:      a dtype [numel] -> packed uint8 [ceil(numel/2)], absmax fp32 [ceil(numel/blocksize)];
//                absmax fp32 [nblocks] -> codes uint8 [nblocks], nested_absmax fp32 [ceil(nblocks/nested_blocksize)]
// Rounding:      fp32 throughout: the reciprocal, the product, the subtraction of the offset; NaN reaches absmax
// Preconditions: blocksize even, so that blocks start on a byte; ops.py checks the rest
// Memory:        reads numel * sizeof(dtype), writes numel / 2 + 4 * nblocks bytes; no allocation
#include "codes.h"
#include "convert.h"
#include "intrinsics.h"
#include "ops.h"
#include "threads.h"

namespace nf4lora {
namespace NF4LORA_ISA {
namespace {

constexpr int64_t kLeastPart = 1 << 14, kPartsPerThread = 8;
constexpr float kLargest = std::numeric_limits<float>::max();
constexpr int64_t kPair = 2 * kWidth;  // elements that are encoded at a time

struct Pair {
    Vec even, odd;  // where loaded as a pair, the first and the second element of each byte
};

NF4LORA_INLINE Vec load_halves(const uint16_t *p) {
#if defined(__AVX512F__)
    return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
#elif defined(__AVX2__)
    return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
#else
    float values[kWidth];
    load_elements(p, kFloat16, 0, kWidth, values);
    return load(values);
#endif
}

// kPair elements from the first on, in two vectors.
template <int32_t dtype>
NF4LORA_INLINE Pair load_two(const Element<dtype> *a) {
    if constexpr (dtype == kFloat32)
        return {load(a), load(a + kWidth)};
    else if constexpr (dtype == kFloat16)
        return {load_halves(a), load_halves(a + kWidth)};
    UVec both;
    memcpy(&both, a, sizeof both);
    return {(Vec)(both << 16), (Vec)(both & 0xffff0000u)};
}

template <int... L>
NF4LORA_INLINE Pair split(Vec a, Vec b, std::integer_sequence<int, L...>) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    const auto in_order = [](__m256 v) { return (Vec)_mm256_permute4x64_pd((__m256d)v, 0xd8); };
    return {in_order(_mm256_shuffle_ps((__m256)a, (__m256)b, 0x88)), in_order(_mm256_shuffle_ps((__m256)a, (__m256)b, 0xdd))};
#else
    return {pick(a, b, std::integer_sequence<int, 2 * L...>{}), pick(a, b, std::integer_sequence<int, 2 * L + 1 ...>{})};
#endif
}

template <int32_t dtype>
NF4LORA_INLINE Pair load_pair(const Element<dtype> *a) {
    const Pair two = load_two<dtype>(a);
    return dtype == kBFloat16 ? two : split(two.even, two.odd, Lanes{});
}

template <class V>
NF4LORA_INLINE V larger(V a, V b) {
    return a > b ? a : b;
}

template <int distance, int... L>
NF4LORA_INLINE IVec largest_lane(IVec v, std::integer_sequence<int, L...> lanes) {
    if constexpr (distance == 0)
        return v;
    else
        return largest_lane<distance / 2>(larger(v, pick(v, v, std::integer_sequence<int, (L ^ distance)...>{})), lanes);
}

// Magnitudes order like their bit patterns, with NaN above infinity.
template <int32_t dtype>
NF4LORA_INLINE float absmax_of(const Element<dtype> *a, int64_t count) {
    using Bits = std::conditional_t<dtype == kFloat32, int32_t, int16_t>;
    typedef Bits BitsVec __attribute__((vector_size(sizeof(Vec))));
    constexpr Bits kMagnitude = std::numeric_limits<Bits>::max();
    constexpr int64_t kAtOnce = sizeof(Vec) / sizeof(Bits);
    BitsVec most = {};
    int64_t i = 0;
    for (; i + kAtOnce <= count; i += kAtOnce) {
        BitsVec bits;
        memcpy(&bits, a + i, sizeof bits);
        most = larger(most, bits & kMagnitude);
    }
    IVec lanes = (IVec)most;
    if (sizeof(Bits) == 2)
        lanes = larger(lanes & 0xffff, (IVec)((UVec)lanes >> 16));
    Bits all = static_cast<Bits>(largest_lane<kWidth / 2>(lanes, Lanes{})[0]);
    for (; i < count; ++i) {
        Bits bits;
        memcpy(&bits, a + i, sizeof bits);
        all = larger<Bits>(all, bits & kMagnitude);
    }
    return load_element(&all, dtype, 0);
}

// ---- The ranks of even and of odd, which are no NaN, among the boundaries: even's << 4 | odd's.

template <int32_t quant_type>
constexpr const Codebook &kBook = quant_type == kFP4 ? kFP4Book : kNF4Book;

#if defined(__AVX2__)
NF4LORA_INLINE Vec pick_any(Vec table, IVec index) {
#if defined(__AVX512F__)
    return (Vec)_mm512_permutexvar_ps((__m512i)index, (__m512)table);
#else
    return (Vec)_mm256_permutevar8x32_ps((__m256)table, (__m256i)index);
#endif
}

// By bisection: the boundaries that the last two steps look at, by the number known to lie below, counted down from 0.
struct Steps {
    float third[kWidth], fourth[kWidth];
};

static constexpr Steps steps_of(const Codebook &book) {
    Steps steps{};
    for (int i = 0; i < kCodes / 2; ++i) {
        steps.third[-i & (kWidth - 1)] = i < kCodes / 4 ? book.boundary[4 * i + 1] : 0;
        steps.fourth[-i & (kWidth - 1)] = book.boundary[2 * i];
    }
    return steps;
}

template <int32_t quant_type>
constexpr Steps kSteps = steps_of(kBook<quant_type>);

template <int32_t quant_type>
NF4LORA_INLINE IVec minus_rank(Vec v) {
    constexpr const float (&boundary)[kCodes - 1] = kBook<quant_type>.boundary;
    const IVec upper = v > broadcast(boundary[7]);
    IVec rank = upper + upper + (v > (upper ? broadcast(boundary[11]) : broadcast(boundary[3])));
    rank += rank + (v > pick_any(load(kSteps<quant_type>.third), rank));
    return rank + rank + (v > pick_any(load(kSteps<quant_type>.fourth), rank));
}
#else
template <int32_t quant_type>
NF4LORA_INLINE IVec minus_rank(Vec v) {
    IVec rank = {};
    NF4LORA_UNROLL
    for (int b = 0; b < kCodes - 1; ++b)
        rank += v > broadcast(kBook<quant_type>.boundary[b]);
    return rank;
}
#endif

#if defined(__AVX512BW__)
// NF4's boundaries lie far apart: the cell that 15 v + 16 is rounded to has one at most.
constexpr int kCellsOfV = 32;

struct BoundaryCells {
    float boundary[kCellsOfV];  // beyond all v where a cell has none
    uint16_t below[kCellsOfV];  // boundaries under the cell
};

static constexpr int cell_of_v(float v) {
    const double exact = 15.0 * v + 16.0;
    const int cell = static_cast<int>(exact);
    const double rest = exact - cell;
    return cell + (rest > 0.5 || (rest == 0.5 && cell % 2));
}

static constexpr BoundaryCells boundary_cells() {
    BoundaryCells cells{};
    for (int cell = 0; cell < kCellsOfV; ++cell) {
        int below = 0;
        while (below < kCodes - 1 && cell_of_v(kNF4Book.boundary[below]) < cell)
            ++below;
        cells.below[cell] = static_cast<uint16_t>(below);
        cells.boundary[cell] = below < kCodes - 1 && cell_of_v(kNF4Book.boundary[below]) == cell ? kNF4Book.boundary[below] : 2.0f;
    }
    return cells;
}

constexpr BoundaryCells kCells = boundary_cells();

static constexpr int rank_in_cell(float v) { return kCells.below[cell_of_v(v)] + (v > kCells.boundary[cell_of_v(v)]); }

// Right at both ends of the values of a code, so right between them.
static constexpr bool cells_are_right() {
    bool all = rank_in_cell(-1.01f) == 0 && rank_in_cell(1.01f) == kCodes - 1;
    for (int i = 0; i < kCodes - 1; ++i)
        all = all && rank_in_cell(kNF4Book.boundary[i]) == i && rank_in_cell(next_above(kNF4Book.boundary[i])) == i + 1;
    return all;
}

static_assert(cells_are_right());

NF4LORA_INLINE UVec ranks_by_cells(Vec even, Vec odd) {
    const Vec steps = broadcast(15), origin = broadcast(16 + 0x1p23f);  // leaves the cell in the lowest bits
    const __m512i even_cell = (__m512i)fma(even, steps, origin), odd_cell = (__m512i)fma(odd, steps, origin);
    const __m512 low = _mm512_loadu_ps(kCells.boundary), high = _mm512_loadu_ps(kCells.boundary + 16);
    const __mmask16 even_above = _mm512_cmp_ps_mask((__m512)even, _mm512_permutex2var_ps(low, even_cell, high), _CMP_GT_OQ);
    const __mmask16 odd_above = _mm512_cmp_ps_mask((__m512)odd, _mm512_permutex2var_ps(low, odd_cell, high), _CMP_GT_OQ);
    const __m512i cells = _mm512_mask_blend_epi16(0xaaaaaaaa, even_cell, _mm512_slli_epi32(odd_cell, 16));
    const __m512i below = _mm512_permutexvar_epi16(cells, _mm512_loadu_si512(kCells.below));
    __m512i ranks = _mm512_madd_epi16(below, _mm512_set1_epi32(1 << 16 | 16));
    ranks = _mm512_mask_add_epi32(ranks, even_above, ranks, _mm512_set1_epi32(16));
    return (UVec)_mm512_mask_add_epi32(ranks, odd_above, ranks, _mm512_set1_epi32(1));
}
#endif

template <int32_t quant_type>
NF4LORA_INLINE UVec ranks_of(Vec even, Vec odd) {
#if defined(__AVX512BW__)
    if constexpr (quant_type == kNF4)
        return ranks_by_cells(even, odd);
#endif
    return (UVec)(-16 * minus_rank<quant_type>(even) - minus_rank<quant_type>(odd));
}

// ---- blocks

struct ByteTable {
    uint8_t at[256];
};

// From two ranks to two codes.
static constexpr ByteTable codes_of_ranks(const Codebook &book) {
    ByteTable table{};
    for (int ranks = 0; ranks < 256; ++ranks)
        table.at[ranks] = static_cast<uint8_t>(book.code_of_rank[ranks >> 4] << 4 | book.code_of_rank[ranks & 15]);
    return table;
}

constexpr ByteTable kFP4Codes = codes_of_ranks(kFP4Book);

// The lowest byte of each lane.
NF4LORA_INLINE void store_bytes(uint8_t *out, UVec v) {
#if defined(__AVX512F__)
    _mm_storeu_si128(reinterpret_cast<__m128i *>(out), _mm512_cvtepi32_epi8((__m512i)v));
#elif defined(__AVX2__)
    const __m256i in_lane = _mm256_shuffle_epi8((__m256i)v, _mm256_set1_epi32(0x0c080400));
    const __m128i low = _mm256_castsi256_si128(in_lane), high = _mm256_extracti128_si256(in_lane, 1);
    _mm_storel_epi64(reinterpret_cast<__m128i *>(out), _mm_unpacklo_epi32(low, high));
#else
    for (int l = 0; l < kWidth; ++l)
        out[l] = static_cast<uint8_t>(v[l]);
#endif
}

template <int32_t dtype, int32_t quant_type>
NF4LORA_INLINE float quantize_block(const Element<dtype> *a, int64_t count, uint8_t *packed) {
    const float absmax = absmax_of<dtype>(a, count), inv = reciprocal(absmax);
    int64_t i = 0;
    if (absmax <= kLargest) {
        for (; i + kPair <= count; i += kPair) {
            const Pair v = load_pair<dtype>(a + i);
            store_bytes(packed + i / 2, ranks_of<quant_type>(v.even * broadcast(inv), v.odd * broadcast(inv)));
        }
        if (quant_type == kFP4)
            for (int64_t byte = 0; byte < i / 2; ++byte)
                packed[byte] = kFP4Codes.at[packed[byte]];
    }
    const Codebook &book = kBook<quant_type>;
    for (; i < count; i += 2) {
        const int even = encode(book, load_element(a, dtype, i) * inv);
        const int odd = i + 1 < count ? encode(book, load_element(a, dtype, i + 1) * inv) : book.zero;
        packed[i / 2] = static_cast<uint8_t>(even << 4 | odd);
    }
    return absmax;
}

template <int32_t dtype, int32_t quant_type>
void quantize_blocks(const QuantizeParams &p, int64_t first, int64_t last) {
    const int64_t blocksize = p.blocksize, numel = p.numel;
    const Element<dtype> *const a = static_cast<const Element<dtype> *>(p.a);
    uint8_t *const packed = p.packed;
    float *const absmax = p.absmax;
    for (int64_t block = first; block < last; ++block) {
        const int64_t i = block * blocksize;
        absmax[block] = quantize_block<dtype, quant_type>(a + i, min_of(blocksize, numel - i), packed + i / 2);
    }
}

template <int32_t dtype>
void quantize_as(const QuantizeParams &p) {
    const int64_t blocks = ceil_div(p.numel, p.blocksize);
    const int64_t part = max_of(blocks / (kPartsPerThread * max_of(p.workers, 1)), ceil_div(kLeastPart, p.blocksize));
    for_parts(p.workers, ceil_div(blocks, part), [&](int64_t i, int) {
        const auto run = p.quant_type == kFP4 ? quantize_blocks<dtype, kFP4> : quantize_blocks<dtype, kNF4>;
        run(p, i * part, min_of((i + 1) * part, blocks));
    });
}

}  // namespace

const char *quantize(const QuantizeParams &p) {
    if (p.dtype == kFloat32)
        quantize_as<kFloat32>(p);
    else if (p.dtype == kBFloat16)
        quantize_as<kBFloat16>(p);
    else
        quantize_as<kFloat16>(p);
    return nullptr;
}

const char *quantize_absmax(const QuantizeAbsmaxParams &p) {
    const Vec offset = broadcast(*p.offset);
    for (int64_t first = 0; first < p.nblocks; first += p.nested_blocksize) {
        int64_t i = first;
        const int64_t end = min_of(first + p.nested_blocksize, p.nblocks);
        uint32_t bits = 0;
        for (int64_t i = first; i < end; ++i) {
            const uint32_t magnitude = bits_of(p.absmax[i] - offset[0]) & 0x7fffffff;
            bits = magnitude > bits ? magnitude : bits;
        }
        const float nested_absmax = float_of(bits), inv = reciprocal(nested_absmax);
        p.nested_absmax[first / p.nested_blocksize] = nested_absmax;
        if (nested_absmax <= kLargest)
            for (; i + kGroup <= end; i += kGroup) {
                Vec v[kGroupVecs];
                for (int j = 0; j < kGroupVecs; ++j)
                    v[j] = (load(p.absmax + i + j * kWidth) - offset) * broadcast(inv);
                encode_group(kSignedMap, v, p.codes + i);
            }
        for (; i < end; ++i)
            p.codes[i] = static_cast<uint8_t>(encode_in_cell(kSignedCells, (p.absmax[i] - offset[0]) * inv));
    }
    return nullptr;
}

}  // namespace NF4LORA_ISA
}  // namespace nf4lora
