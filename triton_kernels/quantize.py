"""quantize and quantize_absmax in Triton, one launch each."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..codebook import NESTED_BLOCKSIZE, dynamic_boundaries
from ..triton_tiles import TritonConfig
from .nf4 import cells, encode, scaled, to_float32


@triton.jit(do_not_specialize=["numel"])
def quantize_kernel(
    a_ptr,  # float32, bfloat16 or float16 [numel]
    packed_ptr,  # uint8 [ceil(numel / 2)], aligned to 4
    absmax_ptr,  # float32 [ceil(numel / BLOCKSIZE)]
    cells_ptr,  # int64 [32]
    numel,
    BLOCKSIZE: tl.constexpr,
    NF4: tl.constexpr,
    TAIL: tl.constexpr,  # numel % 8 != 0: masks by the element, bytes stored one by one
    ASM: tl.constexpr,
    WEIGHTS: tl.constexpr,  # that one program takes, a multiple of BLOCKSIZE
):
    """absmax of each block; code of each a * (1 / absmax), two to a byte, the first in the high nibble.

    A thread takes 16 bytes of a at a time. Elements beyond the last count as zeros, so the padding nibble of an odd
    count is the code of zero. Bytes moved: numel * itemsize + numel / 2 + 4 * numel / BLOCKSIZE.
    Source: QLoRA, arXiv:2305.14314.
    """
    tl.static_assert(WEIGHTS % BLOCKSIZE == 0, "whole blocks")
    first = tl.program_id(0).to(tl.int64) * WEIGHTS
    left = tl.minimum(numel - first, WEIGHTS).to(tl.int32)
    block = tl.arange(0, WEIGHTS // BLOCKSIZE)
    word = block[:, None] * (BLOCKSIZE // 8) + tl.arange(0, BLOCKSIZE // 8)[None, :]  # [B, n]
    element = tl.arange(0, 8)[None, None, :]
    index = 8 * word[:, :, None] + element  # [B, n, 8]
    mask = index < left if TAIL else tl.broadcast_to((8 * word < left)[:, :, None], index.shape)
    v, absmax = scaled(to_float32(tl.load(a_ptr + first + index, mask=mask, other=0.0)))
    if TAIL:
        v = tl.where(mask, v, 0.0)  # a NaN or Inf in the block is none in the padding
    codes = encode(v, cells_ptr, NF4, ASM)
    if TAIL:
        nibble = 4 * (1 - tl.arange(0, 2))[None, None, None, :]
        byte = tl.sum(codes.reshape(word.shape[0], word.shape[1], 4, 2) << nibble, axis=3)  # [B, n, 4]
        at = 4 * word[:, :, None] + tl.arange(0, 4)[None, None, :]
        tl.store(packed_ptr + first // 2 + at, byte.to(tl.uint8), mask=2 * at < left)
    else:
        nibble = 4 * (element ^ 1)  # element 2j is the high nibble of byte j
        words_ptr = packed_ptr.to(tl.pointer_type(tl.int32)) + first // 8
        at = tl.max_contiguous(word, [1, 1])  # as if not neighbours: or they would be gathered, four to a thread, through shared memory
        tl.store(words_ptr + at, tl.sum(codes << nibble, axis=2), mask=8 * word < left)
    tl.store(absmax_ptr + first // BLOCKSIZE + block, absmax, mask=block * BLOCKSIZE < left)


@triton.jit(do_not_specialize=["groups"])
def quantize_absmax_kernel(
    absmax_ptr,  # float32 [groups]
    offset_ptr,  # float32 [1]
    codes_ptr,  # uint8 [groups]
    nested_absmax_ptr,  # float32 [ceil(groups / BLOCK)]
    boundaries_ptr,  # float32 [255]
    groups,
    BLOCK: tl.constexpr,  # blocksize of the nested absmax, one block a program
):
    """code = #{boundaries < (absmax - offset) * (1 / nested_absmax)}, the exact nearest of 256; 255 for NaN."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    index = (8 * tl.arange(0, BLOCK // 8)[:, None] + tl.arange(0, 8)[None, :])[None, :, :]  # [1, BLOCK / 8, 8]
    mask = index < tl.minimum(groups - first, BLOCK).to(tl.int32)
    absmax = tl.load(absmax_ptr + first + index, mask=mask, other=0.0)
    v, nested_absmax = scaled(tl.where(mask, absmax - tl.load(offset_ptr), 0.0))
    code = tl.zeros(v.shape, tl.int32)
    for bit in tl.static_range(8):
        code += tl.where(v <= tl.load(boundaries_ptr + code + ((128 >> bit) - 1)), 0, 128 >> bit)  # NaN goes up
    tl.store(codes_ptr + first + index, code.to(tl.uint8), mask=mask)
    tl.store(nested_absmax_ptr + tl.program_id(0) + tl.arange(0, 1), nested_absmax)


def quantize(a: Tensor, blocksize: int, quant_type: str, config: TritonConfig) -> tuple[Tensor, Tensor]:
    """a: float32, bfloat16 or float16, any shape -> packed uint8 [ceil(n/2), 1], absmax float32 [ceil(n/blocksize)].

    A view that is not contiguous is copied first. Source: nf4lora/reference.py, quantize.
    """
    a = a.contiguous()
    numel = a.numel()
    packed = a.new_empty((triton.cdiv(numel, 2), 1), dtype=torch.uint8)
    absmax = a.new_empty(triton.cdiv(numel, blocksize), dtype=torch.float32)
    if numel:
        with torch.cuda.device_of(a):
            quantize_kernel[triton.cdiv(numel, config.weights),](
                a, packed, absmax, cells(quant_type, a.device), numel,
                BLOCKSIZE=blocksize, NF4=quant_type == "nf4", TAIL=numel % 8 != 0,
                ASM=isinstance(quantize_kernel, triton.JITFunction), WEIGHTS=config.weights,
                num_warps=config.warps, enable_fp_fusion=False,
            )  # fmt: skip
    return packed, absmax


def quantize_absmax(absmax: Tensor, offset: Tensor, config: TritonConfig) -> tuple[Tensor, Tensor]:
    """absmax float32 [G], offset float32 [1] -> codes uint8 [G], nested_absmax float32 [ceil(G/256)].

    Source: nf4lora/reference.py, quantize_absmax.
    """
    groups = absmax.numel()
    codes = absmax.new_empty(groups, dtype=torch.uint8)
    nested_absmax = absmax.new_empty(triton.cdiv(groups, NESTED_BLOCKSIZE))
    if groups:
        with torch.cuda.device_of(absmax):
            quantize_absmax_kernel[triton.cdiv(groups, NESTED_BLOCKSIZE),](
                absmax, offset, codes, nested_absmax, dynamic_boundaries(absmax.device), groups,
                BLOCK=NESTED_BLOCKSIZE, num_warps=config.warps, enable_fp_fusion=False,
            )  # fmt: skip
    return codes, nested_absmax
