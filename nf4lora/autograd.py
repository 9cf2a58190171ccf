"""The differentiable linear, and groups of them: a `torch.autograd.Function` over the ops, for base product and LoRA together."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from . import backends, ops
from .matrices import matrix


def _not_constant(dy: Tensor, adapter_learns: bool) -> Tensor:
    """With a constant dy `once_differentiable` would take the gradients for constants, but they depend on A and B."""
    return dy.detach().requires_grad_() if adapter_learns else dy


def _forced() -> tuple[str | None, str | None] | None:
    """What `use_backend` forces here, if anything."""
    found = backends.forced(), backends.forced_path()
    return found if any(found) else None


def _forced_again(ctx: Any) -> AbstractContextManager[None]:
    """Gradients of other devices are computed on other threads, which a forced back end must follow."""
    return backends.use_backend(*ctx.forced) if ctx.forced else nullcontext()


def _sum_of_rows(dy: Tensor) -> Tensor:
    return matrix(dy).sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))


class NF4LoRAFunction(torch.autograd.Function):
    """y = x W^T + bias + scaling * (dropout(x) lora_A^T) lora_B^T. Saves x (if lora_A learns) and xa (if lora_B does).

    x [..., K]; gradients for x, bias, lora_A and lora_B, each only if asked for; other arguments as in
    `reference.linear_fwd`, those after seed in one tuple.
    """

    @staticmethod
    def forward(ctx: Any, x, packed, absmax, nested_absmax, offset, bias, lora_A, lora_B, seed, numbers) -> Tensor:
        y, xa = ops.linear_fwd(x, packed, absmax, nested_absmax, offset, bias, lora_A, lora_B, seed, *numbers)
        need = ctx.needs_input_grad
        ctx.save_for_backward(
            x if need[6] else None, xa if need[7] else None, packed, absmax, nested_absmax, offset, lora_A, lora_B, seed
        )
        ctx.meta = x.shape[-1], numbers[1:], None if bias is None else bias.dtype
        ctx.forced = _forced()
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return NF4LoRAFunction._gradients_once(ctx, _not_constant(dy, any(ctx.needs_input_grad[6:8])))
        return NF4LoRAFunction._gradients(ctx, dy)

    @staticmethod
    def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, xa, packed, absmax, nested_absmax, offset, lora_A, lora_B, seed = ctx.saved_tensors
        K, numbers, bias_dtype = ctx.meta
        need = ctx.needs_input_grad
        need_x, need_A, need_B = need[0], need[6], need[7]
        dx = dbias = dA = dB = None
        if need_x or need_A or need_B:
            with _forced_again(ctx):
                dx, dA, dB = ops.linear_grads(
                    dy, x, xa, packed, absmax, nested_absmax, offset, lora_A, lora_B, seed, K, *numbers, need_x, need_A, need_B
                )
        if need[5]:
            dbias = _sum_of_rows(dy).to(bias_dtype)
        return dx if need_x else None, None, None, None, None, dbias, dA if need_A else None, dB if need_B else None, None, None

    _gradients_once = staticmethod(once_differentiable(_gradients))


def _seen_anew(tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    """For Dynamo, which takes what `torch.func.grad` differentiates by for a constant, but not a view of it; compilers drop the views."""
    if forward_ad._current_level >= 0:
        raise NotImplementedError("nf4lora has no forward-mode derivatives: found a call inside torch.func.jvp or forward_ad.dual_level")
    return [t.view_as(t) if t is not None and t.is_floating_point() else t for t in tensors]


def linear(
    x: Tensor, packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, offset: Tensor | None,
    bias: Tensor | None, lora_A: Tensor | None, lora_B: Tensor | None, seed: Tensor | None,
    N: int, blocksize: int, quant_type: str, scaling: float, dropout_p: float,
) -> Tensor:  # fmt: skip
    """x [..., K] -> y [..., N], in x's dtype; arguments as in `reference.linear_fwd`."""
    tensors, numbers = (packed, absmax, nested_absmax, offset, bias, lora_A, lora_B, seed), (N, blocksize, quant_type, scaling, dropout_p)
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:  # the Function refuses forward mode, an op would drop the tangent
        if torch.compiler.is_compiling():
            x, *tensors = _seen_anew((x, *tensors))
        return NF4LoRAFunction.apply(x, *tensors, numbers)
    return ops.linear_fwd(x, *tensors, *numbers)[0]


