// What the kernels of the linear share: tables of decoded bytes in shared memory, a member's scales, conversions, and the
// ordered sum of a reduction that several blocks split.
#pragma once
#include <cstring>

#include "launch.h"
#include "nf4.h"
#include "ptx.cuh"

namespace nf4lora {

constexpr int kLanes = 32;

static __constant__ Codebook kBooks[] = {kNF4Book, kFP4Book};
struct DynamicMap {
    float value[kDynamicCodes];
};
static constexpr DynamicMap copy_dynamic_map() {
    DynamicMap map{};
    for (int i = 0; i < kDynamicCodes; ++i)
        map.value[i] = kDynamicCodebook[i];
    return map;
}
static __constant__ DynamicMap kDynamicMap = copy_dynamic_map();

// ---- dtypes

template <class Pair>
NF4LORA_DEVICE uint32_t bits_of(Pair pair) {
    static_assert(sizeof(Pair) == sizeof(uint32_t), "two 16-bit values");
    uint32_t bits;
    memcpy(&bits, &pair, sizeof bits);
    return bits;
}

template <class T>
NF4LORA_DEVICE uint32_t round_pair(float low, float high);  // each rounded to T, low in the lower half
template <>
NF4LORA_DEVICE uint32_t round_pair<__nv_bfloat16>(float low, float high) {
    return bits_of(__floats2bfloat162_rn(low, high));
}
template <>
NF4LORA_DEVICE uint32_t round_pair<__half>(float low, float high) {
    return bits_of(__floats2half2_rn(low, high));
}

NF4LORA_DEVICE float to_float(float v) { return v; }
NF4LORA_DEVICE float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
NF4LORA_DEVICE float to_float(__half v) { return __half2float(v); }

template <class T>
NF4LORA_DEVICE T from_float(float v);
template <>
NF4LORA_DEVICE float from_float<float>(float v) {
    return v;
}
template <>
NF4LORA_DEVICE __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
    return __float2bfloat16_rn(v);
}
template <>
NF4LORA_DEVICE __half from_float<__half>(float v) {
    return __float2half_rn(v);
}

// Element i of an operand that is read rarely enough to look at its Dtype each time: bias, lora_A, lora_B.
NF4LORA_DEVICE float load_element(const void *p, int32_t dtype, int64_t i) {
    if (dtype == kFloat32)
        return static_cast<const float *>(p)[i];
    return dtype == kBFloat16 ? to_float(static_cast<const __nv_bfloat16 *>(p)[i])
                              : to_float(static_cast<const __half *>(p)[i]);
}

NF4LORA_DEVICE void store_element(void *p, int32_t dtype, int64_t i, float v) {
    if (dtype == kFloat32)
        static_cast<float *>(p)[i] = v;
    else if (dtype == kBFloat16)
        static_cast<__nv_bfloat16 *>(p)[i] = __float2bfloat16_rn(v);
    else
        static_cast<__half *>(p)[i] = __float2half_rn(v);
}

// ---- what a packed byte decodes to: row b of a table, one copy a lane, so that no two lanes meet in a bank. With rows
// of 256 bytes one byte_perm makes the whole offset: the byte above, the lane's column below.

constexpr uint32_t kTableRow = 256;
constexpr size_t kTableBytes = 256 * kTableRow;

// Rows hold 32 pairs of fp32 values of the code, 8 bytes a lane.
NF4LORA_DEVICE void fill_values(char *table, int32_t quant_type) {
    const Codebook &book = kBooks[quant_type];
    for (unsigned i = threadIdx.x; i < 256 * (kLanes / 2); i += blockDim.x) {
        const unsigned byte = i / (kLanes / 2), part = i % (kLanes / 2);
        const uint32_t even = __float_as_uint(book.value[byte >> 4]), odd = __float_as_uint(book.value[byte & 15]);
        *reinterpret_cast<uint4 *>(table + byte * kTableRow + part * sizeof(uint4)) = make_uint4(even, odd, even, odd);
    }
}

