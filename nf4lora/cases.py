"""Operands for checks of the 4-bit linear, with what they must give: used through `nf4lora.testing`."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .codebook import NESTED_BLOCKSIZE, codebook
from .functional import linear_4bit, quantize_4bit
from .quant_state import QuantState, ceil_div


class Products(NamedTuple):
    """What one forward and backward gives; None where the operand is not there."""

    y: Tensor
    dx: Tensor
    dA: Tensor | None
    dB: Tensor | None
    dbias: Tensor | None


@dataclass(frozen=True)
class LinearCase:
    """Operands of y = x W^T + bias + scaling * (dropout(x) lora_A^T) lora_B^T, and the gradient dy of y.

    x dtype [M, K]; dy dtype [M, N]; packed, state: W [N, K]; bias [N]; lora_A [r, K], lora_B [N, r]; seed int64 [1].
    """

    x: Tensor
    dy: Tensor
    packed: Tensor
    state: QuantState
    bias: Tensor | None = None
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    scaling: float = 1.0
    dropout_p: float = 0.0
    seed: Tensor | None = None

    def run(self) -> Products:
        """Forward and backward through `nf4lora.linear_4bit`, that is, through the kernels."""
        x, bias, A, B = (None if t is None else t.detach().requires_grad_() for t in (self.x, self.bias, self.lora_A, self.lora_B))
        y = linear_4bit(x, self.packed, self.state, bias, A, B, self.scaling, self.dropout_p, self.seed)
        y.backward(self.dy)
        return Products(y.detach(), *(None if t is None else t.grad for t in (x, A, B, bias)))

    def truth(self) -> Products:
        """float64 arithmetic on the exactly decoded weight, nothing rounded on the way."""
        return self._dense(torch.float64)

    def baseline(self) -> Products:
        """Plain torch: dequantize to x's dtype, then torch's products in that dtype."""
        dense = self._dense(self.x.dtype)
        stored = (self.x, self.dy, self.lora_A, self.lora_B, self.bias)
        return Products(*(None if t is None else t.to(like.dtype) for t, like in zip(dense, stored, strict=True)))

    def _dense(self, dtype: torch.dtype) -> Products:
        state = self.state
        w = reference.dequantize(
            self.packed, state.absmax, state.nested_absmax, state.offset, state.shape, state.blocksize, state.quant_type, dtype
        )
        x, dy = self.x.to(dtype), self.dy.to(dtype)
        y, dx, dA, dB, dbias = x @ w.T, dy @ w, None, None, None
        if self.bias is not None:
            y, dbias = y + self.bias.to(dtype), dy.sum(0)
        if self.lora_A is not None:
            A, B, seed = self.lora_A.to(dtype), self.lora_B.to(dtype), self.seed if self.dropout_p > 0 else None
            dropped = reference.dropout(x, seed, self.dropout_p).to(dtype)
            xa, dyb = dropped @ A.T, dy @ B * self.scaling
            y = y + xa @ B.T * self.scaling
            dx = dx + reference.dropout(dyb @ A, seed, self.dropout_p).to(dtype)
            dA, dB = dyb.T @ dropped, dy.T @ xa * self.scaling
        return Products(y, dx, dA, dB, dbias)


def random_case(
    M: int, N: int, K: int, r: int = 0, dtype: torch.dtype = torch.float32, adapter_dtype: torch.dtype = torch.float32,
    bias: bool = True, blocksize: int = 64, quant_type: str = "nf4", nested: bool = True, scaling: float = 2.0,
    dropout_p: float = 0.0, seed: int = 0, device: torch.device | str = "cpu",
) -> LinearCase:  # fmt: skip
    """Normal operands of a model's magnitudes: W of 1/sqrt(K), neither adapter zero. The same for the same arguments."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, to: torch.dtype, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=g) * std).to(device, to)

    packed, state = quantize_4bit(normal(N, K, to=dtype, std=K**-0.5), blocksize, nested, quant_type)
    A = normal(r, K, to=adapter_dtype, std=K**-0.5) if r else None
    B = normal(N, r, to=adapter_dtype, std=0.1) if r else None
    return LinearCase(
        normal(M, K, to=dtype), normal(M, N, to=dtype), packed, state, normal(N, to=dtype) if bias else None, A, B, scaling,
        dropout_p, torch.tensor([seed + 1], device=device),
    )  # fmt: skip


