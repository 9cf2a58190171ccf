"""Sizes that no format has, in config.json and in the state of a weight."""

import json

import pytest
import safetensors.torch
import torch

from nf4lora.hf import from_pretrained

KEY = "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize("blocksize", [0, -64, 1, 2**40, 2**64, 64.0, True, None, "64", [64]])
def test_blocksize(copy, blocksize):
    folder = copy("native")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["blocksize"] = blocksize
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="blocksize: found"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    "changes",
    [{"blocksize": v} for v in (0, -64, 2**40, 64.0, True)] + [{"nested_blocksize": v} for v in (0, -256, 2**40, 256.0)]
    + [{"shape": v} for v in ([2**62, 2**62], [2**70, 0], [-128, -64], [0, 64], [128.0, 64], [True, 64], [])]
    + [{"nested_offset": v} for v in (float("nan"), float("inf"), 1e39, -1e300, 10**400)],
    ids=str,
)  # fmt: skip
def test_a_state(copy, changes):
    folder = copy("bnb")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    text = json.loads(bytes(tensors[KEY].tolist())) | changes
    tensors[KEY] = torch.tensor(list(json.dumps(text).encode()), dtype=torch.uint8)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((ValueError, TypeError), match=rf"up_proj\.weight: .*({next(iter(changes))}|absmax)"):
        from_pretrained(folder)
