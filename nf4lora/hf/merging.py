"""Adapters of any kind into the weights they were trained on: in 16 bits, or on request back into 4."""

import math
import sys
from typing import Any, NamedTuple

import torch
from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from ..checks import FLOATS
from ..nn import NF4Linear
from ..nn.experts import NF4Experts
from .decoded import DecodedLinear, Requantized
from .peft_merge import Merging, merging, on_packed
from .quantizer import NF4Quantizer

DENSE = (*FLOATS, torch.float64)


class MergedIn4Bit(NamedTuple):
    """A merged 4-bit model, and how much of the adapters requantizing has left: 1 all of it, 0 nothing but noise."""

    model: nn.Module
    cosine: dict[str, float]  # of each layer, by its path
    overall: float


def merge_and_unload(
    peft_model: nn.Module, dtype: torch.dtype = torch.bfloat16, adapter_names: list[str] | None = None, safe_merge: bool = False,
    progressbar: bool = False,
) -> nn.Module:  # fmt: skip
    """The base model with the active adapters merged into its decoded weights, a plain model in `dtype`.

    Adapters were trained on the decoded weight, so that is what they are merged into, layer by layer, in float32, rounded
    once. Adapters that `merge_adapter()` has merged are merged anew. Layers without an adapter are decoded too. An adapted head
    that was tied to the embedding is a weight of its own then, and so says the configuration.
    `save_pretrained` then writes a checkpoint that loads without nf4lora. A base in floats is merged in float32 as well: its
    adapted layers take 4 bytes an element meanwhile.
    `peft_model.merge_and_unload()` does the same in the dtype that a 4-bit base was quantized from.

    Args:
        peft_model:    a PeftModel of any tuner that peft can merge; it is used up, as by peft's own method
        dtype:         float32, bfloat16 or float16
        adapter_names: those to merge; the active ones by default
        safe_merge:    check the merged weights for NaN and Inf, also of `dtype`
    Raises: TypeError for another model or dtype; ValueError for a base that others have quantized or that is offloaded, and,
            naming the layer, for NaN or Inf with `safe_merge`, where the model stays whole, and for a tied weight that a model
            of its kind cannot have apart (T5's) or that is merged into already.
    """
    tuner = to_merge(peft_model, dtype)
    if safe_merge:
        try_merging(tuner, dtype, adapter_names)
    return merged(tuner, Merging(dtype), adapter_names, safe_merge, progressbar)


def merge_in_4bit_(
    peft_model: nn.Module, adapter_names: list[str] | None = None, progressbar: bool = False
) -> MergedIn4Bit:
    """Merge the active adapters into the 4-bit weights themselves: LOSSY, an update under half a quantization step is gone.

    The decoded weight plus the change is quantized again, in the layer's own format. What is left of the change is told by the
    cosine between it and the change that there is then; it says how much of what was learned a user of the merged model keeps.
    Prefer `merge_and_unload`, or the adapter beside its base. Every layer is merged twice, the first time on trial.

    Returns: `MergedIn4Bit`, its model the one inside `peft_model`, its adapters taken out. Arguments as in `merge_and_unload`.
    Raises: TypeError for another model; ValueError, with nothing changed, for a base without 4-bit layers, adapters that are
            merged already, and, naming the layer, NaN or Inf.
    """
    tuner = _checked(peft_model)
    for name, layer in _tuner_layers(tuner):
        if layer.merged:
            raise ValueError(f"{name}: found {layer.merged_adapters} merged already; call unmerge_adapter() first")
    names = {m: name for name, m in tuner.model.named_modules() if isinstance(m, NF4Linear)}
    if not names:
        raise ValueError(
            f"peft_model: found {type(peft_model).__name__} without 4-bit layers, wanted one on an NF4 base"
        )
    try_merging(tuner, None, adapter_names)
    how = Merging(in_4bit=True)
    model = merged(tuner, how, adapter_names, False, progressbar)
    parts = {names[packed].replace(".base_layer", ""): part for packed, part in how.requantized.items()}
    total = Requantized(*(sum(part[i] for part in parts.values()) for i in range(3)))
    return MergedIn4Bit(model, {name: _cosine(part) for name, part in parts.items()}, _cosine(total))


def merged(
    tuner: BaseTuner, how: Merging, adapter_names: list[str] | None, safe: bool, progressbar: bool = False
) -> nn.Module:
    """The model inside `tuner`, its adapters merged and taken out."""
    token = merging.set(how)
    try:
        return tuner.merge_and_unload(progressbar=progressbar, safe_merge=safe, adapter_names=adapter_names)
    finally:
        merging.reset(token)


