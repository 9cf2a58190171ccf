"""The quantizer that transformers finds for `NF4Config`: 4-bit layers put in before loading, weights quantized as they arrive."""

import os
import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module

from ..codebook import QUANT_TYPES
from ..nn import NF4Linear, NF4LoRALinear
from ..nn.expert_layers import expert_stacks
from ..quant_keys import DTYPES
from ..quant_state import ceil_div
from . import experts
from .bf16_storage import whole_state
from .config import METHOD, NF4Config
from .conversion import FromBitsAndBytes, Quantize, blank, dense
from .loaded import fetch_integers, fill_biases, make_dense, new_layers, not_converted, one_format
from .owned import Owned
from .shards import check_files, check_statistics, packed_dtype

# The bare name last: transformers before 5.18 takes the first that matches.
_BNB_KEYS = [
    "weight.nested_absmax", "weight.nested_quant_map", "weight.quant_map", "weight.absmax",
    *(f"weight.quant_state.bitsandbytes__{kind}" for kind in QUANT_TYPES), "weight",
]  # fmt: skip
# A tensor of this name goes with every checkpoint, so that transformers without our quantizer prints the sentence.
SENTENCE = (
    "this is a 4-bit checkpoint of nf4lora: `import nf4lora.hf` before from_pretrained, or call nf4lora.from_pretrained"
)
_NO_DISK = (
    'device_map puts modules on "disk", and transformers would keep their 16-bit weights there: save the model quantized '
    "(`nf4lora quantize`, or load without device_map and save_pretrained), and load that with this device_map"
)


