// The weights of a group, decoded into one matrix for the library's product, with the adapters beside or below them
// Operands:      members' packed and absmax as Weight says, lora_A, lora_B -> decoded dtype [N + below, ld]:
//                rows [0, N), a member's below the other's: columns [0, K) its weights, [K, ld) scaling_i * B_i in the
//                columns of its xa and zeros in all others (forward, ld > K); rows [N, N + below) the A_i, then zeros (backward)
// Rounding:      code * absmax in fp32, then to dtype, as dequantize has it; scaling * B likewise; A once
// Preconditions: blocksize a power of two from 32 to 4096, nested blocks of 256; no pointer needs more than its
//                element's alignment; quant_type, blocksize and nesting the same for all members
// Memory:        reads the codes, the absmax and the adapters once; what it writes stays in L2 for the product as far
//                as it fits; 4 KiB shared, nested 12 KiB
// Budget:        at most 6.5 instructions a weight (16-bit, nested, sm_90a); bench/codegen.py counts them
//
// A warp decodes 1024 weights at a time, as in dequantize.cu, where 16-byte stores fit into rows and pointers are
// aligned, however rows and blocks lie to each other. All else goes element by element along the rows.
#include "../tile.cuh"
#include "paths.h"

namespace nf4lora {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kLanes;
constexpr int kWarpTile = 1024;  // weights a warp decodes at a time: at most one block a lane
constexpr int kUnit = 4 * kThreads;  // elements a block takes at a time where it goes one by one
constexpr int64_t kUnitCost = 8;     // of one of those, in weights of a tile

struct Job {
    Member member[kMaxGroup];
    void *out;  // dtype [N + below, ld]
    int64_t count;
    int64_t N;
    int64_t K;
    int64_t below;
    int64_t ld;
    int32_t A_dtype;
    int32_t B_dtype;
    int32_t shift;          // log2 of the blocksize
    int32_t nested_shift;   // log2 of the elements of a nested block
    uint32_t decoders;      // blocks that decode whole tiles; the others do what is left, and the adapters
    Divisor stores_of_row;  // 16-byte stores of the weights of a row
};

// Of lists of units that several blocks work through, one list after the other, those of one block: every `step`-th.
// What one list leaves of a round goes on in the next. Uniform in a block, as the hot loop is faster for it.
struct Share {
    uint32_t at, step;

