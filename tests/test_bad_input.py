"""Bad input and faults: the numbered rows of the reliability table, one test a row at least; `test_rowNN_…` is row NN.

Every refusal names its exception class and says what was found and what was wanted, and what was there stays as it was.
"""

import copy
import gc
import io
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import warnings
import weakref
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import nf4lora
from nf4lora import NF4Linear, NF4LoRALinear, QuantState, dequantize_4bit, linear_4bit, native, ops, quantize_4bit, triton_rows
from nf4lora.backends import report, use_backend
from nf4lora.nn import NF4LoRALinearGroup
from nf4lora.quant_error import quantization_error
from nf4lora.testing import assert_error_ratio

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NAN, INF = math.nan, math.inf


@contextmanager
def refuses(error, *words):
    """The block raises exactly `error`, whose text has every word."""
    with pytest.raises(error) as caught:
        yield
    assert caught.type is error
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in {caught.value}"


def raw(t):
    return None if t is None else t.detach().contiguous().reshape(-1).view(torch.uint8).tolist()


def snapshot(layer):
    """Everything a layer is: the bytes, dtypes and identities of its tensors, its gradients, its plain attributes."""
    plain = {k: v for k, v in vars(layer).items() if not k.startswith("_")}
    return plain, {n: (id(p), p.dtype, p.shape, raw(p), raw(p.grad)) for n, p in layer.named_parameters()}


@contextmanager
def unchanged(*layers):
    before = [snapshot(layer) for layer in layers]
    yield
    assert [snapshot(layer) for layer in layers] == before


def make(K=96, N=40, r=4, seed=0, **kwargs):
    """A layer whose adapter does something."""
    torch.manual_seed(seed)
    layer = NF4LoRALinear(K, N, r=r, **kwargs)
    if r and not layer.lora_B.is_meta:
        nn.init.normal_(layer.lora_B, std=0.1)
    return layer


def weight_4bit(N=40, K=96, **kwargs):
    return quantize_4bit(torch.randn(N, K, generator=torch.Generator().manual_seed(3)), **kwargs)


def passes(layer, x):
    """Output, dx, dA and dB of one forward and backward; the layer's gradients are cleared."""
    x = x.detach().requires_grad_()
    y = layer(x)
    y.float().square().sum().backward()
    found = [y.detach(), x.grad, layer.lora_A.grad, layer.lora_B.grad]
    layer.zero_grad()
    return found


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", FLOATS)
def test_row01_nan_weight(dtype):
    weight = torch.randn(40, 96, dtype=dtype)
    weight[3, 7] = weight[30, 2] = NAN
    for nested in (False, True):
        with refuses(ValueError, "A:", "found 2 NaN or Inf of 3840", "(nan) at (3, 7)", "wanted none"):
            quantize_4bit(weight, compress_statistics=nested)
    layer = make()
    with unchanged(layer), refuses(ValueError, "found 2 NaN", "(3, 7)"):
        layer.quantize_(weight)
    linear = nn.Linear(96, 40)
    linear.weight.data = weight
    with refuses(ValueError, "found 2 NaN", "(3, 7)"):
        NF4LoRALinear.from_linear(linear)
    # The text is made on the CPU, whatever the default device.
    with torch.device("meta"), refuses(ValueError, "found 2 NaN"):
        quantize_4bit(weight)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_row01_unchecked_is_never_a_finite_lie(bad, quant_type):
    weight = torch.randn(640)
    weight[130] = bad
    decoded = dequantize_4bit(*quantize_4bit(weight, quant_type=quant_type, check_finite=False))
    block = torch.zeros(640, dtype=torch.bool).index_fill_(0, torch.arange(128, 192), True)
    assert not decoded[block].isfinite().any() and decoded[~block].isfinite().all()
    decoded = dequantize_4bit(*quantize_4bit(weight, compress_statistics=True, quant_type=quant_type, check_finite=False))
    assert not decoded[block].isfinite().any()


