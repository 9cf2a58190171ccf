"""From examples to token ids, and to labels on the tokens of their answers."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from operator import itemgetter
from typing import Any

import numpy as np
from tokenizers.processors import ByteLevel

from .chat import Example

IGNORED = -100  # the label of a token without a loss, as transformers has it
Piece = tuple[np.ndarray, np.ndarray]  # int32 [tokens] each: ids and labels of one example, or of one block of text


def tokenized(examples: list[Example], tokenizer: Any, find: bool) -> Iterator[Piece]:
    """Whole examples."""
    with _untrimmed(tokenizer):
        encoded = tokenizer([e.text for e in examples], add_special_tokens=False, return_offsets_mapping=find)
    for number, (each, ids) in enumerate(zip(examples, encoded["input_ids"], strict=True)):
        ids = np.asarray(ids, dtype=np.int32)
        labels = np.full_like(ids, IGNORED) if find else ids
        for answer in each.answers if find else ():
            tokens = _within(answer, encoded["offset_mapping"][number], each.marked)
            labels[tokens] = ids[tokens]
        yield ids, labels


def _within(answer: tuple[int, int], spans: list[tuple[int, int]], reaching_in: bool) -> slice:
    """The tokens that start in an answer, and with `reaching_in` one that starts before it and ends in it."""
    edge, key = (bisect_right, itemgetter(1)) if reaching_in else (bisect_left, itemgetter(0))
    return slice(edge(spans, answer[0], key=key), bisect_left(spans, answer[1], key=itemgetter(0)))


@contextmanager
def _untrimmed(tokenizer: Any) -> Iterator[None]:
    """With tokens' characters as they are: byte-level tokenizers leave out leading spaces, as if these were before a token."""
    backend = tokenizer.backend_tokenizer if tokenizer.is_fast else None
    if backend is None or backend.post_processor is None:
        yield
        return
    kept, backend.post_processor = backend.post_processor, ByteLevel(trim_offsets=False)
    try:
        yield
    finally:
        backend.post_processor = kept
