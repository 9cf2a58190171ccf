"""Checkpoints from one folder into another: what `quantize`, `merge`, `export` and `compare` share."""

import json as jsons
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from .model import check_source, loaded, quiet_transformers
from .settings import UserError

ABOUT = "nf4lora.json"  # beside an adapter: what its base was, {"base": "nf4" or "dense"}
# What reading a tokenizer that is not whole, or not one, raises.
_DAMAGED = (OSError, ValueError, TypeError, KeyError, RuntimeError)


def check_new(option: str, folder: Path) -> None:
    """Raises: UserError where something is that would be lost."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{option}: {folder} is there already; wanted a new or an empty folder")


def load(source: str, quantization_config: Any = None, dtype: str = "auto", quiet: bool = True) -> Any:
    """The model of a folder or a Hub id in 4 bits, of the class its config names; in 16 bits with `quantization_config=False`.

    Raises: UserError saying what the folder lacks.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from ..hf import from_pretrained
    from .planning.source import auto_class

    if quiet:
        quiet_transformers()
    check_source("", source)
    made_by = loaded("", source, lambda path: auto_class(AutoConfig.from_pretrained(path))) or AutoModelForCausalLM
    if quantization_config is False:
        return loaded("", source, made_by.from_pretrained, weights=True, dtype=dtype, use_safetensors=True)

    def load_in_4bit(path: str, **kwargs: Any) -> Any:
        return from_pretrained(path, quantization_config, made_by, **kwargs)

    return loaded("", source, load_in_4bit, weights=True, dtype=dtype)


def publish(target: Path, source: str, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a folder, add the source's tokenizer or processor, and give it the name `target` in one step.

    Raises: OSError with the system's reason; there is no `target` then.
    """
    from transformers import AutoProcessor

    from ..hf import atomic

    target.parent.mkdir(parents=True, exist_ok=True)
    atomic.sweep(target.parent)
    with atomic.temporary(target.parent) as temp:
        write(temp / "model")
        with suppress(*_DAMAGED, ImportError):  # a model without one is saved without one
            AutoProcessor.from_pretrained(source).save_pretrained(temp / "model")
        if target.is_dir():
            target.rmdir()
        atomic.move(temp / "model", target)


def bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def report(found: dict[str, Any], lines: Iterable[str], as_json: bool) -> None:
    print(jsons.dumps(found) if as_json else "\n".join(lines))
