"""The processes of a run: one, or those that torchrun or `accelerate launch` started, joined by accelerate."""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .compute import device
from .settings import UserError

# Accelerate and torch.distributed do not start without one of them, or start every process alone.
LAUNCHED = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR")


class Processes:
    """This process alone.

    rank, count: which one this is, of how many; device: where its part of the work is done
    """

    rank, count = 0, 1

    def __init__(self) -> None:
        self.device = device()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        """The model as it is to be called; `optimizer` then steps its parameters."""
        return model

    def unwrap(self, model: nn.Module) -> nn.Module:
        return model

    def no_sync(self, model: nn.Module) -> AbstractContextManager:
        """Around every backward of a step but the last: gradients stay in the process."""
        return nullcontext()

    def sum(self, *values: float) -> list[float]:
        return list(values)

    def clip(self, parameters: list[nn.Parameter], max_norm: float) -> float:
        """Clip the gradients. Returns their norm before."""
        return nn.utils.clip_grad_norm_(parameters, max_norm).item()

    def gathered(self, value: Any) -> list[Any]:
        """`value` of every process, by rank."""
        return [value]

    def end(self) -> None:
        """After the last that they do together; the caller holds the prepared model no more."""


class Several(Processes):
    """One of several, each with the same data on a part of every batch: DDP, or FSDP2 where accelerate's config says so.

    Raises: UserError where it says something else
    """

    def __init__(self) -> None:
        from accelerate import Accelerator

        for kind in ("DEEPSPEED", "MEGATRON_LM"):  # before accelerate asks for their packages
            if os.environ.get(f"ACCELERATE_USE_{kind}", "").lower() == "true":
                _refuse(kind)
        # What is computed in which dtype says --compute-dtype, not `accelerate config`.
        self._accelerator = Accelerator(cpu=device().type == "cpu", mixed_precision="no")
        check_kind(self._accelerator.state)
        self.rank, self.count = self._accelerator.process_index, self._accelerator.num_processes
        self.device = self._accelerator.device

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        return self._accelerator.prepare(model, optimizer)[0]

    def unwrap(self, model: nn.Module) -> nn.Module:
        return self._accelerator.unwrap_model(model)

    def no_sync(self, model: nn.Module) -> AbstractContextManager:
        return self._accelerator.no_sync(model)

    def sum(self, *values: float) -> list[float]:
        told = torch.tensor(values, dtype=torch.float64, device=self.device)
        return self._accelerator.reduce(told, "sum").tolist()

    def clip(self, parameters: list[nn.Parameter], max_norm: float) -> float:
        return whole(nn.utils.clip_grad_norm_(parameters, max_norm)).item()

    def gathered(self, value: Any) -> list[Any]:
        every = [None] * self.count
        torch.distributed.all_gather_object(every, value)
        return every

    def end(self) -> None:
        # A thread of gloo's needs the GIL to let go of the last tensor. It has that while this process waits for the others: in
        # the interpreter's end it would abort, and were DDP's reducer the last to hold the group, wait for it for ever.
        self._accelerator.wait_for_everyone()
        self._accelerator.end_training()


def processes() -> Processes:
    """Those that this one belongs to, as the launcher's environment says. Raises: UserError where it says half of it."""
    count = os.environ.get("WORLD_SIZE", "1")
    if count.isdecimal() and int(count) < 2:
        return Processes()
    for name in LAUNCHED:
        value = os.environ.get(name)
        if not value or not (value.isdecimal() or name == "MASTER_ADDR"):
            raise UserError(
                f"{name}: found {value or 'none'} in the environment beside WORLD_SIZE {count}; wanted what torchrun or "
                "`accelerate launch` set: start several processes by one of them, or unset WORLD_SIZE"
            )
    return Several()


def check_kind(state: Any) -> None:
    """Of an AcceleratorState. Raises: UserError for what is neither DDP nor FSDP2, each process with batches of its own."""
    kind, parallel = state.distributed_type.value, getattr(state, "parallelism_config", None)
    if kind == "FSDP" and not state.is_fsdp2:
        _refuse("FSDP with fsdp_version 1")
    if kind not in ("NO", "FSDP") and not kind.startswith("MULTI_"):
        _refuse(kind)
    if parallel and parallel.non_data_parallel_size > 1:
        _refuse("tensor, context or sequence parallelism")


def _refuse(kind: str) -> None:
    raise UserError(
        f"accelerate: found {kind}, but nf4lora finetune takes DDP or FSDP2 (fsdp_version: 2); "
        "for DeepSpeed use transformers' Trainer"
    )


def whole(tensor: Tensor) -> Tensor:
    """Of a tensor that is sharded, all of it; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
