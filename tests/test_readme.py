"""README.md's example runs as it stands there, and its commands are the two that CI runs."""

import re
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.M | re.S)


def test_the_example_runs(tmp_path, monkeypatch):
    (code,) = blocks("python")
    monkeypatch.chdir(tmp_path)
    tiny = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    LlamaForCausalLM(tiny).save_pretrained("path/to/model")
    names = {"batch": torch.arange(24).view(2, 12)}
    exec(code, names)
    trained = [p for p in names["model"].parameters() if p.requires_grad]
    assert len(trained) == 14 and any(p.grad.abs().max() > 0 for p in trained)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_the_commands_are_two_lines_and_the_readme_is_short():
    (commands,) = blocks("bash")
    first, second = commands.splitlines()
    assert "-c constraints.txt" in first and first.endswith("nf4lora finetune")
    assert "-c constraints.txt" in second and second.endswith("pytest")
    assert len(TEXT.splitlines()) <= 200


def test_numbers_name_a_results_file_that_is_there():
    named = set(re.findall(r"bench/results/[\w.]+", TEXT))
    assert named and all((ROOT / name).is_file() for name in named)
