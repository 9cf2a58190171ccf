"""Tables and plots of bench/results/*.json: `python -m bench.report` prints Markdown; `--write` also draws the plots
beside the results and renews README.md, where `<!-- bench:cpu_quantize -->` … `<!-- /bench -->` holds what that file
says; `bench:cpu_quantize:1` its first table only."""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .cpu_targets import summary
from .files import AGAIN, COPY, RESULTS, load

README = RESULTS.parents[1] / "README.md"
REGION = re.compile(r"(<!-- bench:(\w+)(?::(\d+))? -->\n).*?(<!-- /bench -->)", re.DOTALL)
MISSING = "not measured"
HOST = "host"  # how bench_host times: of a device's limits its rows say nothing
NEEDS_GPU = "Not measured: `python -m bench.gpu_report` on a machine with a GPU measures it."
# Kernels whose machine code is shown, of bench/codegen.py and bench/codegen_triton.py
_MACHINE_CODE = {
    "decode_tiles<__nv_bfloat16, true>": "dequantize to bf16, double quantization",
    "encode_blocks<__nv_bfloat16, (QuantType)0, 8>": "quantize bf16 to NF4, blocksize 64",
    "small_kernel<__nv_bfloat16, 8, 1>": "forward small, 8 tokens",
    "linear_tiles<Shape<64, 2, 1>, __nv_bfloat16>": "forward mma, 64 tokens",
    "linear_fwd_kernel<__nv_bfloat16, 128>": "forward wgmma, 128 tokens",
    "dx_kernel<__nv_bfloat16, Plan<16> >": "backward small, mma, 16 tokens",
    "bwd_kernel<__nv_bfloat16, 2>": "backward wgmma, 128 tokens",
    "decode_members<__nv_bfloat16, true>": "dense: decode a group",
    "dequantize<bfloat16, nested, 64>": "dequantize to bf16, double quantization, blocksize 64",
    "quantize<bfloat16, nf4, 64>": "quantize bf16 to NF4, blocksize 64",
}


def markdown(document: dict[str, Any] | None, tables: int | None = None) -> str | None:
    """The (first) tables of a results file, with the machine they were measured on; None for a file without tables."""
    if document is None:
        return NEEDS_GPU
    if "curves" in document:
        from nf4lora.cli.report import COLUMNS  # here, as the report of a GPU machine does without the command line

        columns = COLUMNS[: [key for _, key, _ in COLUMNS].index("lr")]
        cells = [["–" if row.get(key) is None else form(row[key]) for _, key, form in columns] for row in document["rows"]]
        return table([title for title, _, _ in columns], cells)
    rows = document.get("rows")
    if isinstance(rows, list) and rows and isinstance(rows[0], dict) and "instructions_per_weight" in rows[0]:
        return _machine_code(rows)
    if isinstance(rows, list) and rows and isinstance(rows[0], dict) and "tuner" in rows[0]:
        return _tuners(document)
    if not isinstance(document.get("environment"), dict) or not ("methods" in document or _of_harness(rows)):
        return None
    parts = [table(*shown) for shown in contents(document)]
    return "\n\n".join([headline(document), *parts[:tables], *remarks(document)])


