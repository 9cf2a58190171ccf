"""Builds nf4lora/libnf4lora_cpu.so and, where nvcc is, libnf4lora_cuda.so: plain C ABIs, loaded with ctypes, so that no
torch and no Python header is needed here. NF4LORA_CUDA_ARCHS names other architectures than the default; empty: none."""

import os
import platform
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES, CUDA_SOURCES = (sorted(str(p) for p in Path("csrc").glob(pattern)) for pattern in ("cpu/*.cpp", "cuda/*.cu"))
HEADERS = sorted(str(p) for p in [*Path("csrc").rglob("*.h"), *Path("csrc").rglob("*.cuh"), *Path("nf4lora").glob("*.csv")])
FLAGS = "-O3 -std=c++17 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -Wall -Wextra -Icsrc -Inf4lora".split()
# No device code is linked across files; nvlinks that run beside one another (--threads) have torn a file they share.
NVCC_FLAGS = ("-O3 -std=c++17 --fmad=false -cudart static --threads 2 --no-device-link -Xptxas -warn-spills,-warn-lmem-usage "
              "-Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra -Xlinker -z,relro,-z,now,--exclude-libs,ALL -Icsrc -Inf4lora").split()
STRICT = "-Werror all-warnings -Xptxas -Werror".split()  # set by CI; a newer nvcc's new warning is no reason not to install
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, *"-mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512".split()]
BF16 = [*AVX512, "-mavx512vbmi", "-mavx512bf16"]
WIDE = {"avx512": AVX512, "avx512vbmi": [*AVX512, "-mavx512vbmi"], "avx512bf16": BF16, "amx": [*BF16, "-mamx-tile", "-mamx-bf16"]}
ISAS = {"portable": []} | ({"avx2": AVX2} | WIDE if platform.machine() in ("x86_64", "AMD64") else {})
ONCE = ("api", "threads")  # compiled for the baseline processor; every other file once for each instruction set


def compiler() -> list[str]:
    words = shlex.split(os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), ""))
    if not words or not shutil.which(words[0]):
        raise SystemExit("nf4lora: no C++ compiler found. Install one (Debian, Ubuntu: apt install g++) or name it in CXX.")
    return words


def known(cxx: list[str]) -> dict[str, list[str]]:
    """The instruction sets whose flags the compiler takes: g++ 10 has no AMX, g++ 9 no bf16."""
    fails = {i: subprocess.run([*cxx, *more, "-xc++", "-E", os.devnull], capture_output=True).returncode for i, more in ISAS.items()}
    print("".join(f"nf4lora: this compiler does not know {isa}, which the library will lack\n" for isa in ISAS if fails[isa]), end="")
    return {isa: more for isa, more in ISAS.items() if not fails[isa]}


def cuda() -> list[str]:
    """nvcc and its targets, machine code of every wanted architecture and PTX of the newest; empty: no CUDA library."""
    wanted = [a for a in re.split(r"[\s;,]+", os.environ.get("NF4LORA_CUDA_ARCHS", "75 80 86 89 90a 100 120")) if a]
    folders = [*(f"{os.environ[v]}/bin" for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)), os.environ.get("PATH", "")]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(folders))
    why = "" if wanted and nvcc else "no nvcc found" if wanted else "NF4LORA_CUDA_ARCHS is empty"
    version = "" if why else subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    if (told := re.search(r"release (\d+)\.(\d+)", version)) and (int(told[1]), int(told[2])) < (12, 1):  # most 4 KiB of parameters
        why = f"found nvcc {told[1]}.{told[2]}, wanted 12.1 or newer"
    if why:
        print(f"nf4lora: {why}, going on without the CUDA kernels")
        return []
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    archs = [a for a in wanted if f"sm_{a.rstrip('af')}" in known]
    for arch in set(wanted) - set(archs):
        print(f"nf4lora: this nvcc does not know sm_{arch}, which the CUDA library will lack")
    ptx = max((a for a in archs if a.isdigit()), key=int, default="")
    return [nvcc, *(f"-gencode=arch=compute_{a},code=[sm_{a}{f',compute_{a}' if a == ptx else ''}]" for a in archs)] if archs else []


class BuildLibrary(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        out = self.get_ext_fullpath(ext.name)
        os.makedirs(os.path.dirname(out), exist_ok=True)
        if ext.name.endswith("cuda"):
            return self.spawn([*CUDA, "-shared", *NVCC_FLAGS, *STRICT * bool(os.environ.get("NF4LORA_WERROR")), *ext.sources, "-o", out])
        isas, flags = known(cxx := compiler()), [*FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        jobs = {f"{Path(s).stem}.{isa}": (s, [*extra, f"-DNF4LORA_ISA={isa}"])
                for s in ext.sources for isa, extra in isas.items() if Path(s).stem not in ONCE}  # fmt: skip
        best_first = "-DNF4LORA_ISAS(X)=" + " ".join(f"X({isa})" for isa in reversed(isas))
        jobs |= {stem: (f"csrc/cpu/{stem}.cpp", [best_first]) for stem in ONCE}
        os.makedirs(self.build_temp, exist_ok=True)
        objects = [f"{self.build_temp}/{name}.o" for name in jobs]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1) as pool:
            list(pool.map(lambda o, job: self.spawn([*cxx, *flags, *job[1], "-c", job[0], "-o", o]), objects, jobs.values()))
        self.spawn([*cxx, "-shared", *flags, *objects, "-Wl,-z,relro,-z,now", "-lstdc++", "-ldl", "-pthread", "-o", out])  # CXX may be gcc


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


CUDA = cuda()
LIBRARIES = [Extension("nf4lora.libnf4lora_cpu", SOURCES, depends=[*HEADERS, *CUDA_SOURCES])]  # for sdists made without nvcc
LIBRARIES += [Extension("nf4lora.libnf4lora_cuda", CUDA_SOURCES, depends=HEADERS)] if CUDA else []
setup(ext_modules=LIBRARIES, cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel})
