// Projections onto the ranks on tensor cores: xa = dropout(x) A^T, and dyb = scaling * dy B where no dB comes with it
// Operands:      as params.h says, any K, N, M, ranks and alignment; 16-byte copies where x or dy allow them
// Rounding:      to x's dtype, once; A and B are rounded to it where they enter a product; sums in fp32. The mask
//                zeroes elements exactly, the factor 1 / (1 - p) multiplies the sum
// Memory:        x is read once while the group has at most 256 ranks, a member's dy while it has; x_ext and dy_ext are
//                written from the same tiles. Sums split over blocks go through the workspace and are added in order by
//                the block that comes last: the same bits every run. At most 99 KiB shared
// Budget:        the bytes of x or dy; with dropout Philox, 22 instructions an element
#include "lora.cuh"

namespace nf4lora {
namespace {

constexpr int kDepth = 64;              // of the reduction a step takes
constexpr int kStages = 3;              // tiles of x or dy on their way or in use
constexpr int64_t kLeastSteps = 4;      // of a part of a split reduction
constexpr int64_t kEnoughBlocks = 264;  // from which on it is not split

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
    const int of = 0;  // whose bit of Wideness
    const void *const source;

    NF4LORA_DEVICE ForwardProjection(const GroupFwdParams &p_, int64_t chunk)
        : p(p_), mask(p_.dropout), extends(p_.x_ext && chunk == 0), rank0(chunk * Tile::kRanks), stride(p_.K),
          depth(p_.K), ranks(extent(p_.r - rank0, Tile::kRanks)), source(p_.x) {}

    NF4LORA_DEVICE int32_t factor_dtype() const { return p.A_dtype; }
    NF4LORA_DEVICE uint4 factor(int rank, int64_t k, bool wide) const {
        return load_quad_of_A(p, rank0 + rank, k, rank < ranks ? p.K - k : 0, wide);
    }
    NF4LORA_DEVICE void pass_on(int64_t token, int64_t k, uint4 piece, int64_t valid, bool wide) const {
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
        const int zeros = extends ? static_cast<int>(p.ld - p.K - p.r) : 0;
        for (int i = static_cast<int>(threadIdx.x); i < rows * zeros; i += kThreads)
            static_cast<T *>(p.x_ext)[(token0 + i / zeros) * p.ld + p.K + p.r + i % zeros] = from_float<T>(0.0f);
    }

    static int64_t chunks(const GroupFwdParams &p) { return p.r > 0 ? ceil_div(p.r, Tile::kRanks) : 1; }
    static int64_t deepest(const GroupFwdParams &p) { return p.K; }
    static Wideness wide(const GroupFwdParams &p) {
        return {wide_rows(p.x, p.K), wide_rows(p.x_ext, p.ld), false, wide_A(p)};
    }
};

// A member's dy onto the columns of its B, chunks of kRanks at a time.
template <class Tile>
struct BackwardProjection {
    typedef GroupLoraBwdParams Params;
    static constexpr bool kRankRows = false;  // B is [N][rank]
    static constexpr int kFactorBytes = kDepth * kPitch<Tile::kRanks>;
    static constexpr size_t kShared = kStages * Tile::kSourceBytes + 2 * kFactorBytes;

    const GroupLoraBwdParams &p;
    const DropoutMask mask;  // none
    const PartPlace place;
    const Member &member;
    const bool extends;  // whether this chunk's blocks write the member's columns of dy_ext
    const int64_t stride, depth;
    const int rank0, ranks;
    const int of;
    const void *const source;

    NF4LORA_DEVICE BackwardProjection(const GroupLoraBwdParams &p_, int64_t chunk)
        : p(p_), mask(Dropout{nullptr, 0.0f}), place(place_of_part(p_, chunk, false, Tile::kRanks)),
          member(p_.member[place.member]), extends(p_.dy_ext && place.part == 0), stride(member.ld_dy),
          depth(member.w.rows), rank0(static_cast<int>(place.part) * Tile::kRanks),
          ranks(extent(member.r - rank0, Tile::kRanks)), of(place.member), source(member.dy) {}

    NF4LORA_DEVICE int32_t factor_dtype() const { return p.B_dtype; }
    NF4LORA_DEVICE uint4 factor(int rank, int64_t n, bool wide) const {
        return load_quad(member.lora_B, p.B_dtype, n * member.r + rank0 + rank, n < depth ? ranks - rank : 0, wide);
    }
    NF4LORA_DEVICE void pass_on(int64_t token, int64_t n, uint4 piece, int64_t valid, bool wide) const {
        store_piece(p.dy_ext, token * p.ld + place.row0 + n, piece, valid, wide);
    }
    template <class T>
    NF4LORA_DEVICE void store(int64_t token, int rank, float v) const {
        store_dyb<T>(p, token, place.rank0 + rank0 + rank, __fmul_rn(v, member.scaling));
    }
    template <class T>
    NF4LORA_DEVICE void finish(int64_t token0, int rows) const {
        if (extends && of + 1 == p.count)
            store_zeros_beyond_dyb<T>(p, token0, rows);
    }

