"""`nf4lora plan`: what fine-tuning a model takes of a card's memory, what fits, and what to do; from its config alone."""

import json as jsons
from pathlib import Path
from typing import Annotated

import typer

from .settings import OPTIMS, UserError

NOTHING_FITS = 3
_EXAMPLE = "Example: nf4lora plan ./Llama-3-8B/config.json --gpu 24GiB --seq-len 4096 --png plan.png"


def plan(
    line: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL_OR_CONFIG", help="Folder with config.json, a config.json, or a Hub id in this disk's cache."
        ),
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help="Its memory (24GiB, 80GB) or its name (RTX4090, A100, H100, …).")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences in a forward.")] = 1,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens in a sequence. [2048, or the most that the model takes]")
    ] = None,
    grad_accum: Annotated[
        int, typer.Option(help="Forwards in a step; with more than one, gradients live through them.")
    ] = 4,
    r: Annotated[int, typer.Option("--r", help="LoRA rank of the table.")] = 16,
    dropout: Annotated[float, typer.Option(help="Dropout before the LoRA branch.")] = 0.05,
    target_modules: Annotated[str, typer.Option(help="all-linear, or names separated by commas.")] = "all-linear",
    optim: Annotated[str, typer.Option(help=f"{', '.join(OPTIMS)}.")] = OPTIMS[0],
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="In the table of bytes.")
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="To compute in, and of what 4 bits do not hold: bfloat16, float16 or float32.")
    ] = "bfloat16",
    full_weights: Annotated[
        str, typer.Option(help="That full fine-tuning trains: those dtypes; float32 computes by autocast.")
    ] = "bfloat16",
    blocksize: Annotated[int, typer.Option(help="Weights that share one constant.")] = 64,
    double_quant: Annotated[bool, typer.Option("--double-quant/--no-double-quant", help="Constants in 8 bits.")] = True,
    attention: Annotated[str, typer.Option(help="flash, efficient (sdpa under a mask), or eager.")] = "flash",
    context: Annotated[str, typer.Option(help="Assumed: CUDA's context, kernels and library workspaces.")] = "700MiB",
    slack: Annotated[
        float, typer.Option(help="Assumed: share of the tensors that the allocator holds beyond them.")
    ] = 0.05,
    margin: Annotated[
        float, typer.Option(help="Share of the card left free: display, other processes, errors of this plan.")
    ] = 0.03,
    cpu: Annotated[
        bool, typer.Option("--cpu", help="Of a CPU: no context, no paging, no workspace, masks of floats.")
    ] = False,
    png: Annotated[Path | None, typer.Option(help="Write stacked bars of the methods here.")] = None,
    claims: Annotated[
        bool, typer.Option("--claims", help="Compute claims in circulation about QLoRA, said against computed.")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="With --claims: a Markdown table.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")] = False,
) -> None:
    """Plan fine-tuning from a config: bytes by method, what fits, and a recommendation with its reasons.

    Reads no weights and no network, needs no GPU. Exit code 3 when no method fits the card at that length.
    """
    if claims:
        if beside := _given(line) - {"claims", "json" if json else "markdown"}:
            named = ("MODEL_OR_CONFIG" if name == "model" else f"--{name.replace('_', '-')}" for name in sorted(beside))
            raise UserError(f"--claims: found {', '.join(named)} beside it; it takes --markdown or --json alone")
        from .planning import claims as claimed

        claimed.show(claimed.check(), "json" if json else "markdown" if markdown else "table")
        return
    if model is None or gpu is None or markdown:
        raise UserError("wanted MODEL_OR_CONFIG and --gpu, or --claims [--markdown]. " + _EXAMPLE)
    if png and png.suffix.lower() != ".png":
        raise UserError(f"--png: found {png}, wanted the path of a .png file")
    from .planning.run import Options, planned

    options = Options(
        gpu=gpu, batch_size=batch_size, seq_len=seq_len, grad_accum=grad_accum, r=r, dropout=dropout,
        target_modules=tuple(name.strip() for name in target_modules.split(",")), optim=optim,
        gradient_checkpointing=gradient_checkpointing, dtype=dtype,
        full_weights=full_weights, blocksize=blocksize, double_quant=double_quant, attention=attention, context=context,
        slack=slack, margin=margin, cpu=cpu,
    )  # fmt: skip
    found = planned(model, options)
    if png:
        found.draw(png)
    if json:
        print(jsons.dumps(found.as_json()))
    else:
        found.show()
    if not found.advice.fit:
        raise typer.Exit(NOTHING_FITS)


def _given(line: typer.Context) -> set[str]:
    """Names of the parameters that this command line gives."""
    return {
        name for name in line.params if (source := line.get_parameter_source(name)) and source.name == "COMMANDLINE"
    }


plan.__doc__ = f"{plan.__doc__.rstrip()}\n\n    {_EXAMPLE}\n    "
