"""Merging adapters of every kind into the decoded weights, taking them out again to the bit, and merging back into 4 bits."""

import copy
import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import safetensors.torch
import tiny
import torch
import transformers
from peft import LoraConfig, OFTConfig, PromptTuningConfig, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from nf4lora import NF4Linear, NF4LoRALinear, replace_linears
from nf4lora.hf import NF4Config, peft_dispatch, save_merged
from nf4lora.hf.decoded import DecodedLinear
from nf4lora.hf.merging import merge_and_unload, merge_in_4bit_

sys.path.append(str(Path(__file__).parents[1]))
from bench import tuners  # noqa: E402

peft_dispatch.install()
pytestmark = pytest.mark.filterwarnings("ignore:.*")  # peft's, of many kinds
TOKENS = tiny.tokens()
TARGETS = ["q_proj", "v_proj", "down_proj"]
LORA = {"target_modules": TARGETS, "r": 4}

TUNERS = {name: config for name, config in tuners.TUNERS.items() if name not in tuners.PROMPTS + tuners.FAIL}


def base(dtype=torch.float32, model=None, **kwargs):
    model = tiny.llama(dtype=dtype, **kwargs) if model is None else model
    return replace_linears(model, layer=NF4Linear).requires_grad_(False)


def learned(config, model=None, seed: int = 0, scale: float = 0.03, **kwargs):
    """A peft model, as if trained."""
    torch.manual_seed(seed)
    model = get_peft_model(base() if model is None else model, copy.deepcopy(config), **kwargs)
    for p in [p for p in model.parameters() if p.requires_grad]:
        p.data.add_(torch.randn_like(p) * scale)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def error(found, wanted) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def integers(model) -> dict:
    return {n: p.clone() for n, p in model.named_parameters() if not p.is_floating_point()}


@pytest.mark.parametrize("name", TUNERS)
def test_merging_is_right_and_unmerging_exact(name, figures):
    plain, model = logits(base()), learned(TUNERS[name])
    wanted, packed = logits(model), integers(model)
    assert error(wanted, plain) > 1e-3
    model.merge_adapter()
    assert name == "LN tuning" or any(isinstance(m, DecodedLinear) for m in model.modules())
    beside = error(logits(model), wanted)
    model.unmerge_adapter()
    assert logits(model).equal(wanted)
    after = integers(model)
    assert after.keys() == packed.keys() and all(p.equal(packed[n]) for n, p in after.items())
    model.merge_adapter()
    with model.disable_adapter():  # peft unmerges here
        assert logits(model).equal(plain)
    assert logits(model).equal(wanted)
    merged = merge_and_unload(model, torch.float32)
    alone = error(logits(merged), wanted)
    figures[f"merged against unmerged, parts in 1e9: {name}"] = round(1e9 * max(beside, alone))
    assert beside <= 1e-6 and alone <= 1e-6
    assert {type(m) for m in merged.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    assert not integers(merged)


@pytest.mark.parametrize("name", [name for name in TUNERS if name != "LN tuning"])
def test_a_layer_merges_by_itself(name):
    model = learned(TUNERS[name])
    layer = next(m for m in model.modules() if isinstance(m, BaseTunerLayer))
    x, packed = torch.randn(3, layer.get_base_layer().in_features), layer.get_base_layer()
    with torch.no_grad():
        wanted, before = layer(x), integers(packed)
        layer.merge(safe_merge=True)
        torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-5)
        layer.unmerge()
        assert layer.get_base_layer() is packed and layer(x).equal(wanted)
    assert all(p.equal(before[n]) for n, p in integers(packed).items())


def test_merged_weights_are_rounded_once():
    """In the base's 16 bits what one rounding of the decoded weight and the change, both float32, gives."""
    for dtype, ask in ((torch.bfloat16, None), (torch.bfloat16, torch.float16), (torch.float32, torch.bfloat16)):
        model = learned(TUNERS["rsLoRA"], base(dtype))
        expected, frequencies = {}, model.base_model.model.model.rotary_emb.inv_freq
        for name, m in model.base_model.model.named_modules():
            if isinstance(m, BaseTunerLayer):
                A, B = m.lora_A["default"].weight, m.lora_B["default"].weight
                expected[name] = m.base_layer.dequantize(torch.float32) + (B @ A) * m.scaling["default"]
            elif isinstance(m, NF4Linear):
                expected.setdefault(name.removesuffix(".base_layer"), m.dequantize(torch.float32))
        merged = model.merge_and_unload() if ask is None else merge_and_unload(model, ask)
        assert len(expected) == 14
        for name, weight in expected.items():
            assert merged.get_submodule(name).weight.equal(weight.to(ask or dtype)), name
        assert {p.dtype for p in merged.parameters()} == {ask or dtype} and merged.config.dtype == (ask or dtype)
        assert merged.model.rotary_emb.inv_freq is frequencies  # of float32 in models of any dtype
        assert logits(merged).isfinite().all()


