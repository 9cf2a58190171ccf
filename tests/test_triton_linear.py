"""The linear in Triton: T1 on both paths, over tiles and parts heuristics would not choose, groups, and what lies beside.

Without a GPU in Triton's interpreter, where the kernels round bfloat16 by its bits and multiply it in float32.
"""

import os
import random
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from drawn import drawn_case
from under_test import GPU, force

from nf4lora import backends, linear_4bit, ops, quantize_4bit, reference, triton_linear, triton_rows, triton_tiles
from nf4lora.cases import exact_case, random_case
from nf4lora.codebook import BLOCKSIZES, QUANT_TYPES
from nf4lora.testing import assert_exact, check_error_ratio, check_exact
from nf4lora.triton_tiles import TritonPath, TritonTile

if find_spec("triton") is None and (sys.platform, os.uname().machine) != ("linux", "x86_64"):
    pytest.skip("Triton has no release for this machine", allow_module_level=True)

DEVICE = "cuda" if GPU else "cpu"
PATHS = [p.name.lower() for p in TritonPath]
SIXTEEN = (torch.float16, torch.bfloat16)
CASES = "T1 on the paths of Triton: integer-exact cases, forward and backward, path"

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),  # numpy's, in the interpreter
]


@pytest.fixture(params=PATHS)
def path(request):
    with force("triton", request.param):
        yield request.param


@pytest.fixture
def drawn_tiles(monkeypatch):
    """`drawn_tiles(draw)`: from then on small tiles and parts, those of the last empty too."""

    def install(draw):
        def tile(*args):
            return TritonTile(draw.choice([16, 32]), draw.choice([32, 64]), draw.choice([32, 64]), draw.choice([1, 1, 2, 3]), 4, 2)

        monkeypatch.setattr(triton_tiles, "linear_fwd", tile)
        monkeypatch.setattr(triton_tiles, "linear_bwd", tile)
        monkeypatch.setattr(triton_tiles, "xa", tile)
        monkeypatch.setattr(triton_tiles, "lora_bwd", lambda *args: triton_tiles.TritonLoraConfig(tile(), tile()))

    return install


def fixed(draw, path, **more):
    """What the path asks of a drawn case. (Where dx adds a dropped-out part to torch's product, it is rounded twice.)"""
    if path == "tiled":
        return {"dtype": draw.choice(SIXTEEN)} | more
    dtype = draw.choice([torch.float32, *SIXTEEN])
    return {"dtype": dtype, **({} if dtype == torch.float32 else {"dropout_p": 0.0})} | more


@pytest.mark.parametrize("axis", ["M", "N", "K", "r"])
def test_t1_over(drawn_tiles, path, axis, figures):
    """Every tail of every axis; K of any size, so that rows begin within words, bytes and blocks."""
    draw = random.Random(f"{axis} {path}")
    drawn_tiles(draw)
    values = {
        "M": (0, 1, 15, 16, 17, 33, 65), "N": (1, 2, 16, 17, 33, 65), "r": (1, 3, 16, 17, 65, 128),
        "K": (1, 2, 3, 7, 8, 15, 24, 33, 40, 66, 72, 129),
    }[axis]  # fmt: skip
    for value in values:
        others = {"M": draw.choice([3, 20]), "N": draw.choice([5, 33]), "K": draw.choice([40, 64, 66])}
        check_exact(drawn_case(draw, **fixed(draw, path, **others | {axis: value})))
        figures[f"{CASES} {path}"] += 1


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_t1_over_formats(path, quant_type, blocksize, figures):
    """Every blocksize, blocks that rows share, both codes, nested or not; the tiles of the heuristics."""
    draw = random.Random(f"{path} {quant_type} {blocksize}")
    for nested, K in ((False, 40), (True, 192), (True, 35)):
        check_exact(drawn_case(draw, **fixed(draw, path, M=5, N=33, K=K, blocksize=blocksize, quant_type=quant_type, nested=nested)))
        figures[f"{CASES} {path}"] += 1


