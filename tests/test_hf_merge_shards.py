"""Merging to the disk writes, byte for byte, what merging in memory and saving writes, and holds one layer at a time."""

import copy

import pytest
import safetensors.torch
import tiny
import torch
import transformers
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM

from nf4lora.cli.memory import peak_bytes
from nf4lora.cli.progress import Later
from nf4lora.hf import NF4Config, merge_and_unload, save_merged

pytestmark = pytest.mark.filterwarnings("ignore:.*")  # peft's, of many kinds
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"], "qwen3_moe": ["q_proj", "o_proj"], "gpt2": ["c_attn", "c_fc"],
    "gemma3": ["k_proj", "down_proj"],
}  # fmt: skip
TUNERS = {
    "LoRA": lambda **targets: LoraConfig(r=4, **targets),
    "DoRA": lambda **targets: LoraConfig(r=4, use_dora=True, **targets),
    "AdaLoRA": lambda **targets: AdaLoraConfig(init_r=4, target_r=2, total_step=10, **targets),
    "IA3": lambda **targets: IA3Config(feedforward_modules=[], **targets),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("bases")
    for family in TARGETS:
        tiny.FAMILIES[family]().save_pretrained(path / family)
    return path


def learned(folder, config, quantization_config=None, **kwargs):
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization_config, **kwargs)
    torch.manual_seed(0)
    model = get_peft_model(model, copy.deepcopy(config))
    for p in [p for p in model.parameters() if p.requires_grad]:
        p.data.add_(torch.randn_like(p) * 0.03)
    return model.eval()


def config_for(family, tuner):
    return TUNERS[tuner](target_modules=TARGETS[family], **({"fan_in_fan_out": True} if family == "gpt2" else {}))


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tensors(folder):
    return {name: t for path in folder.glob("*.safetensors") for name, t in safetensors.torch.load_file(path).items()}


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("family", TARGETS)
def test_the_files_are_those_of_merging_in_memory(folders, tmp_path, family, tuner):
    """Tied heads, Conv1D and experts, which are cut into one tensor each, among them."""
    config, seen = config_for(family, tuner), []
    for name, sizes in (("one", {}), ("many", {"max_shard_size": 20_000}))[: 2 if tuner == "LoRA" else 1]:
        model = merge_and_unload(learned(folders / family, config, NF4Config()), safe_merge=True)
        model.save_pretrained(tmp_path / f"memory-{name}", **sizes)
        save_merged(
            learned(folders / family, config, NF4Config()), tmp_path / f"disk-{name}", **sizes, progress=lambda *at: seen.append(at)
        )
        wanted, found = files(tmp_path / f"memory-{name}"), files(tmp_path / f"disk-{name}")
        assert (len(wanted) > 8) == (name == "many")
        if name == "one" or family != "qwen3_moe":
            assert found == wanted
            continue
        # views of one stack are to stay in one file, as transformers sees them; tensors that are yet to be made are no views
        wanted, found = tensors(tmp_path / "memory-many"), tensors(tmp_path / "disk-many")
        assert found.keys() == wanted.keys() and all(t.equal(wanted[n]) for n, t in found.items())
        assert max(p.stat().st_size for p in (tmp_path / "disk-many").glob("*.safetensors")) < 22_000
        AutoModelForCausalLM.from_pretrained(tmp_path / "disk-many")
    assert seen[-1][0] == seen[-1][1] and seen[0][0] < seen[0][1]


def test_in_float32_with_biases_and_with_what_was_merged_before(tmp_path):
    tiny.llama(attention_bias=True).save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], lora_bias=True)
    for merged_before in (False, True):
        one, other = (learned(tmp_path / "base", config, NF4Config()) for _ in range(2))
        if merged_before:
            one.merge_adapter()
            other.merge_adapter()
        merge_and_unload(one, torch.float32, safe_merge=True).save_pretrained(tmp_path / "memory")
        save_merged(other, tmp_path / "disk", torch.float32)
        assert files(tmp_path / "disk") == files(tmp_path / "memory")


