"""What an install gives: from an sdist, editable, and without a compiler. Each works on a copy of the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TREE = ["pyproject.toml", "setup.py", "README.md", "csrc", "triton_kernels", "nf4lora"]


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
    checked(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, tree, cwd=out)
    assert len(list(out.glob("*.tar.gz"))) == 1
    (wheel,) = out.glob("*.whl")
    return wheel


def test_wheel_serves_every_python_and_torch(wheel):
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")


def test_wheel_holds_the_package_and_nothing_beside_it(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == {"nf4lora"}
    for wanted in ("libnf4lora_cpu.so", "nf4_codebook.csv", "nn/lora.py", "cli/__init__.py", "triton_kernels/__init__.py"):
        assert f"nf4lora/{wanted}" in names


PROBE = """
import torch, nf4lora, nf4lora.triton_kernels
from nf4lora import native
assert native.host.load()[1] is None, native.library()[1]
layer = nf4lora.NF4LoRALinear(64, 32, r=4)
layer(torch.randn(3, 64)).sum().backward()
assert layer.lora_B.grad.shape == (32, 4)
try:
    import triton_kernels
except ModuleNotFoundError:
    print("ok", nf4lora.__file__)
"""


def test_wheel_runs_where_it_is_installed(wheel, tmp_path):
    checked(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", tmp_path / "site", wheel, cwd=tmp_path)
    out = checked(sys.executable, "-c", PROBE, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert out.startswith(f"ok {tmp_path}")


def test_editable_install_runs_from_the_tree(tree, tmp_path):
    checked(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv/bin/python"
    site = checked(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(("nf4lora", "__editable__", "__pycache__")) and not Path(site, entry.name).exists():
            Path(site, entry.name).symlink_to(entry)
    checked(python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "-e", tree, cwd=tmp_path)
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


def test_the_bare_name_triton_kernels_is_refused():
    done = run(sys.executable, "-c", "import triton_kernels", cwd=ROOT, PYTHONSAFEPATH="")
    assert done.returncode != 0 and "nf4lora.triton_kernels" in done.stderr
