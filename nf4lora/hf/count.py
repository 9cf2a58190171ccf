"""How many parameters a model has, and in how many bytes: peft and transformers count packed bytes, half as many."""

from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, nn

from ..nn import NF4Linear
from ..nn.experts import NF4Experts
from .bf16_storage import STORED


@dataclass(frozen=True)
class Parameters:
    """Of a model: counts of elements, and bytes; `str()` says them in two lines.

    total:           all, a 4-bit weight as out_features * in_features
    trainable:       those that learn
    quantized:       those in 4 bits
    quantized_bytes: of the 4-bit weights, with their absmax
    other_bytes:     of everything else: embeddings, norms, biases, dense layers, adapters
    """

    total: int
    trainable: int
    quantized: int
    quantized_bytes: int
    other_bytes: int

    @property
    def bits_per_quantized(self) -> float:
        return 8 * self.quantized_bytes / self.quantized if self.quantized else 0.0

    def __str__(self) -> str:
        share = self.trainable / self.total if self.total else 0.0
        return (
            f"trainable {self.trainable:,} of {self.total:,} parameters ({share:.4%})\n"
            f"in 4 bits {self.quantized:,}: {_size(self.quantized_bytes)}, {self.bits_per_quantized:.3f} bits each; "
            f"the other {self.total - self.quantized:,}: {_size(self.other_bytes)}"
        )


def count_parameters(model: nn.Module) -> Parameters:
    """The parameters of `model`, each once however often it is shared; buffers are none.

    Works on the meta device too, and on models in peft's hands.
    """
    packed = _packed(model)
    quantized = sum({key: n for m in model.modules() for key, n in _elements(m).items()}.values())
    others = [p for p in model.parameters() if id(p) not in packed]
    return Parameters(
        total=quantized + sum(p.numel() for p in others),
        trainable=sum(p.numel() for p in others if p.requires_grad),
        quantized=quantized,
        quantized_bytes=sum(map(_bytes, packed.values())),
        other_bytes=sum(map(_bytes, others)),
    )


def _elements(module: nn.Module) -> dict[int, int]:
    """Counts of those that this module itself holds in 4 bits, by the id of the parameter that has their codes.

    On its way from a checkpoint a module may hold a weight as it was.
    """
    if isinstance(module, NF4Linear):
        sizes = {"weight": (module.out_features, module.in_features)}
    elif (state := _of_bitsandbytes(module._parameters.get("weight"))) is not None:
        sizes = {"weight": tuple(state.shape)}
    else:
        sizes = module.stacks if isinstance(module, NF4Experts) else {}
    own = module._parameters
    codes = {name: own.get(name + STORED, own.get(name)) for name in sizes}
    return {id(p): prod(sizes[name]) for name, p in codes.items() if _in_4_bits(module, p)}


def _of_bitsandbytes(p: Tensor | None) -> Any:
    """How bitsandbytes decodes a weight of its own that is in 4 bits; None for others."""
    return getattr(p, "quant_state", None) if type(p).__name__ == "Params4bit" else None


def _in_4_bits(module: nn.Module, p: Tensor) -> bool:
    if not p.is_floating_point() or _of_bitsandbytes(p) is not None:
        return True
    return any(module._parameters.get(key + STORED) is p for key in vars(module).get("stored", ()))


def _packed(model: nn.Module) -> dict[int, Tensor]:
    """The parameters that hold the 4-bit weights of `model`, by id."""
    holders = [m for m in model.modules() if _elements(m)]
    return {id(p): p for m in holders for p in m.parameters(recurse=False) if _in_4_bits(m, p)}


def _bytes(p: Tensor) -> int:
    state = _of_bitsandbytes(p)
    nested = getattr(state, "state2", None)
    constants = () if state is None else (state.absmax, *((nested.absmax, state.offset) if nested else ()))
    return sum(t.numel() * t.element_size() for t in (p, *constants))


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"
