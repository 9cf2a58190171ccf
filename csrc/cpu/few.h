// The whole forward for few tokens by the planes of planes.h, in two passes: x in plane order and xa, then y.
// Memory of a call: x in plane order for block_m tokens, which are made fewer where it is more than kPlaneBytes, the
// tokens' xa [block_m, r] in fp32, and for each thread
//   4 * (block_m * n * 17 + 65 * n + 3 * kDeep + K / 16 + 4 * r) bytes with n = block_n, r rounded up to vectors, of which
//   3 * kDeep only where rows are decoded to a scratch;
// in tiles, of which each is for 32 rows of W and 16 or 32 tokens, 4 * (32 * 528 + 98 * 32 + 32 * 32 + K / 16 + 4 * r).
#pragma once
#include <unistd.h>

#include "gemm.h"
#include "planes.h"

namespace nf4lora {
namespace NF4LORA_ISA {

constexpr int64_t kPlaneBytes = 2 << 20;
constexpr int64_t kPiece = 512;  // of K, in the sums of xa
constexpr int64_t kDeep = 1024;  // of K, decoded at a time to a scratch
constexpr int64_t kAbsmaxSpan = kGroup * kAbsmaxRun;
constexpr int kSide = 4;         // tokens and rows of lora_A that share their loads

// xa of T tokens and up to kSide rows of lora_A, rounded; `scaled` [M, stride] is scaling times that.
template <int T>
static void down_tile(const LinearFwdParams &p, const DropoutMask &mask, int64_t m0, int64_t i0, float *scaled, int64_t stride) {
    const int64_t K = p.w.cols, rows = min_of(kSide, p.r - i0);
    const Matrix x = dropped(p.x, p.x_dtype, K, mask), a = dense(p.lora_A, p.A_dtype, K);
    float xs[T][kPiece], as[kSide][kPiece];
    Vec total[T][kSide] = {};
    for (int64_t k0 = 0; k0 < K; k0 += kPiece) {
        const int64_t depth = min_of(kPiece, K - k0);
        for (int t = 0; t < T; ++t)
            load_row(x, m0 + t, k0, depth, xs[t]);
        for (int i = 0; i < kSide; ++i)
            load_row(a, i0 + min_of(i, rows - 1), k0, depth, as[i]);
        Vec acc[T][kSide] = {};
        for (int64_t k = 0; k < depth; k += kWidth)
            NF4LORA_UNROLL
            for (int t = 0; t < T; ++t)
                NF4LORA_UNROLL
                for (int i = 0; i < kSide; ++i)
                    acc[t][i] = fma(load(xs[t] + k), load(as[i] + k), acc[t][i]);
        for (int t = 0; t < T; ++t)
            for (int i = 0; i < kSide; ++i)
                total[t][i] += acc[t][i];
    }
    for (int t = 0; t < T; ++t)
        for (int i = 0; i < rows; ++i) {
            const int64_t at = (m0 + t) * p.ld_xa + i0 + i;
            const float sum = sum_lanes(total[t][i]);
            store_elements(p.xa, p.x_dtype, at, 1, &sum);
            scaled[t * stride + i0 + i] = p.scaling * load_element(p.xa, p.x_dtype, at);
        }
}

// Calls body(std::integral_constant<int, T>) for T = tokens, at most kMost.
template <int kMost, class Body>
NF4LORA_INLINE void with_tokens(int64_t tokens, const Body &body) {
    if constexpr (kMost > 1)
        if (tokens < kMost)
            return with_tokens<kMost - 1>(tokens, body);
    body(std::integral_constant<int, kMost>{});
}

// Tokens are done in groups of as many as this, the last of as many as remain.
template <class P>
NF4LORA_INLINE int64_t group_size(int64_t tokens) {
    return tokens <= P::kFewTokens ? tokens : ceil_div(tokens, ceil_div(tokens, P::kTokens));
}

constexpr int kMostRows = 4;  // of W in a tile

// What the parts of the second pass read, and what a thread writes.
template <class P>
struct Few {
    const LinearFwdParams &p;
    const typename P::Element *x;  // in plane order, a group of tokens after the other
    int64_t x_stride;              // elements of a token in it
    const float *xa;               // [tokens, rank]: scaling * xa
    int64_t rank;                  // r rounded up to a vector
    int64_t tokens, group;         // in a group
    int64_t stride;                // of a token in the tile: block_n
};

struct Own {
    float *planes;  // P::Element [kDeep / kWords, kPlanes, kRows, lanes]
    float *totals;  // [block_n / kRows, tokens, kRows, kWidth]
    float *b;       // [kMostRows, rank]
    float *absmax;  // [kMostRows, K / kAbsmaxRun], or [block_n, kGroup]
    float *bias;    // [block_n]
    float *tile;    // [tokens, block_n]
};

// The first `rows` rows of R from `row` on, whose absmax is at own.absmax, `runs` to a row.
template <class P, int R>
NF4LORA_INLINE Coded<P, R> take_rows(const Few<P> &few, int64_t row, int64_t rows, const float *absmax, int64_t runs) {
    Coded<P, R> coded{P::table(codebook(few.p.w.quant_type)), R * few.p.w.cols / 2, {}, {}};
    for (int i = 0; i < R; ++i) {
        const int64_t at = min_of(i, rows - 1);
        coded.packed[i] = few.p.w.packed + (row + at) * (few.p.w.cols / 2);
        coded.absmax[i] = absmax + at * runs;
    }
    return coded;
}

// Of rows [n0, n0 + cols) the span that begins at k0, kGroup apart.
static void take_absmax(const Weight &w, int64_t n0, int64_t cols, int64_t k0, float *absmax) {
    for (int64_t n = 0; n < cols; ++n)
        load_absmax(w, ((n0 + n) * w.cols + k0) / kAbsmaxRun, min_of(kAbsmaxSpan, w.cols - k0) / kAbsmaxRun, absmax + n * kGroup);
}

template <class P>
NF4LORA_INLINE void take_b(const Few<P> &few, int64_t row, int64_t rows, float *b) {
    if (few.rank > 0)
        for (int64_t i = 0; i < rows; ++i)
            load_elements(few.p.lora_B, few.p.B_dtype, (row + i) * few.p.r, few.p.r, b + i * few.rank);
}

// totals [T, R, kWidth] = scaling * xa lora_B^T, lane by lane
template <int T, int R>
NF4LORA_INLINE void up_tile(const float *xa, const float *b, int64_t rank, float *totals) {
    NF4LORA_UNROLL
    for (int t = 0; t < T; ++t)
        NF4LORA_UNROLL
        for (int i = 0; i < R; ++i) {
            Vec sum = {};
            for (int64_t k = 0; k < rank; k += kWidth)
                sum = fma(load(xa + t * rank + k), load(b + i * rank + k), sum);
            store(totals + (t * R + i) * kWidth, sum);
        }
}

template <int T, int R>
NF4LORA_INLINE void put_sums(const float *totals, int64_t rows, float *tile, int64_t stride) {
    float sums[T * R + kWidth - 1];
    sum_all<T * R>(totals, sums);
    for (int t = 0; t < T; ++t)
        if (rows == R)  // a copy whose size is known
            memcpy(tile + t * stride, sums + t * R, R * sizeof *sums);
        else
            memcpy(tile + t * stride, sums + t * R, rows * sizeof *sums);
}

// The tile of T tokens, which are all, and rows [n0, n0 + cols) of W.
template <class P, int T>
static void fwd_coded(const Few<P> &few, int64_t n0, int64_t cols, const Own &own) {
    constexpr int R = P::kFewRows;
    const int64_t K = few.p.w.cols, runs = K / kAbsmaxRun, groups = K / kWords<P>, rest = K % kWords<P> / 2;
    for (int64_t n = 0; n < cols; n += R) {
        const int64_t rows = min_of(R, cols - n);
        load_absmax(few.p.w, (n0 + n) * runs, rows * runs, own.absmax);
        take_b(few, n0 + n, rows, own.b);
        const Coded<P, R> coded = take_rows<P, R>(few, n0 + n, rows, own.absmax, runs);
        float totals[T * R * kWidth];
        up_tile<T, R>(few.xa, own.b, few.rank, totals);
        add_groups<P, T, R>(coded, groups, few.x, totals);
        if (rest) {
            Rest copy[R];
            add_groups<P, T, R>(coded.last(groups, copy), 1, few.x + groups * T * kWords<P>, totals);
        }
        put_sums<T, R>(totals, rows, own.tile + n, few.stride);
    }
}

// Rows [n0 + n, n0 + n + rows) from k0 on, whose absmax take_absmax took.
template <class P, int R>
NF4LORA_INLINE Coded<P, R> take_part(const Few<P> &few, int64_t n0, int64_t n, int64_t rows, int64_t k0, const Own &own) {
    Coded<P, R> coded = take_rows<P, R>(few, n0 + n, rows, own.absmax + n * kGroup, kGroup);
    for (int i = 0; i < R; ++i) {
        coded.packed[i] += k0 / 2;
        coded.absmax[i] += k0 % kAbsmaxSpan / kAbsmaxRun;
    }
    return coded;
}

static int64_t find_l1_bytes() {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
    return sysconf(_SC_LEVEL1_DCACHE_SIZE);  // 0 or -1 where it is not known
#else
    return 0;
#endif
}

// The same for more tokens, which all pass a part of K before the next one, whose codes come into the L2 cache meanwhile.
template <class P>
static void fwd_passes(const Few<P> &few, int64_t n0, int64_t cols, const Own &own) {
    constexpr int R = P::kRows;
    constexpr auto kEach = std::make_integer_sequence<int, P::kPlanes>{};
    static const int64_t l1_bytes = find_l1_bytes();
    constexpr int64_t kPassBytes = 2 * kDeep * P::kTokens * sizeof(typename P::Element);
    const int64_t reach = kPassBytes <= l1_bytes / 3 * 2 ? 2 * kDeep : kDeep;  // of x in the L1 cache, beside all that passes
    const int64_t N = few.p.w.rows, K = few.p.w.cols, passes = ceil_div(few.tokens, few.group);
    for (int64_t k0 = 0; k0 < K; k0 += reach) {
        const int64_t depth = min_of(reach, K - k0), groups = depth / kWords<P>, rest = depth % kWords<P> / 2;
        const bool last = k0 + depth == K;
        if (k0 % kAbsmaxSpan == 0)
            take_absmax(few.p.w, n0, cols, k0, own.absmax);
        for (int64_t pass = 0; pass < passes; ++pass) {
            const int64_t m = pass * few.group;
            with_tokens<P::kTokens>(min_of(few.group, few.tokens - m), [&](auto tokens) {
                constexpr int T = tokens;
                const auto *const x = few.x + m * few.x_stride + k0 * T;
                for (int64_t n = 0; n < cols; n += R) {
                    const int64_t rows = min_of(R, cols - n);
                    const Coded<P, R> coded = take_part<P, R>(few, n0, n, rows, k0, own);
                    const uint8_t *next[R];  // each pass has its share of the rows
                    for (int i = 0; i < R; ++i) {
                        const int64_t at = i * passes + pass, row = n0 + n + (at < R ? at : pass % R) + (last ? cols : 0);
                        next[i] = few.p.w.packed + (min_of(row, N - 1) * K + (last ? 0 : k0 + depth)) / 2;
                    }
                    float *const totals = own.totals + (n * few.tokens + m * R) * kWidth;
                    if (k0 == 0) {
                        take_b(few, n0 + n, rows, own.b);
                        up_tile<T, R>(few.xa + m * few.rank, own.b, few.rank, totals);
                    }
                    if (groups)
                        add_planes<P, T, R>(coded, groups, next, x, totals, kEach);
                    if (rest) {
                        Rest copy[R];
                        add_planes<P, T, R>(coded.last(groups, copy), 1, next, x + groups * T * kWords<P>, totals, kEach);
                    }
                    if (last)
                        put_sums<T, R>(totals, rows, own.tile + m * few.stride + n, few.stride);
                }
            });
        }
    }
}

// The same with rows that are decoded once for all tokens.
template <class P>
static void fwd_decoded(const Few<P> &few, int64_t n0, int64_t cols, const Own &own) {
    constexpr int R = P::kRows;
    constexpr auto kEach = std::make_integer_sequence<int, P::kPlanes>{};
    const int64_t K = few.p.w.cols;
    auto *const planes = reinterpret_cast<typename P::Element *>(own.planes);
    for (int64_t k0 = 0; k0 < K; k0 += kDeep) {
        const int64_t depth = min_of(kDeep, K - k0), groups = depth / kWords<P>, rest = depth % kWords<P> / 2;
        if (k0 % kAbsmaxSpan == 0)
            take_absmax(few.p.w, n0, cols, k0, own.absmax);
        for (int64_t n = 0; n < cols; n += R) {
            const int64_t rows = min_of(R, cols - n);
            const Coded<P, R> coded = take_part<P, R>(few, n0, n, rows, k0, own);
            decode_groups(coded, groups, planes, kEach);
            auto *const last = planes + groups * R * kWords<P>;
            if (rest) {
                Rest copy[R];
                decode_groups(coded.last(groups, copy), 1, last, kEach);
            }
            if (k0 == 0)
                take_b(few, n0 + n, rows, own.b);
            for (int64_t m = 0; m < few.tokens; m += few.group)
                with_tokens<P::kTokens>(min_of(few.group, few.tokens - m), [&](auto tokens) {
                    constexpr int T = tokens;
                    const auto *const x = few.x + m * few.x_stride + k0 * T;
                    float *const totals = own.totals + (n * few.tokens + m * R) * kWidth;
                    if (k0 == 0)
                        up_tile<T, R>(few.xa + m * few.rank, own.b, few.rank, totals);
                    add_groups<P, T, R>(Decoded<P, R>{planes}, groups, x, totals);
                    if (rest)
                        add_groups<P, T, R>(Decoded<P, R>{last}, 1, x + groups * T * kWords<P>, totals);
                    if (k0 + depth == K)
                        put_sums<T, R>(totals, rows, own.tile + m * few.stride + n, few.stride);
                });
        }
    }
}

#if defined(__AMX_BF16__)
constexpr int64_t kTileN = 2 * kTileRows;  // rows of W that tiles take at once
constexpr int64_t kTileDeep = kDeep / 2 + kPad;
constexpr int64_t kMostTileRank = 512;  // of the adapter, so that xa fits where W's planes will be

// x [first, first + cols) of a token, in plane order, as column `token` of the pairs [., width] that tiles multiply by.
static void put_column(const void *x, int32_t dtype, int64_t first, int64_t cols, int64_t width, int64_t token, void *to) {
    auto *const panel = static_cast<uint16_t *>(to);
    constexpr int64_t kGroupWords = kWords<HalfPlanes>;
    for (int64_t k = 0; k < cols; k += kGroupWords) {
        uint16_t planes[kGroupWords];
        put_planes<HalfPlanes>(x, dtype, first + k, min_of(kGroupWords, cols - k), 1, planes);
        for (int64_t i = 0; i < kGroupWords; i += Pairs::kDepth)
            memcpy(panel + (k + i) * width + Pairs::kDepth * token, planes + i, Pairs::kDepth * sizeof *planes);
    }
}

// The same in tiles: rows of C are W's, of which there are at most kTileN, columns are tokens.
static void fwd_tiles(const Few<HalfPlanes> &few, int64_t n0, int64_t cols, const Own &own) {
    constexpr auto kEach = std::make_integer_sequence<int, HalfPlanes::kPlanes>{};
    const int64_t K = few.p.w.cols, width = round_up(few.tokens, kTileRows);
    const float *const panel = reinterpret_cast<const float *>(few.x);
    float *const c = own.totals, *const xa = own.planes;
    for (int64_t i = 0; i < few.rank; ++i)
        for (int64_t t = 0; t < width; ++t)
            xa[i * width + t] = t < few.tokens ? few.xa[t * few.rank + i] : 0;
    for (int64_t n = 0; n < kTileN; ++n) {
        take_b(few, n0 + min_of(n, cols - 1), 1, own.b);
        for (int64_t t = 0; t < width; t += kWidth) {
            Vec sum = {};
            for (int64_t i = 0; i < few.rank; ++i)
                sum = fma(broadcast(own.b[i]), load(xa + i * width + t), sum);
            store(c + n * width + t, sum);
        }
    }
    configure_tiles();
    for (int64_t k0 = 0; k0 < K; k0 += kDeep) {
        const int64_t depth = min_of(kDeep, K - k0), groups = depth / kWords<HalfPlanes>, rest = depth % kWords<HalfPlanes> / 2;
        if (k0 % kAbsmaxSpan == 0)
            take_absmax(few.p.w, n0, cols, k0, own.absmax);
        for (int64_t n = 0; n < kTileN; ++n) {  // those past the last are the last
            const int64_t at = min_of(n, cols - 1);
            const Coded<HalfPlanes, 1> coded = take_part<HalfPlanes, 1>(few, n0, at, 1, k0, own);
            auto *const row = reinterpret_cast<uint16_t *>(own.planes + n * kTileDeep);
            decode_groups(coded, groups, row, kEach);
            if (rest) {
                Rest copy[1];
                decode_groups(coded.last(groups, copy), 1, row + groups * kWords<HalfPlanes>, kEach);
            }
        }
        const int64_t steps = round_up(depth, kWords<HalfPlanes>) / Pairs::kDepth;
        const float *const from = panel + k0 / Pairs::kDepth * width;
        if (width == kTileRows)
            tile_kernel<2, 1>(own.planes, kTileDeep, from, width, steps, c, width);
        else
            tile_kernel<2, 2>(own.planes, kTileDeep, from, width, steps, c, width);
    }
    _tile_release();
    for (int64_t t = 0; t < few.tokens; ++t)
        for (int64_t n = 0; n < cols; ++n)
            own.tile[t * few.stride + n] = c[n * width + t];
}

// Whether a call is for tiles, by the tokens it does at a time.
template <class P>
NF4LORA_INLINE bool takes_tiles(int64_t tokens, int64_t rank) {
    return std::is_same_v<P, HalfPlanes> && tokens > P::kFewTokens && rank <= kMostTileRank;
}

#else
constexpr int64_t kTileN = 2, kTileDeep = 1;

template <class P>
NF4LORA_INLINE bool takes_tiles(int64_t, int64_t) { return false; }

static inline void put_column(const void *, int32_t, int64_t, int64_t, int64_t, int64_t, void *) {}
#endif

template <class P>
NF4LORA_INLINE void fwd_tiles(const Few<P> &, int64_t, int64_t, const Own &) {}

template <class P>
static const char *few_tokens(const LinearFwdParams &p) {
    const int64_t N = p.w.rows, K = p.w.cols, r = p.r, rank = round_up(r, kWidth);
    const int64_t x_stride = round_up(K, kWords<P>), x_bytes = x_stride * sizeof(typename P::Element);
    int64_t block_m = min_of(min_of(p.config.block_m, p.M), max_of(kPlaneBytes / x_bytes, 1));
    int64_t block_n = min_of(p.config.block_n, column_share(N, kMostRows * P::kRows, p.config.threads)), width = block_m;
    const bool tiles = takes_tiles<P>(block_m, rank);
    if (tiles) {
        block_m = min_of(min_of(p.M, kTileN), max_of(kPlaneBytes / x_bytes, 1)), width = round_up(block_m, kTileN / 2);
        block_n = min_of(kTileN, N);
    }
    const int64_t parts = ceil_div(N, block_n);
    const int64_t absmax_floats = max_of(round_up(kMostRows * (K / kAbsmaxRun), kGroup), block_n * kGroup) + kPad;
    const int64_t totals_floats = tiles ? kTileN * width : block_m * round_up(block_n, P::kRows) * kWidth;
    const int64_t planes_floats =
        tiles         ? kTileN * kTileDeep
        : P::kScratch ? round_up(P::kRows * min_of(kDeep, x_stride) * sizeof(typename P::Element) / sizeof(float), kPad)
                      : 0;
    const int64_t own_floats =
        round_up(absmax_floats + kMostRows * rank + (block_m + 1) * block_n + totals_floats + planes_floats, kPad);
    const int64_t x_floats = round_up(width * x_bytes / sizeof(float), kPad), xa_floats = round_up(block_m * rank, kPad);
    const int team = static_cast<int>(max_of(min_of(p.config.threads, max_of(parts, p.M)), 1));
    const int64_t floats = x_floats + xa_floats + team * own_floats;
    float *const memory = static_cast<float *>(aligned_alloc(64, floats * sizeof(float)));
    if (!memory)
        return kOutOfMemory;
    auto *const x = reinterpret_cast<typename P::Element *>(memory);
    float *const xa = memory + x_floats, *const owns = xa + xa_floats;
    memset(xa, 0, xa_floats * sizeof(float));
    const DropoutMask mask = dropout_mask(p.dropout);
    for (int64_t m0 = 0; m0 < p.M; m0 += block_m) {
        const int64_t tokens = min_of(block_m, p.M - m0), group = group_size<P>(tokens);
        const int64_t down_m = ceil_div(tokens, kSide), down_parts = down_m * ceil_div(r, kSide);
        for_parts(team, tokens + down_parts, [&](int64_t part, int) {
            if (part < tokens) {
                if (tiles)
                    return put_column(p.x, p.x_dtype, (m0 + part) * K, K, round_up(tokens, kTileN / 2), part, x);
                const int64_t first = part / group * group;
                put_planes<P>(p.x, p.x_dtype, (m0 + part) * K, K, min_of(group, tokens - first),
                              x + first * x_stride + (part - first) * kPlaneLanes<P>);
                return;
            }
            const int64_t first = (part - tokens) % down_m * kSide, i0 = (part - tokens) / down_m * kSide;
            with_tokens<kSide>(tokens - first, [&](auto T) {
                down_tile<T>(p, mask, m0 + first, i0, xa + first * rank, rank);
            });
        });
        const Few<P> few = {p, x, x_stride, xa, rank, tokens, group, block_n};
        for_parts(team, parts, [&](int64_t part, int thread) {
            Own own;
            own.planes = owns + thread * own_floats;
            own.totals = own.planes + planes_floats;
            own.b = own.totals + totals_floats;
            own.absmax = own.b + kMostRows * rank;
            own.bias = own.absmax + absmax_floats;
            own.tile = own.bias + block_n;
            memset(own.b, 0, kMostRows * rank * sizeof(float));
            const int64_t n0 = part * block_n, cols = min_of(block_n, N - n0);
            if (tiles)
                fwd_tiles(few, n0, cols, own);
            else if (tokens <= P::kFewTokens)
                with_tokens<P::kFewTokens>(tokens, [&](auto T) { fwd_coded<P, T>(few, n0, cols, own); });
            else if constexpr (P::kScratch)
                fwd_decoded(few, n0, cols, own);
            else
                fwd_passes(few, n0, cols, own);
            if (p.bias)
                load_elements(p.bias, p.bias_dtype, n0, cols, own.bias);
            for (int64_t t = 0; t < tokens; ++t) {
                float *const line = own.tile + t * block_n;
                for (int64_t n = 0; n < (p.bias ? cols : 0); ++n)
                    line[n] += own.bias[n];
                store_elements(p.y, p.x_dtype, (m0 + t) * p.ld_y + n0, cols, line);
            }
        });
    }
    free(memory);
    return nullptr;
}

// Whether rows start at whole groups of codes, and the run of an absmax is long enough.
NF4LORA_INLINE bool few_tokens_apply(const LinearFwdParams &p) {
    return p.M > 0 && p.w.rows > 0 && p.w.cols > 0 && p.w.cols % kAbsmaxRun == 0 && p.w.blocksize % kAbsmaxRun == 0;
}

}  // namespace NF4LORA_ISA
}  // namespace nf4lora
