"""A model that transformers has just loaded: whether every 4-bit layer is whole, and what config.json is to say of it."""

import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..nn import NF4Linear
from ..nn.expert_layers import expert_stacks
from ..nn.experts import NF4Experts
from .checkpoint import CheckpointError
from .conversion import blank, parameters


def new_layers(model: nn.Module) -> list[str]:
    """Names of the `NF4Linear`s of which the checkpoint held nothing, such as a new head.

    Raises: CheckpointError naming what is missing of a layer of which there is something, and of experts; what is of
            another size or dtype than the format of the layer has.
    """
    new = []
    for name, module in model.named_modules():
        if isinstance(module, NF4Linear):
            needed, wanted = parameters(module), parameters(_alike(module))
        elif isinstance(module, NF4Experts):
            wanted = {key: t for stack in module.stacks for key, t in module._empty(stack, "meta").items()}
            needed = {key: getattr(module, key) for key in wanted}
        else:
            continue
        missing = [key for key, p in needed.items() if not p.is_meta and not getattr(p, "_is_hf_initialized", False)]
        if len(missing) == len(needed) and isinstance(module, NF4Linear):
            new.append(name)
            continue
        if missing:
            raise CheckpointError(
                f"{name}: the checkpoint holds no {', '.join(missing)}; what there is of it cannot be decoded"
            )
        for key, t in wanted.items():
            p = needed[key]
            if not p.is_meta and (p.shape != t.shape or p.dtype != t.dtype):
                found, format_has = (f"{list(x.shape)}{f' of {x.dtype}' if p.dtype != t.dtype else ''}" for x in (p, t))
                raise CheckpointError(f"{name}.{key}: found {found}, wanted {format_has} for {module}")
    return new


def _alike(layer: NF4Linear) -> NF4Linear:
    """An empty layer of the same sizes and format."""
    return NF4Linear(
        layer.in_features,
        layer.out_features,
        False,
        layer.blocksize,
        layer.quant_type,
        layer.double_quant,
        device="meta",
    )


def fetch_integers(model: nn.Module) -> None:
    """Let integer weights on the disk be fetched as integers: transformers 5.0 has all of them cast to the model's dtype."""
    for name, module in model.named_modules():
        weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        index = getattr(getattr(weights, "dataset", weights), "index", None) or {}
        for key, p in module.named_parameters(recurse=False):
            if (entry := index.get(f"{name}.{key}")) and p.is_meta and not p.is_floating_point():
                entry["dtype"] = str(p.dtype).removeprefix("torch.")


@torch.no_grad()
def make_dense(model: PreTrainedModel, names: list[str]) -> None:
    """Put freshly initialized linears in the place of these layers, to be trained."""
    for name in names:
        layer = model.get_submodule(name)
        made = blank(layer, layer.weight.device, layer.weight_dtype)
        model.set_submodule(name, made)
        model._init_weights(made)


@torch.no_grad()
def fill_biases(model: nn.Module) -> None:
    """Zeros for each bias of a 4-bit layer that the checkpoint lacks."""
    for layer in model.modules():
        bias = layer.bias if isinstance(layer, NF4Linear) else None
        if bias is not None and not bias.is_meta and not getattr(bias, "_is_hf_initialized", False):
            bias.zero_()


def one_format(model: nn.Module) -> dict[str, Any]:
    """quant_type, blocksize and double_quant of every 4-bit layer; empty without one. Raises: ValueError naming two that differ."""
    formats: dict[tuple, str] = {}
    for name, m in model.named_modules():
        if isinstance(m, (NF4Linear, NF4Experts)):
            formats.setdefault((m.quant_type, m.blocksize, m.double_quant), name)
    if len(formats) > 1:
        (one, first), (other, second), *_ = formats.items()
        raise ValueError(
            f"found {first} as {one} and {second} as {other} (quant_type, blocksize, double_quant), "
            "wanted one 4-bit format in a model"
        )
    return {} if not formats else dict(zip(("quant_type", "blocksize", "double_quant"), *formats, strict=True))


def not_converted(model: nn.Module) -> list[str]:
    """Patterns that keep out exactly the linears and experts of `model` that are not in 4 bits."""
    kinds = (nn.Linear, Conv1D, NF4Experts)
    modules = {name: m for name, m in model.named_modules() if isinstance(m, kinds) or expert_stacks(m)}
    packed = [name for name, m in modules.items() if isinstance(m, (NF4Linear, NF4Experts))]
    dense = [name for name in modules if name not in set(packed)]
    return [f"^{re.escape(n)}$" if _hits(n, packed) else n for n in dense]


def _hits(name: str, paths: list[str]) -> bool:
    """Whether transformers, which takes a name for a pattern of beginnings and for an end, could find it in one of these."""
    pattern = re.compile(name)
    return any(pattern.match(path) or path.endswith(name) for path in paths)
