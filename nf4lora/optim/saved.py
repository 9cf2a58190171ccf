"""States of one parameter as a checkpoint has them: ours, bitsandbytes' (which ours are) and torch's, checked before they are taken."""

from typing import Any

import torch
from torch import Tensor

from ..codebook import codebook
from ..reference_optim import STATE_BLOCKSIZE
from .pool import NAMES
from .sharded import local
from .shown import count, fits, told

CODES = {"state1": "dynamic", "state2": "unsigned_dynamic"}
WRAPPED = "__bnb_optimizer_quant_state__"  # where bitsandbytes puts what FSDP must not reshape
_TORCH = {"exp_avg": "state1", "exp_avg_sq": "state2"}
_EMPTY = {"max1", "max2", "new_max1", "new_max2", "gnorm_vec", "unorm_vec"}  # of older versions of bitsandbytes


# Steps, states to copy, and with stochastic rounding the number of the pool and the offset in it, which draws depend on.
Entry = tuple[int, dict[str, Tensor], tuple[int, int] | None]


def parts(state_dict: Any) -> tuple[dict[Any, Any], list[dict[str, Any]]]:
    """The entries and the groups of a state dict. Raises: ValueError for another thing."""
    try:
        state, groups = state_dict["state"], state_dict["param_groups"]
        right = isinstance(state, dict) and all(isinstance(g, dict) and isinstance(g["params"], list) for g in groups)
        ids = [i for g in groups for i in g["params"]] if right else []
        right = right and len(set(ids)) == len(ids)
    except (KeyError, TypeError):
        right = False
    if not right:
        raise ValueError('state dict: wanted {"state": entries of parameters, "param_groups": groups with "params", each of them once}')
    return state, groups


def taken(entry: dict[str, Any], p: Tensor, rule: str, bits: int, where: str) -> Entry:
    """A saved entry, for a parameter that keeps its states in `bits` bits.

    Raises: ValueError naming the first thing that does not fit.
    """
    wrapped = entry.get(WRAPPED, {}) if isinstance(entry, dict) else None
    if not isinstance(wrapped, dict):
        raise ValueError(f"{where}: found {entry!r:.80}, wanted states by name")
    entry = {**entry, **wrapped}
    entry.pop(WRAPPED, None)
    entry = {_TORCH.get(name, name): local(value) for name, value in entry.items() if name not in _EMPTY}
    p, coded = local(p), bits == 8
    blocks = -(-p.numel() // STATE_BLOCKSIZE)
    wanted = {}
    for i, name in enumerate(NAMES[rule], 1):
        wanted[name] = tuple(p.shape), torch.uint8 if coded else torch.float32
        if coded:
            wanted[f"absmax{i}"], wanted[f"qmap{i}"] = ((blocks,), torch.float32), ((256,), torch.float32)
    place = entry.pop("place", None)
    wanted = {name: kind for name, kind in wanted.items() if name in entry or not name.startswith("qmap")}  # they are always the same
    if different := {"step", *wanted} ^ entry.keys():
        name = min(different, key=str)
        raise ValueError(f"{where}: {'no ' if name not in entry else 'unexpected '}{name}, wanted {_kind(rule, bits)}")
    for name, (shape, dtype) in wanted.items():
        value = entry[name]
        if not fits(value, shape, dtype):
            raise ValueError(f"{where}.{name}: found {told(value)}, wanted {dtype} {list(shape)}: {_kind(rule, bits)}")
        if name.startswith("qmap") and not torch.equal(value.cpu(), codebook(CODES[f"state{name[-1]}"])):
            raise ValueError(f"{where}.{name}: found another map than the dynamic one of bitsandbytes")
    if place is not None and not fits(place, (2,), torch.int64):
        raise ValueError(f"{where}.place: found {told(place)}, wanted torch.int64 [2]")
    states = {name: entry[name] for name in wanted if not name.startswith("qmap")}
    return count(entry["step"], f"{where}.step"), states, None if place is None else tuple(place.tolist())


def _kind(rule: str, bits: int) -> str:
    return f"{rule} with states of {bits} bits"
