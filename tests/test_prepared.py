"""Calls that ops remember: what a remembered call depends on is in its signature, and nothing else is kept."""

import copy
import threading
import weakref
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.nn.utils import parametrize
from under_test import force

from nf4lora import backends, eager, native, ops
from nf4lora.cases import random_case
from nf4lora.eager import Op
from nf4lora.nn import NF4LoRALinear, NF4LoRALinearGroup

pytestmark = pytest.mark.usefixtures("one_thread")
M, N, K, R = 3, 64, 64, 64  # so that lora_A and lora_B are as wide as they are high

FRESH = ("dtype", "shape", "strides", "device", "neg", "memory")
KEPT = ("dtype", "shape", "address", "device", "contiguous", "neg")


@pytest.fixture(autouse=True)
def nothing_is_remembered(monkeypatch):
    monkeypatch.forget()


def operands(name):
    """The arguments of an op, by name."""
    case = random_case(M, N, K, R, torch.bfloat16, torch.bfloat16)
    state, x = case.state, case.x.reshape(1, M, K)
    weight = {"packed": case.packed, "absmax": state.absmax, "nested_absmax": state.nested_absmax, "offset": state.offset}
    adapter, format_ = (
        {"lora_A": case.lora_A, "lora_B": case.lora_B},
        {"blocksize": 64, "quant_type": "nf4", "scaling": 2.0, "dropout_p": 0.0},
    )
    saved = {"x": x, "xa": torch.ones(M, R, dtype=torch.bfloat16)}
    if name == "linear_fwd":
        return {"x": x, **weight, "bias": case.bias, **adapter, "seed": None, "N": N, **format_}
    if name == "linear_grads":
        need = {"need_dx": True, "need_dA": True, "need_dB": True}
        return {"dy": case.dy.reshape(1, M, N), **saved, **weight, **adapter, "seed": None, "K": K, **format_, **need}
    if name == "swiglu_bwd":
        return {"gate_up": torch.cat((x, x), -1), "dh": x.clone()}
    lists = {key: [t, t.clone()] for key, t in weight.items()}
    format_["scaling"] = [2.0, 0.5]
    other = [t.clone() for t in adapter.values()]
    lists |= {key: [t, o] for (key, t), o in zip(adapter.items(), other, strict=True)}
    return {"x": x, **lists, "bias": [case.bias, case.bias.clone()], "seed": None, "N": [N, N], **format_} if name == "group_fwd" else {
        "dy": [case.dy, case.dy.clone()], "x": case.x, "xa": torch.ones(M, 2 * R, dtype=torch.bfloat16), **lists, "seed": None,
        "N": [N, N], "K": K, **format_, "need_dx": True, "need_dA": True, "need_dB": True,
    }  # fmt: skip


def ordered(name, given):
    return [given[argument.name] for argument in getattr(ops, name).overload._schema.arguments]


def listed(outputs):
    return [t for out in outputs for t in (out if isinstance(out, (list, tuple)) else [out])]


def outcome(op, args, within=nullcontext):
    """What comes of a call: its outputs, or its error."""
    with torch.no_grad(), within():
        try:
            return [
                (t.dtype, t.device, t.contiguous().view(torch.uint8).tolist() if t.device.type == "cpu" else t.shape)
                for t in listed(op(*args))
            ]
        except Exception as error:  # noqa: BLE001
            return type(error), str(error)


def as_before(op):
    """The op without a memory."""
    return Op(op.overload, op.call, op.prepare, frozenset())


def but(**changes):
    """One argument changed: a value, or a function of what it was."""
    return lambda given: given | {key: change(given[key]) if callable(change) else change for key, change in changes.items()}


def second_but(**changes):
    """The same of the second member's."""
    return lambda given: given | {key: [given[key][0], change(given[key][1])] for key, change in changes.items()}


@contextmanager
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def meta(t):
    return t.to("meta")


class Change:
    """What is different in a second call: the arguments, or where it is made. `before` is done to the first call's, too."""

    def __init__(self, arguments=lambda given: given, within=nullcontext, before=lambda given: given, error=False):
        self.arguments, self.within, self.before, self.error = arguments, within, before, error


