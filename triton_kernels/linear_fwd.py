"""linear_fwd in Triton: the weight decoded tile by tile inside the product, or once to memory for torch's product."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_tiles import TritonLinearConfig, TritonPath, TritonTile, span
from . import lora
from .weight import Parts, decode_into, members, operand, product, rounded, stacked, weight_arguments, weight_tile

_WIDE = 8  # rows of what torch multiplies begin at multiples of so many elements


@triton.jit(do_not_specialize=["M", "steps"])
def linear_fwd_kernel(
    packed_ptr,  # uint8 [ceil(N * K / 2)]
    absmax_ptr,  # float32 [G], or uint8 [G] with nested_absmax
    nested_absmax_ptr,  # float32 [ceil(G / 256)] or None
    offset_ptr,  # float32 [1] or None
    codebook_ptr,  # float32 [16]
    dynamic_ptr,  # float32 [256] or None
    x_ptr,  # bfloat16 or float16 [M, K]
    bias_ptr,  # any float [N] or None
    xa_ptr,  # x's dtype [M, r], rows xa_ld apart, or None
    B_ptr,  # any float [N, r] or None
    out_ptr,  # x's dtype [M, N], or float32 [parts, M, N]; rows out_ld apart
    M,
    N,
    K,
    r,
    xa_ld,
    out_ld,
    scaling,
    steps,  # of BLOCK_K that one part takes
    BLOCKSIZE: tl.constexpr,
    SPAN: tl.constexpr,
    ASM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RANK: tl.constexpr,  # of xa and B that one step takes
):
    """out = x W^T + bias + scaling * xa B^T. Grid: tiles, those of one block of W side by side in time; parts of K.

    The first part takes the LoRA steps, in the accumulators the product then goes on from, and the bias.
    """
    blocks, part = tl.cdiv(M, BLOCK_M), tl.program_id(1)
    rows = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    outs = tl.program_id(0) // blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    row = rows.to(tl.int64)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if xa_ptr is not None:
        for first in tl.range(0, tl.where(part == 0, r, 0), RANK, num_stages=1):
            rank = first + tl.arange(0, RANK)
            is_rank = (rank < r)[None, :]
            xa = tl.load(xa_ptr + row * xa_ld + rank[None, :], mask=(rows < M)[:, None] & is_rank, other=0.0)
            b = operand(B_ptr + outs.to(tl.int64)[:, None] * r + rank[None, :], (outs < N)[:, None] & is_rank, xa.dtype, ASM)
            acc = product(xa, b.T, acc, ASM)
        acc *= scaling
    for step in range(part * steps, tl.minimum((part + 1) * steps, tl.cdiv(K, BLOCK_K))):
        cols = step * BLOCK_K + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + row * K + cols[None, :], mask=(rows < M)[:, None] & (cols < K)[None, :], other=0.0)
        w = weight_tile(
            packed_ptr, absmax_ptr, nested_absmax_ptr, offset_ptr, codebook_ptr, dynamic_ptr, outs, outs < N,
            step * BLOCK_K, K, x.dtype, BLOCKSIZE, SPAN, BLOCK_K, ASM,
        )  # fmt: skip
        acc = product(x, w.T, acc, ASM)
    if bias_ptr is not None:
        acc += operand(bias_ptr + outs, outs < tl.where(part == 0, N, 0), tl.float32, ASM)[None, :]
    to = out_ptr + (part.to(tl.int64) * M + row) * out_ld + outs[None, :]
    tl.store(to, rounded(acc, out_ptr.dtype.element_ty, ASM), mask=(rows < M)[:, None] & (outs < N)[None, :])


def linear_fwd(
    x, packed, absmax, nested_absmax, offset, bias, lora_A, lora_B, seed, N, blocksize, quant_type, scaling, dropout_p,
    config: TritonLinearConfig,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y [M, N], xa [M, r]: a group of one. Source: nf4lora/reference.py, linear_fwd."""
    lists = ([] if t is None else [t] for t in (packed, absmax, nested_absmax, offset, bias, lora_A, lora_B))
    return group_fwd(x, *lists, seed, [N], blocksize, quant_type, [scaling], dropout_p, config)


def group_fwd(
    x, packed, absmax, nested_absmax, offset, bias, lora_A, lora_B, seed, N, blocksize, quant_type, scaling, dropout_p,
    config: TritonLinearConfig,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y [M, sum N], xa [M, sum r], which all members share one pass over x for. Source: nf4lora/reference.py, group_fwd."""
    x, lora_B = x.contiguous(), [B.contiguous() for B in lora_B]
    with torch.cuda.device_of(x):
        weights = members(packed, absmax, nested_absmax, offset)
        xa = lora.xa(x, stacked(lora_A), seed, dropout_p, config.xa) if lora_A else x.new_empty((x.shape[0], 0))
        compute = _dense if config.path == TritonPath.DENSE else _tiled
        return compute(x, weights, bias, xa, lora_B, N, blocksize, quant_type, scaling, config.product), xa


def _tiled(x, weights, bias, xa, lora_B, N, blocksize, quant_type, scaling, tile: TritonTile) -> Tensor:
    M, K = x.shape
    y = x.new_empty((M, sum(N)))
    ranks = [B.shape[1] for B in lora_B] or [0] * len(N)
    for i, (out, rank) in enumerate(zip(y.split(N, 1), xa.split(ranks, 1), strict=True)):
        if not out.numel():
            continue
        r, parts = ranks[i], Parts(out, tile.split)
        linear_fwd_kernel[triton.cdiv(M, tile.rows) * triton.cdiv(N[i], tile.cols), tile.split](
            *weight_arguments(*weights[i], quant_type), x, bias[i] if bias else None, rank if r else None,
            lora_B[i] if r else None, parts.pointer(), M, N[i], K, r, xa.stride(0), parts.ld, scaling[i],
            triton.cdiv(triton.cdiv(K, tile.steps), tile.split),
            BLOCKSIZE=blocksize, SPAN=min(span(K, blocksize, weights[i][0].data_ptr()), tile.steps),
            ASM=isinstance(linear_fwd_kernel, triton.JITFunction),
            BLOCK_M=tile.rows, BLOCK_N=tile.cols, BLOCK_K=tile.steps, RANK=min(64, lora.padded_rank(r)),
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
        )  # fmt: skip
        parts.finish()
    return y


def _dense(x, weights, bias, xa, lora_B, N, blocksize, quant_type, scaling, tile: None) -> Tensor:
    """[x | xa] [W | scaling B]^T + bias: with the LoRA branch in the product, y is rounded once."""
    (M, K), r = x.shape, xa.shape[1]
    width = triton.cdiv(K + r, _WIDE) * _WIDE if r else K
    w, first = x.new_empty((sum(N), width)), K
    w[:, K:].zero_()
    for i, rows in enumerate(w.split(N)):
        decode_into(rows, *weights[i], K, blocksize, quant_type)
        if r:
            rows[:, first : (first := first + lora_B[i].shape[1])] = lora_B[i] * scaling[i]
    if r:
        x = torch.cat((x, xa, x.new_zeros((M, width - K - r))), 1)
    return torch.addmm(stacked(bias).to(x.dtype), x, w.T) if bias else x @ w.T
