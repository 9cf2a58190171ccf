"""`nf4lora plan`: its bytes against those that are then allocated, its advice on models and cards, its refusals."""

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from commands import in_process, refused
from torch import nn
from transformers import (
    GPT2Config,
    JambaConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    Mamba2Config,
    MambaConfig,
    MambaForCausalLM,
    Qwen3MoeConfig,
    RobertaConfig,
    T5Config,
    WhisperConfig,
    XLNetConfig,
    xLSTMConfig,
)  # fmt: skip
from transformers.models.gpt2 import GPT2LMHeadModel

from nf4lora import optim
from nf4lora.cli import methods
from nf4lora.cli import model as models
from nf4lora.cli.memory import peak_bytes
from nf4lora.cli.planning import needs
from nf4lora.cli.planning.fit import largest
from nf4lora.cli.planning.inventory import take
from nf4lora.cli.planning.needs import Choice, need
from nf4lora.cli.planning.run import Options, plan_of
from nf4lora.cli.planning.states import states
from nf4lora.cli.planning.units import card_bytes, shown
from nf4lora.cli.settings import DEMO, UserError
from nf4lora.cli.train import start, train_step
from nf4lora.hf import NF4Config
from nf4lora.hf.experts import quantize_experts_
from nf4lora.nn import NF4Linear, replace_linears

GIB = 2**30
LLAMA3_8B = dict(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    max_position_embeddings=8192,
)  # fmt: skip
CONFIGS = {
    "8B": LlamaConfig(**LLAMA3_8B),
    "70B": LlamaConfig(**LLAMA3_8B | dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64)),
    "30B-A3B": Qwen3MoeConfig(
        vocab_size=151936, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=48, head_dim=128,
        num_attention_heads=32, num_key_value_heads=4, num_experts=128, num_experts_per_tok=8, max_position_embeddings=40960,
    ),
    "1B": LlamaConfig(**LLAMA3_8B | dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, tie_word_embeddings=True, head_dim=64)),
    "gpt2": GPT2Config(),
    "roberta": RobertaConfig(architectures=["RobertaForMaskedLM"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def inventories():
    return {name: take(config) for name, config in CONFIGS.items()}


def planned(inventory, gpu, **options):
    return plan_of(inventory, Options(gpu=gpu, **options), card_bytes(gpu))


def value(found, option):
    return found.advice.values[option][0]


# ---- what is then allocated


def gpt2(**changes):
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64, **changes)).to(torch.bfloat16)


MODELS = {"llama": tiny.llama, "tied llama": lambda: tiny.llama(tie_word_embeddings=True), "qwen3_moe": tiny.qwen3_moe}


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_weights_are_the_bytes_that_quantizing_allocates(name, double_quant):
    model = MODELS[name]()
    inventory = take(model.config, double_quant=double_quant)
    quantize_experts_(model, double_quant=double_quant)
    replace_linears(model, layer=NF4Linear, double_quant=double_quant)
    ours = needs.weights_of(inventory, Choice("qlora"))
    assert sum(ours.values()) - ours["buffers"] == models.tensor_bytes(model.parameters())
    named = {n: p for n, p in model.named_parameters() if not p.is_floating_point()}
    assert inventory.packed == sum(p.numel() for n, p in named.items() if not n.endswith(("_absmax", "_offset")))
    assert sum(inventory.constants.values()) == models.tensor_bytes(p for n, p in named.items() if n.endswith(("_absmax", "_offset")))
    assert bool(inventory.stacked) == (name == "qwen3_moe")


def test_a_model_of_conv1d_is_what_loading_it_allocates(tmp_path):
    dense = gpt2()
    dense.save_pretrained(tmp_path)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path, quantization_config=NF4Config(), dtype=torch.bfloat16)
    inventory = take(dense.config)
    assert sum(needs.weights_of(inventory, Choice("qlora")).values()) == models.weight_bytes(loaded) and len(inventory.linears) == 8
    dense_bytes = sum(needs.weights_of(inventory, Choice("full", weights=2)).values())
    assert dense_bytes == models.weight_bytes(dense) and inventory.total == sum(p.numel() for p in dense.parameters())


