"""Memory without a device: a page table that moves real contents, and clocks that find what nothing ordered."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from .memory import Layout, Memory


class Unordered(RuntimeError):
    """Two streams touch the same memory, one of them writes, and no event orders them."""


class Injected(RuntimeError):
    """A call that was told to fail, and did nothing else."""


class Clocks:
    """Vector clocks: every stream, and the host, knows how much of each other one is over before its own next access."""

    HOST = "host"

    def __init__(self, *streams: str) -> None:
        self._known = {name: dict.fromkeys((*streams, self.HOST), 0) for name in (*streams, self.HOST)}
        self._last: dict[tuple[int, int], dict[tuple[str, bool], int]] = {}

    def record(self, stream: str) -> dict[str, int]:
        """An event: what is over once all that the stream was given so far is."""
        return dict(self._known[stream])

    def wait(self, stream: str, event: dict[str, int]) -> None:
        """What the stream is given from now on comes after the event."""
        known = self._known[stream]
        for name, time in event.items():
            known[name] = max(known[name], time)

    def synchronize(self, *streams: str) -> None:
        """The host waits for all that the streams were given."""
        for name in streams:
            self.wait(self.HOST, self._known[name])

    def access(self, stream: str, tensors: Sequence[Tensor], write: bool) -> None:
        """The stream reads or writes contiguous tensors. Raises `Unordered`."""
        self.wait(stream, self._known[self.HOST])  # what the host did before it gave this
        known = self._known[stream]
        known[stream] += 1
        for t in tensors:
            first = t.data_ptr()
            end = first + t.nbytes
            for (low, high), accesses in self._last.items():
                if low < end and first < high:
                    self._compare(stream, accesses, write)
            self._last.setdefault((first, end), {})[stream, write] = known[stream]

    def forget(self, t: Tensor) -> None:
        """What touched the memory of a tensor, which is another's from now on."""
        first, end = t.data_ptr(), t.data_ptr() + t.nbytes
        self._last = {place: accesses for place, accesses in self._last.items() if not first <= place[0] < end}

    def _compare(self, stream: str, accesses: dict[tuple[str, bool], int], write: bool) -> None:
        for (other, wrote), time in accesses.items():
            if (write or wrote) and self._known[stream][other] < time:
                verbs = ("reads", "writes")
                raise Unordered(f"{stream} {verbs[write]} what {other} {verbs[wrote]}, with nothing to order them")


