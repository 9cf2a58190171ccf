// y_i = x W_i^T + bias_i + scaling_i * xa_i B_i^T, the weight decoded into the registers of the tensor cores' A operand
// Operands:      GroupFwdParams: x [M, K], packed codes and absmax, xa [M, r] as lora_fwd left it -> y [M, N]
// Decoding:      T(codebook[code] * absmax): the product in fp32, one rounding, as dequantize does
// Rounding:      fp32 sums: the adapter's first, times scaling, then those over K on top; bias added in fp32; y once
// Preconditions: sm_90a; x bf16 or fp16; x and packed on 16 bytes; K a multiple of 64; blocksize a power of two from 32
// Memory:        a tile reads its codes and its tokens once, L2 serves the others; split, 8 bytes more an element and
//                part; 149 KiB of shared memory with 128 tokens, 213 KiB with 256: one block a multiprocessor
// Budget:        at most 4 instructions a weight in the consumers' loop (bf16, nested, blocksize 64); bench/codegen.py
//                counts them
//
// A block makes the transpose of a tile of y: 128 rows of the weight by 128 or 256 tokens, over all of K or a part.
// A producer warpgroup fills a ring of stages; two consumer warpgroups, of 64 rows each, decode a half of a step while
// the products of the half before it are under way.
//
// x comes as it is, in asynchronous copies of 16 bytes. For a product, lane c of a quad then decodes byte c of each of
// two words of a row's codes. The producers, through whose registers the codes pass, store a row's bytes in the order
// of c, so that what a lane decodes of a row in a step is one load of eight bytes.
#include "../tile.cuh"
#include "paths.h"

