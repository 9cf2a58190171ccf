"""Save and load the LoRA matrices of `NF4LoRALinear`s in PEFT's adapter format, which peft and vLLM read."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ..nn import NF4LoRALinear
from .checkpoint import JSON_LIMIT, CheckpointError, parse_json, parse_tensors, publish

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_HEADER_LIMIT = 10**8  # of safetensors
_UNSUPPORTED = {"use_dora": False, "bias": "none", "modules_to_save": None, "fan_in_fan_out": False, "lora_bias": False}


def lora_layers(model: nn.Module) -> dict[str, NF4LoRALinear]:
    """Path -> layer, of every `NF4LoRALinear` of rank 1 or more. Raises: ValueError if there is none."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, NF4LoRALinear) and m.r > 0}
    if not layers:
        raise ValueError("model: found no NF4LoRALinear with an adapter; nf4lora.nn.replace_linears puts them in")
    return layers


def save_adapter(model: nn.Module, directory: str | os.PathLike, base_model_name_or_path: str | None = None) -> None:
    """Write `adapter_model.safetensors`, `adapter_config.json` and `README.md`, all at once or not at all.

    Args:
        model:     holds `NF4LoRALinear`s; an existing `directory` is replaced
        base_model_name_or_path: the model the adapter belongs to, as peft is to find it
    Raises: ValueError (no adapter, or layers that PEFT's one configuration cannot describe); OSError
    """
    publish(directory, adapter_files(model, base_model_name_or_path))


def load_adapter(model: nn.Module, directory: str | os.PathLike) -> None:
    """Copy a saved adapter into `model`'s `NF4LoRALinear`s, bit for bit where dtypes agree.

    Raises: ValueError naming the keys that are missing, unexpected or of another shape, the layers of another scaling,
            or the file that is damaged or too large; the model is then as it was.
    """
    directory = Path(directory)
    numel = sum(p.numel() for p in _parameters(lora_layers(model)).values())
    files = {}
    for name, most in ((CONFIG, JSON_LIMIT), (WEIGHTS, _HEADER_LIMIT + 8 * numel)):
        path = directory / name
        if not path.is_file():
            raise ValueError(f"{path}: no such file; wanted a PEFT adapter folder with {CONFIG} and {WEIGHTS}")
        if (size := path.stat().st_size) > most:
            raise ValueError(f"{path}: {size} bytes, wanted at most {most}")
        files[name] = path.read_bytes()
    load_adapter_files(model, files, directory)


def adapter_files(model: nn.Module, base_model_name_or_path: str | None = None) -> dict[str, bytes]:
    """The files of `save_adapter`: name -> bytes. Tensors: `base_model.model.<path>.lora_A.weight` [r, K], `lora_B` [N, r]."""
    layers = lora_layers(model)
    return files_of(_parameters(layers), _config(model, layers, base_model_name_or_path))


def files_of(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, bytes]:
    """The files of an adapter, by the names of its tensors and its configuration as peft has them: name -> bytes."""
    tensors = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
    base, kind = config["base_model_name_or_path"], config["peft_type"]
    card = (
        f"---\nbase_model: {json.dumps(base)}\nlibrary_name: peft\ntags:\n- {kind.lower()}\n- nf4lora\n---\n\n"
        f"{kind} adapter, trained with nf4lora. Loads with `peft.PeftModel.from_pretrained`.\n"
    )
    weights = safetensors.torch.save(tensors, metadata={"format": "pt"})
    return {WEIGHTS: weights, CONFIG: json.dumps(config, indent=2).encode(), "README.md": card.encode()}


