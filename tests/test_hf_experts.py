"""Experts of transformers' models in 4 bits: their bytes, their products, what they leave in 16 bits, and the way through the loader."""

import copy
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.utils.checkpoint
import transformers
from safetensors import safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import nf4lora.hf
from nf4lora import QuantState, dequantize_4bit, quantize_4bit
from nf4lora.hf import NF4Config
from nf4lora.hf import experts as hf_experts
from nf4lora.backends import use_backend
from nf4lora.nn import expert_layers
from nf4lora.nn.expert_layers import NF4DecodedExperts, NF4RoutedExperts, as_experts, expert_stacks
from nf4lora.nn.experts import NF4Experts

E, H, I, TOP = 5, 64, 32, 2
SIZES = dict(
    num_experts=E, num_local_experts=E, n_routed_experts=E, moe_num_experts=E, hidden_size=H, intermediate_size=I, expert_ffn_hidden_size=I,
    moe_intermediate_size=I, hidden_act="silu", mlp_hidden_act="relu2", moe_latent_size=None, zero_expert_num=1, swiglu_alpha=1.7,
    swiglu_limit=7.0, moe_hidden_size=H, post_norm_eps=1e-6, _experts_implementation="eager",
)  # fmt: skip
ROUTED = {
    "plain": Qwen3MoeExperts,
    "deepseek": DeepseekV3Experts,
    "transposed": AriaExperts,
    "transposed, interleaved, biases": GptOssExperts,
    "no gate": NemotronHExperts,
    "a norm after each": MuseSparkExperts,
}
OWN = {"bmm": Llama4TextExperts, "loop": LongcatFlashExperts}


def module(cls, dtype=torch.float32, seed=0, **changes):
    """An experts module with drawn weights, biases included."""
    made = cls(SimpleNamespace(**{**SIZES, **changes})).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for p in made.parameters():
        p.data = torch.randn(p.shape, generator=generator).div(8).to(dtype)
    return made


def operands(cls, tokens=13, dtype=torch.float32, seed=1):
    """What its forward takes. No token is sent to expert 1."""
    generator = torch.Generator().manual_seed(seed)
    if cls is Llama4TextExperts:
        return (torch.randn(E * 3, H, generator=generator).to(dtype),)
    index = torch.stack([torch.randperm(E - 1, generator=generator)[:TOP] for _ in range(tokens)])
    index[index == 1] = E - 1
    return torch.randn(tokens, H, generator=generator).to(dtype), index, torch.rand(tokens, TOP, generator=generator).to(dtype)


def pair(cls, dtype=torch.float32, **options):
    """The quantized module, and a dense one of the class it was, holding the decoded stacks."""
    four = as_experts(module(cls, dtype), **options).quantize_()
    return four, copy.deepcopy(four).dense_()


def learn(m, given):
    """Output and gradients of the float operands of one step."""
    given = [t.clone().requires_grad_() if t.is_floating_point() else t for t in given]
    y = m(*given)
    (y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return [y, *(t.grad for t in given if t.is_floating_point())]


def parts(m, name, e):
    """What quantize_4bit would return for one expert, read from the module's parameters."""
    rows = [getattr(m, key)[e] for key in m.names_of(name)]
    absmax, *nested = (t if t.dtype == torch.uint8 else t.view(torch.float32) for t in rows[1:])
    nested_absmax, offset = nested or (None, None)
    return rows[0], QuantState(absmax, m.stacks[name][1:], m.weight_dtype, m.blocksize, m.quant_type, offset, nested_absmax)


class OddExperts(nn.Module):
    """A forward of its own, and sizes that end in half a byte."""

    def __init__(self, shape=(3, 5, 7)):
        super().__init__()
        self.first = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        return torch.stack([x @ self.first[e].T for e in range(len(self.first))])


@pytest.mark.parametrize("options", [{}, {"double_quant": False}, {"quant_type": "fp4", "blocksize": 32}], ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 96, 100)])  # half a byte left over; more than 256 blocks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_expert_is_what_quantize_4bit_gives(shape, dtype, options):
    dense = OddExperts(shape).to(dtype)
    m = as_experts(copy.deepcopy(dense), **options).quantize_()
    for e, weight in enumerate(dense.first.detach()):
        packed, state = quantize_4bit(weight, m.blocksize, m.double_quant, m.quant_type)
        found, found_state = parts(m, "first", e)
        assert torch.equal(found, packed.view(-1)) and found_state == state
        assert torch.equal(m.dequantize_expert("first", e), dequantize_4bit(packed, state))
        assert torch.equal(m.dequantize("first")[e], dequantize_4bit(packed, state))
    assert m.dequantize("first").dtype == dtype
    assert not any(p.is_floating_point() or p.requires_grad for p in m.parameters())


