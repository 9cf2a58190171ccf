// y_i = x W_i^T + bias_i + scaling_i * xa_i B_i^T and xa = dropout(x) A^T for few tokens, in one launch
// Operands:      GroupFwdParams; x bf16 or fp16 [M, K], codes as they are in memory, absmax fp32 or nested
//                -> y [M, N], xa [M, r]
// Decode:        T(code) enters the products, the fp32 absmax multiplies the fp32 sums of each 64 (or 32) columns
// Rounding:      sums in fp32: over the blocks of 64 in order, then of the warps, of the parts, LoRA, bias; xa is
//                rounded to T and goes on as such, as do A and B; y is rounded once
// Preconditions: K % 64 == 0; x and packed 16-byte aligned; blocksize a power of two from 32 to 4096
// Memory:        reads the codes once for each kTokens tokens, past shared memory; 68 KiB shared; of counters 2 for
//                each kTokens tokens and one for each tile, none where nothing is split and r = 0
// Budget:        at most 2 instructions a weight (8 tokens, bf16, nested, sm_90a); bench/codegen.py counts them
//
// A product of 16 rows with 8 tokens may take its columns in any order, if both operands take the same. So a lane loads
// 8 consecutive bytes of a row's block of 64, whose 8 pairs are its share of four mma, and the matching 16 values of a
// token lie together in shared memory.
//
// Thread blocks, of one chunk of tokens after the other: first the producers of xa, each of which claims a slice of the
// columns; whoever ends the last slice adds them up and says that xa is there. Then those of y, each a tile of rows and
// a part of the columns; the one that comes last to a tile adds its parts and, once xa is there, finishes. A block that
// finds it missing claims what slices are left, so that none waits for a block that may not have started.
#include "../dropout.cuh"
#include "../tile.cuh"
#include "paths.h"

