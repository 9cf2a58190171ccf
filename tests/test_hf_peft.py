"""peft's LoRA on a 4-bit base: which layer there is, what it computes in one call, what it writes, and what it refuses."""

import json
import re
import subprocess
import sys

import peft
import peft.utils.hotswap
import pytest
import safetensors.torch
import tiny
import torch
from accelerate import cpu_offload
from peft import EvaConfig, IA3Config, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora.config import KasaConfig
from torch import nn
from transformers import AutoModelForCausalLM

from nf4lora import NF4Linear, NF4LoRALinear, autograd, replace_linears
from nf4lora.hf import NF4Config, peft_dispatch
from nf4lora.hf.peft_lora import NF4LoraLinear
from nf4lora.hf.peft_merge import Merging, merging
from nf4lora.testing import assert_error_ratio

peft_dispatch.install()
TOKENS = tiny.tokens()
ATTENTION = ["q_proj", "v_proj"]


def base(dtype=torch.float32, **kwargs):
    return replace_linears(tiny.llama(dtype=dtype), layer=NF4Linear, **kwargs).requires_grad_(False)


def learned(model, seed: int = 0):
    """As if trained: every parameter of the adapters changed."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if any(part in name for part in ("lora_", "ia3_")) and p.is_floating_point():
            p.data.add_(torch.randn(p.shape, generator=generator).to(p.dtype) * 0.05)
    return model.eval()


def lora(model=None, seed: int = 0, **kwargs):
    return learned(
        get_peft_model(
            base() if model is None else model, LoraConfig(**{"target_modules": ATTENTION, "r": 4, **kwargs})
        ),
        seed,
    )


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def layers(model, kind=PeftLinear) -> dict:
    return {name: m for name, m in model.named_modules() if isinstance(m, kind)}


@pytest.fixture
def calls(monkeypatch):
    """The ranks of the adapters in the calls of the op: 0 for a base alone."""
    ranks, op = [], autograd.linear

    def counted(x, packed, absmax, nested_absmax, offset, bias, lora_A, *rest):
        ranks.append(0 if lora_A is None else lora_A.shape[0])
        return op(x, packed, absmax, nested_absmax, offset, bias, lora_A, *rest)

    monkeypatch.setattr(autograd, "linear", counted)
    return ranks


# -- which layer


def test_every_way_to_an_adapter_gives_the_fused_layer(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "base")
    config = LoraConfig(target_modules=ATTENTION, r=4)

    def from_disk():
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=NF4Config())

    made = lora(from_disk())
    made.save_pretrained(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tmp_path / "base"
    )
    loaded = PeftModel.from_pretrained(from_disk(), tmp_path / "a")
    loaded.load_adapter(tmp_path / "a", "second")
    added, by_transformers = from_disk(), from_disk()
    added.add_adapter(config)
    by_transformers.load_adapter(str(tmp_path / "a"))
    automatic = AutoModelForCausalLM.from_pretrained(tmp_path / "a", quantization_config=NF4Config())
    models = {"get": made, "from": loaded, "add": added, "load": by_transformers, "auto": automatic}
    for way, model in models.items():
        assert len(layers(model)) == 4 and {type(m) for m in layers(model).values()} == {NF4LoraLinear}, way
    for way in ("from", "load", "auto"):
        assert logits(models[way].eval()).equal(logits(made)), way
    loaded.set_adapter("second")
    assert logits(loaded).equal(logits(made))


def test_nothing_else_changes_and_all_of_it_can_be_taken_back():
    assert {type(m) for m in layers(lora(tiny.llama(dtype=torch.float32))).values()} == {PeftLinear}
    hooked = peft.tuners.lora.model.dispatch_default
    peft_dispatch.install()
    assert peft.tuners.lora.model.dispatch_default is hooked
    try:
        peft_dispatch.uninstall()
        assert peft.tuners.lora.model.dispatch_default is not hooked
        assert {type(m) for m in layers(lora()).values()} == {PeftLinear}
        assert all("nf4lora" not in m.__globals__["__name__"] for m in (PeftLinear.merge, PeftModel.load_adapter))
    finally:
        peft_dispatch.install()
    assert {type(m) for m in layers(lora()).values()} == {NF4LoraLinear}


# -- one layer: bits and errors


def pair(dtype=torch.float32, adapter_dtype=torch.float32, **kwargs):
    """Our own layer and peft's, of the same numbers."""
    torch.manual_seed(3)
    ours = NF4LoRALinear.from_linear(nn.Linear(96, 70).to(dtype), r=5, lora_alpha=7, **kwargs)
    nn.init.normal_(ours.lora_B, std=0.1)
    for p in (ours.lora_A, ours.lora_B):
        p.data = p.data.to(adapter_dtype)
    plain = NF4Linear(96, 70, dtype=dtype)
    plain.load_state_dict({k: v for k, v in ours.state_dict().items() if "lora" not in k})
    config = LoraConfig(lora_dropout=ours.lora_dropout, use_rslora=ours.use_rslora)
    theirs = NF4LoraLinear(plain, "default", config=config, r=5, lora_alpha=7)
    theirs.lora_A["default"].weight.data, theirs.lora_B["default"].weight.data = (
        ours.lora_A.data.clone(),
        ours.lora_B.data.clone(),
    )
    return ours, theirs