@pytest.mark.parametrize("options", [{}, {"double_quant": False, "blocksize": 128}, {"quant_type": "fp4"}], ids=str)
@pytest.mark.parametrize("name", [*ROUTED, *OWN])
def test_output_and_gradients_are_those_of_the_class_on_the_decoded_weights(name, options):
    cls = {**ROUTED, **OWN}[name]
    four, dense = pair(cls, **options)
    assert isinstance(four, cls) and isinstance(four, NF4RoutedExperts if name in ROUTED else NF4DecodedExperts)
    assert type(dense) is cls and set(dense.state_dict()) == set(module(cls).state_dict())
    for found, wanted in zip(learn(four, operands(cls)), learn(dense, operands(cls)), strict=True):
        assert found.dtype == wanted.dtype and found.abs().max() > 0
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ROUTED)
def test_16_bits_are_no_worse_than_the_class_itself(name):
    """Against float32 arithmetic on the same decoded weights; the class rounds a token's sum once an expert, we once."""
    cls = ROUTED[name]
    four, dense = pair(cls, torch.bfloat16)
    given = operands(cls, tokens=64, dtype=torch.bfloat16)
    truth = copy.deepcopy(four).dense_(torch.float32).float()(*[t.float() if t.is_floating_point() else t for t in given])
    error, usual = ((m(*given).float() - truth).square().mean().sqrt() for m in (four, dense))
    assert four(*given).dtype == torch.bfloat16 and 0 < error <= 1.25 * usual


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cls", [Qwen3MoeExperts, AriaExperts, NemotronHExperts])
def test_small_integers_come_out_to_the_bit(cls, dtype, double_quant):
    """Weights -1, 0, 1 and a block's largest always 1 decode exactly; every sum and product is exact in 8 bits."""
    m = module(cls, dtype)
    generator = torch.Generator().manual_seed(2)
    for p in m.parameters():
        kept = torch.rand(p.shape, generator=generator) < 0.1
        p.data = (torch.randint(-1, 2, p.shape, generator=generator) * kept).to(dtype)
        p.data.view(-1, 64)[:, 0] = 1
    m.act_fn = nn.Identity()
    up, down = (getattr(m, n).detach().double() for n in expert_stacks(m))
    up, down = (w.mT if cls is AriaExperts else w for w in (up, down))
    x, index, _ = operands(cls, tokens=40)
    x = torch.randint(-1, 2, x.shape, generator=generator).to(dtype) * (torch.rand(x.shape, generator=generator) < 0.5)
    weights = torch.randint(1, 3, index.shape, generator=generator).to(dtype)
    wanted = torch.zeros(x.shape, dtype=torch.float64)
    for t, k in ((t, k) for t in range(40) for k in range(TOP)):
        h = up[index[t, k]] @ x[t].double()
        h = h[:I] * h[I:] if h.numel() == 2 * I else h
        wanted[t] += weights[t, k].double() * (down[index[t, k]] @ h)
    assert wanted.abs().max() < 256 and wanted.count_nonzero() > 500
    y = as_experts(m, double_quant=double_quant).quantize_()(x, index, weights)
    assert y.dtype == dtype and torch.equal(y.double(), wanted)