namespace nf4lora {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kLanes;
constexpr int kRowWarps = 4, kColumnWarps = kWarps / kRowWarps;  // the latter take blocks of 64 columns in turn
constexpr int kMmaRows = 16, kMmaTokens = 8, kMmaColumns = 16;
constexpr int kWarpRows = 2 * kMmaRows, kRows = kRowWarps * kWarpRows;
constexpr int kBlock = 64;                     // columns that a step takes: four mma deep
constexpr int kSteps = kBlock / kMmaColumns;   // mma
constexpr int kLaneRows = kWarpRows / 8;       // rows of which a lane decodes its share
constexpr int kLaneColumns = kBlock / 4;       // that share
constexpr int kPiece = 8;                      // values of x in 16 bytes
constexpr int kAlign = 4;                      // blocks: where rows are multiples of it, parts are, too
constexpr int kMapCopies = 4;                  // of the dynamic map, so that few of a warp's lanes meet in a bank
constexpr int kSliceBlocks = kWarps;           // blocks of 64 columns in a slice of xa: one a warp

// ---- shared memory: the table of pairs, in whose unused upper halves lie two chunks of x; the dynamic map; two words.
// Once the table is done with, its place holds sums.

constexpr int kBuffers = 2, kPiecesOfRow = kTableRow / 2 / sizeof(uint4);
constexpr int kBufferPieces = 256 * kPiecesOfRow / kBuffers;
constexpr size_t kMapAt = kTableBytes, kArrivedAt = kMapAt + kDynamicCodes * kMapCopies * sizeof(float);
constexpr size_t kStateAt = kArrivedAt + sizeof(uint32_t), kSharedBytes = kStateAt + sizeof(uint32_t);
constexpr int kSumPitch = kRows + 4;      // floats from token to token, so that a fragment is stored without conflicts
constexpr int kRankPitch = kMmaRows + 4;  // likewise

// Where piece i lies, and how much further piece i + more if `more` fills whole rows.
NF4LORA_DEVICE uint32_t piece_offset(uint32_t i) {
    return i / kPiecesOfRow * kTableRow + kTableRow / 2 + i % kPiecesOfRow * sizeof(uint4);
}
NF4LORA_DEVICE constexpr uint32_t pieces_further(uint32_t more) { return more / kPiecesOfRow * kTableRow; }

template <int kTokensOfTile>
struct Shape {
    static constexpr int kTokens = kTokensOfTile;
    static constexpr int kTiles = kTokens / kMmaTokens;                               // along the tokens
    static constexpr int kChunkBlocks = kBufferPieces * kPiece / (kTokens * kBlock);  // of x in a buffer
    static constexpr int kDepth = kTokens == 8 ? 4 : kTokens < 64 ? 2 : 1;            // blocks whose codes are held
    static_assert(kChunkBlocks % (kColumnWarps * kDepth) == 0 && kAlign % kDepth == 0);
    static constexpr int kSliceTiles = kTiles < 4 ? kTiles : 4;                       // that xa takes at a time
    static constexpr size_t kSumsOfSliceAt = kTokens * kSumPitch * sizeof(float);     // after the sums of y
    static_assert(kSumsOfSliceAt + kWarps * kSliceTiles * kMmaTokens * kRankPitch * sizeof(float) <= kTableBytes);
};

// ---- what the host works out

struct Plan {
    uint32_t tiles;                  // of rows, over all members
    uint32_t first_tile[kMaxGroup];  // of each member
    uint32_t split;                  // parts of the columns
    uint32_t part, longer;           // blocks of 64 columns in a part; how many parts have `unit` more
    uint32_t unit;                   // of which a part has whole multiples
    uint32_t block_shift;            // log2 of the blocks of 64 columns to an absmax
    uint32_t slices;                 // of the columns, for xa; 0 without LoRA
    uint32_t producers;              // rows of the grid
    uint32_t chunks;                 // of kTokens tokens
    uint32_t *xa_state;              // [chunks]
    uint32_t *xa_arrivals;           // [chunks]
    uint32_t *tile_arrivals;         // [chunks, tiles]
    float *xa_parts;                 // [chunks, slices, kTokens, r]
    float *parts;                    // [chunks, tiles, split, kTokens, kRows]
};

// ---- operands

// v, which is the same in all lanes: so the compiler knows, and keeps what follows from it once a warp.
NF4LORA_DEVICE uint32_t uniform(uint32_t v) { return __shfl_sync(~0u, v, 0); }

// Pairs of 16 consecutive values, each rounded to T; `wide`: p is 16-byte aligned.
template <class T, class From>
NF4LORA_DEVICE void load_pairs(const From *p, bool wide, uint32_t (&pairs)[8]) {
    From v[16];
    if (wide) {
        uint4 raw[sizeof(From)];
#pragma unroll
        for (int i = 0; i < static_cast<int>(sizeof(From)); ++i)
            raw[i] = reinterpret_cast<const uint4 *>(p)[i];
        memcpy(static_cast<void *>(v), raw, sizeof v);
    } else {
#pragma unroll
        for (int i = 0; i < 16; ++i)
            v[i] = p[i];
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
        pairs[i] = round_pair<T>(to_float(v[2 * i]), to_float(v[2 * i + 1]));
}

// Elements of an operand whose Dtype only the launch knows, as bits: many are under way before one is looked at.
NF4LORA_DEVICE uint32_t load_bits(const void *p, int32_t dtype, int64_t i) {
    return dtype == kFloat32 ? static_cast<const uint32_t *>(p)[i] : static_cast<const uint16_t *>(p)[i];
}
NF4LORA_DEVICE float float_of(uint32_t bits, int32_t dtype) {
    if (dtype == kFloat32)
        return __uint_as_float(bits);
    const auto half = static_cast<uint16_t>(bits);
    return dtype == kBFloat16 ? __uint_as_float(bits << 16) : __half2float(__ushort_as_half(half));
}
NF4LORA_DEVICE int bytes_of(int32_t dtype) { return dtype == kFloat32 ? 4 : 2; }
NF4LORA_DEVICE const char *address_of(const void *p, int32_t dtype, int64_t i) {
    return static_cast<const char *>(p) + i * bytes_of(dtype);
}

// All threads bring [p, p + bytes) to L2, for who reads it in the end.
NF4LORA_DEVICE void prefetch(const char *p, int64_t bytes) {
    constexpr int kLine = 128;
#pragma unroll 1
    for (int64_t at = threadIdx.x * kLine; at < bytes; at += kThreads * kLine)
        prefetch_l2(p + at);
}

NF4LORA_DEVICE void add(float &sum, float v) { sum += v; }
NF4LORA_DEVICE void add(float4 &sum, float4 v) {
    sum = make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w);
}

// parts[0] + parts[stride] + …, `count` of them in this order, 8 under way at a time
template <class V>
NF4LORA_DEVICE V ordered_sum(const V *parts, int64_t stride, uint32_t count) {
    constexpr uint32_t kAtOnce = 8;
    V sum{};
#pragma unroll 1
    for (uint32_t first = 0; first < count; first += kAtOnce) {
        V v[kAtOnce];
#pragma unroll
        for (uint32_t i = 0; i < kAtOnce; ++i)
            if (first + i < count)
                v[i] = parts[(first + i) * stride];
#pragma unroll
        for (uint32_t i = 0; i < kAtOnce; ++i)
            if (first + i < count)
                add(sum, v[i]);
    }
    return sum;
}

// Elements i, i + 1 of p, each rounded to T, those from `end` on as zeros.
template <class T, class From>
NF4LORA_DEVICE uint32_t load_pair(const From *p, int64_t i, int64_t end) {
    return round_pair<T>(i < end ? to_float(p[i]) : 0.0f, i + 1 < end ? to_float(p[i + 1]) : 0.0f);
}

// Calls body with a null pointer to the type that a Dtype names.
template <class Body>
NF4LORA_DEVICE void with_type(int32_t dtype, const Body &body) {
    if (dtype == kFloat32)
        body(static_cast<const float *>(nullptr));
    else if (dtype == kBFloat16)
        body(static_cast<const __nv_bfloat16 *>(nullptr));
    else
        body(static_cast<const __half *>(nullptr));
}

// ---- xa

// The products of kTiles tiles of tokens with A over a slice of the columns: each warp's block of 64, added up in the
// order of the warps -> out fp32 [tokens, r]
template <class T, int kTiles>
NF4LORA_DEVICE void produce_slice(const GroupFwdParams &p, int64_t token0, uint32_t slice, float *out, float *sums) {
    constexpr int kTokens = kTiles * kMmaTokens;
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, group = lane / 4, quad = lane % 4;
    const int64_t block = int64_t{slice} * kSliceBlocks + warp, column = block * kBlock + quad * kLaneColumns;
    const bool inside = block * kBlock < p.K;
    const DropoutMask mask(p.dropout);

    uint32_t x[kTiles][8];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
        const int64_t token = token0 + tile * kMmaTokens + group, first = token * p.K + column;
        if (inside && token < p.M)
            load_pairs<T>(static_cast<const T *>(p.x) + first, true, x[tile]);
        else
#pragma unroll
            for (int i = 0; i < 8; ++i)
                x[tile][i] = 0;
        if (mask.active) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint32_t kept = mask.kept(first / 4 + i);
                x[tile][2 * i] &= (kept & 1 ? 0x0000ffffu : 0) | (kept & 2 ? 0xffff0000u : 0);
                x[tile][2 * i + 1] &= (kept & 4 ? 0x0000ffffu : 0) | (kept & 8 ? 0xffff0000u : 0);
            }
        }
    }

    for (int64_t rank0 = 0; rank0 < p.r; rank0 += kMmaRows) {
        uint32_t a[2][8];  // of ranks rank0 + group and + 8
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int64_t rank = rank0 + group + half * 8;
            int member = 0;
            while (member + 1 < p.count && rank >= p.member[member].r)
                rank -= p.member[member++].r;
#pragma unroll
            for (int i = 0; i < 8; ++i)
                a[half][i] = 0;
            if (inside && rank < p.member[member].r)
                with_type(p.A_dtype, [&](auto *type) {
                    const auto *A = static_cast<decltype(type)>(p.member[member].lora_A);
                    const bool wide = reinterpret_cast<uintptr_t>(A) % sizeof(uint4) == 0;
                    load_pairs<T>(A + rank * p.K + column, wide, a[half]);
                });
        }
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
            float sum[4] = {};
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                const uint32_t left[4] = {a[0][2 * step], a[1][2 * step], a[0][2 * step + 1], a[1][2 * step + 1]};
                const uint32_t right[2] = {x[tile][2 * step], x[tile][2 * step + 1]};
                mma_m16n8k16<T>(sum, left, right);
            }
            float *mine = sums + (warp * kTokens + tile * kMmaTokens + quad * 2) * kRankPitch + group;
