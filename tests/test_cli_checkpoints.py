"""`nf4lora quantize`, `merge`, `export` and `compare`: what they write loads elsewhere, what they say is so, what they refuse."""

import json
import sys
from pathlib import Path

import pytest
import safetensors.torch
import tiny
import torch
from commands import in_process, refused
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
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


def saved(model, path, config=None, **changes) -> Path:
    """An adapter on it, as if trained; `changes` go into its adapter_config.json."""
    torch.manual_seed(0)
    model = get_peft_model(model, config or LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for p in [p for p in model.parameters() if p.requires_grad]:
        p.data.normal_(std=0.05)
    model.save_pretrained(path)
    return changed(Path(path), **changes)


def changed(path, **changes) -> Path:
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return path


@pytest.mark.parametrize("noted, onto", [("nf4", "decoded"), ("dense", "original"), (None, "decoded")])
def test_merging_is_onto_what_the_adapter_was_trained_on(command, folder, noted, onto):
    adapter = saved(AutoModelForCausalLM.from_pretrained(folder), "adapter")
    if noted:
        Path("adapter/nf4lora.json").write_text(json.dumps({"base": noted}))
    code, out, _ = command("merge", adapter, "--out", "merged", "--dtype", "float32")
    why = "trained on that, says nf4lora.json" if noted else "no nf4lora.json says what it was trained on"
    assert code == 0 and f", {onto} ({why}), in float32" in out
    found = written(command("merge", adapter, "--out", "asked", "--dtype", "float32", "--onto", onto, "--json"))
    assert found["onto"] == onto and found["onto_reason"] == "as --onto says"
    assert Path("merged/model.safetensors").read_bytes() == Path("asked/model.safetensors").read_bytes()
    other = written(command("merge", adapter, "--out", "other", "--onto", "original" if onto == "decoded" else "decoded", "--json"))
    assert Path("merged/model.safetensors").read_bytes() != Path("other/model.safetensors").read_bytes() and other["onto"] != onto
    Path("adapter/nf4lora.json").write_text('{"base": ["nf4"]}')
    refused(command("merge", adapter, "--out", "x"), "adapter/nf4lora.json: found base ['nf4'], wanted nf4 or dense")
    Path("adapter/nf4lora.json").write_text("[" * 100_000)
    refused(command("merge", adapter, "--out", "x"), "holds no nf4lora.json that can be read")


def test_the_original_of_what_is_saved_in_4_bits_is_not_there(command, folder):
    assert command("quantize", folder, "four")[0] == 0
    adapter = saved(nf4lora.from_pretrained("four"), "adapter")
    for format in ("four", "bnb"):
        if format == "bnb":
            assert command("export", "four", "bnb")[0] == 0
        message = command("merge", adapter, "--base", format, "--out", "x", "--onto", "original")
        refused(message, "--onto: found original (as --onto says)", f"{format} is saved quantized", "decoded")
    assert command("merge", adapter, "--out", "merged")[0] == 0
    Path("adapter/nf4lora.json").write_text('{"base": "dense"}')
    refused(command("merge", adapter, "--out", "x"), "trained on that, says nf4lora.json", "four is saved quantized")


def test_an_adapter_of_another_model_or_half_of_one_is_refused(command, folder):
    for layers in (1, 3):
        tiny.llama(num_hidden_layers=layers).save_pretrained(f"of-{layers}")
    wide = saved(AutoModelForCausalLM.from_pretrained("of-3"), "wide")
    refused(command("merge", wide, "--base", folder, "--out", "x"), "4 tensors of no use", "layers.2.self_attn.q_proj.lora_A", "another")
    narrow = saved(AutoModelForCausalLM.from_pretrained("of-1"), "narrow")
    refused(command("merge", narrow, "--base", folder, "--out", "x"), "4 tensors missing", "layers.1.self_attn.q_proj.lora_A")
    for name, config in (
        ("LoRA", LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])),
        ("AdaLoRA", AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj", "v_proj"])),
    ):
        ranks = {}
        if name == "AdaLoRA":  # cut to some of its ranks, and one layer to none
            keys = [f"model.layers.{i}.self_attn.{n}_proj.lora_E" for i in range(2) for n in "qv"]
            ranks = {"rank_pattern": dict(zip(keys, ([True, False] * 2, [True] * 4, [False] * 4, [True] * 4), strict=True))}
        model = nf4lora.from_pretrained(folder)
        whole = saved(model, name, config, **ranks)
        file = whole / "adapter_model.safetensors"
        tensors = safetensors.torch.load_file(file)
        for key, kept in ranks.get("rank_pattern", {}).items():
            key, kept = "base_model.model." + key.removesuffix("lora_E"), torch.tensor(kept)
            tensors |= {key + "lora_E": tensors[key + "lora_E"][kept], key + "lora_A": tensors[key + "lora_A"][kept]}
            tensors[key + "lora_B"] = tensors[key + "lora_B"][:, kept].contiguous()
        safetensors.torch.save_file(tensors, file)
        assert command("merge", whole, "--out", f"merged-{name}")[0] == 0
        safetensors.torch.save_file(dict(list(tensors.items())[: len(tensors) // 2]), file)
        refused(command("merge", whole, "--out", "x"), f"{name} does not merge into {folder}")
        safetensors.torch.save_file(tensors | {"base_model.model.model.layers.0.more": torch.zeros(2)}, file)
        refused(command("merge", whole, "--out", "x"), "1 tensors of no use, such as base_model.model.model.layers.0.more")
        file.write_bytes(file.read_bytes()[:-100])
        refused(command("merge", whole, "--out", "x"), "does not merge into", "SafetensorError")
    assert not Path("x").exists()


@pytest.mark.parametrize("changes, texts", [
    ({"base_model_name_or_path": 5}, ["found base_model_name_or_path 5, wanted a folder or a Hub id"]),
    ({"base_model_name_or_path": ["m"]}, ["found base_model_name_or_path ['m']"]),
    ({"peft_type": "NOPE"}, ["does not merge into", "NOPE"]),
    ({"peft_type": ["LORA"]}, ["does not merge into"]),
    ({"target_modules": "("}, ["does not merge into", "missing )"]),
    ({"r": "four"}, ["does not merge into"]),
])  # fmt: skip
def test_damaged_adapters(command, folder, changes, texts):
    saved(AutoModelForCausalLM.from_pretrained(folder), "adapter", **changes)
    refused(command("merge", "adapter", "--out", "x"), "ADAPTER: ", *texts)
    for text in ("[" * 100_000, "{", "5", '{"r": NaN}'):
        Path("adapter/adapter_config.json").write_text(text)
        refused(command("merge", "adapter", "--out", "x", "--base", folder), "adapter holds no adapter_config.json that can be read")


def test_a_tied_head_merges_apart(command):
    tiny.gemma3().save_pretrained("tied")
    adapter = saved(nf4lora.from_pretrained("tied"), "adapter", LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
    wanted = logits(PeftModel.from_pretrained(nf4lora.from_pretrained("tied", dtype=torch.float32), adapter))
    assert command("merge", adapter, "--out", "merged", "--dtype", "float32")[0] == 0
    assert (logits(AutoModelForCausalLM.from_pretrained("merged")) - wanted).norm() <= 1e-5 * wanted.norm()


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
