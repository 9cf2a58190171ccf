"""The compiled host library through ctypes: the "cpu" rows of the back-end table. Called only from inside an op."""

import ctypes
import os
import warnings
from collections.abc import Callable
from ctypes import POINTER, Structure, byref, c_char_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import heuristics
from .abi import (
    FUNCTIONS, DequantizeParams, Dropout, LinearBwdParams, LinearConfig, LinearFwdParams, LoraBwdParams,
    QuantizeAbsmaxParams, QuantizeParams, Weight,
)  # fmt: skip
from .backends import implements
from .codebook import NESTED_BLOCKSIZE, QUANT_TYPES
from .quant_state import ceil_div

_DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@cache
def library() -> tuple[ctypes.CDLL | None, str | None]:
    """The loaded library and None, or None and the reason why not. Loaded by its path in the package, nowhere else."""
    path = Path(__file__).with_name("libnf4lora_cpu.so")
    if not path.exists():
        return None, f"{path.name} was not built into {path.parent}: reinstall nf4lora, or in a source tree start Python elsewhere"
    try:
        loaded = ctypes.CDLL(os.fspath(path))
    except OSError as error:
        return None, f"{path.name} does not load: {error}"
    for name, params in FUNCTIONS.items():
        function = getattr(loaded, f"nf4lora_cpu_{name}")
        function.argtypes, function.restype = [POINTER(params)], c_char_p
    loaded.nf4lora_cpu_isa.argtypes, loaded.nf4lora_cpu_isa.restype = [], c_char_p
    return loaded, None


def isa() -> str | None:
    """Instruction set the host library runs: "avx512", "avx2" or "portable"; None without a library."""
    loaded, _ = library()
    name = loaded.nf4lora_cpu_isa() if loaded else None
    return name.decode() if name else None


def why_not(*args: Any) -> str | None:
    if any(isinstance(a, Tensor) and a.dtype == torch.float64 for a in args) or torch.float64 in args[-1:]:
        return "float64 is for the reference"
    reason = library()[1]
    if args and reason:
        warnings.warn(f"nf4lora runs without its kernels, on the slow reference: {reason}", RuntimeWarning, stacklevel=4)
    return reason


def _run(name: str, params: Structure) -> None:
    if message := getattr(library()[0], f"nf4lora_cpu_{name}")(byref(params)):
        raise RuntimeError(f"nf4lora cpu {name}: {message.decode()}")


def _pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _code(t: Tensor | None) -> int:
    return 0 if t is None else _DTYPE[t.dtype]


def _weight(packed, absmax, nested_absmax, offset, rows: int, cols: int, blocksize: int, quant_type: str) -> Weight:
    return Weight(*map(_pointer, (packed, absmax, nested_absmax, offset)), rows, cols, blocksize, NESTED_BLOCKSIZE,
                  QUANT_TYPES.index(quant_type))  # fmt: skip


def _config(config: heuristics.LinearConfig) -> LinearConfig:
    return LinearConfig(config.path, config.block_m, config.block_n, config.block_k, config.threads)


def _tiles_fwd(first: Tensor, *args: Any) -> heuristics.LinearConfig:
    return heuristics.cpu_linear_fwd(first.shape[0], torch.get_num_threads())


def _tiles_bwd(first: Tensor, *args: Any) -> heuristics.LinearConfig:
    return heuristics.cpu_linear_bwd(first.shape[0], torch.get_num_threads())


def _cpu(op: str, configure: Callable[..., Any] | None = None) -> Callable[..., Any]:
    return implements(op, "cpu", why_not, configure)


