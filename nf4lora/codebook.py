"""The code tables: NF4 and FP4 (16 values), and the 8-bit dynamic maps (256 values), the signed one of double quantization
and of an optimizer's first state, the unsigned one of its second.

Each table is one CSV file, read here, by the C++ sources and by the Triton kernels. What follows from a table
(sorted order, decision boundaries) is derived, never stored.
"""

from functools import cache
from importlib.resources import files

import torch
from torch import Tensor

QUANT_TYPES = ("nf4", "fp4")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256
# Below this an absmax counts as this in the reciprocal, so that a block of zeros divides by something.
MIN_ABSMAX = 1e-38


def _read(name: str) -> Tensor:
    text = files("nf4lora").joinpath(f"{name}_codebook.csv").read_text(encoding="ascii")
    return torch.tensor([float(v) for v in text.split(",")], dtype=torch.float32, device="cpu")


@cache
@torch.inference_mode(False)  # a cached tensor outlives the mode it is first asked for in
def codebook(quant_type: str, device: torch.device | str = "cpu") -> Tensor:
    """Values of the codes, float32 [16] for "nf4" and "fp4", float32 [256] for "dynamic" and "unsigned_dynamic", by code."""
    return _read(quant_type).to(device)


@cache
@torch.inference_mode(False)
def code_order(quant_type: str, device: torch.device | str = "cpu") -> Tensor:
    """Codes sorted by value, int64 [16]. The identity for NF4; FP4's codes are sign and magnitude bits."""
    return torch.argsort(codebook(quant_type), stable=True).to(device)


@cache
@torch.inference_mode(False)
def boundaries(quant_type: str, device: torch.device | str = "cpu") -> Tensor:
    """Decision thresholds between neighbours in `code_order`, float32 [15]: their float32 midpoints; a tie is the lower."""
    values = codebook(quant_type)[code_order(quant_type)]
    return ((values[:-1] + values[1:]) * 0.5).to(device)


@cache
@torch.inference_mode(False)
def dynamic_boundaries(device: torch.device | str = "cpu", code: str = "dynamic") -> Tensor:
    """Thresholds of an 8-bit map, float32 [255]: the largest float32 not above the true midpoint.

    With these `#{boundaries < v}` is the exact nearest code for every float32 v, ties to the lower.
    """
    values = codebook(code).double()
    middle = (values[:-1] + values[1:]) * 0.5
    rounded = middle.float()
    below = torch.nextafter(rounded, torch.tensor(-torch.inf, device="cpu"))
    return torch.where(rounded.double() > middle, below, rounded).to(device)
