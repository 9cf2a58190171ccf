"""States of an optimizer in CUDA's managed memory: one arena for each kind of state, of which chunks are sent home and fetched."""

import ctypes
import warnings
import weakref
from collections.abc import Sequence
from ctypes import byref, c_void_p

import torch
from torch import Tensor

from .. import managed
from .memory import Layout, Memory


class Managed(Memory):
    """A `Memory` whose chunks keep their addresses wherever they are; all of them begin at home, as zeros.

    Moves run on a stream of its own, between events: kernels use a chunk after its last move, and a move starts after its
    last use. They are told to the driver, which obeys as long as the GPU has room; what it did instead, or that it refused,
    costs time only, as kernels find pages by faults: a move that was refused is said once, by a RuntimeWarning.
    With allow_oversubscription, states that do not fit what the device has free have a `budget`: what fits beside the rest
    that this process holds, two chunks at least. Kernels on more than that would wait for nothing but faults.
    Raises: NotImplementedError where a device cannot share memory with the host at all times (WSL, Windows, before sm_60), or
    the CUDA library is not there; RuntimeError where this process would hold more managed memory than the device has free,
    unless allow_oversubscription; with the name of CUDA's error, having done nothing; on a stream that is captured into a
    CUDA graph; in a child of fork.
    """

    slips = True

    def __init__(
        self, layout: Layout, device: torch.device, allow_oversubscription: bool = False, calls: managed.Calls = managed.CALLS
    ) -> None:
        self.layout, self._device, self._calls = layout, device, calls
        calls.no_capture(calls.stream(device))
        self._handles = _Handles(device, calls)
        self._arenas: tuple[Tensor, ...] | None = None
        try:
            self._side = self._handles.make("stream").handle[0]
            self._all = self._handles.make("event")
            self._moved = [self._handles.make("event") for _ in range(layout.count)]
            self._used = [self._handles.make("event") for _ in range(layout.count)]
            self._arenas = managed.allocate(
                [layout.numel] * len(layout.dtypes), layout.dtypes, device, at_home=True,
                allow_oversubscription=allow_oversubscription, stream=self._side, calls=calls,
            )  # fmt: skip
            if allow_oversubscription:
                self.budget = self._found_budget(managed.room(device, calls))
            for event in self._moved:
                self._record(event, self._side)
        except BaseException:
            self.close()
            raise
        self._user: list[int | None] = [None] * layout.count  # the stream of a chunk's last use
        self._here: set[int] = set()  # chunks that were fetched and not sent
        self._torn: set[int] = set()  # chunks of which a move failed half-way, or that the host may have drawn home
        self._opened: int | None = None  # the stream on which what `home` gave is read and written
        self._refused = False  # whether a move was, and it was said

    def fetch(self, chunk: int) -> None:
        self._begin()
        self._move(chunk, self._device.index)
        self._here.add(chunk)

    def send(self, chunk: int) -> None:
        self._begin()
        self._move(chunk, managed.HOME)
        self._here.discard(chunk)

    def wait(self, chunk: int) -> None:
        current = self._begin()
        if chunk in self._torn:  # by a `send`, which then did not happen, or by a reader of `home`
            self._move(chunk, self._device.index)
        self._wait(self._moved[chunk], current)
        if self._user[chunk] not in (None, current):
            self._wait(self._used[chunk], current)

    def used(self, chunk: int) -> None:
        current = self._begin()
        self._record(self._used[chunk], current)
        self._user[chunk] = current

    def arenas(self, chunk: int | None = None) -> tuple[Tensor, ...]:
        if self._arenas is None:
            raise RuntimeError("managed memory: it was closed")
        if chunk is None:
            return self._arenas
        first, end = self.layout.span(chunk)
        return tuple(t[first:end] for t in self._arenas)

    def home(self) -> Sequence[Tensor]:
        """On torch's current stream, and for the host: it waits until all moves and uses are over."""
        current = self._current()
        if self._opened != current:
            self._begin()
            self._record(self._all, self._side)
            self._wait(self._all, current)
            for event in self._used:  # those not recorded yet are over
                self._wait(event, current)
            self._opened = current
        self._torn |= self._here
        self._record(self._all, current)
        self._calls("event_synchronize", self._all)
        return self.arenas()

    def close(self) -> None:
        """The arenas go with the last tensor that views them."""
        self._arenas = None
        self._handles.destroy()

    def _current(self) -> int:
        self.arenas()  # raises if it was closed
        current = self._calls.stream(self._device)
        self._calls.no_capture(current)
        return current

    def _begin(self) -> int:
        """The current stream. What was done to what `home` gave comes before every move and use from now on."""
        current = self._current()
        if self._opened is not None:
            self._record(self._all, self._opened)
            self._wait(self._all, self._side)
            for event in self._moved:
                self._record(event, self._side)
            self._opened = None
        return current

    def _move(self, chunk: int, place: int) -> None:
        self._wait(self._used[chunk], self._side)
        self._torn.add(chunk)
        refusal = ""
        for t in self.arenas(chunk):
            try:
                self._calls.prefetch(t, place, self._side)
            except RuntimeError as error:  # a hint was not taken: the next call tells if the device is lost
                refusal = str(error)
        self._record(self._moved[chunk], self._side)
        self._torn.discard(chunk)
        if refusal and not self._refused:
            self._refused = True
            what = f"paged optimizer: {refusal}; steps go on, and are slower where pages were not moved ahead"
            warnings.warn(what, RuntimeWarning, stacklevel=2)

    def _found_budget(self, room: managed.Room) -> int | None:
        """What is left for these states of a device that holds them too, at home; None where all are."""
        over = room.held - max(room.free + room.resident - managed.RESERVE, 0)
        sizes = [self.layout.nbytes(chunk) for chunk in range(self.layout.count)]
        return max(sum(sizes) - over, 2 * sizes[0]) if over > 0 and sizes else None

    def _record(self, event: managed.ManagedHandle, stream: int) -> None:
        self._calls("event_record", event, stream)

    def _wait(self, event: managed.ManagedHandle, stream: int) -> None:
        """What is put on the stream from now on comes after what the event recorded."""
        self._calls("event_wait", event, stream)


class _Handles:
    """A stream and events, destroyed with this object, though not at exit: then the process takes them along."""

    def __init__(self, device: torch.device, calls: managed.Calls) -> None:
        self._device, self._calls = device, calls
        self._made: list[tuple[str, managed.ManagedHandle]] = []
        self.destroy = weakref.finalize(self, _destroy, calls, self._made)
        self.destroy.atexit = False

    def make(self, kind: str) -> managed.ManagedHandle:
        """kind: "stream" or "event"."""
        made = managed.ManagedHandle(ctypes.pointer(c_void_p()), self._device.index)
        self._calls(f"{kind}_create", made)
        self._made.append((kind, made))
        return made


def _destroy(calls: managed.Calls, made: list[tuple[str, managed.ManagedHandle]]) -> None:
    while made:
        kind, handle = made.pop()
        calls.function(f"{kind}_destroy")(byref(handle))  # an error would be of what ran before it, and destroys all the same
