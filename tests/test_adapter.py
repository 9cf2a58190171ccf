"""Adapters in PEFT's format: our own round trip bit for bit, peft's reading and writing, and files that do not fit."""

import json
import shutil

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from nf4lora import NF4Linear, replace_linears
from nf4lora.hf import load_adapter, save_adapter
from nf4lora.hf.adapter import lora_layers

TOKENS = torch.arange(24).view(2, 12) % 50


def llama(seed: int = 0, dtype=torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def qlora(seed: int = 1, targets="all-linear", **kwargs) -> LlamaForCausalLM:
    """The same base for every seed; adapters of the seed's own, as if trained."""
    base = llama()
    torch.manual_seed(seed)
    model = replace_linears(base, targets, **{"r": 4, "lora_alpha": 6, **kwargs})
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    return model.eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def decoded_base() -> LlamaForCausalLM:
    """The dense model whose linears are the decoded NF4 weights."""
    model, nf4 = llama(), replace_linears(llama(), layer=NF4Linear)
    for name, layer in nf4.named_modules():
        if isinstance(layer, NF4Linear):
            model.get_submodule(name).weight.data = layer.dequantize(torch.float32)
    return model


def test_round_trip_gives_the_same_logits_bit_for_bit(tmp_path):
    model = qlora()
    save_adapter(model, tmp_path / "a", "some/base")
    other = qlora(seed=2)
    assert not logits(other).equal(logits(model))
    load_adapter(other, tmp_path / "a")
    assert logits(other).equal(logits(model))
    save_adapter(other, tmp_path / "b", "some/base")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_files_are_as_peft_and_vllm_want_them(tmp_path):
    save_adapter(qlora(lora_dropout=0.1), tmp_path / "a", "some/base")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "manifest.json",
    ]  # fmt: skip
    with safetensors.safe_open(tmp_path / "a" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        keys = set(file.keys())
    paths = [f"layers.{i}.{m}" for i in (0, 1) for m in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )]  # fmt: skip
    assert keys == {f"base_model.model.model.{p}.lora_{ab}.weight" for p in paths for ab in "AB"}
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    wanted = dict(
        peft_type="LORA", task_type="CAUSAL_LM", r=4, lora_alpha=6, lora_dropout=0.1, bias="none", use_rslora=False, use_dora=False,
        fan_in_fan_out=False, inference_mode=True, modules_to_save=None, rank_pattern={}, alpha_pattern={},
        base_model_name_or_path="some/base",
        target_modules=["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
    )  # fmt: skip
    assert {key: config[key] for key in wanted} == wanted


@pytest.mark.parametrize("kwargs", [{}, {"use_rslora": True}, {"targets": ["q_proj", "mlp.up_proj"]}])
def test_peft_computes_the_same_on_the_decoded_base(tmp_path, kwargs):
    model = qlora(**kwargs)
    save_adapter(model, tmp_path / "a")
    base = decoded_base()
    if kwargs.get("targets"):  # what was no target stayed dense
        for name, module in llama().named_modules():
            if isinstance(module, torch.nn.Linear) and not name.endswith(("q_proj", "up_proj")):
                base.get_submodule(name).weight.data = module.weight.data
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(base, tmp_path / "a")), logits(model), rtol=0, atol=2e-5
    )


def test_peft_loads_it_on_the_bf16_base(tmp_path):
    model = qlora()
    save_adapter(model, tmp_path / "a")
    loaded = PeftModel.from_pretrained(llama(dtype=torch.bfloat16), tmp_path / "a")
    for path, layer in lora_layers(model).items():
        theirs = loaded.get_submodule(f"base_model.model.{path}")
        assert theirs.lora_A["default"].weight.equal(layer.lora_A) and theirs.lora_B["default"].weight.equal(
            layer.lora_B
        )
        assert theirs.scaling["default"] == layer.scaling
    merged = loaded.merge_and_unload()
    assert (logits(merged).float() - logits(model)).abs().max() < 0.3 * logits(model).abs().max()


def test_an_adapter_of_peft_loads_here(tmp_path):
    peft_model = get_peft_model(
        decoded_base(), LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=False)
    )
    peft_model.eval().save_pretrained(tmp_path / "a")
    model = qlora()
    load_adapter(model, tmp_path / "a")
    torch.testing.assert_close(logits(model), logits(peft_model), rtol=0, atol=2e-5)


