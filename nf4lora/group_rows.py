"""Groups on the back ends that have no kernels for them: member by member, on that back end's own rows of the linear."""

from typing import Any

import torch
from torch import Tensor

from . import backends, reference


def _at(tensors: list[Tensor], i: int) -> Tensor | None:
    return tensors[i] if tensors else None


class MemberByMember:
    """The group rows of back end `name`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def enter(self) -> None:
        for op in ("group_fwd", "group_bwd", "group_lora_bwd"):
            single = op.replace("group_lora", "lora").replace("group_", "linear_")
            backends.implements(op, self.name, self._why_not(single))(getattr(self, op))
        for op in ("swiglu_fwd", "swiglu_bwd"):
            backends.implements(op, self.name, self._why_not("dequantize"))(getattr(reference, op))

    def _why_not(self, op: str) -> Any:
        """The single op's, asked of what its reasons depend on: device and dtype, the same for all members."""

        def why_not(*args: Any) -> str | None:
            return backends._ROWS[op, self.name].why_not(*args)

        return why_not

    def _run(self, op: str, *args: Any) -> Any:
        row = backends._ROWS[op, self.name]
        return row.call(*args) if row.configure is None else row.call(*args, row.configure(*args))

    def group_fwd(
        self, x, packed, absmax, nested_absmax, offset, bias, lora_A, lora_B, seed, N, blocksize, quant_type, scaling, dropout_p
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        each = [
            self._run(
                "linear_fwd", x, packed[i], absmax[i], _at(nested_absmax, i), _at(offset, i), _at(bias, i), _at(lora_A, i),
                _at(lora_B, i), seed, n, blocksize, quant_type, scaling[i], dropout_p,
            )
            for i, n in enumerate(N)
        ]  # fmt: skip
        return torch.cat([y for y, _ in each], -1), torch.cat([xa for _, xa in each], 1)

    def group_bwd(
        self, dy, packed, absmax, nested_absmax, offset, lora_A, dyb, seed, N, K, blocksize, quant_type, dropout_p
    ) -> Tensor:  # fmt: skip
        dyb = dyb.float().split([A.shape[0] for A in lora_A], 1) if lora_A else []
        # In float32, so that the sum over the members is rounded once.
        dx = dy.new_zeros((dy.shape[0], K), dtype=torch.float32)
        for i, part in enumerate(dy.float().split(N, 1)):
            dx += self._run(
                "linear_bwd", part, packed[i], absmax[i], _at(nested_absmax, i), _at(offset, i), _at(lora_A, i), _at(dyb, i),
                seed, K, blocksize, quant_type, dropout_p,
            )  # fmt: skip
        return dx.to(dy.dtype)

    def group_lora_bwd(
        self, dy, x, xa, lora_A, lora_B, seed, scaling, dropout_p, need_dA, need_dB
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        own = xa.split([A.shape[0] for A in lora_A], 1) if need_dB else [xa] * len(lora_A)
        each = [
            self._run("lora_bwd", part, x, a, A, B, seed, s, dropout_p, need_dA, need_dB)
            for part, a, A, B, s in zip(dy.split([B.shape[0] for B in lora_B], 1), own, lora_A, lora_B, scaling, strict=True)
        ]
        dyb, dA, dB = zip(*each, strict=True)
        return torch.cat(dyb, 1), list(dA) if need_dA else [], list(dB) if need_dB else []


MemberByMember("cpu").enter()
