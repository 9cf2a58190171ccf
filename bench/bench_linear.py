"""The fused 4-bit linear with LoRA, one at a time, beside torch's dense linear (+ LoRA) and bitsandbytes (+ LoRA).

2*M*N*K operations forward, twice that with the backward's dx; torch's dense linear is the limit that matters here. On a
GPU: Llama-3-8B's shapes and the contenders of `bench/layer.py`, paths of ours beside the one chosen, kernel time over
weights no cache holds.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from nf4lora import NF4LoRALinear
from nf4lora.testing import assert_error_ratio

from . import peers
from .bench_layer import case
from .harness import Case, meter_for, options, relative_error, run
from .layer import OURS, Work
from .shapes import LLAMA_3_8B
from .timing import Contender, WallMeter, cold_sets

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
    theirs = None if peers.why_not("bitsandbytes") else peers.bitsandbytes_linear(ours, dtype)
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


GPU_ROWS = (1, 4, 8, 16, 64, 128, 256, 512, 1024, 4096)
# Paths beside the chosen one: where a neighbour might be better.
FORCED = {
    1: ("small",),
    16: ("small", "mma"),
    64: ("small", "mma", "wgmma"),
    128: ("mma", "wgmma"),
    512: ("wgmma", "dense"),
    1024: ("wgmma", "dense"),
}
# The linear of `LLAMA_3_8B_LAYER` that stands for a shape of `LLAMA_3_8B`.
ONE_OF = {"q, o": "o_proj", "k, v": "k_proj", "gate, up": "gate_proj", "down": "down_proj"}


def cuda_case(name: str, work: Work, backend: str, absent: list[str]) -> Case:
    """The contenders of `bench/layer.py` on one linear, ours on every path that might do; no operand is in a cache."""
    N, K = work.shape(work.names[0])
    found = case(work, f"{name} {N} × {K}, {str(work.dtype)[6:]}, r = {work.rank}", backend, absent)
    ours, *others = found.contenders.items()
    paths = {f"{OURS} {path}": replace(ours[1], path=path) for path in FORCED.get(work.M, ())}
    triton = {f"{OURS} triton": replace(ours[1], backend="triton")}
    return replace(found, contenders=dict([ours]) | paths | triton | dict(others), sweep=f"{work} {name}")


def cuda_works(l2_bytes: int) -> list[tuple[str, Work]]:
    """Most important first: a time limit cuts the end off."""
    first = [(M, name, False) for M in (1, 16, 4, 8, 64, 128, 512, 4096) for name in ("gate, up", "q, o")]
    first += [(4096, name, True) for name in ("gate, up", "q, o")]
    rest = [(M, name, backward) for backward in (False, True) for M in GPU_ROWS for name in LLAMA_3_8B]
    works = []
    for M, name, backward in dict.fromkeys(first + rest):
        N, K = LLAMA_3_8B[name]
        sets = cold_sets(N * K // 2 + 2 * M * (N + K), l2_bytes)
        works.append((name, Work(M, ((ONE_OF[name],),), backward, sets=sets)))
    return works


def dtypes() -> tuple[torch.dtype, ...]:
    """Those whose products this processor has."""
    return (torch.float32, torch.bfloat16) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else (torch.float32,)


def cpu_cases() -> Iterator[Callable[[], Case]]:
    """Forward at every M, forward and backward at the last."""
    # torch's bfloat16 product takes minutes where the processor has no instruction for it
    for dtype in dtypes():
        for M in ROWS:
            yield lambda M=M, dtype=dtype: linear_case(M, dtype, backward=False)
        yield lambda dtype=dtype: linear_case(ROWS[-1], dtype, backward=True)


def main() -> int:
    warnings.filterwarnings("ignore", message=".*kernels-community.*")
    asked = options(__doc__)
    torch.manual_seed(0)
    if asked.device == "cuda":
        meter, absent = meter_for("cuda"), []
        cases = ((lambda of=of: cuda_case(*of, "cuda", absent)) for of in cuda_works(meter.l2_bytes))
        return run("cuda_linear", cases, meter, rounds=9, out=asked.out, absent=absent)
    return run("cpu_linear", cpu_cases(), WallMeter(), rounds=11, out=asked.out)


if __name__ == "__main__":
    sys.exit(main())
