"""The placement policy: properties on a simulated page table, and what each call may do; faults planted in it are found."""

import weakref
from dataclasses import replace
from inspect import signature
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from pager_mutants import PAGER, POOL, drawn, verdicts
from paging import SCENARIO, UINT8, Case, Play, Step, Watched, cases, orderly, passing, unruly

from nf4lora.optim import pool
from nf4lora.optim.memory import Layout, Resident
from nf4lora.optim.pager import Pager
from nf4lora.optim.simulated import Clocks, Injected, Simulated, Unordered

pytestmark = pytest.mark.usefixtures("one_thread")


def pager_of(budget, ahead=1, layout=UINT8):
    memory = Simulated(layout, max(layout.nbytes(0), 10**9 if budget is None else budget))
    return Pager(memory, budget, ahead), memory


def launch(memory, chunks):
    """Launches on each chunk as it comes; returns their order."""
    done = []
    for chunk in chunks:
        memory.touch(chunk, lambda t: t.add_(1))
        done.append(chunk)
    return done


@settings(max_examples=3000)
@given(cases(orderly=True))
def test_transfers_are_those_of_an_exact_lru_and_ahead_of_their_use(case):
    orderly(case, Pager)


@settings(max_examples=2500)
@given(cases())
def test_contents_are_those_of_a_run_without_paging(case):
    unruly(case, Pager)


@settings(max_examples=1000)
@given(cases(failures=True))
def test_failing_calls_lose_nothing(case):
    unruly(case, Pager)


@settings(max_examples=2000)
@given(cases(orderly=True, stays=False))
def test_what_does_not_stay_comes_if_there_is_room_and_goes_when_it_was_stepped(case):
    passing(case, Pager)


@settings(max_examples=2500)
@given(cases(stays=False))
def test_contents_of_what_does_not_stay_are_those_of_a_run_without_paging(case):
    unruly(case, Pager)


@settings(max_examples=1000)
@given(cases(failures=True, stays=False))
def test_failing_calls_lose_nothing_of_what_does_not_stay(case):
    unruly(case, Pager)


def failing_at_every_call(pager):
    steps = [Step(**vars(step) | {"at_once": True}) for step in SCENARIO]
    crowded = [Step(**vars(step) | {"others": (0, 1024)}) for step in SCENARIO]
    for case in (
        *(Case(UINT8, budget, ahead, steps) for budget, ahead in ((1024, 1), (1280, 2), (300, 1), (None, 1))),
        *(Case(UINT8, None, ahead, crowded, room=room) for ahead, room in ((1, 1536), (2, 2304), (1, 3000))),
        Case(UINT8, None, 1, steps, room=2304),
    ):
        calls = unruly(case, pager).memory.calls
        for n in range(1, calls + 1):
            play = unruly(replace(case, fail_at=(n, n + 1 + n % 5)), pager)
            assert play.errors
            kept = [weakref.ref(t) for t in (*play.memory._home, *play.memory._device)]
            play.memory.close()
            assert not any(ref() is not None for ref in kept)
    return calls


def test_each_call_fails_in_turn():
    assert failing_at_every_call(Pager) > 30


def test_a_fetch_that_nothing_needed_has_to_go_for():
    pager, memory = pager_of(1024)
    for chunk in (3, 1, 0, 3):  # the third has no room beside what was announced
        pager.prefetch(chunk)
    assert memory.resident == {1, 3} and memory.fetches == 2 and memory.sends == 0
    assert launch(memory, pager.stepping([1])) == [1]
    pager.prefetch(0)  # 3 was not stepped
    assert memory.resident == {0, 1}
    pager.prefetch(2)
    assert memory.resident == {0, 1}


def test_what_the_system_may_have_sent_home_is_fetched_again_once_a_step(monkeypatch):
    for slips in (False, True):
        memory = Simulated(UINT8, 10**6)
        monkeypatch.setattr(memory, "slips", slips, raising=False)
        fetched = []
        pager = Pager(memory)
        with pager.all():
            pass
        monkeypatch.setattr(memory, "fetch", fetched.append)
        for _ in range(2):
            for chunk in (1, 1, 0, 1):
                pager.prefetch(chunk)
            with pager.all():
                pass
        assert fetched == ([1, 0, 1, 0] if slips else [])


