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
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ..hf.adapter import save_adapter
from . import corpus
from . import model as models
from .compute import compute_dtype, device
from .memory import peak_bytes
from .progress import Meter, memory_in_use
from .settings import RunFailed, Settings, UserError
from .train import Run, evaluate, start, train_step

MODEL = dict(
    vocab_size=256, hidden_size=256, intermediate_size=704, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=512, bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip
PRETRAIN = dict(lr=2e-3, max_steps=600, batch_size=4, grad_accum=1, seq_len=128, max_grad_norm=1.0)
EVALUATIONS = 6
FULL_RATE = 0.25  # of --lr: with every weight moving, the rate that suits adapters is too high


class Bf16Linear(nn.Linear):
    """A frozen linear that keeps its weight in bfloat16 and computes in x's dtype: what LoRA's base is, without 4 bits."""

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self.weight)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)  # not its float32 copy, which autograd would keep
        return x @ weight.to(x.dtype).t()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return dy @ weight.to(dy.dtype), None


def build_full(base: Path, settings: Settings, compute: torch.dtype) -> nn.Module:
    """Every weight trains, in float32: in bfloat16 the steps of AdamW would round away."""
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def build_lora(base: Path, settings: Settings, compute: torch.dtype) -> nn.Module:
    """peft's LoRA on the base's bfloat16 linears; the rest in the compute dtype."""
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(base, dtype=compute)
    for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]:
        frozen = Bf16Linear(linear.in_features, linear.out_features, bias=False, device="meta")
        frozen.weight = nn.Parameter(linear.weight.detach().to(torch.bfloat16), requires_grad=False)
        model.set_submodule(name, frozen)
    targets = settings.target_modules
    config = LoraConfig(
        r=settings.r, lora_alpha=settings.alpha, lora_dropout=settings.dropout, task_type="CAUSAL_LM",
        target_modules=targets[0] if targets == ("all-linear",) else list(targets), exclude_modules=["lm_head"],
    )  # fmt: skip
    torch.manual_seed(settings.seed)
    return get_peft_model(model, config)


def build_qlora(base: Path, settings: Settings, compute: torch.dtype) -> nn.Module:
    """NF4LoRALinears, with double quantization, of the same base."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    return models.prepare(model, settings, device(), compute)


BUILD = {"full": build_full, "lora": build_lora, "qlora": build_qlora}


def pretrain(settings: Settings, emit: Any) -> dict[str, Any]:
    """Train the base on code from scratch and save it in bfloat16."""
    torch.manual_seed(settings.seed)
    settings = replace(settings, **PRETRAIN)
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
    if method == "full":
        settings = replace(settings, lr=settings.lr * FULL_RATE)
    compute, why = compute_dtype(where, settings.compute_dtype)
    trained, held_out = corpus.prose(settings.seq_len)
    model = BUILD[method](Path(settings.output) / "base", settings, compute).to(where)
    mixed = compute if method == "full" and compute != torch.float32 else None
    run = start(model, trained, settings, mixed)
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


def _loop(run: Run, emit: Any, after: Any = lambda: None) -> Meter:
    meter = Meter()
    while run.step < run.steps:
        with meter:
            loss = train_step(run)
        meter.tokens += run.tokens_per_step
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
