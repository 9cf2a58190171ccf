"""What `state` shows of one parameter: tensors that kernels step where they lie, so that none can take their place."""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor


class Shown(dict[str, Any]):
    """The step and the states of a parameter; another value for one of them is copied to where it lies.

    own: states by the names of `Pool.states`; home: has all of them where `own` shows them.
    Raises: ValueError for a value of another shape, dtype or kind.
    """

    def __init__(self, own: dict[str, Tensor], home: Callable[[], Any]) -> None:
        super().__init__(step=0, **own)
        self.own, self._home = own, home
        self._steps: Tensor | None = None

    def count_in(self, steps: Tensor) -> None:
        """Steps are counted there from now on, int32 [], by others."""
        self._steps = steps
        super().__setitem__("step", steps)

    def fill(self, step: int, states: dict[str, Tensor]) -> None:
        """These states, and zeros for those that are missing; all of them are at home."""
        for name, t in self.own.items():
            t.copy_(states[name]) if name in states else t.zero_()
            super().__setitem__(name, t)
        self._count(step)

    def __setitem__(self, name: str, value: Any) -> None:
        if name == "step":
            self._count(count(value, "step"))
        elif (own := self.own.get(name)) is None:
            super().__setitem__(name, value)
        elif not fits(value, own.shape, own.dtype):
            raise ValueError(f"{name}: found {told(value)}, wanted {own.dtype} {list(own.shape)}")
        else:
            self._home()
            own.copy_(value.detach())
            super().__setitem__(name, own)

    def update(self, *args: Any, **kwargs: Any) -> None:
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __ior__(self, other: Any) -> Self:
        self.update(other)
        return self

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return dict, (dict(self),)  # a copy lies in no arena

    def _count(self, step: int) -> None:
        if self._steps is not None:
            self._steps.fill_(step)
        super().__setitem__("step", step if self._steps is None else self._steps)


def fits(value: Any, shape: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether it is a tensor of these that has each of its numbers in memory: not on meta, not sparse."""
    return _in_memory(value) and value.dtype == dtype and tuple(value.shape) == tuple(shape)


def told(value: Any) -> str:
    """What was found, for an error."""
    if not isinstance(value, Tensor):
        return f"{value!r:.80}"
    return f"{value.dtype} {list(value.shape)}" + ("" if _in_memory(value) else f" on {value.device}, {value.layout}")


def _in_memory(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_meta and value.layout == torch.strided


def count(step: Any, where: str) -> int:
    """A saved count of steps. Raises: ValueError for what is none."""
    value = step.item() if _in_memory(step) and step.numel() == 1 else step
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 2**31 or value != int(value):
        raise ValueError(f"{where}: found {step!r:.80}, wanted a count of steps")
    return int(value)
