// The innermost products: a few rows of X times kMicroCols columns of a panel of P, into an fp32 tile of C. X and the panel
// are made of units along the reduction: one fp32 number, or where the processor multiplies bf16 itself a pair of those.
#pragma once
#include "simd.h"
#if defined(__AVX512BF16__)
#include "intrinsics.h"
#endif

namespace nf4lora {
namespace NF4LORA_ISA {

// How X is reached: the unit at step k of row i of the g-th kRows rows is x[g * group + i * row + k * step]. Rows lie beside
// each other, row = 1, but where tiles of AMX are loaded from them, which need step = 1.
struct Strides {
    int64_t row, step, group;
};

struct Floats {
    using Element = float;
    static constexpr int kRows = kMicroRows;
    static constexpr int kDepth = 1;               // elements in a unit
    static constexpr int kStep = 1;                // the depth of a chunk is padded with zeros to a multiple of it
    static constexpr int64_t kSteps = kPartial;    // summed on their own before they join the tile; 0: they go on from it
    NF4LORA_INLINE Vec splat(const float *x) { return broadcast(*x); }
    NF4LORA_INLINE Vec multiply_add(Vec x, Vec p, Vec sum) { return fma(x, p, sum); }
    // Units of which each has its elements `stride` apart.
    NF4LORA_INLINE Vec join(const float *elements, int64_t) { return load(elements); }
};

#if defined(__AVX512BF16__)
struct Pairs {
    using Element = uint16_t;
    static constexpr int kRows = 12;
    static constexpr int kDepth = 2;
#if defined(__AMX_BF16__)
    static constexpr int kStep = 32;
#else
    static constexpr int kStep = 2;
#endif
    static constexpr int64_t kSteps = 0;
    NF4LORA_INLINE Vec splat(const float *x) {  // as an integer: half of a pair may look like a signaling NaN
        uint32_t pair;
        memcpy(&pair, x, sizeof pair);
        return (Vec)(pair - UVec{});
    }
    NF4LORA_INLINE Vec multiply_add(Vec x, Vec p, Vec sum) {
        return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)p);
    }
    NF4LORA_INLINE Vec join(const uint16_t *elements, int64_t stride) {
        typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));
        Halves low, high;
        memcpy(&low, elements, sizeof low);
        memcpy(&high, elements + stride, sizeof high);
        return (Vec)(__builtin_convertvector(low, UVec) | __builtin_convertvector(high, UVec) << 16);
    }
};
#endif

template <class Unit, int kRowCount>
static void micro_kernel(const float *x, int64_t x_step, const float *panel, int64_t steps, float *c, int64_t c_stride) {
    constexpr bool goes_on = Unit::kSteps == 0;
    const int64_t span = goes_on ? steps : Unit::kSteps;
    for (int64_t left = steps; left > 0; left -= span) {
        Vec acc[kRowCount][kMicroVecs];
        NF4LORA_UNROLL
        for (int i = 0; i < kRowCount; ++i) {
            NF4LORA_UNROLL
            for (int j = 0; j < kMicroVecs; ++j)
                acc[i][j] = goes_on ? load(c + i * c_stride + j * kWidth) : Vec{};
        }
        for (int64_t k = min_of(left, span); k > 0; --k, x += x_step, panel += kMicroCols) {
            Vec p[kMicroVecs];
            NF4LORA_UNROLL
            for (int j = 0; j < kMicroVecs; ++j)
                p[j] = load(panel + j * kWidth);
            NF4LORA_UNROLL
            for (int i = 0; i < kRowCount; ++i) {
                const Vec xi = Unit::splat(x + i);
                NF4LORA_UNROLL
                for (int j = 0; j < kMicroVecs; ++j)
                    acc[i][j] = Unit::multiply_add(xi, p[j], acc[i][j]);
            }
        }
        NF4LORA_UNROLL
        for (int i = 0; i < kRowCount; ++i) {
            NF4LORA_UNROLL
            for (int j = 0; j < kMicroVecs; ++j) {
                float *at = c + i * c_stride + j * kWidth;
                store(at, goes_on ? acc[i][j] : load(at) + acc[i][j]);
            }
        }
    }
}

