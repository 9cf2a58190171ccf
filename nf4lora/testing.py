"""Checks of the 4-bit linear that need no tuned tolerance, public so that they run wherever the package does.

T1, exact cases: operands for which every product and every order of summation is exact in float32, so a right kernel
    gives the exact result rounded once, and any wrong index, layout, tail or scale shows.

        check_exact(exact_case(M=5, N=70, K=33, r=3, dtype=torch.bfloat16))

T2, error ratio: on real data a kernel may err no more than plain torch does on the dequantized weight.

        check_error_ratio(random_case(M=64, N=512, K=1000, r=16, dtype=torch.bfloat16))

Both take the back end in force: wrap them in `nf4lora.backends.use_backend(name)` to choose one.
`python -m nf4lora.selftest` runs a quick set of both on every back end there is.
"""

import math

import torch
from torch import Tensor

from .cases import LinearCase, Products, exact_case, random_case
from .quant_state import ceil_div

__all__ = [
    "LinearCase", "Products", "assert_error_ratio", "assert_exact", "check_error_ratio", "check_exact", "exact_case",
    "random_case", "ulp",
]  # fmt: skip

TILE, MIN_ELEMENTS = 16, 256
MAX_RATIO, RMS_RATIO, TILE_RATIO, ULPS = 2.0, 1.25, 2.0, 2.0


def check_exact(case: LinearCase) -> None:
    """T1. Raises AssertionError unless every result of `case` (from `exact_case`) is the exact one rounded once."""
    for name, result, truth in zip(Products._fields, case.run(), case.truth(), strict=True):
        if truth is not None:
            assert_exact(result, truth.to(result.dtype), name)


def check_error_ratio(case: LinearCase) -> None:
    """T2. Raises AssertionError unless every result of `case` passes `assert_error_ratio` against plain torch."""
    for name, result, baseline, truth in zip(Products._fields, case.run(), case.baseline(), case.truth(), strict=True):
        if truth is not None:
            assert_error_ratio(result, baseline, truth, name)


def assert_exact(result: Tensor, expected: Tensor, name: str = "result") -> None:
    """Same dtype, same shape, every element equal; NaN equals nothing, and zeros of either sign are equal."""
    if result.dtype != expected.dtype or result.shape != expected.shape:
        raise AssertionError(f"{name}: {result.dtype} {list(result.shape)}, wanted {expected.dtype} {list(expected.shape)}")
    if not torch.equal(result, expected):
        wrong = torch.nonzero(result != expected)
        at = tuple(wrong[0].tolist())
        raise AssertionError(
            f"{name}: {len(wrong)} of {result.numel()} elements wrong, the first at {at}: {result[at].item()}, wanted {expected[at].item()}"
        )


def assert_error_ratio(result: Tensor, baseline: Tensor, truth: Tensor, name: str = "result") -> None:
    """T2: `result` is about as near to `truth` as `baseline` is. e = |. - truth|, in float64:

        max e <= 2 max e_baseline + 2 ulp(max |truth|);   rms e <= 1.25 rms e_baseline;   on 16x16 tiles rms <= 2x

    The rms and tile rules need 256 elements: tails join a neighbouring tile, smaller tensors take the max rule only.
    Where the baseline makes no error at all the rms rules allow none either. NaN and Inf fail. `result` and `baseline`
    are of one dtype, whose ulp counts; truth is float64. All have one shape; the last dimension makes the columns.
    """
    if not result.shape == baseline.shape == truth.shape or result.dtype != baseline.dtype or truth.dtype != torch.float64:
        kinds = [f"{t.dtype} {list(t.shape)}" for t in (result, baseline, truth)]
        raise AssertionError(f"{name}: found {kinds}, wanted one shape, one dtype of result and baseline, truth in float64")
    if truth.numel() == 0:
        return
    columns = truth.shape[-1] if truth.ndim else 1
    r, e, t = (v.double().reshape(-1, columns) for v in (truth, result, baseline))
    if not (r.isfinite().all() and t.isfinite().all()):
        raise AssertionError(f"{name}: the truth or the baseline is not finite, so nothing can be compared with it")
    e, t = (e - r).abs(), (t - r).abs()
    found, limit = e.max().item(), MAX_RATIO * t.max().item() + ULPS * ulp(r.abs().max().item(), result.dtype)
    if not found <= limit:
        at = divmod(int(e.nan_to_num(math.inf).argmax()), columns)
        raise AssertionError(f"{name}: error {found:.3e} at {at}, where it should be {r[at].item():.6e}; wanted <= {limit:.3e}")
    if truth.numel() < MIN_ELEMENTS:
        return
    found, limit = (v.square().mean().sqrt().item() for v in (e, t))
    if not found <= RMS_RATIO * limit:
        raise AssertionError(f"{name}: rms error {found:.3e}, wanted <= {RMS_RATIO} * {limit:.3e}")
    rows = min(len(e), TILE)
    width = min(columns, max(TILE, ceil_div(MIN_ELEMENTS, rows)))
    height = min(len(e), max(TILE, ceil_div(MIN_ELEMENTS, width)))
    found, limit = (_tiles(v.square(), height, width).sqrt() for v in (e, t))
    if not bool((found <= TILE_RATIO * limit).all()):
        excess = torch.where(found > 0, found / limit, 0.0)
        i, j = divmod(int(excess.argmax()), excess.shape[1])
        raise AssertionError(
            f"{name}: rms error {found[i, j].item():.3e} in the tile at {(i * height, j * width)}, wanted <= {TILE_RATIO} * "
            f"{limit[i, j].item():.3e}"
        )


def ulp(value: float, dtype: torch.dtype) -> float:
    """Distance of the neighbouring numbers of `dtype` at magnitude `value`."""
    info = torch.finfo(dtype)
    return info.eps * max(math.ldexp(0.5, math.frexp(value)[1]) if value else 0.0, info.smallest_normal)


def _tiles(v: Tensor, height: int, width: int) -> Tensor:
    """Means over tiles of [rows, columns]; a tail belongs to the last whole tile."""
    for dim, size in ((0, height), (1, width)):
        count = v.shape[dim] // size
        edges = [size] * (count - 1) + [v.shape[dim] - size * (count - 1)]
        v = torch.stack([part.sum(dim) for part in v.split(edges, dim)], dim)
        counts = torch.tensor(edges, dtype=v.dtype, device=v.device)
        v = v / (counts.unsqueeze(1) if dim == 0 else counts)
    return v
