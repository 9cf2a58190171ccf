// quantize:        packed[i] = code(a[i] * (1 / max(absmax, 1e-38))), absmax = max |a| over the block
// quantize_absmax: codes[i] = nearest of the dynamic map to (absmax[i] - offset) * (1 / max(nested_absmax, 1e-38))
// Operands:      a dtype [numel] -> packed uint8 [ceil(numel/2)], absmax fp32 [ceil(numel/blocksize)];
//                absmax fp32 [nblocks] -> codes uint8 [nblocks], nested_absmax fp32 [ceil(nblocks/nested_blocksize)]
// Rounding:      fp32 throughout: the reciprocal, the product, the subtraction of the offset; NaN reaches absmax
// Preconditions: blocksize a power of two from 32 to 4096; ops.py checks the rest
// Memory:        reads numel * sizeof(dtype) once (blocks longer than a warp's step twice), writes numel / 2 + 4 * nblocks
//                bytes; 4.6 KiB shared
// Budget:        at most 16 instructions a weight (16-bit NF4, blocksize 64, sm_90a); bench/codegen.py counts them
//
// A step: each lane loads 16 bytes of a and stores their codes, so that loads and stores of a warp are both contiguous;
// a block is 4 to 32 lanes (encode_blocks), or a warp's loop (encode_long_blocks). What whole steps do not cover, or all
// of a tensor whose pointers are not aligned, takes encode_rest.
#include <cfloat>
#include <cstring>
#include <limits>

#include "../api.h"
#include "../launch.h"
#include "../nf4.h"
#include "../ptx.cuh"

