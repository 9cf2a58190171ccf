"""The command line: `nf4lora --help`. Heavy imports wait until a command needs them."""

import sys
from importlib.util import find_spec

NEEDS = ("typer", "rich", "transformers", "peft", "matplotlib")


def main() -> None:
    """Entry point `nf4lora`. Exits with 0, 1 (a run failed), 2 (bad input) or 130 (Ctrl-C)."""
    if absent := [name for name in NEEDS if find_spec(name) is None]:
        sys.exit(f"nf4lora: the command line needs {', '.join(absent)}: pip install 'nf4lora[cli]'")
    try:
        from .app import run

        code = run()
    except (KeyboardInterrupt, SystemExit) as end:  # typer makes 130 of one within a command
        if getattr(end, "code", 130) != 130:
            raise
        print("nf4lora: stopped: Ctrl-C", file=sys.stderr)
        code = 130
    sys.exit(code)
