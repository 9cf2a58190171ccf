"""Merging peft's adapters of any kind on a 4-bit base: the tuners' own code, on the decoded weight.

For the time that adapters are merged a dense layer stands in the base's place. It is merged into in float32 and rounded once.
Unmerging puts the packed base back, which nothing has touched.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.mixed import MixedModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from ..nn import NF4Linear
from .decoded import DecodedLinear, Requantized, decode_rest, put_plain, requantize_
from .hooks import Hooks
from .tied import untied


@dataclass
class Merging:
    """How bases are merged here: the dtype they end in (None for the one they were quantized from), or back in 4 bits.

    `later` is called in the place of merging a layer that is right on a 4-bit base, and `rest` decodes what has no adapter.
    """

    dtype: torch.dtype | None = None
    in_4bit: bool = False
    requantized: dict[NF4Linear, Requantized] = field(default_factory=dict)
    later: Callable[..., None] | None = None
    rest: Callable[[nn.Module, torch.dtype], None] = decode_rest


merging: ContextVar[Merging] = ContextVar("nf4lora_merging", default=Merging())  # noqa: B039 (this one is never changed)
_for_good: ContextVar[bool] = ContextVar("nf4lora_for_good", default=False)


def install(hooks: Hooks) -> None:
    """Hook merge and unmerge of every tuner's layers, and what takes the layers out of a model."""
    for cls in _subclasses(BaseTunerLayer):
        for name, ours in (("merge", _merge), ("unmerge", _unmerge)):
            if name in vars(cls):
                hooks.around(cls, name, ours)
    for cls in (BaseTuner, *_subclasses(BaseTuner)):
        if "_unload_and_optionally_merge" in vars(cls):
            hooks.around(cls, "_unload_and_optionally_merge", _unload)


def _subclasses(cls: type) -> list[type]:
    found = {sub: None for direct in cls.__subclasses__() for sub in (direct, *_subclasses(direct))}
    return list(found)


def _holder(layer: BaseTunerLayer) -> BaseTunerLayer | None:
    """The tuner layer, this one or one that it wraps, right on a base of ours."""
    while isinstance(base := getattr(layer, "base_layer", None), BaseTunerLayer):
        layer = base
    return layer if isinstance(base, (NF4Linear, DecodedLinear)) else None


def on_packed(layer: BaseTunerLayer) -> bool:
    return isinstance(layer.get_base_layer(), NF4Linear)


def _merge(original: Any, layer: BaseTunerLayer, *args: Any, **kwargs: Any) -> Any:
    holder = _holder(layer)
    if holder is None or isinstance(holder.base_layer, DecodedLinear) and holder.base_layer.busy:
        return original(layer, *args, **kwargs)
    if merging.get().later and holder is layer and on_packed(layer):
        return merging.get().later(layer, *args, **kwargs)
    if not isinstance(holder.base_layer, DecodedLinear):
        if hasattr(holder.base_layer, "_hf_hook") and getattr(holder.base_layer._hf_hook, "offload", True):
            raise ValueError(
                f"found {holder.base_layer} offloaded; merge a model that is loaded without offload in its device_map"
            )
        holder.base_layer = DecodedLinear(holder.base_layer)
    dense, how = holder.base_layer, merging.get()
    try:
        with _working(dense), _float32(layer):
            if dense.merged_by and dense.kept and dense.weight.dtype != torch.float32:
                _merge_anew(dense)
            dense.to_dtype(torch.float32)
            return original(layer, *args, **kwargs)
    finally:
        if layer.merged_adapters and layer not in dense.merged_by:
            dense.merged_by.append(layer)
        if not dense.merged_by:
            holder.base_layer = dense.kept[0]
        elif how.in_4bit:
            how.requantized[dense.kept[0]] = requantize_(dense.kept[0], dense)
            holder.base_layer = dense.kept[0]
        else:
            dense.to_dtype(how.dtype or dense.given_dtype)
            if _for_good.get():
                dense.kept = ()  # nobody unmerges: free the packed base now, not after the last layer


def _merge_anew(dense: DecodedLinear) -> None:
    """What is merged already, in float32: its sum was rounded."""
    earlier = [(layer, list(layer.merged_adapters)) for layer in dense.merged_by]
    if not all(layer._get_available_adapters().issuperset(names) for layer, names in earlier):
        return  # an adapter was deleted since: it lives on in the sum alone
    for layer, _ in reversed(earlier):
        layer.unmerge()
    dense.reset()
    for layer, names in earlier:
        with _float32(layer):
            layer.merge(adapter_names=names)


def _unmerge(original: Any, layer: BaseTunerLayer, *args: Any, **kwargs: Any) -> Any:
    holder = _holder(layer)
    if holder is None or not isinstance(holder.base_layer, DecodedLinear) or holder.base_layer.busy:
        return original(layer, *args, **kwargs)
    dense = holder.base_layer
    try:
        with _working(dense):
            return original(layer, *args, **kwargs)  # for its books: the weight that it computes is let go
    finally:
        dense.merged_by = [other for other in dense.merged_by if other.merged_adapters]
        if not dense.merged_by:
            holder.base_layer = dense.kept[0].to(dense.weight.device)


@contextmanager
def _working(dense: DecodedLinear) -> Iterator[None]:
    """Merging may unmerge and merge again inside: all of that is on the dense weight."""
    dense.busy = True
    try:
        with torch.no_grad(), torch.autocast(dense.weight.device.type, enabled=False):
            yield
    finally:
        dense.busy = False


@contextmanager
def _float32(layer: nn.Module) -> Iterator[None]:
    """The layer's adapters in float32: tuners compute a change in its dtype, and round it before it is added."""
    floats = (p for name, p in layer.named_parameters() if "base_layer." not in name)
    given = [(p, p.data) for p in floats if p.dtype in (torch.bfloat16, torch.float16)]
    for p, data in given:
        p.data = data.float()
    try:
        yield
    finally:
        for p, data in given:
            p.data = data


def _unload(original: Any, tuner: BaseTuner, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
    dtypes = Counter(dtype for m in tuner.model.modules() if (dtype := _given_dtype(m)) is not None)
    how, dtype = merging.get(), None
    if merge and not how.in_4bit:
        dtype = how.dtype or (dtypes.most_common(1)[0][0] if dtypes else None)
    # of adapters on top of each other the second to be merged has the first merged anew
    token = _for_good.set(merge and not isinstance(tuner, MixedModel))
    try:
        apart = untied(tuner) if dtype or merge and how.in_4bit else nullcontext()
        with apart, _dense_in_float32(tuner) if dtype else nullcontext():
            model = original(tuner, merge, *args, **kwargs)
    finally:
        _for_good.reset(token)
    put_plain(model)
    if dtype is not None:
        how.rest(model, dtype)
    return model


@contextmanager
def _dense_in_float32(tuner: BaseTuner) -> Iterator[None]:
    """Adapted layers that are not in 4 bits, and their adapters, in float32 while they are merged."""
    layers = [m for m in tuner.model.modules() if isinstance(m, BaseTunerLayer) and _holder(m) is None]
    given = [(p, p.dtype) for m in layers for p in m.parameters() if p.dtype in (torch.bfloat16, torch.float16)]
    for p, _ in given:
        p.data = p.data.float()
    try:
        yield
    except BaseException:
        for p, dtype in given:
            p.data = p.data.to(dtype)
        raise


def _given_dtype(module: nn.Module) -> torch.dtype | None:
    """Of the weight before it was quantized."""
    if isinstance(module, DecodedLinear):
        return module.given_dtype
    return module.weight_dtype if isinstance(module, NF4Linear) else None