@pytest.mark.parametrize("bad", [INF, -INF])
def test_row02_inf_weight(bad):
    weight = torch.randn(7, 64)
    weight[6, 63] = bad
    with refuses(ValueError, "found 1 NaN or Inf of 448", f"({bad}) at (6, 63)", "wanted none"):
        quantize_4bit(weight)
    layer = make(64, 7)
    with unchanged(layer), refuses(ValueError, "(6, 63)"):
        layer.quantize_(weight)


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_row03_zero_block(blocksize):
    weight = torch.randn(4 * blocksize)
    weight[blocksize : 2 * blocksize] = 0
    weight[2 * blocksize : 3 * blocksize] = -0.0
    packed, state = quantize_4bit(weight, blocksize)
    assert (packed[blocksize // 2 : 3 * blocksize // 2] == 0x77).all() and (state.absmax[1:3] == 0).all()
    zeros = dequantize_4bit(packed, state)[blocksize : 3 * blocksize]
    assert (zeros == 0).all() and not zeros.signbit().any()
    # bitsandbytes' CUDA build writes code 0 there; it reads as a zero all the same.
    packed[blocksize // 2 : 3 * blocksize // 2] = 0
    assert (dequantize_4bit(packed, state)[blocksize : 3 * blocksize] == 0).all()
    all_zero = dequantize_4bit(*quantize_4bit(torch.zeros(1000), blocksize, compress_statistics=True))
    assert torch.equal(all_zero, torch.zeros(1000)) and not all_zero.signbit().any()


@pytest.mark.parametrize("scale", [1e-38, 1e-39, 1e-42, 1.4e-45])
def test_row04_denormal_absmax(scale):
    weight = torch.randn(512).clamp(-3, 3) * scale
    packed, state = quantize_4bit(weight)
    decoded = dequantize_4bit(packed, state)
    assert decoded.isfinite().all()
    bound = state.absmax.repeat_interleave(64).double()
    assert ((decoded.double() - weight.double()).abs() <= bound).all()
    assert dequantize_4bit(*quantize_4bit(weight, compress_statistics=True)).isfinite().all()


def test_row05_one_huge_block():
    weight = torch.randn(300 * 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert quantization_error(weight, *quantize_4bit(weight, compress_statistics=True)).nested_relative < 0.1
        weight[64] = 1e6
        assert quantization_error(weight, *quantize_4bit(weight)).nested_relative == 0
    packed, state = quantize_4bit(weight, compress_statistics=True)
    with pytest.warns(UserWarning, match=r"double quantization changes an absmax by \d+%.*compress_statistics=False"):
        assert quantization_error(weight, packed, state).nested_relative > 0.1
    assert dequantize_4bit(packed, state).isfinite().all()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_row06_numel_no_multiple_of_the_block(quant_type, one_thread):
    weight = torch.randn(257)
    for numel in range(1, 258):
        packed, state = quantize_4bit(weight[:numel], quant_type=quant_type)
        padded, _ = quantize_4bit(nn.functional.pad(weight[:numel], (0, -numel % 64)), quant_type=quant_type)
        assert torch.equal(packed, padded[: -(-numel // 2)]) and len(state.absmax) == -(-numel // 64)
        tail = weight[numel - 1 - (numel - 1) % 64 : numel]
        assert state.absmax[-1] == tail.abs().max()
        assert dequantize_4bit(packed, state).shape == (numel,)


@pytest.mark.parametrize("nested", [False, True])
def test_row07_odd_single_and_empty(nested):
    for numel in (1, 3, 65, 127):
        packed, state = quantize_4bit(torch.randn(numel), compress_statistics=nested)
        assert packed.shape == ((numel + 1) // 2, 1) and packed[-1] & 15 == 7
    one = torch.tensor([-2.5])
    assert torch.equal(dequantize_4bit(*quantize_4bit(one, compress_statistics=nested)), one)
    for shape in ((0,), (0, 5), (3, 0, 2)):
        packed, state = quantize_4bit(torch.empty(shape), compress_statistics=nested)
        assert packed.shape == (0, 1) and state.shape == shape
        assert dequantize_4bit(packed, state).shape == shape


def test_row08_rank_0():
    with refuses(ValueError, "A:", "without dimensions", "wanted one or more", "A.reshape(1)"):
        quantize_4bit(torch.tensor(1.0))
    layer = make()
    with unchanged(layer), refuses(ValueError, "found x of shape ()", "wanted [..., 96]"):
        layer(torch.tensor(1.0))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("K", [1, 2, 33, 63, 65, 95, 127, 129, 130])
def test_row09_k_no_multiple_of_the_tile(K, dtype):
    layer = make(K, 37, r=1, dtype=dtype)
    x = torch.randn(5, K).to(dtype)
    w, A, B, b = (t.double() for t in (layer.dequantize(torch.float32), layer.lora_A, layer.lora_B, layer.bias))
    truth = x.double() @ w.T + b + layer.scaling * (x.double() @ A.T).to(dtype).double() @ B.T
    baseline = x @ w.T.to(dtype) + b.to(dtype) + layer.scaling * (x @ A.T.to(dtype)) @ B.T.to(dtype)
    assert_error_ratio(layer(x).detach(), baseline, truth.detach())


def test_row10_sizes_beyond_int32():
    """Sizes only, on the meta device; the values are in test_quantize.py."""
    numel = 2**31 + 64
    for nested in (False, True):
        packed, state = quantize_4bit(torch.empty(numel, dtype=torch.bfloat16, device="meta"), compress_statistics=nested)
        assert packed.shape == (2**30 + 32, 1) and state.absmax.shape == (2**25 + 1,) and state.numel == numel
        assert dequantize_4bit(packed, state).shape == (numel,)
        with refuses(ValueError, f"wanted {2**30 + 32}"):
            dequantize_4bit(packed[:-1], state)
    N, K = 2**16, 2**15 + 1
    layer = NF4LoRALinear(K, N, r=2, device="meta")
    assert layer.weight.shape == (N * K // 2, 1) and layer.weight_absmax.shape == (N * K // 64,)
    x = torch.empty(2, K, device="meta", requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (2, N) and x.grad.shape == (2, K) and layer.dequantize().shape == (N, K)


@pytest.mark.parametrize("dtype", FLOATS)
def test_row11_any_strides_of_x(dtype):
    layer = make(6, 40, r=2)
    x = torch.randn(4, 6).to(dtype)
    wide = torch.full((4, 12), NAN, dtype=dtype)
    wide[:, ::2] = x
    for view in (x.T.contiguous().T, wide[:, ::2], torch.stack([x, x * NAN], 1)[:, 0]):
        assert not view.is_contiguous() and equal(passes(layer, view), passes(layer, x))
    row = x[:1].expand(5, 6)
    assert row.stride(0) == 0 and equal(passes(layer, row), passes(layer, row.contiguous()))
    column = x[:, :1].expand(4, 6)
    assert equal(passes(layer, column), passes(layer, column.contiguous()))
    negative = torch._neg_view(-x)
    assert equal(passes(layer, negative), passes(layer, negative.clone()))


def test_row11_any_strides_of_the_gradient_and_of_a_weight():
    layer = make()
    x = torch.randn(5, 96)
    for dy in (torch.ones(1, 1).expand(5, 40), torch.randn(40, 5).T, torch.randn(5, 80)[:, ::2]):
        found = []
        for gradient in (dy, dy.contiguous()):
            x = x.detach().requires_grad_()
            found.append(torch.autograd.grad(layer(x), [x, layer.lora_A, layer.lora_B], gradient))
        assert not dy.is_contiguous() and equal(*found)
    weight = torch.randn(96, 80)
    for view in (weight.T, weight[:, ::2], weight[:1].expand(40, 80), torch._neg_view(weight)):
        (packed, state), (packed_, state_) = quantize_4bit(view), quantize_4bit(view.contiguous())
        assert torch.equal(packed, packed_) and state == state_


def test_row11_codes_and_statistics_must_be_contiguous():
    packed, state = weight_4bit()
    with refuses(ValueError, "packed:", "found strides", "contiguous"):
        dequantize_4bit(packed.repeat(1, 2)[:, :1], state)
    with refuses(ValueError, "absmax:", "non-contiguous", "wanted 60 contiguous"):
        replace(state, absmax=state.absmax.repeat_interleave(2)[::2])
    with refuses(ValueError, "absmax:", "non-contiguous"):
        ops.dequantize(packed, state.absmax.repeat_interleave(2)[::2], None, None, [40, 96], 64, "nf4", torch.float32)


def offset_view(t, elements):
    """The same values `elements` further into a fresh storage."""
    flat = torch.empty(t.numel() + elements, dtype=t.dtype)
    view = flat[elements:].view(t.shape)
    view.copy_(t)
    return view


@pytest.mark.parametrize("dtype", FLOATS)
def test_row12_misaligned_storage(dtype):
    N, K = 40, 96
    packed, state = weight_4bit(compress_statistics=True)
    x, dy, bias, A, B = (torch.randn(s).to(dtype) for s in ((5, K), (5, N), (N,), (3, K), (N, 3)))

    def run(offset):
        moved_state = QuantState(offset_view(state.absmax, offset), (N, K), state.dtype, 64, "nf4", state.offset,
                                 offset_view(state.nested_absmax, offset))  # fmt: skip
        moved = [offset_view(t, offset).requires_grad_() for t in (x, bias, A, B)]
        y = linear_4bit(moved[0], offset_view(packed, offset), moved_state, *moved[1:], scaling=0.5)
        quantized = quantize_4bit(offset_view(x, offset))
        return [y, *torch.autograd.grad(y, moved, offset_view(dy, offset)), quantized[0], quantized[1].absmax,
                dequantize_4bit(offset_view(packed, offset), moved_state)]  # fmt: skip

    aligned = run(0)
    for offset in range(1, 16):
        found = run(offset)
        assert equal(found[-3:], aligned[-3:]), offset
        if native.host.load()[0]:
            assert equal(found, aligned), offset
        for f, a in zip(found, aligned, strict=True):  # torch's own product, the reference's, depends on alignment
            torch.testing.assert_close(f, a)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float64, torch.float8_e4m3fn, torch.complex64])
def test_row13_wrong_dtype(dtype):
    found = str(dtype)
    with refuses(TypeError, "a:", found, "torch.bfloat16"):
        quantize_4bit(torch.ones(64).to(dtype))
    packed, state = weight_4bit()
    with refuses(TypeError, "dtype:", found, "torch.bfloat16"):
        dequantize_4bit(packed, state, dtype)
    layer = make()
    with unchanged(layer):
        with refuses(TypeError, "NF4LoRALinear", found, "torch.bfloat16"):
            layer(torch.ones(2, 96).to(dtype))
        with refuses(TypeError, "a:", found):
            layer.quantize_(torch.ones(40, 96).to(dtype))
    with refuses(TypeError, "compute_dtype:", found):
        make(compute_dtype=dtype)
    with refuses(TypeError, "dtype:", found):
        make(dtype=dtype)
    with refuses(TypeError, "quant_storage:", "'uint8'", "wanted a dtype"):
        quantize_4bit(torch.ones(64), quant_storage="uint8")


def test_row13_no_dense_tensor():
    for bad, kind in (([1.0, 2.0], "list"), (torch.ones(64).numpy(), "ndarray"), (torch.eye(8).to_sparse(), "sparse_coo")):
        with refuses(TypeError, "A:", kind, "wanted a dense torch tensor"):
            quantize_4bit(bad)
    with refuses(TypeError, "linear:", "found Conv1d", "wanted a torch.nn.Linear"):
        NF4Linear.from_linear(nn.Conv1d(4, 4, 1))
    with refuses(TypeError, "linear:", "found NF4Linear"):
        NF4Linear.from_linear(NF4Linear(8, 8))


@pytest.mark.parametrize("blocksize", [0, 16, 48, 8192, -64, 64.0, True, "64", None])
def test_row13_wrong_format(blocksize):
    found = f"found {blocksize!r}, wanted one of (32, 64,"
    with refuses(ValueError, "blocksize:", found):
        quantize_4bit(torch.ones(64), blocksize)
    with refuses(ValueError, "blocksize:", found):
        make(blocksize=blocksize)
    for quant_type in ("int4", "NF4", None):
        with refuses(ValueError, "quant_type:", repr(quant_type), "'nf4'"):
            quantize_4bit(torch.ones(64), quant_type=quant_type)
        with refuses(ValueError, "quant_type:", repr(quant_type)):
            make(quant_type=quant_type)


def test_row14_mixed_devices():
    layer, x = make(), torch.randn(2, 96)
    with unchanged(layer), refuses(ValueError, "packed:", "found on cpu", "wanted on meta"):
        layer(x.to("meta"))
    packed, state = weight_4bit(compress_statistics=True)
    parts = (state.absmax, state.nested_absmax, state.offset)
    rest = [None, None, None, None, 40, 64, "nf4", 1.0, 0.0]
    for i, name in enumerate(("absmax", "nested_absmax", "offset")):
        mixed = [p.to("meta") if i == j else p for j, p in enumerate(parts)]
        with refuses(ValueError, name, "meta", "cpu"):
            ops.linear_fwd(x, packed, *mixed, *rest)
        with refuses(ValueError, "found on ['cpu', 'meta']", "wanted one device"):
            QuantState(mixed[0], (40, 96), torch.float32, 64, "nf4", mixed[2], mixed[1])
    A, B, bias, seed = torch.randn(4, 96), torch.randn(40, 4), torch.randn(40), torch.tensor([1])
    given = {"bias": bias, "lora_A": A, "lora_B": B, "seed": seed}
    for name, t in given.items():
        with refuses(ValueError, f"{name}: found on meta", "wanted on cpu"):
            linear_4bit(x, packed, state, **given | {name: t.to("meta")}, dropout_p=0.5)
    with refuses(ValueError, "found on meta", "wanted on cpu"):
        dequantize_4bit(packed, state.to("meta"))


def test_row15_rank_0_is_a_plain_layer():
    layer, x = make(r=0, lora_dropout=0.5), torch.randn(3, 96, requires_grad=True)
    assert layer.lora_A is None and layer.lora_B is None and not [p for p in layer.parameters() if p.requires_grad]
    plain = NF4Linear(96, 40)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), plain(x))
    layer(x).sum().backward()
    assert torch.equal(layer.merge().weight, layer.dequantize()) and x.grad.isfinite().all()
    layer.reset_parameters()
    assert layer.lora_A is None


@pytest.mark.parametrize("r", [-1, 2.0, True, "4", None, NAN])
def test_row15_wrong_rank(r):
    with refuses(ValueError, f"r: found {r!r}", "wanted an integer of 0 or more"):
        NF4LoRALinear(8, 8, r=r)
    with refuses(ValueError, "r: found"):
        NF4LoRALinear.from_linear(nn.Linear(8, 8), r=r)


def test_row15_rank_beyond_full_warns():
    with pytest.warns(UserWarning, match=r"r=9 is more than min\(in_features, out_features\)"):
        layer = NF4LoRALinear(8, 12, r=9)
    assert layer(torch.randn(2, 8)).shape == (2, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NF4LoRALinear(8, 12, r=8)


def test_row16_wrong_alpha_and_dropout():
    for alpha in (0, 0.0, -1, NAN, INF, "32", None):
        with refuses(ValueError, f"lora_alpha: found {alpha!r}", "positive finite"):
            NF4LoRALinear(8, 8, r=2, lora_alpha=alpha)
    for p in (-0.1, 1, 1.0, 1.5, NAN, INF, "0.1", None):
        with refuses(ValueError, f"lora_dropout: found {p!r}", "[0, 1)"):
            NF4LoRALinear(8, 8, r=2, lora_dropout=p)
    packed, state = weight_4bit()
    x, A, B = torch.randn(2, 96), torch.randn(4, 96), torch.randn(40, 4)
    for p in (-0.1, 1.0, NAN):
        with refuses(ValueError, f"dropout_p: found {p}", "[0, 1)"):
            linear_4bit(x, packed, state, None, A, B, 1.0, p, torch.tensor([1]))
    with refuses(ValueError, "seed: found None", "int64", "dropout_p > 0"):
        linear_4bit(x, packed, state, None, A, B, 1.0, 0.5)
    # As near 1 as can be: everything is dropped, nothing becomes NaN.
    layer = make(lora_dropout=1 - 1e-9)
    assert torch.equal(layer(x), linear_4bit(x, layer.weight, layer.quant_state, layer.bias))


def test_row16_wrong_sizes():
    for bad in (0, -1, 4.0, True, "8", None):
        with refuses(ValueError, f"in_features: found {bad!r}", "positive integer"):
            NF4Linear(bad, 8)
        with refuses(ValueError, f"out_features: found {bad!r}", "positive integer"):
            NF4LoRALinear(8, bad)


@pytest.mark.parametrize("shape", [(0, 96), (3, 0, 96), (0, 5, 96)])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_row17_empty_batch(shape, p):
    layer = make(lora_dropout=p)
    layer.bias.requires_grad_()
    x = torch.empty(shape, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (*shape[:-1], 40) and x.grad.shape == shape
    for gradient, own in ((layer.lora_A.grad, (4, 96)), (layer.lora_B.grad, (40, 4)), (layer.bias.grad, (40,))):
        assert torch.equal(gradient, torch.zeros(own))


def test_row17_one_dimension():
    layer, x = make(), torch.randn(96)
    assert layer(x).shape == (40,) and torch.equal(layer(x), layer(x[None])[0])
    assert all(torch.equal(a.reshape(b.shape), b) for a, b in zip(passes(layer, x), passes(layer, x[None]), strict=True))


def test_row18_wrong_last_size():
    layer = make()
    for shape in ((3, 95), (96, 3), (0,), (2, 3, 40)):
        with unchanged(layer), refuses(ValueError, "NF4LoRALinear(in_features=96", f"found x of shape {shape}", "[..., 96]"):
            layer(torch.randn(shape))
    packed, state = weight_4bit()
    with refuses(ValueError, "x: found shape (3, 95)", "wanted [..., 96]", "[40, 96]"):
        linear_4bit(torch.randn(3, 95), packed, state)


@pytest.mark.parametrize("layer", [NF4Linear(96, 40, device="meta"), make(device="meta")])
def test_row19_forward_before_quantize(layer):
    with refuses(RuntimeError, "holds no 4-bit weight yet", "quantize_(weight)", "from_linear", "load_state_dict"):
        layer(torch.randn(2, 96))
    assert all(p.is_meta and p.grad is None for p in layer.parameters())


def test_row19_float_weight_put_in():
    layer = make()
    layer.weight = nn.Parameter(torch.randn(40, 96))
    with unchanged(layer), refuses(RuntimeError, "holds no 4-bit weight", "quantize_(weight)"):
        layer(torch.randn(2, 96))


def test_row20_state_that_does_not_fit_at_a_call():
    x = torch.randn(2, 96)
    packed, state = weight_4bit()
    layer = make(double_quant=False)
    for numel in (0, 1, 59, 61):
        absmax = torch.ones(numel)
        with refuses(ValueError, "absmax:", f"found {numel}", "wanted 60"):
            replace(state, absmax=absmax)
        with refuses(ValueError, "absmax:", f"found {numel}", "wanted 60"):
            ops.linear_fwd(x, packed, absmax, None, None, None, None, None, None, 40, 64, "nf4", 1.0, 0.0)
        layer.weight_absmax = nn.Parameter(absmax.view(torch.int32), requires_grad=False)
        with unchanged(layer), refuses(ValueError, "absmax:", f"found {numel}", "wanted 60"):
            layer(x)
    with refuses(ValueError, "packed:", "found 1919 bytes", "wanted 1920"):
        dequantize_4bit(packed[:-1], state)
    with refuses(ValueError, "packed:", "found 1920 bytes", "wanted 1921"):
        dequantize_4bit(packed, replace(state, shape=(1, 3841), absmax=torch.ones(61)))
    with refuses(ValueError, "absmax:", "found 60", "wanted 120"):
        replace(state, blocksize=32)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        with refuses(TypeError, "absmax:", str(dtype), "wanted torch.float32"):
            replace(state, absmax=state.absmax.to(dtype))
        with refuses(TypeError, "absmax:", str(dtype)):
            ops.dequantize(packed, state.absmax.to(dtype), None, None, [40, 96], 64, "nf4", torch.float32)
    packed, state = weight_4bit(compress_statistics=True)
    with refuses(ValueError, "nested_absmax:", "found 2", "wanted 1"):
        replace(state, nested_absmax=torch.ones(2))
    with refuses(ValueError, "offset:", "found 2", "wanted 1"):
        replace(state, offset=torch.ones(2))
    with refuses(ValueError, "nested_absmax:", "found 0", "wanted 1"):
        ops.dequantize(packed, state.absmax, torch.ones(0), state.offset, [40, 96], 64, "nf4", torch.float32)
    with refuses(ValueError, "belong together"):
        replace(state, offset=None)
    with refuses(ValueError, "quant_state.quant_type: found 'nf4'", "wanted 'fp4'"):
        nf4lora.functional.dequantize_fp4(packed, state)
    with refuses(ValueError, "quant_state.shape", "(3840,)", "[out_features, in_features]"):
        linear_4bit(x, packed, replace(state, shape=(3840,)))


def meta_json(keys):
    """The key and the decoded JSON of packed quant-state keys."""
    name = next(k for k in keys if "bitsandbytes__" in k)
    return name, json.loads(bytes(keys[name].tolist()))


def with_json(keys, **changes):
    name, meta = meta_json(keys)
    text = json.dumps({k: v for k, v in (meta | changes).items() if v is not ...})
    return keys | {name: torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)}


STATE_FAULTS = {
    "truncated absmax": (lambda k: k | {"absmax": k["absmax"][:-1]}, ValueError, ("absmax", "found 59", "wanted 60")),
    "no absmax": (lambda k: {n: v for n, v in k.items() if n != "absmax"}, ValueError, ("missing", "absmax")),
    "absmax no tensor": (lambda k: k | {"absmax": [1.0] * 60}, TypeError, ("absmax", "found list")),
    "absmax float64": (lambda k: k | {"absmax": k["absmax"].double()}, TypeError, ("absmax", "torch.float64")),
    "nested_absmax 2 for 1": (lambda k: k | {"nested_absmax": torch.ones(2)}, ValueError, ("nested_absmax", "found 2", "wanted 1")),
    "no nested_absmax": (lambda k: {n: v for n, v in k.items() if n != "nested_absmax"}, ValueError, ("missing", "nested_absmax")),
    "code table of 3": (lambda k: k | {"quant_map": torch.ones(3)}, ValueError, ("quant_map", "nf4 table")),
    "wrong code table": (lambda k: k | {"quant_map": k["quant_map"] * 1.01}, ValueError, ("quant_map", "nf4 table")),
    "NaN in the code table": (lambda k: k | {"quant_map": k["quant_map"] * NAN}, ValueError, ("quant_map", "nf4 table")),
    "wrong nested table": (lambda k: k | {"nested_quant_map": k["nested_quant_map"].flip(0)}, ValueError, ("nested_quant_map",)),
    "no JSON": (lambda k: {n: v for n, v in k.items() if "bitsandbytes" not in n}, ValueError, ("missing", "blocksize")),
    "broken JSON": (lambda k: k | {meta_json(k)[0]: torch.tensor([123, 34], dtype=torch.uint8)}, ValueError, ("not a JSON",)),
    "JSON list": (lambda k: k | {meta_json(k)[0]: torch.tensor([91, 93], dtype=torch.uint8)}, ValueError, ("found a JSON list",)),
    "JSON as floats": (lambda k: k | {meta_json(k)[0]: torch.ones(9)}, ValueError, ("uint8",)),
    "type of the key": (lambda k: with_json(k, quant_type="fp4"), ValueError, ("bitsandbytes__nf4", "'fp4'")),
    "blocksize 48": (lambda k: with_json(k, blocksize=48), ValueError, ("blocksize", "found 48", "wanted one of")),
    "blocksize 64.0": (lambda k: with_json(k, blocksize=64.0), ValueError, ("blocksize", "found 64.0")),
    "blocksize 32": (lambda k: with_json(k, blocksize=32), ValueError, ("absmax", "found 60", "wanted 120")),
    "other shape": (lambda k: with_json(k, shape=[80, 96]), ValueError, ("absmax", "found 60", "wanted 120")),
    "negative shape": (lambda k: with_json(k, shape=[-40, -96]), ValueError, ("shape", "[-40, -96]")),
    "2**63 elements": (lambda k: with_json(k, shape=[2**62, 2]), ValueError, ("shape", "2**63")),
    "shape of text": (lambda k: with_json(k, shape="40"), ValueError, ("shape", "'40'", "wanted a list")),
    "no shape": (lambda k: with_json(k, shape=...), ValueError, ("missing", "shape")),
    "unknown key": (lambda k: with_json(k, code="os.system"), ValueError, ("unknown", "code")),
    "unknown tensor": (lambda k: k | {"codes": torch.ones(1)}, ValueError, ("unknown", "codes")),
    "unknown dtype": (lambda k: with_json(k, dtype="float64"), ValueError, ("dtype", "float64", "bfloat16")),
    "dtype of a trap": (lambda k: with_json(k, dtype="load"), ValueError, ("dtype", "load", "bfloat16")),
    "nested blocksize": (lambda k: with_json(k, nested_blocksize=128), ValueError, ("nested_blocksize", "128", "256")),
    "NaN offset": (lambda k: with_json(k, nested_offset=NAN), ValueError, ("nested_offset", "nan", "finite")),
    "offset of text": (lambda k: with_json(k, nested_offset="1"), ValueError, ("nested_offset", "'1'")),
    "huge offset": (lambda k: with_json(k, nested_offset=1e39), ValueError, ("nested_offset", "1e+39")),
    "no offset": (lambda k: with_json(k, nested_offset=...), ValueError, ("missing", "nested_offset")),
    "two tensors' keys": (lambda k: {f"a.{n}": v for n, v in k.items()} | {f"b.{n}": v for n, v in k.items()}, ValueError, ("more than one",)),
}  # fmt: skip


@pytest.mark.parametrize("fault", STATE_FAULTS)
def test_row20_state_that_does_not_fit_at_load(fault):
    change, error, words = STATE_FAULTS[fault]
    keys = weight_4bit(compress_statistics=True)[1].as_dict()
    assert QuantState.from_dict(keys) == weight_4bit(compress_statistics=True)[1]
    changed = change(dict(keys))
    before = {k: raw(v) for k, v in changed.items() if isinstance(v, torch.Tensor)}
    with refuses(error, *words):
        QuantState.from_dict(changed)
    assert before == {k: raw(v) for k, v in changed.items() if isinstance(v, torch.Tensor)}


def test_row21_transposed():
    layer = make()
    with unchanged(layer), refuses(ValueError, "weight:", "found shape (96, 40)", "wanted (40, 96)"):
        layer.quantize_(torch.randn(96, 40))
    packed, state = quantize_4bit(torch.randn(96, 40))
    with refuses(ValueError, "x: found shape (2, 96)", "wanted [..., 40]", "[96, 40]"):
        linear_4bit(torch.randn(2, 96), packed, state)
    # As many bytes, and no bias or adapter to give it away.
    plain, transposed = NF4Linear(96, 40, bias=False), NF4Linear(40, 96, bias=False)
    for strict in (True, False):
        with unchanged(plain), refuses(RuntimeError, "[96, 40]", "[40, 96]", "left as it is"):
            plain.load_state_dict(transposed.state_dict(), strict=strict)
    fp4 = NF4Linear(96, 40, bias=False, quant_type="fp4")
    saved = io.BytesIO()
    torch.save(fp4.state_dict(), saved)
    saved.seek(0)
    with unchanged(plain), refuses(RuntimeError, "'fp4'", "'nf4'"):
        plain.load_state_dict(torch.load(saved, weights_only=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_row22_half_precision_statistics(dtype):
    for nested in (False, True):
        packed, state = weight_4bit(compress_statistics=nested)
        name = "nested_absmax" if nested else "absmax"
        keys = state.as_dict()
        loaded = QuantState.from_dict(keys | {name: keys[name].to(dtype)})
        assert torch.equal(getattr(loaded, name), keys[name].to(dtype).float()) and keys[name].dtype == torch.float32
        with refuses(TypeError, f"{name}: found {dtype}", "wanted torch.float32"):
            replace(state, **{name: keys[name].to(dtype)})
    with refuses(TypeError, f"offset: found {dtype}", "wanted torch.float32"):
        replace(state, offset=state.offset.to(dtype))
    with refuses(TypeError, f"offset: found {dtype}"):
        ops.dequantize(packed, state.absmax, state.nested_absmax, state.offset.to(dtype), [40, 96], 64, "nf4", torch.float32)


def test_row22_casts_of_a_layer_leave_the_statistics():
    for nested in (False, True):
        layer = make(double_quant=nested)
        w = layer.dequantize(torch.float32)
        for cast in (nn.Module.half, nn.Module.bfloat16, nn.Module.float, nn.Module.double):
            assert torch.equal(cast(layer).dequantize(torch.float32), w)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_row24_missing_or_wrong_piece(nested, assign, strict):
    layer, other = make(double_quant=nested), make(seed=1, double_quant=nested)
    good = other.state_dict()
    for name in good:
        broken = type(good)((n, t) for n, t in good.items() if n != name)
        with unchanged(layer), refuses(RuntimeError, "NF4LoRALinear", "left as it is", f"missing {name}"):
            layer.load_state_dict(broken, strict=strict, assign=assign)
        wrong = copy.deepcopy(good)
        wrong[name] = good[name][..., :-1] if name != "weight" else good[name][:-1]
        with unchanged(layer), refuses(RuntimeError, f"{name} is {good[name].dtype}", f"wanted {good[name].dtype} {list(good[name].shape)}"):
            layer.load_state_dict(wrong, strict=strict, assign=assign)
        wrong[name] = good[name].long() if good[name].is_floating_point() else good[name].float()
        with unchanged(layer), refuses(RuntimeError, f"{name} is {wrong[name].dtype}", f"wanted {good[name].dtype}"):
            layer.load_state_dict(wrong, strict=strict, assign=assign)
    layer.load_state_dict(good, strict=strict, assign=assign)
    assert all(torch.equal(p, good[n]) for n, p in layer.named_parameters())


@pytest.mark.parametrize("strict", [True, False])
def test_row24_pieces_of_another_kind_of_layer(strict):
    nested, single = make(), make(double_quant=False)
    with unchanged(single), refuses(RuntimeError, "unexpected weight_nested_absmax", "unexpected weight_nested_offset"):
        single.load_state_dict(nested.state_dict(), strict=strict)
    with unchanged(nested), refuses(RuntimeError, "missing weight_nested_absmax", "missing weight_nested_offset"):
        nested.load_state_dict(single.state_dict(), strict=strict)
    no_bias = make(bias=False)
    with unchanged(no_bias), refuses(RuntimeError, "unexpected bias"):
        no_bias.load_state_dict(nested.state_dict(), strict=strict)
    dense = nn.Linear(96, 40).state_dict()
    with unchanged(nested), refuses(RuntimeError, "weight is torch.float32 [40, 96]", "wanted torch.uint8 [1920, 1]"):
        nested.load_state_dict(dense, strict=strict)
    model = nn.Sequential(nn.ReLU(), nn.ModuleDict({"q": nested}))
    state = model.state_dict()
    del state["1.q.weight_absmax"]
    with unchanged(nested), refuses(RuntimeError, "prefix '1.q.'", "missing 1.q.weight_absmax"):
        model.load_state_dict(state, strict=strict)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.int32])
def test_row25_other_storage_of_the_bytes(storage):
    weight = torch.randn(64, 128)
    packed, state = quantize_4bit(weight)
    other, state_ = quantize_4bit(weight, quant_storage=storage)
    assert other.dtype == storage and other.shape == (4096 // storage.itemsize, 1) and state == state_
    assert torch.equal(other.view(-1).view(torch.uint8), packed.view(-1))
    # Every 16-bit pattern there is, NaNs included.
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.uint8).unsqueeze(1)
    state = QuantState(torch.ones(4096), (262144,), torch.float32)
    as_storage = every.view(-1).view(storage).unsqueeze(1)
    assert storage not in (torch.bfloat16, torch.float16) or as_storage.isnan().sum() > 200
    assert torch.equal(dequantize_4bit(as_storage, state), dequantize_4bit(every, state))
    x, state = torch.randn(2, 512), replace(state, shape=(512, 512))
    assert torch.equal(linear_4bit(x, as_storage, state), linear_4bit(x, every, state))
    assert torch.equal(as_storage.view(-1).view(torch.uint8), every.view(-1))


def test_row25_a_storage_the_bytes_do_not_fill():
    with refuses(ValueError, "quant_storage:", "3 bytes", "torch.float32", "use torch.uint8"):
        quantize_4bit(torch.randn(5), quant_storage=torch.float32)


@pytest.mark.parametrize("asked", [(), ("x",), ("lora_A",), ("lora_B",), ("bias",), ("x", "lora_B"), ("lora_A", "lora_B", "bias")])
def test_row32_only_what_asks_gets_a_gradient(asked, monkeypatch):
    calls = []
    grads = ops.linear_grads
    monkeypatch.setattr(ops, "linear_grads", lambda *a: calls.append(a[-3:]) or grads(*a))
    layer, x = make(), torch.randn(3, 96, requires_grad="x" in asked)
    for name in ("lora_A", "lora_B", "bias"):
        getattr(layer, name).requires_grad_(name in asked)
    y = layer(x)
    assert y.requires_grad == bool(asked)
    if asked:
        y.sum().backward()
    given = {"x": x} | dict(layer.named_parameters())
    assert {n for n, t in given.items() if t.grad is not None} == set(asked)
    learns = {"x", "lora_A", "lora_B"} & set(asked)
    assert calls == [tuple(n in asked for n in ("x", "lora_A", "lora_B"))] * bool(learns)


def test_row32_frozen_and_unfrozen_again():
    layer, x = make(), torch.randn(3, 96)
    full = passes(layer, x)
    layer.lora_A.requires_grad_(False)
    layer(x).square().sum().backward()
    assert layer.lora_A.grad is None and torch.equal(layer.lora_B.grad, full[3])
    layer.lora_A.requires_grad_(True)
    layer.zero_grad()
    assert equal(passes(layer, x), full)
    with refuses(RuntimeError, "floating point"):
        layer.weight.requires_grad_(True)


COMPUTE = (None, *FLOATS)


class Ending:
    """Memory for outputs that is not to be had at call number `last`, counted from 0."""

    def __init__(self, last):
        self.last, self.calls, self.given = last, 0, []

    def __call__(self, like, shape, dtype):
        self.calls += 1
        if self.calls - 1 == self.last:
            raise torch.OutOfMemoryError("no memory left")
        made = like.new_empty(shape, dtype=dtype)
        self.given.append(weakref.ref(made))
        return made


@pytest.mark.parametrize("group", (False, True))
def test_row30_memory_that_ends_in_forward_or_backward(monkeypatch, group):
    """At each allocation of ours in turn: nothing is kept, no gradient is half there, and a smaller batch works."""
    layers = [NF4LoRALinear(64, 48, r=4).bfloat16() for _ in range(2)]
    for layer in layers:
        nn.init.normal_(layer.lora_B)
    call = NF4LoRALinearGroup(a=layers[0], b=layers[1]) if group else layers[0]
    learned = [p for p in call.parameters() if p.requires_grad]

    def step(x):
        out = call(x)
        sum(y.float().square().mean() for y in (out if group else (out,))).backward()

    def gradients(rows):
        x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
        step(x)
        found = [t.grad.clone() for t in (x, *learned)]
        for p in learned:
            p.grad = None
        return found

    with use_backend("cpu"):
        wanted = gradients(8)
        counted = Ending(-1)
        with monkeypatch.context() as patch:
            patch.setattr(native.host, "empty", counted)
            gradients(32)
        assert counted.calls >= 4
        for last in range(counted.calls):
            ending = Ending(last)
            with monkeypatch.context() as patch:
                patch.setattr(native.host, "empty", ending)
                with pytest.raises(torch.OutOfMemoryError):
                    gradients(32)
            gc.collect()
            assert not any(t() is not None for t in ending.given) and all(p.grad is None for p in learned)
            assert all(map(torch.equal, wanted, gradients(8)))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compute_dtype", COMPUTE)
@pytest.mark.parametrize("dtype", FLOATS)
def test_row33_dtypes(dtype, compute_dtype, autocast):
    """The table of `nf4lora.nn`; the values are as good as plain torch's in the dtype computed in."""
    layer = make(compute_dtype=compute_dtype)
    layer.bias.requires_grad_()
    x = torch.randn(32, 96).to(dtype).requires_grad_()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        y = layer(x)
    work = autocast or compute_dtype or dtype
    assert y.dtype == (autocast or dtype)
    dy = torch.randn(32, 40).to(y.dtype)
    y.backward(dy)
    assert x.grad.dtype == dtype and all(p.grad.dtype == p.dtype for p in (layer.lora_A, layer.lora_B, layer.bias))

    truth_x = x.detach().to(work).double().requires_grad_()
    A, B, b = (p.detach().double() for p in (layer.lora_A, layer.lora_B, layer.bias))
    w = layer.dequantize(torch.float32).double()
    truth = truth_x @ w.T + b + layer.scaling * (truth_x @ A.T) @ B.T
    truth.backward(dy.to(work).double())
    plain_x = x.detach().to(work).requires_grad_()
    plain = plain_x @ w.T.to(work) + b.to(work) + layer.scaling * (plain_x @ A.T.to(work)) @ B.T.to(work)
    plain.backward(dy.to(work))
    assert_error_ratio(y.detach(), plain.detach().to(y.dtype), truth.detach(), "y")
    assert_error_ratio(x.grad, plain_x.grad.to(dtype), truth_x.grad, "dx")


def test_row33_autocast_does_not_reach_inside_nor_stay():
    layer, x = make(), torch.randn(3, 96)
    with torch.autocast("cpu", torch.bfloat16):
        w = layer.dequantize()
        merged = layer.merge().weight
        state = quantize_4bit(w)[1]
    assert w.dtype == torch.float32 and torch.equal(merged, layer.merge().weight) and state.dtype == torch.float32
    assert layer(x).dtype == torch.float32


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": lambda m: through_torch_save(m, m),
    "state_dict": lambda m: load_into(make(seed=9, double_quant=m.double_quant), through_torch_save(m.state_dict(), m)),
    "cpu": lambda m: copy.deepcopy(m).cpu(),
}


def through_torch_save(what, module):
    file = io.BytesIO()
    torch.save(what, file)
    file.seek(0)
    return torch.load(file, weights_only=what is not module)


def load_into(layer, state):
    layer.load_state_dict(state)
    return layer


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("way", COPIES)
def test_row34_copies(way, nested):
    layer = make(double_quant=nested)
    other = COPIES[way](layer)
    assert type(other) is NF4LoRALinear and repr(other) == repr(layer)
    theirs = dict(other.named_parameters())
    for name, own in layer.named_parameters():
        assert raw(theirs[name]) == raw(own) and theirs[name].dtype == own.dtype, name
        assert theirs[name].requires_grad == own.requires_grad
        assert theirs[name].untyped_storage().data_ptr() != own.untyped_storage().data_ptr(), name
    x = torch.randn(3, 96)
    assert equal(passes(other, x), passes(layer, x)) and other.quant_state == layer.quant_state
    with torch.no_grad():
        other.weight.zero_()
        other.lora_B.zero_()
    assert layer.weight.any() and layer.lora_B.any()


@pytest.mark.parametrize("nested", [False, True])
def test_row34_casts_and_moves(nested):
    layer = make(double_quant=nested)
    integers = {n: raw(p) for n, p in layer.named_parameters() if not p.is_floating_point()}
    assert len(integers) == (4 if nested else 2)
    for cast in (nn.Module.half, nn.Module.bfloat16, lambda m: m.to(torch.float16), lambda m: m.to("cpu", torch.bfloat16)):
        other = cast(copy.deepcopy(layer))
        assert {n: raw(p) for n, p in other.named_parameters() if n in integers} == integers
        assert other.lora_A.dtype == other.bias.dtype != torch.float32
        x = torch.randn(2, 96, dtype=other.lora_A.dtype)
        assert other(x).dtype == x.dtype and torch.equal(other.dequantize(), layer.dequantize())
    meta = copy.deepcopy(layer).to("meta")
    assert all(p.is_meta for p in meta.parameters())
    assert {n: p.dtype for n, p in meta.named_parameters()} == {n: p.dtype for n, p in layer.named_parameters()}
    meta.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(meta(torch.ones(96)), layer(torch.ones(96)))
    assert QuantState.from_dict(layer.quant_state.as_dict()) == copy.deepcopy(layer.quant_state) == layer.quant_state


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dynamic", [False, True])
def test_row35_compile(p, dynamic):
    torch._dynamo.reset()
    layer = make(lora_dropout=p)
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for M in (5, 9):
        x, found = torch.randn(M, 96), []
        for run in (layer, compiled):
            torch.manual_seed(4)
            given = x.clone().requires_grad_()
            y = run(given)
            found.append([y.detach(), *torch.autograd.grad(y.square().sum(), [given, layer.lora_A, layer.lora_B])])
        assert equal(*found)
    with refuses(ValueError, "found x of shape (2, 95)", "wanted [..., 96]"):
        layer(torch.randn(2, 95))


def test_row35_compile_inductor_and_autocast():
    torch._dynamo.reset()
    layer = make()
    compiled = torch.compile(lambda x: layer(x).relu().square().sum(), fullgraph=True)
    x = torch.randn(6, 96, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        gradient = torch.autograd.grad(compiled(x), [x, layer.lora_B])
        wanted = torch.autograd.grad(layer(x).relu().square().sum(), [x, layer.lora_B])
    for g, w in zip(gradient, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=0.02, atol=0.02 * w.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_row36_checkpointing(use_reentrant, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(*(make(64, 64, seed=i, lora_dropout=0.25) for i in range(3)))
    x = torch.randn(9, 64, dtype=dtype)
    found = []
    for run in (model, lambda t: checkpoint(model, t, use_reentrant=use_reentrant)):
        torch.manual_seed(5)
        given = x.clone().requires_grad_()
        y = run(given)
        y.float().square().sum().backward()
        found.append([y.detach(), given.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
        assert len(found[-1]) == 8 and all(t is not None for t in found[-1])
        model.zero_grad()
    assert equal(*found)


def test_row36_reentrant_backward():
    """A backward through the same layer from inside its own backward."""
    layer, x = make(lora_dropout=0.25), torch.randn(3, 96)

    def run(nested):
        torch.manual_seed(6)
        given, other, inner = x.clone().requires_grad_(), x.clone().requires_grad_(), []
        y, z = layer(given).square().sum(), layer(other).square().sum()
        if nested:
            y.grad_fn.next_functions[0][0].register_prehook(
                lambda g: inner.extend(torch.autograd.grad(z, [other, layer.lora_A])) and None
            )
        y.backward()
        if not nested:
            inner.extend(torch.autograd.grad(z, [other, layer.lora_A]))
        found = [given.grad, layer.lora_A.grad, layer.lora_B.grad, *inner]
        layer.zero_grad()
        return found

    assert equal(run(True), run(False))


def test_row39_double_backward():
    layer, x = make(), torch.randn(3, 96, requires_grad=True)
    (g,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with refuses(RuntimeError, "differentiate twice", "once_differentiable"):
        g.square().sum().backward()
    # Also where dy is a constant: the gradient depends on A and B, so a penalty on it must not be taken for a constant.
    y = layer(x)
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert g.requires_grad
    with refuses(RuntimeError, "differentiate twice", "once_differentiable"):
        (y.mean() + g.square().sum()).backward()


def test_row39_saved_x_changed_in_place():
    layer = make()
    for view in (lambda t: t, lambda t: t.view(2, 3, 96)):
        x = torch.randn(6, 96)
        y = layer(view(x))
        x.add_(1)
        with refuses(RuntimeError, "modified by an inplace operation"):
            y.sum().backward()
    x = torch.randn(6, 96)
    y = layer(x)
    with torch.no_grad():
        layer.lora_B.add_(1)
    with refuses(RuntimeError, "modified by an inplace operation"):
        y.sum().backward()
    y = layer(x)
    layer.load_state_dict(make(seed=1).state_dict())
    with refuses(RuntimeError, "modified by an inplace operation"):
        y.sum().backward()
    layer.lora_A.requires_grad_(False)
    y = layer(x)
    x.add_(1)  # not saved, so free
    y.sum().backward()


def test_row39_backward_twice():
    layer, x = make(lora_dropout=0.25), torch.randn(3, 96, requires_grad=True)
    y = layer(x).square().sum()
    y.backward(retain_graph=True)
    once = [t.grad.clone() for t in (x, layer.lora_A, layer.lora_B)]
    y.backward()
    assert equal([2 * t for t in once], [t.grad for t in (x, layer.lora_A, layer.lora_B)])
    with refuses(RuntimeError, "backward through the graph a second time"):
        y.backward()


PROBE = """
import sys, torch, nf4lora
from nf4lora import backends
assert nf4lora.__file__.startswith(sys.argv[1]), nf4lora.__file__
layer = nf4lora.NF4LoRALinear(64, 32, r=4)
x = torch.randn(3, 64, requires_grad=True)
layer(x).sum().backward()
assert x.grad.shape == (3, 64) and layer.lora_B.grad.any()
for name in ("cpu", "cuda", "triton"):
    try:
        with backends.use_backend(name):
            layer(x)
    except NotImplementedError as error:
        print(name, "refused:", error)
for row in backends.report():
    print(*row, sep="|")
"""


@pytest.mark.parametrize("library", ["absent", "not a library"])
def test_row42_no_gpu_and_no_library(library, tmp_path):
    package = tmp_path / "nf4lora"
    shutil.copytree(Path(nf4lora.__file__).parent, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if library != "absent":
        (package / "libnf4lora_cpu.so").write_bytes(b"\x7fELF and then nothing of use")
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    env.pop("TRITON_INTERPRET", None)  # in its interpreter Triton would run on this machine
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(tmp_path)],
        check=False, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    why = "was not built into .*: reinstall" if library == "absent" else "does not load"
    assert re.search(rf"RuntimeWarning: nf4lora runs without its kernels.*libnf4lora_cpu.so {why}", done.stderr)
    assert re.search(rf"cpu refused: nf4lora::linear_fwd on cpu: no back end can run it\n\s+cpu: libnf4lora_cpu.so {why}", done.stdout)
    assert re.search(rf"^cpu\|cpu\|libnf4lora_cpu.so {why}", done.stdout, re.MULTILINE)
    assert "cpu|reference|None" in done.stdout
    for name in ("cuda", "triton"):
        assert re.search(rf"{name} refused: nf4lora::linear_fwd on cpu.*\n\s+{name}: \S+", done.stdout)
        assert re.search(rf"^cuda\|{name}\|(?!None)", done.stdout, re.MULTILINE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_row42_a_forced_back_end_never_falls_back(name, monkeypatch):
    monkeypatch.setattr(triton_rows, "interpreted", lambda: False)
    layer = make()
    with unchanged(layer), use_backend(name), refuses(NotImplementedError, "nf4lora::linear_fwd on cpu", f"{name}: "):
        layer(torch.randn(2, 96))
    with refuses(ValueError, "back end: found 'cudnn'", "wanted one of", "'reference'"), use_backend("cudnn"):
        layer(torch.randn(2, 96))
    assert layer(torch.randn(2, 96)).shape == (2, 40)
    assert all(row.why_not for row in report() if row.device == "cuda")


def assert_products(N, K, M, dtype=torch.float32):
    layer = make(K, N, r=1)
    x, dy = torch.randn(M, K, dtype=dtype), torch.randn(M, N, dtype=dtype)
    w, A, B, b = (t.detach().double() for t in (layer.dequantize(torch.float32), layer.lora_A, layer.lora_B, layer.bias))
    given = x.clone().requires_grad_()
    layer(given).backward(dy)
    X, D, s = x.double(), dy.double(), layer.scaling
    truth = {"y": X @ w.T + b + s * X @ A.T @ B.T, "dx": D @ w + s * D @ B @ A, "dA": s * (D @ B).T @ X, "dB": s * D.T @ (X @ A.T)}
    found = {"y": layer(x), "dx": given.grad, "dA": layer.lora_A.grad, "dB": layer.lora_B.grad}
    for name, t in truth.items():
        torch.testing.assert_close(found[name].double(), t, rtol=1e-4, atol=1e-4 * max(1, t.abs().max().item()), msg=name)


def test_row43_tiny_sizes(one_thread):
    for N in range(1, 16):
        for K in range(1, 16):
            assert_products(N, K, 3)


@pytest.mark.parametrize(("N", "K"), [(15, 1), (1, 15), (16, 33)])
def test_row43_many_rows(N, K):
    """More rows than a GPU's grid has in y and z."""
    assert_products(N, K, 70_000)


@pytest.mark.parametrize("nested", [False, True])
def test_row44_merge_twice(nested):
    layer = make(double_quant=nested).bfloat16()
    with unchanged(layer):
        one, two = layer.merge(), layer.merge()
    assert type(one) is nn.Linear and raw(one.weight) == raw(two.weight) and raw(one.bias) == raw(two.bias)
    exact = layer.dequantize(torch.float32).double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        merged = layer.merge(dtype)
        assert merged.weight.dtype == merged.bias.dtype == dtype and merged.weight.requires_grad
        eps = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).eps
        assert ((merged.weight.double() - exact).abs() <= 1.01 * eps * exact.abs() + 1e-7).all()
    assert one.weight.dtype == torch.float32  # as the weight was before it was quantized
    with torch.no_grad():
        one.weight.zero_()
        one.bias.zero_()
    assert layer.bias.any() and raw(layer.merge().weight) == raw(two.weight)
    with unchanged(layer), refuses(TypeError, "dtype: found torch.int8", "wanted a float dtype"):
        layer.merge(torch.int8)


def test_row44_nothing_is_left_behind():
    """No reference cycle keeps a layer, its merged form or a graph alive."""
    import weakref

    layer = make()
    merged = layer.merge()
    y = layer(torch.randn(2, 96, requires_grad=True)).sum()
    y.backward()
    gone = [weakref.ref(t) for t in (layer.weight, merged.weight, y)]
    gc.disable()
    try:
        del layer, merged, y
        assert [r() for r in gone] == [None] * 3
    finally:
        gc.enable()