def test_what_is_there_comes_first_and_the_least_recently_used_goes():
    pager, memory = pager_of(1024)
    assert launch(memory, pager.stepping([0, 1, 2, 3])) == [0, 1, 2, 3]
    assert memory.resident == {2, 3}
    assert launch(memory, pager.stepping([0, 1, 2, 3])) == [2, 3, 0, 1]
    assert memory.fetches == 6
    launch(memory, pager.stepping([0]))
    launch(memory, pager.stepping([2]))
    assert memory.resident == {0, 2}


@pytest.mark.parametrize("ahead", (0, 1, 2, 3))
def test_as_many_are_ahead_as_was_said(ahead):
    pager, memory = pager_of(None, ahead)
    for n, _ in enumerate(pager.stepping([0, 1, 2, 3, 4])):
        assert len(memory.resident) == min(n + 1 + ahead, 5)


def test_none_comes_ahead_of_one_that_is_wanted_before_it():
    pager, memory = pager_of(800, ahead=2)
    for n, chunk in enumerate(pager.stepping([0, 1, 4])):
        assert memory.resident == ({0}, {1, 4}, {1, 4})[n]
        memory.touch(chunk, torch.Tensor.zero_)


def test_a_chunk_larger_than_the_budget_comes_alone_and_goes():
    pager, memory = pager_of(300)
    for chunk in pager.stepping([0, 4, 1]):
        assert memory.resident == {chunk}
        memory.touch(chunk, torch.Tensor.zero_)
    assert memory.resident == set() and not pager.fits
    pager.prefetch(0)
    assert memory.resident == set()
    pager.prefetch(4)
    assert memory.resident == {4}


def test_all_at_once():
    pager, memory = pager_of(None)
    assert pager.fits
    for _ in range(3):
        with pager.all() as arenas:
            assert arenas[0].numel() == UINT8.numel and memory.resident == set(range(5))
    assert memory.fetches == 5 and pager.resident_bytes == UINT8.numel
    assert pager.make_room(1) == 512 and memory.resident == {1, 2, 3, 4}
    with pytest.raises(KeyError), pager.all():
        raise KeyError
    assert pager.make_room(10**9) == UINT8.numel and pager.resident_bytes == 0
    assert pager.make_room(1) == 0
    pager, _ = pager_of(UINT8.numel - 1)
    with pytest.raises(ValueError, match="2304 bytes of states, wanted at most the budget of 2303"), pager.all():
        raise AssertionError("entered")


def passing_pager(capacity=1536, ahead=1):
    memory = Simulated(UINT8, capacity, stays=False)
    return Pager(memory, None, ahead), memory


def test_room_is_asked_for_once_a_step_and_only_by_what_is_not_here():
    pager, memory = passing_pager(1024)
    asked, has_room = [], memory.has_room
    memory.has_room = lambda chunk: asked.append(chunk) or has_room(chunk)
    for _ in range(2):
        asked.clear()
        for chunk in (0, 0, 1, 2, 2, 0, 3):
            pager.prefetch(chunk)
        assert asked == [0, 1, 2, 3] and memory.resident == {0, 1}
        assert launch(memory, pager.stepping([1])) == [1] and not memory.resident


def test_what_was_sent_home_may_be_announced_again():
    for pager, memory in (passing_pager(), pager_of(1024)):
        for _ in range(2):
            pager.prefetch(0), pager.prefetch(0)
            assert memory.resident == {0} and pager.make_room(1) == 512 and memory.resident == set()


def test_a_step_sends_home_what_it_does_not_need_where_memory_ends():
    pager, memory = passing_pager()
    for chunk in (0, 1, 2):
        pager.prefetch(chunk)
    memory.others = 512  # came after them
    assert launch(memory, pager.stepping([1, 3])) == [1, 3]
    assert [c for name, c in memory.log if name == "send"] == [1, 0, 3, 2] and memory.resident == set()
    pager.prefetch(0)
    memory.others = 1100
    for step in (pager.stepping([1]), pager.stepping([0, 1])):
        with pytest.raises(torch.OutOfMemoryError):
            launch(memory, step)
    with pytest.raises(torch.OutOfMemoryError), pager.all():
        raise AssertionError("entered")
    memory.whole = False
    with pytest.raises(ValueError, match="2304 bytes .* and room for it"), pager.all():
        raise AssertionError("entered")
    memory.others = 0
    assert memory.resident == set() and launch(memory, pager.stepping([4, 0])) == [4, 0]


