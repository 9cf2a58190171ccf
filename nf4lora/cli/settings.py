"""What a fine-tuning run is told, checked before anything heavy is imported."""

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

METHODS = ("lora", "qlora", "adalora")
LOSS_ON = ("answers", "all")
SCHEDULERS = ("constant", "linear", "cosine")
DTYPES = ("auto", "float32", "bfloat16")
# By the names that transformers' TrainingArguments has for them.
OPTIMS = (
    "paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit", "paged_lion_8bit", "paged_lion_32bit", "adamw_torch", "adamw_torch_fused",
)  # fmt: skip
_CHOICES = {
    "method": METHODS, "loss_on": LOSS_ON, "optim": OPTIMS, "lr_scheduler": SCHEDULERS, "compute_dtype": DTYPES,
}  # fmt: skip

_ADALORA = {"target_r": 1, "tinit": 0, "tfinal": 0, "delta_t": 1}  # and the least of each


class UserError(Exception):
    """Bad input; the text says what was found, what was wanted and what to do. The command exits with 2."""


class RunFailed(Exception):
    """A run that cannot go on, by no fault of the options alone. The command exits with 1."""


class Stopped(Exception):
    """Ctrl-C; the text says how to go on. The command exits with 130."""


@dataclass(frozen=True)
class Settings:
    """Options of `nf4lora finetune`, under the same names. The defaults are those of a run on the user's own model."""

    model: str | None = None
    data: str | None = None
    output: str = "nf4lora-output"
    method: str = "qlora"
    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    target_r: int | None = None
    tinit: int | None = None
    tfinal: int | None = None
    delta_t: int | None = None
    target_modules: tuple[str, ...] = ("all-linear",)
    lr: float = 2e-4
    optim: str = OPTIMS[0]
    lr_scheduler: str = "linear"
    warmup_ratio: float = 0.03
    max_grad_norm: float = 1.0
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 4
    grad_accum: int = 4
    seq_len: int = 512
    loss_on: str = "answers"
    packing: bool = False
    gradient_checkpointing: bool = False
    save_steps: int = 50
    resume: bool = False
    seed: int = 0
    compute_dtype: str = "auto"

    def __post_init__(self) -> None:
        """Raises: UserError naming the option."""
        for name in ("r", "max_steps", "batch_size", "grad_accum", "save_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                _refuse(name, value, "an integer of 1 or more")
        if self.seq_len < 2:
            _refuse("seq_len", self.seq_len, "an integer of 2 or more")
        for name, least in _ADALORA.items():
            value = getattr(self, name)
            if value is not None and self.method != "adalora":
                _refuse(name, value, "--method adalora with it")
            if value is not None and value < least:
                _refuse(name, value, f"an integer of {least} or more")
        if self.method == "adalora" and self.r < 2:
            _refuse("r", self.r, "an integer of 2 or more with --method adalora, which takes ranks away")
        if self.target_r is not None and self.target_r >= self.r:
            _refuse("target_r", self.target_r, f"less than --r, which is {self.r}")
        if not 0 <= self.seed < 2**63:
            _refuse("seed", self.seed, "an integer from 0 to 2**63 - 1")
        for name in ("alpha", "lr", "max_grad_norm", "epochs"):
            if not 0 < getattr(self, name) < math.inf:
                _refuse(name, getattr(self, name), "a finite number above 0")
        if not 0 <= self.dropout < 1:
            _refuse("dropout", self.dropout, "a number in [0, 1)")
        if not 0 <= self.warmup_ratio <= 1:
            _refuse("warmup_ratio", self.warmup_ratio, "a number in [0, 1]")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                _refuse(name, getattr(self, name), f"one of {', '.join(known)}")
        if not self.target_modules or not all(self.target_modules):
            _refuse("target_modules", ",".join(self.target_modules), "all-linear, or names separated by commas")

    def with_options(self, options: dict[str, Any]) -> "Settings":
        """These settings with every option that was given, those that are not None."""
        return replace(self, **{name: value for name, value in options.items() if value is not None})

    def must_match(self) -> dict[str, Any]:
        """What a resumed run must share with the run that wrote the checkpoint, as JSON has it."""
        free = ("model", "data", "output", "resume", "save_steps")
        return {name: value for name, value in self.as_json().items() if name not in free}

    def schedule(self, steps: int) -> dict[str, int]:
        """AdaLoRA's own names and values for a run of so many steps: what was not given is a share of them."""
        shares = {"tinit": steps // 10, "tfinal": steps // 4, "delta_t": max(steps // 100, 1)}
        given = {
            name: getattr(self, name) if getattr(self, name) is not None else share for name, share in shares.items()
        }
        return {"deltaT" if name == "delta_t" else name: value for name, value in given.items()}

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "target_modules": list(self.target_modules)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Settings":
        known = {field.name for field in fields(cls)}
        values = {name: value for name, value in values.items() if name in known}
        return cls(**{**values, "target_modules": tuple(values["target_modules"])})


# A small model trained for two minutes takes, and needs, a far higher rate than a large one.
DEMO = Settings(
    output="nf4lora-demo", lr=4e-3, lr_scheduler="cosine", warmup_ratio=0.05, max_steps=200, batch_size=4, grad_accum=1,
    seq_len=128,
)  # fmt: skip


def _refuse(name: str, value: Any, wanted: str) -> None:
    raise UserError(f"--{name.replace('_', '-')}: found {value}, wanted {wanted}")
