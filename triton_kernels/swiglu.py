"""SwiGLU and its gradient in Triton: one pass over all operands, float32 arithmetic."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_tiles import TritonConfig
from .nf4 import to_float32

# Of exp: 1 / ln 2, and ln 2 in two parts, whose first has zeros enough that its products with small integers are exact.
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN2_HIGH = tl.constexpr(0.693145751953125)
_LN2_LOW = tl.constexpr(1.4286068203094173e-06)
_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2**23: a sum with it holds the nearest integer in its low bits
_VANISHES = tl.constexpr(-110.0)  # exp is below every float32 there


@triton.jit
def _power_of_two(n):
    """2**n of int32 n in -126 … 127."""
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _exp(v):
    """exp of float32 v <= 0, within 2 ulp where the device's exp2 is: tl.exp loses as many bits as v has before the point."""
    v = tl.where(v < _VANISHES, tl.full(v.shape, _VANISHES, tl.float32), v)
    magic = tl.full(v.shape, _MAGIC, tl.float32)
    rounded = tl.fma(v, tl.full(v.shape, _LOG2_E, tl.float32), magic)
    n = rounded - magic
    rest = tl.fma(n, tl.full(v.shape, -_LN2_LOW, tl.float32), tl.fma(n, tl.full(v.shape, -_LN2_HIGH, tl.float32), v))
    whole = rounded.to(tl.int32, bitcast=True) - magic.to(tl.int32, bitcast=True)
    half = whole >> 1  # in two steps, as 2**n itself may be denormal
    return tl.exp2(rest * _LOG2_E) * _power_of_two(half) * _power_of_two(whole - half)


@triton.jit
def _sigmoid(v):
    """sigmoid(v) and 1 - sigmoid(v), the latter without cancellation; by exp(-|v|), which never overflows."""
    e = _exp(-tl.abs(v))
    larger = tl.div_rn(tl.full(v.shape, 1.0, tl.float32), 1.0 + e)
    smaller = e * larger
    return tl.where(v < 0, smaller, larger), tl.where(v < 0, larger, smaller)


@triton.jit(do_not_specialize=["blocks"])
def swiglu_fwd_kernel(
    gate_up_ptr,  # float32, bfloat16 or float16 [M, 2 N], the gate's columns first
    out_ptr,  # same dtype [M, N]
    N,
    blocks,  # of BLOCK columns in a row
    BLOCK: tl.constexpr,
):
    """out = gate * sigmoid(gate) * up. Bytes moved: 3 M N itemsize. Source: SwiGLU, arXiv:2002.05202."""
    row, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    column = block * BLOCK + tl.arange(0, BLOCK)
    mask = column < N
    gate = to_float32(tl.load(gate_up_ptr + row * 2 * N + column, mask=mask))
    up = to_float32(tl.load(gate_up_ptr + row * 2 * N + N + column, mask=mask))
    sigmoid, _ = _sigmoid(gate)
    tl.store(out_ptr + row * N + column, (gate * sigmoid * up).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["blocks"])
def swiglu_bwd_kernel(
    gate_up_ptr,  # float32, bfloat16 or float16 [M, 2 N], the gate's columns first
    dh_ptr,  # same dtype [M, N]
    out_ptr,  # same dtype [M, 2 N]
    N,
    blocks,  # of BLOCK columns in a row
    BLOCK: tl.constexpr,
):
    """The gradient of gate_up. Bytes moved: 5 M N itemsize."""
    row, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    column = block * BLOCK + tl.arange(0, BLOCK)
    mask = column < N
    gate = to_float32(tl.load(gate_up_ptr + row * 2 * N + column, mask=mask))
    up = to_float32(tl.load(gate_up_ptr + row * 2 * N + N + column, mask=mask))
    dh = to_float32(tl.load(dh_ptr + row * N + column, mask=mask))
    sigmoid, rest = _sigmoid(gate)
    dtype = out_ptr.dtype.element_ty
    tl.store(out_ptr + row * 2 * N + column, (dh * up * sigmoid * (1.0 + gate * rest)).to(dtype), mask=mask)
    tl.store(out_ptr + row * 2 * N + N + column, (dh * gate * sigmoid).to(dtype), mask=mask)


def swiglu_fwd(gate_up: Tensor, config: TritonConfig) -> Tensor:
    """[M, N] of gate_up [M, 2 N]. Source: nf4lora/reference.py, swiglu_fwd."""
    gate_up, (M, N) = gate_up.contiguous(), (gate_up.shape[0], gate_up.shape[1] // 2)
    out = gate_up.new_empty((M, N))
    if out.numel():
        blocks = triton.cdiv(N, config.weights)
        with torch.cuda.device_of(gate_up):
            swiglu_fwd_kernel[M * blocks,](
                gate_up, out, N, blocks, BLOCK=config.weights, num_warps=config.warps, enable_fp_fusion=False
            )  # fmt: skip
    return out


def swiglu_bwd(gate_up: Tensor, dh: Tensor, config: TritonConfig) -> Tensor:
    """[M, 2 N] of gate_up [M, 2 N] and dh [M, N]. Source: nf4lora/reference.py, swiglu_bwd."""
    gate_up, dh, (M, N) = gate_up.contiguous(), dh.contiguous(), dh.shape
    out = gate_up.new_empty((M, 2 * N))
    if out.numel():
        blocks = triton.cdiv(N, config.weights)
        with torch.cuda.device_of(gate_up):
            swiglu_bwd_kernel[M * blocks,](
                gate_up, dh, out, N, blocks, BLOCK=config.weights, num_warps=config.warps, enable_fp_fusion=False
            )  # fmt: skip
    return out
