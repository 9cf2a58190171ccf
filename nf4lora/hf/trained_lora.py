"""Trained LoRA adapters, in a model of peft or in a folder of its format, as plain matrices."""

import copy
import math
from pathlib import Path
from typing import Any, NamedTuple

from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from .adapter import CONFIG, WEIGHTS
from .checkpoint import parse_tensors

# Settings of a LoRA adapter that P Λ Q has no place for.
_MORE_THAN_BA = (
    "use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication",
    "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
_ON_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")  # starts that leave the base as it is
_PREFIX = "base_model.model."


class Trained(NamedTuple):
    """A LoRA adapter: its configuration, and layer -> A [r, K], B [N, r], scaling."""

    config: LoraConfig
    layers: dict[str, tuple[Tensor, Tensor, float]]


def in_model(model: nn.Module) -> tuple[str, Trained]:
    """The name and the matrices of the one LoRA adapter of a PeftModel. Raises: as `continue_as_adalora`."""
    tuner = getattr(model, "base_model", None)
    if not isinstance(model, PeftModel) or not isinstance(tuner, LoraModel) or isinstance(tuner, AdaLoraModel):
        raise TypeError(
            f"model: found {type(model).__name__}, wanted a PeftModel with a LoRA adapter, or adapter= a folder of one"
        )
    if len(model.peft_config) != 1:
        raise ValueError(
            f"model: found the adapters {sorted(model.peft_config)}, wanted one; delete_adapter removes the others"
        )
    ((name, config),) = model.peft_config.items()
    check_settings(config)
    layers = {}
    for path, layer in tuner.model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if (
            layer.merged
            or name in layer.lora_variant
            or name not in layer.lora_A
            or not _is_linear(layer.get_base_layer())
        ):
            raise ValueError(
                f"{path}: found {type(layer).__name__} on {type(layer.get_base_layer()).__name__}"
                f"{', merged' if layer.merged else ''}; wanted plain LoRA, not merged, on linear layers only"
            )
        layers[path] = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    return name, Trained(config, layers)


def in_folder(model: nn.Module, folder: Path) -> Trained:
    """A LoRA adapter on disk, for `model`, which is left as it is. Raises: as `continue_as_adalora`."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder / name}: no such file; wanted a PEFT adapter folder with {CONFIG} and {WEIGHTS}, no pickle"
            )
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig) or isinstance(config, AdaLoraConfig):
        raise ValueError(f"{folder / CONFIG}: found peft_type {config.peft_type}, wanted LORA")  # noqa: TRY004 (a file's content)
    if config.init_lora_weights not in _ON_THE_BASE:
        raise ValueError(
            f"{folder / CONFIG}: found init_lora_weights={config.init_lora_weights!r}, which changes the base the adapter belongs "
            "to; wanted the PeftModel as it was trained"
        )
    check_settings(config)
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, t in parse_tensors((folder / WEIGHTS).read_bytes(), folder / WEIGHTS).items():
        path, _, part = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        pairs.setdefault(path, {})[part] = t
    layers, wrong = {}, sorted(named(config, model) - pairs.keys())
    wrong = [f"nothing for {path}" for path in wrong]
    for path, parts in sorted(pairs.items()):
        linear, A, B = _at(model, path), parts.get("lora_A"), parts.get("lora_B")
        if (
            not _is_linear(linear)
            or parts.keys() != {"lora_A", "lora_B"}
            or A.ndim != 2
            or B.ndim != 2
            or A.shape[0] != B.shape[1]
        ):
            wrong.append(f"{sorted(parts)} for {path}, which is {type(linear).__name__} in the model")
        elif (B.shape[0], A.shape[1]) != (linear.out_features, linear.in_features):
            wrong.append(
                f"{path} for [{B.shape[0]}, {A.shape[1]}], where the model has [{linear.out_features}, {linear.in_features}]"
            )
        else:
            alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), path), config.lora_alpha)
            device = linear.weight.device
            layers[path] = A.to(device), B.to(device), alpha / (math.sqrt(len(A)) if config.use_rslora else len(A))
    if wrong:
        raise ValueError(f"{folder}: the adapter belongs to another model: found {'; '.join(wrong[:5])}")
    return Trained(config, layers)


def check_settings(config: LoraConfig) -> None:
    """Raises: ValueError for an adapter that is more than scaling * B A."""
    found = {name: value for name in _MORE_THAN_BA if (value := getattr(config, name, None))}
    if config.bias != "none":
        found["bias"] = config.bias
    if found:
        raise ValueError(
            f"LoRA adapter: found {found}, which the form P Λ Q has no place for; wanted plain scaling * B A"
        )


def named(config: Any, model: nn.Module) -> set[str]:
    """Paths of the linear layers, with an adapter or without, that a configuration of peft means."""
    config = _maybe_include_all_linear_layers(copy.copy(config), model)
    inside = tuple(f"{path}." for path, m in model.named_modules() if isinstance(m, LoraLayer))
    linears = [path for path, m in model.named_modules() if _is_linear(m) or isinstance(m, LoraLayer)]
    return {path for path in linears if not path.startswith(inside) and check_target_module_exists(config, path)}


def _is_linear(module: Any) -> bool:
    return isinstance(module, nn.Linear)


def _at(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None
