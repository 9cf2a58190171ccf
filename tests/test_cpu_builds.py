"""The host library under AddressSanitizer, UBSan and ThreadSanitizer, and its AMX kernels where no processor has AMX.

AddressSanitizer and UBSan run the project's own tests on a copy of the package. ThreadSanitizer runs a driver without torch,
where threads.cpp starts threads: torch's pool is libgomp's, whose barriers ThreadSanitizer does not know. That the pool is
torch's own is tested without it. Each sanitizer has to find a planted bug too.
"""

import os
import shutil
import subprocess
import sys

import cpu_builds
import pytest
from cpu_builds import ADDRESS, THREAD
from test_native import ISAS, processor_has

from nf4lora.heuristics import LinearPath

BEST = [isa for isa in ISAS if processor_has(isa)][-1]
REAL = list(dict.fromkeys(("portable", "avx2" if processor_has("avx2") else "portable", BEST)))
EMULATED = processor_has("avx512bf16")  # what an AMX kernel uses beside the tiles
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")


def emulated():
    if not EMULATED:
        pytest.skip("not run here: this processor has no avx512bf16, which the AMX kernels need beside their tiles")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Objects by name, a copy of the package and a driver, of every instruction set that is tested here."""
    at, isas = tmp_path_factory.mktemp("address"), [isa for isa in REAL if isa != "amx"] + ["amx"] * EMULATED
    objects = cpu_builds.objects(at, isas, ADDRESS, emulated=True)
    return objects, cpu_builds.package(at / "package", objects.values(), ADDRESS), cpu_builds.driver(at / "driver", objects.values(), ADDRESS)


@pytest.fixture(scope="module")
def threads(tmp_path_factory):
    """Objects by name, and a driver under ThreadSanitizer."""
    at = tmp_path_factory.mktemp("threads")
    objects = cpu_builds.objects(at, REAL, THREAD)
    return objects, cpu_builds.driver(at / "driver", objects.values(), THREAD)


def drive(driver, isa):
    """What the driver said of its run, and its reports."""
    environment = os.environ | {"NF4LORA_CPU_ISA": isa, "ASAN_OPTIONS": "detect_leaks=1"}
    return subprocess.run([driver, str(len(LinearPath))], env=environment, capture_output=True, text=True, timeout=600, check=False)


# ---- AddressSanitizer and UBSan

TESTS = ("tests/test_quantize.py", "tests/test_dequantize.py", "tests/test_linear_exact.py", "tests/test_linear_accuracy.py",
         "tests/test_optim_step.py", "tests/test_swiglu.py")  # fmt: skip
CHOSEN = ("(cpu and (quantize or identity and True or one_hot or nan_and_inf or bytes_are or check_finds or swiglu)"
          " or tiling or larger_than or alignment or every_output or neighbours) and not (opcheck or -reference or triton or cuda)")  # fmt: skip


def project_tests(address, isa, *arguments):
    return cpu_builds.python(address[1], isa, "pytest", "-q", "--capture=sys", "-p", "no:cacheprovider", "--timeout=600", *arguments)


@pytest.mark.parametrize("isa", REAL)
def test_the_projects_tests_under_address_sanitizer(address, figures, isa):
    done = project_tests(address, isa, *TESTS, "-k", CHOSEN)
    assert done.returncode == 0 and "Sanitizer" not in done.stderr, done.stdout[-3000:] + done.stderr[-3000:]
    count = int(done.stdout.split(" passed")[0].split()[-1])
    figures["tests of the project that ran under AddressSanitizer and UBSan"] += count
    assert count > 100


PLANTED = {  # where: file of the object, file of the bug, text, the bug, what is reported
    "vectors beyond a buffer": (
        "lora", "cpu/gemm.h", "team * floats * sizeof(float)", "(team * floats - line_floats) * sizeof(float)", "AddressSanitizer: heap-",
    ),
    "a sum that overflows": (
        "quantize", "cpu/quantize.cpp", "const char *quantize(const QuantizeParams &p) {",
        "const char *quantize(const QuantizeParams &p) {\n    int64_t sum = INT64_MAX;\n    if ((sum += p.numel) == 77)\n        return nullptr;",
        "signed integer overflow",
    ),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_the_sanitizers_find(address, tmp_path, bug):
    only, file, old, new, report = PLANTED[bug]
    root = cpu_builds.patched(tmp_path, file, old, new)
    objects = address[0] | cpu_builds.objects(tmp_path / "objects", ["portable"], ADDRESS, root, only)
    done = drive(cpu_builds.driver(tmp_path, objects.values(), ADDRESS), "portable")
    assert done.returncode != 0 and report in done.stderr and "csrc" in done.stderr, done.stderr[-3000:]
    folder = cpu_builds.package(tmp_path / "package", objects.values(), ADDRESS)
    done = project_tests((None, folder), "portable", "-x", "tests/test_quantize.py", "tests/test_linear_exact.py", "-k", "cpu and bytes_equal or tiling")
    assert done.returncode != 0 and report in done.stderr, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.parametrize("isa", REAL)
def test_nothing_leaks(address, isa):
    done = drive(address[2], isa)
    assert done.returncode == 0 and done.stdout.startswith(f"{isa} "), done.stderr[-3000:]


def test_a_leak_is_found(address, tmp_path):
    root = cpu_builds.patched(tmp_path, "cpu/gemm.h", "    free(memory);\n    return nullptr;\n", "    return nullptr;\n")
    objects = address[0] | cpu_builds.objects(tmp_path / "objects", ["portable"], ADDRESS, root, "lora")
    done = drive(cpu_builds.driver(tmp_path, objects.values(), ADDRESS), "portable")
    assert done.returncode != 0 and "detected memory leaks" in done.stderr and "lora" in done.stderr, done.stderr[-3000:]


# ---- ThreadSanitizer


@pytest.mark.parametrize("isa", REAL)
def test_no_race_and_the_same_bytes(threads, figures, isa):
    done = drive(threads[1], isa)
    assert done.returncode == 0 and not done.stderr, done.stderr[-3000:]
    name, compared = done.stdout.split()
    assert name == isa and int(compared) > 1000
    figures["outputs of threads compared under ThreadSanitizer"] += int(compared)


RACES = {
    "a count that is not atomic": ("threads", "cpu/threads.cpp", "share.next.fetch_add(1, std::memory_order_relaxed)", "(*reinterpret_cast<int64_t *>(&share.next))++"),
    "scratch that threads share": ("lora", "cpu/gemm.h", "memory + thread * floats", "memory + 0 * thread * floats"),
}


@pytest.mark.parametrize("race", RACES)
def test_thread_sanitizer_finds(threads, tmp_path, race):
    only, file, old, new = RACES[race]
    root = cpu_builds.patched(tmp_path, file, old, new)
    objects = threads[0] | cpu_builds.objects(tmp_path / "objects", REAL[:1] if only != "threads" else REAL, THREAD, root, only)
    done = drive(cpu_builds.driver(tmp_path, objects.values(), THREAD), "portable")
    assert done.returncode != 0 and "data race" in done.stderr, done.stderr[-3000:]


# ---- AMX


def amx_test(folder):
    flags = ["-std=c++17", "-Wall", "-Wextra", *cpu_builds.tables()["AVX512"], *ADDRESS, "-include", cpu_builds.HERE / "amx_emulated.h"]
    return cpu_builds.link(folder / "amx_test", [cpu_builds.HERE / "amx_test.cpp"], flags)


def test_the_emulated_tiles(tmp_path):
    """What they compute, and ten misuses of which each ends the process."""
    emulated()
    program = amx_test(tmp_path)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout == "4096 shapes\n", done.stdout + done.stderr
    said = {}
    for misuse in range(1, 11):
        done = subprocess.run([program, str(misuse)], capture_output=True, text=True, check=False)
        assert done.returncode != 0
        said[misuse] = "AddressSanitizer: global-buffer-overflow" if misuse == 10 else done.stderr.strip()
        assert said[misuse] in done.stderr
    tile, match = "AMX: a tile that is not configured", "AMX: shapes that do not match"
    assert list(said.values())[:-1] == [tile, "AMX: an unknown palette", match, match, match, "AMX: a shape that no tile can have",
                                        "AMX: more tiles than there are", tile, tile]  # fmt: skip


def test_the_amx_kernels_on_emulated_tiles(address, figures):
    emulated()
    done = cpu_builds.python(address[1], "amx", "nf4lora.selftest", "cpu")
    assert done.returncode == 0 and " 0 failed" in f" {done.stdout.splitlines()[-1]}", done.stdout[-3000:] + done.stderr[-3000:]
    done = project_tests(address, "amx", *TESTS, "-k", CHOSEN)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    done = drive(address[2], "amx")
    assert done.returncode == 0 and done.stdout.startswith("amx "), done.stderr[-3000:]


COUNT = """
import ctypes, torch
from nf4lora import linear_4bit, native
from nf4lora.testing import assert_exact, check_exact, exact_case
products = ctypes.c_int64.in_dll(native.host.load()[0], "nf4lora_amx_products")
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    check_exact(exact_case(64, 96, 130, 16, dtype))
    print(products.value)
