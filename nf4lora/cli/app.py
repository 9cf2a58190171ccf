"""The typer application, and the one place where an exception becomes a message and an exit code."""

import sys

import typer

from .doctor import doctor
from .errors import errors
from .finetune import finetune
from .settings import UserError

app = typer.Typer(
    name="nf4lora", help="QLoRA fine-tuning on NF4 kernels.", no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip
for command in (finetune, errors, doctor):
    app.command()(command)


def run() -> int:
    """Run the command of sys.argv. Returns its exit code; an error of the program itself keeps its traceback."""
    try:
        app(prog_name="nf4lora", standalone_mode=True)
    except UserError as error:
        return _fail(f"error: {error}", 2)
    except OSError as error:
        return _fail(f"error: {error}", 1)
    except KeyboardInterrupt as interrupt:
        return _fail(f"stopped{': ' if interrupt.args else ''}{' '.join(interrupt.args)}", 130)
    return 0


def _fail(message: str, code: int) -> int:
    print("nf4lora: " + " ".join(message.split()), file=sys.stderr)
    return code
