// The product of gemm.h for few rows of X and a transposed P: a row of P is decoded and used at once, one dot product
// for each row of X, without panels. Each vector lane sums at most kPartial products before they join the tile.
#pragma once
#include "gemm.h"

namespace nf4lora {
namespace NF4LORA_ISA {

constexpr int kDotRows = 4;
constexpr int64_t kDotSpan = kPartial * kMicroCols;

template <int kRowCount>
static void dot_kernel(const float *x, int64_t row_stride, const float *line, int64_t depth, float *c,
                       int64_t c_stride) {
    for (int64_t left = depth; left > 0; left -= kDotSpan) {
        Vec acc[kRowCount][kMicroVecs] = {};
        for (int64_t k = min_of(left, kDotSpan); k > 0; k -= kMicroCols, x += kMicroCols, line += kMicroCols) {
            NF4LORA_UNROLL
            for (int j = 0; j < kMicroVecs; ++j) {
                const Vec p = load(line + j * kWidth);
                NF4LORA_UNROLL
                for (int i = 0; i < kRowCount; ++i)
                    acc[i][j] = fma(load(x + i * row_stride + j * kWidth), p, acc[i][j]);
            }
        }
        for (int i = 0; i < kRowCount; ++i) {
            Vec sum = acc[i][0];
            for (int j = 1; j < kMicroVecs; ++j)
                sum += acc[i][j];
            c[i * c_stride] += sum_lanes(sum);
        }
    }
}

template <int kRowCount = kDotRows>
NF4LORA_INLINE void run_dot_kernel(int64_t rows, const float *x, int64_t row_stride, const float *line, int64_t depth,
                                   float *c, int64_t c_stride) {
    if (rows >= kRowCount)
        dot_kernel<kRowCount>(x, row_stride, line, depth, c, c_stride);
    else if constexpr (kRowCount > 1)
        run_dot_kernel<kRowCount - 1>(rows, x, row_stride, line, depth, c, c_stride);
}

// tile += the area's part of the product, for an x as used and a transposed p
static void accumulate_dots(const Product &product, const Area &area, const Scratch &s) {
    const int64_t row_stride = s.block_k + kPad;
    for (int64_t k0 = 0; k0 < product.depth; k0 += s.block_k) {
        const int64_t depth = min_of(s.block_k, product.depth - k0), padded = round_up(depth, kMicroCols);
        for (int64_t m = 0; m < area.rows; ++m) {
            load_row(product.x, area.m0 + m, k0, depth, s.x + m * row_stride);
            memset(s.x + m * row_stride + depth, 0, (padded - depth) * sizeof(float));
        }
        memset(s.lines + depth, 0, (padded - depth) * sizeof(float));
        for (int64_t n = 0; n < area.cols; ++n) {
            load_row(product.p, area.n0 + n, k0, depth, s.lines);
            for (int64_t m = 0; m < area.rows; m += kDotRows)
                run_dot_kernel(area.rows - m, s.x + m * row_stride, row_stride, s.lines, padded,
                               s.tile + m * s.tile_stride + n, s.tile_stride);
        }
    }
}

}  // namespace NF4LORA_ISA
}  // namespace nf4lora
