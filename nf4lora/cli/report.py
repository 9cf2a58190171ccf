"""The demonstration's table, on the terminal and in Markdown, and the plot of the losses."""

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

NAMES = {
    "pretrain": "pre-training", "full": "full fine-tuning", "lora": "bf16 LoRA", "qlora": "QLoRA (NF4)",
    "adalora": "AdaLoRA (NF4)", "ia3": "IA3 (NF4)", "prefix": "prefix (NF4)", "p-tuning-v2": "P-tuning v2 (NF4)",
    "prompt": "prompt (NF4)", "p-tuning": "P-tuning (NF4)",
}  # fmt: skip
_STORED = {"full": "float32", "lora": "bfloat16", "qlora": "NF4 + double quant."}

COLUMNS = (
    ("model", "name", str),
    ("before", "before", "{:.4f}".format),
    ("after", "after", "{:.4f}".format),
    ("change", "change", "{:+.1%}".format),
    ("trainable", "trainable_parameters", "{:,}".format),
    ("weights, bytes", "weight_bytes", "{:,}".format),
    ("optimizer, bytes", "optimizer_bytes", "{:,}".format),
    ("peak, bytes", "peak_bytes", "{:,}".format),
    ("tokens/s", "tokens_per_s", "{:,.0f}".format),
    ("lr", "lr", "{:g}".format),
    ("linears kept in", "stored", str),
    ("computed in", "compute_dtype", str),
)


def rows(runs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a model. The two bases are the LoRA and QLoRA models before their first step, where lora_B is zero."""
    table = [
        {"name": "bf16 base", "method": "base", "before": runs["lora"]["before"], "stored": _STORED["lora"]},
        {"name": "NF4 base", "method": "nf4_base", "before": runs["qlora"]["before"], "stored": _STORED["qlora"]},
    ]
    for row, method in zip(table, ("lora", "qlora"), strict=True):
        row["compute_dtype"] = runs[method]["compute_dtype"]
    for method, run in runs.items():
        row = {
            "name": NAMES[method],
            "method": method,
            "stored": _STORED[method],
            "change": run["after"] / run["before"] - 1,
        }
        table.append(row | {key: run[key] for _, key, _ in COLUMNS if key in run})
    return table


def rich_table(report: dict[str, Any]) -> None:
    """Print the table on stdout."""
    table = Table(title="Fine-tuning on prose: held-out loss in nats a byte, before and after")
    for title, _, kind in COLUMNS:
        table.add_column(title, justify="left" if kind is str else "right")
    for row in report["rows"]:
        table.add_row(*_cells(row))
    console = wide_console()
    console.print(table)
    for line in _notes(report):
        console.print(line, highlight=False)


def wide_console() -> Console:
    """For tables on stdout: rich takes a pipe to be 80 columns wide, too narrow for them."""
    return Console() if sys.stdout.isatty() else Console(width=180)


def write_markdown(report: dict[str, Any], path: Path) -> None:
    lines = ["| " + " | ".join(title for title, _, _ in COLUMNS) + " |"]
    lines.append("|" + "|".join("---" if kind is str else "--:" for _, _, kind in COLUMNS) + "|")
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in report["rows"]]
    path.write_text("\n".join([*lines, "", *(f"{line}  " for line in _notes(report))]) + "\n")


def plot_losses(curves: dict[str, tuple[list[float], list[tuple[int, float]]]], path: Path, title: str) -> None:
    """Name -> (training loss of each step, [(step, held-out loss)]), as a PNG; training losses averaged over 10 steps."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="optimizer step", ylabel="loss", title=title)
    for number, (name, (train, held_out)) in enumerate(curves.items()):
        color, window = f"C{number}", min(10, len(train))
        means = [sum(train[i - window : i]) / window for i in range(window, len(train) + 1)]
        train_label = None if held_out else name
        axes.plot(
            range(window, len(train) + 1), means, color=color, alpha=0.35 if held_out else 1, lw=1, label=train_label
        )
        if held_out:
            axes.plot(*zip(*held_out, strict=True), "o-", color=color, label=f"{name}, held out", ms=4)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def _cells(row: dict[str, Any]) -> list[str]:
    return ["–" if row.get(key) is None else form(row[key]) for _, key, form in COLUMNS]


def _notes(report: dict[str, Any]) -> list[str]:
    return [
        f"A Llama of {report['parameters']:,} parameters over bytes, pre-trained for {report['pretrain_steps']} steps on "
        f"Python's library sources (held-out loss {report['held_out_code_loss']:.4f}); tuned and measured on Python's help.",
        f"NF4 takes {report['bits_per_quantized_weight']:.3f} bits a quantized weight, statistics included.",
        f"Computed in {report['compute_dtype']} on {report['device']}: {report['compute_dtype_reason']}. Embeddings, norms and "
        "head are kept in that dtype (full fine-tuning: float32).",
        "Bytes are those of live tensors. Peak: weights, optimizer state and the most that one training step holds beyond "
        "them, by the allocator's own record of a step after the timed ones.",
        f"The whole run took {report['seconds']:.0f} s.",
    ]
