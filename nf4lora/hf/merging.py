"""Adapters of any kind into the weights they were trained on: in 16 bits, or on request back into 4."""

import math
from typing import Any, NamedTuple

import torch
from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from ..checks import FLOATS
from ..nn import NF4Linear
from .peft_merge import Merging, Requantized, merging, on_packed


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
    once. Layers without an adapter are decoded too. `save_pretrained` then writes a checkpoint that loads without nf4lora.
    `peft_model.merge_and_unload()` does the same in the dtype that the base was quantized from.

    Args:
        peft_model:    a PeftModel of any tuner that peft can merge; it is used up, as by peft's own method
        dtype:         float32, bfloat16 or float16
        adapter_names: those to merge; the active ones by default
        safe_merge:    check the merged weights for NaN and Inf
    Raises: TypeError for another model or dtype; ValueError for NaN or Inf with `safe_merge`, where the model stays whole.
    """
    if dtype not in FLOATS:
        raise TypeError(f"dtype: found {dtype}, wanted one of {FLOATS}")
    return _merged(peft_model, Merging(dtype), adapter_names, safe_merge, progressbar)


def merge_in_4bit_(
    peft_model: nn.Module, adapter_names: list[str] | None = None, safe_merge: bool = False, progressbar: bool = False
) -> MergedIn4Bit:
    """Merge the active adapters into the 4-bit weights themselves: LOSSY, an update under half a quantization step is gone.

    The decoded weight plus the change is quantized again, in the layer's own format. What is left of the change is told by the
    cosine between it and the change that there is then; it says how much of what was learned a user of the merged model keeps.
    Prefer `merge_and_unload`, or the adapter beside its base.

    Returns: `MergedIn4Bit`, its model the one inside `peft_model`, its adapters taken out. Arguments as in `merge_and_unload`.
    Raises: as `merge_and_unload`; ValueError without 4-bit layers.
    """
    names = {m: name for name, m in _checked(peft_model).model.named_modules() if isinstance(m, NF4Linear)}
    if not names:
        raise ValueError(
            f"peft_model: found {type(peft_model).__name__} without 4-bit layers, wanted one on an NF4 base"
        )
    how = Merging(in_4bit=True)
    model = _merged(peft_model, how, adapter_names, safe_merge, progressbar)
    parts = {names[packed].replace(".base_layer", ""): part for packed, part in how.requantized.items()}
    total = Requantized(*(sum(getattr(part, key) for part in parts.values()) for key in ("dot", "wanted", "found")))
    return MergedIn4Bit(model, {name: _cosine(part) for name, part in parts.items()}, _cosine(total))


def _merged(
    peft_model: Any, how: Merging, adapter_names: list[str] | None, safe_merge: bool, progressbar: bool
) -> nn.Module:
    tuner = _checked(peft_model)
    if safe_merge:
        _check_finite(tuner, adapter_names)
    token = merging.set(how)
    try:
        return tuner.merge_and_unload(progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names)
    finally:
        merging.reset(token)


def _check_finite(tuner: BaseTuner, adapter_names: list[str] | None) -> None:
    """Merge each layer on its own and take it back, so that an error comes before anything is changed."""
    for layer in [m for m in tuner.modules() if isinstance(m, BaseTunerLayer) and on_packed(m) and not m.merged]:
        try:
            layer.merge(safe_merge=True, adapter_names=adapter_names)
        finally:
            if layer.merged:
                layer.unmerge()


def _checked(peft_model: Any) -> BaseTuner:
    tuner = getattr(peft_model, "base_model", None)
    of_peft = isinstance(peft_model, (PeftModel, PeftMixedModel))
    if not of_peft or not isinstance(tuner, BaseTuner):
        found = type(peft_model).__name__ + (f" on a {type(tuner).__name__}" if of_peft else "")
        raise TypeError(f"peft_model: found {found}, wanted a peft model whose adapters change weights (LoRA, IA3, …)")
    return tuner


def _cosine(part: Requantized) -> float:
    if part.wanted == 0:  # nothing to keep
        return 1.0 if part.found == 0 else 0.0
    return part.dot / math.sqrt(part.wanted * part.found) if part.found else 0.0
