"""Managed memory: tensors that give themselves back, and states of an optimizer in them. Without a GPU over a stub of the
CUDA runtime (managed_stub), which keeps every call, the clocks of streams and the place of every page."""

import contextlib
import ctypes
import gc
import os
import re
import shutil
import subprocess
import sys
import textwrap
import warnings
from inspect import signature
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from managed_stub import stub
from managed_stub.stub import PAGE, Stub
from pager_mutants import MANAGED, verdicts

from nf4lora import managed, native_cuda
from nf4lora.managed import ALIGNMENT, HOME, RESERVE, allocate, places, room
from nf4lora.optim import pool
from nf4lora.optim.managed import Managed
from nf4lora.optim.memory import Layout
from nf4lora.optim.pager import Pager

CSRC = Path(__file__).parents[1] / "csrc"
DEVICE = torch.device("cuda", 0)
GIB = 1 << 30
CHUNK = PAGE // 4
LAYOUT = Layout(3 * CHUNK, (torch.float32, torch.int32), CHUNK)  # a chunk is a page in either arena
NAMES = "|".join(stub.ERRORS.values())


def settled(calls):
    """Nothing is held, though nothing was collected; nothing was done out of order, no error is left."""
    assert calls.get("live") == 0 and calls.get("last") == 0 and calls.get("device") == 0 and calls.get("mode") == 0
    assert calls.violations() == []


def ready(version=None):
    made = Stub(version)
    made.fail(0)
    made.set(card=8 * GIB, others=0, concurrent=1, device=0, capturing=-2, offset=4096, most_resident=0)
    made.record(), made.violations()
    return made


@pytest.fixture(params=[None, 12], ids=["toolkit", "cuda12"])
def calls(request):
    made = ready(request.param)
    yield made
    settled(made)


@pytest.fixture
def memory(calls):
    made = Managed(LAYOUT, DEVICE, calls=calls)
    yield made
    made.close()


# ---- the library


def source(name):
    return re.sub(r"//[^\n]*", "", (CSRC / name).read_text())


def test_structs_equal_the_compilers(tmp_path):
    structs = [managed.ManagedArena, managed.ManagedRange, managed.ManagedRoom, managed.ManagedHandle]
    assert re.findall(r"struct (\w+) \{", source("managed.h")) == [s.__name__ for s in structs]
    lines = [f'printf("%zu ", sizeof(nf4lora::{s.__name__}));' for s in structs]
    lines += [f'printf("%zu ", offsetof(nf4lora::{s.__name__}, {f}));' for s in structs for f, _ in s._fields_]
    program = '#include <cstddef>\n#include <cstdio>\n#include "managed.h"\nint main() {' + "".join(lines) + "}"
    command = [*os.environ.get("CXX", "c++").split(), "-x", "c++", "-", f"-I{CSRC}", "-o", tmp_path / "sizes"]
    subprocess.run(command, input=program, text=True, check=True)
    found = subprocess.run([tmp_path / "sizes"], capture_output=True, text=True, check=True).stdout.split()
    wanted = [ctypes.sizeof(s) for s in structs] + [getattr(s, f).offset for s in structs for f, _ in s._fields_]
    assert [int(n) for n in found] == wanted
    declared = re.findall(r"struct (\w+) \{(.*?)\};", source("managed.h"), re.DOTALL)
    assert [len(s._fields_) for s in structs] == [body.count(";") for _, body in declared]
    assert f"kManagedHome = {HOME};" in source("managed.h") and "kManagedAlignment = 2 << 20" in source("managed.h")


def declared():
    return set(re.findall(r"\w+ \*(nf4lora_cuda_managed_\w+)\(", source("api.h")))


def exported(*nm):
    out = subprocess.run(["nm", "--defined-only", *nm], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1] for line in out.splitlines()} - {"DW.ref.__gxx_personality_v0"}


@pytest.mark.parametrize("version", [None, 12])
def test_only_the_declared_functions_are_exported(version):
    assert exported("-g", stub.built(version, stub.SOURCE)) == declared() and len(declared()) == 14


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc compiles it for GPUs")
@pytest.mark.parametrize("arch", ["75", "90a"])
def test_nvcc_compiles_it(tmp_path, arch):
    flags = "-shared -O3 -std=c++17 -cudart static -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra -Xlinker --exclude-libs,ALL"
    command = ["nvcc", *flags.split(), "-Werror", "all-warnings", f"-gencode=arch=compute_{arch},code=sm_{arch}", f"-I{CSRC}"]
    subprocess.run([*command, stub.SOURCE, "-o", tmp_path / "one.so"], check=True)
    assert exported("-D", tmp_path / "one.so") == declared()


