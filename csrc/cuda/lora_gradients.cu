// dB = scaling * dy^T xa with dyb = scaling * dy B and dy_ext from the same dy;  dA = dyb^T dropout(x) with
// dx = mask * (dyb A) from the same dyb and mask. Sums over the tokens, on tensor cores
// Operands:      as params.h says, any K, N, M, ranks and alignment; 16-byte copies where x or a member's dy allow them
// Rounding:      dyb once to x's dtype, the rounded goes on; A and B are rounded to it where they enter a product; sums
//                in fp32; each result once. The mask zeroes elements exactly, the factor 1 / (1 - p) multiplies the sum
// Memory:        dy is read once for dyb, dB and dy_ext while no member has more than 64 ranks (with more, dyb and
//                dy_ext are lora_projections.cu's), x once while the group has at most 256; dx comes with dA up to 64
//                ranks. Sums split over blocks go through the workspace and are added in order by the block that comes
//                last: the same bits every run. At most 99 KiB shared
// Budget:        the bytes of x, dy and what is written; with dropout Philox, 22 instructions an element, once
#include "lora.cuh"

namespace nf4lora {
namespace {

// A tile of the result: a slab of columns of dy or x by ranks, each warp 32 columns by kWarpRanks; kTokens a step.
template <int kRanks_, int kSlab_, int kTokens_>
struct GradientTile {
    static constexpr int kRanks = kRanks_, kSlab = kSlab_, kTokens = kTokens_, kStages = 2;
    static constexpr int kBlocks = kRanks <= 32 ? 2 : 1;  // at least, on a multiprocessor
    static constexpr int kSlabWarps = kSlab / 32, kWarpRanks = kRanks * kSlabWarps / kWarps;
    static constexpr int kPieces = kTokens * (kSlab / kPiece) / kThreads;  // a thread's in a step
    static constexpr int kSourceBytes = kTokens * kPitch<kSlab>, kSideBytes = kTokens * kPitch<kRanks>;
    static constexpr size_t kShared = kStages * (kSourceBytes + kSideBytes);
};

// dB of a member, from its dy and its columns of xa; and dyb and dy_ext from the same tiles of dy where it projects as
// well: up to 64 ranks, as more would move more partial sums of dyb than a second reading of dy costs.
template <class Tile, bool kProjects_>
struct DyGradient {
    static constexpr bool kRankRows = false;  // of dB: it is [N][rank]
    static constexpr bool kProjects = kProjects_, kMakesDx = false;
    static constexpr int kFactorBytes = kProjects ? Tile::kSlab * kPitch<Tile::kRanks> : 0;  // the slab's rows of B
    static constexpr size_t kShared = Tile::kShared + kFactorBytes + (kProjects ? sizeof(uint4) : 0);  // two words
    const GroupLoraBwdParams &p;
    const DropoutMask mask;  // none
    const PartPlace place;
    const Member &member;
    const bool extends;  // whether its blocks write the member's columns of dy_ext
    const int64_t column0, stride, rank0;
    const int columns, ranks;
    const int of;  // whose bit of Wideness
    const void *const source, *const side;

    NF4LORA_DEVICE DyGradient(const GroupLoraBwdParams &p_, int64_t slab, int64_t chunk)
        : p(p_), mask(Dropout{nullptr, 0.0f}), place(place_of_part(p_, slab, true, Tile::kSlab)),
          member(p_.member[place.member]), extends(kProjects && p_.dy_ext), column0(place.part * Tile::kSlab),
          stride(member.ld_dy), rank0(chunk * Tile::kRanks), columns(extent(member.w.rows - column0, Tile::kSlab)),
          ranks(extent(member.r - rank0, Tile::kRanks)), of(place.member),
          source(static_cast<const uint16_t *>(member.dy) + column0),
          side(static_cast<const uint16_t *>(p_.xa) + place.rank0 + rank0) {}
    NF4LORA_DEVICE bool idle() const { return ranks == 0 && !extends; }
    NF4LORA_DEVICE void store(int column, int rank, float v) const {
        store_element(member.dB, p.B_dtype, (column0 + column) * member.r + rank0 + rank, __fmul_rn(v, member.scaling));
    }
    NF4LORA_DEVICE void pass_on(int64_t token, int column, uint4 piece, int64_t valid, bool wide) const {
        store_piece(p.dy_ext, token * p.ld + place.row0 + column0 + column, piece, valid, wide);
    }
    NF4LORA_DEVICE unsigned slabs_of_member() const {
        return static_cast<unsigned>(parts_of_member(member, true, Tile::kSlab));
    }
    NF4LORA_DEVICE uint4 factor(int column, int rank, bool wide) const {
        return load_quad(member.lora_B, p.B_dtype, (column0 + column) * member.r + rank,
                         column < columns ? ranks - rank : 0, wide);
    }
    template <class T>
    NF4LORA_DEVICE void store_projected(int64_t token, int rank, float v) const {
        if (rank < ranks)
            store_dyb<T>(p, token, place.rank0 + rank, __fmul_rn(v, member.scaling));
    }
    template <class T>
    NF4LORA_DEVICE void finish_tokens(int64_t token0, int rows) const {
        if (extends && of + 1 == p.count)
            store_zeros_beyond_dyb<T>(p, token0, rows);
    }