def test_room_that_is_not_there_after_all_is_no_error_of_what_nobody_asked_for():
    pager, memory = passing_pager(512)
    memory.hopeful = True
    for chunk in (1, 0, 2):
        pager.prefetch(chunk)
    assert memory.resident == {1} and pager.resident_bytes == 512
    assert launch(memory, pager.stepping([0, 1, 2])) == [1, 0, 2]


def test_a_step_that_is_left_early_or_fails_leaves_nothing_on_the_device():
    pager, memory = passing_pager(2304)
    for chunk in (3, 4):
        pager.prefetch(chunk)
    chunks = pager.stepping([0, 1, 3])
    next(chunks)
    chunks.close()
    assert memory.resident == set() and memory.log[-1] == ("trim", -1)
    with pytest.raises(KeyError), pager.all():
        raise KeyError
    assert memory.resident == set() and memory.log[-1] == ("trim", -1)


def test_what_comes_and_goes_gives_its_room_back_when_asked_but_not_in_a_step():
    pager, memory = passing_pager(2304)
    pager.prefetch(0)
    assert pager.make_room(1) == 512 and memory.log[-2:] == [("send", 0), ("trim", -1)]
    chunks = pager.stepping([0, 1, 2])
    next(chunks)
    assert pager.make_room(10**9) == 512 and memory.log[-1] == ("send", 1)
    chunks.close()


def test_room_is_not_made_of_what_is_launched_on():
    pager, memory = pager_of(None)
    for chunk in pager.stepping([0, 1, 2]):
        assert pager.make_room(10**9) > 0
        assert memory.resident == {chunk}
        memory.touch(chunk, torch.Tensor.zero_)


def test_a_chunk_whose_turn_it_is_comes_whatever_is_needed_later():
    pager, memory = pager_of(1280, ahead=2)
    for n, chunk in enumerate(pager.stepping([4, 0, 1])):
        if not n:
            assert memory.resident == {4, 0, 1}
            assert pager.make_room(512) == 512
            pager.prefetch(2)
            assert memory.resident == {4, 1, 2}
        memory.touch(chunk, torch.Tensor.zero_)
    assert memory.log[-1] == ("used", 1)


def test_what_a_step_that_is_left_launched_on_is_marked_then():
    pager, memory = pager_of(1024)
    chunks = pager.stepping([0, 1])
    memory.touch(next(chunks), torch.Tensor.zero_)
    chunks.close()
    assert memory.log[-2:] == [("touch", 0), ("used", 0)]


def test_a_step_that_another_overtakes_says_so():
    pager, memory = pager_of(1024)
    first, second = pager.stepping([0, 1]), pager.stepping([1, 0])
    next(first)
    assert next(second) == 1
    with pytest.raises(RuntimeError, match="chunk 0: another step began"):
        next(first)
    memory.touch(1, torch.Tensor.zero_)
    assert next(second) == 0
    memory.touch(0, torch.Tensor.zero_)
    second.close()
    assert pager.make_room(10**9) == 1024


def test_bad_arguments_are_refused_before_anything_moves():
    pager, memory = pager_of(1024)
    for act in (lambda: pager.prefetch(5), lambda: pager.prefetch(-1), lambda: list(pager.stepping([0, 5]))):
        with pytest.raises(IndexError, match="wanted one of 5"):
            act()
    assert not memory.log
    for budget, ahead in ((-1, 1), (None, -1)):
        with pytest.raises(ValueError, match="wanted neither below 0"):
            Pager(memory, budget, ahead)
    assert launch(memory, pager.stepping([1, 1, 0, 1])) == [1, 0]


def test_states_without_elements():
    layout = Layout(0, (torch.float32,), 256)
    pager = Pager(Simulated(layout, 0), 0)
    assert pager.fits and list(pager.stepping([])) == []
    with pager.all() as arenas:
        assert arenas[0].numel() == 0


# ---- what a pool makes of it