namespace nf4lora {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 32;
constexpr int kWarps = kThreads / kLanes;
constexpr int kSteps = 2;  // of a thread per tile, all loads ahead of the first use
constexpr unsigned kAllLanes = ~0u;

// ---- ranks by table: the cell of v on a grid knows the only boundary inside it, and how many lie below

constexpr int kCellsPerUnit = 16;
constexpr float kLowest = -1.0f - 1.0f / kCellsPerUnit;  // lower edge of the first cell; |v| is at most 1 and a rounding
constexpr int kCells = 64;                               // of which 34 are in use; any bits of v find a row
constexpr int kCopies = 16;                              // a half warp of 8-byte loads, no two lanes in a bank
// v + kGrid has the cell's index from bit kCellBit of its mantissa on: 6144 has an ulp of 2^-11, 2^-7 of a cell.
constexpr float kGrid = 6144.0f - kLowest;
constexpr int kCellBit = 7;
constexpr uint32_t kCellMask = (kCells - 1) << kCellBit;
static_assert(1 << kCellBit == kCopies * 8, "the index bits, in place, are the address of a row of copies");

struct Cell {
    float boundary;  // infinity where there is none
    uint32_t below;  // boundaries in lower cells
};

struct Ranks {
    Cell cell[kCells];
    float apart[kCodes - 1];  // boundaries the grid cannot separate, compared with every v
    int count_apart;
    uint8_t codes[256];       // two ranks, as two codes
};

static constexpr Ranks derive_ranks(const Codebook &book) {
    Ranks ranks{};
    for (int c = 0; c < kCells; ++c)
        ranks.cell[c].boundary = std::numeric_limits<float>::infinity();
    for (int i = 0; i < kCodes - 1; ++i) {
        const double position = (static_cast<double>(book.boundary[i]) - kLowest) * kCellsPerUnit;
        const int cell = static_cast<int>(position);
        // The addition moves v by at most half an ulp, 2^-8 of a cell; with twice that, a boundary's cell is its own.
        const double margin = 1.0 / 128, within = position - cell;
        if (within > margin && within < 1 - margin && ranks.cell[cell].boundary > 1.0f) {
            ranks.cell[cell].boundary = book.boundary[i];
            for (int c = cell + 1; c < kCells; ++c)
                ++ranks.cell[c].below;
        } else {
            ranks.apart[ranks.count_apart++] = book.boundary[i];
        }
    }
    for (int byte = 0; byte < 256; ++byte)
        ranks.codes[byte] = static_cast<uint8_t>(book.code_of_rank[byte >> 4] << 4 | book.code_of_rank[byte & 15]);
    return ranks;
}

static constexpr bool ranks_are_codes(const Codebook &book) {
    for (int i = 0; i < kCodes; ++i)
        if (book.code_of_rank[i] != i)
            return false;
    return true;
}

static constexpr bool all_boundaries_are_inside(const Codebook &book) {
    return book.boundary[0] > -1.0f && book.boundary[kCodes - 2] < 1.0f;
}
static_assert(all_boundaries_are_inside(kNF4Book) && all_boundaries_are_inside(kFP4Book), "cells cover every boundary");

static __constant__ Codebook kBooks[] = {kNF4Book, kFP4Book};
static __constant__ Ranks kRanks[] = {derive_ranks(kNF4Book), derive_ranks(kFP4Book)};

template <QuantType kType>
struct Format {
    static constexpr bool kRanksAreCodes = ranks_are_codes(kType == kFP4 ? kFP4Book : kNF4Book);
    static constexpr int kApart = derive_ranks(kType == kFP4 ? kFP4Book : kNF4Book).count_apart;
};
static_assert(Format<kNF4>::kApart == 0 && Format<kFP4>::kApart == 1, "what a weight costs beyond the table");

struct Tables {
    Cell cell[kCells][kCopies];
    uint8_t codes[256];
};

NF4LORA_DEVICE void fill(Tables *tables, int quant_type) {
#pragma unroll 1
    for (unsigned i = threadIdx.x; i < kCells * kCopies; i += kThreads)
        tables->cell[i / kCopies][i % kCopies] = kRanks[quant_type].cell[i / kCopies];
    for (unsigned i = threadIdx.x; i < 256; i += kThreads)
        tables->codes[i] = kRanks[quant_type].codes[i];
    __syncthreads();
}

// ---- a step: 16 bytes of a

template <class T>
constexpr int kStepWeights = static_cast<int>(sizeof(uint4) / sizeof(T));

// The codes of a step, element 2j in the high nibble of byte j.
template <class T>
struct StepCodes {
    typedef uint32_t Type;
};
template <>
struct StepCodes<float> {
    typedef uint16_t Type;
};

NF4LORA_DEVICE void unpack(uint4 raw, float (&v)[4], const float *) {
    v[0] = __uint_as_float(raw.x);
    v[1] = __uint_as_float(raw.y);
    v[2] = __uint_as_float(raw.z);
    v[3] = __uint_as_float(raw.w);
}

NF4LORA_DEVICE void unpack(uint4 raw, float (&v)[8], const __nv_bfloat16 *) {
    const uint32_t word[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        v[2 * j] = __uint_as_float(word[j] << 16);
        v[2 * j + 1] = __uint_as_float(word[j] & 0xffff0000u);
    }
}

NF4LORA_DEVICE void unpack(uint4 raw, float (&v)[8], const __half *) {
    const uint32_t word[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        __half2 pair;
        memcpy(static_cast<void *>(&pair), &word[j], sizeof pair);
        const float2 values = __half22float2(pair);
        v[2 * j] = values.x;
        v[2 * j + 1] = values.y;
    }
}

template <int kCount>
NF4LORA_DEVICE float max_of_lane(const float (&v)[kCount]) {
    float m = fabsf(v[0]);
#pragma unroll
    for (int i = 1; i < kCount; ++i)
        m = max_magnitude(m, v[i]);
    return m;
}

// Of the kGroup lanes that share a block.
template <int kGroup>
NF4LORA_DEVICE float max_of_group(float m) {
#pragma unroll
    for (int apart = kGroup / 2; apart > 0; apart /= 2)
        m = max_magnitude(m, __shfl_xor_sync(kAllLanes, m, apart));
    return m;
}

// Where the fast encoder holds: neither absmax nor its reciprocal is denormal or overflows. An absmax of 0 has only zeros.
NF4LORA_DEVICE bool is_usual(float absmax) { return (absmax >= FLT_MIN && absmax < 0x1p126f) || absmax == 0.0f; }

// 1 / absmax as `reciprocal` has it, of a usual absmax: the steps that division compiles to where it needs no care.
NF4LORA_DEVICE float reciprocal_of_usual(float absmax) {
    const float normal = fmaxf(absmax, FLT_MIN), r = reciprocal_approx(normal);
    return __fmaf_rn(r, -__fmaf_rn(normal, r, -1.0f), r);
}

template <QuantType kType, int kCount>
NF4LORA_DEVICE uint32_t encode_step(const Tables *tables, const float (&x)[kCount], float inv) {
    const uint32_t copy = threadIdx.x % kCopies * sizeof(Cell);
    uint32_t ranks = 0, above = 0, above_apart = 0;
#pragma unroll
    for (int place = kCount - 1; place >= 0; --place) {
        const float v = __fmul_rn(x[place ^ 1], inv);
        const uint32_t row = __float_as_uint(__fadd_rn(v, kGrid)) & kCellMask;
        const Cell cell = *reinterpret_cast<const Cell *>(reinterpret_cast<const char *>(tables->cell) + (row | copy));
        ranks = ranks * 16 + cell.below;
        // The sign bit of the difference, exact in sign, is v > boundary; the three bits beside it go at the end.
        above = above << 4 | __float_as_uint(__fsub_rn(cell.boundary, v)) >> 28;
        if (Format<kType>::kApart > 0)
            above_apart = above_apart << 4 | __float_as_uint(__fsub_rn(kRanks[kType].apart[0], v)) >> 28;
    }
    ranks += above >> 3 & 0x11111111u;
    if (Format<kType>::kApart > 0)
        ranks += above_apart >> 3 & 0x11111111u;
    if (Format<kType>::kRanksAreCodes)
        return ranks;
    uint32_t codes = 0;
#pragma unroll
    for (int byte = 0; byte < kCount / 2; ++byte)
        codes |= static_cast<uint32_t>(tables->codes[ranks >> 8 * byte & 255]) << 8 * byte;
    return codes;
}

NF4LORA_DEVICE float to_float(float v) { return v; }
NF4LORA_DEVICE float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
NF4LORA_DEVICE float to_float(__half v) { return __half2float(v); }

// The codes of a step whose absmax is not usual.
template <class T, QuantType kType>
NF4LORA_DEVICE uint32_t encode_unusual_step(const T *a, float absmax) {
    const float inv = reciprocal(absmax);
    uint32_t codes = 0;
#pragma unroll 1
    for (int place = kStepWeights<T> - 1; place >= 0; --place)
        codes = codes << 4 | encode(kBooks[kType], __fmul_rn(to_float(a[place ^ 1]), inv));
    return codes;
}

// Blocks of kGroup lanes; tiles of kSteps steps a thread.
template <class T, QuantType kType, int kGroup>
__global__ void __launch_bounds__(kThreads) encode_blocks(
    const T *__restrict__ a, uint8_t *__restrict__ packed, float *__restrict__ absmax, int64_t tiles) {
    typedef typename StepCodes<T>::Type Codes;
    NF4LORA_SHARED(Tables, tables);
    fill(tables, kType);
    bool unusual = false;
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const int64_t first = tile * (kSteps * kThreads) + threadIdx.x;
        float *my_absmax = absmax + tile * (kSteps * kThreads / kGroup) + threadIdx.x / kGroup;
        uint4 raw[kSteps];
#pragma unroll
        for (int s = 0; s < kSteps; ++s)
            raw[s] = load_stream(reinterpret_cast<const uint4 *>(a) + first + s * kThreads);
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
            float x[kStepWeights<T>];
            unpack(raw[s], x, a);
            const float m = max_of_group<kGroup>(max_of_lane(x));
            unusual |= !is_usual(m);
            const uint32_t codes = encode_step<kType>(tables, x, reciprocal_of_usual(m));
            reinterpret_cast<Codes *>(packed)[first + s * kThreads] = static_cast<Codes>(codes);
            if (threadIdx.x % kGroup == 0)
                my_absmax[s * (kThreads / kGroup)] = m;
        }
    }
    if (!__any_sync(kAllLanes, unusual))
        return;
    // Once more, out of the way of the loop above: its codes of the unusual blocks are wrong.
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x)
#pragma unroll 1
        for (int s = 0; s < kSteps; ++s) {
            const int64_t step = (tile * kSteps + s) * kThreads + threadIdx.x;
            const T *mine = a + step * kStepWeights<T>;
            float m = 0.0f;
#pragma unroll 1
            for (int i = 0; i < kStepWeights<T>; ++i)
                m = max_magnitude(m, to_float(mine[i]));
            m = max_of_group<kGroup>(m);
            if (!is_usual(m))
                reinterpret_cast<Codes *>(packed)[step] = static_cast<Codes>(encode_unusual_step<T, kType>(mine, m));
        }
}

