"""Where the states of an optimizer live: the layout of their arenas, what a memory can do, and the one that never pages.

The states of all parameters lie in one index space, as `nf4lora.reference_optim` has it; an arena holds one kind of state
for the whole of it. A chunk is a range of the index, the unit that moves between device and home.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """numel: of the index, a multiple of 256. dtypes: of the arenas. chunk: elements of the index in a chunk, a multiple of 256."""

    numel: int
    dtypes: tuple[torch.dtype, ...]
    chunk: int

    @property
    def count(self) -> int:
        """Chunks; the last may be short."""
        return -(-self.numel // self.chunk)

    def span(self, chunk: int) -> tuple[int, int]:
        """First element of a chunk and the one after its last."""
        return chunk * self.chunk, min((chunk + 1) * self.chunk, self.numel)

    def nbytes(self, chunk: int) -> int:
        """Of a chunk, in all arenas together."""
        first, end = self.span(chunk)
        return (end - first) * sum(dtype.itemsize for dtype in self.dtypes)


class Memory(Protocol):
    """What a pager asks of memory. Moves are started, never waited for by the host; a call that raises has done nothing."""

    layout: Layout
    budget: int | None = None  # bytes to keep on the device where the user named none; None: all
    slips: bool = False  # whether the system may send chunks home unasked, so that a fetch is worth repeating
    stays: bool = True  # whether chunks stay on the device between steps; else they go home, then `trim`

    @property
    def whole(self) -> bool:
        """Whether all chunks may be on the device side by side, as `arenas(None)`."""
        return True

    def has_room(self, chunk: int) -> bool:
        """Whether the device has room to spare for a chunk that no step has asked for yet."""
        return True

    def reserve(self) -> None:
        """Take what a step of any chunks needs at least. torch.OutOfMemoryError without room."""

    def fetch(self, chunk: int) -> None:
        """Start to move a chunk to the device, after the last `send` of it. torch.OutOfMemoryError without room."""

    def send(self, chunk: int) -> None:
        """Start to move a chunk home, after everything launched on it before the last `used`."""

    def wait(self, chunk: int) -> None:
        """What is launched on the current stream from now on finds the chunk on the device, also after `home`."""

    def used(self, chunk: int) -> None:
        """What was launched on the current stream up to now uses the chunk."""

    def arenas(self, chunk: int | None = None) -> tuple[Tensor, ...]:
        """Where kernels find a chunk that was waited for, or, of None, the whole index, all of it waited for.

        One tensor for each of `layout.dtypes`, 1-D; element 0 is the chunk's first.
        """

    def home(self) -> Sequence[Tensor]:
        """The whole arenas with all of their contents, to be read or written until the next call: for saving and loading.

        The one method that may wait for the device.
        """

    def trim(self) -> None:
        """Give back what no chunk on the device needs."""

    def close(self) -> None:
        """Give the memory back; nothing else may be called after."""


class Resident(Memory):
    """Plain memory of a device: everything is always there."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout = layout
        self._arenas = tuple(torch.zeros(layout.numel, dtype=dtype, device=device) for dtype in layout.dtypes)

    def fetch(self, chunk: int) -> None: ...

    def send(self, chunk: int) -> None: ...

    def wait(self, chunk: int) -> None: ...

    def used(self, chunk: int) -> None: ...

    def arenas(self, chunk: int | None = None) -> tuple[Tensor, ...]:
        if chunk is None:
            return self._arenas
        first, end = self.layout.span(chunk)
        return tuple(t[first:end] for t in self._arenas)

    def home(self) -> Sequence[Tensor]:
        return self._arenas

    def close(self) -> None:
        self._arenas = ()
