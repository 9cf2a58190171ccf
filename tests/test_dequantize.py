"""dequantize: `round(code * absmax)`, bit-exact on every back end, for every byte, scale, dtype and shape."""

import numpy as np
import pytest
import torch

from nf4lora import dequantize_4bit, ops, quantize_4bit, reference
from nf4lora.codebook import BLOCKSIZES, QUANT_TYPES, codebook
from nf4lora.functional import dequantize_fp4, dequantize_nf4, quantize_fp4, quantize_nf4
from under_test import fewer

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SCALES = [0.0, 1e-45, 1e-40, 1.1754944e-38, 1e-38, 1e-30, 6e-8, 3e-5, 0.0170898, 1 / 3, 1.0, 7.7, 65519.0, 65520.0, 1e30, 3.4e38, torch.inf]

pytestmark = pytest.mark.usefixtures("one_thread")


def same_bits(a, b):
    if a.is_floating_point():
        a, b = (torch.where(t.isnan(), torch.full_like(t, torch.nan), t) for t in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_every_byte_under_every_scale(format_backend, quant_type, dtype):
    # The expected values from numpy: one float32 product, one rounding
    scales = torch.tensor(SCALES + np.random.default_rng(0).standard_normal(200).astype(np.float32).tolist())
    packed = torch.arange(256).to(torch.uint8).repeat(len(scales)).unsqueeze(1)
    book = codebook(quant_type).numpy()
    byte = np.tile(np.arange(256), len(scales))
    with np.errstate(all="ignore"):
        products = np.stack([book[byte >> 4], book[byte & 15]], -1).reshape(-1) * np.repeat(scales.numpy(), 512)
    wanted = torch.from_numpy(products).to(dtype)
    found = ops.dequantize(packed, scales, None, None, [len(scales), 512], 512, quant_type, dtype)
    assert same_bits(found.reshape(-1), wanted)


def test_zero_blocks_decode_to_plus_zero(format_backend):
    for quant_type in QUANT_TYPES:
        for nested in (False, True):
            packed, state = quantize_4bit(torch.zeros(3, 50), compress_statistics=nested, quant_type=quant_type)
            assert bool((dequantize_4bit(packed, state).view(torch.int32) == 0).all())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("nested", [False, True])
def test_bits_equal_the_reference_over_shapes(kernels, nested, dtype):
    g = torch.Generator().manual_seed(0)
    for quant_type in QUANT_TYPES:
        for blocksize in fewer(BLOCKSIZES, kernels, 3):
            for shape in ((0,), (1,), (2,), (31,), (257,), (3, 85), (blocksize + 1,), (5, blocksize - 1), (2, 3, 1001), (40_003,)):
                packed, state = quantize_4bit(torch.randn(shape, generator=g) * 0.05, blocksize, nested, quant_type)
                args = packed, state.absmax, state.nested_absmax, state.offset, list(shape), blocksize, quant_type, dtype
                assert same_bits(ops.dequantize(*args), reference.dequantize(*args)), (shape, blocksize, quant_type)


def test_every_nested_code_is_two_roundings(format_backend):
    # code * scale, then + offset: an fma would round once and give other bits for many of these
    g = torch.Generator().manual_seed(0)
    absmax = torch.arange(256).to(torch.uint8).repeat(64)
    nested_absmax, offset = torch.rand(64, generator=g) * 0.1, torch.rand((), generator=g)
    packed = torch.full((len(absmax) * 16, 1), 0xFF, dtype=torch.uint8)  # every element 1.0 * absmax
    found = ops.dequantize(packed, absmax, nested_absmax, offset, [len(absmax), 32], 32, "nf4", torch.float32)
    scaled = codebook("dynamic").numpy()[absmax.numpy()] * nested_absmax.numpy().repeat(256)
    wanted = torch.from_numpy(scaled + offset.numpy())
    once = (codebook("dynamic").double()[absmax.long()] * nested_absmax.double().repeat_interleave(256) + offset.double()).float()
    assert same_bits(found, wanted[:, None].expand(-1, 32).contiguous()) and not torch.equal(wanted, once)


def test_threads_do_not_change_the_bits(cpu):
    packed, state = quantize_4bit(torch.randn(999, 333), compress_statistics=True)
    wanted = dequantize_4bit(packed, state)
    torch.set_num_threads(2)
    assert same_bits(dequantize_4bit(packed, state), wanted)


def test_alignment_does_not_change_the_bits(kernels):
    packed, state = quantize_4bit(torch.randn(999, 33), compress_statistics=True)
    wanted = dequantize_4bit(packed, state)
    for start in range(1, 16):
        shifted = torch.full((len(packed) + 32,), 0xA5, dtype=torch.uint8)[start : start + len(packed)].unsqueeze(1).copy_(packed)
        assert same_bits(dequantize_4bit(shifted, state), wanted)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_into_memory_that_is_there(kernels, dtype):
    for shape, blocksize, nested, quant_type in (((7, 333), 32, True, "nf4"), ((1,), 64, False, "fp4"), ((0, 5), 64, True, "nf4")):
        packed, state = quantize_4bit(torch.randn(shape) * 0.05, blocksize, nested, quant_type)
        wanted = dequantize_4bit(packed, state, dtype)
        memory = torch.full((wanted.numel() + 64,), 7.0, dtype=dtype)
        for start in fewer(range(33), kernels, 11):
            memory.fill_(7.0)
            out = memory[start : start + wanted.numel()].view(shape)
            version = out._version
            assert dequantize_4bit(packed, state, out=out) is out and out._version > version
            assert same_bits(out, wanted) and bool((memory[:start] == 7).all() and (memory[start + wanted.numel() :] == 7).all())


def test_into_memory_in_every_mode_and_compiled(backend):
    packed, state = quantize_4bit(torch.randn(12, 33), compress_statistics=True)
    wanted, out = dequantize_4bit(packed, state), torch.zeros(12, 33)
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            assert same_bits(dequantize_4bit(packed, state, out=torch.zeros(12, 33)), wanted)
    compiled = torch.compile(lambda out: dequantize_4bit(packed, state, out=out) * 2, fullgraph=True, backend="aot_eager")
    assert same_bits(compiled(out), wanted * 2) and same_bits(out, wanted)


def test_memory_that_does_not_fit_is_refused(format_backend):
    packed, state = quantize_4bit(torch.randn(12, 33))
    for out, error, said in (
        (torch.zeros(33, 12), ValueError, r"found shape \(33, 12\), wanted \(12, 33\)"), (torch.zeros(33, 12).T, ValueError, "non-contiguous"),
        (torch.zeros(12, 33, requires_grad=True), ValueError, "requires_grad"), (torch.zeros(12, 33, dtype=torch.int32), TypeError, "int32"),
        (torch.zeros(12, 33, device="meta"), ValueError, "meta"), ([0.0], TypeError, "list"),
    ):  # fmt: skip
        with pytest.raises(error, match=f"out: .*{said}"):
            dequantize_4bit(packed, state, out=out)
    whole = torch.nn.Parameter(torch.zeros(12, 33), requires_grad=False)
    assert same_bits(dequantize_4bit(packed, state, out=whole), dequantize_4bit(packed, state))
    memory = torch.zeros(2048, dtype=torch.uint8)
    for first in (0, 192):  # its last byte, and all of it
        memory[first : first + packed.numel()] = packed.flatten()
        inside = memory[first : first + packed.numel()].view(packed.shape)
        out = memory[packed.numel() - 2 :][: 12 * 33 * 4].view(torch.float32).view(12, 33)
        for out in (out, torch.nn.Parameter(out, requires_grad=False)):
            with pytest.raises(ValueError, match="out: found memory of packed"):
                dequantize_4bit(inside, state, out=out)
    with pytest.raises(TypeError, match="out: found torch.float32, wanted torch.bfloat16"):
        dequantize_4bit(packed, state, torch.bfloat16, torch.zeros(12, 33))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_no_cache_holds_has_the_same_bits(cpu, dtype):
    """Memory so large that it is written past the caches where it is aligned; last blocks that are not whole, too."""
    numel = 2**25 // dtype.itemsize + 4097
    packed = torch.randint(0, 256, (numel // 2 + 1, 1), dtype=torch.uint8)
    absmax = torch.rand(-(-numel // 64))
    memory = torch.empty(numel + 64, dtype=dtype)
    for start in (0, 1, -memory.data_ptr() // dtype.itemsize % 64):
        out = memory[start : start + numel]
        out.fill_(torch.nan)
        ops.dequantize_into(packed, absmax, None, None, 64, "nf4", out)
        assert same_bits(out, reference.dequantize(packed, absmax, None, None, [numel], 64, "nf4", dtype))


def test_float64_is_the_references_alone(format_backend):
    packed, state = quantize_4bit(torch.randn(4, 64))
    if format_backend == "reference":
        w = dequantize_4bit(packed, state, torch.float64)
        assert torch.equal(w.float(), dequantize_4bit(packed, state, torch.float32))
    else:
        with pytest.raises(TypeError, match="float64"):
            dequantize_4bit(packed, state, torch.float64)


def test_named_functions(format_backend):
    a = torch.randn(10, 64)
    for quantize, dequantize, other, name in ((quantize_nf4, dequantize_nf4, dequantize_fp4, "nf4"), (quantize_fp4, dequantize_fp4, dequantize_nf4, "fp4")):
        packed, state = quantize(a, 32, True)
        assert state == quantize_4bit(a, 32, True, name)[1] and state.quant_type == name
        assert torch.equal(dequantize(packed, state), dequantize_4bit(packed, state))
        with pytest.raises(ValueError, match="quant_type"):
            other(packed, state)
