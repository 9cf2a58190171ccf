// y_i = x W_i^T + bias_i + scaling_i * xa_i B_i^T in tiles, on the tensor cores of sm_80 and newer
// Operands:      params.h; x, xa and y of one type T, bf16 or fp16; xa as lora_fwd left it
// Rounding:      a weight is T(codebook * absmax), the product in fp32: the bits dequantize gives. B is rounded to T.
//                Sums in fp32: xa B^T, times scaling, then x W^T on top, then the bias; y is rounded once
// Preconditions: K % 64 == 0; x and packed 16-byte aligned; blocksize a power of two from 32 on; below 2^35 elements
//                of x and 2^37 of a weight
// Memory:        codes and absmax once for each tile of tokens, x once for each tile of rows (token tiles of the same
//                rows are neighbours, so that L2 serves both), y once; 65 KiB shared. A split writes and reads its
//                partial sums
// Budget:        instructions a weight, of 64 tokens and 256 rows: 2.5 decode it, 1 is products, 1/4 fetches x; main
//                loop 4.1 (sm_80 to sm_120), 4.5 at 128 rows, 6.2 for 128 tokens, where 5.5 is the least; no spills
//
// The weight is the A operand: a warp decodes its own rows straight into fragments, each weight once; tokens are
// columns. A sum over k may run in any order that both operands share: of each 256 columns, a step, lane c of a quad
// takes 64c to 64c + 63, its run. These are two 16-byte loads of codes, of one absmax (two at blocksize 32), so that no
// lane needs what another has decoded. Of x, a slice of 16 columns of each run is staged at a time.
//
// Shared memory is 256 rows of 256 bytes. In the lower half of row b lie the two values that byte b decodes to, in 16
// copies: 64-bit loads serve 16 lanes at a time, so no two meet in a bank, and one byte_perm makes the offset. In the
// upper halves, 128 bytes each, lie two stages of x. Before the loop B's rows take the place of the values, and xa's
// that of the last slice; after it the tile of y takes that of everything.
#include "../tile.cuh"
#include "paths.h"