    static int64_t slabs(const GroupLoraBwdParams &p) { return parts_of(p, true, Tile::kSlab); }
    static int64_t chunks(const GroupLoraBwdParams &p) {
        return kProjects ? 1 : ceil_div(most_ranks(p), Tile::kRanks);
    }
    static Wideness wide(const GroupLoraBwdParams &p) {
        return {wide_dy(p), wide_dy_ext(p), wide_ranks(p, p.xa), kProjects && wide_B(p)};
    }
};

template <class Tile>
using BGradient = DyGradient<Tile, false>;
template <class Tile>
using DyPass = DyGradient<Tile, true>;

// Of all members: the columns of x, the columns of dyb; and dx where it is made as well.
template <class Tile, bool kMakesDx_>
struct XGradient {
    static constexpr bool kRankRows = true;
    static constexpr bool kProjects = false, kMakesDx = kMakesDx_;
    static constexpr bool extends = false;
    static constexpr size_t kShared = Tile::kShared;
    const GroupLoraBwdParams &p;
    const DropoutMask mask;
    const int64_t column0, stride, rank0;
    const int columns, ranks;
    const int of = 0;
    const void *const source, *const side;

    NF4LORA_DEVICE XGradient(const GroupLoraBwdParams &p_, int64_t slab, int64_t chunk)
        : p(p_), mask(p_.dropout), column0(slab * Tile::kSlab), stride(p_.K), rank0(chunk * Tile::kRanks),
          columns(extent(p_.K - column0, Tile::kSlab)), ranks(extent(p_.r - rank0, Tile::kRanks)),
          source(static_cast<const uint16_t *>(p_.x) + column0), side(static_cast<const uint16_t *>(p_.dyb) + rank0) {}
    NF4LORA_DEVICE bool idle() const { return ranks == 0; }
    NF4LORA_DEVICE void store(int column, int rank, float v) const {
        const RankPlace place = place_of_rank(p, rank0 + rank);
        store_element(p.member[place.member].dA, p.A_dtype, (rank0 + rank - place.first) * p.K + column0 + column,
                      __fmul_rn(v, mask.scale));
    }
    NF4LORA_DEVICE uint4 factor(int rank, int column, bool wide) const {
        return load_quad_of_A(p, rank, column0 + column, rank < ranks ? columns - column : 0, wide);
    }
    NF4LORA_DEVICE void store_dx(int64_t token, int column, uint4 piece, int64_t valid, bool wide) const {
        store_piece(p.dx, token * p.K + column0 + column, piece, valid, wide);
    }

