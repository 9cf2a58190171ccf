"""The cases of bench_optim: who steps what, and what must come out before any of it is timed."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nf4lora import backends
from nf4lora.optim import AdamW8bit, PagedAdamW, PagedAdamW8bit, PagedLion8bit

from .bench_optim_steps import (
    Away,
    Bare,
    Blocks,
    Cycle,
    Loop,
    Move,
    Read,
    Spiked,
    Through,
    Work,
    lora_shapes,
    state_bytes,
    step_traffic,
)
from .files import COPY
from .harness import Case, differing_bytes
from .peers import why_not
from .roofline import TILES, copy, fastest_tile
from .timing import Contender, CudaMeter

HYPERS = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.01}
MIB, GIB = 2**20, 2**30
BUDGET = 192 * MIB  # of states that are stepped in chunks: three of 64 MiB, one coming, one stepped, one going
RULES = {"AdamW, float32": PagedAdamW, "AdamW, 8 bits": PagedAdamW8bit, "Lion, 8 bits": PagedLion8bit}
STATES = {PagedAdamW: (32, 2), PagedAdamW8bit: (8, 2), PagedLion8bit: (8, 1)}  # bits, how many
BITSANDBYTES = {
    PagedAdamW: {"bitsandbytes paged": "PagedAdamW"},
    PagedAdamW8bit: {"bitsandbytes paged": "PagedAdamW8bit", "bitsandbytes": "AdamW8bit"},
    PagedLion8bit: {"bitsandbytes paged": "PagedLion8bit"},
}
ROOM, SPIKE, SPIKE_BUDGET = 4 * GIB, 9 * GIB // 4, 256 * MIB  # beside them parameters, gradients 1 GiB, states another


def ours(
    kind: Callable[..., Loop], work: Work, rule: type, backend: str, place: str | None = None, chunk: int | None = None,
    **more: Any,
) -> Contender:  # fmt: skip
    """Steps on `backend`, with states in `place` of `bench_optim_steps.PLACES`; None: where the package puts them."""
    with backends.use_backend(backend):
        return Contender((kind(work, partial(rule, **HYPERS, **more), place, chunk),), backend, ours=True)


def gated(group: str, name: str, work: Work, rule: type, contenders: dict[str, Contender], **more: Any) -> Case:
    """Ours must leave the bytes that the reference leaves, which steps states that never move."""
    with backends.use_backend("reference"):
        wanted = Loop(work, partial(rule, **HYPERS), "resident").found

    def error(found: Sequence[Tensor]) -> dict[str, float]:
        return {"differing_bytes": differing_bytes([t.to(work.device) for t in found], wanted)}

    def gate(found: Sequence[Tensor]) -> None:
        wrong = error(found)["differing_bytes"]
        assert not wrong, f"{wrong} bytes of the parameters are not the reference's"

    return Case(group, name, contenders, gate, error, **more)


def resident_case(work: Work, title: str, backend: str, absent: list[str]) -> Case:
    """A step whose states are on the device."""
    rule = RULES[title]
    contenders = {"nf4lora": ours(Loop, work, rule, backend)}
    pages = work.device == "cuda"
    if rule is not PagedLion8bit and pages:
        plain = AdamW8bit if rule is PagedAdamW8bit else rule
        contenders["nf4lora, not paged"] = ours(Loop, work, plain, backend, "resident")
    if backend == "cuda" and rule is not PagedAdamW:
        with _or_absent(absent, f"{title}, nf4lora triton"):
            contenders["nf4lora triton"] = ours(Loop, work, rule, "triton")
    for how in ("fused", "foreach") if "AdamW" in title else ():
        with _or_absent(absent, f"{title}, torch {how}"):
            contenders[f"torch {how}"] = _theirs(work, partial(torch.optim.AdamW, **HYPERS, **{how: True}))
    for name, theirs in (BITSANDBYTES[rule] if pages else {"bitsandbytes": rule.__name__.removeprefix("Paged")}).items():
        if reason := why_not("bitsandbytes", device=work.device):
            absent.append(f"{title}, {name}: {reason}")
            continue
        with _or_absent(absent, f"{title}, {name}"):
            import bitsandbytes

            contenders[name] = _theirs(work, partial(getattr(bitsandbytes.optim, theirs), **HYPERS))
    traffic = step_traffic(work, *STATES[rule])
    tile = fastest_tile(traffic, "cuda", 1, CudaMeter()) if work.device == "cuda" else TILES[0]
    ceiling = copy(traffic, work.device, 1, tile)
    contenders[COPY] = replace(ceiling, calls=(Bare(ceiling.calls[0]),))
    return gated(f"step, states on the device, {work.title}", title, work, rule, contenders, bytes_moved=traffic.total)


def moving_case(
    work: Work, title: str, kind: type[Loop], backend: str, chunks: Sequence[int], places: Sequence[str]
) -> Case:
    """States that move: to the device (Move), from there (Away), both while they are stepped (Through)."""
    rule, more = RULES[title], {}
    if kind is Through:
        more["budget"] = BUDGET * work.numel // Work("", lora_shapes()).numel
    contenders = {}
    for chunk in chunks:
        note = f", chunks of {chunk / MIB:g} MiB" if chunk != chunks[0] else ""
        contenders |= {place + note: ours(kind, work, rule, backend, place, chunk, **more) for place in places}
    (loop,) = contenders[places[0]].calls
    count, ways = state_bytes(loop.optimizer), {Move: ("in",), Away: ("out",), Through: ("in", "out")}[kind]
    contenders[COPY] = Contender((Bare(link(count, work.device, ways), "clock"),), ceiling=True)
    what = {Move: "to the device", Away: "home", Through: "step in chunks, both ways"}[kind]
    group = f"states that move, {work.title}"
    return gated(group, f"{title}: {what}", work, rule, contenders, bytes_moved=count * len(ways))


def link(count: int, device: str, ways: Sequence[str]) -> Callable[[], None]:
    """Copies of `count` bytes to the device ("in") and from it ("out") by memory that is pinned, at once."""
    pinned = device == "cuda"
    pairs = [
        tuple(torch.ones(count, dtype=torch.uint8, **kind) for kind in ({"pin_memory": pinned}, {"device": device}))
        for _ in ways
    ]
    streams = [torch.cuda.Stream() if pinned else None for _ in ways]

    def go() -> None:
        for way, stream, (host, there) in zip(ways, streams, pairs, strict=True):
            with torch.cuda.stream(stream):
                there.copy_(host, non_blocking=True) if way == "in" else host.copy_(there, non_blocking=True)

    return go


def reading_case(work: Work, title: str, backend: str, places: Sequence[str]) -> Case:
    """One pass over states that were just fetched; first over plain memory, last over managed memory that was not."""
    rule = RULES[title]
    contenders = {place: ours(Read, work, rule, backend, place) for place in ("resident", *places)}
    if "managed" in places:
        contenders["managed, not fetched"] = ours(Read, work, rule, backend, "managed")
        contenders["managed, not fetched"].calls[0].fetched = False
    return gated(f"one pass over states, {work.title}", f"{title}, after a fetch", work, rule, contenders)


def blocks_case(work: Work, title: str, backend: str, counts: Sequence[int]) -> Case:
    """A step by other numbers of thread blocks (threads on a CPU) than what is calculated, the first contender's."""
    contenders = {"nf4lora": ours(Loop, work, RULES[title], backend)}
    for count in counts:
        contenders[f"{count} blocks"] = ours(partial(Blocks, count, backend), work, RULES[title], backend)
    traffic = step_traffic(work, *STATES[RULES[title]])
    return gated(f"blocks of a step, {work.title}", title, work, RULES[title], contenders, bytes_moved=traffic.total)