CLASSES = {
    "paged_adamw_8bit": optim.PagedAdamW8bit, "paged_adamw_32bit": optim.PagedAdamW, "adamw_8bit": optim.AdamW8bit,
    "paged_lion_8bit": optim.PagedLion8bit, "paged_lion_32bit": optim.PagedLion,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*CLASSES, "adamw_torch", "adamw_torch_fused"])
def test_states_are_the_bytes_that_a_step_allocates(name, dtype):
    sizes = [1, 255, 256, 4095, 4096, 4097, 70_001]
    params = [nn.Parameter(torch.zeros(n, dtype=dtype)) for n in sizes]
    for p in params:
        p.grad = torch.ones_like(p)
    with warnings.catch_warnings(action="ignore"):
        optimizer = CLASSES[name](params) if name in CLASSES else torch.optim.AdamW(params, fused=name.endswith("fused"))
        optimizer.step()
    if name in CLASSES:
        held = sum(models.tensor_bytes(pool.memory.home()) for pool in optimizer._pools)
        scales = sum(models.tensor_bytes(pool.absmax) for pool in optimizer._pools)
    else:
        held, scales = 0, models.optimizer_bytes(optimizer)
    found = states(sizes, name, dtype.itemsize)
    assert found.total == held + scales and found.paged == (held if name.startswith("paged") else 0)
    assert states(sizes, name, dtype.itemsize, pages=False) == (0, held + scales)


@pytest.mark.parametrize("target_modules", [("all-linear",), ("q_proj", "mlp.down_proj")])
@pytest.mark.parametrize("build", [tiny.llama, lambda: tiny.llama(num_key_value_heads=4, intermediate_size=192)])
def test_adapters_and_their_states_are_those_of_a_run(build, target_modules):
    model = build()
    inventory = take(model.config)
    settings = replace(DEMO, target_modules=target_modules, r=4, max_steps=2, seq_len=16, optim="paged_adamw_8bit")
    models.prepare(model, settings, torch.device("cpu"), torch.float32)
    run = start(model, tiny.tokens(8, 16), settings)
    train_step(run)
    found = need(inventory, Choice("qlora", r=4, target_modules=target_modules, cuda=False))
    assert found.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    arenas = [t for pool in run.optimizer._pools for t in (*pool.memory.home(), *pool.absmax)]
    assert found.parts["optimizer states"] == models.tensor_bytes(arenas) and found.parts["adapters"] == 4 * found.trainable


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_live_bytes_are_within_a_tenth_of_the_demonstrations(tmp_path, method, checkpointing, dtype):
    """Its model, its optimizer and its meter, on a CPU."""
    settings = replace(DEMO, compute_dtype=dtype, output=str(tmp_path), max_steps=3, gradient_checkpointing=checkpointing)
    torch.manual_seed(0)
    config = LlamaConfig(**methods.MODEL)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    compute = getattr(torch, dtype)
    model = methods.BUILD[method](tmp_path / "base", settings, compute)
    run = start(model, torch.randint(256, (16, settings.seq_len)), settings, compute if method == "full" and compute.itemsize < 4 else None)
    train_step(run)
    weights, held = models.weight_bytes(model), models.optimizer_bytes(run.optimizer)
    measured = peak_bytes(lambda: train_step(run), torch.device("cpu"), weights + held)
    found = need(
        take(config),
        Choice(
            method, settings.batch_size, settings.seq_len, settings.grad_accum, settings.r, settings.target_modules, settings.dropout,
            settings.optim, checkpointing, compute.itemsize, weights=4, cuda=False,
        ),
    )  # fmt: skip
    named = needs.weights_of(take(config), Choice(method, compute=compute.itemsize, weights=4))
    assert sum(named.values()) + found.parts.get("adapters", 0) == weights and found.states.total == held
    assert found.tensors == found.total and found.tensors == pytest.approx(measured, rel=0.1)


# ---- advice


