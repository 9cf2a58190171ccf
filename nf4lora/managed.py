"""Managed memory of CUDA as tensors: memory that kernels use as any other, and that moves to the host and back when told to.

The structs are those of csrc/managed.h, the functions nf4lora_cuda_managed_* of csrc/api.h.
"""

import ctypes
import threading
from collections.abc import Callable, Sequence
from ctypes import POINTER, Structure, byref, c_char_p, c_int32, c_int64, c_void_p
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from . import native_cuda

HOME = -1  # kManagedHome: the host, as a place; others are device numbers
ALIGNMENT = 2 << 20  # kManagedAlignment: of an arena's first byte and its size
RESERVE = 256 << 20  # bytes of a device that managed memory leaves to others

_DLPACK_CUDA, _DLPACK_NAME = 2, b"dltensor"  # the name is not copied into a capsule: it must stay
# dtype -> its code and bits in DLPack
_DTYPES = {
    torch.uint8: (1, 8), torch.int8: (0, 8), torch.int32: (0, 32), torch.int64: (0, 64), torch.float16: (2, 16),
    torch.float32: (2, 32), torch.bfloat16: (4, 16),
}  # fmt: skip
_new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, c_void_p, c_char_p, c_void_p)(("PyCapsule_New", ctypes.pythonapi))


class ManagedArena(Structure):
    """A tensor to be made."""

    _fields_ = [("tensor", POINTER(c_void_p)), ("id", POINTER(c_int64)), ("numel", c_int64), ("device", c_int32),
                ("preferred", c_int32), ("place", c_int32), ("dlpack_device", c_int32), ("dlpack_code", c_int32),
                ("bits", c_int32)]  # fmt: skip


class ManagedRange(Structure):
    """Memory inside an arena."""

    _fields_ = [("data", c_void_p), ("nbytes", c_int64), ("place", c_int32), ("found", POINTER(c_int64))]


class ManagedRoom(Structure):
    """What is asked of a device."""

    _fields_ = [("found", POINTER(c_int64)), ("device", c_int32)]


class ManagedHandle(Structure):
    """A stream or an event of a device."""

    _fields_ = [("handle", POINTER(c_void_p)), ("device", c_int32)]


class Room(NamedTuple):
    """Of a device, in bytes. held: of the arenas of this process; resident: of those, what was last sent to the device."""

    concurrent: bool  # whether kernels and the host may use managed memory at the same time
    free: int
    total: int
    held: int
    resident: int


class Calls:
    """The functions, by name. Raises: RuntimeError with the name of CUDA's error. Tests put their own memory behind the rest."""

    dlpack_device = _DLPACK_CUDA

    @cache
    def function(self, name: str) -> Callable[..., bytes | None]:
        """Raises: NotImplementedError where the library is not there, or is one without managed memory."""
        loaded, why_not = native_cuda.cuda.load()[0], native_cuda.cuda.why_not()
        if loaded and not hasattr(loaded, f"nf4lora_cuda_managed_{name}"):
            why_not = f"the CUDA library has none, it is of another version: {native_cuda.cuda.remedy}"
        if why_not:
            raise NotImplementedError(f"managed memory: {why_not}")
        return declared(loaded, name)

    def __call__(self, name: str, params: Structure | None, *stream: int | None) -> None:
        args = (() if params is None else (byref(params),)) + tuple(map(c_void_p, stream))
        if message := self.function(name)(*args):
            raise RuntimeError(f"nf4lora cuda managed_{name}: {message.decode()}")

    def stream(self, device: torch.device) -> int:
        """torch's current one on a device."""
        torch.cuda.init()
        return torch._C._cuda_getCurrentRawStream(device.index)

    def give_back(self) -> None:
        """Memory that torch keeps for later, to the device."""
        torch.cuda.empty_cache()

    def no_capture(self, stream: int) -> None:
        """Raises: RuntimeError where the stream is being captured into a CUDA graph."""
        self("capture", None, stream)

    def prefetch(self, t: Tensor, place: int, stream: int) -> None:
        """Start to move the memory of a contiguous tensor of an arena to a place, in the order of the stream."""
        if t.numel():
            self("prefetch", ManagedRange(t.data_ptr(), t.nbytes, place), stream)


def declared(loaded: ctypes.CDLL, name: str) -> Callable[..., bytes | None]:
    """A function of a library that has it."""
    function = getattr(loaded, f"nf4lora_cuda_managed_{name}")
    function.restype = c_char_p
    return function