def test_a_library_without_it_says_so(monkeypatch):
    for answer, why in (((None, "it was not built"), "it was not built"), ((ctypes.CDLL(None), None), "of another version")):
        monkeypatch.setattr(native_cuda.CudaLibrary, "load", lambda self, answer=answer: answer)
        with pytest.raises(NotImplementedError, match=f"managed memory: .*{why}"):
            room(DEVICE, managed.Calls())


# ---- tensors


@pytest.mark.parametrize("offset", [0, 256, 4096, PAGE - 256])
@pytest.mark.parametrize("dtype", managed._DTYPES, ids=str)
def test_a_tensor_of_zeros_that_gives_itself_back(calls, dtype, offset):
    calls.set(offset=offset)
    (t,) = allocate([1000], [dtype], DEVICE, calls=calls)
    assert t.dtype == dtype and t.shape == (1000,) and not t.any() and t.data_ptr() % ALIGNMENT == 0
    assert room(DEVICE, calls) == (True, 8 * GIB - PAGE, 8 * GIB, PAGE, PAGE)
    view = t[10:20].view(2, 5)
    view += 1
    del t
    assert (view == 1).all() and calls.get("live") == 1
    del view
    assert calls.get("live") == 0 and room(DEVICE, calls).held == 0


@pytest.mark.parametrize("first", [0, 1, 2])
def test_each_gives_back_its_own(calls, first):
    tensors = list(allocate([PAGE, 2 * PAGE, 4 * PAGE], [torch.uint8] * 3, DEVICE, calls=calls))
    assert not tensors.pop(first).any()
    assert room(DEVICE, calls).held == sum(t.nbytes for t in tensors) == (7 - 2**first) * PAGE
    assert [places(t, calls) for t in tensors] == [(0, 0)] * 2
    calls.kernel(tensors, add=1)


def test_several_or_none_at_home_or_there(calls):
    with pytest.raises(TypeError, match=r"found torch.complex64, wanted one of \['torch.uint8'"):
        allocate([1, 1], [torch.uint8, torch.complex64], DEVICE, calls=calls)
    there = allocate([PAGE, 0, 5], [torch.uint8] * 3, DEVICE, calls=calls)
    home = allocate([PAGE, 0, 5], [torch.uint8] * 3, DEVICE, at_home=True, calls=calls)
    assert [t.numel() for t in there + home] == [PAGE, 0, 5] * 2
    assert [places(t, calls) for t in (there[0], home[2])] == [(0, 0), (HOME, 0)]
    assert [calls.place(t) for t in (there[0], there[2], home[0], home[2])] == [0, 0, -1, -1]
    assert room(DEVICE, calls)[3:] == (4 * PAGE, 2 * PAGE)
    calls.prefetch(there[0], HOME, 7)
    calls("advise", managed.ManagedRange(there[0].data_ptr(), PAGE, HOME))
    assert places(there[0], calls) == (HOME, HOME) and room(DEVICE, calls).resident == PAGE
    assert not [line for line in calls.record() if "FAILS" in line]


def test_places_of_halves(calls):
    (t,) = allocate([8 * PAGE], [torch.uint8], DEVICE, calls=calls)
    calls.prefetch(t[3 * PAGE : 4 * PAGE], HOME, 7)
    assert places(t, calls) == (None, 0) and room(DEVICE, calls).resident == 7 * PAGE


def test_moves_and_clears_in_pieces(calls):
    (t,) = allocate([160 << 20], [torch.uint8], DEVICE, at_home=True, calls=calls)
    calls.prefetch(t, 0, 7)
    record = calls.record()
    moved = [int(line.split()[1]) for line in record if line.startswith("cudaMemPrefetch")]
    cleared = [int(line.split()[1]) for line in record if line.startswith("cudaMemset")]
    assert cleared == [64 << 20, 64 << 20, 32 << 20] and moved == [n for n in cleared for _ in range(2)] + cleared


def test_it_never_fills_the_device_while_it_is_made(calls):
    """A piece of the device is enough for arenas at home."""
    calls.set(others=8 * GIB - (65 << 20))
    with pytest.raises(RuntimeError, match="wanted"):
        allocate([128 << 20], [torch.uint8], DEVICE, at_home=True, calls=calls)
    (t,) = allocate([128 << 20], [torch.uint8], DEVICE, at_home=True, allow_oversubscription=True, calls=calls)
    assert places(t, calls) == (HOME, HOME) and calls.get("most_resident") <= 65 << 20


