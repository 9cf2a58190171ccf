"""Golden vectors: what a card makes of each verb, held against the host machine byte for byte.

Each wrapper of kernels/wrappers.cu has seeded inputs, hard ones among them, and a formula in numpy after the PTX
manual, written apart from the bodies in verbs.h. `record` runs the wrappers on a card; `replay` compares the host
machine with such a record. From the folder of the tests, on a machine with a card and nvcc:

    python -m cuda_on_host.golden golden/h200.npz
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from ctypes import CDLL, c_char_p, c_int32, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import build, driver

KERNELS = build.HERE / "kernels"
FOLDER = build.HERE.parent / "golden"
_ELEMENTS = 1024
Run = Callable[
    [int, np.ndarray, int, int], np.ndarray
]  # wrapper, its input, bytes of the output, elements -> its output


@dataclass(frozen=True)
class Wrapper:
    """`draw` makes an input from a generator; `formula` says what comes out of it. Both as bytes."""

    name: str
    draw: Callable[[np.random.Generator], np.ndarray]
    formula: Callable[[np.ndarray], np.ndarray]
    elements: int = 0
    draws: int = 3

    def inputs(self) -> Iterator[np.ndarray]:
        for i in range(self.draws):
            yield _bytes(self.draw(np.random.default_rng([i, *self.name.encode()])))


def _bytes(*arrays: np.ndarray) -> np.ndarray:
    return np.concatenate([np.ascontiguousarray(a).view(np.uint8).reshape(-1) for a in arrays])


def _words(random: np.random.Generator, *shape: int) -> np.ndarray:
    return random.integers(0, 2**32, shape, dtype=np.uint32)


def _narrow(half: bool, v: np.ndarray) -> np.ndarray:
    return driver.to_half(v) if half else driver.to_bf16(v)


def _wide(half: bool, bits: np.ndarray) -> np.ndarray:
    return bits.view(np.float16).astype(np.float32) if half else driver.from_bf16(bits)


# ---- fragments: the manual's tables, "groupID" being lane / 4 and "threadID_in_group" lane % 4

_LANE = np.arange(32)
_GROUP, _IN_GROUP = _LANE[:, None] // 4, _LANE[:, None] % 4
_I8, _I4, _I2 = np.arange(8), np.arange(4), np.arange(2)
A_ROW = np.where((_I8 < 2) | ((_I8 >= 4) & (_I8 < 6)), _GROUP, _GROUP + 8)
A_COLUMN = np.where(_I8 < 4, _IN_GROUP * 2 + (_I8 & 1), _IN_GROUP * 2 + (_I8 & 1) + 8)
B_ROW = np.where(_I4 < 2, _IN_GROUP * 2 + (_I4 & 1), _IN_GROUP * 2 + (_I4 & 1) + 8)
B_COLUMN = np.broadcast_to(_GROUP, (32, 4))
C_ROW = np.where(_I4 < 2, _GROUP, _GROUP + 8)
C_COLUMN = _IN_GROUP * 2 + (_I4 & 1)


def _ldmatrix(count: int, transposed: bool) -> Wrapper:
    def draw(random: np.random.Generator) -> np.ndarray:
        return _bytes(_words(random, 32, 4), random.permutation(32).astype(np.uint32))

    def formula(given: np.ndarray) -> np.ndarray:
        rows, named = given[:512].view(np.uint16).reshape(32, 8), given[512:].view(np.uint32)
        matrices = rows[named].reshape(4, 8, 8)[:count]
        if transposed:
            matrices = matrices.transpose(0, 2, 1)
        return _bytes(matrices[:, _GROUP, _IN_GROUP * 2 + _I2].transpose(1, 0, 2))

    return Wrapper(f"ldmatrix_x{count}{'_trans' * transposed}", draw, formula)


def _mma(half: bool) -> Wrapper:
    def draw(random: np.random.Generator) -> np.ndarray:
        operands = _narrow(half, random.integers(-64, 65, (32, 12))).view(np.uint32).reshape(32, 6)
        sums = random.integers(-(2**20), 2**20, (32, 4)).astype(np.float32).view(np.uint32)
        return _bytes(np.concatenate([operands, sums], 1))

    def formula(given: np.ndarray) -> np.ndarray:
        words = given.view(np.uint32).reshape(32, 10)
        operands = _wide(half, np.ascontiguousarray(words[:, :6]).view(np.uint16)).reshape(32, 12)
        a, b = np.zeros((16, 16)), np.zeros((16, 8))
        a[A_ROW, A_COLUMN], b[B_ROW, B_COLUMN] = operands[:, :8], operands[:, 8:]
        return _bytes(
            ((a @ b)[C_ROW, C_COLUMN] + np.ascontiguousarray(words[:, 6:]).view(np.float32)).astype(np.float32)
        )

    return Wrapper(f"mma_m16n8k16_{'fp16' if half else 'bf16'}", draw, formula)


def _wgmma(half: bool, columns: int, from_registers: bool, accumulate: bool) -> Wrapper:
    def draw(random: np.random.Generator) -> np.ndarray:
        a, b = (_narrow(half, random.integers(-16, 17, (rows, 64))) for rows in (64, columns))
        return _bytes(a, b, random.integers(-999, 1000, (128, columns // 2)).astype(np.float32))

    def formula(given: np.ndarray) -> np.ndarray:
        operands = _wide(half, given[: 128 * (64 + columns)].view(np.uint16)).astype(np.float64)
        first = given[128 * (64 + columns) :].view(np.float32).reshape(128, -1)
        a, b = operands[: 64 * 64].reshape(64, 64), operands[64 * 64 :].reshape(columns, 64)
        if from_registers:  # [thread, step, 8] are fragments of 64 x 16
            fragments, a = a.reshape(4, 32, 4, 8), np.zeros((64, 64))
            for warp in range(4):
                for step in range(4):
                    a[warp * 16 + A_ROW, step * 16 + A_COLUMN] = fragments[warp, :, step]
        product = a @ b.T
        d = np.zeros((4, 32, columns // 8, 4))
        for warp in range(4):
            for group in range(columns // 8):
                d[warp, :, group] = product[warp * 16 + C_ROW, group * 8 + C_COLUMN]
        return _bytes((d.reshape(128, -1) + first * accumulate).astype(np.float32))

    return Wrapper(
        f"wgmma_n{columns}_{'rs' if from_registers else 'ss'}_{'fp16' if half else 'bf16'}", draw, formula, draws=1
    )


# ---- copies


def _cp_async(size: int) -> Wrapper:
    def draw(random: np.random.Generator) -> np.ndarray:
        return _bytes(_words(random, 32, size // 4), random.integers(0, 2, 32).astype(np.uint32))

    def formula(given: np.ndarray) -> np.ndarray:
        return _bytes(
            given[: 32 * size].reshape(32, size) * (given[32 * size :].view(np.uint32) != 0)[:, None].astype(np.uint8)
        )

    return Wrapper(f"cp_async_{size}", draw, formula)


def _swizzled(given: np.ndarray) -> np.ndarray:
    out = np.empty_like(given)
    out[driver.swizzle128(np.arange(8192))] = given
    return out


# ---- warps


def _shuffles(given: np.ndarray) -> np.ndarray:
    v, by = given.view(np.uint32).reshape(2, 32)
    first = int(by[0])
    segment = _LANE // 8 * 8

    def moved(to: np.ndarray, lowest: np.ndarray | int, highest: np.ndarray | int) -> np.ndarray:
        return v[np.where((to >= lowest) & (to <= highest), to, _LANE)]

    return _bytes(np.stack([
        v[by % 32], v[segment + by % 8],
        moved(_LANE - first, 0, 31), moved(_LANE - 3, segment, 31),
        moved(_LANE + first, 0, 31), moved(_LANE + 5, 0, _LANE // 16 * 16 + 15),
        v[_LANE ^ first], v[_LANE ^ 3],
    ], 1))  # fmt: skip


def _votes(given: np.ndarray) -> np.ndarray:
    predicate = given.view(np.uint32) != 0
    out = np.empty((32, 6), np.uint32)
    for lanes in (_LANE >= 0, _LANE % 2 == 0, _LANE % 2 == 1):
        ballot = sum(1 << int(lane) for lane in _LANE[lanes & predicate])
        columns = slice(0, 3) if lanes.all() else slice(3, 6)
        out[lanes, columns] = ballot, predicate[lanes].any(), predicate[lanes].all()
    return _bytes(out)


# ---- arithmetic, on hard values first

_HARD = np.array(
    [0, 0x80000000, 1, 0x80000001, 0x007FFFFF, 0x00800000, 0x33000000, 0x33000001, 0x387FC000, 0x38800000, 0x477FEFFF,
     0x477FF000, 0x3F808000, 0x3F818000, 0x3F808001, 0x3F801000, 0x3F803000, 0x7F7FFFFF, 0x7F7F8000, 0x7F7F7FFF,
     0x7F800000, 0xFF800000, 0x7E800000, 0x7F000000],
    np.uint32,
)  # fmt: skip
_NAN = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF812345, 0x7FFFFFFF], np.uint32)


def _floats(random: np.random.Generator, count: int, *hard: np.ndarray) -> np.ndarray:
    """Any bits but NaN's, and the hard values in random places."""
    bits = _words(random, count)
    bits[(bits & 0x7F800000) == 0x7F800000] &= 0xBFFFFFFF
    hard_bits = np.concatenate(hard)
    bits[random.permutation(count)[: len(hard_bits)]] = hard_bits
    return bits.view(np.float32)


