"""The one check of each op's arguments: dtypes, devices and sizes. Values only by `raise_not_finite`. Says what was found and what was wanted."""

import math

import torch
from torch import Tensor

from . import operands
from .matrices import rows
from .operands import FLOATS, float_dtypes, format, raise_not_finite

__all__ = ["FLOATS", "float_dtypes", "format", "raise_not_finite"]


def quantize(a: Tensor, blocksize: int, quant_type: str) -> None:
    operands.dtype_in("a", a, FLOATS)
    format(blocksize, quant_type)


def quantize_absmax(absmax: Tensor, offset: Tensor) -> None:
    operands.tensor("absmax", absmax, (torch.float32,), absmax.numel(), absmax)
    operands.tensor("offset", offset, (torch.float32,), 1, absmax)


def dequantize(packed, absmax, nested_absmax, offset, shape, blocksize, quant_type, dtype) -> None:
    if dtype not in float_dtypes():
        raise TypeError(f"dtype: found {dtype}, wanted one of {float_dtypes()}")
    operands.weight(packed, absmax, nested_absmax, offset, math.prod(shape), blocksize, quant_type)


def dequantize_into(packed, absmax, nested_absmax, offset, blocksize, quant_type, out) -> None:
    operands.tensor("out", out, float_dtypes(), out.numel(), packed)
    operands.weight(packed, absmax, nested_absmax, offset, out.numel(), blocksize, quant_type)


def linear_fwd(
    x, packed, absmax, nested_absmax, offset, bias, lora_A, lora_B, seed, N, blocksize, quant_type, scaling, dropout_p
) -> None:  # fmt: skip
    operands.rows("x", x, None)
    K = x.shape[-1]
    operands.weight(packed, absmax, nested_absmax, offset, N * K, blocksize, quant_type)
    operands.same_device(x, packed=packed)
    if bias is not None:
        operands.tensor("bias", bias, float_dtypes(), N, x)
    operands.lora(lora_A, lora_B, N, K, x)
    operands.dropout(seed, dropout_p, x)


def linear_bwd(
    dy, packed, absmax, nested_absmax, offset, lora_A, dyb, seed, K, blocksize, quant_type, dropout_p
) -> None:  # fmt: skip
    operands.matrix("dy", dy, None, None)
    operands.weight(packed, absmax, nested_absmax, offset, dy.shape[1] * K, blocksize, quant_type)
    operands.same_device(dy, packed=packed)
    if (lora_A is None) != (dyb is None):
        raise ValueError("lora_A and dyb belong together: found one of them without the other")
    if lora_A is not None:
        operands.matrix("lora_A", lora_A, None, K)
        operands.matrix("dyb", dyb, dy.shape[0], lora_A.shape[0], (dy.dtype,))
        operands.same_device(dy, lora_A=lora_A, dyb=dyb)
    operands.dropout(seed, dropout_p, dy)


def lora_bwd(dy, x, xa, lora_A, lora_B, seed, scaling, dropout_p, need_dA, need_dB) -> None:
    operands.matrix("dy", dy, None, None)
    operands.lora(lora_A, lora_B, dy.shape[1], None, dy)
    if need_dA:
        operands.matrix("x", x, dy.shape[0], lora_A.shape[1], (dy.dtype,))
    if need_dB:
        operands.matrix("xa", xa, dy.shape[0], lora_A.shape[0], (dy.dtype,))
    operands.same_device(dy, x=x, xa=xa)
    operands.dropout(seed, dropout_p, dy)


def linear_grads(
    dy, x, xa, packed, absmax, nested_absmax, offset, lora_A, lora_B, seed, K, blocksize, quant_type, scaling, dropout_p,
    need_dx, need_dA, need_dB,
) -> None:  # fmt: skip
    operands.rows("dy", dy, None)
    operands.weight(packed, absmax, nested_absmax, offset, dy.shape[-1] * K, blocksize, quant_type)
    operands.same_device(dy, packed=packed)
    operands.lora(lora_A, lora_B, dy.shape[-1], K, dy)
    _saved(dy, x, xa, need_dA, need_dB, K, None if lora_A is None else lora_A.shape[0])
    operands.dropout(seed, dropout_p, dy)


def _saved(dy: Tensor, x: Tensor | None, xa: Tensor | None, need_dA: bool, need_dB: bool, K: int, r: int | None) -> None:
    """What the forward left for the gradients of the adapters, where they are asked for; r: None without adapters."""
    for name, t, needed in (("x", x, need_dA), ("xa", xa, need_dB)):
        if needed and (t is None or r is None):
            raise ValueError(f"{name}: found {'None' if t is None else 'no adapter'}, wanted it for the adapters' gradients")
        if needed:
            operands.same_device(dy, **{name: t})
    if need_dA:
        operands.rows("x", x, K, dy.shape[:-1], (dy.dtype,))
    if need_dB:
        operands.matrix("xa", xa, rows(dy), r, (dy.dtype,))