def test_what_is_merged_like_our_own_layer_merges():
    model = learned(TUNERS["LoRA"], base(torch.bfloat16))
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    ours = NF4LoRALinear.from_linear(layer.base_layer, r=4, lora_alpha=8)
    ours.lora_A.data, ours.lora_B.data = layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data
    assert model.merge_and_unload().model.layers[0].mlp.up_proj.weight.equal(ours.merge().weight)


@pytest.mark.parametrize(
    "config",
    [LoraConfig(**LORA), LoraConfig(use_dora=True, **LORA), OFTConfig(target_modules=TARGETS, r=0, oft_block_size=16)],
)
def test_several_adapters(config):
    model = learned(config)
    model.add_adapter("b", copy.deepcopy(config))
    for p in [p for name, p in model.named_parameters() if ".b." in name or name.endswith(".b")]:
        p.data.add_(torch.randn_like(p) * 0.03)
    first, packed = logits(model), integers(model)
    model.base_model.set_adapter(["default", "b"])
    both = logits(model)
    dense = learned(config, decoded())
    dense.add_adapter("b", copy.deepcopy(config))
    dense.load_state_dict(
        {n: p for n, p in model.state_dict().items() if n in dense.state_dict() and p.is_floating_point()}, strict=False
    )
    for m in (model, dense):
        m.base_model.set_adapter(["default", "b"])
        m.merge_adapter()
    assert error(logits(model), logits(dense)) <= 1e-6  # for DoRA and OFT peft's merge of two is not its sum of two
    assert type(config) is not LoraConfig or config.use_dora or error(logits(model), both) <= 1e-6
    model.unmerge_adapter()
    assert logits(model).equal(both)
    model.merge_adapter(adapter_names=["default"])
    assert error(logits(model), first) <= 1e-6
    model.merge_adapter(adapter_names=["b"])
    model.unmerge_adapter()
    assert logits(model).equal(both) and all(p.equal(packed[n]) for n, p in integers(model).items())
    assert error(logits(merge_and_unload(model, torch.float32, adapter_names=["default"])), first) <= 1e-6


@pytest.mark.parametrize("config", [TUNERS["IA3"], LoraConfig(lora_bias=True, target_modules=["q_proj", "v_proj"])])
def test_biases_are_merged_and_come_back(config):
    model = tiny.llama(dtype=torch.float32, attention_bias=True)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p, std=0.1)
    model = learned(config, base(model=model))
    wanted, before = logits(model), {n: p.clone() for n, p in model.named_parameters()}
    model.merge_adapter()
    assert error(logits(model), wanted) <= 1e-6
    model.unmerge_adapter()
    assert logits(model).equal(wanted) and all(p.equal(before[n]) for n, p in model.named_parameters())
    assert error(logits(merge_and_unload(model, torch.float32)), wanted) <= 1e-6


def test_adapters_in_16_bits_are_merged_in_float32():
    model = learned(LoraConfig(**LORA), base(torch.bfloat16), autocast_adapter_dtype=False)
    model.base_model.to(torch.bfloat16)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert A.dtype == torch.bfloat16
    wanted = (layer.base_layer.dequantize(torch.float32) + (B.float() @ A.float()) * layer.scaling["default"]).to(
        torch.bfloat16
    )
    with torch.autocast("cpu", torch.bfloat16):
        model.merge_adapter()
    assert layer.base_layer.weight.equal(wanted) and layer.lora_A["default"].weight is A and A.dtype == torch.bfloat16


def test_a_model_whose_norms_were_made_float32_ends_in_one_dtype():
    model = learned(LoraConfig(**LORA), prepare_model_for_kbit_training(base(torch.bfloat16)))
    wanted = logits(model)
    assert wanted.dtype == torch.float32 and {p.dtype for p in model.parameters() if p.is_floating_point()} == {
        torch.float32
    }
    model.merge_adapter()
    assert error(logits(model), wanted) < 2e-2  # x is float32 here and the merged weight bfloat16
    merged = model.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert error(logits(merged), wanted) < 3e-2


