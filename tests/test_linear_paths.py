"""Every path of the linear on CUDA, forced by name: T1, T2, identity probes, equal bits, groups. On the host machine under its
checker, where every output lies between guard bytes and starts as NaN; with a GPU, on it too."""

import random

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from cuda_on_host import backend as cuda_on_host
from drawn import drawn_case
from under_test import GPU, force

from nf4lora import autograd, backends, heuristics, linear_4bit, ops, quantize_4bit, reference
from nf4lora.cases import exact_case, random_case
from nf4lora.codebook import QUANT_TYPES, codebook
from nf4lora.heuristics import CudaLinearConfig, CudaPath
from nf4lora.testing import assert_error_ratio, assert_exact, check_error_ratio, check_exact

PATHS = [p.name.lower() for p in CudaPath]
SIXTEEN = (torch.bfloat16, torch.float16)
CASES = "T1 on the paths of CUDA: integer-exact cases, forward and backward, path"
EXTEND = ("cuda_extend_fwd", "cuda_extend_bwd")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=[(b, p) for b in ("cuda_on_host",) + ("cuda",) * GPU for p in PATHS], ids="-".join)
def path(request):
    """Forces a path of a back end; yields the path's name."""
    with force(*request.param):
        yield request.param[1]


@pytest.fixture(autouse=True)
def one_rounding(monkeypatch):
    """The dense path extends x by xa, and so rounds y once, whatever the shape; one test below has it otherwise."""
    for chooser in EXTEND:
        monkeypatch.setattr(heuristics, chooser, lambda N, K: True)


def drawn_tiles(monkeypatch, draw):
    """Tiles and splits that heuristics.py would not choose for small operands."""

    def chooser(path, M, N, K, multiprocessors):
        return CudaLinearConfig(path, draw.choice([8, 16, 32, 64, 128]), draw.choice([16, 32, 64, 128, 256]), draw.choice([1, 1, 2, 3, 5]))

    monkeypatch.setattr(heuristics, "cuda_linear_fwd", chooser)
    monkeypatch.setattr(heuristics, "cuda_linear_bwd", chooser)
    monkeypatch.setattr(heuristics, "cuda_lora_bwd", lambda M, N, multiprocessors: draw.choice([1, 2, 3]))


def fixed(draw, path, **more):
    """What the path asks of a drawn case. (Where dx adds a dropped-out part to a library's product, it is rounded twice.)"""
    if path == "dense":
        dtype = draw.choice((torch.float32, *SIXTEEN))
        return {"dtype": dtype, **({} if dtype == torch.float32 else {"dropout_p": 0.0})} | more
    return {"dtype": draw.choice(SIXTEEN), "K": draw.choice([64, 64, 128, 192, 320])} | more


@pytest.mark.parametrize("axis", ["M", "N", "r", "K"])
def test_t1_over(monkeypatch, path, axis, figures):
    """Every tail of every axis, on drawn tiles and splits of the reduction."""
    draw = random.Random(f"{axis} {path}")
    drawn_tiles(monkeypatch, draw)
    values = {
        "M": (0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 128, 129, 200),
        "N": (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 257),
        "r": (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 100, 128),
        "K": (64, 128, 192, 256, 448, 512, 576, 1088) if path != "dense" else (1, 2, 7, 8, 63, 64, 65, 127, 129, 520),
    }[axis]
    for value in values:
        others = {"M": draw.choice([3, 20, 70])} if axis != "M" else {}
        check_exact(drawn_case(draw, **fixed(draw, path, **others, **{axis: value})))
        figures[f"{CASES} {path}"] += 1


