"""Outputs that a group computes before its members are called for them: for blocks whose own forward calls q, k and v.

The outputs wait in a context of this thread, no longer than one forward of the block, and no module holds them.
"""

from collections.abc import Iterable, Sequence
from contextvars import ContextVar

import torch
from torch import Tensor, nn

# member's id -> x and the member's output for it
_waiting: ContextVar[dict[int, tuple[Tensor, Tensor]]] = ContextVar("nf4lora_waiting", default={})  # noqa: B039 (never changed)


def computed_before(member: nn.Module, x: Tensor) -> Tensor | None:
    """The output of `member` for this very x, if its group has computed it; handed out once."""
    if torch.compiler.is_compiling() or (found := _waiting.get().get(id(member))) is None or found[0] is not x:
        return None
    forget([member])
    return found[1]


def offer(members: Sequence[nn.Module], x: Tensor, outputs: Iterable[Tensor]) -> None:
    """Let each output wait for its member to be called with x."""
    _waiting.set(_waiting.get() | {id(m): (x, y) for m, y in zip(members, outputs, strict=True)})


def forget(members: Iterable[nn.Module]) -> int:
    """Drops what still waits for `members`; how many outputs nobody came for."""
    gone = {id(m) for m in members}
    waiting = _waiting.get()
    _waiting.set({key: value for key, value in waiting.items() if key not in gone})
    return len(gone & waiting.keys())
