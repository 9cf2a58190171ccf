"""`nf4lora compare`: the bytes and the errors of our 4 bits beside bitsandbytes', weight by weight."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .settings import UserError

_SHAPES = ((1024, 1024), (1000, 250), (7, 13))


def compare(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Model folder or Hub id in 16 bits. [a few random weights]")
    ] = None,
    quant_type: Annotated[str, typer.Option(help="nf4 or fp4.")] = "nf4",
    blocksize: Annotated[int, typer.Option(help="Weights that share one constant.")] = 64,
    double_quant: Annotated[bool, typer.Option("--double-quant/--no-double-quant", help="Constants in 8 bits.")] = True,
    most: Annotated[int, typer.Option(help="Linears of the model to compare, the first of each size before others.")] = 8,
    png: Annotated[Path | None, typer.Option(help="Plot the errors here.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")] = False,
) -> None:
    """Quantize by nf4lora and by bitsandbytes, and compare bytes, constants and errors. Exit code 1 if a byte of codes differs.

    Example: nf4lora compare ./Llama-3-8B --most 4 --png errors.png
    """
    from rich.progress import track

    from .. import checks
    from .checkpoints import report
    from .progress import console

    try:
        import bitsandbytes  # noqa: F401 (is it there?)
    except ImportError as error:
        raise UserError(f"bitsandbytes is not here to compare with ({error}); pip install bitsandbytes") from error
    try:
        checks.format(blocksize, quant_type)
    except ValueError as error:
        raise UserError(f"--{str(error).replace('_', '-')}") from error
    if most < 1:
        raise UserError(f"--most: found {most}, wanted an integer of 1 or more")
    if png is not None and png.suffix != ".png":
        raise UserError(f"--png: found {png}, wanted the path of a .png file")
    weights = track(_weights(model, most, json), "comparing", console=console, transient=True, disable=not console.is_terminal)
    rows = [_row(name, weight, blocksize, quant_type, double_quant) for name, weight in weights]
    if png is not None:
        _plot(rows, png, f"{quant_type}, blocksize {blocksize}{', double quantization' * double_quant}")
    if json:
        report({"rows": rows}, (), True)
    else:
        _print(rows)
    if any(row["codes_differing"] for row in rows):
        raise typer.Exit(1)


def _weights(model: str | None, most: int, quiet: bool) -> list[tuple[str, Any]]:
    import torch

    if model is None:
        generator = torch.Generator().manual_seed(0)
        draws = [torch.randn(shape, generator=generator).bfloat16() for shape in _SHAPES]
        return [(f"random {' × '.join(map(str, draw.shape))}", draw) for draw in draws]
    from .checkpoints import load

    linears = {
        name: m.weight.detach()
        for name, m in load(model, False, quiet=quiet).named_modules()
        if type(m) is torch.nn.Linear and m.weight.is_floating_point()
    }
    if not linears:
        raise UserError(f"MODEL: {model} has no linear in 16 bits to compare")
    first: dict[tuple[int, ...], str] = {}
    for name, weight in linears.items():
        first.setdefault(tuple(weight.shape), name)
    chosen = dict.fromkeys((*first.values(), *linears))
    return [(name, linears[name]) for name in list(chosen)[:most]]


def _row(name: str, weight: Any, blocksize: int, quant_type: str, double_quant: bool) -> dict[str, Any]:
    """Counts of what differs, and errors: rms(decoded - weight) / rms(weight), decoded to the weight's dtype, summed in float64."""
    import bitsandbytes.functional as theirs
    import torch

    from ..functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight, blocksize, double_quant, quant_type)
    options = {"blocksize": blocksize, "compress_statistics": double_quant, "quant_type": quant_type}
    other, other_state = theirs.quantize_4bit(weight, **options)
    decoded, reread = dequantize_4bit(packed, state).double(), theirs.dequantize_4bit(other, other_state).double()
    codes = packed.reshape(-1), other.reshape(-1).view(torch.uint8)
    return {
        "weight": name, "shape": list(weight.shape), "codes": codes[0].numel(), "codes_differing": int((codes[0] != codes[1]).sum()),
        "constants": state.absmax.numel(), "constants_differing": int((state.absmax != other_state.absmax.reshape(-1)).sum()),
        "error": _relative(decoded, weight), "error_of_bitsandbytes": _relative(reread, weight),
        "between": (decoded - reread).abs().max().item(),
    }  # fmt: skip


def _relative(decoded: Any, weight: Any) -> float:
    return ((decoded - weight.double()).square().mean() / weight.double().square().mean()).sqrt().item()


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    from .report import wide_console

    columns = "weight", "bytes of codes", "differing", "constants", "differing", "error", "of bitsandbytes", "decoded apart by"
    table = Table(*columns, title="nf4lora beside bitsandbytes; error: rms / rms of the weight")
    for row in rows:
        counts = (f"{row[key]:,}" for key in ("codes", "codes_differing", "constants", "constants_differing"))
        errors = (f"{row[key]:.6f}" for key in ("error", "error_of_bitsandbytes"))
        table.add_row(row["weight"], *counts, *errors, f"{row['between']:.3g}")
    wide_console().print(table)


def _plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(8, 1.5 + 0.4 * len(rows)), layout="constrained")
    axes = figure.add_subplot(xlabel="rms error / rms of the weight", title=title)
    places = range(len(rows))
    axes.barh([p - 0.2 for p in places], [row["error"] for row in rows], 0.38, label="nf4lora")
    axes.barh([p + 0.2 for p in places], [row["error_of_bitsandbytes"] for row in rows], 0.38, label="bitsandbytes")
    axes.set_yticks(list(places), [row["weight"] for row in rows])
    axes.invert_yaxis()
    axes.legend()
    figure.savefig(path, dpi=120)
