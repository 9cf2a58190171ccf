"""Folders to attack, and what an attacker would have run."""

import os
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn

from nf4lora import NF4LoRALinear
from nf4lora.hf import from_pretrained, save_adapter, save_bitsandbytes


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A tiny model on disk: `dense` in 12 files with an index, `native` and `bnb` in 4 bits; an `adapter` of `small()`."""
    at = tmp_path_factory.mktemp("saved")
    tiny.llama().save_pretrained(at / "dense", max_shard_size="20KB")
    model = from_pretrained(at / "dense")
    model.save_pretrained(at / "native")
    save_bitsandbytes(model, at / "bnb")
    save_adapter(small(), at / "adapter")
    return at


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of one of the folders of `saved`, to be attacked."""
    return lambda kind: Path(shutil.copytree(saved / kind, tmp_path / "copy"))


def small() -> nn.Module:
    return nn.Sequential(NF4LoRALinear(64, 32, r=2))


@pytest.fixture
def model():
    """What the adapter of `saved` belongs to."""
    return small()


class Payload:
    """Where it is unpickled, it makes a folder."""

    def __init__(self, at):
        self.at = str(at)

    def __reduce__(self):
        return os.mkdir, (self.at,)


@pytest.fixture
def payload(tmp_path):
    """A pickle file of a state dict with a payload in it, and the folder that the payload makes."""
    file, ran = tmp_path / "payload.bin", tmp_path / "ran"
    torch.save({"lm_head.weight": Payload(ran)}, file)
    with pytest.raises(FileExistsError):  # it does run where it is let
        ran.mkdir()
        torch.load(file, weights_only=False)
    ran.rmdir()
    return file, ran


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module on sys.path, and the folder that its import makes."""
    ran = tmp_path / "imported"
    (tmp_path / "evil_module.py").write_text(f"import os\nos.mkdir({str(ran)!r})\nclass Evil: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    return "evil_module", ran