template <class Unit, int kRowCount = Unit::kRows>
NF4LORA_INLINE void run_micro_kernel(int64_t rows, const float *x, int64_t x_step, const float *panel, int64_t steps,
                                     float *c, int64_t c_stride) {
    if (rows >= kRowCount)
        micro_kernel<Unit, kRowCount>(x, x_step, panel, steps, c, c_stride);
    else if constexpr (kRowCount > 1)
        run_micro_kernel<Unit, kRowCount - 1>(rows, x, x_step, panel, steps, c, c_stride);
}

#if defined(__AMX_BF16__)
constexpr int kTileRows = 16;  // of C and of X; a tile's row is 64 bytes

// Tiles 0-3 are C, 4 and 5 of X, 6 and 7 of the panel.
NF4LORA_INLINE void configure_tiles() {
    struct alignas(64) {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
}

// C += X [16 kRowTiles, 2 steps] P [2 steps, 16 kColTiles], all of whose memory is there; strides are in floats.
template <int kRowTiles, int kColTiles>
NF4LORA_INLINE void tile_kernel(const float *x, int64_t row_stride, const float *panel, int64_t panel_stride, int64_t steps,
                                float *c, int64_t c_stride) {
    constexpr int64_t kUnit = sizeof(float);
    const int64_t x_bytes = row_stride * kUnit, panel_bytes = panel_stride * kUnit, c_bytes = c_stride * kUnit;
    float *const under = c + kTileRows * c_stride;
    const float *const x_under = x + kTileRows * row_stride;
    _tile_loadd(0, c, c_bytes);
    if constexpr (kColTiles > 1)
        _tile_loadd(1, c + kWidth, c_bytes);
    if constexpr (kRowTiles > 1)
        _tile_loadd(2, under, c_bytes);
    if constexpr (kRowTiles > 1 && kColTiles > 1)
        _tile_loadd(3, under + kWidth, c_bytes);
    for (int64_t k = 0; k < steps; k += kTileRows) {
        const float *const p = panel + k * panel_stride;
        _tile_loadd(6, p, panel_bytes);
        _tile_loadd(4, x + k, x_bytes);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (kColTiles > 1) {
            _tile_loadd(7, p + kWidth, panel_bytes);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (kRowTiles > 1) {
            _tile_loadd(5, x_under + k, x_bytes);
            _tile_dpbf16ps(2, 5, 6);
        }
        if constexpr (kRowTiles > 1 && kColTiles > 1)
            _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, c_bytes);
    if constexpr (kColTiles > 1)
        _tile_stored(1, c + kWidth, c_bytes);
    if constexpr (kRowTiles > 1)
        _tile_stored(2, under, c_bytes);
    if constexpr (kRowTiles > 1 && kColTiles > 1)
        _tile_stored(3, under + kWidth, c_bytes);
}

constexpr int kRowPad = kTileRows;
#else
constexpr int kRowPad = 1;
#endif

// C [rows, cols] += X P for a whole chunk.
template <class Unit>
NF4LORA_INLINE void multiply_chunk(int64_t rows, int64_t cols, const float *x, Strides stride, const float *panels,
                                   int64_t panel_stride, int64_t steps, float *tile, int64_t tile_stride) {
#if defined(__AMX_BF16__)
    if (Unit::kDepth == 2 && stride.step == 1) {
        configure_tiles();
        for (int64_t n = 0; n < cols; n += kMicroCols, panels += panel_stride)
            for (int64_t m = 0; m < rows; m += 2 * kTileRows) {
                float *const c = tile + m * tile_stride + n;
                if (rows - m <= kTileRows)
                    tile_kernel<1, 2>(x + m * stride.row, stride.row, panels, kMicroCols, steps, c, tile_stride);
                else
                    tile_kernel<2, 2>(x + m * stride.row, stride.row, panels, kMicroCols, steps, c, tile_stride);
            }
        _tile_release();
        return;
    }
#endif
    for (int64_t m = 0; m < rows; m += Unit::kRows, x += stride.group, tile += Unit::kRows * tile_stride)
        for (int64_t n = 0; n < cols; n += kMicroCols)
            run_micro_kernel<Unit>(rows - m, x, stride.step, panels + n / kMicroCols * panel_stride, steps, tile + n,
                                   tile_stride);
}

}  // namespace NF4LORA_ISA
}  // namespace nf4lora
