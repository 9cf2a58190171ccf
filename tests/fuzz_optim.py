"""F4: state dicts of optimizers with random damage, into optimizers of every kind.

Loading either raises ValueError and leaves every byte as it was, or takes the states as they are written, and the next
step works. Anything else is a finding. A case is its seed: `python -m fuzz_optim --seconds 0 --first SEED`.
"""

import argparse
import copy
import json
import random
import time
import warnings
from collections import Counter
from typing import Any

import torch
from torch import nn

from nf4lora.optim import AdamW8bit, PagedAdamW, PagedAdamW8bit, PagedLion, PagedLion8bit

KINDS = (AdamW8bit, PagedAdamW, PagedAdamW8bit, PagedLion, PagedLion8bit)
SHAPES = ((16, 17), (3,), (300,))
# Seeds that once found something.
CORPUS: tuple[int, ...] = ()


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


def anything(draw: random.Random) -> Any:
    """A value that has no business in a state dict, or might."""
    return draw.choice([
        None, True, -1, 0, 1, 2**31, 2**70, 0.5, float("nan"), float("inf"), "", "state", b"x", [], [1, 2], (), {}, {1: 2}, {"state1": 3}, set(), object(),
        torch.zeros(()), torch.zeros(0), torch.zeros(1), torch.zeros(3, dtype=torch.uint8), torch.zeros(300), torch.zeros(300, dtype=torch.uint8),
        torch.zeros(17, 16).t(), torch.zeros(300, dtype=torch.float64), torch.full((2,), torch.nan), torch.zeros(300, 2)[:, 0], torch.zeros(300, device="meta"),
        torch.sparse_coo_tensor((300,)), torch.tensor(3), torch.tensor(3.5), torch.tensor(True), torch.zeros(300, dtype=torch.complex64),
    ])  # fmt: skip


def damage(draw: random.Random, saved: dict[str, Any]) -> None:
    """One change somewhere in it."""
    where: Any = saved
    for _ in range(draw.randint(0, 4)):
        inner = [v for v in (where.values() if isinstance(where, dict) else where) if isinstance(v, (dict, list)) and v]
        if not inner:
            break
        where = draw.choice(inner)
    keys = list(where) if isinstance(where, dict) else list(range(len(where)))
    how = draw.choice(["replace", "replace", "remove", "add", "swap"])
    if how == "add" or not keys:
        extra = draw.choice(["state1", "state2", "absmax1", "qmap2", "step", "exp_avg", "max1", "params", "lr", 0, 1, 7, None, "__bnb_optimizer_quant_state__"])
        if isinstance(where, dict):
            where[extra] = anything(draw)
        else:
            where.append(anything(draw))
    elif how == "remove":
        del where[draw.choice(keys)]
    elif how == "swap" and len(keys) > 1:
        a, b = draw.sample(keys, 2)
        where[a], where[b] = where[b], where[a]
    else:
        where[draw.choice(keys)] = anything(draw)


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
        damage(draw, saved)
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


def main() -> None:
    warnings.simplefilter("ignore")
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seconds", type=float, default=60)
    options.add_argument("--first", type=int, default=0)
    asked = options.parse_args()
    counts: Counter[str] = Counter()
    end = time.monotonic() + asked.seconds
    seeds = [*CORPUS, asked.first]
    while seeds:
        seed = seeds.pop(0)
        try:
            counts[case(seed)] += 1
        except BaseException:
            print(f"seed {seed}")
            raise
        if not seeds and time.monotonic() < end:
            seeds.append(max(seed, asked.first) + 1)
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
