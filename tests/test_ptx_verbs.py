"""The verbs of csrc/ptx.cuh: kernels made of them are exact on whole numbers for every tail, misuse is refused, and the
same text compiles for cards."""

import itertools
import re
import shutil
import subprocess

import numpy as np
import pytest
from cuda_on_host import build, driver

KERNELS = build.HERE / "kernels"


@pytest.fixture(scope="module")
def device():
    """The machine of a sample kernel's library, plain."""
    made = {}

    def of(name):
        if name not in made:
            made[name] = driver.Device(build.library([KERNELS / f"{name}.cu"]))
        return made[name]

    return of


SEEDS = (0, 1, 2, 3)


@pytest.mark.parametrize(("half", "rounded", "transposed"), list(itertools.product((0, 1), repeat=3)))
def test_gemm_mma_is_exact(device, figures, half, rounded, transposed):
    shapes = [(1, 8, 8), (2, 72, 64), (63, 64, 72), (64, 56, 128), (65, 8, 136), (130, 136, 200)]
    if not transposed:
        shapes += [(3, 1, 8), (17, 63, 24), (64, 65, 64), (1, 131, 72)]
    for (M, N, K), seed in zip(shapes, itertools.cycle(SEEDS), strict=False):
        driver.gemm_mma(device("gemm_mma"), seed, M, N, K, half, rounded, transposed)
        figures["products of sample kernels on the host machine, bit-equal"] += M * N


@pytest.mark.parametrize("from_registers", (0, 1))
def test_gemm_wgmma_is_exact(device, figures, from_registers):
    sizes = (1, 7, 8, 9, 63, 64, 65, 129)
    for i, (M, N) in enumerate(zip(sizes, (65, 1, 64, 8, 7, 63, 130, 9), strict=True)):
        driver.gemm_wgmma(device("gemm_wgmma"), SEEDS[i % 4], M, N, 64 * (1 + i % 5), from_registers)
        figures["products of sample kernels on the host machine, bit-equal"] += M * N


@pytest.mark.parametrize("ordered", (True, False))
@pytest.mark.parametrize(
    ("N", "K", "splits"), [(1, 1, 1), (63, 5, 2), (64, 64, 3), (65, 100, 8), (200, 7, 7), (70, 3, 5)]
)
def test_splitk_is_exact(device, ordered, N, K, splits):
    for seed in SEEDS:
        driver.splitk(device("splitk_flags"), seed, N, K, splits, ordered)


@pytest.mark.parametrize("numel", (1, 31, 32, 33, 127, 128, 129, 1000, 4097))
def test_reductions_are_exact(device, numel):
    reduce = device("reduce")
    for seed, blocks in zip(SEEDS, (1, 2, 3, 7), strict=True):
        driver.summary(reduce, seed, numel, blocks)
        driver.reverse(reduce, seed, numel, blocks)
        driver.handoff(reduce, seed, numel)


# What kernels/misuse.cu does, in its order: threads of the block, what must be said
MISUSES = (
    ("ldmatrix of a misaligned row", 32, "misaligned at {}: ldmatrix needs 16-byte alignment"),
    ("ldmatrix outside of shared memory", 32, "out of bounds at {}: ldmatrix"),
    ("ldmatrix by half a warp", 16, "partial warp at {}: ldmatrix"),
    ("mma by half a warp", 48, "partial warp at {}: mma"),
    ("mma in a branch", 32, "divergent|deadlock"),
    ("cp.async to a misaligned address", 32, "misaligned at {}: cp.async to shared"),
    ("cp.async from a misaligned address", 32, "misaligned at {}: cp.async from global"),
    ("cp.async outside of shared memory", 32, "out of bounds at {}: cp.async"),
    ("bulk copy to a misaligned address", 32, "misaligned at {}"),
    ("bulk copy of 24 bytes", 32, "misaligned at {}: .*24 bytes"),
    ("bulk copy on a barrier nobody made", 32, "uninitialised mbarrier at {}"),
    ("wgmma by three warps", 96, "partial warpgroup at {}"),
    ("wgmma of a matrix beyond shared memory", 128, "out of bounds at {}: wgmma"),
    ("wgmma of a matrix off 1024 bytes", 128, "misaligned at {}: wgmma"),
    ("wgmma of a matrix without swizzle", 128, "bad descriptor at {}"),
    ("wgmma not waited for", 128, "wgmma in flight at exit at {}"),
    ("bulk copy not waited for", 32, "bulk copy in flight at exit at {}"),
)


@pytest.mark.parametrize("which", range(len(MISUSES)), ids=[m[0] for m in MISUSES])
def test_misuse_is_refused_where_it_stands(device, which):
    _, threads, says = MISUSES[which]
    misuse = device("misuse")
    with misuse.memory(0):
        out, values = misuse.empty("out", 128, np.float32), misuse.put("global", np.zeros(64, np.uint8))
        with pytest.raises(RuntimeError) as error:
            misuse.run("misuse", driver.c_int32(which), values, out, driver.c_int32(threads))
    assert re.search(says.format(r"[^ ]*misuse\.cu:\d+, block [^:]*"), str(error.value)), error.value


def test_cp_async_has_three_sizes(tmp_path):
    (tmp_path / "sizes.cu").write_text(
        '#include "ptx.cuh"\nvoid f(char *s, char *g) { nf4lora::cp_async<12>(s, g); }\n'
    )
    with pytest.raises(RuntimeError, match="cp.async copies 4, 8 or 16 bytes"):
        build.library([tmp_path / "sizes.cu"])


def test_every_verb_has_both_bodies_and_a_kernel_that_uses_it():
    device_half = (
        (build.CSRC / "ptx.cuh").read_text().split("#define NF4LORA_SHARED")[1].split("#endif\n\nnamespace")[0]
    )
    verbs = set(re.findall(r"^NF4LORA_DEVICE \w+ (\w+)\(", device_half, re.MULTILINE)) - {"shared_address"}
    assert verbs == set(
        re.findall(r"^using cuda_on_host::verbs::(\w+);", (build.HERE / "verbs.h").read_text(), re.MULTILINE)
    )
    kernels = "".join(p.read_text() for p in (*KERNELS.glob("*.cu"), *build.CSRC.rglob("*.cu"), build.CSRC / "tile.cuh"))
    assert [v for v in sorted(verbs) if not re.search(rf"\b{v}\b", kernels)] == []


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("name", ["gemm_mma", "gemm_wgmma", "splitk_flags", "reduce", "wrappers", "misuse", "on_card"])
def test_samples_compile_for_every_card(name, tmp_path):
    """Also for those without the instructions, where a kernel that uses them is a trap."""
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ("75", "80", "90", "90a", "100", "120")]
    command = ["nvcc", "-std=c++17", "-O3", "-Werror", "all-warnings", "-Xptxas", "-warn-spills", f"-I{build.CSRC}",
               *targets, "-t", "2", "-c", str(KERNELS / f"{name}.cu"), "-o", str(tmp_path / "out.o")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
