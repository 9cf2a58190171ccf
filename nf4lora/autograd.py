"""The differentiable linear: one `torch.autograd.Function` over the ops, for the base product and LoRA together."""

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import backends, ops


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
        # With a constant dy `once_differentiable` would take the gradients for constants, but they depend on A and B.
        if torch.is_grad_enabled() and (ctx.needs_input_grad[6] or ctx.needs_input_grad[7]):
            dy = dy.detach().requires_grad_()
        return NF4LoRAFunction._gradients(ctx, dy)

    @staticmethod
    @once_differentiable
    def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, xa, packed, absmax, nested_absmax, offset, lora_A, lora_B, seed = ctx.saved_tensors
        (M, K), blocksize, quant_type, scaling, dropout_p, bias_dtype = ctx.meta
        need_x, need_bias, need_A, need_B = (ctx.needs_input_grad[i] for i in (0, 5, 6, 7))
        dx = dbias = dA = dB = dyb = None
        # Gradients of other devices are computed on other threads, which a forced back end must follow.
        with backends.use_backend(*ctx.forced) if any(ctx.forced) else nullcontext():
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
            dbias = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)).to(bias_dtype)
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
