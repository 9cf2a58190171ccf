"""Faults planted into the pager and into pinned staging: a text found there exactly once, and what to put in its place."""

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from paging import Case

# Texts that several replace.
ROOM = "for chunk in [c for c in self._here if c not in self._held]:"
END = "self.make_room(self.resident_bytes - (self._budget if self._memory.stays else 0))"
GOING = "sorted((c for c in self._here if c not in self._held), key=self._needed.__contains__)"
ORDER = "[c for c in self._here if c in wanted] + [c for c in wanted if c not in self._here]"
MARKED = "        self._memory.used(chunk)\n        self._held.discard(chunk)\n"
LEFT = '            here.slot.left = self._sent[chunk] = self._streams.record("out")'
HOME = "here.changed, here.stale, here.leaving = False, True, False"

PAGER = [
    # the budget
    ("+ self._sizes[chunk] - self._budget", "- self._budget"),
    ("+ self._sizes[chunk] - self._budget", "+ self._sizes[chunk] - self._budget - 1"),
    ("            over -= self._sizes[other]", "            over -= self._sizes[chunk]"),
    ("if over <= 0 or", "if over < 0 or"),
    ("if not now and (over > 0 or not self._memory.has_room(chunk)):", "if not now and not self._memory.has_room(chunk):"),
    (END, "pass"),
    (END, "self.make_room(self.resident_bytes)"),
    ("self._budget = sum(self._sizes) if budget is None else budget", "self._budget = budget or sum(self._sizes)"),
    ("return sum(self._sizes) <= self._budget and", "return sum(self._sizes) < self._budget and"),
    # who goes
    ("        del self._here[chunk]\n        self._here[chunk] = None\n\n    def _bring", "\n    def _bring"),
    (GOING, "reversed(list(self._here))"),
    (GOING, "sorted(self._here)"),
    (", key=self._needed.__contains__)", ", key=lambda c: c not in self._needed)"),
    (" or (other in self._needed and not now)", ""),
    (" or (other in self._needed and not now)", " or other in self._needed"),
    ("            going.append(other)\n", ""),
    (ROOM, "for chunk in list(self._here):"),
    (ROOM, "for chunk in [c for c in self._here if c not in self._needed]:"),
    (ROOM, "for chunk in reversed([c for c in self._here if c not in self._held]):"),
    ("if gone >= nbytes:", "if gone > nbytes:"),
    ("if gone >= nbytes:", "if gone + self._sizes[chunk] > nbytes:"),
    ("            gone += self._sizes[chunk]\n", "            gone += 1\n"),
    ("            self._send(chunk)\n            gone", "            gone"),
    # what does not stay
    (END, "self.make_room(self.resident_bytes - self._budget)"),
    ("                if not self._memory.stays:\n                    self._send(chunk)\n", ""),
    ("                if not self._memory.stays:\n                    self._send(chunk)\n", "                self._send(chunk)\n"),
    ("        if self._step is None:\n            self._memory.trim()\n", ""),
    ("        if self._step is None:\n            self._memory.trim()\n", "        self._memory.trim()\n"),
    (" and self._memory.whole", ""),
    ("(over > 0 or not self._memory.has_room(chunk))", "over > 0"),
    ("if not now and (over > 0 or not self._memory.has_room(chunk)):", "if over > 0 and not now or not self._memory.has_room(chunk):"),
    ("self._memory.has_room(chunk)", "self._memory.has_room(0)"),
    ("        if not again:", "        if True:"),
    ("        if not again:", "        if again:"),
    ("        self._announced.discard(chunk)\n", ""),
    ("        self._announced.clear()\n", ""),
    # memory that ends
    ("                if not now:\n                    return False\n", ""),
    ("                if not now:\n                    return False\n", "                return False\n"),
    ("                    return False\n                if not (rest", "                    raise\n                if not (rest"),
    ("                if not (rest := self._leaving()):\n                    raise\n                self._send(rest[0])\n", "                raise\n"),
    ("                self._send(rest[0])\n", "                self._send(rest[-1])\n"),
    # what is needed
    ("        self._needed.add(chunk)\n", ""),
    ("        self._needed.discard(chunk)\n", ""),
    ("        self._needed = set(wanted)\n", ""),
    ("        self._needed = set(wanted)\n", "        self._needed |= set(wanted)\n"),
    ("        self._needed.update(wanted)\n", ""),
    ("            self._bring(chunk)\n\n", "            pass\n\n"),
    ("            self._bring(chunk)\n\n", "            self._bring(chunk, now=True)\n\n"),
    # order
    (ORDER, "list(wanted)"),
    (ORDER, "[c for c in wanted if c not in self._here] + [c for c in self._here if c in wanted]"),
    ("[c for c in self._here if c in wanted] +", "[c for c in self._here] +"),
    ("wanted = dict.fromkeys(chunks)", "wanted = dict.fromkeys(sorted(chunks))"),
    # ahead
    ("order[place + 1 : place + 1 + self._ahead]", "order[place + 1 : place + self._ahead]"),
    ("order[place + 1 : place + 1 + self._ahead]", "order[place + 1 : place + 2 + self._ahead]"),
    ("order[place + 1 : place + 1 + self._ahead]", "order[place + 2 : place + 2 + self._ahead]"),
    ("                    if not self._bring(later):\n                        break\n", "                    self._bring(later)\n"),
    ("if not self._bring(later):", "if not self._bring(later, now=True):"),
    # waits and marks
    ("                self._memory.wait(chunk)\n                for later", "                for later"),
    ("            for chunk in every:\n                self._memory.wait(chunk)\n", ""),
    ("                self._bring(chunk, now=True)\n                self._memory.wait(chunk)\n",
     "                self._memory.wait(chunk)\n                self._bring(chunk, now=True)\n"),
    (MARKED, "        self._held.discard(chunk)\n"),
    (MARKED, "        self._held.discard(chunk)\n        self._memory.used(chunk)\n"),
    ("                self._mark(chunk)\n                if not", "                if not"),
    ("                self._held.add(chunk)\n", ""),
    ("            self._held.update(every)\n", ""),
    ("                self._step = None\n                self.make_room", "                self.make_room"),
    ("        if self._step is None:\n            self._settle()\n", ""),
    ("        if self._step is None:\n            self._settle()\n", "        self._settle()\n"),
    ("        self._check(wanted)\n        self._settle()\n", "        self._check(wanted)\n"),
    ("            if self._step is step:\n", "            if True:\n"),
    ("                if self._step is not step:\n", "                if False:\n"),
    # failing calls
    ("            try:\n                self._memory.fetch(chunk)\n",
     "            try:\n                self._here[chunk] = None\n                self._memory.fetch(chunk)\n"),
    ("        self._memory.send(chunk)\n        del self._here[chunk]\n",
     "        del self._here[chunk]\n        self._memory.send(chunk)\n"),
    ("            else:\n                self._here[chunk] = None\n", "            else:\n"),
    ("        if chunk in self._here:\n            return True\n", ""),
    ("        for other in going:\n            self._send(other)\n", ""),
    # bad arguments
    ("if not 0 <= chunk < len(self._sizes):", "if not chunk < len(self._sizes):"),
    ("if not 0 <= chunk < len(self._sizes):", "if not 0 <= chunk <= len(self._sizes):"),
    ("        self._check((chunk,))\n", ""),
    ("        self._check(wanted)\n", ""),
]  # fmt: skip

