// 8-bit codes of an optimizer's states, or of absmax, a group of 64 at a time: decoded, and found again as the nearest of 256 values.
//   encode: as ../optim.h's encode_in_cell, the cell of a value tells which boundary decides.
//   Tables are looked up by permutations of bytes where the processor has them, one by one elsewhere.
#pragma once
#include "../optim.h"
#include "convert.h"

namespace nf4lora {
namespace NF4LORA_ISA {

constexpr int kGroup = 64;
constexpr int kGroupVecs = kGroup / kWidth;

#if defined(__AVX512VBMI__) && !defined(__clang__) && __GNUC__ >= 11
// ---- bytes in registers. Elements of four vectors lie as bytes in `crossed` order, which they get into and out of
// without leaving their lane of 16 bytes; crossing once more gives their own order.

typedef uint8_t Bytes __attribute__((vector_size(kGroup)));
typedef int8_t Signs __attribute__((vector_size(kGroup)));
typedef uint16_t Shorts __attribute__((vector_size(kGroup)));
typedef int16_t SignedShorts __attribute__((vector_size(kGroup)));
using EveryByte = std::make_integer_sequence<int, kGroup>;
using EveryShort = std::make_integer_sequence<int, kGroup / 2>;

template <class V>
NF4LORA_INLINE V load_as(const void *p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}

template <int... B>
NF4LORA_INLINE Bytes crossed(Bytes bytes, std::integer_sequence<int, B...>) {
    return __builtin_shuffle(bytes, Bytes{static_cast<uint8_t>(B % 16 / 4 * 16 + B / 16 * 4 + B % 4)...});
}

// Units of a and b in turn, from the first or the last half of each lane.
template <bool last, class V, int... I>
NF4LORA_INLINE V in_turn(V a, V b, std::integer_sequence<int, I...>) {
    using Unit = std::remove_reference_t<decltype(a[0])>;
    constexpr int n = sizeof...(I), lane = n / 4;
    return __builtin_shuffle(a, b, V{static_cast<Unit>(I / lane * lane + last * lane / 2 + I % lane / 2 + I % 2 * n)...});
}

// Every other unit of a, then of b, lane by lane.
template <bool odd, class V, int... I>
NF4LORA_INLINE V every_other(V a, V b, std::integer_sequence<int, I...>) {
    using Unit = std::remove_reference_t<decltype(a[0])>;
    constexpr int n = sizeof...(I), lane = n / 4;
    return __builtin_shuffle(
        a, b, V{static_cast<Unit>(I / lane * lane + I % (lane / 2) * 2 + odd + (I % lane >= lane / 2 ? n : 0))...});
}

// Of 256 entries, by all 8 bits.
NF4LORA_INLINE Bytes look_up(const uint8_t *table, Bytes index) {
    const Bytes low = __builtin_shuffle(load_as<Bytes>(table), load_as<Bytes>(table + 64), index);
    const Bytes high = __builtin_shuffle(load_as<Bytes>(table + 128), load_as<Bytes>(table + 192), index);
    return (Signs)index < 0 ? high : low;
}

struct alignas(kGroup) Table {
    uint8_t plane[4][kDynamicCodes];  // one byte of each entry, the lowest first
};

static constexpr Table table_of(const float (&entries)[kDynamicCodes]) {
    Table table{};
    for (int i = 0; i < kDynamicCodes; ++i)
        for (int byte = 0; byte < 4; ++byte)
            table.plane[byte][i] = static_cast<uint8_t>(__builtin_bit_cast(uint32_t, entries[i]) >> 8 * byte);
    return table;
}

NF4LORA_INLINE void look_up(const Table &table, Bytes codes, Vec (&out)[kGroupVecs]) {
    Bytes found[4];
    NF4LORA_UNROLL
    for (int b = 0; b < 4; ++b)
        found[b] = look_up(table.plane[b], codes);
    const Bytes a = in_turn<false>(found[0], found[1], EveryByte{}), b = in_turn<true>(found[0], found[1], EveryByte{});
    const Bytes c = in_turn<false>(found[2], found[3], EveryByte{}), d = in_turn<true>(found[2], found[3], EveryByte{});
    out[0] = (Vec)in_turn<false>((Shorts)a, (Shorts)c, EveryShort{});
    out[1] = (Vec)in_turn<true>((Shorts)a, (Shorts)c, EveryShort{});
    out[2] = (Vec)in_turn<false>((Shorts)b, (Shorts)d, EveryShort{});
    out[3] = (Vec)in_turn<true>((Shorts)b, (Shorts)d, EveryShort{});
}

template <class V>
NF4LORA_INLINE SignedShorts high_halves(V a, V b) {
    return (SignedShorts)every_other<true>((Shorts)a, (Shorts)b, EveryShort{});
}

template <bool high, class V>
NF4LORA_INLINE Bytes halves(V a, V b) {
    return every_other<high>((Bytes)a, (Bytes)b, EveryByte{});
}

NF4LORA_INLINE Bytes take_codes(const uint8_t *codes) { return crossed(load_as<Bytes>(codes), EveryByte{}); }

NF4LORA_INLINE void put_codes(uint8_t *codes, Bytes bytes) {
    bytes = crossed(bytes, EveryByte{});
    memcpy(codes, &bytes, sizeof bytes);
}

// ---- cells that a register or a few can hold: as many to an octave of |v| as keep the boundaries apart. A word, the upper
// half of v's bits, tells the octave and the cell in it.

constexpr int kOctaves = 32;     // to the one of 1, by the lowest bits of the exponent
constexpr int kOctaveBits = 7;   // of the mantissa, in a word
constexpr int kLeastWord = (127 - 31) << kOctaveBits;
constexpr int kZeroCode = 127;   // of the signed map
constexpr int kMostCells = 2 * kDynamicCodes;

struct alignas(kGroup) Cells {
    uint16_t shift[kOctaves], base[kOctaves];  // cell of a word: (word >> shift) + base
    uint8_t below[kMostCells];                 // boundaries under a cell, of those above 0
    int count;
};

static constexpr int word_of(float magnitude) {
    const int word = __builtin_bit_cast(int32_t, magnitude) >> 16;
    return word < kLeastWord ? kLeastWord : word;
}

static constexpr int cell_of(const Cells &cells, float magnitude) {
    const int word = word_of(magnitude), octave = word >> kOctaveBits & (kOctaves - 1);
    return ((word >> cells.shift[octave]) + cells.base[octave]) & 0xffff;
}

// `first` is the first boundary above 0.
static constexpr Cells cells_of(const float (&boundary)[kDynamicCodes], int first) {
    Cells cells{};
    for (int octave = 0; octave < kOctaves; ++octave) {
        int shift = kOctaveBits + 1;
        for (bool apart = false; !apart;) {
            --shift;
            apart = true;
            int before = -1;
            for (int i = first; i < kDynamicCodes - 1; ++i) {
                const int word = word_of(boundary[i]), next = word_of(next_above(boundary[i]));
                if ((word >> kOctaveBits & (kOctaves - 1)) != octave || word >> shift != next >> shift)
                    continue;
                apart = apart && before != word >> shift;
                before = word >> shift;
            }
        }
        cells.shift[octave] = static_cast<uint16_t>(shift);
        cells.base[octave] = static_cast<uint16_t>(cells.count - ((kLeastWord + (octave << kOctaveBits)) >> shift));
        cells.count += 1 << (kOctaveBits - shift);
    }
    for (int i = first; i < kDynamicCodes - 2; ++i)  // what lies above all is still compared with the last
        for (int cell = cell_of(cells, boundary[i]) + 1; cell < kMostCells; ++cell)
            ++cells.below[cell];
    return cells;
}

struct DynamicMap {
    bool is_signed;
    Table value, boundary;
    Cells cells;
    const DynamicCells *all;
};

static constexpr DynamicMap map_of(const DynamicCells &all, bool is_signed) {
    float boundary[kDynamicCodes] = {};
    for (int i = 0; i < kDynamicCodes - 1; ++i)
        boundary[i] = all.boundary[i];
    boundary[kDynamicCodes - 1] = -std::numeric_limits<float>::infinity();  // under -1, which has 256 - 1 under its code, 0
    return {is_signed, table_of(all.value), table_of(boundary), cells_of(boundary, is_signed ? kZeroCode : 0), &all};
}

constexpr DynamicMap kSignedMap = map_of(kSignedCells, true), kUnsignedMap = map_of(kUnsignedCells, false);

// What `encode_group` makes of v: right at both ends of the values of a code, so right between them.
static constexpr int derive_code(const DynamicMap &map, float v) {
    const bool negative = map.is_signed && v < 0;
    const int above_zero = map.cells.below[cell_of(map.cells, negative ? -v : v)];
    const int below = map.is_signed ? kZeroCode + (negative ? ~above_zero : above_zero) : above_zero;
    return (below + (below < 0 || v > map.all->boundary[below])) & 255;
}

static constexpr bool right(const DynamicMap &map) {
    const int cells_in_reach = map.is_signed ? kDynamicCodes : kMostCells;
    bool all = map.cells.count <= cells_in_reach && derive_code(map, -1.0f) == 0 && derive_code(map, 1.01f) == kDynamicCodes - 1;
    for (int i = 0; i < kDynamicCodes - 1; ++i)
        all = all && derive_code(map, map.all->boundary[i]) == i && derive_code(map, next_above(map.all->boundary[i])) == i + 1;
    return all;
}

static_assert(right(kSignedMap) && right(kUnsignedMap));

NF4LORA_INLINE Shorts cells_in(const Cells &cells, Shorts words) {
    const Shorts octave = words >> kOctaveBits;
    return (words >> __builtin_shuffle(load_as<Shorts>(cells.shift), octave)) +
           __builtin_shuffle(load_as<Shorts>(cells.base), octave);
}

// Boundaries that are known to lie under each of four vectors' elements.
NF4LORA_INLINE Bytes below(const DynamicMap &map, const Vec (&v)[kGroupVecs]) {
    const SignedShorts high[] = {high_halves(v[0], v[1]), high_halves(v[2], v[3])}, least = SignedShorts{} + kLeastWord;
    Shorts cell[2];
    NF4LORA_UNROLL
    for (int i = 0; i < 2; ++i) {
        const SignedShorts size = map.is_signed ? high[i] & 0x7fff : high[i];
        cell[i] = cells_in(map.cells, (Shorts)(least < size ? size : least));
    }
    const Bytes low = halves<false>(cell[0], cell[1]), found = look_up(map.cells.below, low);
    if (!map.is_signed)
        return halves<true>(cell[0], cell[1]) != 0 ? look_up(map.cells.below + kDynamicCodes, low) : found;
    return (Signs)halves<true>(high[0], high[1]) < 0 ? kZeroCode - 1 - found : kZeroCode + found;
}

NF4LORA_INLINE void decode_group(const DynamicMap &map, const uint8_t *codes, Vec (&out)[kGroupVecs]) {
    look_up(map.value, take_codes(codes), out);
}

// Of numbers in [-1.01, 1.01].
NF4LORA_INLINE void encode_group(const DynamicMap &map, const Vec (&v)[kGroupVecs], uint8_t *codes) {
    Vec boundary[kGroupVecs];
    const Bytes under = below(map, v);
    look_up(map.boundary, under, boundary);
    const SignedShorts a = high_halves(v[0] > boundary[0], v[1] > boundary[1]);
    const SignedShorts b = high_halves(v[2] > boundary[2], v[3] > boundary[3]);
    put_codes(codes, under - halves<false>(a, b));
}
#else
struct DynamicMap {
    const DynamicCells *all;
};

constexpr DynamicMap kSignedMap{&kSignedCells}, kUnsignedMap{&kUnsignedCells};

NF4LORA_INLINE void decode_group(const DynamicMap &map, const uint8_t *codes, Vec (&out)[kGroupVecs]) {
    float found[kGroup];
    for (int i = 0; i < kGroup; ++i)
        found[i] = map.all->value[codes[i]];
    memcpy(out, found, sizeof found);
}

NF4LORA_INLINE void encode_group(const DynamicMap &map, const Vec (&v)[kGroupVecs], uint8_t *codes) {
    float values[kGroup], boundary[kGroup];
    int32_t below[kGroup];
    memcpy(values, v, sizeof values);
    for (int i = 0; i < kGroup; ++i)
        below[i] = place_of_cell(values[i]);
    for (int i = 0; i < kGroup; ++i)
        below[i] = map.all->below[below[i]];
    for (int i = 0; i < kGroup; ++i)
        boundary[i] = map.all->boundary[below[i]];
    for (int i = 0; i < kGroup; ++i)
        codes[i] = static_cast<uint8_t>(below[i] + !(values[i] <= boundary[i]));
}
#endif

}  // namespace NF4LORA_ISA
}  // namespace nf4lora
