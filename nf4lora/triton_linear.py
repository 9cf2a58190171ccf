"""The "triton" rows of the linear: which path runs, and its tiles. The kernels are imported by the first call, as `triton_rows` has it."""

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import backends, triton_rows, triton_tiles
from .matrices import like, matrix, rows
from .triton_tiles import TritonLinearConfig, TritonLoraConfig, TritonPath

_PATHS = {p.name.lower(): p for p in TritonPath}
_OLDEST_TENSOR_CORES = (8, 0)  # for which Triton has instructions


@cache
def kernels() -> tuple[ModuleType, ModuleType, ModuleType]:
    """`nf4lora.triton_kernels`' linear_fwd, linear_bwd and lora, where `triton_rows.why_not` has nothing against them."""
    from .triton_kernels import linear_bwd, linear_fwd, lora

    return linear_fwd, linear_bwd, lora


def why_not(*args: Any) -> str | None:
    """Why Triton cannot run the linear on these arguments, or None; of device and dtype `triton_rows` knows."""
    if reason := triton_rows.why_not(*args):
        return reason
    forced = backends.forced_path()
    if forced is not None and forced not in _PATHS:
        return f"has no path {forced}: wanted one of {tuple(_PATHS)}"
    reason = _no_tensor_cores(args[0]) if args and forced == "tiled" else None
    return None if reason is None else f"path tiled: {reason}"


def _no_tensor_cores(first: Tensor) -> str | None:
    """Why torch has to do the products with `first`, x or dy, or None."""
    if first.dtype == torch.float32:
        return "the tensor cores take bfloat16 and float16; float32 goes by dense"
    if triton_rows.interpreted():
        return None
    capability = torch.cuda.get_device_capability(first.device)
    return None if capability >= _OLDEST_TENSOR_CORES else f"found a device of capability {capability}, wanted 8.0 or newer"


def _path(first: Tensor) -> TritonPath:
    if (forced := backends.forced_path()) in _PATHS:
        return _PATHS[forced]
    return triton_tiles.path(rows(first)) if _no_tensor_cores(first) is None else TritonPath.DENSE


def _multiprocessors(device: torch.device) -> int:
    """Of the device; 1 in the interpreter, where programs run one after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


# ---- a linear and a group differ in that an operand of the one is a list in the other


def _list(t: Any) -> list[Any]:
    return [] if t is None else t if isinstance(t, list) else [t]


def _span(packed: Any, K: int, blocksize: int) -> int:
    return min(triton_tiles.span(K, blocksize, p.data_ptr()) for p in _list(packed))


def _fwd_config(x: Tensor, packed: Any, *args: Any) -> TritonLinearConfig:
    M, K, A, N, blocksize, processors = rows(x), x.shape[-1], _list(args[4]), max(_list(args[7])), args[8], _multiprocessors(x.device)
    path, xa = _path(x), None
    if A and _no_tensor_cores(x) is None:
        xa = triton_tiles.xa(M, K, sum(a.shape[0] for a in A), processors)
    if path == TritonPath.DENSE:
        return TritonLinearConfig(path, None, xa)
    return TritonLinearConfig(path, triton_tiles.linear_fwd(M, N, K, _span(packed, K, blocksize), processors), xa)


def _linear_bwd_config(dy: Tensor, packed: Tensor, *args: Any) -> TritonLinearConfig:
    return _bwd_config(dy, packed, dy.shape[1], *args[6:8])


def _group_bwd_config(dy: Tensor, packed: list[Tensor], *args: Any) -> TritonLinearConfig:
    return _bwd_config(dy, packed, max(args[6]), *args[7:9])


def _bwd_config(dy: Tensor, packed: Any, N: int, K: int, blocksize: int) -> TritonLinearConfig:
    if (path := _path(dy)) == TritonPath.DENSE:
        return TritonLinearConfig(path, None)
    span = _span(packed, K, blocksize)
    return TritonLinearConfig(path, triton_tiles.linear_bwd(dy.shape[0], N, K, span, _multiprocessors(dy.device)))


def _lora_bwd_config(dy: Tensor, x: Tensor, xa: Tensor, lora_A: Any, *args: Any) -> TritonLoraConfig | None:
    A = _list(lora_A)
    if _no_tensor_cores(dy):
        return None
    return triton_tiles.lora_bwd(*dy.shape, A[0].shape[1], sum(a.shape[0] for a in A), _multiprocessors(dy.device))


@backends.implements("linear_fwd", "triton", why_not, _fwd_config)
def linear_fwd(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    y, xa = kernels()[0].linear_fwd(matrix(x), *args)
    return like(y, x), xa


@backends.implements("linear_bwd", "triton", why_not, _linear_bwd_config)
def linear_bwd(*args: Any) -> Tensor:
    return kernels()[1].linear_bwd(*args)


@backends.implements("lora_bwd", "triton", why_not, _lora_bwd_config)
def lora_bwd(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return kernels()[2].lora_bwd(*args)


@backends.implements("group_fwd", "triton", why_not, _fwd_config)
def group_fwd(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    y, xa = kernels()[0].group_fwd(matrix(x), *args)
    return like(y, x), xa


@backends.implements("group_bwd", "triton", why_not, _group_bwd_config)
def group_bwd(*args: Any) -> Tensor:
    return kernels()[1].group_bwd(*args)


@backends.implements("group_lora_bwd", "triton", why_not, _lora_bwd_config)
def group_lora_bwd(*args: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    return kernels()[2].group_lora_bwd(*args)
