"""How one contender is timed: on a CPU by the clock, on a GPU by graph replays over buffers that no cache holds."""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from nf4lora import backends

POISON = 0xA5


class Spread(NamedTuple):
    """Median, least and most of what the rounds gave."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        values = list(values)
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Contender:
    """One way to do the work of a case.

    calls: each does the work once, on buffers of its own, and returns what it wrote. They are gone round, so that no
        call finds its operands in the cache (`cold_sets` says how many that takes)
    backend, path: the back end of ours that is forced meanwhile, and its path of the linear
    within: makes a context that its calls run in, entered before the clock starts
    ours: its result must pass the case's gate before any of its times is told
    ceiling: it moves the bytes and does nothing else
    bytes_moved: where it moves other bytes than the case
    memory: bytes it holds at its peak, by kind
    """

    calls: tuple[Callable[[], Any], ...]
    backend: str | None = None
    ours: bool = False
    ceiling: bool = False
    bytes_moved: int | None = None
    path: str | None = None
    memory: dict[str, int] | None = None
    within: Callable[[], AbstractContextManager[None]] = nullcontext

    @contextmanager
    def forced(self) -> Iterator[None]:
        with self.within(), backends.use_backend(self.backend, self.path) if self.backend else nullcontext():
            yield


class Sample(Protocol):
    """A contender made ready. `timed` says how `kernel_ms` measures; None is what was not measured."""

    timed: str

    def kernel_ms(self) -> float: ...
    def eager_ms(self) -> float | None: ...
    def energy_mj(self) -> float | None: ...


class Meter(Protocol):
    """Makes contenders ready. `check` raises AssertionError on a wrong result; what is timed is what passed it."""

    def prepare(self, contender: Contender, check: Callable[[Any], None] | None) -> Sample: ...


class WallMeter:
    """A call by the host's clock: the mean of one turn round its calls, each of which must pass."""

    def prepare(self, contender: Contender, check: Callable[[Any], None] | None = None) -> Sample:
        for call in contender.calls:
            with contender.forced():
                result = call()
            if check:
                check(result)
        return _WallSample(contender)


class _WallSample:
    timed = "wall clock"

    def __init__(self, contender: Contender) -> None:
        self._contender = contender

    def kernel_ms(self) -> float:
        calls = self._contender.calls
        with self._contender.forced():
            start = time.perf_counter()
            for call in calls:
                call()
            return (time.perf_counter() - start) * 1e3 / len(calls)

    def eager_ms(self) -> None:
        return None

    def energy_mj(self) -> None:
        return None


