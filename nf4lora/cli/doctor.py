"""`nf4lora doctor`: what this machine has, which back ends run, and why the others do not."""

import json as jsons
import os
import platform
from importlib import metadata
from typing import Annotated, Any

import typer

PACKAGES = ("nf4lora", "torch", "numpy", "safetensors", "triton", "transformers", "peft", "accelerate", "bitsandbytes")
SHOWN_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "sve", "asimd", "bf16")


def doctor(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Say which back ends are there and, for each that is not, why; and the versions that a bug report needs.

    Example: nf4lora doctor --json > doctor.json
    """
    found = examine()
    if json:
        print(jsons.dumps(found))
    else:
        _print(found)


def examine() -> dict[str, Any]:
    """Everything `doctor` prints: machine, versions, and one entry a device and back end."""
    import torch

    from .. import backends, native, native_cuda
    from .compute import compute_dtype, cpu_flags, device

    dtype, why = compute_dtype(device())
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "machine": {
            "system": platform.platform(), "cores": len(os.sched_getaffinity(0)), "torch threads": torch.get_num_threads(),
            "CPU instruction sets": [f for f in SHOWN_FLAGS if f in cpu_flags()],
            "instruction set of the CPU kernels": native.host.isa(),
            "CUDA kernels": native_cuda.cuda.load()[1] or "built",
            "torch's CPU capability": torch.backends.cpu.get_cpu_capability(), "CUDA of torch": torch.version.cuda, "GPUs": gpus,
            "compute dtype of finetune": f"{str(dtype)[6:]}: {why}",
        },
        "backends": [{"device": d, "backend": b, "why_not": reason} for d, b, reason in backends.report()],
    }  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _print(found: dict[str, Any]) -> None:
    from rich.table import Table

    from .report import wide_console

    console = wide_console()
    for part in ("versions", "machine"):
        table = Table(title=part, show_header=False)
        for name, value in found[part].items():
            text = ", ".join(value) if isinstance(value, list) else value
            table.add_row(name, str(text or "none" if part == "machine" else text or "not installed"))
        console.print(table)
    table = Table("device", "back end", "state", title="back ends, in the order they are tried")
    for row in found["backends"]:
        table.add_row(row["device"], row["backend"], row["why_not"] or "ready")
    console.print(table)
