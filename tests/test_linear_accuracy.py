"""T2: on real data the linear errs no more than plain torch on the dequantized weight; and what else its results may
depend on: not on threads, repetition, alignment, strides or fresh memory; and on no [N, K] temporary."""

import dataclasses
import json
import math
import os
import subprocess
import sys

import pytest
import torch

from nf4lora import heuristics, linear_4bit
from nf4lora.heuristics import LinearConfig, LinearPath
from nf4lora.testing import Products, assert_error_ratio, assert_exact, check_error_ratio, random_case, ulp

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# N, K of attention and MLP projections scaled down; one K a multiple of nothing
SHAPES = ((512, 512), (333, 700), (1024, 500), (256, 1023))
CASES = "T2: error-ratio cases, forward and backward"


# alpha = 2r, plain and rank-stabilized. (The rounding of the M r numbers x lora_A^T and dy lora_B can be nearly all of the
# error of a result: with M and r both small, a handful of samples, whose rms is luck.)
@pytest.mark.parametrize("M", [1, 3, 17, 64, 257])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_error_ratio_over_model_shapes(backend, figures, dtype, M):
    for i, (N, K) in enumerate(SHAPES):
        r = (4, 8, 64, 16)[(i + M) % 4] if M > 3 else 64
        check_error_ratio(random_case(
            M, N, K, r, dtype, adapter_dtype=(torch.float32, dtype)[i % 2], bias=i != 2, blocksize=(64, 32, 128, 4096)[i],
            quant_type=("nf4", "nf4", "fp4", "nf4")[i], nested=i != 1, scaling=2.0 * (math.sqrt(r) if i % 2 else 1),
            dropout_p=(0.0, 0.1, 0.0, 0.5)[(i + M // 3) % 4], seed=100 * M + i,
        ))  # fmt: skip
        figures[CASES] += 1


@pytest.mark.parametrize("path", LinearPath)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_error_ratio_on_both_paths(monkeypatch, cpu, figures, dtype, path):
    for block in ((8, 64, 512), (240, 96, 256), (33, 20, 64)):
        for chooser in ("cpu_linear_fwd", "cpu_linear_bwd", "cpu_lora_bwd"):
            monkeypatch.setattr(heuristics, chooser, lambda M, threads, *_, block=block: LinearConfig(path, *block, threads))
        for M in (2, 40):
            check_error_ratio(random_case(M, 300, 700, 16, dtype, dropout_p=0.1, seed=M))
            figures[CASES] += 1


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_error_ratio_without_adapter_and_over_ranks(cpu, figures, dtype):
    for r in (0, 1, 2, 5, 32, 64):
        check_error_ratio(random_case(20, 200, 300, r, dtype, seed=r))
        figures[CASES] += 1


def bits(products):
    return [None if t is None else t.contiguous().view(torch.uint8).clone() for t in products]


def assert_same_bits(found, wanted):
    for name, f, w in zip(Products._fields, found, wanted, strict=True):
        assert (f is None and w is None) or torch.equal(f, w), name


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_same_bits_for_any_threads_and_every_time(cpu, dtype):
    threads = torch.get_num_threads()
    try:
        for M in (1, 8, 9, 100):
            case = random_case(M, 333, 700, 16, dtype, dropout_p=0.1)
            runs = []
            for count in (1, 2, 3, 2, 1):
                torch.set_num_threads(count)
                y = linear_4bit(case.x, case.packed, case.state, case.bias, case.lora_A, case.lora_B, case.scaling, case.dropout_p, case.seed)
                gradients = case.run()
                runs.append(bits(gradients))
                assert torch.equal(y, gradients.y)
            for other in runs[1:]:
                # dbias is torch's own sum, whose order may follow its threads
                assert_same_bits(other[:-1] + [None], runs[0][:-1] + [None])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_row_does_not_depend_on_its_neighbours(cpu, one_thread, dtype):
    """Concatenation along M: within a path, a row's bits are its own. K = 704 has whole blocks in a row, 700 has not.
    AMX tiles begin with 5 tokens."""
    for K in (700, 704):
        case = random_case(110, 333, K, 16, dtype)
        rest = case.packed, case.state, case.bias, case.lora_A, case.lora_B, case.scaling
        for most, parts in ((4, ((0, 1), (1, 4))), (32, ((0, 13), (13, 32))), (110, ((0, 40), (40, 110)))):
            whole = linear_4bit(case.x[:most], *rest)
            for first, last in parts:
                assert torch.equal(linear_4bit(case.x[first:last], *rest), whole[first:last])


def padded(t, offset, fill):
    """`t` as a contiguous view `offset` elements into a larger buffer of `fill`."""
    buffer = torch.full((t.numel() + offset + 37,), fill, dtype=t.dtype)
    return buffer[offset : offset + t.numel()].view(t.shape).copy_(t)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_row_12_any_alignment_gives_the_same_bits(cpu, one_thread, dtype):
    """Inputs lie in larger buffers of NaN, 0 to 15 elements in (bytes for the codes): nothing outside is read into a result."""
    for M in (3, 20):
        case = random_case(M, 70, 129, 5, dtype, nested=M == 3, dropout_p=0.1)
        wanted = bits(case.run())
        for offset in range(16):
            state = dataclasses.replace(case.state, absmax=padded(case.state.absmax, offset, torch.nan if M != 3 else 255))
            moved = {n: padded(getattr(case, n), (offset * k) % 16, torch.nan) for k, n in enumerate(("x", "dy", "bias", "lora_A", "lora_B"), 1)}
            found = dataclasses.replace(case, packed=padded(case.packed, offset, 0xA5), state=state, **moved).run()
            assert_same_bits(bits(found), wanted)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_row_11_any_stride_gives_the_same_bits(cpu, one_thread, dtype):
    case = random_case(20, 70, 129, 5, dtype, bias=False)  # dbias is torch's own sum, whose order follows the strides
    wanted = bits(case.run())

    def every_other(t):
        wide = torch.full((t.shape[0], 2 * t.shape[1]), torch.nan, dtype=t.dtype)
        wide[:, ::2] = t
        return wide[:, ::2]

    for stride in (every_other, lambda t: t.T.contiguous().T):
        moved = {n: stride(getattr(case, n)) for n in ("x", "dy", "lora_A", "lora_B")}
        assert_same_bits(bits(dataclasses.replace(case, **moved).run()), wanted)
    row = case.x[:1].expand(20, -1)
    assert torch.equal(linear_4bit(row, case.packed, case.state), linear_4bit(row.contiguous(), case.packed, case.state))


@pytest.fixture
def poison():
    """Fresh memory comes as NaN (255 in bytes), so that a result that was not written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.ones(1).new_empty(4).isnan().all() and torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_output_is_written(cpu, one_thread, poison, dtype):
    for M, N, K, r in ((0, 5, 7, 3), (1, 1, 1, 1), (3, 70, 129, 5), (20, 70, 129, 0), (257, 100, 65, 17)):
        case = random_case(M, N, K, r, dtype, dropout_p=0.5 if r else 0.0)
        for result in case.run():
            assert result is None or result.isfinite().all()
        if M > 1:  # one element is no sample
            check_error_ratio(case)


def test_nan_and_inf_go_where_they_must_and_nowhere_else(backend, one_thread):
    case = random_case(20, 70, 129, 5)
    for M in (3, 20):
        x = case.x[:M].clone()
        x[1, 5] = torch.nan
        y = linear_4bit(x, case.packed, case.state, case.bias, case.lora_A, case.lora_B)
        assert y[1].isnan().all() and y[0].isfinite().all() and y[2:].isfinite().all()


MEASURE = """
import gc, json, sys, torch
from nf4lora import backends, linear_4bit, quantize_4bit
M, dtype, backend = int(sys.argv[1]), getattr(torch, sys.argv[2]), sys.argv[3]

def status(key):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key))

