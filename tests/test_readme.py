"""README.md's example runs as it stands there, and its commands are the two that CI runs."""

import re
from pathlib import Path

import pytest
import tiny

import nf4lora
import nf4lora.hf
from nf4lora.bench import displays
from nf4lora.hf.peft_lora import NF4LoraLinear
from nf4lora.optim import PagedAdamW8bit

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.M | re.S)


@pytest.mark.filterwarnings("ignore:paged optimizer")
def test_the_example_runs(tmp_path, monkeypatch):
    (code,) = blocks("python")
    monkeypatch.chdir(tmp_path)
    tiny.llama().save_pretrained("path/to/model")
    names = {"data": [{"input_ids": row, "labels": row} for row in tiny.tokens(8)]}
    exec(code.replace("max_steps=100", "max_steps=2, report_to=[], disable_tqdm=True"), names)
    assert names["trainer"].state.global_step == 2 and type(names["trainer"].optimizer.optimizer) is PagedAdamW8bit
    trained = [p for p in names["model"].parameters() if p.requires_grad]
    assert len(trained) == 2 * 14 and sum(isinstance(m, NF4LoraLinear) for m in names["model"].modules()) == 14
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_what_the_text_names_is_there():
    for name in re.findall(r"`nf4lora\.hf\.(\w+)", TEXT):
        assert hasattr(nf4lora.hf, name), name
    listed = TEXT[TEXT.index("Of `nf4lora.hf`:") : TEXT.index("Without peft:")]
    assert len(names := re.findall(r"`(\w+)", listed)[1:]) > 5
    for name in names:
        assert name in nf4lora.hf.__all__, name
    assert "max_steps=100" in TEXT and callable(nf4lora.patch_bitsandbytes)


def test_the_commands_are_two_lines_and_the_readme_is_short():
    (commands,) = blocks("bash")
    first, second = commands.splitlines()
    assert "-c constraints.txt" in first and first.endswith("nf4lora finetune")
    assert "-c constraints.txt" in second and second.endswith("pytest")
    assert len(TEXT.splitlines()) <= 200


@pytest.mark.parametrize("name", ["plan", "claims"])
def test_displays_show_what_the_command_says_now(name):
    """Their texts, in order; how rich draws them is its own."""
    kept, now = (re.findall(r">([^<]+)</text>", svg) for svg in ((ROOT / f"bench/results/{name}.svg").read_text(), displays.svg(name)))
    assert len(kept) > 100 and kept == now
    assert f"](bench/results/{name}.svg)" in TEXT and "](bench/results/training.svg)" in TEXT


def test_numbers_name_a_results_file_that_is_there():
    named = set(re.findall(r"bench/results/[\w.]+", TEXT))
    assert named and all((ROOT / name).is_file() for name in named)
