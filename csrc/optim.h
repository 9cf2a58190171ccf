// What the steps of an optimizer share between host and device: the constants of a step, and the 8-bit codes of its
// states, found without a search.
//   constants: each computed in double and rounded once, the bits of nf4lora/reference_optim.py::constants
//   codes:     the nearest of a dynamic map's 256 values, a tie to the lower; NaN is code 255
#pragma once
#include <cmath>
#include <cstring>
#include <limits>

#include "nf4.h"

namespace nf4lora {

constexpr int kStateBlock = 256;  // elements of a state that share an absmax

// ---- constants

struct OptimConstants {
    float lr, keep, beta1, rest1, beta2, rest2, eps, root, step_size;
};

// base to the power of an exponent of 0 and more, by squaring.
NF4LORA_HD double power(double base, int64_t exponent) {
    double result = 1.0;
    for (; exponent > 0; exponent >>= 1) {
        if (exponent & 1)
            result *= base;
        base *= base;
    }
    return result;
}

NF4LORA_HD OptimConstants constants_of(const OptimHyper &of, int64_t step) {
    const double root = sqrt(1.0 - power(of.beta2, step)), step_size = of.lr / (1.0 - power(of.beta1, step));
    return {static_cast<float>(of.lr),          static_cast<float>(1.0 - of.lr * of.weight_decay),
            static_cast<float>(of.beta1),       static_cast<float>(1.0 - of.beta1),
            static_cast<float>(of.beta2),       static_cast<float>(1.0 - of.beta2),
            static_cast<float>(of.eps),         static_cast<float>(root),
            static_cast<float>(step_size)};
}

// ---- codes. A dynamic map is as fine as its values are small, and so are floating-point numbers: the exponent and the
// first bits of the mantissa of |v| + kCellBias, with v's sign, number a cell with at most one boundary inside it. (The
// bias makes what lies below it a few cells.) The sum is rounded, but never turns the order of two v around; so a cell
// is known to have `below` boundaries under it, and whether v is above the next one, in full precision, gives the code.

constexpr int kCellBits = 7;                     // of the mantissa
constexpr float kCellBias = 0x1p-14f;            // exponents from that of 2^-14 on, which ends in 0001, to that of 1
constexpr int kHalfCells = 16 << kCellBits;      // of a sign
constexpr int kCellShift = 23 - kCellBits;
constexpr int kCellMask = kHalfCells - 1;

struct alignas(16) DynamicCells {
    float value[kDynamicCodes];
    float boundary[kDynamicCodes];   // between a code and the next; the last is infinity
    uint8_t below[2 * kHalfCells];   // by cell: negative v first, the least of them right before the middle
};

// Where the cell of a v in [-1.01, 1.01] lies from the middle of `below`, as `cell_of` finds it from bits.
static constexpr int derive_cell(float v) {
    const double magnitude = v < 0 ? -static_cast<double>(v) : static_cast<double>(v);
    const double sum = static_cast<float>(magnitude + kCellBias);
    double low = kCellBias;
    int exponent = 1;
    for (; sum >= 2 * low; low *= 2)
        ++exponent;
    const int cell = (exponent << kCellBits) + static_cast<int>((sum / low - 1) * (1 << kCellBits));
    return v < 0 ? cell - kHalfCells : cell;
}

// The order of cells is that of their v's.
static constexpr int order_of_cell(int cell) { return cell < 0 ? -1 - (cell + kHalfCells) : cell; }

static constexpr float next_above(float v) {
    const double magnitude = v < 0 ? -static_cast<double>(v) : static_cast<double>(v);
    double ulp = 0x1p-23;  // of the numbers from 1 to 2, then of magnitude
    while (ulp * 0x1p23 > magnitude)
        ulp /= 2;
    if (v < 0 && ulp * 0x1p23 == magnitude)
        ulp /= 2;
    return static_cast<float>(v + ulp);
}

// Where a cell has more than one boundary inside, which no code may then be looked up with, `value` is left empty.
static constexpr DynamicCells derive_dynamic_cells(const float (&code)[kDynamicCodes]) {
    const DynamicBoundaries boundaries = derive_dynamic_boundaries(code);
    DynamicCells cells{};
    int first[kDynamicCodes - 1] = {};  // order of the cell of a boundary
    bool clear = true;
    int before = -kHalfCells - 1;
    for (int i = 0; i < kDynamicCodes - 1; ++i) {
        const float boundary = cells.boundary[i] = boundaries.at[i];
        first[i] = order_of_cell(derive_cell(boundary));
        const bool inside = first[i] == order_of_cell(derive_cell(next_above(boundary)));
        clear = clear && !(inside && first[i] == before);
        before = inside ? first[i] : before;
    }
    cells.boundary[kDynamicCodes - 1] = std::numeric_limits<float>::infinity();
    int below = 0;
    for (int order = -kHalfCells; order < kHalfCells; ++order) {
        while (below < kDynamicCodes - 1 && first[below] < order)
            ++below;
        cells.below[order < 0 ? -1 - order : order + kHalfCells] = static_cast<uint8_t>(below);
    }
    // Beyond the cell of 1 there is NaN alone, which is not below a boundary.
    for (int cell = (15 << kCellBits) + 1; cell < kHalfCells; ++cell)
        cells.below[cell] = cells.below[cell + kHalfCells] = kDynamicCodes - 2;
    for (int i = 0; i < kDynamicCodes; ++i)
        cells.value[i] = clear ? code[i] : 0.0f;
    return cells;
}

constexpr DynamicCells kSignedCells = derive_dynamic_cells(kDynamicCodebook);
constexpr DynamicCells kUnsignedCells = derive_dynamic_cells(kUnsignedDynamicCodebook);
static_assert(kSignedCells.value[255] == 1.0f && kUnsignedCells.value[255] == 1.0f, "a cell has one boundary at most");

// Of `below`, from its start, where v belongs, which is NaN or in [-1.01, 1.01]; any other belongs somewhere.
NF4LORA_HD int32_t place_of_cell(float v) {
    uint32_t bits, biased;
    memcpy(&bits, &v, sizeof bits);
    constexpr uint32_t kBiasBits = (127 - 14) << 23;
    const uint32_t bias_bits = (bits & 0x80000000u) | kBiasBits;
    float bias;
    memcpy(&bias, &bias_bits, sizeof bias);
    const float sum = v + bias;
    memcpy(&biased, &sum, sizeof biased);
    const int32_t sign = static_cast<int32_t>(biased) >> 31, place = static_cast<int32_t>(biased >> kCellShift);
    return kHalfCells + ((sign & ~kCellMask) | (place & kCellMask));
}

// The code of such a v.
NF4LORA_HD uint32_t encode_in_cell(const DynamicCells &cells, float v) {
    const uint32_t below = cells.below[place_of_cell(v)];
    return below + !(v <= cells.boundary[below]);
}

}  // namespace nf4lora
