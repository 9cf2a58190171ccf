"""`nf4lora finetune` started by torchrun and by `accelerate launch`: two processes give the losses and the adapter of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import tiny
import torch
from accelerate import DistributedType
from accelerate.parallelism_config import ParallelismConfig
from commands import in_process, refused

from nf4lora.cli import processes
from nf4lora.cli.settings import UserError
from nf4lora.hf.checkpoint import read

HERE = Path(__file__).parent
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
TORCHRUN, WATCHED, SHARDED = (*TWO, "-m", "nf4lora.cli"), (*TWO, HERE / "finetune_watched.py"), (*TWO, HERE / "finetune_sharded.py")
# --multi_gpu is the launcher of several processes; there being no GPU, accelerate takes gloo
ACCELERATE = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=bf16",
              "--dynamo_backend=no", "--main_process_port=0", "-m", "nf4lora.cli")  # fmt: skip
OPTIONS = {  # --r alone is an option of the launchers, cut short
    "--rank": 4, "--dropout": 0, "--lr": 5e-3, "--max-steps": 4, "--grad-accum": 2, "--seq-len": 48, "--save-steps": 2,
    "--compute-dtype": "float32", "--optim": "adamw_torch",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    tokenizer.save_pretrained(path)
    tiny.llama(vocab_size=len(tokenizer)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Answers of one to eight words, so that processes learn from unlike numbers of tokens."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"instruction": f"Say it {i % 8 + 1} times", "output": "dog " * (i % 8 + 1)} for i in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def arguments(model, data, output, *flags, **options) -> list[str]:
    changed = {f"--{name.replace('_', '-')}": value for name, value in options.items()}
    pairs = {"--model": model, "--data": data, "--output": output, **OPTIONS, **changed}
    return ["finetune", *(str(part) for pair in pairs.items() for part in pair), *flags]


def started(*command) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    return subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, timeout=600)


def result(done: subprocess.CompletedProcess) -> dict:
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)  # of one process, and nothing else


def tensors(output: Path):
    return safetensors.torch.load(read(output / "adapter")["adapter_model.safetensors"])


@pytest.mark.parametrize(("launcher", "method", "flags"), [
    (TORCHRUN, "qlora", ()), (SHARDED, "qlora", ("--gradient-checkpointing",)), (WATCHED, "lora", ("--packing", "--gradient-checkpointing")), (ACCELERATE, "qlora", ()), (TORCHRUN, "adalora", ()),
])  # fmt: skip
def test_two_processes_are_as_one(model, data, tmp_path, launcher, method, flags, capsys, monkeypatch):
    command = in_process(capsys, monkeypatch, tmp_path)
    code, out, err = command(*arguments(model, data, tmp_path / "one", "--json", *flags, method=method, batch_size=4))
    assert code == 0, err
    one = json.loads(out)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # of `accelerate config`; the dtype is --compute-dtype's
    two = result(started(*launcher, *arguments(model, data, tmp_path / "two", "--json", *flags, method=method, batch_size=2)))
    assert (one["processes"], two["processes"]) == (1, 2) and one["steps"] == two["steps"] == 4
    assert max(abs(a - b) for a, b in zip(one["losses"], two["losses"], strict=True)) <= 1e-6
    wanted, found = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert wanted.keys() == found.keys() and any(t.any() for name, t in wanted.items() if "lora_B" in name)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    lines = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == two["losses"]  # of one process


@pytest.mark.parametrize("launcher", [TORCHRUN, SHARDED], ids=["ddp", "fsdp2"])
def test_two_processes_resume_to_equal_bits(model, data, tmp_path, launcher):
    options = {"dropout": 0.1, "batch_size": 2}
    whole = result(started(*launcher, *arguments(model, data, tmp_path / "whole", "--json", **options)))
    half, dies = tmp_path / "half", tmp_path / "dies.py"
    dies.write_text(
        "import os, sys, signal\nfrom finetune_sharded import Sharded\nfrom nf4lora.cli import app, processes, user\nsave = user.save\n"
        "def save_and_die(root, step, files):\n    save(root, step, files)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        f"user.save = save_and_die\nif {launcher == SHARDED}: processes.Several = Sharded\nsys.exit(app.run())"
    )
    killed = started(*TWO, dies, *arguments(model, data, half, **options))
    assert killed.returncode and [p.name for p in half.glob("checkpoint-*")] == ["checkpoint-2"]
    again = result(started(*launcher, *arguments(model, data, half, "--json", "--resume", **options)))
    assert again["losses"] == whole["losses"] and read(half / "checkpoint-4") == read(tmp_path / "whole" / "checkpoint-4")
    alone = started("-m", "nf4lora.cli", *arguments(model, data, half, "--resume", **options))
    assert alone.returncode == 2 and "was made by 2 processes, now 1; start as many" in alone.stderr


class State:
    """As much of an AcceleratorState as is looked at."""

    def __init__(self, kind: str, version: int = 1, tp_size: int = 1) -> None:
        self.distributed_type, self.is_fsdp2 = DistributedType(kind), kind == "FSDP" and version == 2
        self.parallelism_config = ParallelismConfig(tp_size=tp_size) if tp_size > 1 else None


@pytest.mark.parametrize(("state", "found"), [
    (State("FSDP"), "FSDP with fsdp_version 1"), (State("DEEPSPEED"), "DEEPSPEED"), (State("MEGATRON_LM"), "MEGATRON_LM"),
    (State("XLA"), "XLA"), (State("MULTI_GPU", tp_size=2), "tensor, context or sequence parallelism"),
])  # fmt: skip
def test_what_is_neither_ddp_nor_fsdp2_is_refused(state, found):
    with pytest.raises(UserError, match=rf"accelerate: found {found}, but .* DDP or FSDP2 \(fsdp_version: 2\); for DeepSpeed use"):
        processes.check_kind(state)
    for kind in ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU"):
        processes.check_kind(State(kind))
    processes.check_kind(State("FSDP", version=2))


@pytest.mark.parametrize("kind", ["DEEPSPEED", "MEGATRON_LM"])
def test_what_accelerate_is_told_to_use_is_refused_before_its_package_is_sought(monkeypatch, kind):
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    with pytest.raises(UserError, match=f"accelerate: found {kind}, but"):
        processes.Several()


WHOLE = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(("name", "value"), [
    *((name, None) for name in WHOLE if name != "WORLD_SIZE"), ("WORLD_SIZE", "abc"), ("WORLD_SIZE", ""), ("WORLD_SIZE", "-2"),
    ("RANK", "first"), ("MASTER_PORT", "http"), ("MASTER_ADDR", ""),
])  # fmt: skip
def test_half_an_environment_of_a_launcher_is_refused(model, data, tmp_path, monkeypatch, capsys, name, value):
    for each, good in WHOLE.items():
        monkeypatch.setenv(each, good)
    monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    found = in_process(capsys, monkeypatch, tmp_path)(*arguments(model, data, tmp_path / "out"))
    refused(found, f"{name}: found {value or 'none'} in the environment beside WORLD_SIZE", "torchrun or `accelerate launch`")


@pytest.mark.parametrize("count", ["1", "0", None])
def test_one_process_alone_needs_no_launcher(monkeypatch, count):
    monkeypatch.delenv("WORLD_SIZE", raising=False) if count is None else monkeypatch.setenv("WORLD_SIZE", count)
    assert type(processes.processes()) is processes.Processes


@pytest.mark.parametrize(("option", "value", "wanted"), [("optim", "paged_adamw_8bit", "wanted paged_adamw_32bit"), ("method", "adalora", "wanted DDP")])
def test_what_fsdp2_cannot_have_is_refused(model, data, tmp_path, option, value, wanted):
    done = started(*SHARDED, *arguments(model, data, tmp_path / "out", batch_size=2, **{option: value}))
    assert done.returncode and f"nf4lora: error: --{option}: found {value}" in done.stderr and wanted in done.stderr
