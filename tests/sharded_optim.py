"""A process of a run whose parameters FSDP2 shards and our optimizers step: `sharded_optim.py <folder>`, alone or by torchrun."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from nf4lora.optim import PagedAdamW, PagedAdamW8bit, PagedLion

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def build(size: int) -> nn.Module:
    """Rows that two processes share out evenly, unevenly, and of which one gets none."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 64), nn.Tanh(), nn.Linear(64, 33, bias=False), nn.Tanh(), nn.Linear(33, 1))
    if size > 1:
        mesh = init_device_mesh("cpu", (size,))
        for layer in (model[0], model[2], model[4]):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, steps: int, rank: int, size: int) -> None:
    for step in range(first, first + steps):
        x = torch.randn(8, 40, generator=torch.Generator().manual_seed(step))[rank * 8 // size : (rank + 1) * 8 // size]
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(model: nn.Module) -> dict:
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for n, p in model.named_parameters()}


def said(action) -> str:
    try:
        action()
    except NotImplementedError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size > 1:
        dist.init_process_group("gloo")
    found = {}
    for kind in (PagedAdamW, PagedLion, PagedAdamW8bit):
        options = {"lr": 1e-2, **({"min_8bit_size": 0} if kind is PagedAdamW8bit else {})}
        model = build(size)
        before = whole(model)
        optimizer = kind(model.parameters(), **options)
        train(model, optimizer, 0, 3, rank, size)
        found[kind.__name__, "before"], found[kind.__name__, 3] = before, whole(model)
        if kind is PagedAdamW8bit:
            found["8-bit state_dict"] = said(optimizer.state_dict)
        else:
            saved = get_optimizer_state_dict(model, optimizer, options=FULL)
            found[kind.__name__, "state"] = {n: s["state1"] for n, s in saved.get("state", {}).items()}  # of rank 0
            again = build(size)
            again.load_state_dict(model.state_dict())
            other = kind(again.parameters(), **options)
            if size > 1:
                set_optimizer_state_dict(again, other, saved, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
            else:
                other.load_state_dict(optimizer.state_dict())
            train(model, optimizer, 3, 2, rank, size)
            train(again, other, 3, 2, rank, size)
            found[kind.__name__, "resumed"] = whole(again)
        found[kind.__name__, 5] = whole(model)
    if size > 1:
        skipping = PagedAdamW(build(size).parameters(), skip_nonfinite=True)
        for p in skipping.param_groups[0]["params"]:
            p.grad = torch.zeros_like(p)
        found["skip_nonfinite"] = said(skipping.step)
    if rank == 0:
        torch.save(found, folder / f"{size}.pt")
    if size > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
