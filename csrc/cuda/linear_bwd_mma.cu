// dx = sum over members of dy_i W_i + dropout_mask * (dyb_i A_i), on the tensor cores of sm_80 and newer
// Operands:      dy T [M, N], dyb T [M, r], W_i packed [N_i, K] with absmax, lora_A [r_i, K] any Dtype -> dx T [M, K]
// Rounding:      a weight is T(codebook * absmax), so that dy = I gives dequantize's bits; lora_A is rounded to T; sums
//                are fp32 in a fixed order: W, then LoRA under its mask; one rounding of dx
// Preconditions: T bf16 or fp16; K % 64 == 0; dy, dx and packed 16-byte aligned; blocksize a power of two, 32 to 4096;
//                blocksize and quant_type the same for all members
// Memory:        reads W once for each tile of 16, 32 or 64 rows of dy; at most 99 KiB shared; a split reduction takes
//                split * M * K floats of workspace, a counter a tile
// Budget:        instructions a weight in the main loop (nested, sm_90a): 4.4, 4.8, 5.4 at 16, 32, 64 tokens; 2.5 of
//                them decode it and 0.25, 0.5, 1 are products
//
// The reduction runs over the rows n of the weight, so the product is made transposed: dx^T[k, token] += W^T[k, n]
// dy^T[n, token], where W^T is the operand A of m16n8k16. Its registers want pairs of neighbouring n at one k, while a
// byte of the weight holds neighbouring k at one n: values are decoded to fp32 and packed after that, any two that are
// wanted. The rows of a product are columns k in an order of our choice: the one in which a lane's word of a row, its 8
// columns, feeds four products. Row g of product j is column 8g + 2j of the warp's 64, row g + 8 column 8g + 2j + 1.
#include "../dropout.cuh"
#include "../tile.cuh"
#include "paths.h"

namespace nf4lora {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kLanes;
constexpr int kWarpColumns = 64;   // 32 bytes of a row: one absmax, or two with blocksize 32
constexpr int kWarpRows = kLanes;  // of the weight in a step: a lane looks after the scale of one
constexpr int kProducts = 4;       // of 16 columns each
constexpr int kDepth = 16;         // rows of the weight that a product sums over
constexpr int kPiece = 16;         // bytes of a copy
constexpr int kPanelRow = 128;     // bytes of a row of dy in shared memory, swizzled
constexpr int kPanel = kPanelRow / 2;

// How a block covers kTokens of M: warps side by side share dy, warps below each other share the rows of the weight
// between them and add up at the end. A step of the reduction is kRows rows of the weight.
template <int kTokens_>
struct Plan {
    static constexpr int kTokens = kTokens_, kTokenTiles = kTokens / 8;
    static constexpr int kColumnWarps = kTokens == 16 ? 2 : 4, kRowWarps = kWarps / kColumnWarps;
    static constexpr int kColumns = kColumnWarps * kWarpColumns, kRows = kRowWarps * kWarpRows;
    static constexpr int kResidentBlocks = kTokens == 64 ? 1 : 2;  // of a multiprocessor, as far as registers go

    static constexpr int kCodeStages = kTokens == 64 ? 2 : 3, kDyStages = 2;
    static constexpr int kCodeRow = kColumns / 2, kCodeBytes = kRows * kCodeRow;
    static constexpr int kPanelBytes = kTokens * kPanelRow, kDyBytes = kRows / kPanel * kPanelBytes;
    static constexpr size_t kMapAt = kTableBytes, kScalesAt = kMapAt + kDynamicCodes * sizeof(float);
    static constexpr size_t kCodesAt = kScalesAt + 2 * kThreads * sizeof(float);
    static constexpr size_t kDyAt = kCodesAt + kCodeStages * kCodeBytes;
    static constexpr size_t kSharedBytes = kDyAt + kDyStages * kDyBytes;
    static_assert(kSharedBytes <= 99 << 10, "sm_86 has no more");

