"""The physical limits: how many bytes a kernel must move, and how fast this machine copies as many in the same mix.

Bytes are the fewest there can be: each operand read once, each result written once, statistics included.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nf4lora.codebook import NESTED_BLOCKSIZE
from nf4lora.quant_state import ceil_div

from .timing import Contender, CudaMeter


class Traffic(NamedTuple):
    """Bytes read and written."""

    read: int
    written: int

    @property
    def total(self) -> int:
        return self.read + self.written


def statistics_bytes(numel: int, blocksize: int = 64, nested: bool = False) -> int:
    """What says how the packed bytes are scaled: float32 absmax, or its 8-bit codes, their scales and the offset."""
    blocks = ceil_div(numel, blocksize)
    return blocks + 4 * ceil_div(blocks, NESTED_BLOCKSIZE) + 4 if nested else 4 * blocks


def packed_bytes(numel: int) -> int:
    """Two weights a byte."""
    return ceil_div(numel, 2)


def quantize_traffic(numel: int, dtype: torch.dtype, blocksize: int = 64, nested: bool = False) -> Traffic:
    """Reads the weights once, writes packed bytes and statistics. The mean that double quantization needs first is not
    in it: a kernel that reads the float32 absmax again moves more."""
    return Traffic(numel * dtype.itemsize, packed_bytes(numel) + statistics_bytes(numel, blocksize, nested))


def dequantize_traffic(numel: int, dtype: torch.dtype, blocksize: int = 64, nested: bool = False) -> Traffic:
    """Reads packed bytes and statistics, writes the weights once."""
    return Traffic(packed_bytes(numel) + statistics_bytes(numel, blocksize, nested), numel * dtype.itemsize)


class Mix(NamedTuple):
    """Bytes read to bytes written, as small whole numbers of which one is 1."""

    reads: int
    writes: int

    @classmethod
    def of(cls, traffic: Traffic) -> "Mix":
        read, written = traffic
        return cls(1, max(1, round(written / read))) if written >= read else cls(max(1, round(read / written)), 1)

    def __str__(self) -> str:
        return f"{self.reads}:{self.writes}"


class Tile(NamedTuple):
    """How the Triton copy is launched: int32 a block, warps a program."""

    block: int
    warps: int


TILES = (Tile(1024, 4), Tile(2048, 4), Tile(2048, 8), Tile(4096, 8), Tile(8192, 8))


def copy(traffic: Traffic, device: torch.device | str, sets: int = 1, tile: Tile = TILES[0]) -> Contender:
    """Reads and writes about as many bytes as `traffic`, in its mix, and computes nothing: the ceiling of what does.

    On a GPU with Triton a kernel of ours, into fresh memory at every call; else torch, into memory already there.
    """
    mix, unit = Mix.of(traffic), 4 * tile.block
    units = max(1, round(traffic.total / (unit * (mix.reads + mix.writes))))
    source = torch.ones(units * mix.reads * tile.block, dtype=torch.int32, device=device)
    sources = [source, *(source.clone() for _ in range(sets - 1))]
    length = units * mix.writes * tile.block
    kernel = _triton_copy() if torch.device(device).type == "cuda" else None
    if kernel is None:
        targets = [source.new_empty(length) for _ in sources]
        calls = tuple(_torch_copy(s, t, mix) for s, t in zip(sources, targets, strict=True))
    else:
        calls = tuple((lambda s=s: kernel(s, s.new_empty(length), *mix, *tile)) for s in sources)
    return Contender(calls, ceiling=True, bytes_moved=units * unit * (mix.reads + mix.writes))


def fastest_tile(traffic: Traffic, device: torch.device | str, sets: int, meter: CudaMeter) -> Tile:
    """The tile with which the copy of this mix is fastest here, measured now; the first where torch copies."""
    if torch.device(device).type != "cuda" or _triton_copy() is None:
        return TILES[0]

    def least(tile: Tile) -> float:
        sample = meter.prepare(copy(traffic, device, sets, tile), None)
        return min(sample.kernel_ms() for _ in range(5))

    return min(TILES, key=least)


def _torch_copy(source: Tensor, target: Tensor, mix: Mix) -> Callable[[], Tensor]:
    """One operand is read or written in equal parts beside the other. int32 [reads * n] -> int32 [writes * n]."""
    if mix.reads == 1:
        return lambda: target.view(mix.writes, -1).copy_(source)
    return lambda: torch.amax(source.view(mix.reads, -1), dim=0, out=target)


def _triton_copy() -> Callable[..., Tensor] | None:
    try:
        from .triton_copy import copy_blocks
    except ImportError:
        return None
    return copy_blocks
