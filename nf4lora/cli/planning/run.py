"""One call of `nf4lora plan`: its options checked, everything computed."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...codebook import BLOCKSIZES
from ..settings import OPTIMS, UserError
from . import show
from .activations import ATTENTIONS
from .advice import Advice, advise
from .fit import Fit, fit, inference
from .inventory import Inventory, take
from .needs import METHODS, Choice, Need, need
from .source import read_config
from .units import card_bytes, parse_bytes, shown

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}
USUAL_LENGTH = 2048


@dataclass(frozen=True)
class Options:
    """Of the command, under the same names. Raises: UserError naming the option."""

    gpu: str
    batch_size: int = 1
    seq_len: int | None = None
    grad_accum: int = 4
    r: int = 16
    dropout: float = 0.05
    target_modules: tuple[str, ...] = ("all-linear",)
    optim: str = OPTIMS[0]
    gradient_checkpointing: bool = False
    dtype: str = "bfloat16"
    full_weights: str = "bfloat16"
    blocksize: int = 64
    double_quant: bool = True
    attention: str = "flash"
    context: str = "700MiB"
    slack: float = 0.05
    margin: float = 0.03
    cpu: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "seq_len", "grad_accum", "r"):
            value = getattr(self, name)
            if value is not None and not 1 <= value < 2**31:
                _refuse(name, value, "an integer of 1 or more")
        for name in ("dropout", "slack", "margin"):
            if not 0 <= getattr(self, name) < 1:
                _refuse(name, getattr(self, name), "a number in [0, 1)")
        known = {
            "optim": OPTIMS,
            "dtype": ITEMSIZE,
            "full_weights": ITEMSIZE,
            "blocksize": BLOCKSIZES,
            "attention": ATTENTIONS,
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                _refuse(name, getattr(self, name), f"one of {', '.join(map(str, values))}")
        if not all(self.target_modules):
            _refuse("target_modules", ",".join(self.target_modules), "all-linear, or names separated by commas")

    def choice(self, longest: int | None) -> Choice:
        """Of QLoRA; a length that was not given is the usual one, or what the model takes."""
        length = self.seq_len or min(USUAL_LENGTH, longest or USUAL_LENGTH)
        if longest and length > longest:
            _refuse("seq_len", length, f"at most {longest}, the longest the model takes")
        context = 0 if self.cpu else parse_bytes(self.context, "--context")
        return Choice(
            "qlora", self.batch_size, length, self.grad_accum, self.r, self.target_modules, self.dropout, self.optim,
            self.gradient_checkpointing, ITEMSIZE[self.dtype], ITEMSIZE[self.full_weights], self.attention, not self.cpu, context,
            0.0 if self.cpu else self.slack,
        )  # fmt: skip


def _refuse(name: str, value: Any, wanted: str) -> None:
    raise UserError(f"--{name.replace('_', '-')}: found {value}, wanted {wanted}")


@dataclass(frozen=True)
class Planned:
    """What the command shows."""

    model: Inventory
    card: int
    needs: dict[str, Need]
    turned: dict[str, int]  # activations with gradient checkpointing the other way
    fits: list[Fit]
    advice: Advice
    inference: dict[str, int]
    assumed: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        return show.as_json(self.model, self.needs, self.turned, self.fits, self.advice, self.inference, self.assumed)

    def show(self) -> None:
        show.tables(self.model, self.needs, self.turned, self.fits, self.advice, self.inference, self.assumed)

    def draw(self, path: Path) -> None:
        """Raises: UserError where no PNG can be written."""
        lower = ", a lower bound" if self.model.uncounted else ""
        try:
            show.chart(
                self.needs,
                self.card,
                path,
                f"{self.model.name}, {self.model.total / 1e9:.2f}B parameters: one step{lower}",
            )
        except (OSError, ValueError) as error:
            raise UserError(f"--png: {path} cannot be written ({error}); wanted the path of a .png file") from error


def planned(named: str, options: Options) -> Planned:
    """Raises: UserError."""
    card = card_bytes(options.gpu)
    parse_bytes(options.context, "--context")
    return plan_of(take(read_config(named), options.blocksize, options.double_quant), options, card)


def plan_of(model: Inventory, options: Options, card: int) -> Planned:
    """Of a model whose shapes are known. Raises: UserError for targets and lengths that it has not."""
    asked = options.choice(model.longest)
    if not math.prod((model.total, len(model.linears))):
        raise UserError(f"MODEL_OR_CONFIG: {model.name} has no linear layers to fine-tune")
    room = int(card * (1 - options.margin))
    other = asked.with_(gradient_checkpointing=not asked.gradient_checkpointing)
    needs, turned = ({m: need(model, choice.with_(method=m)) for m in METHODS} for choice in (asked, other))
    fits = [
        fit(model, asked.with_(method=method, gradient_checkpointing=on), room) for method in METHODS for on in (False, True)
    ]  # fmt: skip
    return Planned(
        model, card, needs, {m: n.parts["activations"] for m, n in turned.items()}, fits,
        advise(model, asked, room, options.margin), inference(model, asked), _assumed(model, asked, options, card),
    )  # fmt: skip


def _assumed(model: Inventory, asked: Choice, options: Options, card: int) -> dict[str, Any]:
    found = {
        "card": shown(card), "left free": f"{options.margin:.0%}", "batch size": asked.batch_size,
        "tokens a sequence": asked.seq_len,
        "CUDA context": shown(asked.context), "allocator slack": f"{asked.slack:.0%} of all tensors", "computed in": options.dtype,
        "full fine-tuning of": f"{options.full_weights} weights", "attention": asked.attention,
        "checkpointing": "on" if asked.gradient_checkpointing else "off", "optimizer": asked.optim,
        "adapters": f"float32, rank {asked.r}, on {', '.join(asked.target_modules)}", "gradient accumulation": asked.grad_accum,
    }  # fmt: skip
    if any(block.experts for block in model.blocks):
        found["tokens of experts"] = "spread by the router, whatever the balance"
    if any(block.image_tokens for block in model.blocks):
        one = "clips of sound" if hasattr(model.config, "max_source_positions") else "images"
        found[one] = (
            "one a sequence, its tokens counted in the length"
            if one == "images"
            else "one a sequence, as long as it takes"
        )
    if model.uncounted:
        found["activations"] = (
            f"a lower bound: those of {model.uncounted} are not counted, nor states that they keep to generate"
        )
    return found
