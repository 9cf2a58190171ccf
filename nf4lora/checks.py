"""The one check of each op's arguments: dtypes, devices and sizes. Values only by `raise_not_finite`. Says what was found and what was wanted."""

import math

import torch
from torch import Tensor

from . import backends
from .codebook import BLOCKSIZES, NESTED_BLOCKSIZE, QUANT_TYPES
from .quant_keys import DTYPES
from .quant_state import ceil_div

FLOATS = tuple(DTYPES.values())


def quantize(a: Tensor, blocksize: int, quant_type: str) -> None:
    _dtype("a", a, FLOATS)
    format(blocksize, quant_type)


def quantize_absmax(absmax: Tensor, offset: Tensor) -> None:
    _tensor("absmax", absmax, (torch.float32,), absmax.numel(), absmax)
    _tensor("offset", offset, (torch.float32,), 1, absmax)


def _statistics(absmax: Tensor, nested_absmax: Tensor | None, offset: Tensor | None) -> None:
    nested = nested_absmax is not None
    if nested != (offset is not None):
        raise ValueError("nested_absmax and offset belong together: found one of them without the other")
    _tensor("absmax", absmax, (torch.uint8 if nested else torch.float32,), absmax.numel(), absmax)
    if nested:
        _tensor("nested_absmax", nested_absmax, (torch.float32,), ceil_div(absmax.numel(), NESTED_BLOCKSIZE), absmax)
        _tensor("offset", offset, (torch.float32,), 1, absmax)


def dequantize(packed, absmax, nested_absmax, offset, shape, blocksize, quant_type, dtype) -> None:
    if dtype not in float_dtypes():
        raise TypeError(f"dtype: found {dtype}, wanted one of {float_dtypes()}")
    _weight(packed, absmax, nested_absmax, offset, math.prod(shape), blocksize, quant_type)


def linear_fwd(
    x, packed, absmax, nested_absmax, offset, bias, lora_A, lora_B, seed, N, blocksize, quant_type, scaling, dropout_p
) -> None:  # fmt: skip
    _matrix("x", x, None)
    K = x.shape[1]
    _weight(packed, absmax, nested_absmax, offset, N * K, blocksize, quant_type)
    _same_device(x, packed=packed)
    if bias is not None:
        _tensor("bias", bias, float_dtypes(), N, x)
    _lora(lora_A, lora_B, N, K, x)
    _dropout(seed, dropout_p, x)


def linear_bwd(
    dy, packed, absmax, nested_absmax, offset, lora_A, dyb, seed, K, blocksize, quant_type, dropout_p
) -> None:  # fmt: skip
    _matrix("dy", dy, None)
    _weight(packed, absmax, nested_absmax, offset, dy.shape[1] * K, blocksize, quant_type)
    _same_device(dy, packed=packed)
    if (lora_A is None) != (dyb is None):
        raise ValueError("lora_A and dyb belong together: found one of them without the other")
    if lora_A is not None:
        _matrix("lora_A", lora_A, (lora_A.shape[0], K))
        _matrix("dyb", dyb, (dy.shape[0], lora_A.shape[0]), (dy.dtype,))
        _same_device(dy, lora_A=lora_A, dyb=dyb)
    _dropout(seed, dropout_p, dy)


def lora_bwd(dy, x, xa, lora_A, lora_B, seed, scaling, dropout_p, need_dA, need_dB) -> None:
    _matrix("dy", dy, None)
    _lora(lora_A, lora_B, dy.shape[1], lora_A.shape[1], dy)
    if need_dA:
        _matrix("x", x, (dy.shape[0], lora_A.shape[1]), (dy.dtype,))
    if need_dB:
        _matrix("xa", xa, (dy.shape[0], lora_A.shape[0]), (dy.dtype,))
    _same_device(dy, x=x, xa=xa)
    _dropout(seed, dropout_p, dy)


def float_dtypes() -> tuple[torch.dtype, ...]:
    """float64 exists for gradcheck and truth only, so only where the reference is asked for by name."""
    return (*FLOATS, torch.float64) if backends.forced() == "reference" else FLOATS


def _dtype(name: str, t: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if t.dtype not in allowed:
        raise TypeError(f"{name}: found {t.dtype}, wanted one of {allowed}")


def _same_device(first: Tensor, **others: Tensor) -> None:
    for name, t in others.items():
        if t.device != first.device:
            raise ValueError(f"{name}: found on {t.device}, wanted on {first.device} like the first argument")


def _tensor(name: str, t: Tensor, dtypes: tuple[torch.dtype, ...], numel: int, like: Tensor) -> None:
    _dtype(name, t, dtypes)
    if t.numel() != numel or not t.is_contiguous():
        kind = "" if t.is_contiguous() else "non-contiguous "
        raise ValueError(f"{name}: found {t.numel()} {kind}elements, wanted {numel} contiguous")
    _same_device(like, **{name: t})


def _matrix(name: str, t: Tensor, shape: tuple[int, int] | None, dtypes: tuple[torch.dtype, ...] | None = None) -> None:
    _dtype(name, t, dtypes or float_dtypes())
    if t.ndim != 2 or (shape is not None and tuple(t.shape) != tuple(shape)):
        wanted = "a matrix" if shape is None else f"shape {tuple(shape)}"
        raise ValueError(f"{name}: found shape {tuple(t.shape)}, wanted {wanted}")


def format(blocksize: int, quant_type: str) -> None:
    if type(blocksize) is not int or blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize: found {blocksize!r}, wanted one of {BLOCKSIZES}")
    if quant_type not in QUANT_TYPES:
        raise ValueError(f"quant_type: found {quant_type!r}, wanted one of {QUANT_TYPES}")


def _weight(packed, absmax, nested_absmax, offset, numel: int, blocksize: int, quant_type: str) -> None:
    format(blocksize, quant_type)
    _tensor("packed", packed, (torch.uint8,), ceil_div(numel, 2), packed)
    _statistics(absmax, nested_absmax, offset)
    _same_device(packed, absmax=absmax)
    if absmax.numel() != ceil_div(numel, blocksize):
        raise ValueError(f"absmax: found {absmax.numel()} elements, wanted {ceil_div(numel, blocksize)}")


def _lora(lora_A: Tensor | None, lora_B: Tensor | None, N: int, K: int, like: Tensor) -> None:
    if (lora_A is None) != (lora_B is None):
        raise ValueError("lora_A and lora_B belong together: found one of them without the other")
    if lora_A is not None:
        _matrix("lora_A", lora_A, (lora_A.shape[0], K))
        _matrix("lora_B", lora_B, (N, lora_A.shape[0]))
        _same_device(like, lora_A=lora_A, lora_B=lora_B)


def _dropout(seed: Tensor | None, p: float, like: Tensor) -> None:
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout_p: found {p}, wanted in [0, 1)")
    if seed is not None:
        _tensor("seed", seed, (torch.int64,), 1, like)


def raise_not_finite(name: str, A: Tensor) -> None:
    """Raise the ValueError that says how many elements of A are NaN or Inf and where the first is."""
    bad = (~A.isfinite()).reshape(-1)
    count, first = int(bad.sum()), int(bad.to(torch.uint8).argmax())
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(first, device="cpu"), A.shape))
    value = A[where].item()
    raise ValueError(f"{name}: found {count} NaN or Inf of {A.numel()} elements, the first ({value}) at {where}; wanted none")
