"""Gradients tell the pools of their states that they are there, while backward still makes others."""

import weakref
from typing import Any

import torch
from torch import Tensor

from .pool import Pool


def announce(optimizer: torch.optim.Optimizer, pool: Pool, params: list[Tensor]) -> None:
    """Tell the pool of gradients as backward makes them, as long as the optimizer lives."""
    found = weakref.ref(pool)

    @torch._disable_dynamo  # which would compile a pager as soon as a backward inside a compiled function calls it
    def hook(p: Tensor) -> None:
        # A graph replays the backward without us: nothing is announced, which costs time only.
        if (alive := found()) is not None and not (p.is_cuda and torch.cuda.is_current_stream_capturing()):
            alive.prefetch(p)

    handles = [p.register_post_accumulate_grad_hook(hook) for p in params]
    weakref.finalize(optimizer, _remove, handles).atexit = False


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
