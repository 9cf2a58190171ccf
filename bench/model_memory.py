"""Memory of one contender among others on the same card, and a limit on all of it."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from nf4lora import managed


def clear() -> None:
    """The last case's models go, which hold themselves in cycles; cuBLAS takes its workspaces, which are nobody's own."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        x = torch.ones(256, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        (x @ x).sum().backward()


def measured(
    build: Callable[[], nn.Module], work: Callable[[nn.Module], Any], alone: bool = False
) -> tuple[Any, dict[str, int] | None]:
    """`work` of a model built, once done, and the most bytes that both held meanwhile; None on a CPU.

    peak:     allocated, less what others held before
    reserved: taken from the card by torch's allocator; told only of one that is `alone` there
    managed:  in unified memory, where a paged optimizer keeps its states, wherever they are at the time
    """
    if not torch.cuda.is_initialized():
        return work(build()), None
    before, managed_before = torch.cuda.memory_allocated(), _managed_bytes()
    model = build()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    done = work(model)
    reserved = {"reserved": torch.cuda.max_memory_reserved()} if alone else {}
    return done, {"peak": torch.cuda.max_memory_allocated() - before} | reserved | {
        "managed": _managed_bytes() - managed_before
    }


def _managed_bytes() -> int:
    """Of this process; 0 without our CUDA library."""
    try:
        return managed.room(torch.device("cuda", 0)).held
    except NotImplementedError:
        return 0


@contextmanager
def within(limit_bytes: int | None) -> Iterator[None]:
    """torch takes no more than this of the card; None for no limit."""
    if limit_bytes is None:
        yield
        return
    torch.cuda.set_per_process_memory_fraction(limit_bytes / torch.cuda.get_device_properties(0).total_memory)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
