"""libnf4lora_cuda.so: the "cuda" rows of the back-end table. Every launch is on torch's current stream; nothing synchronizes."""

from ctypes import Structure, byref, c_char_p, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import heuristics
from .abi import CUDA_FUNCTIONS
from .cuda_linear import CudaLinear


class CudaLibrary(CudaLinear):
    """The CUDA kernels. `why_not` tells a driver that is too old and a GPU the library has no code for."""

    backend = prefix = "cuda"
    functions = CUDA_FUNCTIONS
    ops = (*CUDA_FUNCTIONS, "group_fwd", "group_bwd", "group_lora_bwd")
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
        function = getattr(self.load()[0], f"nf4lora_cuda_{name}")
        with torch.cuda.device(device):
            message = function(byref(params), torch.cuda.current_stream(device).cuda_stream)
        self._raise_if(name, message)

    def _quantize_config(self, a: Tensor, *args: Any) -> int:
        return heuristics.cuda_quantize(a.numel(), self.multiprocessors(a.device))

    def _dequantize_config(self, packed: Tensor, *args: Any) -> int:
        return heuristics.cuda_dequantize(2 * packed.numel(), self.multiprocessors(packed.device))

    def workspace_bytes(self, name: str, params: Structure) -> int:
        function = getattr(self.load()[0], f"nf4lora_cuda_{name}_workspace")
        function.argtypes, function.restype = [c_void_p], c_int64
        return function(byref(params))


cuda = CudaLibrary()
cuda.enter()
