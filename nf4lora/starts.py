"""Adapters that start from the 16-bit weight, computed while it is in hand: PiSSA, OLoRA, LoftQ, orthogonal."""

import difflib
import math
import re
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from .checks import FLOATS, raise_not_finite
from .functional import dequantize_4bit, quantize_4bit
from .nn import NF4Linear, NF4LoRALinear

KINDS = ("pissa", "pissa_niter_4", "olora", "loftq", "orthogonal")
_SKETCHED = re.compile(r"pissa_niter_(\d{1,4})")


def kind_of(name: Any) -> tuple[str, int | None]:
    """Which start a name says, and the N of "pissa_niter_N". Raises: ValueError for another name."""
    known = name.lower() if isinstance(name, str) else ""
    if sketched := _SKETCHED.fullmatch(known):
        return "pissa", int(sketched[1])
    if known not in KINDS:
        near = difflib.get_close_matches(known, KINDS, 1)
        raise ValueError(f"kind: found {name!r}, wanted one of {KINDS}{f'; did you mean {near[0]!r}?' if near else ''}")
    return known, None


@torch.no_grad()
def start(
    weight: Tensor, r: int, scaling: float, kind: str, *, iterations: int = 1, blocksize: int = 64, quant_type: str = "nf4",
    double_quant: bool = True, generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The first A and B of an adapter, and what is to be quantized beside them: weight = residual + scaling * B A.

    Args:
        weight:     float32, bfloat16 or float16 [N, K]
        r:          rank, at most min(N, K), but for "orthogonal"
        scaling:    of the adapter: lora_alpha / r, or lora_alpha / sqrt(r)
        kind:       "pissa":         the r largest singular triplets, sqrt(S / scaling) on each side
                    "pissa_niter_N": those, nearly, by a random sketch and N rounds of subspace iteration
                    "olora":         B is the first r columns of Q, A the first r rows of R of weight = Q R
                    "loftq":         in turn, quantize what the adapter leaves and fit the adapter to what that loses, keeping
                                     the best of `iterations` rounds; here weight ~ decoded(residual) + scaling * B A
                    "orthogonal":    random, B A = 0 to rounding; the residual is the weight
        iterations, blocksize, quant_type, double_quant: for "loftq", those the residual will be quantized with
        generator:  of the random numbers, torch's own by default; drawn on its device, so one seed serves every device
    Returns:  lora_A float32 [r, K], lora_B float32 [N, r], residual float32 [N, K], on the weight's device. The residual
              may share the weight's memory
    Numerics: float32 throughout; A and B are those of peft's own start on a float32 base, except that LoftQ divides by
              `scaling`, which peft forgets: the two agree where scaling is 1
    Raises:   ValueError (kind, r, scaling, iterations, NaN or Inf, a weight on the meta device), TypeError (dtype)
    Memory:   "pissa" and "loftq": about 4 [N, K] in float32; "pissa_niter_N": 1 and the residual
    Source:   PiSSA, arXiv:2404.02948; OLoRA, arXiv:2406.01775; LoftQ, arXiv:2310.08659
    """
    dtype = getattr(weight, "dtype", type(weight).__name__)
    if dtype not in FLOATS:
        raise TypeError(f"weight: found {dtype}, wanted one of {FLOATS}: a start is computed before quantizing")
    check(weight.shape, r, scaling, kind, iterations)
    if weight.is_meta:
        raise ValueError("weight: found it on the meta device; load the model first")
    if not weight.isfinite().all():
        raise_not_finite("weight", weight)
    kind, niter = kind_of(kind)
    W = weight.detach().float()
    with torch.autocast(W.device.type, enabled=False):
        if kind == "orthogonal":
            return *(t.to(W.device) for t in _orthogonal(*W.shape, r, generator)), W
        if kind == "loftq":
            return _loftq(W, r, scaling, iterations, (blocksize, double_quant, quant_type))
        if kind == "olora":
            Q, R = torch.linalg.qr(W)
            A, B = R[:r].contiguous(), Q[:, :r].contiguous()
        else:
            triplets = _svd(W) if niter is None else _sketched_svd(W, r, niter, generator)
            A, B = _balanced(*triplets, r, scaling)
        return A, B, torch.addmm(W, B, A, alpha=-scaling)


def start_layer(
    layer: NF4Linear, weight: Tensor, r: int, scaling: float, kind: str, **options: Any
) -> tuple[Tensor, Tensor]:
    """Let `layer` hold the residual of `start`, in its own 4-bit format. Returns: lora_A and lora_B; raises as `start`."""
    options |= {"blocksize": layer.blocksize, "quant_type": layer.quant_type, "double_quant": layer.double_quant}
    lora_A, lora_B, residual = start(weight, r, scaling, kind, **options)
    layer.quantize_(residual)
    layer.weight_dtype = weight.dtype
    return lora_A, lora_B


@torch.no_grad()
def with_start(
    linear: nn.Linear, kind: str, *, iterations: int = 1, generator: torch.Generator | None = None, **kwargs: Any
) -> NF4LoRALinear:
    """`NF4LoRALinear.from_linear(linear, **kwargs)` with the adapter and the base of `start`; raises as both."""
    layer = NF4LoRALinear.from_linear(linear, **kwargs)
    weight = linear.weight.detach().to(layer.weight.device, layer.weight_dtype)
    options = {"iterations": iterations, "generator": generator}
    lora_A, lora_B = start_layer(layer, weight, layer.r, layer.scaling, kind, **options)
    layer.lora_A.copy_(lora_A)
    layer.lora_B.copy_(lora_B)
    return layer


def check(shape: tuple[int, ...], r: int, scaling: float, kind: str, iterations: int = 1) -> None:
    """Whether a weight of this shape can have such a start. Raises: ValueError."""
    kind, _niter = kind_of(kind)
    if len(shape) != 2:
        raise ValueError(f"weight: found shape {tuple(shape)}, wanted [N, K]")
    if type(r) is not int or r < 1:
        raise ValueError(f"r: found {r!r}, wanted a positive integer")
    if kind != "orthogonal" and r > min(shape):
        raise ValueError(f"r: found {r}, wanted at most {min(shape)} for a weight of shape {tuple(shape)}")
    if kind == "orthogonal" and r % 2:
        raise ValueError(f"r: found {r}, wanted an even rank for the orthogonal start, half for A and half for B")
    if not isinstance(scaling, Real) or not 0 < scaling < math.inf:
        raise ValueError(f"scaling: found {scaling!r}, wanted a positive finite number")
    if type(iterations) is not int or iterations < 1:
        raise ValueError(f"iterations: found {iterations!r}, wanted a positive integer")


def _balanced(U: Tensor, S: Tensor, Vh: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A [r, K] and B [N, r] with scaling * B A = U S Vh of the first r triplets, as long as each other."""
    root = (S[:r] / scaling).sqrt()
    return (root.unsqueeze(1) * Vh[:r]).contiguous(), (U[:, :r] * root).contiguous()


def _loftq(
    W: Tensor, r: int, scaling: float, iterations: int, quantizing: tuple[int, bool, str]
) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and residual of the round that leaves least of W."""
    residual, best, least = W, None, math.inf
    for _ in range(iterations):
        lost = W - dequantize_4bit(*quantize_4bit(residual, *quantizing), torch.float32)
        A, B = _balanced(*_svd(lost), r, scaling)
        error = torch.linalg.norm(lost.addmm_(B, A, alpha=-scaling)).item()
        if best is None or error < least:
            best, least = (A, B, residual), error
        residual = torch.addmm(W, B, A, alpha=-scaling)
    return best


def _svd(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(W, full_matrices=False)


def _sketched_svd(W: Tensor, r: int, niter: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
    """U [N, r], S [r], Vh [r, K]: Algorithm 5.1 of Halko, Martinsson and Tropp, arXiv:0909.4061, as `torch.svd_lowrank`."""
    tall = W if W.shape[0] >= W.shape[1] else W.T
    Q = torch.linalg.qr(tall @ _random(tall.shape[1], r, generator).to(W.device)).Q
    for _ in range(niter):
        Q = torch.linalg.qr(tall @ torch.linalg.qr(tall.T @ Q).Q).Q
    U, S, Vh = _svd(Q.T @ tall)
    return (Q @ U, S, Vh) if tall is W else (Vh.T, S, (Q @ U).T)


def _orthogonal(N: int, K: int, r: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Random A and B whose rows and columns are made of two halves of one orthonormal basis of r dimensions."""
    Q = torch.linalg.qr(_random(r, r, generator)).Q
    A = (_random(K, r // 2, generator) @ Q[0::2]).T / 10
    B = (_random(r // 2, N, generator).T @ Q[1::2]) / 10
    return A.contiguous(), B.contiguous()


def _random(rows: int, columns: int, generator: torch.Generator | None) -> Tensor:
    device = None if generator is None else generator.device
    return torch.randn(rows, columns, generator=generator, dtype=torch.float32, device=device or "cpu")
