"""Other builds of csrc/cpu than setup.py's: under sanitizers, with planted bugs, with AMX emulated; alone with a driver in
C++ (drive.cpp), or in a copy of the package that the project's own tests run against. Flags and files are setup.py's own.
"""

import os
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
_SANITIZED = "-O1 -g1 -fno-omit-frame-pointer -fno-sanitize-recover=all"
# A vector that is one load of 64 bytes is checked at both of its ends; one that is masked, and a prefetch, are not.
ADDRESS = f"{_SANITIZED} -fsanitize=address,undefined".split()
THREAD = f"{_SANITIZED} -fsanitize=thread".split()
_EMULATED = ["-include", str(HERE / "amx_emulated.h")]


@cache
def tables() -> dict:
    """The names of setup.py, which builds nothing here."""
    with mock.patch("setuptools.setup"), mock.patch.dict(os.environ, NF4LORA_CUDA_ARCHS=""):
        return runpy.run_path(os.fspath(ROOT / "setup.py"))


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "g++"))


def run(command: Iterable[object], **kwargs) -> subprocess.CompletedProcess[str]:
    """The command, done, with what it said; RuntimeError with the compiler's words where one is not 0."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **kwargs)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(map(str, command))}\n{done.stderr}")
    return done


def patched(folder: Path, name: str, old: str, new: str) -> Path:
    """A copy of csrc under `folder`, in whose file `name` this text, found once, is another: a root for `objects`."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    file = folder / "csrc" / name
    assert file.read_text().count(old) == 1, f"{name} has another text by now"
    file.write_text(file.read_text().replace(old, new))
    return folder


def objects(
    folder: Path, isas: Iterable[str], flags: Iterable[str], root: Path = ROOT, only: str = "", emulated: bool = False
) -> dict[str, Path]:
    """Objects by name, "quantize.avx2" or "api", of the instruction sets; `only` those of a file. `emulated`: the tiles."""
    setup, isas = tables(), list(isas)
    extra = setup["ISAS"] | ({"amx": [f for f in setup["ISAS"]["amx"] if "amx" not in f] + _EMULATED} if emulated else {})
    jobs = {f"{stem}.{isa}": [*extra[isa], f"-DNF4LORA_ISA={isa}"]
            for stem in sorted(p.stem for p in (ROOT / "csrc/cpu").glob("*.cpp")) if stem not in setup["ONCE"] for isa in isas}  # fmt: skip
    built = "-DNF4LORA_ISAS(X)=" + "".join(f"X({isa})" for isa in reversed(isas))
    jobs |= {stem: [built, *(_EMULATED if emulated and stem == "api" else [])] for stem in setup["ONCE"]}
    jobs = {name: extra for name, extra in jobs.items() if not only or name.split(".")[0] == only}
    folder.mkdir(parents=True, exist_ok=True)
    base = [*compiler(), *setup["FLAGS"], f"-I{root / 'csrc'}", f"-I{ROOT / 'nf4lora'}", *flags]

    def compiled(name: str) -> tuple[str, Path]:
        run([*base, *jobs[name], "-c", root / f"csrc/cpu/{name.split('.')[0]}.cpp", "-o", folder / f"{name}.o"], cwd=root)
        return name, folder / f"{name}.o"

    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(compiled, jobs))


def link(out: Path, files: Iterable[Path], flags: Iterable[str]) -> Path:
    """A library where `out` is one by its name, else a program."""
    shared = ["-shared"] * (out.suffix == ".so")
    run([*compiler(), *shared, *flags, *files, "-ldl", "-pthread", "-o", out])
    return out


def driver(folder: Path, files: Iterable[Path], flags: Iterable[str]) -> Path:
    """drive.cpp with these objects of the library."""
    folder.mkdir(parents=True, exist_ok=True)
    return link(folder / "drive", [HERE / "drive.cpp", *files], ["-std=c++17", f"-I{ROOT / 'csrc'}", *flags])


def package(folder: Path, files: Iterable[Path], flags: Iterable[str]) -> Path:
    """A copy of the package, with these objects as its only library; `folder`, for PYTHONPATH."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "nf4lora", folder / "nf4lora", ignore=ignore)
    for inner in ("triton_kernels", "bench"):
        shutil.copytree(ROOT / inner, folder / "nf4lora" / inner, ignore=ignore)
    link(folder / "nf4lora" / "libnf4lora_cpu.so", files, flags)
    return folder


def preloads() -> str:
    """What LD_PRELOAD names in a Python that loads a library with AddressSanitizer, which looks once, at its start, for what
    throws exceptions."""
    return " ".join(os.fspath(Path(run([*compiler(), f"-print-file-name={name}"]).stdout.strip()).resolve())
                    for name in ("libasan.so", "libstdc++.so.6"))  # fmt: skip


def python(folder: Path, isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A module, and its arguments, on a copy of the package with AddressSanitizer, loaded with this instruction set."""
    check = ("import nf4lora, runpy, sys; from nf4lora import native\n"
             f"assert nf4lora.__file__.startswith({os.fspath(folder)!r}) and native.host.isa() == {isa!r}, native.host.isa()\n"
             "sys.argv = sys.argv[1:]; runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)")  # fmt: skip
    environment = os.environ | {"PYTHONPATH": os.fspath(folder), "PYTHONSAFEPATH": "1", "NF4LORA_CPU_ISA": isa,
                                "LD_PRELOAD": preloads(), "ASAN_OPTIONS": "detect_leaks=0"}  # fmt: skip
    command = [sys.executable, "-c", check, *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