def cycle_case(
    work: Work, title: str, name: str, backward: Callable[..., None], backend: str, places: Sequence[str],
    budget: int | None = None,
) -> Case:  # fmt: skip
    """Backward and step with states that stay, and with states at home before and after; also within a budget."""
    rule, kind = RULES[title], partial(Cycle, backward)
    contenders = {place: ours(kind, work, rule, backend, place) for place in ("resident", *places)}
    if budget is not None:
        for place in places:
            contenders[f"{place}, {budget / MIB:.0f} MiB"] = ours(kind, work, rule, backend, place, budget=budget)
    return gated("backward and step", name, work, rule, contenders)


def spike_case(work: Work, budget: int | None, backend: str, absent: list[str]) -> Case:
    """Steps in ROOM bytes, with plain allocations of SPIKE bytes beside: with a budget they stay until the step is
    done; without, they go before it, and what they drove away comes back. torch's AdamW must run out of memory.

    All of it, managed memory too, is more than ROOM, or else this says so.
    """
    case = gated("plain allocations", f"within {budget / MIB:.0f} MiB" if budget else "no budget", work, PagedAdamW, {})
    ballast = take_all_but(ROOM, work.device)
    kind = partial(Spiked, partial(take, SPIKE, work.device), budget is not None)
    try:
        _theirs(work, partial(torch.optim.AdamW, **HYPERS, fused=True), kind)
    except torch.OutOfMemoryError:
        absent.append(f"{case.group}, {case.name}, torch fused: ran out of memory, as it should")
    else:
        raise RuntimeError("torch's AdamW did not run out of memory, so that ours does not either says nothing")
    free()
    place = "managed" if work.device == "cuda" else "pinned staging"
    contender = ours(kind, work, PagedAdamW, backend, place, budget=budget)
    (loop,) = contender.calls
    loop.ballast = ballast
    plain = SPIKE + 2 * work.numel * work.dtype.itemsize
    memory = {"room": ROOM, "plain": plain, "managed": state_bytes(loop.optimizer)}
    if plain + memory["managed"] <= ROOM:
        raise RuntimeError(f"nothing had to move: {memory}")
    return replace(case, contenders={"nf4lora": replace(contender, memory=memory)})


def take(count: int, device: str) -> Tensor:
    return torch.ones(count, dtype=torch.uint8, device=device)


def take_all_but(room: int, device: str) -> Tensor:
    """Plain memory, so that little of a card is at stake."""
    free()
    return torch.empty(torch.cuda.mem_get_info()[0] - room, dtype=torch.uint8, device=device)


def free() -> None:
    """What the case before held."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _theirs(work: Work, make: Callable[..., Any], kind: Callable[..., Loop] = Loop) -> Contender:
    return Contender((kind(work, make),))


@contextmanager
def _or_absent(absent: list[str], name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001 who cannot run here is named, with the reason, and the others go on
        absent.append(f"{name}: {type(error).__name__}: {str(error).strip().split(chr(10))[0]}")
        print(f"absent: {absent[-1]}", flush=True)
