"""A model that bitsandbytes holds in 4 bits becomes one of ours where it is: the same bytes under `NF4Linear`s."""

from typing import Any

import torch
from accelerate.hooks import add_hook_to_module
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..nn import NF4Linear
from .bnb_layer import Weight, held_weight
from .config import NF4Config
from .loaded import not_converted, one_format
from .quantizer import NF4Quantizer


def from_bitsandbytes_(model: nn.Module) -> nn.Module:
    """Put `NF4Linear`s in the place of every `bitsandbytes.nn.Linear4bit`, on its bytes: no tensor is copied.

    transformers then takes the model for one that `NF4Config` loaded: it saves, trains and dequantizes it as such.
    Returns: `model`
    Raises:  ValueError, with nothing changed, for a model without such layers, with adapters of peft (call it before
             `get_peft_model`), in two 4-bit formats, and for a layer that is not quantized yet, or that bitsandbytes has
             repacked for a CPU.
    """
    from bitsandbytes.nn import Linear4bit

    layers = {name: m for name, m in model.named_modules() if isinstance(m, Linear4bit)}
    if not layers or "" in layers:
        raise ValueError(
            f"model: found {type(model).__name__}, wanted a model with layers of bitsandbytes.nn.Linear4bit in it"
        )
    if adapted := [name for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]:
        raise ValueError(
            f"{adapted[0]}: found an adapter of peft on a layer of bitsandbytes; convert the model before get_peft_model"
        )
    weights = {name: held_weight(m) for name, m in layers.items()}
    if strange := [name for name, weight in weights.items() if weight is None]:
        raise ValueError(
            f"{strange[0]}: found a weight that is not quantized, or not in a format of ours; move the model to a device"
        )
    formats = {name: (w.quant_type, w.blocksize, w.offset is not None) for name, w in weights.items()}
    if len(set(formats.values())) > 1:
        raise ValueError(
            f"model: found 4-bit formats {sorted(set(formats.values()))} (quant_type, blocksize, double_quant), wanted one"
        )
    for name, weight in weights.items():
        model.set_submodule(name, made := _ours(layers[name], weight))
        if hook := vars(layers[name]).get("_hf_hook"):
            add_hook_to_module(made, hook)
    if hasattr(model, "hf_quantizer"):
        _tell_transformers(model)
    return model


def _ours(layer: Any, weight: Weight) -> NF4Linear:
    double_quant = weight.offset is not None
    made = NF4Linear(
        layer.in_features, layer.out_features, layer.bias is not None, blocksize=weight.blocksize, quant_type=weight.quant_type,
        double_quant=double_quant, compute_dtype=layer.compute_dtype, device="meta", dtype=layer.weight.quant_state.dtype,
    )  # fmt: skip
    made._freeze("weight", weight.packed)
    made._freeze("weight_absmax", weight.absmax if double_quant else weight.absmax.view(torch.int32))
    if double_quant:
        made._freeze("weight_nested_absmax", weight.nested_absmax.view(torch.int32))
        made._freeze("weight_nested_offset", weight.offset.reshape(1).view(torch.int32))
    if layer.bias is not None:
        made.bias = layer.bias
    made._is_hf_initialized = True
    return made.train(layer.training)


def _tell_transformers(model: nn.Module) -> None:
    compute = {m.compute_dtype for m in model.modules() if isinstance(m, NF4Linear)}
    config = NF4Config(
        **one_format(model), compute_dtype=compute.pop() if len(compute) == 1 else None,
        modules_to_not_convert=not_converted(model),
    )  # fmt: skip
    model.config.quantization_config = config
    model.hf_quantizer = NF4Quantizer(config, pre_quantized=True)
    model.quantization_method = config.quant_method
    for name in ("is_loaded_in_4bit", "is_4bit_serializable"):
        vars(model).pop(name, None)
    # steps by which bitsandbytes' checkpoints are read, and which saving would run backwards
    model._weight_conversions = [
        c for c in getattr(model, "_weight_conversions", None) or ()
        if not any(type(o).__name__ == "Bnb4bitDeserialize" for o in getattr(c, "operations", ()))
    ]  # fmt: skip
