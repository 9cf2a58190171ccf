"""The puzzle "convert nf4 to Triton": three MLPs, three dequants an iteration with a synchronization after each, wall clock.

Its baseline is a schedule of three kernels, called through ctypes in bitsandbytes' library: the absmax decoded, the offset
added, the weights decoded. Our tensors must first be equal to the reference's, strides included, the baseline's within 1e-3,
and so must every MLP be to the first's. `python -m bench.puzzle --out DIR` needs a GPU and writes DIR/puzzle.json.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from nf4lora import QuantState, backends, ops, quantize_4bit, reference
from nf4lora.codebook import codebook

from .environment import environment
from .files import RESULTS, write

# (sequences, tokens, hidden, intermediate, dtype), as the puzzle has them
SHAPES = (
    (2, 3333, 2048, 8192, torch.float16),
    (5, 777, 1024, 4096, torch.bfloat16),
    (3, 2048, 4096, 14336, torch.bfloat16),
)
BASELINE = "bitsandbytes, three kernels"
TURNS = 5

Dequantize = Callable[["Weight"], Tensor]


@dataclass(frozen=True)
class Weight:
    """A quantized weight, NF4 with double quantization, as both sides take it."""

    packed: Tensor  # uint8 [N * K / 2, 1]
    state: QuantState

    @property
    def arguments(self) -> tuple[Any, ...]:
        s = self.state
        return self.packed, s.absmax, s.nested_absmax, s.offset, list(s.shape), s.blocksize, s.quant_type, s.dtype


def ours(backend: str, weight: Weight) -> Tensor:
    """dtype [N, K] on one back end of nf4lora."""
    with backends.use_backend(backend):
        return ops.dequantize(*weight.arguments)


def three_kernels() -> Dequantize:
    """The baseline, from bitsandbytes' library for CUDA. Raises: ImportError, AttributeError where there is none."""
    from bitsandbytes.cextension import lib

    names = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
    absmax_kernel = lib.cdequantize_blockwise_fp32
    kernels = {dtype: getattr(lib, f"cdequantize_blockwise_{name}_nf4") for dtype, name in names.items()}

    def dequantize(weight: Weight) -> Tensor:
        s, device = weight.state, weight.packed.device
        stream = torch.cuda.current_stream(device).cuda_stream
        absmax = torch.empty(s.absmax.numel(), dtype=torch.float32, device=device)
        out = torch.empty(s.shape, dtype=s.dtype, device=device)
        code = codebook("dynamic", device)
        absmax_kernel(*(t.data_ptr() for t in (code, s.absmax, s.nested_absmax, absmax)), 256, absmax.numel(), stream)
        absmax += s.offset
        kernels[s.dtype](None, *(t.data_ptr() for t in (weight.packed, absmax, out)), s.blocksize, out.numel(), stream)
        return out

    return dequantize


def contenders() -> dict[str, Dequantize]:
    """The baseline first where it is there, then those of our GPU back ends that run."""
    found: dict[str, Dequantize] = {}
    try:
        found[BASELINE] = three_kernels()
    except (ImportError, AttributeError) as error:
        print(f"no baseline: {error}")
    running = [b.backend for b in backends.report() if b.device == "cuda" and b.why_not is None]
    return found | {f"nf4lora {name}": partial(ours, name) for name in running if name != "reference"}


def mlp(hidden: int, intermediate: int, dtype: torch.dtype, device: str) -> tuple[Weight, Weight, Weight]:
    """up, gate [intermediate, hidden], down [hidden, intermediate]."""
    shapes = ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate))
    return tuple(Weight(*quantize_4bit((torch.randn(s, device=device) * 0.02).to(dtype), 64, True)) for s in shapes)


def forward(x: Tensor, weights: Sequence[Weight], dequantize: Dequantize) -> Tensor:
    up, gate, down = weights
    return (silu(x @ dequantize(gate).t()) * (x @ dequantize(up).t())) @ dequantize(down).t()


def iteration(weights: Sequence[Weight], dequantize: Dequantize, synchronize: Callable[[], None]) -> list[Tensor]:
    """What is timed: the three transposed weights, with a synchronization after each."""
    found = []
    for weight in weights:
        found.append(dequantize(weight).t())
        synchronize()
    return found


def run(
    rounds: int = 1000, device: str = "cuda", schedules: Mapping[str, Dequantize] | None = None, shapes: Sequence[tuple] = SHAPES
) -> list[dict[str, Any]]:
    """A row for each shape and schedule: seconds of `rounds` iterations, and `speedup`, the first schedule's time over its own.

    The schedules take turns, the speedup is the median over the turns. Raises: AssertionError for a wrong tensor.
    """
    schedules = contenders() if schedules is None else dict(schedules)
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    each, rows = max(1, rounds // TURNS), []
    for sequences, tokens, hidden, intermediate, dtype in shapes:
        torch.manual_seed(3407)
        weights = mlp(hidden, intermediate, dtype, device)
        x = torch.randn(sequences, tokens, hidden, device=device).to(dtype)
        wanted = [reference.dequantize(*weight.arguments).t() for weight in weights]
        first = forward(x, weights, next(iter(schedules.values())))
        for name, schedule in schedules.items():
            found = iteration(weights, schedule, synchronize)
            tolerance = 1e-3 if name == BASELINE else 0.0
            torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance, check_stride=True)
            torch.testing.assert_close(forward(x, weights, schedule), first, rtol=1e-3, atol=1e-3, check_stride=True)
        taken: dict[str, list[float]] = {name: [] for name in schedules}
        for _ in range(TURNS):
            for name, schedule in schedules.items():
                start = time.perf_counter()
                for _ in range(each):
                    iteration(weights, schedule, synchronize)
                taken[name].append(time.perf_counter() - start)
        base = next(iter(taken.values()))
        rows += [
            {"hidden": hidden, "intermediate": intermediate, "dtype": str(dtype).removeprefix("torch."), "schedule": name,
             "iterations": each * TURNS, "seconds": round(sum(times), 6),
             "speedup": round(statistics.median(b / t for b, t in zip(base, times, strict=True)), 4)}
            for name, times in taken.items()
        ]  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--rounds", type=int, default=1000)
    args = parser.parse_args()
    rows = run(args.rounds)
    write(args.out / "puzzle.json", {"environment": environment(), "rows": rows})
    for row in rows:
        print("{hidden:5} x {intermediate:5} {dtype:9} {schedule:28} {seconds:8.3f} s  {speedup:.2f}x".format(**row))


if __name__ == "__main__":
    main()
