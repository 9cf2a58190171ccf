"""An index that names a file outside of its folder: it is not opened."""

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from nf4lora.hf import NF4Config, from_pretrained, shards
from nf4lora.hf.checkpoint import CheckpointError


@pytest.mark.parametrize("load", [from_pretrained, AutoModelForCausalLM.from_pretrained])
@pytest.mark.parametrize("name", ["../outside.safetensors", "{}/outside.safetensors", "x/../../outside.safetensors"])
def test_an_index_that_points_outside(copy, tmp_path_factory, monkeypatch, load, name):
    outside, folder = tmp_path_factory.mktemp("else"), copy("dense")
    secret = (outside if name.startswith("{") else folder.parent) / "outside.safetensors"
    first = sorted(folder.glob("model-*.safetensors"))[0]
    secret.write_bytes(first.read_bytes())
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    bad = name.format(outside)
    index["weight_map"] = {key: bad if file == first.name else file for key, file in index["weight_map"].items()}
    path.write_text(json.dumps(index))
    opened = []
    original = shards.safe_open
    for module in (shards, sys.modules["transformers.modeling_utils"]):
        monkeypatch.setattr(module, "safe_open", lambda file, *a, **k: opened.append(str(file)) or original(file, *a, **k))
    with pytest.raises(CheckpointError, match="outside of this folder"):
        load(folder, quantization_config=NF4Config(), dtype=torch.bfloat16)
    assert not [file for file in opened if "outside" in file]
