"""The public functions: names and arguments people know, any shape and strides, storages, and the error report."""

import inspect

import pytest
import torch

import nf4lora
from nf4lora import QuantState, dequantize_4bit, linear_4bit, quantize_4bit
from nf4lora.functional import dequantize_fp4, dequantize_nf4, quantize_fp4, quantize_nf4
from nf4lora.quant_error import quantization_error
from nf4lora.testing import assert_error_ratio

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TYPES = ("nf4", "fp4")
both = pytest.mark.parametrize("nested", [False, True])


def arguments(function):
    found = inspect.signature(function).parameters.values()
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in found)
    return {p.name: ... if p.default is p.empty else p.default for p in found}


def same(a, b):
    return torch.equal(a[0], b[0]) and a[1] == b[1]


def test_signatures():
    whole = {
        "A": ..., "blocksize": 64, "compress_statistics": False, "quant_type": "nf4", "quant_storage": torch.uint8,
        "check_finite": True, "device": None,
    }  # fmt: skip
    assert arguments(quantize_4bit) == whole and list(arguments(quantize_4bit)) == list(whole)
    del whole["quant_type"]
    for function in (quantize_nf4, quantize_fp4):
        assert arguments(function) == whole and list(arguments(function)) == list(whole)
    for function in (dequantize_4bit, dequantize_nf4, dequantize_fp4):
        assert arguments(function) == {"packed": ..., "quant_state": ..., "dtype": None, "out": None}
    assert list(arguments(linear_4bit))[:3] == ["x", "packed", "quant_state"]
    assert nf4lora.quantize_4bit is nf4lora.functional.quantize_4bit


@both
@pytest.mark.parametrize("quant_type", TYPES)
def test_by_position_and_by_name(quant_type, nested):
    A = torch.randn(24, 50, dtype=torch.bfloat16)
    by_name = quantize_4bit(A=A, blocksize=128, compress_statistics=nested, quant_type=quant_type, quant_storage=torch.uint8)
    short, decode = {"nf4": (quantize_nf4, dequantize_nf4), "fp4": (quantize_fp4, dequantize_fp4)}[quant_type]
    assert same(by_name, quantize_4bit(A, 128, nested, quant_type, torch.uint8, True))
    assert same(by_name, short(A, 128, nested, torch.uint8, False))
    packed, state = by_name
    assert type(state) is QuantState and state.shape == A.shape and state.dtype == A.dtype
    assert (state.blocksize, state.quant_type, state.nested) == (128, quant_type, nested)
    decoded = dequantize_4bit(packed, state)
    assert decoded.dtype == A.dtype and torch.equal(decoded, decode(packed, quant_state=state))
    other = dequantize_fp4 if quant_type == "nf4" else dequantize_nf4
    with pytest.raises(ValueError, match=f"found '{quant_type}', wanted"):
        other(packed, state)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("quant_type", TYPES)
def test_dequantize_rounds_once(quant_type, dtype):
    packed, state = quantize_4bit(torch.randn(5000), 64, True, quant_type)
    exact = dequantize_4bit(packed, state, torch.float32)
    decoded = dequantize_4bit(packed, state, dtype)
    assert decoded.dtype == dtype and torch.equal(decoded, exact.to(dtype))
    assert dequantize_4bit(packed, state).dtype == torch.float32


@both
@pytest.mark.parametrize("shape", [(1,), (7,), (1, 1), (3, 5), (5, 13, 3), (1, 65, 1), (2, 3, 4, 5), (0,), (0, 7), (4, 0, 2)])
def test_shapes_and_odd_counts(shape, nested):
    A = torch.randn(shape)
    packed, state = quantize_4bit(A, 32, nested)
    assert packed.shape == ((A.numel() + 1) // 2, 1) and packed.dtype == torch.uint8 and packed.is_contiguous()
    assert len(state.absmax) == -(-A.numel() // 32) and state.shape == A.shape
    decoded = dequantize_4bit(packed, state)
    assert decoded.shape == A.shape and torch.equal(decoded.flatten(), dequantize_4bit(*quantize_4bit(A.flatten(), 32, nested)))
    again = QuantState.from_dict(state.as_dict())
    assert again == state and torch.equal(dequantize_4bit(packed, again), decoded)


@both
@pytest.mark.parametrize("quant_type", TYPES)
def test_no_elements(quant_type, nested):
    packed, state = quantize_4bit(torch.empty(0, 64), 64, nested, quant_type)
    assert packed.shape == (0, 1) and state.absmax.shape == (0,)
    if nested:
        assert state.offset == 0 and state.nested_absmax.shape == (0,)
    assert linear_4bit(torch.randn(3, 64), packed, state).shape == (3, 0)
    packed, state = quantize_4bit(torch.empty(8, 0), 64, nested, quant_type)
    assert torch.equal(linear_4bit(torch.randn(3, 0), packed, state), torch.zeros(3, 8))
    assert linear_4bit(torch.randn(2, 0, 0), packed, state, torch.ones(8)).shape == (2, 0, 8)


@both
@pytest.mark.parametrize("dtype", FLOATS)
def test_strides(dtype, nested):
    base = torch.randn(60, 70, 4).to(dtype)
    views = [
        base.transpose(0, 1), base[::2], base[:, 3:40:3], base[..., 1], base.permute(2, 1, 0)[1:3], base[:1].expand(9, 70, 4),
        base[0, 0, :1].expand(100, 3), base[5:, 5:, 1:], torch._neg_view(base),
        base.flip(0), base.unfold(0, 8, 3), torch.as_strided(base, (50, 50), (3, 7), 11),
    ]  # fmt: skip
    for view in views:
        before = view.clone(memory_format=torch.contiguous_format)
        found, wanted = quantize_4bit(view, 64, nested), quantize_4bit(before, 64, nested)
        assert same(found, wanted) and torch.equal(view, before)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32, torch.int16, torch.int64, torch.bool])
