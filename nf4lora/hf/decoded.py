"""`DecodedLinear`: what stands in the place of a 4-bit base while adapters are merged into it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..nn import NF4Linear, NF4LoRALinear


class DecodedLinear(nn.Linear):
    """The decoded weight, with adapters merged into it; as an `NF4Linear` it takes x of any dtype. Keeps the packed base."""

    def __init__(self, packed: NF4Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = packed.in_features, packed.out_features
        adapted = isinstance(packed, NF4LoRALinear) and packed.r
        weight = packed.merge(torch.float32).weight if adapted else packed.dequantize(torch.float32)
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None
        if packed.bias is not None:
            self.bias = nn.Parameter(packed.bias.detach().to(torch.float32, copy=True), requires_grad=False)
        self.source, self.given_dtype = getattr(packed, "source", nn.Linear), packed.weight_dtype
        self.kept = (packed,)  # in a tuple it is no submodule: neither saved nor counted
        self.busy, self.merged_by = False, []
        self.train(packed.training)

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
