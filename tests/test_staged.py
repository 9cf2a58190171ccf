"""Pinned staging: the pager's properties over it with streams that know what is ordered, planted faults, and what it allocates."""

import weakref
from dataclasses import replace
from inspect import signature
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from pager_mutants import SPARE, STAGED, STAGED_ORDER, drawn, verdicts
from paging import SCENARIO, UINT8, Case, Play, Recorded, Step, cases, load, same, unruly
from under_test import GPU

from nf4lora.managed import RESERVE
from nf4lora.optim import PagedAdamW, base, pool, staged
from nf4lora.optim import streams as streams_of
from nf4lora.optim.memory import Layout
from nf4lora.optim.pager import Pager
from nf4lora.optim.simulated import Injected, Unordered

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def recorded(case, module=staged):
    """Plays a case on staged memory over streams that record; the calls after its construction fail as the case says."""
    streams = Recorded(case.fail_at, case.room, case.hopeful)
    stays = case.room is None
    with patch.object(module, "WHOLE", module.WHOLE if case.whole else 0):
        memory = module.Staged(case.layout, CPU, case.bytes if stays else None, streams)
    slots = streams.taken
    assert slots <= (max(case.bytes, case.layout.nbytes(0)) if stays else 0)
    streams.armed = True
    play = unruly(case, Pager, memory, launched=streams.kernel, host=streams.host, device=streams)
    assert not streams.wrong and (streams.taken == slots or not stays)
    return play, streams


@settings(max_examples=1500)
@given(cases())
def test_contents_and_order_under_a_pager(case):
    recorded(case)


@settings(max_examples=1500)
@given(cases(stays=False))
def test_contents_and_order_of_what_does_not_stay(case):
    recorded(case)


@settings(max_examples=500)
@given(cases(failures=True))
def test_failing_calls_lose_nothing(case):
    recorded(case)


@settings(max_examples=500)
@given(cases(failures=True, stays=False))
def test_failing_calls_lose_nothing_of_what_does_not_stay(case):
    recorded(case)


def each_call_fails_in_turn(module=staged):
    two = Layout(UINT8.numel, (torch.uint8, torch.int8), UINT8.chunk)
    steps = [Step(**vars(step) | {"at_once": True}) for step in SCENARIO]
    crowded = [Step(**vars(step) | {"others": (0, 512)}) for step in SCENARIO[1:4]]
    for case in (
        *(Case(UINT8, budget, 1, steps) for budget in (1024, 1280, None)),
        Case(two, 2560, 1, steps),
        Case(two, None, 1, steps, room=5000),
        Case(UINT8, None, 1, steps, room=5000, whole=False),
        Case(UINT8, None, 2, crowded, room=1100),
    ):
        calls = recorded(case, module)[1].calls
        for n in range(1, calls + 1):
            play, _ = recorded(replace(case, fail_at=(n,)), module)
            assert play.errors == 1
    return calls


def test_each_call_fails_in_turn():
    assert each_call_fails_in_turn() > 50


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of mutants' generators
def test_planted_faults_are_found(figures, monkeypatch):
    tests = [f for name, f in globals().items() if name.startswith("test_") and not hasattr(f, "hypothesis")]
    plain = [f for f in tests if not signature(f).parameters and f is not test_each_call_fails_in_turn]
    corpus = [*drawn(cases(), 150), *drawn(cases(failures=True), 80)]
    corpus += [*drawn(cases(stays=False), 150), *drawn(cases(failures=True, stays=False), 60)]

    def check(module):
        monkeypatch.setitem(globals(), "staged", module)
        for test in plain:
            test()
        for case in corpus:
            recorded(case, module)
        each_call_fails_in_turn(module)

    def check_order(module):
        for case in corpus:  # as other tests may find the same otherwise
            recorded(case, module)
        check(module)

    def check_spare(module):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(globals(), "streams_of", module)
            test_what_is_to_spare(patch)

    order, others = verdicts("staged", STAGED_ORDER, check_order), verdicts("staged", STAGED, check)
    spare = verdicts("streams", SPARE, check_spare)
    verdict = [(fault, found) for each in (order, others, spare) for fault, found in each.items()]
    alive = [fault for fault, found in verdict if not found]
    figures["faults planted in pinned staging"] += len(verdict)
    figures["faults planted in pinned staging and found"] += len(verdict) - len(alive)
    assert len(order) >= 8 and len(verdict) >= 90 and not alive, alive
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
    memory.fetch(0)
    assert streams.shared == [memory.arenas(0)[0].data_ptr()]
    streams = Recorded()
    memory = staged.Staged(UINT8, CPU, None, streams)
    memory.fetch(0)
    assert streams.shared == [memory.arenas(0)[0].data_ptr()]


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


