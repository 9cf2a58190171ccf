"""States at home in pinned memory of the host, and slots on the device that chunks are copied to and from."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .memory import Layout, Memory


class Streams(Protocol):
    """What `Staged` needs of streams: "in" and "out", which it alone copies on, and "current", which kernels are on."""

    def copy(self, stream: str, to: Tensor, of: Tensor) -> None:
        """Starts a copy of one side stream."""

    def record(self, stream: str) -> Any:
        """An event: all that the stream was given up to now."""

    def wait(self, stream: str, event: Any) -> None:
        """What the stream is given from now on comes after the event."""

    def synchronize(self) -> None:
        """The host waits for the side streams."""

    def share(self, t: Tensor) -> None:
        """Once t is dropped, its memory serves nobody else before the side streams are done with it."""


class CudaStreams:
    """Streams of a CUDA device; "current" is torch's. Copies from and to the host run at once in both directions."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = {"in": torch.cuda.Stream(device), "out": torch.cuda.Stream(device)}

    def copy(self, stream: str, to: Tensor, of: Tensor) -> None:
        with torch.cuda.stream(self._side[stream]):
            to.copy_(of, non_blocking=True)

    def record(self, stream: str) -> torch.cuda.Event:
        return self._of(stream).record_event()

    def wait(self, stream: str, event: torch.cuda.Event) -> None:
        self._of(stream).wait_event(event)

    def synchronize(self) -> None:
        for stream in self._side.values():
            stream.synchronize()

    def share(self, t: Tensor) -> None:
        for stream in self._side.values():
            t.record_stream(stream)

    def _of(self, stream: str) -> torch.cuda.Stream:
        return self._side.get(stream) or torch.cuda.current_stream(self._device)


class InOrder(Streams):
    """Streams of a device that does everything at once, as the CPU does: events are nothing."""

    def copy(self, stream: str, to: Tensor, of: Tensor) -> None:
        to.copy_(of)


@dataclass
class _Slot:
    """A place of one chunk on the device. left: the event after which it may be written."""

    tensors: tuple[Tensor, ...]
    left: Any


@dataclass
class _Here:
    """A chunk in its slot. fetched, used: events, the latter of the last use or, before one, of the fetch."""

    slot: _Slot
    fetched: Any
    used: Any
    changed: bool = False  # perhaps, by kernels, since it was last copied home
    stale: bool = False  # home was given out since, and may have been written; never with `changed`
    leaving: bool = False  # a send of it raised: copies of it may have begun


class Staged(Memory):
    """A `Memory` whose slots on `device` take `budget` bytes, None for all chunks, and never less than one chunk does.

    Where all fits, the slots are one contiguous arena, and `arenas(None)` is it. Everything is allocated here.
    """

    def __init__(self, layout: Layout, device: torch.device, budget: int | None = None, streams: Streams | None = None):
        self.layout = layout
        pinned = device.type == "cuda"
        self._streams = streams or (CudaStreams(device) if pinned else InOrder())
        self._home = tuple(torch.zeros(layout.numel, dtype=dtype, pin_memory=pinned) for dtype in layout.dtypes)
        self._whole, ends = _places(layout, budget)
        numel = max((end for _, end in ends), default=0)
        self._slots = tuple(torch.empty(numel, dtype=dtype, device=device) for dtype in layout.dtypes)
        for t in self._slots:
            self._streams.share(t)
        free = self._streams.record("current")  # the allocator's blocks are free for what is launched there
        slots = [_Slot(tuple(t[first:end] for t in self._slots), free) for first, end in ends]
        # Chunks with a slot of their own: all, or a short last one for which only a short slot is left.
        self._own = dict(enumerate(slots)) if self._whole else {}
        if not self._whole and len(slots[-1].tensors[0]) < layout.chunk:
            self._own = {layout.count - 1: slots.pop()}
        self._free = deque(() if self._whole else slots)  # the one that was left first is the first to be taken
        self._here: dict[int, _Here] = {}
        self._sent: dict[int, Any] = {}

    def fetch(self, chunk: int) -> None:
        if chunk in self._here:
            raise RuntimeError(f"fetch: found chunk {chunk} in a slot, wanted it at home")
        own = self._own.get(chunk)
        if own is None and not self._free:
            raise RuntimeError(f"fetch: found chunks {sorted(self._here)} in all slots, wanted one for {chunk}")
        slot = own or self._free[0]
        self._streams.wait("in", slot.left)
        if chunk in self._sent:  # elsewhere than in this slot, perhaps
            self._streams.wait("in", self._sent[chunk])
        self._copy_in(chunk, slot)
        fetched = self._streams.record("in")
        if own is None:
            self._free.popleft()
        self._here[chunk] = _Here(slot, fetched, fetched)

    def send(self, chunk: int) -> None:
        here = self._here[chunk]
        if here.changed:
            self._copy_out(chunk, here.used)
            here.slot.left = self._sent[chunk] = self._streams.record("out")
        else:
            here.slot.left = here.used
        del self._here[chunk]
        if chunk not in self._own:
            self._free.append(here.slot)

    def wait(self, chunk: int) -> None:
        here = self._here[chunk]
        if here.leaving:
            self._streams.wait("current", self._streams.record("out"))
            here.leaving = False
        if here.stale:
            self._copy_in(chunk, here.slot)
            here.fetched = here.used = self._streams.record("in")
            here.stale = False
        self._streams.wait("current", here.fetched)
        here.changed = True

    def used(self, chunk: int) -> None:
        self._here[chunk].used = self._streams.record("current")

    def arenas(self, chunk: int | None = None) -> tuple[Tensor, ...]:
        if chunk is not None:
            first, end = self.layout.span(chunk)
            return tuple(t[: end - first] for t in self._here[chunk].slot.tensors)
        if len(self._here) < self.layout.count or not self._whole:
            raise RuntimeError(f"arenas: found {len(self._here)} chunks on the device, wanted all {self.layout.count}")
        return self._slots

    def home(self) -> Sequence[Tensor]:
        launched = self._streams.record("current")
        for chunk, here in self._here.items():
            if here.changed:
                self._copy_out(chunk, launched)
        self._streams.synchronize()
        for here in self._here.values():
            here.changed, here.stale, here.leaving = False, True, False
        return self._home

    def close(self) -> None:
        self._home, self._slots, self._here, self._own, self._free = (), (), {}, {}, deque()

    def _copy_in(self, chunk: int, slot: _Slot) -> None:
        first, end = self.layout.span(chunk)
        for to, of in zip(slot.tensors, self._home, strict=True):
            self._streams.copy("in", to[: end - first], of[first:end])

    def _copy_out(self, chunk: int, after: Any) -> None:
        first, end = self.layout.span(chunk)
        self._streams.wait("out", after)
        self._here[chunk].leaving = True
        for to, of in zip(self._home, self._here[chunk].slot.tensors, strict=True):
            self._streams.copy("out", to[first:end], of[: end - first])


def _places(layout: Layout, budget: int | None) -> tuple[bool, list[tuple[int, int]]]:
    """Whether slots hold everything at once; the first element of each in the arenas on the device and the one after."""
    spans = [layout.span(chunk) for chunk in range(layout.count)]
    if budget is None or sum(map(layout.nbytes, range(layout.count))) <= budget:
        return True, spans
    full = max(1, budget // layout.nbytes(0))
    first, end = spans[-1]
    if layout.nbytes(layout.count - 1) > budget - full * layout.nbytes(0):
        return False, spans[:full]
    return False, [*spans[:full], (full * layout.chunk, full * layout.chunk + end - first)]
