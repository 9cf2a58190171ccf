"""The gradients of the linear on CUDA, alone and all in as few launches as there are."""

from typing import Any

import torch
from torch import Tensor

from . import heuristics
from .abi import Dropout, GroupBwdParams, GroupLoraBwdParams
from .cuda_linear import CudaLinear, aligned, all_contiguous, config_of
from .cuda_paths import CudaGradsConfig, as_list
from .heuristics import CudaLinearConfig, CudaPath
from .native import _code, _contiguous


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

    def linear_grads(
        self, dy, x, xa, packed, absmax, nested_absmax, offset, lora_A, lora_B, seed, K, blocksize, quant_type, scaling,
        dropout_p, need_dx, need_dA, need_dB, config: CudaGradsConfig,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        lists = map(as_list, (packed, absmax, nested_absmax, offset, lora_A, lora_B))
        dx, dA, dB = self.group_grads([dy], x, xa, *lists, seed, [dy.shape[1]], K, blocksize, quant_type, [scaling], dropout_p,
                                      need_dx, need_dA, need_dB, config)  # fmt: skip
        return dx, dA[0] if need_dA else dy.new_empty(0), dB[0] if need_dB else dy.new_empty(0)

    # ---- groups

    def group_bwd(
        self, dy, packed, absmax, nested_absmax, offset, lora_A, dyb, seed, N, K, blocksize, quant_type, dropout_p,
        config: CudaLinearConfig,
    ) -> Tensor:  # fmt: skip
        dy, weights = aligned(dy), (packed, absmax, nested_absmax, offset)
        dense = config.path == CudaPath.DENSE
        dx = self.empty(dy, (dy.shape[0], K), dy.dtype) if lora_A or not dense else None
        decoded = self._dx(dy, weights, lora_A, dyb, dx, sum(N), seed, N, K, blocksize, quant_type, dropout_p, config)
        if not dense:
            return dx
        return dy @ decoded if dx is None else dx.addmm_(dy, decoded)

    def group_lora_bwd(
        self, dy, x, xa, lora_A, lora_B, seed, scaling, dropout_p, need_dA, need_dB, split: int
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        need = x if need_dA else None, xa if need_dB else None
        return self._adapters([dy], *need, lora_A, lora_B, None, dy.shape[1], None, seed, scaling, dropout_p, split)

    def group_grads(
        self, dy, x, xa, packed, absmax, nested_absmax, offset, lora_A, lora_B, seed, N, K, blocksize, quant_type, scaling,
        dropout_p, need_dx, need_dA, need_dB, config: CudaGradsConfig,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
        """Where W is decoded, dyb stands beside dy and A below W for one product, or dx starts as dropout_mask * (dyb A)."""
        M, total, r, dense = dy[0].shape[0], sum(N), sum(A.shape[0] for A in lora_A), config.dx.path == CudaPath.DENSE
        weights, rest = (packed, absmax, nested_absmax, offset), (seed, N, K, blocksize, quant_type, dropout_p, config.dx)
        if not r:
            dy = dy[0] if len(dy) == 1 else torch.cat(list(dy), 1)
            return (self.group_bwd(dy, *weights, [], None, *rest) if need_dx else dy.new_empty(0)), [], []
        extend = need_dx and dense and seed is None and (len(dy) > 1 or heuristics.cuda_extend_bwd(total, K))
        ld = -(-(total + r) // 8) * 8 if extend else total
        beside = self.empty(dy[0], (M, ld), dy[0].dtype) if extend or (need_dx and len(dy) > 1) else None
        dx = self.empty(dy[0], (M, K), dy[0].dtype) if need_dx and not extend else None
        begun = dx if dense and need_dA else None
        dyb, dA, dB = self._adapters(dy, x if need_dA else None, xa if need_dB else None, lora_A, lora_B, beside, ld, begun,
                                     seed, scaling, dropout_p, config.split)  # fmt: skip
        if not need_dx:
            return dy[0].new_empty(0), dA, dB
        left = aligned(dy[0]) if beside is None else beside
        branch = ([], None, None) if begun is not None else (lora_A, dyb, dx)
        decoded = self._dx(left, weights, *branch, ld, *rest)
        if dense:
            dx = left @ decoded if extend else dx.addmm_(left, decoded)
        return dx, dA, dB

    def _dx(
        self, dy, weights, lora_A, dyb, dx, ld, seed, N, K, blocksize, quant_type, dropout_p, config: CudaLinearConfig
    ) -> Tensor | None:
        """Runs linear_bwd, which fills dx if it is given; W decoded [ld, K] on the DENSE path."""
        M, lora_A, ranks = dy.shape[0], all_contiguous(lora_A), [A.shape[0] for A in lora_A] or [0] * len(N)
        decoded = self.empty(dy, (ld, K), dy.dtype) if config.path == CudaPath.DENSE else None
        members = self._members(*weights, N, K, blocksize, quant_type, lora_A=lora_A, r=ranks)
        params = GroupBwdParams(members, *map(self.pointer, (dy, _contiguous(dyb), dx, decoded)), None, None, len(N), M, sum(N),
                                K, sum(ranks), ld, _code(dy), _code(lora_A[0] if lora_A else None),
                                Dropout(self.pointer(seed), dropout_p), config_of(config))  # fmt: skip
        if M and K:
            scratch = self._workspace("linear_bwd", params, dy)  # noqa: F841
            self.run("linear_bwd", params, dy.device)
        return decoded

    def _adapters(
        self, dy, x, xa, lora_A, lora_B, beside, ld, dx, seed, scaling, dropout_p, split: int
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Runs lora_bwd: dyb, dA where x is given, dB where xa is; `beside` [M, ld] gets dy, dyb; dx dropout_mask * (dyb A)."""
        dy, x, xa, lora_B = [_rows(t) for t in dy], _contiguous(x), _contiguous(xa), all_contiguous(lora_B)
        first, M, N, ranks, K = dy[0], dy[0].shape[0], [B.shape[0] for B in lora_B], [A.shape[0] for A in lora_A], lora_A[0].shape[1]
        lora_A = all_contiguous(lora_A)
        dyb = self.empty(first, (M, sum(ranks)), first.dtype)
        dA = [self.empty(A, A.shape, A.dtype) for A in lora_A] if x is not None else []
        dB = [self.empty(B, B.shape, B.dtype) for B in lora_B] if xa is not None else []
        if len(dy) == 1:
            whole = self.pointer(first) or 0
            starts = [whole + sum(N[:i]) * first.itemsize for i in range(len(N))]
        else:
            starts = [self.pointer(t) for t in dy]
        members = self._members([], [], [], [], N, K, 0, "nf4", lora_A=lora_A if dx is not None else [], lora_B=lora_B, dA=dA, dB=dB,
                                dy=starts, ld_dy=[dy[i if len(dy) > 1 else 0].stride(0) for i in range(len(N))], r=ranks,
                                scaling=scaling)  # fmt: skip
        params = GroupLoraBwdParams(members, *map(self.pointer, (x, xa, dyb, beside, dx)), None, None, len(N), M, sum(N), K,
                                    sum(ranks), ld, _code(first), _code(lora_A[0]), _code(lora_B[0]), split,
                                    Dropout(self.pointer(seed), dropout_p))  # fmt: skip
        scratch = self._workspace("lora_bwd", params, first)  # noqa: F841
        self.run("lora_bwd", params, first.device)
        return dyb, dA, dB


def _rows(t: Tensor) -> Tensor:
    """With the elements of a row side by side, and no row on another."""
    return t if t.stride(1) == 1 and t.stride(0) >= t.shape[1] else t.contiguous()
