// The matrix product behind the linear kernels: an fp32 tile of C += X P over chunks of the reduction.
//   X  is walked by the rows of C and P by its columns; each may be stored as it is used or transposed.
//   Both are packed in the units of micro.h: pairs of bf16 where the processor multiplies them, X is bf16 and P is, or is a
//   4-bit weight, which is rounded to it, or fp32, which is the sum of three; else fp32. P a chunk at a time into panels
//   [col / kMicroCols][unit][kMicroCols]. X once for all tiles of a span of rows where for_spans packs it, else a chunk at a
//   time into scratch.x. The order of every sum is fixed by k alone, so neither the tile sizes nor the number of threads
//   change a bit.
// Memory of a call: threads * 4 * (m * n + m * (j + 16) + n * block_k + max(kMicroCols * block_k, m, n)) bytes with
// m = block_m rounded up to kRowBlock, n = block_n to kMicroCols, j = min(block_k, kOwnChunk), and each bound cut down to
// the size of the problem; without panels (dots.h) m is rounded to kWidth, j is block_k and the last two terms are
// max(block_k, n). The X of a span takes kPackedBytes, or what kSpanRows rows take.
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
constexpr int64_t kOwnChunk = 64;  // units of the chunks of an X that is packed for one tile, and of its P
constexpr int64_t kPackedBytes = 4 << 20;
constexpr int64_t kFetchedAhead = 4096;  // elements of P
constexpr int64_t kRowBlock = 48;  // a multiple of every micro-kernel's rows
constexpr int64_t kSpanRows = 4 * kRowBlock;  // P is decoded once for so many rows at least

enum Stored { kAsUsed, kTransposed };

// sum over k < depth of X[m, k] P[k, n]
struct Product {
    Matrix x;        // [M, depth], or [depth, M] where transposed
    Stored x_stored;
    Matrix p;        // [depth, N], or [N, depth] where transposed
    Stored p_stored;
    int64_t depth;
    const float *packed = nullptr;  // units of X from row `first` on, where they are packed for every tile
    Strides stride{};
    int64_t first = 0;
};

struct Scratch {
    float *tile;   // [block_m, tile_stride]
    float *x;      // units of block_m rows, own_chunk of each
    float *panel;  // units [block_n / kMicroCols, block_k, kMicroCols]
    float *lines;  // elements of units [kMicroCols, block_k], or [block_n]
    int64_t tile_stride;
    int64_t block_k, own_chunk;  // units of a chunk; of one whose X is packed for this tile
};

