"""SwiGLU and its gradient: within an ulp of float64 on every back end, whatever the values, the shape and the alignment."""

import itertools
import math

import pytest
import torch
from under_test import KERNELS, fewer, force

from nf4lora import backends, heuristics, ops, reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Of the output's dtype. float32 has no precision to spare: exp, reciprocal and three products err by half an ulp or one each.
ULPS = {torch.float32: 4.0, torch.bfloat16: 1.0, torch.float16: 1.0}
LEAST = 2.0**-149
MAGNITUDES = [0.0, 1e-45, 1e-38, 1e-6, 0.1, 0.5, 1.0, 1.2784645, 2.0, 5.0, 17.0, 20.0, 40.0, 80.0, 87.0, 88.5, 89.0, 95.0, 100.0,
              104.0, 120.0, 1e3, 6e4, 1e15, 1e30, 3e38]  # fmt: skip
COLUMNS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 24, 31, 64, 255, 256, 257, 1000, 1032)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),  # numpy's, in the interpreter
]


def operands(M, N, dtype, seed=0, std=3.0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(M, 2 * N, generator=g) * std).to(dtype), torch.randn(M, N, generator=g).to(dtype)


def ulp(truth, dtype):
    """Distance of the neighbouring numbers of dtype at each element of truth."""
    info, exponent = torch.finfo(dtype), torch.frexp(truth).exponent
    return info.eps * torch.ldexp(torch.ones_like(truth), exponent - 1).clamp_min(info.smallest_normal)


def assert_near(found, truth, slack, dtype):
    """Within ULPS of the truth in float64, or of what its terms lose in float32: `slack`."""
    assert found.dtype == dtype and found.shape == truth.shape
    rounded = truth.to(dtype)
    finite = rounded.isfinite()
    assert torch.equal(found[~finite], rounded[~finite])
    error, allowed = (found.double() - truth).abs(), ULPS[dtype] * ulp(truth, dtype) + slack
    if dtype == torch.bfloat16 and backends.forced() == "triton, interpreted":
        allowed += torch.finfo(dtype).smallest_normal  # the interpreter has its denormals wrong
    worst = torch.where(finite, error / allowed, 0.0)
    assert bool((worst <= 1).all()), f"{int((worst > 1).sum())} of {worst.numel()} wrong, the worst {worst.max().item():.3g} times what may be"


