"""Five steps of a two-layer model give the same losses on every back end and path that can run here."""

import pytest
import torch
from under_test import GPU, force

from nf4lora.heuristics import CudaPath
from nf4lora.nn import NF4LoRALinear

M, K, HIDDEN, N, STEPS = 48, 64, 128, 64, 5
WHERE = [("cpu", "rows"), ("cpu", "panels"), ("triton", "tiled"), ("triton", "dense")]
WHERE += [(b, p.name.lower()) for b in ("cuda_on_host",) + ("cuda",) * GPU for p in CudaPath]

pytestmark = pytest.mark.usefixtures("one_thread")


def losses(dtype, compute):
    """Of five AdamW steps on the adapters: two 4-bit layers with dropout between them."""
    torch.manual_seed(0)
    layers = [NF4LoRALinear.from_linear(torch.nn.Linear(a, b), r=8, lora_alpha=16, compute_dtype=compute) for a, b in ((K, HIDDEN), (HIDDEN, N))]
    x, target = torch.randn(M, K, dtype=dtype), torch.randn(M, N)
    optimizer = torch.optim.AdamW([p for layer in layers for p in (layer.lora_A, layer.lora_B)], lr=2e-2)
    found = []
    for _ in range(STEPS):
        y = layers[1](torch.nn.functional.silu(layers[0](x)))
        loss = torch.nn.functional.mse_loss(y.float(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.fixture(scope="module")
def wanted():
    with force("reference"):
        return {d: losses(d, d) for d in (torch.float32, torch.bfloat16, torch.float16)}


@pytest.mark.parametrize(("name", "path"), WHERE, ids=lambda v: str(v))
def test_the_same_losses(name, path, wanted, figures):
    fused = path in ("small", "mma", "wgmma", "tiled")
    interpreted = name == "triton" and not GPU  # which has no bfloat16
    for dtype in (torch.float16,) if interpreted else (torch.bfloat16, torch.float16) if fused else wanted:
        with force(name, path):
            found = losses(dtype, dtype)
        assert wanted[dtype][-1] < 0.9 * wanted[dtype][0]
        for f, w in zip(found, wanted[dtype], strict=True):
            assert abs(f - w) <= 2e-3 * w, (found, wanted[dtype])
        figures["five training steps with the reference's losses (relative 2e-3), runs"] += 1