// The selector with which table_offset takes byte j of a word.
NF4LORA_DEVICE constexpr uint32_t byte_selector(uint32_t j) { return 0x5504u | j << 4; }

// Offset of this lane's copy of the row of a byte of `word`. column: 4 * lane (pairs) or 8 * lane (values).
NF4LORA_DEVICE uint32_t table_offset(uint32_t word, uint32_t column, uint32_t selector) {
    return __byte_perm(word, column, selector);
}

NF4LORA_DEVICE uint32_t lookup_pair(const char *table, uint32_t word, uint32_t column, uint32_t selector) {
    return *reinterpret_cast<const uint32_t *>(table + table_offset(word, column, selector));
}

NF4LORA_DEVICE float2 lookup_values(const char *table, uint32_t word, uint32_t column, uint32_t selector) {
    return *reinterpret_cast<const float2 *>(table + table_offset(word, column, selector));
}

// ---- scales

// Decodes the absmax of blocks; two roundings where it is nested. `map`: kDynamicCodes floats, filled by fill_map.
struct Scales {
    const void *absmax;
    const float *nested_absmax;
    const float *map;
    float offset;

    NF4LORA_DEVICE Scales(const Weight &w, const float *map_)
        : absmax(w.absmax), nested_absmax(w.nested_absmax), map(map_), offset(w.nested_absmax ? *w.offset : 0.0f) {}

    NF4LORA_DEVICE float operator()(int64_t block) const {
        if (!nested_absmax)
            return static_cast<const float *>(absmax)[block];
        const float scale = nested_absmax[block / kNestedBlocksize];
        return __fadd_rn(__fmul_rn(map[static_cast<const uint8_t *>(absmax)[block]], scale), offset);
    }

    static constexpr int64_t kNestedBlocksize = 256;
};

NF4LORA_DEVICE void fill_map(float *map) {
    for (unsigned i = threadIdx.x; i < kDynamicCodes; i += blockDim.x)
        map[i] = kDynamicMap.value[i];
}

// ---- groups

// Which member a row of the concatenated weight belongs to, and what comes before it.
struct Place {
    int member;
    int64_t row0;   // first row of the member in the group
    int64_t rank0;  // first of its columns of xa
};

template <class Params>
NF4LORA_DEVICE Place place_of(const Params &p, int64_t row) {
    Place place{0, 0, 0};
    while (place.member + 1 < p.count && row >= place.row0 + p.member[place.member].w.rows) {
        place.row0 += p.member[place.member].w.rows;
        place.rank0 += p.member[place.member].r;
        ++place.member;
    }
    return place;
}

// ---- reductions that several blocks split

// True in the block that comes last of `parts` to *counter, which starts as 0 and then is 0 again: what every block of
// them stored before is visible to all its threads. One word of shared memory at `word`; all threads of the block call.
NF4LORA_DEVICE bool comes_last(uint32_t *counter, uint32_t parts, uint32_t *word) {
    __syncthreads();  // all have stored
    if (threadIdx.x == 0)
        *word = atomic_inc_acq_rel(counter, parts - 1);
    __syncthreads();
    return *word + 1 == parts;
}

// ---- 16 bytes of T at a time: how they are made of fp32 values and taken apart, and the packed codes of as many weights

template <class T>
NF4LORA_DEVICE float2 unpack_pair(uint32_t pair);  // the lower half first
template <>
NF4LORA_DEVICE float2 unpack_pair<__nv_bfloat16>(uint32_t pair) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}
template <>
NF4LORA_DEVICE float2 unpack_pair<__half>(uint32_t pair) {
    return make_float2(__half2float(__ushort_as_half(static_cast<unsigned short>(pair))),
                       __half2float(__ushort_as_half(static_cast<unsigned short>(pair >> 16))));
}

