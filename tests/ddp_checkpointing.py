"""DDP with gradient checkpointing, on our layers and on plain ones: `torchrun --nproc_per_node=2 … <file>`; alone: plain python.

Every combination of layers, reentrant checkpointing, accumulation without synchronizing and a search for unused parameters
makes one step of gradients; rank 0 saves them, or the sentence that torch refuses the combination with.
"""

import itertools
import os
import sys
from contextlib import nullcontext

import peft
import tiny
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from two_processes import build

from nf4lora import NF4Linear, replace_linears
from nf4lora.hf.conversion import dense

LAYERS = ("fused", "native", "plain")
COMBINATIONS = list(itertools.product((True, False), (1, 2), (True, False)))  # reentrant, micro-batches, find_unused_parameters
ROWS = 4


def model_of(layers: str, reentrant: bool) -> nn.Module:
    torch.manual_seed(0)
    if layers == "plain":
        model = replace_linears(tiny.llama(dtype=torch.float32), layer=NF4Linear)
        for name, m in list(model.named_modules()):
            if isinstance(m, NF4Linear):
                model.set_submodule(name, dense(m))
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    else:
        model = build(layers == "native", False)
    generator = torch.Generator().manual_seed(1)
    for name, p in sorted(model.named_parameters(), key=lambda named: named[0]):
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=generator) * 0.05
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model.train()


def gradients(layers: str, reentrant: bool, micro: int, unused: bool, rank: int, size: int) -> dict[str, torch.Tensor] | str:
    wrapped = model = model_of(layers, reentrant)
    if size > 1:
        wrapped = DistributedDataParallel(model, find_unused_parameters=unused, process_group=dist.new_group())
    share = ROWS // size
    try:
        for step in range(micro):
            rows = tiny.tokens(ROWS, seed=step)[rank * share : (rank + 1) * share]
            with wrapped.no_sync() if size > 1 and step < micro - 1 else nullcontext():
                (wrapped(input_ids=rows, labels=rows).loss / micro).backward()
    except RuntimeError as error:
        return " ".join(str(error).split(".")[:1])
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def main(file: str) -> None:
    torch.set_num_threads(1)
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size > 1:
        dist.init_process_group("gloo")
    found = {(layers, *c): gradients(layers, *c, rank, size) for layers in LAYERS for c in COMBINATIONS}
    if rank == 0:
        torch.save(found, file)
    if size > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
