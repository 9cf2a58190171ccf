"""The measured tiles that heuristics are overridden by: read from a file, chosen by sizes, never beyond what a path can take."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_on_host import backend
from under_test import force

import nf4lora
from nf4lora import cuda_paths, heuristics, quantize_4bit, tuned
from nf4lora.heuristics import CudaLinearConfig, CudaPath

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # behind what is installed: bench is not

from bench import tune  # noqa: E402

FILE = Path(nf4lora.__file__).with_name("tuned.csv")


@pytest.fixture
def table(monkeypatch):
    """Two measured rows of one shape."""
    rows = [(16, CudaLinearConfig(CudaPath.MMA, 64, 128, 3)), (256, CudaLinearConfig(CudaPath.SMALL, 8, 16, 2))]
    monkeypatch.setattr(tuned, "_rows", lambda: {("linear_fwd", "9.0", 130, 128): rows})
    return [config for _, config in rows]


def test_the_file_is_what_the_reader_wants():
    with FILE.open(newline="") as file:
        rows = list(csv.reader(file))
    assert tuple(rows[0]) == tuned.COLUMNS and all(len(row) == len(tuned.COLUMNS) for row in rows)
    results = Path(__file__).parents[1] / "bench" / "results"
    assert all((results / row[-1]).is_file() for row in rows[1:]), "a row names a results file that is not there"
    assert tuned._rows().keys() == {(r[0], r[1], int(r[2]), int(r[3])) for r in rows[1:]}


def test_the_smallest_row_that_holds_the_tokens(table):
    find = lambda M, **other: tuned.tuned(**{"op": "linear_fwd", "capability": (9, 0), "M": M, "N": 130, "K": 128} | other)  # noqa: E731
    assert [find(M) for M in (1, 16, 17, 256, 257)] == [table[0], table[0], table[1], table[1], None]
    assert find(1, op="linear_bwd") is None and find(1, capability=(8, 0)) is None and find(1, N=131) is None


def test_a_measured_row_is_taken_unless_its_path_is_not_forced_or_not_able(table, monkeypatch):
    seen = []
    prepare = backend.Machine._group_fwd_prepare
    monkeypatch.setattr(backend.Machine, "_group_fwd_prepare", lambda self, *args: (seen.append(args[-1]), prepare(self, *args))[1])
    packed, state = quantize_4bit(torch.randn(130, 128))
    x = torch.randn(9, 128, dtype=torch.bfloat16)
    calculated = heuristics.cuda_linear_fwd(CudaPath.SMALL, 9, 130, 128, 1)
    for path, dtype, wanted in ((None, torch.bfloat16, table[0]), ("mma", torch.bfloat16, table[0]), ("small", torch.bfloat16, calculated),
                                (None, torch.float32, heuristics.cuda_linear_fwd(CudaPath.DENSE, 9, 130, 128, 1))):  # fmt: skip
        with force("cuda_on_host", path):
            nf4lora.linear_4bit(x.to(dtype), packed, state)
        assert seen.pop() == wanted
    assert isinstance(cuda_paths.as_list(None), list)


def test_the_sweep_keeps_the_fastest_and_the_rows_of_other_devices(tmp_path):
    config = {"op": "linear_fwd", "capability": "9.0", "N": 64, "K": 64, "M": 8, "tokens": 8, "rows": 16, "split": 1}
    measured = [config | {"path": path, "ms": ms} for path, ms in (("small", 2.0), ("mma", 1.0), ("wgmma", None), ("dense", 1.0))]
    (row,) = tune.best(measured)
    assert row["path"] == "mma"
    file = tmp_path / "tuned.csv"
    other = "linear_fwd,8.0,64,64,8,small,8,16,2,a.json"
    file.write_text(",".join(tuned.COLUMNS) + f"\n{other}\nlinear_fwd,9.0,1,64,8,small,8,16,2,old.json\n")
    tune.save([row], file, "new.json")
    assert file.read_text().splitlines()[1:] == [other, "linear_fwd,9.0,64,64,8,mma,8,16,1,new.json"]


@pytest.mark.parametrize("op", ["linear_fwd", "linear_bwd"])
def test_the_sweep_tries_what_can_be_best_and_the_calculated_config_first(op):
    for M, paths in ((1, {"SMALL"}), (64, {"SMALL", "MMA", "WGMMA", "DENSE"}), (512, {"MMA", "WGMMA", "DENSE"})):
        tried = list(tune.candidates(op, M, 4096, 4096, True))
        assert len(tried) == len(set(tried)) and {c.path.name for c in tried} == paths
        assert tried[0] == getattr(heuristics, f"cuda_{op}")(tried[0].path, M, 4096, 4096, 132)


def test_without_a_gpu_the_sweep_says_so():
    done = subprocess.run([sys.executable, "-m", "bench.tune"], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONSAFEPATH": "", "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 1 and done.stdout.strip() == "bench.tune sweeps on a GPU, and torch finds none", done.stderr
