"""`nf4lora errors`: how far NF4, FP4 and INT4 are from the weights they stand for."""

import json as jsons
from pathlib import Path
from typing import Annotated, Any

import typer

from .settings import DEMO, UserError

BLOCKSIZE = 64
FORMATS = ("NF4", "NF4 + double quant.", "FP4", "INT4")


def errors(
    demo: Annotated[
        Path | None,
        typer.Option(help=f"Output folder of the demonstration, for its weights. [{DEMO.output}, if there]"),
    ] = None,
    size: Annotated[int, typer.Option(help="Elements drawn from each distribution.")] = 1 << 20,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the quantization errors of NF4, FP4 and INT4 on normal, heavy-tailed and trained weights.

    Example: nf4lora errors --demo nf4lora-demo
    """
    if size < 1:
        raise UserError(f"--size: found {size}, wanted an integer of 1 or more")
    table = [
        {"weights": name, "elements": sum(t.numel() for t in tensors), "format": form, **_errors(tensors, form)}
        for name, tensors in _weights(demo, size, seed).items()
        for form in FORMATS
    ]
    if json:
        print(jsons.dumps(table))
    else:
        _print(table)


def _weights(demo: Path | None, size: int, seed: int) -> dict[str, list[Any]]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(size, generator=generator)
    # Student's t with 3 degrees of freedom: a normal over the root of a mean of 3 squared normals
    heavy = torch.randn(size, generator=generator) / torch.randn(3, size, generator=generator).square().mean(0).sqrt()
    weights = {"normal": [normal], "heavy-tailed (Student's t, 3)": [heavy]}
    folder = demo or Path(DEMO.output)
    path = folder / "base" / "model.safetensors"
    if path.is_file():
        from ..hf.checkpoint import parse_tensors

        tensors = parse_tensors(path.read_bytes(), path)
        weights["the demonstration's base"] = [
            t.float() for n, t in sorted(tensors.items()) if n.endswith("_proj.weight")
        ]
    elif demo:
        raise UserError(f"--demo: no {path}; wanted the output folder of `nf4lora finetune`")
    return weights


def _errors(tensors: list[Any], form: str) -> dict[str, float]:
    """Over all elements of the tensors: mean and largest |error|, and rms(error) / rms(weight)."""
    import torch

    differences = torch.cat([(_roundtrip(t, form).double() - t.double()).reshape(-1) for t in tensors])
    norm = torch.cat([t.double().reshape(-1) for t in tensors]).square().mean().sqrt()
    return {
        "mean_abs": differences.abs().mean().item(),
        "max_abs": differences.abs().max().item(),
        "relative_rms": (differences.square().mean().sqrt() / norm).item(),
    }


def _roundtrip(weight: Any, form: str) -> Any:
    """Quantize and decode, in blocks of 64. INT4, which is defined here only: absmax / 7 times an integer of -7 … 7."""
    import torch

    from ..functional import dequantize_4bit, quantize_4bit

    if form != "INT4":
        packed, state = quantize_4bit(weight, BLOCKSIZE, "double" in form, form[:3].lower())
        return dequantize_4bit(packed, state, torch.float32)
    flat = weight.reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCKSIZE)).view(-1, BLOCKSIZE)
    scale = (blocks.abs().amax(1, keepdim=True) / 7).clamp(min=torch.finfo(torch.float32).tiny)
    return ((blocks / scale).round() * scale).reshape(-1)[: flat.numel()].view_as(weight)


def _print(table: list[dict[str, Any]]) -> None:
    from rich.table import Table

    from .report import wide_console

    shown = Table(title=f"Error of 4-bit formats, blocks of {BLOCKSIZE}")
    for column in ("weights", "elements", "format", "mean |error|", "largest |error|", "rms error / rms weight"):
        shown.add_column(column, justify="left" if column in ("weights", "format") else "right")
    for row in table:
        numbers = (f"{row['mean_abs']:.3e}", f"{row['max_abs']:.3e}", f"{row['relative_rms']:.4f}")
        shown.add_row(
            row["weights"], f"{row['elements']:,}", row["format"], *numbers, end_section=row["format"] == FORMATS[-1]
        )
    wide_console().print(shown)