def test_8b(inventories):
    small, usual, large = (planned(inventories["8B"], gpu) for gpu in ("8GiB", "24GiB", "80GiB"))
    assert not any(f.fits for f in usual.fits if f.choice.method == "full") and any(f.fits for f in large.fits if f.choice.method == "full")
    assert not small.advice.fit and "fits at" in small.advice.otherwise
    assert value(usual, "--method") == "qlora" and value(large, "--method") == "lora"
    assert value(large, "--gradient-checkpointing") == "no" and int(value(large, "--batch-size")) > int(value(usual, "--batch-size"))
    assert value(usual, "--r") == "16" and value(usual, "--lr") == "2e-4"
    assert value(planned(inventories["8B"], "24GiB", seq_len=8192), "--gradient-checkpointing") == "yes"


def test_70b(inventories):
    fits = {gpu: planned(inventories["70B"], gpu) for gpu in ("8GiB", "24GiB", "48GiB", "80GiB")}
    assert [bool(found.advice.fit) for found in fits.values()] == [False, False, True, True]
    assert "takes" in fits["24GiB"].advice.otherwise and "48 GiB would do" in fits["24GiB"].advice.otherwise
    for gpu in ("48GiB", "80GiB"):
        assert value(fits[gpu], "--method") == "qlora" and value(fits[gpu], "--lr") == "1e-4"
        assert "even with checkpointing" in fits[gpu].advice.values["--method"][1]
    assert not any(f.fits for f in fits["80GiB"].fits if f.choice.method in ("full", "lora"))
    assert value(fits["48GiB"], "--optim").startswith("paged")


def test_experts(inventories):
    small, usual, large = (planned(inventories["30B-A3B"], gpu) for gpu in ("8GiB", "24GiB", "80GiB"))
    assert not small.advice.fit
    for found in (usual, large):
        assert value(found, "--method") == "qlora" and "3-D stacks" in found.advice.values["--target-modules"][1]
    assert value(usual, "--gradient-checkpointing") == "yes" and value(large, "--gradient-checkpointing") == "no"
    model = inventories["30B-A3B"]
    assert model.stacked / model.total > 0.94 and model.packed * 2 == model.quantized


def test_small_models(inventories):
    for gpu in ("8GiB", "24GiB", "80GiB"):
        assert value(planned(inventories["gpt2"], gpu), "--method") == "lora" and value(planned(inventories["gpt2"], gpu), "--r") == "8"
        encoder = planned(inventories["roberta"], gpu)
        assert value(encoder, "--method") == "adalora" and value(encoder, "--r") == "12" and "is 8" in encoder.advice.values["--r"][1]
        assert planned(inventories["1B"], gpu).advice.fit
    plain, again, small = (planned(inventories["1B"], gpu) for gpu in ("24GiB", "8GiB", "6GiB"))
    assert [value(found, "--method") for found in (plain, again, small)] == ["lora", "lora", "qlora"]
    assert [value(found, "--gradient-checkpointing") for found in (plain, again, small)] == ["no", "yes", "yes"]


@pytest.mark.parametrize("gpu", ["24GiB", "32GiB"])
def test_the_reason_for_4_bits_tells_what_16_bits_take(inventories, gpu):
    found = planned(inventories["8B"], gpu)
    plain, again = (f for f in found.fits if f.choice.method == "lora")
    assert not plain.fits and again.fits and again.choice.gradient_checkpointing and value(found, "--gradient-checkpointing") == "no"
    base = sum(needs.weights_of(inventories["8B"], plain.choice).values())
    reason = found.advice.values["--method"][1]
    assert f"16-bit base of {shown(base)} takes {shown(plain.on_device)}" in reason and base == 2 * inventories["8B"].total + inventories["8B"].buffers
    assert f"fits only with checkpointing, in {shown(again.on_device)}" in reason and value(found, "--method") == "qlora"


def test_options_that_are_recommended_are_options_of_finetune(inventories, nf4lora_finetune_help):
    for name in ("8B", "roberta"):
        options = list(planned(inventories[name], "24GiB").advice.values)
        assert len(options) == 9 + (value(planned(inventories[name], "24GiB"), "--method") == "adalora") and all(re.search(rf"  {option}[ ,]", nf4lora_finetune_help) for option in options)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("gpu", ["8GiB", "24GiB", "80GiB"])
