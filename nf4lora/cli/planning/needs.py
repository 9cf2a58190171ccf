"""The bytes of one way to fine-tune a model: weights, adapters, states, and the most that a step holds beside them."""

from dataclasses import dataclass, replace
from typing import Any

from . import activations as act
from .inventory import Inventory
from .states import States, states

METHODS = ("full", "lora", "qlora", "adalora")
ADALORA_STATISTICS = 3  # importance, its mean and its spread: float32, as large as the adapter


@dataclass(frozen=True)
class Choice:
    """One way to fine-tune; names as in `nf4lora finetune`.

    compute, weights: bytes an element of what is computed, and of the weights that full fine-tuning trains
    context: bytes outside torch's tensors; slack: share of the tensors that the allocator holds beyond them; both assumed
    """

    method: str = "qlora"
    batch_size: int = 1
    seq_len: int = 2048
    grad_accum: int = 4
    r: int = 16
    target_modules: tuple[str, ...] = ("all-linear",)
    dropout: float = 0.05
    optim: str = "paged_adamw_8bit"
    gradient_checkpointing: bool = False
    compute: int = 2
    weights: int = 2
    attention: str = "flash"
    cuda: bool = True
    context: int = 0
    slack: float = 0.0

    def with_(self, **changes: Any) -> "Choice":
        return replace(self, **changes)

    @property
    def mode(self) -> act.Mode:
        return act.Mode(
            self.method, self.compute, self.weights, self.r, self.target_modules, self.dropout, self.attention, self.cuda,
            self.seq_len,
        )  # fmt: skip


@dataclass(frozen=True)
class Need:
    """Bytes by name at the fullest moment of a step, named `peak`, and what of them may page to the host."""

    parts: dict[str, int]
    peak: str
    trainable: int
    states: States

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def on_device(self) -> int:
        """The least that the card must hold: all but the optimizer states that can wait on the host."""
        return self.total - self.states.total + self.states.needed

    @property
    def tensors(self) -> int:
        """Without context and slack, which are assumed."""
        return self.total - self.parts["CUDA context"] - self.parts["allocator slack"]


def weights_of(model: Inventory, choice: Choice) -> dict[str, int]:
    """Bytes of what does not train, or of all that does in full fine-tuning, by name."""
    quantized = choice.method in ("qlora", "adalora")
    each = choice.weights if choice.method == "full" else choice.compute
    # peft's LoRA keeps its base in 16 bits also where float32 is computed in
    dense = each if choice.method == "full" else min(each, 2)
    named = {"packed 4-bit weights": model.packed} if quantized else {"dense linear weights": model.quantized * dense}
    named |= {f"constants: {name}": size for name, size in model.constants.items() if quantized and size}
    named |= {
        name if name == "other" else f"{name}, 16 bits" if each == 2 else name: n * each
        for name, n in model.rest.items()
    }
    return named | {"buffers": model.buffers}


def adapter_sizes(model: Inventory, choice: Choice) -> list[int]:
    """Elements of each trained parameter: A [r, K] and B [N, r], for AdaLoRA also the r singular values; all for full."""
    if choice.method == "full":
        return list(model.parameters)
    r, targets = choice.r, model.targets(choice.target_modules)
    sizes = [size for linear in targets for size in (r * linear.K, linear.N * r)]
    return sizes + [r] * len(targets) if choice.method == "adalora" else sizes


def need(model: Inventory, choice: Choice) -> Need:
    """What a step takes. Adapters, their gradients and statistics are float32; workspace is one decoded weight."""
    sizes, full = adapter_sizes(model, choice), choice.method == "full"
    trainable, itemsize = sum(sizes), choice.weights if full else 4
    held = states(sizes, choice.optim, itemsize, choice.cuda)
    parts = weights_of(model, choice)
    if not full:
        parts["adapters"] = 4 * trainable
    if choice.method == "adalora":
        parts["importance statistics"] = ADALORA_STATISTICS * 4 * trainable
    if choice.mode.mixed:
        # recomputing a layer makes copies anew, of that layer
        copied = (
            max(b.weights for b in model.blocks) if choice.gradient_checkpointing and model.blocks else model.quantized
        )
        parts["autocast's copies of the weights"] = choice.compute * (copied + model.rest.get("head", 0))
    parts["optimizer states"] = held.total
    gradients = itemsize * trainable
    moments = _moments(model, choice, gradients)
    peak = max(moments, key=lambda name: sum(moments[name].values()))
    parts |= moments[peak]
    parts["CUDA context"] = choice.context
    parts["allocator slack"] = int(choice.slack * (sum(parts.values()) - choice.context))
    return Need(parts, peak, trainable, held)


def _moments(model: Inventory, choice: Choice, gradients: int) -> dict[str, dict[str, int]]:
    """Bytes beside weights and states at the loss, where the backward begins and ends, and at the optimizer's step."""
    mode, T, c = choice.mode, choice.batch_size * choice.seq_len, choice.mode.stream
    tokens = {block: block.tokens(choice.batch_size, choice.seq_len) for block in model.blocks}
    each = {block: act.of_layer(block, mode) * n for block, n in tokens.items()}
    layers = sum(block.count * size for block, size in each.items())
    one = max((size + act.of_backward(block, mode) * tokens[block] for block, size in each.items()), default=0)
    more = max((act.of_backward(block, mode) * n for block, n in tokens.items()), default=0)
    if choice.gradient_checkpointing:
        layers = sum(block.count * n * c * block.hidden for block, n in tokens.items())
        # a float32 norm keeps the very tensor that was the checkpoint
        more = one - (T * c * model.hidden if c == 4 else 0)
    head = act.of_head(mode, model.hidden, model.final_norm, model.vocabulary) * T
    before = gradients if choice.grad_accum > 1 else 0
    first = before or (choice.weights * (model.rest.get("head", 0) + model.hidden * 4) if mode.full else 0)
    workspace = _workspace(model, choice)
    softmax = 4 * model.vocabulary * T
    # while the first layer's activations live, its gradients and those of the embeddings do not
    last = before or gradients - (
        choice.weights * (model.rest.get("embeddings", 0) + max((b.weights for b in model.blocks), default=0))
        if mode.full
        else 0
    )
    moments = {
        "the loss": (layers + head - softmax, act.of_loss(mode, model.vocabulary) * T + softmax, before, 0),
        "the begin of the backward": (layers + more, 0, first, workspace),
        "the end of the backward": (one, 0, last, workspace),
        "the optimizer's step": (0, 0, gradients, 0),
    }  # fmt: skip
    names = "activations", "logits", "gradients", "workspace"
    return {
        moment: {name: int(size) for name, size in zip(names, sizes, strict=True)} for moment, sizes in moments.items()
    }


def _workspace(model: Inventory, choice: Choice) -> int:
    """On a GPU: the largest weight decoded beside its adapter, [N, K + r], and x beside xa, [tokens, K + r]."""
    if choice.method not in ("qlora", "adalora") or not choice.cuda:
        return 0
    N, K = model.largest
    return choice.compute * (K + choice.r) * (N + choice.batch_size * choice.seq_len)
