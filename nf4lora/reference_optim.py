"""The executable specification of an optimizer's step, as `nf4lora.reference` is of the other ops: every back end gives these bits.

The parameters of a step lie one after another in one index space, each from a multiple of 256 on: `offsets[i]` is where
params[i] begins. `state1` and `state2` are indexed by it: float32, or uint8 codes with `absmax1` and `absmax2` float32, one
for each 256 of the index. What lies between parameters is neither read nor written.

Every operation is rounded to float32 on its own, in the order written here; constants are computed in float64 first.
"""

import math

import torch
from torch import Tensor

from .codebook import MIN_ABSMAX, codebook, dynamic_boundaries
from .dropout import philox

STATE_BLOCKSIZE = 256
HYPERS = ("lr", "beta1", "beta2", "eps", "weight_decay", "step")
KINDS = ("adamw", "lion")


def optim_check(grads: list[Tensor], steps: Tensor, flag: Tensor, slots: list[int]) -> None:
    """flag int32 [1] = 1 if any element of grads is NaN or Inf, else 0 and steps[slots[i]] + 1 for every i.

    steps: int32 [any], counts of the steps taken, one a parameter.
    """
    found = torch.stack([~g.isfinite().all() for g in grads]).any().to(torch.int32).reshape(1)
    flag.copy_(found)
    steps[torch.tensor(slots, device=steps.device)] += 1 - found


def optim_step(
    params: list[Tensor], grads: list[Tensor], state1: Tensor, state2: Tensor | None, absmax1: Tensor | None,
    absmax2: Tensor | None, steps: Tensor | None, flag: Tensor | None, offsets: list[int], slots: list[int],
    hyper_of: list[int], hypers: list[float], kind: str, seed: int | None, origin: int,
) -> None:  # fmt: skip
    """One step of every parameter, in place.

    params, grads: float32, bfloat16 or float16, one dtype for all; hypers: `HYPERS` one set after another, of which
    params[i] takes number hyper_of[i]; step counts this one, 1 for the first.
    steps, flag: as `optim_check` left them; with them the count of params[i] is steps[slots[i]], and nothing at all
    changes where the flag is set.
    kind: "adamw" (Loshchilov and Hutter, arXiv:1711.05101) or "lion" (Chen et al., arXiv:2302.06675), which has no state2.
    seed: rounds bfloat16 parameters stochastically; None: to nearest.
    origin: where the arenas begin in a larger index space, a multiple of 256; it counts for the stochastic rounding alone,
        so that arenas stepped piece by piece give the bits of one step.
    """
    if flag is not None and int(flag):
        return
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        numbers = hypers[len(HYPERS) * hyper_of[i] :][: len(HYPERS)]
        c = constants(*numbers[:-1], int(numbers[-1]) if steps is None else int(steps[slots[i]]), p.device)
        first, last = offsets[i], offsets[i] + p.numel()
        blocks = slice(first // STATE_BLOCKSIZE, -(-last // STATE_BLOCKSIZE))
        p32 = p.reshape(-1).float() * c["keep"]
        g = g.reshape(-1).float()
        m = _read(state1[first:last], absmax1, blocks, "dynamic")
        if kind == "lion":
            p32 = p32 - (m * c["beta1"] + g * c["rest1"]).sign() * c["lr"]
            m = m * c["beta2"] + g * c["rest2"]
        else:
            v = _read(state2[first:last], absmax2, blocks, "unsigned_dynamic")
            m = m * c["beta1"] + g * c["rest1"]
            v = v * c["beta2"] + (g * c["rest2"]) * g
            root_v = v.double().sqrt().float()  # float32's own is not correctly rounded on every CPU
            p32 = p32 - (m / (root_v / c["root"] + c["eps"])) * c["step_size"]
            _write(v, state2[first:last], absmax2, blocks, "unsigned_dynamic")
        _write(m, state1[first:last], absmax1, blocks, "dynamic")
        if seed is not None:
            p32 = stochastically_rounded(p32, seed, origin + first)
        p.copy_(p32.to(p.dtype).reshape(p.shape))


def constants(
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int, device: torch.device
) -> dict[str, Tensor]:  # fmt: skip
    """What a step multiplies by, each computed in float64 and rounded once, float32 [] each."""
    found = {
        "lr": lr, "keep": 1.0 - lr * weight_decay, "beta1": beta1, "rest1": 1.0 - beta1, "beta2": beta2, "rest2": 1.0 - beta2,
        "eps": eps, "root": math.sqrt(1.0 - power(beta2, step)), "step_size": lr / (1.0 - power(beta1, step)),
    }  # fmt: skip
    return {name: torch.tensor(value, dtype=torch.float32, device=device) for name, value in found.items()}


def power(base: float, exponent: int) -> float:
    """base ** exponent for exponents of 0 and more, in float64 by squaring: the same bits on every back end."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def stochastically_rounded(v: Tensor, seed: int, first: int) -> Tensor:
    """float32 [n] -> float32 [n] of which bfloat16 has every value: one of v's two neighbours, the nearer the likelier.

    Philox4x32-10, key = seed, counter = index // 4 of the index first … first + n - 1; the high half of word index % 4 is
    added to the bits of v, whose low half is then dropped. NaN and Inf stay what they are.
    """
    index = torch.arange(first, first + v.numel(), dtype=torch.int64, device=v.device)
    words = philox(index // 4, torch.tensor(seed, dtype=torch.int64, device=v.device))
    bits = v.view(torch.int32).long() + (words.gather(1, (index % 4).unsqueeze(1)).squeeze(1) >> 16)
    rounded = (bits >> 16 << 16).to(torch.int32).view(torch.float32)
    return torch.where(v.isfinite(), rounded, v)


def _read(state: Tensor, absmax: Tensor | None, blocks: slice, code: str) -> Tensor:
    if absmax is None:
        return state
    scale = absmax[blocks].repeat_interleave(STATE_BLOCKSIZE)[: state.numel()]
    return codebook(code, state.device)[state.int()] * scale


def _write(values: Tensor, state: Tensor, absmax: Tensor | None, blocks: slice, code: str) -> None:
    """In float32, or as the nearest codes of values / absmax, ties to the lower; NaN makes absmax NaN and the code 255."""
    if absmax is None:
        state.copy_(values)
        return
    padded = torch.nn.functional.pad(values, (0, -values.numel() % STATE_BLOCKSIZE)).reshape(-1, STATE_BLOCKSIZE)
    absmax[blocks] = padded.abs().amax(1)
    scaled = padded * (1.0 / absmax[blocks].clamp_min(MIN_ABSMAX)).unsqueeze(1)
    state.copy_(torch.bucketize(scaled.reshape(-1)[: values.numel()], dynamic_boundaries(state.device, code)))
