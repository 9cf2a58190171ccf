"""A launch of a CUDA kernel: its struct filled once and copied by each call, and operands in the form that kernels take."""

from collections.abc import Sequence
from ctypes import Structure
from typing import Any

import torch
from torch import Tensor

from .abi import MAX_GROUP, CudaConfig, Member
from .cuda_paths import WIDE, CudaPaths
from .heuristics import CudaLinearConfig
from .matrices import matrix


class Launch:
    """A kernel of the library with a struct that is filled but for the addresses that change, of which each call writes a copy."""

    def __init__(self, library: CudaPaths, name: str, params: Structure, work: bool) -> None:
        self.library, self.name, self.work = library, name, work
        self._params, self._workspace = params, None

    def params(self) -> Any:
        return type(self._params).from_buffer_copy(self._params)

    def __call__(self, params: Any, like: Tensor) -> None:
        """On torch's current stream, with scratch of a size that depends on nothing that changes; nothing without `work`."""
        if not self.work:
            return
        library, device = self.library, like.device
        params.counters = library.counters(device)
        if self._workspace is None:
            self._workspace = library.workspace_bytes(self.name, params)
        if self._workspace:
            scratch = library.empty(like, (self._workspace,), torch.uint8)
            params.workspace = library.pointer(scratch)
        library.run(self.name, params, device)


def members(library: CudaPaths, packed, absmax, nested_absmax, offset, N, K, blocksize, quant_type, **others) -> Any:
    """`others`: lists of `Member`'s other fields, tensors or numbers, empty where there are none."""
    found = (Member * MAX_GROUP)()
    for i, rows in enumerate(N):
        if packed:
            statistics = nested_absmax[i] if nested_absmax else None, offset[i] if offset else None
            found[i].w = library._weight(packed[i], absmax[i], *statistics, rows, K, blocksize, quant_type)
        else:
            found[i].w.rows = rows
        for field, values in others.items():
            if values:
                value = values[i]
                setattr(found[i], field, library.pointer(value) if isinstance(value, Tensor) else value)
    return found


def aligned(t: Tensor) -> Tensor:
    """Contiguous, and where wide loads may begin: a row of a larger tensor may not."""
    t = t.contiguous()
    return t.clone() if t.data_ptr() % WIDE else t


def all_contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.contiguous() for t in tensors]


def config_of(config: CudaLinearConfig) -> CudaConfig:
    return CudaConfig(config.path, config.tokens, config.rows, config.split)


def side_by_side(t: Tensor) -> Tensor:
    """With the elements of a row side by side, and the rows a stride apart: [..., n] if contiguous, else [M, n]."""
    if t.is_contiguous():
        return t
    t = matrix(t)
    return t if t.stride(1) == 1 and t.stride(0) >= t.shape[1] else t.contiguous()