template <class T>
struct Wide {
    static constexpr int kCount = 8;
    typedef uint32_t Codes;
    static NF4LORA_DEVICE Codes load_codes(const Codes *p) { return load_stream(p); }
    static NF4LORA_DEVICE uint4 pack(const float (&v)[kCount]) {
        return make_uint4(round_pair<T>(v[0], v[1]), round_pair<T>(v[2], v[3]), round_pair<T>(v[4], v[5]),
                          round_pair<T>(v[6], v[7]));
    }
    static NF4LORA_DEVICE void unpack(uint4 bits, float (&v)[kCount]) {
        const uint32_t pairs[] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
        for (int i = 0; i < kCount / 2; ++i) {
            const float2 values = unpack_pair<T>(pairs[i]);
            v[2 * i] = values.x, v[2 * i + 1] = values.y;
        }
    }
};

template <>
struct Wide<float> {
    static constexpr int kCount = 4;
    typedef uint16_t Codes;
    static NF4LORA_DEVICE Codes load_codes(const Codes *p) { return *p; }
    static NF4LORA_DEVICE uint4 pack(const float (&v)[kCount]) {
        return make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3]));
    }
    static NF4LORA_DEVICE void unpack(uint4 bits, float (&v)[kCount]) {
        v[0] = __uint_as_float(bits.x), v[1] = __uint_as_float(bits.y);
        v[2] = __uint_as_float(bits.z), v[3] = __uint_as_float(bits.w);
    }
};

// ---- decoding with a small table: row c holds the value of code c, 4 bytes a lane

constexpr size_t kCodeTableBytes = kCodes * kTableRow;

// The upper halves of the rows are never touched.
NF4LORA_DEVICE void fill_codes(char *table, int32_t quant_type) {
    const Codebook &book = kBooks[quant_type];
    for (unsigned i = threadIdx.x; i < kCodes * kLanes; i += blockDim.x)
        *reinterpret_cast<float *>(table + i / kLanes * kTableRow + i % kLanes * sizeof(float)) = book.value[i / kLanes];
}

// The 16 bytes of the weights of `codes`: each code * absmax in fp32, rounded to T.
template <class T>
NF4LORA_DEVICE uint4 decode_wide(const char *table, typename Wide<T>::Codes codes, float absmax) {
    const uint32_t column = threadIdx.x % kLanes * sizeof(float);
    const uint32_t even = codes >> 4 & 0x0f0f0f0fu, odd = codes & 0x0f0f0f0fu;
    float v[Wide<T>::kCount];
#pragma unroll
    for (int i = 0; i < Wide<T>::kCount; ++i) {
        const uint32_t offset = table_offset(i % 2 ? odd : even, column, byte_selector(i / 2));
        v[i] = __fmul_rn(*reinterpret_cast<const float *>(table + offset), absmax);
    }
    return Wide<T>::pack(v);
}

// Copies of the dynamic map for kernels that decode an absmax a lane, so that few of a warp's lanes meet in a bank:
// entry c of the copy of lane l is map[c * kMapCopies + l % kMapCopies].
constexpr int kMapCopies = 8;
constexpr size_t kMapCopiesBytes = kDynamicCodes * kMapCopies * sizeof(float);

NF4LORA_DEVICE void fill_map_copies(float *map) {
    for (unsigned i = threadIdx.x; i < kDynamicCodes * kMapCopies; i += blockDim.x)
        map[i] = kDynamicMap.value[i / kMapCopies];
}

// ---- division by what only the launch knows

// n / d by one multiplication, for n < 2^31 and 2 <= d < 2^31. Source: Granlund and Montgomery, PLDI 1994.
struct Divisor {
    uint32_t multiplier, shift;

    NF4LORA_DEVICE uint32_t quotient(uint32_t n) const { return __umulhi(n, multiplier) >> shift; }
};

constexpr int64_t kMostDivided = int64_t{1} << 31;

static inline Divisor divisor_of(int64_t d) {
    const int bits = log2_of(d);
    return {static_cast<uint32_t>((uint64_t{1} << (31 + bits)) / static_cast<uint64_t>(d) + 1),
            static_cast<uint32_t>(bits - 1)};
}

}  // namespace nf4lora
