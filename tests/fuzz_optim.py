"""F4: state dicts of optimizers with random damage, into optimizers of every kind.

Loading either raises ValueError and leaves every byte as it was, or takes the states as they are written, and the next
step works. Anything else is a finding.
"""

import copy
import random
from typing import Any

import torch
from torch import nn

from fuzzing import damage, main
from nf4lora.optim import AdamW8bit, PagedAdamW, PagedAdamW8bit, PagedLion, PagedLion8bit

KINDS = (AdamW8bit, PagedAdamW, PagedAdamW8bit, PagedLion, PagedLion8bit)
SHAPES = ((16, 17), (3,), (300,))
EXTRA = ("state1", "state2", "absmax1", "qmap2", "step", "exp_avg", "max1", "params", "lr", 0, 1, 7, None, "__bnb_optimizer_quant_state__")
# Seeds that once found something.
CORPUS: tuple[int, ...] = (48854,)  # a state on meta


def optimizer_of(draw: random.Random, steps: int) -> torch.optim.Optimizer:
    dtype = draw.choice([torch.float32, torch.bfloat16])
    ps = [nn.Parameter(torch.ones(s, dtype=dtype)) for s in SHAPES]
    groups = [{"params": ps[:1]}, {"params": ps[1:], "lr": 1e-2}] if draw.random() < 0.3 else ps
    made = draw.choice(KINDS)(groups, min_8bit_size=256, skip_nonfinite=draw.random() < 0.3)
    for _ in range(steps):
        step(made)
    return made


def params_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def step(optimizer: torch.optim.Optimizer) -> None:
    for p in params_of(optimizer):
        p.grad = torch.full_like(p, 0.5)
    optimizer.step()


def bytes_of(optimizer: torch.optim.Optimizer) -> list[Any]:
    saved = optimizer.state_dict()
    found = [p.detach().clone() for p in params_of(optimizer)]
    for i in sorted(saved["state"]):
        found += [torch.as_tensor(saved["state"][i][name]) for name in sorted(saved["state"][i])]
    return [*found, torch.tensor([float(g["lr"]) for g in saved["param_groups"]])]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(x.dtype == y.dtype and x.shape == y.shape and torch.equal(x.nan_to_num(7), y.nan_to_num(7)) for x, y in zip(a, b, strict=True))


def case(seed: int) -> str:
    """The outcome of one seed. Raises: whatever it found."""
    draw = random.Random(seed)
    saved = copy.deepcopy(optimizer_of(draw, draw.randint(0, 2)).state_dict())
    into = optimizer_of(draw, draw.randint(0, 2))
    for _ in range(draw.choice([0, 1, 1, 1, 2, 4])):
        damage(draw, saved, EXTRA)
    before = bytes_of(into)
    try:
        into.load_state_dict(saved)
    except ValueError as error:
        assert str(error), "an error without a word"
        assert same(before, bytes_of(into)), f"refused, but changed: {error}"
        step(into)
        return "refused"
    for i, entry in into.state_dict()["state"].items():
        given = saved["state"].get(i) or {}
        for name in ("state1", "state2", "absmax1", "absmax2"):
            if name in entry and given.get(name) is not None:
                assert torch.equal(entry[name].nan_to_num(7), given[name].nan_to_num(7)), f"state[{i}].{name} is not what was given"
    step(into)
    return "taken"


if __name__ == "__main__":
    main(case, CORPUS, __doc__)