case, before = exact_case(16, 96, 128, 16, torch.bfloat16), products.value
y = linear_4bit(case.x, case.packed, case.state, case.bias, case.lora_A, case.lora_B, case.scaling)
assert_exact(y, case.truth().y.bfloat16())
print(products.value - before)
"""


def test_the_amx_kernels_multiply_in_tiles(address, tmp_path):
    """In bfloat16, and there only."""
    emulated()
    (address[1] / "count_products.py").write_text(COUNT)
    done = cpu_builds.python(address[1], "amx", "count_products")
    assert done.returncode == 0, done.stderr[-3000:]
    none, still, many, few = map(int, done.stdout.split())
    assert none == still == 0 and many > 100 and few == 3 * 2 * 4  # 32 rows of W at a time, 16 of them a tile, 32 of K a product


def test_the_shipped_amx_objects_have_the_instruction(tmp_path):
    amx, others = ["amx"], [isa for isa in ISAS if isa not in ("amx", "portable")][-1:]
    if "amx" not in cpu_builds.tables()["ISAS"]:
        pytest.skip("not run here: no x86-64")
    objects = cpu_builds.objects(tmp_path, amx + others, ["-O1"], only="linear_bwd")
    code = {name: subprocess.run(["objdump", "-d", file], capture_output=True, text=True, check=True).stdout for name, file in objects.items()}
    assert "tdpbf16ps" in code["linear_bwd.amx"] and "ldtilecfg" in code["linear_bwd.amx"] and "tilerelease" in code["linear_bwd.amx"]
    assert "tdpbf16ps" not in code[f"linear_bwd.{others[0]}"]


# ---- the pool is torch's

POOL = """
import hashlib, os, sys, threading, time, torch
from nf4lora import dequantize_4bit, linear_4bit, quantize_4bit

