"""The streams that states are copied on between pinned memory and a device, and the device's memory they are copied to."""

from typing import Any, Protocol

import torch
from torch import Tensor

from ..managed import RESERVE


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

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Memory of the device, for what "current" is given from now on. Raises: torch.OutOfMemoryError."""

    def room(self) -> tuple[int, int] | None:
        """Bytes of the device that are torch's or free, and how many of those are in use; None: there is no limit."""


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

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(numel, dtype=dtype, device=self._device)

    def room(self) -> tuple[int, int]:
        stats = torch.cuda.memory_stats_as_nested_dict(self._device)
        kept, used = (stats[name]["all"]["current"] if stats else 0 for name in ("reserved_bytes", "active_bytes"))
        return torch.cuda.mem_get_info(self._device)[0] + kept, used

    def _of(self, stream: str) -> torch.cuda.Stream:
        return self._side.get(stream) or torch.cuda.current_stream(self._device)


class InOrder(Streams):
    """Streams of a device that does everything at once, as the CPU does: events are nothing."""

    def copy(self, stream: str, to: Tensor, of: Tensor) -> None:
        to.copy_(of)

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(numel, dtype=dtype)


class Spare:
    """What of a device nobody will want back soon: all but `RESERVE` and the most that others were seen to use."""

    def __init__(self, streams: Streams) -> None:
        self._streams, self._others = streams, 0
        self.own = 0  # bytes that whoever asks has already

    def holds(self, nbytes: int) -> bool:
        """Whether there are so many beside its own."""
        found = self._streams.room()
        if found is None:
            return True
        room, used = found
        self._others = max(self._others, used - self.own)
        return self.own + nbytes <= room - self._others - RESERVE

    def forget(self) -> None:
        """What others were seen to use."""
        self._others = 0
