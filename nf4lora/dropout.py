"""Dropout from a seed, part of the specification (`nf4lora.reference`): every back end makes the same mask."""

import torch
from torch import Tensor


def work_dtype(t: Tensor) -> torch.dtype:
    """What the reference computes in: float64 for float64, else float32."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def dropout(x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """Inverted dropout of [M, K] from a seed, in float32 (float64 for float64): the same bits on every back end.

    Philox4x32-10, key = seed, counter = flat index // 4; element i keeps iff (word[i % 4] >> 8) >= ceil(p * 2**24),
    multiplied by the float32 1 / (1 - p); a dropped element is 0 whatever it was.
    """
    x = x.to(work_dtype(x))
    if seed is None:
        return x
    p32 = torch.tensor(p, dtype=torch.float32, device=x.device)
    counter = torch.arange(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    words = philox(counter, seed.reshape(())).reshape(-1)[: x.numel()].reshape(x.shape)
    keep = (words >> 8) >= torch.ceil(p32.double() * 2.0**24).long()
    return torch.where(keep, x * (1.0 / (1.0 - p32)).to(x.dtype), torch.zeros_like(x))


def philox(counter: Tensor, seed: Tensor) -> Tensor:
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
