"""`nf4lora quantize`, `merge`, `export` and `compare`: what they write loads elsewhere, what they say is so, what they refuse."""

import json
import sys
from pathlib import Path

import pytest
import tiny
import torch
from commands import in_process, refused
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerFast

import nf4lora
from nf4lora import NF4Linear
from nf4lora.nn.experts import NF4Experts

IDS = tiny.tokens()


@pytest.fixture
def command(capsys, monkeypatch, tmp_path):
    return in_process(capsys, monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny.llama().save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    model = get_peft_model(nf4lora.from_pretrained(folder), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for p in [p for p in model.parameters() if p.requires_grad]:
        p.data.normal_(std=0.05)
    model.save_pretrained(path)
    return path


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def written(result) -> dict:
    """The JSON a command printed, and nothing else."""
    code, out, _ = result
    assert code == 0, result
    return json.loads(out)


def test_quantize_native_then_bnb(command, folder):
    found = written(command("quantize", folder, "four", "--quant-type", "fp4", "--blocksize", 128, "--no-double-quant", "--json"))
    wanted = nf4lora.from_pretrained(folder, nf4lora.hf.NF4Config("fp4", 128, False))
    model = nf4lora.from_pretrained("four")
    assert torch.equal(logits(model), logits(wanted)) and AutoTokenizer.from_pretrained("four").convert_tokens_to_ids("a") == 1
    assert found["quantized"] == sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, NF4Linear))
    assert found["bits_per_quantized"] == 4.25 and found["left_in_16_bits"].keys() == {"model.embed_tokens.weight", "lm_head.weight"}
    assert found["bytes_saved"] == sum(f.stat().st_size for f in Path("four").iterdir())
    assert not [p for p in Path().iterdir() if p.name.startswith(".")]  # nothing is left of the way there
    code, out, _ = command("export", "four", "theirs")
    assert code == 0 and "format bnb" in out
    theirs = AutoModelForCausalLM.from_pretrained("theirs")
    assert theirs.is_loaded_in_4bit and theirs.config.quantization_config.bnb_4bit_quant_type == "fp4"
    state = theirs.model.layers[0].mlp.up_proj.weight
    assert torch.equal(state.data.reshape(-1), model.model.layers[0].mlp.up_proj.weight.data.reshape(-1))
    refused(command("quantize", folder, "four"), "four is there already", "new or an empty folder")


def test_quantize_for_bitsandbytes_with_a_skip_list(command, folder):
    code, out, _ = command("quantize", folder, "bnb", "--format", "bnb", "--skip", "lm_head,down_proj")
    assert code == 0 and "4.1" in out and "down_proj.weight: 16,384 bytes" in out
    model = AutoModelForCausalLM.from_pretrained("bnb")
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear and isinstance(model.config.quantization_config, BitsAndBytesConfig)


def test_experts_are_quantized_and_told_of(command):
    tiny.qwen3_moe().save_pretrained("moe")
    assert written(command("quantize", "moe", "four", "--json"))["quantized"] > 2 * 4 * 3 * 32 * 64
    assert any(isinstance(m, NF4Experts) for m in nf4lora.from_pretrained("four").modules())
    with pytest.warns(UserWarning, match="4 stacks of experts .* are written decoded, 98,304 bytes"):
        assert command("export", "four", "bnb")[0] == 0