ALONE = """
import sys, torch
from transformers import AutoModelForCausalLM
folder, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder)
assert not any(name.startswith("nf4lora") for name in sys.modules) and model.dtype == torch.bfloat16
with torch.no_grad():
    torch.save(model(input_ids=torch.load(out, weights_only=True)).logits, out)
"""


def test_what_is_saved_is_a_plain_checkpoint(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=NF4Config())
    merged = learned(LoraConfig(target_modules=["q_proj"]), model).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    saved = safetensors.torch.load_file(tmp_path / "merged" / "model.safetensors")
    assert saved.keys() == safetensors.torch.load_file(tmp_path / "base" / "model.safetensors").keys()
    assert {t.dtype for t in saved.values()} == {torch.bfloat16}
    torch.save(TOKENS, tmp_path / "out.pt")
    subprocess.run([sys.executable, "-P", "-c", ALONE, str(tmp_path / "merged"), str(tmp_path / "out.pt")], check=True)
    assert torch.load(tmp_path / "out.pt", weights_only=True).equal(logits(merged))


def test_experts_are_decoded_too(tmp_path):
    tiny.qwen3_moe().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=NF4Config())
    assert sum("experts" in name for name in integers(model))
    model = learned(LoraConfig(target_modules=["q_proj"]), model)
    wanted = logits(model)
    merged = merge_and_unload(model, torch.float32)
    assert not integers(merged) and error(logits(merged), wanted) < 5e-2  # the model computes in bfloat16
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert logits(again).equal(logits(merged))


def test_conv1d_layers_are_what_they_were_again(tmp_path):
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=2, n_positions=64)).save_pretrained(
        tmp_path / "base"
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=NF4Config())
    model = learned(LoraConfig(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True), model)
    wanted = logits(model)
    merged = merge_and_unload(model, torch.float32)
    assert sum(isinstance(m, Conv1D) for m in merged.modules()) == 8 and error(logits(merged), wanted) <= 1e-6
    merged.save_pretrained(tmp_path / "merged")
    assert logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")).equal(logits(merged))


@pytest.mark.parametrize("name", ["LoRA", "IA3"])
def test_grouped_blocks(name, tmp_path):
    model = learned(TUNERS[name], replace_linears(tiny.llama(dtype=torch.float32), layer=NF4Linear, group=True))
    wanted = logits(model)
    model.merge_adapter()
    assert error(logits(model), wanted) <= 1e-6
    model.unmerge_adapter()
    assert logits(model).equal(wanted)
    merged = merge_and_unload(model, torch.float32)
    assert error(logits(merged), wanted) <= 1e-6
    merged.save_pretrained(tmp_path / "merged")
    assert error(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), wanted) <= 1e-6


def test_unloading_frees_each_packed_base_as_it_goes():
    model = learned(TUNERS["LoRA"])
    bases = [weakref.ref(m) for m in model.modules() if isinstance(m, NF4Linear)]
    alive, last = [], [m for m in model.modules() if isinstance(m, BaseTunerLayer)][-1]

    class Counted(type(last)):
        def get_delta_weight(self, adapter):
            gc.collect()
            alive.append(sum(ref() is not None for ref in bases))
            return super().get_delta_weight(adapter)

    last.__class__ = Counted
    model.merge_and_unload()
    assert alive == [1]


def test_other_tuners_on_our_own_layer_merge_its_adapter_too():
    model = replace_linears(tiny.llama(dtype=torch.float32), r=2)
    for m in model.modules():
        if isinstance(m, NF4LoRALinear):
            nn.init.normal_(m.lora_B, std=0.05)
    model = learned(TUNERS["IA3"], model)
    wanted = logits(model)
    model.merge_adapter()
    assert error(logits(model), wanted) <= 1e-6
    model.unmerge_adapter()
    assert logits(model).equal(wanted)
    assert error(logits(merge_and_unload(model, torch.float32)), wanted) <= 1e-6