def results(layer, A, B, x, dy, seed=0):
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    y = layer(x)
    return y, *torch.autograd.grad(y, (x, A, B), dy.to(y.dtype))


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kwargs", [{}, {"use_rslora": True}, {"lora_dropout": 0.3}])
def test_the_bits_are_those_of_our_own_layer(dtype, adapter_dtype, kwargs):
    ours, theirs = pair(dtype, adapter_dtype, **kwargs)
    x, dy = torch.randn(2, 9, 96, dtype=dtype), torch.randn(2, 9, 70, dtype=dtype)
    for training in (True, False):
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                one = results(ours.train(training), ours.lora_A, ours.lora_B, x, dy)
                other = results(
                    theirs.train(training), theirs.lora_A["default"].weight, theirs.lora_B["default"].weight, x, dy
                )
            for name, a, b in zip(("y", "dx", "dA", "dB"), one, other, strict=True):
                assert a.dtype == b.dtype and a.equal(b), (name, training, autocast)


def test_dropout_is_ours_in_training_only():
    _, layer = pair(lora_dropout=0.5)
    x = torch.randn(4, 96)
    with torch.no_grad():
        drawn = []
        for training in (True, True, False, False):
            drawn.append(layer.train(training)(x))
    assert not drawn[0].equal(drawn[1]) and drawn[2].equal(drawn[3])
    layer.lora_dropout["default"].p = 0.0
    assert layer.train()(x).equal(drawn[2])