class Simulated(Memory):
    """A `Memory` of CPU tensors with room for `capacity` bytes on what plays the device.

    Contents are in one of two places, as managed memory has them, and what lies in the other is 255 in every byte.
    Fetches and sends are on a side stream. fail_at: numbers of calls of fetch, send, wait, used, home and trim, from 1,
    that raise `Injected`. Raises MemoryError for a fetch without room; RuntimeError for one of what is there, and for the
    touch, send, wait or use of what is not; `Unordered` where hardware might give another result.

    stays: as of every memory. Without it, `others` may take of the capacity, and a fetch without room among them raises
    torch.OutOfMemoryError, also one that `has_room` allowed, where it is `hopeful`; and all of it is `whole` or not.
    """

    hopeful, whole, others = False, True, 0

    def __init__(self, layout: Layout, capacity: int, fail_at: Collection[int] = (), stays: bool = True) -> None:
        self.layout, self.capacity, self._fail_at, self.stays = layout, capacity, fail_at, stays
        self.calls = self.fetches = self.sends = self.faults = 0
        self.log: list[tuple[str, int]] = []  # of what was done to which chunk
        self._clocks = Clocks("current", "side")
        self._home = tuple(torch.zeros(layout.numel, dtype=dtype) for dtype in layout.dtypes)
        self._device = tuple(torch.zeros_like(t) for t in self._home)
        self._arrived: dict[int, Any] = {}  # by chunk on the device: the event of its fetch
        self._used: dict[int, Any] = {}
        self._stale: set[int] = set()  # on the device, but their contents are at home, where they may have been written
        for t in self._device:
            _poison(t)

    @property
    def resident(self) -> set[int]:
        """Chunks on the device."""
        return set(self._arrived)

    def has_room(self, chunk: int) -> bool:
        return self.stays or self.hopeful or self._over(chunk) <= 0

    def fetch(self, chunk: int) -> None:
        self._call("fetch", chunk)
        if chunk in self._arrived:
            raise RuntimeError(f"fetch: found chunk {chunk} on the device, wanted it at home")
        if self._over(chunk) > 0:
            error = MemoryError if self.stays else torch.OutOfMemoryError
            raise error(f"fetch: found no room for chunk {chunk} beside {sorted(self._arrived)}")
        self._move(chunk, self._home, self._device)
        self._arrived[chunk] = self._clocks.record("side")
        self.fetches += 1

    def send(self, chunk: int) -> None:
        self._call("send", chunk)
        self._here("send", chunk)
        if chunk in self._used:
            self._clocks.wait("side", self._used.pop(chunk))
        if chunk not in self._stale:
            self._move(chunk, self._device, self._home)
        self._stale.discard(chunk)
        del self._arrived[chunk]
        self.sends += 1

    def wait(self, chunk: int) -> None:
        self._call("wait", chunk)
        self._here("wait", chunk)
        if chunk in self._stale:
            self._move(chunk, self._home, self._device)
            self._arrived[chunk] = self._clocks.record("side")
            self._stale.discard(chunk)
            self.log.append(("reload", chunk))
        self._clocks.wait("current", self._arrived[chunk])

    def used(self, chunk: int) -> None:
        self._call("used", chunk)
        self._here("used", chunk)
        self._used[chunk] = self._clocks.record("current")

    def arenas(self, chunk: int | None = None) -> tuple[Tensor, ...]:
        """As every memory's; counts as a kernel on the current stream that touches all of them."""
        for c in range(self.layout.count) if chunk is None else (chunk,):
            if c not in self._arrived or c in self._stale:
                self.faults += 1
                raise RuntimeError(f"touch: found chunk {c} at home, wanted it on the device")
            self._clocks.access("current", self._of(self._device, c), write=True)
            self.log.append(("touch", c))
        return self._device if chunk is None else self._of(self._device, chunk)

    def touch(self, chunk: int | None, function: Callable[..., Any]) -> Any:
        """A kernel on the current stream: function(*arenas)."""
        return function(*self.arenas(chunk))

    def home(self) -> Sequence[Tensor]:
        self._call("home", -1)
        self._clocks.synchronize("current", "side")
        for chunk in set(self._arrived) - self._stale:
            self._move(chunk, self._device, self._home)
        self._clocks.synchronize("side")
        self._stale = set(self._arrived)
        return self._home

    def trim(self) -> None:
        if not self.stays:
            self._call("trim", -1)

    def close(self) -> None:
        self._home = self._device = ()

    def _over(self, chunk: int) -> int:
        """Bytes that a chunk would be too many."""
        return sum(map(self.layout.nbytes, (*self._arrived, chunk))) + self.others - self.capacity

    def _call(self, name: str, chunk: int) -> None:
        self.calls += 1
        if self.calls in self._fail_at:
            raise Injected(f"call {self.calls}, {name} of {chunk}")
        self.log.append((name, chunk))

    def _here(self, name: str, chunk: int) -> None:
        if chunk not in self._arrived:
            raise RuntimeError(f"{name}: found chunk {chunk} at home, wanted it on the device")

    def _of(self, arenas: Sequence[Tensor], chunk: int) -> tuple[Tensor, ...]:
        first, end = self.layout.span(chunk)
        return tuple(t[first:end] for t in arenas)

    def _move(self, chunk: int, source: Sequence[Tensor], target: Sequence[Tensor]) -> None:
        here, there = self._of(source, chunk), self._of(target, chunk)
        self._clocks.access("side", (*here, *there), write=True)
        for a, b in zip(here, there, strict=True):
            b.copy_(a)
            _poison(a)


def _poison(t: Tensor) -> None:
    t.view(torch.uint8).fill_(255)
