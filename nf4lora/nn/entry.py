"""The door of every forward: x checked against the layer, in the dtype to compute in."""

from typing import Any

import torch
from torch import Tensor, nn

from .. import checks


def held(layer: nn.Module, *names: str) -> tuple[Any, ...]:
    """Parameters of a layer, past the look-up of `nn.Module`, which finds them last; or what stands in their place."""
    p = layer._parameters
    try:
        return tuple([p[name] for name in names])
    except KeyError:
        return tuple([getattr(layer, name, None) for name in names])


def entered(layer: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, torch.dtype]:
    """x in the dtype to compute in, and the dtype of the output, as the table of `nf4lora.nn` has them."""
    dtype = x.dtype
    if x.ndim == 0 or x.shape[-1] != layer.in_features:
        raise ValueError(f"{layer}: found x of shape {tuple(x.shape)}, wanted [..., {layer.in_features}]")
    if dtype not in checks.FLOATS and dtype not in checks.float_dtypes():
        raise TypeError(f"{layer}: found x of {dtype}, wanted one of {checks.float_dtypes()}")
    if weight.dtype != torch.uint8 or weight.is_meta and not x.is_meta:
        raise RuntimeError(f"{layer} holds no 4-bit weight yet: call quantize_(weight), from_linear or load_state_dict")
    compute, device = layer.compute_dtype or dtype, x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        compute = dtype = torch.get_autocast_dtype(device)
    return x if x.dtype == compute else x.to(compute), dtype