@pytest.mark.parametrize("name", ROUTED)
def test_no_expert_is_decoded_and_autograd_keeps_no_weight(name, monkeypatch):
    four, _ = pair(ROUTED[name])
    monkeypatch.setattr(NF4Experts, "dequantize_expert", None)
    saved = []
    given = [t.requires_grad_() if t.is_floating_point() else t for t in operands(ROUTED[name], tokens=3)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = four(*given)
    y.sum().backward()
    assert given[0].grad.abs().sum() > 0
    kept = {t.untyped_storage().data_ptr() for t in saved if t.dtype == torch.uint8}
    assert {getattr(four, n).untyped_storage().data_ptr() for n in four.stacks} <= kept  # the codes, where they lie
    assert max(t.untyped_storage().nbytes() for t in saved if t.is_floating_point()) < H * I * 4


@pytest.mark.parametrize("name", ["plain", "transposed"])
def test_gradients_in_float64(name):
    """The reference alone computes in float64; a backward follows the back end that its forward was forced to."""
    four, _ = pair(ROUTED[name])
    x, bias = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((3, H), (2 * I,)))
    with use_backend("reference"):
        y = four.expert_linear(x, "gate_up_proj", 2, bias)
        assert torch.autograd.gradcheck(lambda *t: four.expert_linear(t[0], "gate_up_proj", 2, t[1]), (x, bias))
    weight = four.dequantize("gate_up_proj", torch.float32)[2].double()
    weight = weight.T if name == "transposed" else weight
    torch.testing.assert_close(y, x @ weight.T + bias, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], weight.sum(0).expand(3, H), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", OWN)
def test_a_forward_of_its_own_keeps_no_decoded_stack_for_the_backward(name, monkeypatch):
    four, dense = pair(OWN[name])
    decoded, real = [], NF4Experts.dequantize_expert
    monkeypatch.setattr(NF4Experts, "dequantize_expert", lambda m, n, e, d=None: decoded.append((n, e)) or real(m, n, e, d))
    given = [t.requires_grad_() if t.is_floating_point() else t for t in operands(OWN[name])]
    saved = []
    recipe = expert_layers._Decoded.recipe

    def seen(self, t):
        saved.append(recipe(self, t) or t)
        return recipe(self, t)

    monkeypatch.setattr(expert_layers._Decoded, "recipe", seen)
    y = four(*given)
    held = [t for t in saved if isinstance(t, torch.Tensor)]
    assert len(held) < len(saved) and max(t.untyped_storage().nbytes() for t in held) < H * I * 4
    forward = len(decoded)
    y.sum().backward()
    assert set(decoded[forward:]) <= set(decoded[:forward])
    if name == "loop":  # expert 1 was not asked, so nobody needs it again
        assert ("gate_up_proj", 1) in decoded[:forward] and ("gate_up_proj", 1) not in decoded[forward:]
    dense(*operands(OWN[name])).sum()
    with torch.no_grad():
        torch.testing.assert_close(four(*given), dense(*given))


@pytest.mark.parametrize("name", OWN)
def test_a_forward_of_its_own_is_checkpointed_like_any_other(name):
    """Bytes the graph holds under checkpointing, whose hooks see what is saved within."""
    four, dense = pair(OWN[name])
    held = {}
    for module in (four, dense):
        given = [t.requires_grad_() if t.is_floating_point() else t for t in operands(OWN[name])]
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.nbytes) or t, lambda t: t):
            y = torch.utils.checkpoint.checkpoint(module, *given, use_reentrant=False)
        wanted = torch.autograd.grad(module(*given).sum(), given[0])[0]
        torch.testing.assert_close(torch.autograd.grad(y.sum(), given[0])[0], wanted)
        held[module] = sum(kept)
    assert held[four] == held[dense]