def contents(document: dict[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """The tables of a results file of the harness or of `bench.methods`: header and rows of each. Of `bench.bench_cpu`
    the first says what is reached."""
    if "methods" in document:
        return [_methods(document["rows"])]
    parts, rows = [summary(document)] if "isas" in document else [], document["rows"]
    for of_sweep in (False, True):
        for group in dict.fromkeys(row["group"] for row in rows):
            chosen = [row for row in rows if row["group"] == group and _of_sizes(row) == of_sweep]
            if chosen and chosen[0].get("tokens"):
                parts.append(_models(group, chosen))
            elif chosen:
                parts.append(_comparison(group, chosen, "gpu" in document["environment"] and chosen[0]["timed"] != HOST))
    launches = document.get("launches", ())
    for group in dict.fromkeys(row["group"] for row in launches):
        parts.append(_launches(group, [row for row in launches if row["group"] == group]))
    if hidden := document.get("hidden"):
        shares = ["{:.0f}% [{:.0f} … {:.0f}]".format(*(100 * share for share in of["hidden"])) for of in hidden]
        names = [f"{of['case']}: {of['contender']}" for of in hidden]
        lines = [[name, _time([of["moves_ms"]]), share] for name, of, share in zip(names, hidden, shares, strict=True)]
        parts.append((["states at home before a backward", "both moves alone", "hidden by it"], lines))
    return parts


def remarks(document: dict[str, Any]) -> list[str]:
    """What such a file says beside its tables: who was not there, what failed."""
    absent = [f"Not there, so not timed: {why}" for why in document.get("absent", ())]
    return absent + [f"Failed, so not timed: {why.splitlines()[0]}" for why in document.get("failed", ())]


def headline(document: dict[str, Any]) -> str:
    """What it was measured on, and how methods were run."""
    line, about = machine(document["environment"]), document.get("methods")
    if not about:
        return line
    return f"{line[:-1]}; {about['steps']} steps each; speeds taken in turns; load average before: {about['load_before']:.1f}:"


def machine(found: dict[str, Any]) -> str:
    """What the times were taken on, in a line."""
    gpu = found.get("gpu")
    parts = [f"{found['processor']}, {found['cores']} cores, {found['isa']}, torch {found['torch']}"]
    if gpu:
        clocks = [
            f"{name} {_of(gpu[f'{key}_mhz'], gpu[f'{key}_max_mhz'])} MHz"
            for name, key in (("SM", "sm"), ("memory", "memory"))
        ]
        limit = "power limit unknown" if gpu["power_limit_w"] is None else f"{gpu['power_limit_w']:.0f} W"
        versions = [f"{name} {found.get(name) or 'absent'}" for name in ("triton", "bitsandbytes")]
        parts = [
            f"{gpu['name']} ({', '.join([*clocks, limit])})", f"driver {gpu['driver'] or 'unknown'}",
            f"CUDA {gpu['cuda_runtime']}", f"torch {found['torch']}", *versions,
        ]  # fmt: skip
    return f"{', '.join(parts)}; commit {found['commit']}, {found['date']}:"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first to the right."""
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(
        ["| " + " | ".join(lines[0]) + " |", "|" + "|".join(lines[1]) + "|"]
        + ["| " + " | ".join(r) + " |" for r in rows]
    )


def renew(text: str, documents: dict[str, dict[str, Any]]) -> str:
    """`text` with every region between markers made anew from the results file it names."""

    def region(found: re.Match[str]) -> str:
        start, stem, tables, end = found.groups()
        if (inside := markdown(documents.get(stem), tables and int(tables))) is None:
            raise ValueError(f"{stem}.json has no tables, but a region of the text asks for them")
        return f"{start}{inside}\n{end}"

    return REGION.sub(region, text)


def plots(stem: str, document: dict[str, Any], folder: Path) -> list[Path]:
    """A PNG where rows make curves: share of the copy's speed against size, or else times of nf4lora's against M."""
    points = [row for row in document.get("rows", ()) if isinstance(row, dict) and row.get("sweep")]
    curves = [
        key for key in dict.fromkeys(map(_curve, points)) if len({row["x"] for row in points if _curve(row) == key}) > 1
    ]
    if not curves:
        return []
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(6 * len(curves), 4.2), layout="constrained")
    for axes, (group, sweep) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
        chosen = [row for row in points if _curve(row) == (group, sweep)]
        shares = any(row["of_ceiling"] for row in chosen)
        for name in dict.fromkeys(row["contender"] for row in chosen):
            line = sorted(
                (row["x"], row["of_ceiling"] if shares else row["ratio"]) for row in chosen if row["contender"] == name
            )
            line = [(x, value) for x, value in line if value]
            if not line or name == COPY or name.endswith(AGAIN):
                continue
            xs, values = zip(*line, strict=True)
            scale = 100 if shares else 1
            middle, low, high = ([scale * v[i] for v in values] for i in range(3))
            axes.plot(xs, middle, "o-", label=name, ms=4)
            axes.fill_between(xs, low, high, alpha=0.15)
        axes.set(title=f"{sweep}: {group}", xlabel="weights" if shares else "M, rows of x",
                 ylabel="% of the copy's speed" if shares else "time over nf4lora's")  # fmt: skip
        axes.set_xscale("log", base=2)
        if shares:
            axes.set_ylim(bottom=0)
        else:
            axes.set_yscale("log", base=2)
            axes.set_yticks([1, 2, 4, 8], ["1", "2", "4", "8"])
        axes.grid(alpha=0.3)
        axes.legend()
    path = folder / f"{stem}.png"
    figure.savefig(path, dpi=120)
    return [path]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where the JSON files are")
    parser.add_argument(
        "--readme", type=Path, default=README, metavar="FILE", help="the file whose regions --write renews"
    )
    parser.add_argument("--write", action="store_true", help="draw the plots and renew the README's regions")
    asked = parser.parse_args(arguments)
    documents = load(asked.results)
    for stem, document in documents.items():
        if text := markdown(document):
            print(f"### {stem}\n\n{text}\n")
        for path in plots(stem, document, asked.results) if asked.write else ():
            print(f"![{stem}]({path.name})\n")
    if asked.write:
        asked.readme.write_text(renew(asked.readme.read_text(), documents))
    return 0


def _comparison(group: str, rows: list[dict[str, Any]], gpu: bool) -> tuple[list[str], list[list[str]]]:
    """One row a case: the first contender's time, then how the others and the limits compare with it."""
    pairs = Counter(row["contender"].removesuffix(AGAIN) for row in rows if row["contender"].endswith(AGAIN))
    first = max(pairs, key=pairs.__getitem__)  # where it was red, a case was measured against another: not shown
    peers = [n for n in dict.fromkeys(r["contender"] for r in rows) if n not in (first, COPY) and not n.endswith(AGAIN)]
    cases = {
        case: {r["contender"]: r for r in rows if r["case"] == case} for case in dict.fromkeys(r["case"] for r in rows)
    }
    ours = [found[first] for found in cases.values() if first in found]
    limited = gpu or any(COPY in found for found in cases.values())
    header = [group, first, *peers, *(["of a copy's speed"] if limited else []), "again"]
    extra = []
    for title, key, form in (
        ("eager call", "eager_ms", _time),
        ("energy", "energy_mj", _energy),
        ("error", "error", _error),
    ):
        # On a GPU all of them are expected; elsewhere only those that some row has
        if gpu or any(row[key] for row in ours):
            extra.append((key, form))
            header.append(title)
    lines = []
    for case, found in cases.items():
        own = found.pop(first, None)
        if own is None:
            lines.append([case, MISSING, *["–"] * (len(header) - 2)])
            continue
        ratios = [_ratio(found.get(name)) for name in (*peers, first + AGAIN)]
        if limited:
            ratios.insert(-1, _share(own, found.get(COPY)))
        lines.append([case, _time(own["time_ms"], _mark(own)), *ratios])
        lines[-1] += [MISSING if own[key] is None else form(own[key]) for key, form in extra]
    return header, lines


def _launches(group: str, rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """A row a case, a column a contender."""
    counts: dict[str, dict[str, str]] = {}
    for row in rows:
        counts.setdefault(row["case"], {})[row["contender"]] = str(row["launches"] or MISSING)
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    lines = [[case, *(of.get(name, "–") for name in contenders)] for case, of in counts.items()]
    return [f"launches, {group}", *contenders], lines


def _tuners(document: dict[str, Any]) -> str:
    """A line for all tuners of one outcome."""
    outcomes: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in document["rows"]:
        merges = "merge_error" in row
        key = ("fails", "–", "–") if "fails" in row else ("falls", "equal bits" if row["reloads"] else "differs", "yes" if merges else "–")
        outcomes.setdefault(key, []).append(row)
    cells = []
    for (loss, reload, merge), rows in outcomes.items():
        if merge == "yes":
            merge = f"≤ {max(row['merge_error'] for row in rows):.0e} of the logits"
        cells.append([", ".join(row["tuner"] for row in rows), loss, reload, merge])
    versions = ", ".join(f"{name} {number}" for name, number in document["versions"].items())
    return table([f"tuners ({versions})", "loss", "save, reload", "merged in float32, differs by"], cells)


def _methods(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """A row a method of fine-tuning; its speed also as a ratio, as it was taken in turns."""
    lines = []
    for row in rows:
        counts = [f"{row[key]:,}" for key in ("trainable_parameters", "weight_bytes", "optimizer_bytes", "peak_bytes")]
        speed = [MISSING, "–"]
        if "ratio" in row:
            speed = ["{:,.0f} [{:,.0f} … {:,.0f}]".format(*row["tokens_per_s"]), "{:.2f} [{:.2f} … {:.2f}]".format(*row["ratio"])]
        lines.append([row["name"], *counts, *speed, f"{row['before']:.4f}", f"{row['after']:.4f}", f"{row['lr']:g}"])
    header = ["method", "trainable", "weights, bytes", "optimizer, bytes", "peak, bytes", "tokens/s", "over QLoRA's", "before", "after", "lr"]
    return header, lines


def _machine_code(rows: list[dict[str, Any]]) -> str:
    """Instructions a weight by architecture; the most registers of any. A spill or a stack frame would have failed the tests."""
    shown = [row for row in rows if row["kernel"] in _MACHINE_CODE]
    archs = sorted({row["arch"] for row in shown}, key=lambda arch: int(re.sub(r"\D", "", arch)))
    lines = []
    for kernel, title in _MACHINE_CODE.items():
        for compiler in sorted({row["compiler"] for row in shown if row["kernel"] == kernel}):
            of = {row["arch"]: row for row in shown if (row["kernel"], row["compiler"]) == (kernel, compiler)}
            counts = [f"{n:.1f}" if arch in of and (n := of[arch]["instructions_per_weight"]) else "–" for arch in archs]
            lines.append([title, compiler, str(max(row["registers"] for row in of.values())), *counts])
    return table(["instructions a weight", "compiler", "registers", *archs], lines)


def _models(group: str, rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """One row a contender: tokens a second, its time over the first's, memory at its peak, what the gate saw."""
    lines = []
    for row in rows:
        rates = [row["tokens"] / ms * 1e3 for ms in row["time_ms"]]
        rate, ratio = "{0:,.0f} [{2:,.0f} … {1:,.0f}]".format(*rates), "{:.2f} [{:.2f} … {:.2f}]".format(*row["ratio"])
        held = ", ".join(f"{kind} {count / 2**30:.2f}" for kind, count in (row["memory"] or {}).items())
        error = ", ".join(f"{key} {value:.1e}" for key, value in (row["error"] or {}).items())
        lines.append([f"{row['case']}: {row['contender']}", rate, ratio, held or MISSING, error or "–"])
    return [group, "tokens/s", "time over the first's", "GiB", "relative error"], lines


def _of_harness(rows: Any) -> bool:
    return isinstance(rows, list) and all(isinstance(row, dict) and "time_ms" in row for row in rows)


def _curve(row: dict[str, Any]) -> tuple[str, str]:
    return row["group"], row["sweep"]


def _of_sizes(row: dict[str, Any]) -> bool:
    """A point of a curve over sizes, which is a table of its own."""
    return bool(row["sweep"]) and row["case"].startswith(f"{row['sweep']} 2^")


def _mark(row: dict[str, Any]) -> str:
    return "" if row["timed"] in ("wall clock", "graph replay", HOST) else "†"


def _ratio(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    middle, low, high = row["ratio"]
    return f"{middle:.2f}{_mark(row)} [{low:.2f} … {high:.2f}]"


def _time(spread: Sequence[float], mark: str = "") -> str:
    ms = spread[0]
    return (f"{ms:.1f} ms" if ms >= 1 else f"{ms * 1e3:.1f} µs") + mark


def _share(row: dict[str, Any], limit: dict[str, Any] | None) -> str:
    if row["of_ceiling"] is None or limit is None:
        return MISSING
    middle, low, high = (100 * share for share in row["of_ceiling"])
    speed = limit["bytes_moved"] / limit["time_ms"][0] * 1e3 / 1e9
    return f"{middle:.0f}% [{low:.0f} … {high:.0f}] of {speed:,.0f} GB/s"


def _energy(millijoules: float) -> str:
    return f"{millijoules:.2f} mJ"


def _error(error: dict[str, float]) -> str:
    parts = [f"{error['differing_bytes']} bytes"] if "differing_bytes" in error else []
    return ", ".join(parts + [f"{key} {error[key]:.1e}" for key in ("max", "rms") if key in error])


def _of(now: Any, most: Any) -> str:
    return f"{'?' if now is None else f'{now:.0f}'} of {'?' if most is None else f'{most:.0f}'}"


if __name__ == "__main__":
    sys.exit(main())
