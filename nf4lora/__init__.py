"""nf4lora: fused 4-bit (NF4) linear layers with LoRA, forward and backward.

    from nf4lora import NF4LoRALinear, replace_linears
    model = replace_linears(model, r=16, lora_alpha=32)
"""

from typing import Any

from .functional import dequantize_4bit, linear_4bit, quantize_4bit
from .nn import NF4Linear, NF4LoRALinear, replace_linears
from .quant_state import QuantState

__version__ = "0.1.0"
__all__ = [
    "NF4LoRALinear", "NF4Linear", "QuantState", "dequantize_4bit", "from_pretrained", "linear_4bit", "patch_bitsandbytes",
    "quantize_4bit", "replace_linears",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """What needs transformers and peft, which are imported when it is asked for, not before."""
    if name not in ("from_pretrained", "patch_bitsandbytes"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import hf

    return getattr(hf, name)
