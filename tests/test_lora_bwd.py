"""The adapters' backward on CUDA beyond what the ops ask of it: dy member by member, each with a stride of its own; dy_ext,
which copies dy beside dyb for the library's product; dx from the adapters. Exact operands, on the host machine: every output
starts as NaN between guard bytes, and operands of rows wider than they hold are NaN there."""

import itertools
import os
import random

import pytest
import torch
from cuda_on_host import backend
from under_test import force

from nf4lora import reference
from nf4lora.abi import Dropout, GroupBwdParams, GroupLoraBwdParams
from nf4lora.cuda_launch import Launch, members
from nf4lora.native import _code
from nf4lora.testing import assert_exact

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
CASES = "T1: integer-exact cases of the adapters' backward with dy_ext and dx"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def machine():
    with force("cuda_on_host"):
        yield backend.machine(os.environ.get("CUDA_ON_HOST", "checker"))


class Case:
    """Operands whose sums are exact in float32, and what the kernels give for them.

    pads: columns by which the rows of each member's dy are longer than it, one of them before its first.
    """

    def __init__(self, M, N, K, ranks, dtype, adapter_dtype=torch.float32, p=0.0, pads=(), seed=0):
        g = torch.Generator().manual_seed(seed)

        def integers(*shape, high):
            return torch.randint(-high, high + 1, shape, generator=g).to(torch.float32)

        def sparse(rows, columns):
            return integers(rows, columns, high=1) * (torch.rand(rows, columns, generator=g) < 8 / max(rows, columns))

        self.M, self.N, self.K, self.ranks, self.r, self.dtype = M, N, K, ranks, sum(ranks), dtype
        self.scaling = [(0.5, 1.0, 2.0)[i] for i in range(len(N))]
        self.x = integers(M, K, high=4).to(dtype)
        self.dy = [integers(M, n, high=2).to(dtype) for n in N]
        self.xa = integers(M, self.r, high=2).to(dtype)
        self.A = [sparse(r, K).to(adapter_dtype) for r in ranks]
        self.B = [sparse(n, r).to(adapter_dtype) for n, r in zip(N, ranks, strict=True)]
        self.p, self.seed = p, torch.tensor([seed + 1]) if p else None
        self.pads = pads

    def given(self):
        """dy as the kernels get it: columns of one matrix, or of a matrix each that is NaN elsewhere."""
        if not self.pads:
            whole = torch.cat(self.dy, 1)
            return [whole], list(whole.split(self.N, 1))
        wholes = [torch.full((self.M, n + pad), torch.nan, dtype=self.dtype) for n, pad in zip(self.N, self.pads, strict=True)]
        slices = [w[:, min(pad, 1) : min(pad, 1) + n] for w, n, pad in zip(wholes, self.N, self.pads, strict=True)]
        for to, dy in zip(slices, self.dy, strict=True):
            to.copy_(dy)
        return wholes, slices

    def run(self, machine, split=1, ext=None, dx=False, dA=True, dB=True):
        """ext: None, "dy" (copies alone) or "dyb". Returns dyb, dA, dB, dy_ext, dx."""
        M, N, total, like = self.M, self.N, sum(self.N), self.x
        ld = -(-(total + self.r) // 8) * 8 if ext == "dyb" else total
        wholes, slices = self.given()
        out = {
            "dyb": machine.empty(like, (M, self.r), self.dtype), "dy_ext": machine.empty(like, (M, ld), self.dtype) if ext else None,
            "dx": machine.empty(like, (M, self.K), self.dtype) if dx else None,
        }  # fmt: skip
        dAs = [machine.empty(A, A.shape, A.dtype) for A in self.A] if dA else []
        dBs = [machine.empty(B, B.shape, B.dtype) for B in self.B] if dB else []
        each = members(machine, [], [], [], [], N, self.K, 0, "nf4", lora_A=self.A if dx else [], lora_B=self.B, dA=dAs, dB=dBs,
                       r=self.ranks, scaling=self.scaling)  # fmt: skip
        for whole in wholes:
            machine.pointer(whole)
        for member, rows, dy in zip(each, N, slices, strict=False):
            member.w.rows, member.dy, member.ld_dy = rows, dy.data_ptr(), dy.stride(0)
        params = GroupLoraBwdParams(
            each, *map(machine.pointer, (self.x if dA else None, self.xa if dB else None, out["dyb"], out["dy_ext"], out["dx"])),
            None, None, len(N), M, total, self.K, self.r, ld, _code(self.x), _code(self.A[0]), _code(self.B[0]), split,
            Dropout(machine.pointer(self.seed), self.p),
        )  # fmt: skip
        Launch(machine, "lora_bwd", params, True)(params, like)
        return out["dyb"], dAs, dBs, out["dy_ext"], out["dx"]

    def dx_alone(self, machine, dyb):
        """What linear_bwd's DENSE path gives, which has no other launch to make it."""
        dx = machine.empty(dyb, (self.M, self.K), dyb.dtype)
        decoded = machine.empty(dyb, (sum(self.N), self.K), dyb.dtype)
        packed = [torch.zeros(-(-n * self.K // 2), dtype=torch.uint8) for n in self.N]
        absmax = [torch.ones(-(-n * self.K // 64)) for n in self.N]
        each = members(machine, packed, absmax, [], [], self.N, self.K, 64, "nf4", lora_A=self.A, r=self.ranks)
        params = GroupBwdParams(each, *map(machine.pointer, (None, dyb, dx, decoded)), None, None, len(self.N), self.M, sum(self.N),
                                self.K, self.r, sum(self.N), _code(dyb), _code(self.A[0]), Dropout(machine.pointer(self.seed), self.p))  # fmt: skip
        params.config.path, params.config.split = 3, 2
        Launch(machine, "linear_bwd", params, True)(params, dyb)
        return dx

    def check(self, machine, split=1, ext=None, dx=False, dA=True, dB=True):
        dyb, dAs, dBs, dy_ext, found_dx = self.run(machine, split, ext, dx, dA, dB)
        wanted = [torch.cat([s * (d.float() @ B.float()) for s, d, B in zip(self.scaling, self.dy, self.B, strict=True)], 1).to(self.dtype)]
        assert_exact(dyb, wanted[0], "dyb")
        parts = dyb.split(list(self.ranks), 1)
        if dA:
            dropped = reference.dropout(self.x, self.seed, self.p)
            for found, part in zip(dAs, parts, strict=True):
                assert_exact(found, (part.float().T @ dropped.float()).to(found.dtype), "dA")
        if dB:
            for found, dy, xa, s in zip(dBs, self.dy, self.xa.split(list(self.ranks), 1), self.scaling, strict=True):
                assert_exact(found, (s * (dy.float().T @ xa.float())).to(found.dtype), "dB")
        if ext:
            columns = [*self.dy, dyb, torch.zeros(self.M, -(sum(self.N) + self.r) % 8, dtype=self.dtype)] if ext == "dyb" else self.dy
            assert_exact(dy_ext, torch.cat(columns, 1), "dy_ext")
        if dx:
            branch = sum(part.float() @ A.float() for part, A in zip(parts, self.A, strict=True))
            assert_exact(found_dx, reference.dropout(branch, self.seed, self.p).to(self.dtype), "dx")


RANKS = ((1,), (8,), (16,), (17,), (32,), (33,), (64,), (65,), (5, 3), (16, 16), (24, 40), (1, 33, 2), (8, 8, 8), (16, 32, 16), (40, 70, 3), (256,))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_every_rank(machine, ranks, dtype, figures):
    """Slabs and chunks of a member, members that end inside a piece, every split; what is wanted and what is not."""
    draw = random.Random(f"{ranks} {dtype}")
    for ext, dx in (None, True), ("dy", draw.random() < 0.5), ("dyb", False), ("dyb", True):
        M, K = draw.choice([1, 40, 64, 70, 130, 200]), draw.choice([8, 33, 136, 264, 270])
        N = [draw.choice([1, 7, 64, 72, 130, 256, 264, 520]) for _ in ranks]
        case = Case(M, N, K, ranks, dtype, draw.choice(FLOATS), draw.choice([0.0, 0.5]), seed=draw.randrange(1000))
        case.check(machine, draw.choice([1, 2, 5]), ext, dx, dB=draw.random() < 0.7)
        figures[CASES] += 1


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("pads", [(0, 0, 0), (8, 16, 8), (1, 0, 9), (0, 3, 2)], ids=str)
@pytest.mark.parametrize("ranks", [(4, 8, 3), (40, 8, 16)], ids=str)
def test_every_stride_of_dy(machine, ranks, pads, dtype, figures):
    """Each member's dy in a matrix of its own: aligned, at an odd column, in rows of odd length, wide and narrow in one group."""
    for i, N in enumerate(([64, 8, 24], [264, 9, 16], [520, 72, 257])[: 1 if dtype == torch.float32 else 3]):
        case = Case(70, N, 72, ranks, dtype, p=(0.0, 0.5)[i % 2], pads=pads, seed=i)
        for ext in (None, "dy", "dyb"):
            case.check(machine, 2, ext, dx=ext is None)
            figures[CASES] += 1


def test_a_piece_never_reaches_into_the_next_column(machine, figures):
    """The last columns of an aligned slice of a wider matrix, whose neighbours are NaN."""
    for n in (1, 7, 8, 12, 263):
        Case(33, [n], 40, (8,), torch.bfloat16, pads=(16 - n % 8,), seed=n).check(machine, 1, "dyb", True)
        figures[CASES] += 1


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dx_has_the_bits_of_a_launch_of_its_own(machine, dtype, figures):
    """Beside dA or alone, dropped out or not: one sum in one order, rounded once."""
    g = torch.Generator().manual_seed(3)
    for ranks, p, K in (((16,), 0.1, 264), ((5, 7), 0.0, 33), ((64,), 0.3, 520), ((20, 21, 23), 0.7, 130), ((40, 60), 0.5, 264)):
        if dtype == torch.float32 and sum(ranks) > 16:
            continue
        case = Case(150, [40] * len(ranks), K, ranks, dtype, p=p)
        for t in (case.x, *case.dy, *case.A, *case.B):
            t.copy_(torch.randn(t.shape, generator=g))
        dyb, *_, dx = case.run(machine, 3, dx=True)
        assert torch.equal(dx, case.dx_alone(machine, dyb))
        assert torch.equal(dx, case.run(machine, 1, dx=True, dA=False)[-1])
        figures[CASES] += 1


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_equal_bits_every_time(machine, dtype):
    """Four schedules of the machine, several slabs, parts of the tokens."""
    g, before = torch.Generator().manual_seed(4), machine.seed
    case = Case(330, [520, 264], 264, (16, 5), dtype, p=0.1)
    for t in (case.x, *case.dy, *case.A, *case.B):
        t.copy_(torch.randn(t.shape, generator=g))
    found = []
    for seed in (0, 1, 2, 3, 1):
        machine.seed = seed
        dyb, dA, dB, dy_ext, dx = case.run(machine, 3, "dyb", True)
        found.append((dyb, *dA, *dB, dy_ext, dx))
    machine.seed = before
    assert all(torch.equal(a, b) for other in found for a, b in zip(other, found[0], strict=True))


def test_no_tokens_and_one(machine, figures):
    for M, dtype in itertools.product((0, 1), FLOATS):
        for ranks in ((4,), (40,), (70,)):
            Case(M, [24], 40, ranks, dtype, p=0.5).check(machine, 2, "dyb", True)
            figures[CASES] += 1
