"""`nf4lora merge`: an adapter into the weights it was trained on, as a checkpoint for any engine."""

import re
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from .settings import UserError

DTYPES = ("bfloat16", "float16", "float32")
TRAINED_ON = {"nf4": "decoded", "dense": "original"}  # as `finetune` notes it beside an adapter: --onto


def merge(
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="Folder with adapter_config.json, of any tuner of peft.")
    ],
    out: Annotated[Path, typer.Option(help="New folder.")],
    base: Annotated[str | None, typer.Option(help="Model folder or Hub id. [the one the adapter names]")] = None,
    dtype: Annotated[str, typer.Option(help=f"Of the merged weights: {', '.join(DTYPES)}.")] = "bfloat16",
    onto: Annotated[
        str | None,
        typer.Option(
            help="decoded: the base as 4 bits hold it; original: as it is saved, in 16 or 32 bits. [the one that the adapter was "
            "trained on, as finetune notes beside it; decoded where nothing is noted]"
        ),
    ] = None,
    max_shard_size: Annotated[str | None, typer.Option(help='Of a file, as "5GB". [transformers\' own]')] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")] = False,
) -> None:
    """Merge an adapter into its base and save a plain model in 16 (or 32) bits, which loads without nf4lora.

    Decoded weights go to the disk layer by layer: memory is that of the 4-bit model and of some copies of its largest layer,
    whatever is written. An original is in memory as a whole, its adapted layers in float32.

    Example: nf4lora merge nf4lora-output/adapter --out merged --dtype bfloat16
    """
    from .checkpoints import bytes_of, check_new, load, publish, report
    from .progress import Later

    if dtype not in DTYPES:
        raise UserError(f"--dtype: found {dtype}, wanted one of {', '.join(DTYPES)}")
    if onto not in (None, *TRAINED_ON.values()):
        raise UserError(f"--onto: found {onto}, wanted decoded or original")
    check_new("--out", out)
    if max_shard_size is not None and not re.fullmatch(r"[1-9][0-9]*(KB|MB|GB|TB)", max_shard_size):
        raise UserError(f"--max-shard-size: found {max_shard_size}, wanted a number and KB, MB, GB or TB, such as 5GB")
    named = _json(adapter / "adapter_config.json").get("base_model_name_or_path")
    if named is not None and not isinstance(named, str):
        raise UserError(
            f"ADAPTER: {adapter}/adapter_config.json: found base_model_name_or_path {named!r:.80}, wanted a folder or a Hub id"
        )
    if not (source := base or named):
        raise UserError(f"--base: {adapter} does not say which model it belongs to; name it")
    onto, why = (onto, "as --onto says") if onto else _trained_on(adapter)
    import torch

    from ..hf import save_merged

    wanted = getattr(torch, dtype)
    model = load(source, None if onto == "decoded" else False, quiet=json)
    if onto == "original" and getattr(model, "hf_quantizer", None):
        raise UserError(
            f"--onto: found original ({why}), but {source} is saved quantized; wanted decoded, or the model it was made of as --base"
        )
    adapted = _adapted(model, adapter, source)
    try:
        with Later("merging") as bar:
            publish(out, source, lambda folder: save_merged(adapted, folder, wanted, None, max_shard_size, bar.update))
    except (ValueError, TypeError, RuntimeError) as error:
        raise _does_not_merge(adapter, source, str(error)) from error
    size = bytes_of(out)
    found = {"saved": str(out), "base": source, "onto": onto, "onto_reason": why, "dtype": dtype, "bytes_saved": size}
    report(found, [f"merged {adapter} into {source}, {onto} ({why}), in {dtype}: {out}, {size:,} bytes"], json)


def _json(path: Path) -> dict[str, Any]:
    from ..hf.checkpoint import parse_json

    try:
        return parse_json(path.read_bytes(), path)
    except (OSError, ValueError) as error:
        raise UserError(f"ADAPTER: {path.parent} holds no {path.name} that can be read ({error})") from error


def _trained_on(adapter: Path) -> tuple[str, str]:
    """What the adapter is to be merged into, and why."""
    from .checkpoints import ABOUT

    if not (adapter / ABOUT).exists():
        return "decoded", f"no {ABOUT} says what it was trained on"
    trained_on = _json(adapter / ABOUT).get("base")
    if not isinstance(trained_on, str) or trained_on not in TRAINED_ON:
        raise UserError(f"ADAPTER: {adapter / ABOUT}: found base {trained_on!r:.80}, wanted {' or '.join(TRAINED_ON)}")
    return TRAINED_ON[trained_on], f"trained on that, says {ABOUT}"


def _adapted(model: Any, adapter: Path, source: str) -> Any:
    """`model` with the adapter on it. Raises: UserError for one that is damaged, not whole, or of another model."""
    from peft import PeftModel

    from ..hf.hooks import Hooks

    results, hooks = [], Hooks()

    def kept(original: Any, *args: Any, **kwargs: Any) -> Any:
        results.append(original(*args, **kwargs))
        return results[0]

    hooks.around(PeftModel, "load_adapter", kept)  # which knows what fits; its caller warns of a part of that
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")
            adapted = PeftModel.from_pretrained(model, adapter)
    except Exception as error:  # whatever damaged files make peft raise
        raise _does_not_merge(adapter, source, f"{type(error).__name__}: {error}") from error
    finally:
        hooks.remove()
    if adapted.active_peft_config.is_prompt_learning:  # no weights to merge, as `save_merged` says
        return adapted
    shared = "vblora_vector_bank"  # that all layers have one of
    missing = [name for name in results[0].missing_keys if shared not in name]
    wrong = {"missing": missing, "of no use": results[0].unexpected_keys}
    if told := [f"{len(names)} tensors {what}, such as {min(names)}" for what, names in wrong.items() if names]:
        raise _does_not_merge(adapter, source, f"{'; '.join(told)}: it is of another model, or not whole")
    return adapted


def _does_not_merge(adapter: Path, source: str, why: str) -> UserError:
    return UserError(f"ADAPTER: {adapter} does not merge into {source} ({' '.join(why.split())[:300]})")
