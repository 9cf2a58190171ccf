"""The fused 4-bit linear with LoRA on the host, beside torch's dense linear (+ LoRA) and bitsandbytes.

2*M*N*K operations forward, twice that with the backward's dx; torch's dense linear is the limit that matters here.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nf4lora import NF4LoRALinear
from nf4lora.testing import assert_error_ratio

from .harness import Case, options, relative_error, run
from .timing import Contender, WallMeter

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
    return theirs.to("cpu")


def main() -> int:
    warnings.filterwarnings("ignore", message=".*kernels-community.*")
    asked = options(__doc__)
    torch.manual_seed(0)
    if asked.device != "cpu":
        print("the linear layer has no rows on a GPU yet")
        return 0
    return run("cpu_linear", cpu_cases(), WallMeter(), rounds=11, out=asked.out)


if __name__ == "__main__":
    sys.exit(main())