packed, state = quantize_4bit(torch.randn(4096, 4096), compress_statistics=True)
x = torch.randn(M, 4096).to(dtype).requires_grad_()
A = (torch.randn(16, 4096) * 0.01).requires_grad_()
B = (torch.randn(4096, 16) * 0.01).requires_grad_()
dy = torch.randn(M, 4096).to(dtype)
def step():
    y = linear_4bit(x, packed, state, None, A, B, 2.0, 0.1, torch.tensor([1]))
    y.backward(dy)
    made = [y, x.grad, A.grad, B.grad]
    x.grad = A.grad = B.grad = None
    return sum(t.nbytes for t in made)
with backends.use_backend(backend):
    for _ in range(2):
        step()
    gc.collect()
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # VmHWM becomes VmRSS
    before = status("VmRSS")
    made = step()
print(json.dumps({"extra": status("VmHWM") - before - made, "made": made}))
"""


def measured(M, dtype, backend):
    # All but the smallest blocks go back to the system when freed, so that no temporary hides in a warm heap.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run([sys.executable, "-c", MEASURE, str(M), dtype, backend], env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)["extra"]


@pytest.mark.parametrize(("M", "dtype"), [(64, "float32"), (64, "bfloat16"), (1, "bfloat16"), (512, "bfloat16")])
def test_no_N_by_K_temporary(M, dtype, figures):
    """Peak memory of a forward and backward at N = K = 4096 beyond its results: at most 8 MiB."""
    extra = measured(M, dtype, "cpu")
    figures[f"peak extra bytes, forward and backward, N=K=4096, M={M}, {dtype}"] = extra
    assert extra <= 8 * 2**20


def test_the_memory_measurement_sees_a_temporary():
    assert measured(1, "bfloat16", "reference") > 32 * 2**20


def test_error_ratio_rule_itself():
    """The rule refuses what it should: NaN, a local fault, a global one; and takes what is as good as the baseline."""
    truth = torch.randn(70, 90, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(70, 90, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 1e-3
    baseline = (truth + noise).float()
    assert_error_ratio((truth - 1.2 * noise).float(), baseline, truth)
    assert_error_ratio(truth.float(), baseline, truth)
    at = noise.abs().argmax()
    spike = truth.float().reshape(-1)
    spike[at] += 2.5 * noise.abs().max()
    local, short, nan = truth.float(), truth[:, :-1].float(), truth.float()
    local[64:70, 80:90] += 1.9 * noise.abs().max()  # a tail, which belongs to the tile before it
    nan[3, 4] = torch.nan
    for bad, words in (
        (spike.view(70, 90), "error"), ((truth + 1.3 * noise).float(), "rms"), (local, "tile at"), (nan, r"nan at \(3, 4\)"),
        (short, "one shape"), (truth.double(), "one dtype"),
    ):  # fmt: skip
        with pytest.raises(AssertionError, match=words):
            assert_error_ratio(bad, baseline, truth)
    # A baseline without any error allows none; small tensors have the max rule only.
    exact = truth.round()
    assert_error_ratio(exact.float(), exact.float(), exact)
    wrong = exact.float()
    wrong[0, 0] += 2 * ulp(wrong[0, 0].item(), torch.float32)
    with pytest.raises(AssertionError, match="rms"):
        assert_error_ratio(wrong, exact.float(), exact)
    assert_error_ratio(wrong[:10, :10], exact.float()[:10, :10], exact[:10, :10])
    with pytest.raises(AssertionError, match="not finite"):
        assert_error_ratio(nan, nan, truth)
    with pytest.raises(AssertionError, match="wanted"):
        assert_exact(wrong, exact.float())


def test_ulp():
    for dtype, one in ((torch.float32, 2.0**-23), (torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-10)):
        assert ulp(1.0, dtype) == one and ulp(1.99, dtype) == one and ulp(2.0, dtype) == 2 * one and ulp(0.99, dtype) == one / 2
        assert ulp(0.0, dtype) == torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
