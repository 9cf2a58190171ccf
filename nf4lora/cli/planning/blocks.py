"""The repeated layers of a model, as far as their activations depend on them: attention, MLP, norms, experts, dropouts."""

from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from ...nn.experts import NF4Experts
from .unknown import unknown_in

_LAST = ("o_proj", "out_proj", "c_proj", "o", "wo", "dense", "down_proj", "fc2", "w2", "lin2")
# Tensors of the width of its input that autograd keeps for an activation; 1 for those that are one kernel.
_KEPT = {"NewGELUActivation": 4, "FastGELUActivation": 5, "QuickGELUActivation": 2, "ReLU": 0}


class Read(NamedTuple):
    """Linears that read one x of width K: (path within the block, out_features) of each."""

    K: int
    linears: tuple[tuple[str, int], ...]

    @property
    def N(self) -> int:
        return sum(N for _, N in self.linears)


@dataclass(frozen=True)
class Attention:
    """What reads the hidden states (q, k, v together or apart), what reads the result, and the heads."""

    into: Read
    out: Read
    heads: int


@dataclass(frozen=True)
class Mlp:
    """up (and gate) -> activation -> down. `kept`: tensors as wide as down's input that autograd keeps between them."""

    into: Read
    down: Read | None
    gated: bool
    kept: int


class Experts(NamedTuple):
    """Stacks: tokens go to `chosen` of `count` experts, each `hidden` -> `width` -> `hidden`."""

    chosen: int
    count: int
    hidden: int
    width: int


class Norm(NamedTuple):
    """Elements a token, and whether it is an RMSNorm, which transformers computes in float32 op by op."""

    width: int
    rms: bool


@dataclass(frozen=True)
class Block:
    """A layer and how many of its kind there are.

    image_tokens: a sample's, where it reads images or sound and not text; unknown: names of what the formulas do not count
    """

    kind: str
    count: int
    hidden: int
    attention: tuple[Attention, ...]
    mlps: tuple[Mlp, ...]
    norms: tuple[Norm, ...]
    experts: Experts | None
    dropouts: int
    image_tokens: int | None
    unknown: tuple[str, ...] = ()

    def tokens(self, batch: int, length: int) -> int:
        return batch * (self.image_tokens or length)

    @property
    def weights(self) -> int:
        """Elements of the weights of one layer."""
        reads = [r for a in self.attention for r in (a.into, a.out)] + [
            r for m in self.mlps for r in (m.into, m.down) if r
        ]
        e = self.experts
        return sum(r.K * r.N for r in reads) + (3 * e.count * e.hidden * e.width if e else 0)