def pool_of(params, named=None, **attributes):
    """Over a memory that pages, of chunks of 2 KiB, with attributes of its own."""

    def make(layout, device):
        memory = Simulated(layout, 10**9)
        vars(memory).update(attributes)
        return memory

    with patch.object(pool, "CHUNK_BYTES", 2048):
        return pool.Pool(params, "adamw", pool.Kind(torch.device("cpu"), torch.float32, 32), make, named)


def grads_of(params, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape[::-1], generator=generator).t() for p in params]  # of other strides


def step_of(made, params, seed):
    hypers = [1e-2, 0.9, 0.99, 1e-8, 0.1, seed + 1.0]
    made.step(params, grads_of(params, seed), [0] * len(params), [0] * len(params), pool.Work(None, None, hypers, None))


def test_a_pool_asks_its_memory_for_a_budget_where_the_user_names_none():
    p = torch.nn.Parameter(torch.zeros(2048))
    for named, found, fits in ((None, None, True), (None, 4096, False), (20000, 4096, True), (0, None, False)):
        made = pool_of([p], named, budget=found)
        assert made.memory.layout.count == 8 and made.pager.fits == fits
        for chunk in range(8):
            made.pager.prefetch(chunk)
        assert made.pager.resident_bytes == min(16384, next(n for n in (named, found, 16384) if n is not None))


def test_a_pool_in_chunks_steps_gradients_and_parameters_of_any_strides():
    found = []
    for budget in (None, 4096):
        params = [torch.nn.Parameter(t) for t in grads_of([torch.empty(30, 50), torch.empty(7, 100)], 9)]
        made = pool_of(params, budget)
        with torch.no_grad():
            for seed in range(3):
                step_of(made, params, seed)
        assert made.pager.fits == (budget is None)
        found.append([*(p.detach() for p in params), *made.memory.home()])
    assert all(map(torch.equal, *found))


def test_what_does_not_stay_comes_in_the_last_backward_of_a_step():
    p, q = (torch.nn.Parameter(torch.zeros(256, 1)) for _ in range(2))

    def backwards(made, count, params=(p, q)):
        """How many chunks are there after each, then a step."""
        seen = []
        for _ in range(count):
            for each in params:
                made.prefetch(each)
            seen.append(len(made.memory.resident))
        with torch.no_grad():
            step_of(made, [p, q], 0)
        return seen

    made = pool_of([p, q], stays=False)
    assert [backwards(made, n) for n in (2, 2, 1, 1, 3, 3)] == [[0, 0], [0, 2], [0], [2], [2] * 3, [0, 0, 2]]
    made.prefetch(p), made.prefetch(p)
    assert [backwards(made, 1, few) for few in ([q], [p, q])] == [[0], [0]]  # as many as the one of most
    assert backwards(made, 0) == [] and backwards(made, 2) == [0, 0]
    made = pool_of([p, q])
    assert [backwards(made, 2) for _ in range(2)] == [[2, 2]] * 2


def test_memory_that_never_pages_serves_a_pager_too():
    play = Play(Case(UINT8, 1024, 1, []), Pager, Resident(UINT8, torch.device("cpu")))
    for step in SCENARIO:
        play.step(step)
    play.end()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of mutants' generators
def test_planted_faults_are_found(figures, monkeypatch):
    """By what hypothesis draws first, by calls that fail in turn and by the tests of this file; the real one passes them all."""
    tests = [f for name, f in globals().items() if name.startswith("test_") and not hasattr(f, "hypothesis")]
    plain = [f for f in tests if not signature(f).parameters and f is not test_each_call_fails_in_turn]
    corpora = [
        (orderly, drawn(cases(orderly=True), 150)),
        (unruly, drawn(cases(), 150)),
        (unruly, drawn(cases(failures=True), 100)),
        (passing, drawn(cases(orderly=True, stays=False), 100)),
        (unruly, drawn(cases(stays=False), 100)),
    ]

    def check_pool(module):
        with pytest.MonkeyPatch.context() as patched:
            patched.setitem(globals(), "pool", module)
            test_a_pool_asks_its_memory_for_a_budget_where_the_user_names_none()
            test_a_pool_in_chunks_steps_gradients_and_parameters_of_any_strides()
            test_what_does_not_stay_comes_in_the_last_backward_of_a_step()

    def check(module):
        monkeypatch.setitem(globals(), "Pager", module.Pager)
        for holds, corpus in corpora:
            for case in corpus:
                holds(case, module.Pager)
        for test in plain:
            test()

    found = [*verdicts("pool", POOL, check_pool).items(), *verdicts("pager", PAGER, check).items()]
    alive = [mutant for mutant, verdict in found if not verdict]
    figures["faults planted in the pager"] += len(found)
    figures["faults planted in the pager and found"] += len(found) - len(alive)
    assert len(found) >= 80 and len(alive) <= 0.05 * len(found), alive


