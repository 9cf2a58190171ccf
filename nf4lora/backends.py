"""Which code runs an op: a table of rows (callable, why_not, configure) per op and back end, tried in a fixed order."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .heuristics import PATHS

PRIORITY = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}


@dataclass(frozen=True)
class Row:
    """One back end's way to run one op.

    call:      takes the op's arguments, and `config` last where the row has a `configure`
    why_not:   the op's arguments -> why this back end cannot run them, or None; without arguments, anything at all
    configure: the op's arguments -> the config of `nf4lora.heuristics` to run with
    prepare:   takes what `call` takes -> a call of arguments like these, or None where it cannot be repeated; autocast must
               not reach into it
    """

    call: Callable[..., Any]
    why_not: Callable[..., str | None]
    configure: Callable[..., Any] | None
    prepare: Callable[..., Callable[..., Any] | None] | None = None


_ROWS: dict[tuple[str, str], Row] = {}
_forced: ContextVar[str | None] = ContextVar("nf4lora_forced_backend", default=None)
_forced_path: ContextVar[str | None] = ContextVar("nf4lora_forced_path", default=None)


def implements(
    op: str,
    backend: str,
    why_not: Callable[..., str | None] = lambda *args: None,
    configure: Callable[..., Any] | None = None,
    prepare: Callable[..., Callable[..., Any] | None] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: enter a function as `backend`'s row for `op`."""

    def enter(call: Callable[..., Any]) -> Callable[..., Any]:
        _ROWS[op, backend] = Row(call, why_not, configure, prepare)
        return call

    return enter


def names() -> tuple[str, ...]:
    """Every back end there is a row for or a device asks for."""
    return tuple(dict.fromkeys([b for order in PRIORITY.values() for b in order] + [b for _, b in _ROWS]))


def has(op: str, backend: str) -> bool:
    """Whether there is a row for `op`, whatever it then refuses."""
    return (op, backend) in _ROWS


def forced() -> str | None:
    """The back end named by the `use_backend` around this call, if any. Compiled code reads it when it runs."""
    return None if torch.compiler.is_compiling() else _forced.get()


def chosen() -> tuple[str | None, str | None]:
    """Back end and path named by the `use_backend` around this call; not for what is compiled."""
    return _forced.get(), _forced_path.get()


def forced_path() -> str | None:
    """The path named by the `use_backend` around this call, if any."""
    return None if torch.compiler.is_compiling() else _forced_path.get()


@contextmanager
def use_backend(name: str | None, path: str | None = None) -> Iterator[None]:
    """Force one back end for every op inside, in this thread and in the backward of what ran inside. Never falls back.

    path: the kernels of the linear to force with it, as `nf4lora.heuristics.PATHS` has them for the back end; what the
        back end computes without a choice of paths ignores it.
    Raises: ValueError for an unknown name; the ops raise NotImplementedError where the back end or its path refuses.
    """
    if name is not None and name not in names():
        raise ValueError(f"back end: found {name!r}, wanted one of {names()}")
    if path is not None and path not in PATHS:
        raise ValueError(f"path: found {path!r}, wanted one of {PATHS}")
    tokens = _forced.set(name), _forced_path.set(path)
    try:
        yield
    finally:
        _forced.reset(tokens[0])
        _forced_path.reset(tokens[1])


def first_of(args: tuple[Any, ...]) -> torch.Tensor:
    """The first tensor of an op's arguments, which may be the first of a list."""
    return args[0] if isinstance(args[0], torch.Tensor) else args[0][0]


def run(op: str, *args: Any) -> Any:
    """Run `op` on the first back end that takes these arguments; the first tensor's device decides.

    Raises: NotImplementedError listing every back end and its reason.
    """
    row, config = _chosen(op, args)
    return row.call(*args, *config)


def prepare(op: str, *args: Any) -> Callable[..., Any]:
    """What `run` would call, for these arguments and others like them: all that was looked at to choose it must be the same.

    Raises: NotImplementedError as `run`.
    """
    row, config = _chosen(op, args)
    prepared = None if row.prepare is None else row.prepare(*args, *config)
    if prepared is not None:
        return prepared
    device = first_of(args).device.type
    return lambda *again: without_autocast(device, row.call, *again, *config)


def without_autocast(device: str, call: Callable[..., Any], *args: Any) -> Any:
    """The call where no enclosing autocast changes what it computes."""
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return call(*args)
    return call(*args)


def _chosen(op: str, args: tuple[Any, ...]) -> tuple[Row, tuple[Any, ...]]:
    """The row that runs, and its config if it takes one."""
    device = first_of(args).device.type
    chosen = _forced.get()
    reasons = []
    for backend in (chosen,) if chosen else PRIORITY.get(device, ("reference",)):
        row = _ROWS.get((op, backend))
        reason = "has no kernel for this op" if row is None else row.why_not(*args)
        if reason is None:
            return row, () if row.configure is None else (row.configure(*args),)
        reasons.append(f"{backend}: {reason}")
    raise NotImplementedError(f"nf4lora::{op} on {device}: no back end can run it\n  " + "\n  ".join(reasons))


class Availability(NamedTuple):
    """Whether a back end can run anything on a kind of device; `why_not` is None where it can."""

    device: str
    backend: str
    why_not: str | None


def report() -> list[Availability]:
    """Every back end of every kind of device, in the order they are tried, and why not for each that is not there."""
    found = []
    for device, order in PRIORITY.items():
        absent = "torch finds no CUDA device" if device == "cuda" and not torch.cuda.is_available() else None
        for backend in order:
            rows = [row for (_, name), row in _ROWS.items() if name == backend]
            found.append(Availability(device, backend, rows[0].why_not() or absent if rows else "has no kernels in this version"))
    return found
