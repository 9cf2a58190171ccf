"""Every method of fine-tuning that the table of `bench.methods` has: what trains, that it learns, and the table."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nf4lora import NF4Linear, NF4LoRALinear
from nf4lora.cli import corpus, demo, demo_models, methods, train
from nf4lora.cli.settings import DEMO, RunFailed
from nf4lora.cli.train import evaluate, train_step

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # behind what is installed
from bench import files, report  # noqa: E402
from bench import methods as table  # noqa: E402

H, KV, I, LAYERS, VOCAB, RANK = 64, 64, 96, 2, 256, 4
SMALL = dict(
    vocab_size=VOCAB, hidden_size=H, intermediate_size=I, num_hidden_layers=LAYERS, num_attention_heads=2, num_key_value_heads=2,
    max_position_embeddings=128, bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip
LINEARS = [(H, H)] * 2 + [(KV, H)] * 2 + [(I, H)] * 2 + [(H, I)]  # of a layer: q, o; k, v; gate, up; down
V, HIDDEN = demo_models.VIRTUAL, demo_models.HIDDEN
INIT = RANK * 3 // 2


def linear(into, out):
    return into * out + out


TRAINABLE = {
    "full": 2 * VOCAB * H + LAYERS * (sum(N * K for N, K in LINEARS) + 2 * H) + H,
    "lora": LAYERS * sum(RANK * (N + K) for N, K in LINEARS),
    "qlora": LAYERS * sum(RANK * (N + K) for N, K in LINEARS),
    "adalora": LAYERS * sum(INIT * (N + K + 1) for N, K in LINEARS),
    "ia3": LAYERS * (KV + KV + I),
    "prefix": V * LAYERS * 2 * KV,
    "p-tuning-v2": V * KV + linear(KV, HIDDEN) + linear(HIDDEN, LAYERS * 2 * KV),
    "prompt": V * H,
    "p-tuning": V * H + linear(H, HIDDEN) + linear(HIDDEN, HIDDEN) + linear(HIDDEN, H),
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Of runs on a small base that was trained for a moment."""
    patch, threads = pytest.MonkeyPatch(), torch.get_num_threads()
    patch.setattr(methods, "MODEL", SMALL)
    torch.set_num_threads(1)
    found = replace(DEMO, output=str(tmp_path_factory.mktemp("methods")), max_steps=24, seq_len=64, r=RANK, alpha=2.0 * RANK)
    methods.pretrain(replace(found, max_steps=50), lambda event: None)
    yield found
    torch.set_num_threads(threads)
    patch.undo()


def test_the_methods_are_those_of_the_issue():
    assert list(demo_models.BUILD) == list(demo_models.RATE) == list(TRAINABLE)


@pytest.mark.parametrize("method", TRAINABLE)
def test_a_method_trains_what_its_formula_counts_and_the_held_out_loss_falls(settings, method):
    steps = 60 if method == "prompt" else settings.max_steps  # on so small a base it learns little
    run, held_out = methods.prepared(method, replace(settings, max_steps=steps), torch.float32)
    trained = [p for p in run.model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == TRAINABLE[method]
    if method == "ia3":
        scaled = [name.split(".")[-3] for name, p in run.model.named_parameters() if p.requires_grad]
        assert scaled == ["k_proj", "v_proj", "down_proj"] * LAYERS
    linears = [m for m in run.model.modules() if isinstance(m, NF4Linear)]
    assert len(linears) == (0 if method in ("full", "lora") else 7 * LAYERS)
    assert all(isinstance(m, NF4LoRALinear) for m in linears) == (method in ("full", "lora", "qlora"))
    frozen = {n: p.clone() for n, p in run.model.named_parameters() if not p.requires_grad and "ranknum" not in n}
    before = evaluate(run, held_out)
    while run.step < run.steps:
        train_step(run)
    assert evaluate(run, held_out) < before - 0.002
    assert all(torch.equal(p, frozen[n]) for n, p in run.model.named_parameters() if n in frozen)


def test_all_methods_see_the_same_blocks_and_are_scored_on_the_same_bytes(settings):
    """Of virtual tokens the last predicts the first byte too, which the others are not asked for."""
    runs = {method: methods.prepared(method, settings, torch.float32)[0] for method in ("qlora", "prompt", "p-tuning")}
    indices = [run.indices().tolist() for run in runs.values()]
    assert indices[0] == indices[1] == indices[2]
    _, held_out = corpus.prose(settings.seq_len)
    block = held_out[:1].long()
    for run in runs.values():
        run.model.eval()
        logits = run.model(input_ids=block).logits[:, -settings.seq_len :].detach()
        wanted = torch.nn.functional.cross_entropy(logits[0, :-1], block[0, 1:]).item()
        assert evaluate(run, held_out[:1]) == pytest.approx(wanted, rel=1e-5)


def in_this_process(method, settings):
    if method == "prompt":
        raise RunFailed("no memory")
    return (methods.pretrain if method == "pretrain" else lambda *of: methods.tune(method, *of))(settings, lambda event: None)


def test_the_table(settings, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "run_method", in_this_process)
    short = replace(settings, max_steps=3)
    assert table.measure(tmp_path, short, ("ia3", "prompt", "qlora", "adalora"), rounds=3) == 1
    document = json.loads((tmp_path / "methods.json").read_text())
    rows = {row["method"]: row for row in document["rows"]}
    assert list(rows) == ["ia3", "qlora", "adalora"] and document["failed"] == ["prompt (NF4): no memory"]
    for method, row in rows.items():
        assert row["trainable_parameters"] == TRAINABLE[method] and row["lr"] == DEMO.lr * demo_models.RATE[method]
        assert row["peak_bytes"] > row["weight_bytes"] + row["optimizer_bytes"]
        for middle, least, most in (row["tokens_per_s"], row["ratio"]):
            assert 0 < least <= middle <= most
    assert rows["qlora"]["ratio"] == [1, 1, 1]
    about = document["methods"]
    assert about["steps"] == 3 and about["pretrain_steps"] == 9 and about["load_before"] >= 0
    text = report.markdown(document)
    assert "3 steps each; speeds taken in turns; load average before:" in text and "Failed, so not timed: prompt (NF4): no memory" in text
    assert f"| IA3 (NF4) | {TRAINABLE['ia3']:,} |" in text and "| 1.00 [1.00 … 1.00] |" in text


def test_a_wrong_result_gets_no_speed(settings, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "run_method", in_this_process)
    monkeypatch.setattr(train, "train_step", lambda run: float("nan"))
    assert table.measure(tmp_path, replace(settings, max_steps=2), ("qlora",), rounds=1) == 1
    document = files.load(tmp_path)["methods"]
    assert "ratio" not in document["rows"][0] and "the loss is nan" in document["failed"][0]
    assert "| not measured | – |" in report.markdown(document)


def test_what_was_measured_is_in_the_tree():
    document = json.loads((ROOT / "bench/results/methods.json").read_text())
    assert [row["method"] for row in document["rows"]] == list(TRAINABLE) and not document["failed"]
    assert all(row["after"] < row["before"] for row in document["rows"])