def launched(call: Callable[[], Any]) -> int | None:
    """Kernels, copies and fills of a call on the device, which is idle before; None where there are none."""
    with torch.profiler.profile() as profile:
        call()
        torch.cuda.synchronize()
    on_device = (e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    return sum(not e.is_user_annotation for e in on_device) or None


def cold_sets(bytes_per_call: int, l2_bytes: int) -> int:
    """Sets of buffers that three times fill the L2 cache: a call then finds nothing of its own there."""
    return max(2, math.ceil(3 * l2_bytes / max(bytes_per_call, 1)))


def calls_per_replay(call_ms: float, sets: int, target_ms: float = 4.0, most: int = 2000) -> int:
    """Whole turns round the sets that take about `target_ms`; one turn at least, `most` calls beyond that."""
    turns = math.ceil(target_ms / max(call_ms, 1e-4) / sets)
    return sets * max(1, min(turns, most // sets))


def tensors(value: Any) -> list[Tensor]:
    """The tensors of a result: itself, or those in a tuple or list."""
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in tensors(v)] if isinstance(value, tuple | list) else []


class NotCapturable(Exception):
    """The contender's work is not in the graph: it launches on another stream, or synchronizes."""


class CudaMeter:
    """Kernel time of many calls inside one CUDA graph, which pays no launch; eager calls beside it; energy by NVML.

    Every call has buffers of its own, outputs included, and before a graph is timed its outputs are poisoned and one
    replay must write them again. What cannot be captured is timed by events, after a kernel that flushes the L2 cache.
    """

    def __init__(
        self, l2_bytes: int | None = None, energy: Callable[[], float] | None = None, energy_s: float = 0.5
    ) -> None:
        self.l2_bytes = l2_bytes or torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self.energy, self.energy_s = energy, energy_s

    def prepare(self, contender: Contender, check: Callable[[Any], None] | None = None) -> Sample:
        with contender.forced():
            self._warm_up(contender)
            if check:
                check(contender.calls[0]())
            sets = len(contender.calls)
            try:
                replay, kept = self.capture(lambda: _go_round(contender, sets))
                self._verify(replay, kept, check)
                count = calls_per_replay(self._time(replay) / sets, sets)
                if count > sets:
                    replay, kept = self.capture(lambda: _go_round(contender, count))
                    self._verify(replay, kept, check)
            except (NotCapturable, RuntimeError):
                self._synchronize()
                return _EventSample(self, contender)
        return _GraphSample(self, contender, replay, count)

    def capture(self, body: Callable[[], list[Any]]) -> tuple[Callable[[], None], list[Any]]:
        """Records `body` into a graph; returns its replay and what `body` returned, which every replay writes anew."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = body()
        return graph.replay, kept

    def _verify(self, replay: Callable[[], None], kept: list[Any], check: Callable[[Any], None] | None) -> None:
        written = tensors(kept)
        for t in written:
            _bytes(t).fill_(POISON)
        replay()
        self._synchronize()
        if any(t.numel() and bool((_bytes(t) == POISON).all()) for t in written):
            raise NotCapturable("a replay left an output untouched")
        for result in (kept[0], kept[-1]) if check else ():
            check(result)

    def _warm_up(self, contender: Contender) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in contender.calls[:3]:
                call()
        torch.cuda.current_stream().wait_stream(side)
        self._synchronize()

    def _synchronize(self) -> None:
        torch.cuda.synchronize()

    def _event(self) -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True)

    def _time(self, work: Callable[[], Any]) -> float:
        start, end = self._event(), self._event()
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def _flush(self) -> Tensor:
        """Memory whose clearing empties the cache, and takes the time that the host needs to launch what is timed."""
        return torch.empty(max(4 * self.l2_bytes, 512 * 2**20), dtype=torch.int8, device="cuda")


class _GraphSample:
    timed = "graph replay"

    def __init__(self, meter: CudaMeter, contender: Contender, replay: Callable[[], None], count: int) -> None:
        self._meter, self._contender, self._replay, self._count = meter, contender, replay, count
        meter._time(replay)

    def kernel_ms(self) -> float:
        return self._meter._time(self._replay) / self._count

    def eager_ms(self) -> float:
        return _eager_ms(self._meter, self._contender)

    def energy_mj(self) -> float | None:
        """The card's energy between two ticks of its counter, `energy_s` or more apart, over the calls between."""
        read, seconds = self._meter.energy, self._meter.energy_s
        if read is None:
            return None
        calls, first, deadline = 0, None, time.monotonic() + 4 * seconds + 1
        before = read()
        while time.monotonic() < deadline:
            self._meter._time(self._replay)
            calls += self._count
            now = read()
            if now == before:
                continue
            if first is None:
                first, begun, calls = now, time.monotonic(), 0
            elif time.monotonic() - begun >= seconds:
                return (now - first) / calls
            before = now
        return None


class _EventSample:
    timed = "events, L2 flushed"

    def __init__(self, meter: CudaMeter, contender: Contender) -> None:
        self._meter, self._contender, self._memory = meter, contender, meter._flush()

    def kernel_ms(self) -> float:
        pairs = []
        with self._contender.forced():
            for call in (self._contender.calls * 5)[:5]:
                self._memory.zero_()
                start, end = self._meter._event(), self._meter._event()
                start.record()
                call()
                end.record()
                pairs.append((start, end))
        self._meter._synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in pairs)

    def eager_ms(self) -> float:
        return _eager_ms(self._meter, self._contender)

    def energy_mj(self) -> None:
        return None


def _eager_ms(meter: CudaMeter, contender: Contender) -> float:
    """One call of many launched one after the other, as a program launches them: the longer of launch and kernel."""
    count = max(20, len(contender.calls))
    with contender.forced():
        return meter._time(lambda: _go_round(contender, count)) / count


def _go_round(contender: Contender, count: int) -> list[Any]:
    """`count` calls round the sets. The results of the last turn stay alive: outputs too take turns in memory."""
    sets = len(contender.calls)
    kept: deque[Any] = deque(maxlen=sets)
    for i in range(count):
        kept.append(contender.calls[i % sets]())
    return list(kept)


def _bytes(t: Tensor) -> Tensor:
    """A view of the tensor's memory, not a copy."""
    t = t.detach()
    return (t if t.ndim and t.stride(-1) == 1 else t.reshape(-1)).view(torch.uint8)
