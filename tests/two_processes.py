"""A process of a run on two: `torchrun --nproc_per_node=2 tests/two_processes.py <folder> <engine> …`; alone: plain python.

For each engine, trains adapters on an NF4 base for a few steps, half of each batch a process, and has rank 0 save the
losses, the adapters, and what it saw of the engine, in <folder>/<engine>.
"""

import json
import os
import sys
from pathlib import Path

import peft
import tiny
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from nf4lora import NF4Linear, NF4LoRALinear, replace_linears
from nf4lora.hf import quantize_experts_, store_as_bfloat16  # and the fused layers

STEPS, BATCH = 4, 4


def build(native: bool, experts: bool, adalora: bool = False) -> nn.Module:
    if adalora:  # on a base that computes in 16 bits, where peft casts what it makes of an adapter
        model = replace_linears(tiny.llama(), layer=NF4Linear, compute_dtype=torch.bfloat16).requires_grad_(False)
        return peft.get_peft_model(model, peft.AdaLoraConfig(init_r=4, target_r=2, total_step=100, target_modules=["q_proj", "v_proj"]))
    model = (tiny.qwen3_moe if experts else tiny.llama)(dtype=torch.float32)
    if experts:
        quantize_experts_(model)
    if native:
        return replace_linears(model.requires_grad_(False), layer=NF4LoRALinear, r=4)
    replace_linears(model, layer=NF4Linear).requires_grad_(False)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"] + ([] if experts else ["gate_proj", "up_proj", "down_proj"])
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))


def plant_nans(model: nn.Module) -> None:
    """Codes that are NaNs as bfloat16, quiet and signalling ones of both signs: what a float-aware copy would rewrite."""
    nans = torch.tensor([0x7F81, 0xFF81, 0x7FC1, 0xFFFF, 0x7FBF], dtype=torch.int32).to(torch.int16).view(torch.uint8)
    for layer in model.modules():
        if isinstance(layer, NF4Linear):
            layer.weight.data.view(-1)[: nans.numel()] = nans


def layers_of(model: nn.Module) -> nn.ModuleList:
    return next(m for name, m in model.named_modules() if name.endswith("model.layers"))


def by_accelerate(model: nn.Module, efficient: bool) -> nn.Module:
    """As `accelerate launch` shards a model with fsdp_version 2; there it takes a GPU, so the plugin is put in by hand."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    accelerator = Accelerator(cpu=True)
    accelerator.state._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=efficient, reshard_after_forward=True,
    )  # fmt: skip
    if efficient and dist.get_rank():  # only the first process has read the checkpoint
        for p in model.parameters():
            p.data.zero_()
    return fsdp2_prepare_model(accelerator, model)


def run(engine: str, folder: Path, rank: int, size: int) -> None:
    torch.manual_seed(0)
    model = build("native" in engine, "experts" in engine, "adalora" in engine)
    if "bytes" in engine or "bf16" in engine:
        plant_nans(model)
    whole = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        if p.requires_grad and "lora_B" in name:
            p.data.normal_(std=0.02)
    begun = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    if "bf16" in engine:
        store_as_bfloat16(model)
    wrapped = model
    if size > 1:
        if "ddp" in engine:
            wrapped = DistributedDataParallel(model)
        elif "accelerate" in engine:
            wrapped = model = by_accelerate(model, "efficient" in engine)
        else:
            options = {"mesh": init_device_mesh("cpu", (size,))}
            if "offload" in engine:
                options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
            if "policy" in engine:
                options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
            for layer in layers_of(model):
                fully_shard(layer, **options)
            fully_shard(model, **options)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for step in range(STEPS):
        rows = tiny.tokens(BATCH, seed=step)[rank * BATCH // size : (rank + 1) * BATCH // size]
        loss = wrapped(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if size > 1:
            dist.all_reduce(mean)
        losses.append(mean.item() / size)
    bits = torch.bfloat16 if "bf16" in engine else None
    frozen = [n for n, p in model.named_parameters() if not p.is_floating_point() or p.dtype == bits]
    sharded = sorted(name for name, p in model.named_parameters() if isinstance(p, DTensor))
    local = {n: p.to_local() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
    found = {
        "losses": losses, "sharded": len(sharded), "parameters": len(whole),
        "frozen_bytes_here": sum(local[n].nbytes for n in frozen),
        "frozen_bytes": sum(p.nbytes for p in whole.values() if not p.is_floating_point()),
    }  # fmt: skip
    intact = len(frozen) == sum(not p.is_floating_point() for p in whole.values())
    for name, p in ((n, model.get_parameter(n)) for n in frozen):
        full = p.full_tensor() if isinstance(p, DTensor) else p
        wanted = whole[name.removesuffix("_bf16")].reshape(-1).view(torch.uint8)
        intact &= torch.equal(full.cpu().reshape(-1).view(torch.uint8)[: wanted.numel()], wanted)
    found["intact"] = bool(intact)
    every = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    if bits and size > 1:  # all of them, as checkpoints of torch have them
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        for name in frozen if rank == 0 else ():
            wanted = whole[name.removesuffix("_bf16")].reshape(-1).view(torch.uint8)
            found["intact"] &= torch.equal(state[name].view(torch.uint8)[: wanted.numel()], wanted)
    state = get_model_state_dict(model, options=every) if size > 1 else {
        n: p.detach() for n, p in model.named_parameters() if p.requires_grad
    }  # fmt: skip
    if rank == 0:
        folder.mkdir()
        torch.save(begun, folder / "begun.pt")
        torch.save({n: t.clone() for n, t in state.items()}, folder / "adapter.pt")
        (folder / "found.json").write_text(json.dumps(found))


def main(folder: Path, *engines: str) -> None:
    torch.set_num_threads(1)
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size > 1:
        dist.init_process_group("gloo")
    for engine in engines:
        run(engine, folder / engine, rank, size)
    if size > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
