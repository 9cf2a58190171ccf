"""The gradients of the linear on CUDA, alone and all in as few launches as there are."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .cuda_backward import AdapterGradients, Gradients, InputGradient
from .cuda_launch import aligned, all_contiguous, side_by_side
from .cuda_linear import CudaLinear
from .cuda_paths import as_list
from .heuristics import CudaLinearConfig
from .native_linear import contiguous as _contiguous


class CudaGrads(CudaLinear):
    """The rows of the backward. A single linear is a group of one."""

    def linear_bwd(
        self, dy, packed, absmax, nested_absmax, offset, lora_A, dyb, seed, K, blocksize, quant_type, dropout_p,
        config: CudaLinearConfig,
    ) -> Tensor:  # fmt: skip
        lists = map(as_list, (packed, absmax, nested_absmax, offset, lora_A))
        return self.group_bwd(dy, *lists, dyb, seed, [dy.shape[1]], K, blocksize, quant_type, dropout_p, config)

    def lora_bwd(
        self, dy, x, xa, lora_A, lora_B, seed, scaling, dropout_p, need_dA, need_dB, split: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        dyb, dA, dB = self.group_lora_bwd(dy, x, xa, [lora_A], [lora_B], seed, [scaling], dropout_p, need_dA, need_dB, split)
        return dyb, dA[0] if need_dA else lora_A.new_empty(0), dB[0] if need_dB else lora_B.new_empty(0)

    def linear_grads(self, dy: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _of_one(self.group_grads(*_as_group(dy, *args)), dy)

    def _linear_grads_prepare(self, dy: Tensor, *args: Any) -> Callable[..., Any] | None:
        if (gradients := self._group_grads_prepare(*_as_group(dy, *args))) is None:
            return None
        return lambda dy, *args: _of_one(gradients([dy], *args), dy)

    # ---- groups

    def group_bwd(
        self, dy, packed, absmax, nested_absmax, offset, lora_A, dyb, seed, N, K, blocksize, quant_type, dropout_p,
        config: CudaLinearConfig,
    ) -> Tensor:  # fmt: skip
        dy, lora_A = aligned(dy), all_contiguous(lora_A)
        weights = packed, absmax, nested_absmax, offset, lora_A
        dx, adapter = self.empty(dy, (dy.shape[0], K), dy.dtype), bool(lora_A)
        product = InputGradient(self, dy, *weights, sum(N), N, K, blocksize, quant_type, dropout_p, config, adapter, adapter)
        product(dy, *weights, _contiguous(dyb), seed, dx)
        return dx

    def group_lora_bwd(
        self, dy, x, xa, lora_A, lora_B, seed, scaling, dropout_p, need_dA, need_dB, split: int
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        adapters, dy = (all_contiguous(lora_A), all_contiguous(lora_B)), [side_by_side(dy)]
        launch = AdapterGradients(self, dy, *adapters, dy[0].shape[1], False, scaling, dropout_p, need_dA, need_dB, split)
        return launch(dy, x, xa, *adapters, seed, None, None)

    def group_grads(self, dy, x, xa, packed, absmax, nested_absmax, offset, lora_A, lora_B, seed, *rest) -> Any:
        args = dy, x, xa, packed, absmax, nested_absmax, offset, all_contiguous(lora_A), all_contiguous(lora_B), seed
        return Gradients(self, *args, *rest)(*args)

    def _group_grads_prepare(self, *args: Any) -> Callable[..., Any] | None:
        return Gradients(self, *args) if all(t.is_contiguous() for values in args[7:9] for t in values) else None


def _as_group(dy: Tensor, *args: Any) -> tuple[Any, ...]:
    """The arguments of `linear_grads` as those of `group_grads`."""
    x, xa, *operands, seed, K, blocksize, quant_type, scaling, dropout_p = args[:14]
    return [dy], x, xa, *map(as_list, operands), seed, [dy.shape[-1]], K, blocksize, quant_type, [scaling], dropout_p, *args[14:]


def _of_one(found: tuple[Tensor, list[Tensor], list[Tensor]], dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dx, dA, dB = found
    return dx, dA[0] if dA else dy.new_empty(0), dB[0] if dB else dy.new_empty(0)
