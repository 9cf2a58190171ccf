"""`nf4lora quantize`: a checkpoint into 4 bits, of nf4lora or of bitsandbytes."""

from pathlib import Path
from typing import Annotated

import typer

from .settings import UserError

FORMATS = ("native", "bnb")


def quantize(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Model folder or Hub id, in 16 bits or in 4.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="New folder.")],
    format: Annotated[
        str, typer.Option(help="native: loads with nf4lora; bnb: also with transformers + bitsandbytes alone.")
    ] = "native",
    quant_type: Annotated[str, typer.Option(help="nf4 or fp4.")] = "nf4",
    blocksize: Annotated[int, typer.Option(help="Weights that share one constant.")] = 64,
    double_quant: Annotated[bool, typer.Option("--double-quant/--no-double-quant", help="Constants in 8 bits.")] = True,
    skip: Annotated[
        str | None, typer.Option(help="Modules that stay in 16 bits, separated by commas. [the head, tied weights]")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")] = False,
) -> None:
    """Quantize a checkpoint to 4 bits and save it, with its tokenizer.

    Example: nf4lora quantize ./Llama-3-8B ./Llama-3-8B-nf4
    """
    from .checkpoints import bytes_of, check_new, load, publish, report

    if format not in FORMATS:
        raise UserError(f"--format: found {format}, wanted one of {', '.join(FORMATS)}")
    check_new("DST", target)
    from ..hf import NF4Config, count_parameters, left_in_16_bits, save_bitsandbytes

    try:
        names = None if skip is None else [name for name in skip.split(",") if name]
        config = NF4Config(quant_type, blocksize, double_quant, modules_to_not_convert=names)
    except (ValueError, TypeError) as error:
        raise UserError(f"--{str(error).replace('_', '-')}") from error
    model = load(source, config, quiet=json)
    if not count_parameters(model).quantized:
        raise UserError(f"SRC: {source} has no linear outside --skip to quantize")
    publish(target, source, lambda folder: save_bitsandbytes(model, folder) if format == "bnb" else model.save_pretrained(folder))
    counted, left = count_parameters(model), left_in_16_bits(model)
    found = {
        "saved": str(target), "format": format, "parameters": counted.total, "quantized": counted.quantized,
        "bytes_4_bit": counted.quantized_bytes, "bits_per_quantized": counted.bits_per_quantized, "bytes_16_bit": counted.other_bytes,
        "left_in_16_bits": left, "bytes_saved": bytes_of(target),
    }  # fmt: skip
    largest = [f"  {name}: {size:,} bytes" for name, size in list(left.items())[:3]]
    summary = str(counted).splitlines()[1]
    report(found, [f"saved {target}: {found['bytes_saved']:,} bytes", summary, "not in 4 bits, the largest:", *largest], json)