def test_never_more_than_is_free(calls):
    calls.set(card=RESERVE + 10 * PAGE)
    refusal = rf"found room for {10 * PAGE} bytes.*wanted {11 * PAGE} beside the 0 held.*allow_oversubscription"
    with pytest.raises(RuntimeError, match=refusal):
        allocate([5 * PAGE + 1, 5 * PAGE], [torch.uint8] * 2, DEVICE, calls=calls)
    assert not [line for line in calls.record() if line.startswith("cudaMalloc")]
    there = allocate([6 * PAGE], [torch.uint8], DEVICE, calls=calls)  # of which the device has no more free
    home = allocate([3 * PAGE], [torch.uint8], DEVICE, at_home=True, calls=calls)  # and of which it has, but for this
    with pytest.raises(RuntimeError, match=f"found room for {10 * PAGE} bytes.*wanted {2 * PAGE} beside the {9 * PAGE} held"):
        allocate([PAGE + 1], [torch.uint8], DEVICE, calls=calls)
    more = allocate([PAGE], [torch.uint8], DEVICE, calls=calls)
    over = allocate([4 * PAGE], [torch.uint8], DEVICE, allow_oversubscription=True, calls=calls)
    assert [places(t, calls)[1] for t in (*there, *home, *more, *over)] == [0, 0, 0, HOME]
    other = torch.device("cuda", 1)
    assert room(other, calls).held == 0


def test_a_terabyte_is_refused_before_it_is_asked_for(calls):
    with pytest.raises(RuntimeError, match=f"wanted {1 << 40} beside"):
        allocate([1 << 40], [torch.uint8], DEVICE, calls=calls)
    with pytest.raises(RuntimeError, match="managed_allocate: found no such number"):
        allocate([1 << 62], [torch.float32], DEVICE, allow_oversubscription=True, calls=calls)


def test_another_device_is_current_only_meanwhile(calls):
    other = torch.device("cuda", 1)
    (t,) = allocate([5], [torch.uint8], other, calls=calls)
    assert calls.get("device") == 0 and places(t, calls) == (1, 1)


@pytest.mark.parametrize("consumed", [False, True])
def test_nothing_leaks_where_torch_refuses(calls, monkeypatch, consumed):
    taken = managed.from_dlpack

    def refuses(capsule):
        if consumed:
            taken(capsule)
        raise BufferError("no")

    monkeypatch.setattr(managed, "from_dlpack", refuses)
    with pytest.raises(BufferError, match="no"):
        allocate([5, 5], [torch.uint8] * 2, DEVICE, calls=calls)
    assert calls.get("live") == 0 and sum(line == "cudaFree" for line in calls.record()) == 1


def test_a_thousand_times(calls):
    def once():
        memory = Managed(Layout(512, (torch.float32,), 256), DEVICE, calls=calls)
        for chunk in range(2):
            memory.fetch(chunk), memory.wait(chunk), memory.used(chunk), memory.send(chunk)
        kept = memory.arenas(1)
        del memory
        assert calls.get("live") == 1
        del kept
        assert calls.get("live") == 0
        calls.record()

    def rss():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    gc.disable()  # nothing waits for a collection
    try:
        for _ in range(50):
            once()
        objects, grown = len(gc.get_objects()), []
        for _ in range(3):  # what leaks does so each time; other threads of the process may take memory once
            before = rss()
            for _ in range(1000):
                once()
            grown.append(rss() - before)
        assert min(grown) < 1 << 20 and len(gc.get_objects()) - objects < 50, grown
    finally:
        gc.enable()


def run(code, **env):
    folders = [str(Path(__file__).parent), *sys.path]
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(code)], check=False, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, folders))} | env,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


BEGIN = """
import os, sys, torch
from managed_stub.stub import Stub
from nf4lora import managed
from nf4lora.optim.managed import Managed
from nf4lora.optim.memory import Layout
calls, device, layout = Stub(), torch.device("cuda", 0), Layout(512, (torch.float32,), 256)
"""


def test_a_child_of_fork_is_refused_and_calls_nothing():
    code = """
    memory = Managed(layout, device, calls=calls)
    tensors = managed.allocate([5], [torch.uint8], device, calls=calls)
    calls.record()
    child = os.fork()
    if not child:
        for refused in (
            lambda: memory.fetch(0), lambda: memory.home(), lambda: Managed(layout, device, calls=calls),
            lambda: managed.allocate([5], [torch.uint8], device, calls=calls),
        ):
            try:
                refused()
            except RuntimeError as error:
                if "forked" not in str(error) or "spawn" not in str(error):
                    os._exit(2)
            else:
                os._exit(3)
        memory.close()
        del memory, tensors
        os._exit(4 if calls.record() else 0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    memory.fetch(0)
    memory.close()
    del tensors
    print(calls.get("live"))
    """
    assert run(BEGIN + textwrap.dedent(code)).split() == ["0", "0"]


