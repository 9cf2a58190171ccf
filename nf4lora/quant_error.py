"""How far a quantized tensor is from the original."""

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .functional import dequantize_4bit
from .quant_state import QuantState


class QuantError(NamedTuple):
    """How far a quantized tensor is from the original; see `quantization_error`."""

    mean_abs: float
    relative_rms: float
    nested_relative: float


def quantization_error(A: Tensor, packed: Tensor, quant_state: QuantState) -> QuantError:
    """Error of a quantized tensor against the original `A`; warns where double quantization spoils a block.

    Returns: mean |A - decoded|; rms(A - decoded) / rms(A); and the largest relative error of an absmax
    (0 without double quantization), which one huge block can drive up for its 255 neighbours.
    """
    if A.shape != quant_state.shape:
        raise ValueError(f"A: found shape {tuple(A.shape)}, wanted {tuple(quant_state.shape)}, the quant_state's")
    difference = (A.double() - dequantize_4bit(packed, quant_state, torch.float32).double()).abs()
    total, squares, norm = (t.sum().item() for t in (difference, difference.square(), A.double().square()))
    nested = 0.0
    if quant_state.nested:
        _, exact = reference.quantize(A, quant_state.blocksize, quant_state.quant_type)
        stored = reference.dequantize_absmax(quant_state.absmax, quant_state.nested_absmax, quant_state.offset)
        relative = ((stored - exact).abs() / exact)[exact > 0]
        nested = relative.max().item() if relative.numel() else 0.0
        if nested > 0.1:
            warnings.warn(
                f"double quantization changes an absmax by {nested:.0%}: a block among its 256 is far larger than the "
                "others; compress_statistics=False keeps them exact",
                stacklevel=2,
            )
    return QuantError(total / max(A.numel(), 1), math.sqrt(squares / (norm or squares or 1)), nested)
