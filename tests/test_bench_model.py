"""The benchmark of whole models on toys: what it builds, what its gates refuse. No test reads the clock."""

import json
import sys
import types
import weakref
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from nf4lora import NF4Linear, NF4LoRALinear

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # behind what is installed: bench is not

from bench import bench_model, harness, model_memory, models, report
from bench.bench_model import decode_case, packed_case, train_case
from bench.model_sizes import LLAMA_3_8B, LLAMA_3_70B, TOY, Llama
from bench.model_steps import Decoding, StepMeter, Training
from bench.timing import Contender

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = Llama("toy", TOY)
BATCH = torch.randint(512, (2, 96), generator=torch.Generator().manual_seed(1))
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])


def rows(case, tmp_path):
    """What a run of one round writes: {contender: row}, failures."""
    rc = harness.run("toy", [lambda: case], StepMeter("cpu"), 1, tmp_path)
    document = json.loads((tmp_path / "toy.json").read_text())
    assert rc == bool(document["failed"])
    return {row["contender"]: row for row in document["rows"]}, document["failed"]


# ---- training


@DTYPES
def test_every_contender_trains_and_ours_lose_what_the_dense_model_loses(dtype, tmp_path):
    absent = []
    found, failed = rows(train_case(SMALL, BATCH, dtype, absent), tmp_path)
    peers = ["bitsandbytes + peft", "float32 + peft"]
    if dtype == torch.bfloat16:
        peers = ["bitsandbytes + peft, autocast", "bitsandbytes + peft", "bfloat16 + peft, autocast"]
    assert list(found) == ["nf4lora", "nf4lora, not grouped", *peers, "nf4lora (again)"] and not failed and not absent
    assert found[peers[-1]]["error"] == {"losses": 0.0, "logits": 0.0, "gradients": 0.0}
    for name in ("nf4lora", "nf4lora, not grouped"):
        # float32: nothing but the order of sums differs
        assert found[name]["error"]["losses"] < (1e-6 if dtype == torch.float32 else 2e-3)
        assert found[name]["tokens"] == BATCH.numel() and found[name]["memory"] is None


def test_all_start_from_the_same_weights_and_adapters():
    ours, dense, bnb = (build(SMALL.config, "cpu", torch.float32) for build in (models.ours, models.dense_peft, models.bitsandbytes_peft))
    base = {name.removeprefix("base_model.model."): m for name, m in dense.named_modules()}
    own = {name: m for name, m in ours.named_modules() if isinstance(m, NF4LoRALinear)}
    assert len(own) == 7 * SMALL.config.num_hidden_layers
    for name, layer in own.items():
        assert torch.equal(layer.dequantize(), base[name].base_layer.weight)
    for (name, A, B), *others in zip(*map(models.adapters, (ours, dense, bnb)), strict=True):
        assert B.abs().sum() > 0 and A.requires_grad and B.requires_grad
        for other, A_, B_ in others:
            assert other == name and torch.equal(A, A_) and torch.equal(B, B_) and A_.dtype == torch.float32
    for model in (ours, dense, bnb):
        assert {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n} == set()


@pytest.mark.parametrize("build", [models.ours, models.bitsandbytes_peft])
def test_no_more_than_a_layer_is_ever_held_dense(build, monkeypatch):
    held, most, draw = weakref.WeakSet(), 0, models._drawn

    def drawn(name, shape, *args):
        nonlocal most
        weight = draw(name, shape, *args)
        if name[0].isdigit():
            held.add(weight.untyped_storage())
            most = max(most, len(held))
        return weight

    monkeypatch.setattr(models, "_drawn", drawn)
    model = build(SMALL.config, "cpu", torch.float32)
    assert most == 7 and not held and next(model.parameters()).device.type == "cpu"


def swapped(model):
    """The two weights of every byte of one linear in the wrong order."""
    layer = [m for m in model.modules() if isinstance(m, NF4Linear)][-1]
    layer.weight.data = (layer.weight.data >> 4) | (layer.weight.data << 4)
    return model


def unscaled(model):
    for m in model.modules():
        if isinstance(m, NF4LoRALinear):
            m.lora_alpha = 0.5
    return model


