"""Eager calls go past torch's dispatcher; whoever would notice, a mode, a transform, a compiler, a profiler, still sees the ops."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from nf4lora import ops
from nf4lora.nn import NF4LoRALinear, NF4LoRALinearGroup

pytestmark = pytest.mark.usefixtures("cpu", "one_thread")


@pytest.fixture
def layer():
    torch.manual_seed(0)
    made = NF4LoRALinear(64, 32, r=4)
    torch.nn.init.normal_(made.lora_B)
    return made


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_plain_call_goes_past_the_dispatcher_and_a_watched_one_does_not(layer, monkeypatch):
    taken = []
    for name in ("linear_fwd", "linear_grads"):
        op = getattr(ops, name)
        monkeypatch.setattr(op, "overload", lambda *a, op=op, was=op.overload: taken.append(op) or was(*a))
    x = torch.randn(2, 3, 64, requires_grad=True)
    wanted = torch.autograd.grad(layer(x).square().sum(), [x, layer.lora_A, layer.lora_B])
    with torch.no_grad():
        y = layer(x)
    assert not taken
    with Seen() as seen:
        watched = layer(x)
        found = torch.autograd.grad(watched.square().sum(), [x, layer.lora_A, layer.lora_B])
    assert {"nf4lora.linear_fwd.default", "nf4lora.linear_grads.default"} <= set(seen.ops) and len(taken) == 2
    assert torch.equal(y, watched) and all(map(torch.equal, found, wanted))


def test_the_profiler_lists_the_ops(layer):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(torch.randn(3, 64)).sum().backward()
    assert {"nf4lora::linear_fwd", "nf4lora::linear_grads"} <= {event.name for event in profile.events()}


@pytest.mark.parametrize("view", [torch._neg_view, lambda t: t.T.contiguous().T, lambda t: t[:1].expand(3, 64)])
def test_views_are_seen_through(layer, view):
    x = view(torch.randn(3, 64))
    with torch.no_grad():
        assert torch.equal(layer(x), layer(x.clone()))


def test_a_trace_before_dispatch_holds_the_op(layer):
    x, other = torch.randn(3, 64), torch.randn(3, 64)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            traced = make_fx(lambda x: layer(x), pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True)(x)
            assert torch.equal(traced(other), layer(other))


@pytest.mark.parametrize("shape", [(3, 64), (2, 3, 64)])
def test_gradients_of_torch_func_through_a_compiler(layer, shape):
    x = torch.randn(shape)
    wanted = torch.autograd.grad(layer(leaf := x.clone().requires_grad_()).square().sum(), leaf)[0]
    gradient = torch.func.grad(lambda x: layer(x).square().sum())
    found = torch.compile(lambda x: gradient(x), backend="aot_eager", fullgraph=True)(x)
    assert wanted.abs().max() > 0 and torch.allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode_is_refused_not_dropped(layer, grad):
    with forward_ad.dual_level(), torch.set_grad_enabled(grad), pytest.raises((RuntimeError, NotImplementedError)):
        layer(forward_ad.make_dual(torch.randn(3, 64), torch.ones(3, 64)))


@pytest.mark.parametrize("grouped", [False, True])
def test_a_change_of_what_a_checkpoint_keeps_is_noticed(layer, grouped):
    module = NF4LoRALinearGroup(a=layer, b=NF4LoRALinear(64, 32, r=4)) if grouped else layer
    op = ops.group_fwd if grouped else ops.linear_fwd

    def call(x):
        y = module(x)
        return torch.tanh((y[0] if grouped else y).mul_(0.3)).sin()

    x = torch.randn(2, 3, 64, requires_grad=True)
    with pytest.raises(RuntimeError, match="mutated|view and is being modified"):
        checkpoint(call, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts([op.overload])).sum().backward()


def test_an_argument_of_a_wrong_kind_is_named():
    with torch.no_grad(), pytest.raises(RuntimeError, match="dy"):
        ops.linear_bwd(3, *[None] * 11)
    with torch.no_grad(), pytest.raises(TypeError, match="absmax: found None"):
        ops.dequantize(torch.zeros(32, 1, dtype=torch.uint8), None, None, None, [64], 64, "nf4", torch.float32)
