"""What fits a card: the largest batch at a length, and the largest length at batch 1, by the formulas of `needs`."""

from collections.abc import Callable
from dataclasses import dataclass

from .inventory import Inventory
from .needs import Choice, need

MOST = 1 << 20  # of a batch or a length; beyond it nobody asks


@dataclass(frozen=True)
class Fit:
    """Of one way to fine-tune: bytes, whether they fit, and how far batch and length can go (0: not even 1)."""

    choice: Choice
    total: int
    on_device: int
    fits: bool
    pages: bool  # fits only while optimizer states wait on the host
    largest_batch: int
    largest_length: int


def largest(fits: Callable[[int], bool], most: int = MOST) -> int:
    """The largest of 1 … most that fits, 0 if none; what fits is all up to some number."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def fit(model: Inventory, choice: Choice, room: int) -> Fit:
    """room: bytes of the card less the margin."""
    found = need(model, choice)

    def fits(**changes: int) -> bool:
        return need(model, choice.with_(**changes)).on_device <= room

    return Fit(
        choice, found.total, found.on_device, found.on_device <= room, found.on_device <= room < found.total,
        largest(lambda n: fits(batch_size=n)), largest(lambda n: fits(batch_size=1, seq_len=n), model.longest or MOST),
    )  # fmt: skip


def inference(model: Inventory, choice: Choice) -> dict[str, int]:
    """Bytes to generate: weights in 4 bits, the cache of keys and values of all layers, the logits of the last token.

    The cache: q, k and v are read as one width, of which q's, which is that of attention's output, is not kept; a model with
    sliding windows or shared caches keeps less.
    """
    from .needs import weights_of

    tokens = choice.batch_size * choice.seq_len
    wide = sum(
        b.count * max(a.into.N - a.out.K, 0) for b in model.blocks if b.image_tokens is None for a in b.attention
    )
    cache = wide * choice.compute * tokens if model.generates else 0
    weights = sum(weights_of(model, choice.with_(method="qlora")).values())
    logits = (choice.compute + 4) * model.vocabulary * choice.batch_size
    return {"weights": weights, "KV cache": cache, "logits": logits, "CUDA context": choice.context}
