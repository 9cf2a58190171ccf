"""The Triton kernels of `optim_step` and `optim_check`: the reference's bytes. Without a GPU they run in Triton's interpreter.

tests/test_codegen_triton.py runs what the compiler makes of it.
"""

import os
import sys
from importlib.util import find_spec

import pytest
import torch
from test_optim_step import (  # noqa: F401  the tests are run here too, with this file's `kernels`
    FLOATS,
    KINDS,
    Run,
    check,
    same_bytes,
    test_a_check_of_nothing_but_empty_gradients,
    test_a_tensor_without_elements,
    test_autograd_notices_that_parameters_changed,
    test_grads_of_any_strides,
    test_in_inference_mode,
    test_nan_and_inf_go_where_the_reference_has_them,
    test_nothing_changes_under_the_flag,
    test_steps_are_counted_on_the_device,
    test_the_check_finds_every_place,
    test_the_first_states_code_is_exact_around_every_boundary,
    test_the_largest_numbers_are_finite,
    test_what_does_not_fit_the_check_or_the_rounding_is_refused,
    test_zeros_denormals_and_magnitudes_of_every_size,
)
from torch import nn
from under_test import GPU, force

from nf4lora import backends, codebook, ops, reference_optim, triton_optim
from nf4lora.optim import AdamW8bit

if find_spec("triton") is None and (sys.platform, os.uname().machine) != ("linux", "x86_64"):
    pytest.skip("Triton has no release for this machine", allow_module_level=True)

DEVICE = "cuda" if GPU else "cpu"
ODD = (1,), (255,), (256,), (257,), (10, 100), (4096,)
WHOLE = (8,), (4, 64), (1024,), (129, 8), (2048,)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(
        "ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning"
    ),  # numpy's, in the interpreter
]


@pytest.fixture(autouse=True)
def kernels():
    with force("triton"):
        yield "triton"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind, coded", KINDS)
def test_the_bytes_are_the_references(kind, coded, dtype, figures):
    for shapes, shift in (
        (ODD, lambda i: 0),
        (ODD[:-1], lambda i: i % 9),
        (WHOLE, lambda i: 0),
        (WHOLE, lambda i: 4 * (i % 3)),
    ):
        run = Run(kind, coded, dtype, shapes, seed=len(shapes), shift=shift)
        for step in range(2):
            figures["bytes of optimizer steps equal to the reference's"] += check(run)
            run.hypers[5::6] = [h + 1 for h in run.hypers[5::6]]


@pytest.mark.parametrize("kind, coded", KINDS)
def test_stochastic_rounding(kind, coded):
    for seed, origin, shapes in ((0, 0, ODD), (2**63 - 1, 2**33, WHOLE), (-5, 256, ODD[:3])):
        check(Run(kind, coded, torch.bfloat16, shapes, shift=lambda i: i % 3), seed, origin)
    run = Run(kind, coded, torch.bfloat16, ODD[2:4])
    run.params[0][7], run.params[0][8], run.params[1][3] = torch.nan, torch.inf, 0.0
    run.grads[1][5] = torch.inf
    check(run, 11)