def _max_magnitude(given: np.ndarray) -> np.ndarray:
    m, v = given.view(np.float32).reshape(-1, 2).T
    out = np.maximum(m, np.abs(v)).astype(np.float32).view(np.uint32)
    out[np.isnan(m) | np.isnan(v)] = 0x7FFFFFFF
    return _bytes(out)


def _narrowed(given: np.ndarray) -> np.ndarray:
    v = given.view(np.float32)
    with np.errstate(over="ignore"):
        bf16, half = driver.to_bf16(np.nan_to_num(v, nan=0, posinf=np.inf, neginf=-np.inf)), driver.to_half(v)
    bf16[np.isnan(v)] = half[np.isnan(v)] = 0x7FFF
    return _bytes(bf16.astype(np.uint32) | half.astype(np.uint32) << 16)


def _any_half(random: np.random.Generator) -> np.ndarray:
    """Every 64th pattern, from a random one on, that is a NaN in neither format."""
    bits = (np.arange(_ELEMENTS) * 64 + random.integers(0, 64)).astype(np.uint16)
    nan = np.isnan(driver.from_bf16(bits)) | np.isnan(bits.view(np.float16))
    return np.where(nan, bits & np.uint16(0xBBFF), bits)


def _widened(given: np.ndarray) -> np.ndarray:
    bits = given.view(np.uint16)
    return _bytes(np.stack([driver.from_bf16(bits), bits.view(np.float16).astype(np.float32)], 1))


