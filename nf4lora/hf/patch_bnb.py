"""`patch_bitsandbytes`: our kernels under bitsandbytes' own layers, for scripts with `BitsAndBytesConfig(load_in_4bit=True)`."""

import gc
import importlib.util
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .. import autograd
from .bnb_layer import Adapter, Weight, adapter_of, keeps_dtype, nobody_listens, weight_of

_originals: dict[Callable[..., Tensor], Callable[..., Tensor]] = {}  # by the forward in its place


def patch_bitsandbytes() -> None:
    """Let `bitsandbytes.nn.Linear4bit` and peft's LoRA on it compute with our kernels, in models there are and to come.

    x float32, bfloat16 or float16 [..., K] -> x's dtype [..., N]. The bytes stay where they are and nothing is kept beside
    them; results have the bits of our `NF4Linear` on the same bytes, and one call computes a layer with all active adapters.
    Computed in the layer's compute_dtype, under autocast too, as bitsandbytes does; and so are adapters, which peft computes in
    a dtype of their own. Dropout in training draws a mask of its own, from one number of torch's generator. bitsandbytes
    repacks weights in evaluation where a processor has AVX512-BF16, which rounds them; those computed here stay as they are.
    What is not exactly ours goes to the forward that was there: tables that are not NF4, FP4 and the dynamic map, a weight
    not quantized yet or repacked, DoRA and its like, adapter_names, lora_bias, several adapters with dropout, hooks within a
    layer, torch.compile. A second call changes nothing.
    Raises: ImportError without bitsandbytes; RuntimeError for a bitsandbytes or peft whose layers are others, with nothing patched.
    """
    for cls, made in _layers():
        if (original := cls.forward) not in _originals:
            cls.forward = made(original)
            _originals[cls.forward] = original
            _bind_again(original, cls.forward)


def unpatch_bitsandbytes() -> None:
    """Undo `patch_bitsandbytes`; nothing where it was not called."""
    for cls, _ in _layers():
        if original := _originals.pop(ours := cls.forward, None):
            cls.forward = original
            _bind_again(ours, original)


def _layers() -> list[tuple[Any, Callable[..., Any]]]:
    """Each class to patch, and what makes its forward from the one it has."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise ImportError(
            "patch_bitsandbytes: found no bitsandbytes to patch; load the model with NF4Config instead"
        ) from error
    found = [("bitsandbytes", bitsandbytes, getattr(bitsandbytes.nn, "Linear4bit", None), _base, ("self", "x"))]
    if importlib.util.find_spec("peft"):
        import peft.tuners.lora.bnb

        layer = getattr(peft.tuners.lora.bnb, "Linear4bit", None)
        found.append(("peft", peft, layer, _lora, ("self", "x", "args", "kwargs")))
    for name, package, cls, _, wanted in found:
        forward = getattr(cls, "forward", None)
        if forward is None or tuple(inspect.signature(forward).parameters) != wanted:
            raise RuntimeError(
                f"patch_bitsandbytes: found {name} {package.__version__}, without a Linear4bit.forward({', '.join(wanted)}), "
                "and patched nothing; it is tested with bitsandbytes 0.50 and peft 0.21. Or load the model with NF4Config"
            )
    return [(cls, made) for *_, cls, made, _ in found]


def _bind_again(old: Any, new: Any) -> None:
    """accelerate's hooks keep the forward that a layer had when they came."""
    for method in gc.get_referrers(old):
        if isinstance(method, MethodType) and isinstance(method.__self__, nn.Module):
            kept = vars(method.__self__)
            if kept.get("_old_forward") is method:
                kept["_old_forward"] = MethodType(new, method.__self__)


# ---- forwards


def _base(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(original)
    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or (weight := weight_of(self, x)) is None:
            return original(self, x)
        return _computed(self, x, weight, Adapter())

    return forward


def _lora(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(original)
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or torch.compiler.is_compiling() or self.disable_adapters or self.merged:
            return original(self, x, *args, **kwargs)
        base = self.base_layer
        if type(base).forward not in _originals or not nobody_listens(base) or not keeps_dtype(x):
            return original(self, x)
        if (weight := weight_of(base, x)) is None or (adapter := adapter_of(self, x)) is None:
            return original(self, x)
        return _computed(base, x, weight, adapter)

    return forward


def _computed(base: Any, x: Tensor, weight: Weight, adapter: Adapter) -> Tensor:
    if not base.compute_type_is_set:  # the first x decides, as in bitsandbytes
        base.set_compute_type(x)
        base.compute_type_is_set = True
    *tensors, blocksize, quant_type = weight
    lora_A, lora_B, scaling, dropout_p = adapter
    seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device) if dropout_p else None
    device = x.device.type
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
        y = autograd.linear(
            x.to(base.compute_dtype or x.dtype), *tensors, base.bias, lora_A, lora_B, seed,
            base.out_features, blocksize, quant_type, scaling, dropout_p,
        )  # fmt: skip
    return y.to(x.dtype)