def test_many_tensors_are_one_launch(monkeypatch):
    """Each of them found by its program, and those without elements by none."""
    sizes = [(1, 0, 7, 256, 1025, 0, 3)[i % 7] for i in range(90)]
    run = Run(
        "adamw",
        True,
        torch.bfloat16,
        [(n,) for n in (0, *sizes, 0)],
        sets=[(1e-3 * (i + 1), 0.8, 0.95, 1e-6, 0.1, 1.0 + i) for i in range(70)],
    )
    run.hyper_of = [i * 7 % 70 for i in range(len(run.params))]
    check(run)
    launches = recorded(monkeypatch)
    run.step()
    assert [grid for grid, _ in launches] == [(sum(-(-n // triton_optim.config().weights) for n in sizes),)]


def recorded(monkeypatch, kernel="optim_step_kernel"):
    """(grid, keywords) of the launches of a kernel from here on, which do nothing."""
    launches = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **keywords: launches.append((grid, keywords))

    monkeypatch.setattr(triton_optim.kernels(), kernel, Recorder())
    return launches


def test_only_aligned_tensors_of_eights_are_taken_whole(monkeypatch):
    launches = recorded(monkeypatch)
    for dtype in FLOATS:
        each = 16 // dtype.itemsize
        Run("lion", True, dtype, WHOLE).step()
        Run("lion", True, dtype, WHOLE, shift=lambda i, each=each: each * (i % 2)).step()
        for tensor in range(len(WHOLE) + 1):  # a parameter and the gradient before it
            Run("lion", True, dtype, WHOLE, shift=lambda i, tensor=tensor: int(i == tensor)).step()
        Run("lion", True, dtype, (*WHOLE, (12,))).step()
    assert [keywords["WHOLE"] for _, keywords in launches] == 3 * ([True, True] + [False] * (len(WHOLE) + 2))
    assert not any(keywords["enable_fp_fusion"] for _, keywords in launches)


@pytest.mark.parametrize("count", (1, 2, 3, 4, 5, 8, 9))
def test_every_number_of_tensors(count):
    check(Run("lion", True, torch.float32, [(1 + i,) for i in range(count)]))


@pytest.mark.parametrize("code", ("dynamic", "unsigned_dynamic"))
def test_a_cell_is_of_numbers_that_one_boundary_divides(code):
    """The table of cells against counting, around every boundary and every edge of a cell."""
    optim = triton_optim.kernels()
    boundaries = codebook.dynamic_boundaries(code=code)
    edges = (torch.arange(113 << 7, (127 << 7) + 1) << 16).to(torch.int32).view(torch.float32) - 2.0**-14
    v = torch.cat([boundaries, edges, -edges, torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, 1 + 2**-23])])
    v = torch.cat([v, v.nextafter(torch.tensor(torch.inf)), v.nextafter(torch.tensor(-torch.inf))])
    order = optim._order(v)
    entry = optim.cells(code)[torch.where(order < 0, 2047 - order, order)]
    found = (entry & 0xFFFFFFFF) + (v > (entry >> 32).to(torch.int32).view(torch.float32))
    assert torch.equal(found, torch.bucketize(v, boundaries))
    beyond = optim.cells(code).view(2, 2048)[:, (15 << 7) + 64 :]  # of NaN
    assert bool(((beyond & 0xFFFFFFFF) == 254).all())


def test_a_cell_of_two_boundaries_is_an_error(monkeypatch):
    optim = triton_optim.kernels()
    near = torch.tensor([0.5, 0.5 + 2.0**-20])
    monkeypatch.setattr(optim, "dynamic_boundaries", lambda device, code: near)
    with pytest.raises(ValueError, match="finer: two boundaries in one cell"):
        optim.cells("finer")


# ---- skipping


COUNTS = (1, 2, 3, 7, 100, 2**16, 2**16 - 1, 1234567, 2**30, 2**31 - 2, 2**31 - 1)


@pytest.mark.parametrize("kind", ("adamw", "lion"))
def test_constants_of_every_count(kind):
    """Each for each of a few sets, of which some have powers that end in 0 and some that do not."""
    near_one = 1 - 2**-30, 1 - 2**-31
    sets = (1e-3, 0.9, 0.999, 1e-8, 0.1, -1.0), (0.7, *near_one, 0.1, 1e-9, -1.0), (3e-5, 0.0, 0.5, 0.0, 0.0, -1.0)
    run = Run(kind, False, torch.float32, [(64,)] * len(sets) * len(COUNTS), sets=sets)
    for p in run.params:
        p.zero_()  # so that every bit of what is taken from them is seen
    run.steps = torch.tensor([0, 0, *(count for count in COUNTS for _ in sets)], dtype=torch.int32)
    run.flag = torch.zeros(1, dtype=torch.int32)
    check(run)


def test_slots_in_any_order():
    run = Run("adamw", True, torch.float32, ODD)
    run.slots, run.steps = [5, 0, 3, 1, 6, 2], torch.tensor([4, 1, 900, 2, 7777, 3, 60], dtype=torch.int32)
    run.flag = torch.zeros(1, dtype=torch.int32)
    check(run)


def test_the_check_of_448_tensors_is_one_launch(monkeypatch):
    sizes = [(1, 0, 7, 256, 4104, 0, 3)[i % 7] for i in range(448)]
    run = Run("lion", False, torch.bfloat16, [(n,) for n in sizes], shift=lambda i: i % 3)
    slots = torch.randperm(500, generator=torch.Generator().manual_seed(0))[:448].tolist()
    for place in (None, 447):
        if place is not None:
            run.grads[place].view(-1)[-1] = torch.inf
        steps, flag = torch.arange(500, dtype=torch.int32), torch.full((1,), 9, dtype=torch.int32)
        wanted = steps.clone(), flag.clone()
        reference_optim.optim_check(run.grads, *wanted, slots)
        with torch.no_grad():
            ops.optim_check(run.grads, steps, flag, slots)
        assert torch.equal(steps, wanted[0]) and torch.equal(flag, wanted[1]) and flag.item() == (place is not None)
    launches = recorded(monkeypatch, "optim_check_kernel")
    with torch.no_grad():
        ops.optim_check(run.grads, steps, flag, slots)
        ops.optim_check([run.grads[1]], steps, flag, slots[:1])
    assert [grid for grid, _ in launches] == [(sum(-(-n // triton_optim.check_config().weights) for n in sizes),), (1,)]


def test_the_check_takes_only_aligned_tensors_of_eights_whole(monkeypatch):
    launches = recorded(monkeypatch, "optim_check_kernel")
    steps, flag = torch.zeros(2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    for dtype in FLOATS:
        g = torch.zeros(1024, dtype=dtype)
        for second in (g[16 // dtype.itemsize :][:64], g[1:65], g[:60], g[:0]):
            with torch.no_grad():
                ops.optim_check([g, second], steps, flag, [0, 1])
    assert [keywords["WHOLE"] for _, keywords in launches] == 3 * [True, False, False, True]


@pytest.fixture
def rows_run(monkeypatch):
    """(op, back end) of every op that runs."""
    seen = []

    def spy(key, row):
        def call(*args):
            seen.append(key)
            return row.call(*args)

        return backends.Row(call, row.why_not, row.configure)

    monkeypatch.setattr(backends, "_ROWS", {key: spy(key, row) for key, row in backends._ROWS.items()})
    return seen


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_an_optimizer_that_skips_runs_these_kernels(rows_run, dtype):
    """Steps and a step that a NaN takes back, with 8-bit states and float32 ones, against the reference's."""
    found = {}
    for name in ("triton", "reference"):
        made = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(s, generator=made).to(DEVICE, dtype)) for s in ((4200,), (3, 100), (1,))]
        hypers = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
        optimizer = AdamW8bit(params, **hypers, skip_nonfinite=True, stochastic_rounding=dtype == torch.bfloat16)
        torch.manual_seed(0)
        with backends.use_backend(name):
            for step in range(4):
                for p in params:
                    p.grad = torch.randn(p.shape, generator=made).to(DEVICE, dtype)
                if step == 2:
                    params[1].grad[2, 99] = torch.nan
                    before = [p.detach().clone() for p in params]
                optimizer.step()
                if step == 2:
                    assert all(map(same_bytes, (p.detach() for p in params), before))
        states = optimizer.state_dict()["state"]
        assert {int(state["step"]) for state in states.values()} == {3}
        kept = [torch.as_tensor(v).reshape(-1) for _, state in sorted(states.items()) for v in state.values()]
        found[name] = [p.detach() for p in params] + kept
        assert set(rows_run) == {("optim_check", name), ("optim_step", name)}
        assert rows_run.count(("optim_check", name)) == 4 and rows_run.count(("optim_step", name)) == 8
        rows_run.clear()
    assert all(map(same_bytes, found["triton"], found["reference"])) and len(found["triton"]) > 10


def test_what_it_refuses_it_says(monkeypatch):
    run = Run("lion", True, torch.float32, ((3,),))
    run.params[0], run.grads[0] = run.params[0].to(DEVICE), run.grads[0].to(DEVICE)
    steps, flag = torch.ones(9, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    given = run.arguments(), (run.grads, steps, flag, run.slots)
    assert [triton_optim.why_not(*arguments) for arguments in ((), *given)] == [None] * 3
    monkeypatch.setattr(triton_optim.triton_rows, "why_not", lambda *args: "it is ill")
    assert [triton_optim.why_not(*arguments) for arguments in ((), *given)] == ["it is ill"] * 3
    with backends.use_backend("triton"), pytest.raises(NotImplementedError, match="optim_check.*\n  triton: it is ill"):
        backends.run("optim_check", *given[1])
