"""Addresses in the machine's messages, as lines of kernel text."""

import re
import subprocess
from functools import cache
from pathlib import Path

_ROOT = f"{Path(__file__).resolve().parents[2]}/"
_ADDRESS = re.compile(r"(\S+\.so)\+0x([0-9a-f]+)")
# Kernels call what these define, inlined: the line that matters is the one that called.
_OURS = ("tests/cuda_on_host/cuda_on_host.h", "tests/cuda_on_host/verbs.h")


def resolve(message: str, library: Path | None = None) -> str:
    """`message` with each "lib.so+0x1234" replaced by "file:line", where the library's debug information knows it."""
    return _ADDRESS.sub(lambda found: _line(str(library or found[1]), found[2]) or found[0], message)


@cache
def _line(library: str, offset: str) -> str | None:
    # The address is where the call returns to, so the byte before it belongs to the call.
    command = ["addr2line", "-i", "-e", library, hex(int(offset, 16) - 1)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    known = [line for line in found.stdout.splitlines() if "?" not in line]
    frames = [re.sub(r" \(discriminator \d+\)", "", line).removeprefix(_ROOT) for line in known]
    kernel = [f for f in frames if not f.startswith("/usr/") and not f.rsplit(":", 1)[0].endswith(_OURS)]
    return (kernel or frames or [None])[0]