// Rows of the output, and the part of it that one tile covers.
struct Span {
    int64_t m0, rows;
};

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
    // rows ahead of the one that is decoded: the processor drops what is fetched in a burst
    const int64_t ahead = max_of(kFetchedAhead / (product.p_stored == kAsUsed ? cols : depth), 1);
    if (product.p_stored == kAsUsed) {
        const int64_t width = round_up(cols, kMicroCols);
        for (int64_t k = 0; k < padded; k += Unit::kDepth) {
            for (int i = 0; i < Unit::kDepth; ++i) {
                if (k + i + ahead < depth)
                    fetch_ahead(product.p, k0 + k + i + ahead, area.n0, cols);
                load_line(product.p, k0 + k + i, area.n0, k + i < depth ? cols : 0, width, lines + i * width);
            }
            float *panel = s.panel + k / Unit::kDepth * kMicroCols;
            for (int64_t n = 0; n < width; n += kMicroCols, panel += panel_stride)
                for (int j = 0; j < kMicroVecs; ++j)
                    store(panel + j * kWidth, Unit::join(lines + n + j * kWidth, width));
        }
        return;
    }
    const int64_t line_stride = Unit::kDepth * s.block_k;
    for (int64_t n = 0; n < cols; n += kMicroCols) {
        for (int64_t j = 0; j < kMicroCols; ++j) {
            if (n + j + ahead < cols)
                fetch_ahead(product.p, area.n0 + n + j + ahead, k0, depth);
            load_line(product.p, area.n0 + n + j, k0, n + j < cols ? depth : 0, padded, lines + j * line_stride);
        }
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

// Of an X as used, `depth` elements deep.
template <class Unit>
NF4LORA_INLINE Strides packed_strides(int64_t depth) {
    const int64_t steps = round_up(depth, Unit::kStep) / Unit::kDepth;
    if (Unit::kDepth == 2 && kRowPad > 1)
        return {steps + kPad, 1, Unit::kRows * (steps + kPad)};
    return {1, Unit::kRows, Unit::kRows * steps + kPad};
}

// X[m0 .. m0 + rows, k0 .. k0 + depth], as used; what pads it is zero.
template <class Unit>
static void pack_rows(const Product &product, int64_t m0, int64_t rows, int64_t k0, int64_t depth, const Strides &stride,
                      float *units) {
    constexpr int64_t kPiece = 1024;  // whose units of kRows rows stay in the L1
    using Element = typename Unit::Element;
    Element memory[kPiece];
    const int64_t step = stride.step, padded_rows = round_up(rows, kRowPad);
    for (int64_t i0 = 0; i0 < padded_rows; i0 += Unit::kRows, units += stride.group)
        for (int64_t k = 0; k < depth; k += kPiece) {
            const int64_t count = min_of(kPiece, depth - k), padded = round_up(count, Unit::kStep);
            for (int64_t i = i0; i < min_of(i0 + Unit::kRows, padded_rows); ++i) {
                const Element *const line = line_of(product.x, m0 + i, k0 + k, i < rows ? count : 0, padded, memory);
                float *const to = units + (i - i0) * stride.row + k / Unit::kDepth * step;
                for (int64_t j = 0; j < padded / Unit::kDepth; ++j)
                    memcpy(to + j * step, line + j * Unit::kDepth, sizeof *to);
            }
        }
}

// X[the area's rows, k0 .. k0 + depth] into s.x.
template <class Unit>
static Strides pack_x(const Product &product, int64_t k0, int64_t depth, const Area &area, const Scratch &s) {
    if (product.x_stored == kAsUsed) {
        const Strides stride = packed_strides<Unit>(depth);
        pack_rows<Unit>(product, area.m0, area.rows, k0, depth, stride, s.x);
        return stride;
    }
    using Element = typename Unit::Element;
    const int64_t padded = round_up(depth, Unit::kStep), width = round_up(area.rows, kWidth);
    for (int64_t k = 0; k < padded; k += Unit::kDepth) {
        Element *const lines = reinterpret_cast<Element *>(s.lines);
        for (int i = 0; i < Unit::kDepth; ++i)
            load_line(product.x, k0 + k + i, area.m0, k + i < depth ? area.rows : 0, width, lines + i * width);
        for (int64_t m = 0; m < width; m += kWidth)
            store(s.x + k / Unit::kDepth * width + m, Unit::join(lines + m, width));
    }
    return {1, width, Unit::kRows};
}

template <class Unit>
static void accumulate_units(const Product &product, const Area &area, const Scratch &s) {
    const int64_t chunk = Unit::kDepth * (product.packed ? s.block_k : s.own_chunk);
    for (int64_t k0 = 0; k0 < product.depth; k0 += chunk) {
        const int64_t depth = min_of(chunk, product.depth - k0), steps = round_up(depth, Unit::kStep) / Unit::kDepth;
        pack_panel<Unit>(product, k0, depth, area, s);
        const float *x = s.x;
        Strides stride = product.stride;
        if (product.packed)
            x = product.packed + (area.m0 - product.first) / Unit::kRows * stride.group + k0 / Unit::kDepth * stride.step;
        else
            stride = pack_x<Unit>(product, k0, depth, area, s);
        multiply_chunk<Unit>(area.rows, area.cols, x, stride, s.panel, kMicroCols * s.block_k, steps, s.tile, s.tile_stride);
    }
}

NF4LORA_INLINE bool in_pairs([[maybe_unused]] const Product &product) {
#if defined(__AVX512BF16__)
    return is_bf16(product.x) && (is_bf16(product.p) || has_parts(product.p));
#else
    return false;
#endif
}

// Calls body with the unit that the product is computed in.
template <class Body>
NF4LORA_INLINE void with_unit([[maybe_unused]] const Product &product, const Body &body) {
#if defined(__AVX512BF16__)
    if (in_pairs(product))
        return body(Pairs{});
#endif
    body(Floats{});
}

// tile += the area's part of the product
static void accumulate(const Product &product, const Area &area, const Scratch &s) {
    with_unit(product, [&](auto unit) {
        Product part = product;
        if (decltype(unit)::kDepth == 1 || !has_parts(product.p))
            return accumulate_units<decltype(unit)>(product, area, s);
        for (part.p.part = 1; part.p.part <= kParts; ++part.p.part)
            accumulate_units<decltype(unit)>(part, area, s);
    });
}

// Calls body(span) for the rows of C a span after the other, with X of the products, as used, packed for it.
template <class Body>
NF4LORA_INLINE const char *for_spans(int64_t M, Product *products, int64_t count, int32_t threads, const Body &body) {
    int64_t floats[kMaxGroup], all = 0;
    for (int64_t i = 0; i < count; ++i) {
        with_unit(products[i], [&](auto unit) {
            using Unit = decltype(unit);
            products[i].stride = packed_strides<Unit>(products[i].depth);
            floats[i] = ceil_div(min_of(round_up(M, kRowPad), kRowBlock), Unit::kRows) * products[i].stride.group;
        });
        all += floats[i];
    }
    const int64_t blocks = ceil_div(M, kRowBlock), most = max_of(kPackedBytes / sizeof(float) / max_of(all, 1), kSpanRows / kRowBlock);
    const int64_t at_once = ceil_div(blocks, ceil_div(max_of(blocks, 1), most));
    float *const memory = static_cast<float *>(aligned_alloc(64, round_up(max_of(at_once * all, 1), kPad) * sizeof(float)));
    if (!memory)
        return kOutOfMemory;
    const char *error = nullptr;
    for (int64_t m0 = 0; m0 < M && !error; m0 += at_once * kRowBlock) {
        const Span span = {m0, min_of(at_once * kRowBlock, M - m0)};
        float *at = memory;
        for (int64_t i = 0; i < count; ++i) {
            products[i].packed = at;
            products[i].first = m0;
            at += at_once * floats[i];
        }
        for_parts(max_of(threads, 1), ceil_div(span.rows, kRowBlock) * count, [&](int64_t t, int) {
            const Product &of = products[t % count];
            const int64_t block = t / count, row = block * kRowBlock;
            float *const units = memory + (of.packed - memory) + block * floats[t % count];
            with_unit(of, [&](auto unit) {
                pack_rows<decltype(unit)>(of, m0 + row, min_of(kRowBlock, span.rows - row), 0, of.depth, of.stride, units);
            });
        });
        error = body(span);
    }
    free(memory);
    return error;
}

// Lets a product have the packed X of one whose X is the same.
NF4LORA_INLINE void share_packed(const Product &from, Product &product) {
    if (!from.packed || product.x.mask || in_pairs(from) != in_pairs(product))
        return;
    product.packed = from.packed;
    product.stride = from.stride;
    product.first = from.first;
}

// Of N columns, some for every thread, but a multiple of `step`.
NF4LORA_INLINE int64_t column_share(int64_t N, int64_t step, int64_t threads) {
    return min_of(round_up(ceil_div(N, max_of(threads, 1)), step), N);
}

// Cuts the span's rows of C, which has N columns, into areas, and for each zeroes the tile and calls body(scratch, area), on
// config.threads threads. `panels`: whether the body calls accumulate.
template <class Body>
NF4LORA_INLINE const char *for_tiles(Span span, int64_t N, int64_t depth, bool panels, const LinearConfig &config,
                                     const Body &body) {
    if (!valid(config))
        return kBadConfig;
    const int64_t M = span.rows;
    if (M == 0 || N == 0)
        return nullptr;
    const int64_t threads = max_of(config.threads, 1);
    const int64_t block_n = min_of(config.block_n, column_share(N, kMicroCols, threads)), tiles_n = ceil_div(N, block_n);
    // a narrow output gets shorter tiles, so that every thread has some
    const int64_t row_step = panels ? kRowBlock : 1, row_share = round_up(ceil_div(M, ceil_div(threads, tiles_n)), row_step);
    const int64_t block_m = min_of(min_of(round_up(config.block_m, row_step), max_of(row_share, kRowBlock)), M);
    const int64_t block_k = min_of(config.block_k, round_up(max_of(depth, 1), kPartial));
    const int64_t own_chunk = panels ? min_of(block_k, kOwnChunk) : block_k;
    const int64_t tiles_m = ceil_div(M, block_m), tile_stride = round_up(block_n, kMicroCols);

    const int64_t tile_rows = round_up(block_m, kRowPad), x_rows = round_up(block_m, kWidth);
    const int64_t tile_floats = round_up(tile_rows * tile_stride, kPad);
    const int64_t x_floats = (panels ? round_up(x_rows, kRowBlock) : x_rows) * (own_chunk + kPad);
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
        const Scratch s = {tile, x, panel, lines, tile_stride, block_k, own_chunk};
        const int64_t m0 = t % tiles_m * block_m, n0 = t / tiles_m * block_n;
        const Area area = {span.m0 + m0, min_of(block_m, M - m0), n0, min_of(block_n, N - n0)};
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
