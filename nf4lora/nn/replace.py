"""`replace_linears`: put 4-bit layers in the place of a model's dense linears."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..checks import FLOATS, raise_not_finite
from .group import group_blocks
from .linear import NF4Linear
from .lora import NF4LoRALinear


def replace_linears(
    model: nn.Module,
    target_modules: str | Iterable[str] = "all-linear",
    exclude: Iterable[str] = ("lm_head",),
    layer: type[NF4Linear] = NF4LoRALinear,
    group: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Replace `torch.nn.Linear`s of `model` in place by `layer.from_linear(linear, **kwargs)`; other parameters stay.

    With adapters asked for, an `NF4Linear` that is there already is taken too, its bytes as they are.

    Args:
        target_modules: "all-linear", or names: a module's own ("q_proj") or the end of its path ("self_attn.q_proj")
        exclude:        names that stay dense, written likewise
        layer:          `NF4LoRALinear`, or `NF4Linear` for a base without adapters
        group:          compute q, k, v and gate, up of each block as one operation: `nf4lora.nn.group_blocks`
        kwargs:         r, lora_alpha, lora_dropout, blocksize, …: those of `layer`
    Returns: `model`
    Raises:  ValueError, before anything is changed, for names that match no linear (listing those there are), weights
             shared with another module, and NaN or Inf in a weight; TypeError likewise for other dtypes.
    """
    adapts = issubclass(layer, NF4LoRALinear)
    linears = {n: m for n, m in model.named_modules(remove_duplicate=False) if _is_dense(m) or (adapts and type(m) is NF4Linear)}
    if "" in linears:
        raise ValueError(f"model: found a bare {type(model).__name__}; use {layer.__name__}.from_linear(linear)")
    exclude = [exclude] if isinstance(exclude, str) else list(exclude)
    targets = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    if targets == ["all-linear"]:
        chosen = list(linears)
    else:
        check_names(targets, linears)
        chosen = [name for name in linears if any(_ends_with(name, t) for t in targets)]
    chosen = [name for name in chosen if not any(_ends_with(name, e) for e in exclude)]
    if not chosen:
        raise ValueError(f"model: found no torch.nn.Linear to replace outside {exclude}")
    check_weights(model, {name: linears[name] for name in chosen}, kwargs.get("dtype"))
    for name in chosen:
        model.set_submodule(name, layer.from_linear(linears.pop(name), **kwargs))
    if group:
        group_blocks(model)
    return model


def check_names(targets: Iterable[str], linears: Iterable[str]) -> None:
    """Raises: ValueError for targets that name none of the linears at these paths, listing the names there are."""
    if unknown := [t for t in targets if not any(_ends_with(name, t) for name in linears)]:
        there = sorted({name.rsplit(".", 1)[-1] for name in linears})
        raise ValueError(f"target_modules: found no linear named {unknown}; the model has {there}")


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _is_dense(m: nn.Module) -> bool:
    # nn.MultiheadAttention reads the weight of its out_proj, which is of this class, and never calls it.
    return isinstance(m, nn.Linear) and not isinstance(m, (NF4Linear, nn.modules.linear.NonDynamicallyQuantizableLinear))


def check_weights(model: nn.Module, linears: dict[str, nn.Linear], dtype: torch.dtype | None) -> None:
    holders = Counter(id(p) for _, m in model.named_modules(remove_duplicate=False) for p in m.parameters(recurse=False))
    for name, linear in linears.items():
        if isinstance(linear, NF4Linear):
            continue
        if linear.weight.is_meta:
            raise ValueError(f"{name}: found its weight on the meta device; load the model before quantizing it")
        if holders[id(linear.weight)] > 1:
            raise ValueError(f"{name}: found its weight shared with another module, which would stay dense; exclude {name!r}")
        weight = linear.weight.detach()
        wanted = dtype or weight.dtype if weight.is_floating_point() else weight.dtype
        if wanted not in FLOATS:
            raise TypeError(f"{name}.weight: found {wanted}, wanted one of {FLOATS}; exclude {name!r} or give dtype=")
        weight = weight.to(dtype=dtype)
        if not weight.isfinite().all():
            raise_not_finite(f"{name}.weight", weight)
