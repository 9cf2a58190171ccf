"""PiSSA, OLoRA, LoftQ and orthogonal starts of a peft LoRA on a base quantized here, while its 16-bit weights are in hand."""

import copy
import dataclasses
import os
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module

from .. import starts
from ..nn import NF4Linear
from ..nn.replace import check_weights
from .config import NF4Config
from .experts import quantize_experts_
from .quantizer import NF4Quantizer
from .saying import say_quantized

# Fields of LoraConfig that these starts go with; any other changes what the adapter computes or where it sits.
_GOES_WITH = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r",
    "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "bias", "use_rslora", "modules_to_save",
    "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "trainable_token_indices",
    "loftq_config", "use_dora", "runtime_config",
}  # fmt: skip


@torch.no_grad()
def quantize_with_start(
    model: nn.Module, peft_config: LoraConfig, config: NF4Config | None = None, adapter_name: str = "default",
    quantize_rest: bool = True, generator: torch.Generator | None = None,
) -> PeftModel:  # fmt: skip
    """Quantize a 16-bit model and give it a LoRA adapter that starts as `peft_config.init_lora_weights` says.

        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        model = quantize_with_start(model, LoraConfig(init_lora_weights="pissa_niter_4", target_modules="all-linear"))
        model.save_pretrained("start")                     # the adapter before training
        ...
        model.save_pretrained("trained"); save_base(model, "base")
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "trained")

    Args:
        model:         float32, bfloat16 or float16; changed in place
        peft_config:   init_lora_weights "pissa", "pissa_niter_N", "olora", "loftq" (rounds: `loftq_config`) or "orthogonal";
                       peft itself chooses the layers, ranks and scalings. Not changed
        config:        4-bit format, and the modules that keep their dtype
        quantize_rest: also what has no adapter, the linears and stacks of experts that `from_pretrained` with this config quantizes
        generator:     of the random numbers, torch's own by default
    Returns:  a PeftModel with the fused layers. Its config says init_lora_weights=True, as loading must not start anew, which
              on 4 bits peft cannot
    Keep:     the base is the residual, so an adapter alone is of no use (but for "orthogonal"): `save_base` writes it. Or save
              a plain LoRA of twice the rank for the original model: save_pretrained("plain",
              path_initial_model_for_weight_conversion="start"), peft's own
    Raises:   before anything is changed: ValueError for a start of another name, a model that is quantized or has adapters
              already, options of LoraConfig that do not go with it, targets that are no `torch.nn.Linear`, a rank that does
              not fit, weights that are shared, on the meta device or hold NaN or Inf; TypeError for other dtypes; what peft
              raises where no layer matches
    Memory:   one layer's float32 temporaries at a time
    """
    config = NF4Config() if config is None else config
    if not isinstance(config, NF4Config):
        raise TypeError(f"config: found a {type(config).__name__}, wanted an NF4Config")
    kind, iterations = _checked(model, peft_config)
    plain = copy.deepcopy(peft_config)
    plain.init_lora_weights, plain.loftq_config = True, {}
    targets, others = _choice(model, plain, adapter_name)
    _check_targets(model, targets, config, kind, iterations)
    skip = _skipped(model, config)
    modules = dict(model.named_modules()) if quantize_rest else {}
    rest = [n for n, m in modules.items() if type(m) is nn.Linear and n in others and should_convert_module(n, skip)]
    check_weights(model, {name: model.get_submodule(name) for name in (*targets, *rest)}, None)
    if quantize_rest:
        quantize_experts_(model, [*skip, *(modules.keys() - others)], **config.layer_options())
    del modules  # holds dense layers
    adapters = {}
    for name in (*targets, *rest):
        layer = NF4Linear.from_linear(model.get_submodule(name), **config.layer_options())
        if name in targets:
            weight = model.get_submodule(name).weight.detach()
            options = {"iterations": iterations, "generator": generator}
            adapters[name] = starts.start_layer(layer, weight, *targets[name], kind, **options)
            del weight
        model.set_submodule(name, layer)
    if isinstance(model, PreTrainedModel):
        say_quantized(model, config)
    peft_model = get_peft_model(model, plain, adapter_name)
    for name, (lora_A, lora_B) in adapters.items():
        _take(model.get_submodule(name), adapter_name, lora_A, lora_B)
    return peft_model


def save_base(model: PeftModel, directory: str | os.PathLike) -> None:
    """Write the quantized base below the adapters, for `from_pretrained`; the model stays as it is.

    Raises: ValueError for merged adapters; TypeError for a base that is no model of transformers.
    """
    if not isinstance(model.get_base_model(), PreTrainedModel):
        raise TypeError(f"model: found a {type(model.get_base_model()).__name__}, wanted a model of transformers")
    if any(isinstance(m, BaseTunerLayer) and m.merged for m in model.modules()):
        raise ValueError("model: found merged adapters, whose base is gone: unmerge_adapter() first")
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    copy.deepcopy(model, shared).unload().save_pretrained(directory)


