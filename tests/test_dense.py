"""The DENSE path: a group's weights decoded into one matrix, bit-equal to the reference, with the adapters beside or below
them for one product of the library; and the linear through it."""

import itertools
import os
import random

import pytest
import torch
from cuda_on_host import backend
from under_test import force

from nf4lora import backends, heuristics, ops, quantize_4bit, reference
from nf4lora.abi import CudaConfig, GroupBwdParams
from nf4lora.codebook import BLOCKSIZES, QUANT_TYPES
from nf4lora.cuda_launch import members
from nf4lora.native import _code
from nf4lora.testing import assert_exact, check_error_ratio, check_exact, exact_case, random_case

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
ELEMENTS = "elements decoded by the DENSE path, bit-equal"
CASES = "T1: integer-exact cases through the DENSE path"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def dense():
    with force("cuda_on_host"), backends.use_backend("cuda_on_host", path="dense"):
        yield


@pytest.fixture
def outputs(monkeypatch):
    """What the kernels are given to write to, the call's last."""
    made, empty = [], backend.Machine.empty
    monkeypatch.setattr(backend.Machine, "empty", lambda self, *args: made.append(empty(self, *args)) or made[-1])
    return made


@pytest.fixture(params=[False, True], ids=["apart", "extended"])
def extend(request, monkeypatch):
    """Whether the adapters are part of the library's product."""
    for chooser in ("cuda_extend_fwd", "cuda_extend_bwd"):
        monkeypatch.setattr(heuristics, chooser, lambda N, K: request.param)
    return request.param