#pragma unroll
            for (int e = 0; e < 4; ++e)
                mine[e % 2 * kRankPitch + e / 2 * 8] = sum[e];
        }
        __syncthreads();
        for (int i = threadIdx.x; i < kTokens * kMmaRows; i += kThreads) {
            const int token = i / kMmaRows, rank = i % kMmaRows;
            float sum = 0.0f;
#pragma unroll
            for (int w = 0; w < kWarps; ++w)
                sum += sums[(w * kTokens + token) * kRankPitch + rank];
            if (rank0 + rank < p.r && token0 + token < p.M)
                out[token * p.r + rank0 + rank] = sum;
        }
        __syncthreads();  // the next ranks' sums overwrite these
    }
}

// xa_state of a chunk begins as 0 and counts claims: one of each producer, and some of finishers that find xa missing.
// Once all slices are done, xa is there, and `tiles * kThere - slices` is added. A finisher that has seen this takes
// kThere and its own claims away when it leaves, so that it ends as 0.
// Before, it is at most 2 * slices + tiles, less than kThere / 2, and each claim below `slices` comes once. After, it
// is at least kThere - slices until the last finisher has left, and then 0 less the producers that are yet to claim. In
// both, xa is there for who is still to look: no slice is claimed again and no finisher waits for ever, in any order.
constexpr uint32_t kThere = 1 << 16;
constexpr uint32_t kMostTiles = 1 << 14, kMostSlices = 1 << 12;
static_assert(2 * kMostSlices + kMostTiles < kThere / 2 && uint64_t{kMostTiles} * kThere < uint64_t{1} << 31);
NF4LORA_DEVICE bool xa_is_there(uint32_t state) { return state >= kThere / 2; }
constexpr int kSpeaker = kThreads - kLanes;  // the thread that speaks to it, in the warp with least to add

// Brings to L2 what a slice reads of A.
NF4LORA_DEVICE void prefetch_slice(const GroupFwdParams &p, uint32_t slice) {
    constexpr int kColumns = kSliceBlocks * kBlock;
    for (int member = 0; member < p.count; ++member)
#pragma unroll 1
        for (int64_t rank = threadIdx.x / kLanes; rank < p.member[member].r; rank += kWarps) {
            const int64_t column = int64_t{slice} * kColumns + threadIdx.x % kLanes * (kColumns / kLanes);
            if (column < p.K)
                prefetch_l2(address_of(p.member[member].lora_A, p.A_dtype, rank * p.K + column));
        }
}

// Produces a slice; after the last one xa itself.
template <class T, int kTokens>
NF4LORA_DEVICE void produce_xa(const GroupFwdParams &p, const Plan &plan, uint32_t slice, char *shared) {
    typedef Shape<kTokens> S;
    const uint32_t chunk = blockIdx.z;
    const int64_t token0 = int64_t{chunk} * kTokens, size = kTokens * p.r;
    float *const parts = plan.xa_parts + int64_t{chunk} * plan.slices * size;
#pragma unroll 1
    for (int token = 0; token < kTokens; token += S::kSliceTiles * kMmaTokens)
        produce_slice<T, S::kSliceTiles>(p, token0 + token, slice, parts + slice * size + token * p.r,
                                         reinterpret_cast<float *>(shared + S::kSumsOfSliceAt));
    if (!comes_last(plan.xa_arrivals + chunk, plan.slices, reinterpret_cast<uint32_t *>(shared + kArrivedAt)))
        return;
    const float scale = DropoutMask(p.dropout).scale;
    const int64_t tokens = p.M - token0 < kTokens ? p.M - token0 : kTokens;
    T *const xa = static_cast<T *>(p.xa) + token0 * p.r;
    for (int64_t i = threadIdx.x; i < tokens * p.r; i += kThreads)
        xa[i] = from_float<T>(__fmul_rn(ordered_sum(parts + i, size, plan.slices), scale));
    __syncthreads();  // all have stored before one says so
    if (threadIdx.x == kSpeaker)
        atomic_add_acq_rel(plan.xa_state + chunk, plan.tiles * kThere - plan.slices);
}