@pytest.mark.parametrize("blocksize", [32, 64, 128, 512, 4096])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_t1_over_formats(monkeypatch, path, quant_type, blocksize, figures):
    """Every blocksize, blocks that rows share, both codes, nested or not."""
    draw = random.Random(f"{path} {quant_type} {blocksize}")
    drawn_tiles(monkeypatch, draw)
    for nested in (False, True):
        case = drawn_case(draw, **fixed(draw, path, M=draw.choice([5, 40]), N=draw.choice([33, 130]), K=192, blocksize=blocksize,
                                        quant_type=quant_type, nested=nested))  # fmt: skip
        check_exact(case)
        figures[f"{CASES} {path}"] += 1


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("M", [3, 17, 64, 130])
def test_t2(path, dtype, M, figures):
    for i, (N, K) in enumerate(((256, 512), (333, 704))):
        p = 0.1 if (i + M) % 2 else 0.0
        check_error_ratio(random_case(M, N, K, (64, 16)[i], dtype, adapter_dtype=(torch.float32, dtype)[i], bias=i == 0, nested=i == 0,
                                      blocksize=(64, 128)[i], dropout_p=p, seed=M + i))  # fmt: skip
        figures[f"T2 on the paths of CUDA: error-ratio cases, path {path}"] += 1


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
def test_t2_without_extension(monkeypatch, dtype):
    """The dense path where the adapter's part is added to what the library has rounded."""
    for chooser in EXTEND:
        monkeypatch.setattr(heuristics, chooser, lambda N, K: False)
    with force("cuda_on_host", "dense"):
        for M in (17, 64):
            check_error_ratio(random_case(M, 256, 512, 16, dtype, seed=M))


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
def test_identity_gives_the_decoded_weight(path, dtype, nested, quant_type):
    """Through the real main loop, to the bit: round(code * absmax); the small forward's rule is round(round(code) * absmax)."""
    for N, K in ((70, 64), (33, 192), (257, 128)):
        packed, state = quantize_4bit(torch.randn(N, K, generator=torch.Generator().manual_seed(N)), 64, nested, quant_type)
        w = reference.dequantize(packed, state.absmax, state.nested_absmax, state.offset, [N, K], 64, quant_type, dtype)
        rule = w
        if path == "small":
            codes = torch.stack((packed.reshape(-1) >> 4, packed.reshape(-1) & 15), -1).reshape(-1).int()
            scale = reference.dequantize_absmax(state.absmax, state.nested_absmax, state.offset).repeat_interleave(64)[: N * K]
            rule = (codebook(quant_type).to(dtype)[codes].float() * scale).to(dtype).reshape(N, K)
        y = linear_4bit(torch.eye(K, dtype=dtype), packed, state)
        assert torch.equal(y, rule.T)
        x = torch.zeros(N, K, dtype=dtype, requires_grad=True)
        linear_4bit(x, packed, state).backward(torch.eye(N, dtype=dtype))
        assert torch.equal(x.grad, w)


def test_equal_bits_every_time(path):
    """Two runs, and four schedules of the host machine, give the same bits, splits and all."""
    case = random_case(20, 130, 576, 16, torch.bfloat16, dropout_p=0.1)
    machine = cuda_on_host.machine()
    wanted = None
    for seed in (0, 1, 2, 3, 1):
        machine.seed = seed
        found = case.run()
        wanted = wanted or found
        assert all(map(torch.equal, found, wanted))


def test_a_row_does_not_depend_on_its_neighbours(path):
    case = random_case(70, 130, 256, 16, torch.bfloat16)
    rest = case.packed, case.state, case.bias, case.lora_A, case.lora_B, case.scaling
    whole = linear_4bit(case.x, *rest)
    if path == "dense":
        pytest.skip("the library's product, which promises no such thing")
    for first, last in ((0, 64), (64, 70)):
        again = linear_4bit(torch.cat((case.x[first:last], case.x.new_full((70 - last + first, 256), 3.0))), *rest)
        assert torch.equal(again[: last - first], whole[first:last])


