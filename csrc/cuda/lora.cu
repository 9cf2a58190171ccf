// xa = dropout(x) A^T;  dyb = scaling * dy B and dB = scaling * dy^T xa;  dA = dyb^T dropout(x);  dx = mask * (dyb A)
// Operands:      as params.h says, any K, N, M, ranks and alignment; 16-byte copies where x or dy allow them
// Rounding:      xa and dyb once to x's dtype, the rounded ones go on; A and B are rounded to it where they enter a
//                product; sums in fp32. The mask zeroes elements exactly, the factor 1 / (1 - p) multiplies the sum
// Memory:        x is read once while the group has at most 256 ranks; dy once for dyb and dB while no member has more
//                than 32, else once for each. Sums split over blocks go through the workspace and are added in order by
//                the block that comes last: the same bits every run. At most 99 KiB shared
// Budget:        the bytes of x and dy; with dropout Philox, 22 instructions an element, made once for each
//
// bf16 and fp16 take tensor cores; fp32 (any dtype would do) the plain products at the end.
#include "../dropout.cuh"
#include "../tile.cuh"
#include "paths.h"

namespace nf4lora {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kLanes;
constexpr int kPiece = 8;  // 16-bit elements of a 16-byte copy

// Bytes of a row of 16-bit elements in shared memory: 16 more than it holds, so that ldmatrix meets no bank twice.
template <int kColumns>
constexpr int kPitch = 2 * kColumns + 16;

// ---- groups

struct RankPlace {
    int member;
    int64_t first;  // of the member's ranks in the group
};

template <class Params>
NF4LORA_DEVICE RankPlace place_of_rank(const Params &p, int64_t rank) {
    RankPlace place{0, 0};
    while (place.member + 1 < p.count && rank >= place.first + p.member[place.member].r) {
        place.first += p.member[place.member].r;
        ++place.member;
    }
    return place;
}

// Where every member is cut along its rows (or ranks) into parts of `size`: whose part this is, and its number there.
struct PartPlace {
    int member;
    int64_t part;
    int64_t row0, rank0;  // the member's first row and rank in the group
};

NF4LORA_DEVICE PartPlace place_of_part(const GroupLoraBwdParams &p, int64_t part, bool along_rows, int size) {
    PartPlace place{0, part, 0, 0};
    for (; place.member + 1 < p.count; ++place.member) {
        const Member &member = p.member[place.member];
        const int64_t parts = ((along_rows ? member.w.rows : member.r) + size - 1) / size;
        if (place.part < parts)
            break;
        place.part -= parts;
        place.row0 += member.w.rows;
        place.rank0 += member.r;
    }
    return place;
}

// How many parts there are.
int64_t parts_of(const GroupLoraBwdParams &p, bool along_rows, int size) {
    int64_t parts = 0;
    for (int i = 0; i < p.count; ++i)
        parts += ceil_div(along_rows ? p.member[i].w.rows : p.member[i].r, size);
    return parts;
}

template <class Params>
int64_t largest_rank(const Params &p) {
    int64_t largest = 0;
    for (int i = 0; i < p.count; ++i)
        largest = p.member[i].r > largest ? p.member[i].r : largest;
    return largest;
}

// ---- extents and sums of parts

NF4LORA_DEVICE int extent(int64_t left, int most) { return static_cast<int>(left < most ? left : most); }

NF4LORA_DEVICE float sum_of_parts(const float *first, int64_t apart, unsigned parts) {
    float sum = 0.0f;
#pragma unroll 4
    for (unsigned part = 0; part < parts; ++part)
        sum = __fadd_rn(sum, first[part * apart]);
    return sum;
}

// ---- four neighbours of lora_A or lora_B, as they lie in memory, and rounded to T

// Elements from `valid` on are zero. wide: all four may be loaded at once.
NF4LORA_DEVICE uint4 load_quad(const void *p, int32_t dtype, int64_t at, int64_t valid, bool wide) {
    uint4 raw = make_uint4(0, 0, 0, 0);
    if (dtype == kFloat32) {
        const uint32_t *words = static_cast<const uint32_t *>(p) + at;
        if (wide && valid >= 4)
            return *reinterpret_cast<const uint4 *>(words);
        raw.x = valid > 0 ? words[0] : 0;
        raw.y = valid > 1 ? words[1] : 0;
        raw.z = valid > 2 ? words[2] : 0;
        raw.w = valid > 3 ? words[3] : 0;
        return raw;
    }
    const uint16_t *halves = static_cast<const uint16_t *>(p) + at;
    if (wide && valid >= 4) {
        const uint2 pairs = *reinterpret_cast<const uint2 *>(halves);
        return make_uint4(pairs.x, pairs.y, 0, 0);
    }
    raw.x = (valid > 0 ? halves[0] : 0u) | (valid > 1 ? halves[1] : 0u) << 16;
    raw.y = (valid > 2 ? halves[2] : 0u) | (valid > 3 ? halves[3] : 0u) << 16;
    return raw;
}

template <class T>
NF4LORA_DEVICE uint2 round_quad(uint4 raw, int32_t dtype) {
    if (dtype == kFloat32)
        return make_uint2(round_pair<T>(__uint_as_float(raw.x), __uint_as_float(raw.y)),
                          round_pair<T>(__uint_as_float(raw.z), __uint_as_float(raw.w)));
    const bool bf16 = dtype == kBFloat16;
    const float2 low = bf16 ? unpack_pair<__nv_bfloat16>(raw.x) : unpack_pair<__half>(raw.x);
    const float2 high = bf16 ? unpack_pair<__nv_bfloat16>(raw.y) : unpack_pair<__half>(raw.y);
    return make_uint2(round_pair<T>(low.x, low.y), round_pair<T>(high.x, high.y));
}

// ---- pieces: eight neighbours of a row of x or dy

// Puts one into shared memory, zeros from `valid` on. wide: as an asynchronous copy, which the thread waits for.
NF4LORA_DEVICE void load_piece(char *to, const void *from, int64_t at, int64_t valid, bool wide) {
    const uint16_t *source = static_cast<const uint16_t *>(from);
    if (wide)
        return cp_async<16>(to, source + (valid > 0 ? at : 0), valid > 0);
    uint32_t pair[kPiece / 2];
#pragma unroll
    for (int i = 0; i < kPiece / 2; ++i)
        pair[i] = (2 * i < valid ? source[at + 2 * i] : 0u) | (2 * i + 1 < valid ? source[at + 2 * i + 1] : 0u) << 16;
    *reinterpret_cast<uint4 *>(to) = make_uint4(pair[0], pair[1], pair[2], pair[3]);
}

NF4LORA_DEVICE uint32_t keep_pair(uint32_t pair, uint32_t kept) {
    return pair & ((kept & 1 ? 0xffffu : 0u) | (kept & 2 ? 0xffff0000u : 0u));
}

// Zeroes what the mask drops of the eight elements from flat index `first` on.
NF4LORA_DEVICE void drop_piece(char *piece, const DropoutMask &mask, int64_t first) {
    const int64_t counter = first / 4;
    uint32_t kept = mask.kept(counter) | mask.kept(counter + 1) << 4;
    if (first % 4)
        kept = (kept | mask.kept(counter + 2) << 8) >> first % 4;
    uint4 &v = *reinterpret_cast<uint4 *>(piece);
    v = make_uint4(keep_pair(v.x, kept), keep_pair(v.y, kept >> 2), keep_pair(v.z, kept >> 4),
                   keep_pair(v.w, kept >> 6));
}

NF4LORA_DEVICE void store_piece(void *to, int64_t at, const char *piece, int64_t valid, bool wide) {
    uint16_t *target = static_cast<uint16_t *>(to) + at;
    if (wide && valid >= kPiece) {
        *reinterpret_cast<uint4 *>(target) = *reinterpret_cast<const uint4 *>(piece);
        return;
    }
    const uint16_t *source = reinterpret_cast<const uint16_t *>(piece);
    for (int i = 0; i < kPiece && i < valid; ++i)
        target[i] = source[i];
}

// Whether four neighbours of every A can be loaded at once.
template <class Params>
bool wide_A(const Params &p) {
    bool wide = p.K % 4 == 0;
    for (int i = 0; i < p.count; ++i)
        wide = wide && aligned(p.member[i].lora_A, p.A_dtype == kFloat32 ? 16 : 8);
    return wide;
}

// The same of every B, whose rows are its ranks.
bool wide_B(const GroupLoraBwdParams &p) {
    bool wide = true;
    for (int i = 0; i < p.count; ++i)
        wide = wide && p.member[i].r % 4 == 0 && aligned(p.member[i].lora_B, p.B_dtype == kFloat32 ? 16 : 8);
    return wide;
}

// Whether dy, or xa and dyb, can be copied by pieces that end with a member's columns.
bool wide_dy(const GroupLoraBwdParams &p) {
    bool wide = aligned(p.dy, 16);
    for (int i = 0; i < p.count; ++i)
        wide = wide && p.member[i].w.rows % kPiece == 0;
    return wide;
}

bool wide_ranks(const GroupLoraBwdParams &p, const void *side) {
    bool wide = aligned(side, 16);
    for (int i = 0; i < p.count; ++i)
        wide = wide && p.member[i].r % kPiece == 0;
    return wide;
}

// ---- plain products: fp32 sums of at most 64 terms, for what tensor cores do not take

constexpr int kPlainTile = 64, kPlainDepth = 16, kPlainPart = 64;

struct PlainTiles {
    float a[kPlainDepth][kPlainTile + 1], b[kPlainDepth][kPlainTile + 1];
};

// A Product is made of the launch's parameters for one member: `rows`, `columns` and `depth`, the factors a(row, k) and
// b(k, column), along which index they lie in memory, and what becomes of a sum. 4 x 4 sums a thread.
// Grid: (tiles of the columns, tiles of the rows, members).
template <class Product, class Params>
__global__ void __launch_bounds__(kThreads) product_kernel(const __grid_constant__ Params p) {
    NF4LORA_SHARED(PlainTiles, tiles);
    const Product product(p, static_cast<int>(blockIdx.z));
    const int64_t row0 = int64_t{blockIdx.y} * kPlainTile, column0 = int64_t{blockIdx.x} * kPlainTile;
    if (row0 >= product.rows || column0 >= product.columns)
        return;
    const int row = static_cast<int>(threadIdx.x) / 16, column = static_cast<int>(threadIdx.x) % 16;
    float sum[4][4] = {}, part[4][4] = {};
    for (int64_t k0 = 0; k0 < product.depth; k0 += kPlainDepth) {
        for (int at = static_cast<int>(threadIdx.x); at < kPlainTile * kPlainDepth; at += kThreads) {
            const int ka = Product::kDeepA ? at % kPlainDepth : at / kPlainTile;
            const int i = Product::kDeepA ? at / kPlainDepth : at % kPlainTile;
            const int kb = Product::kDeepB ? at % kPlainDepth : at / kPlainTile;
            const int j = Product::kDeepB ? at / kPlainDepth : at % kPlainTile;
            const bool has_a = row0 + i < product.rows && k0 + ka < product.depth;
            const bool has_b = column0 + j < product.columns && k0 + kb < product.depth;
            tiles->a[ka][i] = has_a ? product.a(row0 + i, k0 + ka) : 0.0f;
            tiles->b[kb][j] = has_b ? product.b(k0 + kb, column0 + j) : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < kPlainDepth; ++k)
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    part[i][j] = __fmaf_rn(tiles->a[k][row + 16 * i], tiles->b[k][column + 16 * j], part[i][j]);
        const bool ends = (k0 + kPlainDepth) % kPlainPart == 0 || k0 + kPlainDepth >= product.depth;
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                sum[i][j] = ends ? __fadd_rn(sum[i][j], part[i][j]) : sum[i][j];
                part[i][j] = ends ? 0.0f : part[i][j];
            }
        __syncthreads();  // the next step overwrites the tiles
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
            if (row0 + row + 16 * i < product.rows && column0 + column + 16 * j < product.columns)
                product.store(row0 + row + 16 * i, column0 + column + 16 * j, sum[i][j]);
}

template <class Product, class Params>
const char *launch_product(const Params &p, int64_t rows, int64_t columns, int64_t members, void *stream) {
    if (rows == 0 || columns == 0)
        return nullptr;
    const dim3 grid(static_cast<unsigned>(ceil_div(columns, kPlainTile)),
                    static_cast<unsigned>(ceil_div(rows, kPlainTile)), static_cast<unsigned>(members));
    return NF4LORA_LAUNCH((product_kernel<Product, Params>), grid, kThreads, sizeof(PlainTiles), stream, p);
}

template <class Params>
NF4LORA_DEVICE int64_t first_rank(const Params &p, int member) {
    int64_t first = 0;
    for (int i = 0; i < member; ++i)
        first += p.member[i].r;
    return first;
}

NF4LORA_DEVICE int64_t first_row(const GroupLoraBwdParams &p, int member) {
    int64_t first = 0;
    for (int i = 0; i < member; ++i)
        first += p.member[i].w.rows;
    return first;
}

NF4LORA_DEVICE float under_mask(const DropoutMask &mask, float v, int64_t index) {
    return mask.active && !mask.keeps(index) ? 0.0f : __fmul_rn(v, mask.scale);
}

struct XaProduct {
    static constexpr bool kDeepA = true, kDeepB = true;
    const GroupFwdParams &p;
    const Member &member;
    const DropoutMask mask;
    const int64_t rank0, rows, columns, depth;

