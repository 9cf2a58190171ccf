"""The plan on the terminal, as JSON, and as a chart."""

from pathlib import Path
from typing import Any

from ..report import wide_console
from .advice import Advice
from .fit import Fit
from .inventory import Inventory
from .needs import Need
from .units import shown

NAMES = {"full": "full fine-tuning", "lora": "LoRA, 16 bits", "qlora": "QLoRA", "adalora": "AdaLoRA on NF4"}


def as_json(
    model: Inventory, needs: dict[str, Need], turned: dict[str, int], fits: list[Fit], advice: Advice, generation: dict[str, int],
    assumed: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    return {
        "model": model.name, "parameters": model.total, "quantized_parameters": model.quantized, "assumptions": assumed,
        "methods": {
            method: {
                "bytes": need.parts, "total": need.total, "on_device": need.on_device, "tensors": need.tensors, "peak": need.peak,
                "activations_with_checkpointing_turned": turned[method], "trainable_parameters": need.trainable,
                "optimizer_paged": need.states.paged,
                "optimizer_resident": need.states.resident,
            } for method, need in needs.items()
        },
        "fits": [
            {
                "method": f.choice.method, "gradient_checkpointing": f.choice.gradient_checkpointing, "total": f.total,
                "on_device": f.on_device, "fits": f.fits, "pages": f.pages, "largest_batch": f.largest_batch,
                "largest_length": f.largest_length, "lower_bound": bool(model.uncounted),
            } for f in fits
        ],
        "inference": generation,
        "advice": {name: {"value": value, "reason": reason} for name, (value, reason) in advice.values.items()} or None,
        "otherwise": advice.otherwise or None,
    }  # fmt: skip


def tables(
    model: Inventory, needs: dict[str, Need], turned: dict[str, int], fits: list[Fit], advice: Advice, generation: dict[str, int],
    assumed: dict[str, Any],
) -> None:  # fmt: skip
    """Print on stdout: bytes, what fits, generation, the advice and what was assumed."""
    from rich.table import Table

    console = wide_console()
    title = f"{model.name}: {model.total:,} parameters, {model.quantized:,} of them in linears that 4 bits can hold"
    lower = f"\na lower bound: activations of {model.uncounted} are not counted" if model.uncounted else ""
    table = Table(
        title=f"{title}\nbytes of one step: batch {assumed['batch size']}, {assumed['tokens a sequence']} tokens{lower}"
    )
    table.add_column("")
    for method in needs:
        table.add_column(NAMES[method], justify="right")
    for part in _in_order(needs):
        table.add_row(part, *(shown(need.parts[part]) if part in need.parts else "–" for need in needs.values()))
    table.add_section()
    table.add_row("total", *(shown(need.total) for need in needs.values()))
    table.add_row("of it may wait on the host", *(shown(need.total - need.on_device) for need in needs.values()))
    table.add_row("trainable parameters", *(f"{need.trainable:,}" for need in needs.values()))
    table.add_row("fullest at", *(need.peak for need in needs.values()))
    other = "without" if assumed["checkpointing"] == "on" else "with"
    table.add_row(f"activations {other} checkpointing", *(shown(turned[method]) for method in needs))
    console.print(table)
    title = f"what fits {assumed['card']}, {assumed['left free']} of it left free{lower}"
    table = Table("method", "checkpointing", title=title)
    for column in (
        "needed on the card",
        "fits",
        f"largest batch at {assumed['tokens a sequence']}",
        "largest length at batch 1",
    ):
        table.add_column(column, justify="right")
    for f in fits:
        fitting = ("perhaps" if lower else "yes") if f.fits else "no"
        fitting = ("perhaps, paged" if lower else "paged") if f.pages else fitting
        most, least = ("≤ ", "≥ ") if lower else ("", "")
        whole = " (all it takes)" if f.largest_length and f.largest_length == model.longest else ""
        on = "on" if f.choice.gradient_checkpointing else "off"
        batch, length = f"{most}{f.largest_batch:,}", f"{most}{f.largest_length:,}{whole}"
        table.add_row(NAMES[f.choice.method], on, f"{least}{shown(f.on_device)}", fitting, batch, length)
    console.print(table)
    parts = ", ".join(f"{name} {shown(size)}" for name, size in generation.items())
    console.print(f"To generate at that batch and length: {shown(sum(generation.values()))} ({parts})", highlight=False)
    if advice.values:
        table = Table("option", "value", "reason", title="recommended")
        for name, (value, reason) in advice.values.items():
            table.add_row(name, value, reason)
        console.print(table)
    else:
        console.print(f"Nothing fits: {advice.otherwise}", highlight=False)
    console.print(
        "Calculated from the config, nothing is measured. Assumed: "
        + "; ".join(f"{k} {v}" for k, v in assumed.items()),
        highlight=False,
    )


def _in_order(needs: dict[str, Need]) -> list[str]:
    """Every part that some method has, in the order of the method that has most."""
    order: list[str] = []
    for need in needs.values():
        where = 0
        for part in need.parts:
            if part in order:
                where = order.index(part) + 1
            else:
                order.insert(where, part)
                where += 1
    return order


def chart(needs: dict[str, Need], card: int, path: Path, title: str) -> None:
    """A stacked bar a method, and the card as a line, as a PNG."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(10, 0.8 * len(needs) + 3), layout="constrained")
    axes = figure.add_subplot(xlabel="GiB", title=title)
    names, left = [NAMES[method] for method in needs], [0.0] * len(needs)
    shown_parts = [
        part
        for part in _in_order(needs)
        if any(need.parts.get(part, 0) > 0.002 * need.total for need in needs.values())
    ]
    for number, part in enumerate(shown_parts):
        sizes = [need.parts.get(part, 0) / 2**30 for need in needs.values()]
        axes.barh(
            names,
            sizes,
            left=left,
            label=part,
            color=f"C{number % 10}",
            hatch="//" if number >= 10 else None,
            height=0.6,
        )
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    axes.axvline(card / 2**30, color="black", linestyle="--", label=f"card: {shown(card)}")
    axes.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=120)