namespace nf4lora {
namespace {

constexpr int kRows = 128;                 // of the weight, in a tile
constexpr int kStep = 64;                  // k's of a stage
constexpr int kCodeBytes = kStep / 2;      // of a row
constexpr int kTokenBytes = kStep * 2;     // of a token
constexpr int kPiece = sizeof(uint4) / 2;  // elements of 16 bytes
constexpr int kFragment = 16;              // k's of a product
constexpr uint32_t kFragmentBytes = kFragment * 2;
constexpr int kStages = 4;
constexpr int kConsumers = 256;
constexpr int kProducers = 128;
constexpr int kThreads = kConsumers + kProducers;
constexpr int kProducerWarps = kProducers / kLanes;
constexpr int kConsumerWarps = kConsumers / kLanes;
constexpr int kConsumersMet = 1;  // named barrier
constexpr int kPrefetch = 16;     // steps that a row's codes and scales come to L2 before they are wanted
constexpr int kPrefetchStep = 4;  // steps of codes in the 128 bytes that one prefetch brings
constexpr int kLag = 2;           // steps of x that a producer keeps under way before it waits for the oldest
constexpr int kConsumerRegisters = 216, kProducerRegisters = 72;  // of 168 at the launch

template <int kTokens>
struct Stage {
    char x[kTokens * kTokenBytes];      // [tokens][64], swizzle128
    uint8_t codes[kRows * kCodeBytes];  // [rows][32]; byte 8c + i of them is byte 4i + c of the row
    float scales[kRows * 2];            // [rows][2]: of the k's below 32 and from 32 on
};

template <int kTokens>
struct Shared {
    Stage<kTokens> stage[kStages];
    char table[kTableBytes];  // fill_values
    float map[kDynamicCodes];
    uint64_t full[kStages], empty[kStages];
    uint32_t arrived_before;
};

// The finished tile, token by token, for coalesced stores of y; in place of the stages.
constexpr int kPitch = kRows + kPiece;  // eight rows of four token pairs in different banks
template <class T, int kTokens>
constexpr size_t kOutBytes = sizeof(T) * kTokens * kPitch;

struct Tile {
    int member;
    int64_t row0;     // of the member's weight
    int64_t rows;     // of the weight that are there, up to kRows
    int64_t column0;  // of y
    int64_t rank0;    // first column of xa
    int64_t token0;
    int64_t tokens;   // that are there, from token0 to the end of x
    int first, last;  // steps
    int lora;         // steps before those, over the adapter's rank; only the first part has them
};

NF4LORA_DEVICE constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// blockIdx.x: token tiles of one tile of rows side by side, so that they read its codes together; blockIdx.y: the part.
template <int kTokens>
NF4LORA_DEVICE Tile tile_of_block(const GroupFwdParams &p) {
    const uint32_t token_tiles = static_cast<uint32_t>((p.M + kTokens - 1) / kTokens);
    Tile tile{};
    int64_t row_tile = blockIdx.x / token_tiles;
    for (;; ++tile.member) {
        const int64_t tiles = (p.member[tile.member].w.rows + kRows - 1) / kRows;
        if (row_tile < tiles)
            break;
        row_tile -= tiles;
        tile.column0 += p.member[tile.member].w.rows;
        tile.rank0 += p.member[tile.member].r;
    }
    tile.row0 = row_tile * kRows;
    tile.rows = smaller(p.member[tile.member].w.rows - tile.row0, kRows);
    tile.column0 += tile.row0;
    tile.token0 = static_cast<int64_t>(blockIdx.x % token_tiles) * kTokens;
    tile.tokens = p.M - tile.token0;
    const int64_t steps = p.K / kStep;
    tile.first = static_cast<int>(steps * blockIdx.y / gridDim.y);
    tile.last = static_cast<int>(steps * (blockIdx.y + 1) / gridDim.y);
    tile.lora = blockIdx.y == 0 ? static_cast<int>((p.member[tile.member].r + kStep - 1) / kStep) : 0;
    return tile;
}

// Products of 16 that a step of the adapter has: the last is not always whole.
NF4LORA_DEVICE int lora_fragments(int64_t r, int step) {
    return static_cast<int>((smaller(r - static_cast<int64_t>(step) * kStep, kStep) + kFragment - 1) / kFragment);
}

// ---- the ring. Steps are numbered from 0 in a block, those of the adapter first.

NF4LORA_DEVICE uint32_t stage_of(uint32_t number) { return number % kStages; }
NF4LORA_DEVICE uint32_t phase_of(uint32_t number) { return number / kStages % 2; }

template <int kTokens>
NF4LORA_DEVICE Stage<kTokens> &wait_empty(Shared<kTokens> *shared, uint32_t number) {
    mbarrier_wait(shared->empty + stage_of(number), phase_of(number) ^ 1);
    return shared->stage[stage_of(number)];
}

template <int kTokens>
NF4LORA_DEVICE Stage<kTokens> &wait_full(Shared<kTokens> *shared, uint32_t number) {
    mbarrier_wait(shared->full + stage_of(number), phase_of(number));
    return shared->stage[stage_of(number)];
}

// The tensor cores read what this thread has stored through another proxy: each thread fences, then its warp arrives.
template <int kTokens>
NF4LORA_DEVICE void arrive_full(Shared<kTokens> *shared, uint32_t number) {
    fence_proxy_async();
    __syncwarp();
    if (threadIdx.x % kLanes == 0)
        mbarrier_arrive(shared->full + stage_of(number));
}

// After the warp's wait for the products that read the stage.
template <int kTokens>
NF4LORA_DEVICE void arrive_empty(Shared<kTokens> *shared, uint32_t number) {
    __syncwarp();  // all lanes have read
    if (threadIdx.x % kLanes == 0)
        mbarrier_arrive(shared->empty + stage_of(number));
}

// ---- producers

// The codes of the first steps, while the table is filled.
NF4LORA_DEVICE void prefetch_start(const GroupFwdParams &p, const Tile &tile) {
    constexpr int kLines = kPrefetch / kPrefetchStep;
    const int row = threadIdx.x / kLines, line = threadIdx.x % kLines;
    const int step = tile.first + line * kPrefetchStep;
    const uint8_t *packed = p.member[tile.member].w.packed + tile.row0 * (p.K / 2);
    for (int i = row; i < tile.rows; i += kThreads / kLines)
        if (step < tile.last)
            prefetch_l2(packed + i * (p.K / 2) + static_cast<int64_t>(step) * kCodeBytes);
}

// An absmax on its way, to be decoded when it is stored.
struct RawScale {
    uint32_t absmax;  // code, or the bits of a float
    float nested;
};

NF4LORA_DEVICE RawScale load_scale(const Scales &scales, int64_t block) {
    if (!scales.nested_absmax)
        return {static_cast<const uint32_t *>(scales.absmax)[block], 0.0f};
    return {static_cast<const uint8_t *>(scales.absmax)[block],
            scales.nested_absmax[block / Scales::kNestedBlocksize]};
}

NF4LORA_DEVICE float decode_scale(const Scales &scales, RawScale raw) {
    if (!scales.nested_absmax)
        return __uint_as_float(raw.absmax);
    return __fadd_rn(__fmul_rn(scales.map[raw.absmax], raw.nested), scales.offset);
}

// Eight columns of xa from `column` on, zeros from `columns` on. Rows of xa start anywhere.
NF4LORA_DEVICE uint4 load_xa(const uint16_t *row, int64_t column, int64_t columns, bool whole_pieces) {
    if (whole_pieces && column + kPiece <= columns)
        return *reinterpret_cast<const uint4 *>(row + column);
    uint32_t pair[kPiece / 2];
#pragma unroll
    for (int i = 0; i < kPiece / 2; ++i) {
        const int64_t at = column + 2 * i;
        const uint32_t even = at < columns ? row[at] : 0, odd = at + 1 < columns ? row[at + 1] : 0;
        pair[i] = even | odd << 16;
    }
    return make_uint4(pair[0], pair[1], pair[2], pair[3]);
}

// Word c of `out`: bytes c of the four words.
NF4LORA_DEVICE void transpose_bytes(uint32_t (&out)[4], uint4 in) {
    const uint32_t upper[2] = {__byte_perm(in.x, in.y, 0x5140), __byte_perm(in.z, in.w, 0x5140)};
    const uint32_t lower[2] = {__byte_perm(in.x, in.y, 0x7362), __byte_perm(in.z, in.w, 0x7362)};
    out[0] = __byte_perm(upper[0], upper[1], 0x5410);
    out[1] = __byte_perm(upper[0], upper[1], 0x7632);
    out[2] = __byte_perm(lower[0], lower[1], 0x5410);
    out[3] = __byte_perm(lower[0], lower[1], 0x7632);
}

// One producer's part of every step: a row of codes with its scales, and 16 bytes of every 16th token.
template <int kTokens>
struct Producer {
    static constexpr int kPieces = kTokenBytes / static_cast<int>(sizeof(uint4));
    static constexpr int kTokensApart = kProducers / kPieces;
    static_assert(kProducers == kRows && kTokensApart % 8 == 0, "a row each; one place in the swizzle");