    NF4LORA_DEVICE XaProduct(const GroupFwdParams &p_, int i)
        : p(p_), member(p_.member[i]), mask(p_.dropout), rank0(first_rank(p_, i)), rows(p_.M), columns(member.r),
          depth(p_.K) {}
    NF4LORA_DEVICE float a(int64_t token, int64_t k) const {
        return under_mask(mask, load_element(p.x, p.x_dtype, token * p.K + k), token * p.K + k);
    }
    NF4LORA_DEVICE float b(int64_t k, int64_t rank) const {
        return load_element(member.lora_A, p.A_dtype, rank * p.K + k);
    }
    NF4LORA_DEVICE void store(int64_t token, int64_t rank, float v) const {
        store_element(p.xa, p.x_dtype, token * p.r + rank0 + rank, v);
    }
};

// x_ext from x and the finished xa.
__global__ void __launch_bounds__(kThreads) extend_kernel(const __grid_constant__ GroupFwdParams p) {
    for (int64_t token = blockIdx.x; token < p.M; token += gridDim.x)
#pragma unroll 1
        for (int64_t column = threadIdx.x; column < p.ld; column += kThreads) {
            float v = 0.0f;
            if (column < p.K)
                v = load_element(p.x, p.x_dtype, token * p.K + column);
            else if (column < p.K + p.r)
                v = load_element(p.xa, p.x_dtype, token * p.r + column - p.K);
            store_element(p.x_ext, p.x_dtype, token * p.ld + column, v);
        }
}

// dyb_i = scaling_i * dy_i B_i
struct DybProduct {
    static constexpr bool kDeepA = true, kDeepB = false;
    const GroupLoraBwdParams &p;
    const Member &member;
    const int64_t row0, rank0, rows, columns, depth;

    NF4LORA_DEVICE DybProduct(const GroupLoraBwdParams &p_, int i)
        : p(p_), member(p_.member[i]), row0(first_row(p_, i)), rank0(first_rank(p_, i)), rows(p_.M), columns(member.r),
          depth(member.w.rows) {}
    NF4LORA_DEVICE float a(int64_t token, int64_t n) const {
        return load_element(p.dy, p.dtype, token * p.N + row0 + n);
    }
    NF4LORA_DEVICE float b(int64_t n, int64_t rank) const {
        return load_element(member.lora_B, p.B_dtype, n * member.r + rank);
    }
    NF4LORA_DEVICE void store(int64_t token, int64_t rank, float v) const {
        store_element(p.dyb, p.dtype, token * p.r + rank0 + rank, __fmul_rn(v, member.scaling));
    }
};

// dB_i = scaling_i * dy_i^T xa_i
struct BGradientProduct {
    static constexpr bool kDeepA = false, kDeepB = false;
    const GroupLoraBwdParams &p;
    const Member &member;
    const int64_t row0, rank0, rows, columns, depth;

