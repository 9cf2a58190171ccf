"""A quant_type that is a path: the table of a type is a file of its name, and no other is opened."""

import json
from pathlib import Path

import pytest
import torch

from nf4lora import QuantState, quantize_4bit


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "dynamic", "", "nf4\0", "NF4"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_quant_type_that_is_a_path(monkeypatch, name, packed):
    opened = []
    original = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: opened.append(self) or original(self, *a, **k))
    given = quantize_4bit(torch.ones(64))[1].as_dict(packed=packed)
    if packed:
        text = json.loads(bytes(given.pop("quant_state.bitsandbytes__nf4").tolist())) | {"quant_type": name}
        given[f"quant_state_bitsandbytes__{name}".replace("state_", "state.", 1)] = torch.tensor(list(json.dumps(text).encode()), dtype=torch.uint8)
    else:
        given["quant_type"] = name
    with pytest.raises(ValueError, match="quant_type|unknown keys"):
        QuantState.from_dict(given)
    assert not opened
