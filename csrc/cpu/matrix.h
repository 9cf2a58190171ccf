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
    int32_t part = 0;         // of fp32 as the sum of three bf16, the greatest first; 0: as it is
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

// Whether its elements are bf16: exactly, or as a 4-bit weight rounded to it, or a part.
NF4LORA_INLINE bool is_bf16(const Matrix &matrix) {
    return !matrix.data || matrix.part || (matrix.dtype == kBFloat16 && !matrix.mask);
}

constexpr int32_t kParts = 3;

NF4LORA_INLINE bool has_parts(const Matrix &matrix) {
    return matrix.data && matrix.dtype == kFloat32 && !matrix.mask;
}

// Parts are cut off, not rounded, so that no finite number becomes infinite; an infinity and NaN are all in the first. An infinity
// on the other side of the product gives NaN where a part is 0.
static void load_part(const Matrix &matrix, int64_t first, int64_t count, uint16_t *dst) {
    const float *const from = static_cast<const float *>(matrix.data) + first;
    for (int64_t i = 0; i < count; ++i) {
        uint32_t u, whole;
        memcpy(&whole, from + i, sizeof whole);
        float left = from[i];
        for (int32_t part = 1; part < matrix.part; ++part) {
            memcpy(&u, &left, sizeof u);
            u &= 0xffff0000;
            float cut;
            memcpy(&cut, &u, sizeof cut);
            left -= cut;
        }
        memcpy(&u, &left, sizeof u);
        const bool finite = (whole & 0x7f800000) != 0x7f800000;
        const uint32_t quiet = (whole & 0x7fffffff) > 0x7f800000 ? 0x40 : 0;
        dst[i] = static_cast<uint16_t>(matrix.part == 1 ? u >> 16 | quiet : finite ? u >> 16 : 0);
    }
}

// The same of what is bf16, as such.
NF4LORA_INLINE void load_line(const Matrix &matrix, int64_t row, int64_t col, int64_t count, int64_t width, uint16_t *dst) {
    const int64_t first = row * matrix.stride + col;
    if (count > 0 && matrix.part)
        load_part(matrix, first, count, dst);
    else if (count > 0 && matrix.data)
        memcpy(dst, static_cast<const uint16_t *>(matrix.data) + first, count * sizeof *dst);
    else if (count > 0)
        decode_halves(*matrix.weight, first, count, kBFloat16, dst);
    memset(dst + count, 0, (width - count) * sizeof *dst);
}

// The same where it lies, or in `line`.
template <class Element>
NF4LORA_INLINE const Element *line_of(const Matrix &matrix, int64_t row, int64_t col, int64_t count, int64_t width, Element *line) {
    constexpr int32_t kIs = sizeof(Element) == sizeof(float) ? kFloat32 : kBFloat16;
    if (matrix.data && matrix.dtype == kIs && !matrix.mask && !matrix.part && count == width)
        return static_cast<const Element *>(matrix.data) + row * matrix.stride + col;
    load_line(matrix, row, col, count, width, line);
    return line;
}

// Brings a row's part nearer that will be decoded soon: rows of a 4-bit weight lie too far apart for the processor to foresee.
NF4LORA_INLINE void fetch_ahead(const Matrix &matrix, int64_t row, int64_t col, int64_t count) {
    if (matrix.data)
        return;
    constexpr int64_t kLine = 64;
    const Weight &w = *matrix.weight;
    const int64_t first = row * matrix.stride + col, size = w.nested_absmax ? 1 : sizeof(float);
    const auto fetch = [](const void *base, int64_t begin, int64_t end) {
        for (int64_t i = begin & -kLine; i < end; i += kLine)
            __builtin_prefetch(static_cast<const char *>(base) + i, 0, 2);
    };
    fetch(w.packed, first / 2, (first + count) / 2);
    fetch(w.absmax, first / w.blocksize * size, ((first + count) / w.blocksize + 1) * size);
}

}  // namespace NF4LORA_ISA
}  // namespace nf4lora
