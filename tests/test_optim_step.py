"""The kernels of `optim_step` and `optim_check`: the reference's bytes on every back end, whatever sizes, places and values."""

import ctypes
import itertools
import math
import mmap
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from cuda_on_host import backend as on_host
from cuda_on_host import errors
from test_native import ISAS, processor_has
from under_test import GPU, force

from nf4lora import backends, heuristics, native, ops, reference_optim
from nf4lora.abi import OptimHyper, OptimParams, OptimTensor
from nf4lora.codebook import codebook, dynamic_boundaries

KERNELS = ("cpu", "cuda_on_host") + (("cuda",) if GPU else ())
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
KINDS = [(kind, coded) for kind in ("adamw", "lion") for coded in (False, True)]
BLOCK = 256
# lr, beta1, beta2, eps, weight_decay, step: none of them a default of anybody's
SETS = ((3e-3, 0.8, 0.95, 1e-6, 0.1, 3.0), (0.25, 0.35, 0.73, 1e-3, 0.04, 1.0), (1e-4, 0.97, 0.9987, 3e-10, 0.0, 1234567.0))
SHAPES = ((1,), (255,), (256,), (257,), (4096,), (3, 5, 7), (2, 1021), (1, 1), (768,), (31, 33))

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=KERNELS)
def kernels(request):
    """Forces the kernels of one back end, each in turn."""
    with force(request.param):
        yield request.param