@pytest.mark.parametrize(("M", "p"), [(1, 0.0), (40, 0.5), (130, 0.5)])
def test_t1_on_the_tiles_of_the_heuristics(figures, M, p):
    with force("triton", "tiled"):
        check_exact(exact_case(M, 150, 136, 40, torch.bfloat16, torch.bfloat16, nested=True, dropout_p=p))
    figures[f"{CASES} tiled"] += 1


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
def test_t2(path, dtype):
    check_error_ratio(random_case(33, 70, 192, 16, dtype, dtype, nested=True, dropout_p=0.1))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
def test_identity_gives_the_decoded_weight(path, dtype, nested):
    for N, K in ((70, 64), (33, 72), (20, 65)):
        packed, state = quantize_4bit(torch.randn(N, K, generator=torch.Generator().manual_seed(N)), 64, nested)
        w = reference.dequantize(packed, state.absmax, state.nested_absmax, state.offset, [N, K], 64, "nf4", dtype)
        assert torch.equal(linear_4bit(torch.eye(K, dtype=dtype), packed, state), w.T)
        x = torch.zeros(N, K, dtype=dtype, requires_grad=True)
        linear_4bit(x, packed, state).backward(torch.eye(N, dtype=dtype))
        assert torch.equal(x.grad, w)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.999])
def test_the_mask_of_dropout_is_the_reference_s(p):
    """x of ones through A of the identity gives the mask itself; K a multiple of 4 and not, seeds of 64 bits."""
    for K, seed in ((64, 3), (33, -5), (66, 2**40 + 1), (32, 2**63 - 1)):
        x, seed = torch.ones(70, K, dtype=torch.float16), torch.tensor([seed])
        packed, state = quantize_4bit(torch.zeros(8, K))
        args = packed, state.absmax, state.nested_absmax, state.offset
        with force("triton", "tiled"):
            found = ops.linear_fwd(x, *args, None, torch.eye(K), torch.zeros(8, K), seed, 8, 64, "nf4", 1.0, p)[1]
        assert_exact(found, reference.dropout(x, seed, p).to(x.dtype))


def test_dropped_nan_leaves_no_trace():
    packed, state = quantize_4bit(torch.zeros(8, 64))
    seed, x = torch.tensor([11]), torch.ones(20, 64, dtype=torch.float16)
    kept = reference.dropout(x, seed, 0.5) > 0
    args = packed, state.absmax, state.nested_absmax, state.offset, None, torch.eye(64), torch.zeros(8, 64), seed, 8, 64, "nf4", 1.0, 0.5
    with force("triton", "tiled"):
        xa = ops.linear_fwd(torch.where(kept, 1.0, torch.nan).half(), *args)[1]
    assert torch.equal(xa, kept.half() * 2)


