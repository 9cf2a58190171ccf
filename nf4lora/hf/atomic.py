"""Folders that appear, or take the place of another, in one step, and what a killed writer leaves swept."""

import ctypes
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

TEMP = ".nf4lora-tmp-"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def sweep(folder: Path) -> None:
    """Remove the temporary folders of dead savers; a living one holds a lock on its own."""
    for entry in folder.glob(TEMP + "*"):
        with suppress(OSError):
            lock = os.open(entry, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(entry)
            finally:
                os.close(lock)


@contextmanager
def temporary(parent: Path) -> Iterator[Path]:
    """A folder in `parent`, gone at the end unless it was moved, and safe from `sweep` until then."""
    temp = Path(tempfile.mkdtemp(prefix=TEMP, dir=parent))
    lock = os.open(temp, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield temp
    finally:
        os.close(lock)
        shutil.rmtree(temp, ignore_errors=True)  # holds what was replaced, or what could not be finished


def move(temp: Path, target: Path) -> None:
    """Give the folder `temp` the name `target`; one that has it already is exchanged with it."""
    if target.exists() and _exchange(temp, target):
        return flush(target.parent)
    with temporary(target.parent) if target.exists() else nullcontext() as replaced:
        if replaced:
            target.rename(replaced)
        try:
            temp.rename(target)
        except OSError:
            if replaced:
                replaced.rename(target)
            raise
    flush(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step, so that neither is ever absent; False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None or not renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        return renameat2 is not None
    if ctypes.get_errno() in (errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def write(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    path.write_bytes(data)
    flush(path)


def flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
