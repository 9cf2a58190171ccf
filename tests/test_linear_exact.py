"""T1: integer-exact cases of the linear, forward and backward: every shape axis swept whole, the rest drawn. No tolerance."""

import random

import pytest
import torch
from drawn import FLOATS, drawn_case

from nf4lora import backends, heuristics, linear_4bit, ops, quantize_4bit, reference
from nf4lora.codebook import QUANT_TYPES
from nf4lora.heuristics import LinearConfig, LinearPath
from nf4lora.testing import check_exact, exact_case

SWEEPS = {"M": range(0, 131), "K": range(1, 131), "N": range(1, 131), "r": range(0, 21)}
CASES = "T1: integer-exact cases, forward and backward"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("axis", SWEEPS)
def test_rows_9_and_43_every_size_of(axis, dtype, backend, figures):
    """Row 9: K a multiple of nothing; row 43: N and K tiny, M at the edges of the tiles."""
    draw = random.Random(f"{axis} {dtype} {backend}")
    rounds = 2 if backend == "cpu" else 1
    for _ in range(rounds * (6 if axis == "r" else 1)):
        for value in SWEEPS[axis]:
            case = drawn_case(draw, **{axis: value})
            check_exact(case)
            figures[CASES] += 1


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("path", LinearPath)
def test_every_tiling_is_exact(monkeypatch, cpu, figures, path, threads):
    draw = random.Random(f"{path} {threads}")
    for block_m, block_n, block_k in ((1, 1, 64), (8, 64, 512), (5, 7, 128), (240, 96, 256), (16, 16, 64), (33, 130, 192)):
        config = LinearConfig(path, block_m, block_n, block_k, threads)
        for chooser in ("cpu_linear_fwd", "cpu_linear_bwd", "cpu_lora_bwd"):
            monkeypatch.setattr(heuristics, chooser, lambda M, threads, *_, config=config: config)
        for _ in range(24 // threads**2):
            check_exact(drawn_case(draw))
            figures[CASES] += 1


def test_larger_than_every_tile(cpu, figures):
    torch.set_num_threads(2)
    for i, (M, N, K, r) in enumerate(((257, 300, 700), (9, 1030, 515), (8, 515, 1030), (1, 2048, 2048), (500, 65, 130))[j] + (j * 8,) for j in range(5)):
        for dtype in FLOATS:
            check_exact(exact_case(M, N, K, r, dtype, nested=i % 2 == 0, dropout_p=0.5 * (i % 2), seed=i))
            figures[CASES] += 1


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("N", "K"), [(24, 4096), (4096, 24)])
def test_more_rows_than_are_packed_at_once(cpu, figures, N, K, dtype):
    """4 MiB of x, or of dy, are packed for all tiles: 240 rows of 4096 floats, 480 of bfloat16."""
    torch.set_num_threads(2)
    for M in (300, 600):
        check_exact(exact_case(M, N, K, 4, dtype, dropout_p=0.5 * (M == 300)))
        figures[CASES] += 1


def test_at_least_2000_cases_ran(figures, request):
    """Runs after the sweeps above; alone it has nothing to judge."""
    ran = [item.originalname for item in request.session.items]
    if ran.count("test_rows_9_and_43_every_size_of") < 2 * len(SWEEPS) * len(FLOATS) or hasattr(request.config, "workerinput"):
        pytest.skip("not all sweeps were selected for this process")
    assert figures[CASES] >= 2000


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_identity_gives_the_decoded_weight(backend, dtype, nested, quant_type):
    """x = I gives W^T and dy = I gives W, to the bit: one rounding of code * absmax in every path, and the same one."""
    for N, K in ((70, 33), (5, 130), (130, 5), (64, 64), (300, 257)):
        weight = torch.randn(N, K, generator=torch.Generator().manual_seed(N))
        packed, state = quantize_4bit(weight, 64, nested, quant_type)
        w = reference.dequantize(packed, state.absmax, state.nested_absmax, state.offset, [N, K], 64, quant_type, dtype)
        for first in range(0, K, 8 if K < 200 else 100):  # few rows take another path than many
            x = torch.eye(K, dtype=dtype)[first : first + (8 if first else K)]
            assert torch.equal(linear_4bit(x, packed, state), w.T[first : first + len(x)])
        for rows in (1, N):
            x = torch.zeros(rows, K, dtype=dtype, requires_grad=True)
            linear_4bit(x, packed, state).backward(torch.eye(N, dtype=dtype)[:rows])
            assert torch.equal(x.grad, w[:rows])


def test_one_hot_adapters_isolate_the_lora_branch(backend):
    """With W = 0: y[m, n] = scaling x[m, k] where A has its one at [i, k] and B at [n, i]; nowhere else anything."""
    M, N, K, r = 5, 40, 33, 7
    packed, state = quantize_4bit(torch.zeros(N, K))
    x = torch.randn(M, K)
    for i, k, n in ((0, 0, 0), (3, 17, 21), (6, 32, 39)):
        A, B = torch.zeros(r, K), torch.zeros(N, r)
        A[i, k], B[n, i] = 1, 1
        y = linear_4bit(x, packed, state, lora_A=A, lora_B=B, scaling=0.25)
        wanted = torch.zeros(M, N)
        wanted[:, n] = 0.25 * x[:, k]
        assert torch.equal(y, wanted)