def tasks():
    return set(os.listdir("/proc/self/task"))

def ours(rows=40, blocks=None):
    g = torch.Generator().manual_seed(0)
    weight, x = torch.randn(96, 320, generator=g), torch.randn(rows, 320, generator=g).bfloat16()
    packed, state = quantize_4bit(weight, 64)
    small, small_state = quantize_4bit(weight.flatten()[:192], 64)  # three blocks: fewer parts than threads
    y = linear_4bit(x, packed, state)
    parts = packed, dequantize_4bit(packed, state), dequantize_4bit(small, small_state), y
    return hashlib.sha256(b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in parts)).hexdigest()

def theirs():
    return torch.exp(torch.ones(1 << 20)).sum()
"""
SAME_THREADS = POOL + """
torch.set_num_threads(2)
theirs()
others = len(tasks()) - 2  # beside the pool
for threads in (2, 3, 64, 3):
    torch.set_num_threads(threads)
    theirs()
    until = time.monotonic() + 30  # the threads that a smaller pool lets go end in their own time
    while len(before := tasks()) > others + threads and time.monotonic() < until:
        time.sleep(0.01)
    assert len(before) == others + threads, (threads, others, len(before))
    ours()
    during = tasks()
    theirs()
    assert before == during == tasks(), (threads, len(before), before ^ during, during ^ tasks())
    print(ours())
torch.set_num_threads(1)
print(ours())
assert tasks() == before
"""
AT_ONCE = POOL + """
wanted, found = ours(), []
for threads in (1, 2, 3, 64):
    def work():
        torch.set_num_threads(threads)
        for _ in range(3):
            found.append(ours())
            theirs()
    many = [threading.Thread(target=work) for _ in range(4)]
    for t in many: t.start()
    for t in many: t.join()
assert len(found) == 48 and set(found) == {wanted}, found
"""
INSIDE = POOL + """
import ctypes
torch.set_num_threads(3)
wanted, found = ours(), []
body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: found.append(ours()))
ctypes.CDLL(torch.__path__[0] + "/lib/libtorch_cpu.so").GOMP_parallel(body, None, 3, 0)
assert found == [wanted] * 3, found
"""
FORKED = POOL + """
torch.set_num_threads(2)
theirs()
if len(sys.argv) > 2:  # the child is the first to call an op
    child = os.fork()
    if not child:
        ours()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
wanted = ours()
theirs()
child = os.fork()
if not child:
    torch.set_num_threads(int(sys.argv[1]))
    os._exit(0 if ours() == wanted else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert ours() == wanted
"""
LOADED = POOL + """
class Data(torch.utils.data.Dataset):
    def __len__(self): return 4
    def __getitem__(self, i): return ours()
if __name__ == "__main__":
    torch.set_num_threads(2)
    wanted = ours()
    theirs()
    found = [h for batch in torch.utils.data.DataLoader(Data(), num_workers=2, multiprocessing_context="fork") for h in batch]
    assert found == [wanted] * 4
"""


def python(code, *arguments):
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_ops_run_on_the_threads_that_torch_has():
    """The process has the same threads after an op of ours, of few parts too, and after the next one of torch's: none was
    started, none ended and started anew. Results are the same for any number of threads."""
    assert len(set(python(SAME_THREADS).split())) == 1


def test_ops_of_several_threads_at_once():
    python(AT_ONCE)


def test_ops_inside_a_parallel_region_of_torchs_pool():
    python(INSIDE)


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_ops_in_a_forked_process(threads):
    """The child has none of the pool's threads, and libgomp would wait for them, as it does in torch's own ops."""
    python(FORKED, str(threads))
    python(FORKED, str(threads), "first")


def test_ops_in_a_data_loaders_workers():
    python(LOADED)
