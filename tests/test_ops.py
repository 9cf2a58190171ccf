"""The ops: schema, fake, dispatch and autograd as torch checks them; gradients in float64; torch.compile; dropout's bits."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nf4lora import autograd, backends, dropout, linear_4bit, ops, quantize_4bit, reference
from nf4lora.abi import CUDA_FUNCTIONS
from nf4lora.testing import random_case

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NAMES = (
    "quantize", "quantize_absmax", "dequantize", "linear_fwd", "linear_bwd", "lora_bwd", "group_fwd", "group_bwd",
    "group_lora_bwd", "linear_grads", "group_grads", "swiglu_fwd", "swiglu_bwd",
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


def samples(name):
    """Arguments of the op, every kind of them."""
    for dtype in FLOATS:
        for nested in (False, True):
            for r, p in ((0, 0.0), (3, 0.0), (3, 0.1)):
                case = random_case(4, 12, 33, r, dtype, adapter_dtype=(torch.float32, dtype)[nested], bias=nested, nested=nested)
                state, seed = case.state, case.seed if p else None
                weight = case.packed, state.absmax, state.nested_absmax, state.offset
                xa, dyb = torch.randn(4, r).to(dtype), torch.randn(4, r).to(dtype) if r else None
                x, dy = (t.reshape(2, 2, -1) if nested else t for t in (case.x, case.dy))
                if name == "quantize":
                    yield case.x, 64, "nf4"
                elif name == "quantize_absmax":
                    yield torch.rand(300), torch.tensor(0.5)
                elif name == "dequantize":
                    yield *weight, [12, 33], 64, "nf4", dtype
                elif name == "linear_fwd":
                    yield x, *weight, case.bias, case.lora_A, case.lora_B, seed, 12, 64, "nf4", 2.0, p
                elif name == "linear_bwd":
                    yield case.dy, *weight, case.lora_A, dyb, seed, 33, 64, "nf4", p
                elif name == "lora_bwd" and r:
                    yield case.dy, case.x, xa, case.lora_A, case.lora_B, seed, 2.0, p, True, not nested
                elif name == "linear_grads":
                    need = (True, bool(r), bool(r) and not nested)
                    yield dy, x, xa, *weight, case.lora_A, case.lora_B, seed, 33, 64, "nf4", 2.0, p, *need
                elif name.startswith("group"):
                    yield from group_samples(name, case, seed, p)
                elif name == "swiglu_fwd" and not r:
                    yield (dy,)
                elif name == "swiglu_bwd" and not r:
                    yield dy, dy[..., ::2].contiguous()


def group_samples(name, case, seed, p):
    """The op of a group of two: the case, and itself again."""
    state, r = case.state, 0 if case.lora_A is None else case.lora_A.shape[0]
    weights, bias, A, B = (
        [[] if t is None else [t, t.clone()] for t in tensors]
        for tensors in ((case.packed, state.absmax, state.nested_absmax, state.offset), (case.bias,), (case.lora_A,), (case.lora_B,))
    )
    dy, side = torch.cat((case.dy, case.dy), 1), torch.randn(4, 2 * r).to(case.x.dtype)
    x = case.x.reshape(2, 2, -1) if case.bias is not None else case.x
    if name == "group_fwd":
        yield x, *weights, *bias, *A, *B, seed, [12, 12], 64, "nf4", [2.0, 0.5], p
    elif name == "group_bwd":
        yield dy, *weights, *A, side if r else None, seed, [12, 12], 33, 64, "nf4", p
    elif name == "group_grads":
        dys, need = [case.dy, case.dy.clone()] if r else [dy], (bool(r), bool(r), case.bias is None and bool(r))
        yield [t.reshape(*x.shape[:-1], -1) for t in dys], x, side, *weights, *A, *B, seed, [12, 12], 33, 64, "nf4", [2.0, 0.5], p, *need
    elif r:
        yield dy, case.x, side, *A, *B, seed, [2.0, 0.5], p, True, case.bias is None


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(backend, name):
    for args in list(samples(name))[:: 5 if backend == "cpu" else 11]:
        torch.library.opcheck(getattr(ops, name).overload, args)  # all of torch's test utilities


def test_opcheck_of_an_op_in_place(backend):
    for *weight, _, blocksize, quant_type, dtype in list(samples("dequantize"))[::3]:
        torch.library.opcheck(ops.dequantize_into.overload, (*weight, blocksize, quant_type, torch.zeros(12, 33, dtype=dtype)))


def tensors_of(outputs):
    """An op's outputs in a row, those of lists too."""
    for out in outputs if isinstance(outputs, (tuple, list)) else (outputs,):
        yield from tensors_of(out) if isinstance(out, (tuple, list)) else (out,)