@pytest.mark.parametrize("late", [False, True])
def test_the_end_of_the_process(tmp_path, late):
    """What is still held then goes with it: no call comes after exit handlers, and none fails before."""
    code = """
    import ctypes
    memory = Managed(layout, device, calls=calls)
    sys.kept = memory.arenas()
    sys.cycle = [memory]; sys.cycle.append(sys.cycle)
    if {late}:
        made, number = ctypes.c_void_p(), ctypes.c_int64()
        params = managed.ManagedArena(ctypes.pointer(made), ctypes.pointer(number), 5, 0, 0, 0, 1, 1, 8)
        calls("allocate", params, 7)
        calls.loaded.stub_keep(made)
    """
    run(BEGIN + textwrap.dedent(code).format(late=late), NF4LORA_STUB_LOG=str(tmp_path / "log"))
    assert [line for line in (tmp_path / "log").read_text().splitlines() if not line.endswith(" held")] == []


# ---- states of an optimizer


def test_all_begin_at_home_as_zeros(calls, memory):
    first, second = memory.home()
    assert memory.arenas() == memory.home() and (first.dtype, second.dtype) == LAYOUT.dtypes
    assert all(t.shape == (LAYOUT.numel,) and not t.any() and t.data_ptr() % ALIGNMENT == 0 for t in (first, second))
    calls.host((first, second))
    assert [calls.place(t) for t in (first, second)] == [-1, -1] and calls.get("resident") == 0


def test_a_chunk_there_and_back(calls, memory):
    memory.fetch(1)
    memory.wait(1)
    assert [t.numel() for t in memory.arenas(1)] == [CHUNK, CHUNK]
    assert [calls.place(t) for t in memory.arenas(1)] == [0, 0] and [calls.place(t) for t in memory.arenas(2)] == [-1, -1]
    calls.kernel(memory.arenas(1), add=3)
    memory.used(1)
    memory.send(1)
    assert calls.get("resident") == 0
    home = memory.home()
    calls.host(home)
    assert all((t[CHUNK : 2 * CHUNK] == 3).all() and not t[:CHUNK].any() and not t[2 * CHUNK :].any() for t in home)


def test_moves_are_on_a_stream_of_their_own(calls, memory):
    calls.record()
    memory.fetch(0), memory.wait(0), memory.used(0), memory.send(0)
    lines = [line for line in calls.record() if line != "cudaGetDevice"]
    (side,) = {line.split()[-1] for line in lines if line.startswith("cudaMemPrefetch")}
    assert int(side) > 1000 and not [line for line in lines if "Synchronize" in line or "Memcpy" in line]
    assert sum(line.startswith("cudaMemPrefetch") for line in lines) == 4 and len(lines) < 20


@pytest.mark.parametrize("wrong", ["no wait", "no fetch", "no used", "another stream", "home at once"])
def test_the_stub_finds_what_is_out_of_order(calls, memory, wrong):
    """Each is a use of the memory that breaks the contract."""
    if wrong != "no fetch":
        memory.fetch(0)
    if wrong != "no wait":
        memory.wait(0)
    calls.current = 8 if wrong == "another stream" else 7
    calls.kernel(memory.arenas(0))
    if wrong == "no used":
        memory.send(0)
    if wrong == "home at once":
        calls.host(memory.arenas(0))
    assert calls.violations()


ACTIONS = st.lists(st.tuples(st.sampled_from(["step", "step", "fetch", "send", "home", "stream"]), st.integers(0, 2)), max_size=30)


@pytest.mark.parametrize("version", [None, 12])
@settings(max_examples=60, deadline=None)
@given(actions=ACTIONS, oversubscribed=st.booleans())
def test_any_order_of_calls_keeps_the_contract(version, actions, oversubscribed):
    """Kernels find their chunk on the device, moves wait for them, nothing is lost, and streams may change in between."""
    calls = Stub(version)
    calls.set(card=RESERVE if oversubscribed else 8 * GIB, others=-GIB if oversubscribed else 0)
    layout = Layout(3 * PAGE, (torch.uint8,), PAGE)
    memory = Managed(layout, DEVICE, allow_oversubscription=True, calls=calls)
    there, wanted = set(), [0, 0, 0]
    for action, chunk in actions:
        if action == "stream":
            calls.current = 7 + chunk
        elif action == "fetch" or (action == "step" and chunk not in there):
            memory.fetch(chunk)
            there.add(chunk)
        elif action == "send" and chunk in there:
            memory.send(chunk)
            there.discard(chunk)
        elif action == "home":
            calls.host(memory.home())
            calls.kernel([memory.home()[0][chunk * PAGE : (chunk + 1) * PAGE]], add=1, anywhere=True)
            wanted[chunk] += 1
        if action == "step":
            memory.wait(chunk)
            calls.kernel(memory.arenas(chunk), add=1)
            memory.used(chunk)
            wanted[chunk] += 1
    home = memory.home()
    calls.host(home)
    assert [int(t[0]) for t in home[0].split(PAGE)] == wanted and all((t == t[0]).all() for t in home[0].split(PAGE))
    memory.close()
    del home, memory
    calls.set(card=8 * GIB, others=0)
    calls.record()
    settled(calls)


