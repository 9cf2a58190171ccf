"""A user's model with adapters on it, the demonstration's with NF4LoRALinears, and what a model weighs."""

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from ..hf.experts import quantize_experts_
from ..nn import NF4Linear, replace_linears
from ..nn.experts import NF4Experts
from ..nn.replace import check_names
from .progress import console
from .settings import Settings, UserError


def load_tokenizer(settings: Settings) -> Any:
    """The tokenizer of --model. Raises: UserError for a folder that is missing or holds none."""
    from transformers import AutoTokenizer

    quiet_transformers()
    check_source("--model: ", settings.model)
    return loaded("--model: ", settings.model, AutoTokenizer.from_pretrained)


def sizes(settings: Settings) -> tuple[int, int | None]:
    """Rows of the embedding of --model, and the longest sequence it takes, as its config says. Raises: UserError."""
    from transformers import AutoConfig

    config = loaded("--model: ", settings.model, AutoConfig.from_pretrained).get_text_config(decoder=True)
    if not isinstance(rows := getattr(config, "vocab_size", None), int):
        raise UserError(
            f"--model: {settings.model} is a {config.model_type}, which has no vocabulary; wanted a language model"
        )
    return rows, getattr(config, "max_position_embeddings", None)


def load_base(settings: Settings, device: torch.device, compute: torch.dtype) -> nn.Module:
    """The causal language model of --model, frozen: in 4 bits (16 for --method lora), and what stays dense in `compute`.
    A checkpoint in 4 bits, ours or bitsandbytes', is taken as it is.

    Raises: UserError for a folder without a model.
    """
    from transformers import AutoModelForCausalLM

    from ..hf import from_pretrained

    # safetensors only: other weight files are pickles, which can run code
    load = AutoModelForCausalLM.from_pretrained if settings.method == "lora" else from_pretrained
    model = loaded("--model: ", settings.model, load, weights=True, dtype="auto", use_safetensors=True)
    if settings.method == "lora" and getattr(model, "hf_quantizer", None):
        raise UserError(f"--method: found lora, but {settings.model} is quantized already; wanted qlora or adalora")
    for parameter in model.requires_grad_(False).parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(compute)
    for layer in model.modules():
        if isinstance(layer, (NF4Linear, NF4Experts)):
            layer.compute_dtype = None  # that of a checkpoint's config, which --compute-dtype overrides
    return model.to(device)


def add_adapters(model: nn.Module, settings: Settings, steps: int) -> nn.Module:
    """The base in peft's hands, with --method's adapters for a run of so many steps. Raises: UserError: unknown targets."""
    from peft import AdaLoraConfig, LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    targets, every = list(settings.target_modules), settings.target_modules == ("all-linear",)
    options = {
        "lora_alpha": settings.alpha, "lora_dropout": settings.dropout, "target_modules": "all-linear" if every else targets,
        "task_type": "CAUSAL_LM", "base_model_name_or_path": settings.model,
    }  # fmt: skip
    torch.manual_seed(settings.seed)
    try:
        if not every:
            check_names(targets, [name for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))])
        if settings.method == "adalora":
            ranks = {"init_r": settings.r, "target_r": settings.target_r or max(settings.r * 2 // 3, 1)}
            schedule = settings.schedule(steps)
            if not schedule["tinit"] < steps - schedule["tfinal"] >= 2:
                raise UserError(
                    f"--method: found adalora with {schedule} in {steps} steps, which leaves none to take ranks away at; "
                    "wanted --tinit < steps - --tfinal, and that 2 or more"
                )
            config = AdaLoraConfig(total_step=steps, **ranks, **schedule, **options)
        else:
            config = LoraConfig(r=settings.r, **options)
        return get_peft_model(model, config)
    except ValueError as error:
        option, text = "--method", str(error)
        if text.startswith("target_modules: "):
            option, text = "--target-modules", text.removeprefix("target_modules: ")
        raise UserError(f"{option}: {text}") from error


def check_source(option: str, source: str) -> None:
    """`option` begins the message. Raises: UserError for what can only be meant as a folder, and is none."""
    if not Path(source).is_dir() and (
        source.startswith((".", "/", "~")) or source.count("/") > 1 or Path(source).exists()
    ):
        raise UserError(
            f"{option}no such folder: {source}; wanted one with config.json, weights and tokenizer, or a Hub id"
        )


def loaded(option: str, source: str, loader: Callable[..., Any], weights: bool = False, **kwargs: Any) -> Any:
    """What `loader` makes of a folder or a Hub id.

    Raises: UserError for what cannot be loaded, and, of `weights`, for tensors that are not there: they would be drawn at random.
    """
    if weights:
        kwargs["output_loading_info"] = True
    try:
        found = loader(source, **kwargs)
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file makes a loader raise
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        reason = (
            reason if isinstance(error, (OSError, ValueError, SafetensorError)) else f"{type(error).__name__}: {reason}"
        )
        raise UserError(f"{option}{source} cannot be loaded ({reason}); wanted a model folder or a Hub id") from error
    if not weights:
        return found
    model, info = found
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"{option}{source} lacks {len(missing)} tensors that its config wants, such as {missing[0]}; wanted the whole model"
        )
    return model


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of names, shapes and first elements of the parameters, to tell a resumed run that its base changed."""
    found = hashlib.sha256()
    for name, p in model.named_parameters():
        found.update(f"{name} {list(p.shape)} {p.dtype}".encode())
        found.update(p.detach().reshape(-1)[:4096].cpu().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def quiet_transformers() -> None:
    """No bars and warnings of transformers among the command's own lines."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # of names that peft still uses


def show_loading() -> None:
    """The bar of transformers after all, where a terminal shows it."""
    from transformers.utils import logging

    if console.is_terminal:
        logging.enable_progress_bar()


def prepare(model: nn.Module, settings: Settings, device: torch.device, compute: torch.dtype) -> nn.Module:
    """Put linears in 4 bits, adapters on the targets; freeze the rest, cast what stays dense to `compute`."""
    torch.manual_seed(settings.seed)
    model.requires_grad_(False)
    model.to(device)
    replace_linears(model, layer=NF4Linear)
    quantize_experts_(model)
    replace_linears(
        model, list(settings.target_modules), r=settings.r, lora_alpha=settings.alpha, lora_dropout=settings.dropout
    )
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
