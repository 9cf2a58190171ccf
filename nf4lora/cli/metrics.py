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
    tokens: in this step's sequences; tokens_per_s and seconds: of the run up to here, without saving; memory_bytes: as the bar
    shows; budget and total_rank: AdaLoRA's newest.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._jsonl, self._csv = folder / "metrics.jsonl", folder / "metrics.csv"
        kept = [record for record in read_records(self._jsonl) if record["step"] <= step] if step else []
        for path in (self._jsonl, self._csv):
            path.unlink(missing_ok=True)
        with self._csv.open("w", newline="") as file:
            csv.writer(file).writerow(COLUMNS)
        for record in kept:
            self.add(record)

    def add(self, record: dict[str, Any]) -> None:
        append_records(self._jsonl, [record])
        with self._csv.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow(record)