def test_of_two_adapters_the_one_that_is_named_and_of_a_dense_base(folders, tmp_path):
    config = config_for("llama", "LoRA")
    for base in (NF4Config(), None):
        for name in ("memory", "disk"):
            model = learned(folders / "llama", config, base)
            model.add_adapter("b", copy.deepcopy(config))
            torch.manual_seed(1)
            for p in [p for n, p in model.named_parameters() if ".b." in n]:
                p.data.normal_(std=0.05)
            if name == "disk":
                save_merged(model, tmp_path / name, adapter_names=["b"])
            else:
                merge_and_unload(model, adapter_names=["b"]).save_pretrained(tmp_path / name)
        assert files(tmp_path / "disk") == files(tmp_path / "memory")


# What is made for one layer, of its weight in float32 times
WIDE = {"llama": dict(hidden_size=256, intermediate_size=512), "gpt2": dict(n_embd=192), "qwen3_moe": dict(num_experts=16)}
CASES = [("llama", "LoRA", 7), ("gpt2", "DoRA", 7), ("llama", "AdaLoRA", 7), ("llama", "IA3", 7), ("qwen3_moe", "LoRA", 2)]


@pytest.mark.parametrize(("family", "tuner", "times"), CASES)
def test_there_is_one_layer_at_a_time(tmp_path, family, tuner, times, figures):
    """Every allocation of torch's is counted, while what is in 4 bits is there all the time."""
    layers = {"n_layer" if family == "gpt2" else "num_hidden_layers": 8}
    model = tiny.FAMILIES[family](**layers, **WIDE[family])
    largest = 4 * max(p.numel() for n, p in model.named_parameters() if ".layers." in n or ".h." in n)
    model.save_pretrained(tmp_path / "base")
    config = config_for(family, tuner)
    model = learned(tmp_path / "base", config, NF4Config())
    beyond = peak_bytes(lambda: save_merged(model, tmp_path / "disk"), torch.device("cpu"), 0)
    whole = (tmp_path / "disk" / "model.safetensors").stat().st_size
    figures[f"merged to the disk, {family}, {tuner}: bytes beyond the model, of its largest layer in float32 times"] = round(
        beyond / largest, 2
    )
    assert beyond <= times * largest < 0.75 * whole
    if tuner == "LoRA":
        model = learned(tmp_path / "base", config, NF4Config())
        in_memory = peak_bytes(lambda: merge_and_unload(model).save_pretrained(tmp_path / "memory"), torch.device("cpu"), 0)
        assert in_memory > 0.9 * whole


def test_what_is_not_merged(folders, tmp_path):
    model = learned(folders / "llama", config_for("llama", "LoRA"), NF4Config())
    last = [m for m in model.modules() if isinstance(m, BaseTunerLayer)][-1]
    last.lora_B["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="layers.1.mlp.down_proj: found NaN or Inf in the merged weights"):
        save_merged(model, tmp_path / "disk")
    save_file = transformers.modeling_utils.safe_save_file
    assert save_file is safetensors.torch.save_file  # also after an error
    with pytest.raises(TypeError, match="dtype: found torch.int8"):
        save_merged(model, tmp_path / "disk", torch.int8)
    with pytest.raises(TypeError, match="wanted a peft model whose adapters change weights"):
        save_merged(get_peft_model(tiny.llama(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)), tmp_path / "x")
    module = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    with pytest.raises(TypeError, match="found a Sequential as its base, wanted a model of transformers"):
        save_merged(PeftModel(module.base_model.model, LoraConfig(target_modules=["0"])), tmp_path / "x")


def test_the_bar_shows_after_a_second(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with Later("merging") as bar:
        bar.update(500, 1000)
        assert capsys.readouterr().err == ""
        now[0] = 1.5
        for done in (600, 610, 1000):
            bar.update(done, 1000)
    assert capsys.readouterr().err.splitlines() == ["merging: 60 % of 1,000 bytes", "merging: 100 % of 1,000 bytes"]
