"""The rows of a data file, checked one by one. Every fault is a UserError that says in which file and line it is."""

import errno
import json
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from .settings import UserError

WANTED = '"text" with a string, "instruction" and "output" with strings, or "messages" with a list'
PART = '{"type": "text", "text": …}, as models of text alone have it'
ROLES = {"human": "user", "gpt": "assistant"}  # what ShareGPT calls them


class Row(NamedTuple):
    """What one line holds: a document, an instruction with its answer, or a chat; the others are None."""

    where: str  # for messages: "--data: FILE line 3"
    text: str | None = None
    instruction: tuple[str, str, str] | None = None  # instruction, input (may be empty), output
    messages: list[dict[str, Any]] | None = None
    tools: Any = None  # what the chat template is told of them


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a .txt file (one document), of a .jsonl file (one a line), or of a .json file (those of its list, or as .jsonl).

    Raises: UserError: missing, a folder or a device, empty, not UTF-8, another suffix, or a row that is not what is wanted
    """
    path = Path(path)
    wanted = "wanted a .txt or .jsonl file, or a .json file with a list"
    suffix = path.suffix.lower()
    if suffix not in (".txt", ".jsonl", ".json"):
        raise UserError(f"--data: found {path}, {wanted}")
    try:
        with opened(path) as file:
            raw = file.read()
    except (OSError, ValueError) as error:  # a path with a NUL is the latter
        why = getattr(error, "strerror", None) or error
        raise UserError(f"--data: {path} cannot be read ({why}); {wanted}") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"--data: {path} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}; convert it, e.g. with iconv"
        ) from error
    if not text.strip():
        raise UserError(f"--data: {path} is empty ({len(raw)} bytes, no text); wanted text to train on")
    if suffix == ".txt":
        return [Row(f"--data: {path}", text=text)]
    if suffix == ".json" and text.lstrip().startswith("["):
        values = _parsed(text, f"--data: {path}", "a list of objects")
        rows = [_row(value, f"--data: {path} item {number}") for number, value in enumerate(values, start=1)]
    else:
        lines = ((f"--data: {path} line {n}", line) for n, line in enumerate(text.split("\n"), start=1) if line.strip())
        rows = [_row(_parsed(line, where, "one object a line"), where) for where, line in lines]
    if not any(row.text is None or row.text.strip() for row in rows):
        raise UserError(f"--data: {path} is empty: {len(rows)} lines without text; wanted text to train on")
    return rows


def opened(path: Path) -> BinaryIO:
    """A file to read. Raises: OSError, for a FIFO or a device too: they may never end."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "no regular file")
    return path.open("rb")


def _parsed(text: str, where: str, wanted: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}); wanted {wanted}") from error


def _row(value: Any, where: str) -> Row:
    """What is structured comes first: files of instructions often repeat them as a finished "text". A null is as no key."""
    if not isinstance(value, dict):
        raise UserError(f"{where} is a JSON {type(value).__name__}; wanted an object")
    for key in ("messages", "conversations"):
        if value.get(key) is not None:
            return Row(where, messages=_messages(value[key], f'{where} "{key}"'), tools=value.get("tools"))
    if "instruction" in value and "output" in value and (value["output"] is not None or value.get("text") is None):
        parts = tuple("" if value.get(key) is None else value[key] for key in ("instruction", "input", "output"))
        if all(isinstance(part, str) for part in parts):
            return Row(where, instruction=tuple(_encodable(part, where) for part in parts))
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise UserError(f'{where} has "instruction", "input" and "output" of {kinds}; wanted strings')
    if isinstance(value.get("text"), str):
        return Row(where, text=_encodable(value["text"], where))
    raise UserError(f"{where} has the keys {_keys(value)}; wanted {WANTED}")


def _messages(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise UserError(
            f"{where} is {'an empty list' if value == [] else f'a {type(value).__name__}'}; wanted a list of messages"
        )
    return [_message(message, f"{where} number {number}") for number, message in enumerate(value, start=1)]


def _message(value: Any, where: str) -> dict[str, Any]:
    """With the keys of OpenAI's format, whichever it came with, and without those whose value is None."""
    if not isinstance(value, dict):
        raise UserError(f'{where} is a {type(value).__name__}; wanted an object with "role" and "content"')
    message = {
        {"from": "role", "value": "content"}.get(key, key): item for key, item in value.items() if item is not None
    }
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not (isinstance(content, str | list) or "tool_calls" in message):
        raise UserError(f'{where} has the keys {_keys(value)}; wanted "role" and "content" with strings')
    if isinstance(content, list):
        message["content"] = [_part(part, f'{where} "content" number {n}') for n, part in enumerate(content, start=1)]
    return message | {"role": ROLES.get(role, role)}


def _part(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise UserError(f"{where} is a {type(value).__name__}; wanted {PART}")
    if value.get("type") != "text" or not isinstance(value.get("text"), str):
        raise UserError(f"{where} has the keys {_keys(value)} and the type {value.get('type')!s:.40}; wanted {PART}")
    return {"type": "text", "text": value["text"]}


def _keys(value: dict[str, Any]) -> str:
    return str(sorted(value))[:200]


def _encodable(text: str, where: str) -> str:
    r"""JSON can write half a character, such as "\ud83d", of which no tokenizer makes anything."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where} has a lone surrogate ({error.reason}) at character {error.start}; wanted whole characters"
        ) from error
    return text