def blocks_of(model: nn.Module) -> tuple[Block, ...]:
    """Of the layers that transformers checkpoints one by one; alike ones are one Block. Empty if the model has none."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found: Counter[Block] = Counter()
    for path, layer in model.named_modules():
        if isinstance(layer, GradientCheckpointingLayer):
            found[_read(path, layer, model.config)] += 1
    return tuple(Block(**{**vars(block), "count": count}) for block, count in found.items())


def _read(path: str, layer: nn.Module, config: Any) -> Block:
    linears = {n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
    units = [
        n for n, m in layer.named_modules() if n and ("attention" in type(m).__name__.lower() or n.endswith("attn"))
    ]
    units = [n for n in units if not any(n.startswith(other + ".") for other in units)]
    attention, taken = [], set()
    for unit in units:
        own = {n: m for n, m in linears.items() if n.startswith(unit + ".")}
        taken |= own.keys()
        if len(own) > 1:
            last = _last(own)
            attention.append(
                Attention(_reads([n for n in own if n != last], own), _reads([last], own), _heads(layer, unit, config))
            )
    rest = {n: m for n, m in linears.items() if n not in taken}
    mlps = [_mlp(group, _activation(layer)) for group in _by_parent(rest)]
    hidden = attention[0].into.K if attention else next((m.into.K for m in mlps), 0)
    norms = [_norm(n, m, hidden, attention) for n, m in layer.named_modules() if "norm" in type(m).__name__.lower()]
    drops = [
        n for n, m in layer.named_modules()
        if isinstance(m, nn.Dropout) and m.p and "attn_dropout" not in n and not n.endswith("self.dropout")
    ]  # fmt: skip
    experts = next((_experts(m, config) for m in layer.modules() if isinstance(m, NF4Experts)), None)
    image = _image_tokens(path, config)
    return Block(
        type(layer).__name__, 1, hidden, tuple(attention), tuple(mlps), tuple(norms), experts, len(drops), image,
        unknown_in(layer, bool(attention)),
    )  # fmt: skip


def _reads(names: list[str], own: dict[str, nn.Linear]) -> Read:
    return Read(own[names[0]].in_features, tuple((n, own[n].out_features) for n in names))


def _last(own: dict[str, nn.Linear]) -> str:
    named = [n for n in own if n.rsplit(".", 1)[-1] in _LAST]
    return (named or list(own))[-1]


def _by_parent(linears: dict[str, nn.Linear]) -> list[dict[str, nn.Linear]]:
    """The linears of each MLP: of one parent, or, where each parent has one, all of them together."""
    groups: dict[str, dict[str, nn.Linear]] = {}
    for n, m in linears.items():
        groups.setdefault(n.rpartition(".")[0], {})[n] = m
    single = {n: m for group in groups.values() if len(group) == 1 for n, m in group.items()}
    return [group for group in (*(g for g in groups.values() if len(g) > 1), single) if group]


def _mlp(own: dict[str, nn.Linear], kept: int) -> Mlp:
    if len(own) == 1:
        return Mlp(_reads(list(own), own), None, False, 0)
    last = _last(own)
    into = _reads([n for n in own if n != last], own)
    return Mlp(into, _reads([last], own), into.N >= 2 * own[last].in_features, kept)


def _activation(layer: nn.Module) -> int:
    names = [type(m).__name__ for n, m in layer.named_modules() if "act" in n.rsplit(".", 1)[-1]]
    return next((_KEPT[name] for name in names if name in _KEPT), 1)


def _norm(name: str, norm: nn.Module, hidden: int, attention: list[Attention]) -> Norm:
    width = next((p.numel() for p in norm.parameters()), hidden)
    if attention and width < hidden and attention[0].out.K % width == 0:  # of each head of q, or of k
        q = attention[0].out.K
        width = q if "q" in name.rsplit(".", 1)[-1] else min(N for _, N in attention[0].into.linears)
    return Norm(width, type(norm).__name__ != "LayerNorm")


def _heads(layer: nn.Module, unit: str, config: Any) -> int:
    for module in layer.get_submodule(unit).modules():
        for owner in (module, getattr(module, "config", None)):
            for name in ("num_attention_heads", "num_heads", "n_heads"):
                if type(found := getattr(owner, name, None)) is int:
                    return found
    return getattr(config.get_text_config(), "num_attention_heads", 1)


def _experts(module: NF4Experts, config: Any) -> Experts:
    E, a, b = module.stacks.get("down_proj") or next(iter(module.stacks.values()))
    text = config.get_text_config()
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k")
    chosen = next((v for n in names if type(v := getattr(text, n, None)) is int), 1)
    hidden = getattr(text, "hidden_size", max(a, b))
    return Experts(chosen, E, hidden, b if a == hidden else a)


def _image_tokens(path: str, config: Any) -> int | None:
    if "encoder" in path.split(".") and type(frames := getattr(config, "max_source_positions", None)) is int:
        return frames  # of sound
    vision = getattr(config, "vision_config", None)
    if vision is None or not any(word in path for word in ("vision", "visual")):
        return None
    size, patch = getattr(vision, "image_size", 336), getattr(vision, "patch_size", 14)
    return (size // patch) ** 2 + 1
