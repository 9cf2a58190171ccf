"""The functions people know: quantize, dequantize and multiply 4-bit tensors, with bitsandbytes' names and bytes."""

from typing import Any

import torch
from torch import Tensor

from . import autograd, checks, ops, staging
from .quant_state import QuantState, ceil_div


def quantize_4bit(
    A: Tensor,
    blocksize: int = 64,
    compress_statistics: bool = False,
    quant_type: str = "nf4",
    quant_storage: torch.dtype = torch.uint8,
    check_finite: bool = True,
    device: torch.device | str | None = None,
) -> tuple[Tensor, QuantState]:
    """Quantize to 4 bits an element, in blocks of the flattened tensor.

    Args:
        A:                   float32, bfloat16 or float16, any shape of one dimension or more, any strides
        blocksize:           elements per absmax: 32, 64, …, 4096
        compress_statistics: double quantization: 8-bit absmax, 4.127 bits a weight in all instead of 4.5
        quant_type:          "nf4" or "fp4"
        quant_storage:       dtype the bytes come back as; the same bytes whatever it is
        check_finite:        refuse NaN and Inf; waits for the device
        device:              where to quantize and where the results live, A's own by default. A tensor in host memory
                             goes there in pinned pieces, so that only its 4-bit form has to fit
    Returns:  packed, quant_storage [ceil(numel/2) / itemsize, 1], and its QuantState
    Numerics: as QuantState states; byte-equal on every back end
    Raises:   TypeError (dtype), ValueError (sizes, options, NaN or Inf: how many and where the first is)
    Memory:   reads A once, writes half a byte an element and 4 bytes a block; 128 MiB more on `device` for A in pieces.
              Not differentiable
    Source:   QLoRA, arXiv:2305.14314 §3; spec: nf4lora/reference.py::quantize
    """
    if not isinstance(A, Tensor) or A.layout != torch.strided:
        raise TypeError(f"A: found a {getattr(A, 'layout', type(A).__name__)}, wanted a dense torch tensor")
    if not isinstance(quant_storage, torch.dtype):
        raise TypeError(f"quant_storage: found {quant_storage!r}, wanted a dtype such as torch.uint8")
    checks.format(blocksize, quant_type)
    if A.ndim == 0:
        raise ValueError("A: found a tensor without dimensions, wanted one or more; A.reshape(1) makes one")
    device = A.device if device is None else torch.device(device)
    if device.type == A.device.type and device.index in (None, A.device.index):
        packed, absmax = ops.quantize(A.detach(), blocksize, quant_type)
    else:
        packed, absmax = staging.quantize(A.detach(), device, blocksize, quant_type)
    if packed.numel() % quant_storage.itemsize:
        raise ValueError(f"quant_storage: {packed.numel()} bytes are no whole number of {quant_storage}; use torch.uint8")
    if check_finite and absmax.numel() and not absmax.is_meta and not bool(absmax.amax().isfinite()):
        checks.raise_not_finite("A", A)
    offset = nested_absmax = None
    if compress_statistics:
        offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
        absmax, nested_absmax = ops.quantize_absmax(absmax, offset)
    state = QuantState(absmax, A.shape, A.dtype, blocksize, quant_type, offset, nested_absmax)
    return packed.view(-1).view(quant_storage).unsqueeze(1), state


def quantize_nf4(
    A: Tensor, blocksize: int = 64, compress_statistics: bool = False, quant_storage: torch.dtype = torch.uint8,
    check_finite: bool = True, device: torch.device | str | None = None,
) -> tuple[Tensor, QuantState]:  # fmt: skip
    """`quantize_4bit` with quant_type="nf4"."""
    return quantize_4bit(A, blocksize, compress_statistics, "nf4", quant_storage, check_finite, device)


def quantize_fp4(
    A: Tensor, blocksize: int = 64, compress_statistics: bool = False, quant_storage: torch.dtype = torch.uint8,
    check_finite: bool = True, device: torch.device | str | None = None,
) -> tuple[Tensor, QuantState]:  # fmt: skip
    """`quantize_4bit` with quant_type="fp4"."""
    return quantize_4bit(A, blocksize, compress_statistics, "fp4", quant_storage, check_finite, device)


