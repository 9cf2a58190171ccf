// y_i = x W_i^T + bias_i + scaling_i * xa_i B_i^T in tiles, on the tensor cores of sm_80 and newer
// Operands:      params.h; x, xa and y of one type T, bf16 or fp16; xa as lora_fwd left it
// Rounding:      a weight is T(codebook * absmax), the product in fp32: the bits dequantize gives. B is rounded to T.
//                Sums in fp32: xa B^T, times scaling, then x W^T on top, then the bias; y is rounded once
// Preconditions: K % 64 == 0 and at most 2^23; x and packed 16-byte aligned; blocksize a power of two from 32 on
// Memory:        codes and absmax once for each tile of tokens, x once for each tile of rows (token tiles of the same
//                rows are neighbours, so that L2 serves both), y once; 65 KiB shared. A split writes and reads its
//                partial sums
// Budget:        a weight: decode 2.5 instructions, 1 MMA for 64 tokens; main loop 5.0 at 256 rows, 6.3 at 128, for 128
//                tokens 8.1 (sm_80); no spills
//
// The weight is the A operand: a warp decodes its own rows straight into fragments, each weight once; tokens are
// columns. A sum over k may run in any order that both operands share: of each 64 columns, lane c of a quad takes 16c
// to 16c + 15. These are 8 bytes of codes, of one absmax even at blocksize 32, and two 16-byte pieces of a token.
//
// Shared memory is 256 rows of 256 bytes. In the lower half of row b lie the two values that byte b decodes to, in 16
// copies: 64-bit loads serve 16 lanes at a time, so no two meet in a bank, and one byte_perm makes the offset. In the
// upper halves, 128 bytes each, lie the stages of x. Before the loop B's rows take the place of the values, and xa's
// that of the last stage; after it the tile of y takes that of everything.
#include "../tile.cuh"
#include "paths.h"

