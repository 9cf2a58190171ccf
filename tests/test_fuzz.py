"""F3: the ops with random operands, right and wrong, on the CUDA kernels under AddressSanitizer. See fuzz_ops.py.
F1: 4-bit weights with random damage; F2: adapters; F4: state dicts of optimizers; F5: round trips. See fuzz_states.py,
fuzz_adapters.py, fuzz_optim.py and fuzz_round_trips.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

from cuda_on_host import backend, build

HERE = Path(__file__).parent
SECONDS = os.environ.get("NF4LORA_FUZZ_SECONDS", "60")


def test_no_operands_break_the_kernels(figures):
    build.library(backend.SOURCES, "address")  # here: the compiler is slow under a sanitizer
    # Python does not load libstdc++ itself, and AddressSanitizer looks for what throws exceptions once, at its start.
    found = subprocess.run(["g++", "-print-file-name=libstdc++.so.6"], capture_output=True, text=True, check=True).stdout.strip()
    environment = os.environ | {"LD_PRELOAD": f"{build.libasan()} {Path(found).resolve()}", "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": str(HERE)}
    command = [sys.executable, "-m", "fuzz_ops", "--seconds", SECONDS, "--first", "0"]
    done = subprocess.run(command, env=environment, cwd=HERE, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, (done.stderr.split()[-1:], done.stdout[-3000:], done.stderr[-3000:])
    counts = json.loads(done.stdout.splitlines()[-1])
    for outcome, number in counts.items():
        figures[f"F3: ops with random operands under AddressSanitizer, {outcome}"] += number
    assert counts["equal"] > 100 and counts["refused"] > 100


def counted(module, figures, sentence):
    """What a target made of random cases, for as long as they are given; any finding fails."""
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", module, "--seconds", SECONDS]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, cwd=HERE, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-3000:])
    counts = json.loads(done.stdout.splitlines()[-1])
    for outcome, number in counts.items():
        figures[f"{sentence}, {outcome}"] += number
    return counts


def test_no_weights_break_what_reads_them(figures):
    counts = counted("fuzz_states", figures, "F1: damaged 4-bit weights")
    assert all(counts[f"{kind} {outcome}"] > 10 for kind in ("state", "layer", "folder") for outcome in ("refused", "taken"))


def test_no_adapter_breaks_a_model(figures):
    counts = counted("fuzz_adapters", figures, "F2: damaged adapters")
    assert all(counts[outcome] > 10 for outcome in ("ours refused", "ours taken", "by_peft refused by peft", "by_peft taken"))


def test_no_state_dict_breaks_the_optimizers(figures):
    counts = counted("fuzz_optim", figures, "F4: damaged state dicts of optimizers")
    assert counts["refused"] > 100 and counts["taken"] > 20


def test_what_is_saved_is_what_is_loaded(figures):
    counts = counted("fuzz_round_trips", figures, "F5: round trips of random")
    assert all(counts[kind] > 1 for kind in ("state", "layer", "model", "adapter", "by_peft", "folder"))
