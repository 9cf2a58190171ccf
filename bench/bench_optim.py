"""Steps of the optimizers: ours, torch's and bitsandbytes', on the adapters of Llama-3-8B (all linears, r = 16).

"resident": states on the device, which on a CPU all are. Bytes of a step are the fewest there can be, beside a copy of as
    many. `eager_ms` is the host's time of `step()`. bitsandbytes pages no tensor below 1e5 elements: of these 448 only the 96 of 16 × 14336.
"moves": states that go to the device and home, in chunks of 32 and 64 MiB, beside copies of as many bytes between the
    device and pinned memory, in both directions at once where a step does so too. Whether a fetch left pages behind is
    seen from one pass over the states right after it, beside one over plain memory: a page of 2 MiB that is not there
    takes as long to come as a hundred take to be read. Counts of faults only CUPTI has.
"hidden": states at home, a backward of 100 ms that does nothing but hand out gradients, a step, states home again.
    `hidden` in the results: 1 - (time - time with states that stay) / (time of both moves alone).
"full": the same with the products of a model of 1 B parameters, all of them trained.
"blocks": steps by other numbers of thread blocks than `nf4lora.heuristics` has.
"spike": plain allocations for which AdamW's memory does not suffice. All but 4 GiB of the card are taken before.
"""

import json
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .bench_optim_backward import Products, Waiting
from .bench_optim_cases import (
    MIB,
    RULES,
    SPIKE_BUDGET,
    blocks_case,
    cycle_case,
    free,
    moving_case,
    reading_case,
    resident_case,
    spike_case,
)
from .bench_optim_meter import OptimMeter, launches
from .bench_optim_steps import PLACES, Away, Move, Through, Work, lora_shapes
from .files import write
from .harness import Case, counted, options, run

KINDS = ("resident", "moves", "hidden", "full", "blocks", "spike")


def cases(
    device: str,
    only: Sequence[str],
    absent: list[str],
    made: list[Case],
    backend: str | None = None,
    adapters: Work | None = None,
) -> Iterator[Callable[[], Case]]:
    """Most important first; those of "resident" are `made` too. On a CPU all others are of a toy's size, and what pages is
    copied at once: a look at whether it runs."""
    cuda, backend = device == "cuda", backend or device
    adapters = adapters or Work("r = 16 of Llama-3-8B", lora_shapes(), device=device)
    work = adapters if cuda else Work("toy", lora_shapes(2, 2)[:24], device="cpu")
    chunks, places = ((32 * MIB, 64 * MIB), PLACES[:2]) if cuda else ((MIB // 16, MIB // 8), PLACES[1:2])
    if cuda:
        full, tokens = Work("1.0 B parameters, bfloat16", ((4096, 4096),) * 60, torch.bfloat16), 8192
        multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    else:
        full, tokens, multiprocessors = Work("toy", ((64, 64),) * 4, torch.bfloat16, "cpu"), 8, 1

    def build(make: Callable[..., Case], *args: Any) -> Case:
        free()
        return make(*args)

    def case(make: Callable[..., Case], *args: Any) -> Callable[[], Case]:
        return lambda: build(make, *args)

    def resident(title: str) -> Case:
        made.append(resident_case(adapters, title, backend, absent))
        return made[-1]

    def hidden(title: str) -> Case:
        return cycle_case(work, title, f"{title}, 100 ms", Waiting(work, 100.0), backend, places)

    def full_tuning() -> Case:
        name = f"AdamW, 8 bits, {full.title}, {tokens} tokens"
        return cycle_case(full, "AdamW, 8 bits", name, Products(full, tokens), backend, places, 256 * MIB)

    of_adamw = list(RULES)[:2]
    if "resident" in only:
        yield from (case(resident, title) for title in RULES)
    if "moves" in only:
        for title in of_adamw:
            for kind in (Through, Move, Away) if title == of_adamw[0] else (Move, Away):
                sizes = chunks if kind is Through else chunks[:1]
                yield case(moving_case, work, title, kind, backend, sizes, places)
        yield case(reading_case, work, of_adamw[0], backend, places)
    if "hidden" in only:
        yield from (case(hidden, title) for title in of_adamw)
    if "full" in only:
        yield case(full_tuning)
    if "blocks" in only:
        counts = [count * multiprocessors for count in (1, 2, 3, 8)]
        yield from (case(blocks_case, work, title, backend, counts) for title in of_adamw)
    if "spike" in only and cuda:  # last: what it does to the driver is its own risk
        plain = Work("128 Mi parameters", ((2**20, 128),))
        yield from (case(spike_case, plain, budget, backend, absent) for budget in (SPIKE_BUDGET, None))


def hidden(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each backward of 100 ms and step: the part of its states' two moves that it took no longer for."""
    alone: dict[tuple[str, str], float] = {}
    for row in rows:
        title, _, what = row["case"].partition(": ")
        if what in ("to the device", "home"):
            alone[title, row["contender"]] = alone.get((title, row["contender"]), 0.0) + row["time_ms"][0]
    found = []
    still = {row["case"]: row["time_ms"][0] for row in rows if row["contender"] == "resident"}
    for row in rows:
        title, is_one, _ = row["case"].partition(", 100 ms")
        if is_one and row["case"] in still and (moves_ms := alone.get((title, row["contender"]))):
            shares = [1 - (ratio - 1) * still[row["case"]] / moves_ms for ratio in row["ratio"]]
            found.append({"case": row["case"], "contender": row["contender"], "moves_ms": moves_ms, "hidden": shares})
    return found


def measure(
    stem: str,
    todo: Iterable[Callable[[], Case]],
    made: list[Case],
    device: str,
    out: Path,
    absent: list[str],
    rounds: int,
) -> int:
    path = out / f"{stem}.json"
    path.unlink(missing_ok=True)  # the rows of an earlier run are none of this one's
    try:
        return run(stem, todo, OptimMeter(device), rounds, out, absent)
    finally:
        if path.exists():
            document = json.loads(path.read_text())
            document["hidden"] = hidden(document["rows"])
            write(path, document)
            for found in document["hidden"]:
                print(
                    f"{found['case']}, {found['contender']}: {found['hidden'][0]:.1%} of {found['moves_ms']:.2f} ms hidden",
                    flush=True,
                )
            write(path, document | {"launches": counted(made, document["rows"], launches, ceilings=False)})


def main() -> int:
    warnings.filterwarnings(
        "ignore", message=".*(kernels-community|nothing pages|Paged optimizers are not supported).*"
    )
    asked = options(
        __doc__, only={"default": ",".join(KINDS), "help": "what to measure, with commas between: %(default)s"}
    )
    only = asked.only.split(",")
    if unknown := set(only) - set(KINDS):
        sys.exit(f"--only: found {sorted(unknown)}, wanted some of {KINDS}")
    absent: list[str] = []
    made: list[Case] = []
    todo = cases(asked.device, only, absent, made)
    return measure(f"{asked.device}_optim", todo, made, asked.device, asked.out, absent, rounds=5)


if __name__ == "__main__":
    sys.exit(main())