def scenario(calls, again=lambda operation: operation()):
    """Every method, on two streams; `again` runs each of its operations. Gives what the arenas hold then, one value a chunk."""
    calls.current = 7
    memory = again(lambda: Managed(LAYOUT, DEVICE, calls=calls))
    for _ in range(2):
        for chunk in (0, 2):
            again(lambda: memory.fetch(chunk))  # noqa: B023
            again(lambda: memory.wait(chunk))  # noqa: B023
            calls.kernel(memory.arenas(chunk), add=1)
            again(lambda: memory.used(chunk))  # noqa: B023
        calls.current = 8
        try:
            again(lambda: memory.send(0))
        finally:
            again(lambda: memory.wait(2))
            calls.kernel(memory.arenas(2), add=1)
            again(lambda: memory.used(2))
        again(lambda: memory.send(2))
    home = again(memory.home)
    calls.host(home)
    found = [[int(t[0]) for t in arena.split(CHUNK)] for arena in home]
    again(memory.close)
    return found


WANTED = [[2, 0, 4]] * 2


def test_every_call_failing_in_turn(calls):
    """Either the scenario ends with the error's name, or, where what failed was giving back, or a hint of where pages are
    going to be used, as if nothing had been; the hint says so."""
    calls.fail(0)
    assert scenario(calls) == WANTED
    total, raised, hints = calls.get("calls"), 0, 0
    assert total > 100
    for n in range(1, total + 1):
        error = list(stub.ERRORS)[n % len(stub.ERRORS)]
        calls.record()
        calls.fail(n, error)
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                assert scenario(calls) == WANTED
            (line,) = [line for line in calls.record() if line.endswith("FAILS")]
            hint = line.startswith("cudaMemPrefetchAsync")
            given = "cudaFree|cudaEventDestroy|cudaStreamDestroy|cudaGetDevice|cudaThreadExchange"
            assert hint or re.match(given, line), line
            assert [stub.ERRORS[error] in str(w.message) for w in said if w.category is RuntimeWarning] == [True] * hint
            hints += hint
        except RuntimeError as found:
            assert re.fullmatch(f"nf4lora cuda managed_\\w+: {stub.ERRORS[error]}", str(found))
            raised += 1
        calls.fail(0)
        settled(calls)
    assert raised > total * 0.7 and hints == 2 * 2 * 4  # there and back, twice, of two chunks of two arenas


def test_a_memory_that_could_not_be_made_holds_nothing(calls):
    """Not even while somebody looks at the exception."""
    Managed(LAYOUT, DEVICE, calls=calls).close()
    for n in range(1, calls.get("calls") + 1):
        calls.fail(n)
        try:
            Managed(LAYOUT, DEVICE, calls=calls).close()
        except RuntimeError as error:
            assert error.__traceback__ and calls.get("live") == 0, n
        calls.fail(0)


@pytest.mark.filterwarnings("ignore:paged optimizer:RuntimeWarning")
def test_what_failed_can_be_done_again(calls):
    """At once, on the same memory: a call that raised has done nothing that shows."""

    def again(operation):
        try:
            return operation()
        except RuntimeError as error:
            assert re.search(NAMES, str(error))
            return operation()

    scenario(calls)
    calls.fail(0)
    scenario(calls)
    for n in range(1, calls.get("calls") + 1):
        calls.record()
        calls.fail(n)
        assert scenario(calls, again) == WANTED, n
        calls.fail(0)
        settled(calls)


@pytest.mark.filterwarnings("ignore:paged optimizer:RuntimeWarning")
def test_a_chunk_that_failed_to_leave_is_still_there_for_the_next_use(calls, memory):
    memory.fetch(0), memory.wait(0)
    calls.kernel(memory.arenas(0), add=1)
    memory.used(0)
    raised = 0
    for n in range(1, 6):
        calls.record()
        calls.fail(n)
        try:
            memory.send(0)
            assert next(line for line in calls.record() if line.endswith("FAILS")).startswith("cudaMemPrefetch")
            calls.fail(0)
            memory.fetch(0)
        except RuntimeError as error:
            assert re.search(NAMES, str(error))
            raised += 1
        calls.fail(0)
        memory.wait(0)
        calls.kernel(memory.arenas(0), add=1)
        memory.used(0)
    assert raised == 3
    memory.send(0)
    assert (memory.home()[0][:CHUNK] == 6).all() and calls.get("resident") == 0


