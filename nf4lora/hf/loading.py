"""`from_pretrained`: a model in 4 bits from whatever checkpoint there is: 16-bit, ours, or bitsandbytes' own."""

import copy
import os
import warnings
from typing import Any

from peft import PeftConfig
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import find_adapter_config_file

from . import quantizer  # noqa: F401 (registers itself)
from .config import METHOD, NF4Config
from .shards import check_folder

# Of the keyword arguments, what says where files are
_HUB = (
    "cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token", "trust_remote_code",
    "code_revision",
)  # fmt: skip
_NOT_OF_THE_CONFIG = ("dtype", "torch_dtype", "attn_implementation", "name_or_path")


def from_pretrained(
    path: str | os.PathLike, quantization_config: NF4Config | None = None, model_class: Any = AutoModelForCausalLM, **kwargs: Any
) -> PreTrainedModel:  # fmt: skip
    """`model_class.from_pretrained`, with linears in 4 bits whatever the checkpoint holds.

    Args:
        path:                a folder or the name of a model: in 16 bits (quantized while it is read), of nf4lora, or quantized
                             to 4 bits by bitsandbytes (its bytes as they are; what is then saved is nf4lora's)
        quantization_config: NF4Config() by default. Over a checkpoint in 4 bits its compute_dtype counts, all else is
                             the checkpoint's own
        model_class:         an Auto class or a model's
        kwargs:              dtype, device_map, …: as transformers has them. `use_safetensors` is True
    Raises: ValueError naming what was found (a pickle, an index that points outside, files missing or damaged, another
            quantization); and what transformers raises.
    """
    if kwargs.setdefault("use_safetensors", True) is not True:
        raise ValueError(
            f"use_safetensors: found {kwargs['use_safetensors']!r}, wanted True: a pickle may run any code"
        )
    if quantization_config is not None and not isinstance(quantization_config, NF4Config):
        raise TypeError(f"quantization_config: found {type(quantization_config).__name__}, wanted an NF4Config")
    hub = {key: kwargs[key] for key in _HUB if kwargs.get(key) is not None}
    base = _base_of(path, hub)
    folder = os.path.join(base, kwargs.get("subfolder") or "")
    if os.path.isdir(folder) and kwargs.get("gguf_file") is None:
        check_folder(folder, kwargs.get("variant"))
    config = kwargs.get("config")
    given = isinstance(config, PreTrainedConfig)
    config = copy.deepcopy(config) if given else AutoConfig.from_pretrained(base if config is None else config, **hub)
    found = _quantization(config)
    if found is None:
        return model_class.from_pretrained(path, quantization_config=quantization_config or NF4Config(), **kwargs)
    asked = None if quantization_config is None else quantization_config.compute_dtype
    options = _options(found, base)
    if asked is not None:
        options["compute_dtype"] = asked
    _warn_of_others(options, quantization_config)
    for key in [key for key in kwargs if key not in (*_HUB, *_NOT_OF_THE_CONFIG, "config") and hasattr(config, key)]:
        setattr(config, key, kwargs.pop(key))  # transformers does so only with a configuration that it reads itself
    text = config.get_text_config(decoder=True)
    if text is not config and hasattr(text, "quantization_config"):
        del text.quantization_config
    kwargs["config"], config.quantization_config = config, options
    return model_class.from_pretrained(path, **kwargs)


def _base_of(path: str | os.PathLike, hub: dict[str, Any]) -> str:
    """`path`, or the model that the adapter at `path` belongs to."""
    if os.path.isdir(path) and os.path.isfile(os.path.join(path, hub.get("subfolder", ""), "config.json")):
        return os.fspath(path)
    known = {key: value for key, value in hub.items() if key not in ("trust_remote_code", "code_revision")}
    if (file := find_adapter_config_file(path, **known)) is None:
        return os.fspath(path)
    return PeftConfig.from_pretrained(os.path.dirname(file)).base_model_name_or_path


def _quantization(config: PreTrainedConfig) -> dict[str, Any] | None:
    """The `quantization_config` of config.json, whichever part of a composite model it stands at."""
    for part in (config, config.get_text_config(decoder=True)):
        if (found := getattr(part, "quantization_config", None)) is not None:
            return found if isinstance(found, dict) else found.to_dict()
    return None


def _options(found: dict[str, Any], path: str) -> dict[str, Any]:
    """The arguments of `NF4Config` for a quantized checkpoint. Raises: ValueError for one that is not in 4 bits of ours."""
    method = found.get(
        "quant_method", "bitsandbytes" if found.get("load_in_4bit") or found.get("load_in_8bit") else None
    )
    if method == METHOD:
        return NF4Config.from_dict(found).to_dict()
    if method != "bitsandbytes" or not found.get("load_in_4bit"):
        kind = "8-bit bitsandbytes" if method == "bitsandbytes" else f"quant_method {method!r}"
        raise ValueError(
            f"{path}: found a checkpoint of {kind}, wanted one in 16 bits, of nf4lora, or in 4 bits of bitsandbytes"
        )
    return NF4Config(
        quant_type=found.get("bnb_4bit_quant_type", "fp4"), double_quant=found.get("bnb_4bit_use_double_quant", False),
        compute_dtype=found.get("bnb_4bit_compute_dtype"), modules_to_not_convert=found.get("llm_int8_skip_modules"),
        checkpoint_format="bnb",
    ).to_dict()  # fmt: skip


def _warn_of_others(options: dict[str, Any], asked: NF4Config | None) -> None:
    names = ("quant_type", "double_quant", "blocksize", "modules_to_not_convert")
    if options["checkpoint_format"] == "bnb":
        names = names[:2]  # its bytes say the others
    differing = [name for name in names if asked is not None and getattr(asked, name) != options[name]]
    if differing:
        found = ", ".join(f"{name}={options[name]!r}" for name in differing)
        warnings.warn(
            f"the checkpoint is quantized already, with {found}: that of quantization_config is not used", stacklevel=3
        )