    const uint16_t *x;      // its piece of its first token
    int64_t token_stride;   // to its next token, in elements
    int tokens;             // of the tile, from its first on
    uint32_t token_place;   // of the piece in a stage's x
    const uint8_t *packed;  // its row
    int64_t element;        // of the weight, its row's first
    int row;                // in the tile
    Scales scales;
    int shift;     // log2 of the blocksize
    int sent = 0;  // steps whose x was asked for before the tables were filled

    // On their way from global memory to a stage
    uint4 row_codes[2];
    RawScale row_scales[2];

    NF4LORA_DEVICE Producer(const GroupFwdParams &p, const Tile &tile, const float *map)
        : scales(p.member[tile.member].w, map) {
        const Weight &w = p.member[tile.member].w;
        row = threadIdx.x % kProducers;
        const int token = row / kPieces, piece = row % kPieces;
        x = static_cast<const uint16_t *>(p.x) + (tile.token0 + token) * p.K + piece * kPiece;
        token_stride = kTokensApart * p.K;
        tokens = static_cast<int>(smaller(tile.tokens, kTokens)) - token;
        token_place = swizzle128(token * kTokenBytes + piece * sizeof(uint4));
        element = (tile.row0 + smaller(row, tile.rows - 1)) * p.K;  // beyond the weight: its last row again
        packed = w.packed + element / 2;
        shift = 31 - __clz(static_cast<int>(w.blocksize));
    }