namespace nf4lora {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kLanes;
constexpr int kStep = 256;   // columns of W and x that a step of the main loop takes
constexpr int kRun = 64;     // those of a lane, one after another
constexpr int kSlice = 16;   // those of a run that lie in shared memory together
constexpr int kSlices = kRun / kSlice;
constexpr int kRow = 256;    // bytes of a row of shared memory
constexpr int kHalf = 128;
constexpr int kRows = 256;
constexpr int kPiece = 16;   // bytes of one copy: 8 elements, or codes of 32 weights
constexpr int kMaxSplit = 64;
static_assert(kRow == kTableRow && kRows * kRow == kTableBytes, "what table_offset makes");
static_assert(kHalf == 4 * kSlice * sizeof(uint16_t), "a half holds a quad's slice of one token");
static_assert(kThreads == kRows, "a thread fills a row of the table");

constexpr size_t kMapAt = kRows * kRow, kWordAt = kMapAt + kDynamicCodes * sizeof(float);
constexpr size_t kSharedBytes = kWordAt + sizeof(uint32_t);

template <int kTokens_, int kFragments_, int kBlocks_ = 1>
struct Shape {
    static constexpr int kTokens = kTokens_;
    static constexpr int kFragments = kFragments_;          // of 16 rows, of a warp
    static constexpr int kColumns = kTokens / 8;            // fragments of 8 tokens
    static constexpr int kWarpRows = 16 * kFragments;
    static constexpr int kTileRows = kWarps * kWarpRows;
    static constexpr int kLaneRows = 2 * kFragments;        // lane / 4 + 8 i of a warp's rows
    static constexpr int kBlocks = kBlocks_;                // absmax of a lane's run of a row
    static constexpr int kSlots = kRows / kTokens;          // for slices of x
    static constexpr int kStageSlices = kSlots / 2;         // arrive together while those before are in use
    static constexpr int kSlotBytes = kTokens * kRow;
    // Blocks of a multiprocessor. Left alone, the compiler takes so few registers that two of 64 x 128 fit; made to, it
    // spills.
    static constexpr int kResident = kTokens * kFragments * kBlocks == 64 ? 0 : 1;
    static_assert(kTileRows <= kRows, "B's rows in the lower halves");
    static_assert(kTileRows * kTokens * 2 <= kRows * kRow, "the tile of y");
};

// Offset of piece i of a row in its half: eight rows of one column lie in eight different groups of banks.
NF4LORA_DEVICE constexpr int piece_at(int row, int i) { return (i ^ (row & 7)) * kPiece; }

// ---- which tile

struct Grid {
    uint32_t token_tiles, row_tiles;
};

constexpr uint32_t kBand = 16;  // token tiles that take turns with the same rows of W; their x stays in L2

struct Tile {
    int member;
    int64_t row0;     // in the member's weight
    int64_t column0;  // of y, where the member begins
    int64_t rank0;    // of xa, likewise
    int64_t token0;
};

template <class S>
NF4LORA_DEVICE Tile tile_of(const GroupFwdParams &p, Grid grid, uint32_t index) {
    const uint32_t before = index / (kBand * grid.row_tiles) * kBand, left = grid.token_tiles - before;
    const uint32_t width = left < kBand ? left : kBand, inside = index - before * grid.row_tiles;
    Tile tile{0, int64_t{inside / width} * S::kTileRows, 0, 0, int64_t{before + inside % width} * S::kTokens};
    for (; tile.row0 >= p.member[tile.member].w.rows; ++tile.member) {
        const Member &passed = p.member[tile.member];
        tile.row0 -= (passed.w.rows + S::kTileRows - 1) / S::kTileRows * S::kTileRows;
        tile.column0 += passed.w.rows;
        tile.rank0 += passed.r;
    }
    return tile;
}

// ---- products: a[f][s] are the fragments of 16 columns each, b's lie in one piece of each token

template <class S, class T>
NF4LORA_DEVICE void multiply(float (&sum)[S::kFragments][S::kColumns][4], const uint32_t (&a)[S::kFragments][2][4],
                             const char *tokens) {
#pragma unroll
    for (int j = 0; j < S::kColumns; j += 2) {
        uint32_t b[2][2][2];  // [fragment][16 columns]
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint4 piece = *reinterpret_cast<const uint4 *>(tokens + (j + i) * 8 * kRow);
            b[i][0][0] = piece.x, b[i][0][1] = piece.y, b[i][1][0] = piece.z, b[i][1][1] = piece.w;
        }
#pragma unroll
        for (int s = 0; s < 2; ++s)
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int f = 0; f < S::kFragments; ++f)
                    mma_m16n8k16<T>(sum[f][j + i], a[f][s], b[i][s]);
    }
}

// ---- the adapter: up to 64 columns of B and xa at a time, in shared memory as if they were a step of W and x

// Rows of `from`, of which `rows` and `columns` are there, into `to`, rounded to T; zeros beyond, up to 2**log_width
// columns. Column 16 s + 4 c + e lies where lane c of a quad takes element e of the 16 columns s, so that few columns
// are few s.
template <class T, int kCopied, class Source>
NF4LORA_DEVICE void stage_columns(char *to, const Source *from, int64_t stride, int64_t rows, int64_t columns,
                                  int log_width) {
    constexpr int kBatch = 8;  // loads under way
    static_assert(kCopied * 32 % (kThreads * kBatch) == 0, "whole batches");
#pragma unroll 1
    for (int first = threadIdx.x; first < kCopied << log_width; first += kThreads * kBatch) {
        T v[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int at = first + i * kThreads, row = at >> log_width, column = at & ((1 << log_width) - 1);
            const bool inside = row < rows && column < columns;
            v[i] = from_float<T>(inside ? to_float(from[row * stride + column]) : 0.0f);
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int at = first + i * kThreads, row = at >> log_width, column = at & ((1 << log_width) - 1);
            const int place = column % 16 / 4 * 16 + column / 16 * 4 + column % 4;
            reinterpret_cast<T *>(to + row * kRow + piece_at(row, place / 8))[place % 8] = v[i];
        }
    }
}

