"""Pinned staging: the pager's properties over it with streams that know what is ordered, planted faults, and what it allocates."""

import weakref
from inspect import signature

import pytest
import torch
from hypothesis import given, settings
from pager_mutants import STAGED, STAGED_ORDER, drawn, verdicts
from paging import SCENARIO, UINT8, Case, Play, Recorded, Step, cases, load, same, unruly
from under_test import GPU

from nf4lora.optim import staged
from nf4lora.optim.memory import Layout
from nf4lora.optim.pager import Pager
from nf4lora.optim.simulated import Injected, Unordered

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def recorded(case, module=staged):
    """Plays a case on staged memory over streams that record; the calls after its construction fail as the case says."""
    streams = Recorded(case.fail_at)
    memory = module.Staged(case.layout, CPU, case.budget, streams)
    slots = sum(t.nbytes for t in memory._slots)
    assert slots <= max(case.bytes, case.layout.nbytes(0))
    streams.armed = True
    play = unruly(case, Pager, memory, launched=streams.kernel, host=streams.host)
    assert sum(t.nbytes for t in memory._slots) == slots
    return play, streams


@settings(max_examples=3000)
@given(cases())
def test_contents_and_order_under_a_pager(case):
    recorded(case)


@settings(max_examples=500)
@given(cases(failures=True))
def test_failing_calls_lose_nothing(case):
    recorded(case)


def each_call_fails_in_turn(module=staged):
    for budget, dtypes in (
        (1024, (torch.uint8,)),
        (1280, (torch.uint8,)),
        (None, (torch.uint8,)),
        (2560, (torch.uint8, torch.int8)),
    ):
        layout = Layout(UINT8.numel, dtypes, UINT8.chunk)
        steps = [Step(**vars(step) | {"at_once": True}) for step in SCENARIO]
        calls = recorded(Case(layout, budget, 1, steps), module)[1].calls
        for n in range(1, calls + 1):
            play, _ = recorded(Case(layout, budget, 1, steps, (n,)), module)
            assert play.errors == 1
    return calls


def test_each_call_fails_in_turn():
    assert each_call_fails_in_turn() > 50


def test_planted_faults_are_found(figures, monkeypatch):
    tests = [f for name, f in globals().items() if name.startswith("test_") and not hasattr(f, "hypothesis")]
    plain = [f for f in tests if not signature(f).parameters]
    corpus = [*drawn(cases(), 200), *drawn(cases(failures=True), 100)]

    def check(module):
        monkeypatch.setitem(globals(), "staged", module)
        for case in corpus:
            recorded(case, module)
        each_call_fails_in_turn(module)
        for test in plain:
            test()

    order, others = verdicts("staged", STAGED_ORDER, check), verdicts("staged", STAGED, check)
    found = sum(map(bool, (*order.values(), *others.values())))
    figures["faults planted in pinned staging"] += len(order) + len(others)
    figures["faults planted in pinned staging and found"] += found
    assert len(order) >= 8 and found == len(STAGED_ORDER) + len(STAGED), {**order, **others}
    assert set(order.values()) == {Unordered}, order


def test_copies_are_those_that_are_needed():
    streams = Recorded()
    memory = staged.Staged(UINT8, CPU, 1024, streams)
    memory.fetch(0)
    memory.send(0)  # as it came
    assert streams.copies == {"in": 1, "out": 0}
    memory.fetch(1)
    memory.wait(1)
    memory.used(1)
    memory.home()
    assert streams.copies == {"in": 2, "out": 1}
    memory.home()
    memory.send(1)
    assert streams.copies == {"in": 2, "out": 1} and streams.synchronized == 2


def test_a_send_that_failed_halfway_is_over_before_the_next_kernel():
    streams = Recorded(fail_at=(5,))
    memory = staged.Staged(UINT8, CPU, 1024, streams)
    memory.fetch(0)
    memory.wait(0)
    streams.kernel(memory.arenas(0))
    memory.used(0)
    streams.armed, streams.calls = True, 2
    with pytest.raises(Injected, match="call 5, record"):
        memory.send(0)
    assert streams.copies["out"] == 1
    memory.wait(0)
    streams.kernel(memory.arenas(0))
    memory.used(0)
    calls = streams.calls
    memory.wait(0)
    assert streams.calls == calls + 1  # once is enough
    memory.home()
    calls = streams.calls
    memory.wait(0)
    assert streams.calls == calls + 3  # a copy in, its event, the wait


def test_slots_are_shared_with_the_side_streams():
    streams = Recorded()
    memory = staged.Staged(UINT8, CPU, 1024, streams)
    assert [t.data_ptr() for t in streams.shared] == [t.data_ptr() for t in memory._slots]


