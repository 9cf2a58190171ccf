// dx = sum over members of dy_i W_i + dropout_mask * (dyb_i A_i), tiles on the tensor cores of sm_90a
// Operands:      dy, dyb bf16 or fp16; the members' weights and lora_A as params.h says -> dx of dy's type
// Product:       transposed, so that W comes from registers: dx^T [64 columns of W, tokens] += W^T dy^T, 16 rows of W
//                at a time. A product takes its 64 columns in any order: a lane's two are the two codes of a byte, and
//                pairs along the reduction are made where decoded values are rounded
// Rounding:      a weight as dequantize rounds it, lora_A to dy's type; sums in fp32, dx once at the end. dyb A has its
//                own sums until they are masked; split parts are added in their order
// Preconditions: K a multiple of 64, packed on 16 bytes; any M, rows and ranks. Steps of dy that are not made of
//                aligned 16-byte pieces (odd N, a member that starts off 8, a member's odd tail) are read by element
// Memory:        a block reads dy once for its 256 (or 128) columns of W, and the codes once for its 128 (or 256)
//                tokens; 173 (or 218) KiB shared, one block a multiprocessor. Split: the parts in fp32 in the workspace
// Budget:        a weight of a block at most 4 instructions; bench/codegen.py counts them
//
// A ring of steps, each 64 rows of one member's weight or 16 of lora_A: a warpgroup fills it, two multiply. In a slice
// of 16 rows a lane decodes rows t, t + 1, t + 8, t + 9 of its bytes while the products before are under way; a
// transposing load brings it those of two slices. The two sides meet on mbarriers: `full`, an arrival of each filling
// warp once its copies and stores are there, and `empty`.
#include "../dropout.cuh"
#include "../tile.cuh"
#include "paths.h"

