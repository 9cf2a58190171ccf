"""Checkpoint folders that are published whole or not at all: safetensors, JSON and text, never pickle.

A folder is written under a temporary name beside its target, every file flushed, `manifest.json` (size and SHA-256 of
the others) last, and renamed in one step. A kill leaves older checkpoints whole, and a temporary folder at most.
"""

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from . import atomic

MANIFEST, FORMAT = "manifest.json", "nf4lora-checkpoint-1"
JSON_LIMIT = 1 << 20
_STEP = re.compile(r"checkpoint-(\d{1,18})")


class CheckpointError(ValueError):
    """A checkpoint, or a file of one, that is incomplete, damaged or not what its manifest says."""


def save(root: str | os.PathLike, step: int, files: Mapping[str, bytes], keep: int = 2) -> Path:
    """Publish `root/checkpoint-<step>` and remove all but the `keep` newest checkpoints.

    `files` maps plain names to bytes. Raises: ValueError (a name that is not plain); OSError with the system's reason
    (no space, read-only, …): what was there is there still, and the temporary folder is gone.
    """
    target = Path(root) / f"checkpoint-{step}"
    publish(target, files)
    for old in [folder for _, folder in _numbered(Path(root)) if folder != target][keep - 1 :]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def publish(target: str | os.PathLike, files: Mapping[str, bytes]) -> None:
    """Write a folder of files and its manifest under a temporary name, flush them, and rename it to `target`.

    A `target` that exists is exchanged with it in one step, or where that is not to be had moved aside first, and back
    if the rename fails. Raises: as `save`.
    """
    target = Path(target)
    for name in files:
        _plain(name, target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        atomic.sweep(target.parent)
        with atomic.temporary(target.parent) as temp:
            entries = {}
            for name, data in files.items():
                atomic.write(temp / name, data)
                entries[name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
            atomic.write(temp / MANIFEST, json.dumps({"format": FORMAT, "files": entries}, indent=1).encode())
            atomic.flush(temp)
            atomic.move(temp, target)
    except OSError as error:
        message = f"cannot write {target}: {error.strerror or error}; what was saved before is untouched"
        raise OSError(error.errno, message) from error


def latest(root: str | os.PathLike) -> Path | None:
    """The newest complete checkpoint of `root`, every byte checked; None if there is none."""
    for _, folder in _numbered(Path(root)):
        with suppress(CheckpointError):
            read(folder)
            return folder
    return None


def read(folder: str | os.PathLike) -> dict[str, bytes]:
    """Every file of a checkpoint, read once and checked: name -> bytes.

    Raises: CheckpointError naming the file that is missing, damaged, a link, or not as the manifest describes it.
    """
    folder = Path(folder)
    manifest = parse_json(_read(folder / MANIFEST, JSON_LIMIT), folder / MANIFEST)
    entries = manifest.get("files")
    if manifest.get("format") != FORMAT or not isinstance(entries, dict):
        raise CheckpointError(f"{folder / MANIFEST}: found format {manifest.get('format')!r}, wanted {FORMAT!r}")
    files = {}
    for name, entry in entries.items():
        path = folder / _plain(name, folder)
        size = entry.get("size") if isinstance(entry, dict) else None
        if not isinstance(size, int) or size < 0:
            raise CheckpointError(f"{folder / MANIFEST}: {name!r} has no valid size")
        data = _read(path, size)
        if len(data) != size or hashlib.sha256(data).hexdigest() != entry.get("sha256"):
            raise CheckpointError(f"{path}: {len(data)} bytes that are not the {size} bytes the manifest describes")
        files[name] = data
    return files


def parse_json(data: bytes, path: str | os.PathLike) -> dict[str, Any]:
    """A JSON object of at most 1 MB without NaN or Infinity. Raises: CheckpointError naming the file."""
    if len(data) > JSON_LIMIT:
        raise CheckpointError(f"{path}: {len(data)} bytes of JSON, wanted at most {JSON_LIMIT}")

    try:
        value = json.loads(data, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: found a JSON {type(value).__name__}, wanted an object")
    return value


def parse_tensors(data: bytes, path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in new memory. Raises: CheckpointError naming the file."""
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: truncated or damaged safetensors file ({error})") from error


def _read(path: Path, limit: int) -> bytes:
    """At most limit + 1 bytes of a regular file, not through a link."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path}: not a regular file")
            return file.read(min(limit, status.st_size) + 1)
    except (OSError, MemoryError) as error:
        raise CheckpointError(f"{path}: cannot be read ({getattr(error, 'strerror', 'larger than memory')})") from error


def _no_number(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def _plain(name: Any, folder: Path) -> str:
    plain = isinstance(name, str) and os.path.basename(name) == name and "\0" not in name
    if not plain or name in ("", ".", "..", MANIFEST):
        raise CheckpointError(f"{folder}: file name {name!r} in a checkpoint, wanted a plain name")
    return name


def _numbered(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint folder, newest first."""
    folders = [entry for entry in root.glob("checkpoint-*") if entry.is_dir() and not entry.is_symlink()]
    return sorted(((int(m[1]), entry) for entry in folders if (m := _STEP.fullmatch(entry.name))), reverse=True)
