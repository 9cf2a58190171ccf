"""`nf4lora finetune` without arguments: pre-train a small model on code, then three fine-tunes on prose, compared."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .progress import Bar
from .report import NAMES, plot_losses, rich_table, rows, write_markdown
from .settings import RunFailed, Settings, Stopped, UserError

METHODS = ("full", "lora", "qlora")


def run(settings: Settings, as_json: bool) -> None:
    """Write base/, adapter/, results.json, table.md and loss.png to the output folder, and print the table or the JSON.

    Raises: UserError, RunFailed; Stopped after Ctrl-C.
    """
    began = time.perf_counter()
    output = Path(settings.output)
    (output / "logs").mkdir(exist_ok=True)
    try:
        results = {method: run_method(method, settings) for method in ("pretrain", *METHODS)}
    except KeyboardInterrupt:
        raise Stopped("the demonstration keeps no checkpoints; run it again") from None
    base, runs = results["pretrain"], {method: results[method] for method in METHODS}
    report = {
        "rows": rows(runs), "compute_dtype": runs["qlora"]["compute_dtype"],
        "compute_dtype_reason": runs["qlora"]["compute_dtype_reason"], "device": runs["qlora"]["device"],
        "bits_per_quantized_weight": runs["qlora"]["bits_per_quantized_weight"], "parameters": base["parameters"],
        "held_out_code_loss": base["held_out_code"], "pretrain_steps": len(base["losses"]), "pretrain_losses": base["losses"],
        "curves": {method: {"train": r["losses"], "held_out": r["curve"]} for method, r in runs.items()},
        "settings": settings.as_json(), "seconds": time.perf_counter() - began,
    }  # fmt: skip
    (output / "results.json").write_text(json.dumps(report, indent=1))
    write_markdown(report, output / "table.md")
    curves = {NAMES[method]: (r["losses"], r["curve"]) for method, r in runs.items()}
    plot_losses(curves, output / "loss.png", "Fine-tuning on prose: loss in nats a byte")
    if as_json:
        print(json.dumps(report))
    else:
        rich_table(report)
        print(f"saved in {output}: results.json, table.md, loss.png, adapter/ (PEFT), base/")


def run_method(method: str, settings: Settings) -> dict[str, Any]:
    """Run "pretrain" or a method of `methods.BUILD` in a process of its own and show its progress. Returns its result.

    The output folder has logs/, and for a method the base that "pretrain" left. Raises: UserError, RunFailed.
    """
    name = NAMES[method]
    # -P: run from a source tree, it would else import that tree, which may hold no kernels
    command = [sys.executable, "-P", "-m", "nf4lora.cli.methods", method, json.dumps(settings.as_json())]
    log = Path(settings.output) / "logs" / f"{method}.log"
    result = error = None
    # OpenMP threads that spin long while they wait make a busy machine several times slower, and ones that never spin an
    # idle machine twice as slow
    environment = {"GOMP_SPINCOUNT": "50000"} | os.environ
    with (
        log.open("w") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process,
    ):
        try:
            bar = None
            for event in map(json.loads, process.stdout):
                if "step" in event:
                    bar = bar or Bar(name, event["steps"]).__enter__()
                    bar.update(event["step"], event["loss"], event["tokens_per_s"], event["memory"])
                result, error = event.get("result", result), event if "error" in event else error
        finally:
            if bar:
                bar.__exit__()
            process.kill()  # nothing to a process that has ended
    if error:
        raise (UserError if error["kind"] == "UserError" else RunFailed)(error["error"])
    if result is None:
        last = (log.read_text().strip() or "no message").splitlines()[-1]
        raise RunFailed(f"the {name} run ended with exit code {process.returncode}: {last}; see {log}")
    return result
