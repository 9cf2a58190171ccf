"""The measured tiles that heuristics are overridden by: read from a file, chosen by sizes, never beyond what a path can take."""

import csv
from pathlib import Path

import pytest
import torch
from cuda_on_host import backend
from under_test import force

import nf4lora
from nf4lora import cuda_paths, heuristics, quantize_4bit, tuned
from nf4lora.heuristics import CudaLinearConfig, CudaPath

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
    run = backend.Machine.group_fwd
    monkeypatch.setattr(backend.Machine, "group_fwd", lambda self, *args: (seen.append(args[-1]), run(self, *args))[1])
    packed, state = quantize_4bit(torch.randn(130, 128))
    x = torch.randn(9, 128, dtype=torch.bfloat16)
    calculated = heuristics.cuda_linear_fwd(CudaPath.SMALL, 9, 130, 128, 1)
    for path, dtype, wanted in ((None, torch.bfloat16, table[0]), ("mma", torch.bfloat16, table[0]), ("small", torch.bfloat16, calculated),
                                (None, torch.float32, CudaLinearConfig(CudaPath.DENSE))):  # fmt: skip
        with force("cuda_on_host", path):
            nf4lora.linear_4bit(x.to(dtype), packed, state)
        assert seen.pop() == wanted
    assert isinstance(cuda_paths.as_list(None), list)
