"""The executable specification: every op of `nf4lora.ops` in plain torch, same signatures, on any device and in float64.

A kernel is right if it gives these bytes (quantize, dequantize, dropout) or meets the error rules of `nf4lora.testing`
against these functions in float64 (the products). It is also the back end of last resort.

Weight arguments, everywhere: `packed` uint8 [ceil(N*K/2), 1]; `absmax` float32 [G], or uint8 [G] with `nested_absmax`
float32 [ceil(G/256)] and `offset` float32 [1]; G = ceil(N*K/blocksize). `QuantState` states the format.
"""

import math

import torch
from torch import Tensor

from .codebook import MIN_ABSMAX, NESTED_BLOCKSIZE, boundaries, code_order, codebook, dynamic_boundaries


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
        return absmax
    scale = nested_absmax.repeat_interleave(NESTED_BLOCKSIZE)[: absmax.numel()]
    return codebook("dynamic", absmax.device)[absmax.int()] * scale + offset


def dequantize(
    packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, offset: Tensor | None,
    shape: list[int], blocksize: int, quant_type: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """dtype [shape]: `round(code * absmax)`, the product in float32 with one rounding to dtype; exact in float64."""
    numel = math.prod(shape)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    codes = torch.stack((packed.reshape(-1) >> 4, packed.reshape(-1) & 15), dim=-1).reshape(-1)[:numel]
    scale = dequantize_absmax(absmax, nested_absmax, offset).repeat_interleave(blocksize)[:numel]
    values = codebook(quant_type, packed.device)[codes.int()].to(work)
    return (values * scale.to(work)).to(dtype).reshape(shape)


def linear_fwd(
    x: Tensor, packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, offset: Tensor | None,
    bias: Tensor | None, lora_A: Tensor | None, lora_B: Tensor | None, seed: Tensor | None,
    N: int, blocksize: int, quant_type: str, scaling: float, dropout_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x [M, K] -> y [M, N] = x W^T + bias + scaling * xa lora_B^T, and xa [M, r] = dropout(x) lora_A^T; both in x's dtype.

    bias [N]; lora_A [r, K], lora_B [N, r], each of any float dtype; seed int64 [1] turns dropout on.
    Rounding: xa once to x's dtype, and it is the rounded xa that goes on; y once, at the end.
    """
    work = _work_dtype(x)
    w = dequantize(packed, absmax, nested_absmax, offset, [N, x.shape[1]], blocksize, quant_type, work)
    y = x.to(work) @ w.T
    xa = x.new_zeros(x.shape[0], 0)
    if lora_A is not None:
        xa = (dropout(x, seed, dropout_p) @ lora_A.to(work).T).to(x.dtype)
        y = y + scaling * (xa.to(work) @ lora_B.to(work).T)
    if bias is not None:
        y = y + bias.to(work)
    return y.to(x.dtype), xa


def linear_bwd(
    dy: Tensor, packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, offset: Tensor | None,
    lora_A: Tensor | None, dyb: Tensor | None, seed: Tensor | None,
    K: int, blocksize: int, quant_type: str, dropout_p: float,
) -> Tensor:  # fmt: skip
    """dy [M, N] -> dx [M, K] = dy W + mask * (dyb lora_A), in dy's dtype; dyb [M, r] comes from `lora_bwd`."""
    work = _work_dtype(dy)
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
    work = _work_dtype(dy)
    dyb = (scaling * (dy.to(work) @ lora_B.to(work))).to(dy.dtype)
    dA, dB = lora_A.new_empty(0), lora_B.new_empty(0)
    if need_dA:
        dA = (dyb.to(work).T @ dropout(x, seed, dropout_p)).to(lora_A.dtype)
    if need_dB:
        dB = (scaling * (dy.to(work).T @ xa.to(work))).to(lora_B.dtype)
    return dyb, dA, dB


def dropout(x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """Inverted dropout of [M, K] from a seed, in float32 (float64 for float64): the same bits on every back end.

    Philox4x32-10, key = seed, counter = flat index // 4; element i keeps iff (word[i % 4] >> 8) >= ceil(p * 2**24),
    multiplied by the float32 1 / (1 - p); a dropped element is 0 whatever it was.
    """
    x = x.to(_work_dtype(x))
    if seed is None:
        return x
    p32 = torch.tensor(p, dtype=torch.float32, device=x.device)
    counter = torch.arange(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    words = _philox(counter, seed.reshape(())).reshape(-1)[: x.numel()].reshape(x.shape)
    keep = (words >> 8) >= torch.ceil(p32.double() * 2.0**24).long()
    return torch.where(keep, x * (1.0 / (1.0 - p32)).to(x.dtype), torch.zeros_like(x))


def _philox(counter: Tensor, seed: Tensor) -> Tensor:
    """Philox4x32-10 (Salmon et al., SC'11). counter, seed: int64 -> int64 [len(counter), 4] of 32-bit words."""
    low = 0xFFFFFFFF
    c = [counter & low, (counter >> 32) & low, torch.zeros_like(counter), torch.zeros_like(counter)]
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        # int64 products wrap, and the wrapped bits are the ones wanted.
        product0, product1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [
            ((product1 >> 32) & low) ^ c[1] ^ k0, product1 & low,
            ((product0 >> 32) & low) ^ c[3] ^ k1, product0 & low,
        ]  # fmt: skip
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return torch.stack(c, dim=-1)


def _scaled_blocks(flat: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """float32 [n] -> [blocks, blocksize] divided by their absmax, and absmax [blocks]; the short tail padded with zeros."""
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % blocksize)).reshape(-1, blocksize)
    absmax = blocks.abs().amax(dim=1)
    return blocks * (1.0 / absmax.clamp_min(MIN_ABSMAX)).unsqueeze(1), absmax


def _work_dtype(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32
