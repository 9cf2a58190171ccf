"""Ranks and importances of AdaLoRA while it trains: one record each time ranks are allocated, as JSON lines, as a plot."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft.tuners.adalora import AdaLoraModel

from .adalora_state import triplet_scores


def importances(tuner: AdaLoraModel) -> dict[str, float]:
    """Layer -> mean importance of its triplets."""
    scores = triplet_scores(tuner)
    return dict(zip(scores, torch.stack([s.mean() for s in scores.values()]).tolist(), strict=True))


def ranks(pattern: dict[str, list[bool]]) -> dict[str, int]:
    """Layer -> how many triplets a rank_pattern of peft keeps."""
    return {name.partition(".lora_E")[0]: sum(kept) for name, kept in pattern.items()}


def append_records(path: Path, records: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def read_records(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of an `adalora.jsonl`, up to a line that a killed run has left unfinished; none if there is no file."""
    records = []
    if Path(path).is_file():
        for line in Path(path).read_text().splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                break
    return records


def plot_ranks(records: Sequence[dict[str, Any]], path: str | os.PathLike) -> None:
    """A PNG of total rank and budget, of the ranks and of the importances of every layer, over the steps.

    Args: records: those of `AdaLoraCallback.records` or `read_records`; path: of the PNG
    Raises: ValueError if there are none
    """
    if not records:
        raise ValueError("records: found none, wanted those of a run that has allocated ranks (steps after tinit)")
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    steps, layers = [r["step"] for r in records], list(records[0]["ranks"])
    figure = Figure(figsize=(9, 4 + 0.36 * min(len(layers), 40)), layout="constrained")
    total, *maps = figure.subplots(3, 1, sharex=True, height_ratios=(1, 2, 2))
    total.step(steps, [r["budget"] for r in records], where="post", color="C1", lw=3, alpha=0.5, label="budget")
    total.step(steps, [r["total_rank"] for r in records], where="post", color="C0", label="total rank")
    total.set(ylabel="rank", title="AdaLoRA: ranks and importances")
    total.legend()
    edges = [*steps, steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1)]
    for axes, key, label in zip(maps, ("ranks", "importances"), ("rank", "importance, log10"), strict=True):
        rows = torch.tensor([[float(r[key][layer]) for r in records] for layer in layers])
        if key == "importances":
            rows = rows.clamp_min(1e-30).log10()
        mesh = axes.pcolormesh(edges, range(len(layers) + 1), rows.tolist(), cmap="viridis")
        figure.colorbar(mesh, ax=axes, label=label)
        every = -(-len(layers) // 40)
        axes.set_yticks([i + 0.5 for i in range(0, len(layers), every)], layers[::every], fontsize=6)
        axes.invert_yaxis()
    maps[-1].set_xlabel("optimizer step")
    figure.savefig(path, dpi=120)
