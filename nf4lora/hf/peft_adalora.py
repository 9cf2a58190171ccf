"""peft's AdaLoRA on a 4-bit base: base product and P Λ Q in one call. `install` makes peft choose this layer by itself."""

from typing import Any

import torch
from peft.tuners.adalora import AdaLoraConfig, AdaLoraModel, SVDLinear
from torch import Tensor, nn

from .. import autograd, checks
from ..nn import NF4Linear, NF4LoRALinear
from ..nn.entry import entered, held
from .peft_lora import _dropout, _hooked

_create_by_peft = AdaLoraModel._create_new_module


class _Untrained(nn.ParameterDict):
    """What is put here is no weight. peft puts cast tensors in, of which the dictionary makes parameters that are trained."""

    def __setitem__(self, key: str, value: Tensor) -> None:
        super().__setitem__(key, value)
        self[key].requires_grad_(False)


class NF4SVDLinear(SVDLinear):
    """y = x W^T + b + lora_alpha / ranknum * dropout(x) (E * A)^T B^T, with W of an `NF4Linear`, in one fused operation.

    Parameters, of the adapter "default": `lora_A.default` Q [r, K], `lora_E.default` Λ [r, 1], `lora_B.default` P [N, r].
    Anything but one active adapter on a base without hooks takes peft's own forward. Dtypes: as `nf4lora.nn` has them.
    Raises: ValueError for a target_r not below init_r.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: AdaLoraConfig, **kwargs: Any) -> None:
        if not config.inference_mode:
            check_ranks(config)
        super().__init__(base_layer, adapter_name, config, **kwargs)
        self.ranknum.requires_grad_(False)
        self.ranknum.__class__ = _Untrained  # a new one would be on the meta device where peft loads through that
        self._ranknums: dict[str, tuple[Tensor, int, float]] = {}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter = None if args or kwargs else self._alone()
        if adapter is None:
            return super().forward(x, *args, **kwargs)
        base, A, E, B = self.base_layer, self.lora_A[adapter], self.lora_E[adapter], self.lora_B[adapter]
        weight, (bias,) = base._weight_args(), held(base, "bias")
        compute, dtype = entered(base, x, weight[0])
        (seed, dropout_p), scaling = _dropout(self.lora_dropout[adapter], x), 1.0
        if A.shape[0] == 0:
            QE = B = seed = None
        elif torch.compiler.is_compiling():  # a graph can read no number of a tensor
            QE = A * (E * (self.scaling[adapter] / (self.ranknum[adapter] + 1e-5)))
        else:
            QE, scaling = A * E, self.scaling[adapter] / (self._ranknum(adapter) + 1e-5)
        y = autograd.linear(
            compute, *weight, bias, QE, B, seed, base.out_features, base.blocksize, base.quant_type, scaling, dropout_p
        )
        return y if y.dtype == dtype else y.to(dtype)

    def _alone(self) -> str | None:
        """The one adapter to compute with the base, if there is nothing else to be done."""
        base, active = self.base_layer, self.active_adapters
        if self.disable_adapters or self.merged or len(active) != 1 or active[0] not in self.lora_A:
            return None
        if not isinstance(base, NF4Linear) or _hooked(base) or self.lora_A[active[0]].dtype not in checks.FLOATS:
            return None
        return active[0] if getattr(self.lora_dropout[active[0]], "p", 0.0) < 1 else None

    def _ranknum(self, adapter: str) -> float:
        """The divisor of the scaling, read from its parameter only when that has changed: reading waits for the device.

        It is init_r, also of layers that a load has cut to the ranks of a rank_pattern after that, and what a state dict
        of the whole model has.
        """
        ranknum = self.ranknum[adapter]
        version = -1 if ranknum.is_inference() else ranknum._version
        seen = self._ranknums.get(adapter)
        if seen is None or seen[0] is not ranknum or seen[1] != version or version < 0:
            self._ranknums[adapter] = seen = (ranknum, version, float(ranknum))
        return seen[2]


def check_ranks(config: AdaLoraConfig) -> None:
    """Raises: ValueError for an `init_r` or `target_r` that leaves peft's allocator nothing to take away."""
    for name in ("init_r", "target_r"):
        value = getattr(config, name)
        if type(value) is not int or value < 1:
            raise ValueError(f"{name}: found {value!r}, wanted a positive integer")
    if config.target_r >= config.init_r:
        raise ValueError(
            f"target_r: found {config.target_r} with init_r {config.init_r}; AdaLoRA starts with more than the average rank it "
            "is to reach, so wanted target_r < init_r (1.5 times as many to start with is usual), or LoRA for one rank"
        )


def _create_new_module(lora_config: AdaLoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
    # An NF4LoRALinear, or a layer of another tuner, has more to compute than the base.
    if not isinstance(target, NF4Linear) or isinstance(target, NF4LoRALinear):
        return _create_by_peft(lora_config, adapter_name, target, **kwargs)
    lora_config.fan_in_fan_out = False  # the weight of a Linear is [N, K]
    return NF4SVDLinear(target, adapter_name, lora_config, r=kwargs["r"], lora_alpha=kwargs["lora_alpha"])


def install() -> None:
    """Let peft put `NF4SVDLinear` on `NF4Linear`s: get_peft_model, PeftModel.from_pretrained, load_adapter, add_adapter."""
    AdaLoraModel._create_new_module = staticmethod(_create_new_module)


def uninstall() -> None:
    """Undo `install`; layers that are there stay what they are."""
    AdaLoraModel._create_new_module = staticmethod(_create_by_peft)