@both
def test_storage(storage, nested):
    A = torch.randn(64, 32)
    packed, state = quantize_4bit(A, 64, nested)
    stored, stored_state = quantize_4bit(A, 64, nested, quant_storage=storage)
    assert stored.dtype == storage and stored.shape == (1024 // storage.itemsize, 1) and stored_state == state
    assert torch.equal(stored.view(-1).view(torch.uint8), packed.view(-1))
    for form in (stored, stored.view(-1), stored.view(1, -1), stored.view(2, -1), torch.nn.Parameter(stored, requires_grad=False)):
        assert torch.equal(dequantize_4bit(form, state), dequantize_4bit(packed, state))
    assert quantize_4bit(A[:0], 64, nested, quant_storage=storage)[0].shape == (0, 1)


def test_a_call_changes_nothing_and_remembers_nothing():
    A = torch.randn(16, 64, requires_grad=True)
    kept = A.detach().clone()
    first = quantize_4bit(A, 64, True)
    assert not first[0].requires_grad and not first[1].absmax.requires_grad and torch.equal(A, kept)
    state = first[1]
    state.code.zero_()  # a copy of the table
    assert state.code.any() and same(quantize_4bit(A, 64, True), first)
    decoded = dequantize_4bit(*first)
    decoded.zero_()
    assert dequantize_4bit(*first).any()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert same(quantize_4bit(A, 64, True), first) and dequantize_4bit(*first).dtype == torch.float32
    with torch.inference_mode():
        assert torch.equal(dequantize_4bit(*first), dequantize_4bit(first[0].clone(), state))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_linear_4bit(dtype, p):
    torch.manual_seed(0)
    packed, state = quantize_4bit(torch.randn(48, 70), 64, True)
    x, bias, A, B = (torch.randn(s).to(dtype) for s in ((4, 9, 70), (48,), (3, 70), (48, 3)))
    w, seed = dequantize_4bit(packed, state).double(), torch.tensor([11])
    kept = nf4lora.reference.dropout(torch.ones(36, 70), seed, p).reshape(4, 9, 70) if p else torch.ones(4, 9, 70)
    assert abs(kept.mean() - 1) < 0.1 and len(kept.unique()) == (2 if p else 1)

    def dense(work):
        x_, bias_, A_, B_ = (t.to(work) for t in (x, bias, A, B))
        xa = ((x_ * kept.to(work)) @ A_.T).to(dtype).to(work)
        return x_ @ w.to(work).T + bias_ + 0.5 * xa @ B_.T

    y = linear_4bit(x, packed, state, bias, A, B, 0.5, p, seed)
    assert y.dtype == dtype and y.shape == (4, 9, 48)
    assert_error_ratio(y, dense(dtype), dense(torch.float64))
    assert torch.equal(y, linear_4bit(x, packed, state, bias, A, B, 0.5, p, seed))
    assert p == 0 or not torch.equal(y, linear_4bit(x, packed, state, bias, A, B, 0.5, p, seed + 1))
    assert torch.equal(linear_4bit(x, packed, state), linear_4bit(x, packed, state, None, A, 0 * B))
    for given in ({"lora_A": A}, {"lora_B": B}, {"lora_A": A, "lora_B": B.T}, {"lora_A": A[:2], "lora_B": B}, {"bias": bias[1:]}):
        with pytest.raises(ValueError, match="lora_[AB]|bias"):
            linear_4bit(x, packed, state, **given)


def test_quantization_error():
    torch.manual_seed(0)
    A = torch.randn(256, 1024)
    packed, state = quantize_4bit(A)
    error = quantization_error(A, packed, state)
    difference = A.double() - dequantize_4bit(packed, state).double()
    assert error.mean_abs == pytest.approx(difference.abs().mean().item())
    assert error.relative_rms == pytest.approx((difference.square().mean() / A.double().square().mean()).sqrt().item())
    assert error.nested_relative == 0 and 0.07 < error.mean_abs < 0.075
    nested = quantization_error(A, *quantize_4bit(A, compress_statistics=True))
    assert 0 < nested.nested_relative < 0.02 and abs(nested.mean_abs / error.mean_abs - 1) < 0.02
    fp4 = quantization_error(A, *quantize_fp4(A))
    assert fp4.mean_abs > error.mean_abs and quantization_error(A, *quantize_4bit(A, 4096)).mean_abs > error.mean_abs
    half = A.bfloat16()
    assert quantization_error(half, *quantize_4bit(half)).mean_abs == pytest.approx(error.mean_abs, rel=0.01)


def test_quantization_error_of_nothing_and_of_zeros():
    for A in (torch.zeros(0), torch.zeros(100)):
        for nested in (False, True):
            error = quantization_error(A, *quantize_4bit(A, compress_statistics=nested))
            assert error == (0.0, 0.0, 0.0), error
    with pytest.raises(ValueError, match=r"A: found shape \(100,\), wanted \(3, 100\)"):
        quantization_error(A, *quantize_4bit(torch.randn(3, 100)))
