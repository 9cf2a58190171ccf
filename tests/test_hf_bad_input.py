"""Checkpoints and options that cannot be loaded are refused with a sentence that names what was found, before harm is done."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import nf4lora.hf
from nf4lora import NF4Linear, NF4LoRALinear, replace_linears
from nf4lora.hf.bnb_format import save_bitsandbytes
from nf4lora.hf.checkpoint import CheckpointError
from nf4lora.hf.config import NF4Config
from nf4lora.hf.conversion import Quantize
from nf4lora.hf.loading import from_pretrained
from nf4lora.hf.quantizer import SENTENCE

pytestmark = pytest.mark.usefixtures("one_thread")
LOADERS = (from_pretrained, AutoModelForCausalLM.from_pretrained)
LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    tiny.llama().save_pretrained(folder, max_shard_size="20KB")
    return folder


@pytest.fixture(scope="module")
def native(tmp_path_factory, dense):
    folder = tmp_path_factory.mktemp("native")
    from_pretrained(dense).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bnb(tmp_path_factory, dense):
    folder = tmp_path_factory.mktemp("bnb")
    save_bitsandbytes(from_pretrained(dense), folder)
    return folder


@pytest.fixture
def copied(tmp_path):
    def copy(folder):
        for file in folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        return tmp_path

    return copy


def changed(folder, change, name="model.safetensors"):
    """Change the tensors of a file in place."""
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name, metadata={"format": "pt"})
    return folder


def said(folder, **changes):
    """Change `quantization_config` in config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))
    return folder


def test_without_the_import_the_sentence_is_printed(native):
    """transformers alone prints the names of tensors that it has no place for, one of which is the sentence; then it fails."""
    code = "import sys, transformers\ntransformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(native)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "import nf4lora.hf" in SENTENCE and SENTENCE in done.stderr + done.stdout
    assert "Unknown quantization type, got nf4lora" in done.stderr and "MISMATCH" in done.stderr
    _, info = AutoModelForCausalLM.from_pretrained(native, output_loading_info=True)
    assert not any(info.values())


@pytest.mark.parametrize("load", LOADERS)
def test_a_shard_is_missing(dense, copied, load):
    folder = copied(dense)
    gone = sorted(folder.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=f"1 of 12 files missing: {gone.name}"):
        load(folder, quantization_config=NF4Config())


@pytest.mark.parametrize("load", LOADERS)
def test_a_shard_is_cut_short(dense, copied, load):
    folder = copied(dense)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=f"{shard.name}: truncated or damaged"):
        load(folder, quantization_config=NF4Config())


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 100_000]
)
def test_an_index_that_is_none(dense, copied, text):
    folder = copied(dense)
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="index"):
        from_pretrained(folder)


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(dense, copied, monkeypatch, load, value):
    folder = copied(dense)
    index = json.loads((folder / "model.safetensors.index.json").read_text())

    def spoil(tensors):
        tensors[f"{LAYER}.weight"][3, 5] = value

    changed(folder, spoil, index["weight_map"][f"{LAYER}.weight"])
    read, convert = [], Quantize.convert
    monkeypatch.setattr(Quantize, "convert", lambda self, found, **kwargs: read.extend(found) or convert(self, found, **kwargs))
    with pytest.raises(ValueError, match=rf"{LAYER}\.weight: .*1 NaN or Inf"):
        load(folder, quantization_config=NF4Config())
    newer = tuple(map(int, transformers.__version__.split(".")[:2])) > (5, 17)  # others read to the end
    assert f"{LAYER}.weight" in read and (read[-1] == f"{LAYER}.weight") >= newer


