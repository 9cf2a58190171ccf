"""`nf4lora finetune`: the options, and which of the two runs they ask for."""

from pathlib import Path
from typing import Annotated

import typer

from .settings import DEMO, DTYPES, OPTIMS, SCHEDULERS, Settings, UserError

_USER = Settings()


def _option(field: str, text: str, *names: str):
    user, demo = getattr(_USER, field), getattr(DEMO, field)
    if isinstance(user, tuple):
        user, demo = ",".join(user), ",".join(demo)
    shown = user if user == demo else f"{'none' if user is None else user}; demonstration: {demo}"
    return typer.Option(*names, help=f"{text} [{shown}]", show_default=False)


def finetune(
    model: Annotated[str | None, typer.Option(help="Model folder or Hub id.")] = None,
    data: Annotated[Path | None, typer.Option(help='.txt, or .jsonl of {"text": …} or {"messages": […]}.')] = None,
    output: Annotated[str | None, _option("output", "Folder for results, checkpoints and the adapter.")] = None,
    r: Annotated[int | None, _option("r", "LoRA rank.", "--r")] = None,
    alpha: Annotated[float | None, _option("alpha", "LoRA alpha; the branch is scaled by alpha / r.")] = None,
    dropout: Annotated[float | None, _option("dropout", "Dropout before the LoRA branch.")] = None,
    target_modules: Annotated[
        str | None, _option("target_modules", "all-linear, or names separated by commas.")
    ] = None,
    optim: Annotated[str | None, _option("optim", f"{', '.join(OPTIMS)}.")] = None,
    lr: Annotated[float | None, _option("lr", "Peak learning rate.")] = None,
    lr_scheduler: Annotated[str | None, _option("lr_scheduler", f"{', '.join(SCHEDULERS)}.")] = None,
    warmup_ratio: Annotated[float | None, _option("warmup_ratio", "Share of the steps that warm up.")] = None,
    max_grad_norm: Annotated[float | None, _option("max_grad_norm", "Gradients are clipped to this norm.")] = None,
    epochs: Annotated[float | None, _option("epochs", "Passes over the data, unless --max-steps is given.")] = None,
    max_steps: Annotated[int | None, _option("max_steps", "Optimizer steps.")] = None,
    batch_size: Annotated[int | None, _option("batch_size", "Sequences in a forward.")] = None,
    grad_accum: Annotated[int | None, _option("grad_accum", "Forwards in an optimizer step.")] = None,
    seq_len: Annotated[int | None, _option("seq_len", "Tokens in a sequence.")] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option("--gradient-checkpointing", help="Recompute activations: less memory, more time.")
    ] = None,
    save_steps: Annotated[int | None, _option("save_steps", "Steps between checkpoints.")] = None,
    resume: Annotated[
        bool | None, typer.Option("--resume", help="Go on from the newest checkpoint of --output.")
    ] = None,
    seed: Annotated[int | None, _option("seed", "Of the data order, the adapters and dropout.")] = None,
    compute_dtype: Annotated[str | None, _option("compute_dtype", f"{', '.join(DTYPES)}.")] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON, and nothing else, on stdout.")
    ] = False,
) -> None:
    """Fine-tune a causal language model with QLoRA.

    Without --model and --data: a demonstration that needs no network, comparing full fine-tuning, LoRA and QLoRA on a
    small model, in a few minutes. With them: training on your own model and text, saved as a PEFT adapter.
    """
    given = dict(locals())
    given.pop("json")
    given["data"] = None if data is None else str(data)
    given["target_modules"] = None if target_modules is None else tuple(target_modules.split(","))
    if (model is None) != (data is None):
        raise UserError("--model and --data go together: give both, or neither for the demonstration")
    settings = (DEMO if model is None else _USER).with_options(given)
    check_output(settings.output)
    if model is None:
        if settings.resume or epochs is not None:
            raise UserError(
                "--resume and --epochs are for your own --model and --data; the demonstration always runs whole"
            )
        from .demo import run
    else:
        from .user import run
    run(settings, json)


def check_output(output: str) -> None:
    """Make the folder and try it. Raises: UserError when nothing can be written there."""
    import tempfile

    try:
        Path(output).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except (OSError, ValueError) as error:
        raise UserError(
            f"--output: {output} cannot be written ({getattr(error, 'strerror', None) or error}); wanted a folder to write to"
        ) from error
