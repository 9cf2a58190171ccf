"""The LoRA branch in Triton: xa in one pass over x; dyb and dB in one pass over dy; dA in one pass over x.

Dropout masks x as it is read. Sums over many tokens or columns are split into parts, which `Parts.finish` adds up in
their order. Without a tile to run with, torch multiplies. Source: nf4lora/reference.py, linear_fwd and lora_bwd.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_tiles import TritonLoraConfig, TritonTile
from .weight import Parts, dropout, dropout_constants, kept, operand, product, rounded


@triton.jit
def _dropped(x, seed_ptr, threshold, rows, first, K, COLS: tl.constexpr, QUADS: tl.constexpr):
    """x [R, COLS] where dropout keeps it, elsewhere 0 whatever it was."""
    if seed_ptr is None:
        return x
    else:
        return tl.where(kept(seed_ptr, threshold, rows, first, K, COLS, QUADS), x, tl.zeros(x.shape, x.dtype))


@triton.jit(do_not_specialize=["M", "threshold", "steps"])
def xa_kernel(
    x_ptr,  # bfloat16 or float16 [M, K]
    A_ptr,  # any float [r, K]
    seed_ptr,  # int64 [1] or None
    out_ptr,  # x's dtype [M, r], or float32 [parts, M, r]
    M,
    K,
    r,
    threshold,  # of `kept`
    factor,
    steps,  # of BLOCK_K that one part takes
    QUADS: tl.constexpr,
    ASM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RANK: tl.constexpr,  # at least r and 16, a power of two
):
    """xa = dropout(x) A^T, the factor of what dropout keeps applied to the sum. Grid: blocks of tokens, parts of K."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rank = tl.arange(0, RANK)
    acc = tl.zeros((BLOCK_M, RANK), tl.float32)
    part = tl.program_id(1)
    for step in range(part * steps, tl.minimum((part + 1) * steps, tl.cdiv(K, BLOCK_K))):
        cols = step * BLOCK_K + tl.arange(0, BLOCK_K)
        is_col = (cols < K)[None, :]
        x = tl.load(x_ptr + rows.to(tl.int64)[:, None] * K + cols[None, :], mask=(rows < M)[:, None] & is_col, other=0.0)
        x = _dropped(x, seed_ptr, threshold, rows, step * BLOCK_K, K, BLOCK_K, QUADS)
        a = operand(A_ptr + rank.to(tl.int64)[:, None] * K + cols[None, :], (rank < r)[:, None] & is_col, x.dtype, ASM)
        acc = product(x, a.T, acc, ASM)
    to = out_ptr + (part.to(tl.int64) * M + rows)[:, None] * r + rank[None, :]
    tl.store(to, rounded(acc * factor, out_ptr.dtype.element_ty, ASM), mask=(rows < M)[:, None] & (rank < r)[None, :])


@triton.jit(do_not_specialize=["M", "steps"])
def dyb_dB_kernel(
    dy_ptr,  # bfloat16 or float16 [M, N], rows dy_ld apart
    B_ptr,  # any float [N, r]
    xa_ptr,  # dy's dtype [M, r], rows xa_ld apart, or None: dB is not needed
    dyb_ptr,  # dy's dtype [M, r], or float32 [parts of N, M, r]; rows dyb_ld apart
    dB_ptr,  # B's dtype [N, r], or float32 [blocks of tokens, N, r], or None
    M,
    N,
    r,
    dy_ld,
    xa_ld,
    dyb_ld,
    scaling,
    steps,  # of BLOCK_N that one part takes
    ASM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RANK: tl.constexpr,
):
    """dyb = scaling * dy B and dB = scaling * dy^T xa, dy read once. Grid: blocks of tokens, parts of N.

    dyb stays in registers along a row of tiles of dy; each tile gives its block of tokens' part of dB.
    """
    block, part = tl.program_id(0), tl.program_id(1)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    rank = tl.arange(0, RANK)
    of_rows = (rows < M)[:, None] & (rank < r)[None, :]
    dyb = tl.zeros((BLOCK_M, RANK), tl.float32)
    if xa_ptr is not None:
        xa = tl.load(xa_ptr + rows.to(tl.int64)[:, None] * xa_ld + rank[None, :], mask=of_rows, other=0.0)
    for step in range(part * steps, tl.minimum((part + 1) * steps, tl.cdiv(N, BLOCK_N))):
        cols = step * BLOCK_N + tl.arange(0, BLOCK_N)
        of_cols = (cols < N)[:, None] & (rank < r)[None, :]
        dy = tl.load(
            dy_ptr + rows.to(tl.int64)[:, None] * dy_ld + cols[None, :], mask=(rows < M)[:, None] & (cols < N)[None, :], other=0.0
        )
        dyb = product(dy, operand(B_ptr + cols.to(tl.int64)[:, None] * r + rank[None, :], of_cols, dy.dtype, ASM), dyb, ASM)
        if xa_ptr is not None:
            dB = product(dy.T, xa, tl.zeros((BLOCK_N, RANK), tl.float32), ASM)
            to = dB_ptr + (block.to(tl.int64) * N + cols)[:, None] * r + rank[None, :]
            tl.store(to, rounded(dB * scaling, dB_ptr.dtype.element_ty, ASM), mask=of_cols)
    to = dyb_ptr + (part.to(tl.int64) * M + rows)[:, None] * dyb_ld + rank[None, :]
    tl.store(to, rounded(dyb * scaling, dyb_ptr.dtype.element_ty, ASM), mask=of_rows)


