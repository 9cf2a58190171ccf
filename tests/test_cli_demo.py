"""`nf4lora finetune` as the README runs it: once, whole, and what it must show."""

import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from nf4lora.cli import corpus, errors, methods
from nf4lora.cli.settings import Settings
from nf4lora.cli.train import evaluate, start
from nf4lora.hf import load_adapter


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> tuple[dict, Path]:
    """The result and the output folder of the default run."""
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "nf4lora.cli", "finetune", "--json"]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0
    return json.loads(done.stdout), folder / "nf4lora-demo"


def row(demo, method) -> dict:
    return next(r for r in demo[0]["rows"] if r["method"] == method)


def test_the_files_are_there_and_agree(demo):
    result, folder = demo
    assert json.loads((folder / "results.json").read_text()) == result
    table = (folder / "table.md").read_text()
    for name in ("bf16 base", "NF4 base", "full fine-tuning", "bf16 LoRA", "QLoRA (NF4)"):
        assert f"| {name} |" in table
    assert f"{row(demo, 'qlora')['after']:.4f}" in table and result["compute_dtype"] in table
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert result["parameters"] >= 2_000_000


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_fine_tuning_brings_the_held_out_loss_a_tenth_below_its_base(demo, method):
    assert row(demo, method)["after"] <= 0.9 * row(demo, method)["before"]
    assert row(demo, method)["before"] == row(demo, {"lora": "base", "qlora": "nf4_base"}[method])["before"]


def test_qlora_ends_within_2_percent_of_lora(demo):
    assert row(demo, "qlora")["after"] <= 1.02 * row(demo, "lora")["after"]


def test_full_fine_tuning_learns_and_the_base_knows_code(demo):
    assert row(demo, "full")["after"] <= 0.9 * row(demo, "full")["before"]
    assert demo[0]["held_out_code_loss"] < row(demo, "base")["before"]


def test_nf4_takes_4_13_bits_a_weight(demo):
    assert demo[0]["bits_per_quantized_weight"] == pytest.approx(4.127, abs=0.005)


def test_memory_is_counted(demo):
    full, lora, qlora = (row(demo, method) for method in ("full", "lora", "qlora"))
    assert full["weight_bytes"] == pytest.approx(4 * demo[0]["parameters"], rel=1e-3)
    quantized = sum(t.numel() for n, t in base_tensors(demo).items() if n.endswith("_proj.weight"))
    saved = quantized * (16 - demo[0]["bits_per_quantized_weight"]) / 8
    assert lora["weight_bytes"] - qlora["weight_bytes"] == pytest.approx(saved, abs=64)
    for method in (full, lora, qlora):
        assert 2 * method["trainable_parameters"] < method["optimizer_bytes"] < 8 * method["trainable_parameters"]
        assert (
            method["peak_bytes"]
            > method["weight_bytes"] + method["optimizer_bytes"] + 4 * method["trainable_parameters"]
        )
    assert qlora["peak_bytes"] < lora["peak_bytes"]
    assert lora["trainable_parameters"] == qlora["trainable_parameters"] < full["trainable_parameters"] / 5


def base_tensors(demo):
    import safetensors.torch

    return safetensors.torch.load_file(demo[1] / "base" / "model.safetensors")


def test_the_adapter_gives_the_measured_loss_again_bit_for_bit(demo):
    result, folder = demo
    settings = Settings.from_json({**result["settings"], "output": str(folder)})
    model = methods.BUILD["qlora"](folder / "base", settings, getattr(torch, result["compute_dtype"]))
    _, held_out = corpus.prose(settings.seq_len)
    run = start(model, held_out, settings)
    assert evaluate(run, held_out) == row(demo, "qlora")["before"]
    load_adapter(model, folder / "adapter")
    assert evaluate(run, held_out) == row(demo, "qlora")["after"]


def test_plain_peft_loads_the_adapter_on_the_bf16_base(demo):
    result, folder = demo
    dense = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in dense.parameters())
    model = PeftModel.from_pretrained(dense.float(), folder / "adapter")
    settings = Settings.from_json(result["settings"])
    _, held_out = corpus.prose(settings.seq_len)
    model.requires_grad_(True)
    loss = evaluate(start(model, held_out, settings), held_out)
    assert loss == pytest.approx(row(demo, "qlora")["after"], rel=0.02)


def test_errors_on_the_demonstrations_trained_weights(demo):
    weights = errors._weights(demo[1], 1 << 12, 0)["the demonstration's base"]
    assert len(weights) == 21
    table = {form: errors._errors(weights, form)["relative_rms"] for form in errors.FORMATS}
    assert 0.05 < table["NF4"] < min(table["FP4"], table["INT4"])


def test_held_out_text_is_never_trained_on():
    for text in (corpus.code, corpus.prose):
        trained, held_out = text(128)
        seen = {block.numpy().tobytes() for block in trained}
        assert len(held_out) == corpus.HELD_OUT and not any(block.numpy().tobytes() in seen for block in held_out)


def test_ctrl_c_ends_the_run_and_its_process(tmp_path):
    command = [sys.executable, "-m", "nf4lora.cli", "finetune", "--output", tmp_path]
    # What a shell runs in the background ignores the signal, and so would this process
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed) as process:
        until = time.monotonic() + 60
        while not (tmp_path / "logs" / "pretrain.log").exists():
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        time.sleep(0.5)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == "" and "Traceback" not in err
    assert "nf4lora: stopped: the demonstration keeps no checkpoints; run it again" in err
    assert len(children) == 1 and not Path(f"/proc/{children[0]}").exists()
