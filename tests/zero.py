"""A process of DeepSpeed on two: `torchrun --nproc_per_node=2 tests/zero.py <folder> <stage>-<optimizer> …`; alone: plain python.

Has rank 0 save the losses and the adapters of each run, as `two_processes.py` does, in <folder>/<run>-<processes>.pt.
"""

import os
import sys
from contextlib import nullcontext
from pathlib import Path

import tiny
import torch
import torch.distributed as dist
from torch import nn
from two_processes import BATCH, STEPS, build

from nf4lora import optim

OPTIMIZERS = {"AdamW": torch.optim.AdamW, "PagedAdamW": optim.PagedAdamW, "PagedAdamW8bit": optim.PagedAdamW8bit}


def sharded(model: nn.Module, optimizer: torch.optim.Optimizer, stage: int, size: int):
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": BATCH // size, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }  # fmt: skip
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def run(name: str, rank: int, size: int) -> dict:
    stage, kind = name.split("-")
    torch.manual_seed(0)
    model = build(False, False)
    whole = {n: p.detach().clone() for n, p in model.named_parameters()}
    for n, p in model.named_parameters():
        if p.requires_grad and "lora_B" in n:
            p.data.normal_(std=0.02)
    options = {"min_8bit_size": 0} if kind == "PagedAdamW8bit" else {}
    optimizer = OPTIMIZERS[kind]([p for p in model.parameters() if p.requires_grad], lr=2e-3, **options)
    engine = sharded(model, optimizer, int(stage), size) if size > 1 else None
    losses = []
    for step in range(STEPS):
        rows = tiny.tokens(BATCH, seed=step)[rank * BATCH // size : (rank + 1) * BATCH // size]
        loss = (engine or model)(input_ids=rows, labels=rows).loss
        if engine:
            engine.backward(loss)
            engine.step()
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        mean = loss.detach().clone()
        if size > 1:
            dist.all_reduce(mean)
        losses.append(mean.item() / size)
    here = sum(p.nbytes for p in model.parameters() if not p.is_floating_point())
    gathered = nullcontext()
    if stage == "3" and engine:
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(list(model.parameters()))
    with gathered:
        state = {n: p.detach().clone() for n, p in model.named_parameters()}
    packed = [n for n, p in whole.items() if not p.is_floating_point()]
    return {
        "losses": losses, "adapters": {n: t for n, t in state.items() if "lora_" in n},
        "intact": all(torch.equal(state[n], whole[n]) for n in packed), "frozen_bytes_here": here,
        "frozen_bytes": sum(whole[n].nbytes for n in packed),
    }  # fmt: skip


def main(folder: Path, *names: str) -> None:
    torch.set_num_threads(1)
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size > 1:
        import deepspeed
        import deepspeed.comm  # its `torch` is torch's, so the module is taken from where modules are

        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # a C++ extension, minutes to compile
        deepspeed.init_distributed("gloo")
    for name in names:
        found = run(name, rank, size)
        if rank == 0:
            torch.save(found, folder / f"{name}-{size}.pt")
    if size > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
