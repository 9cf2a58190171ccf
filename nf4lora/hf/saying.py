"""Models that were quantized in memory are saved as ones that were loaded in 4 bits: config.json says it."""

import copy
from typing import Any

from transformers import PreTrainedModel

from ..nn import NF4Linear
from ..nn.experts import NF4Experts
from .config import NF4Config
from .experts import save_stacks_whole
from .hooks import Hooks
from .loaded import not_converted, one_format
from .quantizer import NF4Quantizer

_hooks = Hooks()


def install() -> None:
    """Hook `save_pretrained` of transformers' models, once."""
    if not _hooks:
        _hooks.around(PreTrainedModel, "save_pretrained", _save)


def say_quantized(model: PreTrainedModel, config: NF4Config) -> None:
    """Leave the model as `from_pretrained` with such a config leaves one, so that it is saved and loaded alike."""
    config = copy.deepcopy(config)
    config.modules_to_not_convert = not_converted(model)
    model.hf_quantizer, model.config.quantization_config = NF4Quantizer(config, pre_quantized=True), config
    model.is_quantized, model.quantization_method = True, config.quant_method
    model.hf_quantizer.owned_by(model)
    save_stacks_whole(model)


def _save(original: Any, model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """What has a quantizer, a configuration or a state dict of its own is saved as these say.

    Raises: ValueError for layers of two formats, which no checkpoint holds.
    """
    said = getattr(model, "hf_quantizer", None) or getattr(model.config, "quantization_config", None)
    given = len(args) > 2 or kwargs.get("state_dict") is not None or getattr(model, "_hf_peft_config_loaded", False)
    packed = [m for m in model.modules() if isinstance(m, (NF4Linear, NF4Experts))]
    if packed and not said and not given:
        say_quantized(model, NF4Config(**one_format(model), compute_dtype=packed[0].compute_dtype))
    return original(model, *args, **kwargs)
