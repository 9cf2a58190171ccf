"""Which memory the states of an optimizer get on a device."""

import warnings
from collections.abc import Callable
from functools import cache, partial

import torch

from .managed import Managed
from .memory import Layout, Memory, Resident
from .staged import Staged

MakeMemory = Callable[[Layout, torch.device], Memory]


def chooser(paged: bool, budget: int | None, allow_oversubscription: bool) -> MakeMemory:
    """What makes the memory of a pool: unified memory, pinned staging where a device cannot share it, plain memory elsewhere."""
    return partial(_make, paged=paged, budget=budget, allow_oversubscription=allow_oversubscription)


def _make(layout: Layout, device: torch.device, paged: bool, budget: int | None, allow_oversubscription: bool) -> Memory:
    if not paged:
        return Resident(layout, device)
    if device.type != "cuda":
        _say(f"nothing pages on {device.type}, its states are plain memory there")
        return Resident(layout, device)
    try:
        return Managed(layout, device, allow_oversubscription)
    except NotImplementedError as reason:
        _say(f"{reason}; its states are staged through pinned memory")
        return Staged(layout, device, budget)


@cache
def _say(what: str) -> None:
    """Once in a process."""
    warnings.warn(f"paged optimizer: {what}", RuntimeWarning, stacklevel=2)