def test_nan_and_inf_stay_in_their_rows(path):
    case = random_case(20, 70, 128, 5, torch.bfloat16)
    x = case.x.clone()
    x[1, 5], x[3, 7] = torch.nan, torch.inf
    y = linear_4bit(x, case.packed, case.state, case.bias, case.lora_A, case.lora_B)
    assert y[1].isnan().all() and not y[3].isfinite().any()
    assert y[[0, 2, *range(4, 20)]].isfinite().all()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_groups(monkeypatch, path, count, figures):
    """One launch for members that share x: y, xa, dx, dA and dB of the exact group, as the reference has them."""
    draw = random.Random(f"{path} {count}")
    drawn_tiles(monkeypatch, draw)
    for _ in range(4):
        f = fixed(draw, path, M=draw.choice([1, 20, 70]))
        M, dtype, K, p = f["M"], f["dtype"], f.get("K", draw.choice([33, 64, 130])), f.get("dropout_p", draw.choice([0.0, 0.5]))
        blocksize, nested = draw.choice([32, 64, 4096]), draw.random() < 0.5
        cases = [exact_case(M, draw.choice([1, 16, 33, 130]), K, draw.choice([1, 3, 16, 17]), dtype, torch.float32, blocksize=blocksize,
                            nested=nested, seed=draw.randrange(2**31)) for _ in range(count)]  # fmt: skip
        states = [c.state for c in cases]
        lists = [[c.packed for c in cases], *([getattr(s, n) for s in states if nested or n == "absmax"] for n in ("absmax", "nested_absmax", "offset"))]
        bias, A, B = [c.bias for c in cases], [c.lora_A for c in cases], [c.lora_B for c in cases]
        N, scaling, seed = [s.shape[0] for s in states], [c.scaling for c in cases], cases[0].seed if p else None
        x, dy = cases[0].x, torch.cat([c.dy for c in cases], 1)
        fwd = x, *lists, bias, A, B, seed, N, blocksize, "nf4", scaling, p
        y, xa = ops.group_fwd(*fwd)
        with backends.use_backend("reference"):
            wanted_y, wanted_xa = ops.group_fwd(*fwd)
        assert_exact(y, wanted_y)
        assert_exact(xa, wanted_xa)
        lora = dy, x, xa, A, B, seed, scaling, p, True, True
        dyb, dA, dB = ops.group_lora_bwd(*lora)
        bwd = dy, *lists, A, dyb, seed, N, K, blocksize, "nf4", p
        dx = ops.group_bwd(*bwd)
        with backends.use_backend("reference"):
            wanted = ops.group_lora_bwd(*lora)
            wanted_dx = ops.group_bwd(*bwd)
        for found, want in zip([dyb, *dA, *dB, dx], [wanted[0], *wanted[1], *wanted[2], wanted_dx], strict=True):
            assert_exact(found, want)
        figures[f"{CASES} {path}"] += 1


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
def test_groups_t2(path, dtype):
    """The gradient of x through a group errs no more than plain torch's on the concatenated weight."""
    cases = [random_case(40, n, 256, 8, dtype, bias=False, seed=i) for i, n in enumerate((128, 64, 72))]
    w = {d: torch.cat([reference.dequantize(c.packed, c.state.absmax, c.state.nested_absmax, c.state.offset, c.state.shape, 64, "nf4", d) for c in cases])
         for d in (dtype, torch.float64)}  # fmt: skip
    lists = [[c.packed for c in cases], *([getattr(c.state, n) for c in cases] for n in ("absmax", "nested_absmax", "offset"))]
    x = cases[0].x.clone().requires_grad_()
    group = autograd.Group((128, 64, 72), 64, "nf4", (1.0, 1.0, 1.0), 0.0, False)
    ys = autograd.linear_group(x, (*lists, [], [], []), None, group)
    torch.autograd.backward(ys, [c.dy for c in cases])
    dy, x0 = torch.cat([c.dy for c in cases], 1), cases[0].x
    assert_error_ratio(torch.cat([y.detach() for y in ys], 1), x0 @ w[dtype].T, x0.double() @ w[torch.float64].T)
    assert_error_ratio(x.grad, dy @ w[dtype], dy.double() @ w[torch.float64])


