"""`nf4lora merge`: an adapter into the weights it was trained on, as a checkpoint for any engine."""

import json as jsons
import re
from pathlib import Path
from typing import Annotated

import typer

from .settings import UserError

DTYPES = ("bfloat16", "float16", "float32")


def merge(
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="Folder with adapter_config.json, of any tuner of peft.")
    ],
    out: Annotated[Path, typer.Option(help="New folder.")],
    base: Annotated[str | None, typer.Option(help="Model folder or Hub id. [the one the adapter names]")] = None,
    dtype: Annotated[str, typer.Option(help=f"Of the merged weights: {', '.join(DTYPES)}.")] = "bfloat16",
    onto: Annotated[
        str,
        typer.Option(
            help="decoded: the base as 4 bits hold it, which a QLoRA adapter has seen; original: as it is saved."
        ),
    ] = "decoded",
    max_shard_size: Annotated[str | None, typer.Option(help='Of a file, as "5GB". [transformers\' own]')] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")] = False,
) -> None:
    """Merge an adapter into its base and save a plain model in 16 (or 32) bits, which loads without nf4lora.

    Layer by layer to the disk: memory is that of the 4-bit model and of some copies of its largest layer, whatever is written.

    Example: nf4lora merge nf4lora-output/adapter --out merged --dtype bfloat16
    """
    from .checkpoints import bytes_of, check_new, load, publish, report
    from .progress import Later

    if dtype not in DTYPES:
        raise UserError(f"--dtype: found {dtype}, wanted one of {', '.join(DTYPES)}")
    if onto not in ("decoded", "original"):
        raise UserError(f"--onto: found {onto}, wanted decoded or original")
    check_new("--out", out)
    if max_shard_size is not None and not re.fullmatch(r"[1-9][0-9]*(KB|MB|GB|TB)", max_shard_size):
        raise UserError(f"--max-shard-size: found {max_shard_size}, wanted a number and KB, MB, GB or TB, such as 5GB")
    try:
        named = jsons.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"ADAPTER: {adapter} holds no adapter_config.json that names its base ({error})") from error
    if not (source := base or named):
        raise UserError(f"--base: {adapter} does not say which model it belongs to; name it")
    import torch
    from peft import PeftModel

    from ..hf import save_merged

    wanted = getattr(torch, dtype)
    model = load(source, None if onto == "decoded" else False, quiet=json)
    writing = False
    try:
        adapted, writing = PeftModel.from_pretrained(model, adapter), True
        with Later("merging") as bar:
            publish(out, source, lambda folder: save_merged(adapted, folder, wanted, None, max_shard_size, bar.update))
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        if writing and isinstance(error, OSError):
            raise
        raise UserError(
            f"ADAPTER: {adapter} does not merge into {source} ({' '.join(str(error).split())[:300]})"
        ) from error
    found = {"saved": str(out), "base": source, "onto": onto, "dtype": dtype, "bytes_saved": bytes_of(out)}
    report(found, [f"merged {adapter} into {source}, {onto}, in {dtype}: {out}, {found['bytes_saved']:,} bytes"], json)