class Group(NamedTuple):
    """What linears that read one x have in common, beside the tensors."""

    N: tuple[int, ...]
    blocksize: int
    quant_type: str
    scaling: tuple[float, ...]
    dropout_p: float
    swiglu: bool  # of two members: the output is silu(first) * second


class NF4LoRAGroupFunction(torch.autograd.Function):
    """`NF4LoRAFunction` of several linears on one x. Saves x and xa, and with `swiglu` the two outputs it combines.

    tensors: the operands of all members one list after another, as `sizes` counts them: packed, absmax, nested_absmax,
    offset, bias, lora_A, lora_B.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, seed: Tensor | None, group: Group, sizes: tuple[int, ...], *tensors: Tensor) -> Any:
        packed, absmax, nested_absmax, offset, bias, lora_A, lora_B = _lists(tensors, sizes)
        y, xa = ops.group_fwd(
            x, packed, absmax, nested_absmax, offset, bias, lora_A, lora_B, seed,
            group.N, group.blocksize, group.quant_type, group.scaling, group.dropout_p,
        )  # fmt: skip
        ctx.group, ctx.sizes, ctx.K, ctx.forced = group, sizes, x.shape[-1], _forced()
        need_A, need_B = (any(need) for need in _lists(ctx.needs_input_grad[4:], sizes)[5:])
        ctx.save_for_backward(x if need_A else None, xa if need_B else None, y if group.swiglu else None, seed, *tensors)
        if group.swiglu:
            return ops.swiglu_fwd(y)
        return y.split(group.N, -1)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            adapter = any(map(any, _lists(ctx.needs_input_grad[4:], ctx.sizes)[5:]))
            return NF4LoRAGroupFunction._gradients_once(ctx, *(_not_constant(dy, adapter) for dy in dys))
        return NF4LoRAGroupFunction._gradients(ctx, *dys)

    @staticmethod
    def _gradients(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, xa, gate_up, seed, *tensors = ctx.saved_tensors
        packed, absmax, nested_absmax, offset, bias, lora_A, lora_B = _lists(tensors, ctx.sizes)
        need_x, (*_, need_bias, need_A, need_B) = ctx.needs_input_grad[0], _lists(ctx.needs_input_grad[4:], ctx.sizes)
        group, dx, dA, dB, dbias = ctx.group, None, [], [], []
        with _forced_again(ctx):
            dys = [ops.swiglu_bwd(gate_up, dys[0])] if group.swiglu else list(dys)
            if need_x or any(need_A) or any(need_B):
                dx, dA, dB = ops.group_grads(
                    dys, x, xa, packed, absmax, nested_absmax, offset, lora_A, lora_B, seed,
                    group.N, ctx.K, group.blocksize, group.quant_type, group.scaling, group.dropout_p,
                    need_x, any(need_A), any(need_B),
                )  # fmt: skip
        if any(need_bias):
            each = dys[0].split(group.N, -1) if group.swiglu else dys
            dbias = [_sum_of_rows(dy).to(b.dtype) for dy, b in zip(each, bias, strict=True)]
        needed = zip((need_bias, need_A, need_B), (dbias, dA, dB), strict=True)
        learned = [t if n else None for need, found in needed for n, t in zip(need, found or [None] * len(need), strict=True)]
        return dx if need_x else None, None, None, None, *[None] * sum(ctx.sizes[:4]), *learned

    _gradients_once = staticmethod(once_differentiable(_gradients))


def _lists(flat: Iterable[Any], sizes: tuple[int, ...]) -> list[list[Any]]:
    rest = iter(flat)
    return [list(islice(rest, size)) for size in sizes]


def linear_group(x: Tensor, lists: tuple[list[Tensor], ...], seed: Tensor | None, group: Group) -> Any:
    """x [..., K] -> a tuple of y [..., N_i], or with `swiglu` one h [..., N]; `lists` as `NF4LoRAGroupFunction` has them."""
    if not torch.is_grad_enabled() and forward_ad._current_level < 0:
        y, _ = ops.group_fwd(x, *lists, seed, group.N, group.blocksize, group.quant_type, group.scaling, group.dropout_p)
        return ops.swiglu_fwd(y) if group.swiglu else torch.unsafe_split_with_sizes(y, group.N, -1)
    sizes, tensors = tuple(map(len, lists)), [t for values in lists for t in values]
    if torch.compiler.is_compiling():
        x, *tensors = _seen_anew((x, *tensors))
    return NF4LoRAGroupFunction.apply(x, seed, group, sizes, *tensors)