    NF4LORA_DEVICE bool halves() const { return 1 << shift == kStep / 2; }

    NF4LORA_DEVICE int64_t block_of(int step) const { return (element + static_cast<int64_t>(step) * kStep) >> shift; }

    NF4LORA_DEVICE void prefetch(int step) const {
        prefetch_l2(packed + static_cast<int64_t>(step) * kCodeBytes);
        prefetch_l2(static_cast<const uint8_t *>(scales.absmax) +
                    block_of(step) * (scales.nested_absmax ? 1 : sizeof(float)));
    }

    // A group of this thread's copies; zeros for tokens beyond M.
    NF4LORA_DEVICE void send(Stage<kTokens> &stage, int step) const {
        const uint16_t *from = x + static_cast<int64_t>(step) * kStep;
#pragma unroll
        for (int i = 0; i < kTokens / kTokensApart; ++i, from += token_stride)
            cp_async<sizeof(uint4)>(stage.x + token_place + i * kTokensApart * kTokenBytes, from,
                                    i * kTokensApart < tokens);
        cp_async_commit();
    }

    NF4LORA_DEVICE void load(int step) {
        const uint4 *from = reinterpret_cast<const uint4 *>(packed + static_cast<int64_t>(step) * kCodeBytes);
        row_codes[0] = from[0];  // through L1, which has the second when it has the first
        row_codes[1] = from[1];
        const int64_t block = block_of(step);
        row_scales[0] = load_scale(scales, block);
        row_scales[1] = halves() ? load_scale(scales, block + 1) : row_scales[0];
    }

    // Lane c of a quad finds its bytes c of a row's eight words side by side.
    NF4LORA_DEVICE void store(Stage<kTokens> &stage) const {
        uint32_t below[4], above[4];  // of the first 32 k's, of the others
        transpose_bytes(below, row_codes[0]);
        transpose_bytes(above, row_codes[1]);
        const uint4 first = make_uint4(below[0], above[0], below[1], above[1]);
        const uint4 second = make_uint4(below[2], above[2], below[3], above[3]);
        uint4 *to = reinterpret_cast<uint4 *>(stage.codes + row * kCodeBytes);
        const bool swap = row / 4 % 2;  // four lanes of eight store theirs the other way round: no banks shared
        to[swap] = swap ? second : first;
        to[!swap] = swap ? first : second;
        const float scale = decode_scale(scales, row_scales[0]);
        *reinterpret_cast<float2 *>(stage.scales + 2 * row) =
            make_float2(scale, halves() ? decode_scale(scales, row_scales[1]) : scale);
    }

