"""Checks of single operands, for the one check that each op makes (`nf4lora.checks`): dtypes, devices and sizes."""

import torch
from torch import Tensor

from . import backends
from .abi import MAX_GROUP
from .codebook import BLOCKSIZES, NESTED_BLOCKSIZE, QUANT_TYPES
from .quant_keys import DTYPES

FLOATS = tuple(DTYPES.values())
_BYTES = (torch.uint8,)
_BITS = (torch.float32, torch.int32)  # layers keep the bits of float32 as int32


# Every call of a layer passes through here: what is right leaves after one comparison each, the rest is worded after.


def float_dtypes() -> tuple[torch.dtype, ...]:
    """float64 exists for gradcheck and truth only, so only where the reference is asked for by name."""
    return (*FLOATS, torch.float64) if backends.forced() == "reference" else FLOATS


def dtype_in(name: str, t: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if t.dtype not in allowed:
        raise TypeError(f"{name}: found {t.dtype}, wanted one of {allowed}")


def same_device(first: Tensor, **others: Tensor) -> None:
    for name, t in others.items():
        if t.device != first.device:
            raise ValueError(f"{name}: found on {t.device}, wanted on {first.device} like the first argument")


def tensor(name: str, t: Tensor, dtypes: tuple[torch.dtype, ...], numel: int, like: Tensor) -> None:
    if t.dtype in dtypes and t.numel() == numel and t.is_contiguous() and t.device == like.device:
        return
    dtype_in(name, t, dtypes)
    if t.numel() != numel or not t.is_contiguous():
        kind = "" if t.is_contiguous() else "non-contiguous "
        raise ValueError(f"{name}: found {t.numel()} {kind}elements, wanted {numel} contiguous")
    same_device(like, **{name: t})


def matrix(name: str, t: Tensor, rows: int | None, columns: int | None, dtypes: tuple[torch.dtype, ...] | None = None) -> None:
    if t.dtype not in (dtypes or FLOATS):
        dtype_in(name, t, dtypes or float_dtypes())
    shape = t.shape
    if len(shape) != 2 or (rows is not None and rows != shape[0]) or (columns is not None and columns != shape[1]):
        wanted = f"a matrix of {'any' if rows is None else rows} x {'any' if columns is None else columns}"
        raise ValueError(f"{name}: found shape {tuple(t.shape)}, wanted {wanted}")


def rows(
    name: str, t: Tensor, columns: int | None, leading: torch.Size | None = None, dtypes: tuple[torch.dtype, ...] | None = None
) -> None:
    """A matrix in any number of dimensions: [..., columns], the others as in `leading`."""
    if t.dtype not in (dtypes or FLOATS):
        dtype_in(name, t, dtypes or float_dtypes())
    shape = t.shape
    if not shape or (columns is not None and columns != shape[-1]) or (leading is not None and leading != shape[:-1]):
        others = "..." if leading is None else str(tuple(leading))[1:-1].rstrip(",")
        wanted = ", ".join(filter(None, (others, "any" if columns is None else str(columns))))
        raise ValueError(f"{name}: found shape {tuple(shape)}, wanted [{wanted}]")


def format(blocksize: int, quant_type: str) -> None:
    if type(blocksize) is not int or blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize: found {blocksize!r}, wanted one of {BLOCKSIZES}")
    if quant_type not in QUANT_TYPES:
        raise ValueError(f"quant_type: found {quant_type!r}, wanted one of {QUANT_TYPES}")


def weight(packed, absmax, nested_absmax, offset, numel: int, blocksize: int, quant_type: str) -> None:
    format(blocksize, quant_type)
    tensor("packed", packed, _BYTES, -(-numel // 2), packed)
    nested = nested_absmax is not None
    if nested != (offset is not None):
        raise ValueError("nested_absmax and offset belong together: found one of them without the other")
    blocks = -(-numel // blocksize)
    tensor("absmax", absmax, _BYTES if nested else _BITS, blocks, packed)
    if nested:
        tensor("nested_absmax", nested_absmax, _BITS, -(-blocks // NESTED_BLOCKSIZE), packed)
        tensor("offset", offset, _BITS, 1, packed)


def lora(lora_A: Tensor | None, lora_B: Tensor | None, N: int | None, K: int | None, like: Tensor) -> None:
    if (lora_A is None) != (lora_B is None):
        raise ValueError("lora_A and lora_B belong together: found one of them without the other")
    if lora_A is not None:
        matrix("lora_A", lora_A, None, K)
        matrix("lora_B", lora_B, N, lora_A.shape[0])
        same_device(like, lora_A=lora_A, lora_B=lora_B)


def dropout(seed: Tensor | None, p: float, like: Tensor) -> None:
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout_p: found {p}, wanted in [0, 1)")
    if seed is not None:
        tensor("seed", seed, (torch.int64,), 1, like)


def group(sizes, **lists) -> list[dict]:
    """The members' operands, None where the list is empty."""
    if not 1 <= len(sizes) <= MAX_GROUP:
        raise ValueError(f"group: found {len(sizes)} members, wanted 1 to {MAX_GROUP}")
    for name, values in lists.items():
        wanted = "" if name in ("packed", "absmax", "scaling") else "none or "
        if len(values) != len(sizes) and (values or not wanted):
            raise ValueError(f"{name}: found {len(values)}, wanted {wanted}one for each of the {len(sizes)} members")
        if len({t.dtype for t in values if isinstance(t, Tensor)}) > 1:
            raise TypeError(f"{name}: found {[t.dtype for t in values]}, wanted one dtype in a group")
    return [{name: values[i] if values else None for name, values in lists.items()} for i in range(len(sizes))]


def raise_not_finite(name: str, A: Tensor) -> None:
    """Raise the ValueError that says how many elements of A are NaN or Inf and where the first is."""
    bad = (~A.isfinite()).reshape(-1)
    count, first = int(bad.sum()), int(bad.to(torch.uint8).argmax())
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(first, device="cpu"), A.shape))
    value = A[where].item()
    raise ValueError(f"{name}: found {count} NaN or Inf of {A.numel()} elements, the first ({value}) at {where}; wanted none")
