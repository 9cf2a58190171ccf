"""All gradients of a layer as what they are made of, `lora_bwd` and `linear_bwd`: the spec, and the rows of back ends that
have no launches of their own for them together."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends
from .matrices import matrix


def linear_grads(
    dy, x, xa, packed, absmax, nested_absmax, offset, lora_A, lora_B, seed, K, blocksize, quant_type, scaling, dropout_p,
    need_dx, need_dA, need_dB,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx of `reference.linear_bwd`, dA and dB of `reference.lora_bwd`; one that is not needed comes back empty.

    dy [..., N], x and dx [..., K], xa [M, r] as in `reference.linear_fwd`.
    """
    leading, dy = dy.shape[:-1], matrix(dy)
    dyb, unused = None, dy.new_empty(0, 0)
    dx, dA, dB = dy.new_empty(0), dy.new_empty(0), dy.new_empty(0)
    if lora_A is not None:
        x, xa = unused if x is None else matrix(x), unused if xa is None else xa
        dyb, *learned = backends.run("lora_bwd", dy, x, xa, lora_A, lora_B, seed, scaling, dropout_p, need_dA, need_dB)
        dA, dB = learned[0] if need_dA else dA, learned[1] if need_dB else dB
    if need_dx:
        dx = backends.run(
            "linear_bwd", dy, packed, absmax, nested_absmax, offset, lora_A, dyb, seed, K, blocksize, quant_type, dropout_p
        ).view(*leading, K)
    return dx, dA, dB


def group_grads(
    dy: Sequence[Tensor], x, xa, packed, absmax, nested_absmax, offset, lora_A, lora_B, seed, N, K, blocksize, quant_type,
    scaling, dropout_p, need_dx, need_dA, need_dB,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    """The same of a group, from `reference.group_bwd` and `group_lora_bwd`; dy [..., sum N] whole, or each member's [..., N_i]."""
    leading, dy = dy[0].shape[:-1], matrix(dy[0]) if len(dy) == 1 else torch.cat([matrix(t) for t in dy], 1)
    dyb, unused = None, dy.new_empty(0, 0)
    dx, dA, dB = dy.new_empty(0), [], []
    if lora_A:
        x, xa = unused if x is None else matrix(x), unused if xa is None else xa
        dyb, dA, dB = backends.run("group_lora_bwd", dy, x, xa, lora_A, lora_B, seed, scaling, dropout_p, need_dA, need_dB)
    if need_dx:
        dx = backends.run(
            "group_bwd", dy, packed, absmax, nested_absmax, offset, lora_A, dyb, seed, N, K, blocksize, quant_type, dropout_p
        ).view(*leading, K)
    return dx, dA, dB


def _enter(op: str, backend: str, call: Any) -> None:
    """What the parts of the row refuse, they refuse when it runs; before, only what keeps the whole back end away."""
    backends.implements(op, backend, lambda *args: _part(op, backend).why_not(*([backends.first_of(args)] if args else [])))(call)


def _part(op: str, backend: str) -> backends.Row:
    return backends._ROWS["linear_bwd" if op == "linear_grads" else "group_bwd", backend]


for name in ("cpu", "triton", "reference"):
    _enter("linear_grads", name, linear_grads)
for name in ("triton", "reference"):
    _enter("group_grads", name, group_grads)