def _reciprocal(given: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", over="ignore"):
        return _bytes(np.float32(1) / given.view(np.float32))


def _byte_perm(given: np.ndarray) -> np.ndarray:
    x, y, selector, _ = given.view(np.uint32).reshape(-1, 4).T
    either = np.stack([x, y], 1).copy().view(np.uint8)
    out = np.empty((len(x), 4), np.uint8)
    for i in range(4):
        nibble = selector >> np.uint32(4 * i) & np.uint32(15)
        byte = either[np.arange(len(x)), nibble & 7]
        out[:, i] = np.where(nibble & 8, np.where(byte & 0x80, 0xFF, 0), byte)
    return _bytes(out)


def _memory(given: np.ndarray) -> np.ndarray:
    count = given.view(np.uint32)[128:129] + np.uint32(3 * 32)
    return _bytes(given, count, np.arange(32, dtype=np.uint32) * 3)


_MBARRIER = np.array(
    [[0, 1], [0, 1], [1, 0], [1, 0], [0, 1]], np.uint32
)  # phase 0 runs, …, ends, phase 1 runs, …, ends

WRAPPERS = (
    *(_ldmatrix(count, transposed) for count in (1, 2, 4) for transposed in (False, True)),
    _mma(half=False), _mma(half=True),
    *(_cp_async(size) for size in (4, 8, 16)),
    Wrapper("bulk_copy", lambda random: _words(random, 2048), _swizzled),
    Wrapper("mbarrier_test", lambda random: _words(random, 4), lambda _: _bytes(_MBARRIER)),
    *(_wgmma(half, columns, registers, columns == 64 and not registers or columns == 128 and registers)
      for half in (False, True) for columns in (64, 128) for registers in (False, True)),
    Wrapper("shuffle", lambda random: _bytes(_words(random, 32), _words(random, 32) % np.uint32(32)), _shuffles),
    Wrapper("vote", lambda random: (_words(random, 32) % random.integers(1, 12)).astype(np.uint32), _votes),
    Wrapper("max_magnitude", lambda random: np.stack([np.abs(_floats(random, _ELEMENTS, _HARD, _NAN)),
            _floats(random, _ELEMENTS, _HARD, _NAN)], 1), _max_magnitude, _ELEMENTS),
    Wrapper("narrow", lambda random: _floats(random, _ELEMENTS, _HARD, _NAN), _narrowed, _ELEMENTS),
    Wrapper("widen", _any_half, _widened, _ELEMENTS),
    Wrapper("reciprocal", lambda random: _floats(random, _ELEMENTS, _HARD), _reciprocal, _ELEMENTS),
    Wrapper("byte_perm", lambda random: _words(random, _ELEMENTS, 4), _byte_perm, _ELEMENTS),
    Wrapper("memory", lambda random: _words(random, 160), _memory),
)  # fmt: skip


# ---- running, recording, replaying


def on_host() -> Run:
    """The wrappers on the host machine. Raises: RuntimeError with the machine's message."""
    device = driver.Device(build.library([KERNELS / "wrappers.cu"]))

    def run(which: int, given: np.ndarray, out_bytes: int, elements: int) -> np.ndarray:
        with device.memory(seed=0):
            out = device.empty("out", out_bytes, np.uint8)
            device.run("wrapper", c_int32(which), device.put("in", given), out, elements)
            return out.copy()

    return run


def on_card() -> tuple[Run, str]:
    """The wrappers on the first card, and what that is. Raises: RuntimeError where there is none, or no nvcc."""
    target = Path(tempfile.mkdtemp(prefix="nf4lora-golden-")) / "wrappers.so"
    command = ["nvcc", "-std=c++17", "-O3", "-Xcompiler", "-fPIC", "-shared", f"-I{build.CSRC}",
               "-gencode=arch=compute_90a,code=sm_90a", "-gencode=arch=compute_80,code=[sm_80,compute_80]",
               *(str(KERNELS / name) for name in ("wrappers.cu", "on_card.cu")), "-o", str(target)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    library = CDLL(os.fspath(target))
    library.card.restype = library.wrapper_on_card.restype = c_char_p
    name = library.card().decode()
    if name.startswith("no card"):
        raise RuntimeError(name)

    def run(which: int, given: np.ndarray, out_bytes: int, elements: int) -> np.ndarray:
        out = np.empty(out_bytes, np.uint8)
        buffers = c_void_p(given.ctypes.data), c_size_t(given.nbytes), c_void_p(out.ctypes.data), c_size_t(out_bytes)
        message = library.wrapper_on_card(c_int32(which), *buffers, c_int64(elements))
        if message:
            raise RuntimeError(f"{WRAPPERS[which].name}: {message.decode()}")
        return out

    return run, name


def record(path: Path, run: Run, made_by: str) -> None:
    """Writes inputs and outputs of every wrapper."""
    arrays = {}
    for which, wrapper in enumerate(WRAPPERS):
        for i, given in enumerate(wrapper.inputs()):
            arrays[f"{wrapper.name}/{i}/in"] = given
            arrays[f"{wrapper.name}/{i}/out"] = run(which, given, wrapper.formula(given).nbytes, wrapper.elements)
    about = {"made_by": made_by, "wrappers": [w.name for w in WRAPPERS]}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, about=np.array(json.dumps(about)), **arrays)


def replay(path: Path, run: Run) -> tuple[int, list[str]]:
    """Bytes compared, and the inputs whose output differs, each as "wrapper/draw: …"."""
    compared, different = 0, []
    index = {wrapper.name: i for i, wrapper in enumerate(WRAPPERS)}
    with np.load(path) as recorded:
        for key in recorded.files:
            name, draw, what = (*key.split("/"), "", "")[:3]
            if what != "in":
                continue
            expected = recorded[f"{name}/{draw}/out"]
            got = run(index[name], recorded[key], expected.nbytes, WRAPPERS[index[name]].elements)
            compared += expected.nbytes
            if (count := int((got != expected).sum())) > 0:
                first = int(np.argmax(got != expected))
                different.append(f"{name}/{draw}: {count} of {expected.nbytes} bytes differ, the first at {first}")
    return compared, different


def main(path: Path) -> int:
    """Records a card, then says how the host machine differs; the exit code is 1 where it does."""
    run, name = on_card()
    record(path, run, name)
    print(f"{name}: recorded in {path}", flush=True)
    compared, different = replay(path, on_host())
    print(
        f"{name}: {compared:,} bytes recorded; the host machine differs in {len(different)} outputs",
        *different,
        sep="\n",
    )
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
