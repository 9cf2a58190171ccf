"""Two processes over gloo give the losses and adapters of one: FSDP2 by torch and by accelerate, DDP, Trainer under accelerate,
DDP with gradient checkpointing."""

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
    "fsdp-bytes": "one-bytes", "fsdp-bf16": "one-bytes", "fsdp-bf16-offload": "one-bytes", "fsdp-bf16-experts": "one-bytes-experts",
    "fsdp-bf16-policy": "one-bytes", "ddp-adalora": "one-adalora",
}  # fmt: skip
LOSSES, ADAPTERS = 1e-6, 1e-6
ROUNDED = 2e-2  # a loss computed in bfloat16
CHANGED = {"fsdp-bf16-policy": 0.15, "ddp-adalora": 1e-5}  # of what training has changed, this may differ


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
    assert max(abs(a - b) for a, b in zip(one["losses"], two["losses"], strict=True)) <= (ROUNDED if engine in CHANGED else LOSSES)
    adapters, wanted = (torch.load(folder / name / "adapter.pt", weights_only=True) for name in (engine, ENGINES[engine]))
    assert adapters.keys() == wanted.keys() and all("lora_" in name for name in adapters)  # the adapter alone, whole
    if engine in CHANGED:
        begun = torch.load(folder / ENGINES[engine] / "begun.pt", weights_only=True)
        differ, moved = (torch.cat([(t[n] - wanted[n]).flatten() for n in wanted]).norm() for t in (adapters, begun))
        assert differ <= CHANGED[engine] * moved
    else:
        differ = max((adapters[name] - wanted[name]).abs().max().item() for name in wanted)
        assert differ <= (3 * ADAPTERS if "one-bytes" in ENGINES[engine] else ADAPTERS)
    assert two["intact"]  # every packed byte and constant
    if "ddp" in engine:
        assert two["sharded"] == 0 and two["frozen_bytes_here"] == two["frozen_bytes"]
    else:
        assert two["sharded"] == two["parameters"] and two["frozen_bytes_here"] < 0.52 * two["frozen_bytes"]


def test_bytes_that_are_nans_to_bfloat16_are_only_moved(folder):
    """Stored so they give the very adapters that integers give; what a cast would change is in each layer."""
    wanted, *others = (
        torch.load(folder / name / "adapter.pt", weights_only=True) for name in ("fsdp-bytes", "fsdp-bf16", "fsdp-bf16-offload")
    )
    for found in others:
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    nans = torch.tensor([0x7F81, 0xFF81], dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    assert nans.isnan().all() and not torch.equal(nans.float().to(torch.bfloat16).view(torch.int16), nans.view(torch.int16))


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


@pytest.fixture(scope="module")
def checkpointed(tmp_path_factory) -> tuple[dict, dict]:
    at = tmp_path_factory.mktemp("checkpointed")
    started(HERE / "ddp_checkpointing.py", at / "one")
    launched(HERE / "ddp_checkpointing.py", at / "two")
    return torch.load(at / "one"), torch.load(at / "two")


@pytest.mark.parametrize("layers", ["fused", "native"])
def test_row37_ddp_with_gradient_checkpointing(checkpointed, layers):
    """As one process; or, where a parameter would be "marked ready twice", torch's own error, as on plain linears."""
    one, two = checkpointed
    refused = 0
    for combination in [c for kind, *c in one if kind == layers]:
        alone, both, plain = one[layers, *combination], two[layers, *combination], two["plain", *combination]
        if isinstance(plain, str):
            assert both == plain == "Expected to mark a variable ready only once", combination
            refused += 1
            continue
        assert alone.keys() == both.keys() and len(alone) == 28
        for name, grad in alone.items():
            assert grad.any() and (grad - both[name]).abs().max() <= ADAPTERS, (combination, name)
        if layers == "fused":
            assert max((both[name] - plain[name]).abs().max() for name in plain) <= 1e-5, combination
    assert refused == 2  # reentrant, where unused parameters are looked for
