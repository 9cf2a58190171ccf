// h = gate * sigmoid(gate) * up, and its gradient: one pass over all operands
// Operands:      gate_up dtype [M, 2 N], the gate's columns first -> h dtype [M, N];
//                with dh dtype [M, N]: -> the gradient of gate_up, dtype [M, 2 N]
// Rounding:      fp32 in the order of nf4lora/reference.py, each result rounded once; sigmoid within 3 ulp
// Preconditions: ops.py checks the operands
// Memory:        forward 2 M N elements in, M N out; backward 3 M N in, 2 M N out; no allocation
#include "convert.h"
#include "ops.h"
#include "threads.h"

namespace nf4lora {
namespace NF4LORA_ISA {
namespace {

constexpr int64_t kPiece = 1024;  // columns held as fp32 at a time

// Of t <= 0: the power of 2 nearest to it, times a polynomial of what is left, in [-log(2) / 2, log(2) / 2].
NF4LORA_INLINE Vec exp_of_negative(Vec t) {
    constexpr float kLog2e = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: numbers near it are whole
    constexpr float kLeast = -110.0f;      // where the result is 0; NaN stays
    t = t < broadcast(kLeast) ? broadcast(kLeast) : t;
    const Vec shifted = fma(t, broadcast(kLog2e), broadcast(kRound)), whole = shifted - kRound;
    const Vec r = fma(whole, broadcast(-kLn2Low), fma(whole, broadcast(-kLn2High), t));
    Vec p = broadcast(1.9875691500e-4f);
    for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = fma(p, r, broadcast(c));
    const Vec value = fma(p, r * r, r) + 1.0f;
    // in two steps, as 2^-149 has no normal number of its own
    const UVec exponent = (UVec)(IVec)shifted - bits_of(kRound), half = (UVec)((IVec)exponent >> 1);
    return value * (Vec)((half + 127) << 23) * (Vec)((exponent - half + 127) << 23);
}

struct Sigmoid {
    Vec value, rest;  // rest: 1 - value, without the cancellation
};

NF4LORA_INLINE Sigmoid sigmoid(Vec v) {
    const Vec e = exp_of_negative((Vec)((UVec)v | 0x80000000u)), larger = 1.0f / (1.0f + e), smaller = e * larger;
    return {v < 0.0f ? smaller : larger, v < 0.0f ? larger : smaller};
}

void forward(float *__restrict gate, const float *__restrict up) {
    for (int64_t i = 0; i < kPiece; i += kWidth)
        store(gate + i, load(gate + i) * sigmoid(load(gate + i)).value * load(up + i));
}

void backward(float *__restrict gate, float *__restrict up, const float *__restrict dh) {
    for (int64_t i = 0; i < kPiece; i += kWidth) {
        const Vec g = load(gate + i), d = load(dh + i);
        const Sigmoid s = sigmoid(g);
        store(gate + i, d * load(up + i) * s.value * (1.0f + g * s.rest));
        store(up + i, d * g * s.value);
    }
}

template <class Work>
const char *for_pieces(const SwigluParams &p, const Work &work) {
    const int64_t of_row = ceil_div(p.N, kPiece);
    for_parts(p.workers, p.M * of_row, [&](int64_t part, int) {
        const int64_t row = part / of_row, col = part % of_row * kPiece, count = min_of(kPiece, p.N - col);
        float gate[kPiece] = {}, up[kPiece] = {};
        load_elements(p.gate_up, p.dtype, row * 2 * p.N + col, count, gate);
        load_elements(p.gate_up, p.dtype, row * 2 * p.N + p.N + col, count, up);
        work(row, col, count, gate, up);
    });
    return nullptr;
}

}  // namespace

const char *swiglu_fwd(const SwigluParams &p) {
    return for_pieces(p, [&p](int64_t row, int64_t col, int64_t count, float *gate, float *up) {
        forward(gate, up);
        store_elements(p.out, p.dtype, row * p.N + col, count, gate);
    });
}

const char *swiglu_bwd(const SwigluParams &p) {
    return for_pieces(p, [&p](int64_t row, int64_t col, int64_t count, float *gate, float *up) {
        float dh[kPiece] = {};
        load_elements(p.dh, p.dtype, row * p.N + col, count, dh);
        backward(gate, up, dh);
        store_elements(p.out, p.dtype, row * 2 * p.N + col, count, gate);
        store_elements(p.out, p.dtype, row * 2 * p.N + p.N + col, count, up);
    });
}

}  // namespace NF4LORA_ISA
}  // namespace nf4lora