namespace nf4lora {
namespace {

constexpr int kDepth = 64;      // rows of W in a step
constexpr int kSlice = 16;      // of them in one product
constexpr int kGroup = 128;     // threads of a warpgroup
constexpr int kConsumers = 2 * kGroup;
constexpr int kProducers = kGroup;
constexpr int kThreads = kConsumers + kProducers;
constexpr int kStages = 4;
constexpr int kLag = 2;         // steps a producer keeps under way before it waits for the oldest one's copies
constexpr int kSums = 128;      // of a lane
constexpr int kRowBytes = 2 * kDepth;  // of a tile of dy, which is swizzled
constexpr int kPiece = 8;              // elements in 16 bytes
constexpr uint32_t kConsumersMet = 1;  // named barrier
constexpr int kConsumerRegisters = 216, kProducerRegisters = 72;  // of 168 at the launch

// kTiles: products of 64 columns that stand side by side in a warpgroup. Two for 128 tokens, or one for 256.
template <int kTiles>
struct Shape {
    static constexpr int kTokens = 2 * kSums / kTiles;
    static constexpr int kColumns = kConsumers / kGroup * kTiles * 64;
    static constexpr int kMostScales = kColumns / 32;  // of a row
    // 16 bytes more than whole blocks: the four rows of 32 bytes that a warp loads from at a time fill the 32 banks.
    static constexpr int kCodePitch = kColumns / 2 + 16;
    static constexpr int kOutPitch = 2 * kColumns + 16;
};

template <int kTiles>
struct Ring {
    char dy[kStages][Shape<kTiles>::kTokens * kRowBytes];
    char codes[kStages][kDepth * Shape<kTiles>::kCodePitch];
    float scales[kStages][Shape<kTiles>::kMostScales][kDepth];
};

template <int kTiles>
struct Shared {
    char table[kTableBytes];
    union {
        Ring<kTiles> ring;
        char out[Shape<kTiles>::kTokens * Shape<kTiles>::kOutPitch];
    };
    float map[kDynamicCodes];
    uint64_t full[kStages], empty[kStages];
    uint32_t arrived;
};
static_assert(sizeof(Shared<1>) <= 227 << 10 && sizeof(Shared<2>) <= 227 << 10, "what a block of sm_90 can have");
static_assert(kTableBytes % 1024 == 0 && kRowBytes * 8 == 1024, "tiles of dy start where the swizzle pattern does");

// ---- the steps of the reduction: 64 rows of a member's weight, member after member; then 16 rows of lora_A, which is
// that of all members one below the other

struct Step {
    bool lora;
    int member;      // of the weight
    int64_t row;     // the first, in the member's weight or in all of lora_A
    int64_t column;  // of dy or dyb that belongs to it
    int rows;        // 1 to kDepth or kSlice
};

NF4LORA_DEVICE int at_most(int64_t left, int most) { return left < most ? static_cast<int>(left) : most; }

NF4LORA_DEVICE Step step_at(const GroupBwdParams &p, int index) {
    int64_t column = 0;
    for (int member = 0; member < p.count; ++member) {
        const int64_t rows = p.member[member].w.rows, row = int64_t{index} * kDepth;
        if (row < rows)
            return {false, member, row, column + row, at_most(rows - row, kDepth)};
        index -= static_cast<int>((rows + kDepth - 1) / kDepth);
        column += rows;
    }
    const int64_t row = int64_t{index} * kSlice;
    return {true, 0, row, row, at_most(p.r - row, kSlice)};
}

// What a block does: the steps [first, last), from `lora` on those with lora_A.
struct Work {
    int64_t token0, column0;
    int first, lora, last;
};

// Where the i-th step of a block stands in the ring, and the parity of that round.
struct Turn {
    uint32_t stage, parity;
    NF4LORA_DEVICE explicit Turn(int i)
        : stage(static_cast<uint32_t>(i) % kStages), parity(static_cast<uint32_t>(i) / kStages % 2) {}
};

// ---- producers

NF4LORA_DEVICE int producer() { return static_cast<int>(threadIdx.x) - kConsumers; }

// The step's columns of dy or dyb for the block's tokens; what lies outside is zero.
template <int kTiles>
NF4LORA_DEVICE void copy_tokens(char *tile, const GroupBwdParams &p, const Work &work, const Step &step) {
    constexpr int kPieces = kRowBytes / 16, kRows = kProducers / kPieces, kTokens = Shape<kTiles>::kTokens;
    static_assert(kRows % 8 == 0, "a thread's pieces have one place in the swizzle");
    const int64_t stride = step.lora ? p.r : p.N;
    const int piece = producer() % kPieces, first = producer() / kPieces, tokens = at_most(p.M - work.token0, kTokens);
    if (step.lora && piece * kPiece >= kSlice)
        return;  // nobody reads them
    const uint16_t *columns = static_cast<const uint16_t *>(step.lora ? p.dyb : p.dy) + step.column;
    const uint16_t *from = columns + (work.token0 + first) * stride + piece * kPiece;
    char *to = tile + swizzle128(first * kRowBytes + piece * 16);
    const bool in_pieces =
        step.rows % kPiece == 0 && stride % kPiece == 0 && reinterpret_cast<uintptr_t>(columns) % 16 == 0;
    if (in_pieces) {
        const int inside = piece * kPiece < step.rows ? tokens : 0;
#pragma unroll 8
        for (int token = first; token < kTokens; token += kRows, from += kRows * stride, to += kRows * kRowBytes)
            cp_async<16>(to, token < inside ? from : columns, token < inside);
        return;
    }
    const int inside = step.rows - piece * kPiece;
    for (int token = first; token < kTokens; token += kRows, from += kRows * stride, to += kRows * kRowBytes) {
        uint32_t pair[kPiece / 2];
#pragma unroll
        for (int i = 0; i < kPiece; i += 2) {
            const uint32_t low = token < tokens && i < inside ? from[i] : 0;
            const uint32_t high = token < tokens && i + 1 < inside ? from[i + 1] : 0;
            pair[i / 2] = low | high << 16;
        }
        *reinterpret_cast<uint4 *>(to) = make_uint4(pair[0], pair[1], pair[2], pair[3]);
    }
}

// The codes of the rows. Those beyond the member's repeat its last one, under a scale of zero; columns beyond K have
// none.
template <int kTiles>
NF4LORA_DEVICE void copy_codes(char *codes, const GroupBwdParams &p, const Work &work, const Step &step) {
    constexpr int kPieceColumns = 32, kPieces = Shape<kTiles>::kColumns / kPieceColumns, kRows = kProducers / kPieces;
    const int row0 = producer() / kPieces, piece = producer() % kPieces;
    const int64_t column = work.column0 + piece * kPieceColumns;
    if (column >= p.K)
        return;
    const uint8_t *from = p.member[step.member].w.packed + column / 2;
#pragma unroll
    for (int row = row0; row < kDepth; row += kRows)
        cp_async<16>(codes + row * Shape<kTiles>::kCodePitch + piece * 16,
                     from + (step.row + (row < step.rows ? row : step.rows - 1)) * (p.K / 2));
}

// Columns of W that one scale of a row covers here: a block, or the part of it that lies in 64 columns.
NF4LORA_DEVICE int scale_shift(const GroupBwdParams &p) { return p.member[0].w.blocksize < 64 ? 5 : 6; }

// A lane's rows t, t + 1, t + 8, t + 9 of a slice have their scales side by side.
NF4LORA_DEVICE int place_of_scale(int row) {
    return row / kSlice * kSlice + row % 8 / 2 * 4 + row / 8 % 2 * 2 + row % 2;
}

// Every other absmax of a row, as it is stored: asked for before there is room for it. Two threads share a row.
static_assert(kProducers == 2 * kDepth);
template <int kTiles>
struct RowScales {
    static constexpr int kMost = Shape<kTiles>::kMostScales / 2;
    float scale[kMost];  // absmax, or that of its nested block
    uint32_t code[kMost];
    float offset;
    bool nested;
    int inside;  // how many of them lie in the weight

