"""Runs sample kernels and csrc/cuda on the CPU and holds their results against numpy: `CASES`, and a command line.

    python driver.py LIBRARY CASE SEED...

prints one JSON object a seed: `error` (the machine's message or null) and `wrong` (what differs, or null). Needs ctypes
and numpy only, so that a process with a preloaded sanitizer starts fast.
"""

import ctypes
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import CDLL, Structure, byref, c_char_p, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parents[1] / "nf4lora"
GUARD, GUARD_BYTE, ALIGNMENT = 256, 0xA5, 256


class Wrong(Exception):
    """A kernel's result is not what it should be."""


class Device:
    """One library's machine: its memory between guard bytes, its schedule, its launches."""

    def __init__(self, library: str | os.PathLike[str]) -> None:
        self.library = CDLL(os.fspath(library))
        for name in ("build", "profile"):
            getattr(self.library, f"cuda_on_host_{name}").restype = c_char_p
        self.build = self.library.cuda_on_host_build().decode()
        self._buffers: list[tuple[str, np.ndarray, np.ndarray]] = []

    @contextmanager
    def memory(self, seed: int, resident: bool = False) -> Iterator["Device"]:
        """Buffers live until the end of this block, where their guard bytes are looked at."""
        self.library.cuda_on_host_schedule(seed)
        self.library.cuda_on_host_resident(int(resident))
        try:
            yield self
            for name, raw, _ in self._buffers:
                if self._guard and not ((raw[:GUARD] == GUARD_BYTE).all() and (raw[-GUARD:] == GUARD_BYTE).all()):
                    raise Wrong(f"bytes beside {name} were written")
        finally:
            self.library.cuda_on_host_forget_all()
            self.library.cuda_on_host_resident(0)
            self._buffers.clear()

    @property
    def _guard(self) -> int:
        return 0 if self.build == "address" else GUARD  # AddressSanitizer guards malloc's memory itself

    def put(self, name: str, array: np.ndarray, written: bool = True, shift: int = 0) -> np.ndarray:
        """A copy of the array in the machine's memory, registered; unwritten memory is all ones.

        shift: bytes beyond an aligned address.
        """
        array = np.ascontiguousarray(array)
        if self._guard:
            memory = np.full(array.nbytes + 2 * GUARD + ALIGNMENT + shift, GUARD_BYTE, np.uint8)
            first = -(memory.ctypes.data + GUARD) % ALIGNMENT
            raw = memory[first : first + array.nbytes + 2 * GUARD + shift]
        else:
            raw = np.full(array.nbytes + shift, GUARD_BYTE, np.uint8)
        inside = raw[self._guard + shift : self._guard + shift + array.nbytes]
        inside[:] = array.view(np.uint8).reshape(-1) if written else 0xFF
        self.library.cuda_on_host_register(
            c_void_p(inside.ctypes.data), c_int64(array.nbytes), c_int32(written), c_char_p(name.encode())
        )
        self._buffers.append((name, raw, inside))
        return inside.view(array.dtype).reshape(array.shape)

    def empty(self, name: str, shape: Any, dtype: Any) -> np.ndarray:
        return self.put(name, np.empty(shape, dtype), written=False)

    def run(self, function: str, *arguments: Any) -> None:
        """Calls an extern "C" launcher. Raises: RuntimeError with the machine's message."""
        launcher = getattr(self.library, function)
        launcher.restype = c_char_p
        message = launcher(*map(_as_ctypes, arguments), c_void_p(None))
        if message:
            raise RuntimeError(message.decode())

    def run_path(self, function: str, params: Structure) -> None:
        """Calls a function of csrc/cuda/paths.h, its workspace and counters put into the parameters.

        Raises: as `run`, and Wrong where counters are not left at zero.
        """
        name = type(params).__name__
        struct = f"ERKNS_{len(name)}{name}E"
        wanted = f"{function}_workspace"
        if sizes := getattr(self.library, f"_ZN7nf4lora{len(wanted)}{wanted}{struct}", None):
            sizes.restype = c_int64
            if nbytes := sizes(byref(params)):
                params.workspace = self.empty("workspace", nbytes, np.uint8).ctypes.data
        counters = self.put("counters", np.zeros(4096, np.uint32))
        if hasattr(params, "counters"):
            params.counters = counters.ctypes.data
        self.run(f"_ZN7nf4lora{len(function)}{function}{struct}Pv", byref(params))
        equal("counters", counters, np.zeros(4096))


def _as_ctypes(argument: Any) -> Any:
    if argument is None or isinstance(argument, np.ndarray):
        return c_void_p(None if argument is None else argument.ctypes.data)
    return c_int64(argument) if isinstance(argument, int) else argument


def equal(name: str, got: np.ndarray, expected: np.ndarray) -> None:
    """Raises: Wrong unless every byte is the same."""
    same = got.view(f"u{got.itemsize}") == expected.astype(got.dtype).view(f"u{got.itemsize}")
    if not same.all():
        at = tuple(int(i) for i in np.argwhere(~same)[0])
        count = f"{int((~same).sum())} of {same.size} differ"
        raise Wrong(f"{name}: {count}, the first at {at}: {got[at]} instead of {expected[at]}")