def half_a_gradient(model):
    """The dx of the last linear halved."""
    layer = [m for m in model.modules() if isinstance(m, NF4Linear)][-1]
    layer.register_full_backward_hook(lambda module, dx, dy: (dx[0] * 0.5,))
    return model


@pytest.mark.parametrize("plant", [swapped, unscaled, half_a_gradient])
def test_planted_wrong_weights_and_scalings_are_refused(plant, monkeypatch, tmp_path):
    right = models.ours
    monkeypatch.setattr(models, "ours", lambda *args, group=True, **kw: plant(right(*args, **kw)) if group else right(*args, **kw))
    found, failed = rows(train_case(SMALL, BATCH, torch.float32, []), tmp_path)
    assert len(failed) == 1 and "nf4lora: from the dense model's" in failed[0]
    assert "nf4lora" not in found and "nf4lora, not grouped" in found


def test_losses_that_are_not_numbers_are_refused():
    case = train_case(SMALL, BATCH, torch.float32, [])
    found = case.contenders["nf4lora"].calls[0]()
    for name, times in ((n, t) for n in found._fields for t in (float("nan"), 1.2)):
        with pytest.raises(AssertionError, match="from the dense"):
            case.gate(found._replace(**{name: getattr(found, name) * times}))
    case.gate(found)


def test_a_peer_that_cannot_run_is_named_and_the_rest_goes_on(monkeypatch, tmp_path):
    def broken(*args, **kwargs):
        raise OSError("no such library\nand more")

    monkeypatch.setattr(models, "bitsandbytes_peft", broken)
    absent = []
    found, failed = rows(train_case(SMALL, BATCH, torch.float32, absent), tmp_path)
    assert not failed and absent == ["toy, 2 of 2 layers, bitsandbytes + peft: OSError: no such library"]
    assert list(found)[:2] == ["nf4lora", "nf4lora, not grouped"]
    assert {text.split(":")[0] for text in models.absent_peers()} >= {"Unsloth"}


def test_steps_train_and_checkpoint():
    training = Training(models.ours(SMALL.config, "cpu", torch.float32), BATCH)
    losses = training.found.losses
    assert training.model.is_gradient_checkpointing and losses.shape == (3,)
    assert training.found.logits.shape == (2, 16, 512)
    first = sum(16 * sum(m.weight.shape) for m in models.dense(SMALL.config, "cpu", torch.float32).model.layers[0].modules()
                if isinstance(m, torch.nn.Linear))  # fmt: skip
    assert training.found.gradients.shape == (first,) and training.step() < losses[2] < losses[0]


# ---- decoding


@DTYPES
def test_decoding_gives_what_full_forwards_give(dtype, tmp_path):
    absent, prompt, count = [], BATCH[:1, :32], 5
    case = decode_case(SMALL, prompt, count, dtype, absent)
    found, failed = rows(case, tmp_path)
    peers = [f"{str(dtype)[6:]}, no adapters", "bitsandbytes + peft"]
    assert list(found) == ["nf4lora", *peers, "nf4lora (again)"] and not failed and not absent
    decoding = case.contenders["nf4lora"].calls[0]
    logits, sequence = decoding.decode(), torch.cat([prompt, decoding.first], 1)
    assert {p.dtype for p in decoding.model.parameters() if p.is_floating_point()} == {dtype}
    for of_step in logits:
        with torch.no_grad():
            full = decoding.model(input_ids=sequence, use_cache=False).logits[0, -1]
        assert bench_model._relative(of_step.float(), full.float()) < (1e-5 if dtype == torch.float32 else 2e-2)
        sequence = torch.cat([sequence, of_step.argmax()[None, None]], 1)
    assert torch.equal(sequence[0, -1:], decoding.token[0])


def test_what_a_graph_computes_differently_is_refused(monkeypatch, tmp_path):
    step = Decoding._step
    case = decode_case(SMALL, BATCH[:1, :32], 3, torch.float32, [])
    decoding = case.contenders["nf4lora"].calls[0]
    decoding.step = lambda: step(decoding).nextafter(torch.tensor(0.0))
    _, failed = rows(case, tmp_path)
    assert "from eager and full forwards" in failed[0] and "none of our back ends" not in failed[0]