    // Of the step, if it is one of a weight.
    NF4LORA_DEVICE void load(const GroupBwdParams &p, const Work &work, int index) {
        if (index >= work.lora)
            return;
        const Step step = step_at(p, index);
        const int me = producer();
        const Weight &w = p.member[step.member].w;
        const int shift = scale_shift(p), log_blocksize = __ffs(static_cast<int>(w.blocksize)) - 1;
        const int columns = at_most(p.K - work.column0, Shape<kTiles>::kColumns) >> shift;
        inside = me / 2 < step.rows ? (columns + 1 - me % 2) / 2 : 0;
        nested = w.nested_absmax != nullptr;
        offset = nested ? *w.offset : 0.0f;
        const int64_t first = (step.row + me / 2) * p.K + work.column0 + (me % 2 << shift);
#pragma unroll
        for (int i = 0; i < kMost; ++i) {
            const int64_t block = i < inside ? (first + (2 * i << shift)) >> log_blocksize : 0;
            if (nested) {
                code[i] = static_cast<const uint8_t *>(w.absmax)[block];
                scale[i] = w.nested_absmax[block / Scales::kNestedBlocksize];
            } else {
                scale[i] = static_cast<const float *>(w.absmax)[block];
            }
        }
    }

    NF4LORA_DEVICE void store(float (*scales)[kDepth], const float *map) const {
        const int me = producer();
#pragma unroll
        for (int i = 0; i < kMost; ++i) {
            const float absmax = nested ? __fadd_rn(__fmul_rn(map[code[i]], scale[i]), offset) : scale[i];
            scales[2 * i + me % 2][place_of_scale(me / 2)] = i < inside ? absmax : 0.0f;
        }
    }
};

// A row of the members' lora_A, those of all one below the other; null beyond the last.
template <class A>
NF4LORA_DEVICE const A *adapter_row(const GroupBwdParams &p, int64_t row) {
    const A *found = nullptr;
#pragma unroll
    for (int i = 0; i < kMaxGroup; ++i) {
        const int64_t rows = i < p.count ? p.member[i].r : 0;
        if (row >= 0 && row < rows)
            found = static_cast<const A *>(p.member[i].lora_A) + row * p.K;
        row -= rows;
    }
    return found;
}

// The step's rows of lora_A, rounded to T, where the codes would be; what lies outside is zero.
template <class T, class A, int kTiles>
NF4LORA_DEVICE void copy_adapters(char *to, const GroupBwdParams &p, const Work &work, const Step &step) {
    constexpr int kPairs = Shape<kTiles>::kColumns / 2, kRows = kProducers / kPairs, kBatch = 4;
    static_assert(kRows * kPairs == kProducers && kSlice % (kBatch * kRows) == 0);
    static_assert(kSlice * Shape<kTiles>::kOutPitch <= kDepth * Shape<kTiles>::kCodePitch, "they fit there");
    const int column = producer() % kPairs * 2, row0 = producer() / kPairs;
    const bool inside = work.column0 + column < p.K;
    for (int row = row0; row < kSlice; row += kBatch * kRows) {
        float even[kBatch], odd[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const A *from = adapter_row<A>(p, step.row + row + i * kRows);
            even[i] = from && inside ? to_float(from[work.column0 + column]) : 0.0f;
            odd[i] = from && inside ? to_float(from[work.column0 + column + 1]) : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
            *reinterpret_cast<uint32_t *>(to + (row + i * kRows) * Shape<kTiles>::kOutPitch + column * 2) =
                round_pair<T>(even[i], odd[i]);
    }
}

template <class T, int kTiles>
NF4LORA_DEVICE void copy_adapters(char *to, const GroupBwdParams &p, const Work &work, const Step &step) {
    if (p.A_dtype == kFloat32)
        copy_adapters<T, float, kTiles>(to, p, work, step);
    else if (p.A_dtype == kBFloat16)
        copy_adapters<T, __nv_bfloat16, kTiles>(to, p, work, step);
    else
        copy_adapters<T, __half, kTiles>(to, p, work, step);
}

// What this warp stored and copied has landed: products may read it.
NF4LORA_DEVICE void publish(uint64_t *full) {
    fence_proxy_async();
    __syncwarp();
    if (threadIdx.x % kLanes == 0)
        mbarrier_arrive(full);
}

// Sends for the copies of the i-th step of the block: a group of this thread's.
template <int kTiles>
NF4LORA_DEVICE void send(Ring<kTiles> &ring, const GroupBwdParams &p, const Work &work, int i) {
    const uint32_t stage = Turn(i).stage;
    const Step step = step_at(p, work.first + i);
    if (!step.lora)
        copy_codes<kTiles>(ring.codes[stage], p, work, step);
    copy_tokens<kTiles>(ring.dy[stage], p, work, step);
    cp_async_commit();
}

// The first steps, which find the ring empty, and the scales of the very first.
template <int kTiles>
NF4LORA_DEVICE void send_first(RowScales<kTiles> &scales, Ring<kTiles> &ring, const GroupBwdParams &p,
                               const Work &work) {
    scales.load(p, work, work.first);
    for (int i = 0; i < kLag && i < work.last - work.first; ++i)
        send<kTiles>(ring, p, work, i);
}

template <class T, int kTiles>
NF4LORA_DEVICE void produce(RowScales<kTiles> &scales, Shared<kTiles> *shared, const GroupBwdParams &p,
                            const Work &work) {
    Ring<kTiles> &ring = shared->ring;
    const int steps = work.last - work.first;
    int published = 0;
    for (int i = 0; i < steps; ++i) {
        const Turn turn(i);
        if (i >= kStages)
            mbarrier_wait(shared->empty + turn.stage, turn.parity ^ 1);
        if (i >= kLag)
            send<kTiles>(ring, p, work, i);
        if (work.first + i < work.lora) {
            scales.store(ring.scales[turn.stage], shared->map);
            cp_async_wait<kLag>();
            if (i >= kLag)
                publish(shared->full + Turn(published++).stage);
        } else {  // as many as the ring holds are multiplied at once, so none may be kept back
            copy_adapters<T, kTiles>(ring.codes[turn.stage], p, work, step_at(p, work.first + i));
            cp_async_wait<0>();
            for (; published <= i; ++published)
                publish(shared->full + Turn(published).stage);
        }
        scales.load(p, work, work.first + i + 1);
    }
    cp_async_wait<0>();
    for (; published < steps; ++published)
        publish(shared->full + Turn(published).stage);
}

// ---- consumers

// Of tile j: sum[j][4i + e] and sum[j][4i + e + 2] belong to token 8i + t + e and columns 2j and 2j + 1 of the lane's.
template <int kTiles>
using Sums = float[kTiles][kSums / kTiles];

// The place of a lane. A transposing load gives lanes 4g to 4g + 3 the g-th two bytes of 16 of a row, which are 32
// columns: with two tiles a byte each; with one, two warps read the same 16, and the odd one takes the odd bytes.
template <int kTiles>
struct Lane {
    static constexpr int kWarpsPerBlock = 4 / kTiles;  // of 64 columns
    int t;       // 2 (lane % 4): rows t, t + 1, t + 8, t + 9 of a slice, and tokens t, t + 1 of eight
    int odd;     // which of the two bytes the first tile has
    int column;  // of the block's: the first of 2 kTiles
    int source;  // the same, but in the first 64-block where the own one lies beyond K

    NF4LORA_DEVICE Lane(const GroupBwdParams &p, const Work &work) {
        const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, block = warp / kWarpsPerBlock * 64;
        t = 2 * (lane % 4);
        odd = kTiles == 1 ? warp % 2 : 0;
        source = warp % kWarpsPerBlock * kTiles / 2 * 32 + lane / 4 * 4 + odd * 2;
        column = block + source;
        if (work.column0 + block < p.K)
            source = column;
    }
};

// The weights of one tile: rows t, t + 1, t + 8, t + 9, two columns of each. bytes: those of rows t and t + 1, and of
// t + 8 and t + 9; selector: which byte of them is that of the upper, the lower row.
NF4LORA_DEVICE void decode(float2 (&w)[4], const uint32_t *bytes, const uint32_t (&selector)[2], const float4 &scales,
                           const char *table, uint32_t column) {
    const float scale[4] = {scales.x, scales.y, scales.z, scales.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 value = lookup_values(table, bytes[i / 2], column, selector[i % 2]);
        w[i] = make_float2(__fmul_rn(value.x, scale[i]), __fmul_rn(value.y, scale[i]));
    }
}

// As a product takes them: pairs of rows.
template <class T>
NF4LORA_DEVICE void round_operand(uint32_t (&a)[4], const float2 (&w)[4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        a[2 * i] = round_pair<T>(w[2 * i].x, w[2 * i + 1].x);
        a[2 * i + 1] = round_pair<T>(w[2 * i].y, w[2 * i + 1].y);
    }
}

// This warp reads nothing more of a stage.
NF4LORA_DEVICE void release(uint64_t *empty) {
    __syncwarp();
    if (threadIdx.x % kLanes == 0)
        mbarrier_arrive(empty);
}

constexpr uint64_t kNextSlice = kSlice * 2 >> 4, kNextToken = kRowBytes >> 4;  // in a descriptor

template <class T, int kTiles>
NF4LORA_DEVICE void multiply(float (&sum)[kSums / kTiles], const uint32_t (&a)[4], uint64_t dy) {
    if constexpr (kTiles == 2)
        wgmma_m64n128k16<T>(sum, a, dy);
    else
        wgmma_m64n256k16<T>(sum, a, dy);
}

template <class T, int kTiles>
NF4LORA_DEVICE void consume_weights(Sums<kTiles> &sum, Shared<kTiles> *shared, const GroupBwdParams &p,
                                    const Work &work, const Lane<kTiles> &lane) {
    constexpr int kPitch = Shape<kTiles>::kCodePitch, kLoaded = kLanes / kSlice;  // slices a load of codes brings
    const Ring<kTiles> &ring = shared->ring;
    const int column = pinned(threadIdx.x % kLanes * sizeof(float2));
    const int codes_at = pinned(threadIdx.x % kLanes * kPitch + lane.source / 32 * 16);
    const int scales_at = pinned((lane.source >> scale_shift(p)) * kDepth + 2 * lane.t);
    uint32_t selector[kTiles][2];
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
        selector[i / 2][i % 2] = byte_selector(i % 2 * 2 + i / 2 + lane.odd);
        if constexpr (kTiles == 1)  // else they are constants
            selector[i / 2][i % 2] = pinned(selector[i / 2][i % 2]);
    }
    const uint64_t dy0 = wgmma_descriptor(ring.dy[0]);
    const int steps = work.lora - work.first;
    // A turn goes once round the ring, with constants for addresses; the last may not be whole.
    for (int turn = 0; turn < steps; turn += kStages) {
#pragma unroll
        for (int stage = 0; stage < kStages; ++stage) {
            if (turn + stage >= steps)
                continue;
            mbarrier_wait(shared->full + stage, Turn(turn).parity);
            const uint64_t dy = dy0 + stage * (sizeof(ring.dy[0]) >> 4);
            uint32_t bytes[2 * kLoaded];  // two of each of two rows of eight
#pragma unroll
            for (int slice = 0; slice < kDepth / kSlice; ++slice) {
                if (slice % kLoaded == 0)
                    ldmatrix_x4_trans(bytes, ring.codes[stage] + codes_at + slice * kSlice * kPitch);
                const float4 scales =
                    *reinterpret_cast<const float4 *>(ring.scales[stage][0] + scales_at + slice * kSlice);
#pragma unroll
                for (int tile = 0; tile < kTiles; ++tile) {
                    float2 w[4];
                    decode(w, bytes + slice % kLoaded * 2, selector[tile], scales, shared->table, column);
                    wgmma_wait<1>(sum[tile]);  // two are under way, and the older one's operand is written next
                    if (slice == 1 && tile == 0 && turn + stage > 0)
                        release(shared->empty + (stage + kStages - 1) % kStages);
                    uint32_t a[4];
                    round_operand<T>(a, w);
                    wgmma_fence(sum[tile]);
                    multiply<T, kTiles>(sum[tile], a, dy + slice * kNextSlice);
                    wgmma_commit();
                }
            }
        }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
        wgmma_wait<0>(sum[tile]);
    if (steps > 0)
        release(shared->empty + Turn(steps - 1).stage);
}

// Bit i of a tile's mask: is what belongs to the i-th of 32 sums kept? They are those of 64 tokens, from `token` on.
template <int kTiles>
NF4LORA_DEVICE void make_masks(uint32_t (&mask)[kTiles], const DropoutMask &dropout, int64_t K, int64_t token,
                               int64_t column) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
        mask[tile] = dropout.active ? 0 : ~0u;
#pragma unroll 1
    for (int i = dropout.active ? 0 : 32; i < 32; i += i % 2 ? 3 : 1) {
        const uint32_t kept = dropout.kept(((token + i / 4 * 8 + i % 2) * K + column) / 4) >> column % 4;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
            mask[tile] |= (kept >> 2 * tile & 1) << i | (kept >> (2 * tile + 1) & 1) << (i + 2);
    }
}

// sum += mask * (dyb A), 64 tokens and one tile at a time, over as many steps at once as the ring holds.
template <class T, int kTiles>
NF4LORA_DEVICE void consume_adapters(Sums<kTiles> &sum, Shared<kTiles> *shared, const GroupBwdParams &p,
                                     const Work &work, const Lane<kTiles> &lane) {
    constexpr int kPitch = Shape<kTiles>::kOutPitch, kTokens = 64;
    const DropoutMask dropout(p.dropout);
    const int end = work.last - work.first;
    for (int first = work.lora - work.first, next; first < end; first = next) {
        next = end - first < kStages ? end : first + kStages;
        for (int i = first; i < next; ++i)
            mbarrier_wait(shared->full + Turn(i).stage, Turn(i).parity);
#pragma unroll
        for (int token = 0; token < Shape<kTiles>::kTokens; token += kTokens) {
            uint32_t mask[kTiles];
            make_masks(mask, dropout, p.K, work.token0 + token + lane.t, work.column0 + lane.column);
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) {
                float product[kTokens / 2];
#pragma unroll 1
                for (int i = first; i < next; ++i) {
                    const int at = lane.t * kPitch + (lane.source + 2 * tile) * 2;
                    const char *rows = shared->ring.codes[Turn(i).stage] + at;
                    uint32_t a[4];
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const uint32_t upper = *reinterpret_cast<const uint32_t *>(rows + e * 8 * kPitch);
                        const uint32_t lower = *reinterpret_cast<const uint32_t *>(rows + (e * 8 + 1) * kPitch);
                        a[2 * e] = __byte_perm(upper, lower, 0x5410);
                        a[2 * e + 1] = __byte_perm(upper, lower, 0x7632);
                    }
                    const uint64_t dyb = wgmma_descriptor(shared->ring.dy[Turn(i).stage]);
                    wgmma_fence(product);
                    wgmma_m64n64k16<T>(product, a, dyb + token * kNextToken, i > first);
                    wgmma_commit();
                    wgmma_wait<0>(product);
                }
                float *into = sum[tile] + token / 2;
#pragma unroll
                for (int i = 0; i < kTokens / 2; ++i)
                    into[i] = mask[tile] >> i & 1 ? __fmaf_rn(product[i], dropout.scale, into[i]) : into[i];
            }
        }
        for (int i = first; i < next; ++i)
            release(shared->empty + Turn(i).stage);
    }
}

