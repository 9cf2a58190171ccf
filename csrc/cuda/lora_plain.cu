// The products of the adapters in fp32 (any dtype would do): xa, dyb, dB, dA and dx, which tensor cores do not take
// Operands:      as params.h says, any shape and alignment
// Rounding:      fp32 sums of at most 64 terms, added in order; each result rounded once
// Memory:        64 x 64 results a block, operands through 8 KiB of shared memory; x and dy are read once for each
//                product and 64 ranks, x_ext and dy_ext are made by a copy of their own
#include "lora.cuh"

namespace nf4lora {
namespace {

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
__global__ void __launch_bounds__(kThreads) extend_x_kernel(const __grid_constant__ GroupFwdParams p) {
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

// dy_ext from the members' dy and the finished dyb.
__global__ void __launch_bounds__(kThreads) extend_dy_kernel(const __grid_constant__ GroupLoraBwdParams p) {
    for (int64_t token = blockIdx.x; token < p.M; token += gridDim.x)
#pragma unroll 1
        for (int64_t column = threadIdx.x; column < p.ld; column += kThreads) {
            const Place place = place_of(p, column);
            const Member &of = p.member[place.member];
            float v = 0.0f;
            if (column < p.N)
                v = load_element(of.dy, p.dtype, token * of.ld_dy + column - place.row0);
            else if (column < p.N + p.r)
                v = load_element(p.dyb, p.dtype, token * p.r + column - p.N);
            store_element(p.dy_ext, p.dtype, token * p.ld + column, v);
        }
}

// dyb_i = scaling_i * dy_i B_i
struct DybProduct {
    static constexpr bool kDeepA = true, kDeepB = false;
    const GroupLoraBwdParams &p;
    const Member &member;
    const int64_t rank0, rows, columns, depth;

    NF4LORA_DEVICE DybProduct(const GroupLoraBwdParams &p_, int i)
        : p(p_), member(p_.member[i]), rank0(first_rank(p_, i)), rows(p_.M), columns(member.r), depth(member.w.rows) {}
    NF4LORA_DEVICE float a(int64_t token, int64_t n) const {
        return load_element(member.dy, p.dtype, token * member.ld_dy + n);
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
    const int64_t rank0, rows, columns, depth;

    NF4LORA_DEVICE BGradientProduct(const GroupLoraBwdParams &p_, int i)
        : p(p_), member(p_.member[i]), rank0(first_rank(p_, i)), rows(member.w.rows), columns(member.r), depth(p_.M) {}
    NF4LORA_DEVICE float a(int64_t n, int64_t token) const {
        return load_element(member.dy, p.dtype, token * member.ld_dy + n);
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

constexpr int32_t kMostBlocks = 1 << 16;  // of a copy

}  // namespace

const char *plain_xa(const GroupFwdParams &p, void *stream) {
    const char *error = launch_product<XaProduct>(p, p.M, most_ranks(p), p.count, stream);
    if (error || !p.x_ext)
        return error;
    return NF4LORA_LAUNCH(extend_x_kernel, grid_of(kMostBlocks, p.M), kThreads, 0, stream, p);
}

const char *plain_lora_bwd(const GroupLoraBwdParams &p, void *stream) {
    const int64_t ranks = most_ranks(p);
    const char *error = launch_product<DybProduct>(p, p.M, ranks, p.count, stream);
    if (!error && p.member[0].dB)
        error = launch_product<BGradientProduct>(p, most_rows(p), ranks, p.count, stream);
    if (!error && p.member[0].dA)
        error = launch_product<AGradientProduct>(p, ranks, p.K, p.count, stream);
    if (error || !p.dy_ext || p.M == 0)
        return error;
    return NF4LORA_LAUNCH(extend_dy_kernel, grid_of(kMostBlocks, p.M), kThreads, 0, stream, p);
}

const char *plain_dx(const GroupBwdParams &p, void *stream) {
    return launch_product<DxProduct>(p, p.M, p.K, 1, stream);
}

}  // namespace nf4lora