@_cpu("quantize")
def quantize(a: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
    a = a.contiguous()
    packed = a.new_empty((ceil_div(a.numel(), 2), 1), dtype=torch.uint8)
    absmax = a.new_empty(ceil_div(a.numel(), blocksize), dtype=torch.float32)
    _run("quantize", QuantizeParams(*map(_pointer, (a, packed, absmax)), a.numel(), blocksize, _code(a),
                                    QUANT_TYPES.index(quant_type), torch.get_num_threads()))  # fmt: skip
    return packed, absmax


@_cpu("quantize_absmax")
def quantize_absmax(absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    codes = torch.empty_like(absmax, dtype=torch.uint8)
    nested = absmax.new_empty(ceil_div(absmax.numel(), NESTED_BLOCKSIZE))
    _run("quantize_absmax", QuantizeAbsmaxParams(*map(_pointer, (absmax, offset, codes, nested)), absmax.numel(),
                                                 NESTED_BLOCKSIZE))  # fmt: skip
    return codes, nested


@_cpu("dequantize")
def dequantize(packed, absmax, nested_absmax, offset, shape, blocksize, quant_type, dtype) -> Tensor:
    out = packed.new_empty(shape, dtype=dtype)
    weight = _weight(packed, absmax, nested_absmax, offset, 1, out.numel(), blocksize, quant_type)
    _run("dequantize", DequantizeParams(weight, out.data_ptr(), _code(out), torch.get_num_threads()))
    return out


@_cpu("linear_fwd", _tiles_fwd)
def linear_fwd(
    x, packed, absmax, nested_absmax, offset, bias, lora_A, lora_B, seed, N, blocksize, quant_type, scaling, dropout_p, config
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x, bias, lora_A, lora_B = map(_contiguous, (x, bias, lora_A, lora_B))
    (M, K), r = x.shape, 0 if lora_A is None else lora_A.shape[0]
    y, xa = x.new_empty((M, N)), x.new_empty((M, r))
    weight = _weight(packed, absmax, nested_absmax, offset, N, K, blocksize, quant_type)
    _run("linear_fwd", LinearFwdParams(weight, *map(_pointer, (x, bias, lora_A, lora_B, y, xa)), M, r, scaling,
                                       *map(_code, (x, bias, lora_A, lora_B)), Dropout(_pointer(seed), dropout_p),
                                       _config(config)))  # fmt: skip
    return y, xa


@_cpu("linear_bwd", _tiles_bwd)
def linear_bwd(
    dy, packed, absmax, nested_absmax, offset, lora_A, dyb, seed, K, blocksize, quant_type, dropout_p, config
) -> Tensor:  # fmt: skip
    dy, lora_A, dyb = map(_contiguous, (dy, lora_A, dyb))
    (M, N), r = dy.shape, 0 if lora_A is None else lora_A.shape[0]
    dx = dy.new_empty((M, K))
    weight = _weight(packed, absmax, nested_absmax, offset, N, K, blocksize, quant_type)
    _run("linear_bwd", LinearBwdParams(weight, *map(_pointer, (dy, dyb, lora_A, dx)), M, r, _code(dy), _code(lora_A),
                                       Dropout(_pointer(seed), dropout_p), _config(config)))  # fmt: skip
    return dx


@_cpu("lora_bwd", _tiles_fwd)
def lora_bwd(dy, x, xa, lora_A, lora_B, seed, scaling, dropout_p, need_dA, need_dB, config) -> tuple[Tensor, Tensor, Tensor]:
    dy, lora_B = map(_contiguous, (dy, lora_B))
    x, xa = x.contiguous() if need_dA else None, xa.contiguous() if need_dB else None
    (r, K), (M, N) = lora_A.shape, dy.shape
    dyb = dy.new_empty((M, r))
    dA = lora_A.new_empty((r, K)) if need_dA else None
    dB = lora_B.new_empty((N, r)) if need_dB else None
    _run("lora_bwd", LoraBwdParams(*map(_pointer, (dy, x, xa, lora_B, dyb, dA, dB)), M, N, K, r, scaling, _code(dy),
                                   _code(lora_A), _code(lora_B), Dropout(_pointer(seed), dropout_p), _config(config)))  # fmt: skip
    return dyb, lora_A.new_empty(0) if dA is None else dA, lora_B.new_empty(0) if dB is None else dB


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()