// ---- results

// This thread's sums of a part: kSums / 4 vectors, kConsumers apart.
NF4LORA_DEVICE float4 *part_of(const GroupBwdParams &p, uint32_t part) {
    const int64_t tile = int64_t{blockIdx.y} * gridDim.x + blockIdx.x;
    return static_cast<float4 *>(p.workspace) + (tile * gridDim.z + part) * (kSums / 4 * kConsumers) + threadIdx.x;
}

template <int kTiles>
NF4LORA_DEVICE void store_part(const Sums<kTiles> &sum, float4 *part) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
        for (int i = 0; i < kSums / kTiles; i += 4, part += kConsumers)
            *part = make_float4(sum[tile][i], sum[tile][i + 1], sum[tile][i + 2], sum[tile][i + 3]);
}

template <int kTiles>
NF4LORA_DEVICE void add_parts(Sums<kTiles> &sum, const GroupBwdParams &p) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
        for (int i = 0; i < kSums / kTiles; ++i)
            sum[tile][i] = 0.0f;
    for (uint32_t s = 0; s < gridDim.z; ++s) {
        const float4 *part = part_of(p, s);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
            for (int i = 0; i < kSums / kTiles; i += 4, part += kConsumers) {
                float *into = sum[tile] + i;
                const float4 v = *part;
                into[0] += v.x, into[1] += v.y, into[2] += v.z, into[3] += v.w;
            }
    }
}

