"""AdaLoRA in `finetune`'s own loop: `nf4lora.hf.AdaLoraCallback`, called where a Trainer would call it."""

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft.tuners.adalora import AdaLoraModel
from torch import nn

from ..hf.adalora import STATE, AdaLoraCallback
from ..hf.adalora_records import plot_ranks
from ..hf.adalora_state import config_of, tuner_of
from .settings import UserError


class Adaptive:
    """The allocator of a model whose ranks adapt, over a run of `steps` steps.

    Args:
        model:  peft's AdaLoRA, as `get_peft_model` gives it
        output: folder of `adalora.jsonl` and of the checkpoints
        main:   whether this process writes the former
    """

    def __init__(self, model: nn.Module, output: str, steps: int, main: bool = True) -> None:
        self._model, self._tuner = model, tuner_of(model)
        self._callback, self._begun = AdaLoraCallback(fit_total_step=True), False
        self._args = SimpleNamespace(output_dir=output, world_size=1, average_tokens_across_devices=False)
        self._state = SimpleNamespace(global_step=0, max_steps=steps, is_world_process_zero=main)

    def begin(self, step: int) -> None:
        """Before the first step and after a resume, with `step` steps done; called again it does nothing.

        Raises: UserError for a schedule that leaves no step to take ranks away at; CheckpointError.
        """
        if self._begun:
            return
        self._state.global_step = step
        try:
            self._callback.on_train_begin(self._args, self._state, None, self._model)
        except ValueError as error:
            if str(error).startswith("AdaLoraConfig"):
                raise UserError(f"--method adalora: {error}") from error
            raise
        self._begun = True

    def stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """After the optimizer's step, its gradients still there."""
        self._callback.on_optimizer_step(self._args, self._state, None, self._model, optimizer=optimizer)
        self._state.global_step += 1

    def end(self) -> None:
        """After the last step: the ranks that are left go into the adapter's configuration."""
        self._callback.on_train_end(self._args, self._state, None, self._model)

    def files(self) -> dict[str, bytes]:
        """What a checkpoint of this step needs beside the adapter."""
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = Path(folder) / f"checkpoint-{self._state.global_step}"
            checkpoint.mkdir()
            args = SimpleNamespace(output_dir=folder)
            self._callback.on_save(
                args, SimpleNamespace(**vars(self._state) | {"is_world_process_zero": True}), None, self._model
            )
            return {STATE: (checkpoint / STATE).read_bytes()}

    @torch.no_grad()
    def penalty(self) -> float:
        """The orthogonality term that peft adds to every loss."""
        adapter = self._tuner.trainable_adapter_name
        products = [
            P @ P.T if "lora_A" in name else P.T @ P
            for name, P in self._tuner.model.named_parameters()
            if ("lora_A" in name or "lora_B" in name) and adapter in name
        ]
        distances = [torch.dist(p, torch.eye(len(p), device=p.device, dtype=p.dtype)) for p in products]
        return config_of(self._tuner).orth_reg_weight * torch.stack(distances).mean().item()

    def metrics(self) -> dict[str, Any]:
        """Of the newest allocation: the budget and the sum of the ranks."""
        newest = self._callback.records[-1:] or [{}]
        return {name: newest[0].get(name) for name in ("budget", "total_rank")}

    def plot(self, path: Path) -> None:
        if self._callback.records:
            plot_ranks(self._callback.records, path)


def is_adaptive(model: nn.Module) -> bool:
    return isinstance(getattr(model, "base_model", None), AdaLoraModel)