def test_what_is_recommended_fits_and_no_more_does(inventories, name, gpu):
    found = planned(inventories[name], gpu)
    room = int(card_bytes(gpu) * 0.97)
    for f in found.fits:
        assert f.fits == (f.largest_batch > 0) == (f.on_device <= room)
        if f.fits:
            assert need(inventories[name], f.choice.with_(batch_size=f.largest_batch)).on_device <= room
            assert need(inventories[name], f.choice.with_(batch_size=f.largest_batch + 1)).on_device > room
    if found.advice.fit:
        assert found.advice.fit.fits and all(reason for _, reason in found.advice.values.values())
    else:
        assert not any(f.fits for f in found.fits if f.choice.method == "qlora")


def test_more_of_anything_takes_more(inventories):
    base = Choice("qlora")
    for name, inventory in inventories.items():
        total = need(inventory, base).tensors
        for change in (dict(batch_size=2), dict(seq_len=4096), dict(r=64), dict(compute=4), dict(optim="paged_adamw_32bit"), dict(attention="eager")):
            assert need(inventory, base.with_(**change)).tensors > total, (name, change)
        for change in (dict(gradient_checkpointing=True), dict(target_modules=(inventory.linears[0].path.rsplit(".", 1)[-1],))):
            assert need(inventory, base.with_(**change)).tensors < total, (name, change)
        ordered = [need(inventory, base.with_(method=method)).total for method in ("qlora", "adalora", "full")]
        assert ordered == sorted(ordered)


def test_paged_states_may_wait_on_the_host(inventories):
    full = need(inventories["8B"], Choice("full", optim="paged_adamw_32bit"))
    assert full.states.paged == full.parts["optimizer states"] and full.total - full.on_device == full.states.paged - 2**26
    plain = need(inventories["8B"], Choice("full", optim="adamw_torch_fused", weights=4))
    assert plain.on_device == plain.total and plain.states.total > 8 * inventories["8B"].total


def test_kinds_of_models_are_counted():
    for config in (T5Config(), LlavaConfig(), GPT2Config(), CONFIGS["roberta"]):
        model = take(config)
        found = planned(model, "24GiB", seq_len=256)
        assert model.blocks and found.needs["qlora"].parts["activations"] > 0 and sum(model.rest.values()) + model.quantized == model.total
        assert found.inference["KV cache"] > 0 or not model.generates
        assert ("images" in found.assumed) == isinstance(config, LlavaConfig)


MAMBA = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8)
UNKNOWN = {
    "mamba": (MambaConfig(**MAMBA), "A_log, D, conv1d, MambaMixer in MambaBlock"),
    "mamba2": (Mamba2Config(**MAMBA, num_heads=4, head_dim=16, n_groups=1), "A_log, D, conv1d, Mamba2Mixer in Mamba2Block"),
    "jamba": (
        JambaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2, num_experts=2),
        "A_log, D, conv1d, JambaMambaMixer in JambaMambaDecoderLayer",
    ),
    "xlstm": (xLSTMConfig(vocab_size=64, hidden_size=64, num_blocks=2, num_heads=4), "xLSTMLayer in xLSTMBlock"),
    "xlnet": (XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=64), "all layers of XLNetLMHeadModel"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
def test_layers_with_activations_that_are_not_counted_say_so(capsys, name):
    config, named = UNKNOWN[name]
    found = planned(take(config), "8GiB", seq_len=64)
    assert named in found.model.uncounted and found.assumed["activations"].startswith(f"a lower bound: those of {named}")
    shown_json = found.as_json()
    assert named in shown_json["assumptions"]["activations"] and all(f["lower_bound"] for f in shown_json["fits"])
    for option in ("--batch-size", "--gradient-checkpointing"):
        assert named in shown_json["advice"][option]["reason"] and "try it" in shown_json["advice"][option]["reason"]
    found.show()
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("lower bound") >= 4 and "perhaps" in out and "│ yes │" not in out and "≤ " in out and "≥ " in out


def test_autograd_keeps_more_of_a_state_space_model_than_is_counted():
    kept = {}
    model = MambaForCausalLM(MambaConfig(**MAMBA))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t):
        model(torch.zeros(1, 64, dtype=torch.long))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    measured = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights)
    counted = need(take(model.config), Choice("full", seq_len=64, compute=4, weights=4, cuda=False)).parts
    assert measured > 2 * (counted["activations"] + counted["logits"])