def test_compiled_contenders_are_beside_the_others(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: model)
    case = decode_case(SMALL, BATCH[:1, :32], 2, torch.float32, [], compiled=True)
    names = ["float32, no adapters", "bitsandbytes + peft"]
    assert list(case.contenders) == ["nf4lora", "nf4lora, compiled", *names, *(f"{n}, compiled" for n in names)]


# ---- the model of random bytes


@DTYPES
def test_the_packed_model_holds_bytes_and_trains(dtype, tmp_path):
    model = models.packed(SMALL.config, "cpu", dtype)
    layers = [m for m in model.modules() if isinstance(m, NF4LoRALinear)]
    floats = {n for m in layers for n, p in m.named_parameters(recurse=False) if p.is_floating_point()}
    assert len(layers) == 14 and floats == {"lora_A", "lora_B"} and {m.lora_A.dtype for m in layers} == {dtype}
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and not isinstance(m, NF4Linear)]
    assert linears == [model.lm_head]
    for m in layers:
        assert m.dequantize(torch.float32).std().item() * m.in_features**0.5 == pytest.approx(1.0, rel=0.15)
    model(input_ids=BATCH, labels=BATCH, use_cache=False).loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for _, *pair in models.adapters(model) for p in pair)
    found, failed = rows(packed_case(SMALL, BATCH[:1], dtype), tmp_path)
    assert not failed and list(found) == ["nf4lora", "nf4lora (again)"]


def test_the_packed_model_is_refused_beyond_its_memory_or_with_wrong_adapters(monkeypatch):
    memory = {"peak": 1, "reserved": 2**20, "managed": 0}
    monkeypatch.setattr(bench_model, "measured", lambda build, work, alone: (work(build()), memory))
    case = packed_case(SMALL, BATCH[:1], torch.float32, limit_bytes=2**20)
    training = case.contenders["nf4lora"].calls[0]
    assert case.group.endswith("adapters float32, in 0 GiB") and case.contenders["nf4lora"].memory is memory
    case.gate(training.found)
    memory["managed"] = 1
    with pytest.raises(AssertionError, match="reserved"):
        case.gate(training.found)
    memory["managed"] = 0
    next(models.adapters(training.model))[1].data[0, 0] = float("inf")
    with pytest.raises(AssertionError, match="adapters not finite: .'model.layers.0.self_attn.q_proj'"):
        case.gate(training.found)


# ---- what only a GPU does, with the host in its place


class Host:
    """torch.cuda as far as it is used here: a graph runs its body again, a clock of ms goes on by one at each event."""

    def __init__(self, monkeypatch):
        self.now, self.fraction, self.held = 0.0, [], iter(())
        stream = types.SimpleNamespace(wait_stream=lambda other: None)
        for name, fake in {
            "Stream": lambda: stream, "current_stream": lambda: stream, "stream": lambda s: nullcontext(),
            "graph": lambda g: nullcontext(), "CUDAGraph": types.SimpleNamespace, "synchronize": lambda: None, "Event": self.event,
            "is_initialized": lambda: True, "empty_cache": lambda: None, "reset_peak_memory_stats": lambda: None,
            "memory_allocated": lambda: 100, "max_memory_allocated": lambda: 350, "max_memory_reserved": lambda: 400,
            "get_device_properties": lambda index: types.SimpleNamespace(total_memory=96 * 2**30),
            "set_per_process_memory_fraction": self.fraction.append,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, fake)

    def event(self, enable_timing):
        event = types.SimpleNamespace(at=None, synchronize=lambda: None)
        event.record = lambda: setattr(self, "now", self.now + 1) or setattr(event, "at", self.now)
        event.elapsed_time = lambda end: end.at - event.at
        return event


