"""Steps of transformers' loader: float weights into 4 bits, and bitsandbytes' tensors into ours."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import get_module_from_name

from ..nn import NF4Linear
from ..quant_state import QuantState
from . import experts


def parameters(layer: NF4Linear) -> dict[str, nn.Parameter]:
    """`weight` and its statistics, those there are."""
    return {name: p for name, p in layer.named_parameters(recurse=False) if name.startswith("weight")}


class _Step(ConversionOps):
    """What a step raises, transformers logs, and fails later with a sentence of its own. A tensor of the wrong shape makes
    it ask the quantizer, which raises what was found."""

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Step":
        return self  # the loader copies steps, and what they find is for the one quantizer

    def failed(self, path: str, name: str, error: Exception) -> dict[str, Tensor]:
        self.hf_quantizer.failed = type(error)(f"{path}: {str(error).removeprefix('A: ')}")
        return {name: torch.empty(0)}


class Quantize(_Step):
    """{path of a weight: float tensor} -> {path of each integer parameter: parameter}."""

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], *, model: nn.Module, **_: Any) -> dict[str, Tensor]:
        done = {}
        for path, value in input_dict.items():
            value = value[0] if isinstance(value, list) else value
            module, name = get_module_from_name(model, path)
            try:
                if isinstance(module, NF4Linear):
                    module.quantize_(value.t() if getattr(module, "source", None) is Conv1D else value)
                    found = parameters(module)
                else:
                    found = experts.quantized(module, name, value)
            except (ValueError, TypeError) as error:
                return self.failed(path, path, error)
            done |= {path.removesuffix(name) + key: p for key, p in found.items()}
        return done


class FromBitsAndBytes(_Step):
    """{bitsandbytes' key: tensor} of one weight -> our parameters; any other weight passes in the dtype of its module.

    What a checkpoint holds of a linear, 4 bits or floats, decides what layer it becomes: names in a list of modules to
    skip may be those of an older transformers.
    """

    def convert(
        self, input_dict: dict[str, Any], *, full_layer_name: str, model: nn.Module, missing_keys: set[str] | None = None,
        **_: Any,
    ) -> dict[str, Tensor]:  # fmt: skip
        found = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        module, _name = get_module_from_name(model, full_layer_name)
        path = full_layer_name.removesuffix(".weight")
        missing = set() if missing_keys is None else missing_keys
        try:
            if len(found) == 1:
                return self._plain(model, module, path, found, missing)
            taken = parameters(self._packed(model, module, path, found))
            missing -= {
                m for m in missing if m.startswith(f"{path}.weight_") and m.removeprefix(f"{path}.") not in taken
            }
            return dict(taken)
        except (ValueError, TypeError) as error:
            return self.failed(full_layer_name, "weight", error)

    def _packed(self, model: nn.Module, module: nn.Module, path: str, found: dict[str, Tensor]) -> NF4Linear:
        if "weight" not in found:
            raise ValueError(f"found {sorted(found)} without the packed weight")
        packed = found.pop("weight")
        state = QuantState.from_dict(found, device=packed.device)
        if type(module) in (nn.Linear, Conv1D):
            module = self.hf_quantizer.put_layer(model, path, module)
        if not isinstance(module, NF4Linear):
            raise TypeError(f"found a 4-bit weight for a {type(module).__name__}, wanted one for a linear")
        take_bitsandbytes(module, packed, state)
        return module

    def _plain(
        self, model: nn.Module, module: nn.Module, path: str, found: dict[str, Tensor], missing: set[str]
    ) -> dict[str, Tensor]:
        (key, value), *_ = found.items()
        if isinstance(module, NF4Linear):
            if key != "weight" or not value.is_floating_point():
                raise ValueError(
                    f"found {key} {value.dtype} alone, wanted a float weight, or packed bytes and all their statistics"
                )
            module = self.hf_quantizer.put_dense(model, path, module)
            missing -= {name for name in missing if name.startswith(f"{path}.weight_")}
        own = module._parameters.get("weight")
        kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
        if own is None or not own.is_floating_point() or kept & set(path.split(".")):
            return found
        return {key: value.to(own.dtype)}


@torch.no_grad()
def take_bitsandbytes(layer: NF4Linear, packed: Tensor, state: QuantState) -> None:
    """Let `layer` hold these bytes, in their own memory. Raises: ValueError when they are not of its shape."""
    wanted = (layer.out_features, layer.in_features)
    if tuple(state.shape) != wanted:
        raise ValueError(f"found a 4-bit weight of shape {tuple(state.shape)}, wanted {wanted}")
    packed = packed.contiguous().view(-1).view(torch.uint8)
    if packed.numel() != (state.numel + 1) // 2:
        raise ValueError(f"found {packed.numel()} packed bytes, wanted {(state.numel + 1) // 2} for shape {wanted}")
    layer.blocksize, layer.quant_type, layer.double_quant = state.blocksize, state.quant_type, state.nested
    layer._freeze("weight", packed.reshape(-1, 1))
    layer._freeze("weight_absmax", state.absmax if state.nested else state.absmax.view(torch.int32))
    for name, t in (("nested_absmax", state.nested_absmax), ("nested_offset", state.offset)):
        if t is None:
            layer.register_parameter(f"weight_{name}", None)
        else:
            layer._freeze(f"weight_{name}", t.reshape(-1).view(torch.int32))


def blank(layer: NF4Linear, device: Any, dtype: torch.dtype) -> nn.Module:
    """The layer that `layer` was made from, `nn.Linear` or transformers' Conv1D, its parameters empty."""
    with torch.device(device):
        if getattr(layer, "source", nn.Linear) is Conv1D:
            made = Conv1D(layer.out_features, layer.in_features).to(dtype)
        else:
            made = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=dtype)
    return made.train(layer.training)


@torch.no_grad()
def dense(layer: NF4Linear, dtype: torch.dtype | None = None) -> nn.Module:
    """The layer that `layer` was made from, with the decoded weight. Raises: ValueError while its bytes are on the disk."""
    if layer.weight.is_meta:
        raise ValueError(f'{layer}: its bytes are offloaded; load the model without "disk" in device_map')
    weight = layer.dequantize(dtype)
    made = blank(layer, "meta", weight.dtype)
    made.weight = nn.Parameter(weight.t().contiguous() if isinstance(made, Conv1D) else weight, requires_grad=False)
    if made.bias is not None:
        bias = weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias.to(weight.dtype)
        made.bias = nn.Parameter(bias, requires_grad=False)
    return made
