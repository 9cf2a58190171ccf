"""Runs PTX on the CPU: all threads of a program in lock step, which branches take whole, one numpy operation an instruction.

For what Triton's interpreter cannot run, inline asm and bfloat16, and what it does not check: every access must fall into
an operand. Knows the instructions that the kernels of this package compile to for sm_80, and raises on any other. An
asynchronous copy is made at once, so a missing wait is not found.
"""

import re
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_SHARED = 1 << 30  # where shared memory begins, beyond all tensors; its addresses have 32 bits
_CANONICAL_NAN = np.uint32(0x7FFFFFFF)
_COMPARE = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal}
_BITS = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
_ARITHMETIC: dict[str, Callable] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.minimum, "max": np.maximum, "div": np.divide,
}  # fmt: skip


@dataclass(frozen=True)
class Window:
    """An operand of which only the elements from `start` on exist; the kernel must not touch the others."""

    tensor: Tensor
    start: int


class Memory:
    """Operands at addresses of their own; reading or writing a byte outside of them raises IndexError."""

    def __init__(self) -> None:
        self.spans: list[tuple[int, np.ndarray]] = []
        self.next = 1 << 44
        self.shared = np.zeros(1 << 18, np.uint8)

    def add(self, t: Tensor) -> int:
        """Its address. Its bytes stay where they are, and so does its alignment, up to 16."""
        start = self.next + t.data_ptr() % 16
        self.spans.append((start, t.view(-1).view(torch.uint8).numpy()))
        self.next += t.numel() * t.element_size() // 4096 * 4096 + 8192
        return start

    def at(self, addresses: np.ndarray, size: int, active: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(bytes, indices [n, size], which threads) for each operand that active threads touch."""
        if (addresses[active] % size).any():
            raise IndexError("misaligned access")
        found, left = [], active.copy()
        for start, data in [*self.spans, (_SHARED, self.shared)]:
            inside = left & (addresses >= start) & (addresses + size <= start + len(data))
            if inside.any():
                found.append((data, (addresses[inside].astype(np.int64) - start)[:, None] + np.arange(size), inside))
                left &= ~inside
        if left.any():
            raise IndexError(f"{left.sum()} threads beyond the operands, the first at {addresses[left][0]}")
        return found

    def load(self, addresses: np.ndarray, size: int, active: np.ndarray) -> np.ndarray:
        out = np.zeros((len(addresses), 8), np.uint8)
        for data, index, which in self.at(addresses, size, active):
            out[which, :size] = data[index]
        return out.view(np.uint64)[:, 0]

    def store(self, addresses: np.ndarray, size: int, active: np.ndarray, values: np.ndarray) -> None:
        raw = np.ascontiguousarray(values.astype(np.uint64)).view(np.uint8).reshape(-1, 8)
        for data, index, which in self.at(addresses, size, active):
            data[index] = raw[which, :size]


def run(ptx: str, arguments: Sequence[Tensor | Window | int | float], programs: Iterable[int | tuple[int, int]]) -> None:
    """Run programs of a kernel, in their order, in a grid of one or two dimensions of which the last is one of them.
    arguments: of its parameters in their order; tensors are on the CPU and contiguous."""
    memory, values = Memory(), []
    for a in arguments:
        if isinstance(a, Window):
            values.append(memory.add(a.tensor) - a.start * a.tensor.element_size())
        elif isinstance(a, float):
            values.append(struct.unpack("<I", struct.pack("<f", a))[0])
        else:
            values.append(memory.add(a) if isinstance(a, Tensor) else a)
    threads = int(re.search(r"\.reqntid (\d+)", ptx)[1])
    body = re.sub(r"//[^\n]*", "", ptx[ptx.index("$L__func_begin0:") : ptx.index("$L__func_end0:")])
    lines = [line.strip() for line in body.splitlines()]
    lines = [line for line in lines if line and line not in ("{", "}") and not line.startswith(".")]
    labels = {line[:-1]: n for n, line in enumerate(lines) if line.endswith(":")}
    grid = [program if isinstance(program, tuple) else (program, 0) for program in programs]
    with np.errstate(all="ignore"):
        for program in grid:
            _Program(memory, values, threads, program, max(grid)[0] + 1).run(lines, labels)


class _Program:
    def __init__(self, memory: Memory, arguments: Sequence[int], threads: int, program: tuple[int, int], programs: int) -> None:
        lane = np.arange(threads, dtype=np.uint64)
        self.memory, self.arguments, self.threads = memory, arguments, threads
        self.registers = {
            "%tid.x": lane, "%laneid": lane % 32, "%ctaid.x": np.full(threads, program[0], np.uint64),
            "%ctaid.y": np.full(threads, program[1], np.uint64), "global_smem": np.full(threads, _SHARED, np.uint64),
            "%nctaid.x": np.full(threads, programs, np.uint64),
        }  # fmt: skip

    def run(self, lines: list[str], labels: dict[str, int]) -> None:
        n = 0
        while n < len(lines):
            line = lines[n]
            n += 1
            if line.endswith(":"):
                continue
            guard, operation, rest = re.fullmatch(r"(?:@(!?%p\d+)\s+)?([a-z][\w.:]*)\s*(.*?);?", line).groups()
            active = np.ones(self.threads, bool)
            if guard:
                active = self.value(guard.lstrip("!"), "pred") != guard.startswith("!")
            if operation == "ret":
                if active.all():
                    return
                raise NotImplementedError("a warp that returns in part")
            if operation.startswith("bra"):
                if active.any() != active.all():
                    raise NotImplementedError("a warp that branches in part")
                n = labels[rest] if active.all() else n
                continue
            self.step(operation.split("."), rest, active)

    def value(self, name: str, kind: str) -> np.ndarray:
        """An operand as an array of its PTX type."""
        name = name.strip()
        if name in self.registers:
            raw = self.registers[name]
        elif re.fullmatch(r"0f[0-9A-Fa-f]{8}|0d[0-9A-Fa-f]{16}", name):
            raw = np.full(self.threads, int(name[2:], 16), np.uint64)
        elif name.startswith("%"):
            raw = np.full(self.threads, 0xA5A5A5A5A5A5A5A5, np.uint64)  # never written: what is undefined must not matter
        else:
            raw = np.full(self.threads, int(name.rstrip("U"), 0) & 0xFFFFFFFFFFFFFFFF, np.uint64)
        if kind == "pred":
            return raw.astype(bool)
        size = int(kind[1:])
        unsigned = raw.astype(f"u{max(size // 8, 1)}")
        return unsigned.view({"s": f"i{size // 8}", "f": f"f{size // 8}"}[kind[0]]) if kind[0] in "sf" else unsigned

    def put(self, name: str, value: np.ndarray, active: np.ndarray) -> None:
        if value.dtype == np.float32:
            value = np.where(np.isnan(value), _CANONICAL_NAN, value.view(np.uint32))
        elif value.dtype.kind in "if":
            value = value.view(f"u{value.dtype.itemsize}")
        old = self.registers.get(name, np.zeros(self.threads, np.uint64))
        self.registers[name] = np.where(active, value.astype(np.uint64), old)

    def step(self, op: list[str], rest: str, active: np.ndarray) -> None:
        kind = op[-1]
        if op[0] in ("ld", "st"):
            return self.move(op, rest, active)
        if op[0] in ("cp", "ldmatrix", "mma", "atom"):
            apart = {"cp": self.copy, "ldmatrix": self.load_matrices, "mma": self.multiply, "atom": self.add_atomically}
            return apart[op[0]](op, rest, active)
        operands = [o.strip() for o in re.split(r",\s*(?![^{]*\})", rest)]
        target, sources = operands[0], operands[1:]

        def get(i: int, k: str = kind) -> np.ndarray:
            return self.value(sources[i], k)

        match op:
            case ["bar", *_]:
                return
            case ["createpolicy", *_]:
                out = np.zeros(self.threads, np.uint64)
            case ["mov", _] if target.startswith("{"):
                parts = re.findall(r"[%\w]+", target)
                width = int(kind[1:]) // len(parts)
                for i, part in enumerate(parts):
                    self.put(part, (get(0, "u64") >> np.uint64(i * width)) & np.uint64((1 << width) - 1), active)
                return
            case ["mov", _] if sources[0].startswith("{"):
                parts = re.findall(r"[%\w]+", sources[0])
                width = int(kind[1:]) // len(parts)
                out = sum(self.value(part, f"u{width}").astype(np.uint64) << np.uint64(i * width) for i, part in enumerate(parts))
            case ["mov", _]:
                out = get(0)
            case ["cvt", "rn", ("bf16x2" | "f16x2") as to, "f32"]:
                halves = [_rounded(get(i), to[:-2]) for i in (1, 0)]
                out = halves[0].astype(np.uint32) | (halves[1].astype(np.uint32) << np.uint32(16))
            case ["cvt", "rn", ("bf16" | "f16") as to, "f32"]:
                out = _rounded(get(0), to)
            case ["cvt", "f32", "bf16"]:
                out = (get(0, "u16").astype(np.uint32) << np.uint32(16)).view(np.float32)
            case ["cvt", "f32", "f16"]:
                out = get(0, "f16").astype(np.float32)
            case ["cvt", "rn", "f32", "f64"]:
                out = get(0).astype(np.float32)
            case ["cvt", to, _]:
                out = get(0).astype({"s": "i", "u": "u"}[to[0]] + str(int(to[1:]) // 8))
            case [("and" | "or" | "xor") as name, _]:
                out = _BITS[name](get(0), get(1))
            case ["neg", _]:
                out = -get(0)
            case ["div", "s32"]:
                out = np.trunc(get(0) / get(1).astype(np.float64)).astype(np.int32)
            case ["mul", "hi", "u32"]:
                out = (get(0).astype(np.uint64) * get(1) >> np.uint64(32)).astype(np.uint32)
            case ["not", _]:
                out = ~get(0)
            case [("shl" | "shr") as name, _]:
                value, by, width = get(0), get(1, "u32").astype(np.int64), int(kind[1:])
                clamped = np.minimum(by, width - 1).astype(value.dtype)
                out = value << clamped if name == "shl" else value >> clamped
                out = np.where((by >= width) & ((name == "shl") | (kind[0] != "s")), np.zeros_like(out), out)
            case ["bfe", _]:
                start, length = get(1, "u32").astype(np.int64), get(2, "u32").astype(np.int64)
                out = (get(0).astype(np.int64) << (64 - start - length)) >> (64 - length)
                out = (out if kind[0] == "s" else out & ((1 << length) - 1)).astype(np.int32)
            case ["prmt", _]:
                joined = get(0, "u64") | (get(1, "u64") << np.uint64(32))
                selector, out = get(2, "u64"), np.zeros(self.threads, np.uint64)
                for byte in range(4):
                    pick = (selector >> np.uint64(4 * byte)) & np.uint64(15)
                    if (pick > 7).any():
                        raise NotImplementedError("prmt with sign")
                    out |= ((joined >> (pick * np.uint64(8))) & np.uint64(255)) << np.uint64(8 * byte)
            case [("mul" | "mad") as name, "wide", _]:
                out = get(0).astype(kind[0].replace("s", "i") + "8") * get(1).astype(kind[0].replace("s", "i") + "8")
                if kind[1:] == "16":
                    out = out.astype(kind[0].replace("s", "i") + "4")
                if name == "mad":
                    out = out.view(np.uint64) + get(2, "u64")
            case ["mad", "lo", _]:
                out = get(0) * get(1) + get(2)
            case ["fma", "rn", "f32"]:
                out = (get(0).astype(np.float64) * get(1) + get(2)).astype(np.float32)
            case [("add" | "sub" | "mul" | "min" | "max" | "div") as name, *_]:
                out = _ARITHMETIC[name](get(0), get(1))
            case ["sqrt", "rn", _]:
                out = np.sqrt(get(0))
            case ["copysign", "f32"]:
                out = np.copysign(get(1), get(0))
            case ["setp", compare, _]:
                unordered = compare.endswith("u") and kind[0] == "f"
                a, b = get(0), get(1)
                out = _COMPARE[compare.removesuffix("u") if unordered else compare](a, b)
                if unordered:
                    out |= np.isnan(a) | np.isnan(b)
            case ["selp", _]:
                out = np.where(get(2, "pred"), get(0), get(1))
            case ["shfl", "sync", ("idx" | "bfly") as how, "b32"]:
                lane = np.arange(self.threads)
                index = get(1, "u32").astype(np.int64) & 31
                source = index if how == "idx" else (lane % 32) ^ index
                out = get(0, "u32")[lane // 32 * 32 + source]
            case ["redux", "sync", "max", _]:
                out = get(0).reshape(-1, 32).max(1).repeat(32)
            case _:
                raise NotImplementedError(".".join(op))
        self.put(target, out, active)

    def move(self, op: list[str], rest: str, active: np.ndarray) -> None:
        size = int(op[-1][1:]) // 8
        if op[1] == "param":
            target, number = re.fullmatch(r"(\S+), \[\w+_param_(\d+)\]", rest).groups()
            given = self.arguments[int(number)] if int(number) < len(self.arguments) else 0  # Triton's own scratch
            self.put(target, np.full(self.threads, given, np.uint64), active)
            return
        address = re.search(r"\[\s*([\w%]+)\s*(?:\+\s*(-?\d+)\s*)?\]", rest)
        at = self.value(address[1], "u64") + np.uint64(int(address[2] or 0) & 0xFFFFFFFFFFFFFFFF)
        values = rest[: address.start()] + rest[address.end() :]
        names = re.findall(r"[%\w]+", values if op[0] == "st" else rest[: address.start()])
        many = int(next((o[1:] for o in op if re.fullmatch(r"v\d", o)), "1"))
        if (at[active] % (size * many)).any():
            raise IndexError("misaligned access")
        for i, name in enumerate(names[:many]):
            each = at + np.uint64(i * size)
            if op[0] == "ld":
                self.put(name, self.memory.load(each, size, active), active)
            else:
                self.memory.store(each, size, active, self.value(name, "u64"))

    def add_atomically(self, op: list[str], rest: str, active: np.ndarray) -> None:
        if op[-2:] != ["add", "u64"]:
            raise NotImplementedError(".".join(op))
        target, base, plus, by = re.fullmatch(r"(%\w+), \[\s*(%\w+)\s*\+\s*(\d+)\s*\], (%\w+)", rest).groups()
        at = self.value(base, "u64") + np.uint64(int(plus))
        for thread in np.flatnonzero(active):
            alone = np.arange(self.threads) == thread
            old = self.memory.load(at, 8, alone)
            self.memory.store(at, 8, alone, old + self.value(by, "u64"))
            self.put(target, old, alone)

    def copy(self, op: list[str], rest: str, active: np.ndarray) -> None:
        """cp.async: size bytes, those beyond the source size zeros."""
        if op[2] != "ca" and op[2] != "cg":
            return  # commit_group, wait_group: all copies have been made
        to, source, size, *given = (o.strip(" []") for o in rest.split(","))
        at = [self.value(a.split("+")[0], "u64") + np.uint64(int(a.split("+")[1])) for a in (to, source)]
        of_source = self.value(given[0], "u32") if given else np.full(self.threads, int(size, 0))
        if (at[0][active] % int(size, 0)).any() or (at[1][active] % int(size, 0)).any():
            raise IndexError("misaligned access")
        each = min(int(size, 0), 8)
        for first in map(np.uint64, range(0, int(size, 0), each)):
            words = self.memory.load(at[1] + first, each, active & (of_source > first))
            self.memory.store(at[0] + first, each, active, words)

    def load_matrices(self, op: list[str], rest: str, active: np.ndarray) -> None:
        """ldmatrix.x4: lane 8 i + j has the address of row j of matrix i, of which lane l gets two neighbours into register i."""
        if op[3:5] != ["m8n8", "x4"] or not active.all():
            raise NotImplementedError(".".join(op))
        names, address = re.fullmatch(r"\{(.*)\}, \[\s*([^\]]*)\]", rest).groups()
        base, _, plus = address.partition("+")
        at = self.value(base, "u64") + np.uint64(int(plus or 0))
        if (at % 16).any():
            raise IndexError("misaligned access")
        words = [self.memory.load(at + np.uint64(first), 8, active) for first in (0, 8)]
        matrices = np.stack(words, 1).view(np.uint16).reshape(-1, 4, 8, 8)  # [warps, matrix, row, column]
        if "trans" in op:
            matrices = matrices.swapaxes(2, 3)
        pairs = np.ascontiguousarray(matrices).view(np.uint32)  # [warps, matrix, row, lane % 4]
        for i, name in enumerate(re.findall(r"%\w+", names)):
            self.put(name, pairs[:, i].reshape(-1), active)

    def multiply(self, op: list[str], rest: str, active: np.ndarray) -> None:
        """mma.m16n8k16, d = a b + c; the fragments as the PTX ISA draws them. The sum of 17 is rounded once here."""
        if op[3:7] != ["m16n8k16", "row", "col", "f32"] or op[-1] != "f32" or not active.all():
            raise NotImplementedError(".".join(op))
        d, a, b, c = (re.findall(r"%\w+|0f\w+", part) for part in re.findall(r"\{(.*?)\}", rest))
        warp, row, pair = (n.astype(np.int64) for n in (np.arange(self.threads) // 32, np.arange(self.threads) % 32 // 4, np.arange(self.threads) % 4 * 2))
        left, right, sums = (np.zeros((self.threads // 32, *shape)) for shape in ((16, 16), (16, 8), (16, 8)))
        for i, name in enumerate(a):
            halves = self.halves(name, op[7])
            for j in (0, 1):
                left[warp, row + i % 2 * 8, pair + i // 2 * 8 + j] = halves[:, j]
        for i, name in enumerate(b):
            halves = self.halves(name, op[7])
            for j in (0, 1):
                right[warp, pair + i * 8 + j, row] = halves[:, j]
        for i, name in enumerate(c):
            sums[warp, row + i // 2 * 8, pair + i % 2] = self.value(name, "f32")
        sums = (left @ right + sums).astype(np.float32)
        for i, name in enumerate(d):
            self.put(name, sums[warp, row + i // 2 * 8, pair + i % 2], active)

    def halves(self, name: str, kind: str) -> np.ndarray:
        """A register of two 16-bit floats -> [threads, 2]."""
        bits = np.ascontiguousarray(self.value(name, "u32")).view(np.uint16).reshape(-1, 2)
        return bits.view(np.float16) if kind == "f16" else (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _rounded(values: np.ndarray, to: str) -> np.ndarray:
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[to]
    return torch.from_numpy(values.copy()).to(dtype).view(torch.int16).numpy().view(np.uint16)