// A warp a block, of `steps` steps.
template <class T, QuantType kType>
__global__ void __launch_bounds__(kThreads) encode_long_blocks(
    const T *__restrict__ a, uint8_t *__restrict__ packed, float *__restrict__ absmax, int64_t blocks, int steps) {
    typedef typename StepCodes<T>::Type Codes;
    NF4LORA_SHARED(Tables, tables);
    fill(tables, kType);
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarps;
    int64_t block = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes;
    for (; block < blocks; block += stride) {
        const int64_t first = block * steps * kLanes + threadIdx.x % kLanes;
        const uint4 *in = reinterpret_cast<const uint4 *>(a) + first;
        Codes *out = reinterpret_cast<Codes *>(packed) + first;
        float x[kStepWeights<T>];
        float m = 0.0f;
#pragma unroll 2
        for (int s = 0; s < steps; ++s) {
            unpack(in[s * kLanes], x, a);
            m = max_magnitude(m, max_of_lane(x));
        }
        m = max_of_group<kLanes>(m);
        if (threadIdx.x % kLanes == 0)
            absmax[block] = m;
        const float inv = reciprocal_of_usual(m);
#pragma unroll 2
        for (int s = 0; s < steps; ++s) {
            unpack(in[s * kLanes], x, a);
            out[s * kLanes] = static_cast<Codes>(encode_step<kType>(tables, x, inv));
        }
        if (!is_usual(m))
            for (int s = 0; s < steps; ++s)
                out[s * kLanes] = static_cast<Codes>(encode_unusual_step<T, kType>(a + (first + s * kLanes) * kStepWeights<T>, m));
    }
}

