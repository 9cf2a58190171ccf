"""Modules of experts as transformers has them, computed on 4-bit stacks: one by one, or in their own forward on decoded stacks."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import checks
from .experts import NF4Experts, class_of

_UP, _DOWN = ("gate_up_proj", "up_proj"), "down_proj"


class NF4RoutedExperts(NF4Experts):
    """down(gate(up(x))) of the experts each token is routed to, weighted and summed: one product after another, none decoded.

    What transformers' `use_experts_implementation` promises of a class: `gate_up_proj` or `up_proj`, `down_proj`, their
    biases, `_apply_gate` or `act_fn`, `post_expert_norm`. Tokens are sorted by expert: one synchronization a forward.
    """

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states float [..., H], top_k_index int64 [tokens, k], top_k_weights float [tokens, k] -> [..., H] in x's dtype.

        Numerics: products as in `NF4Linear`; a token's k weighted outputs are summed in float32 and rounded once. An index
        past the last expert, which expert parallelism gives to those of other devices, adds nothing.
        """
        if top_k_weights.shape != top_k_index.shape:
            raise ValueError(
                f"top_k_weights: found shape {tuple(top_k_weights.shape)}, wanted {tuple(top_k_index.shape)} like top_k_index"
            )
        x, ids = hidden_states.reshape(-1, hidden_states.shape[-1]), top_k_index.reshape(-1)
        experts, order = self.stacks[_DOWN][0], ids.argsort(stable=True)
        counts = ids.bincount(minlength=experts).tolist()
        groups = x[order // top_k_index.shape[-1]].split(counts)
        parts = [
            self._one(rows, e) if e < experts else rows.new_zeros(rows.shape)
            for e, rows in enumerate(groups)
            if rows.shape[0]
        ]
        if not parts:
            return torch.zeros_like(hidden_states)
        y = torch.cat(parts) * top_k_weights.reshape(-1, 1)[order]
        y = torch.zeros_like(y).index_copy(0, order, y).view(*hidden_states.shape[:-1], top_k_index.shape[-1], -1)
        return y.sum(-2).to(hidden_states.dtype)

    def _one(self, x: Tensor, e: int) -> Tensor:
        up = next(name for name in _UP if name in self.stacks)
        y = self.expert_linear(x, up, e, self._bias(up, e))
        if up == _UP[1]:
            y = self.act_fn(y)
        elif hasattr(self, "_apply_gate"):
            y = self._apply_gate(y)
        else:  # transformers 5.0 leaves what is usual unsaid
            gate, y = y.chunk(2, -1)
            y = self.act_fn(gate) * y
        y = self.expert_linear(y, _DOWN, e, self._bias(_DOWN, e))
        return self.post_expert_norm(y) if getattr(self, "has_post_expert_norm", False) else y

    def _bias(self, name: str, e: int) -> Tensor | None:
        stack = getattr(self, f"{name}_bias", None)
        return None if stack is None else stack[e]


class NF4DecodedExperts(NF4Experts):
    """A class with a forward of its own, such as Llama 4's: called on the decoded stacks, which last as long as the call.

    Autograd keeps no decoded weight: where it would, the backward decodes those experts again.
    """

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As that of `dense_class`, on x and stacks in x's dtype or `compute_dtype`, -> x's dtype; with autocast as the class does."""
        dtype, device = hidden_states.dtype, hidden_states.device.type
        autocast = torch.is_autocast_enabled(device)
        decoded = _Decoded(self, torch.get_autocast_dtype(device) if autocast else self.compute_dtype or dtype)
        with decoded.saving_none():
            y = self.dense_class.forward(
                decoded, hidden_states if autocast else hidden_states.to(decoded.dtype), *args, **kwargs
            )
        return y if autocast else y.to(dtype)


class _Decoded:
    """Stands in for a module within its forward: the stacks are decoded at the first look, all else is the module's."""

    def __init__(self, module: NF4Experts, dtype: torch.dtype) -> None:
        self.module, self.dtype, self.found = module, dtype, {}

    def __getattr__(self, name: str) -> Any:
        if name not in self.module.stacks:
            return getattr(self.module, name)
        if name not in self.found:
            self.found[name] = self.module.dequantize(name, self.dtype)
        return self.found[name]

    def saving_none(self) -> AbstractContextManager:
        if not torch.is_grad_enabled():
            return nullcontext()
        # Those around, such as checkpointing's, which these hide
        pack, unpack = torch._C._autograd._top_saved_tensors_default_hooks(False) or (_itself, _itself)
        return torch.autograd.graph.saved_tensors_hooks(
            lambda t: self.recipe(t) or pack(t), lambda saved: _decode(saved) if isinstance(saved, _View) else unpack(saved)
        )

    def recipe(self, t: Tensor) -> "_View | None":
        """How a view of a decoded stack is made again; None for any other tensor."""
        for name, whole in self.found.items():
            if t.dtype == whole.dtype and t.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr():
                return _View(self.module, name, t.dtype, t.shape, t.stride(), t.storage_offset())
        return None


class _View(NamedTuple):
    module: NF4Experts
    name: str
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


def _itself(t: Any) -> Any:
    return t


def _decode(view: _View) -> Tensor:
    module, name, dtype, shape, stride, offset = view
    _, a, b = module.stacks[name]
    if 0 in shape:
        return torch.empty(shape, dtype=dtype, device=getattr(module, name).device)
    first, past = (
        offset // (a * b),
        (offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))) // (a * b) + 1,
    )
    whole = torch.stack([module.dequantize_expert(name, e, dtype) for e in range(first, past)])
    return whole.as_strided(shape, stride, offset - first * a * b)