def mapped(f, args):
    """The arguments of an op with f of each tensor, those of lists too."""
    return [f(a) if isinstance(a, torch.Tensor) else mapped(f, a) if isinstance(a, list) else a for a in args]


@pytest.mark.parametrize("name", CUDA_FUNCTIONS)
def test_opcheck_through_the_kernels_of_a_gpu(kernels, name):
    for args in list(samples(name))[::7]:
        torch.library.opcheck(getattr(ops, name).overload, args)


@pytest.mark.parametrize("name", NAMES)
def test_fakes_say_shape_dtype_and_strides(backend, name):
    for args in samples(name):
        real = getattr(ops, name)(*args)
        with FakeTensorMode() as mode:
            fake = getattr(ops, name)(*mapped(mode.from_tensor, args))
        for f, t in zip(tensors_of(fake), tensors_of(real), strict=True):
            assert (f.shape, f.dtype, f.stride(), f.device) == (t.shape, t.dtype, t.stride(), t.device)
            assert all(t.untyped_storage().data_ptr() != a.untyped_storage().data_ptr() or not t.numel()
                       for a in tensors_of(args) if isinstance(a, torch.Tensor) and a.numel()), "an output aliases an input"  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_an_op_runs_on_meta(name):
    for args in samples(name):
        out = getattr(ops, name)(*mapped(lambda t: t.to("meta"), args))
        assert all(t.is_meta for t in tensors_of(out))


def double(r=3, p=0.0, bias=True):
    case = random_case(5, 12, 64, r, torch.float32, bias=bias, dropout_p=p)
    leaves = [None if t is None else t.double().requires_grad_() for t in (case.x, case.bias, case.lora_A, case.lora_B)]

    def f(x, bias, A, B):
        state = case.state
        return autograd.linear(
            x, case.packed, state.absmax, state.nested_absmax, state.offset, bias, A, B, case.seed if p else None, 12, 64, "nf4", 2.0, p
        )

    return f, leaves


@pytest.mark.parametrize(("r", "p", "bias"), [(0, 0.0, False), (0, 0.0, True), (3, 0.0, True), (3, 0.4, True), (1, 0.4, False)])
def test_gradcheck(r, p, bias):
    f, leaves = double(r, p, bias)
    with backends.use_backend("reference"):
        assert torch.autograd.gradcheck(f, leaves, fast_mode=False)


def test_row_39_double_backward_is_refused(backend):
    case = random_case(5, 12, 64, 3, dropout_p=0.1)
    leaves = [t.requires_grad_() for t in (case.x, case.bias, case.lora_A, case.lora_B)]
    x, bias, A, B = leaves
    y = linear_4bit(x, case.packed, case.state, bias, A, B, 2.0, 0.1, case.seed)
    gradients = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(g.sum() for g in gradients).backward()


def test_row_39_backward_twice_and_changed_inputs(backend):
    case = random_case(5, 12, 64, 3)
    x, A, B = (t.clone().requires_grad_() for t in (case.x, case.lora_A, case.lora_B))
    y = linear_4bit(x, case.packed, case.state, None, A, B)
    y.backward(case.dy, retain_graph=True)
    first = x.grad.clone()
    y.backward(case.dy)
    assert torch.equal(x.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward(case.dy)
    y = linear_4bit(x, case.packed, case.state, None, A, B)
    with torch.no_grad():
        A.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(case.dy)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dynamic", [False, True])
def test_row_35_compiled_equals_eager(cpu, dynamic, p):
    state = random_case(1, 12, 64).state

    def f(x, packed, absmax, nested_absmax, offset, bias, A, B, seed):
        y = autograd.linear(
            torch.sin(x), packed, absmax, nested_absmax, offset, bias, A, B, seed, 12, state.blocksize, state.quant_type, 2.0, p
        )
        return torch.cos(y)

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for dtype in (torch.float32, torch.bfloat16):
        for M in (5, 9, 17) if dynamic else (5,):
            case = random_case(M, 12, 64, 3, dtype)
            s = case.state
            results = []
            for call in (f, compiled):
                x, bias, A, B = (t.clone().requires_grad_() for t in (case.x, case.bias, case.lora_A, case.lora_B))
                y = call(x, case.packed, s.absmax, s.nested_absmax, s.offset, bias, A, B, case.seed if p else None)
                y.backward(case.dy)
                results.append((y, x.grad, bias.grad, A.grad, B.grad))
            assert all(map(torch.equal, *results))


def test_autocast_does_not_reach_into_the_ops(backend):
    case = random_case(5, 12, 64, 3)
    args = case.x, case.packed, case.state.absmax, case.state.nested_absmax, case.state.offset, case.bias, case.lora_A, case.lora_B, None, 12, 64, "nf4", 2.0, 0.0
    plain = ops.linear_fwd(*args)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, ops.linear_fwd(*args), plain))


