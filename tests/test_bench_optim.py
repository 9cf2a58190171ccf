"""The benchmark of the optimizers at sizes of a toy: what its loops do, and that nothing wrong gets a time."""

import gc
import json
import sys
import types
from functools import partial
from pathlib import Path

import pytest
import torch
from managed_stub.stub import Stub

sys.path.append(str(Path(__file__).parents[1]))  # behind what is installed: bench is not

from bench import bench_optim, bench_optim_cases, bench_optim_meter, harness, model_sizes, report
from bench import bench_optim_steps as steps
from bench.bench_optim_backward import Products, Waiting
from bench.bench_optim_cases import GIB, HYPERS, RULES, STATES, ours
from bench.bench_optim_meter import LONGEST_HOLD_MS, OptimMeter
from bench.harness import GateFailed, compare
from bench.timing import Contender
from nf4lora import backends
from nf4lora.managed import HOME
from nf4lora.optim import AdamW8bit, PagedAdamW, base, pool, staged
from nf4lora.optim.managed import Managed
from nf4lora.optim.memory import Resident

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*(kernels-community|nothing pages|Paged optimizers are not supported).*"),
]
TINY = steps.Work("tiny", ((300, 17), (5000,), (64, 128), (3,)), device="cpu")
ADAMW, CODED, LION = RULES
CHUNK = 2**15


def loop(kind, rule=PagedAdamW, place="pinned staging", chunk=CHUNK, **options):
    (made,) = ours(kind, TINY, rule, "cpu", place, chunk, **options).calls
    return made


def resident_bytes(made):
    return sum(found.pager.resident_bytes for found in steps.pools(made.optimizer))


# ---- sizes


def test_the_parameters_are_those_of_llama():
    work = steps.Work("adapters", steps.lora_shapes())
    assert steps.LAYERS == model_sizes.LLAMA_3_8B["num_hidden_layers"]
    assert len(work.shapes) == 448 and work.numel == 41_943_040
    each = {title: steps.step_traffic(work, *STATES[rule]).total / work.numel for title, rule in RULES.items()}
    assert each == {ADAMW: 28, CODED: 16 + 1 / 16, LION: 14 + 1 / 32}


@pytest.mark.parametrize("rule", RULES.values())
def test_bytes_of_a_step_are_those_of_its_tensors(rule):
    work = steps.Work("", ((64, 128), (4096,), (5000,)), torch.bfloat16, "cpu")
    optimizer = steps.Loop(work, rule).optimizer
    states = sum(t.nbytes for entry in optimizer.state.values() for t in entry.values() if isinstance(t, torch.Tensor))
    values = 2 * work.numel
    assert steps.step_traffic(work, *STATES[rule]) == (2 * values + states, values + states)


# ---- what is timed


@pytest.mark.parametrize("chunk", (CHUNK, 2**16))
def test_states_are_placed_for_a_while(chunk):
    kept = base.chooser, pool.CHUNK_BYTES
    of = {
        place: steps.pools(loop(steps.Loop, place=place, chunk=chunk).optimizer)[0].memory for place in steps.PLACES[1:]
    }
    assert type(of["pinned staging"]) is staged.Staged and type(of["resident"]) is Resident
    assert of["resident"].layout.chunk == chunk // 8
    with pytest.raises(KeyError), steps.placed("managed", chunk):
        assert base.chooser(True, None, False) is steps.Managed and pool.CHUNK_BYTES == chunk
        raise KeyError
    assert (base.chooser, pool.CHUNK_BYTES) == kept


def test_parameters_stay_what_was_found_however_often_a_step_is_timed():
    for kind in (steps.Loop, steps.Through, partial(steps.Cycle, Waiting(TINY, 0.0))):
        made = loop(kind)
        before = [t.clone() for t in made.found]
        for _ in range(3):
            assert made() is made.found
        assert all(map(torch.equal, before, made.found)) and all(
            map(torch.equal, before, (p.detach() for p in made.params))
        )
        assert {entry["step"] for entry in made.optimizer.state.values()} <= {2 + 3, 2 + 3 * 3}