// Of a producer: claims a slice and produces it. Of a finisher: claims slices until xa `is_there`. Returns the claims.
template <class T, int kTokens>
NF4LORA_DEVICE uint32_t see_to_xa(const GroupFwdParams &p, const Plan &plan, bool finishes, bool is_there,
                                  char *shared) {
    uint32_t *const word = reinterpret_cast<uint32_t *>(shared + kStateAt), *const state = plan.xa_state + blockIdx.z;
    uint32_t claims = 0;
    while (!is_there) {
        __syncthreads();  // all have read the word
        if (threadIdx.x == kSpeaker)
            *word = atomic_add_acq_rel(state, 1);
        __syncthreads();
        ++claims;
        const uint32_t slice = *word;
        if (slice < plan.slices)
            produce_xa<T, kTokens>(p, plan, slice, shared);
        if (!finishes)
            break;
        __syncthreads();  // all have read the word
        if (threadIdx.x == kSpeaker) {
            while (!xa_is_there(*word = load_acquire(state)) && slice >= plan.slices)
                __nanosleep(32);
        }
        __syncthreads();  // what it has acquired, all have
        is_there = xa_is_there(*word);
    }
    return claims;
}

// ---- y

// A tile of y: rows of one member for one chunk of tokens.
struct Tile {
    const Member &member;
    int64_t row0;    // in the member
    int rows;        // that there are, at most kRows
    int64_t column;  // of y, of the first row
    int64_t rank0;   // of xa, of the member
    int64_t token0;
    int tokens;      // that there are, at most kTokens
};

template <int kTokens>
NF4LORA_DEVICE Tile tile_of(const GroupFwdParams &p, const Plan &plan) {
    const uint32_t tile = blockIdx.y - plan.producers;
    int member = 0;
    int64_t column = 0, rank0 = 0;
    while (member + 1 < p.count && tile >= plan.first_tile[member + 1]) {
        column += p.member[member].w.rows;
        rank0 += p.member[member].r;
        ++member;
    }
    const int64_t row0 = int64_t{tile - plan.first_tile[member]} * kRows, rows = p.member[member].w.rows - row0;
    const int64_t token0 = int64_t{blockIdx.z} * kTokens, tokens = p.M - token0;
    return {p.member[member], row0, static_cast<int>(rows < kRows ? rows : kRows), column + row0, rank0,
            token0, static_cast<int>(tokens < kTokens ? tokens : kTokens)};
}

// The absmax of the warp's rows, a lane a row, for kDepth blocks of 64 columns at a time. Indices count from the first
// nested block of the tile, so that they fit 32 bits.
template <int kDepth, int kSums>
struct AbsmaxFeed {
    static constexpr uint32_t kNestedBlocksize = static_cast<uint32_t>(Scales::kNestedBlocksize), kWords = ~0u;
    static constexpr uint32_t kNestedShift = kSums == 1 ? 8 : 7;  // plus `shift`: log2 of the blocks of 64 to a nested
    static_assert(kNestedBlocksize == kSums << kNestedShift);
    typedef std::conditional_t<kDepth == 4, uint32_t, std::conditional_t<kDepth == 2, uint16_t, uint8_t>> Codes;
    const void *absmax;
    const float *nested_absmax, *map;
    float offset;
    uint32_t shift;               // log2 of the blocks of 64 to an absmax; kWords: 1, and a load takes codes of several
    uint32_t row;                 // block of 64 at which the part begins in the lane's row
    uint32_t held[kDepth][kSums]; // the bits of each absmax; kWords: the codes, in held[0][0]
    float scale;                  // kWords: the nested absmax of all

    NF4LORA_DEVICE AbsmaxFeed(const Tile &tile, int row_of_tile, uint32_t begin, uint32_t block_shift,
                              const float *map_)
        : map(map_), shift(block_shift) {
        const Weight &w = tile.member.w;
        const uint32_t blocks = static_cast<uint32_t>(w.cols / kBlock);
        const int64_t first = tile.row0 * blocks, nested_block = (Scales::kNestedBlocksize << shift) / kSums;
        const int64_t nested = first >> (kNestedShift + shift), block = nested * Scales::kNestedBlocksize;
        row = static_cast<uint32_t>(first & (nested_block - 1)) +
              (row_of_tile < tile.rows ? row_of_tile : tile.rows - 1) * blocks + begin;
        nested_absmax = w.nested_absmax;
        offset = 0.0f;
        if (nested_absmax) {
            offset = *w.offset;
            nested_absmax += nested;
            absmax = static_cast<const uint8_t *>(w.absmax) + block;
            if (w.blocksize == kBlock && blocks % kAlign == 0 && reinterpret_cast<uintptr_t>(w.absmax) % kAlign == 0)
                shift = kWords;
        } else {
            absmax = static_cast<const float *>(w.absmax) + block;
        }
    }

    // Whether `load` reads the map.
    NF4LORA_DEVICE bool needs_map() const { return nested_absmax && shift != kWords; }

    // Of the blocks from `first` on that are before `end`.
    NF4LORA_DEVICE void load(uint32_t first, uint32_t end) {
        if (shift == kWords) {
            const uint32_t block = row + first;
            held[0][0] = *reinterpret_cast<const Codes *>(static_cast<const uint8_t *>(absmax) + block);
            scale = nested_absmax[block / kNestedBlocksize];
            return;
        }
#pragma unroll
        for (int i = 0; i < kDepth; ++i)
#pragma unroll
            for (int s = 0; s < kSums; ++s) {
                const uint32_t column = row + (first + i < end ? first + i : end - 1);
                const uint32_t block = kSums == 1 ? column >> shift : column * kSums + s;
                if (nested_absmax)
                    held[i][s] = __float_as_uint(decode(static_cast<const uint8_t *>(absmax)[block],
                                                        nested_absmax[block / kNestedBlocksize]));
                else
                    held[i][s] = static_cast<const uint32_t *>(absmax)[block];
            }
    }