def philox_one_block(counter, key):
    """Random123's philox4x32-10 written out in Python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_philox_known_answers():
    ones = 0xFFFFFFFF
    # Random123's kat_vectors, for the Python integers that judge the rest
    assert philox_one_block([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox_one_block([ones] * 4, [ones] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert philox_one_block([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0]) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]
    for seed in (0, 1, -1, 2**63 - 1, -(2**63), 0x299F31D0A4093822):
        counters = torch.tensor([0, 1, 2**31, 2**32 - 1, 2**32, 2**62])
        words = dropout.philox(counters, torch.tensor(seed))
        key = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
        for c, found in zip(counters.tolist(), words.tolist(), strict=True):
            assert found == philox_one_block([c & 0xFFFFFFFF, c >> 32, 0, 0], key)


def mask_of(backend, M, K, seed, p):
    """The factors dropout multiplies by, out of each kernel: y of W = 0 and A = I, dx of dyb = I, dA of dyb = I."""
    packed, state = quantize_4bit(torch.zeros(K, K))
    eye, seed = torch.eye(K), torch.tensor([seed])
    weight = packed, state.absmax, None, None
    with backends.use_backend(backend):
        _, xa = ops.linear_fwd(torch.ones(M, K), *weight, None, eye, eye, seed, K, 64, "nf4", 1.0, p)
        dx = ops.linear_bwd(torch.zeros(M, K), *weight, torch.ones(1, K), torch.ones(M, 1), seed, K, 64, "nf4", p)
        _, dA, _ = ops.lora_bwd(torch.eye(M), torch.ones(M, K), torch.ones(M, M), torch.zeros(M, K), torch.eye(M), seed, 1.0, p, True, False)
    return xa, dx, dA


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9, 1e-7, 1 - 2**-24])
def test_dropout_is_one_mask_bit_for_bit_in_every_kernel(p):
    for M, K in ((1, 1), (1, 5), (3, 33), (20, 130), (70, 67)):
        for seed in (0, 1, -1, 2**62 + 12345):
            wanted = reference.dropout(torch.ones(M, K), torch.tensor([seed]), p)
            for backend in ("cpu", "reference"):
                assert all(torch.equal(found, wanted) for found in mask_of(backend, M, K, seed, p)), (backend, M, K, seed)


@pytest.mark.parametrize("p", [0.0, 0.05, 0.1, 0.5, 0.9])
def test_dropout_keeps_1_minus_p(p):
    n = 1 << 20
    kept = reference.dropout(torch.ones(1024, n // 1024), torch.tensor([7]), p)
    factor = torch.tensor(1.0) / (1.0 - torch.tensor(p))
    assert set(kept.unique().tolist()) <= {0.0, factor.item()}
    fraction = (kept != 0).double().mean().item()
    assert abs(fraction - (1 - p)) <= 6 * (p * (1 - p) / n) ** 0.5 + 1e-12
    rows = (kept != 0).double()
    for axis in (0, 1):  # no row and no column far from the rest
        assert (rows.mean(axis) - (1 - p)).abs().max() <= 7 * (p * (1 - p) / 1024) ** 0.5 + 1e-12


def test_dropout_differs_between_seeds_and_not_between_calls():
    x = torch.ones(64, 64)
    one, again, other = (reference.dropout(x, torch.tensor([s]), 0.5) for s in (1, 1, 2))
    assert torch.equal(one, again) and 0.4 < (one != other).double().mean() < 0.6


def test_dropout_reaches_the_lora_branch_only(backend):
    case = random_case(20, 33, 65, 3, dropout_p=0.0)
    zero = torch.zeros_like(case.lora_B)
    base = linear_4bit(case.x, case.packed, case.state, case.bias)
    y = linear_4bit(case.x, case.packed, case.state, case.bias, case.lora_A, zero, 2.0, 0.5, case.seed)
    assert torch.equal(y, base)
    assert torch.equal(
        linear_4bit(case.x, case.packed, case.state, None, case.lora_A, case.lora_B, 2.0, 0.0, case.seed),
        linear_4bit(case.x, case.packed, case.state, None, case.lora_A, case.lora_B, 2.0),
    )
