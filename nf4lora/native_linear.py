"""The linear, its backward and groups of linears on the host library: the arguments of each call."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from torch import Tensor

from . import heuristics
from .abi import MAX_GROUP, Dropout, LinearBwdParams, LinearConfig, LinearFwdParams, LoraBwdParams, Member
from .matrices import matrix, rows
from .native_optim import DTYPE


class LinearRows:
    """Their rows, for a `nf4lora.native.Library`. `config`: tiles and threads, as `nf4lora.heuristics` has them."""

    def linear_fwd(
        self, x, packed, absmax, nested_absmax, offset, bias, lora_A, lora_B, seed, N, blocksize, quant_type, scaling,
        dropout_p, config: heuristics.LinearConfig,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        lists = ([] if t is None else [t] for t in (packed, absmax, nested_absmax, offset, bias, lora_A, lora_B))
        return self.group_fwd(x, *lists, seed, [N], blocksize, quant_type, [scaling], dropout_p, config)

    def linear_bwd(
        self, dy, packed, absmax, nested_absmax, offset, lora_A, dyb, seed, K, blocksize, quant_type, dropout_p,
        config: heuristics.LinearConfig,
    ) -> Tensor:  # fmt: skip
        lists = ([] if t is None else [t] for t in (packed, absmax, nested_absmax, offset, lora_A))
        return self.group_bwd(dy, *lists, dyb, seed, [dy.shape[1]], K, blocksize, quant_type, dropout_p, config)

    def lora_bwd(
        self, dy, x, xa, lora_A, lora_B, seed, scaling, dropout_p, need_dA, need_dB, config: heuristics.LinearConfig
    ) -> tuple[Tensor, Tensor, Tensor]:
        dyb, dA, dB = self.group_lora_bwd(dy, x, xa, [lora_A], [lora_B], seed, [scaling], dropout_p, need_dA, need_dB, config)
        return dyb, dA[0] if need_dA else lora_A.new_empty(0), dB[0] if need_dB else lora_B.new_empty(0)

    # ---- groups

    def group_fwd(
        self, x, packed, absmax, nested_absmax, offset, bias, lora_A, lora_B, seed, N, blocksize, quant_type, scaling,
        dropout_p, config: heuristics.LinearConfig,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        x, (M, K) = x.contiguous(), (rows(x), x.shape[-1])
        ranks, total = [A.shape[0] for A in lora_A] or [0] * len(N), sum(N)
        y, xa = self.empty(x, (*x.shape[:-1], total), x.dtype), self.empty(x, (M, sum(ranks)), x.dtype)
        for i, begins in enumerate(zip(self._columns(y, N), self._columns(xa, ranks), strict=True)):
            others = [contiguous(_at(of, i)) for of in (bias, lora_A, lora_B)]
            weight = self._weight(packed[i], absmax[i], _at(nested_absmax, i), _at(offset, i), N[i], K, blocksize, quant_type)
            params = LinearFwdParams(weight, *map(self.pointer, (x, *others)), *begins, M, ranks[i], total, sum(ranks),
                                     scaling[i], *map(code, (x, *others)), Dropout(self.pointer(seed), dropout_p),
                                     _config(config))  # fmt: skip
            self.run("linear_fwd", params, x.device)
        return y, xa

    def group_bwd(
        self, dy, packed, absmax, nested_absmax, offset, lora_A, dyb, seed, N, K, blocksize, quant_type, dropout_p,
        config: heuristics.LinearConfig,
    ) -> Tensor:  # fmt: skip
        return self._dx([dy.contiguous()], packed, absmax, nested_absmax, offset, lora_A, dyb, seed, N, K, blocksize, quant_type,
                        dropout_p, config)  # fmt: skip

    def group_lora_bwd(
        self, dy, x, xa, lora_A, lora_B, seed, scaling, dropout_p, need_dA, need_dB, config: heuristics.LinearConfig
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        return self._adapters([dy.contiguous()], x, xa, lora_A, lora_B, seed, scaling, dropout_p, need_dA, need_dB, config)

    def group_grads(
        self, dy, x, xa, packed, absmax, nested_absmax, offset, lora_A, lora_B, seed, N, K, blocksize, quant_type, scaling,
        dropout_p, need_dx, need_dA, need_dB,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
        leading, dy = dy[0].shape[:-1], [matrix(t).contiguous() for t in dy]
        dyb, dA, dB = None, [], []
        if lora_A:
            x, config = None if x is None else matrix(x), self._lora_bwd_config(dy[0])
            dyb, dA, dB = self._adapters(dy, x, xa, lora_A, lora_B, seed, scaling, dropout_p, need_dA, need_dB, config)
        if not need_dx:
            return dy[0].new_empty(0), dA, dB
        weights = packed, absmax, nested_absmax, offset, lora_A, dyb, seed, N, K, blocksize, quant_type, dropout_p
        return self._dx(dy, *weights, self._linear_bwd_config(dy[0])).view(*leading, K), dA, dB

    # ---- dy: whole, or each member's

    def _dx(
        self, dy, packed, absmax, nested_absmax, offset, lora_A, dyb, seed, N, K, blocksize, quant_type, dropout_p, config
    ) -> Tensor:
        dyb, lora_A = contiguous(dyb), [A.contiguous() for A in lora_A]
        M, like = len(dy[0]), dy[0]
        dx, members = self.empty(like, (M, K), like.dtype), (Member * MAX_GROUP)()
        for i, (member, (begin, stride)) in enumerate(zip(members, self._parts(dy, N), strict=False)):
            weight = packed[i], absmax[i], _at(nested_absmax, i), _at(offset, i)
            member.w = self._weight(*weight, N[i], K, blocksize, quant_type)
            member.dy, member.ld_dy = begin, stride
            if lora_A:
                member.lora_A, member.r = self.pointer(lora_A[i]), lora_A[i].shape[0]
        params = LinearBwdParams(members, self.pointer(dyb), self.pointer(dx), len(N), M, code(like), code(_at(lora_A, 0)),
                                 Dropout(self.pointer(seed), dropout_p), _config(config))  # fmt: skip
        self.run("linear_bwd", params, like.device)
        return dx

    def _adapters(
        self, dy, x, xa, lora_A, lora_B, seed, scaling, dropout_p, need_dA, need_dB, config
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        x, xa = x.contiguous() if need_dA else None, xa.contiguous() if need_dB else None
        ranks, M, like = [A.shape[0] for A in lora_A], len(dy[0]), dy[0]
        dyb, lora_B = self.empty(like, (M, sum(ranks)), like.dtype), [B.contiguous() for B in lora_B]
        dA = [self.empty(A, A.shape, A.dtype) for A in lora_A] if need_dA else []
        dB = [self.empty(B, B.shape, B.dtype) for B in lora_B] if need_dB else []
        parts = self._parts(dy, [B.shape[0] for B in lora_B]), self._columns(dyb, ranks), self._columns(xa, ranks)
        for i, ((begin, stride), dyb_begin, xa_begin) in enumerate(zip(*parts, strict=True)):
            A, B = lora_A[i], lora_B[i]
            params = LoraBwdParams(begin, self.pointer(x), xa_begin, self.pointer(B), dyb_begin, self.pointer(_at(dA, i)),
                                   self.pointer(_at(dB, i)), M, B.shape[0], A.shape[1], ranks[i], stride, sum(ranks),
                                   sum(ranks), scaling[i], code(like), code(A), code(B), Dropout(self.pointer(seed), dropout_p),
                                   _config(config))  # fmt: skip
            self.run("lora_bwd", params, like.device)
        return dyb, dA, dB

    def _parts(self, dy: Sequence[Tensor], N: Sequence[int]) -> list[tuple[int | None, int]]:
        """Where each member's dy [M, N_i] begins, and elements from one of its rows to the next."""
        if len(dy) == len(N):
            return [(self.pointer(t), n) for t, n in zip(dy, N, strict=True)]
        return [(begin, sum(N)) for begin in self._columns(dy[0], N)]

    def _columns(self, t: Tensor | None, sizes: Sequence[int]) -> list[int | None]:
        """Addresses in a row of t [M, sum of sizes], where each one's columns begin."""
        if t is None:
            return [None] * len(sizes)
        begin = self.pointer(t)
        return [begin + t.element_size() * columns for columns in accumulate(sizes, initial=0)][:-1]


def code(t: Tensor | None) -> int:
    """Its dtype as csrc/params.h numbers them; 0 for none."""
    return 0 if t is None else DTYPE[t.dtype]


def contiguous(t: Tensor | None) -> Tensor | None:
    """The same numbers without gaps; None stays None."""
    return None if t is None else t.contiguous()


def _config(config: heuristics.LinearConfig) -> LinearConfig:
    return LinearConfig(config.path, config.block_m, config.block_n, config.block_k, config.threads)


def _at(tensors: Sequence[Any], i: int) -> Any:
    return tensors[i] if tensors else None
