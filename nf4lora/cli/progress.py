"""A bar with loss, tokens a second and memory, by rich, on stderr so that stdout holds only results."""

import resource
import sys
import time
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console(stderr=True)


class Bar:
    """One stage of a run: `with Bar("QLoRA", steps) as bar: bar.update(step, loss=…, tokens_per_s=…, memory=…)`.

    Where stderr is no terminal, a line every ten percent instead.
    """

    def __init__(self, name: str, steps: int, first: int = 0) -> None:
        self._name, self._steps, self._lines = name, steps, not console.is_terminal
        columns = (TextColumn(f"{name:<12}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
        self._progress = Progress(*columns, TimeElapsedColumn(), console=console, disable=self._lines)
        self._task = self._progress.add_task(name, total=steps, completed=first, text="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def update(self, step: int, loss: float, tokens_per_s: float, memory: int) -> None:
        text = f"loss {loss:.3f}  {tokens_per_s:,.0f} tokens/s  {memory / 2**20:,.0f} MiB"
        self._progress.update(self._task, completed=step, text=text)
        if self._lines and (step == self._steps or step % max(self._steps // 10, 1) == 0):
            console.print(f"{self._name}: step {step}/{self._steps}  {text}", highlight=False)


class Later:
    """A bar for what may be over at once: it shows after a second. Where stderr is no terminal, a line every ten percent."""

    def __init__(self, name: str) -> None:
        self._name, self._since, self._said = name, time.monotonic(), 0
        columns = (TextColumn(name), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, transient=True) if console.is_terminal else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._progress:
            self._progress.stop()

    def update(self, done: int, total: int) -> None:
        """`done` of `total` bytes."""
        if time.monotonic() - self._since < 1:
            return
        if self._progress is None:
            if (tenth := 10 * done // total) > self._said:
                self._said = tenth
                console.print(f"{self._name}: {10 * tenth} % of {total:,} bytes", highlight=False)
            return
        if not self._progress.tasks:
            self._progress.add_task(self._name, total=total)
            self._progress.start()
        self._progress.update(self._progress.tasks[0].id, completed=done)


class Meter:
    """Tokens a second over the time spent in `with meter:` blocks only."""

    def __init__(self) -> None:
        self.tokens, self.seconds = 0, 0.0

    def __enter__(self) -> Self:
        self._since = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds += time.perf_counter() - self._since

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


def memory_in_use(device: Any) -> int:
    """Bytes: what torch has allocated on a GPU, or the most this process has had resident on a CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