    // After the last step: sums of the block, kSumCopies times [kTokens][kSumRow], then a word.
    static constexpr int kSumCopies = kTokens == 64 ? 1 : kRowWarps, kSumRow = kColumns + 4;
    static constexpr size_t kWordAt = kSumCopies * kTokens * kSumRow * sizeof(float);
    static_assert(kWordAt + sizeof(uint32_t) <= kSharedBytes, "the sums lie where the operands did");
};

// What follows from the operands of a launch, worked out on the host.
struct Launch {
    float *parts;        // fp32 [split][M, K], null where the reduction is not split
    int part_steps, longer_parts;  // steps of a part of the reduction; so many of the parts have one more
    int lora_steps;                // as which LoRA counts, the first of part 0
    int shift;                     // log2 of the blocksize
    uint32_t step_blocks;          // absmax blocks of a step: whole ones, as K % 64 == 0
    int whole_pieces;              // bool: every member's columns of dy begin and end on 16 bytes
    int nested;                    // bool
    int halves;                    // bool, blocksize 32: a warp's lower and upper columns have their own scales

    // Of the members' rows, the first step of a part.
    NF4LORA_DEVICE int first_step(int part) const {
        const int step = part * part_steps + (part < longer_parts ? part : longer_parts) - lora_steps;
        return step > 0 ? step : 0;
    }
};

// ---- the reduction: the members' rows, one member after another, in steps that do not straddle members

// Where a step lies.
struct Place {
    int member;
    int64_t row0;  // first row of the member in the group
    int64_t row;   // first row of the step in the member
    int left;      // rows of the member from there on, as far as this part of the reduction goes
};

// `end` is the first step of the next part: nothing is left from there on.
template <int kRows>
NF4LORA_DEVICE Place place_of_step(const GroupBwdParams &p, int step, int end) {
    Place at{0, 0, 0, 0};
    for (;; ++at.member) {
        const int rows = static_cast<int>(p.member[at.member].w.rows), steps = (rows + kRows - 1) / kRows;
        if (step < steps || at.member + 1 >= p.count) {
            const int of_member = rows - step * kRows, of_part = (end - step) * kRows;
            at.row = step * kRows;
            at.left = of_member < of_part ? of_member : of_part;
            return at;
        }
        step -= steps;
        end -= steps;
        at.row0 += rows;
    }
}

// ---- what a step reads: aim() at a step of any member, next() to the following one of the same member. `left` is 0 or
// less before the first step, in another member and past the last step; nothing is read there.

constexpr int kNever = 1 << 30;  // a row or column that no step has

// Packed rows of the block's columns, to shared memory. The 32 bytes that a warp reads of a row change places with
// those of rows nearby, so that the four rows its lanes read at once lie in different banks.
template <class P>
struct CodeFeed {
    static constexpr int kPieces = P::kCodeRow / kPiece, kPassRows = kThreads / kPieces;
    const uint8_t *source = nullptr;
    int left = 0, row, to;

    static NF4LORA_DEVICE int place(int row, int byte) { return (row * P::kCodeRow + byte) ^ (row >> 1 & 3) << 5; }
    static NF4LORA_DEVICE int own_row() { return threadIdx.x / kPieces; }
    static NF4LORA_DEVICE int own_byte() { return threadIdx.x % kPieces * kPiece; }

    NF4LORA_DEVICE CodeFeed(const GroupBwdParams &p, int64_t column0)
        : row(pinned(column0 + 2 * own_byte() < p.K ? own_row() : kNever)), to(pinned(place(own_row(), own_byte()))) {}

    NF4LORA_DEVICE void aim(const GroupBwdParams &p, const Place &at, int64_t column0) {
        left = at.left;
        source = p.member[at.member].w.packed + ((at.row + own_row()) * p.K + column0) / 2 + own_byte();
    }

    NF4LORA_DEVICE void next(const GroupBwdParams &p) { source += P::kRows * p.K / 2, left -= P::kRows; }

    NF4LORA_DEVICE void copy(const GroupBwdParams &p, char *stage) const {
        static_assert(kPassRows % 8 == 0, "every pass places its pieces alike");
#pragma unroll
        for (int pass = 0; pass < P::kRows; pass += kPassRows)
            cp_async<kPiece>(stage + to + pass * P::kCodeRow, source + pass * p.K / 2, row + pass < left);
    }
};

// Columns of dy, to shared memory: panels [kTokens][kPanel], zeros outside of the member and of M.
template <class T, class P>
struct DyFeed {
    static constexpr int kElements = kPiece / static_cast<int>(sizeof(T));
    static constexpr int kPieces = P::kRows / kElements, kPassTokens = kThreads / kPieces;
    const T *source = nullptr;
    int left = 0;
    int tokens;  // those from this thread's first on
    int column, to;