    NF4LORA_DEVICE BGradientProduct(const GroupLoraBwdParams &p_, int i)
        : p(p_), member(p_.member[i]), row0(first_row(p_, i)), rank0(first_rank(p_, i)), rows(member.w.rows),
          columns(member.r), depth(p_.M) {}
    NF4LORA_DEVICE float a(int64_t n, int64_t token) const {
        return load_element(p.dy, p.dtype, token * p.N + row0 + n);
    }
    NF4LORA_DEVICE float b(int64_t token, int64_t rank) const {
        return load_element(p.xa, p.dtype, token * p.r + rank0 + rank);
    }
    NF4LORA_DEVICE void store(int64_t n, int64_t rank, float v) const {
        store_element(member.dB, p.B_dtype, n * member.r + rank, __fmul_rn(v, member.scaling));
    }
};

// dA_i = dyb_i^T dropout(x)
struct AGradientProduct {
    static constexpr bool kDeepA = false, kDeepB = false;
    const GroupLoraBwdParams &p;
    const Member &member;
    const DropoutMask mask;
    const int64_t rank0, rows, columns, depth;

    NF4LORA_DEVICE AGradientProduct(const GroupLoraBwdParams &p_, int i)
        : p(p_), member(p_.member[i]), mask(p_.dropout), rank0(first_rank(p_, i)), rows(member.r), columns(p_.K),
          depth(p_.M) {}
    NF4LORA_DEVICE float a(int64_t rank, int64_t token) const {
        return load_element(p.dyb, p.dtype, token * p.r + rank0 + rank);
    }
    NF4LORA_DEVICE float b(int64_t token, int64_t k) const {
        return under_mask(mask, load_element(p.x, p.dtype, token * p.K + k), token * p.K + k);
    }
    NF4LORA_DEVICE void store(int64_t rank, int64_t k, float v) const {
        store_element(member.dA, p.A_dtype, rank * p.K + k, v);
    }
};

// dx = mask * sum of dyb_i A_i, the ranks of all members as one reduction
struct DxProduct {
    static constexpr bool kDeepA = true, kDeepB = false;
    const GroupBwdParams &p;
    const DropoutMask mask;
    const int64_t rows, columns, depth;

    NF4LORA_DEVICE DxProduct(const GroupBwdParams &p_, int)
        : p(p_), mask(p_.dropout), rows(p_.M), columns(p_.K), depth(p_.r) {}
    NF4LORA_DEVICE float a(int64_t token, int64_t rank) const {
        return load_element(p.dyb, p.dy_dtype, token * p.r + rank);
    }
    NF4LORA_DEVICE float b(int64_t rank, int64_t k) const {
        const RankPlace place = place_of_rank(p, rank);
        return load_element(p.member[place.member].lora_A, p.A_dtype, (rank - place.first) * p.K + k);
    }
    NF4LORA_DEVICE void store(int64_t token, int64_t k, float v) const {
        store_element(p.dx, p.dy_dtype, token * p.K + k, under_mask(mask, v, token * p.K + k));
    }
};

const char *plain_forward(const GroupFwdParams &p, void *stream) {
    const char *error = launch_product<XaProduct>(p, p.M, largest_rank(p), p.count, stream);
    if (error || !p.x_ext)
        return error;
    return NF4LORA_LAUNCH(extend_kernel, grid_of(1 << 16, p.M), kThreads, 0, stream, p);
}

const char *plain_backward(const GroupLoraBwdParams &p, void *stream) {
    const int64_t ranks = largest_rank(p);
    int64_t most_rows = 0;
    for (int i = 0; i < p.count; ++i)
        most_rows = p.member[i].w.rows > most_rows ? p.member[i].w.rows : most_rows;
    const char *error = launch_product<DybProduct>(p, p.M, ranks, p.count, stream);
    if (!error && p.member[0].dB)
        error = launch_product<BGradientProduct>(p, most_rows, ranks, p.count, stream);
    if (!error && p.member[0].dA)
        error = launch_product<AGradientProduct>(p, ranks, p.K, p.count, stream);
    return error;
}

// ---- projections onto the ranks: xa = dropout(x) A^T and dyb = scaling * dy B

constexpr int kDepth = 64;              // of the reduction a step takes
constexpr int kStages = 3;              // tiles of x or dy on their way or in use
constexpr int64_t kLeastSteps = 4;      // of a part of a split reduction
constexpr int64_t kEnoughBlocks = 264;  // from which on it is not split

// Which operands can be copied 16 bytes at a time: x or dy, xa or dyb beside it, x_ext; and A or B four elements.
struct Wide {
    bool source, side, out, factor;
};

// A tile of the result: tokens by ranks, each warp 16 tokens by kWarpRanks.
template <int kRanks_>
struct ProjectionTile {
    static constexpr int kRanks = kRanks_, kTokens = kRanks <= 64 ? 128 : 64;
    static constexpr int kBlocks = kRanks <= 64 ? 2 : 1;  // at least, on a multiprocessor
    static constexpr int kTokenWarps = kTokens / 16, kWarpRanks = kRanks * kTokenWarps / kWarps;
    static constexpr int kPieces = kTokens * (kDepth / kPiece) / kThreads;  // of x or dy, a thread's in a step
    static constexpr int kQuads = kRanks * (kDepth / 4) / kThreads;         // of A or B
    static constexpr int kSourceBytes = kTokens * kPitch<kDepth>;
    static constexpr int kUnroll = kRanks <= 64 ? kDepth / 16 : 1;  // there are no registers for more beside 256 ranks
};

// x [M, K] onto the rows of all A, chunks of kRanks at a time.
template <class Tile>
struct ForwardProjection {
    typedef GroupFwdParams Params;
    static constexpr bool kRankRows = true;  // of the factor's tile: A is [rank][K]
    static constexpr int kFactorBytes = Tile::kRanks * kPitch<kDepth>;
    static constexpr size_t kShared = kStages * Tile::kSourceBytes + 2 * kFactorBytes;

    const GroupFwdParams &p;
    const DropoutMask mask;
    const bool extends;  // whether this chunk's blocks write x_ext's columns of x, and its zeros
    const int64_t rank0, stride, depth;
    const int ranks;
    const void *const source;

    NF4LORA_DEVICE ForwardProjection(const GroupFwdParams &p_, int64_t chunk)
        : p(p_), mask(p_.dropout), extends(p_.x_ext && chunk == 0), rank0(chunk * Tile::kRanks), stride(p_.K),
          depth(p_.K), ranks(extent(p_.r - rank0, Tile::kRanks)), source(p_.x) {}

    NF4LORA_DEVICE int32_t factor_dtype() const { return p.A_dtype; }
    NF4LORA_DEVICE uint4 factor(int rank, int64_t k, bool wide) const {
        const RankPlace place = place_of_rank(p, rank0 + rank);
        return load_quad(p.member[place.member].lora_A, p.A_dtype, (rank0 + rank - place.first) * p.K + k,
                         rank < ranks ? p.K - k : 0, wide);
    }
    NF4LORA_DEVICE void pass_on(int64_t token, int64_t k, const char *piece, int64_t valid, bool wide) const {
        store_piece(p.x_ext, token * p.ld + k, piece, valid, wide);
    }
    template <class T>
    NF4LORA_DEVICE void store(int64_t token, int rank, float v) const {
        const T rounded = from_float<T>(__fmul_rn(v, mask.scale));
        static_cast<T *>(p.xa)[token * p.r + rank0 + rank] = rounded;
        if (p.x_ext)
            static_cast<T *>(p.x_ext)[token * p.ld + p.K + rank0 + rank] = rounded;
    }
    // The last columns of x_ext.
    template <class T>
    NF4LORA_DEVICE void finish(int64_t token0, int rows) const {
        const int zeros = static_cast<int>(p.ld - p.K - p.r);
        for (int i = static_cast<int>(threadIdx.x); i < rows * zeros; i += kThreads)
            static_cast<T *>(p.x_ext)[(token0 + i / zeros) * p.ld + p.K + p.r + i % zeros] = from_float<T>(0.0f);
    }

    static int64_t chunks(const GroupFwdParams &p) { return ceil_div(p.r, Tile::kRanks); }
    static int64_t deepest(const GroupFwdParams &p) { return p.K; }
    static Wide wide(const GroupFwdParams &p) {
        return {p.K % kPiece == 0 && aligned(p.x, 16), false, aligned(p.x_ext, 16), wide_A(p)};
    }
};

// A member's columns of dy onto the columns of its B, chunks of kRanks at a time.
template <class Tile>
struct BackwardProjection {
    typedef GroupLoraBwdParams Params;
    static constexpr bool kRankRows = false;  // B is [N][rank]
    static constexpr int kFactorBytes = kDepth * kPitch<Tile::kRanks>;
    static constexpr size_t kShared = kStages * Tile::kSourceBytes + 2 * kFactorBytes;
    static constexpr bool extends = false;