    static int64_t slabs(const GroupLoraBwdParams &p) { return ceil_div(p.K, Tile::kSlab); }
    static int64_t chunks(const GroupLoraBwdParams &p) { return ceil_div(p.r, Tile::kRanks); }
    static Wideness wide(const GroupLoraBwdParams &p) {
        return {wide_rows(p.x, p.K), wide_rows(p.dx, p.K), wide_ranks(p, p.dyb), kMakesDx && wide_A(p)};
    }
};

template <class Tile>
using AGradient = XGradient<Tile, false>;
template <class Tile>
using XPass = XGradient<Tile, true>;

struct GradientGrid {
    int64_t slabs, parts, chunks;  // of the columns, of the tokens, of the ranks
    int64_t slots() const { return slabs * chunks; }
};

// p.split is meant for slabs of 128 columns of dy: as many blocks, whatever the slabs are here.
template <class Tile, class Gradient>
GradientGrid gradient_grid(const GroupLoraBwdParams &p) {
    constexpr int64_t kSplitSlab = 128, kLeastSteps = 2;
    const int64_t slabs = Gradient::slabs(p), chunks = Gradient::chunks(p), steps = ceil_div(p.M, Tile::kTokens);
    const int64_t most = ceil_div(steps, kLeastSteps), blocks = p.split * ceil_div(p.N, kSplitSlab);
    const int64_t wanted = slabs > 0 ? ceil_div(blocks, slabs) : 1, parts = wanted < most ? wanted : most;
    const int64_t of_dyb = Gradient::kProjects ? p.count * steps : 0;
    return {slabs, parts < 1 || slabs * chunks + of_dyb > kCounters ? 1 : parts, chunks};
}

// Where split sums meet: partial sums, and counters.
struct Meeting {
    float *partial;
    uint32_t *counters;
};

// Grid: as GradientGrid has it. Partial sums of the gradient: [slab][chunk][part] of whole tiles, which lie as it does;
// of dyb: [slab][token][rank], with counters [member][token tile].
template <class T, class Tile, class Gradient>
__global__ void __launch_bounds__(kThreads, Tile::kBlocks) gradient_kernel(
    const __grid_constant__ GroupLoraBwdParams p, Meeting gradient, Meeting dyb, Wideness wide) {
    constexpr int kRanks = Tile::kRanks, kSlab = Tile::kSlab, kTokens = Tile::kTokens, kStages = Tile::kStages;
    constexpr int kSourceRow = kPitch<kSlab>, kSideRow = kPitch<kRanks>;
    NF4LORA_SHARED(char, shared);
    char *const source_tiles = shared, *const side_tiles = shared + kStages * Tile::kSourceBytes;
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    const int warp_column = warp % Tile::kSlabWarps * 32, warp_rank = warp / Tile::kSlabWarps * Tile::kWarpRanks;
    const Gradient job(p, blockIdx.x, blockIdx.z);
    if (job.idle())
        return;
    const bool wide_source = wide.source >> job.of & 1, wide_out = wide.out >> job.of & 1;
    const int64_t all_steps = (p.M + kTokens - 1) / kTokens;
    const int64_t begin = all_steps * blockIdx.y / gridDim.y, steps = all_steps * (blockIdx.y + 1) / gridDim.y - begin;

    // A thread's pieces are its own from their copy to the barrier, and from one barrier to the next copy.
    const auto each_piece = [&](int64_t step, auto visit) {
        char *const tile = source_tiles + step % kStages * Tile::kSourceBytes;
#pragma unroll
        for (int i = 0; i < Tile::kPieces; ++i) {
            const int at = static_cast<int>(threadIdx.x) + i * kThreads;
            const int row = at / (kSlab / kPiece), column = at % (kSlab / kPiece) * kPiece;
            const int64_t token = (begin + step) * kTokens + row;
            visit(i, tile + row * kSourceRow + column * 2, token, column, token < p.M ? job.columns - column : 0);
        }
    };
    const auto load = [&](int64_t step) {
        each_piece(step, [&](int, char *piece, int64_t token, int column, int64_t valid) {
            load_piece(piece, job.source, token * job.stride + column, valid, wide_source);
        });
        char *const tile = side_tiles + step % kStages * Tile::kSideBytes;
        for (int at = static_cast<int>(threadIdx.x); at < kTokens * (kRanks / kPiece); at += kThreads) {
            const int row = at / (kRanks / kPiece), rank = at % (kRanks / kPiece) * kPiece;
            const int64_t token = (begin + step) * kTokens + row;
            load_piece(tile + row * kSideRow + rank * 2, job.side, token * p.r + rank,
                       token < p.M ? job.ranks - rank : 0, wide.side);
        }
    };

    // What was kept of the thread's pieces, a byte each: of this step, and of the one before, whose dx waits for it.
    constexpr int kKeptWords = (Tile::kPieces + 3) / 4;
    uint32_t kept[kKeptWords] = {}, kept_before[kKeptWords] = {};
    const auto finish_source = [&](int64_t step) {
        if (!job.extends && !job.mask.active)
            return;
        each_piece(step, [&](int i, char *piece, int64_t token, int column, int64_t valid) {
            if (valid <= 0)
                return;
            uint4 &v = *reinterpret_cast<uint4 *>(piece);
            if constexpr (Gradient::kProjects)
                if (job.extends)
                    job.pass_on(token, column, v, valid, wide_out);
            if (job.mask.active) {
                const uint32_t of_piece = kept_of_piece(job.mask, token * job.stride + job.column0 + column);
                v = keep_piece(v, of_piece);
                if constexpr (Gradient::kMakesDx)
                    kept[i / 4] |= (of_piece & 0xff) << i % 4 * 8;
            }
        });
    };

    // dyb of a step's tokens: complete where the slab is the whole member, else a part that meets those of the others.
    char *const factor_tile = side_tiles + kStages * Tile::kSideBytes;
    const auto load_factor_of_dyb = [&] {
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
            const int64_t token0 = (begin + step) * kTokens;
            const int rows = extent(p.M - token0, kTokens);
            const bool complete = job.slabs_of_member() == 1;
            float *const part = dyb.partial + (blockIdx.x * p.M + token0) * kRanks;  // of this slab
#pragma unroll
            for (int j = 0; j < kMine / 8; ++j)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int row = my_token + lane / 4 + 8 * half, rank = my_rank + 8 * j + lane % 4 * 2;
                    const float2 pair = make_float2(projected[j][2 * half], projected[j][2 * half + 1]);
                    if (row >= rows)
                        continue;
                    if (complete) {
                        job.template store_projected<T>(token0 + row, rank, pair.x);
                        job.template store_projected<T>(token0 + row, rank + 1, pair.y);
                    } else {
                        *reinterpret_cast<float2 *>(part + row * kRanks + rank) = pair;
                    }
                }
            if (complete)
                job.template finish_tokens<T>(token0, rows);
        }
    };

