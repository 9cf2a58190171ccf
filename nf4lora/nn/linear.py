"""`NF4Linear`: a linear layer whose weight is frozen in 4 bits."""

import math
from typing import Any, Self

import torch
from torch import Tensor, nn

from .. import autograd, checks
from ..codebook import NESTED_BLOCKSIZE
from ..functional import dequantize_4bit, quantize_4bit
from ..quant_state import QuantState, ceil_div
from .entry import entered, held
from .together import computed_before

_WEIGHT = ("weight", "weight_absmax", "weight_nested_absmax", "weight_nested_offset")


class NF4Linear(nn.Linear):
    """y = x W^T + b with W frozen in 4 bits.

    All of the weight is frozen *integer* parameters, so that casts, DDP, FSDP2 and mixed-precision policies, which
    change floats only, leave it whole: `weight` uint8 [ceil(N*K/2), 1] in bitsandbytes' byte layout; `weight_absmax`
    uint8 [G], or float32 [G] as int32 bits without double quantization; and with it, as int32 bits of float32,
    `weight_nested_absmax` [ceil(G/256)] and `weight_nested_offset` [1]. G = ceil(N*K/blocksize). The state dict holds
    these tensors only: blocksize and quant_type are the constructor's.

    Args:
        in_features, out_features: K and N
        bias:          whether there is a bias [N]; it is frozen
        blocksize:     elements per absmax: 32, 64, …, 4096
        quant_type:    "nf4" or "fp4"
        double_quant:  8-bit absmax
        compute_dtype: dtype of the product, None for x's own; the table of dtypes is in `nf4lora.nn`
        device:        of the parameters; "meta" leaves them to `quantize_` or `load_state_dict(assign=True)`
        dtype:         of the weight before quantization, and of the bias; torch's default by default
    Raises: ValueError, TypeError naming the argument. On a real device the weight starts as `nn.Linear`'s does.
    """

    # Loading any of the first names of a row takes the whole row.
    _TOGETHER = ((_WEIGHT, ("bias",)),)

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, blocksize: int = 64, quant_type: str = "nf4",
        double_quant: bool = True, compute_dtype: torch.dtype | None = None, device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        nn.Module.__init__(self)
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if type(size) is not int or size < 1:
                raise ValueError(f"{name}: found {size!r}, wanted a positive integer")
        checks.format(blocksize, quant_type)
        dtype = dtype or torch.get_default_dtype()
        for name, value in (("dtype", dtype), ("compute_dtype", compute_dtype or dtype)):
            if value not in checks.FLOATS:
                raise TypeError(f"{name}: found {value}, wanted one of {checks.FLOATS}")
        self.in_features, self.out_features = in_features, out_features
        self.blocksize, self.quant_type, self.double_quant = blocksize, quant_type, double_quant
        self.compute_dtype, self.weight_dtype = compute_dtype, dtype
        blocks = ceil_div(in_features * out_features, blocksize)
        sizes = {"weight": (ceil_div(in_features * out_features, 2), 1), "weight_absmax": (blocks,)}
        if double_quant:
            sizes |= {"weight_nested_absmax": (ceil_div(blocks, NESTED_BLOCKSIZE),), "weight_nested_offset": (1,)}
        for name, size in sizes.items():
            is_bytes = name == "weight" or (double_quant and name == "weight_absmax")
            self._freeze(name, torch.empty(size, dtype=torch.uint8 if is_bytes else torch.int32, device=device))
        for name in (*_WEIGHT, "bias"):
            if name not in sizes:
                self.register_parameter(name, None)
        if bias:
            self._freeze("bias", torch.empty(out_features, dtype=dtype, device=device))
        self.reset_parameters()

    def _freeze(self, name: str, t: Tensor) -> None:
        setattr(self, name, nn.Parameter(t, requires_grad=False))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Quantize a fresh `nn.Linear` initialization; nothing on the meta device."""
        if self.weight.is_meta:
            return
        fresh = torch.empty(self.out_features, self.in_features, dtype=self.weight_dtype, device=self.weight.device)
        nn.init.kaiming_uniform_(fresh, a=math.sqrt(5))
        self.quantize_(fresh)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -1 / math.sqrt(self.in_features), 1 / math.sqrt(self.in_features))

    @torch.no_grad()
    def quantize_(self, weight: Tensor, check_finite: bool = True, device: Any = None) -> Self:
        """Take the 4-bit form of `weight`, float [N, K], on its device or on `device`, where it need not fit whole.

        On an error the layer stays as it was.
        """
        wanted = (self.out_features, self.in_features)
        if tuple(weight.shape) != wanted:
            raise ValueError(f"weight: found shape {tuple(weight.shape)}, wanted {wanted}")
        packed, state = quantize_4bit(
            weight, self.blocksize, self.double_quant, self.quant_type, check_finite=check_finite, device=device
        )
        self._freeze("weight", packed)
        self._freeze("weight_absmax", state.absmax if self.double_quant else state.absmax.view(torch.int32))
        if self.double_quant:
            self._freeze("weight_nested_absmax", state.nested_absmax.view(torch.int32))
            self._freeze("weight_nested_offset", state.offset.reshape(1).view(torch.int32))
        self.weight_dtype = weight.dtype
        return self

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, device: Any = None, dtype: torch.dtype | None = None, **kwargs: Any) -> Self:
        """The 4-bit form of a dense linear, which is left as it is; `kwargs` as in the constructor.

        Raises: TypeError for another kind of layer; ValueError for NaN or Inf in the weight.
        """
        if not isinstance(linear, nn.Linear) or isinstance(linear, NF4Linear) or not linear.weight.is_floating_point():
            raise TypeError(f"linear: found {type(linear).__name__}, wanted a torch.nn.Linear with a float weight")
        weight = linear.weight.detach().to(dtype=dtype)
        has_bias = linear.bias is not None
        layer = cls(linear.in_features, linear.out_features, bias=has_bias, device="meta", dtype=weight.dtype, **kwargs)
        layer.quantize_(weight, device=device)
        if has_bias:
            layer._freeze("bias", linear.bias.detach().to(layer.weight.device, weight.dtype, copy=True))
        return layer.train(linear.training)

    @property
    def quant_state(self) -> QuantState:
        """How `weight` is decoded, sharing this layer's memory."""
        _, absmax, *nested = self._weight_args()
        nested_absmax, offset = (t if t is None else t.view(torch.float32) for t in nested)
        absmax = absmax if self.double_quant else absmax.view(torch.float32)
        return QuantState(absmax, (self.out_features, self.in_features), self.weight_dtype, self.blocksize,
                          self.quant_type, None if offset is None else offset.reshape(()), nested_absmax)  # fmt: skip

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The decoded weight, `dtype` [N, K]; the dtype before quantization by default."""
        return dequantize_4bit(self.weight, self.quant_state, dtype)

    W_q = property(lambda self: self.weight)  # peft calls dequantize() of a layer that has one, for DoRA and others

    def _weight_args(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return held(self, *_WEIGHT)

    def _adapter(self) -> tuple[Tensor | None, Tensor | None, float]:
        """lora_A, lora_B, scaling."""
        return None, None, 1.0

    def _dropout(self, x: Tensor) -> tuple[Tensor | None, float]:
        """The seed of this forward's mask, if elements of x are to be dropped, and their probability."""
        return None, 0.0

    def forward(self, x: Tensor) -> Tensor:
        """x float [..., K] -> [..., N]; dtypes as in the table of `nf4lora.nn`."""
        if (y := computed_before(self, x)) is not None:
            return y
        weight, (bias,) = self._weight_args(), held(self, "bias")
        compute, dtype = entered(self, x, weight[0])
        (lora_A, lora_B, scaling), (seed, dropout_p) = self._adapter(), self._dropout(x)
        y = autograd.linear(
            compute, *weight, bias, lora_A, lora_B, seed,
            self.out_features, self.blocksize, self.quant_type, scaling, dropout_p,
        )  # fmt: skip
        return y if y.dtype == dtype else y.to(dtype)

    def _format(self) -> dict[str, Any]:
        """What the tensors of the state dict do not say; travels in its `_metadata`, which `torch.save` keeps."""
        shape = [self.out_features, self.in_features]
        return {"shape": shape, "blocksize": self.blocksize, "quant_type": self.quant_type}

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if metadata := getattr(destination, "_metadata", None):
            metadata[prefix[:-1]]["nf4lora"] = self._format()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
        """As `nn.Module`'s, but what belongs together comes whole and in its own dtypes or not at all, also with strict=False."""
        wrong = []
        for needing, others in self._TOGETHER:
            names = (*needing, *others)
            if not any(prefix + n in state_dict for n in needing):
                continue
            for n in names:
                own, new = getattr(self, n, None), state_dict.get(prefix + n)
                if own is None or not isinstance(new, Tensor):
                    if own is not new:
                        wrong.append(f"{'unexpected' if own is None else 'missing' if new is None else f'a {type(new)} as'} {prefix}{n}")
                elif new.shape != own.shape or (
                    new.dtype != own.dtype and not (new.is_floating_point() and own.is_floating_point())
                ):
                    wrong.append(f"{prefix}{n} is {new.dtype} {list(new.shape)}, wanted {own.dtype} {list(own.shape)}")
        if prefix + "weight" in state_dict and (saved := local_metadata.get("nf4lora", self._format())) != self._format():
            wrong.append(f"{prefix}weight was saved from {saved}, wanted {self._format()}")
        if wrong:
            error_msgs.append(f"{self} (prefix {prefix!r}) was left as it is: {'; '.join(sorted(wrong))}")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        kind = f"{self.quant_type}, blocksize={self.blocksize}, double_quant={self.double_quant}"
        return f"{super().extra_repr()}, {kind}, compute_dtype={self.compute_dtype}"
