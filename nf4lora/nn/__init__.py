"""`NF4Linear` and `NF4LoRALinear`, drop-in `torch.nn.Linear`s with a 4-bit weight, and `replace_linears` to put them in;
groups of them on one x.

Dtypes of a forward, whatever the dtypes of the parameters (D, D' stand for float32, bfloat16 or float16):

| autocast | compute_dtype | computed in | output |
|---|---|---|---|
| off | None | x's dtype | x's dtype |
| off | D | D | x's dtype |
| on, D' | any | D' | D' |
"""

from .group import NF4LoRAGatedMLP, NF4LoRALinearGroup, group_blocks
from .linear import NF4Linear
from .lora import NF4LoRALinear
from .replace import replace_linears

__all__ = ["NF4LoRAGatedMLP", "NF4LoRALinear", "NF4LoRALinearGroup", "NF4Linear", "group_blocks", "replace_linears"]
