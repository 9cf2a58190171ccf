"""Which device and dtype to compute in, and why."""

from pathlib import Path

import torch

NATIVE_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}  # x86 flags, and the feature of 64-bit Arm


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cpu_flags() -> set[str]:
    """The instruction sets /proc/cpuinfo lists for the first core; empty where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split(":")[1].split()) for line in lines if line.startswith(("flags", "Features"))), set())


def compute_dtype(where: torch.device, wanted: str = "auto") -> tuple[torch.dtype, str]:
    """bfloat16 where the processor has it natively, else float32; and the reason in words.

    A CPU without such instructions can compute in bfloat16 too, but slower than in float32. `wanted` settles it.
    """
    if wanted != "auto":
        return getattr(torch, wanted), "as --compute-dtype says"
    if where.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "the GPU has it natively"
        return torch.float32, "this GPU has no native bfloat16"
    found = NATIVE_BF16 & cpu_flags()
    if found and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16, f"this CPU has {', '.join(sorted(found))}"
    return torch.float32, "this CPU has no native bfloat16"