def test_a_captured_step_decodes_what_the_eager_one_does(monkeypatch):
    host, step, made = Host(monkeypatch), Decoding._step, []
    decoding = Decoding(models.ours(SMALL.config, "cpu", torch.float32), BATCH[:1, :32], 4)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: made.append(types.SimpleNamespace()) or made[0])
    monkeypatch.setattr(decoding, "_step", lambda: kept.append(step(decoding)) or kept[-1], raising=False)
    kept = []
    decoding.capture()
    recorded = kept[-1]
    assert len(kept) == 4 and bool(recorded.isnan().all())
    made[0].replay = lambda: recorded.copy_(step(decoding))
    logits, eager, _ = decoding()
    assert torch.equal(logits, eager) and host.now == 0


def test_a_step_is_timed_between_two_events(monkeypatch):
    Host(monkeypatch)
    calls, seen = [], []
    sample = StepMeter("cuda").prepare(Contender((lambda: calls.append(1) or "found",)), seen.append)
    assert sample.timed == "events" and sample.kernel_ms() == 1.0 and seen == ["found"] and len(calls) == 2


def test_memory_is_that_of_one_contender_and_the_limit_ends(monkeypatch):
    host = Host(monkeypatch)
    build, work = lambda: torch.nn.Linear(1, 1), lambda model: "done"
    held = iter((5, 25, 0, 7))
    monkeypatch.setattr(model_memory.managed, "room", lambda device: types.SimpleNamespace(held=next(held)))
    assert model_memory.measured(build, work) == ("done", {"peak": 250, "managed": 20})
    assert model_memory.measured(build, work, alone=True)[1] == {"peak": 250, "reserved": 400, "managed": 7}

    def absent(device):
        raise NotImplementedError

    monkeypatch.setattr(model_memory.managed, "room", absent)
    assert model_memory.measured(build, work)[1] == {"peak": 250, "managed": 0}
    todo = bench_model.cases("cuda", list(bench_model.KINDS), 4, False, [])
    assert host.fraction == [] and len(list(todo)) == 3 + (models.absent("liger_kernel") is None)
    assert host.fraction == [0.5, 1.0]


# ---- the rest


def test_the_configurations_are_those_of_the_models():
    for llama, billions in (Llama("Llama-3-8B", LLAMA_3_8B), 8.03), (Llama("Llama-3-70B", LLAMA_3_70B), 70.55):
        with torch.device("meta"):
            assert sum(p.numel() for p in LlamaForCausalLM(llama.config).parameters()) / 1e9 == pytest.approx(billions, abs=0.01)
    cut = Llama("Llama-3-8B", LLAMA_3_8B, 4)
    assert cut.title == "Llama-3-8B, 4 of 32 layers" and cut.config.num_hidden_layers == 4


def test_the_command_measures_what_it_is_asked(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_model", "--device", "cpu", "--only", "decode,70b", "--layers", "1", "--out", str(tmp_path)])
    assert bench_model.main() == 0
    document = json.loads((tmp_path / "cpu_model.json").read_text())
    assert [row["group"].split(",")[1] for row in document["rows"]] == [" 1 of 2 layers"] * 6
    text = report.markdown(document)
    assert "| toy, 1 of 2 layers, 32 tokens before, float32 | tokens/s | time over the first's | GiB | relative error |" in text
    assert "Unsloth: not installed" in text
    monkeypatch.setattr(sys, "argv", ["bench_model", "--only", "dekode"])
    with pytest.raises(SystemExit, match="dekode"):
        bench_model.main()


def test_the_table_of_models(tmp_path):
    row = {"group": "Llama", "case": "training step", "contender": "nf4lora", "timed": "events", "rounds": 7, "tokens": 4096,
           "time_ms": [500.0, 400.0, 1000.0], "ratio": [1.0, 1.0, 1.0], "of_ceiling": None, "eager_ms": None, "energy_mj": None,
           "error": {"losses": 1e-4}, "sweep": None, "x": None, "bytes_moved": None,
           "memory": {"peak": 3 * 2**30, "reserved": 2**32, "managed": 0}}  # fmt: skip
    text = report.markdown({"environment": harness.environment(), "rows": [row], "failed": []})
    line = "| training step: nf4lora | 8,192 [4,096 … 10,240] | 1.00 [1.00 … 1.00] | peak 3.00, reserved 4.00, managed 0.00 | losses 1.0e-04 |"
    assert line in text