// Rounds the sums into rows of dx in shared memory, where the ring was.
template <class T, int kTiles>
NF4LORA_DEVICE void store_tile(char *out, const Sums<kTiles> &sum, const Lane<kTiles> &lane) {
#pragma unroll
    for (int i = 0; i < kSums / kTiles; i += i % 2 ? 3 : 1) {
        char *at = out + (i / 4 * 8 + lane.t + i % 2) * Shape<kTiles>::kOutPitch + lane.column * 2;
        uint32_t pair[kTiles];
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
            pair[tile] = round_pair<T>(sum[tile][i], sum[tile][i + 2]);
        if constexpr (kTiles == 2)
            *reinterpret_cast<uint2 *>(at) = make_uint2(pair[0], pair[1]);
        else
            *reinterpret_cast<uint32_t *>(at) = pair[0];
    }
}

template <int kTiles>
NF4LORA_DEVICE void copy_out(const GroupBwdParams &p, const Work &work, const char *out) {
    constexpr int kPieces = Shape<kTiles>::kColumns / kPiece;
    const int64_t left = p.M - work.token0;
    const int tokens = left < Shape<kTiles>::kTokens ? static_cast<int>(left) : Shape<kTiles>::kTokens;
    for (int i = threadIdx.x; i < tokens * kPieces; i += kConsumers) {
        const int token = i / kPieces, piece = i % kPieces;
        const int64_t column = work.column0 + piece * kPiece;
        if (column < p.K)
            *reinterpret_cast<uint4 *>(static_cast<uint16_t *>(p.dx) + (work.token0 + token) * p.K + column) =
                *reinterpret_cast<const uint4 *>(out + token * Shape<kTiles>::kOutPitch + piece * 16);
    }
}