    const GroupLoraBwdParams &p;
    const DropoutMask mask;  // none
    const PartPlace place;
    const Member &member;
    const int64_t stride, depth;
    const int rank0, ranks;
    const void *const source;

    NF4LORA_DEVICE BackwardProjection(const GroupLoraBwdParams &p_, int64_t chunk)
        : p(p_), mask(Dropout{nullptr, 0.0f}),
          place(place_of_part(p_, chunk, false, Tile::kRanks)),
          member(p_.member[place.member]), stride(p_.N), depth(member.w.rows),
          rank0(static_cast<int>(place.part) * Tile::kRanks),
          ranks(extent(member.r - rank0, Tile::kRanks)),
          source(static_cast<const uint16_t *>(p_.dy) + place.row0) {}

    NF4LORA_DEVICE int32_t factor_dtype() const { return p.B_dtype; }
    NF4LORA_DEVICE uint4 factor(int rank, int64_t n, bool wide) const {
        return load_quad(member.lora_B, p.B_dtype, n * member.r + rank0 + rank, n < depth ? ranks - rank : 0, wide);
    }
    NF4LORA_DEVICE void pass_on(int64_t, int64_t, const char *, int64_t, bool) const {}
    template <class T>
    NF4LORA_DEVICE void store(int64_t token, int rank, float v) const {
        static_cast<T *>(p.dyb)[token * p.r + place.rank0 + rank0 + rank] = from_float<T>(__fmul_rn(v, member.scaling));
    }
    template <class T>
    NF4LORA_DEVICE void finish(int64_t, int) const {}

    static int64_t chunks(const GroupLoraBwdParams &p) { return parts_of(p, false, Tile::kRanks); }
    static int64_t deepest(const GroupLoraBwdParams &p) {
        int64_t deepest = 0;
        for (int i = 0; i < p.count; ++i)
            deepest = p.member[i].w.rows > deepest ? p.member[i].w.rows : deepest;
        return deepest;
    }
    static Wide wide(const GroupLoraBwdParams &p) { return {wide_dy(p), false, false, wide_B(p)}; }
};

struct ProjectionGrid {
    int64_t tiles, chunks, parts;  // of the tokens, of the ranks, of the reduction
    int64_t slots() const { return tiles * chunks; }
};

template <class Tile, class Projection>
ProjectionGrid projection_grid(const typename Projection::Params &p) {
    const int64_t tiles = ceil_div(p.M, Tile::kTokens), chunks = Projection::chunks(p), blocks = tiles * chunks;
    const int64_t most = ceil_div(ceil_div(Projection::deepest(p), kDepth), kLeastSteps);
    const int64_t wanted = blocks > 0 ? kEnoughBlocks / blocks : 1, parts = wanted < most ? wanted : most;
    return {tiles, chunks, parts < 1 ? 1 : parts};
}

// Grid: as ProjectionGrid has it. Partial sums: [tile][chunk][part][token][rank] of whole tiles.
template <class T, class Tile, class Projection>
__global__ void __launch_bounds__(kThreads, Tile::kBlocks) projection_kernel(
    const __grid_constant__ typename Projection::Params p, float *partial, uint32_t *counters, Wide wide) {
    constexpr int kRanks = Tile::kRanks, kTokens = Tile::kTokens, kRow = kPitch<kDepth>;
    constexpr bool kRankRows = Projection::kRankRows;
    constexpr int kFactorRow = kRankRows ? kPitch<kDepth> : kPitch<kRanks>;
    NF4LORA_SHARED(char, shared);
    char *const source_tiles = shared, *const factor_tiles = shared + kStages * Tile::kSourceBytes;
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    const int warp_token = warp % Tile::kTokenWarps * 16, warp_rank = warp / Tile::kTokenWarps * Tile::kWarpRanks;
    const Projection job(p, blockIdx.y);
    const int64_t token0 = int64_t{blockIdx.x} * kTokens, all_steps = (job.depth + kDepth - 1) / kDepth;
    const int64_t begin = all_steps * blockIdx.z / gridDim.z, steps = all_steps * (blockIdx.z + 1) / gridDim.z - begin;

    // A thread's pieces are its own until the barrier: what it has copied it passes on to x_ext, and masks.
    const auto each_piece = [&](int64_t step, auto visit) {
        char *const tile = source_tiles + step % kStages * Tile::kSourceBytes;
#pragma unroll
        for (int i = 0; i < Tile::kPieces; ++i) {
            const int at = static_cast<int>(threadIdx.x) + i * kThreads;
            const int row = at / (kDepth / kPiece), column = at % (kDepth / kPiece) * kPiece;
            const int64_t token = token0 + row, k = (begin + step) * kDepth + column;
            visit(tile + row * kRow + column * 2, token, k, token < p.M ? job.depth - k : 0);
        }
    };
    const auto load_source = [&](int64_t step) {
        each_piece(step, [&](char *piece, int64_t token, int64_t k, int64_t valid) {
            load_piece(piece, job.source, token * job.stride + k, valid, wide.source);
        });
    };
    const auto finish_source = [&](int64_t step) {
        if (!job.extends && !job.mask.active)
            return;
        each_piece(step, [&](char *piece, int64_t token, int64_t k, int64_t valid) {
            if (valid <= 0)
                return;
            if (job.extends)
                job.pass_on(token, k, piece, valid, wide.out);
            if (job.mask.active)
                drop_piece(piece, job.mask, token * job.stride + k);
        });
    };

    // The factor is fetched a step ahead, a quarter of it beside each quarter of the products.
    constexpr int kBatches = Tile::kQuads < 4 ? Tile::kQuads : 4, kBatch = Tile::kQuads / kBatches;
    constexpr int kRowQuads = (kRankRows ? kDepth : kRanks) / 4;
    uint4 fetched[kBatch];
    const auto fetch_factor = [&](int64_t step, int batch) {
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int at = static_cast<int>(threadIdx.x) + (batch * kBatch + i) * kThreads;
            const int row = at / kRowQuads, column = at % kRowQuads * 4;
            const int64_t k = (begin + step) * kDepth + (kRankRows ? column : row);
            fetched[i] = job.factor(kRankRows ? row : column, k, wide.factor);
        }
    };
    const auto store_factor = [&](int64_t step, int batch) {
        char *const tile = factor_tiles + step % 2 * Projection::kFactorBytes;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int at = static_cast<int>(threadIdx.x) + (batch * kBatch + i) * kThreads;
            *reinterpret_cast<uint2 *>(tile + at / kRowQuads * kFactorRow + at % kRowQuads * 8) =
                round_quad<T>(fetched[i], job.factor_dtype());
        }
    };

#pragma unroll
    for (int stage = 0; stage < kStages - 1; ++stage) {
        if (stage < steps)
            load_source(stage);
        cp_async_commit();
    }
    if (steps > 0)
