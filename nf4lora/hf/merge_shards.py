"""Merging to the disk: weights are decoded, merged and written one layer at a time, and never all of them in memory."""

import copy
import json
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel, modeling_utils
from transformers.utils import logging

from ..nn import NF4Linear
from ..nn.experts import NF4Experts
from .conversion import blank
from .decoded import DecodedLinear, decode_rest
from .experts import dequantize_experts
from .hooks import Hooks
from .merging import merged, to_merge, try_merging
from .peft_merge import Merging, merging

_NAMES = {
    torch.float64: "F64", torch.int64: "I64", torch.float32: "F32", torch.int32: "I32", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int16: "I16", torch.uint8: "U8", torch.int8: "I8", torch.bool: "BOOL",
}  # fmt: skip


def save_merged(
    peft_model: nn.Module, folder: str | os.PathLike, dtype: torch.dtype = torch.bfloat16,
    adapter_names: list[str] | None = None, max_shard_size: int | str | None = None,
    progress: Callable[[int, int], Any] | None = None,
) -> None:  # fmt: skip
    """Write what `merge_and_unload(peft_model, dtype, safe_merge=True).save_pretrained(folder)` writes, layer by layer.

    The same bytes; only, of files of `max_shard_size`, experts are spread over others: each tensor is as in memory.

    Beside the packed model there is, at one time, one layer: for LoRA, DoRA, AdaLoRA and IA3 at most seven times its weight in
    float32; of experts, the stacks of one module in `dtype`, twice. What is not in 4 bits is in memory as a whole, as is a base in
    floats, whose adapted layers are in float32.

    Args:
        peft_model:     as in `merge_and_unload`, on a model of transformers; it is used up, also by an error
        folder:         written into as it goes: after an error what is there is of no use
        dtype, adapter_names: as in `merge_and_unload`
        max_shard_size: of a file, "5GB" or a number of bytes; transformers' own by default
        progress:       called with the bytes written and their sum, as tensors are written
    Raises: as `merge_and_unload`, and TypeError for a base that is no model of transformers; OSError.
    """
    tuner = to_merge(peft_model, dtype)
    if not isinstance(tuner.model, PreTrainedModel):
        raise TypeError(f"peft_model: found a {type(tuner.model).__name__} as its base, wanted a model of transformers")
    try_merging(tuner, dtype, adapter_names, packed=False)
    promises = _Promises(dtype, {m: name for name, m in tuner.model.named_modules()})
    model = merged(tuner, Merging(dtype, later=promises.merge, rest=promises.rest), adapter_names, safe=True)
    vars(model).pop("hf_device_map", None)  # with "cpu" in it what is on the meta device were taken for offloaded
    state = {name: promises.tensor(p) for name, p in model.state_dict(keep_vars=True).items()}
    total = sum(t.nbytes for t in {id(p): p for p in model.state_dict(keep_vars=True).values()}.values())
    sizes = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    bar = progress is not None and logging.is_progress_bar_enabled()  # of transformers; two would be drawn
    hooks = Hooks()
    hooks.around(modeling_utils, "safe_save_file", _Writer(progress, total).write)
    try:
        if bar:
            logging.disable_progress_bar()
        model.save_pretrained(folder, state_dict=state, **sizes)
    finally:
        hooks.remove()
        if bar:
            logging.enable_progress_bar()


class _Later(Tensor):
    """A tensor on the meta device that knows how its values are made; so does what functions of torch make of it."""

    values: Callable[[], Tensor]

    @classmethod
    def of(cls, like: Tensor, values: Callable[[], Tensor]) -> "_Later":
        made = torch.empty(like.shape, dtype=like.dtype, device="meta").as_subclass(cls)
        made.values = values
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **kwargs)

        def values() -> Any:
            return func(*tree_map_only(cls, cls.now, args), **tree_map_only(cls, cls.now, kwargs))

        if isinstance(found, Tensor):
            return cls.of(found, values)
        if isinstance(found, (tuple, list)) and any(isinstance(t, Tensor) for t in found):
            return type(found)([cls.of(t, lambda i=i: values()[i]) for i, t in enumerate(found)])
        return found

    @staticmethod
    def now(t: Tensor) -> Tensor:
        return t.values() if isinstance(t, _Later) else t