# What orders copies and kernels: the clocks find it, for contents are right by luck.
STAGED_ORDER = [
    ('        self._streams.wait("in", slot.left)\n', ""),
    ('            self._streams.wait("in", self._sent[chunk])\n', "            pass\n"),
    ('        fetched = self._streams.record("in")\n', "        fetched = slot.left\n"),
    ('        self._here[chunk] = _Here(slot, fetched, fetched)', '        self._here[chunk] = _Here(slot, slot.left, slot.left)'),
    (LEFT, '            self._sent[chunk] = self._streams.record("out")'),
    (LEFT, '            here.slot.left = self._streams.record("out")'),
    (LEFT, '            here.slot.left = self._sent[chunk] = here.used'),
    (LEFT, '            here.slot.left = self._sent[chunk] = self._streams.record("in")'),
    ('        self._streams.wait("current", here.fetched)\n', ""),
    ('        self._streams.wait("current", here.fetched)\n', '        self._streams.wait("out", here.fetched)\n'),
    ('self._here[chunk].used = self._streams.record("current")', 'self._here[chunk].used = self._here[chunk].fetched'),
    ('self._here[chunk].used = self._streams.record("current")', 'self._here[chunk].used = self._streams.record("out")'),
    ('        self._streams.wait("out", after)\n', ""),
    ('        self._streams.wait("out", after)\n', '        self._streams.wait("in", after)\n'),
    ("            self._copy_out(chunk, here.used)", "            self._copy_out(chunk, here.fetched)"),
    ('free = self._streams.record("current")', 'free = self._streams.record("in")'),
    ('        launched = self._streams.record("current")', '        launched = self._streams.record("out")'),
    ("        self._streams.synchronize()\n", ""),
    ('            self._streams.wait("current", self._streams.record("out"))\n', ""),
    ('            here.fetched = here.used = self._streams.record("in")\n', ""),
    ("        self._here[chunk].leaving = True\n", ""),
]  # fmt: skip
STAGED = [
    ("            self._streams.share(t)\n", "            pass\n"),
    # places
    ("        slot = own or self._free[0]", "        slot = own or self._free[-1]"),
    ("            self._free.popleft()\n", "            self._free.rotate()\n"),
    ("            self._free.append(here.slot)\n", "            self._free.appendleft(here.slot)\n"),
    ("            self._free.append(here.slot)\n", "            pass\n"),
    ("        if chunk not in self._own:\n", "        if True:\n"),
    ("{layout.count - 1: slots.pop()}", "{0: slots.pop()}"),
    ("{layout.count - 1: slots.pop()}", "{}"),
    ("full = max(1, budget // layout.nbytes(0))", "full = budget // layout.nbytes(0)"),
    ("full = max(1, budget // layout.nbytes(0))", "full = max(1, budget // layout.nbytes(0) - 1)"),
    ("    if layout.nbytes(layout.count - 1) > budget - full * layout.nbytes(0):\n        return spans[:full]\n", ""),
    ("        return spans[:full]", "        return spans[-full:]"),
    ("full * layout.chunk + end - first)]", "full * layout.chunk + end - first - 256)]"),
    ("self._total <= (WHOLE if budget is None else budget)", "self._total < (WHOLE if budget is None else budget)"),
    ('to[: end - first], of[first:end])', 'to[: end - first], of[: end - first])'),
    ('to[first:end], of[: end - first])', 'to[: end - first], of[: end - first])'),
    # contents
    ("        here.changed = True\n", ""),
    ("if here.changed:\n            self._copy_out(chunk, here.used)", "if True:\n            self._copy_out(chunk, here.used)"),
    ("            if here.changed:\n", "            if not here.stale:\n"),
    (HOME, "here.changed, here.leaving = False, False"),
    (HOME, "here.stale, here.leaving = True, False"),
    (HOME, "here.changed, here.stale = False, True"),
    ("            here.stale = False\n", ""),
    ("            self._copy_in(chunk, here.slot)\n", ""),
    # what does not stay
    ("self.stays = budget is not None or not self._total", "self.stays = True"),
    ("self.stays = budget is not None or not self._total", "self.stays = budget is not None"),
    (" if budget is None else budget)", ")"),
    (" if budget is None else budget)", " if budget is None else 0)"),
    ("return bool(self._arenas) or (", "return bool(self._own) or ("),
    ("return bool(self._arenas) or (", "return ("),
    ("self._small and not self._spare.own and", "not self._spare.own and"),
    ("self._small and not self._spare.own and", "self._small and"),
    (" and self._spare.holds(self._total)", ""),
    ("return self.stays or chunk in self._own", "return chunk in self._own"),
    (" or chunk in self._own or bool(self._free)", " or bool(self._free)"),
    (" or bool(self._free) or", " or"),
    ("bool(self._free) or self._spare.holds(self.layout.nbytes(0))", "True"),
    ("        self._grow()\n        own", "        own"),
    ("        if self.stays or self._own:\n", "        if self._own:\n"),
    ("        if self.stays or self._own:\n", "        if self.stays:\n"),
    ("        if self.whole:\n            self._take_all()\n        elif", "        if"),
    ("elif not self._free or (len(self._here)", "elif (len(self._here)"),
    ("elif not self._free or (len(self._here) + len(self._free) < SLOTS and", "elif (not self._free or True) and ("),
    ("len(self._free) < SLOTS", "len(self._free) < SLOTS - 1"),
    ("len(self._free) < SLOTS", "len(self._free) <= SLOTS"),
    ("len(self._here) + len(self._free) < SLOTS", "len(self._free) < SLOTS"),
    ("SLOTS and self._spare.holds(self.layout.nbytes(0))", "SLOTS"),
    ("elif not self._free or (len", "elif self._spare.holds(self.layout.nbytes(0)) and (not self._free or len"),
    ("                if not self._free:\n                    raise\n", "                raise\n"),
    ("                if not self._free:\n                    raise\n", "                pass\n"),
    ("self._free.extendleft(", "self._free.extend("),
    ("self._take([self.layout.span(0)])", "self._take([self.layout.span(self.layout.count - 1)])"),
    ("        if self.stays:\n            return\n", ""),
    ("        self._free.clear()\n", ""),
    ("        self._spare.own -= sum(", "        sum("),
    ("        self._spare.own += sum(", "        sum("),
    ("            self._own, self._arenas, self._spare.own = {}, (), 0\n", ""),
    ("            self._own, self._arenas, self._spare.own = {}, (), 0\n", "            self._own, self._arenas = {}, ()\n"),
    ("            self._own, self._arenas, self._spare.own = {}, (), 0\n", "            self._own, self._spare.own = {}, 0\n"),
    ("            self._own, self._arenas, self._spare.own = {}, (), 0\n", "            self._arenas, self._spare.own = (), 0\n"),
    ("        if not self._here:\n            self._own", "        if True:\n            self._own"),
    ("            self._spare.forget()\n", ""),
    ("(), (), {}, {}, deque()", "(), self._arenas, {}, {}, deque()"),
    ("(), (), {}, {}, deque()", "(), (), {}, {}, self._free"),
    # failing calls
    ("            here.leaving = False\n", ""),
    ("            self._free.popleft()\n        self._here", "            pass\n        self._here"),
]  # fmt: skip


