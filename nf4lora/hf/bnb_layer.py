"""What of a `bitsandbytes.nn.Linear4bit`, and of peft's LoRA on one, is ours to compute: read in place, or left alone."""

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .. import operands
from ..codebook import NESTED_BLOCKSIZE, QUANT_TYPES, codebook

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Of each layer whose tables were compared: the tables, and whether they are ours. A comparison waits for the device.
_compared: "WeakKeyDictionary[nn.Module, tuple[Tensor, Tensor | None, bool]]" = WeakKeyDictionary()


class Weight(NamedTuple):
    """The 4-bit weight of a layer of bitsandbytes, in its memory, as `autograd.linear` takes it."""

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    blocksize: int
    quant_type: str


class Adapter(NamedTuple):
    """The active adapters of a layer, as one."""

    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    scaling: float = 1.0
    dropout_p: float = 0.0


def weight_of(base: Any, x: Tensor) -> Weight | None:
    """The weight of a layer, if it and x are of the kinds that our kernels take."""
    if type(x) not in (Tensor, nn.Parameter) or x.dtype not in operands.FLOATS or x.is_meta:
        return None
    if x.ndim == 0 or x.shape[-1] != base.in_features or (weight := held_weight(base)) is None:
        return None
    return weight if x.device == weight.packed.device else None


def held_weight(base: Any) -> Weight | None:
    """The weight of a layer, if all that the layer is and holds is of the kinds that our kernels take."""
    w, bias = base._parameters.get("weight"), base._parameters.get("bias")
    state = getattr(w, "quant_state", None)
    if (
        state is None
        or getattr(state, "packing_format_for_cpu", False)
        or base.compute_dtype not in (None, *operands.FLOATS)
    ):
        return None
    with torch._C.DisableTorchFunctionSubclass():
        packed = w.data
    if packed.is_meta or not packed.is_contiguous() or tuple(state.shape) != (base.out_features, base.in_features):
        return None
    if state.nested and state.state2.blocksize != NESTED_BLOCKSIZE or not _same_tables(base, state):
        return None
    nested = (state.state2.absmax, state.offset) if state.nested else (None, None)
    packed = packed.view(-1).view(torch.uint8).unsqueeze(1)
    weight = Weight(packed, state.absmax, *nested, state.blocksize, state.quant_type)
    try:
        operands.weight(*weight[:4], base.out_features * base.in_features, *weight[4:])
        if bias is not None:
            operands.tensor("bias", bias, operands.FLOATS, base.out_features, packed)
    except (TypeError, ValueError):
        return None
    return weight


def _same_tables(base: nn.Module, state: Any) -> bool:
    code, nested = state.code, state.state2.code if state.nested else None
    known = _compared.get(base)
    if known is None or known[0] is not code or known[1] is not nested:
        same = state.quant_type in QUANT_TYPES and torch.equal(code.float().cpu(), codebook(state.quant_type))
        if same and nested is not None:
            same = torch.equal(nested.float().cpu(), codebook("dynamic"))
        known = _compared[base] = code, nested, same
    return known[2]


def adapter_of(layer: Any, x: Tensor) -> Adapter | None:
    """The active adapters of peft's layer as one, if all are plain LoRA."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    found = [(layer.lora_A[name], layer.lora_B[name], layer.scaling[name], layer.lora_dropout[name]) for name in names]
    if (
        not names
        or any(name in layer.lora_variant for name in names)
        or not getattr(layer, "cast_input_dtype_enabled", True)
    ):
        return None
    for A, B, _, dropout in found:
        plain = (
            type(A) is type(B) is nn.Linear and A.bias is B.bias is None and type(dropout) in (nn.Identity, nn.Dropout)
        )
        if not plain or not all(map(nobody_listens, (A, B, dropout))):
            return None
        if any(t.dtype not in operands.FLOATS or t.device != x.device for t in (A.weight, B.weight)):
            return None
    p = [dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0 for *_, dropout in found]
    if max(p) >= 1 or any(p) and len(found) > 1:
        return None
    As, Bs, scalings = [A.weight for A, *_ in found], [B.weight for _, B, *_ in found], [s for *_, s, _ in found]
    if len(found) == 1:
        return Adapter(As[0], Bs[0], scalings[0], p[0])
    return Adapter(torch.cat(As), torch.cat([B * s for B, s in zip(Bs, scalings, strict=True)], 1))


def nobody_listens(module: nn.Module) -> bool:
    """No hook would miss a call of this module; those by which accelerate only puts x on the layer's device may."""
    if any(getattr(module, name) for name in _HOOKS):
        return False
    hook = vars(module).get("_hf_hook")
    return "forward" not in vars(module) or type(hook).__name__ == "AlignDevicesHook" and not hook.offload


def keeps_dtype(x: Tensor) -> bool:
    """Whether peft's sum of x's dtype and CUDA autocast's, which it does not cast back, is of x's dtype."""
    return not torch.is_autocast_enabled() or torch.promote_types(x.dtype, torch.get_autocast_dtype("cuda")) == x.dtype
