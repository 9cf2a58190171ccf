"""Steps that a NaN or Inf in a gradient takes back: which parameters have taken how many, kept where the gradients are."""

import torch
from torch import Tensor

from .. import ops


class Slots:
    """A place for each parameter in its device's int32 counts of steps taken. `of`: parameter -> slot; `taken`: device -> counts."""

    def __init__(self) -> None:
        self.of: dict[Tensor, int] = {}
        self.taken: dict[torch.device, Tensor] = {}

    def add(self, params: list[Tensor]) -> None:
        for p in params:
            old = self.taken.get(p.device, torch.zeros(0, dtype=torch.int32, device=p.device))
            self.of[p] = len(old)
            self.taken[p.device] = torch.nn.functional.pad(old, (0, 1))


def check(moved: list[tuple[int, Tensor]], slots: Slots) -> dict[torch.device, Tensor]:
    """Of each device a flag, int32 [1]: whether any gradient at all is not finite. Counts the steps where none is."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for _, p in moved:
        kinds.setdefault((p.device, p.grad.dtype), []).append(p)
    if len(kinds) == 1:
        ((device, _),) = kinds
        flag = torch.empty(1, dtype=torch.int32, device=device)
        params = [p for _, p in moved]
        ops.optim_check([p.grad for p in params], slots.taken[device], flag, [slots.of[p] for p in params])
        return {device: flag}
    flags = []
    for (device, _), params in kinds.items():
        flag, unused = torch.empty(1, dtype=torch.int32, device=device), torch.zeros(len(params), dtype=torch.int32, device=device)
        ops.optim_check([p.grad for p in params], unused, flag, list(range(len(params))))
        flags.append(flag)
    found = {}
    for device in {device for device, _ in kinds}:
        found[device] = torch.stack([flag.to(device, non_blocking=True) for flag in flags]).amax(0)
        mine = torch.tensor([slots.of[p] for _, p in moved if p.device == device], device=device)
        slots.taken[device][mine] += 1 - found[device]
    return found