CALLS = Calls()
_ROOM = threading.Lock()  # from looking for room to having taken it


def room(device: torch.device, calls: Calls = CALLS) -> Room:
    """Raises: NotImplementedError without the library, RuntimeError with the name of CUDA's error."""
    found = (c_int64 * 5)()
    calls("room", ManagedRoom(found, device.index))
    return Room(bool(found[0]), *found[1:])


def places(t: Tensor, calls: Calls = CALLS) -> tuple[int | None, int | None]:
    """Where a contiguous tensor of an arena was last told to move, and where it is preferred: HOME, a device's number, None.

    None: nowhere, or not one place for all of it. This is what was asked for, not what came of it: the move may not have
    begun, and the driver may have moved pages since. Where pages are, and how many faults it took, only CUPTI counts.
    """
    found = (c_int64 * 2)()
    calls("places", ManagedRange(t.data_ptr(), t.nbytes, 0, found))
    return tuple(None if place < HOME else place for place in found)


def allocate(
    numels: Sequence[int], dtypes: Sequence[torch.dtype], device: torch.device, at_home: bool = False,
    allow_oversubscription: bool = False, stream: int | None = None, calls: Calls = CALLS,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Zeros in managed memory, all of the tensors or none: 1-D, on `device`, each from a multiple of 2 MiB on.

    Each gives its memory back with its last view. They begin on the device, where they fit, unless at_home. stream: where
    they are cleared, torch's current one unless told otherwise.
    Raises: RuntimeError where this process would hold more than the device has free (less `RESERVE`, and with what is held
    there already), unless allow_oversubscription; with the name of CUDA's error; in a child of fork; during a capture.
    NotImplementedError where the device cannot share memory with the host at all times, or the library is not there.
    TypeError for a dtype that memory cannot be made of.
    """
    for dtype in dtypes:
        if dtype not in _DTYPES:
            raise TypeError(f"dtypes: found {dtype}, wanted one of {[str(d) for d in _DTYPES]}")
    stream = calls.stream(device) if stream is None else stream
    calls.no_capture(stream)
    wanted = sum(-(-n * dtype.itemsize // ALIGNMENT) * ALIGNMENT for n, dtype in zip(numels, dtypes, strict=True))
    with _ROOM:
        found = room(device, calls)
        if found.held + wanted > found.free + found.resident - RESERVE and wanted:
            calls.give_back()  # after a backward it is much, and not free in the eyes of CUDA
            found = room(device, calls)
        fits = _fits(wanted, found, device, allow_oversubscription)
        preferred = device.index if fits else HOME
        where = device.index, preferred, HOME if at_home else preferred
        return tuple(_tensor(n, dtype, device, where, stream, calls) for n, dtype in zip(numels, dtypes, strict=True))


def _fits(wanted: int, found: Room, device: torch.device, allow_oversubscription: bool) -> bool:
    if not found.concurrent:
        raise NotImplementedError(f"managed memory: {device} has no concurrent access to it (attribute concurrentManagedAccess: "
                                  "WSL, Windows and GPUs before sm_60), so nothing could be moved while kernels run")  # fmt: skip
    most = found.free + found.resident - RESERVE
    if found.held + wanted <= most or not wanted:
        return True
    if allow_oversubscription:
        return False
    raise RuntimeError(f"managed memory on {device}: found room for {max(most, 0)} bytes ({found.free} free, {found.resident} of "
                       f"{found.held} held are there, {RESERVE} kept for others), wanted {wanted} beside the {found.held} held; "
                       "allow_oversubscription=True takes them all the same")  # fmt: skip


def _tensor(numel: int, dtype: torch.dtype, device: torch.device, where: tuple[int, ...], stream: int, calls: Calls) -> Tensor:
    if not numel:
        return torch.empty(0, dtype=dtype, device=device if calls.dlpack_device == _DLPACK_CUDA else "cpu")
    made, number = c_void_p(), c_int64()
    params = ManagedArena(ctypes.pointer(made), ctypes.pointer(number), numel, *where, calls.dlpack_device, *_DTYPES[dtype])
    calls("allocate", params, stream)
    try:
        return from_dlpack(_new_capsule(made.value, _DLPACK_NAME, None))
    except BaseException:
        calls("release", params)  # does nothing where the tensor already did
        raise
