"""The linears of a transformer layer with LoRA, each contender's way, on the same bytes.

- nf4lora grouped:    `NF4LoRALinearGroup` for those that read one x, `NF4LoRAGatedMLP` where SwiGLU is computed
- nf4lora one by one: each `NF4LoRALinear` alone; just "nf4lora" where there is nothing to group
- dense linears:      frozen, of the decoded weights, no LoRA: the limit
- dense linears + peft: the same in peft's LoRA layers, adapters in the layer's dtype: its fastest form
- bitsandbytes + peft: Linear4bit in peft's LoRA layers, float32 adapters as peft makes them, with autocast and without
- bitsandbytes alone: no LoRA, at its own dispatch; forward only
- Unsloth's schedule: `bench.peers.UnslothFunction`; our kernel for SwiGLU stands for Unsloth's

Adapters of ours and of Unsloth's schedule are float32 as well: what all three train by default.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nf4lora import NF4LoRALinear
from nf4lora.nn import NF4LoRAGatedMLP, NF4LoRALinearGroup

from . import peers
from .shapes import LLAMA_3_8B_LAYER

MLP = ("gate_proj", "up_proj", "down_proj")
SEVEN = (("q_proj", "k_proj", "v_proj"), ("o_proj",), MLP[:2], MLP[2:])
WITH_SWIGLU = (*SEVEN[:2], MLP)
OURS, GROUPED, ALONE = "nf4lora", "nf4lora grouped", "nf4lora one by one"
DENSE, DENSE_PEFT, UNSLOTH = "dense linears", "dense linears + peft", "Unsloth's schedule"
AUTOCAST, NO_AUTOCAST, NO_LORA = "bitsandbytes + peft, autocast", "bitsandbytes + peft", "bitsandbytes alone"
Group = Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class Work:
    """What is computed, and on what.

    M:         rows of every x
    groups:    names of linears that read one x; `MLP` is gate, up, SwiGLU and down
    gradients: backward too, to every x and every adapter
    shapes:    name -> (N, K)
    sets:      of operands, so that calls that go round them find nothing in a cache
    """

    M: int
    groups: tuple[tuple[str, ...], ...] = SEVEN
    gradients: bool = False
    shapes: Mapping[str, tuple[int, int]] | None = None  # Llama-3-8B's
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"
    sets: int = 1
    rank: int = 16
    scaling: float = 2.0

    def shape(self, name: str) -> tuple[int, int]:
        return (self.shapes or LLAMA_3_8B_LAYER)[name]

    @property
    def names(self) -> list[str]:
        return [name for names in self.groups for name in names]

    @property
    def outputs(self) -> list[str]:
        """Names of the linears whose outputs are the result."""
        return [name for names in self.groups for name in (names[2:] if names == MLP else names)]

    def __str__(self) -> str:
        return f"{'forward + backward' if self.gradients else 'forward'}{', with SwiGLU' if MLP in self.groups else ''}"


class Layer(NamedTuple):
    """How one contender computes it: for each group a function from x to the outputs; and what learns."""

    groups: Sequence[Group]
    adapters: Sequence[Tensor] = ()


@dataclass(frozen=True)
class Call:
    """One pass over `layer` on a tensor of `inputs` for each group and one of `dys` for each output, or none of `dys`."""

    layer: Layer
    inputs: Sequence[Tensor]
    dys: Sequence[Tensor]
    autocast: torch.dtype | None = None

    @contextmanager
    def mode(self) -> Iterator[None]:
        """Gradients and autocast as the call wants them; every forward casts the adapters anew, as every step does."""
        device = self.inputs[0].device.type
        cast = torch.autocast(device, self.autocast, cache_enabled=False) if self.autocast else nullcontext()
        with torch.set_grad_enabled(bool(self.dys)), cast:
            yield

    def outputs(self) -> list[Tensor]:
        return [y for group, x in zip(self.layer.groups, self.inputs, strict=True) for y in group(x)]

    def forward(self) -> list[Tensor]:
        with self.mode():
            return self.outputs()

    def backward(self, ys: Sequence[Tensor]) -> list[Tensor]:
        """The gradients of every x, then of lora_A and lora_B of each linear."""
        return list(torch.autograd.grad(ys, [*self.inputs, *self.layer.adapters], self.dys))

    def __call__(self) -> list[Tensor]:
        ys = self.forward()
        return [*(y.detach() for y in ys), *self.backward(ys)] if self.dys else ys


def adapters(linears: Mapping[str, NF4LoRALinear]) -> list[Tensor]:
    """lora_A and lora_B of each."""
    return [t for layer in linears.values() for t in (layer.lora_A, layer.lora_B)]


def one_by_one(work: Work, linears: Mapping[str, Callable[[Tensor], Tensor]], learning: Sequence[Tensor] = ()) -> Layer:
    """Each linear alone, and torch's SwiGLU."""

    def gated(gate: Callable, up: Callable, down: Callable) -> Group:
        return lambda x: (down(nn.functional.silu(gate(x)) * up(x)),)

    def each(*members: Callable) -> Group:
        return lambda x: [member(x) for member in members]

    return Layer(
        [(gated if names == MLP else each)(*(linears[name] for name in names)) for names in work.groups], learning
    )