def exact_case(
    M: int, N: int, K: int, r: int = 0, dtype: torch.dtype = torch.float32, adapter_dtype: torch.dtype = torch.float32,
    bias: bool = True, blocksize: int = 64, quant_type: str = "nf4", nested: bool = False, dropout_p: float = 0.0,
    seed: int = 0, device: torch.device | str = "cpu",
) -> LinearCase:  # fmt: skip
    """Operands whose products are exact in float32 in any order of summation; x lora_A^T and dy lora_B in any float dtype.

    Codes whose values are multiples of 1/4 (NF4: -1, 0, 1); absmax 2**k with k in -3…3, or where nested 8-bit codes of
    0.0 and 1.0 over powers of two; integers |x|, |dy|, |bias| <= 8; at most 16 of +-1 in a row of lora_A and a column
    of lora_B; scaling 0.5, 1 or 2. dropout_p 0 or 0.5, whose factor 2 is exact.
    Raises: ValueError for sizes at which float32 no longer holds the sums (M, N, K above 4096, r above 128).
    """
    if max(M, N, K) > 4096 or r > 128 or dropout_p not in (0.0, 0.5):
        raise ValueError(f"exact_case: found {M=} {N=} {K=} {r=} {dropout_p=}, wanted M, N, K <= 4096, r <= 128, p 0 or 0.5")
    g = torch.Generator().manual_seed(seed)

    def integers(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randint(-8, 9, shape, generator=g).to(device, to)

    def signs(rows: int, cols: int) -> Tensor:
        """+-1 in at most 16 places of a row, elsewhere 0."""
        places = torch.rand(rows, cols, generator=g).argsort(1)[:, :16]
        values = torch.randint(0, 2, places.shape, generator=g) * 2.0 - 1.0
        return torch.zeros(rows, cols).scatter_(1, places, values)

    book = codebook(quant_type) * 4
    exact = torch.nonzero((book == book.round()) & ~(book.signbit() & (book == 0))).reshape(-1)
    codes = exact[torch.randint(len(exact), (N * K + N * K % 2,), generator=g)]
    if N * K % 2:
        codes[-1] = exact[book[exact] == 0]
    packed = (codes[0::2] << 4 | codes[1::2]).to(torch.uint8).unsqueeze(1).to(device)
    blocks, offset, nested_absmax = ceil_div(N * K, blocksize), None, None
    if nested:
        zero_or_one = torch.nonzero(codebook("dynamic").remainder(1) == 0).reshape(-1)
        absmax = zero_or_one[torch.randint(2, (blocks,), generator=g)].to(device, torch.uint8)
        nested_absmax = (2.0 ** torch.randint(-1, 3, (ceil_div(blocks, NESTED_BLOCKSIZE),), generator=g)).to(device)
        offset = (2.0 ** torch.randint(-1, 2, (), generator=g)).to(device)
    else:
        absmax = (2.0 ** torch.randint(-3, 4, (blocks,), generator=g)).to(device)
    A = signs(r, K).to(device, adapter_dtype) if r else None
    B = signs(r, N).T.contiguous().to(device, adapter_dtype) if r else None
    return LinearCase(
        integers(M, K), integers(M, N), packed, QuantState(absmax, (N, K), dtype, blocksize, quant_type, offset, nested_absmax),
        integers(N) if bias else None, A, B, 2.0 ** int(torch.randint(-1, 2, (), generator=g)), dropout_p,
        torch.tensor([seed + 1], device=device),
    )  # fmt: skip
