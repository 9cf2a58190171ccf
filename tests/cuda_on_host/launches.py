"""What the CUDA library launches, counted where its kernels run on the host: kernels, threads, shared memory, and how many a layer.

`python -m cuda_on_host.launches --write`, in tests/, renews bench/results/launches.json; test_launches.py holds a layer's
launches against their limits, and bench/codegen.py makes occupancy of the rest.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nf4lora import backends, heuristics
from nf4lora.cases import random_case
from nf4lora.codebook import BLOCKSIZES, QUANT_TYPES
from nf4lora.heuristics import CudaLinearConfig, CudaPath
from nf4lora.operands import FLOATS
from nf4lora.reference_optim import KINDS, STATE_BLOCKSIZE

from . import backend, build

sys.path.append(str(build.ROOT))  # behind what is installed: bench is not

from bench.codegen import plain  # noqa: E402

RESULTS = build.ROOT / "bench" / "results" / "launches.json"
N, K, MULTIPROCESSORS = 512, 512, 132  # so that sums are split
TOKENS = {"small": 4, "mma": 96, "wgmma": 96, "dense": 96}
# Every tile there is, by op: tokens and rows.
TILES = {
    ("linear_fwd", "small"): ((8, 128), (16, 128), (32, 128), (64, 128)),
    ("linear_fwd", "mma"): ((64, 256), (64, 128), (128, 128)),
    ("linear_fwd", "wgmma"): ((128, 128), (256, 128)),
    ("linear_bwd", "mma"): ((16, 128), (32, 256), (64, 256)),
    ("linear_bwd", "wgmma"): ((128, 256), (256, 128)),
}
# torch's ops that launch nothing: memory, and other ways to look at it.
_FREE = re.compile(
    r"aten\.(new_)?empty|aten\.(_unsafe_)?view|aten\.(split|slice|select|detach|lift|alias|expand|unsqueeze|squeeze|as_strided|permute|t\.|transpose)"
)


class Launch(NamedTuple):
    """One launch. `shared_bytes`: dynamic shared memory of a block."""

    kernel: str
    threads: int
    shared_bytes: int


class Recorded(TorchDispatchMode):
    """Launches in the order they are made, of the library and of torch: fills `launches`."""

    def __init__(self, machine: backend.Machine) -> None:
        super().__init__()
        self.machine, self.launches = machine, []
        _read(machine)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.launches += _read(self.machine)
        if func.namespace == "aten" and not _FREE.match(str(func)) and any(t.numel() for t in _tensors(result)):
            self.launches.append(Launch(f"torch {func.overloadpacket.__name__}", 0, 0))
        return result


def _tensors(result: Any) -> Iterator[Tensor]:
    for t in result if isinstance(result, (tuple, list)) else (result,):
        if isinstance(t, Tensor):
            yield t


class Layer:
    """Operands of one call of a layer, or of a group of `members` on one x, as its ops take them."""

    def __init__(
        self, M: int, members: int = 1, r: int = 16, dropout: bool = False, N: int = N, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        cases = [random_case(M, N, K, r, dtype, dtype, bias=False, seed=i) for i in range(members)]
        states = [c.state for c in cases]
        self.x, self.dys, self.dy = cases[0].x, [c.dy for c in cases], torch.cat([c.dy for c in cases], 1)
        self.weights = [c.packed for c in cases], *([getattr(s, n) for s in states] for n in ("absmax", "nested_absmax", "offset"))
        self.A, self.B = ([t for c in cases if (t := getattr(c, n)) is not None] for n in ("lora_A", "lora_B"))
        self.seed, self.N, self.scaling, self.p = cases[0].seed if dropout else None, [N] * members, [2.0] * members, 0.1
        self.xa = torch.zeros(M, r * members, dtype=dtype)

    def forward(self) -> None:
        backends.run(
            "group_fwd", self.x, *self.weights, [], self.A, self.B, self.seed, self.N, 64, "nf4", self.scaling, self.p
        )

    def backward(self, apart: bool = False, dA: bool = True) -> None:
        """`apart`: dy comes in a tensor for each member; dA: lora_A learns."""
        backends.run(
            "group_grads", self.dys if apart else [self.dy], self.x, self.xa, *self.weights, self.A, self.B, self.seed, self.N,
            K, 64, "nf4", self.scaling, self.p, True, bool(self.A) and dA, bool(self.A),
        )  # fmt: skip


# What a layer does -> the layer, and its call.
CALLS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "forward": ({}, "forward", {}),
    "forward, dropout": ({"dropout": True}, "forward", {}),
    "forward, no adapter": ({"r": 0}, "forward", {}),
    "forward, K at least 2 N": ({"N": 256}, "forward", {}),
    "forward of q, k, v": ({"members": 3}, "forward", {}),
    "forward of gate, up": ({"members": 2}, "forward", {}),
    "backward": ({}, "backward", {}),
    "backward, dropout": ({"dropout": True}, "backward", {}),
    "backward, no adapter": ({"r": 0}, "backward", {}),
    "backward, lora_A frozen": ({}, "backward", {"dA": False}),
    "backward of q, k, v": ({"members": 3}, "backward", {"apart": True}),
    "backward of gate, up": ({"members": 2}, "backward", {}),
}


def of_calls(machine: backend.Machine) -> dict[str, dict[str, list[str]]]:
    """What is launched, by call and path, in order."""
    return {
        call: {
            path: [launch.kernel for launch in _recorded(machine, path, partial(getattr(Layer(M, **made), how), **kwargs))]
            for path, M in TOKENS.items()
        }
        for call, (made, how, kwargs) in CALLS.items()
    }


def of_tiles(machine: backend.Machine) -> list[Launch]:
    """Every kernel that a tile, a dtype or a rank makes, once: with its threads and the most shared memory it took."""
    found: list[Launch] = []
    for dtype in (torch.bfloat16, torch.float16):
        for (op, path), tiles in TILES.items():
            for tokens, rows in tiles:
                config = CudaLinearConfig(CudaPath[path.upper()], tokens, rows, 2)
                with mock.patch.object(heuristics, f"cuda_{op}", lambda *args, config=config: config):
                    layer = Layer(min(tokens, 64), N=128, dtype=dtype)
                    found += _recorded(machine, path, layer.forward if op == "linear_fwd" else layer.backward)
        for r in (1, 8, 16, 17, 32, 33, 64, 65, 128):
            for dropout in (False, True):
                layer = Layer(65, r=r, dropout=dropout, N=128, dtype=dtype)
                found += _recorded(machine, "dense", layer.forward) + _recorded(machine, "dense", layer.backward)
    for dtype in FLOATS:
        a = torch.randn(2, 4096).to(dtype)
        found += _recorded(machine, None, partial(backends.run, "swiglu_fwd", a))
        found += _recorded(machine, None, partial(backends.run, "swiglu_bwd", a, a[:, ::2].contiguous()))
        for blocksize, quant_type, nested in product(BLOCKSIZES, QUANT_TYPES, (False, True)):
            found += _recorded(machine, None, partial(_round_trip, a, blocksize, nested, quant_type))
        for kind, coded in product(KINDS, (False, True)):
            for seed in (None, 1) if dtype == torch.bfloat16 else (None,):
                found += _recorded(machine, None, partial(_step, a, kind, coded, seed))
    most: dict[str, Launch] = {}
    for launch in found:
        if launch.threads and launch.shared_bytes >= most.get(launch.kernel, launch).shared_bytes:
            most[launch.kernel] = launch
    return [most[kernel] for kernel in sorted(most)]


def _round_trip(a: Tensor, blocksize: int, nested: bool, quant_type: str) -> None:
    packed, absmax = backends.run("quantize", a, blocksize, quant_type)
    statistics = absmax, None, None
    if nested:
        codes, nested_absmax = backends.run("quantize_absmax", absmax, absmax.mean())
        statistics = codes, nested_absmax, absmax.mean()
    backends.run("dequantize", packed, *statistics, list(a.shape), blocksize, quant_type, a.dtype)


def _step(grad: Tensor, kind: str, coded: bool, seed: int | None) -> None:
    """Of an optimizer, checked first."""
    steps, flag = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    backends.run("optim_check", [grad], steps, flag, [0])
    count = 1 if kind == "lion" else 2
    states = [torch.zeros(grad.numel(), dtype=torch.uint8 if coded else torch.float32) for _ in range(count)]
    absmax = [torch.zeros(grad.numel() // STATE_BLOCKSIZE) for _ in range(count if coded else 0)]
    numbers = [1e-3, 0.9, 0.99, 1e-8, 0.0, 0.0]
    operands = (*states, None)[:2] + (*absmax, None, None)[:2]
    backends.run("optim_step", [grad.clone()], [grad], *operands, steps, flag, [0], [0], [0], numbers, kind, seed, 0)


def _recorded(machine: backend.Machine, path: str | None, call: Callable[[], Any]) -> list[Launch]:
    machine.enter()
    with (
        backends.use_backend(machine.backend, path),
        mock.patch.object(backend.Machine, "multiprocessors", lambda *args: MULTIPROCESSORS),
        Recorded(machine) as recorded,
    ):
        call()
    return recorded.launches + _read(machine)


def _read(machine: backend.Machine) -> list[Launch]:
    found = []
    for line in machine.load()[0].cuda_on_host_launches().decode().splitlines():
        kernel, *_, threads, shared = line.split()
        found.append(Launch(_kernels(machine.path())[int(kernel, 16)], int(threads), int(shared)))
    return found


@cache
def _kernels(library: Path) -> dict[int, str]:
    """Offset into the library -> the kernel there, named as bench/codegen.py names it."""
    listed = subprocess.run(["nm", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    symbols = [line.split() for line in listed.splitlines() if re.match(r"[0-9a-f]+ [tTwW] _Z", line)]
    names = subprocess.run(["c++filt"], input="\n".join(s[2] for s in symbols), capture_output=True, text=True, check=True)
    return {int(s[0], 16): plain(name) for s, name in zip(symbols, names.stdout.splitlines(), strict=True)}


def kernels(machine: backend.Machine) -> list[dict[str, Any]]:
    """`of_tiles` as the file has it."""
    return [launch._asdict() for launch in of_tiles(machine)]


def document() -> dict[str, Any]:
    """What bench/results/launches.json holds."""
    machine = backend.machine("checker")  # the build that most tests use
    return {"calls": of_calls(machine), "kernels": kernels(machine)}


def main() -> None:
    text = json.dumps(document(), indent=1)
    print(text)
    if "--write" in sys.argv[1:]:
        RESULTS.write_text(text + "\n")


if __name__ == "__main__":
    main()
