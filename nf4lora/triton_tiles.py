"""Programs of the Triton kernels: shapes in, launch parameters out, as `heuristics` has it for everything else."""

import math
from dataclasses import dataclass
from enum import IntEnum

from .heuristics import CUDA_DENSE_TOKENS, _split


@dataclass(frozen=True)
class TritonConfig:
    """One program of a Triton kernel: the weights it takes, a multiple of the blocksize where it quantizes, and its warps."""

    weights: int
    warps: int


def triton_quantize(blocksize: int) -> TritonConfig:
    """32 weights a thread, so that the fixed costs of a program spread, and whole blocks. Source: calculated."""
    return TritonConfig(max(4096, blocksize), 4)


def triton_dequantize(numel: int) -> TritonConfig:
    """32 weights a thread, four loads in flight; small tensors in more programs. Source: calculated."""
    return TritonConfig(4096 if numel >= 1 << 20 else 1024, 4)


def triton_quantize_absmax() -> TritonConfig:
    """One nested block a program: there is one for each 16,384 weights. Source: calculated."""
    return TritonConfig(256, 2)


def triton_swiglu() -> TritonConfig:
    """Eight outputs a thread. Source: calculated."""
    return TritonConfig(1024, 4)


class TritonPath(IntEnum):
    """TILED decodes the weight inside the product, DENSE to memory first."""

    TILED = 0
    DENSE = 1


@dataclass(frozen=True)
class TritonTile:
    """One program of a Triton product: rows and columns of what it makes, steps of the sum that it takes at a time.

    split: parts of the sum, each a program's; the only field that changes the order of a sum with `steps` the same.
    Where the whole rank of LoRA is the rows or the columns, they are 0.
    """

    rows: int
    cols: int
    steps: int
    split: int
    warps: int
    stages: int


@dataclass(frozen=True)
class TritonLinearConfig:
    """product: of y or dx, None on the path DENSE; xa: of xa in the forward, None where torch multiplies."""

    path: TritonPath
    product: TritonTile | None
    xa: TritonTile | None = None


@dataclass(frozen=True)
class TritonLoraConfig:
    """dy: the pass over dy that makes dyb and dB; x: the pass over x that makes dA."""

    dy: TritonTile
    x: TritonTile


LARGEST_RANK = 256  # whose sums registers hold
_LARGEST_SPAN = 64
_WAVES = 4  # programs a multiprocessor, where a kernel only streams


def path(M: int) -> TritonPath:
    """From where on decoding the weight for each 128 tokens again costs more than keeping it. Source: calculated."""
    return TritonPath.DENSE if M >= CUDA_DENSE_TOKENS else TritonPath.TILED


def span(K: int, blocksize: int, address: int) -> int:
    """How many weights in a row of K, from a multiple of as many on, share their block and fill words of packed, at most 64.

    A power of two; 1 where the words are not aligned or eight weights have two blocks.
    """
    whole = math.gcd(K, blocksize, _LARGEST_SPAN)
    return whole if whole >= 8 and address % 4 == 0 else 1


def linear_fwd(M: int, N: int, K: int, span: int, multiprocessors: int) -> TritonTile:
    """Few tokens: narrow tiles and parts of K, to keep the device busy; many: what feeds tensor cores. Source: calculated."""
    return _product(M, N, K, span, multiprocessors)


def linear_bwd(M: int, N: int, K: int, span: int, multiprocessors: int) -> TritonTile:
    """As the forward's, the sums over N. Source: calculated."""
    return _product(M, K, N, span, multiprocessors)


def xa(M: int, K: int, r: int, multiprocessors: int) -> TritonTile | None:
    """Parts of K for as many programs as it takes to stream x. None: torch's product. Source: calculated."""
    if r > LARGEST_RANK:
        return None
    rows, (steps, warps) = min(_tokens(M), 64), ((64, 4) if r <= 64 else (32, 8))
    return TritonTile(rows, 0, steps, _split(-(-M // rows), K // 64, _WAVES * multiprocessors), warps, 2)


def lora_bwd(M: int, N: int, K: int, r: int, multiprocessors: int) -> TritonLoraConfig | None:
    """As many tokens a program as registers allow, since each block of tokens writes a part of dB. Source: calculated."""
    if r > LARGEST_RANK:
        return None
    rows = min(_tokens(M), 128 if r <= 64 else 64)
    cols, warps = (64, 4) if r <= 32 else (64, 8) if r <= 64 else (32, 8)
    programs = _WAVES * multiprocessors
    return TritonLoraConfig(
        TritonTile(rows, 0, cols, _split(-(-M // rows), N // 64, programs), warps, 2),
        TritonTile(0, cols, 64, _split(-(-K // cols), M // 64, programs), warps, 2),
    )


def _product(M: int, outs: int, sums: int, span: int, multiprocessors: int) -> TritonTile:
    rows = _tokens(M)
    if span == 1:  # each weight is loaded by itself: registers, not speed
        rows, cols, steps, warps, stages = min(rows, 64), 64, 32, 4, 1
    else:
        cols, steps, warps, stages = (128, 64, 8, 3) if rows == 128 else (64, 64, 4, 3)
    split = _split(-(-M // rows) * -(-outs // cols), sums // 64, multiprocessors)
    return TritonTile(rows, cols, steps, split, warps, stages)


def _tokens(M: int) -> int:
    return next((t for t in (16, 32, 64) if M <= t), 128)
