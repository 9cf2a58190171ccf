"""From a file of texts, instructions or chats to sequences of tokens with labels. Every fault of the file is a UserError."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from .chat import Reader
from .labels import IGNORED, Piece, tokenized
from .packing import check_packing, pack
from .progress import console
from .rows import read_rows
from .settings import Settings, UserError

__all__ = ["IGNORED", "Data", "check_packing", "fingerprint", "load"]

AT_ONCE = 1000  # rows that are rendered and tokenized together


@dataclass(frozen=True)
class Data:
    """Sequences to train on, one after another, on the CPU."""

    input_ids: Tensor  # int32 [tokens]
    labels: Tensor  # int32 [tokens], -100 where no loss is taken
    starts: Tensor  # int64 [n + 1]: sequence i is [starts[i], starts[i + 1])
    position_ids: Tensor | None = (
        None  # int32 [tokens], from 0 in every example of a sequence; None where nothing is packed
    )
    pad_token_id: int = 0
    # documents, examples, truncated, dropped, answers_left_out, sequences, tokens, loss_tokens
    counts: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @classmethod
    def of_blocks(cls, blocks: Tensor) -> "Data":
        """Whole blocks with a loss on every token: integer [n, seq_len]."""
        ids = blocks.reshape(-1).to(torch.int32)
        starts = torch.arange(len(blocks) + 1) * blocks.shape[1]
        return cls(ids, ids, starts, counts=_counted(ids, starts))

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """Sequences `indices`, int64 [b], padded on the right to the longest: int64 [b, longest] each.

        Returns: input_ids and labels; position_ids where examples are packed (padding is then an example of its own, and a
            mask would hide the restarts from transformers), else attention_mask where something is padded.
        """
        first, lengths = self.starts[indices], self.starts[indices + 1] - self.starts[indices]
        columns = torch.arange(int(lengths.max()))
        real = columns < lengths[:, None]
        where = torch.where(real, first[:, None] + columns, 0)

        def rows(values: Tensor, padding: Tensor | int) -> Tensor:
            return torch.where(real, values[where].long(), padding)

        batch = {"input_ids": rows(self.input_ids, self.pad_token_id), "labels": rows(self.labels, IGNORED)}
        if self.position_ids is not None:
            return batch | {"position_ids": rows(self.position_ids, columns - lengths[:, None])}
        return batch if real.all() else batch | {"attention_mask": real.long()}


def load(settings: Settings, tokenizer: Any, vocab_size: int) -> Data:
    """The sequences of `settings.data`: texts joined and cut into blocks of `seq_len`, instructions and chats one by one or packed.

    Documents end with the end-of-text token if there is one; the tail that fills no block is dropped, but shorter data than
    one block gives one shorter block. Examples are cut at `seq_len`, and dropped when no token with a loss is left.

    Args:
        tokenizer: of transformers; to find the answers (`loss_on` "answers") it must be a fast one
        vocab_size: rows of the model's embedding
    Raises: UserError: a fault of the file, tokens the model has no row for, or nothing left to train on
    """
    rows = read_rows(settings.data)
    documents = [row.text for row in rows if row.text is not None]
    rows = [row for row in rows if row.text is None]
    counts = {"documents": len(documents), "examples": len(rows), "truncated": 0, "dropped": 0, "answers_left_out": 0}
    find = settings.loss_on == "answers"
    if rows and find and not tokenizer.is_fast:
        raise UserError(
            f"--loss-on answers: a {type(tokenizer).__name__} does not tell which characters a token has; "
            "give --loss-on all, or a fast tokenizer"
        )
    reader = Reader(tokenizer, find)
    pieces = _blocks(documents, tokenizer, settings.seq_len, bool(rows))
    for some in _chunks(rows, "reading examples"):
        examples = [reader.example(row) for row in some]
        counts["answers_left_out"] += sum(e.left_out for e in examples)
        for ids, labels in tokenized(examples, tokenizer, find):
            counts["truncated"] += len(ids) > settings.seq_len
            ids, labels = ids[: settings.seq_len], labels[: settings.seq_len]
            if (labels[1:] == IGNORED).all():
                counts["dropped"] += 1
            else:
                pieces.append((ids, labels))
    if not pieces:
        raise UserError(
            f"--seq-len: found {settings.seq_len}, and none of the {len(rows)} examples has a token to learn within it; "
            "wanted more, so that their answers are not cut off"
        )
    highest = max(int(ids.max()) for ids, _ in pieces)
    if highest >= vocab_size:
        raise UserError(
            f"--model: its tokenizer gives token {highest}, but the model has {vocab_size}; wanted a matching pair"
        )
    lengths = [len(ids) for ids, _ in pieces]
    sequences = pack(lengths, settings.seq_len) if settings.packing else [[i] for i in range(len(pieces))]
    paddings = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    padding = next(token for token in paddings if token is not None and token < vocab_size)
    return _joined(pieces, sequences, padding, counts)


def fingerprint(data: Data) -> str:
    """SHA-256 of ids, labels, starts and positions, to tell a resumed run that its data changed."""
    found = hashlib.sha256()
    for tensor in (data.input_ids, data.labels, data.starts, data.position_ids):
        found.update(b"none" if tensor is None else tensor.numpy().tobytes())
    return found.hexdigest()


def _blocks(documents: list[str], tokenizer: Any, seq_len: int, may_be_none: bool) -> list[Piece]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    parts = [np.empty(0, np.int32)]
    for some in _chunks(documents, "reading text"):
        for tokens in tokenizer(some, add_special_tokens=False)["input_ids"]:
            parts.append(np.asarray(tokens + end, dtype=np.int32))
    ids = np.concatenate(parts)
    if len(ids) < 2:
        if may_be_none:
            return []
        raise UserError(f"--data: found {len(ids)} tokens, wanted 2 or more to train on")
    seq_len = min(seq_len, len(ids))
    return [(block, block) for block in ids[: len(ids) // seq_len * seq_len].reshape(-1, seq_len)]


def _chunks(rows: list, what: str) -> Iterator[list]:
    chunks = [rows[first : first + AT_ONCE] for first in range(0, len(rows), AT_ONCE)]
    quiet = len(chunks) < 3 or not console.is_terminal
    return iter(track(chunks, what, console=console, transient=True, disable=quiet))


def _joined(pieces: list[Piece], sequences: list[list[int]], padding: int, counts: dict[str, int]) -> Data:
    ordered = [pieces[i] for sequence in sequences for i in sequence]
    lengths = np.array([len(ids) for ids, _ in ordered])
    firsts = np.cumsum(lengths) - lengths
    ids, labels = (torch.from_numpy(np.concatenate(parts)) for parts in zip(*ordered, strict=True))
    ends = np.cumsum([len(sequence) for sequence in sequences])
    starts = torch.from_numpy(np.append(0, np.cumsum(lengths)[ends - 1]))
    positions = None
    if len(ordered) > len(sequences):
        positions = torch.from_numpy((np.arange(len(ids)) - np.repeat(firsts, lengths)).astype(np.int32))
        labels[torch.from_numpy(firsts)] = IGNORED  # the token before is another example's
    return Data(ids, labels, starts, positions, padding, counts | _counted(labels, starts))


def _counted(labels: Tensor, starts: Tensor) -> dict[str, int]:
    """A sequence's first token is predicted by none."""
    losses = int((labels != IGNORED).sum() - (labels[starts[:-1]] != IGNORED).sum())
    return {"sequences": len(starts) - 1, "tokens": len(labels), "loss_tokens": losses}
