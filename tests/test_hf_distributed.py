"""Two processes over gloo give the losses and adapters of one: FSDP2 by torch and by accelerate, DDP, Trainer under accelerate."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
# Each beside the run of one process that it must equal
ENGINES = {
    "fsdp": "one", "fsdp-offload": "one", "ddp": "one", "fsdp-native": "one-native", "ddp-native": "one-native",
    "fsdp-experts": "one-experts", "accelerate": "one", "accelerate-efficient": "one",
}  # fmt: skip
LOSSES, ADAPTERS = 1e-6, 1e-6


def started(*command):
    environment = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def launched(*command):
    started("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *command)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("runs")
    started(HERE / "two_processes.py", path, *dict.fromkeys(ENGINES.values()))
    launched(HERE / "two_processes.py", path, *ENGINES)
    return path


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_are_as_one(folder, engine):
    two, one = (json.loads((folder / name / "found.json").read_text()) for name in (engine, ENGINES[engine]))
    assert len(one["losses"]) == 4 and one["losses"][0] > 4
    assert max(abs(a - b) for a, b in zip(one["losses"], two["losses"], strict=True)) <= LOSSES
    adapters, wanted = (torch.load(folder / name / "adapter.pt", weights_only=True) for name in (engine, ENGINES[engine]))
    assert adapters.keys() == wanted.keys() and all("lora_" in name for name in adapters)  # the adapter alone, whole
    assert max((adapters[name] - wanted[name]).abs().max().item() for name in wanted) <= ADAPTERS
    assert two["intact"]  # every packed byte and constant
    if "ddp" in engine:
        assert two["sharded"] == 0 and two["frozen_bytes_here"] == two["frozen_bytes"]
    else:
        assert two["sharded"] == two["parameters"] and two["frozen_bytes_here"] < 0.52 * two["frozen_bytes"]


@pytest.mark.parametrize("optim", ["PagedAdamW8bit", "PagedAdamW"])
def test_trainer_under_accelerate_launch(tmp_path, optim):
    script = HERE / "trained_by_trainer.py"
    started(script, tmp_path / "one", 4, optim)
    # --multi_gpu is the launcher of several processes; --cpu would want MPI for it, and the script asks for the CPU itself
    two = ("--multi_gpu", "--num_processes", 2, "--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no")
    started("-m", "accelerate.commands.launch", *two, "--main_process_port", 0, script, tmp_path / "two", 2, optim)
    one, two = (json.loads((tmp_path / name / "losses.json").read_text()) for name in ("one", "two"))
    assert two["processes"] == 2 and one["processes"] == 1 and two["optimizer"] == one["optimizer"] == optim
    assert len(one["losses"]) == 4 and max(abs(a - b) for a, b in zip(one["losses"], two["losses"], strict=True)) <= 1e-5
    for name in ("one", "two"):
        assert (tmp_path / name / "checkpoint-4" / "adapter_model.safetensors").is_file()
