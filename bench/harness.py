"""Comparisons that a noisy, shared machine does not spoil: contenders take turns, ratios are taken round by round.

No time is given for a wrong result: a contender of ours is timed only after its case's gate passed on what it computes.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .environment import energy_counter, environment
from .files import AGAIN, RESULTS, write
from .timing import Contender, CudaMeter, Meter, Spread, WallMeter, tensors


class GateFailed(AssertionError):
    """A contender of ours computes something wrong, so nothing was timed."""

    def __init__(self, case: "Case", contender: str, why: BaseException) -> None:
        super().__init__(f"{case.group}: {case.name}: {contender}: {why or type(why).__name__}")
        self.contender = contender


@dataclass(frozen=True)
class Case:
    """One piece of work and those who do it.

    group, name: the table and its row
    gate:        raises where a result of ours is wrong
    error:       a contender's result -> {"differing_bytes"} where exactness is defined, {"max", "rms"} against float64
    bytes_moved: the fewest that must be read and written
    sweep, x:    the curve this case is a point of, such as "dequantize", and where on it
    energy:      measure it too, where it can be read
    tokens:      of a model, that one call takes or makes
    bases:       contenders that the times of all are also compared with, beside the first
    flops:       operations of a call
    """

    group: str
    name: str
    contenders: dict[str, Contender]
    gate: Callable[[Any], None]
    error: Callable[[Any], dict[str, float]] | None = None
    bytes_moved: int | None = None
    sweep: str | None = None
    x: float | None = None
    energy: bool = False
    tokens: int | None = None
    bases: tuple[str, ...] = ()
    flops: int | None = None


@dataclass(frozen=True)
class Row:
    """One contender of one case. `ratio` is its time over the first contender's, `over` its time over each base's,
    `of_ceiling` its bytes a second over the ceiling's, all taken in each round; None is what was not measured."""

    group: str
    case: str
    contender: str
    timed: str
    rounds: int
    time_ms: Spread
    ratio: Spread
    of_ceiling: Spread | None = None
    eager_ms: Spread | None = None
    energy_mj: float | None = None
    bytes_moved: int | None = None
    error: dict[str, float] | None = None
    sweep: str | None = None
    x: float | None = None
    tokens: int | None = None
    memory: dict[str, int] | None = None
    over: dict[str, Spread] | None = None
    flops: int | None = None


def compare(case: Case, meter: Meter, rounds: int = 15, eager_rounds: int = 5) -> list[Row]:
    """Time the contenders in turn, the first one twice: its second self shows what a ratio of 1 looks like here.

    Raises: GateFailed when a result of ours is wrong; then nothing is timed.
    """
    first, *_ = case.contenders
    contenders = case.contenders | {first + AGAIN: case.contenders[first]}
    errors: dict[str, dict[str, float] | None] = {}
    samples = {}
    for name, contender in contenders.items():
        try:
            samples[name] = meter.prepare(
                contender, None if contender.ceiling else _check(case, name, contender, errors)
            )
        except AssertionError as why:
            raise GateFailed(case, name.removesuffix(AGAIN), why) from why
    times = _take_turns({name: sample.kernel_ms for name, sample in samples.items()}, rounds)
    eager = _take_turns({name: sample.eager_ms for name, sample in samples.items()}, eager_rounds)
    ceiling = next((name for name, contender in contenders.items() if contender.ceiling), None)
    rows = []
    for name, contender in contenders.items():
        moved = contender.bytes_moved or case.bytes_moved
        of_ceiling = None
        if ceiling and moved:
            share = moved / (contenders[ceiling].bytes_moved or moved)
            of_ceiling = Spread.of(share * limit / t for limit, t in zip(times[ceiling], times[name], strict=True))
        rows.append(Row(
            case.group, case.name, name, samples[name].timed, rounds,
            time_ms=Spread.of(times[name]),
            ratio=_over(times[name], times[first]),
            of_ceiling=of_ceiling,
            eager_ms=None if None in eager[name] else Spread.of(eager[name]),
            energy_mj=samples[name].energy_mj() if case.energy else None,
            bytes_moved=moved, error=errors.get(name), sweep=case.sweep, x=case.x,
            tokens=case.tokens, memory=contender.memory, flops=case.flops,
            over={base: _over(times[name], times[base]) for base in case.bases if base in times} or None,
        ))  # fmt: skip
    return rows


def differing_bytes(result: Any, wanted: Any) -> int:
    """Bytes of a result's tensors that are not those wanted. Raises: AssertionError on another shape or dtype."""
    found, expected = tensors(result), tensors(wanted)
    kinds = [[(t.dtype, tuple(t.shape)) for t in side] for side in (found, expected)]
    if kinds[0] != kinds[1]:
        raise AssertionError(f"found {kinds[0]}, wanted {kinds[1]}")
    views = [[t.detach().reshape(-1).view(torch.uint8) for t in side] for side in (found, expected)]
    return sum(int((a != b).sum()) for a, b in zip(*views, strict=True))


