"""Stacks of experts in 4 bits: what a module that holds 3-D weights gets instead of them, each expert a 4-bit tensor of its own."""

from functools import cache
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from .. import autograd
from ..codebook import NESTED_BLOCKSIZE
from ..functional import dequantize_4bit, quantize_4bit
from ..quant_state import QuantState, ceil_div
from .entry import entered
from .transposed import linear_transposed

_OWN = ("stacks", "transposed", "blocksize", "quant_type", "double_quant", "compute_dtype", "weight_dtype")
_STATISTICS = ("_absmax", "_nested_absmax", "_nested_offset")


class _Projection(NamedTuple):
    """One expert's product, as errors name it."""

    stack: str
    in_features: int
    compute_dtype: torch.dtype | None


class NF4Experts(nn.Module):
    """A module of experts, its stacked weights frozen in 4 bits: its own class with this one before it (`as_experts`).

    A weight `name` of float [E, a, b] is held as frozen integer parameters: `name` uint8 [E, ceil(a*b/2)]; `name_absmax`
    uint8 [E, G], or float32 as int32 bits without double quantization; and with it, as int32 bits of float32,
    `name_nested_absmax` [E, ceil(G/256)] and `name_nested_offset` [E]. G = ceil(a*b/blocksize). Row e of each is what
    `quantize_4bit(weight[e])` gives, so that an expert is read where it lies. Biases and all else stay as they were.

    Attributes: `stacks` (name -> (E, a, b)), `transposed` (whether weight[e] is [in, out]), `blocksize`, `quant_type`,
    `double_quant`, `compute_dtype`, `weight_dtype` as in `NF4Linear`; `dense_class`, the class it was.
    """

    kind: type["NF4Experts"]
    dense_class: type[nn.Module]
    stacks: dict[str, tuple[int, int, int]]

    def names_of(self, name: str) -> list[str]:
        """Of the integer parameters of a stack, the codes first."""
        return [name, *(name + s for s in (_STATISTICS if self.double_quant else _STATISTICS[:1]))]

    def _empty(self, name: str, device: Any) -> dict[str, Tensor]:
        E, a, b = self.stacks[name]
        blocks = ceil_div(a * b, self.blocksize)
        sizes = (E, ceil_div(a * b, 2)), (E, blocks), (E, ceil_div(blocks, NESTED_BLOCKSIZE)), (E,)
        dtypes = torch.uint8, torch.uint8 if self.double_quant else torch.int32, torch.int32, torch.int32
        parts = zip(self.names_of(name), sizes, dtypes, strict=False)
        return {key: torch.empty(size, dtype=dtype, device=device) for key, size, dtype in parts}

    @torch.no_grad()
    def quantized(self, name: str, weight: Tensor, device: Any = None) -> dict[str, Tensor]:
        """The integers that hold `weight`, float [E, a, b]; expert by expert, this module is left as it is.

        Raises: ValueError (shape; NaN or Inf, naming the expert), TypeError (dtype).
        """
        if tuple(weight.shape) != self.stacks[name]:
            raise ValueError(f"{name}: found shape {tuple(weight.shape)}, wanted {self.stacks[name]}")
        done = self._empty(name, weight.device if device is None else device)
        for e, expert in enumerate(weight.detach()):
            try:
                packed, state = quantize_4bit(expert, self.blocksize, self.double_quant, self.quant_type, device=device)
            except ValueError as error:
                raise ValueError(f"{name}, expert {e}: {error}") from error
            found = packed.view(-1), state.absmax, state.nested_absmax, state.offset
            for part, t in zip(done.values(), found, strict=False):
                part[e] = t if t.dtype == part.dtype else t.view(torch.int32)
        return done

    def quantize_(self, device: Any = None) -> Self:
        """Take the 4-bit form of the stacks that are still float, each on its device or on `device`."""
        for name in self.stacks:
            if (weight := getattr(self, name)).is_floating_point():
                self._hold(self.quantized(name, weight, device))
        return self

    def expect_(self, codes: bool = True) -> Self:
        """Hold empty integer parameters on the meta device, for a loader to fill; without `codes`, beside the float stacks."""
        for name in self.stacks:
            empty = self._empty(name, "meta")
            self._hold({key: t for key, t in empty.items() if codes or key != name})
        return self

    def dense_(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Become the module this was before, with the decoded stacks, frozen, in `dtype`; that before quantization by default."""
        for name in self.stacks:
            self._hold({name: self.dequantize(name, dtype)})
            for key in self.names_of(name)[1:]:
                del self._parameters[key]
        for name in _OWN:
            del self.__dict__[name]
        self.__class__ = self.dense_class
        return self

    def _hold(self, tensors: dict[str, Tensor]) -> None:
        for key, t in tensors.items():
            self.register_parameter(key, nn.Parameter(t, requires_grad=False))

    def _expert(self, name: str, e: int) -> tuple[Tensor | None, ...]:
        """packed, absmax, nested_absmax, offset of one expert, in the memory of the stacks."""
        if (codes := getattr(self, name)).dtype != torch.uint8:
            raise RuntimeError(
                f"{name}: found {codes.dtype}, wanted 4-bit codes: quantize first; no adapter can change them"
            )
        found = [getattr(self, key) for key in self.names_of(name)]
        return *(t[e] for t in found), *[None] * (4 - len(found))

    def dequantize_expert(self, name: str, e: int, dtype: torch.dtype | None = None) -> Tensor:
        """The decoded weight of one expert, `dtype` [a, b]; the dtype before quantization by default."""
        packed, absmax, nested_absmax, offset = self._expert(name, e)
        absmax, nested_absmax, offset = (
            t if t is None or t.dtype == torch.uint8 else t.view(torch.float32) for t in (absmax, nested_absmax, offset)
        )
        state = QuantState(
            absmax, self.stacks[name][1:], self.weight_dtype, self.blocksize, self.quant_type, offset, nested_absmax
        )
        return dequantize_4bit(packed, state, dtype)

    def dequantize(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The decoded stack, `dtype` [E, a, b]; more than it takes one expert."""
        dtype = dtype or self.weight_dtype
        whole = torch.empty(self.stacks[name], dtype=dtype, device=getattr(self, name).device)
        for e, expert in enumerate(whole):
            expert.copy_(self.dequantize_expert(name, e, dtype))
        return whole

    def expert_linear(self, x: Tensor, name: str, e: int, bias: Tensor | None = None) -> Tensor:
        """x [M, in] -> [M, out] by the weight of one expert, without a decoded copy of it; dtypes as in the table of `nf4lora.nn`."""
        _, a, b = self.stacks[name]
        weight = self._expert(name, e)
        x, dtype = entered(_Projection(name, a if self.transposed else b, self.compute_dtype), x, weight[0])
        if not self.transposed:
            y = autograd.linear(x, *weight, bias, None, None, None, a, self.blocksize, self.quant_type, 1.0, 0.0)
        else:
            y = linear_transposed(x, *weight, b, self.blocksize, self.quant_type)
            y = y if bias is None else y + bias.to(y.dtype)
        return y if y.dtype == dtype else y.to(dtype)

    def _format(self) -> dict[str, Any]:
        """What the tensors of the state dict do not say; travels in its `_metadata`."""
        return {"stacks": self.stacks, "blocksize": self.blocksize, "quant_type": self.quant_type}

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if metadata := getattr(destination, "_metadata", None):
            metadata[prefix[:-1]]["nf4lora"] = self._format()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        """As `nn.Module`'s, but the stacks come whole and in their own dtypes or not at all, also with strict=False."""
        wrong = []
        for key in [key for name in self.stacks for key in (name, *(name + s for s in _STATISTICS))]:
            own, new = getattr(self, key, None), state_dict.get(prefix + key)
            if own is None or new is None:
                if own is not new:
                    wrong.append(f"{'missing' if new is None else 'unexpected'} {prefix}{key}")
            elif new.shape != own.shape or new.dtype != own.dtype:
                wrong.append(f"{prefix}{key} is {new.dtype} {list(new.shape)}, wanted {own.dtype} {list(own.shape)}")
        if (saved := local_metadata.get("nf4lora", self._format())) != self._format():
            wrong.append(f"{prefix} was saved from {saved}, wanted {self._format()}")
        if wrong and any(prefix + name in state_dict for name in self.stacks):
            error_msgs.append(f"the experts of {prefix!r} were left as they are: {'; '.join(sorted(wrong))}")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        stacks = ", ".join(f"{name}={list(shape)}" for name, shape in self.stacks.items())
        kind = f"{self.quant_type}, blocksize={self.blocksize}, double_quant={self.double_quant}"
        return f"{stacks}, {kind}, compute_dtype={self.compute_dtype}"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _blank, (self.kind, self.dense_class), self.__dict__  # the class itself has no name to be found by


@cache
def class_of(kind: type[NF4Experts], dense: type[nn.Module]) -> type[NF4Experts]:
    """`dense` with `kind` before it; the same class every time."""
    return type(f"NF4{dense.__name__}", (kind, dense), {"kind": kind, "dense_class": dense})


def _blank(kind: type[NF4Experts], dense: type[nn.Module]) -> NF4Experts:
    made = class_of(kind, dense)
    return made.__new__(made)