    // What is under way while the tables are filled. Stages that the adapter's steps come to first are not free for it.
    NF4LORA_DEVICE void start(Shared<kTokens> *shared, const Tile &tile) {
        load(tile.first);
        for (; sent < kLag && tile.first + sent < tile.last && tile.lora + sent < kStages; ++sent)
            send(shared->stage[tile.lora + sent], tile.first + sent);
    }
};

// A stage of xa, in the order of the columns; whoever multiplies it knows how many there are.
template <int kTokens>
NF4LORA_DEVICE void store_xa(Stage<kTokens> &stage, const GroupFwdParams &p, const Tile &tile, int step) {
    const int64_t r = p.member[tile.member].r;
    const int pieces = lora_fragments(r, step) * (kFragment / kPiece);
    const uint16_t *xa = static_cast<const uint16_t *>(p.xa) + tile.token0 * p.r + tile.rank0;
    const bool whole_pieces = p.r % kPiece == 0 && reinterpret_cast<uintptr_t>(xa) % sizeof(uint4) == 0;
    for (int i = threadIdx.x % kProducers; i < kTokens * pieces; i += kProducers) {
        const int token = i % kTokens, piece = i / kTokens;
        const uint16_t *row = xa + smaller(token, tile.tokens - 1) * p.r;
        *reinterpret_cast<uint4 *>(stage.x + swizzle128(token * kTokenBytes + piece * sizeof(uint4))) =
            load_xa(row, static_cast<int64_t>(step) * kStep + piece * kPiece, r, whole_pieces);
    }
}

template <int kTokens>
NF4LORA_DEVICE void produce(Producer<kTokens> &mine, Shared<kTokens> *shared, const GroupFwdParams &p,
                            const Tile &tile) {
    for (int step = 0; step < tile.lora; ++step) {
        store_xa<kTokens>(wait_empty(shared, step), p, tile, step);
        arrive_full(shared, step);
    }
    const int steps = tile.last - tile.first;
    int published = 0;
    for (int step = 0; step < steps; ++step) {
        Stage<kTokens> &stage = wait_empty(shared, tile.lora + step);
        if (step >= mine.sent)
            mine.send(stage, tile.first + step);
        mine.store(stage);
        cp_async_wait<kLag>();
        if (step >= kLag)
            arrive_full(shared, tile.lora + published++);
        if (step + 1 < steps)
            mine.load(tile.first + step + 1);
        if (step % kPrefetchStep == 0 && step + kPrefetch < steps)
            mine.prefetch(tile.first + step + kPrefetch);
    }
    cp_async_wait<0>();
    while (published < steps)
        arrive_full(shared, tile.lora + published++);
}

// ---- consumers

template <class T>
NF4LORA_DEVICE void multiply(float (&sum)[64], const uint32_t (&a)[4], uint64_t x) {
    wgmma_m64n128k16<T>(sum, a, x);
}
template <class T>
NF4LORA_DEVICE void multiply(float (&sum)[128], const uint32_t (&a)[4], uint64_t x) {
    wgmma_m64n256k16<T>(sum, a, x);
}

// The descriptor of what lies `bytes` further.
NF4LORA_DEVICE uint64_t further(uint64_t descriptor, uint32_t bytes) { return descriptor + bytes / 16; }

// A consumer's place: rows row and row + 8 of the tile, tokens 8j + 2c and the next of each eight.
struct Lane {
    int row, c;
    NF4LORA_DEVICE Lane() : row(threadIdx.x / kLanes * 16 + threadIdx.x % kLanes / 4), c(threadIdx.x % 4) {}
};

constexpr int kFragments = kStep / kFragment;  // products of a step

// A step's columns of two rows of lora_B, zeros from r on: all are asked for before the first is waited for.
template <class T, class B>
NF4LORA_DEVICE void load_fragments(uint32_t (&a)[kFragments][4], const void *lora_B, const int64_t (&row)[2], int64_t r,
                                   int64_t column) {
    float v[kFragments][4][2];
#pragma unroll
    for (int i = 0; i < kFragments * 8; ++i) {
        const int64_t at = column + i / 8 * kFragment + i / 4 % 2 * 8 + i % 2;
        v[i / 8][i / 2 % 4][i % 2] = at < r ? to_float(static_cast<const B *>(lora_B)[row[i / 2 % 2] * r + at]) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kFragments * 4; ++i)
        a[i / 4][i % 4] = round_pair<T>(v[i / 4][i % 4][0], v[i / 4][i % 4][1]);
}

template <class T>
NF4LORA_DEVICE void load_fragments(uint32_t (&a)[kFragments][4], const GroupFwdParams &p, const Member &member,
                                   const int64_t (&row)[2], int64_t column) {
    if (p.B_dtype == kFloat32)
        load_fragments<T, float>(a, member.lora_B, row, member.r, column);
    else if (p.B_dtype == kBFloat16)
        load_fragments<T, __nv_bfloat16>(a, member.lora_B, row, member.r, column);
    else
        load_fragments<T, __half>(a, member.lora_B, row, member.r, column);
}

// sum = scaling * B xa^T
template <class T, int kTokens>
NF4LORA_DEVICE void multiply_adapter(float (&sum)[kTokens / 2], Shared<kTokens> *shared, const GroupFwdParams &p,
                                     const Tile &tile) {
    const Member &member = p.member[tile.member];
    const Lane lane;
    const int64_t row[2] = {tile.row0 + smaller(lane.row, tile.rows - 1),
                            tile.row0 + smaller(lane.row + 8, tile.rows - 1)};
    for (int step = 0; step < tile.lora; ++step) {
        uint32_t a[kFragments][4];
        load_fragments<T>(a, p, member, row, static_cast<int64_t>(step) * kStep + 2 * lane.c);
        const int fragments = lora_fragments(member.r, step);
        const uint64_t xa = wgmma_descriptor(wait_full(shared, step).x);
#pragma unroll
        for (int i = 0; i < kFragments; ++i) {
            if (i >= fragments)
                continue;
            wgmma_fence(sum);
            multiply<T>(sum, a[i], further(xa, i * kFragmentBytes));
            wgmma_commit();
            wgmma_wait<0>(sum);
        }
        arrive_empty(shared, step);
    }
    const float scaling = tile.lora > 0 ? member.scaling : 1.0f;
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i)  // in a branch ptxas would no longer let the products overlap
        sum[i] = __fmul_rn(sum[i], scaling);
}

// Four bytes of each of two rows: the fragments of two products.
template <class T>
NF4LORA_DEVICE void decode(uint32_t (&first)[4], uint32_t (&second)[4], const char *table, uint32_t column,
                           const uint32_t (&word)[2], const float (&scale)[2]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const float2 value = lookup_values(table, word[i % 2], column, byte_selector(i / 2));
        uint32_t(&a)[4] = i < 4 ? first : second;
        a[i % 4] = round_pair<T>(__fmul_rn(value.x, scale[i % 2]), __fmul_rn(value.y, scale[i % 2]));
    }
}

