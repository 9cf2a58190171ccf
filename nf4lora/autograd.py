"""The differentiable linear, and groups of them: a `torch.autograd.Function` over the ops, for base product and LoRA together."""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import backends, ops


def _not_constant(dy: Tensor, adapter_learns: bool) -> Tensor:
    """With a constant dy `once_differentiable` would take the gradients for constants, but they depend on A and B."""
    return dy.detach().requires_grad_() if torch.is_grad_enabled() and adapter_learns else dy


def _forced_again(ctx: Any) -> AbstractContextManager[None]:
    """Gradients of other devices are computed on other threads, which a forced back end must follow."""
    return backends.use_backend(*ctx.forced) if any(ctx.forced) else nullcontext()


def _sum_of_rows(dy: Tensor) -> Tensor:
    return dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))


class NF4LoRAFunction(torch.autograd.Function):
    """y = x W^T + bias + scaling * (dropout(x) lora_A^T) lora_B^T. Saves x (if lora_A learns) and xa (if lora_B does).

    Gradients for x, bias, lora_A and lora_B, each only if asked for; arguments as in `reference.linear_fwd`.
    """

    @staticmethod
    def forward(
        ctx: Any, x, packed, absmax, nested_absmax, offset, bias, lora_A, lora_B, seed,
        N: int, blocksize: int, quant_type: str, scaling: float, dropout_p: float,
    ) -> Tensor:  # fmt: skip
        y, xa = ops.linear_fwd(
            x, packed, absmax, nested_absmax, offset, bias, lora_A, lora_B, seed,
            N, blocksize, quant_type, scaling, dropout_p,
        )  # fmt: skip
        need_A, need_B = ctx.needs_input_grad[6], ctx.needs_input_grad[7]
        ctx.save_for_backward(
            x if need_A else None, xa if need_B else None, packed, absmax, nested_absmax, offset, lora_A, lora_B, seed
        )
        ctx.meta = x.shape, blocksize, quant_type, scaling, dropout_p, None if bias is None else bias.dtype
        ctx.forced = backends.forced(), backends.forced_path()
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return NF4LoRAFunction._gradients(ctx, _not_constant(dy, any(ctx.needs_input_grad[6:8])))

    @staticmethod
    @once_differentiable
    def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, xa, packed, absmax, nested_absmax, offset, lora_A, lora_B, seed = ctx.saved_tensors
        (M, K), blocksize, quant_type, scaling, dropout_p, bias_dtype = ctx.meta
        need_x, need_bias, need_A, need_B = (ctx.needs_input_grad[i] for i in (0, 5, 6, 7))
        dx = dbias = dA = dB = dyb = None
        with _forced_again(ctx):
            if lora_A is not None and (need_x or need_A or need_B):
                unused = dy.new_empty(0, 0)
                dyb, dA, dB = ops.lora_bwd(
                    dy, unused if x is None else x, unused if xa is None else xa, lora_A, lora_B, seed,
                    scaling, dropout_p, need_A, need_B,
                )  # fmt: skip
            if need_x:
                dx = ops.linear_bwd(
                    dy, packed, absmax, nested_absmax, offset, lora_A, dyb, seed, K, blocksize, quant_type, dropout_p
                )
        if need_bias:
            dbias = _sum_of_rows(dy).to(bias_dtype)
        dA, dB = dA if need_A else None, dB if need_B else None
        return dx, None, None, None, None, dbias, dA, dB, *(None,) * 6


def linear(
    x: Tensor, packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, offset: Tensor | None,
    bias: Tensor | None, lora_A: Tensor | None, lora_B: Tensor | None, seed: Tensor | None,
    N: int, blocksize: int, quant_type: str, scaling: float, dropout_p: float,
) -> Tensor:  # fmt: skip
    """x [..., K] -> y [..., N], in x's dtype; arguments as in `reference.linear_fwd`."""
    y = NF4LoRAFunction.apply(
        x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), packed, absmax, nested_absmax, offset, bias, lora_A, lora_B, seed,
        N, blocksize, quant_type, scaling, dropout_p,
    )  # fmt: skip
    return y.reshape(*x.shape[:-1], N)


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
        ctx.group, ctx.sizes, ctx.K, ctx.forced = group, sizes, x.shape[1], (backends.forced(), backends.forced_path())
        need_A, need_B = (any(need) for need in _lists(ctx.needs_input_grad[4:], sizes)[5:])
        ctx.save_for_backward(x if need_A else None, xa if need_B else None, y if group.swiglu else None, seed, *tensors)
        return ops.swiglu_fwd(y) if group.swiglu else y.split(group.N, 1)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        adapter = any(map(any, _lists(ctx.needs_input_grad[4:], ctx.sizes)[5:]))
        return NF4LoRAGroupFunction._gradients(ctx, *(_not_constant(dy, adapter) for dy in dys))

    @staticmethod
    @once_differentiable
    def _gradients(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, xa, gate_up, seed, *tensors = ctx.saved_tensors
        packed, absmax, nested_absmax, offset, bias, lora_A, lora_B = _lists(tensors, ctx.sizes)
        need_x, (*_, need_bias, need_A, need_B) = ctx.needs_input_grad[0], _lists(ctx.needs_input_grad[4:], ctx.sizes)
        group, dx, dyb, dA, dB = ctx.group, None, None, [], []
        with _forced_again(ctx):
            dy = ops.swiglu_bwd(gate_up, dys[0]) if group.swiglu else torch.cat(dys, 1)
            if lora_A and (need_x or any(need_A) or any(need_B)):
                unused = dy.new_empty(0, 0)
                dyb, dA, dB = ops.group_lora_bwd(
                    dy, unused if x is None else x, unused if xa is None else xa, lora_A, lora_B, seed,
                    group.scaling, group.dropout_p, any(need_A), any(need_B),
                )  # fmt: skip
            if need_x:
                dx = ops.group_bwd(
                    dy, packed, absmax, nested_absmax, offset, lora_A, dyb, seed,
                    group.N, ctx.K, group.blocksize, group.quant_type, group.dropout_p,
                )  # fmt: skip
        dbias = [t.to(b.dtype) for t, b in zip(_sum_of_rows(dy).split(group.N), bias, strict=True)] if any(need_bias) else []
        needed = zip((need_bias, need_A, need_B), (dbias, dA, dB), strict=True)
        learned = [t if n else None for need, found in needed for n, t in zip(need, found or [None] * len(need), strict=True)]
        return dx, None, None, None, *[None] * sum(ctx.sizes[:4]), *learned


def _lists(flat: Any, sizes: tuple[int, ...]) -> list[list[Any]]:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [list(flat[end - size : end]) for size, end in zip(sizes, ends, strict=True)]


def linear_group(x: Tensor, lists: tuple[list[Tensor], ...], seed: Tensor | None, group: Group) -> Any:
    """x [..., K] -> a tuple of y [..., N_i], or with `swiglu` one h [..., N]; `lists` as `NF4LoRAGroupFunction` has them."""
    sizes = tuple(map(len, lists))
    tensors = [t for values in lists for t in values]
    out = NF4LoRAGroupFunction.apply(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), seed, group, sizes, *tensors)
    if group.swiglu:
        return out.reshape(*x.shape[:-1], group.N[0])
    return tuple(y.reshape(*x.shape[:-1], n) for y, n in zip(out, group.N, strict=True))