def _checked(model: nn.Module, config: LoraConfig) -> tuple[str, int]:
    """The start's name and its rounds."""
    if not isinstance(config, LoraConfig):
        raise TypeError(f"peft_config: found a {type(config).__name__}, wanted a LoraConfig")
    kind = config.init_lora_weights
    try:
        starts.kind_of(kind)
    except ValueError as error:
        raise ValueError(f"init_lora_weights: {error}; quantize and get_peft_model as usual for any other") from error
    known = LoraConfig()
    fields = [f.name for f in dataclasses.fields(config) if f.name not in _GOES_WITH]
    if other := {n: getattr(config, n) for n in fields if getattr(config, n) != getattr(known, n, None)}:
        raise ValueError(f"peft_config: found {other}, which does not go with a start computed while quantizing")
    loftq = config.loftq_config if kind == "loftq" else {}
    if loftq.get("loftq_bits", 4) != 4:
        raise ValueError(f"loftq_config: found loftq_bits={loftq['loftq_bits']}, wanted 4")
    for name, m in model.named_modules():
        if isinstance(m, nn.Linear) and not m.weight.is_floating_point():
            raise ValueError(
                f"model: found {name} quantized already ({type(m).__name__}); {kind} needs the 16-bit weight: load the model "
                "without quantization_config, and it is quantized here"
            )
    if adapted := [name for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]:
        raise ValueError(f"model: found an adapter at {adapted[0]}, whose base must not change: unload() it first")
    return kind, loftq.get("loftq_iter", 1)


def _choice(model: nn.Module, config: LoraConfig, adapter_name: str) -> tuple[dict[str, tuple[int, float]], set[str]]:
    """Rank and scaling of the linears that peft adapts, and the modules it leaves as they are, tried on a copy without values."""
    memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    memo |= {id(b): torch.empty_like(b, device="meta") for b in model.buffers()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the real call repeats them
        tried = get_peft_model(copy.deepcopy(model, memo), copy.deepcopy(config), adapter_name, low_cpu_mem_usage=True)
    modules = dict(tried.get_base_model().named_modules())
    adapted = {name: m for name, m in modules.items() if isinstance(m, LoraLayer)}
    for name, m in adapted.items():
        if type(base := m.get_base_layer()) is not nn.Linear:
            raise ValueError(
                f"target_modules: found {name}, a {type(base).__name__}, wanted a torch.nn.Linear; name it in exclude_modules"
            )
    targets = {name: (m.r[adapter_name], m.scaling[adapter_name]) for name, m in adapted.items()}
    learn = {name for name, m in modules.items() if isinstance(m, AuxiliaryTrainingWrapper)}  # modules_to_save
    return targets, modules.keys() - targets.keys() - learn


def _check_targets(
    model: nn.Module, targets: dict[str, tuple[int, float]], config: NF4Config, kind: str, iterations: int
) -> None:
    for name, target in targets.items():
        try:
            starts.check(model.get_submodule(name).weight.shape, *target, kind, iterations)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if not should_convert_module(name, config.modules_to_not_convert):
            raise ValueError(
                f"{name}: found it in modules_to_not_convert, but what its adapter leaves of it is to be quantized; "
                "name it in exclude_modules, or take it out"
            )


def _skipped(model: nn.Module, config: NF4Config) -> list[str]:
    """Patterns of the modules that keep their dtype, as `from_pretrained` has them."""
    if isinstance(model, PreTrainedModel):
        skip = config.modules_to_not_convert
        return NF4Quantizer.get_modules_to_not_convert(model, skip, model._keep_in_fp32_modules)
    return ["lm_head"] if config.modules_to_not_convert is None else config.modules_to_not_convert


def _take(layer: LoraLayer, adapter_name: str, lora_A: torch.Tensor, lora_B: torch.Tensor) -> None:
    layer.lora_A[adapter_name].weight.copy_(lora_A)
    layer.lora_B[adapter_name].weight.copy_(lora_B)
    if adapter_name in layer.lora_magnitude_vector:  # DoRA: row norms of the weight that the start makes
        base = layer.get_base_layer().dequantize(torch.float32)
        weight = torch.addmm(base, lora_B, lora_A, alpha=layer.scaling[adapter_name])
        layer.lora_magnitude_vector[adapter_name].weight.copy_(torch.linalg.norm(weight, dim=1))
