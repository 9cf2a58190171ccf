"""`nf4lora finetune --model --data`: a real tokenizer and a saved model, resuming bit for bit, kills and Ctrl-C."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nf4lora.cli import app, train
from nf4lora.cli.settings import OPTIMS, RunFailed, Settings
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
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
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
@pytest.mark.parametrize("flags", [("--r", "64"), ("--gradient-checkpointing",), ("--optim", "adamw_torch_fused")])
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
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": TEXT}]}) + "\n")
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
    assert list((tmp_path / "out").iterdir()) == []


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
