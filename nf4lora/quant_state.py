"""`QuantState`: what, beside the packed bytes, says how a 4-bit tensor is decoded. Its docstring is the format."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import quant_keys
from .codebook import BLOCKSIZES, NESTED_BLOCKSIZE, QUANT_TYPES, codebook
from .quant_keys import DTYPES


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True, eq=False)
class QuantState:
    """How a packed 4-bit tensor is decoded: `w[i] = code[q[i]] * absmax[i // blocksize]`, i over the row-major tensor.

    Packing: element 2j is the high nibble of byte j, element 2j+1 the low one; the padding nibble of an odd count is
    the code of zero. Blocks of `blocksize` elements run over the flattened tensor, may straddle rows, and the last may
    be short. A block of zeros has absmax 0 and decodes to +0. Quantizing: `q = #{boundaries < x * (1 / absmax)}` in
    float32, the reciprocal correctly rounded and absmax clamped to 1e-38 there; a tie takes the lower code.
    Double quantization: `absmax = dynamic[code8] * nested_absmax[block // nested_blocksize] + offset`, two roundings.

    Fields:
        absmax:           float32 [ceil(numel / blocksize)]; uint8 codes of the dynamic map when nested
        shape:            of the tensor before packing
        dtype:            of the tensor before packing: float32, bfloat16 or float16
        blocksize:        elements per absmax: 32 … 4096, a power of two
        quant_type:       "nf4" or "fp4"
        offset:           float32 [], the mean of the absmax, when nested
        nested_absmax:    float32 [ceil(len(absmax) / nested_blocksize)], when nested
        nested_blocksize: 256
    Raises: ValueError or TypeError naming the field, what was found and what was wanted.
    Source: QLoRA, arXiv:2305.14314 §3; the bytes and the keys of `as_dict` are those of bitsandbytes.
    """

    absmax: Tensor
    shape: torch.Size
    dtype: torch.dtype
    blocksize: int = 64
    quant_type: str = "nf4"
    offset: Tensor | None = None
    nested_absmax: Tensor | None = None
    nested_blocksize: int = NESTED_BLOCKSIZE

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", torch.Size(self.shape))
        if self.quant_type not in QUANT_TYPES:
            raise ValueError(f"quant_type: found {self.quant_type!r}, wanted one of {QUANT_TYPES}")
        if type(self.blocksize) is not int or self.blocksize not in BLOCKSIZES:
            raise ValueError(f"blocksize: found {self.blocksize!r}, wanted one of {BLOCKSIZES}")
        if type(self.nested_blocksize) is not int or self.nested_blocksize != NESTED_BLOCKSIZE:
            raise ValueError(f"nested_blocksize: found {self.nested_blocksize!r}, wanted {NESTED_BLOCKSIZE}")
        if self.dtype not in DTYPES.values():
            raise TypeError(f"dtype: found {self.dtype}, wanted one of {tuple(DTYPES)}")
        if (self.offset is None) != (self.nested_absmax is None):
            raise ValueError("offset and nested_absmax belong together: found one of them without the other")
        blocks = ceil_div(self.numel, self.blocksize)
        _check_tensor("absmax", self.absmax, torch.uint8 if self.nested else torch.float32, blocks)
        if self.nested:
            _check_tensor("nested_absmax", self.nested_absmax, torch.float32, ceil_div(blocks, self.nested_blocksize))
            _check_tensor("offset", self.offset, torch.float32, 1)
            devices = {t.device for t in (self.absmax, self.nested_absmax, self.offset)}
            if len(devices) > 1:
                raise ValueError(f"absmax, nested_absmax and offset: found on {sorted(map(str, devices))}, wanted one device")

    @property
    def nested(self) -> bool:
        return self.nested_absmax is not None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def code(self) -> Tensor:
        """The 16 values of the codes, float32 [16], on the device of `absmax`; a copy."""
        return codebook(self.quant_type, self.absmax.device).clone()

    def to(self, device: torch.device | str) -> "QuantState":
        """The same state on another device; `self` is left as it is."""
        move = {k: t.to(device) for k in ("absmax", "offset", "nested_absmax") if (t := getattr(self, k)) is not None}
        return replace(self, **move)

    def __eq__(self, other: object) -> bool:
        """Equal fields and equal bits of every tensor."""
        if not isinstance(other, QuantState):
            return NotImplemented
        plain = ("shape", "dtype", "blocksize", "quant_type", "nested", "nested_blocksize")
        return all(getattr(self, k) == getattr(other, k) for k in plain) and all(
            torch.equal(_bits(getattr(self, k)), _bits(getattr(other, k)))
            for k in (("absmax", "nested_absmax", "offset") if self.nested else ("absmax",))
        )

    __hash__ = None

    def as_dict(self, packed: bool = True) -> dict[str, Any]:
        """bitsandbytes' keys and values. `packed=True`: tensors only, the rest as JSON bytes in one uint8 tensor."""
        return quant_keys.write(self, packed)

    @classmethod
    def from_dict(cls, quant_dict: dict[str, Any], device: torch.device | str | None = None) -> "QuantState":
        """Read what `as_dict` or bitsandbytes wrote; keys may carry a prefix ("model.layer.weight.absmax").

        float16 and bfloat16 statistics are upcast. `quant_dict` is left as it is.
        Raises: ValueError when a key is missing, unknown or does not fit the others.
        """
        return cls(**quant_keys.read(quant_dict, device))


def _bits(t: Tensor) -> Tensor:
    return t.contiguous().reshape(-1).view(torch.uint8)


def _check_tensor(name: str, t: Tensor, dtype: torch.dtype, numel: int) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: found {type(t).__name__}, wanted a {dtype} tensor")
    if t.dtype != dtype:
        raise TypeError(f"{name}: found {t.dtype}, wanted {dtype}")
    if t.numel() != numel or not t.is_contiguous():
        kind = "" if t.is_contiguous() else "non-contiguous "
        raise ValueError(f"{name}: found {t.numel()} {kind}elements, wanted {numel} contiguous")