    static NF4LORA_DEVICE int place(int token, int column) {
        const int element = token * kPanel + column % kPanel;
        return column / kPanel * P::kPanelBytes + static_cast<int>(swizzle128(element * static_cast<int>(sizeof(T))));
    }
    static NF4LORA_DEVICE int own_token() { return threadIdx.x / kPieces; }
    static NF4LORA_DEVICE int own_column() { return threadIdx.x % kPieces * kElements; }

    NF4LORA_DEVICE DyFeed(const GroupBwdParams &p, int64_t token0)
        : tokens(pinned(static_cast<int>(p.M - token0) - own_token())),
          column(pinned(tokens > 0 ? own_column() : kNever)), to(pinned(place(own_token(), own_column()))) {}

    NF4LORA_DEVICE void aim(const GroupBwdParams &p, const Place &at, int64_t token0) {
        left = at.left;
        source = static_cast<const T *>(p.dy) + (token0 + own_token()) * p.N + at.row0 + at.row + own_column();
    }

    NF4LORA_DEVICE void next() { source += P::kRows, left -= P::kRows; }

    // To the stage that is not the one of the call before.
    NF4LORA_DEVICE void copy(const GroupBwdParams &p, const Launch &launch, char *stages) {
        static_assert(kPassTokens % 8 == 0, "every pass places its pieces alike");
        const auto for_each_pass = [&](const auto &copy_piece) {
#pragma unroll
            for (int pass = 0; pass < P::kTokens; pass += kPassTokens)
                copy_piece(stages + to + pass * kPanelRow, source + pass * p.N, pass == 0 || pass < tokens ? left : 0);
        };
        if (launch.whole_pieces)
            for_each_pass([&](char *piece, const T *from, int end) { cp_async<kPiece>(piece, from, column < end); });
        else
            for_each_pass([&](char *piece, const T *from, int end) {
#pragma unroll 1  // N odd: rare
                for (int i = 0; i < kElements; ++i)
                    reinterpret_cast<T *>(piece)[i] = column + i < end ? from[i] : from_float<T>(0.0f);
            });
        to ^= P::kDyBytes;
    }
};

// Scales of a warp's rows and columns: a lane fetches its row's, with blocksize 32 that of the upper columns too, a
// step before they are wanted. Rows outside of the member get any finite scale, as dy is zero there.
template <class P>
struct ScaleFeed {
    const Launch &launch;
    const void *absmax = nullptr;
    const float *nested_absmax = nullptr;
    float offset = 0.0f, factor = 0.0f;  // of the nested block
    uint32_t stored[2] = {0, 0};         // as they lie in memory: codes, or the bits of floats
    uint32_t block = 0;

    static NF4LORA_DEVICE int lane_row() {
        return threadIdx.x / (P::kColumnWarps * kLanes) * kWarpRows + threadIdx.x % kLanes;
    }

    NF4LORA_DEVICE explicit ScaleFeed(const Launch &launch_) : launch(launch_) {}

    NF4LORA_DEVICE void aim(const GroupBwdParams &p, const Place &at, int64_t column) {
        const Weight &w = p.member[at.member].w;
        absmax = w.absmax;
        nested_absmax = w.nested_absmax;
        offset = launch.nested ? *w.offset : 0.0f;
        block = static_cast<uint32_t>(((at.row + lane_row()) * p.K + column) >> launch.shift);
    }

    NF4LORA_DEVICE void next() { block += launch.step_blocks; }

    NF4LORA_DEVICE void load(int left) {
        if (lane_row() >= left)
            return;
        if (launch.nested) {
            const uint8_t *codes = static_cast<const uint8_t *>(absmax) + block;
            stored[0] = codes[0];
            if (launch.halves)
                stored[1] = codes[1];
            factor = nested_absmax[block / Scales::kNestedBlocksize];
        } else {
            const float *values = static_cast<const float *>(absmax) + block;
            stored[0] = __float_as_uint(values[0]);
            if (launch.halves)
                stored[1] = __float_as_uint(values[1]);
        }
    }

