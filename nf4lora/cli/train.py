"""The training loop's one step, and the order of the data. Everything else of it is torch's and transformers'."""

import contextlib
import math
import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from .. import optim
from .settings import RunFailed, Settings

EVAL_BATCH = 32


@dataclass
class Run:
    """A model in training and all that a checkpoint of it must hold. `step` counts finished optimizer steps."""

    model: nn.Module
    blocks: Tensor  # integer [n, seq_len], on the CPU
    settings: Settings
    steps: int
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    autocast: torch.dtype | None = None
    losses: list[float] = field(default_factory=list)
    grad_norm: float = math.nan

    @property
    def step(self) -> int:
        return len(self.losses)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def tokens_per_step(self) -> int:
        return self.settings.batch_size * self.settings.grad_accum * self.blocks.shape[1]


def start(model: nn.Module, blocks: Tensor, settings: Settings, autocast: torch.dtype | None = None) -> Run:
    """A run at step 0 over the parameters that require gradients; `autocast` is the dtype to compute in, if not their own."""
    steps = settings.max_steps or math.ceil(settings.epochs * len(blocks) / (settings.batch_size * settings.grad_accum))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = _optimizer(settings.optim, trained, settings.lr)
    warmup = math.ceil(settings.warmup_ratio * steps)
    # transformers' "constant" knows no warm-up
    name = "constant_with_warmup" if settings.lr_scheduler == "constant" and warmup else settings.lr_scheduler
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    return Run(model, blocks, settings, steps, optimizer, scheduler, autocast)


def _optimizer(name: str, params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """`name`: one of `settings.OPTIMS`."""
    if name.startswith("adamw_torch"):
        return torch.optim.AdamW(params, lr=lr, weight_decay=0.0, fused=name.endswith("fused"))
    classes = {
        "paged_adamw_8bit": optim.PagedAdamW8bit, "paged_adamw_32bit": optim.PagedAdamW, "adamw_8bit": optim.AdamW8bit,
        "paged_lion_8bit": optim.PagedLion8bit, "paged_lion_32bit": optim.PagedLion,
    }  # fmt: skip
    # Nobody asked for paging who took the default.
    warnings.filterwarnings("ignore", message="paged optimizer: nothing pages", category=RuntimeWarning)
    return classes[name](params, lr=lr, weight_decay=0.0)


def order(length: int, first: int, count: int, seed: int) -> Tensor:
    """Indices number `first` … `first + count - 1` of an endless series of permutations of `length`. int64 [count]."""
    epochs = range(first // length, (first + count - 1) // length + 1)
    permutations = [
        torch.randperm(length, generator=torch.Generator().manual_seed((seed + 1_000_003 * e) % 2**63)) for e in epochs
    ]
    return torch.cat(permutations)[first - epochs[0] * length :][:count]


def train_step(run: Run) -> float:
    """One optimizer step over grad_accum forwards. Returns the mean loss.

    Raises: RunFailed for a loss that is not finite, before any parameter has moved.
    """
    settings = run.settings
    count = settings.batch_size * settings.grad_accum
    total = 0.0
    for indices in order(len(run.blocks), run.step * count, count, settings.seed).split(settings.batch_size):
        batch = run.blocks[indices].to(run.device, torch.int64)
        with _autocast(run):
            loss = run.model(input_ids=batch, labels=batch, use_cache=False).loss / settings.grad_accum
        loss.backward()
        total += loss.item()
    if not math.isfinite(total):
        run.optimizer.zero_grad()
        raise RunFailed(f"the loss of step {run.step + 1} is {total}; try a lower --lr than {settings.lr}")
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    run.grad_norm = nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm).item()
    run.optimizer.step()
    run.scheduler.step()
    run.optimizer.zero_grad()
    run.losses.append(total)
    return total


@torch.no_grad()
def evaluate(run: Run, blocks: Tensor) -> float:
    """Mean loss in nats a token over whole blocks [n, seq_len], without dropout."""
    run.model.eval()
    total = 0.0
    for batch in blocks.split(EVAL_BATCH):
        batch = batch.to(run.device, torch.int64)
        with _autocast(run):
            total += run.model(input_ids=batch, labels=batch, use_cache=False).loss.item() * len(batch)
    run.model.train()
    return total / len(blocks)


def _autocast(run: Run) -> contextlib.AbstractContextManager:
    return torch.autocast(run.device.type, run.autocast) if run.autocast else contextlib.nullcontext()
