"""The forward of the linear on CUDA: groups of linears that read one x in one launch, and the path that decodes the weight first."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import heuristics
from .abi import MAX_GROUP, CudaConfig, Dropout, GroupFwdParams, Member, SwigluParams
from .cuda_paths import WIDE, CudaPaths, as_list
from .heuristics import CudaLinearConfig, CudaPath
from .native import _code, _contiguous


class CudaLinear(CudaPaths):
    """The rows of the linear. A single linear is a group of one; lists hold an operand of each member, or nothing."""

    def _workspace(self, name: str, params: Any, like: Tensor) -> Tensor | None:
        """Scratch that the launch asks for; the caller keeps it alive until the launch is made."""
        params.workspace, params.counters = None, self.counters(like.device)
        if size := self.workspace_bytes(name, params):
            scratch = self.empty(like, (size,), torch.uint8)
            params.workspace = self.pointer(scratch)
            return scratch
        return None

    def _members(self, packed, absmax, nested_absmax, offset, N, K, blocksize, quant_type, **others) -> Any:
        """`others`: lists of `Member`'s other fields, tensors or numbers, empty where there are none."""
        members = (Member * MAX_GROUP)()
        for i, rows in enumerate(N):
            if packed:
                statistics = nested_absmax[i] if nested_absmax else None, offset[i] if offset else None
                members[i].w = self._weight(packed[i], absmax[i], *statistics, rows, K, blocksize, quant_type)
            else:
                members[i].w.rows = rows
            for field, values in others.items():
                if values:
                    value = values[i]
                    setattr(members[i], field, self.pointer(value) if isinstance(value, Tensor) else value)
        return members

    # ---- a group of one

    def linear_fwd(
        self, x, packed, absmax, nested_absmax, offset, bias, lora_A, lora_B, seed, N, blocksize, quant_type, scaling,
        dropout_p, config: CudaLinearConfig,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        lists = map(as_list, (packed, absmax, nested_absmax, offset, bias, lora_A, lora_B))
        return self.group_fwd(x, *lists, seed, [N], blocksize, quant_type, [scaling], dropout_p, config)

    # ---- groups

    def group_fwd(
        self, x, packed, absmax, nested_absmax, offset, bias, lora_A, lora_B, seed, N, blocksize, quant_type, scaling,
        dropout_p, config: CudaLinearConfig,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        x, bias, lora_A, lora_B = aligned(x), all_contiguous(bias), all_contiguous(lora_A), all_contiguous(lora_B)
        (M, K), ranks, total = x.shape, [A.shape[0] for A in lora_A] or [0] * len(N), sum(N)
        dense, r = config.path == CudaPath.DENSE, sum(ranks)
        extend = dense and r > 0 and heuristics.cuda_extend_fwd(total, K)
        ld = -(-(K + r) // 8) * 8 if extend else K
        xa = self.empty(x, (M, r), x.dtype)
        y = None if dense else self.empty(x, (M, total), x.dtype)
        x_ext = self.empty(x, (M, ld), x.dtype) if extend else None
        decoded = self.empty(x, (total, ld), x.dtype) if dense else None
        members = self._members(packed, absmax, nested_absmax, offset, N, K, blocksize, quant_type,
                                bias=bias, lora_A=lora_A, lora_B=lora_B, r=ranks, scaling=scaling)  # fmt: skip
        first = [_code(t[0] if t else None) for t in (bias, lora_A, lora_B)]
        params = GroupFwdParams(members, *map(self.pointer, (x, y, xa, x_ext, decoded)), None, None, len(N), M, total, K, r, ld,
                                _code(x), *first, Dropout(self.pointer(seed), dropout_p), config_of(config))  # fmt: skip
        if M and total:
            scratch = self._workspace("linear_fwd", params, x)  # noqa: F841
            self.run("linear_fwd", params, x.device)
        if not dense:
            return y, xa
        b = None if not bias else (bias[0] if len(bias) == 1 else torch.cat(bias)).to(x.dtype)
        left, w = (x_ext if extend else x), decoded.T
        y = left @ w if b is None else torch.addmm(b, left, w)
        if r and not extend:
            for rows, rank, B, s in zip(y.split(N, 1), xa.split(ranks, 1), lora_B, scaling, strict=True):
                rows.addmm_(rank, B.to(x.dtype).T, alpha=s)
        return y, xa

    def swiglu_fwd(self, gate_up: Tensor, workers: int) -> Tensor:
        M, N = gate_up.shape[0], gate_up.shape[1] // 2
        return self._swiglu("swiglu_fwd", gate_up.contiguous(), None, (M, N), workers)

    def swiglu_bwd(self, gate_up: Tensor, dh: Tensor, workers: int) -> Tensor:
        return self._swiglu("swiglu_bwd", gate_up.contiguous(), dh.contiguous(), gate_up.shape, workers)

    def _swiglu(self, name: str, gate_up: Tensor, dh: Tensor | None, shape: Sequence[int], workers: int) -> Tensor:
        out = self.empty(gate_up, shape, gate_up.dtype)
        if out.numel():
            M, N = gate_up.shape[0], gate_up.shape[1] // 2
            params = SwigluParams(*map(self.pointer, (gate_up, dh, out)), M, N, _code(gate_up), workers)
            self.run(name, params, gate_up.device)
        return out


def aligned(t: Tensor) -> Tensor:
    """Contiguous, and where wide loads may begin: a row of a larger tensor may not."""
    t = t.contiguous()
    return t.clone() if t.data_ptr() % WIDE else t


def all_contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.contiguous() for t in tensors]


def config_of(config: CudaLinearConfig) -> CudaConfig:
    return CudaConfig(config.path, config.tokens, config.rows, config.split)