    NF4LORA_DEVICE float decoded(const float *map, int half) const {
        if (!launch.nested)
            return __uint_as_float(stored[half]);
        return __fadd_rn(__fmul_rn(map[stored[half]], factor), offset);
    }

    // What was loaded, to shared memory: [2][kThreads], of the lower columns and of the upper.
    NF4LORA_DEVICE void publish(const float *map, float *shared_scales) const {
        shared_scales[threadIdx.x] = decoded(map, 0);
        if (launch.halves)
            shared_scales[kThreads + threadIdx.x] = decoded(map, 1);
    }
};

// ---- a warp's sums: product, tokens 8t to 8t + 7, register of m16n8k16

template <int kTokens>
struct Sums {
    float of[kProducts][kTokens / 8][4] = {};
};

// Of the 16 rows of the weight that a product sums over, those of a lane's registers: i = 0 … 3. The first two are
// also the tokens of its sums.
NF4LORA_DEVICE int own_row(int i) { return static_cast<int>(threadIdx.x) % 4 * 2 + i % 2 + i / 2 * 8; }

// The lane's sums into or onto a tile with rows of row_floats: its 8 columns of a token are neighbours there.
template <int kTokens>
NF4LORA_DEVICE void store_sums(const Sums<kTokens> &sum, float *tile, int row_floats, bool add) {
#pragma unroll
    for (int t = 0; t < kTokens / 8; ++t)
#pragma unroll
        for (int e = 0; e < 2; ++e)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float(&lower)[4] = sum.of[2 * half][t], (&upper)[4] = sum.of[2 * half + 1][t];
                float4 *to = reinterpret_cast<float4 *>(tile + (8 * t + own_row(e)) * row_floats) + half;
                float4 v = make_float4(lower[e], lower[2 + e], upper[e], upper[2 + e]);
                if (add) {
                    const float4 before = *to;
                    v = make_float4(before.x + v.x, before.y + v.y, before.z + v.z, before.w + v.w);
                }
                *to = v;
            }
}

// ---- LoRA, for 16 tokens at a time: few registers, as its part of the work is small

constexpr int kLoraTokens = 16;
typedef Sums<kLoraTokens> LoraSums;

// sum += A^T dyb^T over at most 16 ranks. a: lora_A from the first of them on, at the lane's 8 columns; dyb likewise,
// at the lane's first token, from which on there are `tokens`.
template <class T, class TA>
NF4LORA_DEVICE void add_ranks(LoraSums &sum, const TA *a, int64_t K, const T *dyb, int64_t dyb_row, int tokens,
                              int ranks) {
    uint32_t b[kLoraTokens / 8][2];
#pragma unroll
    for (int t = 0; t < kLoraTokens / 8; ++t) {
        float v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
            v[i] = own_row(i) < ranks && 8 * t < tokens ? to_float(dyb[8 * t * dyb_row + own_row(i)]) : 0.0f;
        b[t][0] = round_pair<T>(v[0], v[1]);
        b[t][1] = round_pair<T>(v[2], v[3]);
    }
#pragma unroll
    for (int j = 0; j < kProducts; ++j) {
        float even[4], odd[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            even[i] = own_row(i) < ranks ? to_float(a[own_row(i) * K + 2 * j]) : 0.0f;
            odd[i] = own_row(i) < ranks ? to_float(a[own_row(i) * K + 2 * j + 1]) : 0.0f;
        }
        const uint32_t fragment[4] = {round_pair<T>(even[0], even[1]), round_pair<T>(odd[0], odd[1]),
                                      round_pair<T>(even[2], even[3]), round_pair<T>(odd[2], odd[3])};
#pragma unroll
        for (int t = 0; t < kLoraTokens / 8; ++t)
            mma_m16n8k16<T>(sum.of[j][t], fragment, b[t]);
    }
}

