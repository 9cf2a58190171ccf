"""Every instruction set of the host library beside the others in one process.

The library chooses one at its first call and keeps it, so each has a copy of the library of its own.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from nf4lora import native, ops
from nf4lora.eager import Op

from .cpu_targets import ISAS

_ISA = "NF4LORA_CPU_ISA"
_OPS = [op for op in vars(ops).values() if isinstance(op, Op)]


class Isa(native.HostLibrary):
    """A copy of the library that computes with instruction set `name`. Raises: RuntimeError without a library to copy."""

    def __init__(self, name: str, folder: Path) -> None:
        _, why_not = native.host.load()
        if why_not:
            raise RuntimeError(why_not)
        self.name = name
        self._path = Path(shutil.copy(native.host.path(), folder / f"{name}.so"))
        self._prepared: dict[Op, dict[tuple[Any, ...], Callable[..., Any]]] = {op: {} for op in _OPS}

    def path(self) -> Path:
        return self._path

    @contextmanager
    def used(self) -> Iterator[None]:
        """Inside, the "cpu" back end runs this copy, and calls that ops prepared with another one are not repeated."""
        before = {op: op.prepared for op in _OPS}
        native.host.load = self.load
        for op, prepared in self._prepared.items():
            op.prepared = prepared
        try:
            yield
        finally:
            del native.host.load
            for op, prepared in before.items():
                op.prepared = prepared


@cache
def isas() -> dict[str, Isa]:
    """Those this processor has, the best first, each ready."""
    given, found = os.environ.get(_ISA), {}
    try:
        with tempfile.TemporaryDirectory() as folder:  # a loaded library needs its file no more
            for name in ISAS:
                os.environ[_ISA] = name
                isa = Isa(name, Path(folder))
                if isa.isa() == name:
                    found[name] = isa
    finally:
        os.environ.pop(_ISA)
        if given is not None:
            os.environ[_ISA] = given
    return found
