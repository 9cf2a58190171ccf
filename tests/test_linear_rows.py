"""The host's forward for few tokens: T1 and T2 over what cuts it into groups of codes, tiles and blocks, its bits, and its
reads, which end where the operands do."""

import ctypes
import dataclasses
import mmap
import random

import pytest
import torch
from drawn import FLOATS, drawn_case

from nf4lora import heuristics, linear_4bit, quantize_4bit, reference
from nf4lora.codebook import QUANT_TYPES
from nf4lora.heuristics import LinearConfig, LinearPath
from nf4lora.testing import check_error_ratio, check_exact, random_case

pytestmark = pytest.mark.usefixtures("cpu", "one_thread")
TOKENS = (1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 17, 25, 31, 32)


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Sets the tiles of the path, which every forward here takes."""

    def tiles(block_m=32, block_n=24, threads=1):
        monkeypatch.setattr(heuristics, "cpu_linear_fwd", lambda M, *_: LinearConfig(LinearPath.ROWS, block_m, block_n, 1024, threads))

    tiles()
    return tiles


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("K", [64, 128, 192, 960, 1024, 1088, 4096])
def test_t1_over_tokens_and_whole_blocks(few, dtype, K, figures):
    draw = random.Random(f"{dtype} {K}")
    for M in TOKENS:
        few(draw.choice([1, 5, 8, 32]), draw.choice([1, 2, 7, 24, 64]), draw.choice([1, 3]))
        blocksize = draw.choice([64, 64, 128, 4096])
        check_exact(drawn_case(draw, M=M, K=K, N=draw.choice([1, 3, 4, 25, 50]), dtype=dtype, blocksize=blocksize))
        figures["T1: few tokens on the host, forward and backward"] += 1


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_t2_over_tokens(dtype, quant_type):
    for i, M in enumerate(TOKENS):
        check_error_ratio(random_case(M, 130, (704, 1024, 2112)[i % 3], 16, dtype, (torch.float32, dtype)[i % 2], i % 2 == 0, (64, 128)[i % 2],
                                      quant_type, i % 3 > 0, dropout_p=0.1 * (i % 2), seed=i))  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_x_of_one_hots_gives_the_decoded_weight(dtype):
    """To the bit, whether a token comes alone or with others."""
    for N, K, nested in ((70, 192, True), (9, 4160, True), (7, 1088, False)):
        packed, state = quantize_4bit(torch.randn(N, K, generator=torch.Generator().manual_seed(N)), 64, nested)
        w = reference.dequantize(packed, state.absmax, state.nested_absmax, state.offset, [N, K], 64, "nf4", dtype)
        first = 0
        while first < K:
            x = torch.zeros(min(TOKENS[first % len(TOKENS)], K - first), K, dtype=dtype)
            x[range(len(x)), range(first, first + len(x))] = 1
            assert torch.equal(linear_4bit(x, packed, state), w.T[first : first + len(x)])
            first += len(x) if K < 200 else 61


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("K", [192, 1088, 8192])
def test_neither_tiles_nor_threads_nor_other_tokens_change_a_bit(few, dtype, K):
    case = random_case(32, 50, K, 5, dtype, dropout_p=0.0)
    rest = case.packed, case.state, case.bias, case.lora_A, case.lora_B, case.scaling
    wanted = linear_4bit(case.x, *rest)
    for tiles in ((32, 50, 3), (7, 1, 2), (3, 7, 1), (1, 64, 2)):
        few(*tiles)
        assert torch.equal(linear_4bit(case.x, *rest), wanted)
    few()
    for M in TOKENS:
        assert torch.equal(linear_4bit(case.x[:M], *rest), wanted[:M])
        assert torch.equal(linear_4bit(case.x[-M:], *rest), wanted[-M:])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nan_and_inf_stay_in_their_row_as_torch_has_them(dtype):
    case = random_case(16, 30, 192, 4, dtype)
    w = reference.dequantize(case.packed, case.state.absmax, case.state.nested_absmax, case.state.offset, [30, 192], 64, "nf4", dtype)
    for M in (1, 5, 16):
        for value in (torch.nan, torch.inf, -torch.inf):
            x = case.x[:M].clone()
            x[M // 2, 70] = value
            y, expected = linear_4bit(x, case.packed, case.state), x.double() @ w.double().T
            assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y == torch.inf, expected == torch.inf)
            assert torch.equal(y == -torch.inf, expected == -torch.inf)


def at_the_end_of_a_page(t):
    """A copy that ends where memory that may not be read begins, and what keeps it alive."""
    size = -(-t.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + size), mmap.PAGESIZE, 0) == 0
    copy = torch.frombuffer(memory, dtype=torch.uint8, count=size)[size - t.nbytes :].view(t.dtype).view(t.shape)
    return copy.copy_(t)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_scale_that_is_not_finite_stays_in_its_row(dtype):
    """Of W: groups of 128 weights may begin with one row's scale and end before the next one's."""
    for M, K, row in ((1, 64, 3), (4, 192, 1), (5, 320, 2), (17, 1088, 6)):
        case = random_case(M, 7, K, 0, dtype, nested=False, seed=M)
        absmax = case.state.absmax.clone()
        absmax[row * K // 64] = torch.inf
        rest = torch.arange(7) != row
        found = linear_4bit(case.x, case.packed, dataclasses.replace(case.state, absmax=absmax))
        assert torch.equal(found[:, rest], linear_4bit(case.x, case.packed, case.state)[:, rest])
        assert not found[:, row].isfinite().all()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nothing_behind_an_operand_is_read(dtype, nested):
    for K in (192, 1088, 1024):
        case = random_case(9, 29, K, 3, dtype, nested=nested)
        state = case.state
        packed, absmax, A, B, bias = map(at_the_end_of_a_page, (case.packed, state.absmax, case.lora_A, case.lora_B, case.bias))
        moved = type(state)(**{f: getattr(state, f) for f in state.__dataclass_fields__} | {"absmax": absmax})
        for M in (1, 4, 9):
            x = at_the_end_of_a_page(case.x[:M])
            found = linear_4bit(x, packed, moved, bias, A, B, case.scaling)
            assert torch.equal(found, linear_4bit(x, case.packed, state, case.bias, case.lora_A, case.lora_B, case.scaling))
