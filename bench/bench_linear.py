"""The fused 4-bit linear with LoRA, beside torch's dense linear (+ LoRA) and bitsandbytes (+ LoRA).

2*M*N*K operations forward, twice that with the backward's dx; torch's dense linear is the limit that matters here. On a
GPU: Llama-3-8B's shapes, every path that takes the operands beside the one chosen, kernel time over weights no cache holds.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from nf4lora import NF4LoRALinear
from nf4lora.testing import assert_error_ratio

from .harness import Case, meter_for, options, relative_error, run
from .shapes import LLAMA_3_8B
from .timing import Contender, CudaMeter, WallMeter, cold_sets

N = K = 4096
RANK, SCALING = 16, 2.0
ROWS = (1, 16, 512)


class DenseLoRA(nn.Module):
    """A frozen dense linear with LoRA beside it, as peft computes it."""

    def __init__(self, base: nn.Module, like: NF4LoRALinear) -> None:
        super().__init__()
        self.base = base
        self.lora_A, self.lora_B = (nn.Parameter(p.detach().clone()) for p in (like.lora_A, like.lora_B))

    def forward(self, x: Tensor) -> Tensor:
        lora = nn.functional.linear(nn.functional.linear(x.to(self.lora_A.dtype), self.lora_A), self.lora_B)
        return self.base(x) + (lora * SCALING).to(x.dtype)


def layers(N: int, K: int, dtype: torch.dtype) -> tuple[NF4LoRALinear, nn.Linear, nn.Module | None]:
    """Ours, the dense one of its decoded weight, and bitsandbytes' where it is installed."""
    dense = nn.Linear(K, N, bias=False, dtype=dtype)
    ours = NF4LoRALinear.from_linear(dense, r=RANK, lora_alpha=RANK * SCALING)
    nn.init.normal_(ours.lora_B, std=0.02)
    theirs = _bitsandbytes(dense, dtype)
    dense.weight = nn.Parameter(ours.dequantize(dtype), requires_grad=False)
    return ours, dense, theirs


def linear_case(M: int, dtype: torch.dtype, backward: bool, N: int = N, K: int = K) -> Case:
    """The forward may err no more than plain torch does on the decoded weight (T2), whatever is timed."""
    ours, dense, theirs = layers(N, K, dtype)
    lora, x = DenseLoRA(dense, ours), torch.randn(M, K, dtype=dtype)
    w = ours.dequantize(torch.float32).double()
    truth = (x.double() @ w.T + SCALING * (x.double() @ ours.lora_A.double().T) @ ours.lora_B.double().T).detach()

    def forward(layer: nn.Module) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with torch.no_grad():
                return layer(x)

        return call

    def both(layer: nn.Module) -> Callable[[], Tensor]:
        inputs = x.clone().requires_grad_()

        def call() -> Tensor:
            y = layer(inputs)
            y.sum().backward()
            return y.detach()

        return call

    def gate(result: Tensor) -> None:
        assert_error_ratio(result, lora(x).detach(), truth)

    make = both if backward else forward
    contenders = {"nf4lora": Contender((make(ours),), ours=True), "dense linear + LoRA": Contender((make(lora),))}
    if theirs is not None:
        contenders["bitsandbytes + LoRA"] = Contender((make(DenseLoRA(theirs, ours)),))
    if not backward:
        contenders["dense linear alone"] = Contender((make(dense),), ceiling=True)
    what = "forward + backward" if backward else "forward"
    size = f"N = K = {N}" if N == K else f"{N} × {K}"
    return Case(
        f"{size}, {str(dtype)[6:]}, r = {RANK}", f"{what} M={M}",
        contenders, gate, lambda result: relative_error(result, truth), sweep=what, x=M,
    )  # fmt: skip


GPU_ROWS = (1, 4, 16, 64, 128, 256, 512, 1024, 4096)
# Paths beside the chosen one: where a neighbour might be better.
FORCED = {1: ("small",), 16: ("small", "mma"), 64: ("small", "mma", "wgmma"), 128: ("mma", "wgmma"), 512: ("wgmma", "dense"), 1024: ("wgmma", "dense")}


