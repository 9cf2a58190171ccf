"""The fused 4-bit linear with LoRA on the host, beside torch's dense linear (+ LoRA) and bitsandbytes.

2*M*N*K operations forward, twice that with the backward's dx; torch's dense linear is the limit that matters here.
"""

import warnings

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from nf4lora import NF4LoRALinear
from nf4lora.testing import assert_error_ratio

from .harness import Row, compare, report

N = K = 4096
RANK, SCALING = 16, 2.0


class DenseLoRA(nn.Module):
    """A frozen dense linear with LoRA beside it, as peft computes it."""

    def __init__(self, base: nn.Module, like: NF4LoRALinear) -> None:
        super().__init__()
        self.base = base
        self.lora_A, self.lora_B = (nn.Parameter(p.detach().clone()) for p in (like.lora_A, like.lora_B))

    def forward(self, x: Tensor) -> Tensor:
        lora = nn.functional.linear(nn.functional.linear(x.to(self.lora_A.dtype), self.lora_A), self.lora_B)
        return self.base(x) + (lora * SCALING).to(x.dtype)


def layers(dtype: torch.dtype) -> tuple[NF4LoRALinear, nn.Linear, nn.Module]:
    dense = nn.Linear(K, N, bias=False, dtype=dtype)
    ours = NF4LoRALinear.from_linear(dense, r=RANK, lora_alpha=RANK * SCALING)
    nn.init.normal_(ours.lora_B, std=0.02)
    theirs = bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=dtype, quant_type="nf4")
    theirs.weight = bnb.nn.Params4bit(dense.weight.data.clone(), requires_grad=False, quant_type="nf4")
    theirs = theirs.to("cpu")
    dense.weight = nn.Parameter(ours.dequantize(dtype), requires_grad=False)
    return ours, dense, theirs


def rows_for(M: int, dtype: torch.dtype, rounds: int) -> list[Row]:
    ours, dense, theirs = layers(dtype)
    x = torch.randn(M, K, dtype=dtype)
    lora, bnb_lora = DenseLoRA(dense, ours), DenseLoRA(theirs, ours)

    def right() -> None:
        w = ours.dequantize(torch.float32).double()
        delta = SCALING * (x.double() @ ours.lora_A.double().T) @ ours.lora_B.double().T
        assert_error_ratio(ours(x).detach(), lora(x).detach(), (x.double() @ w.T + delta).detach())

    def forward(layer: nn.Module):
        def call() -> None:
            with torch.no_grad():
                layer(x)

        return call

    def both(layer: nn.Module):
        inputs = x.clone().requires_grad_()
        return lambda: layer(inputs).sum().backward()

    name = str(dtype).removeprefix("torch.")
    contenders = {"nf4lora (base + LoRA)": ours, "dense linear + LoRA": lora, "bitsandbytes + LoRA": bnb_lora}
    result = compare(
        f"forward M={M} N=K={N} {name}",
        {n: forward(layer) for n, layer in contenders.items()} | {"dense linear alone": forward(dense)}, right, rounds,
    )  # fmt: skip
    if M > 16:
        steps = {n: both(layer) for n, layer in contenders.items()}
        result += compare(f"forward + backward M={M} N=K={N} {name}", steps, right, rounds)
    return result


def main() -> None:
    warnings.filterwarnings("ignore", message=".*kernels-community.*")
    torch.manual_seed(0)
    rows = []
    # torch's bfloat16 product takes minutes where the processor has no instruction for it
    native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    for M, rounds in ((1, 21), (16, 15), (512, 5)):
        for dtype in (torch.float32, torch.bfloat16) if native else (torch.float32,):
            rows += rows_for(M, dtype, rounds)
    report("cpu_linear", rows)


if __name__ == "__main__":
    main()
