"""The training loop's one step, and the order of the data. Everything else of it is torch's and transformers'."""

import contextlib
import math
import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import get_scheduler

from .. import optim
from .adaptive import Adaptive, is_adaptive
from .data import IGNORED, Data
from .processes import Processes
from .settings import RunFailed, Settings, UserError

EVAL_BATCH = 32


@dataclass
class Run:
    """A model in training and all that a checkpoint of it must hold. `step` counts finished optimizer steps."""

    model: nn.Module  # as it is called: inside DDP where there are several processes
    data: Data
    settings: Settings
    steps: int
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    processes: Processes
    autocast: torch.dtype | None = None
    adaptive: Adaptive | None = None
    base: str = ""  # fingerprint of the model that it began with
    losses: list[float] = field(default_factory=list)
    grad_norm: float = math.nan

    def __post_init__(self) -> None:
        """Counts the tokens that each sequence takes a loss of: all with a label but its first, which nothing predicts."""
        counts = (self.data.labels != IGNORED).to(torch.int64)
        counts[self.data.starts[:-1]] = 0
        sums = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        self._learned = sums[self.data.starts[1:]] - sums[self.data.starts[:-1]]

    @property
    def step(self) -> int:
        return len(self.losses)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def sequences(self) -> int:
        """Of a step, in all processes."""
        return self.settings.batch_size * self.settings.grad_accum * self.processes.count

    def indices(self) -> Tensor:
        """The sequences of the next step, int64 [sequences]."""
        return order(len(self.data), self.step * self.sequences, self.sequences, self.settings.seed)

    def tokens(self, indices: Tensor) -> int:
        """Of these sequences, padding not counted."""
        return int((self.data.starts[indices + 1] - self.data.starts[indices]).sum())

    def learned(self, indices: Tensor) -> int:
        return int(self._learned[indices].sum())


def steps_of(settings: Settings, sequences: int, processes: Processes) -> int:
    """How many optimizer steps a run takes."""
    of_a_step = settings.batch_size * settings.grad_accum * processes.count
    return settings.max_steps or math.ceil(settings.epochs * sequences / of_a_step)


def start(
    model: nn.Module, data: Data | Tensor, settings: Settings, autocast: torch.dtype | None = None,
    processes: Processes | None = None,
) -> Run:  # fmt: skip
    """A run at step 0 over the parameters that require gradients.

    data:     or blocks, integer [n, seq_len], every token of which has a loss
    autocast: the dtype to compute in, if not the parameters' own
    """
    data = data if isinstance(data, Data) else Data.of_blocks(data)
    processes = processes or Processes()
    steps = steps_of(settings, len(data), processes)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = _optimizer(settings.optim, trained, settings.lr)
    if settings.gradient_checkpointing:
        try:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        except ValueError as error:
            raise UserError(f"--gradient-checkpointing: {error}") from error
    model.train()
    adaptive = Adaptive(model, settings.output, steps, processes.is_main) if is_adaptive(model) else None
    prepared = processes.prepare(model, optimizer)
    if any(isinstance(p, DTensor) for p in prepared.parameters()):
        _check_sharded(settings)
    warmup = math.ceil(settings.warmup_ratio * steps)
    # transformers' "constant" knows no warm-up
    name = "constant_with_warmup" if settings.lr_scheduler == "constant" and warmup else settings.lr_scheduler
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    if processes.rank:  # other dropout than the first process has
        torch.manual_seed(settings.seed + processes.rank)
    return Run(prepared, data, settings, steps, optimizer, scheduler, processes, autocast, adaptive)


def _check_sharded(settings: Settings) -> None:
    """Raises: UserError for what cannot be done, or not be saved, where FSDP2 shards the parameters."""
    if settings.optim.endswith("8bit"):
        wanted = settings.optim.replace("8bit", "32bit") if "paged" in settings.optim else "paged_adamw_32bit"
        raise UserError(
            f"--optim: found {settings.optim}, whose 8-bit states cannot be saved where FSDP2 shards them; wanted {wanted}"
        )
    if settings.method == "adalora":
        raise UserError(
            "--method: found adalora under FSDP2, but importances need whole gradients; wanted DDP or one process"
        )


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
    """One optimizer step over grad_accum forwards. Returns the mean loss of the tokens of all of them, in all processes.

    Raises: RunFailed for a loss or a gradient that is not finite, before any parameter has moved.
    """
    settings, processes = run.settings, run.processes
    if run.adaptive:
        run.adaptive.begin(run.step)
    indices = run.indices()
    share = processes.count / run.learned(indices)  # DDP takes the mean over processes
    batches = indices.view(settings.grad_accum, processes.count, settings.batch_size)[:, processes.rank]
    total = 0.0
    for i, rows in enumerate(batches):
        batch = {name: t.to(run.device) for name, t in run.data.batch(rows).items()}
        last = i + 1 == settings.grad_accum
        with contextlib.nullcontext() if last else processes.no_sync(run.model):
            with _autocast(run):
                loss = run.model(**batch, use_cache=False).loss * (run.learned(rows) * share)
            loss.backward()
        total += loss.item() / processes.count
    penalty = run.adaptive.penalty() if run.adaptive else 0.0
    total = processes.sum(total)[0] - penalty
    if not math.isfinite(total):
        run.optimizer.zero_grad()
        raise RunFailed(f"the loss of step {run.step + 1} is {total}; try a lower --lr than {settings.lr}")
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    run.grad_norm = processes.clip(parameters, settings.max_grad_norm)
    if not math.isfinite(run.grad_norm):
        run.optimizer.zero_grad()
        raise RunFailed(
            f"the norm of the gradient of step {run.step + 1} is {run.grad_norm}; try a lower --lr than {settings.lr}"
        )
    run.optimizer.step()
    if run.adaptive:
        run.adaptive.stepped(run.optimizer)
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
    return total / len(blocks) - (run.adaptive.penalty() if run.adaptive else 0.0)


def _autocast(run: Run) -> contextlib.AbstractContextManager:
    return torch.autocast(run.device.type, run.autocast) if run.autocast else contextlib.nullcontext()