NF4LORA_DEVICE float load_element(const void *a, int dtype, int64_t i) {
    if (dtype == kFloat32)
        return static_cast<const float *>(a)[i];
    return dtype == kBFloat16 ? to_float(static_cast<const __nv_bfloat16 *>(a)[i]) : to_float(static_cast<const __half *>(a)[i]);
}

// Blocks from first_block to the last, short or not; a warp a block. Any alignment.
__global__ void __launch_bounds__(kThreads) encode_rest(QuantizeParams p, int64_t first_block) {
    const Codebook &book = kBooks[p.quant_type];
    const int lane = threadIdx.x % kLanes;
    const int64_t blocks = (p.numel + p.blocksize - 1) / p.blocksize, stride = static_cast<int64_t>(gridDim.x) * kWarps;
    int64_t block = first_block + static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes;
    for (; block < blocks; block += stride) {
        const int64_t first = block * p.blocksize;
        const int64_t end = first + p.blocksize < p.numel ? first + p.blocksize : p.numel;
        float m = 0.0f;
        for (int64_t i = first + lane; i < end; i += kLanes)
            m = max_magnitude(m, load_element(p.a, p.dtype, i));
        m = max_of_group<kLanes>(m);
        if (lane == 0)
            p.absmax[block] = m;
        const float inv = reciprocal(m);
        for (int64_t i = first + 2 * lane; i < end; i += 2 * kLanes) {
            const int high = encode(book, __fmul_rn(load_element(p.a, p.dtype, i), inv));
            const int low = i + 1 < end ? encode(book, __fmul_rn(load_element(p.a, p.dtype, i + 1), inv)) : book.zero;
            p.packed[i / 2] = static_cast<uint8_t>(high << 4 | low);
        }
    }
}

// ---- double quantization: a warp a nested block

static __constant__ DynamicBoundaries kDynamicBoundariesOnDevice = kDynamicBoundaries;

__global__ void __launch_bounds__(kThreads) encode_absmax(QuantizeAbsmaxParams p) {
    NF4LORA_SHARED(float, boundaries);
    for (unsigned i = threadIdx.x; i < kDynamicCodes - 1; i += kThreads)
        boundaries[i] = kDynamicBoundariesOnDevice.at[i];
    __syncthreads();
    const int64_t block = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes;
    const int64_t first = block * p.nested_blocksize + threadIdx.x % kLanes;
    const int64_t end = (block + 1) * p.nested_blocksize < p.nblocks ? (block + 1) * p.nested_blocksize : p.nblocks;
    const float offset = *p.offset;
    float m = 0.0f;
#pragma unroll 8
    for (int64_t i = first; i < end; i += kLanes)
        m = max_magnitude(m, __fsub_rn(p.absmax[i], offset));
    m = max_of_group<kLanes>(m);
    if (first < end && threadIdx.x % kLanes == 0)
        p.nested_absmax[block] = m;
    const float inv = reciprocal(m);
#pragma unroll 4
    for (int64_t i = first; i < end; i += kLanes)
        p.codes[i] = encode_dynamic(boundaries, __fmul_rn(__fsub_rn(p.absmax[i], offset), inv));
}

