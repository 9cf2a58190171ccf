"""Weights in a pickle, under its own name or under that of a safetensors file: the payload does not run."""

import shutil

import pytest

from nf4lora.hf import from_pretrained
from nf4lora.hf.checkpoint import CheckpointError


def test_a_pickle(copy, payload):
    file, ran = payload
    folder = copy("native")
    (folder / "model.safetensors").unlink()
    shutil.copy(file, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin, which is a pickle"):
        from_pretrained(folder)
    with pytest.raises(ValueError, match="use_safetensors: found False"):
        from_pretrained(folder, use_safetensors=False)
    assert not ran.exists()


@pytest.mark.parametrize("kind", ["native", "bnb"])
def test_a_pickle_in_disguise(copy, payload, kind):
    file, ran = payload
    folder = copy(kind)
    shutil.copy(file, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated or damaged"):
        from_pretrained(folder)
    assert not ran.exists()