    NF4LORA_DEVICE void pass(uint32_t units) { at -= units; }  // once at >= units
};

// Rows and columns of `out`.
struct Area {
    int64_t row, rows, column, columns;
};

// out[row, column] = value(fetch(row, column)) everywhere in an area, one by one. A thread fetches several before it
// waits for the first, if fetch does no more than load.
template <class T, class Fetch, class Value>
NF4LORA_DEVICE void fill(const Job &p, Share &share, const Area &area, const Fetch &fetch, const Value &value) {
    const int64_t count = area.rows * area.columns;
    const uint32_t units = static_cast<uint32_t>((count + kUnit - 1) / kUnit);
    const uint32_t columns = static_cast<uint32_t>(area.columns);
    for (; share.at < units; share.at += share.step) {
        const int64_t first = int64_t{share.at} * kUnit, first_row = first / area.columns;
        const uint32_t first_column = static_cast<uint32_t>(first - first_row * area.columns);
        decltype(fetch(int64_t{}, int64_t{})) fetched[kUnit / kThreads] = {};
        uint32_t rows_on[kUnit / kThreads] = {};
        const auto column_of = [&](uint32_t i, uint32_t row_on) {
            return area.column + (first_column + i - row_on * columns);
        };
#pragma unroll
        for (uint32_t i = threadIdx.x, j = 0; j < kUnit / kThreads; ++j, i += kThreads)
            if (first + i < count) {
                rows_on[j] = (first_column + i) / columns;
                fetched[j] = fetch(area.row + first_row + rows_on[j], column_of(i, rows_on[j]));
            }
#pragma unroll
        for (uint32_t i = threadIdx.x, j = 0; j < kUnit / kThreads; ++j, i += kThreads)
            if (first + i < count)
                static_cast<T *>(p.out)[(area.row + first_row + rows_on[j]) * p.ld + column_of(i, rows_on[j])] =
                    from_float<T>(value(fetched[j]));
    }
    share.pass(units);
}

// An element of lora_A or lora_B as it lies in memory, and what multiplies it.
struct Loaded {
    uint32_t bits;
    float factor;
};

NF4LORA_DEVICE uint32_t load_bits(const void *p, int32_t dtype, int64_t i) {
    return dtype == kFloat32 ? static_cast<const uint32_t *>(p)[i] : static_cast<const uint16_t *>(p)[i];
}

NF4LORA_DEVICE float value_of(Loaded loaded, int32_t dtype) {
    const float value = dtype == kFloat32    ? __uint_as_float(loaded.bits)
                        : dtype == kBFloat16 ? unpack_pair<__nv_bfloat16>(loaded.bits).x
                                             : unpack_pair<__half>(loaded.bits).x;
    return __fmul_rn(loaded.factor, value);
}

// What stands beside and below the weights.
template <class T>
NF4LORA_DEVICE void fill_adapters(const Job &p, Share &share) {
    const auto load_B = [&p](int64_t row, int64_t column) {
        const Place place = place_of(p, row);
        const Member &of = p.member[place.member];
        const int64_t rank = column - p.K - place.rank0;
        if (rank < 0 || rank >= of.r)
            return Loaded{0, 1.0f};
        return Loaded{load_bits(of.lora_B, p.B_dtype, (row - place.row0) * of.r + rank), of.scaling};
    };
    const auto load_A = [&p](int64_t row, int64_t column) {
        int64_t rank = row - p.N;
        int of = 0;
        while (of < p.count && rank >= p.member[of].r)
            rank -= p.member[of++].r;
        if (of == p.count)
            return Loaded{0, 1.0f};
        return Loaded{load_bits(p.member[of].lora_A, p.A_dtype, rank * p.K + column), 1.0f};
    };
    fill<T>(p, share, Area{0, p.N, p.K, p.ld - p.K}, load_B, [&p](Loaded of) { return value_of(of, p.B_dtype); });
    fill<T>(p, share, Area{p.N, p.below, 0, p.K}, load_A, [&p](Loaded of) { return value_of(of, p.A_dtype); });
}

// What decode_tile keeps in registers of a member.
struct Source {
    const uint8_t *packed;
    const void *absmax;
    const float *nested_absmax;
    float offset;
    uint32_t stores;   // 16-byte stores of the member's weights
    char *out;         // of its first row
    uint32_t skipped;  // bytes between the weights of two rows
};

// row: the member's first in the group
template <class T, bool kNested>
NF4LORA_DEVICE Source source_of(const Job &p, int m, int64_t row) {
    const Weight &w = p.member[m].w;
    return {w.packed, w.absmax, w.nested_absmax, kNested ? *w.offset : 0.0f,
            static_cast<uint32_t>(w.rows * p.K / Wide<T>::kCount),
            static_cast<char *>(p.out) + row * p.ld * static_cast<int64_t>(sizeof(T)),
            static_cast<uint32_t>((p.ld - p.K) * sizeof(T))};
}

template <class T>
constexpr int kTileStores = kWarpTile / Wide<T>::kCount;  // of a warp

// One tile of each warp, or, if not kWhole, what there is of them.
template <class T, bool kNested, bool kWhole>
NF4LORA_DEVICE void decode_tile(const Job &p, const Source &from, const char *table, const float *map_copy,
                                uint32_t tile) {
    typedef typename Wide<T>::Codes Codes;
    constexpr int kCount = Wide<T>::kCount, kSteps = kTileStores<T> / kLanes;
    const uint32_t lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    const uint32_t block_first = tile * (kWarps * kTileStores<T>), first = block_first + warp * kTileStores<T>;
    if (!kWhole && first >= from.stores)
        return;
    const uint32_t at = first + lane;
    const Codes *codes_in = reinterpret_cast<const Codes *>(from.packed) + at;
    char *out = from.out + uint64_t{at} * sizeof(uint4);
    Codes codes[kSteps];
#pragma unroll
    for (int s = 0; s < kSteps; ++s)
        codes[s] = kWhole || at + s * kLanes < from.stores ? Wide<T>::load_codes(codes_in + s * kLanes) : Codes{0};

    const uint32_t left = kWhole || from.stores - first > kTileStores<T> ? kTileStores<T> : from.stores - first;
    const uint32_t last_block = (left * kCount - 1) >> p.shift;
    const int64_t block = (int64_t{block_first} * kCount >> p.shift) + (warp * kWarpTile >> p.shift) +
                          (lane < last_block ? lane : last_block);
    float scale;  // of the warp's block number `lane`
    if (kNested)
        scale = __fadd_rn(__fmul_rn(map_copy[static_cast<const uint8_t *>(from.absmax)[block] * kMapCopies],
                                    from.nested_absmax[int64_t{block_first} * kCount >> p.nested_shift]), from.offset);
    else
        scale = static_cast<const float *>(from.absmax)[block];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
        const uint32_t store = at + s * kLanes;
        const uint64_t gaps = uint64_t{p.stores_of_row.quotient(store)} * from.skipped;
        const float absmax = __shfl_sync(~0u, scale, (s * kLanes + lane) * kCount >> p.shift);
        if (kWhole || store < from.stores)
            reinterpret_cast<uint4 *>(out + gaps)[s * kLanes] = decode_wide<T>(table, codes[s], absmax);
    }
}

