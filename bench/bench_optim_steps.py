"""What bench_optim times: steps over parameters of their own, moves of states, both beside a backward."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from nf4lora import backends
from nf4lora.optim import base, pool
from nf4lora.optim.managed import Managed
from nf4lora.optim.memory import Resident
from nf4lora.optim.staged import Staged

from .roofline import Traffic
from .shapes import LLAMA_3_8B_LAYER

LAYERS = 32  # of Llama-3-8B
FIRST_STEPS = 2  # before anything is timed: the second is from states that are not zero


@dataclass(frozen=True)
class Work:
    """Parameters that are stepped together, and their gradients: the same ones for everybody."""

    title: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype = torch.float32
    device: str = "cuda"

    @property
    def numel(self) -> int:
        return sum(map(prod, self.shapes))

    def parameters(self) -> list[nn.Parameter]:
        return [nn.Parameter(t) for t in self._drawn(0, 0.02)]

    def give_gradients(self, params: Sequence[nn.Parameter], seed: int) -> None:
        for p, gradient in zip(params, self._drawn(seed, 1e-3), strict=True):
            p.grad = gradient

    def _drawn(self, seed: int, std: float) -> Iterator[Tensor]:
        generator = torch.Generator(self.device).manual_seed(seed)
        for shape in self.shapes:
            yield torch.randn(shape, generator=generator, dtype=self.dtype, device=self.device).mul_(std)


def lora_shapes(rank: int = 16, layers: int = LAYERS) -> tuple[tuple[int, int], ...]:
    """lora_A [rank, K] and lora_B [N, rank] of every linear of Llama-3-8B's layers."""
    return tuple(shape for N, K in LLAMA_3_8B_LAYER.values() for shape in ((rank, K), (N, rank))) * layers