def test_some_layers_of_a_name_and_other_ranks(tmp_path):
    model = replace_linears(llama(), ["layers.0.self_attn.q_proj", "layers.0.mlp.up_proj"], r=4, lora_alpha=6)
    replace_linears(model, ["layers.1.self_attn.v_proj"], r=2, lora_alpha=5)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    save_adapter(model.eval(), tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(lora_layers(model))
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "a")
    for path, layer in lora_layers(model).items():
        theirs = loaded.get_submodule(f"base_model.model.{path}")
        assert theirs.scaling["default"] == layer.scaling and theirs.lora_B["default"].weight.equal(layer.lora_B)
    load_adapter(model, tmp_path / "a")


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, path)


KEY = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
WRONG = {
    "missing": (lambda f: edit_tensors(f, lambda t: t.pop(KEY)), f"missing {KEY}"),
    "unexpected": (lambda f: edit_tensors(f, lambda t: t.update({"x.y": t[KEY].clone()})), "unexpected x.y"),
    "mis-shaped": (lambda f: edit_tensors(f, lambda t: t.update({KEY: t[KEY].T})), rf"{KEY} is .*\[64, 4\], wanted a float \[4, 64\]"),
    "integer": (lambda f: edit_tensors(f, lambda t: t.update({KEY: t[KEY].int()})), f"{KEY} is torch.int32"),
    "other alpha": (lambda f: edit_config(f, lora_alpha=7), "found r=4, lora_alpha=7"),
    "other rank": (lambda f: edit_config(f, rank_pattern={"up_proj": 2}), "found r=2.*up_proj"),
    "pattern": (lambda f: edit_config(f, rank_pattern=[1]), "rank_pattern"),
    "rslora": (lambda f: edit_config(f, use_rslora=True), "use_rslora=True"),
    "dora": (lambda f: edit_config(f, use_dora=True), "use_dora=True, wanted False"),
    "bias": (lambda f: edit_config(f, bias="all"), "bias='all', wanted 'none'"),
    "type": (lambda f: edit_config(f, peft_type="IA3"), "peft_type 'IA3', wanted 'LORA'"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json: no such file"),
    "a pickle": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "adapter_model.safetensors: no such file",
    ),
    "huge config": (lambda f: (f / "adapter_config.json").write_bytes(b" " * (1 << 20) + b"{} "), "wanted at most 1048576"),
    "truncated config": (lambda f: (f / "adapter_config.json").write_text('{"r": '), "adapter_config.json: not valid JSON"),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
def test_row24_an_adapter_that_does_not_fit_changes_nothing(tmp_path, fault):
    save_adapter(qlora(), tmp_path / "a")
    spoil, message = WRONG[fault]
    spoil(tmp_path / "a")
    model = qlora(seed=2)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path / "a")
    for name, parameter in model.named_parameters():
        assert parameter.equal(before[name]), name


def test_row23_truncated_adapter_names_the_file_and_changes_nothing(tmp_path):
    save_adapter(qlora(), tmp_path / "whole")
    model = qlora()
    before = logits(model)
    size = (tmp_path / "whole" / "adapter_model.safetensors").stat().st_size
    for length in range(0, size, size // 23):
        shutil.copytree(tmp_path / "whole", tmp_path / "a", dirs_exist_ok=True)
        with (tmp_path / "a" / "adapter_model.safetensors").open("r+b") as file:
            file.truncate(length)
        with pytest.raises(ValueError, match=r"a/adapter_model.safetensors: truncated or damaged"):
            load_adapter(model, tmp_path / "a")
    assert logits(model).equal(before)


def test_a_model_without_adapters_is_refused(tmp_path):
    for model in (llama(), replace_linears(llama(), layer=NF4Linear), replace_linears(llama(), r=0)):
        with pytest.raises(ValueError, match="no NF4LoRALinear with an adapter; nf4lora.nn.replace_linears"):
            save_adapter(model, tmp_path / "a")
    mixed = replace_linears(replace_linears(llama(), ["q_proj"], r=2), ["k_proj"], r=2, use_rslora=True)
    with pytest.raises(ValueError, match="with and without use_rslora"):
        save_adapter(mixed, tmp_path / "a")
    assert not (tmp_path / "a").exists()
