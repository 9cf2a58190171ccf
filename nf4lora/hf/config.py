"""`NF4Config`: what transformers is told about 4-bit weights, and what config.json says of them."""

import re
from collections.abc import Iterable
from typing import Any

import torch
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from .. import checks
from ..quant_keys import DTYPES

METHOD = "nf4lora"
FORMATS = ("native", "bnb")


@register_quantization_config(METHOD)
class NF4Config(QuantizationConfigMixin):
    """`AutoModelForCausalLM.from_pretrained(path, quantization_config=NF4Config())` quantizes on load.

    Args:
        quant_type:    "nf4" or "fp4"
        blocksize:     elements per absmax: 32, 64, …, 4096
        double_quant:  8-bit absmax
        compute_dtype: dtype of the products, a torch dtype or its name; None for that of the activations
        modules_to_not_convert: names or paths of modules that keep their dtype; None for the head, tied weights and the
                       last module. As `llm_int8_skip_modules` of BitsAndBytesConfig
        checkpoint_format: of the checkpoint that is read: "native", or "bnb" for one that bitsandbytes quantized.
                       What is saved is always native; `nf4lora.hf.save_bitsandbytes` writes the other
    Raises: ValueError, TypeError naming the argument.
    """

    def __init__(
        self, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = True,
        compute_dtype: torch.dtype | str | None = None, modules_to_not_convert: Iterable[str] | None = None,
        checkpoint_format: str = "native", quant_method: str = METHOD,
    ) -> None:  # fmt: skip
        checks.format(blocksize, quant_type)
        if type(double_quant) is not bool:
            raise TypeError(f"double_quant: found {double_quant!r}, wanted True or False")
        compute_dtype = None if compute_dtype is None else str(compute_dtype).removeprefix("torch.")
        if compute_dtype not in (None, *DTYPES):
            raise TypeError(f"compute_dtype: found {compute_dtype}, wanted None or one of {tuple(DTYPES)}")
        if checkpoint_format not in FORMATS:
            raise ValueError(f"checkpoint_format: found {checkpoint_format!r}, wanted one of {FORMATS}")
        if quant_method != METHOD:
            raise ValueError(f"quant_method: found {quant_method!r}, wanted {METHOD!r}")
        if isinstance(modules_to_not_convert, str):
            raise TypeError(
                f"modules_to_not_convert: found the string {modules_to_not_convert!r}, wanted a list of names"
            )
        modules_to_not_convert = None if modules_to_not_convert is None else list(modules_to_not_convert)
        for pattern in modules_to_not_convert or ():
            if not isinstance(pattern, str) or not pattern or not _compiles(pattern):
                raise ValueError(f"modules_to_not_convert: found {pattern!r}, wanted names, paths or patterns of paths")
        # transformers writes these attributes to config.json as they stand
        self.quant_method, self.quant_type = METHOD, quant_type
        self.blocksize, self.double_quant = blocksize, double_quant
        self.compute_dtype, self.checkpoint_format = compute_dtype, checkpoint_format
        self.modules_to_not_convert = modules_to_not_convert

    def to_diff_dict(self) -> dict[str, Any]:
        """What is printed; transformers 5.0 has none of its own."""
        return self.to_dict()

    def layer_options(self) -> dict[str, Any]:
        """What `NF4Linear` is constructed with."""
        compute_dtype = None if self.compute_dtype is None else DTYPES[self.compute_dtype]
        return {
            "blocksize": self.blocksize, "quant_type": self.quant_type, "double_quant": self.double_quant,
            "compute_dtype": compute_dtype,
        }  # fmt: skip


def _compiles(pattern: str) -> bool:
    try:
        return re.compile(pattern) is not None
    except re.error:
        return False
