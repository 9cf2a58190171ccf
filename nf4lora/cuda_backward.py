"""The backward of the linear on CUDA, prepared: its two launches, and how they make all the gradients of a layer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import heuristics
from .abi import Dropout, GroupBwdParams, GroupLoraBwdParams
from .cuda_launch import Launch, aligned, config_of, members, side_by_side
from .cuda_paths import CudaGradsConfig, CudaPaths, as_list
from .heuristics import CudaLinearConfig, CudaPath
from .matrices import matrix, rows
from .native_linear import code as _code


class Gradients:
    """The gradients for operands like these, as `cuda_linear.Forward`: dy, x, xa and seed have new addresses in each call.

    Where W is decoded, dyb stands beside dy and A below W for one product, or dx starts as dropout_mask * (dyb A).
    """

    def __init__(
        self, library: CudaPaths, dy, x, xa, packed, absmax, nested_absmax, offset, lora_A, lora_B, seed, N, K, blocksize,
        quant_type, scaling, dropout_p, need_dx, need_dA, need_dB, config: CudaGradsConfig,
    ) -> None:  # fmt: skip
        M, total, r, dense = rows(dy[0]), sum(N), sum(A.shape[0] for A in lora_A), config.dx.path == CudaPath.DENSE
        self.library, self.need_dx, self.adapters = library, need_dx, None
        extend = r > 0 and need_dx and dense and seed is None and (len(dy) > 1 or heuristics.cuda_extend_bwd(total, K))
        ld = -(-(total + r) // 8) * 8 if extend else total
        self.beside = (M, ld) if r and (extend or need_dx and len(dy) > 1) else None
        # dx starts with the branch of the adapters, which the launch of their gradients or that of the product writes.
        self.begun = r > 0 and need_dx and not extend and dense and need_dA
        self.dx, self.branch = (*dy[0].shape[:-1], K), r > 0 and not self.begun
        if r:
            self.adapters = AdapterGradients(
                library, dy, lora_A, lora_B, ld, self.begun, scaling, dropout_p, need_dA, need_dB, config.split
            )
        if need_dx:
            self.product = InputGradient(
                library, dy[0], packed, absmax, nested_absmax, offset, lora_A if self.branch else [], ld, N, K, blocksize,
                quant_type, dropout_p, config.dx, self.branch and not extend, r > 0 and not extend,
            )  # fmt: skip

    def __call__(self, dy, x, xa, packed, absmax, nested_absmax, offset, lora_A, lora_B, seed, *rest) -> Any:
        first, empty, lora_A, dyb, dA, dB = dy[0], self.library.empty, as_list(lora_A), None, [], []
        dx = empty(first, self.dx, first.dtype) if self.need_dx else first.new_empty(0)
        left = empty(first, self.beside, first.dtype) if self.beside else None
        if self.adapters:
            begun = dx if self.begun else None
            dyb, dA, dB = self.adapters(dy, x, xa, lora_A, as_list(lora_B), seed, left, begun)
        if self.need_dx:
            if left is None:
                left = aligned(first if len(dy) == 1 else torch.cat(dy, -1))
            branch = (lora_A, dyb) if self.branch else ([], None)
            self.product(left, packed, absmax, nested_absmax, offset, *branch, seed, dx)
        return dx, dA, dB


class AdapterGradients:
    """Runs lora_bwd: dyb, dA and dB if needed; `beside` [M, ld] gets dy, dyb; dx, where it begins, dropout_mask * (dyb A)."""

    def __init__(
        self, library: CudaPaths, dy, lora_A, lora_B, ld, begins: bool, scaling, dropout_p, need_dA, need_dB, split: int
    ) -> None:
        """dy: whole, or of each member."""
        dy = [side_by_side(t) for t in dy]
        N, ranks, first, M, K = [B.shape[0] for B in lora_B], [A.shape[0] for A in lora_A], dy[0], rows(dy[0]), lora_A[0].shape[1]
        strides = [t.shape[-1] if t.is_contiguous() else t.stride(0) for t in dy]
        self.library, self.need_dA, self.need_dB, self.dyb = library, need_dA, need_dB, (M, sum(ranks))
        self.starts = [sum(N[:i]) * first.itemsize for i in range(len(N))] if len(dy) == 1 else None
        group = members(library, [], [], [], [], N, K, 0, "nf4", lora_A=lora_A if begins else [], lora_B=lora_B,
                        ld_dy=strides if len(dy) > 1 else strides * len(N), r=ranks, scaling=scaling)  # fmt: skip
        params = GroupLoraBwdParams(group, *[None] * 7, len(N), M, sum(N), K, sum(ranks), ld, _code(first), _code(lora_A[0]),
                                    _code(lora_B[0]), split, Dropout(None, dropout_p))  # fmt: skip
        self.launch = Launch(library, "lora_bwd", params, True)

    def __call__(
        self, dy: Sequence[Tensor], x, xa, lora_A, lora_B, seed, beside: Tensor | None, dx: Tensor | None
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        dy = [side_by_side(t) for t in dy]
        library, first = self.library, dy[0]
        pointer, empty, params = library.pointer, library.empty, self.launch.params()
        library.reads(lora_A, lora_B)
        each, dyb = params.member, empty(first, self.dyb, first.dtype)
        dA = [empty(A, A.shape, A.dtype) for A in lora_A] if self.need_dA else []
        dB = [empty(B, B.shape, B.dtype) for B in lora_B] if self.need_dB else []
        x, xa = x.contiguous() if self.need_dA else None, xa.contiguous() if self.need_dB else None
        params.x, params.xa, params.dyb, params.dy_ext, params.dx = map(pointer, (x, xa, dyb, beside, dx))
        starts = map(pointer, dy) if self.starts is None else ((pointer(first) or 0) + start for start in self.starts)
        for i, start in enumerate(starts):
            each[i].dy = start
            if dA:
                each[i].dA = pointer(dA[i])
            if dB:
                each[i].dB = pointer(dB[i])
        if seed is not None:
            params.dropout.seed = pointer(seed)
        self.launch(params, first)
        return dyb, dA, dB


class InputGradient:
    """Runs linear_bwd, and on the DENSE path the product with the W [ld, K] it decodes; ld: columns of dy, with what is beside."""

    def __init__(
        self, library: CudaPaths, dy, packed, absmax, nested_absmax, offset, lora_A, ld, N, K, blocksize, quant_type, dropout_p,
        config: CudaLinearConfig, branch: bool, adds: bool,
    ) -> None:  # fmt: skip
        """branch: the kernel writes dropout_mask * (dyb A) into dx; adds: the product is added to what is in dx."""
        M, ranks, dense = rows(dy), [A.shape[0] for A in lora_A] or [0] * len(N), config.path == CudaPath.DENSE
        self.library, self.writes, self.adds, self.decoded = library, branch or not dense, adds, (ld, K) if dense else None
        group = members(library, packed, absmax, nested_absmax, offset, N, K, blocksize, quant_type, lora_A=lora_A, r=ranks)
        params = GroupBwdParams(group, *[None] * 6, len(N), M, sum(N), K, sum(ranks), ld, _code(dy),
                                _code(lora_A[0] if lora_A else None), Dropout(None, dropout_p), config_of(config))  # fmt: skip
        self.launch = Launch(library, "linear_bwd", params, bool(M and K))

    def __call__(self, dy, packed, absmax, nested_absmax, offset, lora_A, dyb, seed, dx: Tensor) -> None:
        library = self.library
        pointer, params = library.pointer, self.launch.params()
        library.reads(packed, absmax, nested_absmax, offset, lora_A)
        params.dy, params.dyb = pointer(dy), pointer(dyb)
        if self.writes:
            params.dx = pointer(dx)
        if seed is not None:
            params.dropout.seed = pointer(seed)
        if self.decoded is None:
            self.launch(params, dy)
            return
        decoded = library.empty(dy, self.decoded, dy.dtype)
        params.decoded = pointer(decoded)
        self.launch(params, dy)
        if self.adds:
            matrix(dx).addmm_(matrix(dy), decoded)
        else:
            torch.mm(matrix(dy), decoded, out=matrix(dx))