template <class T, bool kNested>
__global__ void __launch_bounds__(kThreads) decode_members(const __grid_constant__ Job p) {
    NF4LORA_SHARED(char, table);
    float *map = reinterpret_cast<float *>(table + kCodeTableBytes);
    fill_codes(table, p.member[0].w.quant_type);
    if (kNested)
        fill_map_copies(map);
    __syncthreads();

    constexpr uint32_t kBlockStores = kWarps * kTileStores<T>;
    const float *map_copy = map + threadIdx.x % kMapCopies;
    int64_t row = 0;
    if (blockIdx.x < p.decoders) {
        Share share{blockIdx.x, p.decoders};
        for (int m = 0; m < p.count; ++m) {
            const Source from = source_of<T, kNested>(p, m, row);
            const uint32_t tiles = from.stores / kBlockStores;
            for (; share.at < tiles; share.at += share.step)
                decode_tile<T, kNested, true>(p, from, table, map_copy, share.at);
            share.pass(tiles);
            row += p.member[m].w.rows;
        }
    } else {
        Share share{blockIdx.x - p.decoders, gridDim.x - p.decoders};
        for (int m = 0; m < p.count; ++m) {
            const Source from = source_of<T, kNested>(p, m, row);
            for (; share.at < 1; share.at += share.step)
                decode_tile<T, kNested, false>(p, from, table, map_copy, from.stores / kBlockStores);
            share.pass(1);
            row += p.member[m].w.rows;
        }
        fill_adapters<T>(p, share);
    }
}

// Any shape, any alignment.
template <class T>
__global__ void __launch_bounds__(kThreads) decode_elements(const __grid_constant__ Job p) {
    NF4LORA_SHARED(float, map);
    fill_map(map);
    __syncthreads();

    Share share{blockIdx.x, gridDim.x};
    const auto decoded = [&p, map](int64_t row, int64_t column) {
        const Place place = place_of(p, row);
        const Weight &w = p.member[place.member].w;
        const int64_t i = (row - place.row0) * p.K + column;
        const int code = w.packed[i / 2] >> (i % 2 ? 0 : 4) & 15;
        return __fmul_rn(kBooks[w.quant_type].value[code], Scales(w, map)(i >> p.shift));
    };
    fill<T>(p, share, Area{0, p.N, 0, p.K}, decoded, [](float value) { return value; });
    fill_adapters<T>(p, share);
}