class _Promises:
    """Layers on the meta device in the place of merged ones, and how each is made when its weight is written."""

    def __init__(self, dtype: torch.dtype, names: dict[nn.Module, str]) -> None:
        self._dtype, self._names = dtype, names
        self._makers: dict[nn.Parameter, tuple[Callable[[], nn.Module], str]] = {}
        self._made: tuple[Any, Any] = None, None  # the last, as tensors of one layer are written together

    def _promise(self, shell: nn.Module, make: Callable[[], nn.Module]) -> nn.Module:
        self._makers |= {p: (make, name) for name, p in shell.named_parameters(recurse=False) if p.is_meta}
        return shell

    def tensor(self, p: Tensor) -> Tensor:
        maker = self._makers.get(p)
        return p.detach() if maker is None else _Later.of(p, partial(self._value, *maker))

    def _value(self, make: Callable[[], nn.Module], name: str) -> Tensor:
        if self._made[0] is not make:
            self._made = None, None  # freed before the next is made
            self._made = make, make()
        return getattr(self._made[1], name).detach()

    def merge(self, layer: BaseTunerLayer, *args: Any, **kwargs: Any) -> None:
        """In the place of merging `layer`, which is right on a 4-bit base."""
        packed = layer.base_layer

        def make() -> nn.Module:
            layer.base_layer = packed
            token = merging.set(Merging(self._dtype))
            try:
                layer.merge(*args, **kwargs | {"safe_merge": False})  # its result is looked at below
            finally:
                merging.reset(token)
            made, layer.base_layer = layer.base_layer, packed
            layer.merged_adapters.clear()
            if isinstance(made, NF4Linear):  # no adapter here
                return self._decoded(made)
            if not all(p.isfinite().all() for p in made.parameters()):
                raise ValueError(f"{self._names[layer]}: found NaN or Inf in the merged weights")
            return made.plain()

        layer.base_layer = self._promise(blank(packed, "meta", self._dtype), make)

    def rest(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        """As `decode_rest`."""
        for name, layer in [(name, m) for name, m in model.named_modules() if isinstance(m, NF4Linear)]:
            model.set_submodule(name, self._promise(blank(layer, "meta", dtype), partial(self._decoded, layer)))
        stacked = {m: _twin(m) for m in model.modules() if isinstance(m, NF4Experts)}
        for shell in stacked:
            for key, p in shell.named_parameters(recurse=False):
                if not p.is_floating_point():
                    shell._parameters[key] = nn.Parameter(p.to("meta"), requires_grad=False)
        dequantize_experts(model, dtype)
        for shell, packed in stacked.items():
            self._promise(shell, lambda packed=packed: _twin(packed).dense_(dtype))
        decode_rest(model, dtype)

    def _decoded(self, layer: NF4Linear) -> nn.Module:
        dense = DecodedLinear(layer)
        dense.to_dtype(self._dtype)
        return dense.plain()


def _twin(module: nn.Module) -> nn.Module:
    """A module with the same parameters, which may be given others."""
    twin = copy.copy(module)
    twin._parameters = dict(module._parameters)
    return twin


class _Writer:
    """safetensors' `save_file` for tensors that are made as they are written."""

    def __init__(self, progress: Callable[[int, int], Any] | None, total: int) -> None:
        self._progress, self._done, self._total = progress or (lambda done, total: None), 0, total

    @torch.no_grad()
    def write(self, original: Any, tensors: dict[str, Tensor], filename: str, metadata: dict[str, str]) -> None:
        order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))  # so that each is aligned
        header, at = {"__metadata__": metadata}, 0
        for name in order:
            t = tensors[name]
            header[name] = {
                "dtype": _NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [at, at := at + t.numel() * t.itemsize]
            }  # fmt: skip
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with open(filename, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                t = _Later.now(tensors.pop(name)).contiguous().cpu()
                self._done += file.write(t.reshape(-1).view(torch.uint8).numpy().data)
                del t
                self._progress(self._done, self._total)
