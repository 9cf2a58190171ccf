"""Properties every pager must have over every memory that pages: drawn cases, an exact LRU to compare with, a driver."""

import weakref
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from random import Random

import torch
from hypothesis import strategies as st
from torch import Tensor

from nf4lora.managed import RESERVE
from nf4lora.optim.memory import Layout, Resident
from nf4lora.optim.simulated import Clocks, Injected, Simulated, Unordered
from nf4lora.optim.streams import InOrder


class Abandoned(Exception):
    """Of a caller, while it steps."""


@dataclass
class Step:
    """chunks: stepped, in the caller's order. announced: before it. during: what happens at which of its yields.

    room: bytes asked for after it; home: whether it is saved, and loaded with other contents, after that. others: bytes of
    the device that others take from before its announcements on, and from before its first chunk on.
    """

    chunks: list[int]
    announced: list[int] = field(default_factory=list)
    during: dict[int, tuple[str, int]] = field(default_factory=dict)
    room: int = 0
    home: bool = False
    at_once: bool = False  # by `all`, where everything fits
    others: tuple[int, int] = (0, 0)


@dataclass
class Case:
    """room: bytes of a device on which nothing stays between steps; whole: if all of it may be one arena there; hopeful: if
    the device says that there is room where there is none, or only in pieces."""

    layout: Layout
    budget: int | None
    ahead: int
    steps: list[Step]
    fail_at: tuple[int, ...] = ()
    room: int | None = None
    whole: bool = True
    hopeful: bool = False

    @property
    def bytes(self) -> int:
        total = sum(map(self.layout.nbytes, range(self.layout.count)))
        return total if self.budget is None else self.budget


# Every chunk twice, some announced, more than the budget holds, a last one that is short.
SCENARIO = [
    Step([0, 1, 2, 3, 4]),
    Step([4, 2, 0], [3, 2]),
    Step([1, 3], [1], room=512),
    Step([0, 1, 2, 3, 4], home=True),
    Step([3]),
]
UINT8 = Layout(256 * 9, (torch.uint8,), 512)


