"""Shapes in, launch parameters out: pure functions of integers. Kernels take what is chosen here and never choose."""

from dataclasses import dataclass
from enum import IntEnum


class LinearPath(IntEnum):
    """As in csrc/params.h. ROWS decodes one output row at a time (few tokens), PANELS a tile for a block of tokens."""

    ROWS = 0
    PANELS = 1


@dataclass(frozen=True)
class LinearConfig:
    """How a product with the 4-bit weight is cut into tiles.

    block_m, block_n: rows and columns of the output a tile covers; block_k: reduction steps decoded at a time, a
    multiple of 64; threads. Scratch is about 4 * threads * (block_m*block_k + block_n*block_k + block_m*block_n) bytes.
    """

    path: LinearPath
    block_m: int
    block_n: int
    block_k: int
    threads: int


# (largest M, path, block_m, block_n, block_k); source: calculated
_CPU_LINEAR = (
    (8, LinearPath.ROWS, 8, 64, 512),
    (2**63, LinearPath.PANELS, 240, 96, 256),
)


def cpu_linear(M: int, threads: int) -> LinearConfig:
    """Tiles of the host's fused linear for M tokens."""
    path, block_m, block_n, block_k = next(row[1:] for row in _CPU_LINEAR if M <= row[0])
    return LinearConfig(path, block_m, block_n, block_k, threads)