namespace nf4lora {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kLanes;
constexpr int kStep = 64;    // columns of W and x that a step of the main loop takes
constexpr int kRow = 256;    // bytes of a row of shared memory
constexpr int kHalf = 128;
constexpr int kRows = 256;
constexpr int kPiece = 16;   // bytes of one copy, 8 elements
constexpr int kMaxSplit = 64;
constexpr int64_t kMaxK = int64_t{1} << 23;  // a tile spans less than 2^32 bytes of W and x
static_assert(kRow == kTableRow && kRows * kRow == kTableBytes, "what table_offset makes");
static_assert(kHalf == kStep * sizeof(uint16_t), "a half holds a step of one token");
static_assert(kThreads == kRows, "a thread fills a row of the table");

constexpr size_t kMapAt = kRows * kRow, kWordAt = kMapAt + kDynamicCodes * sizeof(float);
constexpr size_t kSharedBytes = kWordAt + sizeof(uint32_t);

template <int kTokens_, int kFragments_>
struct Shape {
    static constexpr int kTokens = kTokens_;
    static constexpr int kFragments = kFragments_;          // of 16 rows, of a warp
    static constexpr int kColumns = kTokens / 8;            // fragments of 8 tokens
    static constexpr int kWarpRows = 16 * kFragments;
    static constexpr int kTileRows = kWarps * kWarpRows;
    static constexpr int kLaneRows = 2 * kFragments;        // lane / 4 + 8 i of a warp's rows
    static constexpr int kStages = kRows / kTokens;
    static constexpr int kStageBytes = kTokens * kRow;
    static constexpr int kBlocks = kTokens * kFragments <= 64 ? 2 : 1;  // resident, where 128 registers are enough
    static_assert(kTileRows <= kRows, "B's rows in the lower halves");
    static_assert(kTileRows * kTokens * 2 <= kRows * kRow, "the tile of y");
};

// Offset of piece i of a row in its half: eight rows of one column lie in eight different groups of banks.
NF4LORA_DEVICE constexpr int piece_at(int row, int i) { return (i ^ (row & 7)) * kPiece; }

// Where the same piece lies in the next stage, and after the last in the first.
template <class S>
NF4LORA_DEVICE constexpr uint32_t next_stage(uint32_t at) {
    return (at + S::kStageBytes) % (kRows * kRow);
}

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
    char *const last_stage = shared + (S::kStages - 1) * S::kStageBytes + kHalf;
    const int lane = threadIdx.x % kLanes, g = lane / 4, c = lane % 4;
    const char *const my_rows = shared + (threadIdx.x / kLanes * S::kWarpRows + g) * kRow;
    const char *const my_tokens = last_stage + g * kRow;
    const int64_t rows = member.w.rows - tile.row0, first = tile.row0 * member.r;
#pragma unroll 1
    for (int64_t rank = 0; rank < member.r; rank += kStep) {
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
        stage_columns<T, S::kTokens>(last_stage, static_cast<const T *>(p.xa) + tile.token0 * p.r + tile.rank0 + rank,
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

constexpr int kStepBytes = kStep / 2;  // of codes
constexpr int kLaneBytes = kStepBytes / 4;

// Row i of a lane is lane / 4 + 8 i of its warp. Where it begins, in bytes of codes from the tile's first row; rows
// past the member's last are its last.
template <class S>
NF4LORA_DEVICE uint32_t row_begin(int i, int64_t rows, int64_t K) {
    const int row = threadIdx.x / kLanes * S::kWarpRows + threadIdx.x % kLanes / 4 + 8 * i;
    return static_cast<uint32_t>(row < rows ? row : rows - 1) * static_cast<uint32_t>(K / 2);
}

// The absmax of what a lane decodes. A step is one run of columns under one absmax, at blocksize 32 it is two. The
// lanes of a quad load and decode one each, of their rows and of one or two runs, and hand them round; loads are a turn
// ahead.
template <class S>
class Absmax {
  public:
    // of w's rows from row0 on, from `begin` bytes of codes into them
    NF4LORA_DEVICE Absmax(const Weight &w, int64_t row0, int64_t begin, const float *map)
        : map_(map), halves_(kRuns > 1 && w.blocksize < kStep) {
        shift_ = 30 - __clz(static_cast<int>(w.blocksize));  // here, as a host pass of nvcc parses initializers
        const int64_t first = row0 * (w.cols / 2) + begin;
        const int64_t nested = (first >> shift_) / Scales::kNestedBlocksize, block = nested * Scales::kNestedBlocksize;
        const uint32_t row = static_cast<uint32_t>(first - (block << shift_)) +
                             row_begin<S>(threadIdx.x % S::kLaneRows, w.rows - row0, w.cols);
        at_ = row + threadIdx.x % 4 / S::kLaneRows * run_bytes();
        last_ = row + static_cast<uint32_t>(w.cols / 2 - begin) - run_bytes();
        nested_ = w.nested_absmax ? w.nested_absmax + nested : nullptr;
        absmax_ = static_cast<const char *>(w.absmax) + block * (nested_ ? sizeof(uint8_t) : sizeof(float));
        offset_ = nested_ ? *w.offset : 0.0f;
        code_ = 0;
        fetch();
    }

    // Those of a step; every step is asked for, from 0 on.
    NF4LORA_DEVICE void of_step(float (&scale)[S::kLaneRows], int step) {
        const int first_run = (halves() ? 2 * step : step) % kRuns;
        if (first_run == 0) {
            decoded_ = nested_ ? __fadd_rn(__fmul_rn(map_[code_], factor_), offset_) : factor_;
            fetch();
        }
        const int run = first_run + (halves() ? threadIdx.x % 4 / 2 : 0);
#pragma unroll
        for (int i = 0; i < S::kLaneRows; ++i)
            scale[i] = __shfl_sync(~0u, decoded_, run * S::kLaneRows + i, 4);
    }

  private:
    static constexpr int kRuns = 4 / S::kLaneRows;  // of a turn

    NF4LORA_DEVICE bool halves() const { return kRuns > 1 && halves_; }
    NF4LORA_DEVICE uint32_t run_bytes() const { return halves() ? kStepBytes / 2 : kStepBytes; }

    NF4LORA_DEVICE void fetch() {
        const uint32_t block = (at_ < last_ ? at_ : last_) >> shift_;
        if (nested_) {
            code_ = static_cast<const uint8_t *>(absmax_)[block];
            factor_ = nested_[block / uint32_t{Scales::kNestedBlocksize}];
        } else {
            factor_ = static_cast<const float *>(absmax_)[block];
        }
        at_ += kRuns * run_bytes();
    }

    const void *absmax_;  // of the first block of the nested block in which the tile's first block lies
    const float *nested_, *map_;
    int shift_;           // from a byte of codes to its block
    bool halves_;         // two runs a step, else one
    uint32_t at_, last_;  // byte of codes from there on: of the lane's next run, of its row's last one
    float offset_;
    float factor_;        // the absmax, or what its code's value is multiplied by
    uint32_t code_;
    float decoded_;
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

// The fragments of half a step from a word of codes of each row.
template <class S, class T>
NF4LORA_DEVICE void decode(uint32_t (&a)[S::kFragments][2][4], const char *shared, const uint32_t (&word)[S::kLaneRows],
                           const float (&scale)[S::kLaneRows]) {
    const uint32_t column = threadIdx.x % 16 * sizeof(float2);
#pragma unroll
    for (int i = 0; i < S::kLaneRows; ++i)
#pragma unroll
        for (int byte = 0; byte < 4; ++byte) {
            const float2 v = lookup_values(shared, word[i], column, byte_selector(byte));
            const float even = __fmul_rn(v.x, scale[i]), odd = __fmul_rn(v.y, scale[i]);
            a[i / 2][byte / 2][i % 2 + byte % 2 * 2] = round_pair<T>(even, odd);
        }
}

// Steps [begin, begin + steps) of x W^T. On entry the stages of x but the last are on their way; `fetch_x` sends for
// one.
template <class S, class T, class FetchX>
NF4LORA_DEVICE void add_weight(float (&sum)[S::kFragments][S::kColumns][4], const Weight &w, int64_t row0,
                               const char *shared, int64_t begin, int steps, FetchX fetch_x) {
    const int lane = threadIdx.x % kLanes, g = lane / 4, c = lane % 4;
    const uint8_t *codes_at = w.packed + row0 * (w.cols / 2) + begin * kStepBytes;
    uint32_t row_at[S::kLaneRows];
#pragma unroll
    for (int i = 0; i < S::kLaneRows; ++i)
        row_at[i] = row_begin<S>(i, w.rows - row0, w.cols) + c * kLaneBytes;
    const char *const my_tokens = shared + kHalf + g * kRow;
    Absmax<S> absmax(w, row0, begin * kStepBytes, reinterpret_cast<const float *>(shared + kMapAt));

    uint32_t low[S::kLaneRows], high[S::kLaneRows], next_low[S::kLaneRows], next_high[S::kLaneRows];
    const auto fetch_codes = [&](int step) {
#pragma unroll
        for (int i = 0; i < S::kLaneRows; ++i) {
            const uint2 codes = __ldg(reinterpret_cast<const uint2 *>(codes_at + row_at[i]));
            next_low[i] = codes.x, next_high[i] = codes.y;
        }
        codes_at += step + 1 < steps ? kStepBytes : 0;  // beyond the last step, that of the last again
    };
    const auto take_codes = [&] {
#pragma unroll
        for (int i = 0; i < S::kLaneRows; ++i)
            low[i] = next_low[i], high[i] = next_high[i];
    };

    float scale[S::kLaneRows];
    uint32_t first[S::kFragments][2][4], second[S::kFragments][2][4];  // of the halves of a step
    fetch_codes(0);
    take_codes();
    fetch_codes(1);
    absmax.of_step(scale, 0);
    decode<S, T>(first, shared, low, scale);
    for (int step = 0; step < steps; ++step) {
        cp_async_wait<S::kStages - 2>();
        __syncthreads();  // this step's x has come, and no one reads the stage that is filled next
        fetch_x(step + S::kStages - 1);
        const char *const tokens = my_tokens + step % S::kStages * S::kStageBytes;
        // Fragments are decoded while the tensor cores work on the half before; the compiler interleaves the two.
        decode<S, T>(second, shared, high, scale);
        multiply<S, T>(sum, first, tokens + piece_at(g, 2 * c));
        take_codes();
        fetch_codes(step + 2);
        absmax.of_step(scale, step + 1);
        decode<S, T>(first, shared, low, scale);
        multiply<S, T>(sum, second, tokens + piece_at(g, 2 * c + 1));
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
    const int64_t all_steps = p.K / kStep, begin = all_steps * blockIdx.y / gridDim.y;
    const int steps = static_cast<int>(all_steps * (blockIdx.y + 1) / gridDim.y - begin);

    const int token = threadIdx.x / 8, piece = threadIdx.x % 8;
    const char *const x = static_cast<const char *>(p.x) + (tile.token0 * p.K + begin * kStep) * 2;
    const uint32_t token_bytes = static_cast<uint32_t>(p.K) * 2;
    uint32_t from = token * token_bytes + piece * kPiece, to = kHalf + token * kRow + piece_at(token, piece);
    const auto fetch_x = [&](int step) {
        if (step < steps) {
#pragma unroll
            for (int i = 0; i < S::kTokens * 8 / kThreads; ++i) {
                const int ahead = i * (kThreads / 8);
                cp_async<kPiece>(shared + to + ahead * kRow, x + (from + ahead * token_bytes),
                                 tile.token0 + token + ahead < p.M);
            }
            from += kStep * 2;
            to = next_stage<S>(to);
        }
        cp_async_commit();  // empty after the last step
    };
#pragma unroll
    for (int stage = 0; stage < S::kStages - 1; ++stage)
        fetch_x(stage);

    if (member.r > 0 && blockIdx.y == 0)
        add_adapter<S, T>(sum, p, tile, shared);
    fill_table(shared, member.w.quant_type);
    fill_map(reinterpret_cast<float *>(shared + kMapAt));
    __syncthreads();
    add_weight<S, T>(sum, member.w, tile.row0, shared, begin, steps, fetch_x);
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
__global__ void __launch_bounds__(kThreads, S::kBlocks)
    linear_tiles(const __grid_constant__ GroupFwdParams p, Grid grid, float4 *parts, uint32_t *arrived) {
    NF4LORA_SHARED(char, shared);
    float sum[S::kFragments][S::kColumns][4] = {};
    add_tile<S, T>(sum, p, tile_of<S>(p, grid, blockIdx.x), shared);
    if (gridDim.y > 1) {
        constexpr int64_t kPart = Parts<S>::kFloats / 4;
        float4 *const of_tile = parts + int64_t{blockIdx.x} * gridDim.y * kPart;
        Parts<S>::store(sum, of_tile + blockIdx.y * kPart);
        if (!comes_last(arrived + blockIdx.x, gridDim.y, reinterpret_cast<uint32_t *>(shared + kWordAt)))
            return;
        for (uint32_t part = 0; part < gridDim.y; ++part)
            Parts<S>::add(sum, of_tile + part * kPart, part == 0);
    }
    finish_tile<S, T>(sum, p, tile_of<S>(p, grid, blockIdx.x), shared);  // found again: a tile is nine registers
}

// ---- host

struct Plan {
    int tokens, rows;
    int64_t token_tiles, row_tiles, split;

    int64_t tiles() const { return token_tiles * row_tiles; }
    int64_t counter_bytes() const { return split > 1 ? ceil_div(tiles() * 4, 256) * 256 : 0; }
    int64_t part_bytes() const { return split > 1 ? tiles() * split * tokens * rows * 4 : 0; }
};

Plan plan_of(const GroupFwdParams &p) {
    Plan plan{p.config.tokens > 64 ? 128 : 64, p.config.rows > 128 ? 256 : 128, 0, 0, 1};
    bool halves = false;
    for (int64_t i = 0; i < p.count; ++i)
        halves |= p.member[i].w.blocksize < kStep;
    if (plan.tokens == 128 || halves)
        plan.rows = 128;  // more sums than registers; more absmax a step than a quad has lanes for rows
    plan.token_tiles = ceil_div(p.M, plan.tokens);
    for (int64_t i = 0; i < p.count; ++i)
        plan.row_tiles += ceil_div(p.member[i].w.rows, plan.rows);
    const int64_t steps = p.K / kStep, most = steps < kMaxSplit ? steps : kMaxSplit;
    plan.split = p.config.split < 1 ? 1 : p.config.split < most ? p.config.split : most;
    return plan;
}

template <class S, class T>
const char *launch(const GroupFwdParams &p, const Plan &plan, void *stream) {
    uint32_t *const arrived = static_cast<uint32_t *>(p.workspace);
    float4 *const parts = reinterpret_cast<float4 *>(static_cast<char *>(p.workspace) + plan.counter_bytes());
    if (plan.split > 1)
        if (const char *error = zero_async(arrived, static_cast<size_t>(plan.counter_bytes()), stream))
            return error;
    const dim3 blocks(static_cast<unsigned>(plan.tiles()), static_cast<unsigned>(plan.split));
    const Grid grid{static_cast<uint32_t>(plan.token_tiles), static_cast<uint32_t>(plan.row_tiles)};
    return NF4LORA_LAUNCH((linear_tiles<S, T>), blocks, kThreads, kSharedBytes, stream, p, grid, parts, arrived);
}

template <class T>
const char *launch_shape(const GroupFwdParams &p, const Plan &plan, void *stream) {
    if (plan.tokens == 128)
        return launch<Shape<128, 1>, T>(p, plan, stream);
    return plan.rows == 128 ? launch<Shape<64, 1>, T>(p, plan, stream) : launch<Shape<64, 2>, T>(p, plan, stream);
}

}  // namespace

const char *linear_fwd_mma(const GroupFwdParams &p, void *stream) {
    const Plan plan = plan_of(p);
    if (p.K % kStep != 0 || p.K > kMaxK || plan.tiles() * kBand > INT32_MAX)
        return "the mma path takes K a multiple of 64 up to 2^23, and up to 2^27 tiles";
    return p.x_dtype == kBFloat16 ? launch_shape<__nv_bfloat16>(p, plan, stream)
                                  : launch_shape<__half>(p, plan, stream);
}

int64_t linear_fwd_mma_workspace(const GroupFwdParams &p) {
    const Plan plan = plan_of(p);
    return plan.counter_bytes() + plan.part_bytes();
}

}  // namespace nf4lora