    // The parts of dyb meet in the shadow of the loop, whose barriers serve: after the one that begins a step, a thread
    // counts the step before, and all know whether this slab came last with the one before that.
    const auto meet = [&](int64_t step) {
        if constexpr (Gradient::kProjects) {
            const unsigned slabs = job.slabs_of_member();
            if (slabs == 1)
                return;
            uint32_t *const arrived_before = reinterpret_cast<uint32_t *>(factor_tile + Gradient::kFactorBytes);
            const int64_t summed = step - 2, counted = step - 1;
            if (summed >= 0 && arrived_before[summed % 2] + 1 == slabs) {
                const int64_t token0 = (begin + summed) * kTokens;
                const int rows = extent(p.M - token0, kTokens);
                const float *const first = dyb.partial + ((blockIdx.x - job.place.part) * p.M + token0) * kRanks;
                for (int i = static_cast<int>(threadIdx.x) * 4; i < rows * kRanks; i += kThreads * 4) {
                    if (i % kRanks >= job.ranks)
                        continue;
                    const float4 sum = sum_of_quads<8 / Tile::kBlocks>(first + i, p.M * kRanks, slabs);
                    job.template store_projected<T>(token0 + i / kRanks, i % kRanks, sum.x);
                    job.template store_projected<T>(token0 + i / kRanks, i % kRanks + 1, sum.y);
                    job.template store_projected<T>(token0 + i / kRanks, i % kRanks + 2, sum.z);
                    job.template store_projected<T>(token0 + i / kRanks, i % kRanks + 3, sum.w);
                }
                job.template finish_tokens<T>(token0, rows);
            }
            if (threadIdx.x == 0 && counted >= 0 && counted < steps)
                arrived_before[counted % 2] =
                    atomic_inc_acq_rel(dyb.counters + job.of * all_steps + begin + counted, slabs - 1);
        }
    };