    // Of the blocks that were loaded.
    NF4LORA_DEVICE void get(float (&ready)[kDepth][kSums]) const {
#pragma unroll
        for (int i = 0; i < kDepth; ++i)
#pragma unroll
            for (int s = 0; s < kSums; ++s)
                ready[i][s] = shift == kWords ? decode(held[0][0] >> 8 * i & 255, scale) : __uint_as_float(held[i][s]);
    }

  private:
    NF4LORA_DEVICE float decode(uint32_t code, float by) const {
        return __fadd_rn(__fmul_rn(map[code * kMapCopies], by), offset);
    }
};

// A thread a byte. It stores the copies of its pair 16 bytes at a time, beginning elsewhere than its neighbours, so
// that lanes do not meet in a bank; then those of its value of the dynamic map.
template <class T>
NF4LORA_DEVICE void fill_tables(char *shared, int32_t quant_type) {
    static_assert(kThreads == 256 && kDynamicCodes == 256 && kMapCopies * sizeof(float) == sizeof(uint4));
    constexpr uint32_t kQuarters = kLanes * sizeof(uint32_t) / sizeof(uint4);
    const uint32_t byte = threadIdx.x, value = __float_as_uint(kDynamicMap.value[byte]);
    const Codebook &book = kBooks[quant_type];
    const uint32_t pair = round_pair<T>(book.value[byte >> 4], book.value[byte & 15]);
#pragma unroll
    for (uint32_t i = 0; i < kQuarters; ++i)
        *reinterpret_cast<uint4 *>(shared + byte * kTableRow + (byte ^ i) % kQuarters * sizeof(uint4)) =
            make_uint4(pair, pair, pair, pair);
    reinterpret_cast<uint4 *>(shared + kMapAt)[byte] = make_uint4(value, value, value, value);
}

// The sums of warps that share rows, added in their order to where the table was. (Which warp this is, is found out
// anew, so that it takes no registers from the products.)
template <int kTiles>
NF4LORA_DEVICE void add_warps(const float (&total)[2][kTiles][4], float *sums) {
    const int warp = uniform(threadIdx.x / kLanes), group = threadIdx.x % kLanes / 4, quad = threadIdx.x % 4;
    sums += warp % kRowWarps * kWarpRows + group;
#pragma unroll
    for (int turn = 0; turn < kColumnWarps; ++turn) {
        __syncthreads();  // all are done with the table; the warps before have added their sums
        if (turn != warp / kRowWarps)
            continue;
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int t = 0; t < kTiles; ++t)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    float &sum = sums[(t * kMmaTokens + quad * 2 + e % 2) * kSumPitch + m * kMmaRows + e / 2 * 8];
                    sum = turn == 0 ? total[m][t][e] : sum + total[m][t][e];
                }
    }
    __syncthreads();
}

// The sums of a tile over a part of the columns, left in shared memory: token t's at t * kSumPitch.
// Two warps share a row; they take kDepth blocks in turn, and their sums are added in their order.
template <class T, int kTokens, int kSums>
NF4LORA_DEVICE void multiply(const GroupFwdParams &p, const Plan &plan, const Tile &tile, char *shared) {
    typedef Shape<kTokens> S;
    constexpr int kStride = kColumnWarps * S::kDepth;  // blocks from a warp's group to its next
    constexpr int kXBlock = S::kTiles * 2 * kLanes;    // pieces of x in a block
    const int lane = threadIdx.x % kLanes, group = lane / 4, quad = lane % 4;
    const int warp = uniform(threadIdx.x / kLanes);
    const int row_warp = warp % kRowWarps, column_warp = warp / kRowWarps;
    float *const map = reinterpret_cast<float *>(shared + kMapAt);
    // Blocks of 64 columns count from the first of this part.
    const auto begin_of = [&](uint32_t part) {
        return part * plan.part + (part < plan.longer ? part : plan.longer) * plan.unit;
    };
    const int begin = begin_of(blockIdx.x), end = plan.part + (blockIdx.x < plan.longer ? plan.unit : 0);
    int first = column_warp * S::kDepth;  // of the blocks whose codes are held

    const uint8_t *codes_at[kLaneRows];
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
        const int r = row_warp * kWarpRows + i * 8 + group, row = r < tile.rows ? r : tile.rows - 1;
        codes_at[i] = tile.member.w.packed + ((tile.row0 + row) * p.K + (begin + first) * kBlock) / 2 +
                      quad * (8 / kSums);
    }
    uint2 codes[S::kDepth][kLaneRows];  // two words of a row's block
    const auto load_codes = [&](int s, int ahead) {
#pragma unroll
        for (int i = 0; i < kLaneRows; ++i) {
            const uint8_t *from = codes_at[i] + (s + ahead) * (kBlock / 2);
            if constexpr (kSums == 1)
                codes[s][i] = load_stream(reinterpret_cast<const uint2 *>(from));
            else
                codes[s][i] = make_uint2(load_stream(reinterpret_cast<const uint32_t *>(from)),
                                         load_stream(reinterpret_cast<const uint32_t *>(from + kBlock / 4)));
        }
    };

    // Pieces of x, those of one load of a warp together. A thread takes a piece of one block of several tokens. (Which,
    // is found out anew each time, so that it takes no registers from the products.)
    constexpr int kBlockPieces = kBlock / kPiece, kTokenPieces = S::kChunkBlocks * kBlockPieces;
    constexpr int kTokensAtOnce = kThreads / kTokenPieces;
    const T *const x = static_cast<const T *>(p.x) + tile.token0 * p.K;
    const auto copy_x = [&](int chunk) {  // that begins at this block
        const uint32_t thread = pinned(threadIdx.x), piece = thread % kBlockPieces;
        const int token = thread / kTokenPieces;
        const int owner = kSums == 1 ? piece / 2 : piece % 4, its_half = kSums == 1 ? piece % 2 : piece / 4;
        const int block_of_chunk = thread / kBlockPieces % S::kChunkBlocks;
        const int block = chunk + block_of_chunk, column = begin_of(pinned(blockIdx.x)) + block;
        const T *from = x + token * p.K + column * kBlock + piece * kPiece;
        char *to = shared + chunk / S::kChunkBlocks % kBuffers * pieces_further(kBufferPieces) +
                   piece_offset(block_of_chunk * kXBlock + (token / kMmaTokens * 2 + its_half) * kLanes +
                                token % kMmaTokens * 4 + owner);
#pragma unroll
        for (int i = 0; i < S::kTokens / kTokensAtOnce; ++i) {
            const int more = i * kTokensAtOnce;
            cp_async<16>(to + pieces_further(more / kMmaTokens * 2 * kLanes + more % kMmaTokens * 4), from,
                         block < end && token + more < tile.tokens);
            from += kTokensAtOnce * p.K;
        }
    };

