"""The checks of the optimizers' ops: dtypes, devices, sizes and places in the arenas."""

import torch
from torch import Tensor

from . import operands
from .operands import FLOATS
from .reference_optim import HYPERS, KINDS, STATE_BLOCKSIZE


def optim_check(grads, steps, flag, slots) -> None:
    _floats("grads", grads, grads[0])
    operands.tensor("steps", steps, (torch.int32,), steps.numel(), grads[0])
    operands.tensor("flag", flag, (torch.int32,), 1, grads[0])
    _slots(slots, steps, len(grads))


def optim_step(
    params, grads, state1, state2, absmax1, absmax2, steps, flag, offsets, slots, hyper_of, hypers, kind, seed, origin
) -> None:  # fmt: skip
    first = params[0]
    if kind not in KINDS:
        raise ValueError(f"kind: found {kind!r}, wanted one of {KINDS}")
    _floats("params", params, first)
    _floats("grads", grads, first)
    for name, values in (("grads", grads), ("offsets", offsets), ("hyper_of", hyper_of)):
        if len(values) != len(params):
            raise ValueError(f"{name}: found {len(values)}, wanted one for each of the {len(params)} params")
    if len(hypers) % len(HYPERS) or not all(0 <= h < len(hypers) // len(HYPERS) for h in hyper_of):
        raise ValueError(f"hyper_of: found {sorted(set(hyper_of))} of {len(hypers)} numbers in hypers, wanted indices of sets of {len(HYPERS)}")
    if seed is not None and first.dtype != torch.bfloat16:
        raise TypeError(f"seed: found parameters of {first.dtype}, wanted torch.bfloat16 to round stochastically")
    if origin < 0 or origin % STATE_BLOCKSIZE:
        raise ValueError(f"origin: found {origin}, wanted a multiple of {STATE_BLOCKSIZE}")
    # All at once first, as there are hundreds; what is wrong is found after.
    numels, total = [p.numel() for p in params], state1.numel()
    if (
        [p.shape for p in params] != [g.shape for g in grads]
        or not all(map(Tensor.is_contiguous, params))
        or any(o < 0 or o % STATE_BLOCKSIZE or o + n > total for o, n in zip(offsets, numels, strict=True))
    ):
        _raise_first(params, grads, offsets, total)
    _states(first, state1, state2, absmax1, absmax2, kind)
    if (steps is None) != (flag is None):
        raise ValueError("steps and flag belong together: found one of them without the other")
    if steps is not None:
        operands.tensor("steps", steps, (torch.int32,), steps.numel(), first)
        operands.tensor("flag", flag, (torch.int32,), 1, first)
        _slots(slots, steps, len(params))


def _raise_first(params: list[Tensor], grads: list[Tensor], offsets: list[int], total: int) -> None:
    for i, (p, g, offset) in enumerate(zip(params, grads, offsets, strict=True)):
        if p.shape != g.shape:
            raise ValueError(f"grads[{i}]: found shape {tuple(g.shape)}, wanted {tuple(p.shape)}")
        if not p.is_contiguous():
            raise ValueError(f"params[{i}]: found strides {p.stride()}, wanted it contiguous")
        if offset < 0 or offset % STATE_BLOCKSIZE or offset + p.numel() > total:
            wanted = f"a multiple of {STATE_BLOCKSIZE} with {p.numel()} elements after it of {total}"
            raise ValueError(f"offsets[{i}]: found {offset}, wanted {wanted}")


def _floats(name: str, tensors: list[Tensor], first: Tensor) -> None:
    if first.dtype in FLOATS and {t.dtype for t in tensors} == {first.dtype} and {t.device for t in tensors} == {first.device}:
        return
    for i, t in enumerate(tensors):
        if t.dtype != first.dtype or t.dtype not in FLOATS:
            raise TypeError(f"{name}[{i}]: found {t.dtype}, wanted {first.dtype if first.dtype in FLOATS else FLOATS} like the first")
        operands.same_device(first, **{name: t})


def _states(first: Tensor, state1: Tensor, state2: Tensor | None, absmax1: Tensor | None, absmax2: Tensor | None, kind: str) -> None:
    coded = absmax1 is not None
    for name, t, wanted in (("state2", state2, kind == "adamw"), ("absmax2", absmax2, coded and kind == "adamw")):
        if (t is not None) != wanted:
            raise ValueError(f"{name}: found {'none' if wanted else 'one'}, wanted {'one' if wanted else 'none'} for {kind}")
    for name, t in (("state1", state1), ("state2", state2)):
        if t is not None:
            operands.tensor(name, t, (torch.uint8,) if coded else (torch.float32,), state1.numel(), first)
    for name, t in (("absmax1", absmax1), ("absmax2", absmax2)):
        if t is not None:
            operands.tensor(name, t, (torch.float32,), -(-state1.numel() // STATE_BLOCKSIZE), first)


def _slots(slots: list[int], steps: Tensor, count: int) -> None:
    if len(slots) != count or len(set(slots)) != count or not all(0 <= s < steps.numel() for s in slots):
        raise ValueError(f"slots: found {len(slots)}, wanted {count} different ones, each below {steps.numel()}")
