"""The seven linears of a Llama-3-8B layer with LoRA, by everybody who computes them (`bench/layer.py`), in one run.

q, k, v read one x; gate and up one; o and down one each. Attention, norms and the product of SwiGLU are left out, so a
time is that of the linears. The rows "with SwiGLU" are the exception: there gate, up and down are the MLP of a model,
and every contender computes silu(gate) * up between them.

2*M*N*K operations a linear forward, twice that with dx. On a GPU: bf16, kernel time in CUDA graphs over weights that no
cache holds. On a CPU: an eighth of the widths, to see that it runs.
"""

import gc
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nf4lora import NF4LoRALinear
from nf4lora.testing import assert_error_ratio

from .harness import Case, meter_for, options, relative_error, run
from .layer import (
    ALONE,
    DENSE,
    GROUPED,
    NO_LORA,
    OURS,
    SEVEN,
    UNSLOTH,
    WITH_SWIGLU,
    Call,
    Work,
    adapters,
    contenders,
    one_by_one,
)
from .shapes import LLAMA_3_8B_LAYER
from .timing import Contender, CudaMeter, Meter, Sample, cold_sets

GPU_ROWS = (16, 32, 64, 128, 256, 512, 1024, 4096)
DEVICE_BOUND_MS = 2.5


class LayerMeter(CudaMeter):
    """Eager calls are timed only where the host can be what a layer waits for: of the long ones twenty take a while."""

    def prepare(self, contender: Contender, check: Callable[[Any], None] | None = None) -> Sample:
        sample = super().prepare(contender, check)
        if sample.kernel_ms() > DEVICE_BOUND_MS:
            sample.eager_ms = lambda: None
        return sample


def case(
    work: Work,
    group: str,
    backend: str | None,
    absent: list[str],
    timed: Callable[[Call], Callable[[], Any]] = lambda call: call,
) -> Case:
    """A row of table `group`, ours on `backend` if named; `absent` grows by the contenders that are not there, with the reason.

    Ours and Unsloth's schedule must pass T2 against float64 in every output and gradient. `timed`: what a call becomes.
    """
    linears = quantized(work)
    inputs = [
        torch.randn(work.M, work.shape(names[0])[1], dtype=work.dtype, device=work.device) for names in work.groups
    ]
    dys = [
        torch.randn(work.M, work.shape(n)[0], dtype=work.dtype, device=work.device)
        for n in work.outputs
        if work.gradients
    ]
    truth, baseline = (plain(work, linears, inputs, dys, dtype) for dtype in (torch.float64, work.dtype))
    passed: list[list[Tensor]] = []

    def gate(result: Sequence[Tensor]) -> None:
        if any(len(result) == len(old) and all(map(torch.equal, result, old)) for old in passed):
            return  # the bits of a result that passed: T2 of a layer takes a second
        for i, (y, b, t) in enumerate(zip(result, baseline, truth, strict=True)):
            assert_error_ratio(y, b.to(y.dtype), t, f"result {i}")
        passed.append([y.clone() for y in result])

    def error(result: Sequence[Tensor]) -> dict[str, float]:
        each = [relative_error(y, t) for y, t in zip(result, truth, strict=True)]
        return {key: max(found[key] for found in each) for key in ("max", "rms")}

    found, missing = contenders(work, linears, inputs, dys)
    absent += [why for name in missing if (why := f"{name}: {missing[name]}") not in absent]
    rows = {
        name: Contender(
            tuple(map(timed, calls)), backend if name in (OURS, GROUPED, ALONE) else None,
            ours=name in (OURS, GROUPED, ALONE, UNSLOTH), ceiling=name in (DENSE, NO_LORA),
        )
        for name, calls in found.items()
    }  # fmt: skip
    return Case(group, f"{work} M={work.M}", rows, gate, error, sweep=str(work), x=work.M)


def quantized(work: Work) -> dict[str, NF4LoRALinear]:
    """Linears of normal weights of 1/sqrt(K) with double quantization; neither adapter is zero."""
    layers = {}
    for name in work.names:
        N, K = work.shape(name)
        with torch.device(work.device):
            dense = nn.Linear(K, N, bias=False, dtype=work.dtype)
            nn.init.normal_(dense.weight, std=K**-0.5)
            layers[name] = NF4LoRALinear.from_linear(dense, r=work.rank, lora_alpha=work.scaling * work.rank)
            nn.init.normal_(layers[name].lora_B, std=0.02)
    return layers


def plain(
    work: Work,
    linears: Mapping[str, NF4LoRALinear],
    inputs: Sequence[Tensor],
    dys: Sequence[Tensor],
    dtype: torch.dtype,
) -> list[Tensor]:
    """Torch's products with the decoded weights, all in `dtype`: float64 for the truth."""

    def linear(w: Tensor, A: Tensor, B: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: x @ w.T + (x @ A.T) @ B.T * work.scaling

    learning = [t.detach().to(dtype).requires_grad_(work.gradients) for t in adapters(linears)]
    decoded = [m.dequantize(torch.float32 if dtype == torch.float64 else dtype).to(dtype) for m in linears.values()]
    dense = dict(zip(linears, map(linear, decoded, learning[::2], learning[1::2]), strict=True))
    x = [t.detach().to(dtype).requires_grad_(work.gradients) for t in inputs]
    return Call(one_by_one(work, dense, learning), x, [t.to(dtype) for t in dys])()


def work_cases(works: Iterable[Work], backend: str, absent: list[str]) -> Iterator[Callable[[], Case]]:
    """The case of each; `absent` grows by the contenders that are not there."""

    def build(work: Work) -> Case:
        _free()  # the graphs of the case before
        found = case(work, f"7 linears of a layer, {str(work.dtype)[6:]}, r = {work.rank}", backend, absent)
        _free()  # what float64 took: memory cannot change hands while a graph is recorded
        return found

    for work in works:
        yield lambda work=work: build(work)


def gpu_works(l2_bytes: int) -> list[Work]:
    """Most important first: a time limit cuts the end off."""
    layer = Work(1, sets=cold_sets(sum(N * K for N, K in LLAMA_3_8B_LAYER.values()) // 2, l2_bytes))
    backward = replace(layer, gradients=True)
    first = [replace(layer, M=M) for M in (32, 128, 4096)] + [replace(backward, M=M) for M in (4096, 8192)]
    gated = [replace(w, M=4096, groups=WITH_SWIGLU) for w in (layer, backward)]
    return list(dict.fromkeys([*first, *(replace(layer, M=M) for M in GPU_ROWS), *gated]))


def cpu_works() -> list[Work]:
    narrow = {name: (N // 8, K // 8) for name, (N, K) in LLAMA_3_8B_LAYER.items()}
    dtype = torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
    return [Work(128, SEVEN, gradients, narrow, dtype, "cpu") for gradients in (False, True)]


def measure(stem: str, works: Iterable[Work], meter: Meter, out: Path, backend: str, rounds: int) -> int:
    absent: list[str] = []
    return run(stem, work_cases(works, backend, absent), meter, rounds, out, absent)


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def main() -> int:
    warnings.filterwarnings("ignore", message=".*kernels-community.*")
    asked = options(__doc__)
    torch.manual_seed(0)
    if asked.device == "cuda":
        meter = LayerMeter()
        return measure("cuda_layer", gpu_works(meter.l2_bytes), meter, asked.out, "cuda", rounds=9)
    return measure("cpu_layer", cpu_works(), meter_for("cpu"), asked.out, "cpu", rounds=5)


if __name__ == "__main__":
    sys.exit(main())