NF4LORA_DEVICE void consumers_meet() { bar_sync(kConsumersMet, kConsumers); }

template <class T, int kTiles>
NF4LORA_DEVICE void consume(Shared<kTiles> *shared, const GroupBwdParams &p, const Work &work) {
    const Lane<kTiles> lane(p, work);
    Sums<kTiles> sum = {};
    consume_weights<T, kTiles>(sum, shared, p, work, lane);
    consume_adapters<T, kTiles>(sum, shared, p, work, lane);
    if (gridDim.z > 1) {
        store_part<kTiles>(sum, part_of(p, blockIdx.z));
        consumers_meet();  // all have stored
        if (threadIdx.x == 0) {
            uint32_t *counter = p.counters + int64_t{blockIdx.y} * gridDim.x + blockIdx.x;
            shared->arrived = atomic_inc_acq_rel(counter, gridDim.z - 1);
        }
        consumers_meet();
        if (shared->arrived + 1 < gridDim.z)
            return;
        add_parts<kTiles>(sum, p);
    }
    consumers_meet();  // nobody reads the ring any more
    store_tile<T, kTiles>(shared->out, sum, lane);
    consumers_meet();
    copy_out<kTiles>(p, work, shared->out);
}

// Grid: (tiles of K, tiles of M, parts of the reduction).
template <class T, int kTiles>
__global__ void __launch_bounds__(kThreads, 1) bwd_kernel(const __grid_constant__ GroupBwdParams p, int weight_steps,
                                                          int steps) {
    NF4LORA_SHARED(Shared<kTiles>, shared);
    const int first = static_cast<int>(int64_t{steps} * blockIdx.z / gridDim.z);
    const int last = static_cast<int>(int64_t{steps} * (blockIdx.z + 1) / gridDim.z);
    const Work work{int64_t{blockIdx.y} * Shape<kTiles>::kTokens, int64_t{blockIdx.x} * Shape<kTiles>::kColumns, first,
                    weight_steps < first ? first : weight_steps < last ? weight_steps : last, last};
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < kStages; ++stage) {
            mbarrier_init(shared->full + stage, kProducers / kLanes);
            mbarrier_init(shared->empty + stage, kConsumers / kLanes);
        }
        fence_mbarrier_init();
    }
    const bool producing = threadIdx.x >= kConsumers;
    RowScales<kTiles> scales;
    if (producing)
        send_first<kTiles>(scales, shared->ring, p, work);
    fill_values(shared->table, p.member[0].w.quant_type);
    fill_map(shared->map);
    __syncthreads();

    if (!producing) {
        take_registers<kConsumerRegisters>();
        consume<T, kTiles>(shared, p, work);
    } else {
        give_registers<kProducerRegisters>();
        produce<T, kTiles>(scales, shared, p, work);
    }
}

