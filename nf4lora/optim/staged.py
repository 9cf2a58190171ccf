"""States at home in pinned memory of the host, and slots on the device that chunks are copied to and from."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .memory import Layout, Memory
from .streams import CudaStreams, InOrder, Spare, Streams

WHOLE = 512 << 20  # bytes of states that come as one where there is room, so that their step is one launch
SLOTS = 3  # that a step in chunks takes: one is stepped, one comes, one leaves


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
    """A `Memory` of slots on `device`, for as many chunks as `budget` bytes hold, one at least, or for any number of them.

    With a budget all slots are allocated here, and chunks stay; where all fits, the slots are one contiguous arena, and
    `arenas(None)` is it. Without one nothing stays between steps: slots are allocated as chunks come, one arena for
    `WHOLE` bytes at most, and `trim` drops them. A step takes over the slots of chunks that left, so that in its middle
    it allocates only what is to spare: what is left of the device beside `RESERVE` and the most that others were seen to
    use since the last step. At the first gradient that is all that backward keeps.
    """

    def __init__(self, layout: Layout, device: torch.device, budget: int | None = None, streams: Streams | None = None):
        self.layout = layout
        self._streams = streams or (CudaStreams(device) if device.type == "cuda" else InOrder())
        self._home = tuple(torch.zeros(layout.numel, dtype=dtype, pin_memory=device.type == "cuda") for dtype in layout.dtypes)
        self._total = sum(map(layout.nbytes, range(layout.count)))
        self.stays = budget is not None or not self._total
        self._small = self._total <= (WHOLE if budget is None else budget)  # may be one arena
        self._arenas: tuple[Tensor, ...] = ()  # where it is
        self._own: dict[int, _Slot] = {}  # slots of one chunk only: of all, or of a short last one
        self._free: deque[_Slot] = deque()  # the one that was left first is the first to be taken
        self._spare = Spare(self._streams)  # its own: all slots
        if self.stays and self._small:
            self._take_all()
        elif self.stays:
            _, slots = self._take(_places(layout, budget))
            if len(slots[-1].tensors[0]) < layout.chunk:
                self._own = {layout.count - 1: slots.pop()}
            self._free.extend(slots)
        self._here: dict[int, _Here] = {}
        self._sent: dict[int, Any] = {}

    @property
    def whole(self) -> bool:
        return bool(self._arenas) or (self._small and not self._spare.own and self._spare.holds(self._total))

    def has_room(self, chunk: int) -> bool:
        return self.stays or chunk in self._own or bool(self._free) or self._spare.holds(self.layout.nbytes(0))

    def reserve(self) -> None:
        if not self._here:
            self._grow()

    def fetch(self, chunk: int) -> None:
        if chunk in self._here:
            raise RuntimeError(f"fetch: found chunk {chunk} in a slot, wanted it at home")
        self._grow()
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
        if len(self._here) < self.layout.count or not self._arenas:
            raise RuntimeError(f"arenas: found {len(self._here)} chunks, wanted all {self.layout.count} in one arena")
        return self._arenas

    def home(self) -> Sequence[Tensor]:
        launched = self._streams.record("current")
        for chunk, here in self._here.items():
            if here.changed:
                self._copy_out(chunk, launched)
        self._streams.synchronize()
        for here in self._here.values():
            here.changed, here.stale, here.leaving = False, True, False
        return self._home

    def trim(self) -> None:
        if self.stays:
            return
        self._spare.own -= sum(t.nbytes for slot in self._free for t in slot.tensors)
        self._free.clear()
        if not self._here:
            self._own, self._arenas, self._spare.own = {}, (), 0
            self._spare.forget()

    def close(self) -> None:
        self._home, self._arenas, self._here, self._own, self._free = (), (), {}, {}, deque()

    def _grow(self) -> None:
        """Allocates where there is no slot to take, or where one more is of use and there is room to spare."""
        if self.stays or self._own:
            return
        if self.whole:
            self._take_all()
        elif not self._free or (len(self._here) + len(self._free) < SLOTS and self._spare.holds(self.layout.nbytes(0))):
            try:
                self._free.extendleft(self._take([self.layout.span(0)])[1])
            except torch.OutOfMemoryError:
                if not self._free:
                    raise

    def _take_all(self) -> None:
        self._arenas, slots = self._take([self.layout.span(chunk) for chunk in range(self.layout.count)])
        self._own = dict(enumerate(slots))

    def _take(self, spans: Sequence[tuple[int, int]]) -> tuple[tuple[Tensor, ...], list[_Slot]]:
        """New memory, and slots in it: the first element of each, and the one after its last."""
        numel = max((end for _, end in spans), default=0)
        made = tuple(self._streams.empty(numel, dtype) for dtype in self.layout.dtypes)
        for t in made:
            self._streams.share(t)
        free = self._streams.record("current")  # the allocator's blocks are free for what is launched there
        self._spare.own += sum(t.nbytes for t in made)
        return made, [_Slot(tuple(t[first:end] for t in made), free) for first, end in spans]

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


def _places(layout: Layout, budget: int) -> list[tuple[int, int]]:
    """Of slots for what a budget holds of all: the first element of each in the arenas on the device and the one after."""
    spans = [layout.span(chunk) for chunk in range(layout.count)]
    full = max(1, budget // layout.nbytes(0))
    first, end = spans[-1]
    if layout.nbytes(layout.count - 1) > budget - full * layout.nbytes(0):
        return spans[:full]
    return [*spans[:full], (full * layout.chunk, full * layout.chunk + end - first)]
