// dx = mask * (dyb A), the ranks of all members as one reduction, where it is not made beside dA
// Operands:      as params.h says, any K, M, ranks and alignment; 16-byte copies where dyb and dx allow them
// Rounding:      A to dx's dtype where it enters a product; sums in fp32, multiplied by the mask's factor, rounded
//                once: the bits of lora_gradients.cu
// Memory:        dx is written once, dyb read for every 128 columns of it, A for every 128 tokens; 35 KiB shared
// Budget:        the bytes of dx; with dropout Philox, 22 instructions an element
#include "lora.cuh"

namespace nf4lora {
namespace {

// Shared memory: a tile of dyb and one of A, and in their place in the end the tile of dx.
struct DxTile {
    static constexpr int kTokens = 128, kColumns = 128, kRanks = 64;  // 64 ranks at a time
    static constexpr int kDybBytes = kTokens * kPitch<kRanks>, kFactorBytes = kRanks * kPitch<kColumns>;
    static constexpr size_t kShared = kDybBytes + kFactorBytes;
    static_assert(kShared >= kTokens * kPitch<kColumns>, "dx takes the place of both");
};

// Grid: (tiles of the tokens, of the columns). A warp makes 32 tokens by 64 columns.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) dx_kernel(const __grid_constant__ GroupBwdParams p, Wideness wide) {
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
            const uint4 quad = load_quad_of_A(p, rank0 + rank, column0 + column,
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
        if (token >= p.M || valid <= 0)
            continue;
        uint4 piece = *reinterpret_cast<const uint4 *>(shared + row * kRow + column * 2);
        if (mask.active)
            piece = keep_piece(piece, kept_of_piece(mask, first));
        store_piece(p.dx, first, piece, valid, wide.out);
    }
}

template <class T>
const char *launch_dx(const GroupBwdParams &p, void *stream) {
    const dim3 grid(static_cast<unsigned>(ceil_div(p.M, DxTile::kTokens)),
                    static_cast<unsigned>(ceil_div(p.K, DxTile::kColumns)));
    if (p.M == 0 || p.K == 0)
        return nullptr;
    const Wideness wide{0, wide_rows(p.dx, p.K), wide_rows(p.dyb, p.r), wide_A(p)};
    return NF4LORA_LAUNCH(dx_kernel<T>, grid, kThreads, DxTile::kShared, stream, p, wide);
}

}  // namespace

const char *lora_dx(const GroupBwdParams &p, void *stream) {
    return p.dy_dtype == kBFloat16 ? launch_dx<__nv_bfloat16>(p, stream) : launch_dx<__half>(p, stream);
}

}  // namespace nf4lora
