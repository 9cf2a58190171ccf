"""The "triton" rows of the linear: which path runs, and its tiles. The kernels are imported by the first call, as `triton_rows` has it."""

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import backends, heuristics, triton_rows
from .heuristics import TritonLinearConfig, TritonLoraConfig, TritonPath

_PATHS = {p.name.lower(): p for p in TritonPath}


@cache
def kernels() -> tuple[ModuleType, ModuleType, ModuleType]:
    """`nf4lora.triton_kernels`' linear_fwd, linear_bwd and lora, where `triton_rows.why_not` has nothing against them."""
    from .triton_kernels import linear_bwd, linear_fwd, lora

    return linear_fwd, linear_bwd, lora


def why_not(*args: Any) -> str | None:
    """Why Triton cannot run the linear on these arguments, or None; `triton_rows` knows the device and the dtype."""
    if reason := triton_rows.why_not(*args):
        return reason
    forced = backends.forced_path()
    if forced is not None and forced not in _PATHS:
        return f"path {forced}: wanted one of {tuple(_PATHS)}"
    if not args or forced != "tiled":
        return None
    return _not_tiled(args[0])


def _not_tiled(first: Tensor) -> str | None:
    """first: x or dy."""
    if first.dtype == torch.float32:
        return "path tiled: the tensor cores take bfloat16 and float16; float32 goes by dense"
    if not triton_rows.interpreted() and first.dtype == torch.bfloat16:
        capability = torch.cuda.get_device_capability(first.device)
        return None if capability >= (8, 0) else f"path tiled: found a device of capability {capability}, wanted 8.0 or newer"
    return None


def _path(first: Tensor) -> TritonPath:
    if (forced := backends.forced_path()) in _PATHS:
        return _PATHS[forced]
    return heuristics.triton_path(first.shape[0]) if _not_tiled(first) is None else TritonPath.DENSE


def _multiprocessors(device: torch.device) -> int:
    """Of the device; 1 in the interpreter, where programs run one after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _linear_fwd_config(x: Tensor, *args: Any) -> TritonLinearConfig:
    lora_A, N = args[5], args[8]
    r = 0 if lora_A is None else lora_A.shape[0]
    return heuristics.triton_linear_fwd(_path(x), x.shape[0], N, x.shape[1], r, _multiprocessors(x.device))


def _linear_bwd_config(dy: Tensor, *args: Any) -> TritonLinearConfig:
    return heuristics.triton_linear_bwd(_path(dy), *dy.shape, args[7], _multiprocessors(dy.device))


def _lora_bwd_config(dy: Tensor, x: Tensor, xa: Tensor, lora_A: Tensor, *args: Any) -> TritonLoraConfig:
    r, K = lora_A.shape
    return heuristics.triton_lora_bwd(*dy.shape, K, r, _multiprocessors(dy.device))


@backends.implements("linear_fwd", "triton", why_not, _linear_fwd_config)
def linear_fwd(*args: Any) -> tuple[Tensor, Tensor]:
    return kernels()[0].linear_fwd(*args)


@backends.implements("linear_bwd", "triton", why_not, _linear_bwd_config)
def linear_bwd(*args: Any) -> Tensor:
    return kernels()[1].linear_bwd(*args)


@backends.implements("lora_bwd", "triton", why_not, _lora_bwd_config)
def lora_bwd(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return kernels()[2].lora_bwd(*args)
