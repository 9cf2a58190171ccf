"""Configurations that name a module, a class or an attribute: nothing is imported and nothing looked up."""

import json
import sys

import peft
import pytest
from torch import nn

from nf4lora import NF4Linear
from nf4lora.hf import from_pretrained, load_adapter


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("kind", ["native", "bnb"])
def test_remote_code_needs_trust(copy, module, monkeypatch, kind):
    name, ran = module
    folder = copy(kind)
    (folder / "evil.py").write_text(f"import {name}\n")
    custom = {"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    edit(folder / "config.json", **custom)
    from_pretrained(folder)  # a class of transformers
    edit(folder / "config.json", model_type="evil")
    with pytest.raises(ValueError, match="trust_remote_code"):
        from_pretrained(folder, trust_remote_code=False)
    assert not ran.exists() and name not in sys.modules


def test_an_adapter_that_names_a_class(copy, module, model):
    name, ran = module
    custom = {"auto_mapping": {"base_model_class": "Evil", "parent_library": name}, "task_type": None, "x": {"module": name}}
    folder = copy("adapter")
    edit(folder / "adapter_config.json", **custom)
    load_adapter(model, folder)
    base = nn.Sequential(NF4Linear(64, 32))
    peft.PeftModel.from_pretrained(base, folder)
    assert not ran.exists() and name not in sys.modules


@pytest.mark.parametrize("field", ["compute_dtype", "quant_type", "checkpoint_format", "quant_method"])
@pytest.mark.parametrize("value", ["evil_module.Evil", "__class__", "os.system", "../../x"])
def test_options_are_of_a_list(copy, module, field, value):
    folder = copy("native")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit(folder / "config.json", quantization_config=config | {field: value})
    with pytest.raises((ValueError, TypeError), match="found"):
        from_pretrained(folder)
    assert not module[1].exists()