// sum += W x^T. Of two groups of products one is always under way: while one half of a step is decoded, the one before.
template <class T, int kTokens>
NF4LORA_DEVICE void multiply_weight(float (&sum)[kTokens / 2], Shared<kTokens> *shared, const Tile &tile) {
    const Lane lane;
    const int codes_at = pinned(lane.row * kCodeBytes + lane.c * sizeof(uint2));
    const int scales_at = pinned(lane.row * 2);
    const uint32_t column = pinned(threadIdx.x % kLanes * sizeof(float2));
    const uint64_t x0 = wgmma_descriptor(shared->stage[0].x);
    const uint32_t first = tile.lora, steps = tile.last - tile.first;
    // A turn goes once round the ring, with constants for addresses; the first and the last may not be whole.
    for (uint32_t turn = first / kStages * kStages; turn < first + steps; turn += kStages) {
#pragma unroll
        for (uint32_t at = 0; at < kStages; ++at) {
            const uint32_t step = turn + at - first;
            if (step >= steps)
                continue;
            mbarrier_wait(shared->full + at, phase_of(turn));
            const Stage<kTokens> &stage = shared->stage[at];
            const uint64_t x = further(x0, at * sizeof(Stage<kTokens>));
            const uint2 lower = *reinterpret_cast<const uint2 *>(stage.codes + codes_at);
            const uint2 upper = *reinterpret_cast<const uint2 *>(stage.codes + codes_at + 8 * kCodeBytes);
            const float2 lower_scale = *reinterpret_cast<const float2 *>(stage.scales + scales_at);
            const float2 upper_scale = *reinterpret_cast<const float2 *>(stage.scales + scales_at + 2 * 8);
            uint32_t a[4][4];
            decode<T>(a[0], a[1], shared->table, column, {lower.x, upper.x}, {lower_scale.x, upper_scale.x});
            wgmma_fence(sum);
            multiply<T>(sum, a[0], x);
            multiply<T>(sum, a[1], further(x, kFragmentBytes));
            wgmma_commit();
            wgmma_wait<1>(sum);  // the step before has read its stage
            if (step > 0)
                arrive_empty(shared, at + kStages - 1);
            decode<T>(a[2], a[3], shared->table, column, {lower.y, upper.y}, {lower_scale.y, upper_scale.y});
            wgmma_fence(sum);
            multiply<T>(sum, a[2], further(x, 2 * kFragmentBytes));
            multiply<T>(sum, a[3], further(x, 3 * kFragmentBytes));
            wgmma_commit();
            wgmma_wait<1>(sum);  // a[0] and a[1] are free
        }
    }
    wgmma_wait<0>(sum);
}