template <class S, class T>
NF4LORA_DEVICE void add_adapter(float (&sum)[S::kFragments][S::kColumns][4], const GroupFwdParams &p, const Tile &tile,
                                char *shared) {
    const Member &member = p.member[tile.member];
    char *const last_slot = shared + (S::kSlots - 1) * S::kSlotBytes + kHalf;
    const int lane = threadIdx.x % kLanes, g = lane / 4, c = lane % 4;
    const char *const my_rows = shared + (threadIdx.x / kLanes * S::kWarpRows + g) * kRow;
    const char *const my_tokens = last_slot + g * kRow;
    const int64_t rows = member.w.rows - tile.row0, first = tile.row0 * member.r;
#pragma unroll 1
    for (int64_t rank = 0; rank < member.r; rank += kRun) {
        const int64_t left = member.r - rank;
        const int log_width = left > 32 ? 6 : 5;
        const auto stage_B = [&](const auto *B) {
            stage_columns<T, S::kTileRows>(shared, B + first + rank, member.r, rows, left, log_width);
        };
        if (p.B_dtype == kFloat32)
            stage_B(static_cast<const float *>(member.lora_B));
        else if (p.B_dtype == kBFloat16)
            stage_B(static_cast<const __nv_bfloat16 *>(member.lora_B));
        else
            stage_B(static_cast<const __half *>(member.lora_B));
        stage_columns<T, S::kTokens>(last_slot, static_cast<const T *>(p.xa) + tile.token0 * p.r + tile.rank0 + rank,
                                     p.r, p.M - tile.token0, left, log_width);
        __syncthreads();
#pragma unroll 1
        for (int h = 0; h < 1 << (log_width - 5); ++h) {
            const int piece = piece_at(g, 2 * c + h);
            uint32_t a[S::kFragments][2][4];
#pragma unroll
            for (int i = 0; i < S::kLaneRows; ++i) {
                const uint4 v = *reinterpret_cast<const uint4 *>(my_rows + i * 8 * kRow + piece);
                uint32_t(&of_row)[2][4] = a[i / 2];
                of_row[0][i % 2] = v.x, of_row[0][i % 2 + 2] = v.y;
                of_row[1][i % 2] = v.z, of_row[1][i % 2 + 2] = v.w;
            }
            multiply<S, T>(sum, a, my_tokens + piece);
        }
        __syncthreads();  // what comes next overwrites both
    }
#pragma unroll
    for (int f = 0; f < S::kFragments; ++f)
#pragma unroll
        for (int j = 0; j < S::kColumns; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                sum[f][j][e] = __fmul_rn(sum[f][j][e], member.scaling);
}

// ---- the weight of a lane's rows

// Codes and scales of a lane's rows, fetched ahead of use. Row i of a lane is lane / 4 + 8 i of its warp; rows past the
// member's last are its last. A run past the last column is the one before it again: there x is zero.
template <class S>
class Rows {
  public:
    static constexpr int kWords = kRun / 8;  // of codes, of a run

    uint32_t word[S::kLaneRows][kWords];
    float scale[S::kBlocks][S::kLaneRows];

    // w's rows from row0 on, the step at column0; `left` columns from the lane's run on belong to this part of K.
    NF4LORA_DEVICE Rows(const Weight &w, int64_t row0, int64_t column0, int left, const float *map)
        : codes_(reinterpret_cast<const uint4 *>(w.packed)), map_(map), nested_(w.nested_absmax != nullptr) {
        const int lane = threadIdx.x % kLanes, warp_row = threadIdx.x / kLanes * S::kWarpRows;
        const int64_t column = column0 + (left > 0 ? lane % 4 * kRun : 0);
#pragma unroll
        for (int i = 0; i < S::kLaneRows; ++i) {
            const int64_t row = row0 + warp_row + lane / 4 + 8 * i;
            at_[i] = static_cast<uint32_t>(((row < w.rows ? row : w.rows - 1) * w.cols + column) / kPieceWeights);
        }
        // An absmax that is not nested is decoded too, as 1 * absmax - 0, which is its bits.
        absmax_codes_ = static_cast<const uint8_t *>(w.absmax);
        factors_ = nested_ ? w.nested_absmax : static_cast<const float *>(w.absmax);
        block_shift_ = 26 - __clz(static_cast<int>(w.blocksize));  // here, as a host pass of nvcc parses initializers
        factor_shift_ = block_shift_ + (nested_ ? kNestedShift : 0);
        offset_ = nested_ ? *w.offset : -0.0f;
#pragma unroll
        for (int b = 0; b < S::kBlocks; ++b)
#pragma unroll
            for (int i = 0; i < S::kLaneRows; ++i)
                code_[b][i] = kDynamicCodes - 1;
        fetch_first();
        take_scales();
    }

    NF4LORA_DEVICE void fetch_second_half() { fetch_codes(1); }

    // On to the next step: fetches the codes of the first half of its run and what its scales are made of.
    NF4LORA_DEVICE void go_on(int left) {
        const uint32_t ahead = left > kStep ? kStep / kPieceWeights : 0;
#pragma unroll
        for (int i = 0; i < S::kLaneRows; ++i)
            at_[i] += ahead;
        fetch_first();
    }

    NF4LORA_DEVICE void take_scales() {
#pragma unroll
        for (int b = 0; b < S::kBlocks; ++b)
#pragma unroll
            for (int i = 0; i < S::kLaneRows; ++i)
                scale[b][i] = __fadd_rn(__fmul_rn(map_[code_[b][i]], factor_[b][i]), offset_);
    }

  private:
    static constexpr int kPieceWeights = 2 * kPiece, kNestedShift = 8;
    static_assert(1 << kNestedShift == Scales::kNestedBlocksize, "blocks of a nested block");
    static_assert(kDynamicCodebook[kDynamicCodes - 1] == 1.0f, "the code of an absmax that is not nested");

    NF4LORA_DEVICE void fetch_codes(int half) {
#pragma unroll
        for (int i = 0; i < S::kLaneRows; ++i) {
            const uint4 codes = __ldg(codes_ + at_[i] + half);
            uint32_t *const to = word[i] + half * kWords / 2;
            to[0] = codes.x, to[1] = codes.y, to[2] = codes.z, to[3] = codes.w;
        }
    }

    NF4LORA_DEVICE void fetch_first() {
        fetch_codes(0);
#pragma unroll
        for (int b = 0; b < S::kBlocks; ++b)
#pragma unroll
            for (int i = 0; i < S::kLaneRows; ++i) {
                factor_[b][i] = factors_[(at_[i] + b) >> factor_shift_];
                if (nested_)
                    code_[b][i] = absmax_codes_[(at_[i] + b) >> block_shift_];
            }
    }

    const uint4 *codes_;
    const uint8_t *absmax_codes_;
    const float *factors_, *map_;
    bool nested_;
    int block_shift_, factor_shift_;
    uint32_t at_[S::kLaneRows];  // pieces of codes before the lane's runs in the weight
    float offset_;
    float factor_[S::kBlocks][S::kLaneRows];
    uint32_t code_[S::kBlocks][S::kLaneRows];
};

// A thread fills a row of the table, eight neighbours eight different pieces at a time.
NF4LORA_DEVICE void fill_table(char *shared, int32_t quant_type) {
    const Codebook &book = kBooks[quant_type];
    const int byte = threadIdx.x;
    const uint32_t even = __float_as_uint(book.value[byte >> 4]), odd = __float_as_uint(book.value[byte & 15]);
#pragma unroll
    for (int i = 0; i < kHalf / kPiece; ++i)
        *reinterpret_cast<uint4 *>(shared + byte * kRow + piece_at(byte, i)) = make_uint4(even, odd, even, odd);
}

// The fragments of half a slice from a word of codes of each row.
template <class S, class T>
NF4LORA_DEVICE void decode(uint32_t (&a)[S::kFragments][2][4], const char *shared, const Rows<S> &rows, int word) {
    const uint32_t column = threadIdx.x % 16 * sizeof(float2);
#pragma unroll
    for (int i = 0; i < S::kLaneRows; ++i) {
        const float scale = rows.scale[word * S::kBlocks / Rows<S>::kWords][i];
#pragma unroll
        for (int byte = 0; byte < 4; ++byte) {
            const float2 v = lookup_values(shared, rows.word[i][word], column, byte_selector(byte));
            const float even = __fmul_rn(v.x, scale), odd = __fmul_rn(v.y, scale);
            a[i / 2][byte / 2][i % 2 + byte % 2 * 2] = round_pair<T>(even, odd);
        }
    }
}

// ---- x

// Copies of stages of x. Eight threads copy the pieces of a token's slice, two of each lane of a quad; a token past the
// last is the last, a run past the last column zeros.
template <class S>
class Tokens {
  public:
    NF4LORA_DEVICE Tokens(const GroupFwdParams &p, int64_t token0, int64_t column0, char *shared)
        : x_(static_cast<const uint4 *>(p.x)) {
        const int token = threadIdx.x / 8, c = threadIdx.x % 4, half = threadIdx.x / 4 % 2;
        to_ = shared + kHalf + token * kRow + piece_at(token, 2 * c + half);
#pragma unroll
        for (int i = 0; i < kPasses; ++i) {
            const int64_t t = token0 + token + i * kPassTokens, column = column0 + c * kRun + half * kPieceElements;
            from_[i] = static_cast<uint32_t>(((t < p.M ? t : p.M - 1) * p.K + column) / kPieceElements);
        }
    }

    // Sends for the stage that begins with a slice of this step; its slices from kSlices on are the next step's.
    NF4LORA_DEVICE void fetch(int first, int left) const {
        const int ahead = first / kSlices * kStep;
#pragma unroll
        for (int i = 0; i < kPasses; ++i)
#pragma unroll
            for (int slice = first; slice < first + S::kStageSlices; ++slice)
                cp_async<kPiece>(to_ + i * kPassTokens * kRow + slice % S::kSlots * S::kSlotBytes,
                                 x_ + from_[i] + (ahead + slice % kSlices * kSlice) / kPieceElements, left > ahead);
        cp_async_commit();
    }

    NF4LORA_DEVICE void go_on() {
#pragma unroll
        for (int i = 0; i < kPasses; ++i)
            from_[i] += kStep / kPieceElements;
    }

  private:
    static constexpr int kPassTokens = kThreads / 8, kPasses = S::kTokens / kPassTokens;
    static constexpr int kPieceElements = kPiece / static_cast<int>(sizeof(uint16_t));

    const uint4 *x_;
    char *to_;
    uint32_t from_[kPasses];  // pieces of x
};

// Adds steps of x W^T, of which `left` columns are the lane's and those after it. On entry the first stage of x is on
// its way.
template <class S, class T>
NF4LORA_DEVICE void add_weight(float (&sum)[S::kFragments][S::kColumns][4], Rows<S> &rows, Tokens<S> &tokens,
                               const char *shared, int steps, int left) {
    constexpr int kWords = Rows<S>::kWords;
    const int g = threadIdx.x % kLanes / 4, c = threadIdx.x % 4;
    const char *const x = shared + kHalf + g * kRow;
    const char *const half_slice[] = {x + piece_at(g, 2 * c), x + piece_at(g, 2 * c + 1)};
    uint32_t a[2][S::kFragments][2][4];  // of a word, and of the next
    decode<S, T>(a[0], shared, rows, 0);
#pragma unroll 1
    for (int step = 0; step < steps; ++step, left -= kStep) {
#pragma unroll
        for (int word = 0; word < kWords; ++word) {
            const int slice = word / 2;
            if (word % (2 * S::kStageSlices) == 0) {
                cp_async_wait<0>();
                __syncthreads();  // this stage of x has come, and no one reads the other
                tokens.fetch(slice + S::kStageSlices, left);
            }
            if (word == 0)
                rows.fetch_second_half();
            if (word == kWords / 2)
                rows.go_on(left);
            if (word == kWords - 1)
                rows.take_scales();
            // Fragments are decoded while the tensor cores work on those before; the compiler interleaves the two.
            decode<S, T>(a[(word + 1) % 2], shared, rows, (word + 1) % kWords);
            multiply<S, T>(sum, a[word % 2], half_slice[word % 2] + slice % S::kSlots * S::kSlotBytes);
        }
        tokens.go_on();
    }
    cp_async_wait<0>();
    __syncthreads();  // all have read the last stage
}

// ---- y

// Partial sums of the blocks that share a tile, added in the order of the parts. A thread reads what its like have
// written.
template <class S>
struct Parts {
    static constexpr int kQuads = S::kFragments * S::kColumns;
    static constexpr int64_t kFloats = int64_t{4} * kQuads * kThreads;

    static NF4LORA_DEVICE void store(const float (&sum)[S::kFragments][S::kColumns][4], float4 *part) {
#pragma unroll
        for (int i = 0; i < kQuads; ++i) {
            const float(&d)[4] = sum[i / S::kColumns][i % S::kColumns];
            part[i * kThreads + threadIdx.x] = make_float4(d[0], d[1], d[2], d[3]);
        }
    }

    static NF4LORA_DEVICE void add(float (&sum)[S::kFragments][S::kColumns][4], const float4 *part, bool first) {
#pragma unroll
        for (int i = 0; i < kQuads; ++i) {
            float(&d)[4] = sum[i / S::kColumns][i % S::kColumns];
            const float4 v = part[i * kThreads + threadIdx.x];
            d[0] = first ? v.x : __fadd_rn(d[0], v.x);
            d[1] = first ? v.y : __fadd_rn(d[1], v.y);
            d[2] = first ? v.z : __fadd_rn(d[2], v.z);
            d[3] = first ? v.w : __fadd_rn(d[3], v.w);
        }
    }
};

// Where column `row` of token `token` of y lies in shared memory until it is stored.
template <class S>
NF4LORA_DEVICE int y_at(int token, int row) {
    return token * S::kTileRows * 2 + piece_at(token, row / 8) + row % 8 * 2;
}

// Adds the bias, rounds, and turns the tile round: a row of y is a column of sums. Lanes 4 apart have neighbouring
// rows, of which each takes those of one token.
template <class S, class T>
NF4LORA_DEVICE void stage_y(float (&sum)[S::kFragments][S::kColumns][4], const GroupFwdParams &p, const Tile &tile,
                            char *shared) {
    const Member &member = p.member[tile.member];
    const int lane = threadIdx.x % kLanes, g = lane / 4, odd = g % 2;
    const int warp_row = threadIdx.x / kLanes * S::kWarpRows, token = lane % 4 * 2 + odd;
#pragma unroll
    for (int i = 0; i < S::kLaneRows; ++i) {
        const int64_t row = tile.row0 + warp_row + 8 * i + g;
        float bias = 0.0f;
        if (member.bias && row < member.w.rows)
            bias = load_element(member.bias, p.bias_dtype, row);
#pragma unroll
        for (int j = 0; j < S::kColumns; ++j) {
            const float(&d)[4] = sum[i / 2][j];
            const float even_token = __fadd_rn(d[i % 2 * 2], bias), odd_token = __fadd_rn(d[i % 2 * 2 + 1], bias);
            const float other = __shfl_xor_sync(~0u, odd ? even_token : odd_token, 4);
            const uint32_t pair = odd ? round_pair<T>(other, odd_token) : round_pair<T>(even_token, other);
            *reinterpret_cast<uint32_t *>(shared + y_at<S>(8 * j + token, warp_row + 8 * i + g - odd)) = pair;
        }
    }
}

template <class S, class Word>
NF4LORA_DEVICE void store_y(const GroupFwdParams &p, const Tile &tile, const char *shared) {
    constexpr int kElements = sizeof(Word) / 2, kWords = S::kTileRows / kElements;
    const int64_t left = p.member[tile.member].w.rows - tile.row0;
    uint16_t *const y = static_cast<uint16_t *>(p.y) + tile.token0 * p.N + tile.column0 + tile.row0;
    const int row = threadIdx.x % kWords * kElements;
    if (row >= left)
        return;
    for (int token = threadIdx.x / kWords; token < S::kTokens && token < p.M - tile.token0; token += kThreads / kWords)
        *reinterpret_cast<Word *>(y + token * p.N + row) =
            *reinterpret_cast<const Word *>(shared + y_at<S>(token, row));
}

// ---- the kernel: blockIdx.x a tile, blockIdx.y a part of K

// The block's part of its tile: of the sums x W^T + scaling * xa B^T, whose second term belongs to the first part.
template <class S, class T>
NF4LORA_DEVICE void add_tile(float (&sum)[S::kFragments][S::kColumns][4], const GroupFwdParams &p, const Tile &tile,
                             char *shared) {
    const Member &member = p.member[tile.member];
    const int64_t all_steps = (p.K + kStep - 1) / kStep, first = all_steps * blockIdx.y / gridDim.y;
    const int steps = static_cast<int>(all_steps * (blockIdx.y + 1) / gridDim.y - first);
    const int64_t column0 = first * kStep, end = column0 + steps * kStep;
    const int left = static_cast<int>((end < p.K ? end : p.K) - column0) - static_cast<int>(threadIdx.x) % 4 * kRun;

    Tokens<S> tokens(p, tile.token0, column0, shared);
    tokens.fetch(0, left);
    if (member.r > 0 && blockIdx.y == 0)
        add_adapter<S, T>(sum, p, tile, shared);
    float *const map = reinterpret_cast<float *>(shared + kMapAt);
    fill_table(shared, member.w.quant_type);
    fill_map(map);
    __syncthreads();
    Rows<S> rows(member.w, tile.row0, column0, left, map);
    add_weight<S, T>(sum, rows, tokens, shared, steps, left);
}

template <class S, class T>
NF4LORA_DEVICE void finish_tile(float (&sum)[S::kFragments][S::kColumns][4], const GroupFwdParams &p, const Tile &tile,
                                char *shared) {
    stage_y<S, T>(sum, p, tile, shared);
    __syncthreads();
    const int64_t columns = p.N | tile.column0 | p.member[tile.member].w.rows;
    if (columns % 8 == 0 && reinterpret_cast<uintptr_t>(p.y) % kPiece == 0)
        store_y<S, uint4>(p, tile, shared);
    else
        store_y<S, uint16_t>(p, tile, shared);
}

template <class S, class T>
__global__ void __launch_bounds__(kThreads, S::kResident)
    linear_tiles(const __grid_constant__ GroupFwdParams p, Grid grid) {
    NF4LORA_SHARED(char, shared);
    float sum[S::kFragments][S::kColumns][4] = {};
    add_tile<S, T>(sum, p, tile_of<S>(p, grid, blockIdx.x), shared);
    if (gridDim.y > 1) {
        constexpr int64_t kPart = Parts<S>::kFloats / 4;
        float4 *const of_tile = static_cast<float4 *>(p.workspace) + int64_t{blockIdx.x} * gridDim.y * kPart;
        Parts<S>::store(sum, of_tile + blockIdx.y * kPart);
        if (!comes_last(p.counters + blockIdx.x, gridDim.y, reinterpret_cast<uint32_t *>(shared + kWordAt)))
            return;
        for (uint32_t part = 0; part < gridDim.y; ++part)
            Parts<S>::add(sum, of_tile + part * kPart, part == 0);
    }
    finish_tile<S, T>(sum, p, tile_of<S>(p, grid, pinned(blockIdx.x)), shared);  // found again: nine registers
}

// ---- host

struct Plan {
    int tokens, rows, blocks;
    int64_t token_tiles, row_tiles, split;

    int64_t tiles() const { return token_tiles * row_tiles; }
    int64_t part_bytes() const { return split > 1 ? tiles() * split * tokens * rows * 4 : 0; }
};

Plan plan_of(const GroupFwdParams &p) {
    Plan plan{p.config.tokens > 64 ? 128 : 64, p.config.rows > 128 ? 256 : 128, 1, 0, 0, 1};
    for (int64_t i = 0; i < p.count; ++i)
        if (p.member[i].w.blocksize < kRun)
            plan.blocks = 2, plan.tokens = 64;
    if (plan.tokens == 128 || plan.blocks == 2)
        plan.rows = 128;  // more sums than registers; more scales
    plan.token_tiles = ceil_div(p.M, plan.tokens);
    for (int64_t i = 0; i < p.count; ++i)
        plan.row_tiles += ceil_div(p.member[i].w.rows, plan.rows);
    const int64_t steps = ceil_div(p.K, kStep), most = steps < kMaxSplit ? steps : kMaxSplit;
    if (plan.tiles() <= kCounters)
        plan.split = p.config.split < 1 ? 1 : p.config.split < most ? p.config.split : most;
    return plan;
}

template <class S, class T>
const char *launch(const GroupFwdParams &p, const Plan &plan, void *stream) {
    const dim3 blocks(static_cast<unsigned>(plan.tiles()), static_cast<unsigned>(plan.split));
    const Grid grid{static_cast<uint32_t>(plan.token_tiles), static_cast<uint32_t>(plan.row_tiles)};
    return NF4LORA_LAUNCH((linear_tiles<S, T>), blocks, kThreads, kSharedBytes, stream, p, grid);
}

template <class T>
const char *launch_shape(const GroupFwdParams &p, const Plan &plan, void *stream) {
    if (plan.tokens == 128)
        return launch<Shape<128, 1>, T>(p, plan, stream);
    if (plan.blocks == 2)
        return launch<Shape<64, 1, 2>, T>(p, plan, stream);
    return plan.rows == 128 ? launch<Shape<64, 1>, T>(p, plan, stream) : launch<Shape<64, 2>, T>(p, plan, stream);
}

}  // namespace

const char *linear_fwd_mma(const GroupFwdParams &p, void *stream) {
    const Plan plan = plan_of(p);
    constexpr int64_t kMaxX = int64_t{1} << 35, kMaxWeight = int64_t{1} << 37;  // 2^32 pieces
    bool fits = p.K <= INT32_MAX && p.M * p.K <= kMaxX && plan.tiles() * kBand <= INT32_MAX;
    for (int64_t i = 0; i < p.count; ++i)
        fits &= p.member[i].w.rows * p.K <= kMaxWeight;
    if (p.K % kRun != 0 || !fits)
        return "the mma path takes K a multiple of 64, up to 2^35 elements of x and 2^37 of a weight, 2^27 tiles";
    return p.x_dtype == kBFloat16 ? launch_shape<__nv_bfloat16>(p, plan, stream)
                                  : launch_shape<__half>(p, plan, stream);
}

int64_t linear_fwd_mma_workspace(const GroupFwdParams &p) { return plan_of(p).part_bytes(); }

}  // namespace nf4lora