# What a device has to spare, in `nf4lora.optim.streams`.
SPARE = [
    ("        return torch.cuda.mem_get_info(self._device)[0] + kept, used", "        return torch.cuda.mem_get_info(self._device)[0], used"),
    ('stats[name]["all"]["current"] if stats else 0', 'stats[name]["all"]["current"]'),
    ('("reserved_bytes", "active_bytes")', '("active_bytes", "reserved_bytes")'),
    ("        if found is None:\n            return True\n", "        if found is None:\n            return False\n"),
    ("max(self._others, used - self.own)", "max(self._others, used)"),
    ("max(self._others, used - self.own)", "used - self.own"),
    ("self.own + nbytes <=", "nbytes <="),
    ("self.own + nbytes <=", "self.own + nbytes <"),
    (" - self._others - RESERVE", " - RESERVE"),
    (" - self._others - RESERVE", " - self._others"),
    ('        """What others were seen to use."""\n        self._others = 0\n', '        """What others were seen to use."""\n'),
]  # fmt: skip
# Hints that fail, and the budget of what does not fit, in `nf4lora.optim.managed`.
MANAGED = [
    ("            except RuntimeError as error:", "            except KeyError as error:"),
    ('                refusal = str(error)\n', '                refusal = str(error)\n                return\n'),
    ('                refusal = str(error)\n', '                refusal = str(error)\n                break\n'),
    ("        if refusal and not self._refused:\n", "        if refusal:\n"),
    ("        if refusal and not self._refused:\n", "        if not refusal and not self._refused:\n"),
    ("            self._refused = True\n", ""),
    ('what = f"paged optimizer: {refusal};', 'what = f"paged optimizer: a move;'),
    ("RuntimeWarning, stacklevel=2", "UserWarning, stacklevel=2"),
    ("        self._record(self._moved[chunk], self._side)\n        self._torn", "        self._torn"),
    ("        self._torn.discard(chunk)\n        if refusal", "        if refusal"),
    ("            if allow_oversubscription:\n", "            if False:\n"),
    (" + room.resident - managed.RESERVE", " - managed.RESERVE"),
    (" + room.resident - managed.RESERVE", " + room.resident"),
    ("room.held - max(", "sum(map(self.layout.nbytes, range(self.layout.count))) - max("),
    (", 2 * sizes[0])", ", sizes[0])"),
    ("max(sum(sizes) - over, 2 * sizes[0])", "sum(sizes) - over"),
    ("max(sum(sizes) - over, 2 * sizes[0])", "2 * sizes[0]"),
    ("if over > 0 and sizes", "if over >= 0 and sizes"),
    ("if over > 0 and sizes", "if sizes"),
    ("if over > 0 and sizes", "if over > 0"),
]  # fmt: skip
# What a pool passes on, in `nf4lora.optim.pool`.
POOL = [
    ("self.memory.budget if budget is None else budget", "budget"),
    ("self.memory.budget if budget is None else budget", "self.memory.budget"),
    ("        grads = [g if g.is_contiguous() else g.contiguous() for g in grads]\n", ""),
    ("self._gradients.get(p, 0) + 1", "1"),
    ("self._gradients[p] >= self._backwards", "True"),
    ("self._gradients[p] >= self._backwards", "self._gradients[p] > self._backwards"),
    ("self.memory.stays or self._gradients", "self._gradients"),
    ("max(self._gradients.values(), default=math.inf)", "min(self._gradients.values(), default=math.inf)"),
    ("max(self._gradients.values(), default=math.inf)", "max(self._gradients.values(), default=1)"),
    ("        self._gradients.clear()\n", ""),
    ("self._backwards = math.inf", "self._backwards = 1"),
]  # fmt: skip