@contextlib.contextmanager
def failing_hints(calls, which, error=2):
    """The hints of these numbers, from 1, fail; gives the place of each as it comes."""
    hints, prefetch = [], calls.prefetch

    def hint(t, place, stream):
        hints.append(place)
        calls.fail(int(len(hints) in which), error)
        try:
            prefetch(t, place, stream)
        finally:
            calls.fail(0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calls, "prefetch", hint)
        yield hints


def steps_in_chunks(calls, which=(), error=2):
    """Two steps under a pager, some of whose hints fail. Gives what is home then, what was said, and the count of hints."""
    layout = Layout(5 * PAGE, (torch.uint8, torch.uint8), PAGE)
    memory = Managed(layout, DEVICE, calls=calls)
    pager = Pager(memory, budget=3 * layout.nbytes(0), ahead=1)
    with warnings.catch_warnings(record=True) as said, failing_hints(calls, which, error) as hints:
        warnings.simplefilter("always")
        for step in range(2):
            for chunk in (1, 4):
                pager.prefetch(chunk)
            for chunk in pager.stepping(range(layout.count)):
                calls.kernel(memory.arenas(chunk), add=step + chunk + 1)
    home = memory.home()
    calls.host(home)
    found = [t.clone() for t in home]
    memory.close()
    return found, said, len(hints)


def test_a_hint_that_fails_in_a_step_changes_no_bit_of_it(calls):
    wanted, said, count = steps_in_chunks(calls)
    assert not said and count > 20
    for n in range(1, count + 1):
        error = list(stub.ERRORS)[n % len(stub.ERRORS)]
        found, said, _ = steps_in_chunks(calls, (n, n + n % 3), error)
        assert all(map(torch.equal, found, wanted))
        (warning,) = said
        assert warning.category is RuntimeWarning and f"managed_prefetch: {stub.ERRORS[error]};" in str(warning.message)
        settled(calls)


def test_hints_that_fail_are_said_once(calls, memory):
    with failing_hints(calls, range(1, 7)):
        with pytest.warns(RuntimeWarning, match="cudaErrorMemoryAllocation"):
            memory.fetch(0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            memory.fetch(1), memory.fetch(2)


def test_a_hint_that_fails_keeps_the_order(calls, memory):
    """Also where warnings are errors: that one is raised when all is in order."""
    memory.fetch(0)
    memory.wait(0)
    calls.kernel(memory.arenas(0), add=1)
    memory.used(0)
    with failing_hints(calls, (1,)) as hints, warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="cudaErrorMemoryAllocation"):
            memory.send(0)
        memory.wait(0)
        assert hints == [HOME, HOME]
    calls.kernel(memory.arenas(0)[:1], add=1)


def test_under_the_pager(calls):
    """The budget holds on the pages of the device, from the start on."""
    layout = Layout(8 * PAGE, (torch.uint8, torch.uint8), PAGE)
    memory = Managed(layout, DEVICE, calls=calls)
    pager = Pager(memory, budget=3 * layout.nbytes(0), ahead=1)
    for _ in range(3):
        for chunk in (1, 4):
            pager.prefetch(chunk)
        for chunk in pager.stepping(range(layout.count)):
            calls.kernel(memory.arenas(chunk), add=1)
            assert calls.get("resident") <= 3 * layout.nbytes(0)
    assert all((t == 3).all() for t in memory.home())
    memory.close()
    with pytest.raises(RuntimeError, match="closed"):
        memory.fetch(0)
    assert calls.get("live") == 0


def test_tensors_outlive_the_memory(calls):
    memory = Managed(LAYOUT, DEVICE, calls=calls)
    t = memory.home()[0]
    memory.close()
    memory.close()
    assert calls.get("live") == 1 and not t.any()
    memory = Managed(LAYOUT, DEVICE, calls=calls)
    del memory  # without close
    assert calls.get("live") == 1
    del t


def test_nothing_moves_during_a_capture(calls, memory):
    memory.fetch(0)
    calls.set(capturing=7)
    for method in (
        lambda: memory.fetch(1), lambda: memory.send(0), lambda: memory.wait(0), lambda: memory.used(0), memory.home,
        lambda: Managed(LAYOUT, DEVICE, calls=calls), lambda: allocate([5], [torch.uint8], DEVICE, calls=calls),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="a CUDA graph is being captured on the current stream"):
            method()
    calls.set(capturing=-2)
    memory.wait(0)


