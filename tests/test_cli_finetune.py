"""`nf4lora finetune --model --data`: a real tokenizer and a saved model, resuming bit for bit, kills and Ctrl-C."""

import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import nf4lora
from nf4lora.cli import app, checkpoints, train
from nf4lora.cli.settings import OPTIMS, RunFailed, Settings, UserError
from nf4lora.cli.state import STATE
from nf4lora.hf import load_adapter
from nf4lora.hf.checkpoint import latest, publish, read
from nf4lora.nn import replace_linears

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
OPTIONS = {
    "--r": 4, "--alpha": 8, "--dropout": 0.1, "--lr": 5e-3, "--lr-scheduler": "cosine", "--warmup-ratio": 0.2,
    "--max-grad-norm": 0.5, "--max-steps": 8, "--batch-size": 2, "--grad-accum": 2, "--seq-len": 16, "--seed": 3,
    "--save-steps": 2, "--target-modules": "q_proj,v_proj,mlp.up_proj",
}  # fmt: skip
TEXT = "".join(
    f"Line {i}: the quick brown fox jumps over {i * i} lazy dogs, and the dog sleeps on.\n" for i in range(60)
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A folder with a byte-level BPE tokenizer trained here, and a bfloat16 Llama of its vocabulary."""
    path = tmp_path_factory.mktemp("model")
    fast = tiny.tokenizer(TEXT)
    fast.chat_template = CHAT
    fast.save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": line}) for line in TEXT.splitlines()))
    return path


def arguments(model, data, output, *flags, **options) -> list[str]:
    changed = {f"--{name.replace('_', '-')}": value for name, value in options.items()}
    pairs = {"--model": model, "--data": data, "--output": output, **OPTIONS, **changed}
    return ["finetune", *(str(part) for pair in pairs.items() for part in pair), *flags]


@pytest.fixture
def finetune(monkeypatch, capsys):
    """finetune(…) -> the result, of a run in this process that must succeed."""

    def run(*args, **options) -> dict:
        monkeypatch.setattr(sys, "argv", ["nf4lora", *arguments(*args, "--json", **options)])
        with pytest.raises(SystemExit) as end:
            app.run()
        out, err = capsys.readouterr()
        assert end.value.code == 0, err
        return json.loads(out)

    return run


def refusal(monkeypatch, capsys, *args, **options) -> str:
    monkeypatch.setattr(sys, "argv", ["nf4lora", *arguments(*args, **options)])
    assert app.run() == 2
    return capsys.readouterr().err


def test_a_run_from_a_model_folder_and_a_real_tokenizer(model, data, tmp_path, finetune):
    result = finetune(model, data, tmp_path / "out", max_steps=40, save_steps=15)
    assert result["steps"] == 40 == len(result["losses"]) and result["loss_last"] < result["loss_first"] - 0.25
    assert result["trainable_parameters"] == 2 * 4 * (128 + 128 + 192)
    assert result["optimizer_bytes"] == 8 * result["trainable_parameters"]  # each adapter is below min_8bit_size
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == result
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    steps = sorted(p.name for p in (tmp_path / "out").glob("checkpoint-*"))
    assert steps == ["checkpoint-30", "checkpoint-40"]
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(model)("the quick brown fox", return_tensors="pt").input_ids
    ours = replace_linears(base, ["q_proj", "v_proj", "mlp.up_proj"], r=4, lora_alpha=8).eval()
    before = ours(input_ids=ids).logits
    load_adapter(ours, tmp_path / "out" / "adapter")
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    theirs = PeftModel.from_pretrained(dense, tmp_path / "out" / "adapter").eval()
    after, loaded = ours(input_ids=ids).logits, theirs(input_ids=ids).logits
    assert (after - loaded).square().mean() < 0.25 * (after - before).square().mean()


# With rank 64 the adapters' states have 8 bits.
@pytest.mark.parametrize("flags", [
    ("--r", "64"), ("--gradient-checkpointing",), ("--optim", "adamw_torch_fused"), ("--method", "lora"),
    ("--method", "adalora", "--tinit", "1", "--tfinal", "2"),
])  # fmt: skip
def test_row28_killed_and_resumed_gives_equal_bits(model, data, tmp_path, finetune, flags):
    whole = finetune(model, data, tmp_path / "whole", *flags)
    dies = (
        "import os, signal\nfrom nf4lora.cli import app, user\nsave = user.save\n"
        "def save_and_die(root, step, files):\n    save(root, step, files)\n    step == 4 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "user.save = save_and_die\napp.run()"
    )
    command = [sys.executable, "-c", dies, *arguments(model, data, tmp_path / "out", *flags)]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    assert latest(tmp_path / "out").name == "checkpoint-4" and not (tmp_path / "out" / "adapter").exists()
    resumed = finetune(model, data, tmp_path / "out", "--resume", *flags)
    assert resumed["losses"] == whole["losses"] and len(whole["losses"]) == 8
    a, b = (read(tmp_path / out / "checkpoint-8") for out in ("whole", "out"))
    assert a == b
    assert read(tmp_path / "whole" / "adapter") == read(tmp_path / "out" / "adapter")
    again = finetune(model, data, tmp_path / "out", "--resume", *flags)
    assert again["losses"] == whole["losses"]


def test_lora_on_the_16_bit_base(model, data, tmp_path, finetune):
    result, quantized = (finetune(model, data, tmp_path / method, method=method, max_steps=12) for method in ("lora", "qlora"))
    assert result["loss_last"] < result["loss_first"] and result["bits_per_quantized_weight"] is None
    assert result["trainable_parameters"] == quantized["trainable_parameters"]
    base = LlamaForCausalLM.from_pretrained(model)
    linears = sum(m.weight.numel() for n, m in base.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head")
    itemsize = getattr(torch, result["compute_dtype"]).itemsize
    packed = linears * quantized["bits_per_quantized_weight"] / 8
    assert result["weight_bytes"] - quantized["weight_bytes"] == pytest.approx(itemsize * linears - packed, abs=1)
    merged = PeftModel.from_pretrained(base, tmp_path / "lora" / "adapter")
    assert any(p.any() for n, p in merged.named_parameters() if "lora_B" in n)


def test_adalora_takes_ranks_away_and_says_so(model, data, tmp_path, finetune):
    options = {"method": "adalora", "r": 6, "target_r": 4, "tinit": 2, "tfinal": 4, "delta_t": 1, "max_steps": 12, "lr": 2e-2}
    result = finetune(model, data, tmp_path / "out", **options)
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "ADALORA" and (config["tinit"], config["tfinal"], config["deltaT"], config["total_step"]) == (2, 4, 1, 12)
    kept = [sum(row) for row in config["rank_pattern"].values()]
    assert len(kept) == 6 and sum(kept) == 6 * 4 and max(kept) <= 6
    metrics = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    budgets = [line["budget"] for line in metrics if line["budget"]]
    assert metrics[1]["budget"] is None and budgets == sorted(budgets, reverse=True) and budgets[-1] == 24 == metrics[-1]["total_rank"]
    assert (tmp_path / "out" / "ranks.png").read_bytes().startswith(b"\x89PNG")
    # the loss without the orthogonality term, which a start of random factors makes larger than one
    plain = finetune(model, data, tmp_path / "plain", method="qlora", r=6, max_steps=1)
    assert result["losses"][0] == pytest.approx(plain["losses"][0], abs=0.02)
    loaded = PeftModel.from_pretrained(nf4lora.from_pretrained(model), tmp_path / "out" / "adapter")
    assert sum(p.numel() for n, p in loaded.named_parameters() if "lora_E" in n) == 24


def test_a_schedule_that_cannot_run_is_refused(model, data, tmp_path, monkeypatch, capsys):
    found = refusal(monkeypatch, capsys, model, data, tmp_path / "out", method="adalora", tinit=5, tfinal=4)
    assert found.startswith("nf4lora: error: --method: found adalora with {'tinit': 5, 'tfinal': 4, 'deltaT': 1} in 8 steps")
    assert "wanted --tinit < steps" in found and found.count("\n") == 1
    assert "in 1 steps" in refusal(monkeypatch, capsys, model, data, tmp_path / "out", method="adalora", max_steps=1)
    for ranks in ({"r": 1}, {"r": 4, "target_r": 4}):
        name = "--target-r" if "target_r" in ranks else "--r"
        assert f"{name}: found" in refusal(monkeypatch, capsys, model, data, tmp_path / "out", method="adalora", **ranks)


def test_a_checkpoint_in_4_bits_is_trained_as_it_is(model, data, tmp_path, finetune, monkeypatch, capsys):
    on_load = finetune(model, data, tmp_path / "on_load")
    ready = nf4lora.from_pretrained(model)
    ready.save_pretrained(tmp_path / "native")
    nf4lora.hf.save_bitsandbytes(ready, tmp_path / "bnb")
    for kind in ("native", "bnb"):
        AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / kind)
        # bitsandbytes' config names a compute dtype; that of the run counts
        assert finetune(tmp_path / kind, data, tmp_path / f"of_{kind}")["losses"] == on_load["losses"]
    assert "is quantized already; wanted qlora or adalora" in refusal(
        monkeypatch, capsys, tmp_path / "native", data, tmp_path / "no", method="lora"
    )


def changed(model: Path, folder: Path, file: str = "config.json", /, **changes) -> Path:
    """A copy of the model's folder with other values in one of its JSON files."""
    shutil.copytree(model, folder)
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_a_checkpoint_that_lacks_tensors_is_refused(model, data, tmp_path, monkeypatch, capsys, method):
    """transformers would draw them at random."""
    folder = changed(model, tmp_path / "three", num_hidden_layers=3)
    found = refusal(monkeypatch, capsys, folder, data, tmp_path / "out", method=method)
    assert "tensors that its config wants, such as model.layers.2." in found and found.startswith("nf4lora: error: --model: ")
    with pytest.raises(UserError, match="lacks .* such as model.layers.2."):  # as quantize, merge, export and compare read it
        checkpoints.load(str(folder), None if method == "qlora" else False)


DAMAGED = {
    "config.json": [{"hidden_size": "wide"}, {"num_attention_heads": 0}, {"dtype": "float7"}, {"vocab_size": None},
                    {"quantization_config": {"quant_method": "gptq", "bits": 4}}, {"intermediate_size": 96}],
    "tokenizer.json": [{"model": None}, {"version": 3}],
}  # fmt: skip


@pytest.mark.parametrize("method", ["qlora", "lora"])
@pytest.mark.parametrize(("file", "change"), [(file, change) for file, changes in DAMAGED.items() for change in changes])
def test_a_damaged_folder_is_refused_in_one_line(model, data, tmp_path, monkeypatch, capsys, file, change, method):
    folder = changed(model, tmp_path / "damaged", file, **change)
    found = refusal(monkeypatch, capsys, folder, data, tmp_path / "out", method=method)
    assert found.splitlines()[-1].startswith("nf4lora: error: --model: ") and "Traceback" not in found


def test_lora_on_conv1d_layers_by_name(model, data, tmp_path, finetune):
    tiny.gpt2(vocab_size=len(AutoTokenizer.from_pretrained(model))).save_pretrained(tmp_path / "gpt2")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "gpt2")
    for method in ("lora", "qlora"):
        result = finetune(tmp_path / "gpt2", data, tmp_path / method, method=method, target_modules="c_attn", max_steps=2)
        assert result["trainable_parameters"] == 2 * 4 * (64 + 192)


