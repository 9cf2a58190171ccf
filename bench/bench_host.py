"""Host cost of one layer call, from the call to its return: what the contenders of `bench/layer.py` ask of the processor.

One linear with LoRA, and q, k, v on one x; forward without gradients, forward that records them, and backward. A round
is a batch of calls, begun when the device is idle and short enough that its queue is never full, so the host waits for
nothing; its time is the median of theirs by the host's clock. On a CPU the operands are tiny, but a call's arithmetic is
in its time; OMP_NUM_THREADS=1 keeps threads out of it.

Afterwards, as a profiler slows what follows it, launches are counted: kernels, copies and fills on the device in a call.
"""

import gc
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nf4lora import backends

from .bench_layer import case
from .files import write
from .harness import Case, counted, options, run
from .layer import OURS, SEVEN, Call, Work
from .timing import Contender, launched

# A call makes 60 launches at most (q, k, v backward in peft), and the queue of a device takes 1024.
CALLS = 16
ROUNDS = 11
TITLES = {SEVEN[1:2]: "one linear", SEVEN[:1]: "q, k, v"}


@dataclass(frozen=True)
class Alone:
    """The forward of a call, or its backward; what is called is the whole, which the gate sees."""

    call: Call
    backward: bool

    def __call__(self) -> Any:
        return self.call()

    def mode(self) -> AbstractContextManager[None]:
        """What they are called in: a program enters autocast once a step."""
        return nullcontext() if self.backward else self.call.mode()

    def ready(self, count: int) -> list[Callable[[], Any]]:
        """`count` of them to be timed; the forwards that backwards need are done here."""
        if not self.backward:
            return [self.call.outputs] * count
        return [partial(self.call.backward, self.call.forward()) for _ in range(count)]


class HostMeter:
    """The host's time of a call while the device keeps up; garbage is not collected meanwhile."""

    def prepare(self, contender: Contender, check: Callable[[Any], None] | None = None) -> "_HostSample":
        with contender.forced():
            for _ in range(3):
                result = contender.calls[0]()
        if check:
            check(result)
        return _HostSample(contender)


class _HostSample:
    timed = "host"

    def __init__(self, contender: Contender) -> None:
        self._contender = contender

    def kernel_ms(self) -> float:
        """The median of a batch: what another process takes from one call or two is not in it."""
        taken = []
        (alone,) = self._contender.calls
        with self._contender.forced(), alone.mode():
            batch = alone.ready(CALLS)
            _wait()
            gc.disable()
            try:
                for call in batch:
                    start = time.perf_counter()
                    call()
                    taken.append(time.perf_counter() - start)
            finally:
                gc.enable()
            _wait()
        return statistics.median(taken) * 1e3

    def eager_ms(self) -> None:
        return None

    def energy_mj(self) -> None:
        return None


def works(device: str) -> Iterator[tuple[Work, bool]]:
    """What is computed, and whether its backward is timed. On a GPU each number of tokens takes another path of ours."""
    sizes = {name: (64, 64) for names in TITLES for name in names[0]} if device == "cpu" else None
    for M in (1,) if device == "cpu" else (16, 4096, 256):
        for groups in TITLES:
            work = Work(M, groups, shapes=sizes, device=device)
            yield work, False
            yield replace(work, gradients=True), False
            yield replace(work, gradients=True), True


def host_cases(
    chosen: Iterable[tuple[Work, bool]], absent: list[str], made: list[Case]
) -> Iterator[Callable[[], Case]]:
    """The case of each; `absent` grows by the contenders that are not there, `made` by the cases."""

    def build(work: Work, backward: bool) -> Case:
        what = "backward" if backward else "forward, recorded" if work.gradients else "forward"
        title = f"host cost, {TITLES[work.groups]}, K = {work.shape(work.names[0])[1]}, {str(work.dtype)[6:]}, r = {work.rank}"
        found = case(work, title, None, absent, lambda call: Alone(call, backward))
        made.append(replace(found, name=f"{what} M={work.M}", sweep=None, x=None))
        return made[-1]

    for work, backward in chosen:
        yield lambda work=work, backward=backward: build(work, backward)


def launches(contender: Contender) -> int | None:
    """Kernels, copies and fills of one forward or backward on the device; None where nothing can count them."""
    if not torch.cuda.is_available():
        return None
    (alone,) = contender.calls
    with contender.forced(), alone.mode():
        (once,) = alone.ready(1)
        _wait()
        return launched(once)


def measure(
    stem: str, chosen: Iterable[tuple[Work, bool]], out: Path, device: str, rounds: int = ROUNDS,
    watch: Callable[[list], Iterable] = iter,
) -> int:  # fmt: skip
    """Ours run on the back end that a program would get, whose choice is part of the cost. `watch` sees the cases go by."""
    made: list[Case] = []
    reasons = {(kind, name): why for kind, name, why in backends.report()}
    why = reasons[device, device]
    absent = [f"{OURS} on its {device} back end, so the next one ran: {why}"] if why else []
    path = out / f"{stem}.json"
    try:
        return run(stem, watch(list(host_cases(chosen, absent, made))), HostMeter(), rounds, out, absent)
    finally:
        if path.exists():
            document = json.loads(path.read_text())
            write(path, document | {"launches": counted(made, document["rows"], launches)})


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> int:
    warnings.filterwarnings("ignore", message=".*kernels-community.*")
    asked = options(__doc__)
    torch.manual_seed(0)
    return measure(f"{asked.device}_host", works(asked.device), asked.out, asked.device)


if __name__ == "__main__":
    sys.exit(main())
