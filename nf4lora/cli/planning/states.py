"""Bytes of optimizer states, as `nf4lora.optim` and torch allocate them."""

from collections.abc import Iterable
from typing import NamedTuple

from ...optim.options import options_of
from ...optim.pool import CHUNK_BYTES, NAMES
from ...quant_state import ceil_div
from ...reference_optim import STATE_BLOCKSIZE


class States(NamedTuple):
    """Bytes that may page to the host, and bytes that stay on the device."""

    paged: int
    resident: int

    @property
    def total(self) -> int:
        return self.paged + self.resident

    @property
    def needed(self) -> int:
        """The least that has to be on the device: of what pages, two chunks, one in use and one on its way."""
        return self.resident + min(self.paged, 2 * CHUNK_BYTES)


def states(sizes: Iterable[int], optim: str, itemsize: int, pages: bool = True) -> States:
    """Of parameters of `sizes` elements under one of `settings.OPTIMS`.

    Ours: every parameter starts a block of 256 elements. A state is float32, or, of a parameter of 4096 elements or more
    under an 8-bit optimizer, one byte an element and one float32 a block; AdamW has two states, Lion one. Paged are the
    states, never the scales. torch's: two states in the parameter's own dtype of `itemsize` bytes, and a float32 step.
    pages: whether the device can page; where not, paged optimizers keep everything on it.
    """
    if optim.startswith("adamw_torch"):
        return States(0, sum(2 * itemsize * n + 4 for n in sizes))
    count, threshold = (
        len(NAMES["lion" if "lion" in optim else "adamw"]),
        options_of(optim, 8, False, {})["min_8bit_size"],
    )
    elements = scales = 0
    for n in sizes:
        blocks = ceil_div(n, STATE_BLOCKSIZE)
        small = optim.endswith("8bit") and n >= threshold
        elements += count * blocks * STATE_BLOCKSIZE * (1 if small else 4)
        scales += count * blocks * 4 if small else 0
    return States(elements, scales) if pages and optim.startswith("paged") else States(0, elements + scales)
