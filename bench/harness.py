"""Timing that a noisy, shared machine does not spoil: contenders take turns, ratios are taken round by round.

A row is measured only after its `gate` passed: no time is given for a wrong result.
"""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import nf4lora
from nf4lora import native

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One contender of one comparison. Times in milliseconds; `ratio` is its time over the first contender's, per round."""

    case: str
    contender: str
    median_ms: float
    min_ms: float
    max_ms: float
    ratio: float
    ratio_min: float
    ratio_max: float
    rounds: int


def compare(case: str, contenders: dict[str, Callable[[], object]], gate: Callable[[], None], rounds: int = 15) -> list[Row]:
    """Time the contenders in turn, the first one twice: its second self shows what a ratio of 1 looks like here.

    Raises: whatever `gate` raises; then nothing is timed.
    """
    gate()
    names = list(contenders)
    calls = contenders | {f"{names[0]} (again)": contenders[names[0]]}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():
        call()
    order = list(calls)
    for _ in range(rounds):
        order = order[1:] + order[:1]
        for name in order:
            start = time.perf_counter()
            calls[name]()
            times[name].append((time.perf_counter() - start) * 1e3)
    rows = []
    for name, taken in times.items():
        ratios = [t / base for t, base in zip(taken, times[names[0]], strict=True)]
        rows.append(Row(case, name, statistics.median(taken), min(taken), max(taken),
                        statistics.median(ratios), min(ratios), max(ratios), rounds))  # fmt: skip
    return rows


def report(stem: str, rows: list[Row]) -> None:
    """Print the rows and write them, with the machine, the versions and the commit, to bench/results/<stem>.json."""
    for row in rows:
        spread = f"{row.ratio:7.2f}x [{row.ratio_min:.2f} … {row.ratio_max:.2f}]"
        print(f"{row.case:44} {row.contender:34} {row.median_ms:9.2f} ms {spread}")
    RESULTS.mkdir(exist_ok=True)
    document = {"environment": environment(), "rows": [asdict(row) for row in rows]}
    (RESULTS / f"{stem}.json").write_text(json.dumps(document, indent=1) + "\n")


def environment() -> dict[str, object]:
    """What a reader needs to weigh the times."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=RESULTS.parent)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": native.host.isa(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "nf4lora": nf4lora.__version__,
        "commit": git.stdout.strip() or "unknown",
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
