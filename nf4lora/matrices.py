"""Operands of any rank as the matrices that products are made of: [..., n] stands for the [M, n] of its rows, one after another."""

import math

import torch
from torch import Tensor


def rows(t: Tensor) -> int:
    """M of [..., n], the product of the leading dimensions."""
    return t.shape[0] if t.ndim == 2 else math.prod(t.shape[:-1])


def matrix(t: Tensor) -> Tensor:
    """[..., n] -> [M, n], of the same memory where its strides allow it."""
    return t if t.ndim == 2 else t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def like(y: Tensor, x: Tensor) -> Tensor:
    """[M, n] -> [..., n] as x has it; no view to autograd, so that it may be changed in place."""
    return y if x.ndim == 2 else torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], y.shape[-1]))