// ---- launching

struct Plan {
    int tiles;  // kTiles
    dim3 grid;
    int weight_steps, steps;

    int64_t outputs() const { return int64_t{grid.x} * grid.y; }
    int64_t workspace() const {
        return grid.z > 1 ? outputs() * grid.z * (kSums * kConsumers * int64_t{sizeof(float)}) : 0;
    }
};

Plan plan_of(const GroupBwdParams &p) {
    constexpr int kMostParts = 64;
    Plan plan{p.config.tokens > (Shape<2>::kTokens + Shape<1>::kTokens) / 2 ? 1 : 2, {}, 0, 0};
    for (int64_t i = 0; i < p.count; ++i)
        plan.weight_steps += static_cast<int>(ceil_div(p.member[i].w.rows, kDepth));
    plan.steps = plan.weight_steps + static_cast<int>(ceil_div(p.r, kSlice));
    plan.grid = dim3(static_cast<unsigned>(ceil_div(p.K, plan.tiles == 2 ? Shape<2>::kColumns : Shape<1>::kColumns)),
                     static_cast<unsigned>(ceil_div(p.M, plan.tiles == 2 ? Shape<2>::kTokens : Shape<1>::kTokens)));
    const int most = plan.outputs() > kCounters ? 1 : plan.steps < kMostParts ? plan.steps : kMostParts;
    const int parts = p.config.split < most ? p.config.split : most;
    plan.grid.z = static_cast<unsigned>(parts < 1 ? 1 : parts);
    return plan;
}

template <class T, int kTiles>
const char *launch(const GroupBwdParams &p, const Plan &plan, void *stream) {
    return NF4LORA_LAUNCH((bwd_kernel<T, kTiles>), plan.grid, kThreads, sizeof(Shared<kTiles>), stream, p,
                          plan.weight_steps, plan.steps);
}

template <class T>
const char *linear_bwd(const GroupBwdParams &p, void *stream) {
    const Plan plan = plan_of(p);
    return plan.tiles == 2 ? launch<T, 2>(p, plan, stream) : launch<T, 1>(p, plan, stream);
}

}  // namespace

const char *linear_bwd_wgmma(const GroupBwdParams &p, void *stream) {
    return p.dy_dtype == kBFloat16 ? linear_bwd<__nv_bfloat16>(p, stream) : linear_bwd<__half>(p, stream);
}

int64_t linear_bwd_wgmma_workspace(const GroupBwdParams &p) { return plan_of(p).workspace(); }

}  // namespace nf4lora