def load_adapter_files(model: nn.Module, files: dict[str, bytes], directory: str | os.PathLike) -> None:
    """`load_adapter` from bytes in memory; `directory` is named in errors."""
    layers = lora_layers(model)
    config_path, weights_path = Path(directory) / CONFIG, Path(directory) / WEIGHTS
    if absent := {CONFIG, WEIGHTS} - files.keys():
        raise CheckpointError(f"{directory}: no {', '.join(sorted(absent))}")
    _check_config(parse_json(files[CONFIG], config_path), layers, config_path)
    found, wanted = parse_tensors(files[WEIGHTS], weights_path), _parameters(layers)
    wrong = [f"missing {key}" for key in wanted.keys() - found.keys()]
    wrong += [f"unexpected {key}" for key in found.keys() - wanted.keys()]
    for key in wanted.keys() & found.keys():
        new, own = found[key], wanted[key]
        if new.shape != own.shape or not new.is_floating_point():
            wrong.append(f"{key} is {new.dtype} {list(new.shape)}, wanted a float {list(own.shape)}")
    if wrong:
        raise ValueError(f"{weights_path}: {'; '.join(sorted(wrong))}")
    with torch.no_grad():
        for key, parameter in wanted.items():
            parameter.copy_(found[key])


def _parameters(layers: dict[str, NF4LoRALinear]) -> dict[str, Tensor]:
    return {
        f"{_PREFIX}{path}.{name}.weight": getattr(layer, name)
        for path, layer in layers.items()
        for name in ("lora_A", "lora_B")
    }


def _config(model: nn.Module, layers: dict[str, NF4LoRALinear], base: str | None) -> dict[str, Any]:
    rslora = {layer.use_rslora for layer in layers.values()}
    if len(rslora) > 1:
        raise ValueError("model: found layers with and without use_rslora; PEFT's format has one setting for all")
    r, alpha, dropout = (
        Counter(getattr(layer, name) for layer in layers.values()).most_common(1)[0][0]
        for name in ("r", "lora_alpha", "lora_dropout")
    )
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
        "r": r, "lora_alpha": alpha, "lora_dropout": dropout, "use_rslora": rslora.pop(),
        "target_modules": _targets(model, layers),
        "rank_pattern": {path: layer.r for path, layer in layers.items() if layer.r != r},
        "alpha_pattern": {path: layer.lora_alpha for path, layer in layers.items() if layer.lora_alpha != alpha},
        "inference_mode": True, "init_lora_weights": True, **_UNSUPPORTED,
    }  # fmt: skip


def _targets(model: nn.Module, layers: dict[str, NF4LoRALinear]) -> list[str]:
    """Short names where they mean exactly these layers, as people write them; else whole paths."""
    names = {path.rsplit(".", 1)[-1] for path in layers}
    named = {path for path, _ in model.named_modules() if path.rsplit(".", 1)[-1] in names}
    return sorted(names if named == layers.keys() else layers)


def _check_config(config: dict[str, Any], layers: dict[str, NF4LoRALinear], path: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: found peft_type {config.get('peft_type')!r}, wanted 'LORA'")
    for key, wanted in _UNSUPPORTED.items():
        if config.get(key, wanted) != wanted:
            raise ValueError(
                f"{path}: found {key}={config[key]!r}, wanted {wanted!r}: NF4LoRALinear has no such adapter"
            )
    rslora = config.get("use_rslora", False)
    for name, layer in layers.items():
        r = _of_layer(config, "rank_pattern", name, config.get("r"))
        alpha = _of_layer(config, "alpha_pattern", name, config.get("lora_alpha"))
        if (r, alpha, rslora) != (layer.r, layer.lora_alpha, layer.use_rslora):
            raise ValueError(
                f"{path}: found r={r}, lora_alpha={alpha}, use_rslora={rslora} for {name}, "
                f"which has r={layer.r}, lora_alpha={layer.lora_alpha}, use_rslora={layer.use_rslora}"
            )


def _of_layer(config: dict[str, Any], pattern: str, name: str, default: Any) -> Any:
    values = config.get(pattern) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{CONFIG}: found {pattern} {values!r}, wanted an object")
    return next((value for key, value in values.items() if name == key or name.endswith("." + key)), default)
