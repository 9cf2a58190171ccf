"""The back end "cuda_on_host": csrc/cuda compiled for the CPU, run on CPU tensors by the machine beside this file.

Every output lies between guard bytes, starts as NaN, and a report of the machine is a RuntimeError.
"""

import threading
from ctypes import Structure, byref
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nf4lora.abi import COUNTERS
from nf4lora.native import Library
from nf4lora.native_cuda import CudaLibrary

from . import build, errors

_RUNTIME = {build.CSRC / "cuda" / name for name in ("device.cu", "managed_memory.cu")}  # calls of the CUDA runtime, no kernels
SOURCES = tuple(sorted(set((build.CSRC / "cuda").glob("*.cu")) - _RUNTIME))
_GUARD, _GUARD_BYTE, _ALIGNMENT = 256, 0xA5, 256


class Machine(CudaLibrary):
    """The CUDA library's rows on the host. `seed` and `resident` are those of cuda_on_host/runtime.h."""

    backend = "cuda_on_host"

    def __init__(self, variant: str = "plain") -> None:
        self.variant = variant
        self.seed = 0
        self.resident = False
        self._turn = threading.Lock()  # the machine runs one launch at a time
        self._mine = threading.local()  # operands and guarded outputs of the call under way in this thread

    def path(self) -> Path:
        return build.library(SOURCES, self.variant)

    def why_not(self, *args: Any) -> str | None:
        if args and args[0].device.type != "cpu":
            return f"the machine has CPU memory only, not {args[0].device}"
        return Library.why_not(self, *args)

    def multiprocessors(self, device: torch.device) -> int:
        return 1  # few blocks, so that each goes round its loop

    def capability(self, device: torch.device) -> tuple[int, int]:
        return (9, 0)

    def empty(self, like: Tensor, shape: Any, dtype: torch.dtype) -> Tensor:
        out = torch.empty(shape, dtype=dtype)
        if not out.numel():
            return out
        memory = np.full(out.nbytes + 2 * _GUARD + _ALIGNMENT, _GUARD_BYTE, np.uint8)
        first = _GUARD + -(memory.ctypes.data + _GUARD) % _ALIGNMENT
        memory[first : first + out.nbytes] = 0xFF
        # A storage of its own, as new_empty gives; it keeps `memory` alive
        out = torch.frombuffer(memory, dtype=dtype, count=out.numel(), offset=first).view(shape)
        self._call().outputs[out.data_ptr()] = (memory, first, out.nbytes)
        return out

    def pointer(self, t: Tensor | None) -> int | None:
        if t is not None and t.numel():
            self._call().operands.append(t)
        return super().pointer(t)

    def reads(self, *operands: Any) -> None:
        for t in operands:
            self.reads(*t) if isinstance(t, (list, tuple)) else self.pointer(t)

    def pointers(self, tensors: Any) -> list[int]:
        return [self.pointer(t) or 0 for t in tensors]

    def counters(self, device: torch.device) -> int | None:
        call = self._call()
        call.counters = np.zeros(COUNTERS, np.int32)
        return self.pointer(torch.from_numpy(call.counters))

    def run(self, name: str, params: Structure, device: torch.device) -> None:
        call, self._mine.call = self._call(), None
        machine = self.load()[0]
        with self._turn:
            machine.cuda_on_host_schedule(self.seed)
            machine.cuda_on_host_resident(int(self.resident))
            for t in call.operands:
                written = int(t.data_ptr() not in call.outputs)
                last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
                kind = b"input" if written else b"output"
                machine.cuda_on_host_register(t.data_ptr(), (last + 1) * t.itemsize, written, kind)
            try:
                message = getattr(machine, f"nf4lora_cuda_{name}")(byref(params), None)
                if message:
                    message = errors.resolve(message.decode(), self.path()).encode()
            finally:
                machine.cuda_on_host_forget_all()
        self._raise_if(name, message)
        if call.counters is not None and call.counters.any():
            raise RuntimeError(f"nf4lora {self.backend} {name}: left counters that are not zero")
        for memory, first, nbytes in call.outputs.values():
            if (memory[:first] != _GUARD_BYTE).any() or (memory[first + nbytes :] != _GUARD_BYTE).any():
                raise RuntimeError(f"nf4lora {self.backend} {name}: bytes beside an output of {nbytes} bytes were written")

    def _call(self) -> "_Call":
        if getattr(self._mine, "call", None) is None:
            self._mine.call = _Call()
        return self._mine.call


class _Call:
    def __init__(self) -> None:
        self.operands: list[Tensor] = []
        self.counters: np.ndarray | None = None
        self.outputs: dict[int, tuple[np.ndarray, int, int]] = {}


@cache
def machine(variant: str = "plain") -> Machine:
    """The back end, built and loaded; `enter()` makes it the one that runs. Raises: RuntimeError when it does not build."""
    made = Machine(variant)
    if why_not := made.load()[1]:
        raise RuntimeError(why_not)
    build.declare(made.load()[0])
    return made