@pytest.mark.parametrize("load", LOADERS)
def test_weights_of_another_shape(dense, copied, load):
    folder = copied(dense)
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"intermediate_size": 128', '"intermediate_size": 192'))
    with pytest.raises(ValueError, match=r"layers\.\d\.mlp\.\w+_proj\.weight: weight: found shape \(.*128.*, wanted .*192"):
        load(folder, quantization_config=NF4Config())


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("part", ["weight", "weight_absmax", "weight_nested_offset"])
def test_a_layer_that_is_not_whole(native, copied, load, part):
    with pytest.raises(CheckpointError, match=f"{LAYER}: the checkpoint holds no {part};"):
        load(changed(copied(native), lambda tensors: tensors.pop(f"{LAYER}.{part}")))


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("change", [{"blocksize": 128}, {"double_quant": False}])
def test_a_configuration_that_is_not_of_its_tensors(native, copied, load, change):
    """Another blocksize has another number of absmax, and their dtype says whether they are quantized."""
    with pytest.raises(
        (RuntimeError, ValueError), match=r"weight_absmax: found (U8, wanted I32|\[64\], wanted)|above report"
    ):
        load(said(copied(native), **change))


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(
    "part, change",
    [
        ("weight", lambda t: t[:-1].clone()),
        ("weight_absmax", lambda t: t.to(torch.int32)),
        ("weight_nested_absmax", lambda t: t.view(torch.float32)),
        ("weight_nested_offset", lambda t: t.repeat(2)),
    ],
)
def test_tensors_of_another_size_or_dtype(native, copied, load, part, change):
    folder = changed(copied(native), lambda tensors: tensors.update({f"{LAYER}.{part}": change(tensors[f"{LAYER}.{part}"])}))
    with pytest.raises((RuntimeError, ValueError), match=rf"above report|{LAYER}\.{part}: found .*, wanted"):
        load(folder)


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(
    "changes, error",
    [
        ({"blocksize": 7}, "blocksize: found 7"),
        ({"blocksize": 10**30}, "blocksize"),
        ({"quant_type": "int3"}, "quant_type: found 'int3'"),
        ({"double_quant": "yes"}, "double_quant: found 'yes'"),
        ({"compute_dtype": "__class__"}, "compute_dtype: found __class__"),
        ({"compute_dtype": "float64"}, "compute_dtype: found float64"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert: found the string"),
        ({"modules_to_not_convert": [3]}, "modules_to_not_convert: found 3"),
        ({"modules_to_not_convert": [""]}, "modules_to_not_convert: found ''"),
        ({"modules_to_not_convert": ["("]}, r"modules_to_not_convert: found '\('"),
        ({"checkpoint_format": "gguf"}, "checkpoint_format: found 'gguf'"),
        ({"trust_me": 1}, "trust_me"),
    ],
)
def test_absurd_options(native, copied, load, changes, error):
    with pytest.raises((ValueError, TypeError), match=error):
        load(said(copied(native), **changes))


def test_options_are_an_nf4config(dense):
    with pytest.raises(TypeError, match="quantization_config: found BitsAndBytesConfig, wanted an NF4Config"):
        from_pretrained(dense, BitsAndBytesConfig(load_in_4bit=True))


@pytest.mark.parametrize("skip", [[], ["q_proj"]])
def test_a_tied_head_cannot_be_quantized(tmp_path, skip):
    tiny.gemma3().save_pretrained(tmp_path)
    for load in LOADERS:
        with pytest.raises(ValueError, match="lm_head: its weight is tied .*wanted 'lm_head' among them, or None"):
            load(tmp_path, quantization_config=NF4Config(modules_to_not_convert=skip))
    model = from_pretrained(tmp_path, NF4Config(modules_to_not_convert=["lm_head"]))
    assert model.lm_head.weight is model.get_input_embeddings().weight


# bitsandbytes' checkpoints


def test_nf4config_over_a_bitsandbytes_checkpoint(bnb):
    """transformers refuses two kinds of quantization; ours knows how to read it."""
    with pytest.raises(ValueError, match="BitsAndBytesConfig but you are passing a NF4Config"):
        AutoModelForCausalLM.from_pretrained(bnb, quantization_config=NF4Config())
    with pytest.warns(UserWarning, match="quantized already, with double_quant=True"):
        model = from_pretrained(bnb, NF4Config(double_quant=False))
    assert sum(isinstance(m, NF4Linear) for m in model.modules()) == 14


@pytest.mark.parametrize(
    "quantization, found",
    [
        ({"load_in_4bit": False, "load_in_8bit": True}, "8-bit bitsandbytes"),
        ({"quant_method": "gptq", "load_in_4bit": False}, "quant_method 'gptq'"),
        ({"quant_method": "awq", "load_in_4bit": False}, "quant_method 'awq'"),
        ({"quant_method": None, "load_in_4bit": False, "load_in_8bit": False}, "quant_method None"),
    ],
)
def test_other_quantizations(bnb, copied, quantization, found):
    with pytest.raises(ValueError, match=f"found a checkpoint of {found}, wanted one in 16 bits"):
        from_pretrained(said(copied(bnb), **quantization))


def with_state(kind, **changes):
    """Changes the JSON of one layer's quant_state."""

    def change(tensors):
        old = f"{LAYER}.weight.quant_state.bitsandbytes__nf4"
        state = json.loads(bytes(tensors.pop(old).tolist())) | {"quant_type": kind} | changes
        tensors[old.replace("nf4", kind)] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        if kind == "fp4":
            tensors[f"{LAYER}.weight.quant_map"] = nf4lora.codebook.codebook("fp4") + 0.0

    return change


@pytest.mark.parametrize(
    "change, error",
    [
        (with_state("fp4"), r"found .* as \('nf4', 64, True\) and model.layers.1.mlp.up_proj as \('fp4', 64, True\)"),
        (with_state("nf4", shape=[64, 128]), rf"{LAYER}\.weight: found a 4-bit weight of shape \(64, 128\), wanted \(128, 64\)"),
        (with_state("nf4", shape=[2**40, 2**40]), rf"{LAYER}\.weight: shape"),
        (with_state("nf4", blocksize=128), rf"{LAYER}\.weight: absmax: found 128 elements, wanted 64"),
        (with_state("nf4", dtype="float64"), rf"{LAYER}\.weight: dtype: found 'float64'"),
        (with_state("nf4", evil=1), rf"{LAYER}\.weight: quant state: unknown keys \['evil'\]"),
        (lambda t: t.pop(f"{LAYER}.weight.absmax"), rf"{LAYER}\.weight: quant state: missing \['absmax'\]"),
        (lambda t: t.pop(f"{LAYER}.weight.quant_state.bitsandbytes__nf4"), rf"{LAYER}\.weight: quant state: missing"),
        (
            lambda t: [t.pop(k) for k in list(t) if k.startswith(f"{LAYER}.weight.")],
            rf"{LAYER}\.weight: found weight torch.uint8 alone",
        ),
        (lambda t: t.pop(f"{LAYER}.weight"), rf"{LAYER}\.weight: found .* without the packed weight"),
        (
            lambda t: t.update({f"{LAYER}.weight": t[f"{LAYER}.weight"][:-7].clone()}),
            rf"{LAYER}\.weight: found 4089 packed bytes, wanted 4096",
        ),
    ],
)
def test_damaged_bitsandbytes_checkpoints(bnb, copied, change, error):
    with pytest.raises(ValueError, match=error):
        from_pretrained(changed(copied(bnb), change))


def test_an_adapter_of_ours_in_a_saved_model_is_not_dropped(dense, tmp_path):
    model = replace_linears(from_pretrained(dense), r=2)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lora_A, an adapter of NF4LoRALinear, which from_pretrained would drop.*save_adapter"):
        from_pretrained(tmp_path)


def test_linears_of_other_classes_and_mixers_that_read_a_weight(tmp_path, monkeypatch):
    from nf4lora.hf import experts

    log = []
    monkeypatch.setattr(experts.logger, "warning", log.append)
    falcon = dict(vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    AutoModelForCausalLM.from_config(transformers.FalconConfig(**falcon)).save_pretrained(tmp_path / "falcon")
    from_pretrained(tmp_path / "falcon")
    assert len(log) == 1 and "in 8 linears of class FalconLinear stay in torch.float32, transformer.h.0" in log[0]
    mamba = transformers.MambaConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2, state_size=4)
    AutoModelForCausalLM.from_config(mamba).save_pretrained(tmp_path / "mamba")
    model = from_pretrained(tmp_path / "mamba")
    assert type(model.backbone.layers[0].mixer.dt_proj) is torch.nn.Linear
    assert isinstance(model.backbone.layers[0].mixer.in_proj, NF4Linear)
    assert model(input_ids=tiny.tokens()).logits.isfinite().all()
    model.save_pretrained(tmp_path / "four")
    with torch.no_grad():
        assert torch.equal(from_pretrained(tmp_path / "four")(input_ids=tiny.tokens()).logits, model(input_ids=tiny.tokens()).logits)


def test_export_refuses(dense, tmp_path):
    import peft

    model = from_pretrained(dense)
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(ValueError, match="thesis.tex: found a file, wanted a folder"):
        save_bitsandbytes(model, tmp_path / "thesis.tex")
    mixed = from_pretrained(dense)
    mixed.set_submodule(LAYER, NF4Linear(64, 128, bias=False, quant_type="fp4", dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=f"{LAYER} as \\('fp4', 64, True\\)"):
        save_bitsandbytes(mixed, tmp_path / "bnb")
    with pytest.raises(ValueError, match="found no NF4Linear"):
        save_bitsandbytes(tiny.llama(), tmp_path / "bnb")
    with pytest.raises(ValueError, match="found an adapter"):
        save_bitsandbytes(replace_linears(from_pretrained(dense), r=2), tmp_path / "bnb")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="adapters of peft"):
        save_bitsandbytes(adapted.get_base_model(), tmp_path / "bnb")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    save_bitsandbytes(adapted.unload(), tmp_path / "bnb")
    assert not any(isinstance(m, NF4LoRALinear) for m in from_pretrained(tmp_path / "bnb").modules())


def test_a_full_disk_leaves_what_was_there(bnb, dense, copied, monkeypatch):
    folder = copied(bnb)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    monkeypatch.setattr(
        transformers.modeling_utils, "safe_save_file", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OSError, match="No space left"):
        save_bitsandbytes(from_pretrained(dense), folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before and not list(Path(folder.parent).glob(".nf4lora-tmp-*"))