// ---- the end of a tile

// Parts as they stand in the consumers' registers: [tile][part][kTokens / 8][consumers] of four sums.
template <int kTokens>
NF4LORA_DEVICE float4 *part_of(void *workspace, int64_t part) {
    return static_cast<float4 *>(workspace) +
           (static_cast<int64_t>(blockIdx.x) * gridDim.y + part) * (kTokens / 8 * kConsumers) + threadIdx.x;
}

template <int kTokens>
NF4LORA_DEVICE void store_part(void *workspace, const float (&sum)[kTokens / 2]) {
    float4 *part = part_of<kTokens>(workspace, blockIdx.y);
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j)
        part[j * kConsumers] = make_float4(sum[4 * j], sum[4 * j + 1], sum[4 * j + 2], sum[4 * j + 3]);
}

template <int kTokens>
NF4LORA_DEVICE void add_parts(float (&sum)[kTokens / 2], void *workspace) {
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i)
        sum[i] = 0.0f;
    for (unsigned s = 0; s < gridDim.y; ++s) {
        const float4 *part = part_of<kTokens>(workspace, s);
#pragma unroll
        for (int j = 0; j < kTokens / 8; ++j) {
            const float4 v = part[j * kConsumers];
            sum[4 * j] += v.x, sum[4 * j + 1] += v.y, sum[4 * j + 2] += v.z, sum[4 * j + 3] += v.w;
        }
    }
}

// y of the tile: through shared memory, which the consumers are done with, so that a token's row is one run.
template <class T, int kTokens>
NF4LORA_DEVICE void store_tile(const GroupFwdParams &p, const Tile &tile, T *out, const float (&sum)[kTokens / 2]) {
    const Lane lane;
    const void *bias = p.member[tile.member].bias;
    float addend[2] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i)
        if (bias && lane.row + 8 * i < tile.rows)
            addend[i] = load_element(bias, p.bias_dtype, tile.row0 + lane.row + 8 * i);
    bar_sync(kConsumersMet, kConsumers);  // the other warpgroup's products have read the stages
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i)
        out[(i / 4 * 8 + lane.c * 2 + i % 2) * kPitch + lane.row + i % 4 / 2 * 8] =
            from_float<T>(__fadd_rn(sum[i], addend[i % 4 / 2]));
    bar_sync(kConsumersMet, kConsumers);
    T *y = static_cast<T *>(p.y) + tile.token0 * p.N + tile.column0;
    const int tokens = static_cast<int>(smaller(tile.tokens, kTokens)), rows = static_cast<int>(tile.rows);
    constexpr int kPieces = kRows / kPiece;
    const bool aligned_rows = p.N % kPiece == 0 && reinterpret_cast<uintptr_t>(y) % sizeof(uint4) == 0;
    for (int i = threadIdx.x; i < tokens * kPieces; i += kConsumers) {
        const int token = i / kPieces, row = i % kPieces * kPiece;
        const T *from = out + token * kPitch + row;
        T *to = y + token * p.N + row;
        if (aligned_rows && row + kPiece <= rows)
            *reinterpret_cast<uint4 *>(to) = *reinterpret_cast<const uint4 *>(from);
        else
            for (int e = 0; e < kPiece && row + e < rows; ++e)
                to[e] = from[e];
    }
}