#pragma unroll
        for (int batch = 0; batch < kBatches; ++batch) {
            fetch_factor(0, batch);
            store_factor(0, batch);
        }

    float sum[Tile::kWarpRanks / 8][4] = {};
    for (int64_t step = 0; step < steps; ++step) {
        cp_async_wait<kStages - 2>();
        finish_source(step);
        __syncthreads();  // this step's tiles are there, and all are done with those of the step before
        if (step + kStages - 1 < steps)
            load_source(step + kStages - 1);
        cp_async_commit();
        const char *const tile = source_tiles + step % kStages * Tile::kSourceBytes;
        const char *const factor = factor_tiles + step % 2 * Projection::kFactorBytes;
#pragma unroll(Tile::kUnroll)
        for (int k = 0; k < kDepth / 16; ++k) {
            if (k < kBatches && step + 1 < steps)
                fetch_factor(step + 1, k);
            uint32_t a[4];
            ldmatrix_x4(a, tile + (warp_token + lane % 16) * kRow + (16 * k + lane / 16 * 8) * 2);
#pragma unroll
            for (int j = 0; j < Tile::kWarpRanks / 16; ++j) {
                const int rank = warp_rank + 16 * j + lane / 16 * 8;
                if (warp_rank + 16 * j >= job.ranks)
                    break;
                uint32_t b[4];
                if constexpr (kRankRows)
                    ldmatrix_x4(b, factor + (rank + lane % 8) * kFactorRow + (16 * k + lane / 8 % 2 * 8) * 2);
                else
                    ldmatrix_x4_trans(b, factor + (16 * k + lane % 16) * kFactorRow + rank * 2);
                mma_m16n8k16<T>(sum[2 * j], a, {b[0], b[1]});
                mma_m16n8k16<T>(sum[2 * j + 1], a, {b[2], b[3]});
            }
            if (k < kBatches && step + 1 < steps)
                store_factor(step + 1, k);
        }
    }

    const int rows = extent(p.M - token0, kTokens);
    const auto each_sum = [&](auto visit) {
#pragma unroll
        for (int j = 0; j < Tile::kWarpRanks / 8; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = warp_token + lane / 4 + 8 * half, rank = warp_rank + 8 * j + lane % 4 * 2;
                if (row < rows && rank < job.ranks)
                    visit(row, rank, sum[j][2 * half], sum[j][2 * half + 1]);
            }
    };
    if (gridDim.z == 1)
        each_sum([&](int row, int rank, float even, float odd) {
            job.template store<T>(token0 + row, rank, even);
            if (rank + 1 < job.ranks)
                job.template store<T>(token0 + row, rank + 1, odd);
        });
    else {
        constexpr int64_t kPart = kTokens * kRanks;
        const int64_t slot = int64_t{blockIdx.x} * gridDim.y + blockIdx.y;
        float *const parts = partial + slot * gridDim.z * kPart;
        each_sum([&](int row, int rank, float even, float odd) {
            *reinterpret_cast<float2 *>(parts + blockIdx.z * kPart + row * kRanks + rank) = make_float2(even, odd);
        });
        if (!comes_last(counters + slot, gridDim.z, reinterpret_cast<uint32_t *>(shared)))
            return;
        for (int i = static_cast<int>(threadIdx.x); i < rows * kRanks; i += kThreads)
            if (i % kRanks < job.ranks)
                job.template store<T>(token0 + i / kRanks, i % kRanks, sum_of_parts(parts + i, kPart, gridDim.z));
    }
    if (job.extends)
        job.template finish<T>(token0, rows);
}

template <class Tile>
int64_t projection_partials(const ProjectionGrid &grid) {
    return grid.parts > 1 ? grid.slots() * grid.parts * (Tile::kTokens * Tile::kRanks) : 0;
}

// Partial sums, then a counter for each tile.
template <class Tile, class Projection>
int64_t projection_workspace(const typename Projection::Params &p) {
    const ProjectionGrid grid = projection_grid<Tile, Projection>(p);
    return grid.parts > 1 ? 4 * (projection_partials<Tile>(grid) + grid.slots()) : 0;
}

template <class T, class Tile, class Projection>
const char *launch_projection(const typename Projection::Params &p, void *stream) {
    const ProjectionGrid grid = projection_grid<Tile, Projection>(p);
    if (grid.slots() == 0)
        return nullptr;
    float *const partial = static_cast<float *>(p.workspace);
    uint32_t *counters = nullptr;
    if (grid.parts > 1) {
        counters = reinterpret_cast<uint32_t *>(partial + projection_partials<Tile>(grid));
        if (const char *error = zero_async(counters, grid.slots() * sizeof(uint32_t), stream))
            return error;
    }
    const dim3 blocks(static_cast<unsigned>(grid.tiles), static_cast<unsigned>(grid.chunks),
                      static_cast<unsigned>(grid.parts));
    return NF4LORA_LAUNCH((projection_kernel<T, Tile, Projection>), blocks, kThreads, Projection::kShared, stream, p,
                          partial, counters, Projection::wide(p));
}

// ---- gradients: dB = scaling * dy^T xa and dA = dyb^T dropout(x), reductions over the tokens

// A tile of the result: a slab of columns of dy or x by ranks, each warp 32 columns by kWarpRanks; kTokens a step.
template <int kRanks_, int kSlab_, int kTokens_>
struct GradientTile {
    static constexpr int kRanks = kRanks_, kSlab = kSlab_, kTokens = kTokens_, kStages = 2;
    static constexpr int kBlocks = kRanks <= 32 ? 2 : 1;  // at least, on a multiprocessor
    static constexpr int kSlabWarps = kSlab / 32, kWarpRanks = kRanks * kSlabWarps / kWarps;
    static constexpr int kSourceBytes = kTokens * kPitch<kSlab>, kSideBytes = kTokens * kPitch<kRanks>;
    static constexpr size_t kShared = kStages * (kSourceBytes + kSideBytes);
};

// dB of a member, from its columns of dy and of xa; and dyb from the same tiles of dy where it projects as well: for
// low ranks, as more would move more partial sums of dyb than a second reading of dy costs.
template <class Tile, bool kProjects_>
struct DyGradient {
    static constexpr bool kRankRows = false;  // of dB: it is [N][rank]
    static constexpr bool kProjects = kProjects_;
    static constexpr int kFactorBytes = kProjects ? Tile::kSlab * kPitch<Tile::kRanks> : 0;  // the slab's rows of B
    static constexpr size_t kShared = Tile::kShared + kFactorBytes + (kProjects ? sizeof(uint4) : 0);  // for comes_last
    const GroupLoraBwdParams &p;
    const DropoutMask mask;  // none
    const PartPlace place;
    const Member &member;
    const int64_t column0, stride, rank0;
    const int columns, ranks;
    const void *const source, *const side;

    NF4LORA_DEVICE DyGradient(const GroupLoraBwdParams &p_, int64_t slab, int64_t chunk)
        : p(p_), mask(Dropout{nullptr, 0.0f}), place(place_of_part(p_, slab, true, Tile::kSlab)),
          member(p_.member[place.member]), column0(place.part * Tile::kSlab), stride(p_.N), rank0(chunk * Tile::kRanks),
          columns(extent(member.w.rows - column0, Tile::kSlab)), ranks(extent(member.r - rank0, Tile::kRanks)),
          source(static_cast<const uint16_t *>(p_.dy) + place.row0 + column0),
          side(static_cast<const uint16_t *>(p_.xa) + place.rank0 + rank0) {}
    NF4LORA_DEVICE void store(int column, int rank, float v) const {
        store_element(member.dB, p.B_dtype, (column0 + column) * member.r + rank0 + rank, __fmul_rn(v, member.scaling));
    }
    NF4LORA_DEVICE int64_t slabs_of_member() const { return (member.w.rows + Tile::kSlab - 1) / Tile::kSlab; }
    NF4LORA_DEVICE uint4 factor(int column, int rank, bool wide) const {
        return load_quad(member.lora_B, p.B_dtype, (column0 + column) * member.r + rank,
                         column < columns ? ranks - rank : 0, wide);
    }
    template <class T>
    NF4LORA_DEVICE void store_dyb(int64_t token, int rank, float v) const {
        static_cast<T *>(p.dyb)[token * p.r + place.rank0 + rank] = from_float<T>(__fmul_rn(v, member.scaling));
    }

    static int64_t slabs(const GroupLoraBwdParams &p) { return parts_of(p, true, Tile::kSlab); }
    static int64_t chunks(const GroupLoraBwdParams &p) { return ceil_div(largest_rank(p), Tile::kRanks); }
    static Wide wide(const GroupLoraBwdParams &p) {
        return {wide_dy(p), wide_ranks(p, p.xa), false, kProjects && wide_B(p)};
    }
};

template <class Tile>
using BGradient = DyGradient<Tile, false>;
template <class Tile>
using DyPass = DyGradient<Tile, true>;

// Of all members: the columns of x, the columns of dyb.
template <class Tile>
struct AGradient {
    static constexpr bool kRankRows = true;
    static constexpr bool kProjects = false;
    static constexpr size_t kShared = Tile::kShared;
    const GroupLoraBwdParams &p;
    const DropoutMask mask;
    const int64_t column0, stride, rank0;
    const int columns, ranks;
    const void *const source, *const side;

    NF4LORA_DEVICE AGradient(const GroupLoraBwdParams &p_, int64_t slab, int64_t chunk)
        : p(p_), mask(p_.dropout), column0(slab * Tile::kSlab), stride(p_.K), rank0(chunk * Tile::kRanks),
          columns(extent(p_.K - column0, Tile::kSlab)), ranks(extent(p_.r - rank0, Tile::kRanks)),
          source(static_cast<const uint16_t *>(p_.x) + column0), side(static_cast<const uint16_t *>(p_.dyb) + rank0) {}
    NF4LORA_DEVICE void store(int column, int rank, float v) const {
        const RankPlace place = place_of_rank(p, rank0 + rank);
        store_element(p.member[place.member].dA, p.A_dtype, (rank0 + rank - place.first) * p.K + column0 + column,
                      __fmul_rn(v, mask.scale));
    }

