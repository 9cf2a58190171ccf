"""What a model is made of, counted on the meta device once it holds the layers that `NF4Config` would put in."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from ...nn import NF4Linear
from ...nn.experts import NF4Experts
from ..settings import UserError
from .blocks import Block, blocks_of
from .source import on_meta

CONSTANTS = {"_absmax": "absmax", "_nested_absmax": "nested absmax", "_nested_offset": "offsets"}
# Of the longest sequence, as configs name it.
POSITIONS = ("max_position_embeddings", "n_positions", "max_target_positions")


class Linear(NamedTuple):
    """A linear that 4 bits hold: its path, in_features and out_features."""

    path: str
    K: int
    N: int


@dataclass(frozen=True)
class Inventory:
    """Bytes and shapes of one model.

    packed:    bytes of the 4-bit codes, of linears and of stacks of experts
    constants: bytes of their statistics by name: absmax, nested absmax, offsets
    quantized: parameters that these hold; `stacked` of them in stacks of experts
    rest:      parameters of the others by name: embeddings, head, norms, biases, other
    buffers:   bytes of buffers
    linears:   those that take adapters; blocks: the repeated layers; largest: elements of the largest weight decoded at once
    parameters: elements of each parameter of the dense model, as an optimizer of full fine-tuning sees them
    """

    name: str
    config: Any
    packed: int
    constants: dict[str, int]
    quantized: int
    stacked: int
    rest: dict[str, int]
    buffers: int
    linears: tuple[Linear, ...]
    blocks: tuple[Block, ...]
    parameters: tuple[int, ...]
    hidden: int
    vocabulary: int
    final_norm: bool
    generates: bool

    @property
    def total(self) -> int:
        """Parameters of the dense model."""
        return sum(self.parameters)

    @property
    def largest(self) -> tuple[int, int]:
        """N and K of the linear whose decoded weight is the largest."""
        return max(((linear.N, linear.K) for linear in self.linears), key=lambda s: s[0] * s[1], default=(0, 0))

    @property
    def longest(self) -> int | None:
        """Positions that the model takes, where its config says so."""
        text = self.config.get_text_config()
        found = (getattr(text, name, None) for name in POSITIONS)
        return next((n for n in found if type(n) is int and n > 0), None)

    @property
    def uncounted(self) -> str:
        """Names of what keeps activations that no formula counts; empty where all is counted."""
        if not self.blocks:
            return f"all layers of {self.name} (none is of a kind that transformers checkpoints)"
        found: dict[str, dict[str, None]] = {}
        for block in self.blocks:
            found.setdefault(block.kind, {}).update(dict.fromkeys(block.unknown))
        return "; ".join(f"{', '.join(names)} in {kind}" for kind, names in found.items() if names)

    @property
    def is_encoder(self) -> bool:
        return not self.generates

    def targets(self, names: Iterable[str]) -> list[Linear]:
        """Those that names mean, as `nf4lora.nn.replace_linears` has it. Raises: UserError for a name that none has."""
        names = list(names)
        if names == ["all-linear"]:
            return list(self.linears)
        if unknown := [n for n in names if not any(means(n, linear.path) for linear in self.linears)]:
            there = sorted({linear.path.rsplit(".", 1)[-1] for linear in self.linears})
            raise UserError(
                f"--target-modules: found no linear named {', '.join(unknown)}; the model has {', '.join(there)}"
            )
        return [linear for linear in self.linears if any(means(n, linear.path) for n in names)]


def means(name: str, path: str) -> bool:
    return path == name or path.endswith("." + name)


def take(config: Any, blocksize: int = 64, double_quant: bool = True) -> Inventory:
    """Count the model of a config. Its 4-bit layers are constructed on the meta device, by the quantizer that loads models.

    Raises: UserError for a config that makes no model, or linears that 4 bits cannot hold, such as one without outputs.
    """
    from ...hf.config import NF4Config
    from ...hf.quantizer import NF4Quantizer

    model = on_meta(config, torch.bfloat16)
    sizes = tuple(p.numel() for p in model.parameters())
    quantizer = NF4Quantizer(NF4Config(blocksize=blocksize, double_quant=double_quant), pre_quantized=True)
    try:
        quantizer.preprocess_model(model)
    except ValueError as error:
        name = type(model).__name__
        raise UserError(
            f"MODEL_OR_CONFIG: its {name} has a linear that 4 bits cannot hold ({error}); wanted the config of a model that loads"
        ) from error
    packed, constants, quantized, stacked = 0, dict.fromkeys(CONSTANTS.values(), 0), 0, 0
    held = set()
    for module in model.modules():
        if isinstance(module, NF4Linear):
            names = {"weight": module.in_features * module.out_features}
        elif isinstance(module, NF4Experts):
            names = {name: E * a * b for name, (E, a, b) in module.stacks.items()}
            stacked += sum(names.values())
        else:
            continue
        for name, count in names.items():
            quantized += count
            parts = {end: getattr(module, name + end, None) for end in ("", *CONSTANTS)}
            for end, t in parts.items():
                if t is not None:
                    held.add(id(t))
                    size = t.numel() * t.element_size()
                    packed += 0 if end else size
                    if end:
                        constants[CONSTANTS[end]] += size
    head = model.get_output_embeddings()
    linears = [Linear(n, m.in_features, m.out_features) for n, m in model.named_modules() if isinstance(m, NF4Linear)]
    found = blocks_of(model)
    return Inventory(
        type(model).__name__, config, packed, constants, quantized, stacked, _rest(model, head, held),
        sum(b.numel() * b.element_size() for b in model.buffers()), tuple(linears), found, sizes,
        getattr(config.get_text_config(), "hidden_size", 0), 0 if head is None else head.weight.shape[0],
        not found or any(n.rsplit(".", 1)[-1].endswith(("norm", "ln_f")) for n, m in model.named_modules() if _is_norm(m)),
        bool(model.can_generate()),
    )  # fmt: skip


def _rest(model: nn.Module, head: nn.Module | None, held: set[int]) -> dict[str, int]:
    """Elements of what no 4-bit layer holds; a weight that is tied counts once, as an embedding."""
    rest, seen = Counter(embeddings=0, head=0, norms=0, biases=0, other=0), set(held)
    ordered = sorted(model.modules(), key=lambda m: not isinstance(m, nn.Embedding))
    for module in ordered:
        for name, p in module.named_parameters(recurse=False):
            if id(p) in seen:
                continue
            seen.add(id(p))
            if isinstance(module, nn.Embedding):
                kind = "embeddings"
            elif module is head:
                kind = "head"
            else:
                kind = "norms" if _is_norm(module) else "biases" if "bias" in name else "other"
            rest[kind] += p.numel()
    return {kind: count for kind, count in rest.items() if count}


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()
