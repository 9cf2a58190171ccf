"""The placement policy: properties on a simulated page table, and what each call may do; faults planted in it are found."""

import weakref
from inspect import signature

import pytest
import torch
from hypothesis import given, settings
from pager_mutants import PAGER, drawn, verdicts
from paging import SCENARIO, UINT8, Case, Play, Step, Watched, cases, orderly, unruly

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


def failing_at_every_call(pager):
    for budget, ahead in ((1024, 1), (1280, 2), (300, 1), (None, 1)):
        steps = [Step(**vars(step) | {"at_once": True}) for step in SCENARIO]
        calls = unruly(Case(UINT8, budget, ahead, steps), pager).memory.calls
        for n in range(1, calls + 1):
            play = unruly(Case(UINT8, budget, ahead, steps, (n, n + 1 + n % 5)), pager)
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


def test_memory_that_never_pages_serves_a_pager_too():
    play = Play(Case(UINT8, 1024, 1, []), Pager, Resident(UINT8, torch.device("cpu")))
    for step in SCENARIO:
        play.step(step)
    play.end()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of mutants' generators
def test_planted_faults_are_found(figures, monkeypatch):
    """By what hypothesis draws first, by calls that fail in turn and by the tests of this file; the real one passes them all."""
    tests = [f for name, f in globals().items() if name.startswith("test_") and not hasattr(f, "hypothesis")]
    plain = [f for f in tests if not signature(f).parameters]
    corpora = [
        (orderly, drawn(cases(orderly=True), 150)),
        (unruly, drawn(cases(), 150)),
        (unruly, drawn(cases(failures=True), 100)),
    ]

    def check(module):
        monkeypatch.setitem(globals(), "Pager", module.Pager)
        for holds, corpus in corpora:
            for case in corpus:
                holds(case, module.Pager)
        for test in plain:
            test()

    alive = [mutant for mutant, found in verdicts("pager", PAGER, check).items() if not found]
    figures["faults planted in the pager"] += len(PAGER)
    figures["faults planted in the pager and found"] += len(PAGER) - len(alive)
    assert len(PAGER) >= 20 and len(alive) <= 0.05 * len(PAGER), alive


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
