"""The steps of optimizers through a compiled library: the arguments of every parameter in one table."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import heuristics
from .abi import OptimCheckParams, OptimHyper, OptimParams, OptimTensor
from .reference_optim import KINDS

DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_TENSOR, _HYPER = np.dtype(OptimTensor), np.dtype(OptimHyper)


class OptimRows:
    """The rows of `optim_step` and `optim_check`, for a `nf4lora.native.Library`.

    `config` is the threads or thread blocks to use, as `nf4lora.heuristics` has them.
    """

    def optim_step(
        self, params, grads, state1, state2, absmax1, absmax2, steps, flag, offsets, slots, hyper_of, hypers, kind, seed,
        origin, workers: int,
    ) -> None:  # fmt: skip
        grads = _contiguous(grads)
        tensors = self._table(grads, slots, param=self.pointers(params), offset=offsets, hyper=hyper_of)
        sets = np.array(hypers, np.float64).reshape(-1, len(_HYPER))
        numbers = np.empty(len(sets), _HYPER)
        for name, column in zip(_HYPER.names, sets.T, strict=True):
            numbers[name] = column
        states = map(self.pointer, (state1, state2, absmax1, absmax2, steps, flag))
        call = OptimParams(tensors.ctypes.data, numbers.ctypes.data, *states, len(params), len(sets), seed or 0, origin,
                           seed is not None, DTYPE[params[0].dtype], KINDS.index(kind), workers)  # fmt: skip
        self.run("optim_step", call, params[0].device)
        # torch's dispatcher does so too, but eager calls go past it
        torch.autograd.graph.increment_version(params)

    def optim_check(self, grads, steps, flag, slots, workers: int) -> None:
        grads = _contiguous(grads)
        tensors = self._table(grads, slots)
        call = OptimCheckParams(tensors.ctypes.data, self.pointer(steps), self.pointer(flag), self.counters(grads[0].device),
                                len(grads), DTYPE[grads[0].dtype], workers)  # fmt: skip
        self.run("optim_check", call, grads[0].device)

    def counters(self, device: torch.device) -> int | None:
        """Address of the zeros that launches count in, if any do."""
        return None

    def pointers(self, tensors: Iterable[Tensor]) -> list[int]:
        """Addresses of operands."""
        return [t.data_ptr() for t in tensors]

    def _table(self, grads: Sequence[Tensor], slots: Sequence[int], **columns: Sequence[int]) -> np.ndarray:
        """An `OptimTensor` for each; what keeps it must outlive the call."""
        table = np.zeros(len(grads), _TENSOR)
        columns |= {"grad": self.pointers(grads), "numel": [g.numel() for g in grads]}
        if slots:
            columns["slot"] = slots
        for name, column in columns.items():
            table[name] = np.array(column, _TENSOR[name])
        return table

    def _optim_step_config(self, tensors: Sequence[Tensor], *args: Any) -> int:
        return heuristics.cuda_optim(sum(t.numel() for t in tensors), self.multiprocessors(tensors[0].device))

    _optim_check_config = _optim_step_config

    def _optim_step_why_not(self, *args: Any) -> str | None:
        return self.why_not(*args[0][:1]) if args else self.why_not()

    _optim_check_why_not = _optim_step_why_not


def _contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t if t.is_contiguous() else t.contiguous() for t in tensors]
