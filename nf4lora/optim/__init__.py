"""Optimizers whose states live in unified memory, or in 8 bits, or both; each is a `torch.optim.Optimizer`."""

from typing import Any

from .checkpointing import Checkpointed

__all__ = ["AdamW8bit", "PagedAdamW", "PagedAdamW8bit", "PagedLion", "PagedLion8bit"]


class PagedAdamW(Checkpointed):
    """AdamW with float32 states in unified memory.

    Args: params, lr, betas, eps, weight_decay as `torch.optim.AdamW` has them; `options` are those of `FlatOptimizer`:
        stochastic_rounding, skip_nonfinite, budget, allow_oversubscription.
    Source: arXiv:1711.05101; paging: QLoRA, arXiv:2305.14314
    """

    _BITS, _PAGED = 32, True

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 1e-2, **options: Any,
    ) -> None:  # fmt: skip
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, "adamw", self._BITS, self._PAGED, **options)


class PagedAdamW8bit(PagedAdamW):
    """AdamW with states of 8 bits, blocks of 256 and dynamic maps, in unified memory.

    Args: those of `PagedAdamW`, and min_8bit_size. Source: 8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861
    """

    _BITS = 8


class AdamW8bit(PagedAdamW8bit):
    """`PagedAdamW8bit` with its states in plain memory of the device."""

    _PAGED = False


class PagedLion(Checkpointed):
    """Lion with a float32 state in unified memory.

    Args: params, lr, betas, weight_decay as in the paper; `options` as in `PagedAdamW`. Source: arXiv:2302.06675
    """

    _BITS, _PAGED = 32, True

    def __init__(
        self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0, **options: Any
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": 0.0, "weight_decay": weight_decay}  # eps: for bitsandbytes, which reads one
        super().__init__(params, defaults, "lion", self._BITS, self._PAGED, **options)


class PagedLion8bit(PagedLion):
    """Lion with a state of 8 bits in unified memory. Args: those of `PagedLion`, and min_8bit_size."""

    _BITS = 8