    static int64_t slabs(const GroupLoraBwdParams &p) { return ceil_div(p.K, Tile::kSlab); }
    static int64_t chunks(const GroupLoraBwdParams &p) { return ceil_div(p.r, Tile::kRanks); }
    static Wide wide(const GroupLoraBwdParams &p) {
        return {p.K % kPiece == 0 && aligned(p.x, 16), wide_ranks(p, p.dyb), false, false};
    }
};

struct GradientGrid {
    int64_t slabs, parts, chunks;  // of the columns, of the tokens, of the ranks
    int64_t slots() const { return slabs * chunks; }
};

// p.split is meant for slabs of 128 columns of dy: as many blocks, whatever the slabs are here.
template <class Tile, class Gradient>
GradientGrid gradient_grid(const GroupLoraBwdParams &p) {
    constexpr int64_t kSplitSlab = 128, kLeastSteps = 2;
    const int64_t slabs = Gradient::slabs(p), steps = ceil_div(p.M, Tile::kTokens);
    const int64_t most = ceil_div(steps, kLeastSteps), blocks = p.split * ceil_div(p.N, kSplitSlab);
    const int64_t wanted = slabs > 0 ? ceil_div(blocks, slabs) : 1, parts = wanted < most ? wanted : most;
    return {slabs, parts < 1 ? 1 : parts, Gradient::chunks(p)};
}

// Where split sums meet: partial sums, and counters that start as 0.
struct Meeting {
    float *partial;
    uint32_t *counters;
};

// Grid: as GradientGrid has it. Partial sums of the gradient: [slab][chunk][part] of whole tiles, which lie as it does;
// of dyb: [slab][token][rank], with counters [member][token tile].
template <class T, class Tile, class Gradient>
__global__ void __launch_bounds__(kThreads, Tile::kBlocks) gradient_kernel(
    const __grid_constant__ GroupLoraBwdParams p, Meeting gradient, Meeting dyb, Wide wide) {
    constexpr int kRanks = Tile::kRanks, kSlab = Tile::kSlab, kTokens = Tile::kTokens, kStages = Tile::kStages;
    constexpr int kSourceRow = kPitch<kSlab>, kSideRow = kPitch<kRanks>;
    NF4LORA_SHARED(char, shared);
    char *const source_tiles = shared, *const side_tiles = shared + kStages * Tile::kSourceBytes;
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    const int warp_column = warp % Tile::kSlabWarps * 32, warp_rank = warp / Tile::kSlabWarps * Tile::kWarpRanks;
    const Gradient job(p, blockIdx.x, blockIdx.z);
    if (job.ranks <= 0)
        return;
    const int64_t all_steps = (p.M + kTokens - 1) / kTokens;
    const int64_t begin = all_steps * blockIdx.y / gridDim.y, steps = all_steps * (blockIdx.y + 1) / gridDim.y - begin;

    const auto each_piece = [&](int64_t step, auto visit) {
        char *const tile = source_tiles + step % kStages * Tile::kSourceBytes;
#pragma unroll
        for (int i = 0; i < kTokens * (kSlab / kPiece) / kThreads; ++i) {
            const int at = static_cast<int>(threadIdx.x) + i * kThreads;
            const int row = at / (kSlab / kPiece), column = at % (kSlab / kPiece) * kPiece;
            const int64_t token = (begin + step) * kTokens + row;
            visit(tile + row * kSourceRow + column * 2, token, column, token < p.M ? job.columns - column : 0);
        }
    };
    const auto load = [&](int64_t step) {
        each_piece(step, [&](char *piece, int64_t token, int column, int64_t valid) {
            load_piece(piece, job.source, token * job.stride + column, valid, wide.source);
        });
        char *const tile = side_tiles + step % kStages * Tile::kSideBytes;
        for (int at = static_cast<int>(threadIdx.x); at < kTokens * (kRanks / kPiece); at += kThreads) {
            const int row = at / (kRanks / kPiece), rank = at % (kRanks / kPiece) * kPiece;
            const int64_t token = (begin + step) * kTokens + row;
            load_piece(tile + row * kSideRow + rank * 2, job.side, token * p.r + rank,
                       token < p.M ? job.ranks - rank : 0, wide.side);
        }
    };

    // dyb of a step's tokens: complete where the slab is the whole member, else by the last of its slabs.
    char *const factor_tile = side_tiles + kStages * Tile::kSideBytes;
    const auto load_factor = [&] {
        if constexpr (Gradient::kProjects) {
#pragma unroll 4
            for (int at = static_cast<int>(threadIdx.x); at < kSlab * (kRanks / 4); at += kThreads) {
                const int column = at / (kRanks / 4), rank = at % (kRanks / 4) * 4;
                *reinterpret_cast<uint2 *>(factor_tile + column * kSideRow + rank * 2) =
                    round_quad<T>(job.factor(column, rank, wide.factor), p.B_dtype);
            }
        }
    };
    const auto project = [&](int64_t step, const char *source) {
        if constexpr (Gradient::kProjects) {
            constexpr int kTokenWarps = kTokens / 16, kMine = kRanks * kTokenWarps / kWarps;
            const int my_token = warp % kTokenWarps * 16, my_rank = warp / kTokenWarps * kMine;
            float projected[kMine / 8][4] = {};
#pragma unroll 4
            for (int column = 0; column < kSlab; column += 16) {
                if (column >= job.columns || my_rank >= job.ranks)
                    break;
                uint32_t a[4];
                ldmatrix_x4(a, source + (my_token + lane % 16) * kSourceRow + (column + lane / 16 * 8) * 2);
                const char *const row = factor_tile + (column + lane % 16) * kSideRow + my_rank * 2;
                if constexpr (kMine == 8) {
                    uint32_t b[2];
                    ldmatrix_x2_trans(b, row);
                    mma_m16n8k16<T>(projected[0], a, b);
                } else {
                    uint32_t b[4];
                    ldmatrix_x4_trans(b, row + lane / 16 * 16);
                    mma_m16n8k16<T>(projected[0], a, {b[0], b[1]});
                    mma_m16n8k16<T>(projected[1], a, {b[2], b[3]});
                }
            }
            const int64_t token0 = (begin + step) * kTokens, slabs = job.slabs_of_member();
            const int rows = extent(p.M - token0, kTokens);
            float *const sums = dyb.partial + (blockIdx.x * p.M + token0) * kRanks;  // of this slab
#pragma unroll
            for (int j = 0; j < kMine / 8; ++j)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int row = my_token + lane / 4 + 8 * half, rank = my_rank + 8 * j + lane % 4 * 2;
                    const float2 pair = make_float2(projected[j][2 * half], projected[j][2 * half + 1]);
                    if (row >= rows || rank >= job.ranks)
                        continue;
                    if (slabs > 1) {
                        *reinterpret_cast<float2 *>(sums + row * kRanks + rank) = pair;
                        continue;
                    }
                    job.template store_dyb<T>(token0 + row, rank, pair.x);
                    if (rank + 1 < job.ranks)
                        job.template store_dyb<T>(token0 + row, rank + 1, pair.y);
                }
            uint32_t *const word = reinterpret_cast<uint32_t *>(factor_tile + Gradient::kFactorBytes);
            uint32_t *const counter = dyb.counters + job.place.member * all_steps + begin + step;
            if (slabs == 1 || !comes_last(counter, static_cast<uint32_t>(slabs), word))
                return;
            const float *const first = sums - job.place.part * p.M * kRanks;
            for (int i = static_cast<int>(threadIdx.x); i < rows * kRanks; i += kThreads)
                if (i % kRanks < job.ranks)
                    job.template store_dyb<T>(token0 + i / kRanks, i % kRanks,
                                              sum_of_parts(first + i, p.M * kRanks, static_cast<unsigned>(slabs)));
        }
    };

    load_factor();
