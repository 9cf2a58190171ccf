"""`NF4LoRALinear`: the 4-bit linear with a LoRA adapter, computed together."""

import math
import warnings
from numbers import Real
from typing import Any, Self

import torch
from torch import Tensor, nn

from .entry import held
from .linear import NF4Linear


class NF4LoRALinear(NF4Linear):
    """y = x W^T + b + scaling * (dropout(x) lora_A^T) lora_B^T with W frozen in 4 bits.

    Only `lora_A` [r, K] (kaiming uniform, a = sqrt 5) and `lora_B` [N, r] (zeros) learn; both float32 until `.to(dtype)`.
    The forward saves x and x lora_A^T, no [N, K] tensor and no dropout mask: the mask is made again from its seed.

    Args, beside those of `NF4Linear`:
        r:            rank; 0 for a plain `NF4Linear`
        lora_alpha:   scaling = lora_alpha / r
        lora_dropout: probability of zeroing an element of x in the LoRA branch, in training
        use_rslora:   scaling = lora_alpha / sqrt(r)
    Raises: ValueError for r < 0, lora_alpha not positive and finite, lora_dropout outside [0, 1). Warns for r > min(N, K).
    Source: LoRA, arXiv:2106.09685; QLoRA, arXiv:2305.14314; rsLoRA, arXiv:2312.03732
    """

    _TOGETHER = (*NF4Linear._TOGETHER, (("lora_A", "lora_B"), ()))

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, r: int = 16, lora_alpha: float = 32,
        lora_dropout: float = 0.0, blocksize: int = 64, quant_type: str = "nf4", double_quant: bool = True,
        compute_dtype: torch.dtype | None = None, use_rslora: bool = False, device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        if type(r) is not int or r < 0:
            raise ValueError(f"r: found {r!r}, wanted an integer of 0 or more")
        if not isinstance(lora_alpha, Real) or not 0 < lora_alpha < math.inf:
            raise ValueError(f"lora_alpha: found {lora_alpha!r}, wanted a positive finite number")
        if not isinstance(lora_dropout, Real) or not 0 <= lora_dropout < 1:
            raise ValueError(f"lora_dropout: found {lora_dropout!r}, wanted in [0, 1)")
        super().__init__(
            in_features, out_features, bias, blocksize, quant_type, double_quant, compute_dtype, device, dtype
        )
        self.r, self.lora_alpha, self.lora_dropout, self.use_rslora = r, lora_alpha, lora_dropout, use_rslora
        if r > min(in_features, out_features):
            warnings.warn(f"r={r} is more than min(in_features, out_features) of {self}: no gain over that rank", stacklevel=2)
        self._reset_lora(self.weight.device)

    def _reset_lora(self, device: torch.device) -> None:
        if self.r == 0:
            self.register_parameter("lora_A", None)
            self.register_parameter("lora_B", None)
            return
        self.lora_A = nn.Parameter(torch.empty(self.r, self.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, self.r, dtype=torch.float32, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def reset_parameters(self) -> None:
        """Start the weight, the bias and the adapter anew; nothing on the meta device."""
        super().reset_parameters()
        if "lora_A" in self._parameters:
            self._reset_lora(self.weight.device)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, device: Any = None, dtype: torch.dtype | None = None, **kwargs: Any) -> Self:
        """As `NF4Linear`'s; a plain `NF4Linear` gets an adapter too, and shares its bytes.

        Raises: also ValueError for a format, device or dtype that the `NF4Linear` does not have.
        """
        if type(linear) is not NF4Linear:
            return super().from_linear(linear, device=device, dtype=dtype, **kwargs)
        own = {name: getattr(linear, name) for name in ("blocksize", "quant_type", "double_quant")}
        wanted = {"dtype": dtype or linear.weight_dtype, "device": torch.device(device or linear.weight.device), **kwargs}
        there = {"dtype": linear.weight_dtype, "device": linear.weight.device, **own}
        if wrong := [f"{name}={wanted[name]}" for name in there if wanted.get(name, there[name]) != there[name]]:
            raise ValueError(f"linear: found {linear}, wanted {', '.join(wrong)}: its bytes are taken as they are")
        options = {"compute_dtype": linear.compute_dtype, **kwargs, **own}
        has_bias = linear.bias is not None
        layer = cls(linear.in_features, linear.out_features, has_bias, device="meta", dtype=linear.weight_dtype, **options)
        for name, parameter in linear.named_parameters(recurse=False):
            layer.register_parameter(name, parameter)
        layer._reset_lora(linear.weight.device)
        return layer.train(linear.training)

    def quantize_(self, weight: Tensor, check_finite: bool = True, device: Any = None) -> "NF4LoRALinear":
        super().quantize_(weight, check_finite, device)
        if self._parameters.get("lora_A") is not None and self.lora_A.is_meta:
            self._reset_lora(self.weight.device)
        return self

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r or 1)

    def _adapter(self) -> tuple[Tensor | None, Tensor | None, float]:
        return *held(self, "lora_A", "lora_B"), self.scaling

    def _dropout(self, x: Tensor) -> tuple[Tensor | None, float]:
        drops = self.r and self.lora_dropout > 0 and self.training
        return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device) if drops else None, self.lora_dropout

    @torch.no_grad()
    def merge(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A dense linear of the decoded weight plus scaling * lora_B lora_A, summed in float32, rounded once to `dtype`.

        The adapter was trained on the decoded weight, so that is what it is merged into. This layer is left as it is.
        """
        dtype = dtype or self.weight_dtype
        if not dtype.is_floating_point:
            raise TypeError(f"dtype: found {dtype}, wanted a float dtype")
        weight = self.dequantize(torch.float32)
        if self.r:
            with torch.autocast(weight.device.type, enabled=False):
                weight = torch.addmm(weight, self.lora_B.float(), self.lora_A.float(), alpha=self.scaling)
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        dense.weight = nn.Parameter(weight.to(dtype))
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.to(dtype, copy=True))
        return dense.train(self.training)

    def extra_repr(self) -> str:
        if "r" not in self.__dict__:
            return super().extra_repr()
        scaled = f"r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}, use_rslora={self.use_rslora}"
        return f"{super().extra_repr()}, {scaled}"