def mutant(stem: str, old: str, new: str) -> ModuleType:
    """A module of nf4lora.optim with one text replaced, that nobody else imports."""
    real = import_module(f"nf4lora.optim.{stem}")
    text = Path(real.__file__).read_text()
    if text.count(old) != 1:
        raise ValueError(f"{stem}: found {text.count(old)} of {old!r}, wanted exactly 1")
    made = ModuleType(f"nf4lora.optim.{stem}_mutant")
    made.__package__ = "nf4lora.optim"
    sys.modules[made.__name__] = made  # where dataclasses look for it
    exec(compile(text.replace(old, new), f"{stem} with {new!r}", "exec"), vars(made))  # noqa: S102
    return made


def drawn(strategy, count: int) -> list[Case]:
    """The first cases of a strategy, drawn once for all mutants."""
    found: list[Case] = []

    @settings(max_examples=count, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(strategy)
    def draw(case: Case) -> None:
        found.append(case)

    draw()
    return found


def verdicts(
    stem: str, mutants: list[tuple[str, str]], check: Callable[[ModuleType], None]
) -> dict[tuple[str, str], type | None]:
    """What each mutant makes the check raise, None where it passes as the real module does."""
    check(import_module(f"nf4lora.optim.{stem}"))
    found: dict[tuple[str, str], type | None] = {}
    for old, new in mutants:
        module = mutant(stem, old, new)
        try:
            check(module)
            found[old, new] = None
        except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001
            found[old, new] = type(error)
    return found