#pragma unroll
    for (int stage = 0; stage < kStages - 1; ++stage) {
        if (stage < steps)
            load(stage);
        cp_async_commit();
    }
    float sum[2][Tile::kWarpRanks / 8][4] = {};
    for (int64_t step = 0; step < steps; ++step) {
        cp_async_wait<kStages - 2>();
        if (job.mask.active)  // a thread's pieces are its own until the barrier
            each_piece(step, [&](char *piece, int64_t token, int column, int64_t valid) {
                if (valid > 0)
                    drop_piece(piece, job.mask, token * job.stride + job.column0 + column);
            });
        __syncthreads();  // this step's tiles are there, and all are done with those of the step before
        if (step + kStages - 1 < steps)
            load(step + kStages - 1);
        cp_async_commit();
        const char *const source = source_tiles + step % kStages * Tile::kSourceBytes;
        const char *const side = side_tiles + step % kStages * Tile::kSideBytes;
#pragma unroll
        for (int token = 0; token < kTokens; token += 16) {
            uint32_t a[2][4];  // columns by tokens
#pragma unroll
            for (int i = 0; i < 2; ++i)
                ldmatrix_x4_trans(a[i], source + (token + lane / 16 * 8 + lane % 8) * kSourceRow +
                                            (warp_column + 16 * i + lane / 8 % 2 * 8) * 2);
#pragma unroll
            for (int j = 0; j < Tile::kWarpRanks / 16; ++j) {
                if (warp_rank + 16 * j >= job.ranks)
                    break;
                uint32_t b[4];
                ldmatrix_x4_trans(b, side + (token + lane % 16) * kSideRow + (warp_rank + 16 * j + lane / 16 * 8) * 2);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    mma_m16n8k16<T>(sum[i][2 * j], a[i], {b[0], b[1]});
                    mma_m16n8k16<T>(sum[i][2 * j + 1], a[i], {b[2], b[3]});
                }
            }
        }
        project(step, source);
    }

    const auto each_sum = [&](auto visit) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int j = 0; j < Tile::kWarpRanks / 8; ++j)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int column = warp_column + 16 * i + lane / 4 + 8 * half;
                    const int rank = warp_rank + 8 * j + lane % 4 * 2;
                    if (column < job.columns && rank < job.ranks)
                        visit(column, rank, sum[i][j][2 * half], sum[i][j][2 * half + 1]);
                }
    };
    if (gridDim.y == 1)
        return each_sum([&](int column, int rank, float even, float odd) {
            job.store(column, rank, even);
            if (rank + 1 < job.ranks)
                job.store(column, rank + 1, odd);
        });
    constexpr int64_t kPart = kSlab * kRanks;
    const int64_t slot = int64_t{blockIdx.x} * gridDim.z + blockIdx.z;
    float *const parts = gradient.partial + slot * gridDim.y * kPart;
    each_sum([&](int column, int rank, float even, float odd) {
        float *const mine = parts + blockIdx.y * kPart;
        if constexpr (Gradient::kRankRows) {
            mine[rank * kSlab + column] = even;
            mine[(rank + 1) * kSlab + column] = odd;
        } else {
            *reinterpret_cast<float2 *>(mine + column * kRanks + rank) = make_float2(even, odd);
        }
    });
    if (!comes_last(gradient.counters + slot, gridDim.y, reinterpret_cast<uint32_t *>(shared)))
        return;
    for (int i = static_cast<int>(threadIdx.x); i < kPart; i += kThreads) {
        const int column = Gradient::kRankRows ? i % kSlab : i / kRanks;
        const int rank = Gradient::kRankRows ? i / kSlab : i % kRanks;
        if (column < job.columns && rank < job.ranks)
            job.store(column, rank, sum_of_parts(parts + i, kPart, gridDim.y));
    }
}

// What a launch takes of the workspace, in words: the sums of the gradient and of dyb, then their counters.
struct GradientSpace {
    int64_t partials, counters, dyb_partials, dyb_counters;
    int64_t zeroed() const { return counters + dyb_counters; }
    int64_t words() const { return partials + dyb_partials + zeroed(); }
};

template <class Tile, class Gradient>
GradientSpace gradient_space(const GroupLoraBwdParams &p, const GradientGrid &grid) {
    GradientSpace space{0, 0, 0, 0};
    if (grid.parts > 1)
        space = {grid.slots() * grid.parts * (Tile::kSlab * Tile::kRanks), grid.slots(), 0, 0};
    if (Gradient::kProjects && grid.slabs > 1) {
        space.dyb_partials = grid.slabs * p.M * Tile::kRanks;
        space.dyb_counters = p.count * ceil_div(p.M, Tile::kTokens);
    }
    return space;
}

template <class Tile, template <class> class Gradient>
int64_t gradient_workspace(const GroupLoraBwdParams &p) {
    return 4 * gradient_space<Tile, Gradient<Tile>>(p, gradient_grid<Tile, Gradient<Tile>>(p)).words();
}

template <class T, class Tile, template <class> class Gradient>
const char *launch_gradient(const GroupLoraBwdParams &p, void *stream) {
    const GradientGrid grid = gradient_grid<Tile, Gradient<Tile>>(p);
    if (grid.slots() == 0)
        return nullptr;
    const GradientSpace space = gradient_space<Tile, Gradient<Tile>>(p, grid);
    float *const sums = static_cast<float *>(p.workspace);
    uint32_t *const counters = reinterpret_cast<uint32_t *>(sums + space.partials + space.dyb_partials);
    if (space.zeroed() > 0)
        if (const char *error = zero_async(counters, space.zeroed() * sizeof(uint32_t), stream))
            return error;
    const Meeting gradient{sums, counters}, dyb{sums + space.partials, counters + space.counters};
    const dim3 blocks(static_cast<unsigned>(grid.slabs), static_cast<unsigned>(grid.parts),
                      static_cast<unsigned>(grid.chunks));
    return NF4LORA_LAUNCH((gradient_kernel<T, Tile, Gradient<Tile>>), blocks, kThreads, Gradient<Tile>::kShared, stream,
                          p, gradient, dyb, Gradient<Tile>::wide(p));
}

// ---- dx = mask * (dyb A), the ranks of all members as one reduction

// Shared memory: a tile of dyb and one of A, and in their place in the end the tile of dx.
struct DxTile {
    static constexpr int kTokens = 128, kColumns = 128, kRanks = 64;  // 64 ranks at a time
    static constexpr int kDybBytes = kTokens * kPitch<kRanks>, kFactorBytes = kRanks * kPitch<kColumns>;
    static constexpr size_t kShared = kDybBytes + kFactorBytes;
    static_assert(kShared >= kTokens * kPitch<kColumns>, "dx takes the place of both");
};

// Grid: (tiles of the tokens, of the columns). A warp makes 32 tokens by 64 columns.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) dx_kernel(const __grid_constant__ GroupBwdParams p, Wide wide) {
    constexpr int kTokens = DxTile::kTokens, kColumns = DxTile::kColumns, kRanks = DxTile::kRanks;
    constexpr int kDybRow = kPitch<kRanks>, kRow = kPitch<kColumns>;
    NF4LORA_SHARED(char, shared);
    char *const dyb_tile = shared, *const factor_tile = shared + DxTile::kDybBytes;
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    const int warp_token = warp % 4 * 32, warp_column = warp / 4 * 64;
    const int64_t token0 = int64_t{blockIdx.x} * kTokens, column0 = int64_t{blockIdx.y} * kColumns;
    const DropoutMask mask(p.dropout);

    const auto load = [&](int64_t rank0, int ranks) {
#pragma unroll
        for (int i = 0; i < kTokens * (kRanks / kPiece) / kThreads; ++i) {
            const int at = static_cast<int>(threadIdx.x) + i * kThreads;
            const int row = at / (kRanks / kPiece), rank = at % (kRanks / kPiece) * kPiece;
            if (rank < ranks)
                load_piece(dyb_tile + row * kDybRow + rank * 2, p.dyb, (token0 + row) * p.r + rank0 + rank,
                           token0 + row < p.M ? ranks - rank : 0, wide.side);
            else if (rank < ranks + 15)  // what the products of the last 16 read
                *reinterpret_cast<uint4 *>(dyb_tile + row * kDybRow + rank * 2) = make_uint4(0, 0, 0, 0);
        }
        cp_async_commit();
#pragma unroll 4
        for (int i = 0; i < kRanks * (kColumns / 4) / kThreads; ++i) {
            const int at = static_cast<int>(threadIdx.x) + i * kThreads;
            const int rank = at / (kColumns / 4), column = at % (kColumns / 4) * 4;
            if (rank >= ranks + 15)
                break;
            const RankPlace place = place_of_rank(p, rank0 + rank);
            const uint4 quad = load_quad(p.member[place.member].lora_A, p.A_dtype,
                                         (rank0 + rank - place.first) * p.K + column0 + column,
                                         rank < ranks ? p.K - column0 - column : 0, wide.factor);
            *reinterpret_cast<uint2 *>(factor_tile + rank * kRow + column * 2) = round_quad<T>(quad, p.A_dtype);
        }
        cp_async_wait<0>();
        __syncthreads();
    };

    float sum[2][8][4] = {};
    for (int64_t rank0 = 0; rank0 < p.r; rank0 += kRanks) {
        const int ranks = extent(p.r - rank0, kRanks);
        load(rank0, ranks);
#pragma unroll
        for (int rank = 0; rank < kRanks; rank += 16) {
            if (rank >= ranks)
                break;
            uint32_t a[2][4];
#pragma unroll
            for (int i = 0; i < 2; ++i)
                ldmatrix_x4(a[i], dyb_tile + (warp_token + 16 * i + lane % 16) * kDybRow + (rank + lane / 16 * 8) * 2);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                uint32_t b[4];
                const int column = warp_column + 16 * j + lane / 16 * 8;
                ldmatrix_x4_trans(b, factor_tile + (rank + lane % 16) * kRow + column * 2);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    mma_m16n8k16<T>(sum[i][2 * j], a[i], {b[0], b[1]});
                    mma_m16n8k16<T>(sum[i][2 * j + 1], a[i], {b[2], b[3]});
                }
            }
        }
        __syncthreads();  // the next ranks, or dx, take the tiles' place
    }