// Whether 16-byte stores fit into rows, codes of one can be loaded at once, and a member's stores can be divided.
template <class T>
bool fits_wide(const Job &p) {
    constexpr int kCount = Wide<T>::kCount;
    bool fits = p.K % kCount == 0 && p.K / kCount > 1 && p.ld % kCount == 0 && aligned(p.out, sizeof(uint4));
    for (int m = 0; m < p.count; ++m)
        fits = fits && aligned(p.member[m].w.packed, sizeof(typename Wide<T>::Codes)) &&
               p.member[m].w.rows * p.K / kCount < kMostDivided;
    return fits;
}

template <class T>
const char *decode(Job p, int32_t workers, void *stream) {
    constexpr int64_t kTile = kWarpTile * kWarps;
    if (!fits_wide<T>(p)) {
        const unsigned grid = grid_of(workers, ceil_div((p.N + p.below) * p.ld, kTile));
        return NF4LORA_LAUNCH(decode_elements<T>, grid, kThreads, kDynamicCodes * sizeof(float), stream, p);
    }
    p.stores_of_row = divisor_of(p.K / Wide<T>::kCount);
    const int64_t weights = p.N * p.K, adapters = p.N * (p.ld - p.K) + p.below * p.K, cost = kUnitCost * adapters;
    const int32_t their_share = static_cast<int32_t>(workers * cost / (weights + cost));
    const unsigned others = grid_of(their_share, ceil_div(adapters, kUnit) + p.count);
    p.decoders = grid_of(workers - static_cast<int32_t>(others), ceil_div(weights, kTile));
    const unsigned grid = p.decoders + others;
    if (p.member[0].w.nested_absmax)
        return NF4LORA_LAUNCH((decode_members<T, true>), grid, kThreads, kCodeTableBytes + kMapCopiesBytes, stream, p);
    return NF4LORA_LAUNCH((decode_members<T, false>), grid, kThreads, kCodeTableBytes, stream, p);
}

template <class Params>
const char *decode(const Params &params, Job p, int32_t dtype, void *stream) {
    for (int m = 0; m < kMaxGroup; ++m)
        p.member[m] = params.member[m];
    p.out = params.decoded;
    p.count = params.count;
    p.N = params.N;
    p.K = params.K;
    p.A_dtype = params.A_dtype;
    const Weight &w = p.member[0].w;
    if (!power_of_two(w.blocksize) || w.blocksize < 32 || w.blocksize > 4096 ||
        (w.nested_absmax && w.nested_blocksize != Scales::kNestedBlocksize))
        return "blocksize must be a power of two from 32 to 4096, a nested block 256 of them";
    if (p.ld == 0 || p.N + p.below == 0)
        return nullptr;
    p.shift = log2_of(w.blocksize);
    p.nested_shift = p.shift + log2_of(Scales::kNestedBlocksize);
    const int32_t workers = params.config.split;
    if (dtype == kFloat32)
        return decode<float>(p, workers, stream);
    return dtype == kBFloat16 ? decode<__nv_bfloat16>(p, workers, stream) : decode<__half>(p, workers, stream);
}

}  // namespace

const char *decode_group(const GroupFwdParams &p, void *stream) {
    Job job{};
    job.ld = p.ld;
    job.B_dtype = p.B_dtype;
    return decode(p, job, p.x_dtype, stream);
}

const char *decode_group(const GroupBwdParams &p, void *stream) {
    Job job{};
    job.ld = p.K;
    job.below = p.ld - p.N;
    return decode(p, job, p.dy_dtype, stream);
}

}  // namespace nf4lora
