"""The demonstration's base as each method trains it: whole, in bfloat16 with LoRA, or in NF4 with a tuner of peft.

Every builder takes the base's folder, the run's settings and the dtype to compute in, and returns a model that `train.start`
takes: what is to be trained requires gradients, nothing else does.
"""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ..nn import NF4Linear, replace_linears
from . import model as models
from .compute import device
from .data import IGNORED
from .settings import Settings

# Of --lr, which suits LoRA: with every weight moving it is too high; what multiplies or is read as a token needs far more.
RATE = {
    "full": 0.25, "lora": 1.0, "qlora": 1.0, "adalora": 2.0, "ia3": 25.0, "prefix": 60.0, "p-tuning-v2": 4.0, "prompt": 200.0,
    "p-tuning": 1.0,
}  # fmt: skip
VIRTUAL = 16  # tokens or key-value pairs put before the text
HIDDEN = 128  # width of the networks that make them
_TOKENS = {"num_virtual_tokens": VIRTUAL, "task_type": "CAUSAL_LM"}


class Bf16Linear(nn.Linear):
    """A frozen linear that keeps its weight in bfloat16 and computes in x's dtype: what LoRA's base is, without 4 bits."""

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self.weight)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)  # not its float32 copy, which autograd would keep
        return x @ weight.to(x.dtype).t()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return dy @ weight.to(dy.dtype), None


def build_full(base: Path, settings: Settings, compute: torch.dtype) -> nn.Module:
    """Every weight trains, in float32: in bfloat16 the steps of AdamW would round away."""
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def build_lora(base: Path, settings: Settings, compute: torch.dtype) -> nn.Module:
    """peft's LoRA on the base's bfloat16 linears; the rest in the compute dtype."""
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(base, dtype=compute)
    for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]:
        frozen = Bf16Linear(linear.in_features, linear.out_features, bias=False, device="meta")
        frozen.weight = nn.Parameter(linear.weight.detach().to(torch.bfloat16), requires_grad=False)
        model.set_submodule(name, frozen)
    ranks = {"r": settings.r, "lora_alpha": settings.alpha, "lora_dropout": settings.dropout}
    config = LoraConfig(task_type="CAUSAL_LM", **ranks, **_targets(settings))
    torch.manual_seed(settings.seed)
    return get_peft_model(model, config)


def build_qlora(base: Path, settings: Settings, compute: torch.dtype) -> nn.Module:
    """NF4LoRALinears, with double quantization, of the same base."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    return models.prepare(model, settings, device(), compute)


def _adalora(settings: Settings) -> Any:
    """AdaLoRA that ends with QLoRA's ranks on average and has its scale: half as many more ranks to start with."""
    from peft import AdaLoraConfig

    return AdaLoraConfig(
        init_r=settings.r * 3 // 2, target_r=settings.r, lora_alpha=settings.alpha * 3 / 2, lora_dropout=settings.dropout,
        total_step=settings.max_steps, task_type="CAUSAL_LM", **settings.schedule(settings.max_steps), **_targets(settings),
    )  # fmt: skip


def _ia3(settings: Settings) -> Any:
    from peft import IA3Config

    # As the paper has it: keys, values, and what goes into the MLP's last linear
    targets = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    return IA3Config(task_type="CAUSAL_LM", **targets)


def _prefix(settings: Settings) -> Any:
    from peft import PrefixTuningConfig

    return PrefixTuningConfig(**_TOKENS)


def _projected(settings: Settings) -> Any:
    from peft import PrefixTuningConfig

    return PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=HIDDEN, **_TOKENS)


def _prompt(settings: Settings) -> Any:
    from peft import PromptTuningConfig

    return PromptTuningConfig(prompt_tuning_init="SAMPLE_VOCAB", **_TOKENS)


def _encoder(settings: Settings) -> Any:
    from peft import PromptEncoderConfig

    return PromptEncoderConfig(encoder_hidden_size=HIDDEN, **_TOKENS)


# Tuners of peft on the NF4 base: settings -> config
CONFIGS: dict[str, Callable[[Settings], Any]] = {
    "adalora": _adalora, "ia3": _ia3, "prefix": _prefix, "p-tuning-v2": _projected, "prompt": _prompt, "p-tuning": _encoder,
}  # fmt: skip


def build_tuner(method: str, base: Path, settings: Settings, compute: torch.dtype) -> nn.Module:
    """peft's tuner `method` of CONFIGS over NF4Linears with double quantization; what stays dense in the compute dtype."""
    from peft import get_peft_model

    from .. import hf  # noqa: F401 (peft then puts our AdaLoRA on our linears)

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).requires_grad_(False).to(device())
    replace_linears(model, layer=NF4Linear)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(compute)
    torch.manual_seed(settings.seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(fan_in_fan_out|rank).*")
        model = get_peft_model(model, CONFIGS[method](settings))
    # Of virtual tokens the last predicts the first byte of a block, which no other method has to
    model.register_forward_pre_hook(_first_unscored, with_kwargs=True)
    return model


BUILD: dict[str, Callable[[Path, Settings, torch.dtype], nn.Module]] = {
    "full": build_full, "lora": build_lora, "qlora": build_qlora, **{name: partial(build_tuner, name) for name in CONFIGS},
}  # fmt: skip


def _first_unscored(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    if kwargs.get("labels") is None:
        return args, kwargs
    labels = kwargs["labels"].clone()
    labels[:, 0] = IGNORED
    return args, kwargs | {"labels": labels}


def _targets(settings: Settings) -> dict[str, Any]:
    names = settings.target_modules
    return {"target_modules": names[0] if names == ("all-linear",) else list(names), "exclude_modules": ["lm_head"]}