def test_another_base_is_not_resumed(model, data, tmp_path, finetune, monkeypatch, capsys):
    finetune(model, data, tmp_path / "out", max_steps=2)
    other = LlamaForCausalLM.from_pretrained(model)
    other.model.layers[1].mlp.up_proj.weight.data *= 2
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "other")
    found = refusal(monkeypatch, capsys, tmp_path / "other", data, tmp_path / "out", "--resume", max_steps=2)
    assert "was made with another base" in found


def test_metrics_of_every_step(model, data, tmp_path, finetune):
    output = tmp_path / "out"
    result = finetune(model, data, output, max_steps=4)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and [line["loss"] for line in lines] == result["losses"]
    assert all(line["tokens"] == 2 * 2 * 16 and line["grad_norm"] > 0 and line["seconds"] > 0 for line in lines)
    assert lines[0]["lr"] == 0 and lines[1]["lr"] == OPTIONS["--lr"] and lines[-1]["tokens_per_s"] == result["tokens_per_s"]
    with (output / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [{name: float(row[name]) for name in lines[0]} for row in rows] == [{n: float(v) for n, v in line.items()} for line in lines]
    with (output / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 1}\n{"step": 6, "lo')  # of a run that was killed before its next checkpoint
    finetune(model, data, output, "--resume", max_steps=4)
    assert [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()] == lines
    assert len((output / "metrics.csv").read_text().splitlines()) == 5


def test_config_yaml_of_a_run_repeats_it(model, data, tmp_path, finetune, monkeypatch, capsys):
    first = finetune(model, data, tmp_path / "out", max_steps=3)
    config = tmp_path / "out" / "config.yaml"
    monkeypatch.setattr(sys, "argv", ["nf4lora", "finetune", "--config", str(config), "--output", str(tmp_path / "again"), "--json"])
    with pytest.raises(SystemExit) as end:
        app.run()
    assert end.value.code == 0 and json.loads(capsys.readouterr().out)["losses"] == first["losses"]


def test_every_token_weighs_the_same_however_batches_are_cut(model, tmp_path, finetune):
    """Answers of unlike lengths: the mean of means would be another loss."""
    rows = [{"messages": [{"role": "user", "content": "go"}, {"role": "assistant", "content": "dog " * (1 + 3 * (i % 4))}]} for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"max_steps": 3, "seq_len": 48, "dropout": 0, "compute_dtype": "float32"}
    whole = finetune(model, tmp_path / "rows.jsonl", tmp_path / "whole", batch_size=8, grad_accum=1, **options)
    parts = finetune(model, tmp_path / "rows.jsonl", tmp_path / "parts", batch_size=2, grad_accum=4, **options)
    assert whole["losses"] == pytest.approx(parts["losses"], abs=1e-6)
    answers = finetune(model, tmp_path / "rows.jsonl", tmp_path / "all", batch_size=8, grad_accum=1, loss_on="all", **options)
    assert abs(answers["losses"][0] - whole["losses"][0]) > 1e-3


@pytest.mark.parametrize("name", OPTIMS)
def test_every_optimizer_trains(model, data, tmp_path, finetune, name):
    result = finetune(model, data, tmp_path / "out", optim=name, r=64, max_steps=4)
    assert len(set(result["losses"])) == 4 and math.isfinite(sum(result["losses"]))
    size = {"8bit": 1, "32bit": 4}.get(name.rpartition("_")[2], 4) * (1 if "lion" in name else 2)
    assert result["optimizer_bytes"] == pytest.approx(size * result["trainable_parameters"], rel=0.05)


def test_an_unknown_optimizer_is_refused(model, data, tmp_path, monkeypatch, capsys):
    found = refusal(monkeypatch, capsys, model, data, tmp_path / "out", optim="sgd")
    assert "--optim: found sgd, wanted one of paged_adamw_8bit" in found


def test_row36_gradient_checkpointing_changes_no_bit(model, data, tmp_path, finetune):
    plain = finetune(model, data, tmp_path / "plain")
    recomputed = finetune(model, data, tmp_path / "recomputed", "--gradient-checkpointing")
    assert plain["losses"] == recomputed["losses"]
    no_dropout = finetune(model, data, tmp_path / "no_dropout", dropout=0)
    assert plain["losses"] != no_dropout["losses"]


def test_row28_ctrl_c_saves_and_resumes(model, data, tmp_path, finetune):
    output = tmp_path / "out"
    command = [sys.executable, "-m", "nf4lora.cli", *arguments(model, data, output, max_steps=120, save_steps=3)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        until = time.monotonic() + 120
        while not list(output.glob("checkpoint-*")):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and out == "" and "Traceback" not in err, err
    told = re.search(
        r"stopped: after step (\d+) of 120; .*checkpoint-(\d+) is saved; the same command with --resume goes on", err
    )
    assert told and told[1] == told[2] and latest(output).name == f"checkpoint-{told[1]}"
    stopped = int(told[1])
    assert 3 <= stopped < 120
    resumed = finetune(model, data, output, "--resume", max_steps=120, save_steps=120)
    straight = finetune(model, data, tmp_path / "straight", max_steps=120, save_steps=120)
    assert resumed["losses"] == straight["losses"]


def test_a_resumed_run_must_be_the_same_run(model, data, tmp_path, finetune, monkeypatch, capsys):
    output = tmp_path / "out"
    finetune(model, data, output, max_steps=2)
    assert "holds checkpoint-2; give --resume" in refusal(monkeypatch, capsys, model, data, output, max_steps=2)
    changed = refusal(monkeypatch, capsys, model, data, output, "--resume", max_steps=2, lr=1e-3, r=8)
    assert "made with --r 4, now 8; --lr 0.005, now 0.001" in changed
    other = tmp_path / "other.txt"
    other.write_text(TEXT[::-1])
    assert "made with other data" in refusal(monkeypatch, capsys, model, other, output, "--resume", max_steps=2)


def test_a_damaged_newest_checkpoint_is_passed_over(model, data, tmp_path, finetune):
    whole = finetune(model, data, tmp_path / "out")
    with (tmp_path / "out" / "checkpoint-8" / "training_state.safetensors").open("r+b") as file:
        file.truncate(100)
    assert latest(tmp_path / "out").name == "checkpoint-6"
    assert finetune(model, data, tmp_path / "out", "--resume")["losses"] == whole["losses"]


@pytest.mark.parametrize(
    "change",
    [
        {"param_groups": None}, {"param_groups": []}, {"scheduler": []}, {"settings": []}, {"settings": None},
        {"data_sha256": 3},
    ],
)  # fmt: skip
def test_a_state_of_another_kind_is_refused_in_one_line(model, data, tmp_path, finetune, monkeypatch, capsys, change):
    """Its manifest is right, so it is no damage: somebody else wrote it."""
    finetune(model, data, tmp_path / "out")
    newest = latest(tmp_path / "out")
    files = read(newest)
    files[STATE] = json.dumps(json.loads(files[STATE]) | change).encode()
    publish(newest, files)
    assert "--resume: " in refusal(monkeypatch, capsys, model, data, tmp_path / "out", "--resume")


def test_text_and_chat_files(model, tmp_path, finetune):
    (tmp_path / "a.txt").write_text(TEXT)
    turns = [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": TEXT[:200]}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    text = finetune(model, tmp_path / "a.txt", tmp_path / "text", max_steps=2)
    chat = finetune(model, tmp_path / "chat.jsonl", tmp_path / "chat", max_steps=2)
    assert all(0 < loss < 7 for loss in text["losses"] + chat["losses"]) and text["losses"] != chat["losses"]


def test_epochs_set_the_steps(model, tmp_path, finetune, monkeypatch):
    (tmp_path / "a.txt").write_text(TEXT[:600])
    monkeypatch.setitem(OPTIONS, "--epochs", 2)
    monkeypatch.delitem(OPTIONS, "--max-steps")
    result = finetune(model, tmp_path / "a.txt", tmp_path / "out", batch_size=1, grad_accum=1, lr_scheduler="constant")
    ids = AutoTokenizer.from_pretrained(model)(TEXT[:600]).input_ids
    assert result["steps"] == 2 * ((len(ids) + 1) // 16)


def test_row27_no_room_for_a_checkpoint(model, data, tmp_path, monkeypatch, capsys):
    import errno

    from nf4lora.hf import atomic

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic, "write", full)
    monkeypatch.setattr(sys, "argv", ["nf4lora", *arguments(model, data, tmp_path / "out")])
    assert app.run() == 1
    err = capsys.readouterr().err.splitlines()[-1]
    assert re.search(
        r"nf4lora: error: .*cannot write .*checkpoint-2: No space left on device; what was saved before is untouched",
        err,
    )
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.yaml", "metrics.csv", "metrics.jsonl"]


def test_the_order_of_the_data_is_permutations_without_end():
    whole = train.order(10, 0, 40, seed=5)
    for epoch in whole.view(4, 10):
        assert sorted(epoch.tolist()) == list(range(10))
    assert not whole[:10].equal(whole[10:20]) and not whole.equal(train.order(10, 0, 40, seed=6))
    assert torch.cat([train.order(10, first, 7, seed=5) for first in range(0, 35, 7)]).equal(whole[:35])


def test_a_loss_that_is_not_finite_stops_before_a_step():
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    run = train.start(model, torch.arange(32).view(4, 8) % 9, Settings(batch_size=2, grad_accum=1))
    model.lm_head.weight.data[0, 0] = torch.inf
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(RunFailed, match="the loss of step 1 is nan; try a lower --lr"):
        train.train_step(run)
    assert all(p.equal(before[name]) and p.grad is None for name, p in model.named_parameters())
    assert run.step == 0


def test_a_gradient_that_is_not_finite_stops_before_a_step():
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    run = train.start(model, torch.arange(32).view(4, 8) % 9, Settings(batch_size=2, grad_accum=1))
    model.lm_head.weight.register_hook(lambda grad: grad * torch.nan)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(RunFailed, match="the norm of the gradient of step 1 is nan"):
        train.train_step(run)
    assert all(p.equal(before[name]) and p.grad is None for name, p in model.named_parameters()) and run.step == 0


@pytest.mark.parametrize(
    ("name", "shape"), [("constant", [0.5, 1, 1, 1]), ("linear", [0.5, 1, 5 / 6, 4 / 6]), ("cosine", None)]
)
def test_schedules_warm_up_and_go_as_named(name, shape):
    model = torch.nn.Linear(2, 2)
    run = train.start(model, torch.zeros(4, 2), Settings(lr=1.0, lr_scheduler=name, warmup_ratio=0.25, max_steps=8))
    rates = []
    for _ in range(8):
        run.optimizer.step()
        run.scheduler.step()
        rates.append(run.scheduler.get_last_lr()[0])
    if shape:
        assert rates[:4] == pytest.approx(shape)
    else:
        assert rates[4] == pytest.approx(0.5) or rates[1] == 1 and rates[-1] == pytest.approx(0, abs=1e-9)