def contenders(
    work: Work, linears: Mapping[str, NF4LoRALinear], inputs: Sequence[Tensor], dys: Sequence[Tensor]
) -> tuple[dict[str, list[Call]], dict[str, str]]:
    """name -> a call for each set of operands; name of what is not there -> why."""
    wanted = {DENSE_PEFT: ("peft",), AUTOCAST: ("peft", "bitsandbytes"), NO_AUTOCAST: ("peft", "bitsandbytes"),
              NO_LORA: ("bitsandbytes",), f"{UNSLOTH} by bitsandbytes' kernels, not ours": ("bitsandbytes",)}  # fmt: skip
    absent = {name: why for name, packages in wanted.items() if (why := peers.why_not(*packages, device=work.device))}
    if work.dtype == torch.float32:
        absent[AUTOCAST] = "autocast does not compute in float32"
    found: dict[str, list[Call]] = {}
    for _ in range(work.sets):
        own = deepcopy(linears)
        x, dy = [t.clone().requires_grad_(work.gradients) for t in inputs], [t.clone() for t in dys]
        dense = {name: peers.dense_linear(m, work.dtype) for name, m in own.items()}
        alone = one_by_one(work, own, adapters(own))
        ways = (
            {GROUPED: _grouped(work, own), ALONE: alone}
            if any(len(names) > 1 for names in work.groups)
            else {OURS: alone}
        )
        ways |= {DENSE: one_by_one(work, dense), UNSLOTH: _by_unsloth(work, own)}
        if DENSE_PEFT not in absent:
            ways[DENSE_PEFT] = _in_peft(work, dense, own, work.dtype)
        if NO_LORA not in absent:
            packed = {name: peers.bitsandbytes_linear(m, work.dtype) for name, m in own.items()}
            ways |= {} if work.gradients else {NO_LORA: one_by_one(work, packed)}
        if NO_AUTOCAST not in absent:
            ways[AUTOCAST] = ways[NO_AUTOCAST] = _in_peft(work, packed, own, torch.float32)
        for name in (name for name in ways if name not in absent):
            found.setdefault(name, []).append(Call(ways[name], x, dy, work.dtype if name == AUTOCAST else None))
    return found, absent


def _grouped(work: Work, linears: Mapping[str, NF4LoRALinear]) -> Layer:
    def together(names: Sequence[str]) -> Group:
        members = {name: linears[name] for name in names}
        if len(members) > 1 and names != MLP:
            return NF4LoRALinearGroup(**members)
        only = NF4LoRAGatedMLP(**members) if names == MLP else linears[names[0]]
        return lambda x: (only(x),)

    return Layer(list(map(together, work.groups)), adapters(linears))


def _by_unsloth(work: Work, linears: Mapping[str, NF4LoRALinear]) -> Layer:
    most = max(m.in_features * m.out_features for m in linears.values())
    buffer = torch.empty(most, dtype=work.dtype, device=work.device)

    def scheduled(names: Sequence[str], swiglu: bool = False) -> Group:
        return peers.unsloth([linears[name] for name in names], buffer, work.dtype, swiglu)

    def gated() -> Group:
        gate_up, down = scheduled(MLP[:2], swiglu=True), scheduled(MLP[2:])
        return lambda x: down(gate_up(x))

    return Layer([gated() if names == MLP else scheduled(names) for names in work.groups], adapters(linears))


def _in_peft(
    work: Work, linears: Mapping[str, nn.Module], like: Mapping[str, NF4LoRALinear], dtype: torch.dtype
) -> Layer:
    layers = peers.with_peft(linears, like, dtype)
    return one_by_one(work, layers, peers.peft_adapters(layers.values()))