def check(gate_up, dh):
    """Both ops against float64. The sigmoid and each product are float32 numbers, whose least is LEAST; the slope of the
    gate's gradient cancels near -1.28."""
    dtype, (gate, up) = gate_up.dtype, gate_up.double().chunk(2, 1)
    sigmoid, d = torch.sigmoid(gate), dh.double()
    slack = LEAST * (gate * up).abs() + LEAST * up.abs()
    assert_near(ops.swiglu_fwd(gate_up), reference.swiglu_fwd(gate_up.double()), slack, dtype)
    slope = 1 + (gate * (1 - sigmoid)).abs()
    of_gate = slope * ((d * up).abs() * (LEAST + 4 * 2.0**-24 * sigmoid) + 2 * LEAST)
    slack = torch.cat((of_gate, LEAST * (d * gate).abs() + LEAST), 1)
    assert_near(ops.swiglu_bwd(gate_up, dh), reference.swiglu_bwd(gate_up.double(), d), slack, dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_random_values_of_every_width(kernels, dtype, figures):
    for i, N in enumerate(fewer(COLUMNS, kernels, 3)):
        for M in (1, 2, 5):
            check(*operands(M, N, dtype, seed=i, std=(0.1, 3.0, 30.0)[(i + M) % 3]))
            figures["outputs of swiglu within an ulp of float64"] += 3 * M * N


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_extreme_values(kernels, dtype):
    most = torch.finfo(dtype).max
    values = torch.tensor([s * m for m in MAGNITUDES for s in (1, -1) if m <= most], dtype=dtype)
    others = torch.tensor([1.0, -0.1, 7.0, 1e-30, -1e-4, 3e4], dtype=dtype)
    pairs = torch.tensor(list(itertools.product(values.tolist(), others.tolist())), dtype=torch.float64).to(dtype)
    for N in (len(pairs) // 8 * 8, len(pairs) // 8 * 8 - 1):
        gate_up = torch.cat((pairs[:N, 0], pairs[:N, 1])).reshape(1, 2 * N)
        for scale in (1.0, -3e-3):
            check(gate_up, torch.full((1, N), scale, dtype=dtype))


def test_every_16_bit_gate(kernels):
    """Both dtypes, all 2**16 of their numbers."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        gate = every.view(dtype)
        gate = gate[gate.isfinite()]
        gate = gate[: len(gate) // 8 * 8].reshape(8, -1)
        up = torch.where(gate.abs() < 100, 3.0, 0.5).to(dtype)
        check(torch.cat((gate, up), 1), torch.full(gate.shape, 0.75, dtype=dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nan_and_inf_as_the_formula_has_them(kernels, dtype):
    special = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -2.0]
    gate, up, dh = torch.tensor(list(itertools.product(special, repeat=3)), dtype=dtype).T
    for N in (len(gate) // 8 * 8, len(gate)):
        gate_up, d = torch.cat((gate[:N], up[:N])).reshape(1, -1), dh[None, :N].contiguous()
        for found, wanted in (
            (ops.swiglu_fwd(gate_up), reference.swiglu_fwd(gate_up)), (ops.swiglu_bwd(gate_up, d), reference.swiglu_bwd(gate_up, d))
        ):  # fmt: skip
            finite = wanted.isfinite()
            assert torch.equal(found.isnan(), wanted.isnan()) and torch.equal(found.isfinite(), finite)
            assert torch.equal(found[wanted.isinf()], wanted[wanted.isinf()])
            assert torch.allclose(found[finite].float(), wanted[finite].float(), rtol=8 * torch.finfo(dtype).eps, atol=0)
    assert ops.swiglu_fwd(torch.tensor([[-math.inf, 1.0]], dtype=dtype)).isnan()  # as torch.nn.functional.silu gives in halves


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_alignment_and_strides_do_not_change_the_bits(kernels, dtype):
    gate_up, dh = operands(5, 24, dtype)
    wanted = ops.swiglu_fwd(gate_up), ops.swiglu_bwd(gate_up, dh)

    def at(t, start):
        return torch.full((t.numel() + 16,), math.nan, dtype=dtype)[start : start + t.numel()].view(t.shape).copy_(t)

    for first, second in itertools.product(fewer(range(9), kernels, 4), (0, 1, 8)):
        shifted, d = at(gate_up, first), at(dh, second)
        assert torch.equal(ops.swiglu_fwd(shifted), wanted[0]) and torch.equal(ops.swiglu_bwd(shifted, d), wanted[1])
    shifted, d = gate_up.T.contiguous().T, dh.T.contiguous().T
    assert torch.equal(ops.swiglu_fwd(shifted), wanted[0]) and torch.equal(ops.swiglu_bwd(shifted, d), wanted[1])


def test_no_rows_and_no_columns(kernels):
    for M, N in ((0, 8), (3, 0), (0, 0)):
        gate_up, dh = operands(M, N, torch.bfloat16)
        h, d = ops.swiglu_fwd(gate_up), ops.swiglu_bwd(gate_up, dh)
        assert h.shape == (M, N) and d.shape == (M, 2 * N) and h.dtype == d.dtype == torch.bfloat16


def test_thread_blocks_do_not_change_the_bits(monkeypatch):
    with force("cuda_on_host"):
        for N in (24, 1000, 1001):
            gate_up, dh = operands(7, N, torch.bfloat16)
            found = []
            for workers in (1, 2, 3, 1000):
                monkeypatch.setattr(heuristics, "cuda_swiglu", lambda numel, multiprocessors, workers=workers: workers)
                found.append((ops.swiglu_fwd(gate_up), ops.swiglu_bwd(gate_up, dh)))
            assert all(torch.equal(a, b) for pair in found[1:] for a, b in zip(pair, found[0], strict=True))


def test_the_gradient_is_that_of_the_forward():
    gate_up, dh = (t.double() for t in operands(9, 33, torch.float64))
    gate_up.requires_grad_()
    h = reference.swiglu_fwd(gate_up)
    (wanted,) = torch.autograd.grad(h, gate_up, dh)
    gate, up = gate_up.detach().chunk(2, 1)
    torch.testing.assert_close(h, torch.nn.functional.silu(gate) * up, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(reference.swiglu_bwd(gate_up.detach(), dh), wanted, rtol=1e-13, atol=1e-14)


def test_opcheck(kernels):
    for dtype in FLOATS:
        gate_up, dh = operands(3, 16, dtype)
        torch.library.opcheck(ops.swiglu_fwd.overload, (gate_up,))
        torch.library.opcheck(ops.swiglu_bwd.overload, (gate_up, dh))


def test_what_does_not_fit_is_refused(kernels):
    gate_up, dh = operands(3, 16, torch.bfloat16)
    with pytest.raises(ValueError, match="even"):
        ops.swiglu_fwd(gate_up[:, 1:])
    with pytest.raises(ValueError, match="shape"):
        ops.swiglu_bwd(gate_up, dh[:, 1:])
    with pytest.raises(TypeError):
        ops.swiglu_bwd(gate_up, dh.float())
