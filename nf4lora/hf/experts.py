"""Mixture-of-experts weights of transformers' models, which no `nn.Linear` holds: into 4 bits, back, and what stays in 16."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import logging

from ..checks import raise_not_finite
from ..nn.expert_layers import as_experts, expert_stacks
from ..nn.experts import NF4Experts
from ..nn.linear import NF4Linear

logger = logging.get_logger("transformers.nf4lora")  # with the level that transformers' verbosity sets


def _found(model: nn.Module, skip: Iterable[str] | None) -> dict[str, nn.Module]:
    skip = None if skip is None else list(skip)
    return {name: m for name, m in model.named_modules() if expert_stacks(m) and should_convert_module(name, skip)}


def prepare_experts(model: nn.Module, config: Any, skip: Iterable[str] | None, pre_quantized: bool) -> list[str]:
    """Turn the modules of experts of a model on the meta device into `NF4Experts`, before its weights are loaded.

    Args:
        config:        an `NF4Config`
        skip:          patterns of modules that stay as they are
        pre_quantized: whether the checkpoint holds the integers; if not, `quantized` makes them of each stack that is read
    Returns: the names of these modules
    """
    found = _found(model, skip)
    for module in found.values():
        # Float until it is read: transformers before 5.18 casts a checkpoint to the dtype it finds here.
        as_experts(module, **config.layer_options()).expect_(codes=pre_quantized)
        module._is_hf_initialized = True  # keeps the model's own initialization off integer weights
    return list(found)


def quantize_experts_(
    model: nn.Module, skip: Iterable[str] | None = None, device: Any = None, **options: Any
) -> list[str]:
    """Turn the modules of experts of a model in memory into `NF4Experts`, in place.

    Args: `skip` patterns as transformers has them; `device` to quantize on and stay; `options` blocksize, quant_type,
        double_quant, compute_dtype as in `NF4Linear`.
    Returns: the names of these modules.
    Raises: ValueError for stacks on the meta device and, before anything is changed, for NaN or Inf.
    """
    found = _found(model, skip)
    for name, module in found.items():
        for stack in expert_stacks(module):
            weight = getattr(module, stack).detach()
            if weight.is_meta:
                raise ValueError(f"{name}.{stack}: found it on the meta device; load the model before quantizing it")
            if not all(bool(expert.isfinite().all()) for expert in weight):
                raise_not_finite(f"{name}.{stack}", weight)
    for module in found.values():
        as_experts(module, **options).quantize_(device)
    return list(found)


def holds(module: nn.Module, name: str) -> bool:
    """Whether the parameter `name` of `module` is a stack of experts to quantize."""
    return isinstance(module, NF4Experts) and name in module.stacks


def quantized(module: nn.Module, name: str, value: Tensor) -> dict[str, nn.Parameter]:
    """The integer parameters of a float stack [E, a, b], by name: `name`, `name_absmax`, … Raises: ValueError, TypeError."""
    module.weight_dtype = value.dtype
    return {key: nn.Parameter(t, requires_grad=False) for key, t in module.quantized(name, value).items()}


def dequantize_experts(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Put decoded stacks of `dtype`, of that before quantization by default, back into every module of experts.

    They are then saved as the checkpoints of transformers' models have them, an expert a tensor.
    """
    stacks = _stacks(model)
    for module in list(model.modules()):
        if isinstance(module, NF4Experts):
            module.dense_(dtype)
    if (used := getattr(model, "_weight_conversions", None)) is not None:
        there = [c for c in get_model_conversion_mapping(model, add_legacy=False) if _makes(c, stacks)]
        model._weight_conversions = [*there, *(c for c in used if not _makes(c, stacks))]


def save_stacks_whole(model: nn.Module) -> None:
    """Keep `save_pretrained` from running backwards what merged the experts: it would cut the codes as if they were floats."""
    stacks = _stacks(model)
    model._weight_conversions = [c for c in getattr(model, "_weight_conversions", None) or () if not _makes(c, stacks)]


def _stacks(model: nn.Module) -> list[str]:
    return [f"{name}.{s}" for name, m in model.named_modules() if isinstance(m, NF4Experts) for s in m.stacks]


def _makes(conversion: Any, stacks: list[str]) -> bool:
    """Whether this step of the loader makes one of these, of more than a name."""
    targets = conversion.target_patterns if getattr(conversion, "operations", None) else ()
    return any(
        s.endswith(t.replace("\\", "").strip("^.$")) for s in stacks for t in targets
    )  # some write patterns: "\\.experts"


def left_in_16_bits(model: nn.Module) -> dict[str, int]:
    """Bytes of every float parameter of two or more dimensions, by name, the largest first: what 4 bits do not hold.

    Embeddings, head, routers, stacks that were skipped and biases of experts, adapters of peft; not those of `NF4LoRALinear`.
    """
    parameters = ((name, m, n, p) for name, m in model.named_modules() for n, p in m.named_parameters(recurse=False))
    left, seen = {}, set()
    for module_name, module, name, p in parameters:
        if p.is_floating_point() and p.ndim > 1 and not isinstance(module, NF4Linear) and id(p) not in seen:
            seen.add(id(p))
            left[f"{module_name}.{name}".lstrip(".")] = p.numel() * p.element_size()
    return dict(sorted(left.items(), key=lambda item: -item[1]))


def tell_what_stays(model: nn.Module) -> None:
    """Log the bytes that 4 bits do not hold; warnings name stacks of weights, 3-D, and linears of other classes that stay.

    Those no quantizer of transformers takes, and nobody would see it.
    """
    left = left_in_16_bits(model)
    largest = ", ".join(f"{name} {size:,}" for name, size in list(left.items())[:3])
    logger.info(f"{sum(left.values()):,} bytes of weights are not in 4 bits, {largest} among them: nf4lora.hf.left_in_16_bits has all")
    holders = {name: model.get_submodule(name.rpartition(".")[0]) for name in left if model.get_parameter(name).ndim == 3}
    stacks = [name for name, holder in holders.items() if not isinstance(holder, nn.Conv1d)]
    if stacks:
        logger.warning(
            f"{sum(left[name] for name in stacks):,} bytes in {len(stacks)} stacks of weights stay in {model.dtype}, "
            f"{stacks[0]} the largest of them"
        )
    others = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and type(m) is not nn.Linear and n + ".weight" in left}
    if others:
        kinds, first = sorted({type(m).__name__ for m in others.values()}), next(iter(others))
        logger.warning(
            f"{sum(left[name + '.weight'] for name in others):,} bytes in {len(others)} linears of class {', '.join(kinds)} stay in "
            f"{model.dtype}, {first} among them"
        )