#pragma unroll
    for (int s = 0; s < S::kDepth; ++s)
        if (first + s < end)
            load_codes(s, 0);
    AbsmaxFeed<S::kDepth, kSums> feed(tile, row_warp * kWarpRows + lane, begin, plan.block_shift,
                                      map + lane % kMapCopies);
    if (!feed.needs_map() && first < end)
        feed.load(first, end);
#pragma unroll
    for (int buffer = 0; buffer < kBuffers; ++buffer) {
        copy_x(buffer * S::kChunkBlocks);
        cp_async_commit();
    }
    fill_tables<T>(shared, tile.member.w.quant_type);
    if (blockIdx.x == 0) {
        const int64_t row = tile.row0, r = tile.member.r;
        if (r > 0)
            prefetch(address_of(tile.member.lora_B, p.B_dtype, row * r), tile.rows * r * bytes_of(p.B_dtype));
        if (tile.member.bias)
            prefetch(address_of(tile.member.bias, p.bias_dtype, row), tile.rows * bytes_of(p.bias_dtype));
    }
    __syncthreads();  // the map is there
    if (feed.needs_map() && first < end)
        feed.load(first, end);

    float total[2][S::kTiles][4] = {};
    const auto multiply_block = [&](const uint32_t(&a)[2][kSteps][4], const float(&absmax)[kLaneRows][kSums],
                                    const char *xs) {
#pragma unroll
        for (int t = 0; t < S::kTiles; ++t) {
            uint4 right[2];
#pragma unroll
            for (int half = 0; half < 2; ++half)
                right[half] = *reinterpret_cast<const uint4 *>(xs + pieces_further((t * 2 + half) * kLanes));
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int s = 0; s < kSums; ++s) {
                    float sum[4] = {};
#pragma unroll
                    for (int step = s * kSteps / kSums; step < (s + 1) * kSteps / kSums; ++step) {
                        const uint4 &r = right[step / 2];
                        const uint32_t b[2] = {step % 2 ? r.z : r.x, step % 2 ? r.w : r.y};
                        mma_m16n8k16<T>(sum, a[m][step], b);
                    }
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        total[m][t][e] = __fmaf_rn(sum[e], absmax[2 * m + e / 2][s], total[m][t][e]);
                }
        }
    };

    // kDepth blocks, or (`whole` false) those of them that there are.
    uint32_t x_at = piece_offset(column_warp * S::kDepth * kXBlock + lane);
    const auto multiply_group = [&](auto whole) {
        float ready[S::kDepth][kSums];
        feed.get(ready);
        const int left = end - first;
        if (left > kStride)
            feed.load(first + kStride, end);
#pragma unroll
        for (int s = 0; s < S::kDepth; ++s) {
            if (!decltype(whole)::value && s >= left)
                break;
            uint32_t a[2][kSteps][4];
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int step = 0; step < kSteps; ++step)
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const uint2 &row = codes[s][2 * m + e % 2];
                        a[m][step][e] = lookup_pair(shared, step / 2 ? row.y : row.x, lane * sizeof(uint32_t),
                                                    byte_selector(step % 2 * 2 + e / 2));
                    }
            if (left > kStride + s)
                load_codes(s, kStride);
            float absmax[kLaneRows][kSums];
#pragma unroll
            for (int i = 0; i < kLaneRows; ++i)
#pragma unroll
                for (int h = 0; h < kSums; ++h)
                    absmax[i][h] = __shfl_sync(~0u, ready[s][h], i * 8 + group);
            multiply_block(a, absmax, shared + x_at + pieces_further(s * kXBlock));
        }
        x_at = (x_at + pieces_further(kStride * kXBlock)) % kTableBytes;  // from one buffer to the other and back
        first += kStride;
#pragma unroll
        for (int i = 0; i < kLaneRows; ++i)
            codes_at[i] += kStride * (kBlock / 2);
    };

    for (int chunk = 0; chunk < end; chunk += S::kChunkBlocks) {
        cp_async_wait<kBuffers - 1>();
        __syncthreads();  // everyone's copies of this chunk have landed
#pragma unroll 1
        while (first < chunk + S::kChunkBlocks && first < end) {
            if (first + S::kDepth <= end)
                multiply_group(std::true_type());
            else
                multiply_group(std::false_type());
        }
        if (const int next = chunk + kBuffers * S::kChunkBlocks; next < end) {
            __syncthreads();  // the copies overwrite this chunk
            copy_x(next);
        }
        cp_async_commit();  // empty at the end, so that as many groups are always under way
    }
    cp_async_wait<0>();

    add_warps<S::kTiles>(total, reinterpret_cast<float *>(shared));
}