def test_every_class_of_experts_without_a_decorator_goes_through_its_own_forward():
    m = OddExperts()
    four = as_experts(copy.deepcopy(m), double_quant=False).quantize_()
    x = torch.randn(4, 7)
    wanted = torch.stack([x @ w.T for w in four.dequantize("first")])
    torch.testing.assert_close(four(x), wanted)
    jet = JetMoeParallelExperts(3, 8, 64)
    nn.init.normal_(jet.weight)
    jet = as_experts(jet).quantize_()
    assert jet(torch.randn(6, 8), [1, 2, 3]).shape == (6, 64)


def test_an_index_past_the_last_expert_and_no_token_at_all_add_nothing():
    four, dense = pair(Qwen3MoeExperts)
    x, index, weights = operands(Qwen3MoeExperts)
    index[::2, 1] = E
    torch.testing.assert_close(four(x, index, weights), dense(x, index, weights))
    assert torch.equal(four(x[:12].view(3, 4, H), index[:12], weights[:12]), four(x[:12], index[:12], weights[:12]).view(3, 4, H))
    assert torch.equal(four(x[:0], index[:0], weights[:0]), x[:0])
    index[:] = E
    assert not four(x, index, weights).any()


@pytest.mark.parametrize("name", ["plain", "transposed", "bmm"])
def test_dtypes(name):
    """compute_dtype and autocast decide what is computed in; the output has the dtype that the class gives."""
    cls = {**ROUTED, **OWN}[name]
    given, (four, dense) = operands(cls), pair(cls)
    wanted = dense(*given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, usual = four(*given), dense(*given)
    assert mixed.dtype == usual.dtype
    four.compute_dtype = torch.bfloat16
    assert four(*given).dtype == torch.float32
    for y in (mixed, four(*given)):
        assert not torch.equal(y, wanted)
        assert (y - wanted).norm() < 0.02 * wanted.norm()
    x, *routing = given
    assert four(x.bfloat16(), *routing).dtype == torch.bfloat16  # weights of a router are often float32


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", [*ROUTED, *OWN])
def test_gradient_checkpointing(name, reentrant):
    cls = {**ROUTED, **OWN}[name]
    four, _ = pair(cls)
    wanted = learn(four, operands(cls))
    found = learn(lambda *given: checkpoint(four, *given, use_reentrant=reentrant), operands(cls))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", ["plain", "transposed, interleaved, biases", "bmm"])
def test_compiled_it_computes_the_same(name):
    cls = {**ROUTED, **OWN}[name]
    four, _ = pair(cls)
    wanted = learn(four, operands(cls))
    torch._dynamo.reset()
    for found, right in zip(learn(torch.compile(four, backend="aot_eager"), operands(cls)), wanted, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("name", ["transposed, interleaved, biases", "bmm"])
def test_state_dict_copies_and_casts(name, double_quant):
    cls = {**ROUTED, **OWN}[name]
    four, _ = pair(cls, double_quant=double_quant)
    given, state = operands(cls), four.state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    fresh = as_experts(module(cls, seed=5), double_quant=double_quant).quantize_()
    fresh.load_state_dict(torch.load(file))
    empty = as_experts(module(cls).to("meta"), double_quant=double_quant).expect_()
    empty.load_state_dict(state, assign=True)
    pickled = io.BytesIO()
    torch.save(four, pickled)
    pickled.seek(0)
    for other in (fresh, empty, copy.deepcopy(four), torch.load(pickled, weights_only=False)):
        assert type(other) is type(four) and all(torch.equal(v, state[k]) for k, v in other.state_dict().items())
        assert torch.equal(other(*given), four(*given))
    before = {k: v.clone() for k, v in state.items() if not v.is_floating_point()}
    four.to(torch.float16).to(torch.float32).half()
    assert all(torch.equal(v, before[k]) for k, v in four.state_dict().items() if k in before)


def test_a_state_dict_that_lacks_a_part_or_says_another_format_is_refused_whole():
    four, _ = pair(Qwen3MoeExperts)
    state, other = four.state_dict(), as_experts(module(Qwen3MoeExperts, seed=5)).quantize_()
    before = {k: v.clone() for k, v in other.state_dict().items()}
    short = {k: v for k, v in state.items() if k != "down_proj_absmax"}
    with pytest.raises(RuntimeError, match="missing down_proj_absmax"):
        other.load_state_dict(short, strict=False)
    with pytest.raises(RuntimeError, match=r"gate_up_proj is torch.float32 \[5, 2048\], wanted torch.uint8"):
        other.load_state_dict({**state, "gate_up_proj": state["gate_up_proj"].float()})
    with pytest.raises(RuntimeError, match="saved from .*'fp4'"):
        other.load_state_dict(as_experts(module(Qwen3MoeExperts), quant_type="fp4").quantize_().state_dict())
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


def test_bad_input():
    m = module(Qwen3MoeExperts)
    m.down_proj.data[3, 1, 2] = float("nan")
    model = nn.ModuleDict({"block": nn.ModuleDict({"experts": m, "other": module(Qwen3MoeExperts)})})
    with pytest.raises(ValueError, match=r"block.experts.down_proj: .*1 .*\(3, 1, 2\)"):
        hf_experts.quantize_experts_(model)
    assert type(m) is Qwen3MoeExperts and type(model.block.other) is Qwen3MoeExperts
    with pytest.raises(ValueError, match=r"down_proj, expert 3: "):
        as_experts(m).quantize_()
    with pytest.raises(ValueError, match=r"gate_up_proj: found shape \(5, 64, 32\), wanted \(5, 64, 64\)"):
        m.quantized("gate_up_proj", torch.zeros(E, H, I))
    with pytest.raises(TypeError, match="wanted a module of experts"):
        as_experts(nn.Linear(4, 4))
    with pytest.raises(TypeError, match="gate_up_proj: found torch.float64"):
        as_experts(module(Qwen3MoeExperts).double())
    with pytest.raises(TypeError, match="compute_dtype: found torch.int32"):
        as_experts(module(Qwen3MoeExperts), compute_dtype=torch.int32)
    with pytest.raises(ValueError, match="blocksize: found 48"):
        as_experts(module(Qwen3MoeExperts), blocksize=48)
    with pytest.raises(ValueError, match="meta device"):
        hf_experts.quantize_experts_(nn.ModuleDict({"experts": module(Qwen3MoeExperts).to("meta")}))
    four, _ = pair(Qwen3MoeExperts)
    x, index, weights = operands(Qwen3MoeExperts)
    with pytest.raises(ValueError, match=r"found x of shape \(\d+, 63\), wanted \[..., 64\]"):
        four(x[:, :63], index, weights)
    with pytest.raises(ValueError, match=r"top_k_weights: found shape \(13, 1\), wanted \(13, 2\)"):
        four(x, index, weights[:, :1])
    with pytest.raises(RuntimeError, match="gate_up_proj: found torch.float32, wanted 4-bit codes"):
        as_experts(module(Qwen3MoeExperts))(x, index, weights)


TEXT = {**tiny._TEXT, "tie_word_embeddings": False}
MOE = dict(num_experts_per_tok=2, moe_intermediate_size=32)
CONFIGS = {
    "mixtral": lambda: transformers.MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2),
    "gpt_oss": lambda: transformers.GptOssConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **{**TEXT, "num_key_value_heads": 4, "head_dim": 8}, **MOE, n_routed_experts=4, n_group=2, topk_group=2, q_lora_rank=32,
        kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, first_k_dense_replace=1,
    ),
    "llama4_text": lambda: transformers.Llama4TextConfig(
        **TEXT, num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=96, attention_chunk_size=32,
    ),
}  # fmt: skip