def dequantize_4bit(
    packed: Tensor, quant_state: QuantState, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """Decode 4-bit bytes: w[i] = code[q[i]] * absmax[i // blocksize].

    Args:
        packed:      what `quantize_4bit` gave, in any storage dtype
        quant_state: its state
        dtype:       float32, bfloat16 or float16; the dtype of `out`, or else that before quantization, by default
        out:         contiguous, [quant_state.shape], on packed's device: what to write into, instead of new memory
    Returns:  dtype [quant_state.shape]: `out` where it is given
    Numerics: product in float32, one rounding to dtype; bit-equal on every back end
    Raises:   ValueError, TypeError (packed, dtype or out does not fit the state)
    Memory:   reads half a byte an element and the statistics, writes each element once. Not differentiable
    Source:   spec: nf4lora/reference.py::dequantize
    """
    packed = _bytes(packed, quant_state)
    if out is None:
        return ops.dequantize(
            packed, *_statistics(quant_state), list(quant_state.shape), quant_state.blocksize, quant_state.quant_type,
            dtype or quant_state.dtype,
        )  # fmt: skip
    if not isinstance(out, Tensor) or dtype not in (None, out.dtype):
        raise TypeError(f"out: found {getattr(out, 'dtype', type(out).__name__)}, wanted {dtype or 'a tensor'}")
    if out.shape != quant_state.shape or out.requires_grad:
        kind = ", requires_grad" if out.requires_grad else ""
        raise ValueError(f"out: found shape {tuple(out.shape)}{kind}, wanted {tuple(quant_state.shape)} without gradients")
    statistics = _statistics(quant_state)
    if any(_overlap(out, t) for t in (packed, *statistics)):
        raise ValueError("out: found memory of packed or of quant_state, wanted other memory")
    ops.dequantize_into(packed, *statistics, quant_state.blocksize, quant_state.quant_type, out)
    if not (torch.compiler.is_compiling() or out.is_inference()):
        torch.autograd.graph.increment_version(out)  # torch's dispatcher does so too, but eager calls go past it
    return out


def dequantize_nf4(
    packed: Tensor, quant_state: QuantState, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """`dequantize_4bit` of an NF4 tensor. Raises: ValueError when the state says otherwise."""
    return _dequantize_as("nf4", packed, quant_state, dtype, out)


def dequantize_fp4(
    packed: Tensor, quant_state: QuantState, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """`dequantize_4bit` of an FP4 tensor. Raises: ValueError when the state says otherwise."""
    return _dequantize_as("fp4", packed, quant_state, dtype, out)


def linear_4bit(
    x: Tensor,
    packed: Tensor,
    quant_state: QuantState,
    bias: Tensor | None = None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """y = x W^T + bias + scaling * (dropout(x) lora_A^T) lora_B^T with W in 4 bits; differentiable.

    Args:
        x:              float32, bfloat16 or float16 [..., K]
        packed:         the bytes of W, whose quant_state.shape is [N, K]
        bias:           [N]
        lora_A, lora_B: [r, K] and [N, r], any float dtype
        dropout_p:      probability of zeroing an element of x in the LoRA branch; needs `seed`
        seed:           int64 [1]; the same seed gives the same mask on every back end
    Returns:  x's dtype [..., N]; gradients for x, bias, lora_A, lora_B
    Numerics: float32 accumulation on the decoded weight, one rounding of y; spec: nf4lora/reference.py::linear_fwd. Where x is
              bfloat16 and the processor multiplies it, the weight is rounded to it and denormals count as 0, as in torch's own
    Raises:   ValueError, TypeError (naming the argument, what was found, what was wanted), NotImplementedError
    Memory:   no [N, K] temporary; saves x and x lora_A^T for the backward
    """
    if len(quant_state.shape) != 2:
        raise ValueError(f"quant_state.shape: found {tuple(quant_state.shape)}, wanted [out_features, in_features]")
    N, K = quant_state.shape
    if x.ndim == 0 or x.shape[-1] != K:
        raise ValueError(f"x: found shape {tuple(x.shape)}, wanted [..., {K}] for a weight of shape [{N}, {K}]")
    if dropout_p > 0 and seed is None:
        raise ValueError("seed: found None, wanted an int64 tensor of one element, as dropout_p > 0")
    return autograd.linear(
        x, _bytes(packed, quant_state), *_statistics(quant_state), bias, lora_A, lora_B, seed if dropout_p > 0 else None,
        N, quant_state.blocksize, quant_state.quant_type, scaling, dropout_p,
    )  # fmt: skip


def _dequantize_as(quant_type: str, packed: Tensor, quant_state: QuantState, *rest: Any) -> Tensor:
    if quant_state.quant_type != quant_type:
        raise ValueError(f"quant_state.quant_type: found {quant_state.quant_type!r}, wanted {quant_type!r}")
    return dequantize_4bit(packed, quant_state, *rest)


def _bytes(packed: Tensor, quant_state: QuantState) -> Tensor:
    if not packed.is_contiguous():
        raise ValueError(f"packed: found strides {packed.stride()}, wanted it contiguous")
    packed = packed.detach().reshape(-1).view(torch.uint8)
    if packed.numel() != ceil_div(quant_state.numel, 2):
        raise ValueError(
            f"packed: found {packed.numel()} bytes, wanted {ceil_div(quant_state.numel, 2)} for shape {tuple(quant_state.shape)}"
        )
    return packed.unsqueeze(1)


def _statistics(state: QuantState) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return state.absmax, state.nested_absmax, state.offset


def _overlap(a: Tensor, b: Tensor | None) -> bool:
    """Whether two contiguous tensors have bytes in common; of tensors without memory of their own, no."""
    if type(a) not in (Tensor, torch.nn.Parameter) or not isinstance(b, Tensor) or torch.compiler.is_compiling():
        return False
    return not a.is_meta and a.data_ptr() < b.data_ptr() + b.nbytes and b.data_ptr() < a.data_ptr() + a.nbytes