@pytest.mark.parametrize("adapters", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_are_those_of_peft_on_the_dense_decoded_weight(dtype, adapters):
    _, fused = pair(dtype)
    dense = nn.Linear(96, 70).to(dtype)
    dense.weight.data, dense.bias.data = fused.base_layer.dequantize(dtype), fused.base_layer.bias.data
    unfused = PeftLinear(dense.requires_grad_(False), "default", config=LoraConfig(), r=5, lora_alpha=7)
    names = ["default", "b", "c"][:adapters]
    truth_W, truth = fused.base_layer.dequantize(torch.float32).double(), 0
    x, dy = torch.randn(64, 96, dtype=dtype), torch.randn(64, 70, dtype=dtype)
    for i, name in enumerate(names):
        for layer in (fused, unfused):
            if name != "default":
                layer.update_layer(name, 3 + i, lora_alpha=4, config=LoraConfig())
        A, B = torch.randn(fused.r[name], 96) * 0.1, torch.randn(70, fused.r[name]) * 0.1
        for layer in (fused, unfused):
            layer.lora_A[name].weight.data, layer.lora_B[name].weight.data = A.to(dtype), B.to(dtype)
        truth_W = truth_W + fused.scaling[name] * B.to(dtype).double() @ A.to(dtype).double()
    truth = x.double() @ truth_W.T + dense.bias.double()
    found = []
    for layer in (fused, unfused):
        layer.set_adapter(names)
        found.append(all_results(layer, names, x, dy))
    expected = [truth, dy.double() @ truth_W]
    for name in names:
        A, B, s = (t.double() if hasattr(t, "double") else t for t in (
            fused.lora_A[name].weight.data, fused.lora_B[name].weight.data, fused.scaling[name]))  # fmt: skip
        expected += [s * (dy.double() @ B).T @ x.double(), s * dy.double().T @ (x.double() @ A.T)]
    for i, (ours, theirs, exact) in enumerate(zip(*found, expected, strict=True)):
        assert_error_ratio(ours, theirs, exact, f"result {i} of y, dx, dA, dB, ...")


def all_results(layer, names, x, dy):
    x = x.clone().requires_grad_()
    y = layer(x)
    adapters = [m[name].weight for name in names for m in (layer.lora_A, layer.lora_B)]
    return y, *torch.autograd.grad(y, (x, *adapters), dy)


# -- one call, where there should be one


def two(**kwargs):
    _, layer = pair(**kwargs)
    layer.update_layer("b", 3, lora_alpha=2, config=LoraConfig(lora_dropout=kwargs.get("lora_dropout", 0.0)))
    nn.init.normal_(layer.lora_B["b"].weight, std=0.1)
    layer.set_adapter(["default", "b"])
    return layer


def variant(**kwargs):
    layer = NF4LoraLinear(NF4Linear(96, 70), "default", config=LoraConfig(**kwargs), r=5, lora_alpha=7)
    nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    return layer


def changed(layer, change):
    change(layer)
    return layer


def with_tensor_scaling(layer):
    layer.scaling["default"] = torch.tensor(layer.scaling["default"])


def merged_in_4_bits(layer):
    token = merging.set(Merging(in_4bit=True))
    layer.merge()
    merging.reset(token)


CASES = {  # the layer, what its forward is called with, and the ranks of the calls of the op that it takes
    "one": (lambda: pair()[1], {}, [5]),
    "rslora": (lambda: pair(use_rslora=True)[1], {}, [5]),
    "bf16 adapter": (lambda: pair(adapter_dtype=torch.bfloat16)[1], {}, [5]),
    "dropout, evaluated": (lambda: pair(lora_dropout=0.5)[1].eval(), {}, [5]),
    "several": (two, {}, [8]),
    "several with dropout, evaluated": (lambda: two(lora_dropout=0.5).eval(), {}, [8]),
    "scaled": (lambda: changed(two(), lambda m: m.scale_layer(0.5)), {}, [8]),
    "scaling in a tensor": (lambda: changed(pair()[1], with_tensor_scaling), {}, [5]),
    "switched": (lambda: changed(two(), lambda m: m.set_adapter("b")), {}, [3]),
    "one that is not in this layer": (lambda: changed(pair()[1], lambda m: m.set_adapter("elsewhere")), {}, [0]),
    "one of two not in this layer": (lambda: changed(pair()[1], lambda m: m.set_adapter(["elsewhere", "default"])), {}, [5]),
    "deleted": (lambda: changed(two(), lambda m: m.delete_adapter("default")), {}, [3]),
    "disabled": (lambda: changed(two(), lambda m: m.enable_adapters(False)), {}, [0]),
    "dora": (lambda: variant(use_dora=True), {}, [0]),
    "lora_bias": (lambda: variant(lora_bias=True), {}, [0]),
    "dropout of 1": (lambda: variant(lora_dropout=1.0), {}, [0]),
    "mixed batch": (two, {"adapter_names": ["b", "__base__", "default", "b"]}, [0]),
    "merged": (lambda: changed(pair()[1], lambda m: m.merge()), {}, []),
    "merged in 4 bits": (lambda: changed(pair()[1], merged_in_4_bits), {}, [0]),
    "a hook on the base": (lambda: changed(pair()[1], lambda m: m.base_layer.register_forward_hook(lambda *a: None)), {}, [0]),
    "a hook on an adapter": (
        lambda: changed(pair()[1], lambda m: m.lora_A["default"].register_forward_hook(lambda *a: None)), {}, [0],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_call_where_there_should_be_one_and_peft_elsewhere(case, calls):
    make, kwargs, wanted = CASES[case]
    layer, x = make(), torch.randn(4, 3, 96)
    with torch.no_grad():
        y = layer(x, **kwargs)
        assert calls == wanted
        tolerance = 2e-2 if case == "bf16 adapter" else 1e-5  # peft rounds x to the dtype of the adapter
        torch.testing.assert_close(y, PeftLinear.forward(layer, x, **kwargs), rtol=tolerance, atol=tolerance)


def test_several_with_dropout_in_training_drop_each_their_own(calls):
    layer, x = two(lora_dropout=0.5), torch.randn(4, 96)
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    assert calls == [0] and y.equal(PeftLinear.forward(layer, x))


def test_a_model_takes_one_call_a_layer_forward_and_again_backward(calls):
    model = lora(target_modules="all-linear").train()
    linears, targets = len(layers(model, NF4Linear)), len(layers(model))
    assert linears == targets == 14
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert calls == [4] * targets
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_dtypes_are_those_of_the_table():
    for compute_dtype in (None, torch.bfloat16, torch.float32):
        for autocast in (False, True):
            layer = NF4LoraLinear(NF4Linear(96, 70, compute_dtype=compute_dtype), "default", config=LoraConfig(), r=2)
            plain, x = layer.base_layer, torch.randn(3, 96, dtype=torch.float16)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                assert layer(x).dtype == plain(x).dtype
                assert layer(x).equal(plain(x))  # B is zero


# -- adapters that come and go


def test_disable_switch_add_and_delete():
    plain = logits(base())
    model = lora()
    first = logits(model)
    model.add_adapter("second", LoraConfig(target_modules="all-linear", r=3))
    for p in [p for name, p in model.named_parameters() if ".second." in name]:
        nn.init.normal_(p.data, std=0.05)
    assert logits(model).equal(first)
    model.set_adapter("second")
    second = logits(model)
    assert not second.equal(first)
    model.base_model.set_adapter(["default", "second"])
    assert not logits(model).equal(second)
    with model.disable_adapter():
        assert logits(model).equal(plain)
    model.set_adapter("default")
    assert logits(model).equal(first)
    model.delete_adapter("second")
    assert logits(model).equal(first)
    assert logits(model.unload()).equal(plain)


def test_hotswap_also_between_ranks(tmp_path):
    model, other = lora(), lora(seed=1, r=6)
    wanted = logits(other)
    other.save_pretrained(tmp_path / "a")
    peft.utils.hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert isinstance(next(iter(layers(model).values())).scaling["default"], torch.Tensor)
    peft.utils.hotswap.hotswap_adapter(model, str(tmp_path / "a"), adapter_name="default", torch_device="cpu")
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-6)


# -- what people set


def eva(model):
    batches = [{"input_ids": tiny.tokens(seed=i, batch=4)} for i in range(4)]
    initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    return model


SETTINGS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "eva": {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=1.0)},
    "lora_bias": {"lora_bias": True},
    "all-linear": {"target_modules": "all-linear"},
    "patterns": {"rank_pattern": {"layers.1.self_attn.v_proj": 9}, "alpha_pattern": {"q_proj": 3}},
    "dropout": {"lora_dropout": 0.2},
    "gaussian": {"init_lora_weights": "gaussian"},
    "learning head": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_loss_falls_and_a_saved_adapter_comes_back_bit_for_bit(setting, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(
        base(), LoraConfig(**{"target_modules": ATTENTION, "r": 4, "lora_alpha": 16, **SETTINGS[setting]})
    )
    if setting == "eva":
        eva(model)
        assert all(
            m.lora_A["default"].weight.norm() > 0 and not m.lora_B["default"].weight.any()
            for m in layers(model).values()
        )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses, packed = [], {n: p.clone() for n, p in model.named_parameters() if not p.is_floating_point()}
    for _ in range(4):
        optimizer.zero_grad()
        loss = model.train()(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.01
    assert all(p.equal(packed[n]) for n, p in model.named_parameters() if n in packed)
    wanted = logits(model.eval())
    model.save_pretrained(tmp_path / "a")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "a")
    assert {type(m) for m in layers(loaded).values()} == {NF4LoraLinear}
    assert logits(loaded).equal(wanted)


def test_checkpointing_gives_the_same_gradients(calls):
    grads = {}
    for use_reentrant in (None, True, False):
        model = lora(base(), lora_dropout=0.3).train()
        if use_reentrant is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        torch.manual_seed(5)
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        grads[use_reentrant] = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    for n, g in grads[None].items():
        assert g.equal(grads[True][n]) and g.equal(grads[False][n]), n


@pytest.mark.parametrize("make", [lambda: pair()[1], two, lambda: pair(lora_dropout=0.5)[1]])
def test_the_layer_compiles_whole(make):
    layer, x = make(), torch.randn(4, 96)
    names = layer.active_adapters
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    if layer.lora_dropout["default"].__class__ is nn.Dropout:
        assert compiled(x).shape == (4, 70)  # the seed is drawn elsewhere
        layer.eval()
    for one, other in zip(
        all_results(compiled, names, x, torch.ones(4, 70)), all_results(layer, names, x, torch.ones(4, 70)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_half_changes_floats_only():
    model = lora()
    wanted, bytes_before = (
        logits(model),
        {n: p.clone() for n, p in model.named_parameters() if not p.is_floating_point()},
    )
    model.to(torch.bfloat16)
    assert all(p.equal(bytes_before[n]) for n, p in model.named_parameters() if n in bytes_before)
    assert (logits(model).float() - wanted).norm() < 0.02 * wanted.norm()
    assert next(iter(layers(model).values())).lora_A["default"].weight.dtype == torch.bfloat16


def test_weights_that_accelerate_brings_for_a_call():
    model = lora()
    wanted = logits(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(iter(layers(model, NF4Linear).values())).weight.is_meta
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*not grouped any more")
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules="all-linear", r=4),
        LoraConfig(target_modules=["gate_proj", "q_proj"], r=4),
        IA3Config(target_modules=["k_proj", "down_proj", "up_proj"], feedforward_modules=["down_proj"]),
    ],
)
def test_on_grouped_blocks_the_layers_compute_themselves(config):
    plain, grouped = (learned(get_peft_model(base(group=group), config)) for group in (False, True))
    for _ in range(2):
        torch.testing.assert_close(logits(grouped), logits(plain), rtol=1e-5, atol=1e-5)


# -- files


def saved(tmp_path, **kwargs):
    model = lora(base(torch.bfloat16), **{"target_modules": "all-linear", "task_type": "CAUSAL_LM", **kwargs})
    model.save_pretrained(tmp_path / "a")
    with safetensors.safe_open(tmp_path / "a" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    return model, json.loads((tmp_path / "a" / "adapter_config.json").read_text()), tensors


@pytest.mark.parametrize(
    "kwargs", [{}, {"use_rslora": True}, {"target_modules": ATTENTION, "rank_pattern": {"v_proj": 2}}]
)
def test_files_are_as_vllm_wants_them(tmp_path, kwargs):
    """vLLM reads r, lora_alpha and target_modules, refuses DoRA, modules_to_save and biases, and parses each key."""
    model, config, tensors = saved(tmp_path, **kwargs)
    assert config["peft_type"] == "LORA" and config["r"] == 4 and config["lora_alpha"] == 8 and config["bias"] == "none"
    assert (
        config["use_rslora"] == kwargs.get("use_rslora", False)
        and not config["use_dora"]
        and config["modules_to_save"] is None
    )
    assert config["fan_in_fan_out"] is False and config["inference_mode"] is True and not config["lora_bias"]
    paths = {name.removeprefix("base_model.model.") for name in layers(model)}
    assert tensors.keys() == {f"base_model.model.{path}.lora_{ab}.weight" for path in paths for ab in "AB"}
    for key, tensor in tensors.items():
        path, ab = re.fullmatch(r"base_model\.model\.(model\.layers\.\d+\.\S+)\.lora_([AB])\.weight", key).groups()
        layer = model.get_submodule(f"base_model.model.{path}")
        r = config["rank_pattern"].get(path.rsplit(".", 1)[-1], config["r"])
        assert {path, path.rsplit(".", 1)[-1]} & set(config["target_modules"]) and "default" not in key
        assert (
            tuple(tensor.shape) == ((r, layer.in_features) if ab == "A" else (layer.out_features, r))
            and tensor.dtype == torch.float32
        )
        assert tensor.equal(getattr(layer, f"lora_{ab}")["default"].weight)


def test_dora_adds_its_magnitudes(tmp_path):
    _, config, tensors = saved(tmp_path, use_dora=True, target_modules=["q_proj"])
    assert config["use_dora"] and {key.rsplit("q_proj.")[1] for key in tensors} == {
        "lora_A.weight",
        "lora_B.weight",
        "lora_magnitude_vector",
    }


ALONE = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), adapter).eval()
tokens = torch.load(out, weights_only=True)
with torch.no_grad():
    torch.save(model(input_ids=tokens).logits, out)
assert not [name for name in sys.modules if name.startswith("nf4lora")]
"""


def test_peft_without_us_loads_them_on_a_bf16_base(tmp_path):
    model, _, _ = saved(tmp_path)
    decoded = tiny.llama()
    for name, layer in layers(base(torch.bfloat16), NF4Linear).items():
        decoded.get_submodule(name).weight.data = layer.dequantize(torch.bfloat16)
    decoded.save_pretrained(tmp_path / "base")
    torch.save(TOKENS, tmp_path / "out.pt")
    subprocess.run(
        [sys.executable, "-P", "-c", ALONE, *(str(tmp_path / p) for p in ("base", "a", "out.pt"))], check=True
    )
    alone, ours = torch.load(tmp_path / "out.pt", weights_only=True).float(), logits(model).float()
    plain = logits(base(torch.bfloat16)).float()
    assert (alone - ours).norm() < 0.02 * ours.norm() < 0.1 * (ours - plain).norm()


# -- bad input


def test_an_adapter_of_another_model_names_what_does_not_fit(tmp_path):
    lora(replace_linears(tiny.llama(dtype=torch.float32, hidden_size=32), layer=NF4Linear)).save_pretrained(
        tmp_path / "a"
    )
    model = lora()
    before = logits(model)
    with pytest.raises(
        RuntimeError, match=r"size mismatch for base_model.*q_proj.lora_A.second.weight.*\[4, 32\].*\[4, 64\]"
    ):
        model.load_adapter(tmp_path / "a", "second")
    assert logits(model).equal(before)
    edited = json.loads((tmp_path / "a" / "adapter_config.json").read_text()) | {"target_modules": ["c_attn"]}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(edited))
    with pytest.raises(ValueError, match=r"c_attn.* not found in the base model"):
        PeftModel.from_pretrained(base(), tmp_path / "a")


REFUSED = {
    "a learning module in 4 bits": (
        base, {"modules_to_save": ["o_proj"]}, r"found model.layers.0.self_attn.o_proj in 4 bits.*\['o_proj'\]",
    ),
    "a learning block in 4 bits": (base, {"modules_to_save": ["mlp"]}, "found model.layers.0.mlp in 4 bits"),
    "a parameter in 4 bits": (
        base, {"target_parameters": ["q_proj.weight"], "target_modules": []},
        "found .*q_proj.weight in 4 bits; name the layer in target_modules",
    ),
    "adapters of ours": (
        lambda: replace_linears(tiny.llama(), r=2), {},
        "q_proj and 13 more are NF4LoRALinears.*replace_linears.model, layer=NF4Linear.",
    ),
    "corda": (base, {"init_lora_weights": "corda"}, "init_lora_weights='corda', which is computed from the weight in floats"),
    "lora_ga": (base, {"init_lora_weights": "lora_ga"}, "init_lora_weights='lora_ga', which is computed from the weight in floats"),
    "mica": (base, {"init_lora_weights": "mica"}, "init_lora_weights='mica', which"),
    "kasa": (base, {"kasa_config": KasaConfig()}, "kasa_config, which is computed from the weight in floats"),
    "pissa": (
        base, {"init_lora_weights": "pissa_niter_4"},
        "'pissa_niter_4', computed from a weight in 16 bits; nf4lora.hf.quantize_with_start",
    ),
    "PiSSA": (base, {"init_lora_weights": "PiSSA"}, "'PiSSA', computed from a weight in 16 bits; nf4lora.hf.quantize_with_start"),
    "OLoRA": (base, {"init_lora_weights": "OLoRA"}, "'OLoRA', computed from a weight in 16 bits; nf4lora.hf.quantize_with_start"),
    "Corda": (base, {"init_lora_weights": "Corda"}, "init_lora_weights='Corda', which is computed from the weight in floats"),
    "orthogonal": (base, {"init_lora_weights": "orthogonal"}, "init_lora_weights='orthogonal', computed from a weight in 16 bits"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_by_name(case):
    make, kwargs, message = REFUSED[case]
    model = make()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, LoraConfig(**{"target_modules": ATTENTION, "r": 4, **kwargs}))
    for name, p in model.named_parameters():
        assert p.equal(before[name]), name


def test_our_own_layer_without_an_adapter_is_a_base():
    model = lora(replace_linears(tiny.llama(dtype=torch.float32), r=0))
    assert {type(m) for m in layers(model).values()} == {NF4LoraLinear}
    assert logits(model).equal(logits(lora()))


def test_fan_in_fan_out_is_settled_by_the_layer():
    config = LoraConfig(target_modules=ATTENTION, fan_in_fan_out=True)
    assert (
        not any(m.fan_in_fan_out for m in layers(get_peft_model(base(), config)).values()) and not config.fan_in_fan_out
    )


def test_x_of_another_width_and_dtype_is_named():
    _, layer = pair()
    with pytest.raises(ValueError, match=r"found x of shape \(2, 95\), wanted \[..., 96\]"):
        layer(torch.randn(2, 95))
    with pytest.raises(TypeError, match="found x of torch.int64"):
        layer(torch.ones(2, 96, dtype=torch.int64))
