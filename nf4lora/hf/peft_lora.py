"""`NF4LoraLinear`: peft's LoRA layer on a 4-bit base, base and adapters computed in one call."""

from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from .. import autograd, checks
from ..nn import NF4Linear
from ..nn.entry import entered, held


class _Adapter(NamedTuple):
    A: Tensor
    B: Tensor
    scaling: float | Tensor
    dropout: nn.Module


class NF4LoraLinear(Linear):
    """peft's `lora.Linear` whose base is an `NF4Linear`: the same adapters, files and methods, another forward.

    A forward is one call for the base and all active adapters: with one adapter what `NF4LoRALinear` computes of the same
    numbers, bit for bit; with several, one adapter of their joined ranks. Dtypes as in the table of `nf4lora.nn`.
    DoRA and other variants, `lora_bias`, several adapters with dropout in training, mixed batches (`adapter_names`),
    merged weights, and a base or an adapter with hooks of its own take peft's forward.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x float [..., K] -> [..., N]."""
        if args or kwargs or not (adapters := self._in_one_call()):
            return super().forward(x, *args, **kwargs)
        base = self._modules["base_layer"]
        weight, (bias,) = base._weight_args(), held(base, "bias")
        compute, dtype = entered(base, x, weight[0])
        lora_A, lora_B, scaling = _joined(adapters)
        seed, dropout_p = _dropout(adapters[0].dropout, x)
        y = autograd.linear(
            compute, *weight, bias, lora_A, lora_B, seed,
            base.out_features, base.blocksize, base.quant_type, scaling, dropout_p,
        )  # fmt: skip
        return y if y.dtype == dtype else y.to(dtype)

    def _in_one_call(self) -> list[_Adapter]:
        """The active adapters of this layer, if one call can compute them all; else none."""
        modules = self._modules  # past the look-up of nn.Module, which finds them last
        base, lora_A, lora_B, dropouts = (modules[name] for name in ("base_layer", "lora_A", "lora_B", "lora_dropout"))
        if self._disable_adapters or self.merged_adapters or not isinstance(base, NF4Linear) or _hooked(base):
            return []
        names = [name for name in self.active_adapters if name in lora_A._modules]
        adapters = []
        for name in names:
            A, B, dropout = lora_A._modules[name], lora_B._modules[name], dropouts._modules[name]
            if name in self.lora_variant or any(type(m) is not nn.Linear or _hooked(m) for m in (A, B)):
                return []
            (a,), (b, bias) = held(A, "weight"), held(B, "weight", "bias")
            if bias is not None or a.dtype not in checks.FLOATS or b.dtype not in checks.FLOATS:
                return []
            drops = type(dropout) is not nn.Identity and dropout.training
            if drops and (len(names) > 1 or type(dropout) is not nn.Dropout or dropout.p >= 1):
                return []
            adapters.append(_Adapter(a, b, self.scaling[name], dropout))
        return adapters


def _joined(adapters: list[_Adapter]) -> tuple[Tensor, Tensor, float]:
    """lora_A [r, K], lora_B [N, r] and scaling, of one adapter or of the join of several."""
    first = adapters[0].scaling
    # a tensor where peft prepared a compiled hotswap
    if any(isinstance(a.scaling, Tensor) or a.scaling != first for a in adapters):
        adapters, first = [a._replace(B=a.B.float() * a.scaling) for a in adapters], 1.0
    if len(adapters) == 1:
        return adapters[0].A, adapters[0].B, first
    return torch.cat([a.A for a in adapters]), torch.cat([a.B for a in adapters], 1), first


def _dropout(dropout: nn.Module, x: Tensor) -> tuple[Tensor | None, float]:
    """The seed of this forward's mask, if elements of x are to be dropped, and their probability."""
    if type(dropout) is nn.Identity or not dropout.training or not dropout.p:
        return None, 0.0
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device), dropout.p


def _hooked(module: nn.Module) -> bool:
    """Whether a call of the module does more than its forward: hooks, or weights that accelerate brings for the call."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    return "forward" in vars(module) and getattr(vars(module).get("_hf_hook"), "offload", True)