    // dx of 16 tokens takes the place of their x, whose columns this warp alone reads, and leaves in the next step. A's
    // ranks of those columns stay in registers.
    constexpr int kDxRanks = Gradient::kMakesDx ? kRanks / 16 : 1;
    uint32_t factor_of_dx[kDxRanks][4][2];
    const auto load_factor_of_dx = [&] {
        if constexpr (Gradient::kMakesDx) {
            static_assert(Tile::kSlabWarps == kWarps && kRanks <= kTokens && kStages == 2,
                          "A passes through the second stage");
            char *const tile = source_tiles + Tile::kSourceBytes;
#pragma unroll 4
            for (int at = static_cast<int>(threadIdx.x); at < kRanks * (kSlab / 4); at += kThreads) {
                const int rank = at / (kSlab / 4), column = at % (kSlab / 4) * 4;
                *reinterpret_cast<uint2 *>(tile + rank * kSourceRow + column * 2) =
                    round_quad<T>(job.factor(rank, column, wide.factor), p.A_dtype);
            }
            __syncthreads();
#pragma unroll
            for (int k = 0; k < kDxRanks; ++k)
#pragma unroll
                for (int j = 0; j < 4; j += 2) {
                    uint32_t b[4];
                    const int column = warp_column + 8 * j + lane / 16 * 8;
                    ldmatrix_x4_trans(b, tile + (16 * k + lane % 16) * kSourceRow + column * 2);
                    factor_of_dx[k][j][0] = b[0], factor_of_dx[k][j][1] = b[1];
                    factor_of_dx[k][j + 1][0] = b[2], factor_of_dx[k][j + 1][1] = b[3];
                }
        }
    };
    const auto make_dx = [&](char *source, const char *side, int token) {
        if constexpr (Gradient::kMakesDx) {
            float dx[4][4] = {};
#pragma unroll
            for (int k = 0; k < kDxRanks; ++k) {
                if (16 * k >= job.ranks)
                    break;
                uint32_t a[4];
                ldmatrix_x4(a, side + (token + lane % 16) * kSideRow + (16 * k + lane / 16 * 8) * 2);
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    mma_m16n8k16<T>(dx[j], a, factor_of_dx[k][j]);
            }
            __syncwarp();  // all have read their x
#pragma unroll
            for (int j = 0; j < 4; ++j)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int row = token + lane / 4 + 8 * half, column = warp_column + 8 * j + lane % 4 * 2;
                    *reinterpret_cast<uint32_t *>(source + row * kSourceRow + column * 2) = round_pair<T>(
                        __fmul_rn(dx[j][2 * half], job.mask.scale), __fmul_rn(dx[j][2 * half + 1], job.mask.scale));
                }
        }
    };
    const auto store_dx = [&](int64_t step) {  // after the barrier that follows the step
        if constexpr (Gradient::kMakesDx) {
            if (step >= 0)
                each_piece(step, [&](int i, char *piece, int64_t token, int column, int64_t valid) {
                    if (valid <= 0)
                        return;
                    uint4 v = *reinterpret_cast<const uint4 *>(piece);
                    if (job.mask.active)
                        v = keep_piece(v, kept_before[i / 4] >> i % 4 * 8);
                    job.store_dx(token, column, v, valid, wide_out);
                });
#pragma unroll
            for (int i = 0; i < kKeptWords; ++i)
                kept_before[i] = kept[i], kept[i] = 0;
        }
    };

    load_factor_of_dyb();
#pragma unroll
    for (int stage = 0; stage < kStages - 1; ++stage) {
        if (stage < steps)
            load(stage);
        cp_async_commit();
    }
    load_factor_of_dx();
    float sum[2][Tile::kWarpRanks / 8][4] = {};
    for (int64_t step = 0; step < steps; ++step) {
        cp_async_wait<kStages - 2>();
        finish_source(step);
        __syncthreads();  // this step's tiles are there, and all are done with those of the step before
        store_dx(step - 1);
        if (step + kStages - 1 < steps)
            load(step + kStages - 1);
        cp_async_commit();
        meet(step);
        char *const source = source_tiles + step % kStages * Tile::kSourceBytes;
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
            make_dx(source, side, token);
        }
        project(step, source);
    }
    if constexpr (Gradient::kMakesDx) {
        __syncthreads();
        store_dx(steps - 1);
    }
    if constexpr (Gradient::kProjects)
