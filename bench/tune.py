"""Sweeps the tiles of the CUDA linear on this GPU and writes the best of each shape: `python -m bench.tune --minutes 8`.

Each candidate must pass T2 before it is timed, as kernel time over weights that no cache holds. DIR/tune_<gpu>.json gets
every measurement; --update also writes nf4lora/tuned.csv, from which the next call of the layer takes its tiles.
"""

import argparse
import csv
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

import nf4lora
from nf4lora import heuristics, native_cuda, reference, tuned
from nf4lora.cases import LinearCase, random_case
from nf4lora.heuristics import CudaLinearConfig, CudaPath
from nf4lora.testing import assert_error_ratio

from .environment import environment
from .files import RESULTS, write
from .harness import meter_for
from .shapes import LLAMA_3_8B, LLAMA_3_8B_GROUPS
from .timing import Contender, CudaMeter, cold_sets

TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
RANK = 16


# Tiles (tokens, rows or columns) that the kernels have; a config beside them runs as the nearest.
TILES = {
    "linear_fwd": {
        CudaPath.SMALL: ((8, 128), (16, 128), (32, 128), (64, 128)),
        CudaPath.MMA: ((64, 128), (64, 256), (128, 128)),
        CudaPath.WGMMA: ((128, 128), (256, 128)),
    },
    "linear_bwd": {
        CudaPath.SMALL: ((16, 128), (32, 256)),
        CudaPath.MMA: ((16, 128), (32, 256), (64, 256)),
        CudaPath.WGMMA: ((128, 256), (256, 128)),
    },
}


def candidates(op: str, M: int, N: int, K: int, hopper: bool) -> Iterator[CudaLinearConfig]:
    """Configs worth a measurement for M tokens: of each path the calculated one first."""
    paths = [CudaPath.SMALL] * (M <= 128) + [CudaPath.MMA] * (M > 8) + [CudaPath.WGMMA] * (hopper and M > 16) + [CudaPath.DENSE] * (M >= 64)
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count if torch.cuda.is_available() else 132
    for path in paths:
        best = getattr(heuristics, f"cuda_{op}")(path, M, N, K, multiprocessors)
        yield best
        for (tokens, rows), split in itertools.product(TILES[op].get(path, ()), SPLITS):
            config = CudaLinearConfig(path, tokens, rows, split)
            # A tile of which most is beyond M is never the best, nor many parts of what already fills the device.
            if config != best and tokens < 4 * max(M, 8) and split <= 2 * best.split:
                yield config


def work(op: str, case: LinearCase, copies: int) -> tuple[Callable[[CudaLinearConfig], tuple[Callable[[], Tensor], ...]], Tensor, Tensor]:
    """config -> calls on weights of their own; what plain torch gives; and the truth, in float64."""
    s, cuda = case.state, native_cuda.cuda
    weights = [(case.packed.clone(), s.absmax.clone(), s.nested_absmax.clone(), s.offset) for _ in range(copies)]
    (N, K), args = s.shape, (s.blocksize, s.quant_type)
    if op == "linear_fwd":
        baseline, truth = case.baseline().y, case.truth().y

        def calls(config: CudaLinearConfig) -> tuple[Callable[[], Tensor], ...]:
            return tuple(
                lambda w=w: cuda.linear_fwd(case.x, *w, None, case.lora_A, case.lora_B, None, N, *args, case.scaling, 0.0, config)[0]
                for w in weights
            )
    else:
        baseline, truth = case.baseline().dx, case.truth().dx
        dyb, _, _ = reference.lora_bwd(case.dy, case.x, case.x[:, :0], case.lora_A, case.lora_B, None, case.scaling, 0.0, False, False)

        def calls(config: CudaLinearConfig) -> tuple[Callable[[], Tensor], ...]:
            return tuple(lambda w=w: cuda.linear_bwd(case.dy, *w, case.lora_A, dyb, None, K, *args, 0.0, config) for w in weights)

    return calls, baseline, truth


def sweep(meter: CudaMeter, deadline: float, capability: tuple[int, int]) -> Iterator[dict]:
    """A measurement after the other, the shapes people use most first, until the deadline."""
    shapes = [*LLAMA_3_8B_GROUPS.values(), *LLAMA_3_8B.values()]
    for M, (N, K), op in itertools.product(TOKENS, shapes, ("linear_fwd", "linear_bwd")):
        if time.monotonic() > deadline:
            return
        case = random_case(M, N, K, RANK, torch.bfloat16, torch.bfloat16, bias=False, device="cuda")
        calls, baseline, truth = work(op, case, cold_sets(N * K // 2, meter.l2_bytes))
        for config in candidates(op, M, N, K, capability[0] == 9):
            found = {"op": op, "capability": "{}.{}".format(*capability), "M": M, "N": N, "K": K, **asdict(config), "path": config.path.name.lower()}
            try:
                sample = meter.prepare(Contender(calls(config), ours=True), lambda y: assert_error_ratio(y, baseline, truth))
                times = sorted(sample.kernel_ms() for _ in range(5))
                yield found | {"ms": times[2], "least_ms": times[0], "most_ms": times[-1], "timed": sample.timed}
            except (AssertionError, RuntimeError) as error:
                yield found | {"ms": None, "error": str(error)[:200]}
            if time.monotonic() > deadline:
                return


def best(measured: list[dict]) -> list[dict]:
    """The fastest of each op, shape and number of tokens; a tie goes to the one that was calculated, which came first."""
    groups: dict[tuple, list[dict]] = {}
    for row in measured:
        if row["ms"] is not None:
            groups.setdefault((row["op"], row["capability"], row["N"], row["K"], row["M"]), []).append(row)
    return [min(rows, key=lambda row: row["ms"]) for _, rows in sorted(groups.items())]


def save(rows: list[dict], path: Path, source: str) -> None:
    """tuned.csv: the rows of other devices stay."""
    measured_on = {row["capability"] for row in rows}
    with path.open(newline="") as file:
        kept = [row for row in csv.DictReader(file) if row["capability"] not in measured_on]
    with path.open("w", newline="") as file:
        out = csv.DictWriter(file, tuned.COLUMNS, lineterminator="\n", extrasaction="ignore")
        out.writeheader()
        out.writerows([*kept, *(row | {"source": source} for row in rows)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--update", action="store_true", help="write nf4lora/tuned.csv")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench.tune sweeps on a GPU, and torch finds none")
        return 1
    if why_not := native_cuda.cuda.why_not():
        print(f"bench.tune: {why_not}")
        return 1
    capability = torch.cuda.get_device_capability()
    stem = "tune_" + torch.cuda.get_device_name().lower().replace(" ", "_")
    measured: list[dict] = []
    for row in sweep(meter_for("cuda"), time.monotonic() + 60 * asked.minutes, capability):
        print(row, flush=True)
        measured.append(row)
        if len(measured) % 20 == 0:
            write(asked.out / f"{stem}.json", {"environment": environment(), "rows": measured})
    write(asked.out / f"{stem}.json", {"environment": environment(), "rows": measured})
    if asked.update:
        save(best(measured), Path(nf4lora.__file__).with_name("tuned.csv"), f"{stem}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
