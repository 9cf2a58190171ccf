"""Builds nf4lora/libnf4lora_cpu.so: a plain C ABI, loaded with ctypes, so no torch and no Python header is needed here."""

import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = sorted(str(p) for p in Path("csrc/cpu").glob("*.cpp"))
HEADERS = sorted(str(p) for p in [*Path("csrc").rglob("*.h"), *Path("nf4lora").glob("*.csv")])
FLAGS = "-O3 -std=c++17 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra -Icsrc -Inf4lora".split()
X86 = platform.machine() in ("x86_64", "AMD64")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, *"-mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512".split()]
ISAS = {"portable": []} | ({"avx2": AVX2, "avx512": AVX512} if X86 else {})


def compiler() -> list[str]:
    found = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not found or not shutil.which(found.split()[0]):
        raise SystemExit("nf4lora: no C++ compiler found. Install one (Debian, Ubuntu: apt install g++) or name it in CXX.")
    return found.split()


def openmp(cxx: list[str]) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        probe = subprocess.run([*cxx, "-fopenmp", "-shared", "-fPIC", "-x", "c++", "-", "-o", f"{folder}/probe.so"],
                               input="#include <omp.h>\nint n() { return omp_get_max_threads(); }", text=True, capture_output=True)
    if probe.returncode:
        print("nf4lora: this compiler has no OpenMP; the CPU kernels will run on one thread")
    return [] if probe.returncode else ["-fopenmp"]


class BuildLibrary(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        cxx = compiler()
        # api.cpp chooses among the instruction sets; every other file is compiled once for each.
        flags = [*FLAGS, *openmp(cxx), *os.environ.get("CXXFLAGS", "").split()]
        jobs = {f"{Path(s).stem}.{isa}": (s, [*extra, f"-DNF4LORA_ISA={isa}"])
                for s in ext.sources if Path(s).stem != "api" for isa, extra in ISAS.items()}  # fmt: skip
        jobs["api"] = ("csrc/cpu/api.cpp", [])
        os.makedirs(self.build_temp, exist_ok=True)
        objects = [f"{self.build_temp}/{name}.o" for name in jobs]
        for target, (source, extra) in zip(objects, jobs.values()):
            self.spawn([*cxx, *flags, *extra, "-c", source, "-o", target])
        out = self.get_ext_fullpath(ext.name)
        os.makedirs(os.path.dirname(out), exist_ok=True)
        self.spawn([*cxx, "-shared", *flags, *objects, "-Wl,-z,relro,-z,now", "-o", out])


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(ext_modules=[Extension("nf4lora.libnf4lora_cpu", SOURCES, depends=HEADERS)],
      cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel})
