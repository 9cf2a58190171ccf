"""`nf4lora finetune --model … --data …`: QLoRA on the user's own model and text, with checkpoints."""

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..hf.adapter import save_adapter
from ..hf.checkpoint import CheckpointError, latest, save
from . import model as models
from .compute import compute_dtype, device
from .data import read_documents, to_blocks
from .progress import Bar, Meter, console, memory_in_use
from .report import plot_losses
from .settings import Settings, Stopped, UserError
from .state import pack, restore
from .train import Run, start, train_step


def run(settings: Settings, as_json: bool) -> None:
    """Train, save `output/adapter`, `results.json` and `loss.png`, and print the result.

    Raises: UserError, RunFailed, OSError; Stopped after Ctrl-C, with a checkpoint of the last step saved.
    """
    output = Path(settings.output)
    checkpoint = _checkpoint(settings, output)
    tokenizer = models.load_tokenizer(settings)
    documents = read_documents(settings.data, tokenizer)
    where = device()
    compute, why = compute_dtype(where, settings.compute_dtype)
    model = models.load_model(settings, where, compute)
    blocks = to_blocks(documents, tokenizer, settings.seq_len, model.get_input_embeddings().num_embeddings)
    training = start(model, blocks, settings)
    if checkpoint:
        try:
            restore(training, checkpoint)
        except (CheckpointError, ValueError) as error:
            raise UserError(f"--resume: {error}") from error
        console.print(f"resuming after step {training.step} from {checkpoint}", highlight=False)
    meter = Meter()
    _loop(training, output, meter)
    save_adapter(model, output / "adapter", settings.model)
    result = {
        "losses": training.losses, "steps": training.steps, "loss_first": training.losses[0],
        "loss_last": training.losses[-1], "tokens_per_s": meter.tokens_per_s, "compute_dtype": str(compute)[6:],
        "compute_dtype_reason": why, "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "weight_bytes": models.weight_bytes(model), "optimizer_bytes": models.optimizer_bytes(training.optimizer),
        "bits_per_quantized_weight": models.nf4_bits(model), "memory_bytes": memory_in_use(where),
        "adapter": str(output / "adapter"), "settings": settings.as_json(),
    }  # fmt: skip
    (output / "results.json").write_text(json.dumps(result, indent=1))
    plot_losses({"QLoRA": (training.losses, [])}, output / "loss.png", f"{settings.model}: training loss")
    print(json.dumps(result) if as_json else _summary(result))


def _checkpoint(settings: Settings, output: Path) -> Path | None:
    found = latest(output)
    if settings.resume and found is None:
        raise UserError(f"--resume: no complete checkpoint in {output}; run without --resume to start")
    if found and not settings.resume:
        raise UserError(
            f"--output: {output} holds {found.name}; give --resume to go on, or another folder to start anew"
        )
    return found


def _loop(training: Run, output: Path, meter: Meter) -> None:
    saved = training.step
    with _interruption() as interrupted, Bar("QLoRA", training.steps, training.step) as bar:
        while training.step < training.steps and not interrupted.is_set():
            with meter:
                loss = train_step(training)
            meter.tokens += training.tokens_per_step
            bar.update(training.step, loss, meter.tokens_per_s, memory_in_use(training.device))
            if training.step % training.settings.save_steps == 0:
                save(output, training.step, pack(training))
                saved = training.step
        if training.step > saved:
            save(output, training.step, pack(training))
    if training.step < training.steps:
        kept = f"{output}/checkpoint-{training.step} is saved" if training.step else "nothing was saved yet"
        advice = "the same command with --resume goes on from there" if training.step else "run the same command again"
        raise Stopped(f"after step {training.step} of {training.steps}; {kept}; {advice}")


@contextmanager
def _interruption() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, so that the step in progress ends and is saved; a second one stops at once."""
    event = threading.Event()

    def first(number: int, frame: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)
        console.print("stopping after this step; Ctrl-C again to stop at once", highlight=False)

    before = signal.signal(signal.SIGINT, first)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def _summary(result: dict[str, Any]) -> str:
    return (
        f"loss {result['loss_first']:.4f} -> {result['loss_last']:.4f} in {result['steps']} steps, "
        f"{result['tokens_per_s']:,.0f} tokens/s, computed in {result['compute_dtype']} ({result['compute_dtype_reason']})\n"
        f"{result['trainable_parameters']:,} trainable parameters; weights {result['weight_bytes']:,} bytes, "
        f"{result['bits_per_quantized_weight']:.3f} bits a quantized weight; optimizer {result['optimizer_bytes']:,} bytes\n"
        f"adapter: {result['adapter']}"
    )