def expert_stacks(module: nn.Module) -> list[str]:
    """Names of the 3-D float weights of a module of experts, as transformers 5 writes them; none for any other module.

    That is a class that `use_experts_implementation` wraps, or one whose name ends with Experts.
    """
    if isinstance(module, NF4Experts):
        return []
    names = [
        n for n, p in module.named_parameters(recurse=False) if p.ndim == 3 and p.is_floating_point() and p.numel()
    ]
    return names if _is_routed(module, names) or type(module).__name__.endswith("Experts") else []


def as_experts(
    module: nn.Module, blocksize: int = 64, quant_type: str = "nf4", double_quant: bool = True,
    compute_dtype: torch.dtype | None = None,
) -> NF4Experts:  # fmt: skip
    """Turn a module of experts into `NF4Experts` where it is; its stacks are float until `quantize_` or a loader.

    Args: as those of `NF4Linear`. Returns: `module`, of a subclass of its class.
    Raises: ValueError, TypeError naming the argument; TypeError for a module without `expert_stacks`, or float64 stacks.
    """
    checks.format(blocksize, quant_type)
    names = expert_stacks(module)
    if not names:
        raise TypeError(f"module: found {type(module).__name__}, wanted a module of experts with 3-D float weights")
    dtypes = {name: getattr(module, name).dtype for name in names}
    for name, value in (*dtypes.items(), ("compute_dtype", compute_dtype or torch.float32)):
        if value not in checks.FLOATS:
            raise TypeError(f"{name}: found {value}, wanted one of {checks.FLOATS}")
    module.transposed = _is_routed(module, names) and _is_transposed(module, names)
    module.stacks = {name: tuple(getattr(module, name).shape) for name in names}
    module.blocksize, module.quant_type, module.double_quant = blocksize, quant_type, double_quant
    module.compute_dtype, module.weight_dtype = compute_dtype, dtypes[names[0]]
    module.__class__ = class_of(NF4RoutedExperts if _is_routed(module, names) else NF4DecodedExperts, type(module))
    return module


def _is_routed(module: nn.Module, names: list[str]) -> bool:
    wrapped = hasattr(type(module).forward, "__wrapped__")
    return wrapped and len(names) == 2 and _DOWN in names and any(name in names for name in _UP)


def _is_transposed(module: nn.Module, names: list[str]) -> bool:
    """Whether weight[e] is [in, out]; transformers 5.0 leaves the shapes to tell."""
    if (said := getattr(module, "is_transposed", None)) is not None:
        return said
    up, down = (getattr(module, next(n for n in names if (n == _DOWN) == is_down)).shape for is_down in (False, True))
    return up[1] == down[2] and up[2] != down[1]
