// A matrix operand that yields its rows as fp32, or bf16 where it is that, whatever it is stored as: dense, dense under dropout, or
// 4-bit.
#pragma once
#include "convert.h"
#include "decode.h"
#include "philox.h"

namespace nf4lora {
namespace NF4LORA_ISA {

struct Matrix {
    const void *data;         // dtype [rows, cols], null for a 4-bit weight
    int32_t dtype;            // Dtype of data
    int64_t stride;           // elements from one row to the next
    const DropoutMask *mask;  // over the flat index of data, may be null
    const Weight *weight;     // read where data is null
};

NF4LORA_INLINE Matrix dense(const void *data, int32_t dtype, int64_t stride) {
    return {data, dtype, stride, nullptr, nullptr};
}

NF4LORA_INLINE Matrix dropped(const void *data, int32_t dtype, int64_t cols, const DropoutMask &mask) {
    return {data, dtype, cols, mask.active ? &mask : nullptr, nullptr};
}

NF4LORA_INLINE Matrix decoded(const Weight &w) { return {nullptr, kFloat32, w.cols, nullptr, &w}; }

static void load_row(const Matrix &matrix, int64_t row, int64_t col, int64_t count, float *dst) {
    const int64_t first = row * matrix.stride + col;
    if (!matrix.data) {
        decode_elements(*matrix.weight, first, count, dst);
        return;
    }
    load_elements(matrix.data, matrix.dtype, first, count, dst);
    if (matrix.mask)
        apply_dropout(*matrix.mask, first, count, dst);
}

// A row's part, and zeros up to `width`.
NF4LORA_INLINE void load_line(const Matrix &matrix, int64_t row, int64_t col, int64_t count, int64_t width, float *dst) {
    if (count > 0)
        load_row(matrix, row, col, count, dst);
    memset(dst + count, 0, (width - count) * sizeof *dst);
}

// Whether its elements are bf16: exactly, or as a 4-bit weight rounded to it.
NF4LORA_INLINE bool is_bf16(const Matrix &matrix) {
    return !matrix.data || (matrix.dtype == kBFloat16 && !matrix.mask);
}

// The same of what is bf16, as such.
NF4LORA_INLINE void load_line(const Matrix &matrix, int64_t row, int64_t col, int64_t count, int64_t width, uint16_t *dst) {
    const int64_t first = row * matrix.stride + col;
    if (count > 0 && matrix.data)
        memcpy(dst, static_cast<const uint16_t *>(matrix.data) + first, count * sizeof *dst);
    else if (count > 0)
        decode_halves(*matrix.weight, first, count, kBFloat16, dst);
    memset(dst + count, 0, (width - count) * sizeof *dst);
}

// Brings a row's part nearer that will be decoded soon: its rows lie too far apart for the processor to foresee.
NF4LORA_INLINE void fetch_ahead(const Matrix &matrix, int64_t row, int64_t col, int64_t count) {
    if (matrix.data)
        return;
    constexpr int64_t kLine = 64;
    const uint8_t *const packed = matrix.weight->packed + (row * matrix.stride + col) / 2;
    for (int64_t i = 0; i < count / 2; i += kLine)
        __builtin_prefetch(packed + i, 0, 2);
}

}  // namespace NF4LORA_ISA
}  // namespace nf4lora