@st.composite
def cases(draw, orderly: bool = False, failures: bool = False, stays: bool = True):
    """orderly: nothing happens during steps, and every chunk of one is stepped. Steps are numbers, which draw quickly."""
    per_chunk, blocks, room = draw(st.integers(1, 3)), draw(st.integers(1, 18)), draw(st.integers(-1, 18))
    dtypes = draw(st.sampled_from([(torch.uint8,), (torch.float32,), (torch.float32, torch.uint8)]))
    layout = Layout(min(blocks, 6 * per_chunk) * 256, dtypes, 256 * per_chunk)
    unit = 256 * sum(d.itemsize for d in dtypes)
    steps = [
        a_step_of(number, layout, unit, orderly)
        for number in draw(st.lists(st.integers(0, 10**9), min_size=1, max_size=5))
    ]
    fail_at = tuple(draw(st.lists(st.integers(1, 60), min_size=1, max_size=4))) if failures else ()
    budget = None if room < 0 else max(room * unit + draw(st.sampled_from([0, 0, -1, 1])), 0)
    ahead = draw(st.integers(0, 3))
    if stays:
        return Case(layout, budget, ahead, steps, fail_at)
    room = max(budget if budget is not None else 20 * unit, layout.nbytes(0))
    for step in steps:
        free = room - layout.nbytes(0)
        step.others = draw(st.tuples(*[st.sampled_from([0, 0, free, free // 2, free - min(free, unit)])] * 2))
    return Case(layout, None, ahead, steps, fail_at, room, draw(st.booleans()), not orderly and draw(st.booleans()))


def a_step_of(number: int, layout: Layout, unit: int, orderly: bool) -> Step:
    """0 steps everything in order and does nothing else."""
    every = list(range(layout.count))
    if not number:
        return Step(every)
    drawn = Random(number)
    chunks = drawn.sample(every, drawn.choice([layout.count, drawn.randint(0, layout.count)]))
    step = Step(chunks, drawn.sample(every, drawn.randint(0, layout.count)), home=drawn.random() < 0.3)
    step.room = drawn.choice([0, 0, drawn.randint(0, 6) * unit, 10**9])
    if not orderly:
        acts = ["prefetch", "room", "leave", "raise"]
        step.during = {
            drawn.randrange(6): (drawn.choice(acts), drawn.choice(every)) for _ in range(drawn.randint(0, 2))
        }
        step.at_once = drawn.random() < 0.5
    return step


class Watched(Simulated):
    """Finds more than the budget on the device as soon as it happens."""

    def __init__(self, case: Case) -> None:
        self.budget, self.may_be_whole, self.hopeful = case.bytes, case.whole, case.hopeful
        stays = case.room is None
        super().__init__(
            case.layout, max(case.bytes, case.layout.nbytes(0)) if stays else case.room, case.fail_at, stays
        )

    @property
    def whole(self) -> bool:
        """As of memory that takes all of it at once."""
        return self.stays or (self.may_be_whole and self.budget + self.others <= self.capacity)

    def fetch(self, chunk: int) -> None:
        super().fetch(chunk)
        there = sum(map(self.layout.nbytes, self.resident))
        assert there <= self.budget or len(self.resident) == 1, f"{there} bytes on the device"


class Recorded(InOrder):
    """Streams that do everything at once, and raise where nothing but luck ordered it. Calls of `fail_at` raise, once `armed`.

    room: bytes of the device, beside `RESERVE`, of which `others` take some. Where it is hopeful, they are free in pieces
    only: every third allocation fails. `wrong`: what of the memory that was dropped might still be used then.
    """

    def __init__(self, fail_at: tuple[int, ...] = (), room: int | None = None, hopeful: bool = False) -> None:
        self.clocks = Clocks("current", "in", "out", "next")
        self.fail_at, self.armed, self.calls = fail_at, False, 0
        self.copies = {"in": 0, "out": 0}
        self.synchronized = 0
        self.shared: list[int] = []  # addresses
        self.bytes, self.hopeful, self.others = room, hopeful, 0
        self.taken = self.most_taken = self.taking = 0
        self.wrong: list[Unordered] = []

    def room(self) -> tuple[int, int] | None:
        if self.bytes is None:
            return None
        return self.bytes + RESERVE, self.others + self.taken

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        self.call("empty")
        self.taking += 1
        nbytes = numel * dtype.itemsize
        over = self.bytes is not None and self.taken + self.others + nbytes > self.bytes
        if over or (self.hopeful and self.taking % 3 == 0):
            raise torch.OutOfMemoryError(f"found no room for {nbytes} bytes")
        t = torch.empty(numel, dtype=dtype)
        self.kernel([t])  # which used this memory before it was freed
        self.taken += nbytes
        self.most_taken = max(self.most_taken, self.taken)
        alias = torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())  # which does not keep t
        weakref.finalize(t, self.drop, alias).atexit = False
        return t

    def drop(self, memory: Tensor) -> None:
        """Its next user comes after what is under way on the streams that allocated it or share it."""
        self.taken -= memory.nbytes
        for stream in ("current", *(("in", "out") if memory.data_ptr() in self.shared else ())):
            self.clocks.wait("next", self.clocks.record(stream))
        try:
            self.clocks.access("next", [memory], write=True)
        except Unordered as error:
            self.wrong.append(error)
        self.clocks.forget(memory)
        self.shared = [address for address in self.shared if address != memory.data_ptr()]
        memory.fill_(255)

    def copy(self, stream: str, to: Tensor, of: Tensor) -> None:
        self.call("copy")
        self.clocks.access(stream, [of], write=False)
        self.clocks.access(stream, [to], write=True)
        self.copies[stream] += 1
        to.copy_(of)

    def record(self, stream: str) -> dict[str, int]:
        self.call("record")
        return self.clocks.record(stream)

    def wait(self, stream: str, event: dict[str, int]) -> None:
        self.call("wait")
        self.clocks.wait(stream, event)

    def synchronize(self) -> None:
        self.call("synchronize")
        self.synchronized += 1
        self.clocks.synchronize("in", "out")

    def share(self, t: Tensor) -> None:
        self.call("share")
        self.shared.append(t.data_ptr())

    def kernel(self, arenas: Sequence[Tensor]) -> None:
        self.clocks.access("current", arenas, write=True)

    def host(self, arenas: Sequence[Tensor]) -> None:
        self.clocks.access("host", arenas, write=True)

    def call(self, name: str) -> None:
        self.calls += self.armed
        if self.armed and self.calls in self.fail_at:
            raise Injected(f"call {self.calls}, {name}")


class LRU:
    """Demand paging: a chunk comes when it is touched, and then the least recently touched go until it fits."""

    def __init__(self, case: Case) -> None:
        self.size, self.budget = case.layout.nbytes, case.bytes
        self.here: list[int] = []
        self.fetches = 0
        self.kept: set[int] = set()  # what may not go for an announced chunk

    def over(self, nbytes: int = 0) -> int:
        return sum(map(self.size, self.here)) + nbytes - self.budget

    def touch(self, chunk: int) -> None:
        if chunk in self.here:
            self.here.remove(chunk)
        else:
            self.fetches += 1
            while self.here and self.over(self.size(chunk)) > 0:
                self.here.pop(0)
        self.here.append(chunk)

    def step(self, chunks: list[int]) -> None:
        for chunk in chunks:
            self.touch(chunk)
        while self.over() > 0:
            self.here.pop(0)
        self.kept = set(chunks)

    def announce(self, chunk: int) -> list[tuple[str, int]]:
        """What moves."""
        self.kept.add(chunk)
        if chunk in self.here:
            return []
        free = [c for c in self.here if c not in self.kept]
        going = []
        while free and self.over(self.size(chunk)) - sum(map(self.size, going)) > 0:
            going.append(free.pop(0))
        if self.over(self.size(chunk)) - sum(map(self.size, going)) > 0:
            return []
        self.here = [c for c in self.here if c not in going] + [chunk]
        self.fetches += 1
        return [("send", c) for c in going] + [("fetch", chunk)]

    def room(self, nbytes: int) -> int:
        gone = 0
        while self.here and gone < nbytes:
            gone += self.size(self.here.pop(0))
        return gone


def load(arenas: tuple[Tensor, ...], seed: int) -> None:
    """Contents in which every element differs from its neighbours in its own and other chunks."""
    for i, t in enumerate(arenas):
        t.copy_((torch.arange(t.numel()) * 7 + t.numel() // 256 * i + 31 * seed) % 251 + torch.arange(t.numel()) // 256)


def same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(found, wanted, strict=True))


class Play:
    """Plays a case on a memory, and without paging; `launched` is told the arenas a kernel is about to touch."""

    def __init__(
        self,
        case: Case,
        pager: Callable,
        memory,
        launched: Callable = lambda arenas: None,
        host: Callable = lambda arenas: None,
        device=None,
    ) -> None:
        self.case, self.memory, self.launched, self.host = case, memory, launched, host
        self.device = device or memory  # whose `others` take of its room
        self.plain = Resident(case.layout, torch.device("cpu"))
        self.pager = pager(memory, case.budget, case.ahead)
        self.number = self.errors = 0
        self.home(1)

    def retried(self, act: Callable):
        for _ in range(10):
            try:
                return act()
            except (Injected, torch.OutOfMemoryError):
                self.errors += 1
        raise AssertionError("it fails for ever")

    def kernel(self, arenas: tuple[Tensor, ...]) -> None:
        for t in arenas:
            t.mul_(3).add_(self.number)

    def announce(self, chunk: int) -> None:
        try:
            self.pager.prefetch(chunk)
        except Injected:
            self.errors += 1

    def step(self, step: Step) -> list[int]:
        """Returns the chunks in the order in which they were stepped."""
        self.number += 1
        self.device.others = step.others[1]
        done: list[int] = []
        if step.at_once and self.pager.fits:
            self.retried(lambda: self.at_once(done))
        if done:
            return done
        during = dict(step.during)
        for _ in range(20):
            try:
                self.some([c for c in step.chunks if c not in done], done, during)
                return done
            except (Injected, Abandoned):
                self.errors += 1
            except torch.OutOfMemoryError:
                assert self.case.hopeful and (self.errors or not done), "out of memory in the middle of a step"
                self.errors += 1
        raise AssertionError("it fails for ever")

    def some(self, todo: list[int], done: list[int], during: dict[int, tuple[str, int]]) -> None:
        with (
            closing(self.pager.stepping(todo))
            if self.case.fail_at
            else nullcontext(self.pager.stepping(todo)) as chunks
        ):
            self.each(chunks, todo, done, during)

    def each(self, chunks, todo, done, during) -> None:
        for chunk in chunks:
            assert chunk in todo and chunk not in done
            act, argument = during.pop(len(done), ("", 0))
            if act == "prefetch":
                self.pager.prefetch(argument)
            if act == "room":
                self.pager.make_room(argument * self.case.layout.nbytes(0))
            self.both(chunk, self.memory.arenas(chunk))
            done.append(chunk)
            if act == "leave":
                return
            if act == "raise":
                raise Abandoned
        assert set(todo) <= set(done)

    def at_once(self, done: list[int]) -> None:
        if done or not self.pager.fits:  # launched, but then marking the chunks as used raised; or there is no room now
            return
        with self.pager.all() as arenas:
            self.both(None, arenas)
            done.extend(range(self.case.layout.count))

    def both(self, chunk: int | None, arenas: tuple[Tensor, ...]) -> None:
        self.launched(arenas)
        self.kernel(arenas)
        self.kernel(self.plain.arenas(chunk))

    def home(self, seed: int) -> None:
        """Saves, compares, and loads other contents."""
        found, wanted = self.retried(self.memory.home), self.plain.home()
        self.host(found)
        if self.number:
            assert same(found, wanted)
        load(found, seed)
        load(wanted, seed)

    def end(self) -> None:
        found = self.retried(self.memory.home)
        self.host(found)
        assert same(found, self.plain.home())


def unruly(case: Case, pager: Callable, memory=None, **hooks: Callable) -> Play:
    """Whatever happens around and during steps, and whichever calls fail, contents are those of a run without paging."""
    play = Play(case, pager, memory or Watched(case), **hooks)
    for n, step in enumerate(case.steps):
        play.device.others = step.others[0]
        for chunk in step.announced:
            play.announce(chunk)
        errors = play.errors
        play.step(step)
        if case.room is not None and errors == play.errors:
            gone(play)
        resident(play)
        play.retried(lambda step=step: play.pager.make_room(step.room))
        if step.room >= 10**9:
            assert play.pager.resident_bytes == 0
        resident(play)
        if step.home:
            play.home(n + 2)
    play.end()
    return play


def gone(play: Play) -> None:
    """All room is others'."""
    assert play.pager.resident_bytes == 0
    if isinstance(play.memory, Simulated):
        assert play.memory.resident == set() and play.memory.log[-1] == ("trim", -1)
    else:
        assert play.device.taken == 0


def resident(play: Play) -> None:
    if isinstance(play.memory, Simulated):
        assert play.pager.resident_bytes == sum(map(play.case.layout.nbytes, play.memory.resident))
    assert play.pager.resident_bytes <= max(play.case.bytes, play.case.layout.nbytes(0))


def orderly(case: Case, pager: Callable) -> None:
    """Transfers are those of an exact LRU on the steps' order, which is the best one; fetches are ahead of their use."""
    memory = Watched(case)
    play, lru = Play(case, pager, memory), LRU(case)
    for n, step in enumerate(case.steps):
        for chunk in step.announced:
            for _ in range(2):
                memory.log.clear()
                wanted = lru.announce(chunk)
                play.pager.prefetch(chunk)
                assert memory.log == wanted
        memory.log.clear()
        there = memory.resident
        done = play.step(step)
        a_step(case, step, done, there, memory.log)
        lru.step(done)
        assert memory.resident == set(lru.here)
        assert memory.fetches == lru.fetches
        resident(play)
        assert play.pager.resident_bytes <= case.bytes
        assert play.pager.make_room(step.room) == lru.room(step.room)
        assert memory.resident == set(lru.here)
        if step.home:
            play.home(n + 2)
    play.end()
    assert memory.faults == 0


def passing(case: Case, pager: Callable) -> None:
    """Where nothing stays: what is announced comes once, if there is room; each chunk of a step comes at most once, ahead of
    its use if there is room, and leaves as soon as it was stepped."""
    memory, size = Watched(case), case.layout.nbytes
    play = Play(case, pager, memory)
    for n, step in enumerate(case.steps):
        memory.others = step.others[0]
        announced: list[int] = []
        for chunk in step.announced:
            for _ in range(2):
                memory.log.clear()
                room = case.room - memory.others - sum(map(size, memory.resident))
                comes = chunk not in announced and size(chunk) <= room
                announced.append(chunk)
                play.pager.prefetch(chunk)
                assert memory.log == [("fetch", chunk)] * comes
        there, memory.log = [c for c in dict.fromkeys(announced) if c in memory.resident], []
        free = case.room - step.others[1]
        at_home = set(range(case.layout.count)) - set(there)
        done = play.step(step)
        crowded = sum(map(size, there)) + size(0) > free
        if not crowded:
            assert done == [c for c in there if c in step.chunks] + [c for c in step.chunks if c in at_home]
            assert [c for name, c in memory.log if name == "fetch"] == [c for c in step.chunks if c in at_home]
        assert sorted(done) == sorted(step.chunks)
        assert [c for name, c in memory.log if name == "wait"] == done
        for chunk in done:
            at = memory.log.index(("used", chunk))
            assert memory.log[at + 1] == ("send", chunk)
        if case.ahead and not crowded:
            for place, chunk in enumerate(done[1:], 1):
                before = memory.log.index(("touch", done[place - 1]))
                late = ("fetch", chunk) in memory.log[before:]
                assert not late or size(chunk) + size(done[place - 1]) + sum(map(size, there)) > free
        gone(play)
        assert play.pager.make_room(step.room) == 0
        if step.home:
            play.home(n + 2)
    play.end()
    assert memory.faults == 0


def a_step(case: Case, step: Step, done: list[int], there: set[int], log: list[tuple[str, int]]) -> None:
    size = case.layout.nbytes
    assert sorted(done) == sorted(step.chunks)
    missing = [c for c in step.chunks if c not in there]
    assert done[len(done) - len(missing) :] == missing
    assert [c for name, c in log if name == "fetch"] == missing
    assert [c for name, c in log if name == "wait"] == done
    assert [(n, c) for n, c in log if n in ("touch", "used")] == [(n, c) for c in done for n in ("touch", "used")]
    at = {entry: place for place, entry in enumerate(log)}
    for j, chunk in enumerate(done):
        if chunk in there:
            continue
        for a in range(1, min(case.ahead, j) + 1):
            if sum(map(size, done[j - a : j + 1])) <= case.bytes:
                assert at["fetch", chunk] < at["touch", done[j - a]], f"{chunk} comes too late"
        if j > case.ahead:
            assert at["fetch", chunk] > at["used", done[j - case.ahead - 1]], f"{chunk} comes too early"
