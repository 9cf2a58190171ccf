"""The hyper-parameters of a group: which are right, and as kernels take them."""

from math import inf, ldexp
from typing import Any

from .options import GROUP, check_foreign


def check_group(group: dict[str, Any]) -> None:
    """Raises: ValueError naming the number that is none, or out of range."""
    for name, (count, below, wanted) in _WANTED.items():
        try:
            values = group.get(name, 0.0) if count > 1 else (group.get(name, 0.0),)
            good = len(values) == count and all(0 <= _number(v) < below for v in values)
        except _NONE:
            good = False
        if not good:
            raise ValueError(f"{name}: found {group[name]!r:.80}, wanted {wanted}")
    # Without weight decay it does not matter how it would be done: torch's Adam saves that it does it in another way.
    check_foreign(group, GROUP if group["weight_decay"] else {name: GROUP[name] for name in ("amsgrad", "maximize")})


def numbers_of(group: dict[str, Any], step: int) -> list[float]:
    """One set of hypers, as `reference_optim.HYPERS` names them. Raises: as `check_group`, as users change numbers in groups."""
    try:
        beta1, beta2 = group["betas"]
        numbers = [_number(v) for v in (group["lr"], beta1, beta2, group.get("eps", 0.0), group["weight_decay"])]
        good = all(0 <= v < below for v, below in zip(numbers, _BELOW, strict=True))
    except _NONE:
        good = False
    if not good:
        check_group(group)
    return [*numbers, float(step)]


def _number(value: Any) -> float:
    """As `float`, which takes text too."""
    return ldexp(value, 0)


_NONE = (TypeError, ValueError, RuntimeError, OverflowError)  # RuntimeError: of a tensor on meta
# How many, below what, and that in words.
_WANTED = {
    "lr": (1, inf, "0 or more"), "betas": (2, 1.0, "two of 0 or more, below 1"), "eps": (1, inf, "0 or more"),
    "weight_decay": (1, inf, "0 or more"),
}  # fmt: skip
_BELOW = [below for count, below, _ in _WANTED.values() for _ in range(count)]