// sum = dropout_mask * sum. index: the flat one of the lane's first column of the first token; two counters a token.
NF4LORA_DEVICE void mask_sums(LoraSums &sum, const DropoutMask &mask, int64_t index, int64_t K) {
#pragma unroll
    for (int t = 0; t < kLoraTokens / 8; ++t)
#pragma unroll
        for (int e = 0; e < 2; ++e)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float4 factor = mask.factors((index + (8 * t + own_row(e)) * K) / 4 + half);
                float(&lower)[4] = sum.of[2 * half][t], (&upper)[4] = sum.of[2 * half + 1][t];
                lower[e] = under_mask(lower[e], factor.x);
                lower[2 + e] = under_mask(lower[2 + e], factor.y);
                upper[e] = under_mask(upper[e], factor.z);
                upper[2 + e] = under_mask(upper[2 + e], factor.w);
            }
}

// dropout_mask * (dyb A) of 16 tokens and the lane's 8 columns.
template <class T>
NF4LORA_DEVICE LoraSums lora_sums(const GroupBwdParams &p, const DropoutMask &mask, int64_t token0,
                                  int64_t lane_column) {
    LoraSums sum;
    const int64_t token = token0 + threadIdx.x % kLanes / 4;
    const int tokens = static_cast<int>(p.M - token);
    const T *dyb = static_cast<const T *>(p.dyb) + token * p.r;
    for (int i = 0; i < p.count; dyb += p.member[i].r, ++i)
        for (int64_t rank = 0; rank < p.member[i].r; rank += kDepth) {
            const int64_t at = rank * p.K + lane_column;
            const int left = static_cast<int>(p.member[i].r - rank);
            const void *a = p.member[i].lora_A;
            if (p.A_dtype == kFloat32)
                add_ranks<T>(sum, static_cast<const float *>(a) + at, p.K, dyb + rank, p.r, tokens, left);
            else if (p.A_dtype == kBFloat16)
                add_ranks<T>(sum, static_cast<const __nv_bfloat16 *>(a) + at, p.K, dyb + rank, p.r, tokens, left);
            else
                add_ranks<T>(sum, static_cast<const __half *>(a) + at, p.K, dyb + rank, p.r, tokens, left);
        }
    if (mask.active)
        mask_sums(sum, mask, token0 * p.K + lane_column, p.K);
    return sum;
}

// ---- the products of a step

// Where a lane reads, in bytes from the start of each.
template <class T, class P>
struct Reader {
    int column;    // of the table
    int words[2];  // of a stage of codes: its word of an even row, and of the odd row that follows
    int dy[2];     // of the stages of dy: its row of the matrices of a step's first and second 16 rows
    int scales;    // of the block's scales: that of its first row

    NF4LORA_DEVICE Reader(int warp, bool halves) {
        const int lane = threadIdx.x % kLanes, row = warp / P::kColumnWarps * kWarpRows;
        const int byte = warp % P::kColumnWarps * (kWarpColumns / 2) + lane / 4 * static_cast<int>(sizeof(uint32_t));
        const int token = lane % 8 + lane / 16 * 8, n = row + lane / 8 % 2 * 8;
        column = pinned(lane * static_cast<int>(sizeof(float2)));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            words[i] = pinned(CodeFeed<P>::place(row + own_row(i), byte));
            dy[i] = pinned(DyFeed<T, P>::place(token, n + i * kDepth));
        }
        const int upper = halves && lane >= kLanes / 2 ? kThreads : 0;
        static_assert(P::kDyStages == 2 && (P::kDyBytes & (P::kDyBytes - 1)) == 0, "a bit says which of two stages");
        scales = pinned((warp * kLanes + upper + own_row(0)) * static_cast<int>(sizeof(float)));
    }

    NF4LORA_DEVICE void to_other_dy() {
        dy[0] ^= P::kDyBytes;
        dy[1] ^= P::kDyBytes;
    }
};

