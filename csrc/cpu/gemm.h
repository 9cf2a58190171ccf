// The matrix product behind the linear kernels: an fp32 tile of C += X P over chunks of the reduction.
//   X  is walked by the rows of C and P by its columns; each may be stored as it is used or transposed.
//   Both are packed a chunk at a time, in the units of micro.h: pairs of bf16 where the processor multiplies them, X is
//   bf16 and P is, or is a 4-bit weight, which is rounded to it; else fp32. X into scratch.x, P into panels
//   [col / kMicroCols][unit][kMicroCols]. The order of every sum is fixed by k alone, so neither the tile sizes nor the
//   number of threads change a bit.
// Memory of a call: threads * 4 * (m * n + m * (block_k + 16) + n * block_k + max(kMicroCols * block_k, m, n)) bytes with
// m = block_m rounded up to 16 and n = block_n to kMicroCols, and each bound cut down to the size of the problem; without
// panels (dots.h) the last two terms are max(block_k, n).
#pragma once
#include <cstdlib>

#include "matrix.h"
#include "micro.h"
#include "threads.h"

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
    float *x;      // units [block_m, block_k + kPad], or [block_k, block_m]
    float *panel;  // units [block_n / kMicroCols, block_k, kMicroCols]
    float *lines;  // elements of units [kMicroCols, block_k], or [block_n]
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

// P[k0 .. k0 + depth, the area's columns] as panels; columns beyond them, and what pads the depth, are zero.
template <class Unit>
static void pack_panel(const Product &product, int64_t k0, int64_t depth, const Area &area, const Scratch &s) {
    using Element = typename Unit::Element;
    const int64_t cols = area.cols, padded = round_up(depth, Unit::kStep), panel_stride = kMicroCols * s.block_k;
    Element *const lines = reinterpret_cast<Element *>(s.lines);
    if (product.p_stored == kAsUsed) {
        const int64_t width = round_up(cols, kMicroCols);
        for (int64_t k = 0; k < padded; k += Unit::kDepth) {
            for (int i = 0; i < Unit::kDepth; ++i)
                load_line(product.p, k0 + k + i, area.n0, k + i < depth ? cols : 0, width, lines + i * width);
            float *panel = s.panel + k / Unit::kDepth * kMicroCols;
            for (int64_t n = 0; n < width; n += kMicroCols, panel += panel_stride)
                for (int j = 0; j < kMicroVecs; ++j)
                    store(panel + j * kWidth, Unit::join(lines + n + j * kWidth, width));
        }
        return;
    }
    const int64_t line_stride = Unit::kDepth * s.block_k;
    for (int64_t n = 0; n < cols; n += kMicroCols) {
        for (int64_t j = 0; j < kMicroCols; ++j)
            load_line(product.p, area.n0 + n + j, k0, n + j < cols ? depth : 0, padded, lines + j * line_stride);
        float *panel = s.panel + n * s.block_k;
        // block_k is a multiple of the width, so the last block may run over `padded` within the scratch
        for (int64_t k = 0; k < padded; k += kWidth * Unit::kDepth)
            for (int j = 0; j < kMicroVecs; ++j) {
                Vec rows[kWidth];
                NF4LORA_UNROLL
                for (int l = 0; l < kWidth; ++l)
                    memcpy(&rows[l], lines + (j * kWidth + l) * line_stride + k, sizeof rows[l]);
                transpose(rows);
                NF4LORA_UNROLL
                for (int l = 0; l < kWidth; ++l)
                    store(panel + (k / Unit::kDepth + l) * kMicroCols + j * kWidth, rows[l]);
            }
    }
}

// X[the area's rows, k0 .. k0 + depth] into s.x.
template <class Unit>
static Strides pack_x(const Product &product, int64_t k0, int64_t depth, const Area &area, const Scratch &s) {
    using Element = typename Unit::Element;
    const int64_t padded = round_up(depth, Unit::kStep);
    if (product.x_stored == kAsUsed) {
        const int64_t row_stride = s.block_k + kPad;
        for (int64_t m = 0; m < round_up(area.rows, kRowPad); ++m)
            load_line(product.x, area.m0 + m, k0, m < area.rows ? depth : 0, padded,
                      reinterpret_cast<Element *>(s.x + m * row_stride));
        return {row_stride, 1};
    }
    const int64_t width = round_up(area.rows, kWidth);
    for (int64_t k = 0; k < padded; k += Unit::kDepth) {
        Element *const lines = reinterpret_cast<Element *>(s.lines);
        for (int i = 0; i < Unit::kDepth; ++i)
            load_line(product.x, k0 + k + i, area.m0, k + i < depth ? area.rows : 0, width, lines + i * width);
        for (int64_t m = 0; m < width; m += kWidth)
            store(s.x + k / Unit::kDepth * width + m, Unit::join(lines + m, width));
    }
    return {1, width};
}