#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = warp_token + 16 * i + lane / 4 + 8 * half, column = warp_column + 8 * j + lane % 4 * 2;
                const float even = __fmul_rn(sum[i][j][2 * half], mask.scale);
                const float odd = __fmul_rn(sum[i][j][2 * half + 1], mask.scale);
                *reinterpret_cast<uint32_t *>(shared + row * kRow + column * 2) = round_pair<T>(even, odd);
            }
    __syncthreads();
#pragma unroll 4
    for (int i = 0; i < kTokens * (kColumns / kPiece) / kThreads; ++i) {
        const int at = static_cast<int>(threadIdx.x) + i * kThreads;
        const int row = at / (kColumns / kPiece), column = at % (kColumns / kPiece) * kPiece;
        const int64_t token = token0 + row, first = token * p.K + column0 + column, valid = p.K - column0 - column;
        char *const piece = shared + row * kRow + column * 2;
        if (token >= p.M || valid <= 0)
            continue;
        if (mask.active)
            drop_piece(piece, mask, first);
        store_piece(p.dx, first, piece, valid, wide.out);
    }
}

template <class T>
const char *launch_dx(const GroupBwdParams &p, void *stream) {
    const dim3 grid(static_cast<unsigned>(ceil_div(p.M, DxTile::kTokens)),
                    static_cast<unsigned>(ceil_div(p.K, DxTile::kColumns)));
    const Wide wide{false, p.r % kPiece == 0 && aligned(p.dyb, 16), p.K % kPiece == 0 && aligned(p.dx, 16), wide_A(p)};
    return NF4LORA_LAUNCH(dx_kernel<T>, grid, kThreads, DxTile::kShared, stream, p, wide);
}

// ---- which tile

typedef ProjectionTile<16> Low;
typedef ProjectionTile<64> Middle;
typedef ProjectionTile<256> High;
typedef GradientTile<16, 256, 64> LowSlab;
typedef GradientTile<32, 256, 64> LowerSlab;
typedef GradientTile<64, 256, 64> MiddleSlab;
typedef GradientTile<256, 128, 32> HighSlab;

template <class T>
const char *forward(const GroupFwdParams &p, void *stream) {
    if (p.r <= Low::kRanks)
        return launch_projection<T, Low, ForwardProjection<Low>>(p, stream);
    if (p.r <= Middle::kRanks)
        return launch_projection<T, Middle, ForwardProjection<Middle>>(p, stream);
    return launch_projection<T, High, ForwardProjection<High>>(p, stream);
}

// dyb alone
template <class T>
const char *backward_projection(const GroupLoraBwdParams &p, void *stream) {
    const int64_t ranks = largest_rank(p);
    if (ranks <= Low::kRanks)
        return launch_projection<T, Low, BackwardProjection<Low>>(p, stream);
    if (ranks <= Middle::kRanks)
        return launch_projection<T, Middle, BackwardProjection<Middle>>(p, stream);
    return launch_projection<T, High, BackwardProjection<High>>(p, stream);
}

// dyb and dB
template <class T>
const char *backward_dy(const GroupLoraBwdParams &p, void *stream) {
    const int64_t ranks = largest_rank(p);
    if (ranks <= LowSlab::kRanks)
        return launch_gradient<T, LowSlab, DyPass>(p, stream);
    if (ranks <= LowerSlab::kRanks)
        return launch_gradient<T, LowerSlab, DyPass>(p, stream);
    if (const char *error = backward_projection<T>(p, stream))
        return error;
    return ranks <= MiddleSlab::kRanks ? launch_gradient<T, MiddleSlab, BGradient>(p, stream)
                                       : launch_gradient<T, HighSlab, BGradient>(p, stream);
}

template <class T>
const char *backward(const GroupLoraBwdParams &p, void *stream) {
    const char *error = p.member[0].dB ? backward_dy<T>(p, stream) : backward_projection<T>(p, stream);
    if (error || !p.member[0].dA)
        return error;
    if (p.r <= LowSlab::kRanks)
        return launch_gradient<T, LowSlab, AGradient>(p, stream);
    return p.r <= MiddleSlab::kRanks ? launch_gradient<T, MiddleSlab, AGradient>(p, stream)
                                     : launch_gradient<T, HighSlab, AGradient>(p, stream);
}

int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace

const char *lora_fwd(const GroupFwdParams &p, void *stream) {
    if (p.x_dtype == kFloat32)
        return plain_forward(p, stream);
    return p.x_dtype == kBFloat16 ? forward<__nv_bfloat16>(p, stream) : forward<__half>(p, stream);
}

int64_t lora_fwd_workspace(const GroupFwdParams &p) {
    if (p.x_dtype == kFloat32)
        return 0;
    return p.r <= Low::kRanks      ? projection_workspace<Low, ForwardProjection<Low>>(p)
           : p.r <= Middle::kRanks ? projection_workspace<Middle, ForwardProjection<Middle>>(p)
                                   : projection_workspace<High, ForwardProjection<High>>(p);
}

const char *lora_bwd(const GroupLoraBwdParams &p, void *stream) {
    if (p.dtype == kFloat32)
        return plain_backward(p, stream);
    return p.dtype == kBFloat16 ? backward<__nv_bfloat16>(p, stream) : backward<__half>(p, stream);
}

// The launches run one after another, so that they can share what the largest wants.
int64_t lora_bwd_workspace(const GroupLoraBwdParams &p) {
    if (p.dtype == kFloat32)
        return 0;
    const int64_t ranks = largest_rank(p);
    const int64_t dyb = ranks <= Low::kRanks      ? projection_workspace<Low, BackwardProjection<Low>>(p)
                        : ranks <= Middle::kRanks ? projection_workspace<Middle, BackwardProjection<Middle>>(p)
                                                  : projection_workspace<High, BackwardProjection<High>>(p);
    const int64_t dB = ranks <= LowSlab::kRanks      ? gradient_workspace<LowSlab, DyPass>(p)
                       : ranks <= LowerSlab::kRanks  ? gradient_workspace<LowerSlab, DyPass>(p)
                       : ranks <= MiddleSlab::kRanks ? gradient_workspace<MiddleSlab, BGradient>(p)
                                                     : gradient_workspace<HighSlab, BGradient>(p);
    const int64_t dA = p.r <= LowSlab::kRanks      ? gradient_workspace<LowSlab, AGradient>(p)
                       : p.r <= MiddleSlab::kRanks ? gradient_workspace<MiddleSlab, AGradient>(p)
                                                   : gradient_workspace<HighSlab, AGradient>(p);
    return larger(dyb, larger(dB, dA));
}

const char *lora_dx(const GroupBwdParams &p, void *stream) {
    if (p.dy_dtype == kFloat32)
        return launch_product<DxProduct>(p, p.M, p.K, 1, stream);
    return p.dy_dtype == kBFloat16 ? launch_dx<__nv_bfloat16>(p, stream) : launch_dx<__half>(p, stream);
}

}  // namespace nf4lora
