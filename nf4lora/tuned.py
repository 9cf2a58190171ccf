"""Tiles measured on a GPU: the rows of tuned.csv, which `python -m bench.tune` writes and `nf4lora.cuda_paths` reads first."""

import csv
from functools import cache
from pathlib import Path

from .heuristics import CudaLinearConfig, CudaPath

# op: linear_fwd or linear_bwd; M: the most tokens the row is for; source: the results file it was measured for.
COLUMNS = ("op", "capability", "N", "K", "M", "path", "tokens", "rows", "split", "source")


def tuned(op: str, capability: tuple[int, int], M: int, N: int, K: int) -> CudaLinearConfig | None:
    """The measured config for M tokens of a weight of this shape on this kind of device, or None."""
    measured = _rows().get((op, "{}.{}".format(*capability), N, K), ())
    return next((config for most, config in measured if M <= most), None)


@cache
def _rows() -> dict[tuple[str, str, int, int], list[tuple[int, CudaLinearConfig]]]:
    found: dict[tuple[str, str, int, int], list[tuple[int, CudaLinearConfig]]] = {}
    with Path(__file__).with_name("tuned.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            config = CudaLinearConfig(CudaPath[row["path"].upper()], int(row["tokens"]), int(row["rows"]), int(row["split"]))
            key = row["op"], row["capability"], int(row["N"]), int(row["K"])
            found.setdefault(key, []).append((int(row["M"]), config))
    return {key: sorted(rows, key=lambda row: row[0]) for key, rows in found.items()}
