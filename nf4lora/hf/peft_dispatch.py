"""peft on our base: `install()` makes every way of peft to an adapter give `NF4LoraLinear` on an `NF4Linear`, and nothing else."""

import warnings
from contextvars import ContextVar
from typing import Any

import peft.peft_model
import peft.tuners.lora.model
import peft.tuners.tuners_utils
import peft.utils.hotswap
import peft.utils.save_and_load
import transformers.integrations.peft
import transformers.modeling_utils
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn

from ..nn import NF4Linear, NF4LoRALinear
from ..nn.experts import NF4Experts
from . import peft_adalora, peft_merge
from .hooks import Hooks
from .peft_lora import NF4LoraLinear

# Starts that peft computes from the base's weight, or takes out of it, as if it were floats.
_STARTS_WHILE_QUANTIZING = tuple(f"init_lora_weights='{kind}" for kind in ("pissa", "olora", "loftq", "orthogonal"))
_STARTS_OF_FLOATS = ("kasa_config", *(f"init_lora_weights='{kind}'" for kind in ("corda", "lora_ga", "mica")))
_hooks = Hooks()
_on_our_base: ContextVar[bool] = ContextVar("nf4lora_on_our_base", default=False)


def install() -> None:
    """Hook peft, once: get_peft_model, from_pretrained, load_adapter and add_adapter, of peft's models and of transformers'.

    What they refuse on our base, each with a ValueError that says what to do: an adapter in a pickle file; `modules_to_save`
    that are in 4 bits; a second LoRA beside one of `NF4LoRALinear`; starts that need a weight in floats.
    """
    if _hooks:
        return
    _hooks.around(peft.tuners.lora.model, "dispatch_default", _dispatch)
    _hooks.around(BaseTuner, "inject_adapter", _inject)
    _hooks.around(peft.peft_model.PeftModel, "load_adapter", _load)
    _hooks.around(peft.utils.hotswap, "hotswap_adapter", _load)
    _hooks.around(transformers.integrations.peft.PeftAdapterMixin, "load_adapter", _load)
    _hooks.around(peft.utils.save_and_load, "torch_load", _read_pickle)
    _hooks.around(transformers.modeling_utils, "_get_resolved_checkpoint_files", _find_files)
    peft_adalora.install()
    peft_merge.install(_hooks)


def uninstall() -> None:
    """Take all of `install()` back; layers that it made stay."""
    _hooks.remove()
    peft_adalora.uninstall()


def _dispatch(
    original: Any, target: nn.Module, adapter_name: str, config: Any, parameter_name: Any = None, **kwargs: Any
) -> Any:
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if isinstance(base, NF4Experts) and parameter_name in base.stacks:
        raise ValueError(
            f"{kwargs.get('target_name', '')}.{parameter_name}: found a stack of experts in 4 bits, which takes no adapter; name "
            "the layers to adapt instead, as in target_modules=['q_proj', 'k_proj', 'v_proj', 'o_proj']"
        )
    if not isinstance(base, NF4Linear):
        return original(target, adapter_name, config=config, parameter_name=parameter_name, **kwargs)
    name = kwargs.get("target_name", "")
    if parameter_name is not None:
        raise ValueError(f"target_parameters: found {name} in 4 bits; name the layer in target_modules instead")
    start = f"init_lora_weights={config.init_lora_weights!r}"
    if start.lower().startswith(_STARTS_WHILE_QUANTIZING):
        raise ValueError(
            f"{name}: found {start}, computed from a weight in 16 bits; nf4lora.hf.quantize_with_start does, as it quantizes"
        )
    start = "kasa_config" if getattr(config, "kasa_config", None) else start
    if start.lower().startswith(_STARTS_OF_FLOATS):
        raise ValueError(
            f"{name}: found {start}, which is computed from the weight in floats, but it is in 4 bits; leave it out"
        )
    config.fan_in_fan_out = False  # whatever the layer was before, its weight is [N, K] now
    return NF4LoraLinear(target, adapter_name, config=config, **kwargs)


def _inject(original: Any, tuner: BaseTuner, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
    named = dict(model.named_modules())
    config = tuner.peft_config[adapter_name]
    if PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type) == "lora_":
        own = [name for name, m in named.items() if isinstance(m, NF4LoRALinear) and m.r]
        if own:
            raise ValueError(
                f"{own[0]} and {len(own) - 1} more are NF4LoRALinears, which hold an adapter that peft would not save; make the "
                "base with replace_linears(model, layer=NF4Linear), or put layer.merge() in their place first"
            )
    for name in getattr(config, "modules_to_save", None) or ():
        for path, module in named.items():
            if (path == name or path.endswith("." + name)) and _packed(module):
                raise ValueError(
                    f"modules_to_save: found {path} in 4 bits, which cannot learn; keep it in 16 bits with "
                    f"NF4Config(modules_to_not_convert=[{name!r}]), or give it an adapter through target_modules"
                )
    _adapt_linears_only(tuner.peft_config[adapter_name], model)
    return original(tuner, model, adapter_name, *args, **kwargs)


def _adapt_linears_only(config: Any, model: nn.Module) -> None:
    """Settle "all-linear" beside experts in 4 bits: peft would have it mean their stacks too, which take no adapter."""
    targets = getattr(config, "target_modules", None)
    if not isinstance(targets, str) or targets.lower() != INCLUDE_LINEAR_LAYERS_SHORTHAND:
        return
    stacks = [f"{name}.{stack}" for name, m in model.named_modules() if isinstance(m, NF4Experts) for stack in m.stacks]
    if stacks:
        peft.tuners.tuners_utils._maybe_include_all_linear_layers(config, model)
        warnings.warn(
            f"target_modules='all-linear': {len(config.target_modules)} linears get an adapter; {stacks[0]} and {len(stacks) - 1} "
            "more stacks of experts, in 4 bits, do not",
            stacklevel=2,
        )


def _load(original: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    token = _on_our_base.set(_packed(model))
    try:
        return original(model, *args, **kwargs)
    finally:
        _on_our_base.reset(token)


def _read_pickle(original: Any, file: Any, *args: Any, **kwargs: Any) -> Any:
    _refuse_pickle(file)
    return original(file, *args, **kwargs)


def _find_files(original: Any, *args: Any, **kwargs: Any) -> Any:
    files, metadata = original(*args, **kwargs)
    for file in files or ():
        if not str(file).endswith(".safetensors"):
            _refuse_pickle(file)
    return files, metadata


def _refuse_pickle(file: Any) -> None:
    if _on_our_base.get():
        raise ValueError(
            f"{file}: found an adapter in a pickle file, which can run code; load it with peft on a 16-bit model you trust it "
            "with, and save_pretrained writes it as adapter_model.safetensors"
        )


def _packed(module: nn.Module) -> bool:
    return any(isinstance(m, (NF4Linear, NF4Experts)) for m in module.modules())