def test_adapters_of_two_kinds_on_one_base():
    def mixed():
        torch.manual_seed(0)
        model = get_peft_model(base(), LoraConfig(**LORA), mixed=True)
        model.add_adapter("turned", OFTConfig(target_modules=["q_proj"], r=0, oft_block_size=16))
        for name, p in model.named_parameters():
            if "lora_" in name or "oft_" in name:
                p.data.add_(torch.randn_like(p) * 0.03)
        model.set_adapter(["default", "turned"])
        return model.eval()

    model = mixed()
    wanted, packed = logits(model), integers(model)
    model.base_model.merge_adapter()
    model.base_model.unmerge_adapter()
    assert logits(model).equal(wanted) and all(p.equal(packed[n]) for n, p in integers(model).items())
    dense = get_peft_model(decoded(), LoraConfig(**LORA), mixed=True)
    dense.add_adapter("turned", OFTConfig(target_modules=["q_proj"], r=0, oft_block_size=16))
    dense.load_state_dict(
        {n: p for n, p in model.state_dict().items() if n in dense.state_dict() and p.is_floating_point()}, strict=False
    )
    dense.set_adapter(["default", "turned"])
    assert error(logits(merge_and_unload(model, torch.float32)), logits(dense.eval().merge_and_unload())) <= 1e-6


def decoded():
    model = tiny.llama(dtype=torch.float32)
    for name, layer in base().named_modules():
        if isinstance(layer, NF4Linear):
            model.get_submodule(name).weight.data = layer.dequantize(torch.float32)
    return model


def test_unloading_without_merging_keeps_the_base_packed():
    plain = base()
    model = learned(TUNERS["LoRA"]).unload()
    assert logits(model).equal(logits(plain)) and integers(model).keys() == integers(plain).keys()
    model = learned(TUNERS["LoRA"])
    wanted = logits(model)
    model.merge_adapter()
    unloaded = model.unload()  # peft leaves merged what is merged
    assert error(logits(unloaded), wanted) <= 1e-6 and {
        type(m) for m in unloaded.modules() if isinstance(m, nn.Linear)
    } == {nn.Linear}


def test_a_merged_model_copies_saves_and_moves_without_the_packed_base(tmp_path):
    model = learned(TUNERS["LoRA"])
    wanted = logits(model)
    model.merge_adapter()
    assert not integers(model) and not [name for name in model.state_dict() if "absmax" in name]
    twin = copy.deepcopy(model)
    twin.unmerge_adapter()
    assert logits(twin).equal(wanted) and not integers(model)
    torch.save(model, tmp_path / "whole.pt")
    again = torch.load(tmp_path / "whole.pt", weights_only=False)
    again.unmerge_adapter()
    assert logits(again).equal(wanted)


@pytest.mark.parametrize("name", ["LoRA", "IA3", "OFT", "DoRA", "head"])
def test_nan_is_found_and_leaves_the_base_alone(name):
    ways = {
        lambda m: m.merge_adapter(safe_merge=True): "NaNs detected",
        lambda m: merge_and_unload(m, safe_merge=True): "{}: found NaN or Inf in the merged weights",
        lambda m: merge_in_4bit_(m): "{}: found NaN or Inf in the merged weights",
    }
    config = TUNERS[name] if name != "head" else LoraConfig(target_modules=["q_proj", "lm_head"])
    broken = "lm_head" if name == "head" else "layers.1.self_attn.q_proj"
    for i, (way, message) in enumerate(ways.items()):
        model = learned(config, base(torch.bfloat16))
        first = next(p for n, p in model.named_parameters() if f"{broken}." in n and p.requires_grad)
        first.data.fill_(float("nan"))
        before = {n: p.clone() for n, p in model.named_parameters()}
        with pytest.raises(ValueError, match=message.format(broken)):
            way(model)
        if i == 0:  # peft's own stops where it was; the layers before are merged
            model.unmerge_adapter()
        after = dict(model.named_parameters())
        assert after.keys() == before.keys()
        for n, p in after.items():
            assert p.dtype == before[n].dtype and torch.equal(p.nan_to_num(1e9), before[n].nan_to_num(1e9)), n


def test_what_was_merged_before_is_checked_too_and_so_is_the_dtype():
    model = learned(LoraConfig(**LORA))
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    layer.lora_B["default"].weight.data.fill_(3e5)
    with pytest.raises(ValueError, match="layers.1.mlp.down_proj: found NaN or Inf"):
        merge_and_unload(model, torch.float16, safe_merge=True)  # more than float16 holds
    layer.lora_B["default"].weight.data.fill_(float("nan"))
    model.merge_adapter()
    with pytest.raises(ValueError, match="layers.1.mlp.down_proj: found NaN or Inf"):
        merge_and_unload(model, safe_merge=True)
    layer.lora_B["default"].weight.data.zero_()
    model.unmerge_adapter()
    assert merge_and_unload(model, torch.float16, safe_merge=True).dtype == torch.float16