// sum += W^T dy^T over the warp's rows of one step.
template <class T, class P>
NF4LORA_DEVICE void add_step(Sums<P::kTokens> &sum, const Reader<T, P> &reader, const char *table, const char *codes,
                             const char *dy, const char *scales) {
#pragma unroll
    for (int s = 0; s < kWarpRows / kDepth; ++s) {
        uint32_t matrices[P::kTokens / 16][4];
#pragma unroll
        for (int q = 0; q < P::kTokens / 16; ++q)
            ldmatrix_x4(matrices[q], dy + reader.dy[s] + q * 16 * kPanelRow);
        uint32_t word[4];
        float2 absmax[2];  // of pairs of rows
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = s * kDepth + i / 2 * 8;
            word[i] = *reinterpret_cast<const uint32_t *>(codes + reader.words[i % 2] + row * P::kCodeRow);
            absmax[i / 2] = *reinterpret_cast<const float2 *>(scales + reader.scales + row * sizeof(float));
        }
#pragma unroll
        for (int j = 0; j < kProducts; ++j) {
            float2 v[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                v[i] = lookup_values(table, word[i], reader.column, byte_selector(j));
                const float scale = i % 2 == 0 ? absmax[i / 2].x : absmax[i / 2].y;
                v[i] = make_float2(__fmul_rn(v[i].x, scale), __fmul_rn(v[i].y, scale));
            }
            const uint32_t fragment[4] = {round_pair<T>(v[0].x, v[1].x), round_pair<T>(v[0].y, v[1].y),
                                          round_pair<T>(v[2].x, v[3].x), round_pair<T>(v[2].y, v[3].y)};
#pragma unroll
            for (int t = 0; t < P::kTokenTiles; ++t) {
                const uint32_t b[2] = {matrices[t / 2][t % 2 * 2], matrices[t / 2][t % 2 * 2 + 1]};
                mma_m16n8k16<T>(sum.of[j][t], fragment, b);
            }
        }
    }
}

// ---- the sums of a block, and of the blocks that split the reduction

struct Eight {
    float4 lower, upper;
};

NF4LORA_DEVICE void add(Eight &sum, const float *p) {
    const float4 a = reinterpret_cast<const float4 *>(p)[0], b = reinterpret_cast<const float4 *>(p)[1];
    sum.lower = make_float4(sum.lower.x + a.x, sum.lower.y + a.y, sum.lower.z + a.z, sum.lower.w + a.w);
    sum.upper = make_float4(sum.upper.x + b.x, sum.upper.y + b.y, sum.upper.z + b.z, sum.upper.w + b.w);
}

template <class T>
NF4LORA_DEVICE uint4 rounded(const Eight &v) {
    return make_uint4(round_pair<T>(v.lower.x, v.lower.y), round_pair<T>(v.lower.z, v.lower.w),
                      round_pair<T>(v.upper.x, v.upper.y), round_pair<T>(v.upper.z, v.upper.w));
}

// Calls visit(offset in dx, token, column of the tile) for each 8 columns that are there, a warp side by side.
template <class P, class Visit>
NF4LORA_DEVICE void for_each_eight(const GroupBwdParams &p, int64_t token0, int64_t column0, const Visit &visit) {
    constexpr int kEights = P::kColumns / 8;
    for (int i = threadIdx.x; i < P::kTokens * kEights; i += kThreads) {
        const int token = i / kEights, column = i % kEights * 8;
        if (token0 + token < p.M && column0 + column < p.K)
            visit((token0 + token) * p.K + column0 + column, token, column);
    }
}

