"""T0: the bytes, the checkpoint keys and the decoded values are bitsandbytes' own (its CPU functional API; NaN and Inf aside).

In a short last block bitsandbytes' CPU code divides by the absmax where its CUDA code, and ours, multiply by the
reciprocal; and it stores 1e-38 for an absmax below that there. Every difference must be explained by exactly these.
"""

import pytest
import torch

from nf4lora import QuantState, dequantize_4bit, quantize_4bit, reference
from nf4lora.codebook import BLOCKSIZES, MIN_ABSMAX, QUANT_TYPES, boundaries, code_order, codebook
from under_test import fewer

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
SEGMENT = 4096  # so that one block never holds two kinds of input
COMPARED = "T0, bitsandbytes: elements compared"
DIFFERING = "T0, bitsandbytes: bytes differing"
IN_TAILS = "T0, bitsandbytes: bytes differing in short tails, where it divides: each checked to be that"

pytestmark = pytest.mark.usefixtures("one_thread")


def neighbours(t):
    """Every value with the floats just below and just above it, of t's dtype; t has no zeros."""
    bits = t.view(INTEGERS[t.dtype])
    return torch.stack([bits - 1, bits, bits + 1]).view(t.dtype).movedim(0, -1).reshape(*t.shape[:-1], -1)


