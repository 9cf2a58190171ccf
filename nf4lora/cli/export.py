"""`nf4lora export`: what other programs load: bitsandbytes' checkpoints, and PEFT's adapters out of checkpoints of a run."""

from pathlib import Path
from typing import Annotated

import typer

from .settings import UserError

FORMATS = ("bnb", "peft")


def export(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="bnb: a model folder of nf4lora. peft: a checkpoint of finetune or of Trainer.")
    ],
    target: Annotated[Path, typer.Argument(metavar="DST", help="New folder.")],
    format: Annotated[
        str, typer.Option(help="bnb: for transformers + bitsandbytes and vLLM. peft: for peft, vLLM, llama.cpp.")
    ] = "bnb",
    json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")] = False,
) -> None:
    """Write what others load: a 4-bit model in bitsandbytes' format, or the adapter alone as PEFT has it.

    Example: nf4lora export nf4lora-output/checkpoint-50 adapter-50 --format peft
    """
    from .checkpoints import bytes_of, check_new, load, publish, report

    if format not in FORMATS:
        raise UserError(f"--format: found {format}, wanted one of {', '.join(FORMATS)}")
    check_new("DST", target)
    if format == "peft":
        _adapter(source, target)
    else:
        if not (source / "config.json").is_file():
            raise UserError(f"SRC: {source} holds no config.json; wanted a model folder, or --format peft for an adapter")
        from ..hf import save_bitsandbytes

        model = load(str(source), quiet=json)
        try:
            publish(target, str(source), lambda folder: save_bitsandbytes(model, folder))
        except ValueError as error:
            raise UserError(f"SRC: {source}: {error}") from error
    found = {"saved": str(target), "format": format, "bytes_saved": bytes_of(target)}
    report(found, [f"saved {target}: {found['bytes_saved']:,} bytes, format {format}"], json)


def _adapter(source: Path, target: Path) -> None:
    from ..hf.adapter import CONFIG, WEIGHTS
    from ..hf.checkpoint import CheckpointError, parse_json, parse_tensors, publish, read
    from .checkpoints import ABOUT

    try:
        is_ours = (source / "manifest.json").is_file()
        files = read(source) if is_ours else {name: (source / name).read_bytes() for name in (CONFIG, WEIGHTS)}
        if absent := {CONFIG, WEIGHTS} - files.keys():
            raise CheckpointError(f"no {', '.join(sorted(absent))}")
        parse_json(files[CONFIG], source / CONFIG)
        parse_tensors(files[WEIGHTS], source / WEIGHTS)
    except (OSError, ValueError) as error:
        raise UserError(f"SRC: {source} holds no whole adapter ({error}); wanted a folder with {CONFIG} and {WEIGHTS}") from error
    if target.is_dir():
        target.rmdir()
    publish(target, {name: data for name, data in files.items() if name in (CONFIG, WEIGHTS, "README.md", ABOUT)})