// Grid: (tiles of M, tiles of K, parts of the reduction).
template <class T, class P>
__global__ void __launch_bounds__(kThreads, P::kResidentBlocks)
    dx_kernel(const __grid_constant__ GroupBwdParams p, const __grid_constant__ Launch launch) {
    NF4LORA_SHARED(char, shared);
    float *const map = reinterpret_cast<float *>(shared + P::kMapAt);
    char *const code_stages = shared + P::kCodesAt, *const dy_stages = shared + P::kDyAt;
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    const int column_warp = warp % P::kColumnWarps, row_warp = warp / P::kColumnWarps;
    const int64_t token0 = int64_t{blockIdx.x} * P::kTokens, column0 = int64_t{blockIdx.y} * P::kColumns;
    const int64_t warp_column = column0 + column_warp * kWarpColumns;
    const bool active = warp_column < p.K;  // other warps compute on zeros, so that no branch parts the lanes
    const int first = launch.first_step(blockIdx.z), end = launch.first_step(blockIdx.z + 1);

    // Codes run ahead of the products by kCodeStages - 1 steps, dy and the scales by one.
    CodeFeed<P> codes(p, column0);
    DyFeed<T, P> dy(p, token0);
    ScaleFeed<P> scales(launch);
    const auto copy_codes = [&](int step, char *stage) {
        codes.next(p);
        if (codes.left <= 0) {
            const Place at = place_of_step<P::kRows>(p, step, end);
            if (at.left > 0)
                codes.aim(p, at, column0);
        }
        codes.copy(p, stage);
        cp_async_commit();  // of zeros past the last step, so that a group is as old as its step says
    };
    const auto copy_dy_and_scales = [&](int step) {
        dy.next();
        scales.next();
        if (dy.left <= 0) {
            const Place at = place_of_step<P::kRows>(p, step, end);
            if (at.left > 0) {
                dy.aim(p, at, token0);
                scales.aim(p, at, active ? warp_column : column0);
            }
        }
        dy.copy(p, launch, dy_stages);
        cp_async_commit();
        scales.load(dy.left);
    };
    copy_dy_and_scales(first);
#pragma unroll
    for (int i = 0; i < P::kCodeStages - 1; ++i)
        copy_codes(first + i, code_stages + i * P::kCodeBytes);

    fill_values(shared, p.member[0].w.quant_type);
    fill_map(map);

    Sums<P::kTokens> sum;
    Reader<T, P> reader(warp, launch.halves);
    int codes_at = 0, free_codes_at = (P::kCodeStages - 1) * P::kCodeBytes;  // of this step, of the step before
    for (int step = first; step < end; ++step) {
        cp_async_wait<P::kCodeStages - 2>();  // codes of a later step may be under way
        __syncthreads();                      // everyone's copies of this step are there; the step before is done with
        scales.publish(map, reinterpret_cast<float *>(shared + P::kScalesAt));
        copy_dy_and_scales(step + 1);
        copy_codes(step + P::kCodeStages - 1, code_stages + free_codes_at);
        __syncwarp();  // the scales are there
        add_step(sum, reader, shared, code_stages + codes_at, dy_stages, shared + P::kScalesAt);
        reader.to_other_dy();
        free_codes_at = codes_at;
        codes_at = codes_at == (P::kCodeStages - 1) * P::kCodeBytes ? 0 : codes_at + P::kCodeBytes;
    }
    cp_async_wait<0>();
    __syncthreads();  // the operands are read no more

    // The warps' sums, to shared memory, where they wait for those of LoRA, which want the same registers.
    constexpr int kTile = P::kTokens * P::kSumRow;
    float *const tiles = reinterpret_cast<float *>(shared);
    const int lane_column = column_warp * kWarpColumns + lane / 4 * 8;
    float *const own_sums = tiles + row_warp % P::kSumCopies * kTile + lane_column;
#pragma unroll
    for (int turn = 0; turn < P::kRowWarps / P::kSumCopies; ++turn) {
        if (row_warp / P::kSumCopies == turn)
            store_sums(sum, own_sums, P::kSumRow, turn > 0);
        __syncthreads();
    }
    if (p.r > 0 && blockIdx.z == 0) {
        const DropoutMask mask(p.dropout);
        if (active)
#pragma unroll 1
            for (int token = row_warp * kLoraTokens; token < P::kTokens; token += P::kRowWarps * kLoraTokens)
                store_sums(lora_sums<T>(p, mask, token0 + token, column0 + lane_column),
                           tiles + token * P::kSumRow + lane_column, P::kSumRow, true);
        __syncthreads();
    }
    const auto sum_of_block = [&](int token, int column) {
        Eight v{};
#pragma unroll
        for (int copy = 0; copy < P::kSumCopies; ++copy)
            add(v, tiles + copy * kTile + token * P::kSumRow + column);
        return v;
    };
    T *const dx = static_cast<T *>(p.dx);
    if (gridDim.z == 1) {
        for_each_eight<P>(p, token0, column0, [&](int64_t at, int token, int column) {
            *reinterpret_cast<uint4 *>(dx + at) = rounded<T>(sum_of_block(token, column));
        });
        return;
    }
    const int64_t part = p.M * p.K;
    for_each_eight<P>(p, token0, column0, [&](int64_t at, int token, int column) {
        const Eight v = sum_of_block(token, column);
        float4 *to = reinterpret_cast<float4 *>(launch.parts + blockIdx.z * part + at);
        to[0] = v.lower;
        to[1] = v.upper;
    });
    uint32_t *const word = reinterpret_cast<uint32_t *>(shared + P::kWordAt);
    if (!comes_last(p.counters + int64_t{blockIdx.y} * gridDim.x + blockIdx.x, gridDim.z, word))
        return;
    for_each_eight<P>(p, token0, column0, [&](int64_t at, int, int) {
        Eight v{};
#pragma unroll 4
        for (unsigned i = 0; i < gridDim.z; ++i)
            add(v, launch.parts + i * part + at);
        *reinterpret_cast<uint4 *>(dx + at) = rounded<T>(v);
    });
}