template <int kTokens>
NF4LORA_DEVICE void start_ring(Shared<kTokens> *shared) {
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < kStages; ++stage) {
            mbarrier_init(shared->full + stage, kProducerWarps);
            mbarrier_init(shared->empty + stage, kConsumerWarps);
        }
        fence_mbarrier_init();
    }
}

// Grid: (token tiles * row tiles, parts).
template <class T, int kTokens>
__global__ void __launch_bounds__(kThreads, 1) linear_fwd_kernel(const __grid_constant__ GroupFwdParams p) {
    static_assert(kOutBytes<T, kTokens> <= sizeof(Stage<kTokens>) * kStages, "the tile takes the stages' place");
    static_assert(sizeof(Shared<kTokens>) <= 227 << 10, "what a block may have");
    static_assert(sizeof(Stage<kTokens>) % 1024 == 0, "every stage starts where the swizzle pattern does");
    NF4LORA_SHARED(Shared<kTokens>, shared);
    const Tile tile = tile_of_block<kTokens>(p);
    const Weight &w = p.member[tile.member].w;
    prefetch_start(p, tile);
    start_ring(shared);
    const bool producing = threadIdx.x >= kConsumers;
    Producer<kTokens> producer(p, tile, shared->map);
    if (producing)
        producer.start(shared, tile);
    fill_values(shared->table, w.quant_type);
    fill_map(shared->map);
    __syncthreads();
    if (producing) {
        give_registers<kProducerRegisters>();
        produce(producer, shared, p, tile);
        return;
    }
    take_registers<kConsumerRegisters>();
    float sum[kTokens / 2] = {};
    multiply_adapter<T>(sum, shared, p, tile);
    multiply_weight<T>(sum, shared, tile);
    if (gridDim.y > 1) {
        store_part<kTokens>(p.workspace, sum);
        if (!comes_last(p.counters + blockIdx.x, gridDim.y, &shared->arrived_before))
            return;
        add_parts<kTokens>(sum, p.workspace);
    }
    store_tile<T, kTokens>(p, tile, reinterpret_cast<T *>(shared->stage), sum);
}

// ---- launching

struct Plan {
    bool wide;      // 256 tokens a tile, else 128
    int64_t tiles;  // of y
    int64_t parts;  // of K

    explicit Plan(const GroupFwdParams &p) {
        wide = p.config.tokens > 128;
        const int64_t steps = p.K / kStep;
        tiles = 0;
        for (int i = 0; i < p.count; ++i)
            tiles += ceil_div(p.member[i].w.rows, kRows);
        tiles *= ceil_div(p.M, wide ? 256 : 128);
        const int64_t wanted = tiles > kCounters ? 1 : p.config.split;
        parts = wanted < 1 ? 1 : wanted < steps ? wanted : steps;
    }

    int64_t workspace() const {
        return parts > 1 ? tiles * parts * kRows * (wide ? 256 : 128) * int64_t{sizeof(float)} : 0;
    }
};

template <class T, int kTokens>
const char *launch(const GroupFwdParams &p, const Plan &plan, void *stream) {
    const dim3 grid(static_cast<unsigned>(plan.tiles), static_cast<unsigned>(plan.parts));
    return NF4LORA_LAUNCH((linear_fwd_kernel<T, kTokens>), grid, kThreads, sizeof(Shared<kTokens>), stream, p);
}

template <class T>
const char *launch(const GroupFwdParams &p, void *stream) {
    const Plan plan(p);
    if (plan.tiles > INT32_MAX)
        return "y has more tiles than a grid";
    return plan.wide ? launch<T, 256>(p, plan, stream) : launch<T, 128>(p, plan, stream);
}

}  // namespace

const char *linear_fwd_wgmma(const GroupFwdParams &p, void *stream) {
    return p.x_dtype == kBFloat16 ? launch<__nv_bfloat16>(p, stream) : launch<__half>(p, stream);
}

int64_t linear_fwd_wgmma_workspace(const GroupFwdParams &p) { return Plan(p).workspace(); }

}  // namespace nf4lora