def cuda_case(M: int, name: str, backward: bool, meter: CudaMeter) -> Case:
    """As `linear_case`, each call on a layer and inputs of its own, as many as leave nothing in the cache."""
    (N, K), dtype = LLAMA_3_8B[name], torch.bfloat16
    with torch.device("cuda"):
        ours, dense, theirs = layers(N, K, dtype)
        x = torch.randn(M, K, dtype=dtype)
    ours, lora = ours.to(dtype), DenseLoRA(dense, ours).to(dtype)
    w = ours.dequantize(torch.float32).double()
    truth = (x.double() @ w.T + SCALING * (x.double() @ ours.lora_A.double().T) @ ours.lora_B.double().T).detach()
    del w
    sets = cold_sets(N * K // 2 + 2 * M * (N + K), meter.l2_bytes)

    def calls(layer: nn.Module, sets: int) -> tuple[Callable[[], Tensor], ...]:
        def call(layer: nn.Module, x: Tensor) -> Callable[[], Tensor]:
            def forward() -> Tensor:
                with torch.no_grad():
                    return layer(x)

            def both() -> Tensor:
                y = layer(x)
                torch.autograd.grad(y, [x, layer.lora_A, layer.lora_B] if hasattr(layer, "lora_A") else [x], dy)
                return y.detach()

            return both if backward else forward

        dy = torch.randn(M, N, dtype=dtype, device="cuda")
        return tuple(call(deepcopy(layer), x.clone().requires_grad_(backward)) for _ in range(sets))

    def gate(result: Tensor) -> None:
        assert_error_ratio(result, lora(x).detach(), truth)

    dense_sets = max(2, min(sets, cold_sets(2 * N * K, meter.l2_bytes)))
    contenders = {"nf4lora": Contender(calls(ours, sets), "cuda", ours=True)}
    for path in FORCED.get(M, ()):
        contenders[f"nf4lora {path}"] = Contender(calls(ours, sets), "cuda", ours=True, path=path)
    contenders["nf4lora triton"] = Contender(calls(ours, sets), "triton", ours=True)
    contenders["dense linear alone"] = Contender(calls(dense, dense_sets), ceiling=True)
    contenders["dense linear + LoRA"] = Contender(calls(lora, dense_sets))
    if theirs is not None:
        contenders["bitsandbytes + LoRA"] = Contender(calls(DenseLoRA(theirs.to("cuda"), ours).to(dtype), sets))
    what = "forward + backward" if backward else "forward"
    return Case(
        f"{name} {N} × {K}, bfloat16, r = {RANK}", f"{what} M={M}", contenders, gate,
        lambda result: relative_error(result, truth), sweep=f"{what} {name}", x=M,
    )  # fmt: skip


def cuda_cases(meter: CudaMeter) -> Iterator[Callable[[], Case]]:
    """Most important first: a time limit cuts the end off."""
    first = [(M, name, False) for M in (1, 16, 64, 128, 512, 4096) for name in ("gate, up", "q, o")]
    first += [(4096, name, True) for name in ("gate, up", "q, o")]
    rest = [(M, name, backward) for backward in (False, True) for M in GPU_ROWS for name in LLAMA_3_8B]
    for M, name, backward in dict.fromkeys(first + rest):
        yield lambda M=M, name=name, backward=backward: cuda_case(M, name, backward, meter)


def cpu_cases() -> Iterator[Callable[[], Case]]:
    """Forward at every M, forward and backward at the last."""
    # torch's bfloat16 product takes minutes where the processor has no instruction for it
    native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    for dtype in (torch.float32, torch.bfloat16) if native else (torch.float32,):
        for M in ROWS:
            yield lambda M=M, dtype=dtype: linear_case(M, dtype, backward=False)
        yield lambda dtype=dtype: linear_case(ROWS[-1], dtype, backward=True)


def _bitsandbytes(dense: nn.Linear, dtype: torch.dtype) -> Any:
    try:
        import bitsandbytes as bnb
    except ImportError:
        return None
    theirs = bnb.nn.Linear4bit(dense.in_features, dense.out_features, bias=False, compute_dtype=dtype, quant_type="nf4")
    theirs.weight = bnb.nn.Params4bit(dense.weight.data.clone(), requires_grad=False, quant_type="nf4")
    return theirs.to(dense.weight.device)


def main() -> int:
    warnings.filterwarnings("ignore", message=".*kernels-community.*")
    asked = options(__doc__)
    torch.manual_seed(0)
    if asked.device == "cuda":
        meter = meter_for("cuda")
        return run("cuda_linear", cuda_cases(meter), meter, rounds=9, out=asked.out)
    return run("cpu_linear", cpu_cases(), WallMeter(), rounds=11, out=asked.out)


if __name__ == "__main__":
    sys.exit(main())
