"""`QuantState`: the format pinned by literal bytes, and a frozen record that compares, moves, writes and reads itself."""

import copy
import dataclasses
import io
import json
import pickle

import pytest
import torch

from nf4lora import QuantState, dequantize_4bit, quantize_4bit
from nf4lora.codebook import BLOCKSIZES, QUANT_TYPES

pytestmark = pytest.mark.usefixtures("one_thread")
JSON_KEY = "quant_state.bitsandbytes__nf4"


def quantized(nested=True, **kwargs):
    return quantize_4bit(torch.randn(33, 65, generator=torch.Generator().manual_seed(0)), compress_statistics=nested, **kwargs)


def test_golden_bytes(backend):
    """Nibble order, block order, tail and padding, in literal bytes: a change of the format shows here."""
    a = torch.cat([torch.tensor([-2.0, 2.0, 0.0, 0.5, -0.5, 1.0]), torch.zeros(26), torch.tensor([4.0, -4.0, 1.0])])
    packed, state = quantize_4bit(a, blocksize=32)
    assert packed.reshape(-1).tolist() == [0x0F, 0x7A, 0x4C] + [0x77] * 13 + [0xF0, 0xA7]
    assert state.absmax.tolist() == [2.0, 4.0]
    packed, state = quantize_4bit(a, blocksize=32, quant_type="fp4")
    assert packed.reshape(-1).tolist() == [0xB3, 0x07, 0xF5] + [0x00] * 13 + [0x3B, 0x70]


def test_golden_json():
    packed, state = quantized()
    text = bytes(state.as_dict()[JSON_KEY].tolist()).decode()
    assert text == (
        '{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [33, 65], "nested_blocksize": 256, '
        f'"nested_dtype": "float32", "nested_offset": {json.dumps(state.offset.item())}}}'
    )
    text = bytes(quantized(nested=False)[1].as_dict()[JSON_KEY].tolist()).decode()
    assert text == '{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [33, 65]}'


@pytest.mark.parametrize("packed_dict", [True, False])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_as_dict_and_from_dict_are_inverse(quant_type, nested, packed_dict):
    for blocksize in BLOCKSIZES:
        packed, state = quantized(nested, blocksize=blocksize, quant_type=quant_type)
        written = state.as_dict(packed=packed_dict)
        kept = dict(written)
        assert QuantState.from_dict(written) == state
        assert QuantState.from_dict({f"model.layers.0.weight.{k}": v for k, v in written.items()}) == state
        assert list(written) == list(kept), "from_dict leaves its argument as it is"
        if packed_dict:
            assert all(isinstance(v, torch.Tensor) for v in written.values())


def test_equality_is_of_bits():
    _, state = quantized()
    assert state == quantized()[1] and state != quantized(blocksize=32)[1] and state != quantized(nested=False)[1]
    assert state != "a state" and QuantState.__hash__ is None
    for name in ("absmax", "nested_absmax", "offset"):
        changed = getattr(state, name).clone()
        changed.reshape(-1).view(torch.uint8)[0] ^= 1
        assert dataclasses.replace(state, **{name: changed}) != state
    assert dataclasses.replace(state, dtype=torch.bfloat16) != state and dataclasses.replace(state, shape=(65, 33)) != state
    nan = torch.full_like(quantized(False)[1].absmax, torch.nan)
    assert dataclasses.replace(quantized(False)[1], absmax=nan) == dataclasses.replace(quantized(False)[1], absmax=nan.clone())


def test_frozen_and_copied_whole():
    packed, state = quantized()
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.blocksize = 32
    buffer = io.BytesIO()
    torch.save(state.as_dict(), buffer)
    buffer.seek(0)
    loaded = QuantState.from_dict(torch.load(buffer, weights_only=True))
    for other in (copy.deepcopy(state), pickle.loads(pickle.dumps(state)), state.to("cpu"), loaded):
        assert other == state and torch.equal(dequantize_4bit(packed, other), dequantize_4bit(packed, state))
    assert copy.deepcopy(state).absmax.data_ptr() != state.absmax.data_ptr()
    meta = state.to("meta")
    assert meta.absmax.is_meta and meta.nested_absmax.is_meta and meta.offset.is_meta and not state.absmax.is_meta