FORWARD = {
    "x's shape": Change(but(x=lambda x: x[:, :2].clone())),
    "x's rank": Change(but(x=lambda x: x[0])),
    "x's dtype": Change(but(x=lambda x: x.view(torch.float16))),
    "x's strides": Change(but(x=lambda x: x.mT.contiguous().mT)),
    "x's sign": Change(but(x=torch._neg_view)),
    "x on another device": Change(but(x=meta), error=True),
    "no x, on another device": Change(but(x=meta), before=but(x=lambda x: x[:, :0].clone()), error=True),
    "x without memory": Change(but(x=lambda x: torch._efficientzerotensor(tuple(x.shape), dtype=x.dtype))),
    "packed of other bytes": Change(but(packed=lambda t: t + 17)),
    "packed's dtype": Change(but(packed=lambda t: t.view(torch.int8)), error=True),
    "absmax not nested": Change(but(absmax=lambda t: torch.ones(t.shape), nested_absmax=None, offset=None)),
    "offset alone": Change(but(nested_absmax=None), error=True),
    "bias of other values": Change(but(bias=lambda t: t + 1)),
    "bias's dtype": Change(but(bias=lambda t: t.view(torch.float16))),
    "bias's sign": Change(but(bias=torch._neg_view)),
    "no bias": Change(but(bias=None)),
    "one element for a bias": Change(but(bias=lambda t: t[:1].expand(N)), error=True),
    "lora_A's shape": Change(but(lora_A=lambda t: t.view(2 * R, K // 2)), error=True),
    "lora_A transposed": Change(but(lora_A=lambda t: t.mT)),
    "lora_A of other values": Change(but(lora_A=lambda t: t * 2)),
    "a Parameter": Change(but(lora_A=lambda t: torch.nn.Parameter(t * 2))),
    "a seed": Change(but(seed=torch.tensor([7]), dropout_p=0.5), before=but(dropout_p=0.5)),
    "a seed on another device": Change(but(seed=torch.tensor([7], device="meta")), before=but(seed=torch.tensor([7])), error=True),
    "a seed of another dtype": Change(but(seed=torch.tensor([7], dtype=torch.int32)), before=but(seed=torch.tensor([7])), error=True),
    "N": Change(but(N=N + 1), error=True),
    "N no integer": Change(but(N=float(N)), error=True),
    "blocksize": Change(but(blocksize=32), error=True),
    "blocksize no integer": Change(but(blocksize=64.0), error=True),
    "quant_type": Change(but(quant_type="fp4")),
    "scaling": Change(but(scaling=3.0)),
    "dropout_p": Change(but(dropout_p=0.9), before=but(seed=torch.tensor([7]), dropout_p=0.5)),
    "dropout_p out of range": Change(but(dropout_p=1.5), error=True),
    "the back end": Change(within=lambda: backends.use_backend("triton" if torch.cuda.is_available() else "cuda"), error=True),
    "the path": Change(within=lambda: backends.use_backend(backends.forced(), "mma"), before=but(x=lambda x: x.float())),
    "the number of threads": Change(within=two_threads),
    "autocast": Change(within=lambda: torch.autocast("cpu", torch.bfloat16), before=but(x=lambda x: x.float())),
}  # fmt: skip
EMPTY = {"x": lambda x: x, "N": 0, "packed": lambda t: t[:0].clone(), "absmax": lambda t: t[:0].clone(), "nested_absmax": lambda t: t[:0].clone(),
         "bias": lambda t: t[:0].clone(), "lora_B": lambda t: t[:0].clone()}  # fmt: skip
FORWARD["an empty bias on another device"] = Change(but(bias=meta), before=but(**EMPTY), error=True)
GRADS = {
    "dy's strides": Change(but(dy=lambda t: torch.cat((t, t), -1)[..., :N])),
    "dy's sign": Change(but(dy=torch._neg_view)),
    "x's shape": Change(but(x=lambda x: x[:, :2].clone()), error=True),
    "x missing": Change(but(x=None), error=True),
    "xa's dtype": Change(but(xa=lambda t: t.view(torch.float16)), error=True),
    "xa's sign": Change(but(xa=torch._neg_view)),
    "dA not needed": Change(but(need_dA=False)),
    "dx not needed": Change(but(need_dx=False)),
    "K": Change(but(K=K + 1), error=True),
    "lora_B of other values": Change(but(lora_B=lambda t: t * 2)),
    "autocast": Change(
        within=lambda: torch.autocast("cpu", torch.bfloat16),
        before=but(dy=torch.Tensor.float, x=torch.Tensor.float, xa=torch.Tensor.float),
    ),
}
GROUP = {
    "the second bias": Change(second_but(bias=lambda t: t + 1)),
    "the second lora_A": Change(second_but(lora_A=lambda t: t * 2)),
    "one bias": Change(but(bias=lambda values: values[:1]), error=True),
    "no bias": Change(but(bias=[])),
    "a list for another": Change(lambda given: given | {"bias": [], "lora_A": given["bias"]},
                                 before=lambda given: given | {"lora_A": [], "lora_B": []}, error=True),
    "the second N": Change(but(N=[N, N + 1]), error=True),
    "the second scaling": Change(but(scaling=[2.0, 0.25])),
}  # fmt: skip
GROUP_GRADS = {
    "dy whole": Change(but(dy=lambda dys: [torch.cat(dys, 1)])),
    "the second dy's strides": Change(second_but(dy=lambda t: torch.cat((t, t), -1)[..., :N])),
    "the second lora_B": Change(second_but(lora_B=lambda t: t * 2)),
    "dB not needed": Change(but(need_dB=False)),
}
SWIGLU = {
    "gate_up's shape": Change(but(gate_up=lambda t: t[:, :2].clone()), error=True),
    "gate_up's strides": Change(but(gate_up=lambda t: t.mT.contiguous().mT)),
    "gate_up's sign": Change(but(gate_up=torch._neg_view)),
    "dh's dtype": Change(but(dh=lambda t: t.view(torch.float16)), error=True),
}
TABLE = {"linear_fwd": FORWARD, "linear_grads": GRADS, "group_fwd": GROUP, "group_grads": GROUP_GRADS, "swiglu_bwd": SWIGLU}
CHANGES = [(name, what) for name, changes in TABLE.items() for what in changes]


def pair(name, what):
    """The arguments of the first call and those of the second, which share all that is not changed; and the change."""
    change = TABLE[name][what]
    first = change.before(operands(name))
    return ordered(name, first), ordered(name, change.arguments(first)), change


@pytest.mark.parametrize("backend", ["cpu", "cuda_on_host", "cuda_on_host dense", "reference"])
@pytest.mark.parametrize(("name", "what"), CHANGES)
def test_what_is_changed_between_two_calls_is_seen(backend, name, what):
    """Each of two calls gives what it gives to an op without memory, in either order; an error is the same error."""
    backend, _, path = backend.partition(" ")
    first, second, change = pair(name, what)
    op = getattr(ops, name)
    with force(backend, path or None):
        wanted = outcome(as_before(op), first), outcome(as_before(op), second, change.within)
        if change.error and backend != "reference":
            assert isinstance(wanted[1][0], type), "the second call was to raise"
        for calls in ((first, second, first, second), (second, first, second)):
            op.prepared.clear()
            for args in calls:
                found = outcome(op, args, change.within if args is second else nullcontext)
                assert found == wanted[args is second]


def without(op, args, within, lacking):
    """The signature of a call, less one component: (of a fresh or kept operand, its name) or a name of the rest."""
    fresh, kept = eager._fresh, eager._kept

    def less(names, describe):
        return lambda t: tuple(v for n, v in zip(names, describe(t), strict=True) if n != lacking[1])

    with pytest.MonkeyPatch.context() as patch, within():
        if lacking[0] == "fresh":
            patch.setattr(eager, "_fresh", less(FRESH, fresh))
        if lacking[0] == "kept":
            patch.setattr(eager, "_kept", less(KEPT, kept))
        backend, path, threads, *rest = op.signature(args)
    named = {"back end": backend, "path": path, "threads": threads}
    kinds = {int, float, bool, str, type(None)}
    after = [None, *rest[:-1]]
    if lacking[1] == "kind":
        rest = [v for v in rest if v not in kinds]
    if lacking[1] == "value":
        rest = [v for v, last in zip(rest, after, strict=True) if last not in kinds]
    if lacking[1] == "lists":
        rest = [v for v in rest if v is not list]
    return [*(v for n, v in named.items() if n != lacking[1]), *rest]


COMPONENTS = [
    *(("fresh", n) for n in FRESH), *(("kept", n) for n in KEPT if n != "device"),
    *(("rest", n) for n in ("back end", "path", "threads", "kind", "value", "lists")),
]  # fmt: skip


@pytest.mark.parametrize("lacking", COMPONENTS, ids=" ".join)
def test_no_part_of_the_signature_can_be_left_out(lacking):
    """Some change would not be seen without it. (The number of a kept operand's device differs with two GPUs only.)"""
    missed = []
    with force("cuda_on_host"):
        for name, what in CHANGES:
            first, second, change = pair(name, what)
            op = getattr(ops, name)
            signatures = [without(op, args, within, lacking) for args, within in ((first, nullcontext), (second, change.within))]
            whole = [without(op, args, within, ("", "")) for args, within in ((first, nullcontext), (second, change.within))]
            if signatures[0] == signatures[1] and whole[0] != whole[1]:
                missed.append(f"{name}: {what}")
    assert missed


def test_host_tiles_are_for_the_threads_there_are(monkeypatch):
    args, seen, run = ordered("linear_fwd", operands("linear_fwd")), [], native.host.run
    monkeypatch.setattr(
        native.host, "run", lambda name, params, device: seen.append(params.config.threads) or run(name, params, device)
    )
    with force("cpu"), torch.no_grad():
        ops.linear_fwd(*args)
        with two_threads():
            ops.linear_fwd(*args)
        ops.linear_fwd(*args)
    assert seen == [1, 2, 1]


@pytest.fixture(params=["cpu", "cuda_on_host"])
def layer(request):
    torch.manual_seed(0)
    made = NF4LoRALinear(64, 32, r=4)
    torch.nn.init.normal_(made.lora_B)
    with force(request.param):
        yield made


def run(layer, x, dy):
    """y and the gradients of a step, and y without gradients."""
    x = x.detach().requires_grad_()
    y = layer(x)
    grads = torch.autograd.grad(y, [x, layer.lora_A, layer.lora_B], dy.to(y.dtype))
    with torch.no_grad():
        return y.detach(), layer(x.detach()), *grads


def forgotten(layer, x, dy):
    for op in (ops.linear_fwd, ops.linear_grads):
        op.prepared.clear()
    return run(layer, x, dy)


def test_a_second_call_is_not_prepared_again(layer, monkeypatch):
    prepared = []
    for name in ("linear_fwd", "linear_grads"):
        op = getattr(ops, name)
        monkeypatch.setattr(op, "prepare", lambda *args, name=name, prepare=op.prepare: prepared.append(name) or prepare(*args))
    for _ in range(3):
        run(layer, torch.randn(2, 3, 64), torch.randn(2, 3, 32))
    assert prepared == ["linear_fwd", "linear_grads"]
    run(layer, torch.randn(2, 4, 64), torch.randn(2, 4, 32))
    assert prepared == ["linear_fwd", "linear_grads"] * 2


def set_data(layer):
    layer.lora_A.data = torch.randn(4, 64)


def smaller_rank(layer):
    layer.lora_A.data, layer.lora_B.data = torch.randn(3, 64), torch.randn(32, 3)


LATER = {
    "an optimizer's step": lambda layer: [p.data.add_(0.5) for p in (layer.lora_A, layer.lora_B)],
    "data swapped": set_data,
    "a smaller rank": smaller_rank,
    "a cast": lambda layer: layer.to(torch.bfloat16),
    "another weight": lambda layer: layer.quantize_(torch.randn(32, 64)),
    "another parameter": lambda layer: setattr(layer, "lora_A", torch.nn.Parameter(torch.randn(4, 64))),
    "another scaling": lambda layer: setattr(layer, "lora_alpha", 5),
    "bytes changed in place": lambda layer: layer.weight.data.bitwise_xor_(0x11),
    "transposed memory": lambda layer: setattr(layer.lora_B, "data", torch.randn(4, 32).mT),
}


@pytest.mark.parametrize("change", LATER)
def test_a_layer_that_changes(layer, change):
    x, dy = torch.randn(2, 3, 64), torch.randn(2, 3, 32)
    before = run(layer, x, dy)
    LATER[change](layer)
    found = run(layer, x, dy)
    assert not torch.equal(found[0], before[0])
    assert all(map(torch.equal, found, forgotten(layer, x, dy)))
    assert all(map(torch.equal, found, run(layer, x, dy)))


def test_what_stands_in_a_parameters_place_is_used(layer):
    x, wanted = torch.randn(2, 3, 64), copy.deepcopy(layer)
    wanted.lora_A.data *= 2
    parametrize.register_parametrization(layer, "lora_A", Doubled())
    for _ in range(2):
        assert torch.equal(layer(x), wanted(x))


class Doubled(torch.nn.Module):
    def forward(self, t):
        return 2 * t


def test_outputs_are_new_and_may_be_changed(layer):
    x = torch.randn(2, 3, 64)
    with torch.no_grad():
        first, second = layer(x), layer(x)
        assert first.data_ptr() != second.data_ptr()
        assert first._base is None or backends.forced() != "cpu"  # the machine's memory is numpy's
        kept = second.clone()
        assert torch.equal(layer(x).mul_(2), kept * 2) and torch.equal(second, kept)


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("backend", ["cpu", "cuda_on_host", "cuda_on_host dense", "reference"])
def test_nothing_is_kept_alive(backend, name):
    args = ordered(name, operands(name))
    backend, _, path = backend.partition(" ")
    with force(backend, path or None), torch.no_grad():
        outputs = getattr(ops, name)(*args)
        outputs = getattr(ops, name)(*args)
    held = [weakref.ref(t) for t in listed([*args, *outputs]) if isinstance(t, torch.Tensor)]
    assert len(held) > 2 and len(getattr(ops, name).prepared) == 1
    if backend == "cuda_on_host":  # whose machine checks the operands of the last launch
        from cuda_on_host import backend as machine

        machine.machine("checker")._mine.call = None
    del args, outputs
    assert not [ref for ref in held if ref() is not None]


def test_what_is_remembered_is_bounded(layer, monkeypatch):
    monkeypatch.setattr(eager, "MOST", 3)
    with torch.no_grad():
        for tokens in range(1, 9):
            layer(torch.randn(tokens, 64))
            assert len(ops.linear_fwd.prepared) <= 3


def test_a_failed_call_is_not_remembered(layer):
    with torch.no_grad():
        for _ in range(2):
            with pytest.raises(TypeError, match="absmax: found torch.uint8"):
                ops.linear_fwd(
                    torch.randn(2, 64), layer.weight, layer.weight_absmax, None, None, *[None] * 4, 32, 64, "nf4", 1.0, 0.0
                )
    assert not ops.linear_fwd.prepared


def test_eight_threads_on_one_layer(layer):
    xs = [torch.randn(2, 3, 64) for _ in range(8)]
    dys = [torch.randn(2, 3, 32) for _ in range(8)]
    wanted = [forgotten(layer, x, dy) for x, dy in zip(xs, dys, strict=True)]
    forgotten(layer, xs[0], dys[0])
    found, errors, start = [[] for _ in xs], [], threading.Barrier(len(xs))
    forced = backends.chosen()

    def work(i):
        start.wait()
        try:
            with backends.use_backend(*forced):
                for _ in range(6):
                    found[i].append(run(layer, xs[i], dys[i]))
        except Exception as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(xs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert all(
        len(each) == 6 and all(all(map(torch.equal, once, w)) for once in each) for each, w in zip(found, wanted, strict=True)
    )


def test_a_group_without_gradients_is_its_layers(layer):
    group, x = NF4LoRALinearGroup(a=layer, b=NF4LoRALinear(64, 8, r=2)), torch.randn(2, 3, 64)
    recorded = group(x)
    with torch.no_grad():
        for _ in range(2):
            found = group(x)
            assert all(y.grad_fn is None and torch.equal(y, r) for y, r in zip(found, recorded, strict=True))
        found[0].mul_(2)
    assert torch.equal(found[0], recorded[0] * 2) and torch.equal(found[1], recorded[1])
