"""`DecodedLinear`: what stands in the place of a 4-bit base while adapters are merged into it, and what a model is after."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..nn import NF4Linear, NF4LoRALinear
from ..nn.experts import NF4Experts
from . import experts
from .loaded import not_converted
from .quantizer import NF4Quantizer


class DecodedLinear(nn.Linear):
    """The decoded weight, with adapters merged into it; as an `NF4Linear` it takes x of any dtype. Keeps the packed base."""

    def __init__(self, packed: NF4Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = packed.in_features, packed.out_features
        weight, bias = _floats(packed)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.source, self.given_dtype = getattr(packed, "source", nn.Linear), packed.weight_dtype
        self.kept = (packed,)  # in a tuple it is no submodule: neither saved nor counted
        self.busy, self.merged_by = False, []
        self.train(packed.training)

    def reset(self) -> None:
        """The decoded weight in float32 again, without what was merged; needs the packed base."""
        weight, bias = _floats(self.kept[0])
        self.weight.data = weight.to(self.weight.device)
        if self.bias is not None:
            self.bias.data = bias.to(self.weight.device)

    def to_dtype(self, dtype: torch.dtype) -> None:
        for p in self.parameters():
            p.data = p.data.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)

    def plain(self) -> nn.Module:
        """The layer that was quantized, `nn.Linear` or transformers' Conv1D, on this weight."""
        if self.source is Conv1D:
            layer = Conv1D(self.out_features, self.in_features)
            layer.weight = nn.Parameter(self.weight.t().contiguous(), requires_grad=False)
            layer.bias = (
                self.bias if self.bias is not None else nn.Parameter(self.weight.new_zeros(self.out_features), False)
            )
        else:
            layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
            layer.weight, layer.bias = self.weight, self.bias
        return layer.train(self.training)


@torch.no_grad()
def _floats(packed: NF4Linear) -> tuple[Tensor, Tensor | None]:
    """The weight [N, K], with the adapter that `packed` holds itself, and a copy of the bias [N], in float32."""
    adapted = isinstance(packed, NF4LoRALinear) and packed.r
    weight = packed.merge(torch.float32).weight if adapted else packed.dequantize(torch.float32)
    return weight.detach(), None if packed.bias is None else packed.bias.detach().to(torch.float32, copy=True)


class Requantized(NamedTuple):
    """What requantizing made of a merged change: inner products, in float64, of what was wanted and what there is."""

    dot: float
    wanted: float
    found: float


def requantize_(packed: NF4Linear, merged: nn.Linear) -> Requantized:
    """Put the merged weight into `packed`, in 4 bits; where nothing was changed no byte is."""
    before, dtype = packed.dequantize(torch.float32), packed.weight_dtype
    if merged.bias is not None:
        packed._freeze("bias", merged.bias.to(packed.bias.dtype))
    if not (wanted := merged.weight.double() - before).any():
        return Requantized(0.0, 0.0, 0.0)
    packed.quantize_(merged.weight)
    packed.weight_dtype = dtype
    found = packed.dequantize(torch.float32).double() - before
    return Requantized(*((a * b).sum().item() for a, b in ((wanted, found), (wanted, wanted), (found, found))))


def put_plain(model: nn.Module) -> None:
    """Plain layers in the place of every `DecodedLinear`, and a configuration that knows them: they are saved as floats."""
    if not (merged := [(name, m) for name, m in model.named_modules() if isinstance(m, DecodedLinear)]):
        return
    for name, layer in merged:
        model.set_submodule(name, layer.plain())
    if not isinstance(quantizer := getattr(model, "hf_quantizer", None), NF4Quantizer):
        return
    if any(isinstance(m, (NF4Linear, NF4Experts)) for m in model.modules()):
        dense = not_converted(model)
        for config in (quantizer.quantization_config, model.config.quantization_config):
            config.modules_to_not_convert = dense
    else:
        quantizer.remove_quantization_config(model)


@torch.no_grad()
def decode_rest(model: nn.Module, dtype: torch.dtype) -> None:
    """Nothing in 4 bits any more, parameters of one dtype, and no word of quantization in the configuration."""
    for name, layer in [(name, m) for name, m in model.named_modules() if isinstance(m, NF4Linear)]:
        dense = DecodedLinear(layer)
        dense.to_dtype(dtype)  # one layer at a time in float32
        model.set_submodule(name, dense.plain())
    experts.dequantize_experts(model, dtype)
    kept = model._get_dtype_plan(dtype) if hasattr(model, "_get_dtype_plan") else {}
    for name, p in model.named_parameters():
        if p.is_floating_point() and not any(f".{key}." in f".{name}." for key in kept):
            p.data = p.data.to(dtype)  # buffers stay: rotary frequencies are float32 in models of any dtype
    if isinstance(quantizer := getattr(model, "hf_quantizer", None), NF4Quantizer):
        quantizer.remove_quantization_config(model)
    if hasattr(getattr(model, "config", None), "dtype"):
        model.config.dtype = dtype
