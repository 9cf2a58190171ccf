"""Compiles .cu files for the CPU, with the machine that runs them, into a library for ctypes.

Variants: "plain" (-O2); "address" (AddressSanitizer and UBSan, in a process that preloads libasan); "checker" (the
kernels' loads and stores report to checker.cpp). Libraries are kept by a hash of everything that went into them.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from ctypes import CDLL, c_char_p, c_int32, c_uint32, c_uint64, c_void_p
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
VARIANTS = ("plain", "address", "checker")

# -fno-gnu-unique: several of these libraries live in one process, each with its own machine.
_FLAGS = [
    "-std=c++17", "-g1", "-fPIC", "-ffp-contract=off", "-fno-gnu-unique", "-fstack-clash-protection",
    "-Wall", "-Wextra",
]  # fmt: skip
_OPTIMIZE = {
    "plain": ["-O2"],
    "address": ["-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "checker": ["-O2", "-DCUDA_ON_HOST_CHECKER"],
}
_MACHINE = ["-Wpedantic", "-Wshadow", "-Werror", "-fvisibility-inlines-hidden"]
_KERNELS = ["-Wno-unknown-pragmas"]
# GCC does not instrument a store whose value is what a call returns, if that is a struct, as bfloat16 and uint4 are: so
# everything is inlined that can be. Aggregates stay whole, so that a 16-byte access is one; equal branches stay apart,
# and calls calls, so that a line is the right one.
_INSTRUMENTED = [
    "-fsanitize=thread", "--param=tsan-distinguish-volatile=1", "--param=tsan-instrument-func-entry-exit=0",
    "--param=early-inlining-insns=100000", "--param=max-inline-insns-auto=100000",
    "--param=large-function-growth=100000", "--param=large-stack-frame-growth=100000",
    "-fno-tree-sra", "-fno-tree-tail-merge", "-fno-crossjumping", "-fno-optimize-sibling-calls",
]  # fmt: skip


def library(sources: Iterable[Path], variant: str = "plain", defines: Iterable[str] = ()) -> Path:
    """The library of these .cu files and the machine, built if it is not in the cache. `defines`: "NAME=VALUE".

    Raises: RuntimeError with the compiler's words, or what is missing to compile at all.
    """
    kernel_flags = [*_KERNELS, *(_INSTRUMENTED if variant == "checker" else []), *(f"-D{d}" for d in defines)]
    jobs = [(source, variant, _MACHINE) for source in sorted(HERE.glob("*.cpp"))]
    jobs += [(Path(source).resolve(), variant, kernel_flags) for source in sources]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda job: _object(*job), jobs))
    link = [_compiler(), "-shared", "-Wl,-Bsymbolic", *_OPTIMIZE[variant], *map(str, objects), "-ldl"]
    return _cached(_digest(*link), ".so", link)


def load(path: Path) -> CDLL:
    """The library, with the machine's own functions declared."""
    loaded = CDLL(os.fspath(path))
    declare(loaded)
    return loaded


def declare(loaded: CDLL) -> None:
    """Types of the control surface of runtime.h."""
    for name, result, *arguments in (
        ("schedule", None, c_uint32),
        ("resident", None, c_int32),
        ("register", None, c_void_p, c_uint64, c_int32, c_char_p),
        ("forget_all", None),
        ("build", c_char_p),
        ("profile", c_char_p),
        ("launches", c_char_p),
    ):
        function = getattr(loaded, f"cuda_on_host_{name}")
        function.argtypes, function.restype = arguments, result


def libasan() -> Path:
    """What LD_PRELOAD names in a process that loads an "address" library."""
    found = subprocess.run([_compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    return Path(found.stdout.strip()).resolve()


@cache
def _compiler() -> str:
    found = shutil.which("g++")
    if not found:
        raise RuntimeError("tests/cuda_on_host needs g++ (Debian, Ubuntu: apt install g++)")
    return found


@cache
def _cuda_include() -> str:
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    for home in filter(None, homes):
        if (Path(home) / "include" / "cuda_bf16.h").is_file():
            return str(Path(home) / "include")
    raise RuntimeError(f"cuda_bf16.h is in the include folder of none of {[str(h) for h in homes if h]}: "
                       "install the CUDA toolkit's headers, or name its folder in CUDA_HOME")  # fmt: skip


def _object(source: Path, variant: str, flags: list[str]) -> Path:
    includes = [f"-I{folder}" for folder in (source.parent, CSRC, ROOT / "nf4lora", HERE)]
    command = [_compiler(), *_FLAGS, *_OPTIMIZE[variant], *flags, f"-ffile-prefix-map={ROOT}/=", *includes,
               "-isystem", _cuda_include(), "-c", "-x", "c++", str(source)]  # fmt: skip
    headers = {*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh"), *HERE.rglob("*.h"), *(ROOT / "nf4lora").glob("*.csv"),
               *source.parent.glob("*.h"), *source.parent.glob("*.cuh")}  # fmt: skip
    if source.parent == HERE:  # the machine includes its own headers only, so that it is compiled once for all kernels
        headers = {HERE / "machine.h", HERE / "runtime.h"}
    return _cached(_digest(*command, *(p.read_bytes() for p in [source, *sorted(headers)])), ".o", command)


@cache
def _version() -> str:
    return subprocess.run([_compiler(), "--version"], capture_output=True, text=True, check=True).stdout


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256(_version().encode())
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
        digest.update(b"\0")
    return digest.hexdigest()[:24]


@cache
def _folder() -> Path:
    """Of the cache. What nobody asked for in a week goes."""
    default = Path(tempfile.gettempdir()) / f"nf4lora-build-{os.getuid()}"
    folder = Path(os.environ.get("NF4LORA_BUILD_CACHE") or default)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for path in folder.iterdir():
        try:
            if path.stat().st_mtime < time.time() - 7 * 24 * 3600:
                path.unlink()
        except FileNotFoundError:  # another process was first
            continue
    return folder


def _cached(name: str, suffix: str, command: list[str]) -> Path:
    """The command's output file, made under another name and renamed: of two builders at a time, both are right."""
    folder = _folder()
    path = folder / f"{name}{suffix}"
    if path.exists():
        os.utime(path)
        return path
    handle, temporary = tempfile.mkstemp(suffix=suffix, prefix=name, dir=folder)
    os.close(handle)
    try:
        # In one folder, which the debug information names.
        done = subprocess.run([*command, "-o", temporary], cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        if done.stderr:
            print(done.stderr)
        os.rename(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path
