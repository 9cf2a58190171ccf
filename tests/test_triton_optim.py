"""The Triton kernel of `optim_step`: the reference's bytes, and what it refuses. Without a GPU it runs in Triton's interpreter.

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
    test_a_tensor_without_elements,
    test_autograd_notices_that_parameters_changed,
    test_in_inference_mode,
    test_nan_and_inf_go_where_the_reference_has_them,
    test_the_first_states_code_is_exact_around_every_boundary,
    test_zeros_denormals_and_magnitudes_of_every_size,
)
from under_test import GPU, force

from nf4lora import backends, codebook, triton_optim

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


def recorded(monkeypatch):
    """(grid, keywords) of the launches from here on, which do nothing."""
    launches = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **keywords: launches.append((grid, keywords))

    monkeypatch.setattr(triton_optim.kernels(), "optim_step_kernel", Recorder())
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


def test_grads_of_any_strides():
    run = Run("adamw", True, torch.float32, ((33, 31), (5, 300), (7, 9)))
    run.grads[0] = torch.randn(31, 33).T
    run.grads[1] = torch.tensor([[0.25]]).expand(5, 300)
    run.grads[2] = torch.randn(7, 18)[:, ::2]
    wanted = run.copy()
    wanted.grads = run.grads
    with backends.use_backend("reference"):
        wanted.step()
    run.step()
    assert all(map(same_bytes, run.buffers()[:3], wanted.buffers()[:3])) and same_bytes(run.state1, wanted.state1)


def test_what_it_refuses_it_says():
    run = Run("lion", True, torch.float32, ((3,),))
    run.params[0], run.grads[0] = run.params[0].to(DEVICE), run.grads[0].to(DEVICE)
    assert triton_optim.why_not() is None and triton_optim.why_not(*run.arguments()) is None
    run.steps, run.flag = torch.ones(9, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    assert "counts of steps" in triton_optim.why_not(*run.arguments())
    with backends.use_backend("triton"), pytest.raises(NotImplementedError, match="counts of steps"):
        backends.run("optim_step", *run.arguments())