def test_layers_that_are_counted_have_no_such_caveat(inventories):
    for model in (*inventories.values(), take(LlavaConfig())):
        found = planned(model, "80GiB").as_json()
        assert model.uncounted == "" and "activations" not in found["assumptions"] and not any(f["lower_bound"] for f in found["fits"])


def test_a_length_is_at_most_what_the_config_says():
    assert take(WhisperConfig(encoder_layers=1, decoder_layers=1)).longest == 448
    assert take(GPT2Config(n_layer=1)).longest == 1024 and take(UNKNOWN["xlnet"][0]).longest is None


def test_speech_is_read_by_an_encoder_of_its_own_length():
    model = take(WhisperConfig(encoder_layers=2, decoder_layers=3, architectures=["WhisperForConditionalGeneration"]))
    assert [(b.count, b.image_tokens) for b in model.blocks] == [(2, 1500), (3, None)]
    found = planned(model, "24GiB")
    assert found.assumed["tokens a sequence"] == 448 and "clips of sound" in found.assumed and "images" not in found.assumed


def test_the_largest():
    assert [largest(lambda n, most=most: n <= most) for most in (0, 1, 2, 3, 1000)] == [0, 1, 2, 3, 1000]
    assert largest(lambda n: True, 8192) == 8192 and largest(lambda n: n <= 6000, 8192) == 6000


# ---- the command


@pytest.fixture
def nf4lora(capsys, monkeypatch, tmp_path):
    return in_process(capsys, monkeypatch, tmp_path, "plan")


@pytest.fixture
def nf4lora_finetune_help(capsys, monkeypatch, tmp_path):
    return in_process(capsys, monkeypatch, tmp_path, "finetune")("--help")[1]


@pytest.fixture
def folder(tmp_path) -> Path:
    CONFIGS["8B"].save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_command(nf4lora, folder):
    code, out, _ = nf4lora(folder, "--gpu", "24GiB", "--png", "plan.png", "--json")
    found = json.loads(out)
    assert code == 0 and found["advice"]["--method"]["value"] == "qlora" and Path("plan.png").read_bytes().startswith(b"\x89PNG")
    qlora = found["methods"]["qlora"]
    assert qlora["total"] == sum(qlora["bytes"].values()) and found["assumptions"]["CUDA context"] == "700 MiB"
    code, out, _ = nf4lora(folder / "config.json", "--gpu", "RTX 4090", "--gradient-checkpointing")
    for text in ("packed 4-bit weights", "constants: offsets", "KV cache", "recommended", "nothing is measured", "allocator slack 5%", "paged"):
        assert text in out
    assert code == 0
    code, out, _ = nf4lora(folder, "--gpu", "8GiB")
    assert code == 3 and "Nothing fits" in out
    code, out, _ = nf4lora("--help")
    assert code == 0 and "Example: nf4lora plan" in out and "Exit code 3" in out


OPTIONS = [
    ("--gpu", "24XB", "24GiB or 80GB"), ("--gpu", "1.5", "without a unit"), ("--gpu", "RTX9999", "RTX4090"), ("--gpu", "9999999TB", "more than any"),
    ("--gpu", "-8GiB", "24GiB or 80GB"), ("--batch-size", "0", "1 or more"), ("--seq-len", "9000", "at most 8192"), ("--seq-len", "0", "1 or more"),
    ("--r", "0", "1 or more"), ("--grad-accum", "-1", "1 or more"), ("--dropout", "1", "[0, 1)"), ("--slack", "nan", "[0, 1)"),
    ("--margin", "-0.1", "[0, 1)"), ("--optim", "adam", "paged_adamw_8bit"), ("--dtype", "int8", "bfloat16"), ("--blocksize", "48", "64"),
    ("--attention", "sdpa", "flash"), ("--context", "much", "512MiB"), ("--target-modules", "q_proj,query", "q_proj"),
    ("--target-modules", "a,,b", "separated by commas"), ("--png", "no/folder/plan.png", "path of a .png file"), ("--png", "plan.xyz", ".png"),
    ("--png", ".", "path of a .png file"), ("--png", ".png", "path of a .png file"), ("--png", "plan.pdf", "path of a .png file"),
    ("--gpu", "H100 96GB", "A100-40"), ("--gpu", "A100-20", "A100-40"),
]  # fmt: skip


