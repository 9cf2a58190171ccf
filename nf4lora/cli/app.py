"""The typer application, and the one place where an exception becomes a message and an exit code."""

import sys

import typer

from .bench import bench
from .compare import compare
from .doctor import doctor
from .errors import errors
from .export import export
from .finetune import finetune
from .merge import merge
from .plan import plan
from .quantize import quantize
from .settings import RunFailed, Stopped, UserError

app = typer.Typer(
    name="nf4lora", help="QLoRA fine-tuning on NF4 kernels.", no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip
for command in (finetune, plan, quantize, merge, export, compare, bench, errors, doctor):
    app.command()(command)


def run() -> int:
    """Run the command of sys.argv. Returns its exit code; a fault of the program itself keeps its traceback."""
    try:
        app(prog_name="nf4lora")
    except UserError as error:
        return _fail("error", error, 2)
    except (RunFailed, OSError) as error:
        return _fail("error", error, 1)
    except Stopped as stopped:
        return _fail("stopped", stopped, 130)
    return 0


def _fail(kind: str, error: Exception, code: int) -> int:
    print(f"nf4lora: {kind}: {' '.join(str(error).split())}", file=sys.stderr)
    return code