class Run:
    """Operands of a step, every tensor with guard bytes on both sides, which `buffers` has too.

    shift: elements that params (and one more, grads) begin beyond an aligned address, by tensor.
    """

    def __init__(self, kind, coded, dtype, shapes=SHAPES, seed=0, shift=lambda i: 0, scale=0.1, sets=SETS):
        g = torch.Generator().manual_seed(seed)
        self.kind, self.coded, self.dtype, self.hypers = kind, coded, dtype, [n for s in sets for n in s]
        self.param_buffers, self.grad_buffers, self.params, self.grads = [], [], [], []
        self.offsets, at = [], BLOCK
        for i, shape in enumerate(shapes):
            numel = math.prod(shape)
            kept = (self.param_buffers, self.params, shift(i)), (self.grad_buffers, self.grads, shift(i + 1))
            for buffers, views, first in kept:
                buffers.append(torch.full((numel + 32,), math.nan, dtype=dtype))
                views.append(buffers[-1][8 + first : 8 + first + numel].view(shape))
            self.params[i].copy_(torch.randn(shape, generator=g))
            self.grads[i].copy_(torch.randn(shape, generator=g) * scale)
            self.offsets.append(at)
            at += (-(-numel // BLOCK) + i % 2) * BLOCK
        self.slots = list(range(2, 2 + len(shapes)))
        self.hyper_of = [i % len(sets) for i in range(len(shapes))]
        self.state1 = torch.full((at,), 0xA5, dtype=torch.uint8) if coded else torch.full((at,), math.nan)
        self.state2 = self.state1.clone() if kind == "adamw" else None
        self.absmax1 = torch.full((at // BLOCK,), math.nan) if coded else None
        self.absmax2 = self.absmax1.clone() if coded and kind == "adamw" else None
        self.steps = self.flag = None
        for p, offset in zip(self.params, self.offsets, strict=True):
            for state, absmax, is_second in ((self.state1, self.absmax1, False), (self.state2, self.absmax2, True)):
                if state is None:
                    continue
                part, first = state[offset : offset + p.numel()], offset // BLOCK
                if coded:
                    part.copy_(torch.randint(0, 256, part.shape, generator=g))
                    absmax[first : first + -(-p.numel() // BLOCK)] = torch.rand((), generator=g) * scale**2
                elif is_second:
                    part.copy_(torch.rand(part.shape, generator=g) * scale**2)
                else:
                    part.copy_(torch.randn(part.shape, generator=g) * scale)

    def buffers(self):
        others = self.state1, self.state2, self.absmax1, self.absmax2, self.steps, self.flag
        return [t for t in (*self.param_buffers, *self.grad_buffers, *others) if t is not None]

    def copy(self):
        """The same operands in memory of their own, at the same places."""
        made = Run.__new__(Run)
        made.__dict__.update(self.__dict__)
        for of in ("param", "grad"):
            buffers = [b.clone() for b in getattr(self, f"{of}_buffers")]
            setattr(made, f"{of}_buffers", buffers)
            views = zip(buffers, getattr(self, f"{of}s"), strict=True)
            setattr(made, f"{of}s", [b[v.storage_offset() :][: v.numel()].view(v.shape) for b, v in views])
        for name in ("state1", "state2", "absmax1", "absmax2", "steps", "flag"):
            t = getattr(self, name)
            setattr(made, name, None if t is None else t.clone())
        return made

    def arguments(self, seed=None, origin=0):
        return (self.params, self.grads, self.state1, self.state2, self.absmax1, self.absmax2, self.steps, self.flag,
                self.offsets, self.slots, self.hyper_of, self.hypers, self.kind, seed, origin)  # fmt: skip

    @torch.no_grad()
    def step(self, seed=None, origin=0):
        ops.optim_step(*self.arguments(seed, origin))

    def referenced(self, seed=None, origin=0):
        """A copy after the reference's step."""
        made = self.copy()
        reference_optim.optim_step(*made.arguments(seed, origin))
        return made


def same_bytes(found, wanted):
    """NaN is NaN, whatever its bits: processors differ in those."""
    if found.is_floating_point():
        nan = wanted.isnan()
        if not torch.equal(found.isnan(), nan):
            return False
        found, wanted = found.masked_fill(nan, 0.0), wanted.masked_fill(nan, 0.0)
    return torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))


def check(run, seed=None, origin=0):
    """One step against the reference's; returns how many bytes were compared."""
    wanted = run.referenced(seed, origin)
    run.step(seed, origin)
    for i, (a, b) in enumerate(zip(run.buffers(), wanted.buffers(), strict=True)):
        assert same_bytes(a, b), (i, run.kind, run.coded, run.dtype)
    return sum(t.nbytes for t in run.buffers())


# ---- every combination


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind, coded", KINDS)
def test_the_bytes_are_the_references(kernels, kind, coded, dtype, figures):
    for repeat, shift in enumerate((lambda i: 0, lambda i: i % 9, lambda i: 4 * (i % 3))):
        run = Run(kind, coded, dtype, seed=repeat, shift=shift, scale=(0.1, 3.0, 1e-3)[repeat])
        for step in range(2):
            figures["bytes of optimizer steps equal to the reference's"] += check(run)
            run.hypers[5::6] = [h + 1 for h in run.hypers[5::6]]
    if dtype == torch.bfloat16:
        for seed, origin in ((0, 0), (2**63 - 1, 2**33), (-5, 256)):
            check(Run(kind, coded, dtype, seed=9, shift=lambda i: i % 3), seed, origin)


@pytest.mark.parametrize("isa", ISAS)
def test_the_other_instruction_sets_give_the_same_bytes(isa):
    if not processor_has(isa) or isa == native.host.isa():
        pytest.skip(f"this processor has no {isa}, or every other test runs on it")
    wanted = "(bytes_are_the_references or nan_and_inf or zeros_denormals or code_is_exact) and cpu"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", wanted]
    done = subprocess.run(command, env=os.environ | {"NF4LORA_CPU_ISA": isa}, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "30 passed" in done.stdout, done.stdout[-2000:]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind, coded", KINDS)
def test_nan_and_inf_go_where_the_reference_has_them(kernels, kind, coded, dtype):
    run = Run(kind, coded, dtype, shapes=((700,), (256,), (300,), (512,), (512,)), sets=SETS[:2])
    run.grads[0][5], run.grads[0][600], run.grads[1][255] = math.nan, math.inf, -math.inf
    run.grads[2][299] = torch.finfo(dtype).max  # its square is not finite
    run.params[3][7], run.params[3][300] = math.nan, -math.inf
    run.grads[4].zero_()
    if run.absmax2 is not None:  # no step makes one below 0, a damaged file may hold one
        run.absmax2[run.offsets[3] // BLOCK] *= -1
    for _ in range(3):
        check(run, 7 if dtype == torch.bfloat16 else None)


@pytest.mark.parametrize("kind, coded", KINDS)
def test_zeros_denormals_and_magnitudes_of_every_size(kernels, kind, coded):
    """What a square root, a division and a reciprocal must not get wrong."""
    sets = (0.01, 0.5, 0.75, 0.0, 0.1, 2.0), (0.01, 0.5, 0.5, 1e-8, 0.0, 1.0)
    run = Run(kind, coded, torch.float32, shapes=((4096,), (4096,)), sets=sets)
    exponents = torch.linspace(-149, 63, 4096)
    for g, p, offset in zip(run.grads, run.params, run.offsets, strict=True):
        g.copy_(torch.exp2(exponents) * torch.tensor([1.0, -1.0]).repeat(2048))
        g[::7] = 0.0
        p[::5] = -0.0
        if coded:
            for absmax in (run.absmax1, run.absmax2):
                if absmax is not None:
                    absmax[offset // BLOCK : offset // BLOCK + 16] = torch.exp2(torch.linspace(-149, 120, 16))
        else:
            for state in (run.state1, run.state2):
                if state is not None:
                    state[offset : offset + 4096] = torch.exp2(exponents.flip(0)) * (torch.arange(4096) % 3 > 0)
    check(run)
    check(run)


# ---- codes


def near(values, steps=2):
    """Those values, and the float32 numbers up to `steps` away on both sides."""
    found, up, down = [values], values, values
    for _ in range(steps):
        up, down = torch.nextafter(up, torch.tensor(math.inf)), torch.nextafter(down, torch.tensor(-math.inf))
        found += [up, down]
    return torch.cat(found)


def test_the_first_states_code_is_exact_around_every_boundary(kernels, figures):
    """With beta1 = 0 the first state is the gradient; an element of 1 in its block makes that the scaled value."""
    powers = torch.exp2(torch.arange(-149.0, 1.0))
    v = torch.cat([near(t) for t in (dynamic_boundaries(), codebook("dynamic"), powers, -powers)] + [torch.tensor([0.0, -0.0])])
    v = v[v.abs() <= 1.0]
    grad = torch.ones(-(-len(v) // 255), 256)
    grad.view(-1)[torch.arange(len(v)) // 255 * 256 + torch.arange(len(v)) % 255] = v
    run = Run("adamw", True, torch.float32, shapes=((grad.numel(),),), sets=((0.1, 0.0, 0.9, 1e-8, 0.0, 1.0),))
    run.grads[0].copy_(grad.view(-1))
    check(run)
    values = codebook("dynamic").double()
    found = run.state1[BLOCK : BLOCK + grad.numel()].long()
    distance = (grad.view(-1).double()[:, None] - values).abs()
    assert torch.equal(found, distance.argmin(1))  # the first of two at one distance: the lower
    figures["8-bit codes held against exact nearest"] += grad.numel()


def test_the_second_states_code_is_exact_around_every_boundary(kernels, figures):
    """Of a block whose codes are all 255 the values are absmax, of which beta2 leaves half; one element becomes 2."""
    code, powers = "unsigned_dynamic", torch.exp2(torch.arange(-140.0, 0.0))
    x = torch.cat([near(t) for t in (dynamic_boundaries(code=code), codebook(code), powers)])
    x = x[(x >= 0) & (x <= 1)]
    run = Run("adamw", True, torch.float32, shapes=((256 * len(x),),), sets=((0.1, 0.9, 0.5, 1e-8, 0.0, 1.0),))
    run.grads[0].zero_()
    run.grads[0][::256] = 2.0
    state = run.state2[BLOCK : BLOCK + 256 * len(x)]
    state.fill_(255)
    state[::256] = 0
    run.absmax2[1 : 1 + len(x)] = 4 * x
    check(run)
    assert torch.equal(run.absmax2[1 : 1 + len(x)], torch.full((len(x),), 2.0))
    distance = (x.double()[:, None] - codebook("unsigned_dynamic").double()).abs()
    assert torch.equal(state.view(-1, 256)[:, 1:], distance.argmin(1).to(torch.uint8)[:, None].expand(-1, 255))
    figures["8-bit codes held against exact nearest"] += 255 * len(x)


# ---- many tensors, large indices


def small(kind, coded, dtype, count, **others):
    return Run(kind, coded, dtype, shapes=[((1, 7, 33, 256, 300)[i % 5],) for i in range(count)], **others)


@pytest.mark.parametrize("kind, coded", KINDS)
def test_448_tensors_are_one_launch(kind, coded):
    with force("cuda_on_host") as name:
        library = on_host.machine(name_of_variant()).load()[0]
        run = small(kind, coded, torch.bfloat16, 448)
        wanted = run.referenced()
        library.cuda_on_host_launches()
        run.step()
        assert len(library.cuda_on_host_launches().decode().splitlines()) == 1
        assert all(map(same_bytes, run.buffers(), wanted.buffers()))
        steps, flag = torch.zeros(500, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        with torch.no_grad():
            ops.optim_check(run.grads, steps, flag, run.slots)
        assert len(library.cuda_on_host_launches().decode().splitlines()) == 1
        assert backends.forced() == name


def name_of_variant():
    return os.environ.get("CUDA_ON_HOST", "checker")


def test_448_tensors_on_the_host(cpu):
    for kind, coded in KINDS:
        check(small(kind, coded, torch.float32, 448))


def test_more_tensors_and_more_hypers_than_a_launch_takes(kernels):
    check(small("lion", True, torch.float16, 1500))
    sets = [(1e-3 * (i + 1), 0.8, 0.95, 1e-6, 0.1, 1.0 + i) for i in range(300)]
    run = small("adamw", True, torch.float32, 400, sets=sets)
    run.hyper_of = [(i * 7) % 300 for i in range(400)]
    check(run)
    run.steps, run.flag = torch.arange(1, 500, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    check(run)


def test_a_tensor_without_elements(kernels):
    run = Run("adamw", True, torch.float32, shapes=((3,), (0,), (300,), (0, 4), (5,)))
    check(run)
    check(Run("adamw", False, torch.float32, shapes=((0,), (0,))))


def test_a_check_of_nothing_but_empty_gradients(kernels):
    steps, flag = torch.tensor([4, 7], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    with torch.no_grad():
        ops.optim_check([torch.zeros(0), torch.zeros(0, 5)], steps, flag, [1, 0])
    assert steps.tolist() == [5, 8] and flag.tolist() == [0]


def step_beyond(library, offset):
    """A step whose arenas begin far before their only part that exists, from element `offset` on."""
    run = Run("adamw", True, torch.bfloat16, shapes=((700,), (300,)), sets=SETS[:1])
    wanted = run.referenced(11, offset)
    table, hypers = (OptimTensor * 2)(), (OptimHyper * 1)(OptimHyper(*SETS[0][:5], int(SETS[0][5])))
    for i, (p, g) in enumerate(zip(run.params, run.grads, strict=True)):
        table[i] = OptimTensor(library.pointer(p), library.pointer(g), p.numel(), offset + run.offsets[i], 0, 0)
    states = [(library.pointer(t) - offset // per) % 2**64
              for t, per in ((run.state1, 1), (run.state2, 1), (run.absmax1, 64), (run.absmax2, 64))]  # fmt: skip
    params = OptimParams(ctypes.addressof(table), ctypes.addressof(hypers), *states, None, None, 2, 1, 11, 0, 1, 1, 0, 2)
    library.run("optim_step", params, torch.device("cpu"))
    assert all(map(same_bytes, run.buffers(), wanted.buffers()))


@pytest.mark.parametrize("offset", [2**31, 2**31 + 256, 2**32, 5 * 2**33 + 512])
def test_places_beyond_2_to_the_31(offset):
    step_beyond(native.host, offset)
    step_beyond(on_host.machine(name_of_variant()), offset)


@contextmanager
def aliased(nbytes, tail):
    """Address of `nbytes` of memory of which all but the last `tail` bytes are one piece, over and over; and a view of these."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    piece = 64 << 20
    nbytes = -(-nbytes // 4096) * 4096
    memory = os.memfd_create("aliased")
    os.ftruncate(memory, piece + tail)
    try:
        base = libc.mmap(None, nbytes, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000, -1, 0)
        assert base not in (None, 2**64 - 1)
        fixed = mmap.MAP_SHARED | 0x10
        end = base + nbytes - tail
        for first in range(base, end, piece):
            assert libc.mmap(first, min(piece, end - first), mmap.PROT_READ | mmap.PROT_WRITE, fixed, memory, 0) == first
        assert libc.mmap(end, tail, mmap.PROT_READ | mmap.PROT_WRITE, fixed, memory, piece) == end
        yield base, np.ctypeslib.as_array((ctypes.c_uint8 * tail).from_address(end))
    finally:
        libc.munmap(base, nbytes)
        os.close(memory)


def test_a_parameter_of_more_than_2_to_the_31_elements(cpu):
    """Only its end is memory of its own: all before it is one piece of memory, seen many times."""
    numel, tail = 2**31 + (1 << 18), 1 << 20
    two, one, few = (2 * numel, 2 * tail), (numel, tail), (numel // 64, tail // 64)
    with aliased(*two) as (param, p), aliased(*two) as (grad, g), aliased(*one) as (codes, c), aliased(*few) as (scales, s):
        views = [torch.from_numpy(t) for t in (p, g, c, s)]
        run = Run("lion", True, torch.bfloat16, shapes=((tail,),), sets=SETS[:1])
        for view, t in zip(views, (run.params[0], run.grads[0], run.state1[BLOCK:], run.absmax1[1:]), strict=True):
            view.copy_(t.view(torch.uint8))
        wanted = run.referenced(5, numel - tail - BLOCK)
        table, hypers = OptimTensor(param, grad, numel, 0, 0, 0), OptimHyper(*SETS[0][:5], int(SETS[0][5]))
        states = codes, None, scales, None, None, None
        params = OptimParams(ctypes.addressof(table), ctypes.addressof(hypers), *states, 1, 1, 5, 0, 1, 1, 1, 2)
        native.host.run("optim_step", params, torch.device("cpu"))
        for view, t in zip(views, (wanted.params[0], wanted.grads[0], wanted.state1[BLOCK:], wanted.absmax1[1:]), strict=True):
            assert same_bytes(view.view(t.dtype), t)


# ---- skipping


@pytest.mark.parametrize("kind, coded", KINDS)
def test_steps_are_counted_on_the_device(kernels, kind, coded):
    run = Run(kind, coded, torch.bfloat16)
    run.steps = torch.tensor([7, 9, 1, 2, 3, 10, 1000, 2**20, 2**31 - 1, 5, 6, 77, 13], dtype=torch.int32)
    run.flag = torch.zeros(1, dtype=torch.int32)
    run.hypers[5::6] = [-1.0] * len(SETS)  # nobody's
    check(run)
    check(run, 3)


@pytest.mark.parametrize("kind, coded", KINDS)
def test_nothing_changes_under_the_flag(kernels, kind, coded):
    run = Run(kind, coded, torch.float32)
    run.steps, run.flag = torch.ones(20, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    before = run.copy()
    check(run)
    assert all(map(same_bytes, run.buffers(), before.buffers()))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_check_finds_every_place(kernels, dtype):
    shapes = ((1,), (2047,), (2048,), (4096 + 5,), (600,))
    for shift in (0, 1, 8):
        run = Run("lion", False, dtype, shapes=shapes, shift=lambda i, shift=shift: shift)
        places = [(i, j) for i, s in enumerate(shapes) for j in {0, 1, s[0] // 2, s[0] - 1} if j < s[0]]
        for place, value in zip([None, *places], itertools.cycle((math.nan, math.inf, -math.inf))):
            if place:
                saved = run.grads[place[0]][place[1]].clone()
                run.grads[place[0]][place[1]] = value
            steps, flag = torch.arange(9, dtype=torch.int32), torch.full((1,), 5, dtype=torch.int32)
            wanted = torch.arange(9, dtype=torch.int32)
            with torch.no_grad():
                ops.optim_check(run.grads, steps, flag, [3, 1, 8, 0, 4])
            if not place:
                wanted[[3, 1, 8, 0, 4]] += 1
            assert flag.item() == bool(place) and torch.equal(steps, wanted), place
            if place:
                run.grads[place[0]][place[1]] = saved


def test_the_largest_numbers_are_finite(kernels):
    for dtype in FLOATS:
        grads = [torch.full((n,), sign * torch.finfo(dtype).max, dtype=dtype) for n in (5, 4096) for sign in (1, -1)]
        steps, flag = torch.zeros(4, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
        with torch.no_grad():
            ops.optim_check(grads, steps, flag, [0, 1, 2, 3])
        assert flag.item() == 0 and steps.tolist() == [1] * 4


def test_a_check_of_more_grads_than_a_launch_takes(kernels):
    grads = [torch.ones(1 + i % 3) for i in range(2700)]
    slots = torch.randperm(2800, generator=torch.Generator().manual_seed(0))[:2700].tolist()
    for bad in (None, 0, 1279, 1280, 2600, 2699):
        if bad is not None:
            grads[bad][0] = math.nan
        steps, flag = torch.zeros(2800, dtype=torch.int32), torch.full((1,), 9, dtype=torch.int32)
        with torch.no_grad():
            ops.optim_check(grads, steps, flag, slots)
        assert flag.item() == (bad is not None) and steps.sum() == (2700 if bad is None else 0)
        if bad is not None:
            grads[bad][0] = 1.0


# ---- how it is called


def test_grads_of_any_strides(kernels):
    run = Run("adamw", True, torch.float32, shapes=((33, 31), (5, 300), (7, 9)))
    run.grads[0] = torch.randn(31, 33).T
    run.grads[1] = torch.tensor([[0.25]]).expand(5, 300)
    run.grads[2] = torch.randn(7, 18)[:, ::2]
    wanted = run.copy()
    wanted.grads = run.grads
    reference_optim.optim_step(*wanted.arguments())
    run.step()
    assert all(map(same_bytes, run.buffers()[:3], wanted.buffers()[:3])) and same_bytes(run.state1, wanted.state1)
    flag, steps = torch.zeros(1, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    run.grads[0][3, 3] = math.inf
    with torch.no_grad():
        ops.optim_check(run.grads, steps, flag, [0, 1, 2])
    assert flag.item() == 1


def test_autograd_notices_that_parameters_changed(kernels):
    p = torch.randn(300).requires_grad_()
    run = Run("adamw", False, torch.float32, shapes=((300,),), sets=SETS[:1])
    run.params[0] = p
    loss = (p * p).sum()
    version = p._version
    run.step()
    assert p._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_inference_mode(kernels):
    with torch.inference_mode():
        check(Run("adamw", True, torch.float32))


def test_thread_blocks_do_not_change_the_bits(monkeypatch):
    with force("cuda_on_host"):
        for kind, coded in KINDS:
            found = []
            for workers in (1, 2, 3, 7, 1000):
                monkeypatch.setattr(heuristics, "cuda_optim", lambda numel, multiprocessors, workers=workers: workers)
                run = Run(kind, coded, torch.bfloat16)
                run.step(1)
                found.append(run)
            for run in found[1:]:
                assert all(map(same_bytes, run.buffers(), found[0].buffers()))


def test_threads_do_not_change_the_bits(cpu):
    runs = [Run("adamw", True, torch.bfloat16) for _ in range(3)]
    before = torch.get_num_threads()
    for threads, run in zip((1, 2, 5), runs, strict=True):
        torch.set_num_threads(threads)
        run.step(1)
    torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(map(same_bytes, run.buffers(), runs[0].buffers()))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind, coded", KINDS)
def test_no_sector_is_moved_twice(kind, coded, dtype):
    machine = on_host.machine("checker")
    machine.enter()
    run = Run(kind, coded, dtype, shapes=((1 << 15,), (1 << 14,)))
    run.param_buffers = [torch.zeros(p.numel(), dtype=dtype) for p in run.params]
    run.params, run.grads = run.param_buffers, [torch.zeros_like(p) for p in run.param_buffers]
    with backends.use_backend(machine.backend):
        run.step()
    lines = errors.resolve(machine.load()[0].cuda_on_host_profile().decode(), machine.path()).splitlines()
    sites = [line.split() for line in lines]
    often = [s for s in sites if s[1] == "global" and int(s[3]) * 32 >= (1 << 15) // 8]
    assert len(often) >= 4 and not [s for s in often if float(s[4]) > 1.05], often


# ---- torch and its fakes


@pytest.mark.parametrize("name", ("cpu", "reference"))
@pytest.mark.parametrize("kind, coded", KINDS)
def test_opcheck(name, kind, coded):
    with force(name):
        run = Run(kind, coded, torch.float32, shapes=((3, 100), (256,)))
        torch.library.opcheck(ops.optim_step.overload, run.arguments())
        run.steps, run.flag = torch.ones(9, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        torch.library.opcheck(ops.optim_step.overload, run.arguments())
        torch.library.opcheck(ops.optim_check.overload, (run.grads, run.steps, run.flag, run.slots))


def with_item(name, i, change):
    """Changes one item of a list of the operands."""

    def apply(run):
        values = getattr(run, name)
        values[i] = change(run, values[i])

    return apply


def with_value(name, change):
    return lambda run: setattr(run, name, change(getattr(run, name)))


WRONG = {
    "kind": (with_value("kind", lambda kind: "sgd"), ValueError, "kind: found 'sgd'"),
    "a grad too many": (lambda r: r.grads.append(r.grads[0]), ValueError, "grads: found 3"),
    "a grad of another shape": (with_item("grads", 1, lambda r, g: r.grads[0]), ValueError, r"grads\[1\]: found shape"),
    "a grad of another dtype": (with_item("grads", 0, lambda r, g: g.double()), TypeError, r"grads\[0\]: found torch.float64"),
    "a param of another dtype": (with_item("params", 1, lambda r, p: p.half()), TypeError, r"params\[1\]: found torch.float16"),
    "a param with strides": (with_item("params", 0, lambda r, p: p.T.contiguous().T), ValueError, r"params\[0\]: found strides"),
    "an offset": (with_item("offsets", 1, lambda r, o: o + 1), ValueError, r"offsets\[1\]"),
    "an offset beyond": (with_item("offsets", 1, lambda r, o: r.state1.numel()), ValueError, r"offsets\[1\]"),
    "a negative offset": (with_item("offsets", 0, lambda r, o: -256), ValueError, r"offsets\[0\]"),
    "too few offsets": (lambda r: r.offsets.pop(), ValueError, "offsets: found 1"),
    "hyper_of": (with_item("hyper_of", 0, lambda r, h: 9), ValueError, "hyper_of: found"),
    "hypers": (lambda r: r.hypers.pop(), ValueError, "hyper_of: found"),
    "no state2": (with_value("state2", lambda t: None), ValueError, "state2: found none"),
    "no absmax2": (with_value("absmax2", lambda t: None), ValueError, "absmax2: found none"),
    "codes as float": (with_value("state1", lambda t: t.float()), TypeError, "state1: found torch.float32"),
    "absmax too short": (with_value("absmax1", lambda t: t[1:]), ValueError, "absmax1: found"),
    "flag alone": (with_value("flag", lambda t: torch.zeros(1, dtype=torch.int32)), ValueError, "steps and flag belong together"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_refused(kernels, what):
    change, error, message = WRONG[what]
    run = Run("adamw", True, torch.float32, shapes=((3, 100), (256,)), sets=SETS[:2])
    change(run)
    before = [b.clone() for b in run.param_buffers]
    with pytest.raises(error, match=message):
        run.step()
    assert all(map(same_bytes, run.param_buffers, before))


def test_what_does_not_fit_the_check_or_the_rounding_is_refused(kernels):
    run = Run("adamw", True, torch.float32, shapes=((3, 100), (256,)))
    with pytest.raises(TypeError, match="seed: found parameters of torch.float32"):
        run.step(3)
    with pytest.raises(ValueError, match="origin: found 100"):
        run.step(origin=100)
    steps, flag = torch.zeros(3, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    for slots in ([0], [0, 0], [0, 3], [-1, 0]):
        with pytest.raises(ValueError, match="slots: found"), torch.no_grad():
            ops.optim_check(run.grads, steps, flag, slots)
    with pytest.raises(TypeError, match="flag: found torch.float32"), torch.no_grad():
        ops.optim_check(run.grads, steps, flag.float(), [0, 1])


# ---- others


@pytest.mark.parametrize("name", KERNELS)
def test_adamw_is_torchs(name):
    """T5: 200 steps of float32 states, every hyper-parameter away from its default."""
    lr, beta1, beta2, eps, decay = 3e-3, 0.8, 0.95, 1e-6, 0.1
    g = torch.Generator().manual_seed(3)
    run = Run("adamw", False, torch.float32, shapes=((30, 17), (700,)), sets=((lr, beta1, beta2, eps, decay, 1.0),))
    theirs = [p.clone().requires_grad_() for p in run.params]
    for t in (run.state1, run.state2):
        t.zero_()
    optimizer = torch.optim.AdamW(theirs, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay)
    with force(name):
        for step in range(1, 201):
            for mine, p in zip(run.grads, theirs, strict=True):
                p.grad = torch.randn(p.shape, generator=g)
                mine.copy_(p.grad)
            run.hypers[5] = float(step)
            run.step()
            optimizer.step()
    for p, q in zip(run.params, theirs, strict=True):
        torch.testing.assert_close(p, q.detach(), rtol=1e-5, atol=1e-6)


BNB = (3e-3, 0.8, 0.95, 1e-6, 0.1)


def beside_bitsandbytes(dtype, their_step, look):
    """12 steps of 32768 parameters, each from the states and parameters that bitsandbytes has.

    their_step: param, grad, step -> (code1, code2, absmax1, absmax2) after it; look: called after each with mine, theirs,
    both absmax, and the values that were to be coded, in float64.
    """
    g = torch.Generator().manual_seed(4)
    run = Run("adamw", True, dtype, shapes=((64, 512),), sets=((*BNB, 1.0),))
    p, numel = torch.nn.Parameter(run.params[0].clone()), 64 * 512
    states = [t[BLOCK : BLOCK + numel].zero_() for t in (run.state1, run.state2)]
    scales = [t[1 : 1 + numel // BLOCK].zero_() for t in (run.absmax1, run.absmax2)]
    for step in range(1, 13):
        p.grad = (torch.randn(p.shape, generator=g) * 0.01).to(dtype)
        run.grads[0].copy_(p.grad)
        run.hypers[5] = float(step)
        codes = ("dynamic", "unsigned_dynamic")
        old = zip(codes, states, scales, strict=True)
        m, v = (codebook(c)[s.int()].double() * a.double().repeat_interleave(BLOCK) for c, s, a in old)
        grad = p.grad.double().view(-1)
        truth = m * BNB[1] + grad * (1 - BNB[1]), v * BNB[2] + grad * grad * (1 - BNB[2])
        run.step()
        found = their_step(p, p.grad, step)
        for i, code in enumerate(codes):
            theirs, absmax = found[i].view(-1), found[i + 2]
            torch.testing.assert_close(scales[i], absmax, rtol=1e-6, atol=0)
            look(states[i].clone(), theirs, absmax.double().repeat_interleave(BLOCK), codebook(code).double(), truth[i])
            states[i].copy_(theirs), scales[i].copy_(absmax)
        torch.testing.assert_close(run.params[0], p.detach(), rtol=2e-6 if dtype == torch.float32 else 2**-7, atol=1e-6)
        run.params[0].copy_(p.detach())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_codes_are_those_of_bitsandbytes_nearest(cpu, dtype, figures):
    """Its step in torch, which takes the nearest code; its sums are rounded in other places."""
    pytest.importorskip("bitsandbytes")
    kernels_optim = pytest.importorskip("bitsandbytes.backends.triton.kernels_optim")
    state = torch.zeros(2, 64 * 512, dtype=torch.uint8), torch.zeros(2, 128)
    lr, beta1, beta2, eps, decay = BNB

    def their_step(p, grad, step):
        kernels_optim.optimizer_update_8bit_blockwise_pytorch(
            p.detach().view(-1), grad.view(-1), *state[0], beta1, beta2, 0.0, 0.0, eps, step, lr,
            codebook("dynamic"), codebook("unsigned_dynamic"), *state[1], decay, 1.0, False, optimizer_name="adam",
        )  # fmt: skip
        return *state[0], *state[1]

    counts = [0, 0]

    def look(mine, theirs, absmax, values, truth):
        apart = (mine.int() - theirs.int()).abs()
        assert int(apart.max()) <= 1
        counts[0], counts[1] = counts[0] + int(apart.sum()), counts[1] + apart.numel()

    beside_bitsandbytes(dtype, their_step, look)
    figures["8-bit codes of AdamW compared with bitsandbytes'"] += counts[1]
    figures["8-bit codes of AdamW one beside bitsandbytes'"] += counts[0]
    assert counts[0] <= 1e-4 * counts[1]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_codes_are_never_farther_than_adamw8bits(cpu, dtype, figures):
    """On a CPU that optimizer finds codes in a table of its own, up to some codes beside the nearest."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    lr, beta1, beta2, eps, decay = BNB
    made = []

    def their_step(p, grad, step):
        if not made:
            options = {"lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": decay, "min_8bit_size": 0}
            made.append(bitsandbytes.optim.AdamW8bit([p], **options))
        made[0].step()
        return [made[0].state[p][name] for name in ("state1", "state2", "absmax1", "absmax2")]

    def look(mine, theirs, absmax, values, truth):
        error, error_theirs = ((values[c.int()] * absmax - truth).abs() for c in (mine, theirs))
        assert bool((error <= error_theirs + 1e-6 * absmax).all())
        figures["8-bit codes of AdamW nearer than AdamW8bit's"] += int((mine != theirs).sum())
        figures["8-bit codes of AdamW that AdamW8bit has too"] += int((mine == theirs).sum())
        assert bool(((mine.int() - theirs.int()).abs() <= 8).all())

    with torch.compiler.set_stance("force_eager"):
        beside_bitsandbytes(dtype, their_step, look)
