"""Which path a CUDA linear takes, and its tiles: the best that takes the operands, or the one that was forced."""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, heuristics
from .heuristics import CudaLinearConfig, CudaPath
from .matrices import rows
from .native import Library
from .tuned import tuned

_PATHS = {p.name.lower(): p for p in CudaPath}
WIDE = 16  # bytes of the widest load


class CudaGradsConfig(NamedTuple):
    """Of a layer's gradients: how dx is cut, and parts of the sums over tokens."""

    dx: CudaLinearConfig
    split: int


class CudaPaths(Library):
    """The `why_not` and `configure` of the linear's rows; a single linear and a group differ in their argument lists alone."""

    @cache
    def capability(self, device: torch.device) -> tuple[int, int]:
        return torch.cuda.get_device_capability(device)

    @cache
    def multiprocessors(self, device: torch.device) -> int:
        return torch.cuda.get_device_properties(device).multi_processor_count

    def _unfit_path(self, path: CudaPath, first: Tensor, K: int, packed: Sequence[Tensor]) -> str | None:
        """Why a path cannot take these operands, or None; `first`: x or dy."""
        if path == CudaPath.DENSE:
            return None
        if first.dtype == torch.float32:
            return "the tensor cores take bfloat16 and float16; float32 goes by dense"
        if K % 64:
            return f"found K = {K}, wanted a multiple of 64"
        if any(t.data_ptr() % WIDE for t in packed):
            return f"found packed at an address that is no multiple of {WIDE}"
        capability = self.capability(first.device)
        if path == CudaPath.WGMMA and capability[0] != 9:
            return f"found a device of capability {capability}, wanted 9.0"
        return None if capability >= (8, 0) else f"found a device of capability {capability}, wanted 8.0 or newer"

    def _choose(self, op: str, first: Tensor, N: int, K: int, packed: Sequence[Tensor]) -> CudaLinearConfig:
        """The config of the forced path; else the one measured for these sizes; else the one calculated."""
        calculated = getattr(heuristics, f"cuda_{op}")
        M, capability, multiprocessors = rows(first), self.capability(first.device), self.multiprocessors(first.device)
        measured = tuned(op, capability, M, N, K)
        if (forced := backends.forced_path()) in _PATHS:
            path = _PATHS[forced]
            return measured if measured and measured.path == path else calculated(path, M, N, K, multiprocessors)
        if measured and self._unfit_path(measured.path, first, K, packed) is None:
            return measured
        best = heuristics.cuda_paths(M, capability[0] == 9)
        path = next(p for p in best if self._unfit_path(p, first, K, packed) is None)
        return calculated(path, M, N, K, multiprocessors)

    def _forced_unfit(self, first: Tensor, K: int, packed: Sequence[Tensor]) -> str | None:
        path = _PATHS.get(backends.forced_path() or "")
        reason = None if path is None else self._unfit_path(path, first, K, packed)
        return None if reason is None else f"path {backends.forced_path()}: {reason}"

    def _unfit_lora(self, first: Tensor, lora_A: Any) -> str | None:
        """The kernels of a 16-bit adapter want tensor cores that read bfloat16."""
        capability = self.capability(first.device)
        if lora_A is None or isinstance(lora_A, list) and not lora_A or first.dtype == torch.float32 or capability >= (8, 0):
            return None
        return f"LoRA in {first.dtype}: found a device of capability {capability}, wanted 8.0 or newer"

    def _linear_fwd_why_not(self, *args: Any) -> str | None:
        if reason := self.why_not(*args):
            return reason
        return self._unfit_lora(args[0], args[6]) or self._forced_unfit(args[0], args[0].shape[-1], as_list(args[1])) if args else None

    _group_fwd_why_not = _linear_fwd_why_not

    def _linear_fwd_config(self, x: Tensor, packed: Any, *args: Any) -> CudaLinearConfig:
        K, N = x.shape[-1], args[7]
        return self._choose("linear_fwd", x, N if isinstance(N, int) else sum(N), K, as_list(packed))

    _group_fwd_config = _linear_fwd_config

    def _linear_bwd_why_not(self, *args: Any) -> str | None:
        if reason := self.why_not(*args):
            return reason
        return self._unfit_lora(args[0], args[5]) or self._forced_unfit(args[0], args[8], as_list(args[1])) if args else None

    def _linear_bwd_config(self, dy: Tensor, packed: Any, *args: Any) -> CudaLinearConfig:
        return self._choose("linear_bwd", dy, dy.shape[1], args[6], as_list(packed))

    def _group_bwd_why_not(self, *args: Any) -> str | None:
        if reason := self.why_not(*args):
            return reason
        return self._unfit_lora(args[0], args[5]) or self._forced_unfit(args[0], args[9], args[1]) if args else None

    def _group_bwd_config(self, dy: Tensor, packed: Any, *args: Any) -> CudaLinearConfig:
        return self._linear_bwd_config(dy, packed, *args[:6], args[7])

    def _lora_bwd_why_not(self, *args: Any) -> str | None:
        return self.why_not(*args) or (self._unfit_lora(args[0], args[3]) if args else None)

    _group_lora_bwd_why_not = _lora_bwd_why_not

    def _lora_bwd_config(self, dy: Tensor, *args: Any) -> int:
        return heuristics.cuda_lora_bwd(*dy.shape, self.multiprocessors(dy.device))

    _group_lora_bwd_config = _lora_bwd_config

    def _linear_grads_why_not(self, *args: Any) -> str | None:
        if not args:
            return self.why_not()
        first = backends.first_of(args)
        reason = self.why_not(first) or self._unfit_lora(first, args[7])
        return reason or self._forced_unfit(first, args[10] if isinstance(args[10], int) else args[11], as_list(args[3]))

    _group_grads_why_not = _linear_grads_why_not

    def _linear_grads_config(self, dy: Tensor, *args: Any) -> CudaGradsConfig:
        return self._grads_config(dy, dy.shape[-1], args[9], [args[2]])

    def _group_grads_config(self, dy: Sequence[Tensor], *args: Any) -> CudaGradsConfig:
        return self._grads_config(dy[0], sum(args[9]), args[10], args[2])

    def _grads_config(self, first: Tensor, N: int, K: int, packed: Sequence[Tensor]) -> CudaGradsConfig:
        split = heuristics.cuda_lora_bwd(rows(first), N, self.multiprocessors(first.device))
        return CudaGradsConfig(self._choose("linear_bwd", first, N, K, packed), split)

    def _swiglu_fwd_config(self, gate_up: Tensor, *args: Any) -> int:
        return heuristics.cuda_swiglu(gate_up.numel() // 2, self.multiprocessors(gate_up.device))

    _swiglu_bwd_config = _swiglu_fwd_config


def as_list(t: Any) -> list[Tensor]:
    return [] if t is None else [t] if isinstance(t, Tensor) else list(t)