def relative_error(result: Tensor, truth: Tensor) -> dict[str, float]:
    """Against float64: max |result - truth| / max |truth|, and so of the root mean squares. NaN: AssertionError."""
    if not bool(result.isfinite().all()):
        raise AssertionError("the result has NaN or Inf")
    e, t = (result.double() - truth).abs(), truth.abs()
    return {"max": (e.max() / t.max()).item(), "rms": (e.square().mean() / t.square().mean()).sqrt().item()}


def run(
    stem: str, cases: Iterable[Callable[[], Case]], meter: Meter, rounds: int = 15, out: Path = RESULTS,
    absent: Sequence[str] = (),
) -> int:  # fmt: skip
    """Build, gate, time and print case after case; returns 1 if any failed, else 0.

    After each, <out>/<stem>.json holds what there is: the environment, the rows, and the failures with their reasons. A
    contender of ours that fails the gate gets no time; the case goes on without it while one of ours is left. `absent`,
    which the cases may add to, names peers that could not be measured, and why.
    """
    rows: list[Row] = []
    failed: list[str] = []
    made = environment()  # before the results, which are files of the checkout themselves
    for build in cases:
        for taken in _attempts(build, meter, rounds, failed):
            for row in taken:
                print(line(row), flush=True)
            rows += taken
        write(
            out / f"{stem}.json",
            {"environment": made, "rows": [asdict(row) for row in rows], "failed": failed}
            | ({"absent": list(absent)} if absent else {}),
        )
    return 1 if failed else 0


def counted(
    cases: Iterable[Case], rows: Iterable[dict[str, Any]], launches: Callable[[Contender], int | None], ceilings: bool = True
) -> list[dict[str, Any]]:
    """The launches of every contender that has a row; without `ceilings`, of those that are none."""
    timed = {(row["group"], row["case"], row["contender"]) for row in rows}
    return [
        {"group": case.group, "case": case.name, "contender": name, "launches": launches(contender)}
        for case in cases
        for name, contender in case.contenders.items()
        if (case.group, case.name, name) in timed and (ceilings or not contender.ceiling)
    ]


def line(row: Row) -> str:
    """A row as text."""
    share = f" {row.of_ceiling.median:6.1%} of the copy" if row.of_ceiling else ""
    eager = f" eager {row.eager_ms.median * 1e3:.1f} us" if row.eager_ms else ""
    error = " " + ", ".join(f"{k} {v:.3g}" for k, v in row.error.items()) if row.error else ""
    if row.tokens:
        share += f" {row.tokens / row.time_ms.median * 1e3:,.0f} tokens/s"
    where = f"{row.group}: {row.case}"
    return (f"{where:64} {row.contender:22} {row.time_ms.median:10.4f} ms {row.ratio.median:7.2f}x "
            f"[{row.ratio.least:.2f} … {row.ratio.most:.2f}]{share}{eager}{error}")  # fmt: skip


def options(description: str | None, **more: dict[str, Any]) -> argparse.Namespace:
    """The arguments every benchmark takes: --device, and --out, the folder of the results; and `more` of its own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    for name, kind in more.items():
        parser.add_argument(f"--{name}", **kind)
    return parser.parse_args()


def meter_for(device: str) -> CudaMeter | WallMeter:
    """How to time on a device."""
    return CudaMeter(energy=energy_counter()) if device == "cuda" else WallMeter()


def _attempts(build: Callable[[], Case], meter: Meter, rounds: int, failed: list[str]) -> Iterator[list[Row]]:
    try:
        case = build()
        if not any(contender.ours for contender in case.contenders.values()):
            raise RuntimeError(f"{case.group}: {case.name}: none of our back ends runs here")
        while any(contender.ours for contender in case.contenders.values()):
            try:
                yield compare(case, meter, rounds)
                return
            except GateFailed as error:
                failed.append(str(error))
                print(f"gate failed: {error}", flush=True)
                case = replace(case, contenders={n: c for n, c in case.contenders.items() if n != error.contender})
    except Exception as error:  # noqa: BLE001 whatever it is, the cases after this one still run, and the run ends red
        failed.append(f"{type(error).__name__}: {error}")
        print(f"failed: {failed[-1]}", flush=True)


def _check(case: Case, name: str, contender: Contender, errors: dict[str, Any]) -> Callable[[Any], None]:
    def check(result: Any) -> None:
        if contender.ours:
            case.gate(result)
        errors[name] = case.error(result) if case.error else None

    return check


def _over(times: Sequence[float], base: Sequence[float]) -> Spread:
    return Spread.of(t / b for t, b in zip(times, base, strict=True))


def _take_turns(measure: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[Any]]:
    """name -> one value a round. Each round starts with the next of them."""
    order = list(measure)
    taken: dict[str, list[Any]] = {name: [] for name in measure}
    for _ in range(rounds):
        order = order[1:] + order[:1]
        for name in order:
            taken[name].append(measure[name]())
    return taken