def _tuner_layers(tuner: BaseTuner) -> list[tuple[str, BaseTunerLayer]]:
    return [(name, m) for name, m in tuner.model.named_modules() if isinstance(m, BaseTunerLayer)]


@torch.no_grad()
def try_merging(
    tuner: BaseTuner, dtype: torch.dtype | None, adapter_names: list[str] | None, packed: bool = True
) -> None:
    """Merge each layer on its own and take it back, so that an error comes before anything is changed.

    packed: also those on 4 bits.
    """
    token = merging.set(Merging(dtype or torch.float32))
    try:
        for name, layer in [(n, m) for n, m in _tuner_layers(tuner) if packed or not on_packed(m)]:
            try:
                _try_layer(layer, dtype, adapter_names)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
    finally:
        merging.reset(token)


def _try_layer(layer: BaseTunerLayer, dtype: torch.dtype | None, adapter_names: list[str] | None) -> None:
    earlier = layer.merged  # and stays: unmerging floats is not exact
    given = [] if earlier or on_packed(layer) else [(p, p.data) for p in layer.parameters()]
    try:
        for p, data in given:
            p.data = data.to(torch.float32 if dtype and data.dtype in FLOATS else data.dtype, copy=True)
        if not earlier:
            layer.merge(adapter_names=adapter_names)
        floats = (p for p in layer.get_base_layer().parameters() if p.is_floating_point())
        if not all((p.to(dtype) if dtype else p).isfinite().all() for p in floats):
            raise ValueError("found NaN or Inf in the merged weights; nothing was changed")
    finally:
        if layer.merged and not earlier:
            layer.unmerge()
        for p, data in given:
            p.data = data


def to_merge(peft_model: Any, dtype: torch.dtype) -> BaseTuner:
    """What `merge_and_unload` merges. Raises: as it does."""
    if dtype not in FLOATS:
        raise TypeError(f"dtype: found {dtype}, wanted one of {FLOATS}")
    tuner = _checked(peft_model)
    if offloaded := [name for name, p in tuner.model.named_parameters() if p.is_meta]:
        raise ValueError(
            f"{offloaded[0]}: found it offloaded; merge a model that is loaded without offload in its device_map"
        )
    return tuner


def _checked(peft_model: Any) -> BaseTuner:
    tuner = getattr(peft_model, "base_model", None)
    of_peft = isinstance(peft_model, (PeftModel, PeftMixedModel))
    if not of_peft or not isinstance(tuner, BaseTuner):
        found = type(peft_model).__name__ + (f" on a {type(tuner).__name__}" if of_peft else "")
        raise TypeError(f"peft_model: found {found}, wanted a peft model whose adapters change weights (LoRA, IA3, …)")
    _refuse_quantized_by_others(tuner)
    return tuner


def _refuse_quantized_by_others(tuner: BaseTuner) -> None:
    bitsandbytes = sys.modules.get("bitsandbytes")
    for name, m in tuner.model.named_modules():
        if bitsandbytes and isinstance(m, bitsandbytes.nn.Linear4bit):
            raise ValueError(
                f"{name}: found 4 bits of bitsandbytes, wanted a base of nf4lora: save the adapter, call "
                "nf4lora.hf.from_bitsandbytes_(base) on the base without it, and load the adapter on that"
            )
    own = any(isinstance(m, (NF4Linear, NF4Experts, DecodedLinear)) for m in tuner.model.modules())
    found = None if own else getattr(tuner.model, "hf_quantizer", None)
    for name, layer in _tuner_layers(tuner):
        base = layer.get_base_layer()
        floats = isinstance(base, (NF4Linear, DecodedLinear)) or all(p.dtype in DENSE for p in base.parameters())
        found = found or (None if floats else f"{name}.{base}")
    if found is not None and not isinstance(found, NF4Quantizer):
        raise ValueError(
            f"peft_model: found a base quantized by {found if isinstance(found, str) else type(found).__name__}, wanted one of "
            "nf4lora or one in floats; peft_model.merge_and_unload(), peft's own, merges it in its own format"
        )


def _cosine(part: Requantized) -> float:
    if part.wanted == 0:  # nothing to keep
        return 1.0 if part.found == 0 else 0.0
    return part.dot / math.sqrt(part.wanted * part.found) if part.found else 0.0
