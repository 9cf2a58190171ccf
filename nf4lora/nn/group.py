"""Linears that read one x, computed as one: `NF4LoRALinearGroup`, the gated MLP, and the blocks of a model they fit."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import autograd
from ..abi import MAX_GROUP
from .entry import entered, held
from .linear import NF4Linear
from .together import forget, offer

# Classes of transformers whose forward is down_proj(act_fn(gate_proj(x)) * up_proj(x)).
GATED_MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")
_SILU = ("SiLU", "SiLUActivation")


def why_not_together(members: Sequence[NF4Linear]) -> str | None:
    """Why these layers cannot be computed as one, or None."""
    if not 2 <= len(members) <= MAX_GROUP:
        return f"found {len(members)} layers, wanted 2 to {MAX_GROUP}"
    for name, of in (
        ("in_features", lambda m: m.in_features),
        ("the kind of layer", lambda m: isinstance(m, NF4Linear)),
        ("blocksize, quant_type and double_quant", lambda m: (m.blocksize, m.quant_type, m.double_quant)),
        ("compute_dtype", lambda m: m.compute_dtype),
        ("bias", lambda m: None if m.bias is None else m.bias.dtype),
        ("dtype of adapters", lambda m: [getattr(t, "dtype", None) for t in m._adapter()[:2]]),
        ("lora_dropout", lambda m: getattr(m, "lora_dropout", 0.0)),
        ("device", lambda m: m.weight.device),
    ):
        if any(of(m) != of(members[0]) for m in members[1:]):
            return f"found {[of(m) for m in members]}, wanted one {name} for all"
    return None


def compute_together(members: Sequence[NF4Linear], x: Tensor, swiglu: bool = False) -> Any:
    """x [..., K] -> each member's [..., N_i]; with `swiglu` silu(first) * second. One dropout mask for all."""
    first, seed, dropout_p = members[0], *members[0]._dropout(x)
    lora_A, lora_B, scaling = zip(*[m._adapter() for m in members], strict=True)
    columns = (*zip(*[(*m._weight_args(), *held(m, "bias")) for m in members], strict=True), lora_A, lora_B)
    compute, dtype = entered(first, x, columns[0][0])
    lists = tuple([[t for t in values if t is not None] for values in columns])
    N = tuple([m.out_features for m in members])
    group = autograd.Group(N, first.blocksize, first.quant_type, scaling, dropout_p, swiglu)
    out = autograd.linear_group(compute, lists, seed, group)
    if swiglu:
        return out if out.dtype == dtype else out.to(dtype)
    return out if out[0].dtype == dtype else tuple(y.to(dtype) for y in out)


def _all_ours(members: Sequence[nn.Module]) -> bool:
    """False once peft has put layers of its own in their place; those compute themselves."""
    return all(isinstance(m, NF4Linear) for m in members)


class NF4LoRALinearGroup(nn.Module):
    """Linears that read one x, as one operation: one pass over x for the adapters, one product, one gradient of x.

    Args: members by name, `NF4Linear`s or `NF4LoRALinear`s, two or three: NF4LoRALinearGroup(q_proj=…, k_proj=…, v_proj=…).
        They stay layers of their own, under these names in the state dict.
    Returns of a forward: a tuple of [..., N_i], in the order of the arguments.
    Numerics: each output is that of its layer alone; dx is rounded once instead of once a layer. All members drop the same
        elements of x.
    Raises: ValueError for layers that differ in more than out_features, rank, scaling and bias values.
    """

    def __init__(self, **members: NF4Linear) -> None:
        super().__init__()
        if reason := why_not_together(list(members.values())):
            raise ValueError(f"members: {reason}")
        for name, member in members.items():
            self.add_module(name, member)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        members = list(self.children())
        return compute_together(members, x) if _all_ours(members) else tuple([m(x) for m in members])


class NF4LoRAGatedMLP(nn.Module):
    """down_proj(silu(gate_proj(x)) * up_proj(x)), gate and up as one operation with the SwiGLU in it, forward and backward.

    Raises: ValueError for gate and up layers that cannot be computed as one.
    """

    def __init__(self, gate_proj: NF4Linear, up_proj: NF4Linear, down_proj: nn.Module) -> None:
        super().__init__()
        if reason := why_not_together([gate_proj, up_proj]):
            raise ValueError(f"gate_proj, up_proj: {reason}")
        if gate_proj.out_features != up_proj.out_features:
            raise ValueError(f"found {gate_proj.out_features} and {up_proj.out_features} out_features, wanted the same")
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj

    def forward(self, x: Tensor) -> Tensor:
        members = [self.gate_proj, self.up_proj]
        if not _all_ours(members):
            return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(compute_together(members, x, swiglu=True))


class ComputeTogether:
    """Hooks of a block whose forward calls `members` on its own input: their outputs are computed before, as one."""

    def __init__(self, members: Sequence[NF4Linear]) -> None:
        self.members, self.useless = list(members), False

    def attach(self, block: nn.Module) -> None:
        block.register_forward_pre_hook(self.before, with_kwargs=True)
        block.register_forward_hook(self.after, always_call=True)

    def before(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("hidden_states")
        if not self.useless and not torch.compiler.is_compiling() and isinstance(x, Tensor):
            offer(self.members, x, compute_together(self.members, x))

    def after(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling():  # `before` offered nothing
            return
        if forget(self.members) and output is not None:
            self.useless = True
            warnings.warn(f"{type(block).__name__} does not call {self.members} on its input: not grouped any more", stacklevel=2)


def _is_grouped(block: nn.Module) -> bool:
    hooks = (getattr(hook, "__self__", None) for hook in block._forward_pre_hooks.values())
    return isinstance(block, (NF4LoRALinearGroup, NF4LoRAGatedMLP)) or any(isinstance(h, ComputeTogether) for h in hooks)


def group_blocks(model: nn.Module) -> dict[str, str]:
    """Group q, k, v and gate, up of every block of `model` that has them by these names, in place.

    An MLP of `GATED_MLPS` with SiLU becomes a `NF4LoRAGatedMLP`; other blocks keep their forward, which then finds the
    outputs of its layers computed. Parameters keep their names.
    Returns: name of each block -> "swiglu", "grouped", or why it is left as it was.
    """
    done = {}
    for name, block in list(model.named_modules()):
        for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            members = [getattr(block, n, None) for n in names]
            if _is_grouped(block) or not all(isinstance(m, NF4Linear) for m in members):
                continue
            if reason := why_not_together(members):
                done[name] = reason
            elif type(block).__name__ in GATED_MLPS and type(getattr(block, "act_fn", None)).__name__ in _SILU and name:
                model.set_submodule(name, NF4LoRAGatedMLP(*members, block.down_proj).train(block.training))
                done[name] = "swiglu"
            else:
                ComputeTogether(members).attach(block)
                done[name] = "grouped"
    return done