// The chunk of P that begins at k0.
NF4LORA_INLINE void fetch_next(const Product &product, int64_t k0, int64_t chunk, const Area &area) {
    const int64_t depth = min_of(chunk, product.depth - k0);
    if (product.p_stored == kAsUsed)
        for (int64_t k = k0; k < k0 + depth; ++k)
            fetch_ahead(product.p, k, area.n0, area.cols);
    else if (depth > 0)
        for (int64_t n = area.n0; n < area.n0 + area.cols; ++n)
            fetch_ahead(product.p, n, k0, depth);
}

template <class Unit>
static void accumulate_units(const Product &product, const Area &area, const Scratch &s) {
    const int64_t chunk = Unit::kDepth * s.block_k;
    for (int64_t k0 = 0; k0 < product.depth; k0 += chunk) {
        const int64_t depth = min_of(chunk, product.depth - k0), steps = round_up(depth, Unit::kStep) / Unit::kDepth;
        pack_panel<Unit>(product, k0, depth, area, s);
        const Strides stride = pack_x<Unit>(product, k0, depth, area, s);
        fetch_next(product, k0 + depth, chunk, area);
        multiply_chunk<Unit>(area.rows, area.cols, s.x, stride, s.panel, kMicroCols * s.block_k, steps, s.tile, s.tile_stride);
    }
}

// tile += the area's part of the product
static void accumulate(const Product &product, const Area &area, const Scratch &s) {
#if defined(__AVX512BF16__)
    if (is_bf16(product.x) && is_bf16(product.p))
        return accumulate_units<Pairs>(product, area, s);
#endif
    accumulate_units<Floats>(product, area, s);
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

    const int64_t tile_rows = round_up(block_m, kRowPad), x_rows = round_up(block_m, kWidth);
    const int64_t tile_floats = round_up(tile_rows * tile_stride, kPad);
    const int64_t x_floats = x_rows * (block_k + kPad);
    const int64_t panel_floats = panels ? tile_stride * block_k : 0;
    const int64_t line_floats = round_up(max_of(panels ? max_of(kMicroCols * block_k, x_rows) : block_k, tile_stride), kPad);
    const int64_t floats = tile_floats + x_floats + panel_floats + line_floats;
    const int team = static_cast<int>(min_of(threads, tiles_m * tiles_n));
    float *const memory = static_cast<float *>(aligned_alloc(64, team * floats * sizeof(float)));
    if (!memory)
        return kOutOfMemory;
    for_parts(team, tiles_m * tiles_n, [&](int64_t t, int thread) {
        float *const tile = memory + thread * floats, *const x = tile + tile_floats;
        float *const panel = x + x_floats, *const lines = panel + panel_floats;
        const Scratch s = {tile, x, panel, lines, tile_stride, block_k};
        const int64_t m0 = t % tiles_m * block_m, n0 = t / tiles_m * block_n;
        const Area area = {m0, min_of(block_m, M - m0), n0, min_of(block_n, N - n0)};
        memset(tile, 0, round_up(area.rows, kRowPad) * tile_stride * sizeof(float));
        body(s, area);
    });
    free(memory);
    return nullptr;
}

NF4LORA_INLINE void scale_tile(const Scratch &s, const Area &area, float factor) {
    for (int64_t i = 0; i < area.rows * s.tile_stride; ++i)
        s.tile[i] *= factor;
}

// Writes the tile to its place in out, whose rows are `stride` elements apart, rounding once.
NF4LORA_INLINE void store_tile(const Scratch &s, const Area &area, void *out, int32_t dtype, int64_t stride) {
    for (int64_t m = 0; m < area.rows; ++m)
        store_elements(out, dtype, (area.m0 + m) * stride + area.n0, area.cols, s.tile + m * s.tile_stride);
}

}  // namespace NF4LORA_ISA
}  // namespace nf4lora
