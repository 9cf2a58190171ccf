"""What an install gives: from an sdist, editable, and without a compiler. Each works on a copy of the checkout."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(not NVCC, reason="nvcc builds the CUDA library")
# Nothing, or one architecture, as the kernels of every architecture are compiled by the install under test anyway.
NO_CUDA, ONE_ARCH = {"NF4LORA_CUDA_ARCHS": ""}, {"NF4LORA_CUDA_ARCHS": "80"}
TREE = ["pyproject.toml", "setup.py", "README.md", "csrc", "triton_kernels", "bench", "nf4lora"]


def run(*command, cwd, **env):
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=600
    )


def checked(*command, cwd, **env):
    done = run(*command, cwd=cwd, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A clean copy of what the build needs."""
    folder = tmp_path_factory.mktemp("tree")
    for name in TREE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    """The wheel that comes out of the sdist that comes out of the tree."""
    out = tmp_path_factory.mktemp("dist")
    checked(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, tree, cwd=out, **ONE_ARCH)
    assert len(list(out.glob("*.tar.gz"))) == 1
    (wheel,) = out.glob("*.whl")
    return wheel


def test_sdist_holds_every_source_with_nvcc_or_without(tree, wheel, tmp_path):
    checked(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", tmp_path, cwd=tree, **NO_CUDA)
    wanted = {p.relative_to(ROOT).as_posix() for s in ("*.h", "*.cuh", "*.cpp", "*.cu") for p in (ROOT / "csrc").rglob(s)}
    for sdist in (*wheel.parent.glob("*.tar.gz"), *tmp_path.glob("*.tar.gz")):
        held = {name.split("/", 1)[1] for name in tarfile.open(sdist).getnames() if "/" in name}
        assert "csrc/cuda/quantize.cu" in wanted <= held


def test_wheel_serves_every_python_and_torch(wheel):
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")


def test_wheel_holds_the_package_and_nothing_beside_it(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == {"nf4lora"}
    for wanted in ("libnf4lora_cpu.so", "nf4_codebook.csv", "nn/lora.py", "cli/__init__.py", "triton_kernels/__init__.py", "bench/suite.py"):
        assert f"nf4lora/{wanted}" in names
    assert not [n for n in names if "results" in n]
    assert ("nf4lora/libnf4lora_cuda.so" in names) == (NVCC is not None)


PROBE = """
import torch, nf4lora, nf4lora.triton_kernels
from nf4lora import native
assert native.host.load()[1] is None, native.host.load()[1]
layer = nf4lora.NF4LoRALinear(64, 32, r=4)
layer(torch.randn(3, 64)).sum().backward()
assert layer.lora_B.grad.shape == (32, 4)
try:
    import triton_kernels
except ModuleNotFoundError:
    print("ok", nf4lora.__file__)
"""


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    checked(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", folder, wheel, cwd=folder)
    return folder


def test_wheel_runs_where_it_is_installed(site, tmp_path):
    out = checked(sys.executable, "-c", PROBE, cwd=tmp_path, PYTHONPATH=str(site))
    assert out.startswith(f"ok {site}")


BENCH = """
import sys
from nf4lora.bench import suite
from nf4lora.cli.app import run
assert suite.__file__.startswith(sys.argv.pop()), suite.__file__
suite.QUICK = suite.Quick(shape=(96, 64), rounds=1)
sys.exit(run())
"""


def test_wheel_brings_its_benchmarks(site, tmp_path):
    """In a folder that holds nothing, and inside somebody else's history."""
    if shutil.which("git"):
        checked("git", "init", "-q", cwd=tmp_path)
    out = checked(sys.executable, "-c", BENCH, "bench", "quantize", "--device", "cpu", site, cwd=tmp_path, PYTHONPATH=str(site))
    assert "│ quantize 96 × 64" in out and "commit unknown" in out and "saved in nf4lora-bench" in out
    assert [p.name for p in (tmp_path / "nf4lora-bench").iterdir()] == ["cpu_quantize.json"]
    assert not (site / "nf4lora" / "bench" / "results").exists()


@needs_nvcc
def test_cuda_library_loads_anywhere_and_shows_its_own_functions_only(wheel, tmp_path):
    zipfile.ZipFile(wheel).extract("nf4lora/libnf4lora_cuda.so", tmp_path)
    library = tmp_path / "nf4lora" / "libnf4lora_cuda.so"
    ctypes.CDLL(str(library))  # CUDA's runtime is inside: no driver and no toolkit is needed
    names = [line.split()[-1] for line in checked("nm", "-D", "--defined-only", library, cwd=tmp_path).splitlines()]
    assert "nf4lora_cuda_quantize" in names and all(n.startswith("nf4lora_cuda_") for n in names)
    needed = re.findall(r"NEEDED.*\[(.*)\]", checked("readelf", "-d", library, cwd=tmp_path))
    assert not [n for n in needed if "cuda" in n or "torch" in n or "python" in n]


def test_editable_install_runs_from_the_tree(tree, tmp_path):
    checked(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv/bin/python"
    site = checked(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(("nf4lora", "__editable__", "__pycache__")) and not Path(site, entry.name).exists():
            Path(site, entry.name).symlink_to(entry)
    # The C compiler does too: importing peft's BOFT sets CXX to it.
    cxx = {"CXX": "gcc"} if shutil.which("gcc") else {}
    checked(python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "-e", tree, cwd=tmp_path, **NO_CUDA, **cxx)
    out = checked(python, "-c", PROBE, cwd=tmp_path)
    assert out.startswith(f"ok {tree}")


def test_install_without_a_compiler_says_what_is_missing(tree, tmp_path):
    done = run(sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path, cwd=tree, PATH=str(tmp_path), CXX="")
    assert done.returncode != 0
    assert "no C++ compiler found" in done.stderr and "apt install g++" in done.stderr


def test_install_with_a_compiler_that_is_not_there_says_so(tree, tmp_path):
    done = run(sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path, cwd=tree, CXX="no-such-compiler")
    assert done.returncode != 0
    assert "no C++ compiler found" in done.stderr


# A compiler that says how it was called and writes an empty file; as nvcc, it knows sm_80 and sm_90, and is 12.1 unless told.
PRETENDER = """#!/bin/sh
echo "called: $0 $*"
[ "$1" = --version ] && echo "Cuda compilation tools, release ${PRETENDED:-12.1}, V0"
[ "$1" = --list-gpu-code ] && echo sm_80 sm_90
while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done
"""


def built(tree, folder, *tools, **env):
    """What a build says on a machine of these tools, and the libraries it leaves."""
    (folder / "bin").mkdir()
    for tool in ("c++", *tools):
        (folder / "bin" / tool).write_text(PRETENDER)
        (folder / "bin" / tool).chmod(0o755)
    only = {"PATH": str(folder / "bin"), "CXX": "c++", "CUDA_HOME": "", "CUDA_PATH": ""} | env
    out = checked(sys.executable, "setup.py", "build_ext", "--build-lib", folder / "lib", "--build-temp", folder / "temp", cwd=tree, **only)
    return out, {p.name for p in (folder / "lib").rglob("*.so")}


def test_install_without_nvcc_says_so_and_goes_on(tree, tmp_path):
    out, libraries = built(tree, tmp_path, NF4LORA_CUDA_ARCHS="80")
    assert out.count("nf4lora: no nvcc found, going on without the CUDA kernels") == 1
    assert libraries == {"libnf4lora_cpu.so"}


def test_a_compiler_in_a_folder_with_a_space_is_named_as_in_a_shell(tree, tmp_path):
    folder = tmp_path / "my tools"
    folder.mkdir()
    out, libraries = built(tree, folder, **NO_CUDA, CXX=f"'{folder}/bin/c++' -DNAMED")
    assert libraries == {"libnf4lora_cpu.so"} and f"called: {folder}/bin/c++ -DNAMED -O3" in out


def test_an_nvcc_that_is_too_old_is_not_used(tree, tmp_path):
    out, libraries = built(tree, tmp_path, "nvcc", **ONE_ARCH, PRETENDED="12.0")
    assert out.count("nf4lora: found nvcc 12.0, wanted 12.1 or newer, going on without the CUDA kernels") == 1
    assert libraries == {"libnf4lora_cpu.so"}


def test_no_architecture_is_no_cuda_library(tree, tmp_path):
    out, libraries = built(tree, tmp_path, "nvcc", **NO_CUDA)
    assert out.count("nf4lora: NF4LORA_CUDA_ARCHS is empty, going on without the CUDA kernels") == 1
    assert libraries == {"libnf4lora_cpu.so"}


def test_machine_code_for_each_known_architecture_and_ptx_of_the_newest(tree, tmp_path):
    out, libraries = built(tree, tmp_path, "nvcc", NF4LORA_CUDA_ARCHS="80;90a, 999", NF4LORA_WERROR="1")
    assert out.count("nf4lora: this nvcc does not know sm_999, which the CUDA library will lack") == 1
    assert libraries == {"libnf4lora_cpu.so", "libnf4lora_cuda.so"}
    (call,) = [line for line in out.splitlines() if line.startswith("called:") and "-gencode" in line]
    targets = ["-gencode=arch=compute_80,code=[sm_80,compute_80]", "-gencode=arch=compute_90a,code=[sm_90a]"]
    assert [word for word in call.split() if word.startswith("-gencode")] == targets
    for flag in ("--fmad=false", "-cudart static", "-Xptxas -warn-spills,-warn-lmem-usage", "-Werror all-warnings -Xptxas -Werror", "-fvisibility=hidden"):
        assert flag in call


def test_nvcc_of_cuda_home_comes_first(tree, tmp_path):
    (tmp_path / "home" / "bin").mkdir(parents=True)
    (tmp_path / "home" / "bin" / "nvcc").write_text(PRETENDER)
    (tmp_path / "home" / "bin" / "nvcc").chmod(0o755)
    out, _ = built(tree, tmp_path, "nvcc", CUDA_HOME=str(tmp_path / "home"), **ONE_ARCH)
    assert f"called: {tmp_path}/home/bin/nvcc -gencode" in out and f"called: {tmp_path}/bin/nvcc" not in out


def test_the_bare_name_triton_kernels_is_refused():
    done = run(sys.executable, "-c", "import triton_kernels", cwd=ROOT, PYTHONSAFEPATH="")
    assert done.returncode != 0 and "nf4lora.triton_kernels" in done.stderr
