"""Parameters that FSDP2 shards: a step is of each element alone, so each process steps its own share."""

from typing import Any

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)  # of these it is known at once


def local(t: Tensor) -> Tensor:
    """The share of this process, in its memory; a tensor that is not sharded is its own."""
    return t if type(t) in _PLAIN or not hasattr(t, "to_local") else t.to_local()


def check(name: str, p: Tensor, skips: bool) -> None:
    """Of a sharded parameter. Raises: NotImplementedError for what is no step of each element alone."""
    if skips:
        raise NotImplementedError(
            f"{name}: found skip_nonfinite with a DTensor, wanted it off: a process sees the gradients of its share only"
        )
    if (found := getattr(p.grad, "placements", None)) != p.placements:
        raise NotImplementedError(
            f"{name}: found a gradient placed as {found}, wanted it as its parameter: {p.placements}"
        )


def as_shares(p: Tensor, states: dict[str, Any]) -> dict[str, Any]:
    """The states of this share of `p` as DTensors placed like `p`, which torch gathers and spreads; of a plain `p` as they are.

    Raises: NotImplementedError for states of 8 bits, whose blocks and constants are those of a share.
    """
    if not hasattr(p, "to_local"):
        return states
    if any(t.dtype == torch.uint8 for t in states.values()):
        raise NotImplementedError(
            "state_dict: found 8-bit states of a DTensor, whose blocks are those of one process's share, wanted states of 32 bits: "
            "take PagedAdamW or PagedLion, or save the model alone (save_only_model=True)"
        )
    from torch.distributed.tensor import DTensor  # which `import nf4lora` does without

    def like(t: Tensor) -> Tensor:
        return DTensor.from_local(t, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())

    return {name: like(t) for name, t in states.items()}
