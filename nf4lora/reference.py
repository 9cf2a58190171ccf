"""The executable specification: every op of `nf4lora.ops` in plain torch, same signatures, on any device and in float64.

A kernel is right if it gives these bytes (quantize, dequantize, dropout) or meets the error rules of `nf4lora.testing`
against these functions in float64 (the products). It is also the back end of last resort.

Weight arguments, everywhere: `packed` uint8 [ceil(N*K/2), 1]; `absmax` float32 [G], or uint8 [G] with `nested_absmax`
float32 [ceil(G/256)] and `offset` float32 [1]; G = ceil(N*K/blocksize). `QuantState` states the format. Each float32
may come as int32 of the same bits, as layers keep them.
"""

import math

import torch
from torch import Tensor

from .codebook import MIN_ABSMAX, NESTED_BLOCKSIZE, boundaries, code_order, codebook, dynamic_boundaries
from .dropout import dropout, work_dtype
from .matrices import like, matrix


def quantize(a: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
    """a: float32, bfloat16 or float16, any shape -> packed uint8 [ceil(n/2), 1], absmax float32 [ceil(n/blocksize)].

    NaN in a block makes its absmax NaN and its codes 15; Inf makes its absmax Inf. Neither decodes to a finite lie.
    """
    blocks, absmax = _scaled_blocks(a.reshape(-1).float(), blocksize)
    codes = code_order(quant_type, a.device)[torch.bucketize(blocks, boundaries(quant_type, a.device))]
    codes = codes.reshape(-1)[: a.numel()].to(torch.uint8)
    if a.numel() % 2:
        zero = code_order(quant_type, a.device)[7].to(torch.uint8)  # seven negative values stand before 0 in both tables
        codes = torch.cat([codes, zero.reshape(1)])
    return ((codes[0::2] << 4) | codes[1::2]).unsqueeze(1), absmax


def quantize_absmax(absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Double quantization. absmax float32 [G], offset float32 [1] -> codes uint8 [G], nested_absmax float32 [ceil(G/256)]."""
    blocks, nested_absmax = _scaled_blocks(absmax - offset, NESTED_BLOCKSIZE)
    codes = torch.bucketize(blocks, dynamic_boundaries(absmax.device)).reshape(-1)[: absmax.numel()]
    return codes.to(torch.uint8), nested_absmax


def dequantize_absmax(absmax: Tensor, nested_absmax: Tensor | None, offset: Tensor | None) -> Tensor:
    """float32 [G] whatever the storage; two roundings where it was nested."""
    if nested_absmax is None:
        return absmax.view(torch.float32)
    nested_absmax, offset = nested_absmax.view(torch.float32), offset.view(torch.float32)
    scale = nested_absmax.repeat_interleave(NESTED_BLOCKSIZE)[: absmax.numel()]
    return codebook("dynamic", absmax.device)[absmax.reshape(-1).int()] * scale + offset


def dequantize(
    packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, offset: Tensor | None,
    shape: list[int], blocksize: int, quant_type: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """dtype [shape]: `round(code * absmax)`, the product in float32 with one rounding to dtype; exact in float64."""
    numel, work = math.prod(shape), torch.float64 if dtype == torch.float64 else torch.float32
    codes = torch.stack((packed.reshape(-1) >> 4, packed.reshape(-1) & 15), dim=-1).reshape(-1)[:numel]
    scale = dequantize_absmax(absmax, nested_absmax, offset).repeat_interleave(blocksize)[:numel]
    values = codebook(quant_type, packed.device)[codes.int()].to(work)
    return (values * scale.to(work)).to(dtype).reshape(shape)


def dequantize_into(packed, absmax, nested_absmax, offset, blocksize, quant_type, out) -> None:
    """`dequantize` to the shape and dtype of out, contiguous, and into it."""
    out.copy_(dequantize(packed, absmax, nested_absmax, offset, out.shape, blocksize, quant_type, out.dtype))


def linear_fwd(
    x: Tensor, packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, offset: Tensor | None,
    bias: Tensor | None, lora_A: Tensor | None, lora_B: Tensor | None, seed: Tensor | None,
    N: int, blocksize: int, quant_type: str, scaling: float, dropout_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x [..., K] -> y [..., N] = x W^T + bias + scaling * xa lora_B^T, and xa [M, r] = dropout(x) lora_A^T; both in x's dtype.

    M: the product of the leading dimensions of x, whose rows are those of xa.
    bias [N]; lora_A [r, K], lora_B [N, r], each of any float dtype; seed int64 [1] turns dropout on.
    Rounding: xa once to x's dtype, and it is the rounded xa that goes on; y once, at the end.
    """
    work = work_dtype(x)
    x, given = matrix(x), x
    w = dequantize(packed, absmax, nested_absmax, offset, [N, x.shape[1]], blocksize, quant_type, work)
    y = x.to(work) @ w.T
    xa = x.new_zeros(x.shape[0], 0)
    if lora_A is not None:
        xa = (dropout(x, seed, dropout_p) @ lora_A.to(work).T).to(x.dtype)
        y = y + scaling * (xa.to(work) @ lora_B.to(work).T)
    if bias is not None:
        y = y + bias.to(work)
    return like(y.to(x.dtype), given), xa


def linear_bwd(
    dy: Tensor, packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, offset: Tensor | None,
    lora_A: Tensor | None, dyb: Tensor | None, seed: Tensor | None,
    K: int, blocksize: int, quant_type: str, dropout_p: float,
) -> Tensor:  # fmt: skip
    """dy [M, N] -> dx [M, K] = dy W + mask * (dyb lora_A), in dy's dtype; dyb [M, r] comes from `lora_bwd`."""
    work = work_dtype(dy)
    w = dequantize(packed, absmax, nested_absmax, offset, [dy.shape[1], K], blocksize, quant_type, work)
    dx = dy.to(work) @ w
    if lora_A is not None:
        dx = dx + dropout((dyb.to(work) @ lora_A.to(work)), seed, dropout_p)
    return dx.to(dy.dtype)


def lora_bwd(
    dy: Tensor, x: Tensor, xa: Tensor, lora_A: Tensor, lora_B: Tensor, seed: Tensor | None,
    scaling: float, dropout_p: float, need_dA: bool, need_dB: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dyb [M, r] = scaling * dy lora_B in dy's dtype; dA [r, K] = dyb^T dropout(x); dB [N, r] = scaling * dy^T xa.

    dA and dB in the dtypes of lora_A and lora_B; one that is not needed comes back empty.
    """
    work = work_dtype(dy)
    dyb = (scaling * (dy.to(work) @ lora_B.to(work))).to(dy.dtype)
    dA, dB = lora_A.new_empty(0), lora_B.new_empty(0)
    if need_dA:
        dA = (dyb.to(work).T @ dropout(x, seed, dropout_p)).to(lora_A.dtype)
    if need_dB:
        dB = (scaling * (dy.to(work).T @ xa.to(work))).to(lora_B.dtype)
    return dyb, dA, dB


def group_fwd(
    x: Tensor, packed: list[Tensor], absmax: list[Tensor], nested_absmax: list[Tensor], offset: list[Tensor],
    bias: list[Tensor], lora_A: list[Tensor], lora_B: list[Tensor], seed: Tensor | None,
    N: list[int], blocksize: int, quant_type: str, scaling: list[float], dropout_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`linear_fwd` of each member on one x: y [..., sum N], xa [M, sum r], columns side by side; one mask for them all."""
    each = [
        linear_fwd(
            x, packed[i], absmax[i], *_pair(nested_absmax, offset, i), _at(bias, i), *_pair(lora_A, lora_B, i), seed,
            n, blocksize, quant_type, scaling[i], dropout_p,
        )
        for i, n in enumerate(N)
    ]  # fmt: skip
    return torch.cat([y for y, _ in each], -1), torch.cat([xa for _, xa in each], 1)


def group_bwd(
    dy: Tensor, packed: list[Tensor], absmax: list[Tensor], nested_absmax: list[Tensor], offset: list[Tensor],
    lora_A: list[Tensor], dyb: Tensor | None, seed: Tensor | None,
    N: list[int], K: int, blocksize: int, quant_type: str, dropout_p: float,
) -> Tensor:  # fmt: skip
    """dy [M, sum N] -> dx [M, K], the sum of the members' `linear_bwd`, rounded once; dyb [M, sum r]."""
    work = work_dtype(dy)
    dx = dy.new_zeros((dy.shape[0], K), dtype=work)
    for i, part in enumerate(dy.split(N, 1)):
        w = dequantize(packed[i], absmax[i], *_pair(nested_absmax, offset, i), [N[i], K], blocksize, quant_type, work)
        dx = dx + part.to(work) @ w
    if lora_A:
        dx = dx + dropout(dyb.to(work) @ torch.cat(lora_A).to(work), seed, dropout_p)
    return dx.to(dy.dtype)


def group_lora_bwd(
    dy: Tensor, x: Tensor, xa: Tensor, lora_A: list[Tensor], lora_B: list[Tensor], seed: Tensor | None,
    scaling: list[float], dropout_p: float, need_dA: bool, need_dB: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    """`lora_bwd` of each member: dyb [M, sum r], and each one's dA and dB; a list not needed comes back empty."""
    ranks = [A.shape[0] for A in lora_A]
    parts = xa.split(ranks, 1) if need_dB else [xa] * len(ranks)
    each = [
        lora_bwd(part, x, own, A, B, seed, s, dropout_p, need_dA, need_dB)
        for part, own, A, B, s in zip(dy.split([B.shape[0] for B in lora_B], 1), parts, lora_A, lora_B, scaling, strict=True)
    ]
    dyb, dA, dB = zip(*each, strict=True)
    return torch.cat(dyb, 1), list(dA) if need_dA else [], list(dB) if need_dB else []


def swiglu_fwd(gate_up: Tensor) -> Tensor:
    """gate_up [..., 2 N], the gate's columns first -> h [..., N] = gate * sigmoid(gate) * up, rounded once.

    Source: SwiGLU, arXiv:2002.05202; as the MLP of Llama, Qwen and Mistral computes it, which also rounds silu(gate).
    """
    gate, up = gate_up.to(work_dtype(gate_up)).chunk(2, -1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)


def swiglu_bwd(gate_up: Tensor, dh: Tensor) -> Tensor:
    """dh [..., N] -> the gradient of gate_up [..., 2 N], in its dtype, each rounded once."""
    gate, up = gate_up.to(work_dtype(gate_up)).chunk(2, -1)
    dh, sigmoid = dh.to(gate.dtype), torch.sigmoid(gate)
    dgate = dh * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat((dgate, dh * gate * sigmoid), -1).to(gate_up.dtype)


def _scaled_blocks(flat: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """float32 [n] -> [blocks, blocksize] divided by their absmax, and absmax [blocks]; the short tail padded with zeros."""
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % blocksize)).reshape(-1, blocksize)
    absmax = blocks.abs().amax(dim=1)
    return blocks * (1.0 / absmax.clamp_min(MIN_ABSMAX)).unsqueeze(1), absmax


def _at(tensors: list[Tensor], i: int) -> Tensor | None:
    return tensors[i] if tensors else None


def _pair(first: list[Tensor], second: list[Tensor], i: int) -> tuple[Tensor | None, Tensor | None]:
    return _at(first, i), _at(second, i)
