"""The product with a weight that is stored [in, out], without a decoded copy of it."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import autograd, backends, ops


class _LinearTransposed(torch.autograd.Function):
    """x S is to S what dx is to a weight, and its gradient the product of a linear."""

    @staticmethod
    def forward(ctx: Any, x, packed, absmax, nested_absmax, offset, N, blocksize, quant_type) -> Tensor:
        ctx.save_for_backward(packed, absmax, nested_absmax, offset)
        ctx.numbers = x.shape[-1], blocksize, quant_type
        ctx.forced = backends.forced(), backends.forced_path()
        return ops.linear_bwd(x, packed, absmax, nested_absmax, offset, None, None, None, N, blocksize, quant_type, 0.0)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        # gradients of other devices are computed on other threads
        with backends.use_backend(*ctx.forced) if any(ctx.forced) else nullcontext():
            dx = autograd.linear(dy, *ctx.saved_tensors, None, None, None, None, *ctx.numbers, 1.0, 0.0)
        return dx, *[None] * 7


def linear_transposed(
    x: Tensor, packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, offset: Tensor | None,
    N: int, blocksize: int, quant_type: str,
) -> Tensor:  # fmt: skip
    """x [M, K] -> x S [M, N] in x's dtype, for S [K, N] in 4 bits; differentiable in x. Weight as in `reference.linear_bwd`."""
    return _LinearTransposed.apply(x, packed, absmax, nested_absmax, offset, N, blocksize, quant_type)
