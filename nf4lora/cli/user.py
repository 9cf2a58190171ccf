"""`nf4lora finetune --model … --data …`: a fine-tune of the user's own model on their data, with checkpoints."""

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ..hf.checkpoint import latest, publish, save
from . import config_file
from . import data as datas
from . import model as models
from .compute import compute_dtype
from .metrics import Metrics
from .packing import check_packing
from .processes import Processes, processes
from .progress import Bar, Meter, console, memory_in_use
from .report import plot_losses
from .settings import Settings, Stopped, UserError
from .state import Saved, adapter_files, pack
from .train import Run, start, steps_of, train_step

NAMES = {"lora": "LoRA", "qlora": "QLoRA", "adalora": "AdaLoRA"}


def run(settings: Settings, as_json: bool) -> None:
    """Train, save `output/adapter`, `results.json`, `config.yaml`, the metrics and `loss.png`, and print the result.

    Raises: UserError, RunFailed, OSError; Stopped after Ctrl-C, with a checkpoint of the last step saved.
    """
    together = processes()
    stopped = _train(settings, as_json, together)
    together.end()
    if stopped:
        raise Stopped(stopped)


def _train(settings: Settings, as_json: bool, together: Processes) -> str:
    """Returns what there is to say where it was stopped."""
    output = Path(settings.output)
    checkpoint = _checkpoint(settings, output)
    tokenizer = models.load_tokenizer(settings)
    vocabulary, longest = models.sizes(settings)
    data = datas.load(settings, tokenizer, vocabulary)
    if longest and settings.seq_len > longest:
        raise UserError(f"--seq-len: found {settings.seq_len}, wanted at most {longest}, the longest {settings.model} takes")
    compute, why = compute_dtype(together.device, settings.compute_dtype)
    if together.is_main:
        models.show_loading()
    base = models.load_base(settings, together.device, compute)
    fingerprint = together.gathered(models.fingerprint(base) if together.is_main else "")[0]
    if data.position_ids is not None:
        check_packing(base, settings.batch_size)
    model = models.add_adapters(base, settings, steps_of(settings, len(data), together))
    training = _started(model, data, settings, together, fingerprint, checkpoint)
    meter = Meter()
    if together.is_main:
        config_file.write(settings, output / "config.yaml")
        if checkpoint:
            console.print(f"resuming after step {training.step} from {checkpoint}", highlight=False)
    if stopped := _loop(training, output, meter):
        return stopped
    if training.adaptive:
        training.adaptive.end()
    adapter = adapter_files(training)
    if together.is_main:
        publish(output / "adapter", adapter)
        _finish(training, output, as_json, {
            "tokens_per_s": meter.tokens_per_s, "compute_dtype": str(compute)[6:], "compute_dtype_reason": why,
        })  # fmt: skip
    return ""


def _started(
    model: nn.Module, data: datas.Data, settings: Settings, together: Processes, base: str, checkpoint: Path | None
) -> Run:
    """A run at step 0, or as `checkpoint` has left it; `base`: the fingerprint of its model. Raises: UserError."""
    if len(set(together.gathered(datas.fingerprint(data)))) > 1:
        raise UserError("--data: found other data in other processes; wanted the same file for all")
    if checkpoint is None:
        training = start(model, data, settings, processes=together)
        training.base = base
        return training
    try:
        saved = Saved(checkpoint, settings, data, base, together)
        saved.load_adapter(model)  # before it is sharded
        training = start(model, data, settings, processes=together)
        training.base = base
        saved.restore(training)
        if training.adaptive:
            training.adaptive.begin(training.step)
    except ValueError as error:
        raise UserError(f"--resume: {error}") from error
    return training


def _finish(training: Run, output: Path, as_json: bool, more: dict[str, Any]) -> None:
    """Write and print the result."""
    settings, model = training.settings, training.processes.unwrap(training.model)
    result = {
        "losses": training.losses, "steps": training.steps, "loss_first": training.losses[0],
        "loss_last": training.losses[-1], "method": settings.method, "processes": training.processes.count,
        "data": training.data.counts, "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "weight_bytes": models.weight_bytes(model), "optimizer_bytes": models.optimizer_bytes(training.optimizer),
        "bits_per_quantized_weight": models.nf4_bits(model), "memory_bytes": memory_in_use(training.device),
        "adapter": str(output / "adapter"), "settings": settings.as_json(), **more,
    }  # fmt: skip
    (output / "results.json").write_text(json.dumps(result, indent=1))
    name = NAMES[settings.method]
    plot_losses({name: (training.losses, [])}, output / "loss.png", f"{settings.model}, {name}: training loss")
    if training.adaptive:
        training.adaptive.plot(output / "ranks.png")
    print(json.dumps(result) if as_json else _summary(result))


def _checkpoint(settings: Settings, output: Path) -> Path | None:
    found = latest(output)
    if settings.resume and found is None:
        raise UserError(f"--resume: no complete checkpoint in {output}; run without --resume to start")
    if found and not settings.resume:
        raise UserError(f"--output: {output} holds {found.name}; give --resume to go on, or another folder to start anew")
    return found


def _loop(training: Run, output: Path, meter: Meter) -> str:
    """Returns what there is to say where it was stopped."""
    saved, together = training.step, training.processes
    with _interruption() as interrupted, ExitStack() as stack:
        if together.is_main:
            metrics = Metrics(output, training.step)
            bar = stack.enter_context(Bar(NAMES[training.settings.method], training.steps, training.step))
        while training.step < training.steps and not _any(together, interrupted):
            indices, lr = training.indices(), training.scheduler.get_last_lr()[0]
            with meter:
                loss = train_step(training)
            meter.tokens += training.tokens(indices)
            if together.is_main:
                memory = memory_in_use(training.device)
                bar.update(training.step, loss, meter.tokens_per_s, memory)
                metrics.add({
                    "step": training.step, "epoch": training.step * training.sequences / len(training.data), "loss": loss,
                    "grad_norm": training.grad_norm, "lr": lr, "tokens": training.tokens(indices),
                    "tokens_per_s": meter.tokens_per_s, "seconds": meter.seconds, "memory_bytes": memory,
                    **(training.adaptive.metrics() if training.adaptive else {}),
                })  # fmt: skip
            if training.step % training.settings.save_steps == 0:
                _save(training, output)
                saved = training.step
        if training.step > saved:
            _save(training, output)
    if training.step == training.steps:
        return ""
    kept = f"{output}/checkpoint-{training.step} is saved" if training.step else "nothing was saved yet"
    advice = "the same command with --resume goes on from there" if training.step else "run the same command again"
    return f"after step {training.step} of {training.steps}; {kept}; {advice}"


def _save(training: Run, output: Path) -> None:
    files = pack(training)
    if training.processes.is_main:
        save(output, training.step, files)


def _any(together: Processes, event: threading.Event) -> bool:
    """Whether it is set in any process: all of them stop after the same step."""
    return together.sum(event.is_set())[0] > 0


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
    bits = result["bits_per_quantized_weight"]
    held = f", {bits:.3f} bits a quantized weight" if bits else ""
    data = ", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in result["data"].items() if count)
    return (
        f"loss {result['loss_first']:.4f} -> {result['loss_last']:.4f} in {result['steps']} steps, "
        f"{result['tokens_per_s']:,.0f} tokens/s, computed in {result['compute_dtype']} ({result['compute_dtype_reason']})\n"
        f"{result['trainable_parameters']:,} trainable parameters; weights {result['weight_bytes']:,} bytes{held}; "
        f"optimizer {result['optimizer_bytes']:,} bytes\ndata: {data}\nadapter: {result['adapter']}"
    )
