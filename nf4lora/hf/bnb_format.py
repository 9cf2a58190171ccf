"""Export to bitsandbytes' 4-bit checkpoints, which transformers and vLLM load without nf4lora."""

import copy
import os
import re
import shutil
import warnings
from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from ..nn import NF4Linear, NF4LoRALinear
from ..nn.experts import NF4Experts
from . import atomic
from .conversion import parameters
from .loaded import not_converted, one_format

_OF_A_MODEL = re.compile(r"config\.json|generation_config\.json|model.*\.safetensors|.*\.safetensors\.index\.json")


def save_bitsandbytes(
    model: PreTrainedModel, directory: str | os.PathLike, max_shard_size: int | str = "5GB"
) -> dict[str, int]:
    """Write the model as bitsandbytes' 4-bit checkpoint, all at once or not at all; the model is left as it is.

    Args:
        model:     of transformers, its `NF4Linear`s in one 4-bit format
        directory: a checkpoint there is replaced, other files there stay
    Returns: path -> bytes of what nf4lora holds in 4 bits and bitsandbytes cannot (stacks of experts): written decoded,
             in the dtype before quantization, and warned of.
    Numerics: transformers with bitsandbytes holds the same bytes and decodes the same weights.
    Memory:   no copy of the packed bytes; the decoded experts until they are written
    Raises:   ValueError (no 4-bit layer, two formats, an adapter, weights on the disk, a file in the directory's place);
              OSError with the system's reason: what was there is there still
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory}: found a file, wanted a folder or a name for one")
    config = _config(model)
    tensors, decoded = _tensors(model)
    twin = copy.copy(model)  # shares every module; what differs is the configuration, and that no quantizer has a say
    for name in ("hf_quantizer", "hf_device_map"):
        twin.__dict__.pop(name, None)
    twin.config = copy.deepcopy(model.config)
    twin.config.quantization_config = config
    directory.parent.mkdir(parents=True, exist_ok=True)
    atomic.sweep(directory.parent)
    with atomic.temporary(directory.parent) as temp:
        twin.save_pretrained(temp, state_dict=tensors, max_shard_size=max_shard_size)
        for file in temp.iterdir():
            atomic.flush(file)
        for entry in directory.iterdir() if directory.is_dir() else ():  # a tokenizer, checkpoints of a run
            if not _OF_A_MODEL.fullmatch(entry.name) and not (temp / entry.name).exists():
                _link(entry, temp / entry.name)
        atomic.flush(temp)
        atomic.move(temp, directory)
    if decoded:
        some, total = ", ".join(list(decoded)[:3]), sum(decoded.values())
        warnings.warn(f"{len(decoded)} stacks of experts ({some}, …) are written decoded, {total:,} bytes: bitsandbytes has "
                      "4-bit linears only", stacklevel=2)  # fmt: skip
    return decoded


def _link(entry: Path, target: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.copytree(entry, target, symlinks=True, copy_function=os.link)
    else:
        os.link(entry, target, follow_symlinks=False)


def _config(model: PreTrainedModel) -> BitsAndBytesConfig:
    layers = {name: m for name, m in model.named_modules() if isinstance(m, NF4Linear)}
    if not layers:
        raise ValueError("model: found no NF4Linear, wanted a model in 4 bits")
    if adapted := [name for name, m in layers.items() if isinstance(m, NF4LoRALinear) and m.r]:
        raise ValueError(
            f"{adapted[0]}: found an adapter, which the format has no place for; save it with save_adapter, and merge"
        )
    if any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        raise ValueError(
            "model: found adapters of peft, which the format has no place for; give model.unload(), or merge"
        )
    if offloaded := [name for name, m in layers.items() if m.weight.is_meta]:
        raise ValueError(f'{offloaded[0]}: its bytes are offloaded; load the model without "disk" in device_map')
    found = one_format(model)
    compute_dtype = next(iter(layers.values())).compute_dtype or model.dtype
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=found["quant_type"], bnb_4bit_use_double_quant=found["double_quant"],
        bnb_4bit_compute_dtype=compute_dtype, bnb_4bit_quant_storage=torch.uint8, llm_int8_skip_modules=_skipped(model),
    )  # fmt: skip


def _skipped(model: nn.Module) -> list[str]:
    """`not_converted`, and the experts."""
    return [*not_converted(model), *(name for name, m in model.named_modules() if isinstance(m, NF4Experts))]


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The state dict with bitsandbytes' keys, in the model's own memory, and bytes of what had to be decoded, by path."""
    tensors, decoded = dict(model.state_dict()), {}
    for path, module in model.named_modules():
        if isinstance(module, NF4Linear):
            for name in parameters(module):
                del tensors[f"{path}.{name}"]
            tensors[f"{path}.weight"] = module.weight.detach()
            state = module.quant_state.as_dict(packed=True)
            tensors |= {f"{path}.weight.{key}": t.contiguous() for key, t in state.items()}
        elif isinstance(module, NF4Experts):
            for stack in module.stacks:
                for name in module.names_of(stack):
                    del tensors[f"{path}.{name}"]
                tensors[f"{path}.{stack}"] = whole = module.dequantize(stack)
                decoded[f"{path}.{stack}"] = whole.numel() * whole.element_size()
    return tensors, decoded
