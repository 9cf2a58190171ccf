"""Where results are, and how they are written and read. Standard library only: a broken build is reported too."""

import json
import os
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
AGAIN = " (again)"  # ends the name of a first contender's second self
COPY = "copy"  # the contender that moves the bytes and does nothing else


def write(path: Path, document: dict[str, Any]) -> None:
    """JSON, each element of a list on a line, replaced in one step: whenever the process stops, the file is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(
        "{\n" + ",\n".join(f"{json.dumps(key)}: {_lines(value)}" for key, value in document.items()) + "\n}\n"
    )
    temporary.replace(path)


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """stem -> what its JSON holds, in the order of the names."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def _lines(value: Any) -> str:
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(_lines(v) for v in value) + "\n]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