    static int64_t chunks(const GroupLoraBwdParams &p) { return parts_of(p, false, Tile::kRanks); }
    static int64_t deepest(const GroupLoraBwdParams &p) { return most_rows(p); }
    static Wideness wide(const GroupLoraBwdParams &p) { return {wide_dy(p), wide_dy_ext(p), false, wide_B(p)}; }
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
    return {tiles, chunks, parts < 1 || blocks > kCounters ? 1 : parts};
}

// Grid: as ProjectionGrid has it. Partial sums: [tile][chunk][part][token][rank] of whole tiles.
template <class T, class Tile, class Projection>
__global__ void __launch_bounds__(kThreads, Tile::kBlocks) projection_kernel(
    const __grid_constant__ typename Projection::Params p, float *partial, Wideness wide) {
    constexpr int kRanks = Tile::kRanks, kTokens = Tile::kTokens, kRow = kPitch<kDepth>;
    constexpr bool kRankRows = Projection::kRankRows;
    constexpr int kFactorRow = kRankRows ? kPitch<kDepth> : kPitch<kRanks>;
    NF4LORA_SHARED(char, shared);
    char *const source_tiles = shared, *const factor_tiles = shared + kStages * Tile::kSourceBytes;
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    const int warp_token = warp % Tile::kTokenWarps * 16, warp_rank = warp / Tile::kTokenWarps * Tile::kWarpRanks;
    const Projection job(p, blockIdx.y);
    const bool wide_source = wide.source >> job.of & 1, wide_out = wide.out >> job.of & 1;
    const int64_t token0 = int64_t{blockIdx.x} * kTokens, all_steps = (job.depth + kDepth - 1) / kDepth;
    const int64_t begin = all_steps * blockIdx.z / gridDim.z, steps = all_steps * (blockIdx.z + 1) / gridDim.z - begin;

    // A thread's pieces are its own until the barrier: what it has copied it passes on, and masks.
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
            load_piece(piece, job.source, token * job.stride + k, valid, wide_source);
        });
    };
    const auto finish_source = [&](int64_t step) {
        if (!job.extends && !job.mask.active)
            return;
        each_piece(step, [&](char *piece, int64_t token, int64_t k, int64_t valid) {
            if (valid <= 0)
                return;
            uint4 &v = *reinterpret_cast<uint4 *>(piece);
            if (job.extends)
                job.pass_on(token, k, v, valid, wide_out);
            if (job.mask.active)
                v = keep_piece(v, kept_of_piece(job.mask, token * job.stride + k));
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
        if (!comes_last(p.counters + slot, gridDim.z, reinterpret_cast<uint32_t *>(shared)))
            return;
        for (int i = static_cast<int>(threadIdx.x); i < rows * kRanks; i += kThreads)
            if (i % kRanks < job.ranks)
                job.template store<T>(token0 + i / kRanks, i % kRanks, sum_of_parts(parts + i, kPart, gridDim.z));
    }
    job.template finish<T>(token0, rows);
}

template <class Tile, class Projection>
int64_t projection_workspace(const typename Projection::Params &p) {
    const ProjectionGrid grid = projection_grid<Tile, Projection>(p);
    return grid.parts > 1 ? 4 * grid.slots() * grid.parts * (Tile::kTokens * Tile::kRanks) : 0;
}

template <class T, class Tile, class Projection>
const char *launch_projection(const typename Projection::Params &p, void *stream) {
    const ProjectionGrid grid = projection_grid<Tile, Projection>(p);
    if (grid.slots() == 0)
        return nullptr;
    const dim3 blocks(static_cast<unsigned>(grid.tiles), static_cast<unsigned>(grid.chunks),
                      static_cast<unsigned>(grid.parts));
    return NF4LORA_LAUNCH((projection_kernel<T, Tile, Projection>), blocks, kThreads, Projection::kShared, stream, p,
                          static_cast<float *>(p.workspace), Projection::wide(p));
}

// ---- which tile

typedef ProjectionTile<16> Low;
typedef ProjectionTile<64> Middle;
typedef ProjectionTile<256> High;

template <class T, template <class> class Projection, class Params>
const char *project(const Params &p, int64_t ranks, void *stream) {
    if (ranks <= Low::kRanks)
        return launch_projection<T, Low, Projection<Low>>(p, stream);
    if (ranks <= Middle::kRanks)
        return launch_projection<T, Middle, Projection<Middle>>(p, stream);
    return launch_projection<T, High, Projection<High>>(p, stream);
}

template <template <class> class Projection, class Params>
int64_t workspace(const Params &p, int64_t ranks) {
    return ranks <= Low::kRanks      ? projection_workspace<Low, Projection<Low>>(p)
           : ranks <= Middle::kRanks ? projection_workspace<Middle, Projection<Middle>>(p)
                                     : projection_workspace<High, Projection<High>>(p);
}

}  // namespace

const char *lora_xa(const GroupFwdParams &p, void *stream) {
    return p.x_dtype == kBFloat16 ? project<__nv_bfloat16, ForwardProjection>(p, p.r, stream)
                                  : project<__half, ForwardProjection>(p, p.r, stream);
}

int64_t lora_xa_workspace(const GroupFwdParams &p) { return workspace<ForwardProjection>(p, p.r); }

const char *lora_dyb(const GroupLoraBwdParams &p, void *stream) {
    const int64_t ranks = most_ranks(p);
    return p.dtype == kBFloat16 ? project<__nv_bfloat16, BackwardProjection>(p, ranks, stream)
                                : project<__half, BackwardProjection>(p, ranks, stream);
}

int64_t lora_dyb_workspace(const GroupLoraBwdParams &p) { return workspace<BackwardProjection>(p, most_ranks(p)); }

}  // namespace nf4lora
