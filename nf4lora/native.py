"""A compiled library of csrc through ctypes: finding it, and its rows of the back-end table. Called only from inside an op."""

import ctypes
import os
import warnings
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_char_p, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import backends, heuristics
from .abi import FUNCTIONS, DequantizeParams, QuantizeAbsmaxParams, QuantizeParams, SwigluParams, Weight
from .codebook import NESTED_BLOCKSIZE, QUANT_TYPES
from .matrices import rows
from .native_linear import LinearRows
from .native_linear import code as _code
from .native_optim import OptimRows
from .quant_state import ceil_div


class Library(OptimRows):
    """One library and its rows: `nf4lora_<prefix>_<op>` for each op it has.

    What differs between libraries, and what tests put their own memory behind, is `why_not`, `load`, `empty`,
    `pointer`, `reads`, `run` and the launch parameters.
    """

    backend = prefix = "cpu"
    functions: dict[str, type[Structure]] = FUNCTIONS
    ops: tuple[str, ...] = tuple(FUNCTIONS)
    stream = False  # whether the functions take one
    remedy = "reinstall nf4lora, or in a source tree start Python elsewhere"

    @cache
    def load(self) -> tuple[ctypes.CDLL | None, str | None]:
        """The loaded library and None, or None and the reason why not. Loaded by its path, nowhere else."""
        path = self.path()
        if not path.exists():
            return None, f"{path.name} was not built into {path.parent}: {self.remedy}"
        try:
            loaded = ctypes.CDLL(os.fspath(path))
        except OSError as error:
            return None, f"{path.name} does not load: {error}"
        for name, params in self.functions.items():
            if (function := getattr(loaded, f"nf4lora_{self.prefix}_{name}", None)) is None:
                return None, f"{path.name} has no {name}, it is of another version: {self.remedy}"
            function.argtypes, function.restype = [POINTER(params)] + [c_void_p] * self.stream, c_char_p
        return loaded, None

    def path(self) -> Path:
        return Path(__file__).with_name(f"libnf4lora_{self.prefix}.so")

    def enter(self) -> None:
        """Enter the rows of this library's ops."""
        for op in self.ops:
            why_not, *others = (getattr(self, f"_{op}_{what}", None) for what in ("why_not", "config", "prepare"))
            backends.implements(op, self.backend, why_not or self.why_not, *others)(getattr(self, op))

    def why_not(self, *args: Any) -> str | None:
        if args and (backends.first_of(args).dtype == torch.float64 or args[-1] is torch.float64):
            return "float64 is for the reference"
        return self.load()[1]

    def empty(self, like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory of an output, on the device of `like`."""
        return like.new_empty(shape, dtype=dtype)

    def pointer(self, t: Tensor | None) -> int | None:
        """Address of an operand."""
        return None if t is None else t.data_ptr()

    def reads(self, *operands: Any) -> None:
        """Told what a launch reads by addresses that its params had before."""

    def run(self, name: str, params: Structure, device: torch.device) -> None:
        self._raise_if(name, getattr(self.load()[0], f"nf4lora_{self.prefix}_{name}")(byref(params)))

    def _raise_if(self, name: str, message: bytes | None) -> None:
        if message:
            raise RuntimeError(f"nf4lora {self.backend} {name}: {message.decode()}")

    def _weight(self, packed, absmax, nested_absmax, offset, rows: int, cols: int, blocksize: int, quant_type: str) -> Weight:
        return Weight(*map(self.pointer, (packed, absmax, nested_absmax, offset)), rows, cols, blocksize, NESTED_BLOCKSIZE,
                      QUANT_TYPES.index(quant_type))  # fmt: skip

    # ---- the rows

    def quantize(self, a: Tensor, blocksize: int, quant_type: str, workers: int) -> tuple[Tensor, Tensor]:
        a = a.contiguous()
        packed = self.empty(a, (ceil_div(a.numel(), 2), 1), torch.uint8)
        absmax = self.empty(a, (ceil_div(a.numel(), blocksize),), torch.float32)
        params = QuantizeParams(*map(self.pointer, (a, packed, absmax)), a.numel(), blocksize, _code(a),
                                QUANT_TYPES.index(quant_type), workers)  # fmt: skip
        self.run("quantize", params, a.device)
        return packed, absmax

    def quantize_absmax(self, absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        codes = self.empty(absmax, absmax.shape, torch.uint8)
        nested = self.empty(absmax, (ceil_div(absmax.numel(), NESTED_BLOCKSIZE),), torch.float32)
        params = QuantizeAbsmaxParams(*map(self.pointer, (absmax, offset, codes, nested)), absmax.numel(), NESTED_BLOCKSIZE)
        self.run("quantize_absmax", params, absmax.device)
        return codes, nested

    def dequantize(self, packed, absmax, nested_absmax, offset, shape, blocksize, quant_type, dtype, workers: int) -> Tensor:
        out = self.empty(packed, shape, dtype)
        self.dequantize_into(packed, absmax, nested_absmax, offset, blocksize, quant_type, out, workers)
        return out

    def dequantize_into(self, packed, absmax, nested_absmax, offset, blocksize, quant_type, out, workers: int) -> None:
        weight = self._weight(packed, absmax, nested_absmax, offset, 1, out.numel(), blocksize, quant_type)
        self.run("dequantize", DequantizeParams(weight, self.pointer(out), _code(out), workers), packed.device)

    def swiglu_fwd(self, gate_up: Tensor, workers: int) -> Tensor:
        return self._swiglu("swiglu_fwd", gate_up.contiguous(), None, (*gate_up.shape[:-1], gate_up.shape[-1] // 2), workers)

    def swiglu_bwd(self, gate_up: Tensor, dh: Tensor, workers: int) -> Tensor:
        return self._swiglu("swiglu_bwd", gate_up.contiguous(), dh.contiguous(), gate_up.shape, workers)

    def _swiglu(self, name: str, gate_up: Tensor, dh: Tensor | None, shape: Sequence[int], workers: int) -> Tensor:
        out = self.empty(gate_up, shape, gate_up.dtype)
        if out.numel():
            sizes = rows(gate_up), gate_up.shape[-1] // 2
            params = SwigluParams(*map(self.pointer, (gate_up, dh, out)), *sizes, _code(gate_up), workers)
            self.run(name, params, gate_up.device)
        return out


class HostLibrary(LinearRows, Library):
    """libnf4lora_cpu.so. `isa()`: "amx", "avx512bf16", "avx512vbmi", "avx512", "avx2" or "portable"; None without a library."""

    ops = (*FUNCTIONS, "dequantize_into", "group_fwd", "group_bwd", "group_lora_bwd", "group_grads")

    def isa(self) -> str | None:
        if not (loaded := self.load()[0]):
            return None
        loaded.nf4lora_cpu_isa.argtypes, loaded.nf4lora_cpu_isa.restype = [], c_char_p
        return (loaded.nf4lora_cpu_isa() or b"").decode() or None

    def why_not(self, *args: Any) -> str | None:
        reason = super().why_not(*args)
        if args and reason and reason == self.load()[1]:
            warnings.warn(f"nf4lora runs without its kernels, on the slow reference: {reason}", RuntimeWarning, stacklevel=4)
        return reason

    def _quantize_config(self, *args: Any) -> int:
        return torch.get_num_threads()

    _dequantize_config = _dequantize_into_config = _swiglu_fwd_config = _swiglu_bwd_config = _quantize_config
    _optim_step_config = _optim_check_config = _quantize_config

    def _linear_fwd_config(self, first: Tensor, *args: Any) -> heuristics.LinearConfig:
        config = heuristics.cpu_linear_fwd(rows(first), torch.get_num_threads(), first.dtype == torch.bfloat16)
        return heuristics.on_path(config, backends.forced_path())

    def _linear_bwd_config(self, first: Tensor, *args: Any) -> heuristics.LinearConfig:
        return heuristics.cpu_linear_bwd(first.shape[0], torch.get_num_threads())

    def _lora_bwd_config(self, first: Tensor, *args: Any) -> heuristics.LinearConfig:
        return heuristics.cpu_lora_bwd(first.shape[0], torch.get_num_threads())

    _group_fwd_config, _group_bwd_config, _group_lora_bwd_config = _linear_fwd_config, _linear_bwd_config, _lora_bwd_config


host = HostLibrary()
host.enter()
host.load()  # now, as a process forked later has to know that it is one