@pytest.mark.parametrize(
    ("K", "dtype", "offset", "reason"),
    [(65, torch.bfloat16, 0, "K = 65"), (64, torch.float32, 0, "float32"), (64, torch.bfloat16, 1, "address")],
)
def test_a_path_says_what_it_cannot_take(K, dtype, offset, reason):
    packed, state = quantize_4bit(torch.randn(16, K))
    packed = torch.zeros(len(packed) + offset, 1, dtype=torch.uint8)[offset:].copy_(packed)
    x = torch.zeros(4, K, dtype=dtype)
    for name in ("small", "mma", "wgmma"):
        with force("cuda_on_host", name), pytest.raises(NotImplementedError, match=f"path {name}: .*{reason}"):
            linear_4bit(x, packed, state)
    with force("cuda_on_host"):  # not forced, the dense path takes it
        assert linear_4bit(x, packed, state).shape == (4, 16)


def test_the_wgmma_path_is_for_hopper_only(monkeypatch):
    monkeypatch.setattr(cuda_on_host.Machine, "capability", lambda self, device: (8, 9))
    packed, state = quantize_4bit(torch.randn(16, 64))
    x = torch.zeros(4, 64, dtype=torch.bfloat16)
    with force("cuda_on_host", "wgmma"), pytest.raises(NotImplementedError, match=r"capability \(8, 9\)"):
        linear_4bit(x, packed, state)
    with pytest.raises(ValueError, match="path: found 'fast'"), backends.use_backend("cpu", "fast"):
        pass


def test_a_card_without_bfloat16_takes_dense_and_leaves_adapters_to_others(monkeypatch):
    monkeypatch.setattr(cuda_on_host.Machine, "capability", lambda self, device: (7, 5))
    packed, state = quantize_4bit(torch.randn(16, 64))
    A, B = torch.randn(3, 64), torch.randn(16, 3)
    with force("cuda_on_host"):
        for dtype in SIXTEEN:
            x = torch.randn(4, 64).to(dtype)
            assert linear_4bit(x, packed, state).shape == (4, 16)
            with pytest.raises(NotImplementedError, match=r"LoRA in .*capability \(7, 5\), wanted 8.0"):
                linear_4bit(x, packed, state, lora_A=A, lora_B=B)
        y = linear_4bit(torch.randn(4, 64), packed, state, lora_A=A.requires_grad_(), lora_B=B)
        y.sum().backward()
        assert A.grad.isfinite().all()


@hypothesis.given(
    M=st.integers(0, 140), N=st.integers(1, 140), blocks=st.integers(1, 5), r=st.integers(0, 40), p=st.sampled_from((0.0, 0.5)),
    dtype=st.sampled_from(SIXTEEN), where=st.sampled_from(("small", "mma", "wgmma")), blocksize=st.sampled_from((32, 64, 256, 4096)),
    quant_type=st.sampled_from(QUANT_TYPES), nested=st.booleans(), bias=st.booleans(), seed=st.integers(0, 2**20),
)  # fmt: skip
def test_any_operands_are_exact_on_every_path(M, N, blocks, r, p, dtype, where, blocksize, quant_type, nested, bias, seed):
    with force("cuda_on_host", where):
        check_exact(exact_case(M, N, 64 * blocks, r, dtype, torch.float32, bias, blocksize, quant_type, nested, p, seed))


def test_the_best_path_for_every_M():
    chosen = {hopper: [heuristics.cuda_paths(M, hopper)[0].name for M in (1, 64, 65, 1023, 1024)] for hopper in (True, False)}
    assert chosen == {True: ["SMALL", "SMALL", "WGMMA", "WGMMA", "DENSE"], False: ["SMALL", "SMALL", "MMA", "MMA", "DENSE"]}
    assert all(heuristics.cuda_paths(M, True)[-1] == CudaPath.DENSE for M in (1, 100, 5000))