def test_another_device_than_the_current_one(calls):
    """Whose default stream has the same handle as that of any other: null."""
    calls.current = 0
    memory = Managed(LAYOUT, torch.device("cuda", 1), calls=calls)
    for _ in range(2):
        memory.home()
        for chunk in range(LAYOUT.count):
            memory.fetch(chunk)
            memory.wait(chunk)
            memory.used(chunk)
            memory.send(chunk)
    assert calls.get("device") == 0 and not calls.violations()


def test_what_torch_keeps_for_later_is_room_too(calls, monkeypatch):
    calls.set(card=RESERVE + 16 * PAGE, others=10 * PAGE)
    monkeypatch.setattr(calls, "give_back", lambda: calls.set(others=0))
    (t,) = allocate([12 * PAGE], [torch.uint8], DEVICE, calls=calls)
    assert places(t, calls) == (0, 0)


def test_a_device_that_does_not_share(calls):
    calls.set(concurrent=0)
    with pytest.raises(NotImplementedError, match=r"cuda:0 has no concurrent access.*WSL, Windows and GPUs before sm_60"):
        Managed(LAYOUT, DEVICE, calls=calls)
    assert not [line for line in calls.record() if line.startswith("cudaMalloc")]


def test_oversubscription_is_asked_for(calls):
    calls.set(card=RESERVE + LAYOUT.numel)
    with pytest.raises(RuntimeError, match=f"wanted {8 * LAYOUT.numel} beside the 0 held"):
        Managed(LAYOUT, DEVICE, calls=calls)
    memory = Managed(LAYOUT, DEVICE, allow_oversubscription=True, calls=calls)
    assert [places(t, calls)[1] for t in memory.arenas()] == [HOME, HOME]
    assert memory.budget == 2 * LAYOUT.nbytes(0)
    memory.close()


@pytest.mark.parametrize(
    ("pages", "held", "budget"),
    [(16, 0, None), (15, 0, 15), (10, 0, 10), (10, 4, 6), (16, 1, 15), (17, 1, None), (4, 0, 4), (3, 0, 4), (9, 8, 4), (-100, 0, 4)],
)
def test_what_does_not_fit_is_stepped_within_what_does(calls, pages, held, budget):
    layout = Layout(8 * PAGE, (torch.uint8, torch.uint8), PAGE)  # a chunk is two pages
    calls.set(card=max(RESERVE + pages * PAGE, 100 * PAGE), others=max(0, 100 * PAGE - RESERVE - pages * PAGE))
    others = allocate([held * PAGE], [torch.uint8], DEVICE, held != 1, allow_oversubscription=True, calls=calls)
    memory = Managed(layout, DEVICE, allow_oversubscription=True, calls=calls)
    assert memory.budget == (budget if budget is None else budget * PAGE)
    pager = Pager(memory, memory.budget)
    assert pager.fits == (budget is None)
    if budget is not None and pages > 3:
        for chunk in pager.stepping(range(8)):
            calls.kernel(memory.arenas(chunk), add=1)
    memory.close()
    del others