#pragma unroll 1
        for (int64_t step = steps; step < steps + 2; ++step) {
            __syncthreads();
            meet(step);
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

// What a launch takes: words of the workspace for the sums of the gradient and of dyb, and the counters of each.
struct GradientSpace {
    int64_t partials, counters, dyb_partials, dyb_counters;
};

template <class Tile, class Gradient>
GradientSpace gradient_space(const GroupLoraBwdParams &p, const GradientGrid &grid) {
    GradientSpace space{0, 0, 0, 0};
    if (grid.parts > 1)
        space = {grid.slots() * grid.parts * (Tile::kSlab * Tile::kRanks), grid.slots(), 0, 0};
    if (Gradient::kProjects && most_rows(p) > Tile::kSlab) {
        space.dyb_partials = grid.slabs * p.M * Tile::kRanks;
        space.dyb_counters = p.count * ceil_div(p.M, Tile::kTokens);
    }
    return space;
}

template <class Tile, template <class> class Gradient>
int64_t gradient_workspace(const GroupLoraBwdParams &p) {
    const GradientSpace space = gradient_space<Tile, Gradient<Tile>>(p, gradient_grid<Tile, Gradient<Tile>>(p));
    return 4 * (space.partials + space.dyb_partials);
}

template <class T, class Tile, template <class> class Gradient>
const char *launch_gradient(const GroupLoraBwdParams &p, void *stream) {
    const GradientGrid grid = gradient_grid<Tile, Gradient<Tile>>(p);
    if (grid.slots() == 0)
        return nullptr;
    const GradientSpace space = gradient_space<Tile, Gradient<Tile>>(p, grid);
    if (space.counters + space.dyb_counters > kCounters)
        return "M: more tokens than there are counters for";
    float *const sums = static_cast<float *>(p.workspace);
    const Meeting gradient{sums, p.counters}, dyb{sums + space.partials, p.counters + space.counters};
    const dim3 blocks(static_cast<unsigned>(grid.slabs), static_cast<unsigned>(grid.parts),
                      static_cast<unsigned>(grid.chunks));
    return NF4LORA_LAUNCH((gradient_kernel<T, Tile, Gradient<Tile>>), blocks, kThreads, Gradient<Tile>::kShared, stream,
                          p, gradient, dyb, Gradient<Tile>::wide(p));
}

// ---- which tile

typedef GradientTile<16, 256, 64> Low;
typedef GradientTile<32, 256, 64> Lower;
typedef GradientTile<64, 256, 64> Middle;
typedef GradientTile<64, 256, 32> MiddlePass;
typedef GradientTile<256, 128, 32> High;

template <class T>
const char *of_dy(const GroupLoraBwdParams &p, void *stream) {
    const int64_t ranks = most_ranks(p);
    if (ranks <= Low::kRanks)
        return launch_gradient<T, Low, DyPass>(p, stream);
    if (ranks <= Lower::kRanks)
        return launch_gradient<T, Lower, DyPass>(p, stream);
    return ranks <= MiddlePass::kRanks ? launch_gradient<T, MiddlePass, DyPass>(p, stream)
                                       : launch_gradient<T, High, BGradient>(p, stream);
}

template <class T>
const char *of_x(const GroupLoraBwdParams &p, void *stream) {
    if (lora_dA_gives_dx(p))
        return p.r <= Low::kRanks ? launch_gradient<T, Low, XPass>(p, stream)
                                  : launch_gradient<T, Middle, XPass>(p, stream);
    if (p.r <= Low::kRanks)
        return launch_gradient<T, Low, AGradient>(p, stream);
    return p.r <= Middle::kRanks ? launch_gradient<T, Middle, AGradient>(p, stream)
                                 : launch_gradient<T, High, AGradient>(p, stream);
}

}  // namespace

bool lora_dB_gives_dyb(const GroupLoraBwdParams &p) { return most_ranks(p) <= MiddlePass::kRanks; }

const char *lora_dB(const GroupLoraBwdParams &p, void *stream) {
    return p.dtype == kBFloat16 ? of_dy<__nv_bfloat16>(p, stream) : of_dy<__half>(p, stream);
}

int64_t lora_dB_workspace(const GroupLoraBwdParams &p) {
    const int64_t ranks = most_ranks(p);
    return ranks <= Low::kRanks          ? gradient_workspace<Low, DyPass>(p)
           : ranks <= Lower::kRanks      ? gradient_workspace<Lower, DyPass>(p)
           : ranks <= MiddlePass::kRanks ? gradient_workspace<MiddlePass, DyPass>(p)
                                         : gradient_workspace<High, BGradient>(p);
}

bool lora_dA_gives_dx(const GroupLoraBwdParams &p) { return p.dx && p.r <= Middle::kRanks; }

const char *lora_dA(const GroupLoraBwdParams &p, void *stream) {
    return p.dtype == kBFloat16 ? of_x<__nv_bfloat16>(p, stream) : of_x<__half>(p, stream);
}

int64_t lora_dA_workspace(const GroupLoraBwdParams &p) {
    return p.r <= Low::kRanks      ? gradient_workspace<Low, AGradient>(p)
           : p.r <= Middle::kRanks ? gradient_workspace<Middle, AGradient>(p)
                                   : gradient_workspace<High, AGradient>(p);
}

}  // namespace nf4lora