// The parts of this block's tile, each [kTokens, kRows]; those of a token stand 4 at a time.
template <int kTokens>
struct Parts {
    static constexpr int kQuads = kRows / 4;
    float4 *parts, *sums;
    int quads;  // that there are in a part
    uint32_t split, *arrivals, *word;

    NF4LORA_DEVICE Parts(const Plan &plan, const Tile &tile, char *shared)
        : sums(reinterpret_cast<float4 *>(shared)), quads(tile.tokens * kQuads), split(plan.split),
          word(reinterpret_cast<uint32_t *>(shared + kArrivedAt)) {
        const int64_t index = int64_t{blockIdx.z} * plan.tiles + (blockIdx.y - plan.producers);
        parts = reinterpret_cast<float4 *>(plan.parts) + index * split * (kTokens * kQuads);
        arrivals = plan.tile_arrivals + index;
    }

    NF4LORA_DEVICE float4 &sum(int i) const { return sums[i / kQuads * (kSumPitch / 4) + i % kQuads]; }

    // Stores this block's part; true in the block that comes last.
    NF4LORA_DEVICE bool hand_in() const {
        for (int i = threadIdx.x; i < quads; i += kThreads)
            parts[blockIdx.x * (kTokens * kQuads) + i] = sum(i);
        return comes_last(arrivals, split, word);
    }

    // In its shared memory, the sums of all parts take the place of its own.
    NF4LORA_DEVICE void add() const {
        for (int i = threadIdx.x; i < quads; i += kThreads)
            sum(i) = ordered_sum(parts + i, kTokens * kQuads, split);
    }
};

// scaling * xa B^T of a tile, 16 rows a warp
template <class T, int kTokens>
struct Adapter {
    static constexpr int kTiles = Shape<kTokens>::kTiles;
    const void *B;
    int32_t dtype;
    int row, quad;        // the lane's, as fragments have them
    int64_t r, first[2];  // elements of B: of its rows `row` and row + 8
    uint32_t bits[8];     // of B, for 16 ranks

    NF4LORA_DEVICE Adapter(const GroupFwdParams &p, const Tile &tile)
        : B(tile.member.lora_B), dtype(p.B_dtype), row(threadIdx.x / kLanes * kMmaRows + threadIdx.x % kLanes / 4),
          quad(threadIdx.x % 4), r(tile.member.r) {
        const int last = tile.rows - 1;
        first[0] = (tile.row0 + (row < last ? row : last)) * r;
        first[1] = (tile.row0 + (row + 8 < last ? row + 8 : last)) * r;
    }

    NF4LORA_DEVICE void load(int64_t rank0) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int64_t rank = rank0 + quad * 4 + i / 4 * 2 + i % 2;
            bits[i] = rank < r ? load_bits(B, dtype, first[i / 2 % 2] + rank) : 0;
        }
    }

    // Adds to the sums; the first 16 ranks of B were loaded.
    NF4LORA_DEVICE void add_to(float *sums, const GroupFwdParams &p, const Tile &tile) {
        const int group = row % 8;
        const T *const xa = static_cast<const T *>(p.xa) + tile.token0 * p.r + tile.rank0;
        float total[kTiles][4] = {};
        for (int64_t rank0 = 0; rank0 < r; rank0 += kMmaColumns) {
            const int64_t rank = rank0 + quad * 4;
            uint32_t b[4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
                b[i] = round_pair<T>(float_of(bits[2 * i], dtype), float_of(bits[2 * i + 1], dtype));
            load(rank0 + kMmaColumns);
#pragma unroll
            for (int t = 0; t < kTiles; ++t) {
                const int token = t * kMmaTokens + group;
                const int64_t ranks = token < tile.tokens ? r : 0;
                const T *const mine = xa + token * p.r;
                const uint32_t right[2] = {load_pair<T>(mine, rank, ranks), load_pair<T>(mine, rank + 2, ranks)};
                mma_m16n8k16<T>(total[t], b, right);
            }
        }
#pragma unroll
        for (int t = 0; t < kTiles; ++t)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                float &sum = sums[(t * kMmaTokens + quad * 2 + e % 2) * kSumPitch + row + e / 2 * 8];
                sum = __fmaf_rn(total[t][e], tile.member.scaling, sum);
            }
    }
};

// `bias`: the bits of that of this thread's row.
template <class T>
NF4LORA_DEVICE void store(const GroupFwdParams &p, const Tile &tile, const float *sums, uint32_t bias) {
    const int row = threadIdx.x % kRows;
    if (row >= tile.rows)
        return;
    const float b = float_of(bias, p.bias_dtype);
    T *const y = static_cast<T *>(p.y) + tile.token0 * p.N + tile.column + row;
    for (int token = threadIdx.x / kRows; token < tile.tokens; token += kThreads / kRows)
        y[token * p.N] = from_float<T>(__fadd_rn(sums[token * kSumPitch + row], b));
}

