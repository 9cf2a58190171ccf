"""Which chunks of the states are on the device: as many as a budget holds, the least recently used leave first."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .memory import Memory


class Pager:
    """Places the chunks of `memory`, which has none of them on the device at first.

    budget: bytes of states on the device, None for all of them. A chunk larger than that comes alone and leaves with the
    step's end. ahead: how many chunks are on their way while another is stepped. Where chunks do not stay (`memory.stays`),
    each leaves once it was stepped, and the others with the step's end; what no step has asked for comes if there is room.

    A step, with `order` the chunks in it:

        if pager.fits:
            with pager.all() as arenas: launch on all of it
        else:
            for chunk in pager.stepping(order): launch on memory.arenas(chunk)

    Nothing here waits for the device. One thread calls at a time. What the memory raises is passed on: moves made before
    it stand, and any method may be called again. torch.OutOfMemoryError comes of a step alone, and before its first chunk
    where the memory takes over the room of chunks that left.
    """

    def __init__(self, memory: Memory, budget: int | None = None, ahead: int = 1) -> None:
        if ahead < 0 or (budget is not None and budget < 0):
            raise ValueError(f"found a budget of {budget} and {ahead} chunks ahead, wanted neither below 0")
        self._memory, self._ahead = memory, ahead
        self._sizes = [memory.layout.nbytes(chunk) for chunk in range(memory.layout.count)]
        self._budget = sum(self._sizes) if budget is None else budget
        self._here: dict[int, None] = {}  # what is on the device or on its way there, the least recently used first
        self._needed: set[int] = set()  # by the step; between steps, what was announced and what the last step took
        self._announced: set[int] = set()  # since the last step began
        self._held: set[int] = set()  # given to the caller to launch on, not marked used since
        self._step: object = None  # the one under way

    @property
    def resident_bytes(self) -> int:
        """Of what is on the device or on its way there."""
        return sum(self._sizes[chunk] for chunk in self._here)

    @property
    def fits(self) -> bool:
        """Whether the budget, and the memory now, hold all chunks at once."""
        return sum(self._sizes) <= self._budget and self._memory.whole

    def prefetch(self, chunk: int) -> None:
        """Announces that the next step needs a chunk, and fetches it if there is room: for hooks on gradients.

        Nothing leaves for it that was announced too or that the last step took, as the next one will likely need it. What is
        here is fetched again, once, where the system may have sent it home.
        """
        self._check((chunk,))
        again = chunk in self._announced
        if self._memory.slips and chunk in self._here and not again:
            self._memory.fetch(chunk)
        self._announced.add(chunk)
        self._needed.add(chunk)
        if not again:  # to ask for room takes its time
            self._bring(chunk)

    def stepping(self, chunks: Iterable[int]) -> Iterator[int]:
        """Each chunk of a step, once, on the device and waited for; those that are there already come first.

        It may be launched on until the next is asked for. A caller may leave early, or step the rest after an error.
        """
        wanted = dict.fromkeys(chunks)
        with self._under_way(wanted) as step:
            order = [c for c in self._here if c in wanted] + [c for c in wanted if c not in self._here]
            for place, chunk in enumerate(order):
                self._bring(chunk, now=True)
                self._memory.wait(chunk)
                for later in order[place + 1 : place + 1 + self._ahead]:
                    if not self._bring(later):
                        break
                self._held.add(chunk)
                yield chunk
                if self._step is not step:
                    raise RuntimeError(f"chunk {chunk}: another step began before this one was asked for its next")
                self._mark(chunk)
                if not self._memory.stays:
                    self._send(chunk)

    @contextmanager
    def all(self) -> Iterator[tuple[Tensor, ...]]:
        """The whole arenas on the device, for one launch on all chunks. ValueError where they do not fit."""
        if not self.fits:
            total = sum(self._sizes)
            raise ValueError(
                f"found {total} bytes of states, wanted at most the budget of {self._budget}, and room for it"
            )
        every = range(len(self._sizes))
        with self._under_way(every):
            for chunk in every:
                self._bring(chunk, now=True)
            for chunk in every:
                self._memory.wait(chunk)
            self._held.update(every)
            yield self._memory.arenas(None)

    def make_room(self, nbytes: int) -> int:
        """Sends the least recently used home until nbytes have gone or nothing is left to go; returns what went.

        A chunk the caller is launching on stays.
        """
        if self._step is None:
            self._settle()
        gone = 0
        for chunk in [c for c in self._here if c not in self._held]:
            if gone >= nbytes:
                break
            self._send(chunk)
            gone += self._sizes[chunk]
        if self._step is None:
            self._memory.trim()
        return gone

    @contextmanager
    def _under_way(self, wanted: Iterable[int]) -> Iterator[object]:
        self._check(wanted)
        self._settle()
        self._needed = set(wanted)
        self._announced.clear()
        step = self._step = object()
        try:
            yield step
        finally:
            if self._step is step:
                self._step = None
                self.make_room(self.resident_bytes - (self._budget if self._memory.stays else 0))
        self._needed.update(wanted)

    def _settle(self) -> None:
        """Marks what a step left, or what could not be marked when it ended: later than need be, which is right too."""
        for chunk in [c for c in self._here if c in self._held]:
            self._mark(chunk)

    def _check(self, chunks: Iterable[int]) -> None:
        for chunk in chunks:
            if not 0 <= chunk < len(self._sizes):
                raise IndexError(f"found chunk {chunk}, wanted one of {len(self._sizes)}")

    def _mark(self, chunk: int) -> None:
        self._memory.used(chunk)
        self._held.discard(chunk)
        self._needed.discard(chunk)
        del self._here[chunk]
        self._here[chunk] = None

    def _bring(self, chunk: int, now: bool = False) -> bool:
        """Starts to fetch a chunk if it is not here; unless `now`, only if nothing that is needed has to go for it."""
        if chunk in self._here:
            return True
        over = self.resident_bytes + self._sizes[chunk] - self._budget
        going = []
        for other in self._leaving():
            if over <= 0 or (other in self._needed and not now):
                break
            going.append(other)
            over -= self._sizes[other]
        if not now and (over > 0 or not self._memory.has_room(chunk)):
            return False
        for other in going:
            self._send(other)
        while True:
            try:
                self._memory.fetch(chunk)
            except torch.OutOfMemoryError:
                if not now:
                    return False
                if not (rest := self._leaving()):
                    raise
                self._send(rest[0])
            else:
                self._here[chunk] = None
                return True

    def _leaving(self) -> list[int]:
        """Who may go, in the order to go: what is needed comes last."""
        return sorted((c for c in self._here if c not in self._held), key=self._needed.__contains__)

    def _send(self, chunk: int) -> None:
        self._memory.send(chunk)
        del self._here[chunk]
        self._announced.discard(chunk)