def on_boundaries(segments, dtype, quant_type, generator):
    """Segments led by their absmax, the rest boundary * absmax and its neighbours; every other absmax is a power of two."""
    absmax = torch.rand(segments, 1, generator=generator) * 3.9 + 0.1
    absmax[::2] = 2.0 ** torch.randint(-4, 4, (len(absmax[::2]), 1), generator=generator)
    absmax = absmax.to(dtype)
    bounds = boundaries(quant_type)
    near = neighbours((bounds[bounds != 0] * absmax.float()).to(dtype))
    values = near.repeat(1, SEGMENT // near.shape[1] + 1)[:, :SEGMENT].clone()
    values[:, ::32] = absmax * torch.where(torch.arange(SEGMENT // 32) % 3 == 1, -1, 1)
    return values


def inputs(dtype, quant_type, segments, seed):
    """kind -> [segments, 4096] of `dtype`, all finite."""
    g = torch.Generator().manual_seed(seed)
    limit = torch.finfo(dtype).max
    normal = torch.randn(segments * 4, SEGMENT, generator=g)
    cauchy = (torch.randn(segments, SEGMENT, generator=g) / torch.randn(segments, SEGMENT, generator=g)).nan_to_num(0, limit, -limit)
    few = max(segments // 8, 1)
    smallest = torch.finfo(dtype).smallest_normal
    return {
        "randn": normal.to(dtype),
        "uniform": (torch.rand(segments, SEGMENT, generator=g) * 2 - 1).to(dtype),
        "heavy tails": cauchy.clamp(-limit, limit).to(dtype),
        "boundaries": on_boundaries(segments, dtype, quant_type, g),
        "constant": torch.randn(few, 1, generator=g).expand(few, SEGMENT).to(dtype),
        "tiny": (normal[:few] * 1e-30).to(dtype),
        "denormal": torch.randint(-200, 201, (few, SEGMENT), generator=g).to(torch.float64).mul(smallest / 256).to(dtype),
        "zeros and one value": (torch.arange(few * SEGMENT).reshape(few, SEGMENT) % 97 == 0).to(dtype),
    }


def unpack(packed, numel):
    flat = packed.reshape(-1)
    return torch.stack([flat >> 4, flat & 15], -1).reshape(-1)[:numel].long()


def check_bytes(bnb, figures, a, blocksize, quant_type):
    theirs, their_state = bnb.quantize_4bit(a, blocksize=blocksize, quant_type=quant_type)
    ours, state = quantize_4bit(a, blocksize, quant_type=quant_type)
    figures[COMPARED] += a.numel()
    figures[DIFFERING] += 0
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape and state.absmax.dtype == their_state.absmax.dtype
    whole = a.numel() // blocksize
    assert torch.equal(state.absmax[:whole], their_state.absmax[:whole])
    assert torch.equal(state.absmax[whole:].clamp_min(MIN_ABSMAX), their_state.absmax[whole:])
    if torch.equal(ours, theirs):
        return
    differing = int((ours != theirs).sum())
    assert not (quant_type == "nf4" and a.dtype != torch.float32), "NF4 of 16-bit weights has no exceptions"
    tail = a.reshape(-1)[whole * blocksize :].float()
    by_division = torch.bucketize(tail / tail.abs().max().clamp_min(MIN_ABSMAX), boundaries(quant_type))
    explained = unpack(ours, 2 * len(ours))
    explained[whole * blocksize : a.numel()] = code_order(quant_type)[by_division]
    unexplained = int((explained != unpack(theirs, 2 * len(theirs))).sum())
    figures[DIFFERING] += unexplained
    figures[IN_TAILS] += differing
    assert unexplained == 0


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_bytes_equal_on_whole_blocks(bnb, figures, cpu, quant_type, dtype):
    before = figures[IN_TAILS]
    by_kind = inputs(dtype, quant_type, 70, seed=1)
    a = torch.cat(list(by_kind.values()))
    for blocksize in BLOCKSIZES:
        check_bytes(bnb, figures, a, blocksize, quant_type)
    assert figures[IN_TAILS] == before


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_bytes_equal_with_short_tails_and_odd_counts(bnb, figures, format_backend, quant_type, dtype):
    g = torch.Generator().manual_seed(2)
    for kind, values in inputs(dtype, quant_type, 3, seed=3).items():
        flat = values.reshape(-1)
        for blocksize in BLOCKSIZES:
            for numel in (1, blocksize - 1, blocksize + 1, 3 * blocksize + int(torch.randint(1, blocksize, (), generator=g))):
                start = 32 * int(torch.randint(0, (len(flat) - min(numel, len(flat))) // 32 + 1, (), generator=g))
                check_bytes(bnb, figures, flat[start : start + numel], blocksize, quant_type)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_row_6_numel_1_to_257(bnb, figures, format_backend, quant_type, dtype):
    flat = torch.cat(list(inputs(dtype, quant_type, 1, seed=4).values())).reshape(-1)
    for numel in range(1, 258):
        start = 2048 + 512 * (numel % 61)
        check_bytes(bnb, figures, flat[start : start + numel], (32, 64, 128)[numel % 3], quant_type)


def test_shapes_and_strides_do_not_matter(bnb, figures, format_backend):
    a = torch.randn(3, 50, 70)
    for view in (a, a.transpose(0, 2), a[:, ::3], a[1], a.flip(1), a[:1].expand(4, 50, 70)):
        check_bytes(bnb, figures, view, 64, "nf4")


def test_at_least_1e8_elements_were_compared(figures, request):
    """Runs after the byte tests above; alone it has nothing to judge."""
    ran = [item.originalname for item in request.session.items]
    if ran.count("test_bytes_equal_on_whole_blocks") < len(FLOATS) * len(QUANT_TYPES) or hasattr(request.config, "workerinput"):
        pytest.skip("not all byte tests were selected for this process")
    assert figures[COMPARED] >= 10**8


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_quant_storage_is_the_same_bytes(bnb, storage):
    a = torch.randn(64, 48)
    theirs, _ = bnb.quantize_4bit(a, quant_type="nf4", quant_storage=storage)
    ours, state = quantize_4bit(a, quant_storage=storage)
    assert ours.dtype == storage and ours.shape == theirs.shape
    assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
    assert torch.equal(dequantize_4bit(ours, state), dequantize_4bit(ours.view(torch.uint8), state))


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("numel", [1, 255, 256 * 64, 300_001])
def test_double_quantization_against_theirs(bnb, figures, format_backend, blocksize, numel):
    a = torch.randn(numel, generator=torch.Generator().manual_seed(numel)) * 0.02
    _, theirs = bnb.quantize_4bit(a, blocksize=blocksize, quant_type="nf4", compress_statistics=True)
    _, ours = quantize_4bit(a, blocksize, compress_statistics=True)
    _, absmax = reference.quantize(a, blocksize, "nf4")
    assert torch.equal(ours.offset, absmax.mean())
    # Their offset may be of another thread count; given it, all that follows is equal or, for the codes, no farther.
    codes, nested_absmax = torch.ops.nf4lora.quantize_absmax(absmax, theirs.offset)
    assert torch.equal(nested_absmax, theirs.state2.absmax)
    value = (absmax - theirs.offset) * (1 / nested_absmax.repeat_interleave(256)[: len(absmax)].clamp_min(MIN_ABSMAX))
    table = codebook("dynamic").double()
    far = (table[theirs.absmax.long()] - value.double()).abs()
    near = (table[codes.long()] - value.double()).abs()
    assert bool((near <= far).all())
    figures["T0, bitsandbytes: nested codes compared"] += len(codes)
    figures["T0, bitsandbytes: nested codes where its 65,536-bin table is farther off than ours"] += int((near < far).sum())


def their_states(bnb):
    for dtype in FLOATS:
        for quant_type in QUANT_TYPES:
            for nested in (False, True):
                for blocksize in (32, 64, 4096):
                    for shape in ((33, 65), (128, 300)):
                        a = torch.randn(shape, generator=torch.Generator().manual_seed(blocksize)).to(dtype) * 0.05
                        yield a, bnb.quantize_4bit(a, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested)


@pytest.mark.parametrize("packed_dict", [True, False])
def test_what_bitsandbytes_wrote_decodes_bit_exactly_here(bnb, format_backend, packed_dict):
    for _, (packed, theirs) in fewer(their_states(bnb), format_backend, 7):
        state = QuantState.from_dict(theirs.as_dict(packed=packed_dict))
        wanted = bnb.dequantize_4bit(packed, theirs)
        found = dequantize_4bit(packed, state)
        assert found.dtype == wanted.dtype and torch.equal(found, wanted), state


@pytest.mark.parametrize("packed_dict", [True, False])
def test_what_we_write_decodes_in_bitsandbytes(bnb, format_backend, packed_dict):
    for a, (_, theirs) in fewer(their_states(bnb), format_backend, 7):
        packed, state = quantize_4bit(a, theirs.blocksize, theirs.nested, theirs.quant_type)
        read = bnb.QuantState.from_dict(state.as_dict(packed=packed_dict), device=torch.device("cpu"))
        # bitsandbytes decodes FP4's code 8 to +0 here and to -0 there; torch.equal takes both.
        assert torch.equal(bnb.dequantize_4bit(packed, read), dequantize_4bit(packed, state)), state


def test_as_dict_equals_theirs_key_by_key(bnb):
    for a, (packed, theirs) in their_states(bnb):
        state = QuantState.from_dict(theirs.as_dict(packed=True))
        for packed_dict in (True, False):
            wanted, found = theirs.as_dict(packed=packed_dict), state.as_dict(packed=packed_dict)
            assert sorted(found) == sorted(wanted)
            for key, value in wanted.items():
                if isinstance(value, torch.Tensor):
                    assert found[key].dtype == value.dtype and torch.equal(found[key], value), key
                else:
                    assert found[key] == value and type(found[key]) is type(value), key


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("nested", [False, True])
def test_linear4bit_checkpoints_both_ways(bnb, format_backend, quant_type, nested):
    import bitsandbytes.nn

    torch.manual_seed(0)
    # 128 columns: on a processor with AVX-512 bitsandbytes 0.50.2 decodes rows of 96 with the wrong absmax.
    layer = bitsandbytes.nn.Linear4bit(
        128, 50, bias=False, quant_type=quant_type, compress_statistics=nested, compute_dtype=torch.float32
    ).to("cpu").train()  # fmt: skip
    saved = layer.state_dict()
    state = QuantState.from_dict({k: v for k, v in saved.items() if k != "weight"})
    wanted = bnb.dequantize_4bit(layer.weight, layer.weight.quant_state)
    assert torch.equal(dequantize_4bit(saved["weight"], state), wanted)
    x = torch.randn(5, 128)
    assert torch.allclose(layer(x), x @ wanted.T, atol=1e-5)

    packed, ours = quantize_4bit(torch.randn(50, 128), 64, nested, quant_type)
    stats = {f"weight.{k}": v for k, v in ours.as_dict(packed=True).items()}
    weight = bitsandbytes.nn.Params4bit.from_prequantized(packed, stats, device="cpu")
    assert torch.equal(bnb.dequantize_4bit(weight, weight.quant_state), dequantize_4bit(packed, ours))