template <class T, int kTokens, int kSums>
__global__ void __launch_bounds__(kThreads, kTokens * kSums <= 16 ? 2 : 1)
    small_kernel(const __grid_constant__ GroupFwdParams p, const __grid_constant__ Plan plan) {
    NF4LORA_SHARED(char, shared);
    const bool finishes = blockIdx.y >= plan.producers;
    if (finishes) {
        const Tile tile = tile_of<kTokens>(p, plan);
        multiply<T, kTokens, kSums>(p, plan, tile, shared);
        if (plan.split > 1 && !Parts<kTokens>(plan, tile, shared).hand_in())
            return;
    } else {
        const uint32_t slice = blockIdx.y * gridDim.x + blockIdx.x;
        if (slice >= plan.slices)
            return;
        prefetch_slice(p, slice);
    }

    // All that finishing a tile waits for is under way at once, but for xa.
    const Tile tile = tile_of<kTokens>(p, plan);
    float *const sums = reinterpret_cast<float *>(shared);
    uint32_t *const state = plan.xa_state + blockIdx.z, *const word = reinterpret_cast<uint32_t *>(shared + kStateAt);
    Adapter<T, kTokens> adapter(p, tile);
    uint32_t bias = 0;
    bool is_there = false;
    if (finishes) {
        adapter.load(0);
        if (const int row = threadIdx.x % kRows; tile.member.bias && row < tile.rows)
            bias = load_bits(tile.member.bias, p.bias_dtype, tile.row0 + row);
        if (plan.slices > 0 && threadIdx.x == kSpeaker)
            *word = load_acquire(state);
        if (plan.split > 1)
            Parts<kTokens>(plan, tile, shared).add();
        __syncthreads();
        is_there = plan.slices > 0 && xa_is_there(*word);
    }
    uint32_t claims = 0;
    if (plan.slices > 0)
        claims = see_to_xa<T, kTokens>(p, plan, finishes, is_there, shared);
    if (!finishes)
        return;
    if (plan.slices > 0) {
        if (threadIdx.x == kSpeaker)
            add_relaxed(state, -(kThere + claims));
        adapter.add_to(sums, p, tile);
        __syncthreads();
    }
    store<T>(p, tile, sums, bias);
}

// ---- the launch

// Tokens of a tile: the instantiated one nearest above the wish. Blocks of 32 columns have one only.
int tokens_of(const GroupFwdParams &p) {
    const int wish = p.config.tokens;
    if (p.member[0].w.blocksize < kBlock)
        return 32;
    return wish <= 8 ? 8 : wish <= 16 ? 16 : wish <= 32 ? 32 : 64;
}

struct Sizes {
    size_t xa_parts, parts;
};

constexpr size_t kAlignment = 256;
size_t padded(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// The plan without its pointers, and the bytes behind these.
Plan plan_of(const GroupFwdParams &p, Sizes *sizes) {
    Plan plan{};
    const int tokens = tokens_of(p);
    for (int64_t i = 0; i < p.count; ++i) {
        plan.first_tile[i] = plan.tiles;
        plan.tiles += static_cast<uint32_t>(ceil_div(p.member[i].w.rows, kRows));
    }
    plan.chunks = static_cast<uint32_t>(ceil_div(p.M, tokens));
    plan.unit = p.K % (kAlign * kBlock) ? 1 : kAlign;
    const uint32_t units = static_cast<uint32_t>(p.K / kBlock / plan.unit);
    plan.split = grid_of(p.config.split, units);
    plan.part = units / plan.split * plan.unit;
    plan.longer = units % plan.split;
    if (p.member[0].w.blocksize > kBlock)
        plan.block_shift = static_cast<uint32_t>(log2_of(p.member[0].w.blocksize / kBlock));
    plan.slices = p.r > 0 ? static_cast<uint32_t>(ceil_div(p.K, kSliceBlocks * kBlock)) : 0;
    plan.producers = static_cast<uint32_t>(ceil_div(plan.slices, plan.split));
    sizes->xa_parts = padded(size_t{plan.chunks} * plan.slices * tokens * p.r * sizeof(float));
    sizes->parts = plan.split > 1 ? size_t{plan.chunks} * plan.tiles * plan.split * tokens * kRows * sizeof(float) : 0;
    return plan;
}

template <class T, int kTokens, int kSums>
const char *launch(const GroupFwdParams &p, const Plan &plan, void *stream) {
    const dim3 grid(plan.split, plan.producers + plan.tiles, plan.chunks);
    return NF4LORA_LAUNCH((small_kernel<T, kTokens, kSums>), grid, kThreads, kSharedBytes, stream, p, plan);
}

template <class T>
const char *launch_for(const GroupFwdParams &p, const Plan &plan, void *stream) {
    if (p.member[0].w.blocksize < kBlock)
        return launch<T, 32, 2>(p, plan, stream);
    switch (tokens_of(p)) {
    case 8:
        return launch<T, 8, 1>(p, plan, stream);
    case 16:
        return launch<T, 16, 1>(p, plan, stream);
    case 32:
        return launch<T, 32, 1>(p, plan, stream);
    }
    return launch<T, 64, 1>(p, plan, stream);
}

constexpr const char *kTooLarge = "path small: more tiles than counters; it is meant for up to 64 tokens";

}  // namespace

const char *linear_fwd_small(const GroupFwdParams &p, void *stream) {
    Sizes sizes;
    Plan plan = plan_of(p, &sizes);
    const bool counts = plan.split > 1 || plan.slices > 0;
    if (counts && (plan.tiles > kMostTiles || plan.slices > kMostSlices ||
                   int64_t{plan.chunks} * (plan.tiles + 2) > kCounters))
        return kTooLarge;
    plan.xa_state = p.counters;
    plan.xa_arrivals = plan.xa_state + plan.chunks;
    plan.tile_arrivals = plan.xa_arrivals + plan.chunks;
    plan.xa_parts = static_cast<float *>(p.workspace);
    plan.parts = reinterpret_cast<float *>(static_cast<char *>(p.workspace) + sizes.xa_parts);
    return p.x_dtype == kBFloat16 ? launch_for<__nv_bfloat16>(p, plan, stream) : launch_for<__half>(p, plan, stream);
}

int64_t linear_fwd_small_workspace(const GroupFwdParams &p) {
    Sizes sizes;
    plan_of(p, &sizes);
    return static_cast<int64_t>(sizes.xa_parts + sizes.parts);
}

}  // namespace nf4lora
