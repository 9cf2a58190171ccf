"""Models quantized in memory are saved as what they are, and copies of models train as the models do."""

import copy
import json

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from nf4lora import NF4Linear, NF4LoRALinear, replace_linears
from nf4lora.hf import NF4Config, from_pretrained, quantize_experts_

TOKENS = tiny.tokens()


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


@pytest.mark.parametrize("options", [{}, {"quant_type": "fp4", "blocksize": 128, "double_quant": False, "compute_dtype": torch.bfloat16}])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma3"])
def test_what_was_quantized_in_memory_is_loaded_as_it_was(tmp_path, family, options):
    model = replace_linears(tiny.FAMILIES[family](), layer=NF4Linear, exclude=("lm_head", "k_proj"), **options)
    if family == "qwen3_moe":
        quantize_experts_(model, **{"blocksize": 64, **options})
    wanted = model.state_dict()
    model.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "nf4lora" and said["blocksize"] == options.get("blocksize", 64)
    for load in (AutoModelForCausalLM.from_pretrained, from_pretrained):
        again = load(tmp_path)
        found = {n: type(m).__name__ for n, m in again.named_modules()}
        assert found == {n: type(m).__name__ for n, m in model.named_modules()}
        state = again.state_dict()
        assert state.keys() == wanted.keys() and all(t.equal(wanted[n]) for n, t in state.items())
        kept = [(m.compute_dtype, m.quant_type, m.blocksize) for m in again.modules() if isinstance(m, NF4Linear)]
        assert kept == [(m.compute_dtype, m.quant_type, m.blocksize) for m in model.modules() if isinstance(m, NF4Linear)]
        assert logits(again).isfinite().all()
    model.save_pretrained(tmp_path / "twice")
    assert (tmp_path / "twice" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_two_formats_are_no_checkpoint(tmp_path):
    model = replace_linears(tiny.llama(), layer=NF4Linear, exclude=("lm_head", "q_proj"))
    replace_linears(model, layer=NF4Linear, exclude=("lm_head",), quant_type="fp4")
    with pytest.raises(ValueError, match="wanted one 4-bit format in a model"):
        model.save_pretrained(tmp_path)


def test_dense_models_are_saved_as_they_are(tmp_path):
    tiny.llama().save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_a_copy_of_a_model_trains_its_own_adapters(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=NF4Config())
    alone = copy.deepcopy(model.hf_quantizer)
    other = replace_linears(copy.deepcopy(model).requires_grad_(False), layer=NF4LoRALinear, r=4)
    assert other.hf_quantizer.is_qat_trainable and not model.hf_quantizer.is_qat_trainable and not alone.is_qat_trainable
    data = [{"input_ids": row, "labels": row} for row in TOKENS]
    arguments = TrainingArguments(str(tmp_path / "out"), use_cpu=True, max_steps=1, report_to="none", save_strategy="no", disable_tqdm=True)
    assert Trainer(model=other, args=arguments, train_dataset=data).train().training_loss > 4
