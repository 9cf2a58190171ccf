"""Checkpoints under kills, faults and damage: rows 23 and 26 … 28 of the fault table."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from nf4lora.hf import atomic, checkpoint
from nf4lora.hf.atomic import sweep
from nf4lora.hf.checkpoint import CheckpointError, latest, parse_tensors, publish, read, save

SIZE = 1 << 18


def files(step: int, size: int = SIZE) -> dict[str, bytes]:
    return {"a.safetensors": bytes([step % 251]) * size, "b.json": json.dumps({"step": step}).encode()}


def step_of(folder: Path) -> int:
    return json.loads(read(folder)["b.json"])["step"]


def temporaries(root: Path) -> list[Path]:
    return list(root.glob(atomic.TEMP + "*"))


def in_child(action) -> int:
    """Run `action` in a forked process. Returns its exit code: 0, or 1 after an exception."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_row26_sigkill_at_random_times_leaves_a_complete_newest_checkpoint(tmp_path):
    draw, left, step = random.Random(0), 0, 0
    save(tmp_path, 0, files(0))
    for _ in range(20):
        reports, send = os.pipe()
        pid = os.fork()
        if pid == 0:
            while True:
                step += 1
                save(tmp_path, step, files(step, 4 * SIZE))
                os.write(send, step.to_bytes(8, "little"))
        os.close(send)
        first = os.read(reports, 8)  # so that the kill falls into a save, not into the fork
        time.sleep(draw.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with os.fdopen(reports, "rb") as rest:
            reported = int.from_bytes((first + rest.read())[-8:], "little")
        step = step_of(latest(tmp_path))
        assert step in (reported, reported + 1)  # what save() returned for is there
        left += bool(temporaries(tmp_path))
        step = max(step, reported)
    assert left > 0, "no kill fell into a save: the test tested nothing"
    save(tmp_path, step + 1, files(step + 1))
    assert temporaries(tmp_path) == []
    assert step_of(latest(tmp_path)) == step + 1


@pytest.mark.parametrize("call", ["write_bytes", "fsync", "rename", "mkdtemp"])
def test_row26_a_fault_at_every_call_leaves_the_old_checkpoint(tmp_path, monkeypatch, call):
    save(tmp_path, 1, files(1))
    owner = {"write_bytes": Path, "rename": Path, "fsync": os, "mkdtemp": atomic.tempfile}[call]
    original, left = getattr(owner, call), None

    def faulty(*args, **kwargs):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, call, faulty)
    for allowed in range(10):
        left = allowed
        try:
            save(tmp_path, 2, files(2))
        except OSError as error:
            assert error.errno == errno.EIO and "checkpoint-2" in str(error) and "Input/output error" in str(error)
            assert temporaries(tmp_path) == []
            assert step_of(latest(tmp_path)) in ((1,) if call != "fsync" else (1, 2))
        else:
            break
    assert allowed > 0, "no fault was met"
    assert step_of(latest(tmp_path)) == 2


def test_row26_replacing_a_folder_rolls_back_when_the_rename_fails(tmp_path, monkeypatch):
    target = tmp_path / "adapter"
    publish(target, files(1))
    original = Path.rename

    def rename(self, to):
        if (
            to == target
            and (self / checkpoint.MANIFEST).exists()
            and json.loads((self / "b.json").read_bytes())["step"] == 2
        ):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(self, to)

    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)  # a file system that cannot exchange names
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(OSError, match="adapter"):
            publish(target, files(2))
    assert step_of(target) == 1 and temporaries(tmp_path) == []
    publish(target, files(3))
    assert step_of(target) == 3 and temporaries(tmp_path) == []


def test_row26_a_folder_is_replaced_in_one_step(tmp_path, monkeypatch):
    target = tmp_path / "adapter"
    publish(target, files(1))
    monkeypatch.setattr(Path, "rename", None)  # the two-step way is not taken
    publish(target, files(2))
    assert step_of(target) == 2 and temporaries(tmp_path) == []


