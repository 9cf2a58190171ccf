"""dequantize in Triton: one launch from packed codes and absmax, nested or not, to the dense tensor."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..codebook import codebook
from ..triton_tiles import TritonConfig
from .nf4 import decode, load_absmax, scales


@triton.jit
def _load_words(packed_ptr, words, mask, ALIGNED: tl.constexpr):
    """int32 [W]: bytes 4w to 4w + 3 of packed, the first lowest."""
    if ALIGNED:
        return tl.load(packed_ptr.to(tl.pointer_type(tl.int32)) + words, mask=mask, eviction_policy="evict_first")
    else:
        b0 = tl.load(packed_ptr + 4 * words, mask=mask).to(tl.int32)
        b1 = tl.load(packed_ptr + 4 * words + 1, mask=mask).to(tl.int32)
        b2 = tl.load(packed_ptr + 4 * words + 2, mask=mask).to(tl.int32)
        b3 = tl.load(packed_ptr + 4 * words + 3, mask=mask).to(tl.int32)
        return b0 | (b1 << 8) | (b2 << 16) | (b3 << 24)


@triton.jit
def _four(v0, v1, v2, v3):
    """Four [W] -> [W, 4]"""
    return tl.join(tl.join(v0, v2), tl.join(v1, v3)).reshape(v0.shape[0], 4)


@triton.jit
def _eight(v0, v1, v2, v3, v4, v5, v6, v7):
    """Eight [W] -> [W, 8]"""
    left = tl.join(tl.join(v0, v4), tl.join(v2, v6))
    right = tl.join(tl.join(v1, v5), tl.join(v3, v7))
    return tl.join(left, right).reshape(v0.shape[0], 8)


@triton.jit
def _tail(
    packed_ptr, absmax_ptr, nested_absmax_ptr, offset_ptr, codebook_ptr, dynamic_ptr, out_ptr, numel, BLOCKSIZE: tl.constexpr
):  # fmt: skip
    """The last numel % 8 elements, byte by byte."""
    start = numel // 8 * 8
    element = tl.arange(0, 8)
    mask = element < numel - start
    byte = tl.load(packed_ptr + start // 2 + element // 2, mask=mask).to(tl.int32)
    value = tl.load(codebook_ptr + ((byte >> (4 * (1 - element % 2))) & 15), mask=mask)
    block = start.to(tl.int64) // BLOCKSIZE
    absmax = load_absmax(absmax_ptr, nested_absmax_ptr, offset_ptr, dynamic_ptr, block, element // 8, mask)
    tl.store(out_ptr + start + element, (value * absmax).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["numel"])
def dequantize_kernel(
    packed_ptr,  # uint8 [ceil(numel / 2)]
    absmax_ptr,  # float32 [G], or uint8 [G] with nested_absmax
    nested_absmax_ptr,  # float32 [ceil(G / 256)] or None
    offset_ptr,  # float32 [1] or None
    codebook_ptr,  # float32 [16]
    dynamic_ptr,  # float32 [256] or None
    out_ptr,  # float32, bfloat16 or float16 [numel]
    numel,
    BLOCKSIZE: tl.constexpr,
    ALIGNED: tl.constexpr,  # packed_ptr to 4 bytes
    TAIL: tl.constexpr,  # numel % 8 != 0
    ASM: tl.constexpr,
    WORDS: tl.constexpr,  # that one program decodes, of 8 codes each
):
    """out[i] = round(codebook[code i] * absmax[i // BLOCKSIZE]), the product in float32.

    A thread takes one word at a time, 4 bytes in and 16 (float32: 32) bytes out, side by side with its neighbours'.
    The last numel % 8 elements are the first program's. Bytes moved: numel / 2 + G (nested; else 4 G) + numel * itemsize.
    Source: QLoRA, arXiv:2305.14314.
    """
    tl.static_assert(8 * WORDS <= 256 * BLOCKSIZE, "a program's blocks share one nested absmax")
    first = tl.program_id(0).to(tl.int64) * WORDS
    word = tl.max_contiguous(tl.arange(0, WORDS), 1)  # as if not neighbours: or a thread would take four side by side
    mask = word < tl.minimum(numel // 8 - first, WORDS).to(tl.int32)
    words = _load_words(packed_ptr + 4 * first, word, mask, ALIGNED)
    block = (8 * first) // BLOCKSIZE
    absmax = load_absmax(absmax_ptr, nested_absmax_ptr, offset_ptr, dynamic_ptr, block, 8 * word // BLOCKSIZE, mask)
    v = decode(words, codebook_ptr, ASM)
    dtype = out_ptr.dtype.element_ty
    o0, o1, o2, o3 = (v[0] * absmax).to(dtype), (v[1] * absmax).to(dtype), (v[2] * absmax).to(dtype), (v[3] * absmax).to(dtype)
    o4, o5, o6, o7 = (v[4] * absmax).to(dtype), (v[5] * absmax).to(dtype), (v[6] * absmax).to(dtype), (v[7] * absmax).to(dtype)
    row_ptr = out_ptr + 8 * first + 8 * word[:, None]
    if dtype == tl.float32:
        tl.store(row_ptr + tl.arange(0, 4)[None, :], _four(o0, o1, o2, o3), mask=mask[:, None])
        tl.store(row_ptr + 4 + tl.arange(0, 4)[None, :], _four(o4, o5, o6, o7), mask=mask[:, None])
    else:
        tl.store(row_ptr + tl.arange(0, 8)[None, :], _eight(o0, o1, o2, o3, o4, o5, o6, o7), mask=mask[:, None])
    if TAIL:
        if tl.program_id(0) == 0:
            _tail(packed_ptr, absmax_ptr, nested_absmax_ptr, offset_ptr, codebook_ptr, dynamic_ptr, out_ptr, numel, BLOCKSIZE)


def dequantize(packed, absmax, nested_absmax, offset, shape, blocksize, quant_type, dtype, config: TritonConfig) -> Tensor:
    """dtype [shape], float32, bfloat16 or float16; the op's arguments (`nf4lora.reference`), checked by it.

    packed may start at any byte: where it is not aligned to 4, its bytes are loaded one by one, and nothing is copied.
    Source: nf4lora/reference.py, dequantize.
    """
    out = packed.new_empty(shape, dtype=dtype)
    dequantize_into(packed, absmax, nested_absmax, offset, blocksize, quant_type, out, config)
    return out


def dequantize_into(packed, absmax, nested_absmax, offset, blocksize, quant_type, out, config: TritonConfig) -> None:
    """The same into `out`, contiguous."""
    numel = out.numel()
    if numel:
        nested = nested_absmax is not None
        words = config.weights // 8
        with torch.cuda.device_of(packed):
            dequantize_kernel[max(1, triton.cdiv(numel // 8, words)),](
                packed, *scales(absmax, nested_absmax, offset), codebook(quant_type, packed.device),
                codebook("dynamic", packed.device) if nested else None, out, numel,
                BLOCKSIZE=blocksize, ALIGNED=packed.data_ptr() % 4 == 0, TAIL=numel % 8 != 0,
                ASM=isinstance(dequantize_kernel, triton.JITFunction), WORDS=words,
                num_warps=config.warps, enable_fp_fusion=False,
            )  # fmt: skip
