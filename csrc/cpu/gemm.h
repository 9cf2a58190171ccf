// The one matrix product behind every linear kernel: an fp32 tile of C += X P over chunks of the reduction.
//   X  is walked by the rows of C and P by its columns; each may be stored as it is used or transposed.
//   Both are converted to fp32 a chunk at a time: X into scratch.x, P into panels [col / kMicroCols][k][kMicroCols].
//   A micro-kernel sums kPartial products in registers and then adds them to the tile; the order of every sum is fixed
//   by k alone, so neither the tile sizes nor the number of threads change a bit.
// Memory of a call: threads * 4 * (block_m * n + block_m * (block_k + 16) + n * block_k + max(kMicroCols * block_k, n))
// bytes with n = block_n rounded up to kMicroCols, and each bound cut down to the size of the problem; without panels
// (dots.h) the last two terms are max(block_k, n).
#pragma once
#include <cstdlib>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "matrix.h"

namespace nf4lora {
namespace NF4LORA_ISA {

constexpr const char *kOutOfMemory = "nf4lora: out of memory for the scratch tiles";
constexpr const char *kBadConfig = "nf4lora: block_m, block_n must be at least 1 and block_k a positive multiple of 64";
constexpr int64_t kPad = 16;  // keeps rows of x from meeting in one cache set

enum Stored { kAsUsed, kTransposed };

// sum over k < depth of X[m, k] P[k, n]
struct Product {
    Matrix x;        // [M, depth], or [depth, M] where transposed
    Stored x_stored;
    Matrix p;        // [depth, N], or [N, depth] where transposed
    Stored p_stored;
    int64_t depth;
};

struct Scratch {
    float *tile;   // [block_m, tile_stride]
    float *x;      // [block_m, block_k + kPad], or [block_k, block_m]
    float *panel;  // [block_n / kMicroCols, block_k, kMicroCols]
    float *lines;  // [kMicroCols, block_k], or [block_n]
    int64_t tile_stride;
    int64_t block_k;
};

// Part of the output that one tile covers.
struct Area {
    int64_t m0, rows, n0, cols;
};

NF4LORA_INLINE bool valid(const LinearConfig &config) {
    return config.block_m >= 1 && config.block_n >= 1 && config.block_k >= kPartial && config.block_k % kPartial == 0;
}

NF4LORA_INLINE int thread_number() {
#if defined(_OPENMP)
    return omp_get_thread_num();
#else
    return 0;
#endif
}

template <int kRowCount>
static void micro_kernel(const float *x, int64_t row_stride, int64_t k_stride, const float *panel, int64_t depth,
                         float *c, int64_t c_stride) {
    for (int64_t left = depth; left > 0; left -= kPartial) {
        Vec acc[kRowCount][kMicroVecs] = {};
        for (int64_t k = min_of(left, kPartial); k > 0; --k, x += k_stride, panel += kMicroCols) {
            Vec p[kMicroVecs];
            NF4LORA_UNROLL
            for (int j = 0; j < kMicroVecs; ++j)
                p[j] = load(panel + j * kWidth);
            NF4LORA_UNROLL
            for (int i = 0; i < kRowCount; ++i) {
                const Vec xi = broadcast(x[i * row_stride]);
                NF4LORA_UNROLL
                for (int j = 0; j < kMicroVecs; ++j)
                    acc[i][j] = fma(xi, p[j], acc[i][j]);
            }
        }
        NF4LORA_UNROLL
        for (int i = 0; i < kRowCount; ++i) {
            NF4LORA_UNROLL
            for (int j = 0; j < kMicroVecs; ++j) {
                float *at = c + i * c_stride + j * kWidth;
                store(at, load(at) + acc[i][j]);
            }
        }
    }
}

template <int kRowCount = kMicroRows>
NF4LORA_INLINE void run_micro_kernel(int64_t rows, const float *x, int64_t row_stride, int64_t k_stride,
                                     const float *panel, int64_t depth, float *c, int64_t c_stride) {
    if (rows >= kRowCount)
        micro_kernel<kRowCount>(x, row_stride, k_stride, panel, depth, c, c_stride);
    else if constexpr (kRowCount > 1)
        run_micro_kernel<kRowCount - 1>(rows, x, row_stride, k_stride, panel, depth, c, c_stride);
}

// P[k0 .. k0 + depth, the area's columns] as panels; columns beyond them are zero.
static void pack_panel(const Product &product, int64_t k0, int64_t depth, const Area &area, const Scratch s) {
    const int64_t cols = area.cols;
    if (product.p_stored == kAsUsed) {
        const int64_t padded = round_up(cols, kMicroCols);
        memset(s.lines + cols, 0, (padded - cols) * sizeof(float));
        for (int64_t k = 0; k < depth; ++k) {
            load_row(product.p, k0 + k, area.n0, cols, s.lines);
            float *panel = s.panel + k * kMicroCols;
            for (int64_t n = 0; n < padded; n += kMicroCols, panel += kMicroCols * s.block_k)
                for (int j = 0; j < kMicroVecs; ++j)
                    store(panel + j * kWidth, load(s.lines + n + j * kWidth));
        }
        return;
    }
    for (int64_t n = 0; n < cols; n += kMicroCols) {
        for (int64_t j = 0; j < kMicroCols; ++j) {
            if (n + j < cols)
                load_row(product.p, area.n0 + n + j, k0, depth, s.lines + j * s.block_k);
            else
                memset(s.lines + j * s.block_k, 0, depth * sizeof(float));
        }
        float *panel = s.panel + n * s.block_k;
        // block_k is a multiple of the width, so the last block may run over `depth` within the scratch
        for (int64_t k = 0; k < depth; k += kWidth)
            for (int j = 0; j < kMicroVecs; ++j) {
                Vec rows[kWidth];
                NF4LORA_UNROLL
                for (int l = 0; l < kWidth; ++l)
                    rows[l] = load(s.lines + (j * kWidth + l) * s.block_k + k);
                transpose(rows);
                NF4LORA_UNROLL
                for (int l = 0; l < kWidth; ++l)
                    store(panel + (k + l) * kMicroCols + j * kWidth, rows[l]);
            }
    }
}

// tile += the area's part of the product
static void accumulate(const Product &product, const Area &area, const Scratch &s) {
    for (int64_t k0 = 0; k0 < product.depth; k0 += s.block_k) {
        const int64_t depth = min_of(s.block_k, product.depth - k0);
        pack_panel(product, k0, depth, area, s);
        int64_t row_stride = 1, k_stride = area.rows;
        if (product.x_stored == kAsUsed) {
            row_stride = s.block_k + kPad, k_stride = 1;
            for (int64_t m = 0; m < area.rows; ++m)
                load_row(product.x, area.m0 + m, k0, depth, s.x + m * row_stride);
        } else {
            for (int64_t k = 0; k < depth; ++k)
                load_row(product.x, k0 + k, area.m0, area.rows, s.x + k * k_stride);
        }
        for (int64_t n = 0; n < area.cols; n += kMicroCols)
            for (int64_t m = 0; m < area.rows; m += kMicroRows)
                run_micro_kernel(area.rows - m, s.x + m * row_stride, row_stride, k_stride, s.panel + n * s.block_k,
                                 depth, s.tile + m * s.tile_stride + n, s.tile_stride);
    }
}

// Cuts [M, N] into areas, and for each zeroes the tile and calls body(scratch, area), on config.threads threads.
// `panels`: whether the body calls accumulate.
template <class Body>
NF4LORA_INLINE const char *for_tiles(int64_t M, int64_t N, int64_t depth, bool panels, const LinearConfig &config,
                                     const Body &body) {
    if (!valid(config))
        return kBadConfig;
    if (M == 0 || N == 0)
        return nullptr;
    const int64_t threads = max_of(config.threads, 1);
    const int64_t block_n = min_of(config.block_n, N), tiles_n = ceil_div(N, block_n);
    // a narrow output gets shorter tiles, so that every thread has some
    const int64_t row_share = round_up(ceil_div(M, ceil_div(threads, tiles_n)), kMicroRows);
    const int64_t block_m = min_of(min_of(config.block_m, M), max_of(row_share, 8 * kMicroRows));
    const int64_t block_k = min_of(config.block_k, round_up(max_of(depth, 1), kPartial));
    const int64_t tiles_m = ceil_div(M, block_m), tile_stride = round_up(block_n, kMicroCols);

    const int64_t tile_floats = round_up(block_m * tile_stride, kPad);
    const int64_t x_floats = block_m * (block_k + kPad);
    const int64_t panel_floats = panels ? tile_stride * block_k : 0;
    const int64_t line_floats = round_up(max_of(panels ? kMicroCols * block_k : block_k, tile_stride), kPad);
    const int64_t floats = tile_floats + x_floats + panel_floats + line_floats;
    const int team = static_cast<int>(min_of(threads, tiles_m * tiles_n));
    float *const memory = static_cast<float *>(aligned_alloc(64, team * floats * sizeof(float)));
    if (!memory)
        return kOutOfMemory;
    NF4LORA_OMP(omp parallel num_threads(team))
    {
        float *const tile = memory + thread_number() * floats, *const x = tile + tile_floats;
        float *const panel = x + x_floats, *const lines = panel + panel_floats;
        const Scratch s = {tile, x, panel, lines, tile_stride, block_k};
        NF4LORA_OMP(omp for schedule(dynamic))
        for (int64_t t = 0; t < tiles_m * tiles_n; ++t) {
            const int64_t m0 = t % tiles_m * block_m, n0 = t / tiles_m * block_n;
            const Area area = {m0, min_of(block_m, M - m0), n0, min_of(block_n, N - n0)};
            memset(tile, 0, area.rows * tile_stride * sizeof(float));
            body(s, area);
        }
    }
    free(memory);
    return nullptr;
}

NF4LORA_INLINE void scale_tile(const Scratch &s, const Area &area, float factor) {
    for (int64_t i = 0; i < area.rows * s.tile_stride; ++i)
        s.tile[i] *= factor;
}

// Writes the tile to its place in out [., out_cols], rounding once.
NF4LORA_INLINE void store_tile(const Scratch &s, const Area &area, void *out, int32_t dtype, int64_t out_cols) {
    for (int64_t m = 0; m < area.rows; ++m)
        store_elements(out, dtype, (area.m0 + m) * out_cols + area.n0, area.cols, s.tile + m * s.tile_stride);
}

}  // namespace NF4LORA_ISA
}  // namespace nf4lora