def test_moves_move_everything():
    move, away, through, read = map(loop, (steps.Move, steps.Away, steps.Through, steps.Read))
    count = steps.state_bytes(move.optimizer)
    assert count == 8 * sum(-(-p.numel() // 256) * 256 for p in move.params)
    for made, seen in ((move, (0, count)), (away, (count, 0)), (through, (0, 0)), (read, (count, count))):
        for _ in range(2):
            made.before()
            before = resident_bytes(made)
            made.go()
            assert (before, resident_bytes(made)) == seen


def test_what_moves_is_copied_in_pieces_of_a_chunk(monkeypatch):
    copied = []
    monkeypatch.setattr(
        staged.InOrder, "copy", lambda self, stream, to, of: (copied.append((stream, of.nbytes)), to.copy_(of))
    )
    made = loop(steps.Through, budget=3 * CHUNK)
    made.before()
    copied.clear()
    made.go()
    count = steps.state_bytes(made.optimizer)
    assert {stream: sum(n for s, n in copied if s == stream) for stream in ("in", "out")} == {"in": count, "out": count}
    assert max(n for _, n in copied) == CHUNK // 2


def test_states_come_while_backward_runs():
    """Of a cycle: gone before it; asked for by the gradients, so that the step finds them; gone after it."""
    backward, seen = Waiting(TINY, 0.0), []
    made = loop(partial(steps.Cycle, lambda params: (seen.append(resident_bytes(made)), backward(params))))
    step = made.optimizer.step
    made.optimizer.step = lambda: (seen.append(resident_bytes(made)), step())
    made.go()
    count = steps.state_bytes(made.optimizer)
    assert seen[2:] == [0, count] and resident_bytes(made) == 0
    wanted = TINY.parameters()
    TINY.give_gradients(wanted, steps.FIRST_STEPS)
    assert all(torch.equal(p.grad, w.grad) for p, w in zip(made.params, wanted, strict=True))


def test_products_have_gradients_of_a_size():
    work = steps.Work("", ((64, 64),) * 12, torch.bfloat16, "cpu")
    params = work.parameters()
    Products(work, 8)(params)
    assert all(0.01 < p.grad.float().std() < 100 for p in params)


def test_blocks_are_those_asked_for(monkeypatch):
    seen, kept = [], backends._ROWS["optim_step", "cpu"]
    watched = backends.Row(lambda *args: (seen.append(args[-1]), kept.call(*args))[1], kept.why_not, kept.configure)
    monkeypatch.setitem(backends._ROWS, ("optim_step", "cpu"), watched)
    made = loop(partial(steps.Blocks, 3, "cpu"), place="resident")
    made.go()
    assert seen[1:] == [3, 3] and backends._ROWS["optim_step", "cpu"] is watched


# ---- managed memory, over a stub of CUDA


@pytest.fixture
def card(monkeypatch):
    """Managed memory on the host: its calls, and what has happened to its pages."""
    calls = Stub()
    calls.fail(0)
    calls.set(card=8 * GIB, others=0, concurrent=1, device=0, capturing=-2, offset=4096, most_resident=0)
    calls.record(), calls.violations()
    device = torch.device("cuda", 0)
    monkeypatch.setattr(steps, "Managed", lambda layout, cpu: Managed(layout, device, calls=calls))
    yield calls
    gc.collect()
    assert calls.get("live") == 0 and not calls.violations()


def test_what_managed_memory_is_told(card):
    read, missing = (loop(steps.Read, place="managed") for _ in range(2))
    missing.fetched = False
    arenas = [t for made in (read, missing) for t in steps.pools(made.optimizer)[0].memory.arenas()]
    for _ in range(2):
        for made in (read, missing):
            made.before()
        assert [card.place(t) for t in arenas] == [0, 0, HOME, HOME]
        for made in (read, missing):
            made.go()
        assert [card.place(t) for t in arenas] == [0, 0, HOME, HOME]  # the stub has no faults


def test_managed_rows_pass_their_gates(card):
    places = steps.PLACES[:2]
    for case in (
        *(
            bench_optim_cases.moving_case(TINY, ADAMW, kind, "cpu", (CHUNK,), places)
            for kind in (steps.Move, steps.Through)
        ),
        bench_optim_cases.reading_case(TINY, CODED, "cpu", places),
        bench_optim_cases.cycle_case(TINY, CODED, "", Waiting(TINY, 0.0), "cpu", places, 2 * CHUNK),
    ):
        rows = compare(case, OptimMeter("cpu"), rounds=1)
        assert {row.contender.split(",")[0] for row in rows} >= set(places)
        assert {row.error["differing_bytes"] for row in rows if row.contender != "copy"} == {0}


# ---- the gate


def test_a_wrong_step_gets_no_time(monkeypatch):
    row = backends._ROWS["optim_step", "cpu"]

    def wrong(params, *args):
        row.call(params, *args)
        params[-1].view(-1)[-1] += 2**-10

    monkeypatch.setitem(backends._ROWS, ("optim_step", "cpu"), backends.Row(wrong, row.why_not, row.configure))
    case = bench_optim_cases.resident_case(TINY, ADAMW, "cpu", [])
    with pytest.raises(GateFailed, match=f"{ADAMW}: nf4lora: [1-4] bytes of the parameters are not the reference's"):
        compare(case, OptimMeter("cpu"), rounds=1)


@pytest.mark.parametrize("title", (ADAMW, CODED))
def test_states_that_are_lost_on_their_way_get_no_time(monkeypatch, title):
    monkeypatch.setattr(staged.Staged, "_copy_out", lambda *args: None)
    case = bench_optim_cases.moving_case(TINY, title, steps.Move, "cpu", (CHUNK,), ("pinned staging",))
    with pytest.raises(GateFailed, match="pinned staging: [0-9]+ bytes"):
        compare(case, OptimMeter("cpu"), rounds=1)


# ---- the command


def test_the_command_at_toy_size(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_optim", "--device", "cpu", "--out", str(tmp_path)])
    measure, cases = bench_optim.measure, bench_optim.cases
    monkeypatch.setattr(bench_optim, "cases", partial(cases, adapters=TINY))
    monkeypatch.setattr(bench_optim, "measure", lambda *args, rounds: measure(*args, rounds=1))
    (tmp_path / "cpu_optim.json").write_text("of another run")
    assert bench_optim.main() == 0
    document = json.loads((tmp_path / "cpu_optim.json").read_text())
    rows = document["rows"]
    assert not document["failed"] and {row["timed"] for row in rows} == {"wall clock"}
    ours = [row for row in rows if row["contender"].startswith(("nf4lora", "pinned", "resident"))]
    assert {row["error"]["differing_bytes"] for row in ours} == {0}
    of = {
        case: [row["contender"] for row in rows if row["case"] == case]
        for case in dict.fromkeys(row["case"] for row in rows)
    }
    torchs = ["torch fused", "torch foreach"]
    assert of[ADAMW][:4] == of[CODED][:4] == ["nf4lora", *torchs, "bitsandbytes"]
    assert of[LION] == ["nf4lora", "bitsandbytes", "copy", "nf4lora (again)", *of[LION][4:]]
    moves = [
        f"{ADAMW}: step in chunks, both ways",
        *(f"{t}: {what}" for t in (ADAMW, CODED) for what in ("to the device", "home")),
    ]
    assert {case for case in of if ": " in case} == set(moves) and "pinned staging, chunks of 0.125 MiB" in of[moves[0]]
    both = next(row for row in rows if row["case"] == moves[0])
    assert both["bytes_moved"] == 2 * next(row for row in rows if row["case"] == moves[1])["bytes_moved"]
    assert [(found["case"], found["contender"]) for found in document["hidden"]] == [
        (f"{title}, 100 ms", "pinned staging") for title in (ADAMW, CODED)
    ]
    assert len(document["launches"]) == 10 and {row["launches"] for row in document["launches"]} == {None}
    assert "hidden" in capsys.readouterr().out
    document["hidden"][0] |= {"moves_ms": 6.51, "hidden": [0.97, 0.99, 0.8]}
    text = report.markdown(document)
    assert "| states at home before a backward | both moves alone | hidden by it |" in text
    assert f"| {ADAMW}, 100 ms: pinned staging | 6.5 ms | 97% [99 … 80] |" in text
    assert "| step, states on the device, tiny | nf4lora | torch fused | torch foreach |" in text


def test_only_what_is_asked_for(monkeypatch, tmp_path):
    found = bench_optim.cases("cpu", ["moves"], [], [])
    assert len(list(found)) == 6 and len(list(bench_optim.cases("cpu", ["spike"], [], []))) == 0
    monkeypatch.setattr(sys, "argv", ["bench_optim", "--only", "moves,steps"])
    with pytest.raises(SystemExit, match="steps"):
        bench_optim.main()


def test_who_cannot_run_is_named(monkeypatch):
    monkeypatch.setattr(bench_optim_cases, "why_not", lambda *args, device: f"not for {device}")
    monkeypatch.setattr(torch.optim, "AdamW", None)
    absent = []
    case = bench_optim_cases.resident_case(TINY, ADAMW, "cpu", absent)
    assert list(case.contenders) == ["nf4lora", "copy"]
    assert (
        absent[0].startswith(f"{ADAMW}, torch fused: TypeError: ")
        and absent[2] == f"{ADAMW}, bitsandbytes: not for cpu"
    )


def test_what_a_backward_hides():
    def row(case, contender, ms, ratio=(1.0, 1.0, 1.0)):
        return {"case": case, "contender": contender, "time_ms": [ms, ms, ms], "ratio": list(ratio)}

    cycle = f"{ADAMW}, 100 ms"
    rows = [
        row(f"{ADAMW}: to the device", "managed", 6.0), row(f"{ADAMW}: home", "managed", 4.0),
        row(f"{CODED}: home", "managed", 9.0),
        row(cycle, "resident", 100.0), row(cycle, "managed", 101.0, (1.01, 1.0, 1.05)), row(cycle, "pinned staging", 104.0),
    ]  # fmt: skip
    (found,) = bench_optim.hidden(rows)
    assert (found["case"], found["contender"], found["moves_ms"]) == (cycle, "managed", 10.0)
    assert found["hidden"] == pytest.approx([0.9, 1.0, 0.5])
    assert bench_optim.hidden([r for r in rows if r["contender"] != "resident"]) == []


# ---- allocations that leave too little


class Room:
    """Memory of a card: the first spike is refused, as AdamW's states lie there; `refuse` False lets all pass."""

    def __init__(self, monkeypatch, refuse=True):
        self.taken, self.held = [], []
        self.refuse = refuse
        monkeypatch.setattr(
            bench_optim_cases, "take_all_but", lambda room, device: self.held.append(room) or torch.empty(0)
        )
        monkeypatch.setattr(bench_optim_cases, "take", self.take)

    def take(self, count, device):
        self.taken.append(count)
        if self.refuse and len(self.taken) == 1:
            raise torch.OutOfMemoryError("as on a card")
        return torch.empty(0)


@pytest.mark.parametrize("budget", (None, 2 * CHUNK))
def test_a_spike_that_adamw_does_not_survive(monkeypatch, budget):
    room, absent = Room(monkeypatch), []
    count = 8 * sum(-(-torch.Size(shape).numel() // 256) * 256 for shape in TINY.shapes)
    monkeypatch.setattr(bench_optim_cases, "ROOM", bench_optim_cases.SPIKE + 8 * TINY.numel + count - 1)
    case = bench_optim_cases.spike_case(TINY, budget, "cpu", absent)
    assert absent == [f"plain allocations, {case.name}, torch fused: ran out of memory, as it should"]
    (row, _) = compare(case, OptimMeter("cpu"), rounds=1)
    assert row.memory == {"room": room.held[0], "plain": bench_optim_cases.SPIKE + 8 * TINY.numel, "managed": count}
    assert set(room.taken) == {9 * GIB // 4} and len(room.taken) >= 4
    room.taken.clear()
    monkeypatch.setattr(bench_optim_cases, "ROOM", bench_optim_cases.ROOM + 1)
    with pytest.raises(RuntimeError, match="nothing had to move"):
        bench_optim_cases.spike_case(TINY, budget, "cpu", absent)


def test_a_spike_that_adamw_survives_says_nothing(monkeypatch):
    Room(monkeypatch, refuse=False)
    with pytest.raises(RuntimeError, match="did not run out"):
        bench_optim_cases.spike_case(TINY, None, "cpu", [])


@pytest.mark.parametrize(("keep", "wanted"), [(True, ["step", "gone"]), (False, ["gone", "step"])])
def test_a_spike_is_there_when_the_step_is_only_if_kept(keep, wanted):
    seen = []

    class Spike:
        def __del__(self):
            seen.append("gone")

    made = steps.Spiked(Spike, keep, TINY, partial(AdamW8bit, **HYPERS))
    seen.clear()
    made.optimizer.step = lambda: seen.append("step")
    made.go()
    assert seen == wanted


# ---- what only a GPU does, with the host in its place


class Host:
    """torch.cuda as far as the meter uses it: the host is ahead of the device from a hold of `ahead_ms` on."""

    def __init__(self, monkeypatch, ahead_ms):
        self.log, self.ahead_ms, self.now, self.held = [], ahead_ms, 0.0, 0.0
        monkeypatch.setattr(torch.cuda, "Event", self.event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: self.log.append("idle"))
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep)

    def sleep(self, cycles):
        self.held = cycles / bench_optim_meter.CYCLES_MS
        self.log.append("hold")

    def event(self, enable_timing):
        event = types.SimpleNamespace(at=None, synchronize=lambda: None, query=lambda: self.held < self.ahead_ms)
        event.record = lambda: (
            self.log.append("event") or setattr(self, "now", self.now + 1) or setattr(event, "at", self.now)
        )
        event.elapsed_time = lambda end: end.at - event.at
        return event


class Watched(steps.Timed):
    host = True

    def __init__(self, log, how="events", repeats=1):
        self.log, self.how, self.repeats, self.found = log, how, repeats, "found"

    def before(self):
        self.log.append("before")

    def go(self):
        self.log.append("go")


@pytest.mark.parametrize(("ahead_ms", "held"), [(1.0, 1.0), (10.0, 16.0), (1e6, LONGEST_HOLD_MS)])
def test_the_device_is_held_until_all_is_launched(monkeypatch, ahead_ms, held):
    host = Host(monkeypatch, ahead_ms)
    seen = []
    sample = OptimMeter("cuda").prepare(Contender((Watched(host.log),)), seen.append)
    assert seen == ["found"] and sample.timed == "events"
    host.log.clear()
    assert sample.kernel_ms() == 1.0 and host.held == held
    assert host.log[-6:] == ["before", "idle", "hold", "event", "go", "event"]
    host.log.clear()
    sample.kernel_ms()
    assert host.log.count("hold") == 1  # what it takes is known now
    host.log.clear()
    assert sample.eager_ms() > 0 and host.log == ["before", "idle", "go", "idle"]


def test_a_flow_is_not_interrupted_and_a_clock_starts_and_ends_idle(monkeypatch):
    host = Host(monkeypatch, 0.0)
    flow = OptimMeter("cuda").prepare(Contender((Watched(host.log, "flow", repeats=2),)))
    host.log.clear()
    assert flow.kernel_ms() == 0.5 and host.log == ["before", "event", "go", "event"]
    clock = OptimMeter("cuda").prepare(Contender((Watched(host.log, "clock"),)))
    host.log.clear()
    assert clock.timed == "wall clock" and clock.kernel_ms() > 0
    assert host.log == ["before", "idle", "go", "idle", "idle"]


def test_launches_are_what_ran_on_the_device(monkeypatch):
    cpu, cuda = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA
    events = [
        types.SimpleNamespace(device_type=d, is_user_annotation=a)
        for d, a in ((cpu, False), (cuda, True), (cuda, False), (cuda, False))
    ]

    class Profile:
        def __enter__(self):
            return types.SimpleNamespace(events=lambda: events)

        def __exit__(self, *why):
            pass

    log = []
    contender = Contender((Watched(log),))
    assert bench_optim_meter.launches(contender) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.profiler, "profile", Profile)
    assert bench_optim_meter.launches(contender) == 2 and log == ["before", "go"]


def test_rows_of_a_gpu(monkeypatch):
    """The cases in their order; what is built is a card's."""
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(multi_processor_count=132)
    )
    built = []
    for name in ("resident_case", "moving_case", "reading_case", "cycle_case", "blocks_case", "spike_case"):
        monkeypatch.setattr(bench_optim, name, lambda *args, name=name: built.append((name, args)) or args)
    monkeypatch.setattr(bench_optim, "Waiting", lambda work, ms: ms)
    monkeypatch.setattr(bench_optim, "Products", lambda work, tokens: tokens)
    monkeypatch.setattr(bench_optim, "free", lambda: None)
    for build in bench_optim.cases("cuda", bench_optim.KINDS, [], []):
        build()
    names = [name for name, _ in built]
    assert (
        names
        == ["resident_case"] * 3
        + ["moving_case"] * 5
        + ["reading_case"]
        + ["cycle_case"] * 3
        + ["blocks_case"] * 2
        + ["spike_case"] * 2
    )
    chunks = [args[4] for name, args in built if name == "moving_case"]
    assert chunks[0] == (32 << 20, 64 << 20) and set(chunks[1:]) == {(32 << 20,)}
    (full,) = [args[0] for name, args in built if name == "cycle_case" and args[3] == 8192]
    assert full.numel == pytest.approx(1e9, rel=0.01) and full.dtype == torch.bfloat16
    assert [args[3] for name, args in built if name == "blocks_case"] == [[132, 264, 396, 1056]] * 2
    assert [args[1] for name, args in built if name == "spike_case"] == [256 << 20, None]
    assert harness.run and {args[0].numel for name, args in built if name == "resident_case"} == {41_943_040}
