"""linear_bwd in Triton: dx, as `linear_fwd` the product decoding the weight by the tile, or torch's on the decoded weight."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_tiles import TritonLinearConfig, TritonPath, TritonTile, span
from .lora import padded_rank
from .weight import (
    Parts, decode_into, dropout, dropout_constants, kept, members, operand, product, rounded, stacked, weight_arguments, weight_tile,
)  # fmt: skip


@triton.jit(do_not_specialize=["M", "threshold", "steps"])
def linear_bwd_kernel(
    packed_ptr,  # uint8 [ceil(N * K / 2)]
    absmax_ptr,  # float32 [G], or uint8 [G] with nested_absmax
    nested_absmax_ptr,  # float32 [ceil(G / 256)] or None
    offset_ptr,  # float32 [1] or None
    codebook_ptr,  # float32 [16]
    dynamic_ptr,  # float32 [256] or None
    dy_ptr,  # bfloat16 or float16 [M, N], rows dy_ld apart
    dyb_ptr,  # dy's dtype [M, r] or None
    A_ptr,  # any float [r, K] or None
    seed_ptr,  # int64 [1] or None
    out_ptr,  # dy's dtype [M, K], or float32 [parts, M, K]
    M,
    N,
    K,
    r,
    dy_ld,
    threshold,  # of `kept`
    factor,
    steps,  # of BLOCK_N that one part takes
    BLOCKSIZE: tl.constexpr,
    SPAN: tl.constexpr,
    QUADS: tl.constexpr,
    ASM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RANK: tl.constexpr,  # of dyb and A that one step takes
):
    """out = dy W + mask * (dyb A). Grid: tiles, those of one block of columns of W side by side in time; parts of N.

    The first part takes the LoRA steps, to whose sums dropout's mask is applied before the product goes on from them.
    """
    blocks, part = tl.cdiv(M, BLOCK_M), tl.program_id(1)
    rows = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    first_col = tl.program_id(0) // blocks * BLOCK_K
    cols = first_col + tl.arange(0, BLOCK_K)
    row = rows.to(tl.int64)[:, None]
    is_row, is_col = (rows < M)[:, None], (cols < K)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    if dyb_ptr is not None:
        for first in tl.range(0, tl.where(part == 0, r, 0), RANK, num_stages=1):
            rank = first + tl.arange(0, RANK)
            dyb = tl.load(dyb_ptr + row * r + rank[None, :], mask=is_row & (rank < r)[None, :], other=0.0)
            a = operand(A_ptr + rank.to(tl.int64)[:, None] * K + cols[None, :], (rank < r)[:, None] & is_col, dyb.dtype, ASM)
            acc = product(dyb, a, acc, ASM)
        if seed_ptr is not None:
            acc = tl.where(kept(seed_ptr, threshold, rows, first_col, K, BLOCK_K, QUADS), acc * factor, 0.0)
    for step in range(part * steps, tl.minimum((part + 1) * steps, tl.cdiv(N, BLOCK_N))):
        outs = step * BLOCK_N + tl.arange(0, BLOCK_N)
        dy = tl.load(dy_ptr + row * dy_ld + outs[None, :], mask=is_row & (outs < N)[None, :], other=0.0)
        w = weight_tile(
            packed_ptr, absmax_ptr, nested_absmax_ptr, offset_ptr, codebook_ptr, dynamic_ptr, outs, outs < N, first_col, K,
            dy.dtype, BLOCKSIZE, SPAN, BLOCK_K, ASM,
        )  # fmt: skip
        acc = product(dy, w, acc, ASM)
    to = out_ptr + (part.to(tl.int64) * M + row) * K + cols[None, :]
    tl.store(to, rounded(acc, out_ptr.dtype.element_ty, ASM), mask=is_row & is_col)


def linear_bwd(
    dy, packed, absmax, nested_absmax, offset, lora_A, dyb, seed, K, blocksize, quant_type, dropout_p,
    config: TritonLinearConfig,
) -> Tensor:  # fmt: skip
    """dx [M, K]: a group of one. Source: nf4lora/reference.py, linear_bwd."""
    lists = ([] if t is None else [t] for t in (packed, absmax, nested_absmax, offset, lora_A))
    return group_bwd(dy, *lists, dyb, seed, [dy.shape[1]], K, blocksize, quant_type, dropout_p, config)


def group_bwd(
    dy, packed, absmax, nested_absmax, offset, lora_A, dyb, seed, N, K, blocksize, quant_type, dropout_p,
    config: TritonLinearConfig,
) -> Tensor:  # fmt: skip
    """dx [M, K], the sum over the members, rounded once. Source: nf4lora/reference.py, group_bwd."""
    weights = members(packed, absmax, nested_absmax, offset)
    A = stacked(lora_A) if lora_A else None
    if A is None or not A.shape[0]:
        A = dyb = seed = None
    dy, dyb = dy.contiguous(), None if dyb is None else dyb.contiguous()
    with torch.cuda.device_of(dy):
        compute = _dense if config.path == TritonPath.DENSE else _tiled
        return compute(dy, weights, A, dyb, seed, N, K, blocksize, quant_type, dropout_p, config.product)


def _tiled(dy, weights, A, dyb, seed, N, K, blocksize, quant_type, dropout_p, tile: TritonTile) -> Tensor:
    """Each member makes its parts of the sum; the first member's also have the LoRA branch of them all."""
    M = dy.shape[0]
    dx = dy.new_empty((M, K))
    if not dx.numel():
        return dx
    parts = Parts(dx, len(N) * tile.split)
    for i, columns in enumerate(dy.split(N, 1)):
        branch, r = ((dyb, A, seed), A.shape[0]) if A is not None and i == 0 else ((None, None, None), 0)
        linear_bwd_kernel[triton.cdiv(M, tile.rows) * triton.cdiv(K, tile.cols), tile.split](
            *weight_arguments(*weights[i], quant_type), columns, *branch, parts.pointer(i * tile.split), M, N[i], K, r,
            dy.shape[1], *dropout_constants(seed, dropout_p), triton.cdiv(triton.cdiv(N[i], tile.steps), tile.split),
            BLOCKSIZE=blocksize, SPAN=min(span(K, blocksize, weights[i][0].data_ptr()), tile.cols), QUADS=K % 4 == 0,
            ASM=isinstance(linear_bwd_kernel, triton.JITFunction),
            BLOCK_M=tile.rows, BLOCK_N=tile.steps, BLOCK_K=tile.cols, RANK=min(64, padded_rank(r)),
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
        )  # fmt: skip
    return parts.finish()


def _dense(dy, weights, A, dyb, seed, N, K, blocksize, quant_type, dropout_p, tile: None) -> Tensor:
    """[dy | dyb] [W ; A]. A mask between the two asks for two products, with a rounding each."""
    total, r = sum(N), 0 if A is None or seed is not None else A.shape[0]
    w = dy.new_empty((total + r, K))
    for weight, rows in zip(weights, w[:total].split(N), strict=True):
        decode_into(rows, *weight, K, blocksize, quant_type)
    if r:
        w[total:] = A
        dy = torch.cat((dy, dyb), 1)
    if seed is None:
        return dy @ w
    branch = dyb @ A.to(dy.dtype)
    return dropout(branch, seed, dropout_p, out=branch).addmm_(dy, w)
