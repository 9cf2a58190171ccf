"""Quantizing a tensor where it does not live: it crosses in pinned pieces, so that the device never holds it whole."""

import torch
from torch import Tensor

from . import ops
from .quant_state import ceil_div

# Two of these are pinned on the host while two are on the device; a multiple of every blocksize in every dtype.
PIECE_BYTES = 64 << 20


def quantize(a: Tensor, device: torch.device, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
    """`ops.quantize` on `device` of a float tensor that lives elsewhere: the same bytes, on `device`.

    The host fills one buffer while the other crosses, and waits before it fills one again.
    """
    flat = a.reshape(-1)
    step = PIECE_BYTES // flat.element_size()
    pinned = device.type == "cuda" and flat.device.type == "cpu"
    packed = torch.empty((ceil_div(flat.numel(), 2), 1), dtype=torch.uint8, device=device)
    absmax = torch.empty(ceil_div(flat.numel(), blocksize), dtype=torch.float32, device=device)
    turns = [_Turn(flat, min(step, flat.numel())) for _ in range(2)] if pinned else []
    for n, first in enumerate(range(0, flat.numel(), step)):
        piece = flat[first : first + step]
        piece = turns[n % 2].cross(piece, device) if pinned else piece.to(device)
        part, part_absmax = ops.quantize(piece, blocksize, quant_type)
        packed[first // 2 : first // 2 + len(part)] = part
        absmax[first // blocksize : first // blocksize + len(part_absmax)] = part_absmax
    return packed, absmax


class _Turn:
    """A pinned buffer, used again once what was in it has crossed."""

    def __init__(self, like: Tensor, numel: int) -> None:
        self.buffer = torch.empty(numel, dtype=like.dtype, pin_memory=True)
        self.crossed = torch.cuda.Event()  # not recorded yet: waiting for it returns at once

    def cross(self, piece: Tensor, device: torch.device) -> Tensor:
        self.crossed.synchronize()
        there = self.buffer[: len(piece)].copy_(piece).to(device, non_blocking=True)
        self.crossed.record(torch.cuda.current_stream(device))
        return there
