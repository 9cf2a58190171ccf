"""Our optimizers on parameters that FSDP2 shards over two gloo processes, beside one process with all of the batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    path = tmp_path_factory.mktemp("sharded")
    for launcher in ((), ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")):
        command = [sys.executable, *launcher, str(HERE / "sharded_optim.py"), str(path)]
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(path / "1.pt"), torch.load(path / "2.pt")


def apart(one, two):
    assert one.keys() == two.keys() and len(one) == 5
    return max((one[name] - two[name]).abs().max().item() for name in one)


@pytest.mark.parametrize("name", ["PagedAdamW", "PagedLion"])
def test_shares_are_stepped_as_the_whole(runs, name):
    one, two = runs
    for at in (3, 5, "state"):
        assert apart(one[name, at], two[name, at]) <= 1e-6
    assert apart(one[name, 5], one[name, "before"]) > 1e-3
    for found in runs:  # through a state dict that is whole, back into shares
        assert all(found[name, "resumed"][n].equal(t) for n, t in found[name, 5].items())


def test_blocks_of_8_bits_are_those_of_a_share(runs):
    one, two = runs
    moved = apart(two["PagedAdamW8bit", 5], one["PagedAdamW8bit", "before"])
    assert 0 < apart(one["PagedAdamW8bit", 5], two["PagedAdamW8bit", 5]) <= 0.1 * moved
    assert one["8-bit state_dict"] == ""
    assert two["8-bit state_dict"].startswith("state_dict: found 8-bit states of a DTensor, whose blocks are those of one process's share")
    assert "save_only_model=True" in two["8-bit state_dict"]


def test_what_one_share_cannot_know_is_refused(runs):
    assert "found skip_nonfinite with a DTensor, wanted it off" in runs[1]["skip_nonfinite"]