# -- back into 4 bits


@pytest.mark.parametrize("name", ["LoRA", "IA3", "DoRA"])
def test_merging_in_4_bits_says_what_is_left(name):
    survived = []
    for scale in (0.001, 0.03, 0.3):
        model = learned(TUNERS[name], base(torch.bfloat16), scale=scale)
        before = {
            n: m.dequantize(torch.float32).double()
            for n, m in base(torch.bfloat16).named_modules()
            if isinstance(m, NF4Linear)
        }
        target = merge_and_unload(copy.deepcopy(model), torch.float32)
        merged, cosine, overall = merge_in_4bit_(model)
        adapted = {n for n, m in model.base_model.model.named_modules() if isinstance(m, NF4Linear)} & cosine.keys()
        assert adapted == cosine.keys() and len(cosine) == (14 if name == "LoRA" else 6)
        dot = wanted = found = 0.0
        for n, value in cosine.items():
            layer = merged.get_submodule(n)
            assert type(layer) is NF4Linear and layer.weight_dtype == torch.bfloat16
            delta, there = (
                target.get_submodule(n).weight.double() - before[n],
                layer.dequantize(torch.float32).double() - before[n],
            )
            assert value == pytest.approx(
                ((delta * there).sum() / (delta.norm() * there.norm())).item() if there.any() else 0.0, abs=1e-9
            )
            dot, wanted, found = (
                dot + (delta * there).sum(),
                wanted + delta.square().sum(),
                found + there.square().sum(),
            )
        assert overall == pytest.approx((dot / (wanted * found).sqrt()).item(), abs=1e-9)
        assert not any(isinstance(m, BaseTunerLayer) for m in merged.modules())
        assert logits(merged).isfinite().all()
        survived.append(overall)
    assert survived == sorted(survived) and survived[0] < 0.5 and survived[-1] > 0.9


def test_an_adapter_that_changes_nothing_loses_nothing():
    config = LoraConfig(**LORA)
    merged, cosine, overall = merge_in_4bit_(get_peft_model(base(), config))
    assert overall == 1.0 and set(cosine.values()) == {1.0}
    assert logits(merged).equal(logits(base()))


