"""4-bit weights stored as bfloat16, the same bytes: for FSDP2 of torch before 2.12, which cannot shard integer parameters."""

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..nn import NF4Linear
from ..nn.experts import NF4Experts

STORED = "_bf16"


def store_as_bfloat16(model: nn.Module) -> int:
    """Give every integer parameter of 4-bit layers a bfloat16 view of its bytes, `weight_bf16` in the place of `weight`, and so on.

    Call it last, right before `fully_shard`: FSDP2 of torch before 2.12 wants float parameters ("only Tensors of floating point
    dtype can require gradients"); from 2.12 on nothing of this is needed. Forwards read the same bytes, some of which are NaNs
    to bfloat16: they are moved and never computed with. `MixedPrecisionPolicy(param_dtype=torch.bfloat16)`, or none, leaves
    them whole, `model.to(dtype)` passes them over, and after any other cast the next forward raises RuntimeError.
    `save_pretrained` writes the integers. A second call changes nothing.

    Returns: how many parameters are stored so.
    Raises:  ValueError for parameters on the meta device or sharded already, naming the first.
    """
    found = [
        (name, layer, key, p)
        for name, layer in model.named_modules()
        if isinstance(layer, (NF4Linear, NF4Experts))
        for key, p in layer.named_parameters(recurse=False)
        if not p.is_floating_point()
    ]
    for name, _, key, p in found:
        if p.is_meta or isinstance(p, DTensor):
            what = "on the meta device" if p.is_meta else "sharded"
            raise ValueError(
                f"{name}.{key}: found it {what}, wanted it whole: call store_as_bfloat16 before fully_shard"
            )
    for _, layer, key, p in found:
        layer.__dict__.setdefault("stored", {})[key] = p.dtype, tuple(p.shape)
        layer.__class__ = _class_of(_base(layer))
        del layer._parameters[key]
        layer.register_parameter(key + STORED, nn.Parameter(_as_bfloat16(p.detach()), requires_grad=False))
    return sum(len(m.stored) for m in model.modules() if isinstance(m, _Stored))


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """`model.state_dict()` with integers where they are stored as bfloat16."""
    state = model.state_dict()
    for name, layer in model.named_modules():
        for key in layer.stored if isinstance(layer, _Stored) else ():
            path = f"{name}.{key}".lstrip(".")
            t = state.pop(path + STORED)
            state[path] = layer.read(key, t.full_tensor() if isinstance(t, DTensor) else t)
    return state


class _Stored:
    """Before the class of a layer: its integers, read where they are stored."""

    stored: dict[str, tuple[torch.dtype, tuple[int, ...]]]

    def read(self, key: str, t: Tensor) -> Tensor:
        """The integer tensor that `t`, bfloat16, has the bytes of, in the same memory."""
        dtype, shape = self.stored[key]
        if t.dtype != torch.bfloat16:
            raise RuntimeError(
                f"{self}: found its bytes cast from bfloat16 to {t.dtype}, which changes them: load the model again, cast it before "
                "store_as_bfloat16, and shard it with MixedPrecisionPolicy(param_dtype=torch.bfloat16) or without one"
            )
        return t.view(torch.uint8)[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def __getattr__(self, name: str) -> Any:
        stored = self.__dict__.get("stored", ())
        return self.read(name, super().__getattr__(name + STORED)) if name in stored else super().__getattr__(name)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _blank, (_base(self),), self.__dict__  # the class itself has no name to be found by

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """What moves or casts a model: it is shown the integers, which no cast changes."""
        own = self._parameters
        stored = {key: own[key + STORED] for key in self.stored if not isinstance(own[key + STORED], DTensor)}
        for key in stored:
            del own[key + STORED]
        try:
            super()._apply(fn, recurse)
            for key, p in stored.items():
                p.data = _as_bfloat16(fn(self.read(key, p.data)))
        finally:
            own.update({key + STORED: p for key, p in stored.items()})
        return self


def _as_bfloat16(t: Tensor) -> Tensor:
    flat = t.contiguous().reshape(-1).view(torch.uint8)
    return (nn.functional.pad(flat, (0, 1)) if flat.numel() % 2 else flat).view(torch.bfloat16)


def _base(layer: nn.Module) -> type[nn.Module]:
    return type(layer).__mro__[2] if isinstance(layer, _Stored) else type(layer)


@cache
def _class_of(base: type[nn.Module]) -> type[nn.Module]:
    return type(base.__name__, (_Stored, base), {})


def _blank(base: type[nn.Module]) -> nn.Module:
    made = _class_of(base)
    return made.__new__(made)