def test_nan_and_inf_stay_in_their_rows(path):
    """NaN in x, in a row of W, in the statistics of the last group: each only where it belongs, tails and all."""
    case = random_case(20, 70, 72, 5, torch.float16, nested=True)
    x = case.x.clone()
    x[1, 5], x[3, 7] = torch.nan, torch.inf
    y = linear_4bit(x, case.packed, case.state, case.bias, case.lora_A, case.lora_B)
    assert y[1].isnan().all() and not y[3].isfinite().any() and y[[0, 2, *range(4, 20)]].isfinite().all()
    packed, state = quantize_4bit(torch.randn(70, 72), 32)
    state.absmax[7 * 72 // 32 + 1] = torch.nan  # columns 24 to 55 of row 7, or nearly
    rows = (7 * 72 // 32 + 1) * 32 // 72
    y = linear_4bit(case.x, packed, state)
    assert y[:, rows].isnan().all() and y[:, [n for n in range(70) if n not in (rows, rows + 1)]].isfinite().all()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_groups(drawn_tiles, path, count, figures):
    draw = random.Random(f"{path} {count}")
    drawn_tiles(draw)
    for M in (20, 1):
        f = fixed(draw, path, M=M, K=draw.choice([33, 64, 72]))
        p, nested, blocksize = f.pop("dropout_p", draw.choice([0.0, 0.5])), draw.random() < 0.5, draw.choice([32, 64, 4096])
        cases = [exact_case(N=draw.choice([1, 16, 33]), r=draw.choice([1, 3, 17]), blocksize=blocksize, nested=nested,
                            seed=draw.randrange(2**31), **f) for _ in range(count)]  # fmt: skip
        states = [c.state for c in cases]
        statistics = ([getattr(s, n) for s in states if nested or n == "absmax"] for n in ("absmax", "nested_absmax", "offset"))
        lists = [[c.packed for c in cases], *statistics]
        bias, A, B = [c.bias for c in cases], [c.lora_A for c in cases], [c.lora_B for c in cases]
        N, scaling, seed = [s.shape[0] for s in states], [c.scaling for c in cases], cases[0].seed if p else None
        x, dy = cases[0].x, torch.cat([c.dy for c in cases], 1)

        def run(x=x, lists=lists, bias=bias, A=A, B=B, seed=seed, N=N, blocksize=blocksize, scaling=scaling, p=p, dy=dy):
            y, xa = ops.group_fwd(x, *lists, bias, A, B, seed, N, blocksize, "nf4", scaling, p)
            dyb, dA, dB = ops.group_lora_bwd(dy, x, xa, A, B, seed, scaling, p, True, True)
            return y, xa, dyb, *dA, *dB, ops.group_bwd(dy, *lists, A, dyb, seed, N, x.shape[1], blocksize, "nf4", p)

        found = run()
        with backends.use_backend("reference"):
            wanted = run()
        for each, want in zip(found, wanted, strict=True):
            assert_exact(each, want)
        figures[f"{CASES} {path}"] += 1


GUARD = 512  # bytes before and after each buffer, and what they hold: NaN in every float dtype
FILL = 0xFF


@pytest.fixture
def guarded(monkeypatch):
    """`guarded(t)`: a copy of t between NaNs. So are all outputs and scratch, NaN themselves. On leaving, all guards must be untouched."""
    kept = []

    def place(shape, dtype, device):
        nbytes = torch.Size(shape).numel() * torch.empty((), dtype=dtype).element_size()
        memory = torch.full((2 * GUARD + nbytes,), FILL, dtype=torch.uint8, device=device)
        kept.append((memory, nbytes))
        return memory[GUARD : GUARD + nbytes].view(dtype).view(shape)

    def new_empty(self, *shape, dtype=None, device=None):
        shape = shape[0] if len(shape) == 1 else shape
        return place((shape,) if isinstance(shape, int) else tuple(shape), dtype or self.dtype, self.device)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch, "empty_like", lambda t: place(t.shape, t.dtype, t.device))
    yield lambda t: None if t is None else place(t.shape, t.dtype, t.device).copy_(t)
    monkeypatch.undo()
    for memory, nbytes in kept:
        assert bool((memory[:GUARD] == FILL).all()) and bool((memory[GUARD + nbytes :] == FILL).all())
    assert kept


@pytest.mark.parametrize("K", [40, 64, 33])
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN], ids=str)
def test_nothing_is_read_or_written_beside_the_buffers(guarded, drawn_tiles, dtype, K):
    """Every operand between NaNs, every output NaN to begin with: the exact result says that none of them was read."""
    draw = random.Random(f"{dtype} {K}")
    drawn_tiles(draw)
    for M, N, r, nested in ((17, 17, 3, True), (1, 1, 17, False)):
        case = exact_case(M, N, K, r, dtype, torch.float32, nested=nested, dropout_p=0.5)
        names = ("x", "dy", "packed", "bias", "lora_A", "lora_B")
        state = replace(case.state, **{n: guarded(getattr(case.state, n)) for n in ("absmax", "nested_absmax", "offset")})
        with force("triton", "dense" if dtype == torch.float32 else "tiled"):
            check_exact(replace(case, state=state, **{n: guarded(getattr(case, n)) for n in names}))


def test_equal_bits_every_time(drawn_tiles):
    case = random_case(20, 33, 64, 16, torch.bfloat16, dropout_p=0.1)
    found = []
    for _ in range(2):
        drawn_tiles(random.Random(0))
        with force("triton", "tiled"):
            found.append(case.run())
    assert all(map(torch.equal, *found))


