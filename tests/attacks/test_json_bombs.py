"""JSON that is deep, large, or of numbers that are none, wherever JSON is read."""

import json

import pytest
import torch

from nf4lora import QuantState, quantize_4bit
from nf4lora.hf import from_pretrained, load_adapter
from nf4lora.hf.checkpoint import CheckpointError, parse_json

BOMBS = {
    "a list": b"[]", "torn": b"{", "NaN": b'{"a": NaN}', "Infinity": b'{"a": Infinity}', "no text": b"\xff", "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000, "large": b" " * (1 << 20) + b"{}", "a long number": b'{"a": 1' + b"0" * 5000 + b"}",
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_our_files(copy, model, bomb):
    with pytest.raises(CheckpointError, match="some.json"):
        parse_json(BOMBS[bomb], "some.json")
    folder = copy("adapter")
    (folder / "adapter_config.json").write_bytes(BOMBS[bomb])
    with pytest.raises(ValueError, match="adapter_config.json"):
        load_adapter(model, folder)


@pytest.mark.parametrize("bomb", BOMBS)
def test_the_json_in_a_tensor(bomb):
    _, state = quantize_4bit(torch.ones(64), compress_statistics=True)
    bomb = torch.tensor(list(BOMBS[bomb]), dtype=torch.uint8)
    with pytest.raises(ValueError, match="JSON|quant_type"):
        QuantState.from_dict(state.as_dict() | {"quant_state.bitsandbytes__nf4": bomb})


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "1" + "0" * 5000])
def test_numbers_that_are_none(number):
    good = quantize_4bit(torch.ones(64), compress_statistics=True)[1].as_dict()
    key = "quant_state.bitsandbytes__nf4"
    text = bytes(good[key].tolist()).decode()
    bad = text.replace(str(json.loads(text)["nested_offset"]), number).encode()
    with pytest.raises(ValueError, match="nested_offset|JSON"):
        QuantState.from_dict(good | {key: torch.tensor(list(bad), dtype=torch.uint8)})


@pytest.mark.parametrize("bomb", ["a list", "torn", "no text", "deep", "deep objects", "a long number"])
def test_an_index(copy, bomb):
    folder = copy("dense")
    (folder / "model.safetensors.index.json").write_bytes(BOMBS[bomb])
    with pytest.raises(CheckpointError, match=r"index\.json: no index of a checkpoint"):
        from_pretrained(folder)
