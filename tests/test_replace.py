"""`replace_linears`: which layers it takes, what it refuses, and that a refusal leaves the model as it was."""

import copy
import inspect
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from nf4lora import NF4Linear, NF4LoRALinear, replace_linears

pytestmark = pytest.mark.usefixtures("one_thread")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def tiny_llama(tie=False):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tie,
        )
    )  # fmt: skip


def kinds(model):
    return {name: type(m) for name, m in model.named_modules()}


def replaced(model):
    return {name for name, m in model.named_modules() if isinstance(m, NF4Linear)}


@contextmanager
def refuses(model, error, *words):
    """The block raises `error` with every word, and every module and parameter of the model is the very one it was."""
    modules, parameters = dict(model.named_modules(remove_duplicate=False)), dict(model.named_parameters())
    values = {n: p.detach().clone() for n, p in parameters.items() if not p.is_meta}
    with pytest.raises(error) as caught:
        yield
    assert caught.type is error
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in {caught.value}"
    now = dict(model.named_modules(remove_duplicate=False))
    assert now.keys() == modules.keys() and all(now[n] is modules[n] for n in now)
    now = dict(model.named_parameters())
    assert now.keys() == parameters.keys() and all(now[n] is parameters[n] for n in now)
    assert all(torch.equal(now[n].nan_to_num(), values[n].nan_to_num()) for n in values)


def test_signature():
    found = inspect.signature(replace_linears).parameters
    assert list(found) == ["model", "target_modules", "exclude", "layer", "group", "kwargs"]
    assert found["target_modules"].default == "all-linear" and found["exclude"].default == ("lm_head",)


@pytest.mark.parametrize("tie", [False, True])
def test_all_linear(tie):
    model = tiny_llama(tie)
    dense = copy.deepcopy(model)
    assert replace_linears(model, r=4, lora_alpha=8, lora_dropout=0.1, blocksize=32) is model
    wanted = {f"model.layers.{i}.self_attn.{n}" for i in (0, 1) for n in ATTENTION}
    wanted |= {f"model.layers.{i}.mlp.{n}" for i in (0, 1) for n in MLP}
    assert replaced(model) == wanted and type(model.lm_head) is nn.Linear
    assert tie == (model.lm_head.weight is model.model.embed_tokens.weight)
    for name in wanted:
        layer = model.get_submodule(name)
        assert (type(layer), layer.r, layer.lora_alpha, layer.lora_dropout, layer.blocksize) == (NF4LoRALinear, 4, 8, 0.1, 32)
        was = dense.get_submodule(name)
        assert (layer.in_features, layer.out_features, layer.training) == (was.in_features, was.out_features, was.training)
        assert (layer.dequantize() - was.weight).abs().max() < 0.2 * was.weight.abs().max()
    # All else is the very same.
    rest = {n: p for n, p in model.named_parameters() if not any(n.startswith(w + ".") for w in wanted)}
    assert all(torch.equal(p, dense.get_parameter(n)) and p.requires_grad for n, p in rest.items())
    ids = torch.arange(20).reshape(2, 10)
    difference = (model.eval()(ids).logits - dense.eval()(ids).logits).abs().max()
    assert 0 < difference < 0.1
    loss = model.train()(input_ids=ids, labels=ids).loss
    loss.backward()
    assert all(model.get_submodule(name).lora_B.grad.any() for name in wanted)


@pytest.mark.parametrize(
    ("targets", "exclude", "wanted"),
    [
        (["q_proj", "v_proj"], (), {f"model.layers.{i}.self_attn.{n}" for i in (0, 1) for n in ("q_proj", "v_proj")}),
        ("down_proj", (), {f"model.layers.{i}.mlp.down_proj" for i in (0, 1)}),
        (("self_attn.q_proj",), (), {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}),
        (["1.self_attn.q_proj"], (), {"model.layers.1.self_attn.q_proj"}),
        (["model.layers.0.mlp.up_proj"], (), {"model.layers.0.mlp.up_proj"}),
        (iter(["up_proj", "gate_proj"]), iter(["0.mlp.up_proj", "gate_proj"]), {"model.layers.1.mlp.up_proj"}),
        (["up_proj", "lm_head"], "up_proj", {"lm_head"}),
        ("all-linear", ATTENTION + MLP, {"lm_head"}),
        ("all-linear", [*ATTENTION, "lm_head", "1.mlp.up_proj", "down_proj", "gate_proj"], {"model.layers.0.mlp.up_proj"}),
        ("all-linear", MLP + ATTENTION[:3], {"lm_head", "model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"}),
    ],
)  # fmt: skip
def test_names(targets, exclude, wanted):
    model = replace_linears(tiny_llama(), targets, exclude, r=2)
    assert replaced(model) == wanted


