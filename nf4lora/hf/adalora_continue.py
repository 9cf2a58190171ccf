"""The two-stage path: a trained LoRA adapter goes on as AdaLoRA, from the singular value decomposition of scaling * B A."""

import copy
import math
import os
import warnings
from pathlib import Path

import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from torch import Tensor, nn

from .peft_adalora import check_ranks
from .trained_lora import Trained, in_folder, in_model, named


def continue_as_adalora(
    model: nn.Module, config: AdaLoraConfig, adapter: str | os.PathLike | None = None, truncate: bool = False
) -> PeftModel:
    """An AdaLoRA model that starts where a LoRA adapter has been trained to: P Λ Q is its scaling * B A.

    B and A^T are factored by QR and their small core by SVD, in float64: nothing of [N, K] is made. Directions beyond the
    adapter's rank are orthogonal to it and to each other, with Λ = 0, so that logits are equal at step 0 (within rounding:
    relative 1e-6 in float32) and the orthogonality penalty starts at 0.

    Args:
        model:    a PeftModel with one LoRA adapter, which is taken out of it; or with `adapter` the base alone
        config:   its init_r at least the adapter's rank; target_modules None, or such that mean the adapter's layers
        adapter:  a folder of PEFT's format with safetensors
        truncate: allow init_r below the adapter's rank; what of its energy (squared singular values) is lost is warned of
    Returns: `get_peft_model` of the base, under the adapter's name; `model` is not to be used any more
    Raises: TypeError for other kinds of model; ValueError, before anything is changed, for DoRA and what else is not B A,
        for other layers, init_r too small, an adapter of another model, and what `AdaLoraConfig` cannot run with.
    """
    check_ranks(config)
    if config.lora_alpha <= 0:
        raise ValueError(f"lora_alpha: found {config.lora_alpha}, wanted a positive number")
    name, base = "default", model
    if adapter is not None:
        if isinstance(model, PeftModel):
            raise TypeError("model: found a PeftModel beside an adapter folder, wanted the base alone, or no folder")
        trained = in_folder(model, Path(adapter))
    else:
        name, trained = in_model(model)
        base = model.base_model.model
    config = _targeting(config, trained, base)
    starts, kept, lost = {}, 0.0, 0.0
    for path, (A, B, scaling) in trained.layers.items():
        if len(A) > config.init_r and not truncate:
            raise ValueError(
                f"init_r: found {config.init_r}, but the adapter has rank {len(A)} in {path}; wanted at least that, or "
                "truncate=True, which drops the smallest singular values"
            )
        starts[path], one_kept, one_lost = _decomposed(path, A, B, scaling, config.init_r)
        kept, lost = kept + one_kept, lost + one_lost
    if lost:
        share = lost / (kept + lost)
        warnings.warn(
            f"init_r={config.init_r} keeps {1 - share:.4%} of the adapter's energy: lost {share:.4%}", stacklevel=2
        )
    if adapter is None:
        base = model.unload()
    continued = get_peft_model(base, config, adapter_name=name)
    with torch.no_grad():
        for path, (P, values, Q) in starts.items():
            layer = base.get_submodule(path)
            factor = layer.scaling[name] / (float(layer.ranknum[name]) + 1e-5)
            layer.lora_A[name].copy_(Q)
            layer.lora_B[name].copy_(P)
            layer.lora_E[name].copy_((values / factor)[:, None])
    return continued


def _decomposed(
    path: str, A: Tensor, B: Tensor, scaling: float, rank: int
) -> tuple[tuple[Tensor, Tensor, Tensor], float, float]:
    """P [N, rank], values [rank], Q [rank, K] of scaling * B A; the energy that is kept and that is lost."""
    if not (A.isfinite().all() and B.isfinite().all() and math.isfinite(scaling)):
        raise ValueError(f"{path}: found NaN or Inf in the adapter, wanted finite numbers")
    Q_B, R_B = torch.linalg.qr(B.detach().double())
    Q_A, R_A = torch.linalg.qr(A.detach().double().T)
    U, S, Vh = torch.linalg.svd(scaling * R_B @ R_A.T, full_matrices=False)
    P, Q = (_completed(vectors[:, :rank], rank) for vectors in (Q_B @ U, Q_A @ Vh.T))
    values = S.new_zeros(rank)
    values[: len(S)] = S[:rank]
    return (P, values, Q.T), float(S[:rank].square().sum()), float(S[rank:].square().sum())


def _completed(vectors: Tensor, rank: int) -> Tensor:
    """Orthonormal columns [n, m] -> [n, rank]: random ones orthogonal to them and to each other, as far as n allows."""
    n, m = vectors.shape
    fresh = torch.randn(n, rank - m, dtype=vectors.dtype, device=vectors.device)
    room = max(min(n, rank) - m, 0)
    if room:
        fresh[:, :room] = torch.linalg.qr(torch.cat([vectors, fresh[:, :room]], 1))[0][:, m:]
    return torch.cat([vectors, fresh / fresh.norm(dim=0)], 1)


def _targeting(config: AdaLoraConfig, trained: Trained, base: nn.Module) -> AdaLoraConfig:
    """A copy of `config` that targets the adapter's layers. Raises: ValueError if it says others."""
    config, found = copy.copy(config), trained.config
    config.task_type = config.task_type or found.task_type
    if config.target_modules is None:
        for name in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"):
            setattr(config, name, copy.copy(getattr(found, name)))
    config = _maybe_include_all_linear_layers(config, base)
    wanted = named(config, base)
    if differing := sorted(wanted ^ trained.layers.keys()):
        raise ValueError(
            f"target_modules: found {len(wanted)} layers in AdaLoraConfig and {len(trained.layers)} in the adapter, differing in "
            f"{differing[:5]}; wanted the same, or target_modules=None, which takes the adapter's"
        )
    return config
