"""How bench_optim times: between events with the device held back, or by the host's clock; and what a step launches."""

import gc
import time
from collections.abc import Callable
from typing import Any

import torch

from .bench_optim_backward import CYCLES_MS
from .bench_optim_steps import Timed
from .timing import Contender, launched

LONGEST_HOLD_MS = 64.0


class OptimMeter:
    """Times a `Timed`. A step of an optimizer that pages cannot be captured in a CUDA graph, so on a GPU the device is
    kept busy until the host has launched all of the step: between the events the device then waits for nobody."""

    def __init__(self, device: str) -> None:
        self.device = device

    def prepare(self, contender: Contender, check: Callable[[Any], None] | None = None) -> "_OptimSample":
        with contender.forced():
            for _ in range(1 if contender.calls[0].how == "flow" else 2):
                result = contender.calls[0]()
        idle(self.device)
        if check:
            check(result)
        return _OptimSample(contender, self.device)


class _OptimSample:
    def __init__(self, contender: Contender, device: str) -> None:
        self._contender, self._device, self._hold_ms = contender, device, 1.0
        (self._call,) = contender.calls
        clocked = device == "cpu" or self._call.how == "clock"
        self.timed = "wall clock" if clocked else "events"

    def kernel_ms(self) -> float:
        call = self._call
        with self._contender.forced():
            if self.timed == "wall clock":
                return self._clock(call.before, to_end=True) / call.repeats
            if call.how == "flow":
                call.before()
                return self._between(call)[0] / call.repeats
            while True:
                call.before()
                idle(self._device)
                torch.cuda._sleep(int(self._hold_ms * CYCLES_MS))
                ms, ahead = self._between(call)
                if ahead or self._hold_ms >= LONGEST_HOLD_MS:  # what synchronizes is never ahead
                    return ms
                self._hold_ms *= 4

    def eager_ms(self) -> float | None:
        """The host's time, from an idle device on."""
        with self._contender.forced():
            return self._clock(self._call.before, to_end=False) if self._call.host else None

    def energy_mj(self) -> None:
        return None

    def _between(self, call: Timed) -> tuple[float, bool]:
        """Milliseconds between two events; whether the first was still to come when the host was through."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call.go()
        end.record()
        ahead = not start.query()
        end.synchronize()
        return start.elapsed_time(end), ahead

    def _clock(self, before: Callable[[], Any], to_end: bool) -> float:
        before()
        idle(self._device)
        gc.disable()
        try:
            begun = time.perf_counter()
            self._call.go()
            if to_end:
                idle(self._device)
            return (time.perf_counter() - begun) * 1e3
        finally:
            gc.enable()
            idle(self._device)


def idle(device: str) -> None:
    """The host waits for everything."""
    if device == "cuda":
        torch.cuda.synchronize()


def launches(contender: Contender) -> int | None:
    """Kernels, copies and fills of one `go` on the device; None where nothing can count them."""
    if not torch.cuda.is_available():
        return None
    (call,) = contender.calls
    with contender.forced():
        call.before()
        idle("cuda")
        return launched(call.go)
