"""What peft's AdaLoRA holds beside the adapter's parameters, found in a model and kept in a file."""

from pathlib import Path

import safetensors.torch
import torch
from peft import PeftModel
from peft.tuners.adalora import AdaLoraConfig, AdaLoraModel
from torch import Tensor, nn

from . import atomic
from .checkpoint import CheckpointError, parse_tensors

_AVERAGES = ("exp_avg_ipt", "exp_avg_unc")


def tuner_of(model: nn.Module) -> AdaLoraModel:
    """peft's `AdaLoraModel` of a model, also under DDP or torch.compile, with its allocator.

    Raises: TypeError for another kind of model; ValueError for an adapter that is not to be trained.
    """
    while (
        not isinstance(model, PeftModel)
        and (inner := getattr(model, "_orig_mod", getattr(model, "module", None))) is not None
    ):
        model = inner
    tuner = getattr(model, "base_model", None)
    if not isinstance(model, PeftModel) or not isinstance(tuner, AdaLoraModel):
        raise TypeError(
            f"model: found {type(model).__name__}, wanted the result of peft.get_peft_model(model, AdaLoraConfig(...))"
        )
    if not hasattr(tuner, "rankallocator") or not any(E.requires_grad for E in singular_values(tuner).values()):
        raise ValueError(
            "model: found an AdaLoRA adapter without gradients; load it with PeftModel.from_pretrained(..., is_trainable=True) "
            "and leave requires_grad of its parameters as peft sets it"
        )
    return tuner


def config_of(tuner: AdaLoraModel) -> AdaLoraConfig:
    return tuner.peft_config[tuner.trainable_adapter_name]


def singular_values(tuner: AdaLoraModel) -> dict[str, nn.Parameter]:
    """Name -> lora_E [r, 1] of the adapter that is trained."""
    return {
        name: p
        for name, p in tuner.model.named_parameters()
        if name.endswith(f".lora_E.{tuner.trainable_adapter_name}")
    }


def complete_gradients(tuner: AdaLoraModel, step: int) -> None:
    """Zero gradients for layers that had no part in this step, such as experts nothing was sent to: peft asks for all.

    Raises: ValueError if there is no gradient at all.
    """
    adapter = tuner.trainable_adapter_name
    parameters = [p for name, p in tuner.model.named_parameters() if "lora_" in name and adapter in name]
    if all(p.grad is None for p in parameters):
        raise ValueError(
            f"AdaLoRA, step {step}: found no gradient of lora_A, lora_B, lora_E, by which it ranks them; wanted those of this "
            "step: was the loss computed under torch.no_grad, or were they cleared before on_optimizer_step?"
        )
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)


def save_state(tuner: AdaLoraModel, path: Path, step: int, pattern: dict[str, list[bool]] | None) -> None:
    """Write the averages of the importances, float [shape of the parameter], and the pattern, bool [r], as safetensors."""
    tensors = {f"{kind}.{name}": t for kind in _AVERAGES for name, t in getattr(tuner.rankallocator, kind).items()}
    tensors |= {f"lora_E.{name}": E for name, E in singular_values(tuner).items()}
    tensors |= {f"rank_pattern.{name}": torch.tensor(kept) for name, kept in (pattern or {}).items()}
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()} | {"step": torch.tensor([step])}
    atomic.write(unfinished := path.with_name(path.name + ".tmp"), safetensors.torch.save(tensors))
    unfinished.replace(path)


def load_state(tuner: AdaLoraModel, path: Path, step: int) -> dict[str, list[bool]] | None:
    """Give the allocator its averages back, and return the pattern of `save_state`.

    Raises: CheckpointError (a ValueError) for a file that is missing, damaged, of another step or of another adapter.
    """
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such file, which a run with AdaLoraCallback leaves in its checkpoints; the importances are in it. "
            "For a checkpoint that is not in output_dir say AdaLoraCallback(resume_from=its folder)"
        )
    found = {}
    for key, t in parse_tensors(path.read_bytes(), path).items():
        kind, _, name = key.partition(".")
        found.setdefault(kind, {})[name] = t
    saved, own = found.get("lora_E", {}), singular_values(tuner)
    if found.get("step", {}).get("", torch.tensor([-1])).tolist() != [step]:
        raise CheckpointError(
            f"{path}: found no state of step {step}, which is resumed; wanted the file of that checkpoint"
        )
    if saved.keys() != own.keys() or any(not torch.equal(saved[name], E.detach().cpu()) for name, E in own.items()):
        raise CheckpointError(
            f"{path}: found singular values (lora_E) that are not the model's: it belongs to another adapter"
        )
    parameters, allocator = dict(tuner.model.named_parameters()), tuner.rankallocator
    names = {name.replace("lora_E", part) for name in own for part in ("lora_A", "lora_B", "lora_E")}
    averages = [found.get(kind, {}) for kind in _AVERAGES]
    for one in averages:
        if averages[0].keys() != one.keys() or (one and one.keys() != names):
            raise CheckpointError(
                f"{path}: found averages of {len(one)} tensors, wanted those of the adapter's {len(names)}, or none"
            )
        if wrong := [name for name, t in one.items() if t.shape != parameters[name].shape or not t.is_floating_point()]:
            raise CheckpointError(f"{path}: found averages of another shape or kind than {wrong[0]}")
    pattern = found.get("rank_pattern", {})
    if pattern and (
        pattern.keys() != own.keys()
        or any(pattern[n].dtype != torch.bool or len(pattern[n]) != len(own[n]) for n in own)
    ):
        raise CheckpointError(f"{path}: found a rank pattern that does not fit the adapter")
    allocator.exp_avg_ipt, allocator.exp_avg_unc = (
        {n: t.to(parameters[n]) for n, t in one.items()} for one in averages
    )
    allocator.ipt = {
        name: torch.zeros_like(t) for name, t in allocator.exp_avg_ipt.items()
    }  # made anew before it is read
    return {name: kept.tolist() for name, kept in pattern.items()} or None


def triplet_scores(tuner: AdaLoraModel) -> dict[str, Tensor]:
    """Layer -> importance [r] of its triplets, as peft ranks them: that of Λ_i and the means of P's column and Q's row.

    Each is the average sensitivity |parameter * gradient| times the average of its deviations.
    """
    allocator = tuner.rankallocator
    scores = {}
    for name in singular_values(tuner):
        E, A, B = (allocator._element_score(name.replace("lora_E", part)) for part in ("lora_E", "lora_A", "lora_B"))
        scores[name.removesuffix(f".lora_E.{tuner.trainable_adapter_name}")] = E.view(-1) + A.mean(1) + B.mean(0)
    return scores
