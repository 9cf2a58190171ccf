"""The demonstration's two texts, which every Python has: its library's sources, and its documentation's prose."""

import sysconfig
from pathlib import Path

import torch
from torch import Tensor

from .settings import UserError

HELD_OUT = 96  # blocks of each text that are measured, never trained on


def code(seq_len: int) -> tuple[Tensor, Tensor]:
    """Top-level modules of the standard library, as bytes. uint8 [n, seq_len] to train on, [96, seq_len] held out."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = [path.read_bytes() for path in sorted(folder.glob("*.py"))]
    return _split(files, seq_len, f"the sources of its library, {folder}/*.py")


def prose(seq_len: int) -> tuple[Tensor, Tensor]:
    """The topics of Python's own help, English prose. uint8 [n, seq_len] to train on, [96, seq_len] held out."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        topics = {}
    return _split(
        [topics[name].encode() for name in sorted(topics)], seq_len, "the topics of its help, pydoc_data.topics"
    )


def _split(documents: list[bytes], seq_len: int, what: str) -> tuple[Tensor, Tensor]:
    """Every eighth document is held out whole, so no held-out block continues a trained one."""
    held_out = _blocks(b"\n".join(documents[::8]), seq_len)
    trained = _blocks(b"\n".join(d for i, d in enumerate(documents) if i % 8), seq_len)
    if len(held_out) < HELD_OUT or len(trained) < HELD_OUT:
        raise UserError(
            f"this Python lacks {what}; the demonstration needs them. Give --model and --data, or another Python"
        )
    chosen = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))[:HELD_OUT]
    return trained, held_out[chosen]


def _blocks(text: bytes, seq_len: int) -> Tensor:
    count = len(text) // seq_len
    return torch.frombuffer(bytearray(text[: count * seq_len]), dtype=torch.uint8).view(count, seq_len)
