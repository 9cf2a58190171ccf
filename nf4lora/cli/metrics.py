"""What a run tells of every step: a line of `metrics.jsonl`, a row of `metrics.csv`."""

import csv
from pathlib import Path
from typing import Any

from ..hf.adalora_records import append_records, read_records

COLUMNS = (
    "step", "epoch", "loss", "grad_norm", "lr", "tokens", "tokens_per_s", "seconds", "memory_bytes", "budget", "total_rank",
)  # fmt: skip


class Metrics:
    """The records of a run in `folder`; those of a run that is resumed after `step` are kept up to there.

    step; epoch: passes over the data; loss: mean over the tokens that have one; grad_norm: before clipping; lr: of this step;
    tokens: in this step's sequences; seconds: of the run up to here, without saving, and of those it resumed; tokens_per_s: of
    the run since it was last started or resumed; memory_bytes: as the bar shows; budget and total_rank: AdaLoRA's newest.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._jsonl, self._csv = folder / "metrics.jsonl", folder / "metrics.csv"
        found = read_records(self._jsonl) if step else []
        kept = [record for record in found if _is_ours(record) and record["step"] <= step]
        self._before = 0.0
        for path in (self._jsonl, self._csv):
            path.unlink(missing_ok=True)
        with self._csv.open("w", newline="") as file:
            csv.writer(file).writerow(COLUMNS)
        for record in kept:
            self.add(record)
        self._before = kept[-1]["seconds"] if kept else 0.0

    def add(self, record: dict[str, Any]) -> None:
        record = record | {"seconds": record["seconds"] + self._before}
        append_records(self._jsonl, [record])
        with self._csv.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow(record)


def _is_ours(record: Any) -> bool:
    """Whether `add` wrote it: a run may find a file of another program under this name."""
    if not isinstance(record, dict) or not {"step", "seconds"} <= record.keys() <= set(COLUMNS):
        return False
    numbers = [value for name, value in record.items() if name in ("step", "seconds") or value is not None]
    return all(isinstance(value, int | float) for value in numbers)
