"""A user's model with NF4LoRALinears in it, and what a model weighs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from ..hf.experts import quantize_experts_
from ..nn import NF4Linear, replace_linears
from .settings import Settings, UserError


def load_tokenizer(settings: Settings) -> Any:
    """The tokenizer of --model. Raises: UserError for a folder that is missing or holds none."""
    from transformers import AutoTokenizer

    quiet_transformers()
    source = settings.model
    if not Path(source).is_dir() and (
        source.startswith((".", "/", "~")) or source.count("/") > 1 or Path(source).exists()
    ):
        raise UserError(
            f"--model: no such folder: {source}; wanted one with config.json, weights and tokenizer, or a Hub id"
        )
    return _loaded(source, AutoTokenizer.from_pretrained)


def load_model(settings: Settings, device: torch.device, compute: torch.dtype) -> nn.Module:
    """The causal language model of --model, its linears in NF4 with adapters, all else frozen.

    Raises: UserError for a folder without a model, unknown target modules, or a --seq-len the model does not take.
    """
    from transformers import AutoModelForCausalLM

    # safetensors only: other weight files are pickles, which can run code
    model = _loaded(settings.model, AutoModelForCausalLM.from_pretrained, dtype="auto", use_safetensors=True)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and settings.seq_len > limit:
        raise UserError(
            f"--seq-len: found {settings.seq_len}, wanted at most {limit}, the longest {settings.model} takes"
        )
    return prepare(model, settings, device, compute)


def _loaded(source: str, loader: Callable[..., Any], **kwargs: Any) -> Any:
    try:
        return loader(source, **kwargs)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"--model: {source} cannot be loaded ({reason}); wanted a model folder or a Hub id") from error


def quiet_transformers() -> None:
    """No bars and warnings of transformers among the command's own lines."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def prepare(model: nn.Module, settings: Settings, device: torch.device, compute: torch.dtype) -> nn.Module:
    """Put linears in 4 bits, adapters on the targets; freeze the rest, cast what stays dense to `compute`. Raises: UserError."""
    torch.manual_seed(settings.seed)
    model.requires_grad_(False)
    model.to(device)
    try:
        replace_linears(model, layer=NF4Linear)
        quantize_experts_(model)
        replace_linears(
            model, list(settings.target_modules), r=settings.r, lora_alpha=settings.alpha, lora_dropout=settings.dropout
        )
    except ValueError as error:
        option, text = "--model", str(error)
        if text.startswith("target_modules: "):
            option, text = "--target-modules", text.removeprefix("target_modules: ")
        raise UserError(f"{option}: {text}") from error
    adapters = {id(p) for p in model.parameters() if p.requires_grad}
    for parameter in model.parameters():
        if parameter.is_floating_point() and id(parameter) not in adapters:
            parameter.data = parameter.data.to(compute)
    return model


def tensor_bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of every parameter and buffer of the model, adapters included, each counted once."""
    return tensor_bytes([*model.parameters(), *model.buffers()])


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    return tensor_bytes(v for entry in optimizer.state.values() for v in entry.values() if torch.is_tensor(v))


def nf4_bits(model: nn.Module) -> float | None:
    """Bits a quantized weight, from the bytes of the tensors that hold it; None without NF4 layers."""
    layers = [m for m in model.modules() if isinstance(m, NF4Linear)]
    if not layers:
        return None
    stored = tensor_bytes(p for m in layers for n, p in m.named_parameters(recurse=False) if n.startswith("weight"))
    return 8 * stored / sum(m.in_features * m.out_features for m in layers)
