"""Pipes and devices in the place of files: nothing waits for them, and nothing reads them without end."""

import os

import pytest

from nf4lora.hf import from_pretrained, load_adapter

PLACES = {"native": "model.safetensors", "bnb": "model.safetensors", "dense": "model-00001-of-00012.safetensors"}


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def device(path):
    path.unlink()
    path.symlink_to("/dev/zero")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("put", [pipe, device])
@pytest.mark.parametrize("kind", PLACES)
def test_weights(copy, kind, put):
    folder = copy(kind)
    put(folder / PLACES[kind])
    with pytest.raises((ValueError, OSError), match="missing|no file named"):
        from_pretrained(folder)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("put", [pipe, device])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter(copy, model, name, put):
    folder = copy("adapter")
    put(folder / name)
    with pytest.raises(ValueError, match=f"{name}: no such file"):
        load_adapter(model, folder)
