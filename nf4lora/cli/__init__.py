"""The command line: `nf4lora --help`. Heavy imports wait until a command needs them."""

import sys
from importlib.util import find_spec

NEEDS = ("typer", "rich", "transformers", "peft", "matplotlib")


def main() -> None:
    """Entry point `nf4lora`. Exits with 0, 1 (a run failed), 2 (bad input) or 130 (Ctrl-C)."""
    if absent := [name for name in NEEDS if find_spec(name) is None]:
        sys.exit(f"nf4lora: the command line needs {', '.join(absent)}: pip install 'nf4lora[cli]'")
    from .app import run

    sys.exit(run())
