"""The hyper-parameters of a group: which are right, and as kernels take them."""

import math
from typing import Any


def check_group(group: dict[str, Any]) -> None:
    """Raises: ValueError naming the number that is none, or out of range."""
    for name in ("maximize", "amsgrad"):
        if group.get(name):
            raise ValueError(f"{name}: found {group[name]!r:.80}, wanted none: these optimizers do not do it")
    if not group.get("decoupled_weight_decay", True) and group["weight_decay"]:
        raise ValueError("decoupled_weight_decay: found False, wanted weight decay as AdamW has it, apart from the gradient")
    for name, wanted in _WANTED.items():
        try:
            good = name not in group or _RIGHT[name](group[name])
        except (TypeError, ValueError):
            good = False
        if not good:
            raise ValueError(f"{name}: found {group[name]!r:.80}, wanted {wanted}")


_WANTED = {"lr": "0 or more", "betas": "two of 0 or more, below 1", "eps": "0 or more", "weight_decay": "0 or more"}
_RIGHT = dict.fromkeys(_WANTED, lambda v: 0 <= float(v) < math.inf) | {
    "betas": lambda v: len(v) == 2 and all(0 <= float(beta) < 1 for beta in v)
}


def numbers_of(group: dict[str, Any], step: int) -> list[float]:
    """One set of hypers, as `reference_optim.HYPERS` names them."""
    beta1, beta2 = group["betas"]
    return [float(v) for v in (group["lr"], beta1, beta2, group.get("eps", 0.0), group["weight_decay"], step)]
