"""What the host kernels must reach, and the table that compares it with what `bench.bench_cpu` measured. Standard library only."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

ISAS = ("amx", "avx512bf16", "avx512vbmi", "avx512", "avx2", "portable")  # best first
NOT_HERE, MISSING = "not run here", "not measured"
MEBIBYTE = 2**20
PEAK = 8 * MEBIBYTE  # bytes that a forward and backward may take beside its results

# Contenders that are not ours
EVAL, EVAL_LORA, TRAIN_LORA = "bitsandbytes in eval()", "bitsandbytes in eval() + LoRA", "bitsandbytes + LoRA"
TORCH, READ, LORA = "torch's bf16 linear", "read", "bf16 LoRA"
APART = " one by one"  # ends the name of ours where "together" is the other way
DEMO, STEP = "a training step of the demonstration", "a training step, hidden size 2048"


@dataclass(frozen=True)
class Target:
    """A row of the table: the time of the fastest of `others` over ours.

    inverse: ours over theirs; ceiling: our share of the speed of the case's ceiling instead
    least, most: what is wanted; of avx2 another least may be
    """

    title: str
    case: str
    others: tuple[str, ...] = ()
    least: float | None = None
    most: float | None = None
    avx2: float | None = None
    inverse: bool = False
    ceiling: bool = False

    def wanted(self) -> str:
        if self.most is not None:
            return f"≤ {self.most:g}"
        scale = 100 if self.ceiling else 1
        return f"≥ {scale * self.least:g}{'%' * self.ceiling}" + (f", avx2 ≥ {self.avx2:g}" if self.avx2 else "")

    def reached(self, isa: str, value: float) -> bool:
        if self.most is not None:
            return value <= self.most
        return value >= (self.avx2 if self.avx2 and isa == "avx2" else self.least)


TARGETS = (
    Target("quantize, bitsandbytes' time over ours", "quantize", ("bitsandbytes",), 50),
    Target("dequantize, bitsandbytes' time over ours", "dequantize", ("bitsandbytes",), 3),
    Target("dequantize, of a copy's speed", "dequantize", least=0.6, ceiling=True),
    Target("forward M=1, bitsandbytes' faster mode over ours", "forward M=1", (EVAL, TRAIN_LORA), 1.1),
    Target("forward M=1, torch's bf16 linear over ours", "forward M=1", (TORCH,), 2.2, avx2=1),
    Target("forward M=16, bitsandbytes' faster mode over ours", "forward M=16", (EVAL, TRAIN_LORA), 4),
    Target("forward M=16, torch's bf16 linear over ours", "forward M=16", (TORCH,), 1.5),
    Target("forward + backward M=512, bitsandbytes + LoRA over ours", "forward + backward M=512",
           ("bitsandbytes + peft", "bitsandbytes + peft, autocast"), 3),
    Target("forward + backward M=512, ours over bf16 linear + LoRA", "forward + backward M=512",
           ("dense linears + peft",), most=1.05, inverse=True),
    Target("q, k, v M=512, one by one over together", "q, k, v M=512", (APART,), 1.1),
    Target("gate, up M=512, one by one over together", "gate, up M=512", (APART,), 1.1),
    Target("`nf4lora finetune`, its demonstration: QLoRA's tokens/s over bf16 LoRA's", DEMO, (LORA,), 0.9),
    Target("`nf4lora finetune`, hidden size 2048: QLoRA's tokens/s over bf16 LoRA's", STEP, (LORA,), 0.9),
)  # fmt: skip


def rows(document: dict[str, Any], isa: str) -> Iterator[tuple[str, str, str, str, bool | None]]:
    """Of an instruction set: title, our own figure, the ratio with its spread, what is wanted, whether it is reached."""
    for target in TARGETS:
        case = {row["contender"]: row for row in document["rows"] if row["case"] == target.case}
        own = case.get(isa)
        others = [case[name] for name in (*target.others, *(isa + name for name in target.others)) if name in case]
        if own is None or not (others or target.ceiling):
            yield target.title, MISSING, "–", target.wanted(), None
            continue
        if target.ceiling:
            spread = own["of_ceiling"]
        else:
            spread = min(others, key=lambda row: row["time_ms"][0])["over"][isa]
            spread = [1 / spread[0], 1 / spread[2], 1 / spread[1]] if target.inverse else spread
        yield target.title, _time(own), _spread(spread, target.ceiling), target.wanted(), target.reached(isa, spread[0])
    yield from _limits(document, isa)


def _limits(document: dict[str, Any], isa: str) -> Iterator[tuple[str, str, str, str, bool | None]]:
    """The roofline: bytes a second beside what the machine reads, operations a second beside torch's product; and the memory."""
    found = {(row["case"], row["contender"]): row for row in document["rows"]}
    speed, share = MISSING, "–"
    if own := found.get(("forward M=1", isa)):
        speed = f"{own['bytes_moved'] / own['time_ms'][0] / 1e6:.1f} GB/s"
        share = _spread(own["of_ceiling"], True)
    yield "forward M=1, of the measured read bandwidth", speed, share, "–", None
    speed, share = MISSING, "–"
    if own := found.get(("forward M=512", isa)):
        speed = f"{own['flops'] / own['time_ms'][0] / 1e6:.0f} GFLOP/s"
        share = _spread(found["forward M=512", TORCH]["over"][isa], True)
    yield "forward M=512, of torch's bf16 product", speed, share, "–", None
    peak = document["memory"].get(isa)
    held = MISSING if peak is None else f"{peak / MEBIBYTE:.1f} MiB"
    within = None if peak is None else peak <= PEAK
    yield "forward + backward M=512, peak extra memory", held, "–", f"≤ {PEAK // MEBIBYTE} MiB", within


def summary(document: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The table of all instruction sets: header and rows; ✗ is short of what is wanted."""
    lines: dict[str, list[str]] = {}
    for isa in ISAS:
        if isa not in document["isas"]:
            continue
        for title, own, ratio, wanted, reached in rows(document, isa):
            cell = own if ratio == "–" else f"{own}, {ratio}" if wanted == "–" else ratio
            lines.setdefault(title, [title, wanted]).append(cell + " ✗" * (reached is False))
    absent = [isa for isa in ISAS if isa not in document["isas"]]
    cells = [line + [NOT_HERE] * len(absent) for line in lines.values()]
    return ["4096 × 4096, bfloat16, NF4 + double quantization, r = 16", "wanted", *document["isas"], *absent], cells


def text(document: dict[str, Any]) -> str:
    """A table for each instruction set, in plain text."""
    parts = []
    for isa in ISAS:
        if isa not in document["isas"]:
            parts.append(f"{isa}: {NOT_HERE}")
            continue
        lines = [(isa, "ours", "ratio", "wanted", "")]
        lines += [(*line[:4], {True: "reached", False: "short", None: ""}[line[4]]) for line in rows(document, isa)]
        widths = [max(len(line[i]) for line in lines) for i in range(4)]
        parts.append("\n".join("  ".join(_padded(line, widths)) for line in lines))
    return "\n\n".join(parts)


def _padded(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=False)), line[4]]


def _time(row: dict[str, Any]) -> str:
    ms = row["time_ms"][0]
    return f"{row['tokens'] / ms * 1e3:,.0f} tokens/s" if row["tokens"] else f"{ms:.3g} ms"


def _spread(spread: Sequence[float], share: bool = False) -> str:
    if share:
        return "{:.0f}% [{:.0f} … {:.0f}]".format(*(100 * part for part in spread))
    return "{:.2f} [{:.2f} … {:.2f}]".format(*spread)