@triton.jit(do_not_specialize=["M", "threshold", "steps"])
def dA_kernel(
    x_ptr,  # bfloat16 or float16 [M, K]
    dyb_ptr,  # x's dtype [M, r]
    seed_ptr,  # int64 [1] or None
    dA_ptr,  # A's dtype [r, K], or float32 [parts, r, K]
    M,
    K,
    r,
    threshold,
    factor,
    steps,  # of BLOCK_M that one part takes
    QUADS: tl.constexpr,
    ASM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RANK: tl.constexpr,
):
    """dA = dyb^T dropout(x). Grid: blocks of columns, parts of the tokens."""
    first, part = tl.program_id(0) * BLOCK_K, tl.program_id(1)
    cols = first + tl.arange(0, BLOCK_K)
    is_col = (cols < K)[None, :]
    rank = tl.arange(0, RANK)
    acc = tl.zeros((RANK, BLOCK_K), tl.float32)
    for step in range(part * steps, tl.minimum((part + 1) * steps, tl.cdiv(M, BLOCK_M))):
        rows = step * BLOCK_M + tl.arange(0, BLOCK_M)
        is_row = (rows < M)[:, None]
        x = tl.load(x_ptr + rows.to(tl.int64)[:, None] * K + cols[None, :], mask=is_row & is_col, other=0.0)
        x = _dropped(x, seed_ptr, threshold, rows, first, K, BLOCK_K, QUADS)
        dyb = tl.load(dyb_ptr + rows.to(tl.int64)[:, None] * r + rank[None, :], mask=is_row & (rank < r)[None, :], other=0.0)
        acc = product(dyb.T, x, acc, ASM)
    to = dA_ptr + (part.to(tl.int64) * r + rank)[:, None] * K + cols[None, :]
    tl.store(to, rounded(acc * factor, dA_ptr.dtype.element_ty, ASM), mask=(rank < r)[:, None] & is_col)


def padded_rank(r: int) -> int:
    """RANK of the kernels: `tl.dot` takes powers of two from 16 on."""
    return max(16, triton.next_power_of_2(r))


def xa(x: Tensor, lora_A: Tensor, seed: Tensor | None, dropout_p: float, tile: TritonTile | None) -> Tensor:
    """x [M, K], lora_A [r, K], contiguous -> dropout(x) lora_A^T [M, r] in x's dtype."""
    (M, K), r = x.shape, lora_A.shape[0]
    if tile is None or not M * r:
        return dropout(x, seed, dropout_p, out=torch.empty_like(x)) @ lora_A.to(x.dtype).T
    parts = Parts(x.new_empty((M, r)), tile.split)
    xa_kernel[triton.cdiv(M, tile.rows), tile.split](
        x, lora_A, seed, parts.pointer(), M, K, r, *dropout_constants(seed, dropout_p),
        triton.cdiv(triton.cdiv(K, tile.steps), tile.split), QUADS=K % 4 == 0,
        ASM=isinstance(xa_kernel, triton.JITFunction), BLOCK_M=tile.rows, BLOCK_K=tile.steps, RANK=padded_rank(r),
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
    )  # fmt: skip
    return parts.finish()