def test_row26_a_living_saver_keeps_its_temporary_folder(tmp_path):
    with atomic.temporary(tmp_path) as temp:
        sweep(tmp_path)
        assert temp.is_dir()
    assert not temp.exists()
    dead = tmp_path / (atomic.TEMP + "dead")
    dead.mkdir()
    (dead / "part").write_bytes(b"x")
    sweep(tmp_path)
    assert not dead.exists()


def test_row27_file_size_limit(tmp_path):
    save(tmp_path, 1, files(1))

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, SIZE // 2))
        with pytest.raises(
            OSError, match=r"cannot write .*checkpoint-2: File too large; what was saved before is untouched"
        ):
            save(tmp_path, 2, files(2))

    assert in_child(limited) == 0
    assert step_of(latest(tmp_path)) == 1 and temporaries(tmp_path) == []


def test_row27_disk_full(tmp_path):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here ({mounted.stderr.strip()}); RLIMIT_FSIZE stands in for it")
    try:
        save(tmp_path, 1, files(1))
        with pytest.raises(OSError, match="checkpoint-2: No space left on device") as caught:
            save(tmp_path, 2, files(2, 4 * SIZE))
        assert caught.value.errno == errno.ENOSPC
        assert step_of(latest(tmp_path)) == 1 and temporaries(tmp_path) == []
        save(tmp_path, 2, files(2))
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_row27_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write .*Not a directory"):
        save(tmp_path / "file" / "output", 1, files(1))


DAMAGE = {
    "truncated": lambda f: os.truncate(f / "a.safetensors", SIZE - 1),
    "grown": lambda f: (f / "a.safetensors").write_bytes(files(3)["a.safetensors"] + b"x"),
    "one bit": lambda f: (f / "a.safetensors").write_bytes(b"\x02" + files(3)["a.safetensors"][1:]),
    "missing file": lambda f: (f / "b.json").unlink(),
    "missing manifest": lambda f: (f / "manifest.json").unlink(),
    "torn manifest": lambda f: os.truncate(f / "manifest.json", 40),
    "huge manifest": lambda f: (f / "manifest.json").write_bytes(b" " * (1 << 20) + (f / "manifest.json").read_bytes()),
    "link": lambda f: ((f / "b.json").rename(f / "c"), (f / "b.json").symlink_to(f / "c")),
    "pipe": lambda f: ((f / "b.json").unlink(), os.mkfifo(f / "b.json")),
    "other format": lambda f: (f / "manifest.json").write_text('{"format": "x", "files": {}}'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_row28_the_loader_takes_the_newest_complete_checkpoint(tmp_path, damage):
    for step in (1, 2, 3):
        save(tmp_path, step, files(step))
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["checkpoint-2", "checkpoint-3"]
    DAMAGE[damage](tmp_path / "checkpoint-3")
    with pytest.raises(CheckpointError, match=r"checkpoint-3/(a.safetensors|b.json|manifest.json)"):
        read(tmp_path / "checkpoint-3")
    assert step_of(latest(tmp_path)) == 2


def test_row28_order_is_by_number_and_no_checkpoint_is_none(tmp_path):
    assert latest(tmp_path / "absent") is None and latest(tmp_path) is None
    for step in (9, 10, 100):
        save(tmp_path, step, files(step), keep=3)
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-200").symlink_to(tmp_path / "checkpoint-9")
    assert latest(tmp_path).name == "checkpoint-100"


def test_row23_truncated_or_corrupt_safetensors():
    whole = safetensors.torch.save({"w": torch.arange(64.0), "v": torch.ones(3, 5)})
    assert parse_tensors(whole, "w.safetensors")["w"].equal(torch.arange(64.0))
    broken = [whole[:n] for n in range(0, len(whole), 7)]
    broken += [b"\xff" * 8 + whole[8:], whole[:8] + b"x" + whole[9:], whole + b"\0"]
    for data in broken:
        with pytest.raises(CheckpointError, match=r"w.safetensors: truncated or damaged"):
            parse_tensors(data, "w.safetensors")


def test_a_swept_folder_of_many_files_is_gone(tmp_path):
    dead = tmp_path / (atomic.TEMP + "x")
    shutil.copytree(save(tmp_path, 1, files(1)), dead)
    save(tmp_path, 2, files(2))
    assert temporaries(tmp_path) == []