def test_a_budget_is_found_where_the_user_names_none(calls):
    p, numel = torch.nn.Parameter(torch.zeros(8 * pool.CHUNK_BYTES // 8)), 8 * pool.CHUNK_BYTES // 8
    calls.set(card=RESERVE + 3 * pool.CHUNK_BYTES, others=0)
    kind = pool.Kind(torch.device("cpu"), torch.float32, 32)
    for budget, found in ((None, 3), (8, 8), (1, 1)):
        budget = budget and budget * pool.CHUNK_BYTES
        made = pool.Pool([p], "adamw", kind, lambda layout, cpu: Managed(layout, DEVICE, True, calls), budget)
        assert made.memory.layout.numel == numel and made.pager.fits == (found == 8)
        for chunk in range(8):
            made.pager.prefetch(chunk)
        assert made.pager.resident_bytes == min(found, 3 if budget is None else found) * pool.CHUNK_BYTES
        made.memory.close()


def test_planted_faults_are_found(figures, monkeypatch):
    """In what is new over the contract of every memory: hints that fail, and the budget of what does not fit."""
    budgets = test_what_does_not_fit_is_stepped_within_what_does.pytestmark[0].args[1]

    def check(module):
        monkeypatch.setitem(globals(), "Managed", module.Managed)
        for test, cases in (
            (test_hints_that_fail_are_said_once, [()]),
            (test_a_hint_that_fails_keeps_the_order, [()]),
            (test_what_does_not_fit_is_stepped_within_what_does, budgets),
            (test_an_index_of_nothing, [()]),
            (test_a_hint_that_fails_in_a_step_changes_no_bit_of_it, [()]),
        ):
            for case in cases:
                calls = ready()
                memory = [module.Managed(LAYOUT, DEVICE, calls=calls)] if "memory" in signature(test).parameters else []
                test(calls, *memory, *case)
                for made in memory:
                    made.close()
                settled(calls)

    def checked(module):
        try:
            check(module)
        finally:
            gc.collect()  # of what a test that failed holds

    alive = [fault for fault, found in verdicts("managed", MANAGED, checked).items() if not found]
    figures["faults planted in managed memory"] += len(MANAGED)
    figures["faults planted in managed memory and found"] += len(MANAGED) - len(alive)
    assert not alive, alive


def test_an_index_of_nothing(calls):
    held = allocate([PAGE], [torch.uint8], DEVICE, calls=calls)
    calls.set(others=8 * GIB)
    memory = Managed(Layout(0, (torch.float32,), 256), DEVICE, allow_oversubscription=True, calls=calls)
    assert [t.numel() for t in memory.home()] == [0] and not memory.layout.count and memory.budget is None
    memory.close()
    calls.set(others=0)
    del held


# ---- on a GPU: at most 4 GiB of managed memory, 256 MiB of it there

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@needs_gpu
class TestOnAGpu:
    """What only a driver shows. Nothing here holds more than is free."""

    device = torch.device("cuda", 0)
    budget = 256 << 20

    def layout(self, nbytes):
        return Layout(nbytes // 8, (torch.float32, torch.float32), (32 << 20) // 8)

    def test_tensors_are_of_the_device_and_zeros(self):
        for dtype in managed._DTYPES:
            (t,) = allocate([12_345], [dtype], self.device)
            assert t.device == self.device and t.dtype == dtype and not t.any() and t.data_ptr() % ALIGNMENT == 0
            assert torch.equal((t + 1).cpu(), torch.ones(12_345, dtype=dtype))

    def test_memory_comes_back(self):
        torch.zeros(1, device=self.device)
        torch.cuda.synchronize()
        before, held = torch.cuda.mem_get_info()[0], room(self.device).held
        (t,) = allocate([GIB], [torch.uint8], self.device)
        torch.cuda.synchronize()
        assert room(self.device).held == held + GIB
        assert before - torch.cuda.mem_get_info()[0] > 0.9 * GIB  # a prefetch that was over is seen in what is free
        del t
        assert room(self.device).held == held and torch.cuda.mem_get_info()[0] > before - (64 << 20)

    def test_a_thousand_times(self):
        before = torch.cuda.mem_get_info()[0]
        for _ in range(1000):
            memory = Managed(Layout(1 << 20, (torch.float32,), 1 << 19), self.device)
            memory.fetch(0), memory.wait(0), memory.used(0), memory.send(0)
            del memory
        assert torch.cuda.mem_get_info()[0] > before - (64 << 20) and room(self.device).held == 0

    @pytest.mark.timeout(300)
    def test_a_budget_of_256_mib_keeps_every_bit(self):
        layout = self.layout(2 * GIB)
        assert torch.cuda.mem_get_info()[0] > 8 * GIB
        memory = Managed(layout, self.device)
        pager = Pager(memory, budget=self.budget)
        plain = [torch.zeros(layout.numel, device=self.device) for _ in range(2)]
        for step in range(3):
            for chunk in pager.stepping(range(layout.count)):
                first, end = layout.span(chunk)
                generator = torch.Generator(self.device).manual_seed(chunk + step)
                noise = torch.randn(end - first, device=self.device, generator=generator)
                for t, p in zip(memory.arenas(chunk), plain, strict=True):
                    t.mul_(0.9).add_(noise)
                    p[first:end].mul_(0.9).add_(noise)
            assert pager.resident_bytes <= self.budget
        assert all(torch.equal(t, p) for t, p in zip(memory.home(), plain, strict=True))
        assert {places(t[: layout.chunk]) for t in memory.arenas()} <= {(HOME, 0), (0, 0)}
        memory.close()

    def test_more_than_is_free_is_refused(self):
        free = torch.cuda.mem_get_info()[0]
        with pytest.raises(RuntimeError, match="found room for"):
            Managed(self.layout(free // 256 * 256 + (1 << 30)), self.device)
        assert room(self.device).held == 0

    def test_nothing_moves_during_a_capture(self):
        memory = Managed(self.layout(64 << 20), self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), pytest.raises(RuntimeError, match="captured"):
            memory.fetch(0)

    def test_nothing_synchronizes(self):
        memory = Managed(self.layout(128 << 20), self.device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for chunk in range(memory.layout.count):
                memory.fetch(chunk), memory.wait(chunk), memory.used(chunk), memory.send(chunk)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        end = torch.cuda.Event()
        torch.cuda._sleep(500_000_000)
        memory.fetch(0), memory.wait(0), memory.used(0), memory.send(0)
        end.record()
        assert not end.query()