def group_fwd(
    x, packed, absmax, nested_absmax, offset, bias, lora_A, lora_B, seed, N, blocksize, quant_type, scaling, dropout_p
) -> None:  # fmt: skip
    operands.rows("x", x, None)
    members = operands.group(
        N, packed=packed, absmax=absmax, nested_absmax=nested_absmax, offset=offset, bias=bias, lora_A=lora_A, lora_B=lora_B,
        scaling=scaling,
    )  # fmt: skip
    for n, m in zip(N, members, strict=True):
        linear_fwd(x, m["packed"], m["absmax"], m["nested_absmax"], m["offset"], m["bias"], m["lora_A"], m["lora_B"], seed,
                   n, blocksize, quant_type, m["scaling"], dropout_p)  # fmt: skip


def group_bwd(
    dy, packed, absmax, nested_absmax, offset, lora_A, dyb, seed, N, K, blocksize, quant_type, dropout_p
) -> None:  # fmt: skip
    operands.matrix("dy", dy, None, sum(N))
    members = operands.group(N, packed=packed, absmax=absmax, nested_absmax=nested_absmax, offset=offset, lora_A=lora_A)
    for n, m in zip(N, members, strict=True):
        operands.weight(m["packed"], m["absmax"], m["nested_absmax"], m["offset"], n * K, blocksize, quant_type)
        operands.same_device(dy, packed=m["packed"])
        if m["lora_A"] is not None:
            operands.matrix("lora_A", m["lora_A"], None, K)
            operands.same_device(dy, lora_A=m["lora_A"])
    if bool(lora_A) != (dyb is not None):
        raise ValueError("lora_A and dyb belong together: found one of them without the other")
    if lora_A:
        operands.matrix("dyb", dyb, dy.shape[0], sum(A.shape[0] for A in lora_A), (dy.dtype,))
        operands.same_device(dy, dyb=dyb)
    operands.dropout(seed, dropout_p, dy)


def group_lora_bwd(dy, x, xa, lora_A, lora_B, seed, scaling, dropout_p, need_dA, need_dB) -> None:
    operands.matrix("dy", dy, None, None)
    operands.group(lora_A, lora_A=lora_A, lora_B=lora_B, scaling=scaling)
    for A, B in zip(lora_A, lora_B, strict=True):
        operands.lora(A, B, None, None, dy)
        operands.matrix("lora_A", A, None, lora_A[0].shape[1])
    K, r = lora_A[0].shape[1], sum(A.shape[0] for A in lora_A)
    operands.matrix("dy", dy, None, sum(B.shape[0] for B in lora_B))
    if need_dA:
        operands.matrix("x", x, dy.shape[0], K, (dy.dtype,))
    if need_dB:
        operands.matrix("xa", xa, dy.shape[0], r, (dy.dtype,))
    operands.same_device(dy, x=x, xa=xa)
    operands.dropout(seed, dropout_p, dy)


def group_grads(
    dys, x, xa, packed, absmax, nested_absmax, offset, lora_A, lora_B, seed, N, K, blocksize, quant_type, scaling, dropout_p,
    need_dx, need_dA, need_dB,
) -> None:  # fmt: skip
    members = operands.group(
        N, packed=packed, absmax=absmax, nested_absmax=nested_absmax, offset=offset, lora_A=lora_A, lora_B=lora_B,
        scaling=scaling,
    )  # fmt: skip
    if len(dys) not in (1, len(N)):
        raise ValueError(f"dy: found {len(dys)}, wanted one for all members or one for each of the {len(N)}")
    columns = [sum(N)] if len(dys) == 1 else N
    for dy, n in zip(dys, columns, strict=True):
        operands.rows("dy", dy, n, *((dys[0].shape[:-1], (dys[0].dtype,)) if dy is not dys[0] else ()))
        operands.same_device(dys[0], dy=dy)
    for n, m in zip(N, members, strict=True):
        operands.weight(m["packed"], m["absmax"], m["nested_absmax"], m["offset"], n * K, blocksize, quant_type)
        operands.same_device(dys[0], packed=m["packed"])
        operands.lora(m["lora_A"], m["lora_B"], n, K, dys[0])
    _saved(dys[0], x, xa, need_dA, need_dB, K, sum(A.shape[0] for A in lora_A) if lora_A else None)
    operands.dropout(seed, dropout_p, dys[0])


def swiglu_fwd(gate_up: Tensor) -> None:
    operands.rows("gate_up", gate_up, None)
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up: found {gate_up.shape[-1]} columns, wanted an even number")


def swiglu_bwd(gate_up: Tensor, dh: Tensor) -> None:
    swiglu_fwd(gate_up)
    operands.rows("dh", dh, gate_up.shape[-1] // 2, gate_up.shape[:-1], (gate_up.dtype,))
    operands.same_device(gate_up, dh=dh)
