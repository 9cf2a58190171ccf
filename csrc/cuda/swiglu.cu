// h = gate * sigmoid(gate) * up, and its gradient: one pass over all operands
// Operands:      gate_up dtype [M, 2 N], the gate's columns first -> h dtype [M, N];
//                with dh dtype [M, N]: -> the gradient of gate_up, dtype [M, 2 N]
// Rounding:      fp32 in the order of nf4lora/reference.py, each result rounded once; sigmoid within 3 ulp
// Preconditions: M, N > 0; no pointer needs more than its element's alignment
// Memory:        forward 2 M N elements in, M N out; backward 3 M N in, 2 M N out; no shared memory
// Budget:        memory bound below 37 instructions an output (H200, forward, 16-bit)
//
// Where rows are whole 16-byte accesses and pointers are aligned, a thread takes one access of each operand at a time;
// all else goes element by element. NaN and Inf give what the reference's formula gives: silu(-Inf) is NaN.
#include "../api.h"
#include "../tile.cuh"

namespace nf4lora {
namespace {

constexpr int kThreads = 256;

struct Sigmoid {
    float value, rest;  // rest: 1 - value, without the cancellation
};

// By exp(-|v|), which never overflows, so that the far negative end fades instead of breaking off at -88.
NF4LORA_DEVICE Sigmoid sigmoid(float v) {
    const float e = expf(-fabsf(v)), sum = __fadd_rn(1.0f, e);  // sum in [1, 2], or NaN
    const float approx = reciprocal_approx(sum), larger = __fmaf_rn(approx, -__fmaf_rn(sum, approx, -1.0f), approx);
    const float smaller = __fmul_rn(e, larger);
    return v < 0.0f ? Sigmoid{smaller, larger} : Sigmoid{larger, smaller};
}

NF4LORA_DEVICE float forward(float gate, float up) { return __fmul_rn(__fmul_rn(gate, sigmoid(gate).value), up); }

struct Gradient {
    float gate, up;
};

NF4LORA_DEVICE Gradient backward(float gate, float up, float dh) {
    const Sigmoid s = sigmoid(gate);
    const float slope = __fadd_rn(1.0f, __fmul_rn(gate, s.rest));  // of gate * sigmoid(gate), over sigmoid
    return {__fmul_rn(__fmul_rn(__fmul_rn(dh, up), s.value), slope), __fmul_rn(__fmul_rn(dh, gate), s.value)};
}

// count: 16-byte accesses of [M, N]; of_row: of N
template <class T, bool kBackward>
__global__ void __launch_bounds__(kThreads) swiglu_wide(
    const uint4 *__restrict__ gate_up, const uint4 *__restrict__ dh, uint4 *__restrict__ out, uint32_t count,
    uint32_t of_row, Divisor by_row) {
    constexpr int kCount = Wide<T>::kCount;
    const uint32_t stride = gridDim.x * kThreads;
    for (uint32_t i = blockIdx.x * kThreads + threadIdx.x; i < count; i += stride) {
        const int64_t gate_at = i + int64_t{by_row.quotient(i)} * of_row, up_at = gate_at + of_row;
        float gate[kCount], up[kCount], upper[kCount];
        const uint4 gate_bits = load_stream(gate_up + gate_at), up_bits = load_stream(gate_up + up_at);
        if (kBackward)
            Wide<T>::unpack(load_stream(dh + i), upper);
        Wide<T>::unpack(gate_bits, gate);
        Wide<T>::unpack(up_bits, up);
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
            if (kBackward) {
                const Gradient d = backward(gate[j], up[j], upper[j]);
                gate[j] = d.gate, up[j] = d.up;
            } else {
                gate[j] = forward(gate[j], up[j]);
            }
        }
        out[kBackward ? gate_at : i] = Wide<T>::pack(gate);
        if (kBackward)
            out[up_at] = Wide<T>::pack(up);
    }
}

// Any N, any alignment.
template <class T, bool kBackward>
__global__ void __launch_bounds__(kThreads) swiglu_elements(
    const T *__restrict__ gate_up, const T *__restrict__ dh, T *__restrict__ out, int64_t count, int64_t N) {
    const int64_t stride = int64_t{gridDim.x} * kThreads;
    for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += stride) {
        const int64_t gate_at = i + i / N * N, up_at = gate_at + N;
        const float gate = to_float(gate_up[gate_at]), up = to_float(gate_up[up_at]);
        if (kBackward) {
            const Gradient d = backward(gate, up, to_float(dh[i]));
            out[gate_at] = from_float<T>(d.gate);
            out[up_at] = from_float<T>(d.up);
        } else {
            out[i] = from_float<T>(forward(gate, up));
        }
    }
}

template <class T, bool kBackward>
const char *swiglu(const SwigluParams &p, void *stream) {
    constexpr int kCount = Wide<T>::kCount;
    const int64_t numel = p.M * p.N, accesses = numel / kCount, of_row = p.N / kCount;
    const bool wide = p.N % kCount == 0 && of_row > 1 && accesses < kMostDivided && aligned(p.gate_up, sizeof(uint4)) &&
                      aligned(p.dh, sizeof(uint4)) && aligned(p.out, sizeof(uint4));
    const unsigned grid = grid_of(p.workers, ceil_div(wide ? accesses : numel, kThreads));
    if (wide)
        return NF4LORA_LAUNCH((swiglu_wide<T, kBackward>), grid, kThreads, 0, stream,
                              static_cast<const uint4 *>(p.gate_up), static_cast<const uint4 *>(p.dh),
                              static_cast<uint4 *>(p.out),
                              static_cast<uint32_t>(accesses), static_cast<uint32_t>(of_row), divisor_of(of_row));
    return NF4LORA_LAUNCH((swiglu_elements<T, kBackward>), grid, kThreads, 0, stream, static_cast<const T *>(p.gate_up),
                          static_cast<const T *>(p.dh), static_cast<T *>(p.out), numel, p.N);
}

template <bool kBackward>
const char *swiglu(const SwigluParams &p, void *stream) {
    if (p.dtype == kFloat32)
        return swiglu<float, kBackward>(p, stream);
    return p.dtype == kBFloat16 ? swiglu<__nv_bfloat16, kBackward>(p, stream) : swiglu<__half, kBackward>(p, stream);
}

}  // namespace
}  // namespace nf4lora

const char *nf4lora_cuda_swiglu_fwd(const nf4lora::SwigluParams *p, void *stream) {
    return nf4lora::swiglu<false>(*p, stream);
}

const char *nf4lora_cuda_swiglu_bwd(const nf4lora::SwigluParams *p, void *stream) {
    return nf4lora::swiglu<true>(*p, stream);
}