def test_what_cannot_be_merged_is_refused():
    with pytest.raises(TypeError, match="found LlamaForCausalLM, wanted a peft model"):
        merge_and_unload(base())
    prompt = get_peft_model(base(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    for merge in (merge_and_unload, merge_in_4bit_):
        with pytest.raises(
            TypeError,
            match="found PeftModelForCausalLM on a LlamaForCausalLM, wanted a peft model whose adapters change weights",
        ):
            merge(prompt)
    model = learned(LoraConfig(**LORA))
    with pytest.raises(TypeError, match="dtype: found torch.int8, wanted one of"):
        merge_and_unload(model, torch.int8)
    with pytest.raises(ValueError, match="without 4-bit layers"):
        merge_in_4bit_(get_peft_model(tiny.llama(), LoraConfig(**LORA)))
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("ask", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("saved", [torch.bfloat16, torch.float32])
def test_a_dense_base_is_rounded_once_to_the_dtype_asked_for(ask, saved):
    config = LoraConfig(target_modules=["q_proj", "lm_head"], r=4)
    model = learned(config, tiny.llama(dtype=saved))
    expected = {
        name: m.base_layer.weight.float() + m.get_delta_weight("default")
        for name, m in model.base_model.model.named_modules()
        if isinstance(m, BaseTunerLayer)
    }
    merged = merge_and_unload(model, ask, safe_merge=True)
    assert len(expected) == 3 and merged.config.dtype == ask and {p.dtype for p in merged.parameters()} == {ask}
    for name, weight in expected.items():
        assert merged.get_submodule(name).weight.equal(weight.to(ask)), name


def test_a_head_in_16_bits_beside_4_is_rounded_once_too():
    for ask in (None, torch.float16):
        model = learned(LoraConfig(target_modules=["q_proj", "lm_head"], r=4), base(torch.bfloat16))
        head = model.base_model.model.lm_head
        wanted = (head.base_layer.weight.float() + head.get_delta_weight("default")).to(ask or torch.bfloat16)
        merged = model.merge_and_unload() if ask is None else merge_and_unload(model, ask)
        assert merged.lm_head.weight.equal(wanted)


def test_a_dense_base_stays_whole_on_an_error():
    model = learned(LoraConfig(**LORA), tiny.llama())
    before = {n: p.clone() for n, p in model.named_parameters()}
    model.base_model.model.model.layers[1].mlp.down_proj.lora_B["default"].weight.data[0] = float("inf")
    with pytest.raises(ValueError, match="layers.1.mlp.down_proj: found NaN or Inf in the merged weights; nothing was"):
        merge_and_unload(model, safe_merge=True)
    for n, p in model.named_parameters():
        assert p.dtype == before[n].dtype and (p.equal(before[n]) or "layers.1.mlp.down_proj.lora_B" in n)


def test_a_dense_base_is_checked_in_the_dtype_asked_for():
    def large():
        model = learned(LoraConfig(**LORA), tiny.llama(dtype=torch.float16))
        model.base_model.model.model.layers[1].mlp.down_proj.lora_B["default"].weight.data.fill_(3e5)
        return model

    with pytest.raises(ValueError, match="layers.1.mlp.down_proj: found NaN or Inf"):
        merge_and_unload(large(), torch.float16, safe_merge=True)
    merged = merge_and_unload(large(), torch.bfloat16, safe_merge=True)  # which holds what float16 does not
    weight = merged.model.layers[1].mlp.down_proj.weight
    assert weight.isfinite().all() and weight.abs().max() > torch.finfo(torch.float16).max


def test_an_error_in_the_middle_leaves_a_dense_base_in_its_dtype(monkeypatch):
    model = learned(LoraConfig(**LORA), tiny.llama())
    before = {n: p.clone() for n, p in model.named_parameters()}
    first = model.base_model.model.model.layers[0].self_attn.q_proj
    monkeypatch.setattr(first, "get_delta_weight", lambda adapter: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        merge_and_unload(model)
    for n, p in model.named_parameters():
        assert p.dtype == before[n].dtype and p.equal(before[n]), n


def test_peft_itself_merges_dense_models_as_without_us():
    ours, theirs = (learned(LoraConfig(**LORA), tiny.llama()) for _ in range(2))
    wanted = ours.merge_and_unload()
    peft_dispatch.uninstall()
    try:
        theirs = theirs.merge_and_unload()
    finally:
        peft_dispatch.install()
    assert all(p.equal(q) for p, q in zip(wanted.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_bases_that_others_quantized_are_refused(kind):
    import bitsandbytes

    model = tiny.llama()
    for layer in model.model.layers:
        dense, options = layer.self_attn.q_proj, {"quant_type": "nf4"} if kind == "Linear4bit" else {"has_fp16_weights": False}
        layer.self_attn.q_proj = getattr(bitsandbytes.nn, kind)(64, 64, bias=False, **options)
        layer.self_attn.q_proj.load_state_dict(dense.state_dict())
        layer.self_attn.q_proj.to("cpu")
    if kind == "Linear8bitLt":
        model.is_loaded_in_8bit = True
        model.hf_quantizer = None
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    before = {n: p.clone() for n, p in model.named_parameters()}
    message = {
        "Linear4bit": r"layers.0.self_attn.q_proj.*: found 4 bits of bitsandbytes.*nf4lora.hf.from_bitsandbytes_\(base\)",
        "Linear8bitLt": "found a base quantized by .*q_proj.*peft_model.merge_and_unload",
    }[kind]
    for merge in (merge_and_unload, merge_in_4bit_):
        with pytest.raises(ValueError, match=message):
            merge(model)
    assert all(p.equal(before[n]) for n, p in model.named_parameters())


def test_offloaded_weights_are_not_merged():
    model = get_peft_model(tiny.llama(), LoraConfig(**LORA))
    model.base_model.model.model.layers[1].mlp.up_proj.to("meta")
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj.weight: found it offloaded"):
        merge_and_unload(model)


# -- what was merged before


@pytest.mark.parametrize("name", [name for name in TUNERS if name != "LN tuning"])
def test_what_was_merged_before_is_merged_anew_and_rounded_once(name):
    model, twin = (learned(TUNERS[name], base(torch.bfloat16)) for _ in range(2))
    model.merge_adapter()
    merged, wanted = merge_and_unload(model, torch.float32), merge_and_unload(twin, torch.float32)
    for (n, p), q in zip(merged.named_parameters(), wanted.parameters(), strict=True):
        assert p.equal(q), n


def two(config, model=None):
    model = learned(config, base(torch.bfloat16) if model is None else model)
    model.add_adapter("b", copy.deepcopy(config))
    torch.manual_seed(1)
    for p in [p for n, p in model.named_parameters() if ".b." in n]:
        p.data.add_(torch.randn_like(p) * 0.03)
    model.base_model.set_adapter(["default", "b"])
    return model


def test_adapters_merged_one_after_the_other_are_rounded_once():
    one, other, third = (two(LoraConfig(**LORA)) for _ in range(3))
    one.merge_adapter()
    other.merge_adapter(adapter_names=["default"])
    other.merge_adapter(adapter_names=["b"])
    third.merge_adapter(adapter_names=["default"])
    third = merge_and_unload(third, adapter_names=["b"])
    for n, m in one.base_model.model.named_modules():
        if isinstance(m, DecodedLinear):
            n = n.removesuffix(".base_layer")
            assert other.base_model.model.get_submodule(n).base_layer.weight.equal(m.weight)
            assert third.get_submodule(n).weight.equal(m.weight)
    wanted = logits(two(LoraConfig(**LORA)))
    other.unmerge_adapter()
    assert logits(other).equal(wanted)


def test_a_trial_adds_nothing_to_what_is_merged():
    for make in (base, lambda dtype: tiny.llama(dtype=dtype)):
        one, other = (two(LoraConfig(**LORA), make(torch.bfloat16)) for _ in range(2))
        for model in (one, other):
            model.merge_adapter(adapter_names=["default"])
        wanted = merge_and_unload(one, torch.float32, adapter_names=["b"])
        merged = merge_and_unload(other, torch.float32, adapter_names=["b"], safe_merge=True)
        assert all(p.equal(q) for p, q in zip(merged.parameters(), wanted.parameters(), strict=True))


def test_an_adapter_deleted_after_it_was_merged_stays_merged():
    model = two(LoraConfig(**LORA))
    model.base_model.set_adapter("default")
    model.merge_adapter()
    wanted = logits(model)
    for layer in [m for m in model.modules() if isinstance(m, BaseTunerLayer)]:  # the model's own refuses to in newer peft
        layer.delete_adapter("default")
    assert error(logits(model.merge_and_unload(adapter_names=["default"])), wanted) < 1e-2


def test_two_kinds_of_adapters_are_rounded_once():
    def mixed(dtype):
        torch.manual_seed(0)
        model = get_peft_model(base(torch.bfloat16), LoraConfig(**LORA), mixed=True)
        model.add_adapter("turned", OFTConfig(target_modules=["q_proj"], r=0, oft_block_size=16))
        for name, p in model.named_parameters():
            if "lora_" in name or "oft_" in name:
                p.data.add_(torch.randn_like(p) * 0.03)
        model.set_adapter(["default", "turned"])
        return merge_and_unload(model.eval(), dtype)

    for p, q in zip(mixed(torch.bfloat16).parameters(), mixed(torch.float32).parameters(), strict=True):
        assert p.equal(q.to(torch.bfloat16))


def test_merging_in_4_bits_refuses_what_is_merged_already():
    for config in (LoraConfig(**LORA), TUNERS["LoRA"]):  # some layers, and all
        model = learned(config)
        wanted, packed = logits(model), integers(model)
        model.merge_adapter()
        with pytest.raises(ValueError, match=r"q_proj: found \['default'\] merged already; call unmerge_adapter\(\) first"):
            merge_in_4bit_(model)
        model.unmerge_adapter()
        assert logits(model).equal(wanted) and all(p.equal(packed[n]) for n, p in integers(model).items())
        merge_in_4bit_(model)


@pytest.mark.parametrize("targets", [["q_proj"], "all-linear"])
def test_what_is_unloaded_after_a_merge_is_saved_as_what_it_is(tmp_path, targets):
    tiny.llama().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=NF4Config())
    model = learned(LoraConfig(target_modules=targets), model)
    model.merge_adapter()
    unloaded = model.unload()
    wanted, packed = logits(unloaded), integers(unloaded)
    unloaded.save_pretrained(tmp_path / "half")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert logits(again).equal(wanted) and integers(again).keys() == packed.keys()
    found = {n: type(m) for n, m in again.named_modules() if isinstance(m, nn.Linear)}
    assert found == {n: type(m) for n, m in unloaded.named_modules() if isinstance(m, nn.Linear)}
    assert bool(packed) == (targets == ["q_proj"]) == hasattr(again.config, "quantization_config")


# -- heads that are tied to the embedding


def tied(family, targets, quantized, folder, **more):
    if not (folder / "base").exists():
        tiny.FAMILIES[family](dtype=torch.float32, tie_word_embeddings=True).save_pretrained(folder / "base")
    kind = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    model = kind.from_pretrained(folder / "base", quantization_config=NF4Config() if quantized else None)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return learned(LoraConfig(target_modules=targets, r=4, **more), model, scale=0.05)


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("family", ["gemma3", "llama"])
def test_what_is_merged_into_a_tied_head_is_not_in_the_embedding(family, targets, quantized, tmp_path):
    model = tied(family, targets, quantized, tmp_path)
    wanted = logits(model)
    merged = merge_and_unload(model, torch.float32, safe_merge=True)
    assert error(logits(merged), wanted) <= 1e-6 and not merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path / "memory")
    save_merged(tied(family, targets, quantized, tmp_path), tmp_path / "disk", torch.float32)
    assert (tmp_path / "disk" / "model.safetensors").read_bytes() == (tmp_path / "memory" / "model.safetensors").read_bytes()
    for name in ("memory", "disk"):
        assert error(logits(AutoModelForCausalLM.from_pretrained(tmp_path / name)), wanted) <= 1e-6
    if quantized:  # peft's own method and what stays in 4 bits come apart too
        assert error(logits(tied(family, targets, True, tmp_path).merge_and_unload()), wanted) <= 1e-6
        model = tied(family, targets, True, tmp_path)
        plain, merged = logits(tied(family, targets, True, tmp_path).unload()), merge_in_4bit_(model).model
        assert error(logits(merged), wanted) < 0.3 * error(plain, wanted)


def test_a_text_model_within_a_model_says_so_too(tmp_path):
    """Some engines read its part of the configuration alone."""
    text = transformers.Gemma3TextConfig(**{**tiny._TEXT, "tie_word_embeddings": True}, sliding_window=8, query_pre_attn_scalar=16)
    vision = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, image_size=16, patch_size=8)
    whole = transformers.Gemma3Config(text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=4, image_token_index=127)
    transformers.Gemma3ForConditionalGeneration(whole).save_pretrained(tmp_path / "base")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "base", quantization_config=NF4Config())
    save_merged(learned(LoraConfig(target_modules=["lm_head"]), model), tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is False


def test_a_tied_head_beside_what_peft_unties_or_ties_itself(tmp_path):
    for more, apart in (
        ({"modules_to_save": ["embed_tokens"]}, True), ({"trainable_token_indices": [5, 7]}, False), ({}, False),
    ):  # fmt: skip
        targets = ["q_proj", "lm_head"] if apart else ["q_proj"]
        model = tied("llama", targets, True, tmp_path, **more)
        wanted = logits(model)
        merged = merge_and_unload(model, torch.float32)
        assert error(logits(merged), wanted) <= 1e-6 and merged.config.tie_word_embeddings is not apart
        assert (merged.lm_head.weight is merged.model.embed_tokens.weight) is not apart


def test_tied_weights_that_cannot_come_apart_are_refused(tmp_path):
    model = tied("t5", ["q", "lm_head"], True, tmp_path)
    before = {n: p.clone() for n, p in model.named_parameters()}
    for merge in (merge_and_unload, lambda m: save_merged(m, tmp_path / "disk"), merge_in_4bit_):
        with pytest.raises(ValueError, match="^lm_head: found an adapter on the weight that it shares with shared, encoder.embed"):
            merge(model)
    assert not (tmp_path / "disk").exists() and all(p.equal(before[n]) for n, p in model.named_parameters())
    model = tied("llama", ["q_proj", "lm_head"], False, tmp_path / "llama")
    wanted, head = logits(model), model.base_model.model.lm_head
    head.merge()
    with pytest.raises(ValueError, match=r"^lm_head: found its adapter merged into the weight that it shares with model.embed_to"):
        merge_and_unload(model)
    head.unmerge()
    assert error(logits(merge_and_unload(model, torch.float32)), wanted) <= 1e-5


def test_after_an_error_a_tied_head_is_tied_again(tmp_path, monkeypatch):
    model = tied("llama", ["q_proj", "lm_head"], False, tmp_path)
    monkeypatch.setattr(model.base_model.model.lm_head, "get_delta_weight", lambda adapter: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        merge_and_unload(model, torch.float32)
    assert model.base_model.model.lm_head.base_layer.weight is model.base_model.model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings
