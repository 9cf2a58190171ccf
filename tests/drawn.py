"""Exact cases with every axis drawn, for sweeps over one of them."""

import torch

from nf4lora.testing import exact_case

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def strided(t, kind):
    """The values of matrix `t` behind other strides."""
    if kind == "transposed":
        return t.T.contiguous().T
    if kind == "every other column":
        wide = torch.full((t.shape[0], 2 * t.shape[1] + 1), torch.nan, dtype=t.dtype)
        wide[:, 1::2] = t
        return wide[:, 1::2]
    if kind == "padded rows":
        wide = torch.full((t.shape[0] + 2, t.shape[1] + 3), torch.nan, dtype=t.dtype)
        wide[1:-1, 2:-1] = t
        return wide[1:-1, 2:-1]
    return t


def drawn_case(draw, **fixed):
    """A case with the axes of `fixed` as they are and everything else drawn; sizes near 1, 16, 64 and 128 more often."""

    def size(low):
        return draw.choice([draw.randint(low, 130), draw.choice([low, 1, 2, 7, 15, 16, 17, 31, 63, 64, 65, 127, 128, 129])])

    drawn = {
        "M": size(0), "N": size(1), "K": size(1), "r": draw.choice([0, 1, 2, 3, 4, 8, 16, 17]), "dtype": draw.choice(FLOATS),
        "adapter_dtype": draw.choice(FLOATS), "bias": draw.random() < 0.5,
        "blocksize": draw.choice([32, 64, 64, 128, 256, 1024, 4096]), "quant_type": draw.choice(["nf4", "nf4", "fp4"]),
        "nested": draw.random() < 0.5, "dropout_p": draw.choice([0.0, 0.0, 0.5]), "seed": draw.randrange(2**31),
    }  # fmt: skip
    case = exact_case(**drawn | fixed)
    kinds = ("contiguous", "contiguous", "transposed", "every other column", "padded rows")
    object.__setattr__(case, "x", strided(case.x, draw.choice(kinds)))
    object.__setattr__(case, "dy", strided(case.dy, draw.choice(kinds)))
    return case