class TestSimulated:
    """It raises where a device would have faulted or raced."""

    def memory(self, capacity=1024, **options):
        return Simulated(UINT8, capacity, **options)

    def test_touch_of_what_is_not_there_is_a_fault(self):
        memory = self.memory()
        with pytest.raises(RuntimeError, match="touch: found chunk 1 at home"):
            memory.touch(1, torch.Tensor.zero_)
        assert memory.faults == 1

    def test_touch_before_its_fetch_was_waited_for(self):
        memory = self.memory()
        memory.fetch(1)
        with pytest.raises(Unordered, match="current writes what side writes"):
            memory.touch(1, torch.Tensor.zero_)

    def test_send_before_the_kernel_was_marked(self):
        memory = self.memory()
        memory.fetch(1)
        memory.wait(1)
        memory.used(1)
        memory.touch(1, torch.Tensor.zero_)
        with pytest.raises(Unordered, match="side writes what current writes"):
            memory.send(1)

    def test_capacity(self):
        memory = self.memory(1023)
        memory.fetch(1)
        memory.fetch(4)
        with pytest.raises(MemoryError, match="no room for chunk 0"):
            memory.fetch(0)

    @pytest.mark.parametrize("name", ("send", "wait", "used"))
    def test_what_is_not_there_is_not_moved(self, name):
        with pytest.raises(RuntimeError, match=f"{name}: found chunk 2 at home"):
            getattr(self.memory(), name)(2)

    def test_fetch_of_what_is_there(self):
        memory = self.memory()
        memory.fetch(2)
        with pytest.raises(RuntimeError, match="found chunk 2 on the device"):
            memory.fetch(2)

    def test_contents_are_in_one_place(self):
        memory = self.memory()
        memory.home()[0].copy_(torch.arange(UINT8.numel) % 250)
        memory.fetch(1)
        assert set(memory._home[0][512:1024].tolist()) == {255} and memory._device[0][512] == 512 % 250
        memory.send(1)
        assert memory._home[0][512] == 512 % 250 and set(memory._device[0].tolist()) == {255}

    def test_home_is_read_and_written_while_chunks_stay(self):
        memory = self.memory()
        memory.fetch(1)
        memory.wait(1)
        memory.touch(1, lambda t: t.fill_(7))
        assert memory.home()[0][512] == 7
        memory.home()[0][512:1024] = 9
        with pytest.raises(RuntimeError, match="touch"):
            memory.arenas(1)
        memory.wait(1)
        assert memory.arenas(1)[0][0] == 9
        assert ("reload", 1) in memory.log

    def test_injected_failures_do_nothing(self):
        memory = self.memory(fail_at={2})
        memory.fetch(1)
        with pytest.raises(Injected, match="call 2, send of 1"):
            memory.send(1)
        assert memory.resident == {1} and memory.log == [("fetch", 1)]
        memory.send(1)

    def test_budget_is_watched(self):
        memory = Watched(Case(UINT8, 600, 1, []))
        memory.capacity = 10**9
        memory.fetch(0)
        with pytest.raises(AssertionError, match="768 bytes on the device"):
            memory.fetch(4)

    def test_clocks_allow_reads_beside_reads_and_what_the_host_waited_for(self):
        clocks, t = Clocks("a", "b"), torch.zeros(8)
        clocks.access("a", [t], write=False)
        clocks.access("b", [t[:4]], write=False)
        with pytest.raises(Unordered, match="b writes what a reads"):
            clocks.access("b", [t[2:3]], write=True)
        clocks.synchronize("a")
        clocks.access("b", [t[4:]], write=True)
        clocks.wait("a", clocks.record("b"))
        clocks.access("a", [t], write=True)
        with pytest.raises(Unordered, match="host reads what a writes"):
            clocks.access("host", [t], write=False)