@pytest.mark.parametrize(("option", "bad", "wanted"), OPTIONS)
def test_a_bad_option(nf4lora, folder, option, bad, wanted):
    gpu = [] if option == "--gpu" else ["--gpu", "24GiB"]
    refused(nf4lora(folder, *gpu, option, bad), option, wanted)


def test_a_config_that_is_none(nf4lora, folder):
    refused(nf4lora("some/model-of-the-hub", "--gpu", "24GiB"), "neither a folder", "config.json")
    refused(nf4lora("./none", "--gpu", "24GiB"), "no such folder or file: ./none")
    refused(nf4lora("none.json", "--gpu", "24GiB"), "none.json cannot be read")
    refused(nf4lora(folder), "wanted MODEL_OR_CONFIG and --gpu", "Example")
    refused(nf4lora(folder, "--gpu", "24GiB", "--markdown"), "--claims")
    for name, text, reason in (
        ("torn", '{"model_type": "llama"', "is not JSON"), ("list", "[1]", "has no model_type"), ("other", '{"a": 1}', "has no model_type"),
        ("new", '{"model_type": "no_such_model"}', "cannot be read"), ("odd", '{"model_type": "llama", "num_attention_heads": 0}', "config"),
        ("deep", '{"model_type": "llama", "hidden_size": -4}', "config"),
        ("heads", '{"model_type": "mistral", "num_attention_heads": 0, "head_dim": 8}', "out_features: found 0"),
        ("flat", '{"model_type": "llama", "intermediate_size": 0}', "4 bits cannot hold"),
        ("three", '{"model_type": "llama", "architectures": [3]}', "architectures [3]"),
        ("text", '{"model_type": "llama", "architectures": {"a": 1}}', "wanted a list of names"),
    ):  # fmt: skip
        Path(name).mkdir()
        Path(name, "config.json").write_text(text)
        refused(nf4lora(name, "--gpu", "24GiB"), reason)
    Path("empty").mkdir()
    refused(nf4lora("empty", "--gpu", "24GiB"), "empty/config.json cannot be read")


def test_spaces_between_targets(nf4lora, folder):
    spaced, plain = (nf4lora(folder, "--gpu", "24GiB", "--json", "--target-modules", names) for names in ("q_proj, v_proj", "q_proj,v_proj"))
    assert spaced == plain and plain[0] == 0


def test_claims_stand_alone(nf4lora, folder):
    refused(nf4lora("--claims", "--markdown", "--json"), "--claims: found --markdown beside it")
    refused(nf4lora("--claims", "--seq-len", "3"), "--claims: found --seq-len beside it")
    refused(nf4lora("--claims", folder, "--gpu", "24GiB"), "found --gpu, MODEL_OR_CONFIG beside it")


def test_a_checkpoint_that_is_quantized_already_is_planned_by_its_shapes(nf4lora, folder):
    whole = json.loads((folder / "config.json").read_text())
    before = nf4lora(folder, "--gpu", "24GiB", "--json")
    (folder / "config.json").write_text(json.dumps(whole | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}))
    assert nf4lora(folder, "--gpu", "24GiB", "--json")[:2] == before[:2]


def test_sizes():
    assert card_bytes("24GiB") == card_bytes("rtx 3090") == card_bytes("NVIDIA GeForce RTX 4090") == 24 * GIB
    assert card_bytes("80GB") == 80 * 10**9 and card_bytes("1.5 gib") == 3 * 2**29
    for name in ("A100-80", "a100-80gb", "A100 80GB", "H100 80GB", "NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "h100_80g"):
        assert card_bytes(name) == 80 * GIB, name
    for name in ("A100-40", "a100-40gb", "NVIDIA A100-PCIE-40GB", "A100 40GiB"):
        assert card_bytes(name) == 40 * GIB, name
    assert card_bytes("Tesla T4") == 16 * GIB and card_bytes("NVIDIA RTX A6000") == 48 * GIB
    assert [shown(n) for n in (0, 1000, 2048, 3 * 2**29, 200 * GIB)] == ["0 B", "1,000 B", "2.00 KiB", "1.50 GiB", "200 GiB"]
    with pytest.raises(UserError):
        card_bytes("")
