"""The parameters that are stepped together: one device, one dtype, one width of state, and arenas of their own for it."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..reference_optim import STATE_BLOCKSIZE
from .memory import Layout, Memory
from .pager import Pager
from .sharded import local

CHUNK_BYTES = 32 << 20  # of all arenas together; one move of the pager
NAMES = {"adamw": ("state1", "state2"), "lion": ("state1",)}


class Kind(NamedTuple):
    """What all parameters of a pool have in common."""

    device: torch.device
    dtype: torch.dtype
    bits: int  # of an element of state: 8 or 32


class Work(NamedTuple):
    """What the step of a pool is told beside parameters and gradients; lists as in `reference_optim.optim_step`."""

    steps: Tensor | None
    flag: Tensor | None
    hypers: list[float]
    seed: int | None


class Pool:
    """States of `params` under a rule ("adamw" or "lion"), all zeros at first.

    make_memory: of a layout, on the device; budget: bytes of it to keep on the device, None for what the memory says: all, as
    long as there is room.
    """

    def __init__(
        self, params: Sequence[Tensor], rule: str, kind: Kind, make_memory: Callable[[Layout, torch.device], Memory],
        budget: int | None,
    ) -> None:  # fmt: skip
        self.rule, self.kind, self.shapes, self.offsets = rule, kind, {}, {}
        numel = 0
        for p in params:
            self.offsets[p], self.shapes[p] = numel, local(p).shape
            numel += -(-self.shapes[p].numel() // STATE_BLOCKSIZE) * STATE_BLOCKSIZE
        dtype = torch.uint8 if kind.bits == 8 else torch.float32
        names = NAMES[rule]
        self.memory = make_memory(Layout(numel, (dtype,) * len(names), CHUNK_BYTES // (dtype.itemsize * len(names))), kind.device)
        # A 64th of what they scale, and read with it: always on the device.
        blocks = numel // STATE_BLOCKSIZE
        self.absmax = tuple(torch.zeros(blocks, dtype=torch.float32, device=kind.device) for _ in names) if kind.bits == 8 else ()
        self.pager = Pager(self.memory, self.memory.budget if budget is None else budget)
        self._gradients: dict[Tensor, int] = {}  # how often each was told of since the last step
        self._backwards = math.inf  # that the last step took; as good as never before that is known

    def states(self) -> dict[Tensor, dict[str, Tensor]]:
        """The states of each parameter by bitsandbytes' names: views of the arenas, as fresh as `home` of their memory."""
        home, found = self.memory.home(), {}
        for p, first in self.offsets.items():
            last = first + self.shapes[p].numel()
            found[p] = {name: t[first:last].view(self.shapes[p]) for name, t in zip(NAMES[self.rule], home, strict=True)}
            for i, t in enumerate(self.absmax, 1):
                found[p][f"absmax{i}"] = t[first // STATE_BLOCKSIZE : -(-last // STATE_BLOCKSIZE)]
        return found

    def chunks_of(self, p: Tensor) -> range:
        size = self.memory.layout.chunk
        return range(self.offsets[p] // size, -(-(self.offsets[p] + self.shapes[p].numel()) // size))

    def prefetch(self, p: Tensor) -> None:
        """The parameter has its gradient, so its states are going to be wanted.

        Where they do not stay they come in the last backward of a step, if it has as many as the one before: until then
        forwards are to come, which need the room.
        """
        self._gradients[p] = self._gradients.get(p, 0) + 1
        if self.memory.stays or self._gradients[p] >= self._backwards:
            for chunk in self.chunks_of(p):
                self.pager.prefetch(chunk)

    def step(self, params: list[Tensor], grads: list[Tensor], slots: list[int], hyper_of: list[int], work: Work) -> None:
        """Of `params`, some of the pool's; one of any strides is stepped as a copy, as its states lie in rows.

        All copies are made before anything is stepped, so that none fails in the middle.
        """
        self._backwards = max(self._gradients.values(), default=math.inf)
        self._gradients.clear()
        given = params
        offsets = [self.offsets[p] for p in params]
        params, grads = [local(p) for p in params], [local(g) for g in grads]
        lying = [p if p.is_contiguous() else p.contiguous() for p in params]
        grads = [g if g.is_contiguous() else g.contiguous() for g in grads]
        if self.pager.fits:
            with self.pager.all() as arenas:
                self._launch(lying, grads, offsets, slots, hyper_of, arenas, 0, work)
        else:
            wanted = {chunk: None for p in given for chunk in self.chunks_of(p)}
            for chunk in self.pager.stepping(list(wanted)):
                self._step_chunk(chunk, lying, grads, offsets, slots, hyper_of, work)
        for p, copy in zip(params, lying, strict=True):
            if p is not copy:
                p.copy_(copy)

    def _step_chunk(self, chunk, params, grads, offsets, slots, hyper_of, work) -> None:
        """What of the parameters has its states in a chunk."""
        first, end = self.memory.layout.span(chunk)
        pieces = []
        for p, g, offset, slot, hyper in zip(params, grads, offsets, slots, hyper_of, strict=True):
            a, b = max(offset, first), min(offset + p.numel(), end)
            if a < b:
                part = slice(a - offset, b - offset)
                pieces.append((p.view(-1)[part], g.view(-1)[part], a - first, slot, hyper))
        self._launch(*map(list, zip(*pieces, strict=True)), self.memory.arenas(chunk), first, work)

    def _launch(self, params, grads, offsets, slots, hyper_of, arenas, origin, work: Work) -> None:
        blocks = slice(origin // STATE_BLOCKSIZE, (origin + arenas[0].numel()) // STATE_BLOCKSIZE)
        state = (*arenas, None)[:2] + (*(t[blocks] for t in self.absmax), None, None)[:2]
        ops.optim_step(
            params, grads, *state, work.steps, work.flag, offsets, slots, hyper_of, work.hypers, self.rule, work.seed, origin
        )

def reserve(pools: Iterable[Pool]) -> None:
    """The room that a step of all of them needs: where it is not there, what came for one of them ahead of it goes."""
    for again in (True, False):
        try:
            for pool in pools:
                pool.memory.reserve()
        except torch.OutOfMemoryError:
            for pool in pools:
                if not pool.memory.stays:
                    pool.pager.make_room(pool.pager.resident_bytes)
            if not again:
                raise
        else:
            break