// ---- launching

// The grid and the workspace of a call.
template <class P>
struct Shape {
    int64_t steps = 0, blocks = 0, token_tiles, column_tiles, split, workspace_bytes;

    explicit Shape(const GroupBwdParams &p)
        : token_tiles(ceil_div(p.M, P::kTokens)), column_tiles(ceil_div(p.K, P::kColumns)) {
        for (int i = 0; i < p.count; ++i) {
            const Weight &w = p.member[i].w;
            steps += ceil_div(w.rows, P::kRows);
            const int64_t of_member = ceil_div(w.rows * w.cols, w.blocksize);
            blocks = of_member > blocks ? of_member : blocks;
        }
        constexpr int64_t kMaxGrid = 65535;
        const int64_t most = steps < kMaxGrid ? steps : kMaxGrid;
        split = p.config.split < most ? p.config.split : most;
        if (split < 1 || token_tiles * column_tiles > kCounters)
            split = 1;
        workspace_bytes = split == 1 ? 0 : split * p.M * p.K * int64_t{sizeof(float)};
    }
};

template <class T, class P>
const char *launch_dx(const GroupBwdParams &p, void *stream) {
    const Shape<P> shape(p);
    if (p.N >= kNever || p.M >= kNever || p.r >= kNever || shape.blocks >= int64_t{1} << 32)
        return "M, N and r must be below 2^30, blocks of a weight below 2^32";
    const Weight &w = p.member[0].w;
    const int64_t lora_steps = p.r > 0 ? 2 + p.r / kDepth : 0, steps = shape.steps + lora_steps;  // calculated
    Launch launch{};
    launch.part_steps = static_cast<int>(steps / shape.split);
    launch.longer_parts = static_cast<int>(steps % shape.split);
    launch.lora_steps = static_cast<int>(lora_steps);
    launch.shift = log2_of(w.blocksize);
    launch.step_blocks = static_cast<uint32_t>(P::kRows * p.K >> launch.shift);
    launch.whole_pieces = 1;
    for (int i = 0; i < p.count; ++i)
        launch.whole_pieces &= p.member[i].w.rows % (kPiece / sizeof(T)) == 0;
    launch.nested = w.nested_absmax != nullptr;
    launch.halves = w.blocksize < kWarpColumns;
    launch.parts = static_cast<float *>(p.workspace);
    const dim3 grid(static_cast<unsigned>(shape.token_tiles), static_cast<unsigned>(shape.column_tiles),
                    static_cast<unsigned>(shape.split));
    return NF4LORA_LAUNCH((dx_kernel<T, P>), grid, kThreads, P::kSharedBytes, stream, p, launch);
}

// Calls with the plan for config.tokens.
template <class Call>
auto with_plan(const GroupBwdParams &p, const Call &call) {
    if (p.config.tokens <= 16)
        return call(Plan<16>{});
    return p.config.tokens <= 32 ? call(Plan<32>{}) : call(Plan<64>{});
}

}  // namespace

const char *linear_bwd_mma(const GroupBwdParams &p, void *stream) {
    return with_plan(p, [&](auto plan) {
        typedef decltype(plan) P;
        return p.dy_dtype == kBFloat16 ? launch_dx<__nv_bfloat16, P>(p, stream) : launch_dx<__half, P>(p, stream);
    });
}

int64_t linear_bwd_mma_workspace(const GroupBwdParams &p) {
    return with_plan(p, [&](auto plan) { return Shape<decltype(plan)>(p).workspace_bytes; });
}

}  // namespace nf4lora