def test_nothing_but_home_waits():
    streams = Recorded()
    memory = staged.Staged(UINT8, CPU, 1024, streams)
    play = Play(Case(UINT8, 1024, 1, []), Pager, memory, streams.kernel, streams.host)
    before = streams.synchronized
    for step in SCENARIO:
        play.step(step)
    play.pager.make_room(10**9)
    assert streams.synchronized == before
    memory.close()
    assert streams.synchronized == before


def test_a_slot_that_was_left_first_is_taken_first():
    memory = staged.Staged(UINT8, CPU, 1536, Recorded())
    for chunk in (0, 1, 2):
        memory.fetch(chunk)
    first = [memory.arenas(chunk)[0].data_ptr() for chunk in (0, 1, 2)]
    for chunk in (1, 0):
        memory.send(chunk)
    for chunk in (3, 0):
        memory.fetch(chunk)
    assert [memory.arenas(chunk)[0].data_ptr() for chunk in (3, 0)] == [first[1], first[0]]


@pytest.mark.parametrize(
    ("budget", "numel"),
    [(None, 2304), (2304, 2304), (2303, 2048), (1280, 1280), (1279, 1024), (600, 512), (300, 512), (0, 512)],
)
def test_slots_are_what_the_budget_holds(budget, numel):
    memory = staged.Staged(UINT8, CPU, budget)
    assert [t.numel() for t in memory._slots] == [numel]
    for chunk in range(5) if numel == 2304 else range(numel // 512):
        memory.fetch(chunk)
    if numel == 2304:
        assert memory.arenas(None)[0].numel() == 2304
        assert memory.arenas(4)[0].data_ptr() == memory.arenas()[0].data_ptr() + 2048
    else:
        with pytest.raises(RuntimeError, match=f"arenas: found {numel // 512} chunks on the device, wanted all 5"):
            memory.arenas(None)
        with pytest.raises(RuntimeError, match="fetch: found chunks .* in all slots, wanted one for"):
            memory.fetch(numel // 512)


def test_one_short_chunk_and_none():
    for numel, budget, slots in ((256, None, 256), (256, 10, 256), (0, None, 0), (0, 0, 0)):
        memory = staged.Staged(Layout(numel, (torch.uint8,), 512), CPU, budget)
        assert memory._slots[0].numel() == slots
        pager = Pager(memory, budget)
        for _ in pager.stepping(range(numel // 256)):
            assert memory.arenas(0)[0].numel() == 256


def test_fetch_of_what_is_there_is_refused():
    memory = staged.Staged(UINT8, CPU, 1024)
    memory.fetch(0)
    with pytest.raises(RuntimeError, match="found chunk 0 in a slot"):
        memory.fetch(0)


def test_close_gives_everything_back():
    memory = staged.Staged(UINT8, CPU, 1024)
    for chunk in (0, 1):
        memory.fetch(chunk)
    kept = [weakref.ref(t) for t in (*memory._home, *memory._slots, *memory.arenas(0)[0:0])]
    storage = weakref.ref(memory._here[0].slot.tensors[0])
    memory.close()
    assert storage() is None and not any(ref() is not None for ref in kept)


def test_the_recording_streams_see_what_nothing_ordered():
    streams = Recorded()
    memory = staged.Staged(UINT8, CPU, 1024, streams)
    memory.fetch(0)
    with pytest.raises(Unordered, match="current writes what in writes"):
        streams.kernel(memory.arenas(0))
    memory.wait(0)
    memory.used(0)
    streams.kernel(memory.arenas(0))
    with pytest.raises(Unordered, match="out reads what current writes"):
        memory.send(0)
    with pytest.raises(Unordered, match="host writes what in reads"):
        streams.host(memory._home)


@pytest.mark.parametrize("budget", (None, 3 << 20, 5 << 20))
@pytest.mark.parametrize("device", ("cpu", *(("cuda",) if GPU else ())))
def test_steps_on_a_device_are_those_of_plain_memory(device, budget):
    layout = Layout((4 << 20) - 512, (torch.float32, torch.uint8), 256 << 10)
    device = torch.device(device)
    memory, plain = (
        staged.Staged(layout, device, budget),
        [torch.zeros(layout.numel, dtype=dtype) for dtype in layout.dtypes],
    )
    assert all(t.is_pinned() == (device.type == "cuda") for t in memory._home)
    load(memory.home(), 1)
    load(plain, 1)
    pager, drawn = Pager(memory, budget), torch.Generator().manual_seed(0)
    for n in range(8):
        order = torch.randperm(layout.count, generator=drawn).tolist()[: 16 - n % 3]
        for chunk in order[::2]:
            pager.prefetch(chunk)
        for chunk in pager.stepping(order):
            for t in memory.arenas(chunk):
                t.mul_(3).add_(n)
        for chunk in order:
            first, end = layout.span(chunk)
            for t in plain:
                t[first:end].mul_(3).add_(n)
        if n == 4:
            assert same(memory.home(), plain)
            load(memory.home(), 2)
            load(plain, 2)
    assert same(memory.home(), plain)