# ---- 16-bit floats as their bits


def to_bf16(v: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16, ties to even; v is finite."""
    bits = v.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_half(v: np.ndarray) -> np.ndarray:
    return v.astype(np.float16).view(np.uint16)


def swizzle128(offset: np.ndarray) -> np.ndarray:
    """Where byte `offset` of a tile of 128-byte rows lies."""
    row, piece, byte = offset // 128, offset // 16 % 8, offset % 16
    return row * 128 + (piece ^ row % 8) * 16 + byte


def integers(shape: Any, high: int, seed: int) -> np.ndarray:
    """Whole numbers of [-high, high], as float64."""
    return np.random.default_rng(seed).integers(-high, high + 1, shape).astype(np.float64)


# ---- cases: each runs kernels of one library under one seed


def gemm_mma(device: Device, seed: int, M: int, N: int, K: int, half: int, rounded: int, transposed: int) -> None:
    a, b, bias = integers((M, K), 6, 1), integers((N, K), 6, 2), integers(N, 99, 3)
    narrow = to_half if half else to_bf16
    expected = a @ b.T + bias
    with device.memory(seed):
        out = device.empty("c", (M, N), np.uint16 if rounded else np.float32)
        operands = device.put("a", narrow(a)), device.put("b", narrow(b.T if transposed else b))
        device.run("gemm_mma", *operands, device.put("bias", bias.astype(np.float32)), out, M, N, K,
                   c_int32(half), c_int32(rounded), c_int32(transposed))  # fmt: skip
        equal("c", out, narrow(expected) if rounded else expected.astype(np.float32))


def tiles_of(x: np.ndarray) -> np.ndarray:
    """bf16 bits [M, K] as tiles [ceil(M / 64), K / 64, 64 * 64], each as it lies in shared memory."""
    M, K = x.shape
    padded = np.zeros((-(-M // 64) * 64, K), np.uint16)
    padded[:M] = x
    tiles = padded.reshape(-1, 64, K // 64, 64).transpose(0, 2, 1, 3).reshape(-1, K // 64, 64 * 64)
    swizzled = np.empty_like(tiles)
    swizzled[:, :, swizzle128(np.arange(64 * 64) * 2) // 2] = tiles
    return swizzled


def gemm_wgmma(device: Device, seed: int, M: int, N: int, K: int, from_registers: int) -> None:
    x, codes = integers((M, K), 8, 4), np.random.default_rng(5).integers(0, 16, (N, K))
    packed = (codes[:, 0::2] << 4 | codes[:, 1::2]).astype(np.uint8)
    with device.memory(seed):
        y = device.empty("y", (M, N), np.float32)
        device.run("gemm_wgmma", device.put("x", tiles_of(to_bf16(x))), device.put("w", packed), y, M, N, K,
                   c_int32(from_registers))  # fmt: skip
        equal("y", y, (x @ (codes - 8.0).T).astype(np.float32))


def splitk(device: Device, seed: int, N: int, K: int, splits: int, ordered: bool) -> None:
    x, w = integers(K, 8, 6), integers((K, N), 8, 7)
    tiles = -(-N // 64)
    with device.memory(seed, resident=ordered):
        y, flags = device.empty("y", N, np.float32), device.put("flags", np.zeros(tiles, np.uint32))
        operands = device.put("x", x.astype(np.float32)), device.put("w", w.astype(np.float32))
        for _ in range(2):  # the first launch must leave the flags as it found them
            if ordered:
                device.run("splitk_ordered", *operands, y, flags, N, K, c_int32(splits))
            else:
                workspace = device.empty("workspace", (splits, N), np.float32)
                device.run("splitk_last_arriver", *operands, y, workspace, flags, N, K, c_int32(splits))
            equal("y", y, (x @ w).astype(np.float32))
            equal("flags", flags, np.zeros(tiles, np.uint32))


def summary(device: Device, seed: int, numel: int, blocks: int) -> None:
    x = integers(numel, 1000, 8).astype(np.int32)
    start = np.zeros(20, np.int32)
    start[1] = -(2**31)
    edges = numel * np.arange(blocks + 1) // blocks
    runs = [x[i : min(i + 32, end)] for begin, end in pairwise(edges) for i in range(begin, end, 32)]
    falling = sum(bool((np.diff(run) < 0).any()) for run in runs)
    expected = [x.sum(), x.max(), (x < 0).sum(), falling, *np.bincount(x & 15, minlength=16)]
    with device.memory(seed):
        found = device.put("summary", start)
        device.run("reduce_summary", device.put("x", x), found, numel, c_int32(blocks))
        equal("summary", found, np.array(expected))


def reverse(device: Device, seed: int, numel: int, blocks: int) -> None:
    x = integers(numel, 1000, 9).astype(np.int32)
    with device.memory(seed):
        y = device.empty("y", numel, np.int32)
        device.run("reduce_reverse", device.put("x", x), y, numel, c_int32(blocks))
        equal("y", y, np.concatenate([x[i : i + 32][::-1] for i in range(0, numel, 32)]))


def handoff(device: Device, seed: int, numel: int) -> None:
    x = integers(numel, 1000, 10).astype(np.int32)
    with device.memory(seed):
        y = device.empty("y", numel, np.int32)
        device.run("reduce_handoff", device.put("x", x), y, numel)
        equal("y", y, 2 * x + 1)


# ---- csrc/cuda, against the definition in numpy


@cache
def _abi() -> Any:
    """nf4lora/abi.py without its package, whose import brings torch."""
    spec = importlib.util.spec_from_file_location("nf4lora_abi", PACKAGE / "abi.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _map(name: str) -> np.ndarray:
    return np.array([float(v) for v in (PACKAGE / f"{name}_codebook.csv").read_text().split(",")], np.float32)


def _params(struct: type[Structure], **fields: Any) -> Structure:
    pointers = {n: v.ctypes.data if isinstance(v, np.ndarray) else v for n, v in fields.items()}
    return struct(**pointers)


def _weights(numel: int, dtype: int) -> tuple[np.ndarray, np.ndarray]:
    """The stored weight and its values in float32, some blocks of them zero or tiny."""
    v = np.random.default_rng(11).standard_normal(numel).astype(np.float32) * np.float32(0.02)
    v[64:128] = 0
    v[128:192] *= np.float32(2.0**-140)
    if dtype == 0:
        return v, v
    bits = to_bf16(v) if dtype == 1 else to_half(v)
    return bits, from_bf16(bits) if dtype == 1 else bits.view(np.float16).astype(np.float32)


def _blocks(v: np.ndarray, blocksize: int) -> np.ndarray:
    """[blocks, blocksize], zeros at the end."""
    return np.pad(v, (0, -len(v) % blocksize)).reshape(-1, blocksize)


def quantize(device: Device, seed: int, numel: int, blocksize: int, dtype: int, quant_type: int, workers: int) -> None:
    stored, v = _weights(numel, dtype)
    code = _map("fp4" if quant_type else "nf4")
    order = np.argsort(code, kind="stable")
    boundary = np.float32(0.5) * (code[order][1:] + code[order][:-1])
    blocks = _blocks(v, blocksize)
    absmax = np.abs(blocks).max(1)
    scaled = blocks * (np.float32(1) / np.maximum(absmax, np.float32(1e-38)))[:, None]
    codes = order[(scaled[..., None] > boundary).sum(-1)].reshape(-1)[: numel + numel % 2]
    with device.memory(seed):
        packed, found = (
            device.empty("packed", (numel + 1) // 2, np.uint8),
            device.empty("absmax", len(absmax), np.float32),
        )
        fields = {"numel": numel, "blocksize": blocksize, "dtype": dtype, "quant_type": quant_type, "workers": workers}
        params = _params(_abi().QuantizeParams, a=device.put("a", stored), packed=packed, absmax=found, **fields)
        device.run("nf4lora_cuda_quantize", byref(params))
        equal("absmax", found, absmax)
        equal("packed", packed, (codes[0::2] << 4 | codes[1::2]).astype(np.uint8))


def quantize_absmax(device: Device, seed: int, nblocks: int, nested: int) -> None:
    absmax = np.abs(np.random.default_rng(12).standard_normal(nblocks)).astype(np.float32)
    offset = np.array([absmax.mean()], np.float32)
    code = _map("dynamic").astype(np.float64)
    blocks = _blocks(absmax - offset, nested)
    scale = np.abs(blocks).max(1)
    scaled = blocks * (np.float32(1) / np.maximum(scale, np.float32(1e-38)))[:, None]
    codes = np.searchsorted((code[1:] + code[:-1]) / 2, scaled.astype(np.float64).reshape(-1)[:nblocks])
    with device.memory(seed):
        found = device.empty("codes", nblocks, np.uint8)
        found_scale = device.empty("nested_absmax", len(scale), np.float32)
        operands = {"absmax": device.put("absmax", absmax), "offset": device.put("offset", offset)}
        operands |= {"codes": found, "nested_absmax": found_scale}
        params = _params(_abi().QuantizeAbsmaxParams, **operands, nblocks=nblocks, nested_blocksize=nested)
        device.run("nf4lora_cuda_quantize_absmax", byref(params))
        equal("nested_absmax", found_scale, scale)
        equal("codes", found, codes.astype(np.uint8))


def dequantize(
    device: Device, seed: int, numel: int, blocksize: int, dtype: int, nested: int, workers: int, shift: int = 0
) -> None:
    random = np.random.default_rng(13)
    nblocks = -(-numel // blocksize)
    packed = random.integers(0, 256, (numel + 1) // 2).astype(np.uint8)
    codes = np.stack([packed >> 4, packed & 15], 1).reshape(-1)[:numel]
    if nested:
        stored = random.integers(0, 256, nblocks).astype(np.uint8)
        scale, offset = random.random(-(-nblocks // nested)).astype(np.float32) + 1, np.array([0.7], np.float32)
        absmax = _map("dynamic")[stored] * scale[np.arange(nblocks) // nested] + offset
    else:
        absmax = stored = random.random(nblocks).astype(np.float32)
    values = _map("nf4")[codes] * absmax[np.arange(numel) // blocksize]
    abi = _abi()
    with device.memory(seed):
        out = device.empty("out", numel, np.float32 if dtype == 0 else np.uint16)
        operands = {"packed": device.put("packed", packed, shift=shift), "absmax": device.put("absmax", stored)}
        if nested:
            operands |= {"nested_absmax": device.put("nested_absmax", scale), "offset": device.put("offset", offset)}
        sizes = {"rows": 1, "cols": numel, "blocksize": blocksize, "nested_blocksize": nested or 1}
        w = _params(abi.Weight, **operands, **sizes, quant_type=0)
        params = _params(abi.DequantizeParams, w=w, out=out, dtype=dtype, workers=workers)
        device.run("nf4lora_cuda_dequantize", byref(params))
        equal("out", out, values if dtype == 0 else to_bf16(values) if dtype == 1 else to_half(values))


# ---- the linear: one source file a path, entered below linear.cu, so that a library needs no other


@dataclass(frozen=True)
class Linear:
    """A member of a group, whose products are exact in float32: what its kernels read, and their values in float64."""

    packed: np.ndarray
    absmax: np.ndarray
    nested: tuple[np.ndarray, ...]  # its absmax and the offset, if it is nested
    W: np.ndarray
    bias: np.ndarray
    A: np.ndarray
    B: np.ndarray
    scaling: float


def _linear(N: int, K: int, r: int, nested: bool, blocksize: int, seed: int) -> Linear:
    """NF4 codes of -1, 0 and 1, an absmax of powers of two (or sums of two of them), whole numbers elsewhere."""
    random = np.random.default_rng(seed)
    values = random.integers(-1, 2, N * K)
    codes = np.array([0, 7, 15])[values + 1]
    packed = (codes[0::2] << 4 | codes[1::2]).astype(np.uint8)
    blocks = N * K // blocksize
    if nested:
        dynamic, which = _map("dynamic"), random.integers(0, 2, blocks)
        stored = np.array([np.flatnonzero(dynamic == v)[0] for v in (0, 1)])[which].astype(np.uint8)
        scale = np.float32(2) ** random.integers(-1, 3, -(-blocks // 256)).astype(np.float32)
        offset = np.float32([2.0])
        absmax = which * scale[np.arange(blocks) // 256] + offset
        statistics = scale, offset
    else:
        absmax = stored = np.float32(2) ** random.integers(-2, 3, blocks).astype(np.float32)
        statistics = ()
    W = (values * absmax.astype(np.float64)[np.arange(N * K) // blocksize]).reshape(N, K)
    A, B = integers((r, K), 1, seed + 1), integers((N, r), 1, seed + 2)
    return Linear(packed, stored, statistics, W, integers(N, 8, seed + 3), A, B, (0.5, 2.0)[seed % 2])


@dataclass(frozen=True)
class Config:
    """A group's shape and how it is launched; `paths.h` says what a path makes of it."""

    M: int
    N: tuple[int, ...]
    K: int
    r: tuple[int, ...]
    tokens: int = 64
    rows: int = 128
    split: int = 1
    nested: bool = True
    blocksize: int = 64
    resident: bool = False

    def linears(self) -> list[Linear]:
        each = enumerate(zip(self.N, self.r, strict=True))
        return [_linear(N, self.K, r, self.nested, self.blocksize, 20 + 5 * i) for i, (N, r) in each]

    def sizes(self) -> dict[str, int]:
        return {"count": len(self.N), "M": self.M, "N": sum(self.N), "K": self.K, "r": sum(self.r)}


def _members(device: Device, config: Config, linears: list[Linear], **others: list[np.ndarray]) -> Any:
    abi = _abi()
    members = (abi.Member * abi.MAX_GROUP)()
    for i, of in enumerate(linears):
        weight = {"packed": device.put("packed", of.packed), "absmax": device.put("absmax", of.absmax)}
        for name, array in zip(("nested_absmax", "offset"), of.nested, strict=False):
            weight[name] = device.put(name, array)
        w = _params(abi.Weight, **weight, rows=config.N[i], cols=config.K, blocksize=config.blocksize,
                    nested_blocksize=256, quant_type=0)  # fmt: skip
        operands: dict[str, Any] = {"bias": device.put("bias", to_bf16(of.bias))}
        if config.r[i]:
            operands["lora_A"] = device.put("lora_A", of.A.astype(np.float32))
            operands["lora_B"] = device.put("lora_B", of.B.astype(np.float32))
        operands |= {name: arrays[i] for name, arrays in others.items()}
        members[i] = _params(abi.Member, w=w, **operands, r=config.r[i], scaling=of.scaling)
    return members


def _launch(config: Config, path: int) -> Structure:
    return _abi().CudaConfig(path, config.tokens, config.rows, config.split)


def _beside(of: np.ndarray, ranks: tuple[int, ...]) -> list[np.ndarray]:
    """Columns of each member."""
    return np.split(of, np.cumsum(ranks)[:-1], axis=1)


def forward(device: Device, seed: int, function: str, config: Config) -> None:
    """The functions of GroupFwdParams: y, xa, or both; or the weights decoded, with the adapters beside them."""
    linears, (M, K, r) = config.linears(), (config.M, config.K, sum(config.r))
    x = integers((M, K), 8, 14)
    xa = to_bf16(np.concatenate([x @ of.A.T for of in linears], 1))
    parts = zip(linears, _beside(from_bf16(xa).astype(np.float64), config.r), strict=True)
    y = np.concatenate([x @ of.W.T + of.bias + of.scaling * part @ of.B.T for of, part in parts], 1)
    dense, ld = function == "decode_group", -(-(K + r) // 8) * 8
    with device.memory(seed, config.resident):
        fields: dict[str, Any] = config.sizes() | {"x_dtype": 1, "bias_dtype": 1, "A_dtype": 0, "B_dtype": 0}
        fields |= {"member": _members(device, config, linears), "x": device.put("x", to_bf16(x))}
        fields["ld"] = ld if dense else K
        expected = {}
        if dense:
            expected["decoded"] = np.zeros((len(y[0]), ld))
            expected["decoded"][:, :K] = np.concatenate([of.W for of in linears])
            row, rank = 0, K
            for of in linears:
                expected["decoded"][row : row + len(of.B), rank : rank + len(of.A)] = of.scaling * of.B
                row, rank = row + len(of.B), rank + len(of.A)
        elif function != "lora_xa":
            expected["y"] = y
        if function in ("lora_xa", "linear_fwd_small") and r:
            expected["xa"] = from_bf16(xa)
        else:
            fields["xa"] = device.put("xa", xa)
        out = {name: device.empty(name, v.shape, np.uint16) for name, v in expected.items()}
        path = {"linear_fwd_small": 0, "linear_fwd_mma": 1, "linear_fwd_wgmma": 2}.get(function, 3)
        params = _params(_abi().GroupFwdParams, **fields, **out, config=_launch(config, path))
        device.run_path(function, params)
        for name, v in expected.items():
            equal(name, out[name], to_bf16(v))


def backward(device: Device, seed: int, function: str, config: Config) -> None:
    """The functions of GroupBwdParams: dx, or what the adapters add to it; or the weights decoded, A below them."""
    linears, M = config.linears(), config.M
    dy = [integers((M, N), 8, 15 + i) for i, N in enumerate(config.N)]
    dyb = [integers((M, r), 8, 18 + i) for i, r in enumerate(config.r)]
    adapters = sum(d @ of.A for d, of in zip(dyb, linears, strict=True))
    if function == "decode_group":
        below = np.zeros((-(sum(config.N) + sum(config.r)) % 8, config.K))
        expected = {"decoded": np.concatenate([*(of.W for of in linears), *(of.A for of in linears), below])}
    elif function == "lora_dx":
        expected = {"dx": adapters}
    else:
        expected = {"dx": adapters + sum(d @ of.W for d, of in zip(dy, linears, strict=True))}
    with device.memory(seed, config.resident):
        fields: dict[str, Any] = config.sizes() | {"dy_dtype": 1, "A_dtype": 0}
        fields["ld"] = len(expected["decoded"]) if function == "decode_group" else sum(config.N)
        fields |= {"member": _members(device, config, linears), "dy": device.put("dy", to_bf16(np.concatenate(dy, 1)))}
        if sum(config.r):
            fields["dyb"] = device.put("dyb", to_bf16(np.concatenate(dyb, 1)))
        out = {name: device.empty(name, v.shape, np.uint16) for name, v in expected.items()}
        path = {"linear_bwd_mma": 1, "linear_bwd_wgmma": 2}.get(function, 3)
        device.run_path(function, _params(_abi().GroupBwdParams, **fields, **out, config=_launch(config, path)))
        for name, v in expected.items():
            equal(name, out[name], to_bf16(v))


def lora_backward(device: Device, seed: int, functions: tuple[str, ...], config: Config) -> None:
    """Of GroupLoraBwdParams: dyb, dB and dy_ext, dA and dx, as far as the functions give them; dyb is given else."""
    linears, M, K = config.linears(), config.M, config.K
    x, dy = integers((M, K), 8, 14), [integers((M, N), 8, 15 + i) for i, N in enumerate(config.N)]
    xa = [integers((M, r), 8, 18 + i) for i, r in enumerate(config.r)]
    dyb = to_bf16(np.concatenate([of.scaling * d @ of.B for d, of in zip(dy, linears, strict=True)], 1))
    dA = [part.T @ x for part in _beside(from_bf16(dyb).astype(np.float64), config.r)]
    dB = [of.scaling * d.T @ part for of, d, part in zip(linears, dy, xa, strict=True)]
    dx = sum(
        part @ of.A for part, of in zip(_beside(from_bf16(dyb).astype(np.float64), config.r), linears, strict=True)
    )
    columns = sum(config.N) + sum(config.r)
    ext = np.concatenate([*map(to_bf16, dy), dyb, np.zeros((M, -columns % 8), np.uint16)], 1)
    with device.memory(seed, config.resident):
        sums = {"dA": dA} if "lora_dA" in functions else {}
        sums |= {"dB": dB} if "lora_dB" in functions else {}
        rounded = {"dx": to_bf16(dx)} if "lora_dA" in functions else {}
        rounded |= {"dyb": dyb, "dy_ext": ext} if functions[0] != "lora_dA" else {}
        out = {name: [device.empty(name, v.shape, np.float32) for v in each] for name, each in sums.items()}
        found = {name: device.empty(name, v.shape, np.uint16) for name, v in rounded.items()}
        fields: dict[str, Any] = config.sizes() | {"dtype": 1, "A_dtype": 0, "B_dtype": 0, "split": config.split}
        gradients = [device.put("dy", to_bf16(d)) for d in dy]
        fields |= {
            "ld": ext.shape[1],
            "member": _members(device, config, linears, **out, dy=gradients, ld_dy=list(config.N)),
        }
        fields |= {name: device.put(name, to_bf16(v)) for name, v in (("x", x), ("xa", np.concatenate(xa, 1)))}
        fields |= {} if "dyb" in found else {"dyb": device.put("dyb", dyb)}
        for function in functions:
            device.run_path(function, _params(_abi().GroupLoraBwdParams, **fields, **found))
        for name, expected in rounded.items():
            equal(name, found[name], expected)
        for name, each in sums.items():
            for got, v in zip(out[name], each, strict=True):
                equal(name, got, v.astype(np.float32))


def swiglu(device: Device, seed: int, M: int, N: int, shift: int) -> None:
    """shift: bytes of gate_up beyond an aligned address."""
    random = np.random.default_rng(16)
    gate, up, dh = (from_bf16(to_bf16(random.uniform(-4, 4, (M, N)))).astype(float) for _ in range(3))
    s = 1 / (1 + np.exp(-gate))
    h, gradient = gate * s * up, np.concatenate([dh * up * s * (1 + gate * (1 - s)), dh * gate * s], 1)
    for name, expected in (("fwd", h), ("bwd", gradient)):
        with device.memory(seed):
            out = device.empty("out", expected.shape, np.uint16)
            gate_up = device.put("gate_up", to_bf16(np.concatenate([gate, up], 1)), shift=shift)
            operands = {"gate_up": gate_up, "out": out}
            if name == "bwd":
                operands["dh"] = device.put("dh", to_bf16(dh))
            params = _params(_abi().SwigluParams, **operands, M=M, N=N, dtype=1, workers=2)
            device.run(f"nf4lora_cuda_swiglu_{name}", byref(params))
            error = np.abs(from_bf16(out) - expected)
            if not (error <= 2.0**-8 * np.abs(expected) + 1e-6).all():
                raise Wrong(f"swiglu_{name}: off by {np.nanmax(error)}")


@dataclass(frozen=True)
class Optim:
    """A step: sizes of the parameters, bytes beyond an aligned address, and where in a larger index their arenas stand."""

    kind: int
    sizes: tuple[int, ...]
    coded: bool = True
    stochastic: bool = False
    counted: bool = False
    shift: int = 0
    beyond: int = 0
    workers: int = 2


def _philox(index: np.ndarray, seed: int) -> np.ndarray:
    """Word index % 4 of the block of Philox4x32-10 numbered index // 4."""
    low = np.uint64(0xFFFFFFFF)
    counter = (index // 4).astype(np.uint64)
    c = [counter & low, counter >> np.uint64(32), np.zeros_like(counter), np.zeros_like(counter)]
    k = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        products = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(products[1] >> np.uint64(32)) ^ c[1] ^ np.uint64(k[0]), products[1] & low,
             (products[0] >> np.uint64(32)) ^ c[3] ^ np.uint64(k[1]), products[0] & low]  # fmt: skip
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.choose(index % 4, c).astype(np.uint32)


def _coded(values: np.ndarray, code: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest codes of blocks of 256, and their absmax."""
    blocks = _blocks(values, 256)
    absmax = np.abs(blocks).max(1)
    scaled = blocks * (np.float32(1) / np.maximum(absmax, np.float32(1e-38)))[:, None]
    wide = code.astype(np.float64)
    codes = np.searchsorted((wide[1:] + wide[:-1]) / 2, scaled.astype(np.float64).reshape(-1)[: len(values)])
    return codes.astype(np.uint8), absmax


def optim_step(device: Device, seed: int, config: Optim) -> None:
    """Of bfloat16 parameters, against the same arithmetic in numpy."""
    f32, random, abi, adamw = np.float32, np.random.default_rng(17), _abi(), config.kind == 0
    lr, beta1, beta2, eps, decay, step = 0.01, 0.8, 0.95, 1e-6, 0.1, 4
    c1, c2, rest1, rest2, keep = f32(beta1), f32(beta2), f32(1 - beta1), f32(1 - beta2), f32(1 - lr * decay)
    root = f32((1 - (beta2 * beta2) * (beta2 * beta2)) ** 0.5)
    step_size = f32(lr / (1 - (beta1 * beta1) * (beta1 * beta1)))
    names = ("dynamic", "unsigned_dynamic")[: 1 + adamw]
    offsets = [256 * (1 + i + sum(-(-n // 256) for n in config.sizes[:i])) for i in range(len(config.sizes))]
    total = offsets[-1] + 256 * (2 + config.sizes[-1] // 256)
    states = [
        random.integers(0, 256, total).astype(np.uint8) if config.coded else random.random(total).astype(f32)
        for _ in names
    ]
    scales = [random.random(total // 256).astype(f32) for _ in names] if config.coded else []
    wanted_states, wanted_scales = [t.copy() for t in states], [t.copy() for t in scales]
    params = [to_bf16(random.standard_normal(n)) for n in config.sizes]
    grads = [to_bf16(random.standard_normal(n) * 0.1) for n in config.sizes]
    wanted_params = []
    for p, grad, at in zip(params, grads, offsets, strict=True):
        g, n, block = from_bf16(grad), len(p), slice(at // 256, at // 256 + -(-len(p) // 256))
        old = [t[at : at + n] for t in states]
        if config.coded:
            old = [_map(name)[t] * np.repeat(a[block], 256)[:n] for name, t, a in zip(names, old, scales, strict=True)]
        mixed = old[0] * c1 + g * rest1
        if adamw:
            new = [mixed, old[1] * c2 + (g * rest2) * g]
            change = (mixed / (np.sqrt(new[1]) / root + f32(eps))) * step_size
        else:
            new = [old[0] * c2 + g * rest2]
            change = np.sign(mixed) * f32(lr)
        p32 = from_bf16(p) * keep - change
        if config.stochastic:
            index = np.arange(config.beyond + at, config.beyond + at + n)
            bits = p32.view(np.uint32).astype(np.uint64) + (_philox(index, 5 << 32 | 7) >> np.uint32(16))
            wanted_params.append((bits >> np.uint64(16)).astype(np.uint16))
        else:
            wanted_params.append(to_bf16(p32))
        for i, (name, values) in enumerate(zip(names, new, strict=True)):
            if config.coded:
                wanted_states[i][at : at + n], wanted_scales[i][block] = _coded(values, _map(name))
            else:
                wanted_states[i][at : at + n] = values
    with device.memory(seed):
        table = (abi.OptimTensor * len(params))()
        params = [device.put("param", t, shift=config.shift) for t in params]
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            g = device.put("grad", g, shift=config.shift)
            table[i] = abi.OptimTensor(p.ctypes.data, g.ctypes.data, len(p), config.beyond + offsets[i], 0, i)
        hyper = abi.OptimHyper(lr, beta1, beta2, eps, decay, -1 if config.counted else step)
        states = [device.put("state", t) for t in states]
        scales = [device.put("absmax", t) for t in scales]
        fields: dict[str, Any] = {
            "tensors": ctypes.addressof(table),
            "hypers": ctypes.addressof(hyper),
            "hyper_count": 1,
        }
        for i, t in enumerate(states):
            fields[f"state{i + 1}"] = (t.ctypes.data - config.beyond * t.itemsize) % 2**64
        for i, t in enumerate(scales):
            fields[f"absmax{i + 1}"] = (t.ctypes.data - config.beyond // 64) % 2**64
        if config.counted:
            fields["steps"] = device.put("steps", np.full(len(params), step, np.int32))
            fields["flag"] = device.put("flag", np.zeros(1, np.int32))
        params_of = _params(abi.OptimParams, **fields, count=len(params), seed=5 << 32 | 7, stochastic=int(config.stochastic),
                            dtype=1, kind=config.kind, workers=config.workers)  # fmt: skip
        device.run("nf4lora_cuda_optim_step", byref(params_of))
        for name, found, expected in (
            ("param", params, wanted_params),
            ("state", states, wanted_states),
            ("absmax", scales, wanted_scales),
        ):
            for a, b in zip(found, expected, strict=True):
                equal(name, a, b)


def optim_check(device: Device, seed: int, sizes: tuple[int, ...], workers: int) -> None:
    random, abi = np.random.default_rng(18), _abi()
    for bad in (None, (0, 0), (len(sizes) - 1, sizes[-1] - 1), (1, sizes[1] // 2)):
        grads = [to_bf16(random.standard_normal(n)) for n in sizes]
        if bad:
            grads[bad[0]][bad[1]] = 0x7F80
        with device.memory(seed):
            table = (abi.OptimTensor * len(sizes))()
            for i, g in enumerate(grads):
                table[i] = abi.OptimTensor(0, device.put("grad", g).ctypes.data, len(g), 0, 0, i)
            steps, flag = device.put("steps", np.arange(len(sizes), dtype=np.int32)), device.empty("flag", 1, np.int32)
            counters = device.put("counters", np.zeros(4096, np.uint32))
            fields = {"tensors": ctypes.addressof(table), "steps": steps, "flag": flag, "counters": counters}
            params = _params(abi.OptimCheckParams, **fields, count=len(sizes), dtype=1, workers=workers)
            device.run("nf4lora_cuda_optim_check", byref(params))
            equal("flag", flag, np.array([bad is not None]))
            equal("steps", steps, np.arange(len(sizes)) + (bad is None))
            equal("counters", counters, np.zeros(4096))


# What planted bugs and the clean kernels are run on: name -> (sources, calls)
Call = tuple[Callable[..., None], tuple[Any, ...]]
CASES: dict[str, tuple[Call, ...]] = {
    "gemm_mma": ((gemm_mma, (70, 72, 136, 0, 0, 0)),),
    "gemm_mma_transposed": ((gemm_mma, (33, 72, 72, 1, 1, 1)),),
    "gemm_wgmma_ss": ((gemm_wgmma, (70, 75, 320, 0)),),
    "gemm_wgmma_rs": ((gemm_wgmma, (70, 75, 320, 1)),),
    "splitk_ordered": ((splitk, (100, 57, 4, True)),),
    "splitk_last_arriver": ((splitk, (100, 57, 4, False)),),
    "summary": ((summary, (1001, 2)),),
    "summary_many_blocks": ((summary, (700_001, 4600)),),
    "reverse": ((reverse, (1001, 2)),),
    "handoff": ((handoff, (333,)),),
    "quantize": ((quantize, (3 * 4096 + 37, 64, 1, 0, 2)), (quantize, (2 * 2048 + 129, 512, 0, 1, 2))),
    "quantize_absmax": ((quantize_absmax, (1300, 256)),),
    "dequantize_unaligned": ((dequantize, (8192 + 77, 64, 1, 0, 2, 1)),),
    "dequantize": ((dequantize, (2 * 8192 + 77, 64, 1, 256, 2)), (dequantize, (8192 + 77, 128, 0, 0, 2))),
    "linear_fwd_small": (
        (forward, ("linear_fwd_small", Config(20, (35, 16), 128, (5, 3), tokens=16, split=2))),
        (forward, ("linear_fwd_small", Config(3, (33,), 576, (0,), tokens=8, nested=False))),
        (forward, ("linear_fwd_small", Config(33, (16,), 448, (0,), tokens=64, nested=False))),
    ),
    "linear_fwd_small_resident": (
        (forward, ("linear_fwd_small", Config(9, (70,), 576, (20,), tokens=8, resident=True))),
        (forward, ("linear_fwd_small", Config(3, (130, 5), 576, (3, 50), tokens=8, split=3, resident=True))),
    ),
    "linear_fwd_mma": (
        (forward, ("linear_fwd_mma", Config(70, (20, 16), 576, (17, 3), tokens=64, split=2))),
        (forward, ("linear_fwd_mma", Config(33, (24,), 128, (3,), tokens=128, nested=False, blocksize=32))),
    ),
    "linear_fwd_wgmma": (
        (forward, ("linear_fwd_wgmma", Config(35, (69,), 448, (17,), tokens=128, nested=False))),
        (forward, ("linear_fwd_wgmma", Config(5, (40,), 256, (3,), tokens=128, split=2, blocksize=32))),
    ),
    "linear_bwd_mma": (
        (backward, ("linear_bwd_mma", Config(33, (70, 24), 192, (17, 3), tokens=32, nested=False))),
        (backward, ("linear_bwd_mma", Config(20, (136,), 128, (3,), tokens=16, split=2))),
    ),
    "linear_bwd_wgmma": (
        (backward, ("linear_bwd_wgmma", Config(70, (136, 330), 192, (3, 40), tokens=128))),
        (backward, ("linear_bwd_wgmma", Config(20, (520,), 64, (0,), tokens=128, split=2, nested=False))),
    ),
    "decode_group": (
        (forward, ("decode_group", Config(1, (40, 33, 70), 256, (3, 4, 5), split=2))),
        (backward, ("decode_group", Config(1, (70, 33), 256, (3, 4), split=2, nested=False))),
    ),
    "lora_xa": ((forward, ("lora_xa", Config(70, (16, 16), 264, (13, 3), split=2))),),
    "lora_dyb": ((lora_backward, (("lora_dyb",), Config(70, (24, 16), 64, (13, 3)))),),
    "lora_bwd": (
        (lora_backward, (("lora_dB", "lora_dA"), Config(130, (520,), 136, (16,), split=2))),
        (lora_backward, (("lora_dB", "lora_dA"), Config(70, (264, 24), 264, (17, 4)))),
    ),
    "lora_dx": ((backward, ("lora_dx", Config(20, (8, 8), 136, (17, 60)))),),
    "swiglu": ((swiglu, (5, 24, 0)), (swiglu, (5, 17, 0))),
    "swiglu_unaligned": ((swiglu, (5, 24, 2)),),
    "optim_adamw": (
        (optim_step, (Optim(0, (3000, 256, 3), stochastic=True),)),
        (optim_step, (Optim(0, (700, 300), counted=True, beyond=5 << 33),)),
        (optim_step, (Optim(0, (700, 300, 2100, 600), coded=False, beyond=3 << 31, workers=1),)),
    ),
    "optim_lion": (
        (optim_step, (Optim(1, (1100, 1, 512)),)),
        (optim_step, (Optim(1, (1100, 1, 512), coded=False, stochastic=True),)),
    ),
    "optim_unaligned": (
        (optim_step, (Optim(0, (600, 256), shift=2),)),
        (optim_step, (Optim(1, (600,), coded=False, shift=4),)),
    ),
    "optim_check": ((optim_check, ((5000, 1100, 7), 3)),),
}


def run(device: Device, case: str, seed: int) -> dict[str, str | None]:
    """`error`: the machine's message; `wrong`: which result differs."""
    try:
        for function, arguments in CASES[case]:
            function(device, seed, *arguments)
    except RuntimeError as error:
        return {"error": str(error), "wrong": None}
    except Wrong as wrong:
        return {"error": None, "wrong": str(wrong)}
    return {"error": None, "wrong": None}


def main(library: str, case: str, *seeds: str) -> None:
    device = Device(library)
    for seed in seeds:
        print(json.dumps({"seed": int(seed), **run(device, case, int(seed))}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