def test_each_gradient_only_if_asked_for():
    case = exact_case(20, 33, 64, 3, torch.float16)
    args = case.dy, case.x, torch.ones(20, 3, dtype=torch.float16), case.lora_A, case.lora_B, None, 1.0, 0.0
    with force("triton", "tiled"):
        all_of_them = ops.lora_bwd(*args, True, True)
        for need_dA, need_dB in ((True, False), (False, True), (False, False)):
            dyb, dA, dB = ops.lora_bwd(*args, need_dA, need_dB)
            assert torch.equal(dyb, all_of_them[0])
            assert torch.equal(dA, all_of_them[1]) if need_dA else dA.numel() == 0
            assert torch.equal(dB, all_of_them[2]) if need_dB else dB.numel() == 0


# ---- the rows


def test_which_path_runs(monkeypatch):
    chosen = {}

    def forward(*args):
        chosen["path"] = args[-1]
        return args[0].new_empty((len(args[0]), 8)), args[0].new_empty((len(args[0]), 0))

    monkeypatch.setattr(triton_linear, "kernels", lambda: [type("Module", (), {"linear_fwd": forward})])
    packed, absmax = reference.quantize(torch.randn(8, 64, device=DEVICE), 64, "nf4")
    for M, dtype, name, wanted in (
        (5, torch.float16, None, TritonPath.TILED), (1023, torch.bfloat16, None, TritonPath.TILED),
        (1024, torch.bfloat16, None, TritonPath.DENSE), (5, torch.float32, None, TritonPath.DENSE),
        (5, torch.float16, "dense", TritonPath.DENSE), (2000, torch.float16, "tiled", TritonPath.TILED),
    ):  # fmt: skip
        with backends.use_backend("triton", name):
            x = torch.zeros(M, 64, dtype=dtype, device=DEVICE)
            ops.linear_fwd(x, packed, absmax, *[None] * 6, 8, 64, "nf4", 1.0, 0.0)
        assert chosen["path"].path == wanted and (chosen["path"].product is None) == (wanted == TritonPath.DENSE)


@pytest.mark.parametrize(("dtype", "name", "reason"), [
    (torch.float32, "tiled", "path tiled: the tensor cores take bfloat16 and float16"),
    (torch.float16, "mma", "has no path mma: wanted one of"),
    (torch.float16, "rows", "has no path rows"),
])  # fmt: skip
def test_a_path_says_what_it_cannot_take(dtype, name, reason):
    packed, state = quantize_4bit(torch.randn(8, 64, device=DEVICE))
    with backends.use_backend("triton", name), pytest.raises(NotImplementedError, match=reason):
        linear_4bit(torch.zeros(4, 64, dtype=dtype, device=DEVICE), packed, state)


def test_tensor_cores_from_8_0_on(monkeypatch):
    monkeypatch.setattr(triton_rows, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    x = torch.zeros(1, dtype=torch.float16)
    for capability, reason in (((7, 5), "found a device of capability (7, 5), wanted 8.0 or newer"), ((8, 0), None), ((12, 0), None)):
        assert triton_linear._no_tensor_cores(x) == reason


def test_tiles_are_what_the_kernels_take():
    powers = [2**n for n in range(4, 9)]
    for M in (1, 16, 17, 64, 65, 1000, 10**6):
        for span in (1, 8, 64):
            for tile in (triton_tiles.linear_fwd(M, 4096, 14336, span, 132), triton_tiles.linear_bwd(M, 4096, 1, span, 132)):
                assert tile.rows in powers and tile.cols in powers and tile.steps in powers and 1 <= tile.split <= 16
        for r in (1, 16, 33, 65, 256):
            config = triton_tiles.lora_bwd(M, 4096, 4096, r, 132)
            for size in (triton_tiles.xa(M, 4096, r, 132).rows, config.dy.rows, config.dy.steps, config.x.cols, config.x.steps):
                assert size in powers
        assert triton_tiles.xa(M, 4096, 257, 132) is triton_tiles.lora_bwd(M, 4096, 4096, 257, 132) is None
    assert [triton_tiles.span(K, b, 0) for K, b in ((4096, 64), (4096, 32), (72, 64), (70, 64), (65, 64), (96, 4096))] == [64, 32, 8, 1, 1, 32]
    assert triton_tiles.span(4096, 64, 2) == 1