def built(name, dtype=torch.float32):
    if name == "qwen3_moe":
        return tiny.qwen3_moe(dtype=dtype)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]()).to(dtype).eval()
    for n, p in model.named_parameters():  # Llama 4 and GPT-OSS start some at zero
        p.data = p.data if p.data.any() else torch.randn(p.shape).mul(0.02).to(dtype)
    return model


def experts_of(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, NF4Experts)}


def keys_of(folder):
    found = set()
    for file in Path(folder).glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found |= set(tensors.keys())
    return found


@pytest.mark.parametrize("name", ["qwen3_moe", *CONFIGS])
def test_through_from_pretrained_and_back(name, tmp_path):
    """Quantized on load, bit for bit from the checkpoint's tensors; saved and loaded again; dense again, under the names it came by."""
    source, tokens = built(name), tiny.tokens()
    source.save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=NF4Config(), dtype=torch.float32)
    original, stacks = dict(source.named_modules()), experts_of(model)
    assert len(stacks) == (1 if name == "deepseek_v3" else 2)
    for path, m in stacks.items():
        wanted = as_experts(copy.deepcopy(original[path])).quantize_().state_dict()
        assert wanted.keys() == m.state_dict().keys()
        assert all(torch.equal(v, wanted[k]) for k, v in m.state_dict().items())
    with torch.no_grad():
        logits = model(tokens).logits
    model.save_pretrained(tmp_path / "four")
    saved = [key for key in keys_of(tmp_path / "four") if ".experts." in key]
    assert len(saved) == len([key for key in model.state_dict() if ".experts." in key])  # none is cut into its experts
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "four")
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "four").dequantize(torch.float32)
    dense.set_experts_implementation("eager")
    assert not experts_of(dense)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, logits)
        torch.testing.assert_close(dense(tokens).logits, logits, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(source(tokens).logits, logits, atol=1e-4)
    dense.save_pretrained(tmp_path / "dense again")
    assert keys_of(tmp_path / "dense again") == keys_of(tmp_path / "dense")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense again")
    plain.set_experts_implementation("eager")
    with torch.no_grad():
        assert torch.equal(plain(tokens).logits, dense(tokens).logits)


def test_what_stays_in_16_bits_is_reported_to_the_byte(tmp_path, monkeypatch):
    source = tiny.qwen3_moe()
    left = hf_experts.left_in_16_bits(source)
    assert sum(left.values()) == sum(p.numel() * 2 for p in source.parameters() if p.ndim > 1)
    assert hf_experts.quantize_experts_(source, skip=["model.layers.1"]) == ["model.layers.0.mlp.experts"]
    assert left.keys() - hf_experts.left_in_16_bits(source).keys() == {
        "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"
    }  # fmt: skip
    assert hf_experts.left_in_16_bits(source)["model.layers.1.mlp.experts.down_proj"] == 4 * 64 * 32 * 2
    tiny.qwen3_moe().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=NF4Config())
    assert hf_experts.left_in_16_bits(model) == {
        "model.embed_tokens.weight": 128 * 64 * 2, "lm_head.weight": 128 * 64 * 2,
        "model.layers.0.mlp.gate.weight": 4 * 64 * 2, "model.layers.1.mlp.gate.weight": 4 * 64 * 2,
    }  # fmt: skip
    log = []
    monkeypatch.setattr(hf_experts.logger, "warning", log.append)
    AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=NF4Config())
    assert not log
    skipped = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=NF4Config(modules_to_not_convert=["mlp.experts"]))
    stacks = 2 * 4 * (64 * 64 + 64 * 32) * 2
    assert len(log) == 1 and log[0].startswith(f"{stacks:,} bytes in 4 stacks of weights stay in torch.bfloat16, model.layers.")
    assert not experts_of(skipped)
    assert sum(b for n, b in hf_experts.left_in_16_bits(skipped).items() if "experts" in n) == 2 * 4 * (64 * 64 + 64 * 32) * 2
    assert list(hf_experts.left_in_16_bits(skipped).values()) == sorted(hf_experts.left_in_16_bits(skipped).values(), reverse=True)
    tied = hf_experts.left_in_16_bits(tiny.llama(tie_word_embeddings=True))
    assert tied["model.embed_tokens.weight"] == 128 * 64 * 2 and "lm_head.weight" not in tied
    conv = nn.ModuleDict({"conv": nn.Conv1d(4, 4, 3), "oss": as_experts(module(GptOssExperts)).quantize_()})
    assert not hf_experts.quantize_experts_(conv)
    assert hf_experts.left_in_16_bits(conv) == {
        "conv.weight": 48 * 4, "oss.gate_up_proj_bias": E * 2 * I * 4, "oss.down_proj_bias": E * H * 4
    }  # fmt: skip


