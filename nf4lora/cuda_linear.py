"""The forward of the linear on CUDA: groups of linears that read one x in one launch, and the path that decodes the weight first."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import heuristics
from .abi import Dropout, GroupFwdParams
from .cuda_launch import Launch, aligned, all_contiguous, config_of, members
from .cuda_paths import CudaPaths, as_list
from .heuristics import CudaLinearConfig, CudaPath
from .matrices import matrix, rows
from .native_linear import code as _code


class CudaLinear(CudaPaths):
    """The rows of the linear. A single linear is a group of one; lists hold an operand of each member, or nothing."""

    # ---- a linear and a group differ in that an operand of the one is a list in the other

    def linear_fwd(
        self, x, packed, absmax, nested_absmax, offset, bias, lora_A, lora_B, seed, N, blocksize, quant_type, scaling,
        dropout_p, config: CudaLinearConfig,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        lists = map(as_list, (packed, absmax, nested_absmax, offset, bias, lora_A, lora_B))
        return self.group_fwd(x, *lists, seed, [N], blocksize, quant_type, [scaling], dropout_p, config)

    def group_fwd(
        self, x, packed, absmax, nested_absmax, offset, bias, lora_A, lora_B, seed, N, blocksize, quant_type, scaling,
        dropout_p, config: CudaLinearConfig,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        others = all_contiguous(bias), all_contiguous(lora_A), all_contiguous(lora_B)
        args = x, packed, absmax, nested_absmax, offset, *others, seed
        return Forward(self, *args, N, blocksize, quant_type, scaling, dropout_p, config)(*args)

    def _linear_fwd_prepare(self, x: Tensor, *args: Any) -> Callable[..., tuple[Tensor, Tensor]] | None:
        seed, N, blocksize, quant_type, scaling, dropout_p, config = args[7:]
        return self._group_fwd_prepare(x, *map(as_list, args[:7]), seed, [N], blocksize, quant_type, [scaling], dropout_p, config)

    def _group_fwd_prepare(self, x: Tensor, *args: Any) -> Callable[..., tuple[Tensor, Tensor]] | None:
        return Forward(self, x, *args) if all(t.is_contiguous() for values in args[4:7] for t in values) else None


class Forward:
    """The forward of operands like these, to be called with them and others like them: addresses of all but x and seed stay.

    It holds no tensor. Operands as in `reference.group_fwd`, those with addresses that stay contiguous; may be called by
    many threads at once.
    """

    def __init__(
        self, library: CudaLinear, x, packed, absmax, nested_absmax, offset, bias, lora_A, lora_B, seed, N, blocksize, quant_type,
        scaling, dropout_p, config: CudaLinearConfig,
    ) -> None:  # fmt: skip
        M, K, total, ranks = rows(x), x.shape[-1], sum(N), [A.shape[0] for A in lora_A] or [0] * len(N)
        r, self.library, self.dense = sum(ranks), library, config.path == CudaPath.DENSE
        extend = self.dense and r > 0 and heuristics.cuda_extend_fwd(total, K)
        ld = -(-(K + r) // 8) * 8 if extend else K
        self.y, self.xa = (*x.shape[:-1], total), (M, r)
        self.x_ext, self.decoded = (M, ld) if extend else None, (total, ld)
        self.parts = () if extend or not r else (list(N), ranks, list(scaling))
        group = members(library, packed, absmax, nested_absmax, offset, N, K, blocksize, quant_type,
                        bias=bias, lora_A=lora_A, lora_B=lora_B, r=ranks, scaling=scaling)  # fmt: skip
        codes = [_code(t[0] if t else None) for t in ([x], bias, lora_A, lora_B)]
        params = GroupFwdParams(group, *[None] * 7, len(N), M, total, K, r, ld, *codes, Dropout(None, dropout_p), config_of(config))
        self.launch = Launch(library, "linear_fwd", params, bool(M and total))

    def __call__(self, x, packed, absmax, nested_absmax, offset, bias, lora_A, lora_B, seed, *numbers) -> tuple[Tensor, Tensor]:
        library, x, dtype = self.library, aligned(x), x.dtype
        pointer, empty, params = library.pointer, library.empty, self.launch.params()
        library.reads(packed, absmax, nested_absmax, offset, bias, lora_A, lora_B)
        y, xa = empty(x, self.y, dtype), empty(x, self.xa, dtype)
        params.x, params.xa = pointer(x), pointer(xa)
        if seed is not None:
            params.dropout.seed = pointer(seed)
        if not self.dense:
            params.y = pointer(y)
            self.launch(params, x)
            return y, xa
        decoded, left = empty(x, self.decoded, dtype), matrix(x)
        params.decoded = pointer(decoded)
        if self.x_ext:
            left = empty(x, self.x_ext, dtype)
            params.x_ext = pointer(left)
        self.launch(params, x)
        self._product(matrix(y), left, decoded.T, as_list(bias), xa, as_list(lora_B))
        return y, xa

    def _product(self, y: Tensor, left: Tensor, w: Tensor, bias: list[Tensor], xa: Tensor, lora_B: list[Tensor]) -> None:
        """Into y [M, N], as autocast changes no product that is told where to go."""
        if bias:
            torch.addmm((bias[0] if len(bias) == 1 else torch.cat(bias)).to(y.dtype), left, w, out=y)
        else:
            torch.mm(left, w, out=y)
        if self.parts:
            N, ranks, scaling = self.parts
            for columns, rank, B, s in zip(y.split(N, 1), xa.split(ranks, 1), lora_B, scaling, strict=True):
                columns.addmm_(rank, B.to(y.dtype).T, alpha=s)