def test_slots_are_what_the_budget_holds():
    sizes = {2304: 2304, 2303: 2048, 1280: 1280, 1279: 1024, 600: 512, 300: 512, 0: 512}
    for budget, numel in sizes.items():
        streams = Recorded()
        memory = staged.Staged(UINT8, CPU, budget, streams)
        assert streams.taken == numel and memory.stays and memory.whole == (numel == 2304)
        streams.bytes = 0  # more than it has is not asked for
        for chunk in range(5) if numel == 2304 else range(numel // 512):
            assert memory.has_room(chunk)
            memory.fetch(chunk)
        if numel == 2304:
            assert memory.arenas(None)[0].numel() == 2304
            assert memory.arenas(4)[0].data_ptr() == memory.arenas()[0].data_ptr() + 2048
        else:
            assert memory.has_room(3)  # the budget is the pager's
            with pytest.raises(RuntimeError, match=f"arenas: found {numel // 512} chunks, wanted all 5"):
                memory.arenas(None)
            with pytest.raises(RuntimeError, match="fetch: found chunks .* in all slots, wanted one for"):
                memory.fetch(numel // 512)
        memory.trim()
        assert streams.taken == streams.most_taken == numel


def test_one_short_chunk_and_none():
    for numel, budget, slots in ((256, None, 0), (256, 300, 256), (256, 10, 256), (0, None, 0), (0, 0, 0)):
        streams = Recorded()
        memory = staged.Staged(Layout(numel, (torch.uint8,), 512), CPU, budget, streams)
        assert streams.taken == slots
        pager = Pager(memory, budget)
        for _ in pager.stepping(range(numel // 256)):
            assert memory.arenas(0)[0].numel() == streams.taken == 256
        assert streams.taken == slots
        if not numel:
            with pager.all() as arenas:
                assert [t.numel() for t in arenas] == [0]


def test_fetch_of_what_is_there_is_refused():
    memory = staged.Staged(UINT8, CPU, 1024)
    memory.fetch(0)
    with pytest.raises(RuntimeError, match="found chunk 0 in a slot"):
        memory.fetch(0)


def test_close_gives_everything_back():
    for budget in (None, 1500, 3000):
        streams = Recorded()
        memory = staged.Staged(UINT8, CPU, budget, streams)
        for chunk in (0, 1):
            memory.fetch(chunk)
        memory.send(1)
        kept = [weakref.ref(t) for t in memory._home]
        assert streams.taken
        memory.close()
        assert streams.taken == 0 and not streams.wrong and not any(ref() is not None for ref in kept)


# ---- without a budget


def giving_way(room, whole=False, ahead=1, layout=UINT8):
    streams = Recorded(room=room)
    with patch.object(staged, "WHOLE", staged.WHOLE if whole else 0):
        memory = staged.Staged(layout, CPU, None, streams)
    return Pager(memory, None, ahead), memory, streams


def stepped(pager, memory, streams, chunks=range(5)):
    """Bytes on the device at each chunk."""
    seen = []
    for chunk in pager.stepping(chunks):
        streams.kernel(memory.arenas(chunk))
        seen.append(streams.taken)
    assert streams.taken == 0 and pager.resident_bytes == 0 and not streams.wrong
    return seen


def test_a_step_takes_as_much_as_is_of_use_and_there():
    for ahead, room, slots in (
        *((ahead, room, slots) for ahead in (0, 1, 3) for room, slots in ((512, 1), (1023, 1), (1024, 2), (1600, 3))),
        *((ahead, 10**6, slots) for ahead, slots in ((0, 3), (1, 3), (2, 3), (3, 4))),
    ):
        pager, memory, streams = giving_way(room, ahead=ahead)
        for _ in range(2):
            streams.taking = 0
            assert max(stepped(pager, memory, streams)) == slots * 512 and streams.taking == slots


def test_what_comes_ahead_takes_slots_that_were_left():
    pager, memory, _ = giving_way(1024)
    at = [(pager.resident_bytes, memory.arenas(chunk)[0].data_ptr()) for chunk in pager.stepping(range(4))]
    assert [there for there, _ in at] == [1024, 1024, 1024, 512] and len({address for _, address in at}) == 2
    pager, memory, _ = giving_way(10**6)
    at = [memory.arenas(chunk)[0].data_ptr() for chunk in pager.stepping(range(4))]
    assert len(set(at)) == 3 and at[3] == at[0]  # which had been left before another came


def test_memory_ends_before_the_first_chunk_of_a_step_or_not_at_all():
    pager, memory, streams = giving_way(2000)
    streams.others = 1489
    with pytest.raises(torch.OutOfMemoryError):
        stepped(pager, memory, streams)
    streams.others = 1488
    step = pager.stepping(range(5))
    done = [next(step)]
    streams.others = 2000
    assert [*done, *step] == [0, 1, 2, 3, 4] and streams.taken == 0


def test_gradients_bring_what_there_is_room_for():
    pager, memory, streams = giving_way(10**6)
    for chunk in range(4):
        pager.prefetch(chunk)
    assert streams.taken == 4 * 512
    assert stepped(pager, memory, streams) == [4 * 512] * 5
    pager, memory, streams = giving_way(1100)
    for chunk in range(4):
        pager.prefetch(chunk)
    assert streams.taken == 2 * 512 and pager.resident_bytes == 2 * 512
    assert stepped(pager, memory, streams, [4, 3, 1]) == [2 * 512] * 3


def test_what_others_used_at_the_first_gradient_stays_theirs_until_the_step():
    pager, memory, streams = giving_way(2304)
    for first, last, taken in ((1024, 0, 2), (0, 0, 4), (0, 1500, 1)):
        streams.others = first
        pager.prefetch(0)
        streams.others = last
        for chunk in range(5):
            pager.prefetch(chunk)
        assert streams.taken == taken * 512
        streams.others = 0
        stepped(pager, memory, streams)


@pytest.mark.parametrize("skips", (False, True))
def test_no_parameter_moves_before_there_is_room_for_all(monkeypatch, skips):
    """Those of two dtypes have their states apart; gradients that come first bring theirs and leave no room to others."""
    streams = Recorded(room=0)
    kept = base.chooser
    monkeypatch.setattr(pool, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(staged, "WHOLE", 0)
    drawn = torch.Generator().manual_seed(0)
    values = [torch.randn(3000, generator=drawn), torch.randn(3000, generator=drawn).bfloat16()]
    found = []
    for chooser in (kept, lambda *options: lambda layout, device: staged.Staged(layout, device, None, streams)):
        monkeypatch.setattr(base, "chooser", chooser)
        params = [torch.nn.Parameter(t.clone()) for t in values]
        optimizer = PagedAdamW(params, skip_nonfinite=skips, betas=(0.5, 0.75))
        for step in range(3):
            sum((p.float() * (p.float() + step)).sum() for p in params).backward()
            if chooser is not kept:
                streams.bytes = 2 * 4096 - 1
                before = [p.detach().clone() for p in params]
                with pytest.raises(torch.OutOfMemoryError):
                    optimizer.step()
                assert same(before, params) and streams.taken == 0
                assert [int(optimizer.state[p]["step"]) for p in params] == [step] * 2
                streams.bytes = 2 * 4096
                optimizer.zero_grad()
                sum((p.float() * (p.float() + step)).sum() for p in params).backward()
                assert streams.taken == (2 * 4096 if step else 0)
            optimizer.step()
            optimizer.zero_grad()
            assert streams.taken == 0
        found.append(params + [optimizer.state_dict()["state"][i][name] for i in (0, 1) for name in ("state1", "state2")])
    assert same(*found)


def test_room_that_was_given_back_is_there_again():
    pager, _, streams = giving_way(1024)
    pager.prefetch(0), pager.prefetch(1)
    assert pager.make_room(1) == 512 and streams.taken == 512
    pager.prefetch(2)
    assert streams.taken == 1024


def test_memory_in_pieces_is_no_error():
    pager, memory, streams = giving_way(10**6)
    streams.hopeful = True
    for _ in range(4):
        for chunk in range(4):
            pager.prefetch(chunk)
        assert 2 <= streams.taken // 512 <= 3
        stepped(pager, memory, streams)
    pager, memory, streams = giving_way(10**6, ahead=0)
    streams.hopeful = True
    assert stepped(pager, memory, streams) == [512, 1024, 1024, 1536, 1536]  # the third failed, and two did


def test_small_states_are_one_arena_where_there_is_room():
    pager, memory, streams = giving_way(2304, whole=True)
    for announced in ((), (3,), range(5)):
        streams.taking = 0
        for chunk in announced:
            pager.prefetch(chunk)
        assert pager.fits and streams.taken == (2304 if announced else 0)
        assert pager.resident_bytes == sum(map(UINT8.nbytes, announced))
        with pager.all() as arenas:
            assert arenas[0].numel() == 2304
            streams.kernel(arenas)
        del arenas
        assert streams.taken == 0 and streams.taking == 1 and not streams.wrong
    pager, memory, streams = giving_way(3000, whole=True)
    streams.others = 697
    assert not pager.fits and memory.has_room(0)
    pager.prefetch(1)
    assert streams.taken == 512
    streams.others = 0
    memory._spare.forget()
    assert not pager.fits  # one is elsewhere
    assert max(stepped(pager, memory, streams)) == 3 * 512 and pager.fits
    pager, memory, streams = giving_way(10**6, whole=False)
    assert not pager.fits


def test_how_small():
    assert staged.WHOLE >= 2 * 41_943_040 * 4  # of every linear of Llama-3-8B, r = 16: a step is one launch
    for whole, fits in ((2303, False), (2304, True)):
        with patch.object(staged, "WHOLE", whole):
            assert staged.Staged(UINT8, CPU).whole == fits


def test_what_is_to_spare(monkeypatch):
    """Of what torch has or could have, what is not kept for others, nor was seen with them since it was forgotten."""
    device = streams_of.CudaStreams.__new__(streams_of.CudaStreams)
    device._device = CPU
    numbers = {"reserved_bytes": {"all": {"current": 700}}, "active_bytes": {"all": {"current": 500}}}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (RESERVE + 300, 10**12))
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: numbers)
    assert device.room() == (RESERVE + 1000, 500)
    spare = streams_of.Spare(device)
    assert spare.holds(500) and not spare.holds(501)
    spare.own = 200
    assert spare.holds(300) and not spare.holds(301)  # for others were seen to use 500
    spare.forget()
    assert spare.holds(500) and not spare.holds(501)
    numbers["active_bytes"]["all"]["current"] = 250
    assert spare.holds(500) and not spare.holds(501)
    spare.forget()
    assert spare.holds(750) and not spare.holds(751)
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: {})
    assert device.room() == (RESERVE + 300, 0)
    assert streams_of.Spare(Recorded()).holds(10**15)


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
    assert memory.stays == (budget is not None)
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
