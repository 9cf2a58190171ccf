"""The "triton" rows of the back-end table. Triton is imported by the first call that asks for them, never before."""

import re
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import triton_tiles
from .backends import implements
from .matrices import like, matrix

OLDEST_TRITON = (3, 6)
OLDEST_CAPABILITY = (7, 5)


@cache
def kernels() -> tuple[tuple[ModuleType, ModuleType, ModuleType] | None, str | None]:
    """`nf4lora.triton_kernels`' quantize, dequantize and swiglu and None, or None and the reason why not."""
    try:
        import triton
    except ImportError as error:
        return None, "triton is not installed" if error.name == "triton" else f"triton does not load: {error}"
    if tuple(map(int, re.findall(r"\d+", triton.__version__)[:2])) < OLDEST_TRITON:
        return None, f"triton: found {triton.__version__}, wanted {'.'.join(map(str, OLDEST_TRITON))} or newer"
    try:
        from .triton_kernels import dequantize, quantize, swiglu
    except ImportError as error:
        return None, f"nf4lora.triton_kernels does not load: {error}; reinstall nf4lora, or in a source tree start Python elsewhere"
    return (quantize, dequantize, swiglu), None


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, on any device: TRITON_INTERPRET=1 was set when they were imported."""
    import triton

    return not isinstance(kernels()[0][0].quantize_kernel, triton.JITFunction)


def why_not(*args: Any) -> str | None:
    """Why Triton cannot run an op on these arguments, or None; without arguments, anything at all."""
    if any(isinstance(a, Tensor) and a.dtype == torch.float64 for a in args) or torch.float64 in args[-1:]:
        return "float64 is for the reference"
    if reason := kernels()[1]:
        return reason
    if not args or interpreted():
        return None
    device = args[0].device
    if device.type != "cuda":
        return f"no {device.type} tensors, except in its interpreter (TRITON_INTERPRET=1 before the first call)"
    if torch.version.hip:
        return "its kernels hold instructions of NVIDIA devices"
    if (capability := torch.cuda.get_device_capability(device)) < OLDEST_CAPABILITY:
        return f"device of capability {capability}, wanted {OLDEST_CAPABILITY} or newer"
    return None


def _quantize_config(a: Tensor, blocksize: int, quant_type: str) -> triton_tiles.TritonConfig:
    return triton_tiles.triton_quantize(blocksize)


def _dequantize_config(packed: Tensor, *args: Any) -> triton_tiles.TritonConfig:
    return triton_tiles.triton_dequantize(2 * packed.numel())


@implements("quantize", "triton", why_not, _quantize_config)
def quantize(*args: Any) -> tuple[Tensor, Tensor]:
    return kernels()[0][0].quantize(*args)


@implements("quantize_absmax", "triton", why_not, lambda *args: triton_tiles.triton_quantize_absmax())
def quantize_absmax(*args: Any) -> tuple[Tensor, Tensor]:
    return kernels()[0][0].quantize_absmax(*args)


@implements("dequantize", "triton", why_not, _dequantize_config)
def dequantize(*args: Any) -> Tensor:
    return kernels()[0][1].dequantize(*args)


@implements("dequantize_into", "triton", why_not, _dequantize_config)
def dequantize_into(*args: Any) -> None:
    kernels()[0][1].dequantize_into(*args)


def _swiglu_config(gate_up: Tensor, *args: Any) -> triton_tiles.TritonConfig:
    return triton_tiles.triton_swiglu()


@implements("swiglu_fwd", "triton", why_not, _swiglu_config)
def swiglu_fwd(gate_up: Tensor, *args: Any) -> Tensor:
    return like(kernels()[0][2].swiglu_fwd(matrix(gate_up), *args), gate_up)


@implements("swiglu_bwd", "triton", why_not, _swiglu_config)
def swiglu_bwd(gate_up: Tensor, dh: Tensor, *args: Any) -> Tensor:
    return like(kernels()[0][2].swiglu_bwd(matrix(gate_up), matrix(dh), *args), gate_up)
