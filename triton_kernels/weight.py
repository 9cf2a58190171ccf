"""What the kernels of the linear share: tiles of the decoded weight, of dropout's mask, products of tiles, sums of parts.

ASM=False, for the interpreter, which has neither asm nor bfloat16 arithmetic: tables are loaded from, bfloat16 is rounded
by its bits and multiplied in float32. What comes out is the same.
"""

import math

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..codebook import codebook
from ..triton_tiles import span
from .nf4 import decode, load_absmax, scales, to_float32

DROPOUT_TILE, DECODE_TILE = (32, 64), (64, 64)  # rows and columns a program takes, of 4 warps
SUM = 1024  # elements a program of `sum_parts_kernel` takes


@triton.jit
def rounded(x, dtype: tl.constexpr, ASM: tl.constexpr):
    """float32 -> dtype, to the nearest, ties to even."""
    if ASM or dtype != tl.bfloat16:
        return x.to(dtype)
    else:
        bits = x.to(tl.uint32, bitcast=True)
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x != x, 0x7FC0, even).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def operand(ptr, mask, dtype: tl.constexpr, ASM: tl.constexpr):
    """What a matrix product takes of a float tensor of any dtype: rounded to `dtype`, zero where masked."""
    values = tl.load(ptr, mask=mask, other=0.0)
    if values.dtype == dtype:
        return values
    else:
        return rounded(to_float32(values), dtype, ASM)


@triton.jit
def product(a, b, acc, ASM: tl.constexpr):
    """acc + a b, float32 [M, N], of a [M, K] and b [K, N], both bfloat16 or both float16."""
    tl.static_assert(a.dtype == b.dtype and a.dtype.primitive_bitwidth == 16, "for the tensor cores")
    if ASM:
        return tl.dot(a, b, acc)
    else:
        return acc + tl.dot(to_float32(a), to_float32(b), input_precision="ieee")


