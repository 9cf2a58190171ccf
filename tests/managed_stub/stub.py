"""csrc/cuda/managed_memory.cu compiled for the host with cudart.cpp in place of CUDA: managed memory on CPU tensors."""

import os
from collections.abc import Callable
from ctypes import CDLL, c_char_p, c_int32, c_int64, c_uint64, c_void_p
from functools import cache
from pathlib import Path

import torch
from cuda_on_host import build
from torch import Tensor

from nf4lora import managed

HERE = Path(__file__).parent
SOURCE = build.CSRC / "cuda" / "managed_memory.cu"
PAGE = 2 << 20
ERRORS = {1: "cudaErrorInvalidValue", 2: "cudaErrorMemoryAllocation", 700: "cudaErrorIllegalAddress"}
_FLAGS = ["-std=c++17", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-Wall", "-Wextra", "-Wpedantic",
          "-Wshadow", "-Werror"]  # fmt: skip


def headers(version: int | None) -> str:
    """Of CUDA 12's signatures, or None: the toolkit's."""
    return str(HERE / "cuda12") if version == 12 else build._cuda_include()


@cache
def built(version: int | None, source: Path) -> Path:
    command = [build._compiler(), *_FLAGS, f"-I{build.CSRC}", "-isystem", headers(version), "-c", "-x", "c++", str(source)]
    texts = [p.read_bytes() for p in (source, *sorted(build.CSRC.glob("*.h")), *sorted((HERE / "cuda12").glob("*.h")))]
    return build._cached(build._digest(*command, *texts), ".o", command)


@cache
def library(version: int | None) -> Path:
    objects = [str(built(version, source)) for source in (SOURCE, HERE / "cudart.cpp")]
    link = [build._compiler(), "-shared", "-Wl,-Bsymbolic", *objects]
    return build._cached(build._digest(*link), ".so", link)


class Stub(managed.Calls):
    """The calls of the library over the stub. `current` is the current stream; the rest is cudart.cpp's."""

    dlpack_device = 1

    def __init__(self, version: int | None = None) -> None:
        self.loaded, self.current = CDLL(os.fspath(library(version))), 7
        for name, result, *arguments in (
            ("fail", None, c_int64, c_int32), ("set", None, c_char_p, c_int64), ("get", c_int64, c_char_p),
            ("lines", c_char_p, c_int32), ("kernel", None, c_void_p, c_uint64, c_void_p, c_int32),
            ("host", None, c_void_p, c_uint64), ("place", c_int32, c_void_p, c_uint64), ("keep", None, c_void_p),
        ):  # fmt: skip
            function = getattr(self.loaded, f"stub_{name}")
            function.restype, function.argtypes = result, arguments

    def function(self, name: str) -> Callable[..., bytes | None]:
        return managed.declared(self.loaded, name)

    def stream(self, device: torch.device) -> int:
        return self.current

    def fail(self, call: int, error: int = 2) -> None:
        """Call number `call` from now on, 1 the next, fails; 0: none does."""
        self.loaded.stub_fail(call, error)

    def set(self, **values: int) -> None:
        for name, value in values.items():
            self.loaded.stub_set(name.encode(), value)

    def get(self, name: str) -> int:
        return self.loaded.stub_get(name.encode())

    def record(self) -> list[str]:
        """The calls since this was asked last."""
        return self.loaded.stub_lines(0).decode().splitlines()

    def violations(self) -> list[str]:
        return self.loaded.stub_lines(1).decode().splitlines()

    def kernel(self, tensors: tuple[Tensor, ...], add: int = 0, anywhere: bool = False) -> None:
        """Uses tensors on the current stream, and adds to them."""
        for t in tensors:
            self.loaded.stub_kernel(t.data_ptr(), t.nbytes, self.current, anywhere)
            t.add_(add)

    def host(self, tensors: tuple[Tensor, ...]) -> None:
        """The host reads tensors."""
        for t in tensors:
            self.loaded.stub_host(t.data_ptr(), t.nbytes)

    def place(self, t: Tensor) -> int:
        return self.loaded.stub_place(t.data_ptr(), t.nbytes)
