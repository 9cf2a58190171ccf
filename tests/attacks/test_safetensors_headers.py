"""Safetensors files whose header claims what is not there: refused before anything of that size is made."""

import json
import resource
import struct

import pytest
import safetensors.torch
import torch

from nf4lora.hf import from_pretrained, load_adapter
from nf4lora.hf.checkpoint import CheckpointError, parse_tensors

DATA = 64


def file_of(header, data=b"\0" * DATA, length=None):
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(dtype="U8", shape=(DATA,), begin=0, end=DATA):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


CLAIMS = {
    "a header of 2^63 - 1 bytes": file_of({"a": tensor()}, length=2**63 - 1),
    "a header of 2^64 - 1 bytes": file_of({"a": tensor()}, length=2**64 - 1),
    "a header of 0 bytes": file_of({"a": tensor()}, length=0),
    "a header past the end": file_of({"a": tensor()}, length=10**6),
    "a header over the limit": file_of(b" " * 100_000_001 + b"{}"),
    "no header": b"",
    "overlapping tensors": file_of({"a": tensor(), "b": tensor()}),
    "a hole": file_of({"a": tensor(shape=[8], end=8), "b": tensor(shape=[8], begin=56)}),
    "bytes after the last": file_of({"a": tensor()}, b"\0" * DATA + b"PK\3\4"),
    "fewer bytes than claimed": file_of({"a": tensor()}, b"\0" * 8),
    "an end before the begin": file_of({"a": tensor(begin=DATA, end=0)}),
    "a negative begin": file_of({"a": tensor(begin=-8)}),
    "an end of 2^64": file_of({"a": tensor(end=2**64)}),
    "a shape of 2^80": file_of({"a": tensor(shape=[2**40, 2**40])}),
    "a shape that wraps to its size": file_of({"a": tensor(shape=[2**32 + 1, 2**32, DATA])}),
    "a negative shape": file_of({"a": tensor(shape=[-8, -8])}),
    "another size than its shape": file_of({"a": tensor(shape=[DATA - 1])}),
    "a dtype that is none": file_of({"a": tensor("__class__")}),
    "a deep header": file_of(b"[" * 100_000),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_claim(copy, model, claim):
    usual = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=r"x.safetensors: truncated or damaged"):
        parse_tensors(CLAIMS[claim], "x.safetensors")
    adapter = copy("adapter")
    (adapter / "adapter_model.safetensors").write_bytes(CLAIMS[claim])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors: (truncated or damaged|\d+ bytes, wanted at most)"):
        load_adapter(model, adapter)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - usual) * 1024 < 600 << 20


@pytest.mark.parametrize("claim", [c for c in CLAIMS if "limit" not in c])
@pytest.mark.parametrize("kind", ["native", "bnb", "dense"])
def test_weights(copy, kind, claim):
    folder = copy(kind)
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(CLAIMS[claim])
    with pytest.raises(CheckpointError, match=f"{file.name}: truncated or damaged"):
        from_pretrained(folder)


def test_terabytes_of_holes(copy, model):
    folder = copy("adapter")
    with (folder / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(1 << 43)
    with pytest.raises(ValueError, match=f"{1 << 43} bytes, wanted at most"):
        load_adapter(model, folder)


def test_what_is_left_is_a_file():
    good = file_of({"a": tensor()})
    assert parse_tensors(good, "x")["a"].equal(torch.zeros(DATA, dtype=torch.uint8)) and safetensors.torch.load(good).keys() == {"a"}