@pytest.mark.parametrize("onto", ["decoded", "original"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merge(command, folder, adapter, onto, dtype):
    found = written(command("merge", adapter, "--out", "merged", "--dtype", dtype, "--onto", onto, "--json"))
    assert found["base"] == str(folder) and found["onto"] == onto
    merged = AutoModelForCausalLM.from_pretrained("merged")
    assert not hasattr(merged.config, "quantization_config") and {str(p.dtype)[6:] for p in merged.parameters()} == {dtype}
    base = nf4lora.from_pretrained(folder) if onto == "decoded" else AutoModelForCausalLM.from_pretrained(folder)
    if onto == "decoded":
        base.dequantize(torch.float32)
    beside = logits(PeftModel.from_pretrained(base.float(), adapter))
    assert (logits(merged.float()) - beside).norm() <= {"float32": 1e-6, "bfloat16": 2e-2}[dtype] * beside.norm()
    assert AutoTokenizer.from_pretrained("merged").convert_tokens_to_ids("a") == 1


def test_the_adapter_of_a_checkpoint(command, folder, adapter):
    code, *_ = command("export", adapter, "plain", "--format", "peft")
    assert code == 0 and {p.name for p in Path("plain").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    base = nf4lora.from_pretrained(folder)
    wanted = logits(PeftModel.from_pretrained(base, adapter))
    assert torch.equal(logits(PeftModel.from_pretrained(nf4lora.from_pretrained(folder), "plain")), wanted)


def test_compare(command, folder):
    found = written(command("compare", folder, "--most", 3, "--png", "errors.png", "--json"))["rows"]
    assert [row["shape"] for row in found] == [[64, 64], [32, 64], [128, 64]]
    for row in found:
        assert row["codes"] == row["shape"][0] * row["shape"][1] // 2 and row["codes_differing"] == 0 and row["between"] < 1e-2
        assert 0.05 < row["error"] < 0.15 and abs(row["error"] - row["error_of_bitsandbytes"]) < 1e-4
    assert Path("errors.png").read_bytes().startswith(b"\x89PNG")
    code, out, _ = command("compare", "--no-double-quant", "--quant-type", "fp4")
    assert code == 0 and "7 × 13" in out
    found = written(command("compare", "--no-double-quant", "--json"))["rows"]
    assert all(row["constants_differing"] == row["between"] == 0 and row["error"] == row["error_of_bitsandbytes"] for row in found)


def test_compare_fails_where_a_byte_differs(command, monkeypatch):
    import bitsandbytes.functional as theirs

    original = theirs.quantize_4bit

    def other(*args, **kwargs):
        packed, state = original(*args, **kwargs)
        packed[0] ^= 1
        return packed, state

    monkeypatch.setattr(theirs, "quantize_4bit", other)
    code, out, _ = command("compare", "--json")
    assert code == 1 and [row["codes_differing"] for row in json.loads(out)["rows"]] == [1, 1, 1]


def test_bad_input(command, folder, adapter, monkeypatch):
    refused(command("quantize", folder, "x", "--format", "gguf"), "--format", "native, bnb")
    refused(command("quantize", folder, "x", "--blocksize", 65), "--blocksize", "65")
    refused(command("quantize", folder, "x", "--quant-type", "int4"), "--quant-type", "int4")
    refused(command("quantize", "./nowhere", "x"), "no such folder: ./nowhere")
    refused(command("quantize", folder, "x", "--skip", "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj,lm_head"), "no linear")
    refused(command("merge", folder, "--out", "x"), "adapter_config.json")
    refused(command("merge", adapter, "--out", "x", "--dtype", "int8"), "--dtype", "bfloat16, float16, float32")
    refused(command("merge", adapter, "--out", "x", "--onto", "both"), "--onto")
    tiny.llama(hidden_size=128, head_dim=32).save_pretrained("other")
    refused(command("merge", adapter, "--out", "x", "--base", "other"), "does not merge into other", "size mismatch")
    refused(command("export", adapter, "x"), "config.json", "--format peft")
    refused(command("export", folder, "x", "--format", "peft"), "no whole adapter")
    refused(command("compare", "--png", "x.gif"), "--png", ".png")
    refused(command("compare", "--most", 0), "--most")
    Path("broken").mkdir()
    (Path("broken") / "adapter_config.json").write_text('{"base_model_name_or_path": null}')
    refused(command("merge", "broken", "--out", "x"), "--base")
    assert not Path("x").exists()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    refused(command("compare"), "pip install bitsandbytes")


def test_help_has_an_example(command):
    for name in ("quantize", "merge", "export", "compare"):
        code, out, _ = command(name, "--help")
        assert code == 0 and f"Example: nf4lora {name} " in out, out