def test_names_of_a_sequential():
    """A name is a module's own or the end of its path, by whole parts."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), nn.Linear(4, 4))
    assert replaced(replace_linears(copy.deepcopy(model), ["0"], r=2)) == {"0", "1.0"}
    assert replaced(replace_linears(copy.deepcopy(model), ["1.0"], r=2)) == {"1.0"}
    assert replaced(replace_linears(copy.deepcopy(model), exclude=["2"], r=2)) == {"0", "1.0"}
    assert replaced(replace_linears(copy.deepcopy(model), exclude="1.2", r=2)) == {"0", "1.0", "2"}
    model = nn.ModuleDict({"up": nn.Linear(4, 4), "warm_up": nn.Linear(4, 4)})
    assert replaced(replace_linears(model, "up", r=2)) == {"up"}


def test_layer_and_options():
    model = replace_linears(tiny_llama(), layer=NF4Linear, quant_type="fp4", double_quant=False, compute_dtype=torch.bfloat16)
    layers = [m for m in model.modules() if isinstance(m, NF4Linear)]
    assert len(layers) == 14 and {type(m) for m in layers} == {NF4Linear}
    assert {(m.quant_type, m.double_quant, m.compute_dtype) for m in layers} == {("fp4", False, torch.bfloat16)}
    # A second time, what is there already is left alone.
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    replace_linears(model, "0", r=2)
    first = model[0]
    replace_linears(model, r=2)
    assert model[0] is first and replaced(model) == {"0", "1"}


def test_adapters_on_a_base_in_4_bits():
    """As after loading with NF4Config: the bytes stay where they are, and the model computes what it did."""
    model = replace_linears(tiny_llama(), layer=NF4Linear, quant_type="fp4", double_quant=False, blocksize=32)
    before = {name: (m.weight, m.weight_absmax) for name, m in model.named_modules() if isinstance(m, NF4Linear)}
    ids = torch.arange(12).view(2, 6)
    wanted = model(input_ids=ids).logits
    with pytest.raises(ValueError, match="blocksize=64"):
        replace_linears(model, "q_proj", blocksize=64)
    with pytest.raises(ValueError, match="dtype=torch.float16"):
        replace_linears(model, "q_proj", dtype=torch.float16)
    replace_linears(model, r=2, lora_alpha=3, compute_dtype=torch.float32)
    assert torch.equal(model(input_ids=ids).logits, wanted)
    for name, (weight, absmax) in before.items():
        layer = model.get_submodule(name)
        assert type(layer) is NF4LoRALinear and layer.weight is weight and layer.weight_absmax is absmax
        assert (layer.r, layer.scaling, layer.quant_type, layer.compute_dtype) == (2, 1.5, "fp4", torch.float32)
    model(input_ids=ids, labels=ids).loss.backward()
    assert {n for n, p in model.named_parameters() if n.endswith(("lora_A", "lora_B")) and p.grad is not None} == {
        f"{name}.lora_{x}" for name in before for x in "AB"
    }


@pytest.mark.parametrize("targets", [["q_prj"], ["q_proj", "qproj"], "proj", ["mlp"], ["embed_tokens"], [""], ["lm_head", "norm"]])
def test_unknown_names(targets):
    model = tiny_llama()
    unknown = [t for t in ([targets] if isinstance(targets, str) else targets) if t not in ("q_proj", "lm_head")]
    with refuses(model, ValueError, "target_modules: found no linear named", str(unknown), "'q_proj'", "'down_proj'", "'lm_head'"):
        replace_linears(model, targets, r=2)


def test_nothing_to_replace():
    for model in (nn.Sequential(nn.ReLU()), nn.Sequential(NF4LoRALinear(4, 4, r=2)), nn.ModuleDict({"lm_head": nn.Linear(4, 4)})):
        with refuses(model, ValueError, "found no torch.nn.Linear to replace", "['lm_head']"):
            replace_linears(model)
    with refuses(model := nn.Sequential(nn.Linear(4, 4)), ValueError, "found no torch.nn.Linear to replace"):
        replace_linears(model, [])


def test_bare_linear():
    linear = nn.Linear(4, 4)
    with refuses(linear, ValueError, "found a bare Linear", "use NF4LoRALinear.from_linear(linear)"):
        replace_linears(linear)
    with refuses(linear, ValueError, "use NF4Linear.from_linear(linear)"):
        replace_linears(linear, layer=NF4Linear)


def test_shared_weights():
    model = tiny_llama(tie=True)
    with refuses(model, ValueError, "lm_head: found its weight shared", "exclude 'lm_head'"):
        replace_linears(model, exclude=(), r=2)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[1].weight
    with refuses(model, ValueError, "1: found its weight shared", "exclude '1'"):
        replace_linears(model, r=2)
    # One module under two names.
    linear = nn.Linear(4, 4)
    model = nn.Sequential(linear, nn.ReLU(), linear)
    with refuses(model, ValueError, "0: found its weight shared"):
        replace_linears(model, r=2)
    with refuses(model, ValueError, "2: found its weight shared"):
        replace_linears(model, ["2"], r=2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weight_not_finite(bad):
    model = tiny_llama()
    last = model.model.layers[1].mlp.down_proj
    with torch.no_grad():
        last.weight[2, 3] = bad
    with refuses(model, ValueError, "model.layers.1.mlp.down_proj.weight: found 1 NaN or Inf of 1536", f"({bad}) at (2, 3)"):
        replace_linears(model, r=2)
    assert replaced(replace_linears(model, exclude=("lm_head", "1.mlp.down_proj"), r=2))


def test_weight_not_finite_after_the_cast():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[1].weight[0, 1] = 1e6
    with refuses(model, ValueError, "1.weight: found 1 NaN or Inf", "(inf) at (0, 1)"):
        replace_linears(model, r=2, dtype=torch.float16)
    assert replaced(replace_linears(model, r=2))


def test_weight_of_another_dtype_or_nowhere():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).double())
    with refuses(model, TypeError, "1.weight: found torch.float64", "torch.bfloat16", "exclude '1' or give dtype="):
        replace_linears(model, r=2)
    assert replaced(replace_linears(copy.deepcopy(model), r=2, dtype=torch.float32)) == {"0", "1"}
    model[1].weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with refuses(model, TypeError, "1.weight: found torch.uint8"):
        replace_linears(model, r=2)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta"))
    with refuses(model, ValueError, "1: found its weight on the meta device", "load the model"):
        replace_linears(model, r=2)


@pytest.mark.parametrize(
    ("options", "error", "word"),
    [
        ({"r": -1}, ValueError, "r: found -1"),
        ({"lora_alpha": 0}, ValueError, "lora_alpha: found 0"),
        ({"lora_dropout": 1}, ValueError, "lora_dropout: found 1"),
        ({"blocksize": 48}, ValueError, "blocksize: found 48"),
        ({"quant_type": "int4"}, ValueError, "quant_type: found 'int4'"),
        ({"compute_dtype": torch.float64}, TypeError, "compute_dtype: found torch.float64"),
        ({"dtype": torch.float64}, TypeError, "found torch.float64"),
        ({"rank": 4}, TypeError, "rank"),
    ],
)
def test_wrong_options(options, error, word):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(error, match=word):
        replace_linears(model, **options)
    assert not replaced(model)


def test_attention_of_torch():
    """nn.MultiheadAttention reads its out_proj's weight and never calls it, so it stays dense."""
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "up": nn.Linear(8, 8)})
    replace_linears(model, r=2)
    assert replaced(model) == {"up"}
    x = torch.randn(3, 1, 8)
    assert model["attention"](x, x, x)[0].shape == (3, 1, 8)
    with refuses(model := nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "up": nn.Linear(8, 8)}), ValueError, "['out_proj']", "['up']"):
        replace_linears(model, "out_proj", r=2)


def test_subclasses_and_frozen_models():
    class Mine(nn.Linear):
        pass

    model = nn.Sequential(Mine(4, 4), nn.Linear(4, 4)).eval().requires_grad_(False)
    replace_linears(model, r=2)
    assert replaced(model) == {"0", "1"} and not model[0].training
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {f"{i}.lora_{k}" for i in (0, 1) for k in "AB"}