def test_code_is_the_table_and_nested_says_so():
    for quant_type in QUANT_TYPES:
        for nested in (False, True):
            _, state = quantized(nested, quant_type=quant_type)
            assert state.code.shape == (16,) and state.nested is nested and state.numel == 33 * 65


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_row_22_16_bit_statistics_are_upcast_at_load_and_refused_at_a_call(dtype):
    packed, state = quantized(nested=False)
    written = state.as_dict() | {"absmax": state.absmax.to(dtype)}
    read = QuantState.from_dict(written)
    assert read.absmax.dtype == torch.float32 and torch.equal(read.absmax, state.absmax.to(dtype).float())
    with pytest.raises(TypeError, match="absmax"):
        dataclasses.replace(state, absmax=state.absmax.to(dtype))
    with pytest.raises(TypeError, match="absmax"):
        torch.ops.nf4lora.dequantize(packed, state.absmax.to(dtype), None, None, [33, 65], 64, "nf4", torch.float32)


def test_row_20_a_state_that_does_not_fit_is_refused():
    packed, state = quantized()
    for change in (
        {"absmax": state.absmax[:-1]}, {"nested_absmax": state.nested_absmax.repeat(2)}, {"shape": (33, 64 * 65)},
        {"blocksize": 32}, {"blocksize": 48}, {"blocksize": True}, {"quant_type": "int4"}, {"offset": None},
        {"nested_absmax": None}, {"absmax": state.absmax.float()}, {"nested_blocksize": 64}, {"dtype": torch.int8},
        {"absmax": state.absmax.repeat(2)[::2]}, {"offset": state.offset.double()}, {"offset": torch.zeros(2)},
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match="found"):
            dataclasses.replace(state, **change)
    for bad in (packed[:-1], packed.repeat(2, 1), packed.repeat(2, 1)[::2]):
        with pytest.raises(ValueError, match="packed"):
            dequantize_4bit(bad, state)


def test_row_20_a_checkpoint_that_does_not_fit_is_refused():
    _, state = quantized()
    good = state.as_dict(packed=True)

    def text(**changes):
        meta = json.loads(bytes(good[JSON_KEY].tolist())) | changes
        return {JSON_KEY: torch.tensor(list(json.dumps({k: v for k, v in meta.items() if v is not None}).encode()), dtype=torch.uint8)}

    bad = [
        {k: v for k, v in good.items() if k != drop} for drop in ("absmax", "nested_absmax", JSON_KEY)
    ] + [
        good | change for change in (
            {"absmax": good["absmax"][:-1]}, {"nested_absmax": good["nested_absmax"].repeat(16)}, {"surprise": torch.zeros(1)},
            {"quant_map": good["quant_map"][:3]}, {"quant_map": good["quant_map"].flip(0)}, {"nested_quant_map": torch.zeros(256)},
            {JSON_KEY: torch.zeros(2 << 20, dtype=torch.uint8)}, {JSON_KEY: torch.tensor([255], dtype=torch.uint8)},
            {JSON_KEY: torch.tensor(list(b"[1]"), dtype=torch.uint8)}, {JSON_KEY: torch.tensor(list(b"[" * 9999), dtype=torch.uint8)},
            text(quant_type="fp4"), text(blocksize=63), text(blocksize="64"), text(dtype="qint8"), text(dtype="__class__"),
            text(shape=[33, -65]), text(shape=[2**40, 2**40]), text(shape=None), text(shape="33"), text(shape=[33.0, 65]),
            text(nested_offset=None), text(nested_offset=1e300), text(nested_offset="0"), text(nested_offset=True),
            text(nested_blocksize=64), text(nested_dtype="float16"), text(surprise=1),
        )
    ]  # fmt: skip
    for quant_dict in bad:
        with pytest.raises((ValueError, TypeError)):
            QuantState.from_dict(quant_dict)
    assert QuantState.from_dict(good) == state
