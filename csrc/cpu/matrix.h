// A matrix operand that yields its rows as fp32, whatever it is stored as: dense, dense under dropout, or 4-bit.
#pragma once
#include "convert.h"
#include "decode.h"
#include "philox.h"

namespace nf4lora {
namespace NF4LORA_ISA {

struct Matrix {
    const void *data;         // dtype [rows, cols], null for a 4-bit weight
    int32_t dtype;            // Dtype of data
    int64_t cols;
    const DropoutMask *mask;  // over the flat index of data, may be null
    const Weight *weight;     // read where data is null
};

NF4LORA_INLINE Matrix dense(const void *data, int32_t dtype, int64_t cols) {
    return {data, dtype, cols, nullptr, nullptr};
}

NF4LORA_INLINE Matrix dropped(const void *data, int32_t dtype, int64_t cols, const DropoutMask &mask) {
    return {data, dtype, cols, mask.active ? &mask : nullptr, nullptr};
}

NF4LORA_INLINE Matrix decoded(const Weight &w) { return {nullptr, kFloat32, w.cols, nullptr, &w}; }

static void load_row(const Matrix &matrix, int64_t row, int64_t col, int64_t count, float *dst) {
    const int64_t first = row * matrix.cols + col;
    if (!matrix.data) {
        decode_elements(*matrix.weight, first, count, dst);
        return;
    }
    load_elements(matrix.data, matrix.dtype, first, count, dst);
    if (matrix.mask)
        apply_dropout(*matrix.mask, first, count, dst);
}

}  // namespace NF4LORA_ISA
}  // namespace nf4lora
