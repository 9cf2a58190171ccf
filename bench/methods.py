"""Methods of fine-tuning on the demonstration's model: `python -m bench.methods` prints the table, `--write` renews
bench/results/methods.json.

Each method trains in a process of its own, as `nf4lora finetune` has it, on the same base, data and order, at a rate of
its own: losses, bytes. Then all of them are made once more in one process, where they take turns step by step: tokens/s,
and the ratio to QLoRA's by rounds, so that a machine that others use spoils neither.
"""

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nf4lora.cli.settings import DEMO, RunFailed, Settings

from .environment import environment, version
from .files import AGAIN, RESULTS, write
from .harness import Case, GateFailed, compare
from .timing import Contender, WallMeter

FIRST = "qlora"
KEPT = ("trainable_parameters", "weight_bytes", "optimizer_bytes", "peak_bytes", "before", "after", "lr", "curve")
ROUNDS = 15


def methods() -> tuple[str, ...]:
    """All of them."""
    from nf4lora.cli.demo_models import BUILD

    return tuple(BUILD)


def measure(out: Path, settings: Settings = DEMO, chosen: Sequence[str] = (), rounds: int = ROUNDS) -> int:
    """Writes methods.json into `out`; returns 1 if a method failed, else 0. `chosen`: all methods by default."""
    from nf4lora.cli.demo import run_method
    from nf4lora.cli.report import NAMES

    load, failed, rows = os.getloadavg()[0], [], []
    with tempfile.TemporaryDirectory() as folder:
        settings = replace(settings, output=folder)
        (Path(folder) / "logs").mkdir()
        base = run_method("pretrain", settings)
        for method in chosen or methods():
            try:
                found = run_method(method, settings)
            except RunFailed as error:
                failed.append(f"{NAMES[method]}: {error}")
                continue
            rows.append({"method": method, "name": NAMES[method]} | {key: found[key] for key in KEPT})
        try:
            speeds = _speeds(settings, [row["method"] for row in rows], rounds)
        except GateFailed as error:
            failed.append(str(error))
            speeds = {}
    rows = [row | speeds.get(row["method"], {}) for row in rows]
    about = {
        "parameters": base["parameters"], "held_out_code_loss": base["held_out_code"], "pretrain_steps": len(base["losses"]),
        "steps": settings.max_steps, "load_before": load, "rounds": rounds,
        "note": "speeds were taken in turns, by rounds; others may have used the machine: load_before is its load average before",
    }  # fmt: skip
    found = environment() | {"transformers": version("transformers")}
    write(out / "methods.json", {"environment": found, "methods": about, "rows": rows, "failed": failed})
    return 1 if failed else 0


def _speeds(settings: Settings, chosen: Sequence[str], rounds: int) -> dict[str, dict[str, Any]]:
    """Method -> [median, least, most] of tokens a second and of their ratio to QLoRA's, or the first method's."""
    from nf4lora.cli import methods
    from nf4lora.cli import model as models
    from nf4lora.cli.compute import compute_dtype, device
    from nf4lora.cli.train import train_step

    models.quiet_transformers()
    compute, _ = compute_dtype(device(), settings.compute_dtype)
    order = sorted(chosen, key=lambda method: method != FIRST)

    def stepped(method: str) -> Callable[[], float]:
        run, _ = methods.prepared(method, replace(settings, max_steps=max(settings.max_steps, rounds + 2)), compute)

        def step() -> float:
            loss = train_step(run)
            if run.device.type == "cuda":
                torch.cuda.synchronize()
            return loss

        return step

    def finite(loss: float) -> None:
        assert math.isfinite(loss), f"the loss is {loss}"

    contenders = {method: Contender((stepped(method),), ours=True) for method in order}
    tokens = settings.batch_size * settings.grad_accum * settings.seq_len
    found = {}
    for row in compare(Case("methods", "a training step", contenders, finite, tokens=tokens), WallMeter(), rounds, 1):
        if not row.contender.endswith(AGAIN):
            middle, least, most = row.time_ms
            rates = [tokens / ms * 1e3 for ms in (middle, most, least)]
            found[row.contender] = {"tokens_per_s": rates, "ratio": [1 / r for r in (row.ratio.median, row.ratio.most, row.ratio.least)]}
    return found


def main() -> int:
    from .report import markdown
    from .files import load

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="renew bench/results/methods.json")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write methods.json here")
    parser.add_argument("--only", default="", help="methods with commas between: all by default")
    parser.add_argument("--steps", type=int, default=DEMO.max_steps)
    asked = parser.parse_args()
    chosen = asked.only.split(",") if asked.only else ()
    if unknown := set(chosen) - set(methods()):
        sys.exit(f"--only: found {sorted(unknown)}, wanted some of {methods()}")
    with tempfile.TemporaryDirectory() as folder:
        out = asked.out or (RESULTS if asked.write else Path(folder))
        code = measure(out, replace(DEMO, max_steps=asked.steps), chosen)
        print(markdown(load(out)["methods"]))
    return code


if __name__ == "__main__":
    sys.exit(main())