class Group:
    """Members with weights [N_i, K] and, where ranks are given, adapters; the arguments of the group's ops."""

    def __init__(self, N, K, dtype, blocksize=64, quant_type="nf4", nested=True, ranks=(), adapter_dtype=torch.float32, shift=0):
        g = torch.Generator().manual_seed(sum(N) * K)
        self.N, self.K, self.dtype, self.format, self.r = N, K, dtype, (blocksize, quant_type), sum(ranks)
        made = [quantize_4bit(torch.randn(n, K, generator=g), blocksize, nested, quant_type) for n in N]
        self.packed = [shifted(packed, shift) for packed, _ in made]
        self.absmax = [state.absmax for _, state in made]
        self.nested = [[state.nested_absmax for _, state in made], [state.offset for _, state in made]] if nested else [[], []]
        self.A = [torch.randn(r, K, generator=g).to(adapter_dtype) for r in ranks]
        self.B = [torch.randn(n, r, generator=g).to(adapter_dtype) for n, r in zip(N, ranks, strict=bool(ranks))] if ranks else []
        self.scaling = [0.3, 1.7, 2.0][: len(N)]
        self.weight = torch.cat([
            reference.dequantize(self.packed[i], self.absmax[i], *(s[i] if s else None for s in self.nested), [n, K], *self.format, dtype)
            for i, n in enumerate(N)
        ])  # fmt: skip

    def forward(self, x):
        return ops.group_fwd(x, self.packed, self.absmax, *self.nested, [], self.A, self.B, None, self.N, *self.format, self.scaling, 0.0)[0]

    def backward(self, dy, dyb=None):
        return ops.group_bwd(dy, self.packed, self.absmax, *self.nested, self.A, dyb, None, self.N, self.K, *self.format, 0.0)

    def decoded_with_A(self):
        """What linear_bwd leaves for a product with dy | dyb | zeros."""
        machine, total = backend.machine(os.environ.get("CUDA_ON_HOST", "checker")), sum(self.N)
        decoded = machine.empty(self.weight, (-(-(total + self.r) // 8) * 8, self.K), self.dtype)
        each = members(machine, self.packed, self.absmax, *self.nested, self.N, self.K, *self.format,
                       lora_A=self.A, r=[A.shape[0] for A in self.A])  # fmt: skip
        params = GroupBwdParams(each, decoded=machine.pointer(decoded), count=len(self.N), M=2, N=total, K=self.K, r=self.r,
                                ld=len(decoded), dy_dtype=_code(decoded), A_dtype=_code(self.A[0]),
                                config=CudaConfig(heuristics.CudaPath.DENSE, split=3))  # fmt: skip
        machine.run("linear_bwd", params, decoded.device)
        return decoded

    def beside(self, columns):
        """[sum N, columns]: scaling_i * B_i in member i's columns of xa, one float32 product rounded once."""
        out, rank = torch.zeros(sum(self.N), columns, dtype=self.dtype), 0
        for rows, B, s in zip(out.split(self.N), self.B, self.scaling, strict=True):
            rows[:, rank : rank + B.shape[1]] = (torch.tensor(s, dtype=torch.float32) * B.float()).to(self.dtype)
            rank += B.shape[1]
        return out


def shifted(packed, start):
    """The bytes at another alignment, beside others."""
    memory = torch.full((len(packed) + 2 * start,), 0xA5, dtype=torch.uint8)
    return memory[start : start + len(packed)].unsqueeze(1).copy_(packed)


def check_probes(group, figures):
    """x = I gives W^T and dy = I gives W, to the bit."""
    K, rows = group.K, sum(group.N)
    assert torch.equal(group.forward(torch.eye(K, dtype=group.dtype)), group.weight.T)
    assert torch.equal(group.backward(torch.eye(rows, dtype=group.dtype)), group.weight)
    figures[ELEMENTS] += 2 * rows * K


SHAPES = (([1], 1), ([3], 5), ([70], 33), ([5], 130), ([2, 3], 7), ([64], 64), ([9, 1, 30], 24), ([40], 256), ([33, 66], 264),
          ([40, 33, 7], 256), ([32, 64], 512), ([17], 1032), ([3, 1, 2], 1000), ([130], 8), ([13], 4), ([20], 20))  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("nested", [False, True])
def test_every_shape(nested, dtype, figures):
    """Whole tiles and parts of one, one member and three, blocks that straddle rows and that do not, K that fits and that does not."""
    for N, K in SHAPES:
        check_probes(Group(N, K, dtype, nested=nested), figures)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_every_blocksize(blocksize, quant_type, figures):
    for i, (N, K) in enumerate((([40, 33], 264), ([9, 1], 33), ([5], 2056))):
        check_probes(Group(N, K, FLOATS[i % 2], blocksize, quant_type), figures)


@pytest.mark.parametrize("shift", [1, 2, 4, 6])
def test_every_alignment_of_the_codes(shift, figures):
    for dtype in FLOATS:
        check_probes(Group([33, 7], 264, dtype, shift=shift), figures)


def test_thread_blocks_do_not_change_the_bits(monkeypatch, figures):
    group = Group([40, 70, 33], 264, torch.bfloat16, ranks=(3, 4, 5))
    for resident in (1, 2, 3, 9, 64):
        monkeypatch.setattr(heuristics, "CUDA_DECODE_BLOCKS_PER_SM", resident)
        monkeypatch.setattr(heuristics, "CUDA_DEQUANTIZE_TILE", 8192 // resident)
        dy = torch.eye(143, dtype=torch.bfloat16)
        assert torch.equal(group.backward(dy, torch.zeros(143, 12, dtype=torch.bfloat16)), group.weight)
        figures[ELEMENTS] += group.weight.numel()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("adapter_dtype", FLOATS, ids=str)
def test_the_adapters_beside_and_below(monkeypatch, outputs, adapter_dtype, dtype, figures):
    for chooser in ("cuda_extend_fwd", "cuda_extend_bwd"):
        monkeypatch.setattr(heuristics, chooser, lambda N, K: True)
    for N, K, ranks in (([40], 264, (16,)), ([9, 1, 30], 24, (3, 1, 4)), ([33, 70], 256, (16, 8)), ([5, 4], 33, (2, 7)), ([3], 1000, (300,))):
        group = Group(N, K, dtype, ranks=ranks, adapter_dtype=adapter_dtype)
        group.forward(torch.randn(2, K).to(dtype))
        ld = -(-(K + group.r) // 8) * 8
        (decoded,) = [t for t in outputs if t.shape == (sum(N), ld)]
        assert_exact(decoded, torch.cat((group.weight, group.beside(ld - K)), 1))
        outputs.clear()
        below = torch.zeros(-(sum(N) + group.r) % 8, K, dtype=dtype)
        assert_exact(group.decoded_with_A(), torch.cat((group.weight, *(A.to(dtype) for A in group.A), below)))
        figures[ELEMENTS] += 2 * decoded.numel()


def drawn(draw, r, dtype, **fixed):
    sizes = {"M": draw.choice([1, 5, 33]), "N": draw.choice([1, 7, 64, 70, 130]), "K": draw.choice([1, 8, 33, 64, 130, 264])} | fixed
    return exact_case(
        **sizes, r=r, dtype=dtype, adapter_dtype=draw.choice(FLOATS), blocksize=draw.choice(BLOCKSIZES),
        quant_type=draw.choice(QUANT_TYPES), nested=draw.random() < 0.5, seed=draw.randrange(2**31),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_linear_without_an_adapter_is_exact(dtype, figures):
    draw = random.Random(str(dtype))
    for _ in range(12):
        check_exact(drawn(draw, 0, dtype))
        figures[CASES] += 1


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_linear_with_an_adapter_is_exact_where_one_product_rounds_once(extend, dtype, figures):
    """Apart, 16-bit results are rounded twice: the error ratio judges those."""
    draw = random.Random(f"{dtype} {extend}")
    for r in (1, 3, 8, 16, 17):
        if extend or dtype == torch.float32:
            check_exact(drawn(draw, r, dtype))
            figures[CASES] += 1
        else:
            check_error_ratio(random_case(33, 70, 264, r, dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_error_ratio(extend, dtype):
    for M, N, K, r, p in ((40, 96, 256, 16, 0.0), (33, 70, 130, 5, 0.5)):
        check_error_ratio(random_case(M, N, K, r, dtype, dropout_p=p, seed=M))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_groups_are_what_their_members_are(extend, dtype):
    """Exact operands: y of a group is its members', dx their sum, each as the reference has it."""
    for N in ([40, 24], [9, 1, 30]):
        cases = [exact_case(6, n, 136, 4, dtype, dtype, nested=True, seed=n) for n in N]
        args = [[c.packed for c in cases], *([getattr(c.state, f) for c in cases] for f in ("absmax", "nested_absmax", "offset"))]
        A, B, scaling = [c.lora_A for c in cases], [c.lora_B for c in cases], [c.scaling for c in cases]
        x, dy = cases[0].x, torch.cat([c.dy for c in cases], 1)
        dyb = torch.cat([reference.lora_bwd(c.dy, x, x, c.lora_A, c.lora_B, None, c.scaling, 0.0, False, False)[0] for c in cases], 1)
        bias = [c.bias for c in cases]
        forward = x, *args, bias, A, B, None, N, 64, "nf4", scaling, 0.0
        backward = dy, *args, A, dyb, None, N, 136, 64, "nf4", 0.0
        y, xa = ops.group_fwd(*forward)
        wanted, wanted_xa = reference.group_fwd(*forward)
        dx, wanted_dx = ops.group_bwd(*backward), reference.group_bwd(*backward)
        assert_exact(xa, wanted_xa)
        if extend or dtype == torch.float32:
            assert_exact(y, wanted)
            assert_exact(dx, wanted_dx)
        else:
            for found, exact in ((y, wanted), (dx, wanted_dx)):
                assert torch.allclose(found.float(), exact.float(), rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps * 256)


def test_no_tokens():
    for dtype, (M, r) in itertools.product(FLOATS, ((0, 0), (0, 3))):
        check_exact(exact_case(M, 33, 64, r, dtype))