def step_traffic(work: Work, bits: int, states: int) -> Traffic:
    """Of a step: parameters and states read and written, gradients read. AdamW: 28 bytes a float32 parameter with states
    of 32 bits, 16 1/16 with those of 8, whose absmax, a float32 for 256 of a tensor, is read and written too."""
    coded = states * (4 * sum(-(-prod(shape) // 256) for shape in work.shapes) if bits == 8 else 0)
    own = work.numel * (work.dtype.itemsize + states * bits // 8) + coded
    return Traffic(own + work.numel * work.dtype.itemsize, own)


# ---- where states are

PLACES = ("managed", "pinned staging", "resident")


@contextmanager
def placed(place: str | None, chunk_bytes: int | None = None) -> Iterator[None]:
    """States allocated inside are in one of PLACES, paged in chunks of this size, and stay until they are sent; None for
    what the package chooses."""

    def chooser(paged: bool, budget: int | None, allow_oversubscription: bool) -> Callable[..., Any]:
        return {"managed": Managed, "pinned staging": partial(Staged, budget=sys.maxsize if budget is None else budget), "resident": Resident}[place]

    kept = base.chooser, pool.CHUNK_BYTES
    base.chooser, pool.CHUNK_BYTES = chooser if place else kept[0], chunk_bytes or kept[1]
    try:
        yield
    finally:
        base.chooser, pool.CHUNK_BYTES = kept


def pools(optimizer: Any) -> list[pool.Pool]:
    """None of a peer's."""
    return list(dict.fromkeys(getattr(optimizer, "_pool_of", {}).values()))


def state_bytes(optimizer: Any) -> int:
    """Of the arenas, which is what moves."""
    layouts = [found.memory.layout for found in pools(optimizer)]
    return sum(layout.nbytes(chunk) for layout in layouts for chunk in range(layout.count))


def send_home(optimizer: Any) -> None:
    """All states."""
    for found in pools(optimizer):
        found.pager.make_room(found.pager.resident_bytes)


def fetch(optimizer: Any) -> None:
    """All states, as the hooks on gradients do."""
    for found in pools(optimizer):
        for chunk in range(found.memory.layout.count):
            found.pager.prefetch(chunk)


# ---- what is timed


class Timed:
    """A piece of work: `go` is timed, `before` is not. A call does both and returns what the gate reads.

    how: "events", between two of them with the device held back until all is launched; "flow", between two of them
        right after `before`, whose work may still be under way; "clock", by the host's from an idle device to an idle one
    host: whether the host's time of `go` is told as well; repeats: of the work in one `go`
    """

    how, host, repeats = "events", False, 1
    found: Any = None

    def before(self) -> None: ...

    def go(self) -> None: ...

    def __call__(self) -> Any:
        self.before()
        self.go()
        return self.found


class Bare(Timed):
    """A function."""

    def __init__(self, function: Callable[[], Any], how: str = "events") -> None:
        self.go, self.how = function, how


class Loop(Timed):
    """Steps of an optimizer. The first are made when this is built, all but the very first from states that were sent
    home; `found` is what the parameters were after those."""

    host = True

    def __init__(
        self, work: Work, make: Callable[..., Any], place: str | None = None, chunk_bytes: int | None = None
    ) -> None:
        self.work, self.params = work, work.parameters()
        self.optimizer = make(self.params)
        with placed(place, chunk_bytes):
            work.give_gradients(self.params, 1)
            self.optimizer.step()
            for seed in range(2, FIRST_STEPS + 1):
                work.give_gradients(self.params, seed)
                self.again()
        self.found = [p.detach().clone() for p in self.params]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0  # however often it is timed, parameters stay what was found

    def again(self) -> None:
        """A step before the gate."""
        send_home(self.optimizer)
        self.optimizer.step()

    def go(self) -> None:
        self.optimizer.step()


class Spiked(Loop):
    """A step with an allocation that stays until its end (`keep`) or goes before it, from states on the device."""

    how, host = "clock", False

    def __init__(self, allocate: Callable[[], Tensor], keep: bool, *args: Any, **options: Any) -> None:
        self.allocate, self.keep = allocate, keep
        super().__init__(*args, **options)
        self.found = [t.cpu() for t in self.found]

    def go(self) -> None:
        spike = self.allocate()
        if not self.keep:
            del spike
            if self.params[0].is_cuda:
                torch.cuda.empty_cache()
        self.optimizer.step()

    again = go


class Move(Loop):
    """All states to the device; or, `away`, from there."""

    how, host, away = "clock", False, False

    def before(self) -> None:
        self.optimizer.step() if self.away else send_home(self.optimizer)

    def go(self) -> None:
        (send_home if self.away else fetch)(self.optimizer)


class Away(Move):
    away = True


class Through(Loop):
    """A step from states at home, which are there again afterwards."""

    how = "clock"
    host = False

    def before(self) -> None:
        send_home(self.optimizer)

    def go(self) -> None:
        self.optimizer.step()
        send_home(self.optimizer)


class Read(Loop):
    """One pass over all states, right after they were fetched, or (`fetched` False, managed memory) while they are at home."""

    host, fetched = False, True

    def before(self) -> None:
        for found in pools(self.optimizer):
            found.pager.make_room(found.pager.resident_bytes)
            for chunk in range(found.memory.layout.count):
                # Where pages went by faults no pager knows
                found.pager.prefetch(chunk) if self.fetched else found.memory.send(chunk)

    def go(self) -> None:
        for found in pools(self.optimizer):
            with found.pager.all() if self.fetched else nullcontext(found.memory.arenas()) as arenas:
                for t in arenas:
                    t.view(torch.int32).amax()


class Blocks(Loop):
    """A step launched in `count` blocks, where the back end is told how many."""

    def __init__(self, count: int, backend: str, *args: Any, **options: Any) -> None:
        self._key, self.count = ("optim_step", backend), count
        super().__init__(*args, **options)

    def go(self) -> None:
        row = backends._ROWS[self._key]
        backends._ROWS[self._key] = replace(row, configure=lambda *args: self.count)
        try:
            self.optimizer.step()
        finally:
            backends._ROWS[self._key] = row

    again = go


class Cycle(Loop):
    """Backward, step, states home: as often as `repeats` says, each cycle beside what the one before left under way.

    backward: makes the gradients of the parameters it is given, without waiting for the device.
    """

    how, host, repeats = "flow", False, 2

    def __init__(self, backward: Callable[[Sequence[nn.Parameter]], None], *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.backward = backward

    def before(self) -> None:
        self.optimizer.zero_grad()
        self.backward(self.params)
        self.optimizer.step()
        send_home(self.optimizer)

    def go(self) -> None:
        for _ in range(self.repeats):
            self.before()