// ---- host

// Launches what the fast kernels cover; covered: how many blocks that is.
template <class T, QuantType kType>
const char *encode_whole(const QuantizeParams &p, void *stream, int64_t *covered) {
    constexpr int kTile = kSteps * kThreads * kStepWeights<T>, kWarpStep = kLanes * kStepWeights<T>;
    const T *a = static_cast<const T *>(p.a);
    const bool is_long = p.blocksize > kWarpStep;
    const int64_t tiles = p.numel / (is_long ? p.blocksize : kTile);
    *covered = is_long ? tiles : tiles * (kTile / p.blocksize);
    if (tiles == 0)
        return nullptr;
    const unsigned grid = grid_of(p.workers, is_long ? ceil_div(tiles, kWarps) : tiles);
    if (is_long)
        return NF4LORA_LAUNCH((encode_long_blocks<T, kType>), grid, kThreads, sizeof(Tables), stream, a, p.packed, p.absmax,
                              tiles, static_cast<int>(p.blocksize / kWarpStep));
    switch (p.blocksize / kStepWeights<T>) {
        case 4:  // 16-bit only: 32 of 4 bytes are 8 lanes
            return NF4LORA_LAUNCH((encode_blocks<T, kType, sizeof(T) == 2 ? 4 : 8>), grid, kThreads, sizeof(Tables), stream, a,
                                  p.packed, p.absmax, tiles);
        case 8:
            return NF4LORA_LAUNCH((encode_blocks<T, kType, 8>), grid, kThreads, sizeof(Tables), stream, a, p.packed,
                                  p.absmax, tiles);
        case 16:
            return NF4LORA_LAUNCH((encode_blocks<T, kType, 16>), grid, kThreads, sizeof(Tables), stream, a, p.packed,
                                  p.absmax, tiles);
        default:
            return NF4LORA_LAUNCH((encode_blocks<T, kType, 32>), grid, kThreads, sizeof(Tables), stream, a, p.packed,
                                  p.absmax, tiles);
    }
}

template <class T>
const char *encode_whole(const QuantizeParams &p, void *stream, int64_t *covered) {
    if (!aligned(p.a, sizeof(uint4)) || !aligned(p.packed, sizeof(typename StepCodes<T>::Type)))
        return nullptr;
    return p.quant_type == kFP4 ? encode_whole<T, kFP4>(p, stream, covered) : encode_whole<T, kNF4>(p, stream, covered);
}

}  // namespace
}  // namespace nf4lora

const char *nf4lora_cuda_quantize(const nf4lora::QuantizeParams *p, void *stream) {
    using namespace nf4lora;
    if (p->blocksize < 32 || p->blocksize > 4096 || (p->blocksize & (p->blocksize - 1)))
        return "blocksize must be a power of two from 32 to 4096";
    int64_t covered = 0;
    const char *error = p->dtype == kFloat32    ? encode_whole<float>(*p, stream, &covered)
                        : p->dtype == kBFloat16 ? encode_whole<__nv_bfloat16>(*p, stream, &covered)
                                                : encode_whole<__half>(*p, stream, &covered);
    const int64_t rest = ceil_div(p->numel, p->blocksize) - covered;
    if (error || rest == 0)
        return error;
    const unsigned grid = grid_of(p->workers, ceil_div(rest, kWarps));
    return NF4LORA_LAUNCH(encode_rest, grid, kThreads, 0, stream, *p, covered);
}

const char *nf4lora_cuda_quantize_absmax(const nf4lora::QuantizeAbsmaxParams *p, void *stream) {
    using namespace nf4lora;
    if (p->nblocks == 0)
        return nullptr;
    const unsigned grid = static_cast<unsigned>(ceil_div(ceil_div(p->nblocks, p->nested_blocksize), kWarps));
    return NF4LORA_LAUNCH(encode_absmax, grid, kThreads, kDynamicCodes * sizeof(float), stream, *p);
}
