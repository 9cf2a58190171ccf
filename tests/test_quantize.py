"""quantize and quantize_absmax: every back end against the specification, bit patterns whole, and the format's properties."""

import mmap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nf4lora import abi, native, ops, quantize_4bit, reference
from nf4lora.codebook import BLOCKSIZES, MIN_ABSMAX, QUANT_TYPES, boundaries, code_order, codebook
from under_test import KERNELS, force

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# mean |x - decoded| and mean(|x - decoded| / (|x| + 1e-8)) of randn(1024, 1024) with their standard deviations,
# measured by bitsandbytes over 200 draws; peers/bitsandbytes.md §5.1.
ROUND_TRIP = {
    "nf4": {32: (0.067746, 6.9e-5, 0.189726, 3.04e-4), 64: (0.072798, 7.4e-5, 0.203339, 3.40e-4),
            128: (0.076831, 9.1e-5, 0.215237, 3.91e-4), 256: (0.080337, 1.02e-4, 0.226105, 3.98e-4),
            512: (0.083547, 1.43e-4, 0.236079, 5.44e-4), 1024: (0.086610, 1.87e-4, 0.245370, 6.00e-4),
            2048: (0.089592, 2.51e-4, 0.254163, 7.47e-4), 4096: (0.092547, 3.60e-4, 0.262473, 9.99e-4)},
    "fp4": {32: (0.088925, 9.1e-5, 0.242443, 3.30e-4), 64: (0.096543, 1.11e-4, 0.260125, 3.79e-4),
            128: (0.102969, 1.34e-4, 0.275817, 4.33e-4), 256: (0.108684, 1.82e-4, 0.289831, 4.97e-4),
            512: (0.114115, 2.34e-4, 0.302881, 5.83e-4), 1024: (0.119333, 3.20e-4, 0.315000, 7.57e-4),
            2048: (0.124556, 4.55e-4, 0.326607, 9.55e-4), 4096: (0.129536, 6.12e-4, 0.337169, 1.239e-3)},
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


def same_bits(a, b):
    """Equal to the bit; of a NaN only that it is one."""
    if a.is_floating_point():
        a, b = (torch.where(t.isnan(), torch.full_like(t, torch.nan), t) for t in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def assert_matches_reference(a, blocksize, quant_type):
    for found, wanted in zip(ops.quantize(a, blocksize, quant_type), reference.quantize(a, blocksize, quant_type), strict=True):
        assert same_bits(found, wanted), (a.shape, a.dtype, blocksize, quant_type)


def decoded(a, blocksize, quant_type):
    packed, absmax = ops.quantize(a, blocksize, quant_type)
    return reference.dequantize(packed, absmax, None, None, a.shape, blocksize, quant_type, torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_every_16_bit_pattern(kernels, quant_type, dtype):
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    finite = patterns[patterns.isfinite()]
    for blocksize in (32, 64, 4096):
        assert_matches_reference(finite, blocksize, quant_type)
        assert_matches_reference(patterns, blocksize, quant_type)
    # Each pattern beside an absmax of its own block
    for scale in (1.0, 0.37, 3e-3):
        beside = torch.full((len(finite), 32), 0.0, dtype=dtype)
        beside[:, 0], beside[:, 1] = scale, finite
        assert_matches_reference(beside, 32, quant_type)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_bytes_equal_the_reference_over_shapes(kernels, quant_type, dtype):
    g = torch.Generator().manual_seed(0)
    for blocksize in BLOCKSIZES:
        for numel in (0, 1, 2, 31, 33, 63, 257, 1023, 1024, 1025, blocksize - 1, 3 * blocksize + 1, 40_003):
            a = torch.randn(numel, generator=g).to(dtype)
            assert_matches_reference(a, blocksize, quant_type)
    square = torch.randn(70, 90, generator=g).to(dtype)
    for view in (square.T, square[:, ::2], square[5:6].expand(9, 90), square.reshape(7, 10, 90).permute(2, 0, 1)):
        assert_matches_reference(view, 64, quant_type)


def test_threads_do_not_change_the_bytes(cpu):
    a = torch.randn(300_001)
    one = ops.quantize(a, 64, "nf4")
    torch.set_num_threads(2)
    two = ops.quantize(a, 64, "nf4")
    assert all(map(same_bits, one, two))


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_codes_follow_the_rule(format_backend, quant_type):
    # The rule in plain words, in float32: code of the number of boundaries below x * (1 / absmax)
    a = torch.randn(4096)
    packed, absmax = ops.quantize(a, 64, quant_type)
    assert torch.equal(absmax, a.reshape(-1, 64).abs().amax(1))
    scaled = (a.reshape(-1, 64) * (1 / absmax)[:, None]).reshape(-1, 1)
    codes = code_order(quant_type)[(scaled > boundaries(quant_type)).sum(1)]
    assert torch.equal(packed.reshape(-1), (codes[0::2] * 16 + codes[1::2]).to(torch.uint8))


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_ties_take_the_lower_value(format_backend, quant_type):
    bounds, order = boundaries(quant_type), code_order(quant_type)
    for j in range(15):
        a = torch.zeros(32)
        a[0], a[1], a[2] = 1.0, bounds[j], torch.nextafter(bounds[j], torch.tensor(2.0))
        packed, _ = ops.quantize(a, 32, quant_type)
        assert int(packed[0]) & 15 == order[j]
        assert int(packed[1]) >> 4 == order[j + 1]


@pytest.mark.parametrize(("quant_type", "pad"), [("nf4", 7), ("fp4", 0)])
def test_row_7_padding_nibble_is_the_code_of_zero(format_backend, quant_type, pad):
    for numel in (1, 33, 257):
        packed, absmax = ops.quantize(torch.ones(numel), 64, quant_type)
        assert int(packed[-1]) & 15 == pad and len(packed) == numel // 2 + 1 and len(absmax) == -(-numel // 64)
    packed, absmax = ops.quantize(torch.ones(0), 64, quant_type)
    assert packed.shape == (0, 1) and absmax.shape == (0,)


@pytest.mark.parametrize(("quant_type", "byte"), [("nf4", 0x77), ("fp4", 0x00)])
def test_row_3_zero_block(format_backend, quant_type, byte):
    for numel in (64, 100):
        for zero in (0.0, -0.0):
            packed, absmax = ops.quantize(torch.full((numel,), zero), 64, quant_type)
            assert bool((packed == byte).all()) and bool((absmax.view(torch.int32) == 0).all())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_unchecked_nan_and_inf_never_decode_to_a_finite_lie(format_backend, dtype, value):
    a = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    a[1, 17] = value
    packed, state = quantize_4bit(a, check_finite=False)
    wanted = reference.quantize(a, 64, "nf4")
    assert same_bits(packed, wanted[0]) and torch.equal(state.absmax.isnan(), wanted[1].isnan())
    w = reference.dequantize(packed, state.absmax, None, None, (3, 64), 64, "nf4", torch.float32)
    assert not w[1].isfinite()[17] and w[0].isfinite().all() and w[2].isfinite().all()
    assert state.absmax[1].isnan() if value != value else state.absmax[1].isinf()


@pytest.mark.parametrize("groups", [1, 2, 255, 256, 257, 5000])
@pytest.mark.parametrize("kind", ["like weights", "one huge", "constant", "denormal"])
def test_nested_codes_are_the_exact_nearest(format_backend, kind, groups):
    g = torch.Generator().manual_seed(groups)
    absmax = torch.rand(groups, generator=g) * 0.05 + 0.03
    if kind == "one huge":
        absmax[groups // 2] = 1e4
    elif kind == "constant":
        absmax[:] = 0.25
    elif kind == "denormal":
        absmax *= 1e-42
    offset = absmax.mean()
    codes, nested_absmax = ops.quantize_absmax(absmax, offset)
    centred = absmax - offset
    blocks = torch.nn.functional.pad(centred, (0, -groups % 256)).reshape(-1, 256)
    assert torch.equal(nested_absmax, blocks.abs().amax(1))
    scaled = (blocks * (1 / nested_absmax.clamp_min(MIN_ABSMAX))[:, None]).reshape(-1)[:groups]
    distance = (scaled.double()[:, None] - codebook("dynamic").double()).abs()
    assert torch.equal(codes.long(), distance.argmin(1))  # the first, so the lower, of a tie
    assert all(map(same_bits, (codes, nested_absmax), reference.quantize_absmax(absmax, offset)))


def test_nested_ties_and_midpoints(kernels):
    table = codebook("dynamic").double()
    middle = ((table[:-1] + table[1:]) / 2).float()
    near = torch.cat([middle, torch.nextafter(middle, torch.tensor(-2.0)), torch.nextafter(middle, torch.tensor(2.0))])
    near = torch.nn.functional.pad(near, (0, -len(near) % 255)).reshape(-1, 255)
    absmax = torch.cat([torch.ones(len(near), 1), near], 1).reshape(-1)  # nested_absmax 1 in each 256
    codes, _ = ops.quantize_absmax(absmax, torch.zeros(()))
    assert torch.equal(codes.long(), (absmax.double()[:, None] - table).abs().argmin(1))


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_round_trip_error_is_bitsandbytes(cpu, quant_type, blocksize):
    mean, mean_std, relative, relative_std = ROUND_TRIP[quant_type][blocksize]
    a = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(blocksize))
    error = (a.double() - decoded(a, blocksize, quant_type)).abs()
    assert error.mean() <= mean + 7 * mean_std
    assert (error / (a.abs() + 1e-8)).mean() <= relative + 7 * relative_std


arrays = st.tuples(
    st.integers(1, 700), st.sampled_from(BLOCKSIZES[:4]), st.sampled_from(QUANT_TYPES), st.sampled_from(FLOATS), st.integers(0, 2**32)
)


def draw(numel, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(numel, generator=g) * torch.randint(1, 4, (numel,), generator=g)).to(dtype)


ALL = (*KERNELS, "reference")


@given(arrays, st.integers(-6, 6))
def test_power_of_two_scales_leave_the_codes(args, exponent):
    numel, blocksize, quant_type, dtype, seed = args
    a = draw(numel, torch.bfloat16, seed).to(dtype)  # coarse, so that float16 scales exactly
    a[a.abs() < 2.0**-7] = 0
    for name in ALL:
        with force(name):
            packed, absmax = ops.quantize(a, blocksize, quant_type)
            scaled_packed, scaled_absmax = ops.quantize(a * 2.0**exponent, blocksize, quant_type)
        assert same_bits(packed, scaled_packed) and torch.equal(absmax * 2.0**exponent, scaled_absmax)


@given(arrays)
def test_error_is_at_most_half_the_widest_gap(args):
    numel, blocksize, quant_type, dtype, seed = args
    a = draw(numel, dtype, seed)
    half_gap = codebook(quant_type)[code_order(quant_type)].diff().max().item() / 2
    for name in ALL:
        with force(name):
            _, absmax = ops.quantize(a, blocksize, quant_type)
            error = (a.double() - decoded(a, blocksize, quant_type)).abs()
        limit = absmax.double().repeat_interleave(blocksize)[:numel] * (half_gap + 2.0**-22)
        assert bool((error <= limit).all())


@given(arrays)
def test_blocks_are_independent(args):
    numel, blocksize, quant_type, dtype, seed = args
    a = draw(blocksize * (numel % 9 + 1), dtype, seed).reshape(-1, blocksize)
    order = torch.randperm(len(a), generator=torch.Generator().manual_seed(seed))
    for name in ALL:
        with force(name):
            packed, absmax = ops.quantize(a, blocksize, quant_type)
            permuted, permuted_absmax = ops.quantize(a[order], blocksize, quant_type)
        assert torch.equal(packed.reshape(len(a), -1)[order], permuted.reshape(len(a), -1)) and torch.equal(absmax[order], permuted_absmax)


@given(arrays)
def test_nf4_of_a_decoded_tensor_is_itself(args):
    numel, blocksize, _, _, seed = args
    a = draw(numel, torch.float32, seed)
    for name in ALL:
        with force(name):
            packed, absmax = ops.quantize(a, blocksize, "nf4")
            again = ops.quantize(ops.dequantize(packed, absmax, None, None, [numel], blocksize, "nf4", torch.float32), blocksize, "nf4")
        # where the largest magnitude was decoded to itself; code 0 and 15 are -1 and 1
        assert same_bits(again[0], packed) and same_bits(again[1], absmax)


def reserve(nbytes: int) -> torch.Tensor:
    """uint8 zero pages that take no memory until they are written, in huge pages where the system has them."""
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


def test_row_10_more_than_2_to_the_31_elements(cpu):
    numel, tail = 2**31 + 101, 101
    torch.set_num_threads(2)
    a = reserve(2 * numel).view(torch.bfloat16)
    last = torch.randn(tail, generator=torch.Generator().manual_seed(0)).bfloat16()
    a[-tail:] = last
    packed, absmax = ops.quantize(a, 4096, "nf4")
    assert packed.shape == (numel // 2 + 1, 1) and len(absmax) == 2**19 + 1
    wanted_packed, wanted_absmax = reference.quantize(last, 4096, "nf4")
    assert same_bits(packed[2**30 :], wanted_packed) and same_bits(absmax[-1:], wanted_absmax)
    assert absmax[:-1].count_nonzero() == 0 and bool((packed[:999] == 0x77).all()) and bool((packed[2**30 - 999 : 2**30] == 0x77).all())
    # As the op does it, but into `a`, whose pages are there already
    weight = native.host._weight(packed, absmax, None, None, 1, numel, 4096, "nf4")
    a[-tail - 5000 :] = 1.0
    native.host.run("dequantize", abi.DequantizeParams(weight, a.data_ptr(), 1, 2), a.device)
    wanted = reference.dequantize(wanted_packed, wanted_absmax, None, None, [tail], 4096, "nf4", torch.bfloat16)
    assert same_bits(a[-tail:], wanted) and a[2**31 - 5000 : 2**31].count_nonzero() == 0


def test_row_10_through_the_kernels_of_a_gpu(monkeypatch):
    """Indices beyond 32 bits in csrc/cuda, where there is no GPU to show it (test_cuda.py)."""
    monkeypatch.setenv("CUDA_ON_HOST", "plain")  # the checker would keep a record of every byte
    numel, tail = 2**31 + 101, 101
    a = reserve(2 * numel).view(torch.bfloat16)
    a[-tail:] = last = torch.randn(tail, generator=torch.Generator().manual_seed(0)).bfloat16()
    with force("cuda_on_host"):
        packed, absmax = ops.quantize(a, 4096, "nf4")
        del a
        out = ops.dequantize(packed, absmax, None, None, [numel], 4096, "nf4", torch.bfloat16)
    wanted = reference.quantize(last, 4096, "nf4")
    assert same_bits(packed[2**30 :], wanted[0]) and same_bits(absmax[-1:], wanted[1])
    assert absmax[:-1].count_nonzero() == 0 and bool((packed[: 2**30] == 0x77).all())
    assert same_bits(out[-tail:], reference.dequantize(*wanted, None, None, [tail], 4096, "nf4", torch.bfloat16))
    assert out[: 2**31].count_nonzero() == 0