@triton.jit
def weight_tile(
    packed_ptr, absmax_ptr, nested_absmax_ptr, offset_ptr, codebook_ptr, dynamic_ptr,
    rows, is_row, first, K,
    dtype: tl.constexpr, BLOCKSIZE: tl.constexpr, SPAN: tl.constexpr, COLS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """dtype [R, COLS]: columns `first` on of the rows of W [N, K], rows int32 [R]. Zero beyond column K and where not is_row.

    round(codebook_fp32[code] * absmax_fp32), bit for bit what `dequantize` gives. SPAN, from `triton_tiles.span`: so many weights from
    each multiple of SPAN on stand in one row, one block and whole words of the codes; or 1.
    """
    row = rows.to(tl.int64)
    if SPAN == 1:
        cols = first + tl.arange(0, COLS)
        mask = is_row[:, None] & (cols < K)[None, :]
        index = tl.where(mask, row[:, None] * K + cols[None, :], 0)
        byte = tl.load(packed_ptr + index // 2).to(tl.int32)
        value = tl.load(codebook_ptr + ((byte >> (4 - 4 * (index % 2)).to(tl.int32)) & 15))
        absmax = load_absmax(absmax_ptr, nested_absmax_ptr, offset_ptr, dynamic_ptr, index // BLOCKSIZE, 0, mask)
        return rounded(value * tl.where(mask, absmax, 0.0), dtype, ASM)
    else:
        tl.static_assert(SPAN % 8 == 0 and BLOCKSIZE % SPAN == 0 and COLS % SPAN == 0, "whole spans of whole words")
        start = first + SPAN * tl.arange(0, COLS // SPAN)[None, :, None]
        mask = is_row[:, None, None] & (start < K)  # [R, COLS / SPAN, 1]
        row = row[:, None, None]
        word = start // 8 + tl.arange(0, SPAN // 8)[None, None, :]
        words = tl.load(packed_ptr.to(tl.pointer_type(tl.int32)) + row * (K // 8) + word, mask=mask, other=0)
        block = tl.where(mask, (row * K + start) // BLOCKSIZE, 0)
        absmax = load_absmax(absmax_ptr, nested_absmax_ptr, offset_ptr, dynamic_ptr, block, 0, mask)
        # A sum of one: Triton lays out the product for the narrowest load behind an operand, but looks behind no reduction,
        # and what is right for the bytes of the nested absmax costs two instructions for each of the product's.
        absmax = tl.sum(tl.where(mask, absmax, 0.0), axis=2)[:, :, None]
        v = decode(words, codebook_ptr, ASM)
        o0, o1 = rounded(v[0] * absmax, dtype, ASM), rounded(v[1] * absmax, dtype, ASM)
        o2, o3 = rounded(v[2] * absmax, dtype, ASM), rounded(v[3] * absmax, dtype, ASM)
        o4, o5 = rounded(v[4] * absmax, dtype, ASM), rounded(v[5] * absmax, dtype, ASM)
        o6, o7 = rounded(v[6] * absmax, dtype, ASM), rounded(v[7] * absmax, dtype, ASM)
        even = tl.join(tl.join(o0, o4), tl.join(o2, o6))
        odd = tl.join(tl.join(o1, o5), tl.join(o3, o7))
        return tl.join(even, odd).reshape(rows.shape[0], COLS)


def members(packed: list, absmax: list, nested_absmax: list, offset: list) -> list[tuple[Tensor | None, ...]]:
    """The weight operands of each member of a group; nested_absmax and offset may be empty."""
    return list(zip(packed, absmax, nested_absmax or [None] * len(packed), offset or [None] * len(packed), strict=True))


def stacked(tensors: list[Tensor]) -> Tensor:
    """One below the other, contiguous; of one, not copied."""
    return tensors[0].contiguous() if len(tensors) == 1 else torch.cat(tensors)


def weight_arguments(packed, absmax, nested_absmax, offset, quant_type: str) -> tuple[Tensor | None, ...]:
    """The first six arguments of a kernel that decodes a weight."""
    device = packed.device
    dynamic = None if nested_absmax is None else codebook("dynamic", device)
    return packed, *scales(absmax, nested_absmax, offset), codebook(quant_type, device), dynamic


@triton.jit
def kept(seed_ptr, threshold, rows, first, K, COLS: tl.constexpr, QUADS: tl.constexpr):
    """int1 [R, COLS]: what dropout keeps of columns `first` on, multiples of 4, of rows of [., K]. `nf4lora.dropout` states it.

    QUADS: K is a multiple of 4, so that each Philox counter serves four neighbours; otherwise each element asks alone.
    """
    each: tl.constexpr = 4 if QUADS else 1
    index = rows.to(tl.int64)[:, None] * K + (first + each * tl.arange(0, COLS // each))[None, :]
    w0, w1, w2, w3 = tl.randint4x(tl.load(seed_ptr), index // 4)  # Philox4x32-10
    if QUADS:
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(rows.shape[0], COLS)
    else:
        left, right = tl.where(index % 2 == 0, w0, w1), tl.where(index % 2 == 0, w2, w3)
        words = tl.where(index % 4 < 2, left, right)
    return (words >> 8).to(tl.int32) >= threshold


def dropout_constants(seed: Tensor | None, p: float) -> tuple[int, float]:
    """The threshold of `kept` and the factor of what is kept, a float32 as `nf4lora.dropout` rounds it; 1 without dropout."""
    if seed is None:
        return 0, 1.0
    return math.ceil(float(np.float32(p)) * 2.0**24), float(np.float32(1) / (np.float32(1) - np.float32(p)))


@triton.jit(do_not_specialize=["M", "threshold"])
def dropout_kernel(
    x_ptr,  # any float [M, K]
    seed_ptr,  # int64 [1]
    out_ptr,  # x's dtype [M, K], or x itself
    M,
    K,
    threshold,
    factor,
    QUADS: tl.constexpr,
    ASM: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """out = dropout(x), rounded to x's dtype. For what torch multiplies; our own kernels mask as they read."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * COLS
    cols = first + tl.arange(0, COLS)
    at, mask = rows.to(tl.int64)[:, None] * K + cols[None, :], (rows < M)[:, None] & (cols < K)[None, :]
    x = to_float32(tl.load(x_ptr + at, mask=mask, other=0.0))
    x = tl.where(kept(seed_ptr, threshold, rows, first, K, COLS, QUADS), x * factor, 0.0)
    tl.store(out_ptr + at, rounded(x, out_ptr.dtype.element_ty, ASM), mask=mask)


def dropout(x: Tensor, seed: Tensor | None, p: float, out: Tensor) -> Tensor:
    """x [M, K], contiguous, and `out` of the same kind or x itself; without a seed x, and `out` stays as it is."""
    if seed is None:
        return x
    M, K = x.shape
    if x.numel():
        rows, cols = DROPOUT_TILE
        dropout_kernel[triton.cdiv(M, rows), triton.cdiv(K, cols)](
            x, seed, out, M, K, *dropout_constants(seed, p), QUADS=K % 4 == 0,
            ASM=isinstance(dropout_kernel, triton.JITFunction), ROWS=rows, COLS=cols, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out


@triton.jit
def decode_kernel(
    packed_ptr,  # uint8 [ceil(N * K / 2)]
    absmax_ptr,  # float32 [G], or uint8 [G] with nested_absmax
    nested_absmax_ptr,  # float32 [ceil(G / 256)] or None
    offset_ptr,  # float32 [1] or None
    codebook_ptr,  # float32 [16]
    dynamic_ptr,  # float32 [256] or None
    out_ptr,  # any float [N, ld]
    N,
    K,
    ld,
    BLOCKSIZE: tl.constexpr,
    SPAN: tl.constexpr,
    ASM: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """out[:, :K] = W, beside which the caller may have columns of its own. Bytes moved: as `dequantize_kernel`'s."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * COLS
    cols = first + tl.arange(0, COLS)
    w = weight_tile(
        packed_ptr, absmax_ptr, nested_absmax_ptr, offset_ptr, codebook_ptr, dynamic_ptr, rows, rows < N, first, K,
        out_ptr.dtype.element_ty, BLOCKSIZE, SPAN, COLS, ASM,
    )  # fmt: skip
    tl.store(out_ptr + rows.to(tl.int64)[:, None] * ld + cols[None, :], w, mask=(rows < N)[:, None] & (cols < K)[None, :])


def decode_into(out: Tensor, packed, absmax, nested_absmax, offset, K: int, blocksize: int, quant_type: str) -> None:
    """out: any float [N, at least K], rows side by side or apart; its first K columns become W."""
    N = out.shape[0]
    if N and K:
        rows, cols = DECODE_TILE
        decode_kernel[triton.cdiv(N, rows), triton.cdiv(K, cols)](
            *weight_arguments(packed, absmax, nested_absmax, offset, quant_type), out, N, K, out.stride(0),
            BLOCKSIZE=blocksize, SPAN=span(K, blocksize, packed.data_ptr()), ASM=isinstance(decode_kernel, triton.JITFunction),
            ROWS=rows, COLS=cols, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


@triton.jit(do_not_specialize=["parts"])
def sum_parts_kernel(
    parts_ptr,  # float32 [parts, rows, cols]
    out_ptr,  # any float [rows, cols], rows ld apart
    numel,  # rows * cols
    cols,
    ld,
    parts,
    ASM: tl.constexpr,
    SUM: tl.constexpr,  # elements of one program
):
    """out = the sum over the parts, in their order, rounded once. Grid: rows, blocks of columns."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * SUM + tl.arange(0, SUM)
    from_ptr = parts_ptr + row * cols + col
    total = tl.zeros((SUM,), tl.float32)
    for _ in range(parts):
        total += tl.load(from_ptr, mask=col < cols, other=0.0)
        from_ptr += numel
    tl.store(out_ptr + row * ld + col, rounded(total, out_ptr.dtype.element_ty, ASM), mask=col < cols)


class Parts:
    """Where kernels write the `parts` sums that make up the matrix `out`: to it itself if there is one, else to scratch memory.

    Part p is stored in pointer(p)'s dtype, rounded once, its rows `ld` elements apart; the parts of one kernel side by side.
    """

    def __init__(self, out: Tensor, parts: int) -> None:
        self.out, self.parts = out, parts
        self.memory = out if parts == 1 else out.new_empty((parts, *out.shape), dtype=torch.float32)
        self.ld = self.memory.stride(-2)

    def pointer(self, part: int = 0) -> Tensor:
        return self.memory[part:] if part else self.memory

    def finish(self) -> Tensor:
        """The output, its parts added up in their order: the same bits on every run."""
        if self.parts > 1:
            rows, cols = self.out.shape
            if self.out.is_contiguous():
                rows, cols = 1, rows * cols
            sum_parts_kernel[rows, triton.cdiv(cols, SUM)](
                self.memory, self.out, self.out.numel(), cols, self.out.stride(0), self.parts,
                ASM=isinstance(sum_parts_kernel, triton.JITFunction), SUM=SUM, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
        return self.out
