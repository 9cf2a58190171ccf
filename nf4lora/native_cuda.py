"""libnf4lora_cuda.so: the "cuda" rows of the back-end table. Every launch is on torch's current stream; nothing synchronizes."""

from collections.abc import Callable
from ctypes import Structure, byref, c_char_p, c_int32, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import heuristics
from .abi import COUNTERS, CUDA_FUNCTIONS
from .cuda_grads import CudaGrads


class CudaLibrary(CudaGrads):
    """The CUDA kernels. `why_not` tells a driver that is too old and a GPU the library has no code for."""

    backend = prefix = "cuda"
    functions = CUDA_FUNCTIONS
    ops = (*CUDA_FUNCTIONS, "group_fwd", "group_bwd", "group_lora_bwd", "linear_grads", "group_grads", "dequantize_into")
    stream = True
    remedy = "reinstall nf4lora where nvcc is on the PATH"

    def why_not(self, *args: Any) -> str | None:
        reason = super().why_not(*args)
        if reason:
            return reason
        if not args:
            return self._unfit(torch.cuda.current_device()) if torch.cuda.is_available() else None
        device = args[0].device
        return self._unfit(device.index) if device.type == "cuda" else f"its kernels run on a CUDA device, not on {device.type}"

    @cache
    def _unfit(self, index: int) -> str | None:
        """Why the kernels cannot run on this device, as the CUDA runtime says it."""
        loaded, _ = self.load()
        loaded.nf4lora_cuda_why_not.argtypes, loaded.nf4lora_cuda_why_not.restype = [], c_char_p
        with torch.cuda.device(index):
            message = loaded.nf4lora_cuda_why_not()
        return message.decode() if message else None

    def run(self, name: str, params: Structure, device: torch.device) -> None:
        function, index = self._function(name), device.index
        if torch._C._cuda_getDevice() == index:
            message = function(byref(params), torch._C._cuda_getCurrentRawStream(index))
        else:
            with torch.cuda.device(device):
                message = function(byref(params), torch._C._cuda_getCurrentRawStream(index))
        if message:
            self._raise_if(name, message)

    @cache
    def _function(self, name: str) -> Callable[..., bytes | None]:
        return getattr(self.load()[0], f"nf4lora_cuda_{name}")

    def counters(self, device: torch.device) -> int:
        """Address of the zeros that launches on torch's current stream count in; csrc/api.h says whose they are."""
        if found := self._counters_function()(device.index, torch._C._cuda_getCurrentRawStream(device.index)):
            return found
        raise RuntimeError(f"nf4lora {self.backend}: {4 * COUNTERS} bytes for counters are not to be had on {device}")

    @cache
    def _counters_function(self) -> Callable[[int, int], int | None]:
        function = self.load()[0].nf4lora_cuda_counters
        function.argtypes, function.restype = [c_int32, c_void_p], c_void_p
        return function

    def _quantize_config(self, a: Tensor, *args: Any) -> int:
        return heuristics.cuda_quantize(a.numel(), self.multiprocessors(a.device))

    def _dequantize_config(self, packed: Tensor, *args: Any) -> int:
        return heuristics.cuda_dequantize(2 * packed.numel(), self.multiprocessors(packed.device))

    _dequantize_into_config = _dequantize_config

    def workspace_bytes(self, name: str, params: Structure) -> int:
        return self._workspace_function(name)(byref(params))

    @cache
    def _workspace_function(self, name: str) -> Callable[..., int]:
        function = getattr(self.load()[0], f"nf4lora_cuda_{name}_workspace")
        function.argtypes, function.restype = [c_void_p], c_int64
        return function


cuda = CudaLibrary()
cuda.enter()