def test_float32_adapters_of_bfloat16_layers_stay_float32(cpu):
    """The processor multiplies bfloat16: an adapter is the sum of three such numbers, so what is left of 1 + 2^-23 less 1
    is 2^-23; infinities and NaN stay, what is finite stays finite, and an infinite x is not finite in its own row alone."""
    M, N, K, odd = 40, 70, 130, 1 + 2**-23
    packed, state = quantize_4bit(torch.zeros(N, K))
    A, B, x, dy = torch.zeros(1, K), torch.zeros(N, 1), torch.zeros(M, K).bfloat16(), torch.zeros(M, N).bfloat16()
    A[0, :2], B[:2, 0], x[:, 0], x[:, 1], dy[:, 0], dy[:, 1] = torch.tensor([odd, 1]), torch.tensor([odd, 1]), 1, -1, 1, -1
    xa = ops.linear_fwd(x, packed, state.absmax, None, None, None, A, B, None, N, 64, "nf4", 1.0, 0.0)[1]
    dyb = ops.lora_bwd(dy, x, xa, A, B, None, 1.0, 0.0, True, True)[0]
    assert torch.equal(xa, torch.full((M, 1), 2.0**-23).bfloat16()) and torch.equal(dyb, xa)
    for special in (torch.inf, -torch.inf, torch.nan, torch.finfo(torch.float32).max):
        A[0, 0], x[:] = special, 0
        x[:, 0] = 0.5
        wanted = x[:, :1].float() * A[0, 0]
        found = ops.linear_fwd(x, packed, state.absmax, None, None, None, A, B, None, N, 64, "nf4", 1.0, 0.0)[1]
        assert torch.equal(found.isnan(), wanted.isnan()) and torch.equal(found.nan_to_num(7.0), wanted.bfloat16().nan_to_num(7.0))
    A[0, 0], x[7, 0] = 1, torch.inf
    found = ops.linear_fwd(x, packed, state.absmax, None, None, None, A, B, None, N, 64, "nf4", 1.0, 0.0)[1]
    assert not found[7].isfinite().any() and bool((found[torch.arange(M) != 7] == 0.5).all())


def test_zero_adapter_is_the_base(backend):
    for M in (1, 8, 9, 100):
        packed, state = quantize_4bit(torch.randn(65, 130), compress_statistics=True)
        x, bias = torch.randn(M, 130), torch.randn(65)
        base = linear_4bit(x, packed, state, bias)
        assert torch.equal(linear_4bit(x, packed, state, bias, torch.randn(4, 130), torch.zeros(65, 4), 2.0), base)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_row_17_no_rows_and_one_dimension(backend, dtype):
    case = exact_case(4, 33, 65, 3, dtype)
    for shape in ((0, 65), (2, 0, 65), (65,), (1, 65), (2, 2, 65)):
        x = torch.ones(shape, dtype=dtype, requires_grad=True)
        A, B, bias = (t.clone().requires_grad_() for t in (case.lora_A, case.lora_B, case.bias))
        y = linear_4bit(x, case.packed, case.state, bias, A, B, case.scaling)
        assert y.shape == (*shape[:-1], 33) and y.dtype == dtype
        y.sum().backward()
        assert x.grad.shape == x.shape and A.grad.shape == A.shape and B.grad.shape == B.shape
        if 0 in shape:
            assert not (A.grad.any() or B.grad.any() or bias.grad.any())


def test_no_columns_give_zeros_and_the_bias(backend):
    """K = 0: xa and the adapters' gradients are sums of nothing."""
    packed, nothing = torch.empty(0, 1, dtype=torch.uint8), torch.empty(0)
    A, B, bias = torch.empty(2, 0), torch.ones(4, 2), torch.arange(4.0)
    for M in (3, 40):
        x, dy = torch.empty(M, 0), torch.ones(M, 4)
        y, xa = ops.linear_fwd(x, packed, nothing, None, None, bias, A, B, None, 4, 64, "nf4", 1.0, 0.0)
        assert torch.equal(y, bias.expand(M, 4)) and torch.equal(xa, torch.zeros(M, 2))
        assert torch.equal(ops.lora_bwd(dy, x, xa, A, B, None, 1.0, 0.0, True, True)[2], torch.zeros(4, 2))


def test_each_gradient_only_if_asked_for(backend):
    case = exact_case(20, 33, 65, 3)
    truth = case.truth()
    names = ("x", "lora_A", "lora_B", "bias")
    for mask in range(1, 16):
        leaves = {n: getattr(case, n).clone().requires_grad_(bool(mask >> i & 1)) for i, n in enumerate(names)}
        y = linear_4bit(leaves["x"], case.packed, case.state, leaves["bias"], leaves["lora_A"], leaves["lora_B"], case.scaling)
        y.backward(case.dy)
        for n, wanted in zip(names, (truth.dx, truth.dA, truth.dB, truth.dbias), strict=True):
            grad = leaves[n].grad
            assert (grad is None) if not leaves[n].requires_grad else torch.equal(grad.double(), wanted)


def test_adjoint_identity(cpu):
    """<G, F(X)> == <dX, X> exactly, where all is exact."""
    for seed in range(30):
        case = exact_case(17, 33, 65, 3, bias=False, dropout_p=0.5, seed=seed)
        run = case.run()
        assert (run.y.double() * case.dy.double()).sum() == (run.dx.double() * case.x.double()).sum()


def test_a_forced_back_end_is_the_one_that_ran(backend):
    assert backends.forced() == backend
