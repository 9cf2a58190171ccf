"""Who is stepped with whom, and with which numbers."""

from typing import NamedTuple

from torch import Tensor

from .pool import Pool


class Plan(NamedTuple):
    """ids: of the group and the parameter of each that moves; sets: which of the sets of hypers it takes; one_of_each: for each
    set, who has it; jobs: params, slots, hyper_of of each pool."""

    ids: list[tuple[int, int]]
    sets: list[int]
    one_of_each: list[int]
    jobs: dict[Pool, tuple[list[Tensor], list[int], list[int]]]


def planned(
    old: Plan | None, moved: list[tuple[int, Tensor]], steps: list[int], pool_of: dict[Tensor, Pool], slot_of: dict[Tensor, int]
) -> Plan:
    """The plan for `moved`, which names the group of each: the old one, if the same parameters of the same groups have still
    taken as many steps as each other. steps: taken by each."""
    ids = [(i, id(p)) for i, p in moved]
    if old and old.ids == ids and all(step == steps[old.one_of_each[s]] for step, s in zip(steps, old.sets, strict=True)):
        return old
    plan = Plan(ids, [], [], {})
    numbers: dict[tuple[int, int], int] = {}  # (group, count of steps) -> which of hypers
    for i, ((group, p), step) in enumerate(zip(moved, steps, strict=True)):
        if (group, step) not in numbers:
            numbers[group, step] = len(numbers)
            plan.one_of_each.append(i)
        plan.sets.append(numbers[group, step])
        job = plan.jobs.setdefault(pool_of[p], ([], [], []))
        for values, value in zip(job, (p, slot_of[p], plan.sets[-1]), strict=True):
            values.append(value)
    return plan