def lora_bwd(
    dy, x, xa, lora_A, lora_B, seed, scaling, dropout_p, need_dA, need_dB, config: TritonLoraConfig | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dyb [M, r], dA [r, K], dB [N, r]: a group of one. Source: nf4lora/reference.py, lora_bwd."""
    dyb, dA, dB = group_lora_bwd(dy, x, xa, [lora_A], [lora_B], seed, [scaling], dropout_p, need_dA, need_dB, config)
    return dyb, dA[0] if need_dA else lora_A.new_empty(0), dB[0] if need_dB else lora_B.new_empty(0)


def group_lora_bwd(
    dy, x, xa, lora_A, lora_B, seed, scaling, dropout_p, need_dA, need_dB, config: TritonLoraConfig | None
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """dyb [M, sum r], and dA and dB of each member, all dA in one pass over x. Source: nf4lora/reference.py, group_lora_bwd."""
    dy, lora_B = dy.contiguous(), [B.contiguous() for B in lora_B]
    x, xa = x.contiguous() if need_dA else None, xa.contiguous() if need_dB else None
    ranks, N = [A.shape[0] for A in lora_A], [B.shape[0] for B in lora_B]
    dyb = dy.new_empty((dy.shape[0], sum(ranks)))
    by_torch = config is None or not (dy.numel() and all(ranks))
    dB = []
    with torch.cuda.device_of(dy):
        own = xa.split(ranks, 1) if need_dB else [None] * len(N)
        for each in zip(dy.split(N, 1), own, lora_B, scaling, dyb.split(ranks, 1), strict=True):
            dB.append(_of_dy_by_torch(*each) if by_torch else _of_dy(*each, config.dy))
        if not need_dA:
            return dyb, [], dB if need_dB else []
        if by_torch:
            dA = (dyb.T @ dropout(x, seed, dropout_p, out=torch.empty_like(x))).to(lora_A[0].dtype)
        else:
            dA = _of_x(x, dyb, lora_A[0].dtype, seed, dropout_p, config.x)
    return dyb, [dA] if len(ranks) == 1 else [part.clone() for part in dA.split(ranks)], dB if need_dB else []


def _of_dy_by_torch(dy: Tensor, xa: Tensor | None, lora_B: Tensor, scaling: float, dyb: Tensor) -> Tensor | None:
    dyb.copy_(dy @ lora_B.to(dy.dtype) * scaling)
    return None if xa is None else (dy.T @ xa * scaling).to(lora_B.dtype)


def _of_dy(dy: Tensor, xa: Tensor | None, lora_B: Tensor, scaling: float, dyb: Tensor, tile: TritonTile) -> Tensor | None:
    """Fills dyb [M, r], whose rows may stand apart, and returns dB where there is xa."""
    (M, N), r = dy.shape, lora_B.shape[1]
    blocks = triton.cdiv(M, tile.rows)
    parts, dB = Parts(dyb, tile.split), None if xa is None else Parts(lora_B.new_empty((N, r)), blocks)
    dyb_dB_kernel[blocks, tile.split](
        dy, lora_B, xa, parts.pointer(), None if dB is None else dB.pointer(),
        M, N, r, dy.stride(0), 0 if xa is None else xa.stride(0), parts.ld, scaling,
        triton.cdiv(triton.cdiv(N, tile.steps), tile.split),
        ASM=isinstance(dyb_dB_kernel, triton.JITFunction), BLOCK_M=tile.rows, BLOCK_N=tile.steps, RANK=padded_rank(r),
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
    )  # fmt: skip
    parts.finish()
    return None if dB is None else dB.finish()


def _of_x(x: Tensor, dyb: Tensor, dtype: torch.dtype, seed: Tensor | None, dropout_p: float, tile: TritonTile) -> Tensor:
    """dA [r, K] in `dtype`."""
    (M, K), r = x.shape, dyb.shape[1]
    parts = Parts(x.new_empty((r, K), dtype=dtype), tile.split)
    dA_kernel[triton.cdiv(K, tile.cols), tile.split](
        x, dyb, seed, parts.pointer(), M, K, r, *dropout_constants(seed, dropout_p),
        triton.cdiv(triton.cdiv(M, tile.steps), tile.split), QUADS=K % 4 == 0,
        ASM=isinstance(dA_kernel, triton.JITFunction), BLOCK_M=tile.steps, BLOCK_K=tile.cols, RANK=padded_rank(r),
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
    )  # fmt: skip
    return parts.finish()
