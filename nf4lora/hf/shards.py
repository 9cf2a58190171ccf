"""The files a checkpoint names, looked at before any is read: inside its folder, there, and whole."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .checkpoint import CheckpointError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_INDEX_LIMIT = 1 << 28


def check_folder(folder: str | os.PathLike, variant: str | None = None) -> None:
    """Look at a local checkpoint. Raises: CheckpointError for one that is pickled, names files outside, or lacks some."""
    folder = Path(folder)
    weights, index = (
        name if variant is None else f".{variant}.".join(name.rsplit(".", 1)) for name in (WEIGHTS, INDEX)
    )
    if (folder / weights).is_file():
        return check_files([folder / weights], folder)
    if (folder / index).is_file():
        return check_files([folder / name for name in _indexed(folder / index)], folder)
    if pickles := [name for name in _PICKLES if (folder / name).is_file()]:
        raise CheckpointError(
            f"{folder}: found {pickles[0]}, which is a pickle and may run any code, and no safetensors file; "
            "save it as safetensors first, where you trust it"
        )


def check_files(files: Iterable[str | os.PathLike], folder: str | os.PathLike | None = None) -> None:
    """Raises: CheckpointError naming the files that are outside `folder`, missing or damaged; all names are looked at first."""
    files = [os.fspath(file) for file in files]
    if folder is not None:
        inside = os.path.join(os.path.abspath(folder), "")
        if outside := [file for file in files if not os.path.abspath(file).startswith(inside)]:
            raise CheckpointError(
                f"{folder}: its index names {outside[0]!r}, which is outside of this folder; nothing was read"
            )
    if missing := [os.path.basename(file) for file in files if not os.path.isfile(file)]:
        raise CheckpointError(
            f"{os.path.dirname(files[0])}: {len(missing)} of {len(files)} files missing: {', '.join(missing[:5])}"
        )
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                continue
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: truncated or damaged safetensors file ({error})") from error


def check_statistics(files: Iterable[str | os.PathLike], double_quant: bool) -> None:
    """Look at 4-bit weights and what is saved beside them. Raises: CheckpointError for dtypes that the loader would cast,
    and for adapters of `NF4LoRALinear`, which it would drop."""
    wanted = {"_nested_absmax": "I32", "_nested_offset": "I32", "_absmax": "U8" if double_quant else "I32"}
    dtypes = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            dtypes |= {key: (opened.get_slice(key).get_dtype(), file) for key in opened.keys()}  # noqa: SIM118 (it is no dict)
    for key, (found, file) in dtypes.items():
        if key.endswith(".lora_A") and key.removesuffix("lora_A") + "weight_absmax" in dtypes:
            raise CheckpointError(
                f"{file}: found {key}, an adapter of NF4LoRALinear, which from_pretrained would drop; save it with save_adapter, "
                "or, to go on from this file, put the layers in with replace_linears and load_state_dict"
            )
        dtype = "U8" if f"{key}_absmax" in dtypes else next((wanted[end] for end in wanted if key.endswith(end)), found)
        if found != dtype:
            raise CheckpointError(f"{file}: {key}: found {found}, wanted {dtype} with double_quant={double_quant}")


def packed_dtype(files: Iterable[str | os.PathLike]) -> torch.dtype:
    """The dtype that bitsandbytes' packed bytes are stored as, as the first 4-bit weight in these files has it."""
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (it is no dict)
                weight, state, _ = key.partition(".quant_state.bitsandbytes__")
                if state and weight in opened.keys():  # noqa: SIM118
                    return opened.get_slice(weight)[:1].dtype
    return torch.uint8


def _indexed(path: Path) -> list[str]:
    """The file names of an index."""
    if path.stat().st_size > _INDEX_LIMIT:
        raise CheckpointError(f"{path}: {path.stat().st_size} bytes, wanted at most {_INDEX_LIMIT}")
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: no index of a checkpoint ({type(error).__name__}: {error})") from error
    if not names or not all(isinstance(name, str) and "\0" not in name for name in names):
        raise CheckpointError(f"{path}: found file names {names[:3]}, wanted one or more strings")
    return names