def test_lora_on_the_attention_learns_and_on_a_stack_of_experts_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    from nf4lora.hf import peft_dispatch

    peft_dispatch.install()
    tiny.qwen3_moe().save_pretrained(tmp_path)

    def adapted(**asked):
        base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=NF4Config())
        return peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=32, **asked))

    model = adapted(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    model.base_model.model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    tokens, losses = tiny.tokens(), []
    for _ in range(8):
        losses.append(model.train()(tokens, labels=tokens).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.2
    # peft takes the v4 names of experts for the stacks they are in now, and "all-linear" for those too
    for asked in ({"target_parameters": ["mlp.experts.gate_up_proj"]}, {"target_modules": ["gate_proj", "up_proj"]}):
        with pytest.raises(ValueError, match=r"experts\..*_proj: found a stack of experts in 4 bits.*target_modules="):
            adapted(**asked)
    with pytest.warns(UserWarning, match="8 linears get an adapter; .*experts.gate_up_proj and 3 more stacks"):
        everywhere = adapted(target_modules="all-linear")
    assert {name.split(".")[-4] for name, p in everywhere.named_parameters() if p.requires_grad} == {
        "q_proj", "k_proj", "v_proj", "o_proj"
    }  # fmt: skip
    everywhere.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=NF4Config())
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(again(tokens).logits, everywhere.eval()(tokens).logits)
    with pytest.raises(ValueError, match="modules_to_save: found model.layers.0.mlp.experts in 4 bits"):
        adapted(target_modules=["q_proj"], modules_to_save=["experts"])


def test_the_config_of_a_saved_model_says_how_its_experts_are_decoded(tmp_path):
    tiny.qwen3_moe().save_pretrained(tmp_path / "dense")
    options = dict(quant_type="fp4", blocksize=128, double_quant=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=nf4lora.hf.NF4Config(**options))
    model.save_pretrained(tmp_path / "four")
    assert json.loads((tmp_path / "four" / "config.json").read_text())["quantization_config"]["quant_type"] == "fp4"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "four")
    for m in experts_of(again).values():
        assert (m.quant_type, m.blocksize, m.double_quant) == ("fp4", 128, False)
    with torch.no_grad():
        assert torch.equal(again(tiny.tokens()).logits, model(tiny.tokens()).logits)


@pytest.mark.parametrize("pre_quantized", [True, False])
def test_before_loading_a_stack_has_the_dtype_of_what_is_read(pre_quantized):
    """transformers before 5.18 casts the checkpoint to it, and floats cast to uint8 are zeros."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(tiny.qwen3_moe().config)
    names = hf_experts.prepare_experts(model, NF4Config(), ["model.layers.0"], pre_quantized)
    assert names == ["model.layers.1.mlp.experts"]
    m = model.get_submodule(names[0])
    assert hf_experts.holds(m, "down_proj") and not hf_experts.holds(m, "down_proj_absmax") and m._is_hf_initialized
    assert m.down_proj.is_floating_point() != pre_quantized and m.down_proj.is_meta
    assert list(m.down_proj.shape) == ([4, 64 * 32 // 2] if pre_quantized else [4, 64, 32])
    assert m.down_proj_absmax.dtype == torch.uint8 and m.down_proj_nested_offset.dtype == torch.int32
