"""Backwards to put a step's paging beside: one that only waits, and one of products."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .bench_optim_steps import FIRST_STEPS, Work

CYCLES_MS = 2_000_000  # of a GPU's clock in a millisecond, about


class _Held(torch.autograd.Function):
    """Nothing; its backward keeps the device busy and gives a parameter its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: Tensor, gradient: Tensor, cycles: int) -> Tensor:
        ctx.gradient, ctx.cycles = gradient, cycles
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        if dx.is_cuda:
            torch.cuda._sleep(ctx.cycles)
        return dx, ctx.gradient, None, None


class Waiting:
    """A backward of about `ms` that hands every parameter its gradient in turn, the last one first."""

    def __init__(self, work: Work, ms: float) -> None:
        self.cycles = int(ms * CYCLES_MS / len(work.shapes))
        self.gradients = [p.grad for p in self._with_gradients(work)]
        self.x = torch.zeros((), device=work.device, requires_grad=True)

    def __call__(self, params: Sequence[nn.Parameter]) -> None:
        y = self.x
        for p, gradient in zip(params, self.gradients, strict=True):
            y = _Held.apply(y, p, gradient, self.cycles)
        y.backward()

    @staticmethod
    def _with_gradients(work: Work) -> list[nn.Parameter]:
        params = work.parameters()
        work.give_gradients(params, FIRST_STEPS)
        return params


class Products:
    """Forward and backward of square linears one after the other, without biases: parameters [K, K], x [tokens, K]."""

    def __init__(self, work: Work, tokens: int) -> None:
        K = work.shapes[0][1]
        self.x, self.dy = (torch.randn(tokens, K, dtype=work.dtype, device=work.device) for _ in range(2))
        self.scale = 50 * K**-0.5  # drawn with a std of 0.02

    def __call__(self, params: Sequence[nn.Parameter]) -> None:
        y = self.x
        for p in params:
            y = linear(y, p) * self.scale
        y.backward(self.dy)
