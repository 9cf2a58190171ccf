"""`nf4lora finetune`: the options, and which of the two runs they ask for."""

from pathlib import Path
from typing import Annotated

import typer

from .settings import DEMO, DTYPES, LOSS_ON, METHODS, OPTIMS, SCHEDULERS, Settings, UserError

_USER = Settings()
_NOT_OF_THE_DEMO = (
    "resume", "epochs", "method", "target_r", "tinit", "tfinal", "delta_t", "loss_on", "packing",
)  # fmt: skip


def _option(field: str, text: str, *names: str):
    user, demo = getattr(_USER, field), getattr(DEMO, field)
    if isinstance(user, tuple):
        user, demo = ",".join(user), ",".join(demo)
    shown = user if user == demo else f"{'none' if user is None else user}; demonstration: {demo}"
    return typer.Option(*names, help=f"{text} [{shown}]", show_default=False)


def finetune(
    model: Annotated[str | None, typer.Option(help="Model folder or Hub id.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help=".txt, or .jsonl or .json with rows of text, of instruction, input and output, or of messages."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of these options by name; what is given here beside it counts.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(METHODS)}: base in 16 bits, in 4 bits, in 4 bits with ranks that adapt. [qlora]"
        ),
    ] = None,
    output: Annotated[str | None, _option("output", "Folder for results, checkpoints and the adapter.")] = None,
    r: Annotated[
        int | None,
        _option("r", "LoRA rank; of AdaLoRA the one it starts at. Launchers want it in full.", "--r", "--rank"),
    ] = None,
    alpha: Annotated[float | None, _option("alpha", "LoRA alpha; the branch is scaled by alpha / r.")] = None,
    dropout: Annotated[float | None, _option("dropout", "Dropout before the LoRA branch.")] = None,
    target_r: Annotated[int | None, typer.Option(help="AdaLoRA: mean rank to end with. [two thirds of --r]")] = None,
    tinit: Annotated[
        int | None, typer.Option(help="AdaLoRA: steps before ranks are taken away. [a tenth of all]")
    ] = None,
    tfinal: Annotated[int | None, typer.Option(help="AdaLoRA: steps with the final ranks. [a quarter of all]")] = None,
    delta_t: Annotated[
        int | None, typer.Option(help="AdaLoRA: steps between allocations. [a hundredth of all]")
    ] = None,
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
    batch_size: Annotated[int | None, _option("batch_size", "Sequences in a forward of each process.")] = None,
    grad_accum: Annotated[int | None, _option("grad_accum", "Forwards in an optimizer step.")] = None,
    seq_len: Annotated[int | None, _option("seq_len", "Tokens in a sequence.")] = None,
    loss_on: Annotated[
        str | None,
        typer.Option(help=f"{' or '.join(LOSS_ON)}: of instructions and chats, what the model is to say. [answers]"),
    ] = None,
    packing: Annotated[
        bool | None, typer.Option(help="Put instructions and chats side by side in sequences of --seq-len. [no]")
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option(help="Recompute activations: less memory, more time. [no]")
    ] = None,
    save_steps: Annotated[int | None, _option("save_steps", "Steps between checkpoints.")] = None,
    resume: Annotated[bool | None, typer.Option(help="Go on from the newest checkpoint of --output.")] = None,
    seed: Annotated[int | None, _option("seed", "Of the data order, the adapters and dropout.")] = None,
    compute_dtype: Annotated[str | None, _option("compute_dtype", f"{', '.join(DTYPES)}.")] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON, and nothing else, on stdout.")
    ] = False,
) -> None:
    """Fine-tune a causal language model with QLoRA, LoRA or AdaLoRA.

    Without --model and --data: a demonstration that needs no network, comparing full fine-tuning, LoRA and QLoRA on a
    small model, in a few minutes. With them: training on your own model and text, saved as a PEFT adapter; on several GPUs
    when `accelerate launch -m nf4lora.cli finetune …` or torchrun starts it.

    Example: nf4lora finetune --model ./Llama-3.2-1B --data chats.jsonl --method qlora --r 16 --output out
    """
    given = dict(locals())
    for name in ("json", "config"):
        given.pop(name)
    given["data"] = None if data is None else str(data)
    given["target_modules"] = None if target_modules is None else tuple(n.strip() for n in target_modules.split(","))
    given = {name: value for name, value in given.items() if value is not None}
    if config is not None:
        from .config_file import read

        given = read(config) | given
    if ("model" in given) != ("data" in given):
        raise UserError("--model and --data go together: give both, or neither for the demonstration")
    settings = (_USER if "model" in given else DEMO).with_options(given)
    if "model" not in given and (unfit := [name for name in _NOT_OF_THE_DEMO if name in given]):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in unfit)
        raise UserError(
            f"{names}: for your own --model and --data; the demonstration always runs whole, on its own text"
        )
    check_output(settings.output)
    if "model" not in given:
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
