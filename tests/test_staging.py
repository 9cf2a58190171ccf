"""Quantizing in pieces gives the bytes of quantizing at once, and no piece is larger than said."""

import pytest
import torch

from nf4lora import NF4Linear, NF4LoRALinear, ops, quantize_4bit, staging


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("numel", [0, 1, 8191, 8192, 8193, 40_001])
def test_pieces_give_the_bytes_of_the_whole(monkeypatch, numel, blocksize, dtype):
    monkeypatch.setattr(staging, "PIECE_BYTES", 4096 * 2 * dtype.itemsize)
    sizes = []
    quantize = ops.quantize
    monkeypatch.setattr(ops, "quantize", lambda a, *args: sizes.append(a.numel()) or quantize(a, *args))
    a = torch.randn(numel, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed, absmax = staging.quantize(a, torch.device("cpu"), blocksize, "nf4")
    wanted = quantize(a, blocksize, "nf4")
    assert torch.equal(packed, wanted[0]) and torch.equal(absmax, wanted[1])
    assert sizes == [min(8192, numel - first) for first in range(0, numel, 8192)]


def test_a_piece_is_whole_blocks_of_every_size():
    assert staging.PIECE_BYTES % (4096 * 4) == 0


def test_strided_input(monkeypatch):
    monkeypatch.setattr(staging, "PIECE_BYTES", 4096 * 4)
    a = torch.randn(100, 300).T
    packed, absmax = staging.quantize(a, torch.device("cpu"), 64, "fp4")
    wanted = ops.quantize(a, 64, "fp4")
    assert torch.equal(packed, wanted[0]) and torch.equal(absmax, wanted[1])


def test_device_sends_the_results_there():
    packed, state = quantize_4bit(torch.randn(64, 64), compress_statistics=True, device="meta")
    assert packed.is_meta and state.absmax.is_meta and state.offset.is_meta and packed.shape == (2048, 1)
    linear = torch.nn.Linear(64, 32)
    for layer in (NF4Linear.from_linear(linear, device="meta"), NF4LoRALinear.from_linear(linear, device="meta", r=4)):
        assert all(p.is_meta for p in layer.parameters())


def test_the_tensors_own_device_is_no_journey(monkeypatch):
    monkeypatch.setattr(staging, "quantize", None)
    assert torch.equal(quantize_4bit(torch.ones(64), device="cpu")[0], quantize_4bit(torch.ones(64))[0])