@register_quantizer(METHOD)
class NF4Quantizer(Owned, HfQuantizer):
    """Every `nn.Linear` and Conv1D that `NF4Config` does not skip becomes an `NF4Linear`; stacks of experts likewise.

    Linears that the checkpoint lacks, such as a new head, stay as they are. Raises: ValueError for tied weights that are
    not skipped, NaN or Inf in a weight, and checkpoints that are damaged or hold more than one 4-bit format.
    """

    requires_calibration = False
    is_trainable = True
    is_compileable = True
    quantized_element_size = 0.5  # for device_map="auto"

    quantization_config: NF4Config
    failed: Exception | None = None
    rearranged = False  # whether modules_to_not_convert says what is in 4 bits
    storage = torch.uint8  # of the packed bytes in the checkpoint

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if not self.pre_quantized and isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(_NO_DISK)

    def param_element_size(self, model: nn.Module, param_name: str, param: Tensor) -> float:
        return self.quantized_element_size if self.param_needs_quantization(model, param_name) else param.element_size()

    def update_device_map(self, device_map: Any) -> Any:
        if device_map is not None:
            return device_map
        return {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        if self.failed is not None:
            raise self.failed
        module, name = get_module_from_name(model, param_name)
        return name == "weight" if isinstance(module, NF4Linear) else experts.holds(module, name)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        config, folder = self.quantization_config, model.config.name_or_path
        if checkpoint_files and all(file.endswith(".safetensors") for file in checkpoint_files):
            check_files(checkpoint_files, folder if os.path.isdir(folder) else None)
            if self.pre_quantized and config.checkpoint_format == "native":
                check_statistics(checkpoint_files, config.double_quant)
            elif self.pre_quantized:
                self.storage = packed_dtype(checkpoint_files)
        skip = self.get_modules_to_not_convert(model, config.modules_to_not_convert, model._keep_in_fp32_modules)
        # Of these the mixer reads the weight itself.
        skip += [f"{name}.dt_proj" for name, m in model.named_modules() if type(m).__name__.endswith("MambaMixer")]
        tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
        for name, module in list(model.named_modules()):
            if type(module) in (nn.Linear, Conv1D) and should_convert_module(name, skip):
                if f"{name}.weight" in tied:
                    raise ValueError(
                        f"{name}: its weight is tied to another module's, and stays in its dtype; found modules_to_not_convert="
                        f"{config.modules_to_not_convert}, wanted {name!r} among them, or None"
                    )
                self._put(model, name, module)
        if config.checkpoint_format == "native":
            experts.prepare_experts(model, config, skip, self.pre_quantized)
        else:  # bitsandbytes leaves experts in 16 bits
            self.rearranged = any(expert_stacks(m) for m in model.modules())
        ignored = model._keys_to_ignore_on_load_unexpected  # a set; in transformers 5.0 a list or None
        model._keys_to_ignore_on_load_unexpected = (list if ignored is None else type(ignored))(
            [*(ignored or ()), re.escape(SENTENCE)]
        )

    def _put(self, model: nn.Module, name: str, module: nn.Linear | Conv1D) -> NF4Linear:
        N, K = reversed(module.weight.shape) if isinstance(module, Conv1D) else module.weight.shape
        options = self.quantization_config.layer_options()
        layer = NF4Linear(K, N, module.bias is not None, device="meta", dtype=module.weight.dtype, **options)
        layer.source = type(module)
        # transformers before 5.18 casts what it reads to the dtype found here, and floats to uint8 are zeros
        if not self.pre_quantized:
            layer._freeze("weight", torch.empty_like(module.weight, device="meta"))
        elif self.storage != torch.uint8:
            size = ceil_div(N * K, 2 * self.storage.itemsize), 1
            layer._freeze("weight", torch.empty(size, dtype=self.storage, device="meta"))
        layer._is_hf_initialized = True  # keeps the model's own initialization off integer weights
        model.set_submodule(name, layer.train(module.training))
        return layer

    def put_layer(self, model: nn.Module, name: str, module: nn.Linear | Conv1D) -> NF4Linear:
        """An `NF4Linear` on the meta device in the place of a linear of which a checkpoint holds 4 bits."""
        self.rearranged = True
        return self._put(model, name, module)

    def put_dense(self, model: nn.Module, name: str, layer: NF4Linear) -> nn.Module:
        """A linear on the meta device in the place of a layer of which a checkpoint holds floats."""
        self.rearranged = True
        model.set_submodule(name, made := blank(layer, "meta", layer.weight_dtype))
        return made

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.failed is not None:
            raise self.failed
        if not self.pre_quantized and "disk" in (getattr(model, "hf_device_map", None) or {}).values():
            raise ValueError(_NO_DISK)
        if new := new_layers(model):
            make_dense(model, new)
        fill_biases(model)
        fetch_integers(model)
        config = self.quantization_config
        if config.checkpoint_format == "bnb":
            vars(config).update(one_format(model))
        if new or self.rearranged:
            config.modules_to_not_convert = not_converted(model)
        config.checkpoint_format = "native"
        # Steps that saving would run backwards over bytes.
        model._weight_conversions = [
            c for c in getattr(model, "_weight_conversions", None) or ()
            if not any(isinstance(o, FromBitsAndBytes) for o in getattr(c, "operations", ()))
        ]  # fmt: skip
        experts.save_stacks_whole(model)
        if not self.pre_quantized:
            experts.tell_what_stays(model)
        self.owned_by(model)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        return {**whole_state(model), SENTENCE: torch.zeros(1, dtype=torch.uint8)}, {}

    def get_quantize_ops(self) -> Quantize:
        return Quantize(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        if not self.pre_quantized or self.quantization_config.checkpoint_format != "bnb":
            return []
        return [
            WeightConverter(source_patterns=_BNB_KEYS, target_patterns="weight", operations=[FromBitsAndBytes(self)])
        ]

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Dense layers of the decoded weights. Raises: ValueError where a layer holds an adapter, which would be lost."""
        layers = [(name, m) for name, m in model.named_modules() if isinstance(m, NF4Linear)]
        if adapted := [name for name, m in layers if isinstance(m, NF4LoRALinear) and m.r]:
            raise ValueError(
                f"{adapted[0]} and {len(adapted) - 1} more hold an adapter: put layer.merge() in their place first"
            )
        dtype = DTYPES.get(dtype, dtype)  # transformers passes config.dtype, which save_pretrained turns into its name
        for name, layer in layers:
            model.set_submodule(name, dense(layer, dtype))
        experts.dequantize_experts(model, dtype)
        return model
