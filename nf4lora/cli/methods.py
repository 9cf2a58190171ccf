"""One run of the demonstration, in a process of its own: `python -m nf4lora.cli.methods <method> <settings as JSON>`.

Prints one JSON object a line: {"step": …} and {"held_out": …} while it runs, {"result": …} at the end.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from ..hf.adapter import save_adapter
from . import corpus
from . import model as models
from .compute import compute_dtype, device
from .demo_models import BUILD, RATE
from .memory import peak_bytes
from .progress import Meter, memory_in_use
from .settings import RunFailed, Settings, UserError
from .train import Run, evaluate, start, train_step

MODEL = dict(
    vocab_size=256, hidden_size=256, intermediate_size=704, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=512, bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip
PRETRAIN = dict(lr=2e-3, batch_size=4, grad_accum=1, seq_len=128, max_grad_norm=1.0)
PRETRAIN_STEPS = 600  # at most; three times as many as the tuning's
EVALUATIONS = 6


def pretrain(settings: Settings, emit: Any) -> dict[str, Any]:
    """Train the base on code from scratch and save it in bfloat16."""
    torch.manual_seed(settings.seed)
    settings = replace(settings, max_steps=min(PRETRAIN_STEPS, 3 * settings.max_steps), **PRETRAIN)
    trained, held_out = corpus.code(settings.seq_len)
    model = LlamaForCausalLM(LlamaConfig(**MODEL)).to(device())
    run = start(model, trained, settings)
    meter = _loop(run, emit)
    model.to(torch.bfloat16).save_pretrained(Path(settings.output) / "base")
    model.float()
    loss = evaluate(run, held_out)
    parameters = sum(p.numel() for p in model.parameters())
    return {"held_out_code": loss, "parameters": parameters, "tokens_per_s": meter.tokens_per_s, "losses": run.losses}


def tune(method: str, settings: Settings, emit: Any) -> dict[str, Any]:
    """Fine-tune the base on prose by one method. Returns its row of the table and its curves."""
    where = device()
    compute, why = compute_dtype(where, settings.compute_dtype)
    run, held_out = prepared(method, settings, compute)
    model, settings = run.model, run.settings
    curve = [(0, evaluate(run, held_out))]
    emit({"held_out": curve[-1]})

    def measure() -> None:
        if run.step == run.steps or run.step % max(run.steps // EVALUATIONS, 1) == 0:
            curve.append((run.step, evaluate(run, held_out)))
            emit({"held_out": curve[-1]})

    meter = _loop(run, emit, measure)
    if method == "qlora":
        save_adapter(model, Path(settings.output) / "adapter", str(Path(settings.output) / "base"))
    losses, weights, optimizer = list(run.losses), models.weight_bytes(model), models.optimizer_bytes(run.optimizer)
    return {
        "before": curve[0][1], "lr": settings.lr, "after": curve[-1][1], "curve": curve, "losses": losses,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "weight_bytes": weights, "optimizer_bytes": optimizer,
        "peak_bytes": peak_bytes(lambda: train_step(run), where, weights + optimizer),
        "tokens_per_s": meter.tokens_per_s, "bits_per_quantized_weight": models.nf4_bits(model),
        "compute_dtype": str(compute)[6:], "compute_dtype_reason": why, "device": where.type,
    }  # fmt: skip


def prepared(method: str, settings: Settings, compute: torch.dtype) -> tuple[Run, Tensor]:
    """A run at step 0 by `method` on the base of the output folder, at the method's own rate, and the held-out blocks."""
    settings = replace(settings, lr=settings.lr * RATE[method])
    trained, held_out = corpus.prose(settings.seq_len)
    model = BUILD[method](Path(settings.output) / "base", settings, compute).to(device())
    run = start(model, trained, settings, compute if method == "full" and compute != torch.float32 else None)
    if run.adaptive:
        run.adaptive.begin(0)
    return run, held_out


def _loop(run: Run, emit: Any, after: Any = lambda: None) -> Meter:
    meter = Meter()
    while run.step < run.steps:
        with meter:
            loss = train_step(run)
        meter.tokens += run.settings.batch_size * run.settings.grad_accum * run.settings.seq_len
        memory = memory_in_use(run.device)
        emit({"step": run.step, "steps": run.steps, "loss": loss, "tokens_per_s": meter.tokens_per_s, "memory": memory})
        after()
    return meter


def main(method: str, settings: Settings) -> None:
    # stdout is for the parent alone; what libraries print goes to stderr
    with os.fdopen(os.dup(1), "w") as events:
        os.dup2(2, 1)

        def emit(event: dict[str, Any]) -> None:
            print(json.dumps(event), file=events, flush=True)

        models.quiet_transformers()
        try:
            emit({"result": pretrain(settings, emit) if method == "pretrain" else tune(method, settings, emit)})
        except (UserError, RunFailed) as error:
            emit({"error": str(error), "kind": type(error).__name__})


if __name__ == "__main__":
    main(sys.argv[1], Settings.from_json(json.loads(sys.argv[2])))
