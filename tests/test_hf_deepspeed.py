"""DeepSpeed's ZeRO-2 and ZeRO-3 in two processes over gloo give the losses and adapters of one; 0.19.8 was run.

DeepSpeed is none of our dependencies: without it, in CI too, there is nothing to test here.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
RUNS = [f"{stage}-{optimizer}" for stage in (2, 3) for optimizer in ("AdamW", "PagedAdamW", "PagedAdamW8bit")]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("zero")
    environment = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    for launcher in ((), ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")):
        command = [sys.executable, *launcher, HERE / "zero.py", path, *RUNS]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
    return path


@pytest.mark.parametrize("run", RUNS)
def test_two_processes_are_as_one(folder, run):
    one, two = (torch.load(folder / f"{run}-{size}.pt") for size in (1, 2))
    # 8-bit states have their blocks in the flat share of a process, so they are rounded otherwise
    losses, adapters = (1e-4, 2e-3) if "8bit" in run else (1e-6, 1e-5)
    assert max(abs(a - b) for a, b in zip(one["losses"], two["losses"], strict=True)) <= losses and len(one["losses"]) == 4
    assert len(one["adapters"]) == 28 and one["adapters"].keys() == two["adapters"].keys()
    assert max((two["adapters"][n] - t).abs().max().item() for n, t in one["adapters"].items()) <= adapters
    assert two["intact"]
    assert two["frozen_bytes_here"] == (0 if run.startswith("3") else two["frozen_bytes"])  # let go between steps
