"""From a file of text to token blocks. Every fault of the file is a UserError that says where it is."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .settings import UserError


def read_documents(path: str | Path, tokenizer: Any = None) -> list[str]:
    """The documents of a .txt file (one) or a .jsonl file (one a line: {"text": …}, or {"messages": […]} of a chat).

    Args:
        tokenizer: a transformers tokenizer, whose chat template `messages` need
    Raises: UserError: missing, a folder, empty, not UTF-8, another suffix, or a line that is not what is wanted
    """
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(f"--data: found {path}, wanted a .txt or .jsonl file")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"--data: {path} cannot be read ({error.strerror}); wanted a .txt or .jsonl file") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"--data: {path} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}; convert it, e.g. with iconv"
        ) from error
    if not text.strip():
        raise UserError(f"--data: {path} is empty ({len(raw)} bytes, no text); wanted text to train on")
    if path.suffix == ".txt":
        return [text]
    lines = enumerate(text.split("\n"), start=1)
    documents = [_document(line, f"--data: {path} line {number}", tokenizer) for number, line in lines if line.strip()]
    if not any(document.strip() for document in documents):
        raise UserError(f"--data: {path} is empty: {len(documents)} lines without text; wanted text to train on")
    return documents


def to_blocks(documents: list[str], tokenizer: Any, seq_len: int, vocab_size: int) -> Tensor:
    """Tokenize, end each document with the end-of-text token if there is one, join, and cut. int32 [n, seq_len].

    Shorter data than one block gives one shorter block; otherwise the tail that fills no block is dropped.
    Raises: UserError when fewer than two tokens are there, or tokens the model has no row for.
    """
    ids: list[int] = []
    for tokens in tokenizer(documents, add_special_tokens=False)["input_ids"]:
        ids += tokens
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
    if len(ids) < 2:
        raise UserError(f"--data: found {len(ids)} tokens, wanted 2 or more to train on")
    if max(ids) >= vocab_size:
        raise UserError(
            f"--model: its tokenizer gives token {max(ids)}, but the model has {vocab_size}; wanted a matching pair"
        )
    seq_len = min(seq_len, len(ids))
    count = len(ids) // seq_len
    return torch.tensor(ids[: count * seq_len], dtype=torch.int32).view(count, seq_len)


def fingerprint(blocks: Tensor) -> str:
    """SHA-256 of the blocks, to tell a resumed run that its data changed."""
    return hashlib.sha256(blocks.numpy().tobytes()).hexdigest()


def _document(line: str, where: str, tokenizer: Any) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}); wanted one object a line") from error
    if not isinstance(value, dict):
        raise UserError(f"{where} is a JSON {type(value).__name__}; wanted an object")
    if isinstance(value.get("text"), str):
        return value["text"]
    if "messages" not in value:
        raise UserError(f'{where} has the keys {sorted(value)}; wanted "text" with a string, or "messages"')
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(f'{where} has "messages", but the tokenizer has no chat template; wanted "text"')
    try:
        return tokenizer.apply_chat_template(value["messages"], tokenize=False)
    except Exception as error:  # whatever a template written by others raises
        raise UserError(f"{where}: the chat template refuses its messages ({error})") from error
