"""`nf4lora bench`: the repository's benchmarks on this machine, beside torch, peft and bitsandbytes where they are."""

import json as jsons
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from .settings import Stopped, UserError

WHATS = ("quantize", "linear", "layer", "optim", "host", "model", "methods")
DEFAULT = ("quantize", "linear", "optim")


def bench(
    what: Annotated[
        list[str] | None, typer.Argument(metavar="[WHAT]...", help=f"Some of {', '.join(WHATS)}. [{' '.join(DEFAULT)}]")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="The repository's own sizes, which take from minutes to an hour.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. [cuda where there is one]")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results as JSON.")] = Path("nf4lora-bench"),
    json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")] = False,
) -> None:
    """Time nf4lora beside what else is installed. Exit code 1 if a result is wrong; then it gets no time.

    quantize, linear, layer, optim: kernels. host: what a call costs the processor. model: whole models, toys on a CPU.
    methods: the demonstration's model fine-tuned by every method. Each column of another is its time over nf4lora's, by
    rounds: median [least … most]; "again" is nf4lora beside itself, the noise.

    Example: nf4lora bench linear optim --device cpu --out results
    """
    chosen = tuple(dict.fromkeys(what or DEFAULT))
    if unknown := [name for name in chosen if name not in WHATS]:
        raise UserError(f"WHAT: found {', '.join(unknown)}, wanted some of {', '.join(WHATS)}")
    device = _device(device)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written ({error.strerror}); wanted a folder to write to") from error
    found, failed = {}, False
    for name in chosen:
        document, wrong = _measured(name, device, out, full)
        found[name], failed = document, failed or wrong
        if not json:
            _print(document)
    if json:
        print(jsons.dumps(found))
    else:
        print(f"saved in {out}")
    if failed:
        raise typer.Exit(1)


def _device(asked: str | None) -> str:
    import torch

    there = torch.cuda.is_available()
    if asked not in (None, "cpu", "cuda"):
        raise UserError(f"--device: found {asked}, wanted cpu or cuda")
    if asked == "cuda" and not there:
        raise UserError("--device: found cuda, but torch sees no GPU here; `nf4lora doctor` says more; wanted cpu")
    return asked or ("cuda" if there else "cpu")


def _measured(name: str, device: str, out: Path, full: bool) -> tuple[dict[str, Any], bool]:
    """The results file that a benchmark writes, and whether anything of it failed."""
    from ..bench import suite

    path = out / f"{suite.stem(name, device)}.json"
    path.unlink(missing_ok=True)  # what an earlier run found is none of this one's
    try:
        with redirect_stdout(sys.stderr):  # a line a row, while it runs
            code = suite.suite(name, device, out, full, lambda cases: _watched(name, cases))
    except KeyboardInterrupt:
        raise Stopped(f"during {name}; what was measured before is in {out}") from None
    return jsons.loads(path.read_text()), code != 0


def _watched(name: str, cases: Iterable[Callable[[], Any]]) -> Iterator[Callable[[], Any]]:
    """The cases, and a bar on stderr that counts them, where stderr is a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from .progress import console

    total = len(cases) if isinstance(cases, list) else None
    columns = (TextColumn(f"{name:<12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=total)
        for case in cases:
            yield case
            progress.advance(task)


def _print(document: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    from ..bench import report
    from .report import wide_console

    console = wide_console()
    if not console.is_terminal:
        console.width = 400  # tables of many contenders, unfolded
    console.print(report.headline(document), highlight=False, markup=False)
    launches = [row for row in document.get("launches", ()) if row["launches"] is not None]  # a CPU has none
    for header, lines in report.contents(document | {"launches": launches}):
        table = Table()
        for title in header:
            table.add_column(Text(title), justify="right" if table.columns else "left")
        for line in lines:
            table.add_row(*map(Text, line))
        console.print(table)
    for remark in report.remarks(document):
        console.print(remark, highlight=False, markup=False)
