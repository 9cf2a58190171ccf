"""Whole Llamas of random weights, as each contender of bench_model holds them.

A model is made on the meta device and filled layer by layer: no contender ever holds more of it dense than one layer,
unless it computes so. Weights and adapters are drawn by name, so all contenders start from the same ones; the dense
models hold what NF4 decodes to.
"""

import zlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from nf4lora import NF4Linear, NF4LoRALinear, replace_linears
from nf4lora.codebook import codebook
from nf4lora.nn import group_blocks

RANK, ALPHA = 16, 32
_NF4_RMS = codebook("nf4").square().mean().sqrt().item()
Glue = Callable[[LlamaForCausalLM], Any]  # what is put into a model beside its linears


def no_glue(model: LlamaForCausalLM) -> None:
    """transformers' own RMSNorm, RoPE and cross-entropy."""


def liger_glue(model: LlamaForCausalLM) -> None:
    """Liger's. Its RoPE is that of every model of this process from now on."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(rope=True, rms_norm=True, swiglu=False, fused_linear_cross_entropy=True, model=model)


def ours(config: LlamaConfig, device: str, dtype: torch.dtype, group: bool = True, glue: Glue = no_glue) -> nn.Module:
    """`replace_linears`, layer by layer: 4 bits with double quantization, adapters in float32."""
    model = _model(config, device, dtype, lambda layer: replace_linears(layer, r=RANK, lora_alpha=ALPHA, group=group))
    glue(model)
    return _with_adapters(model)


def dense(config: LlamaConfig, device: str, dtype: torch.dtype) -> nn.Module:
    """The decoded weights in `dtype`, without adapters."""
    return _model(config, device, dtype, _decode)


def dense_peft(config: LlamaConfig, device: str, dtype: torch.dtype, glue: Glue = no_glue) -> nn.Module:
    """LoRA of peft over the decoded weights in `dtype`."""
    model = dense(config, device, dtype)
    glue(model)
    return _peft(model)


def bitsandbytes_peft(config: LlamaConfig, device: str, dtype: torch.dtype, glue: Glue = no_glue) -> nn.Module:
    """What transformers makes of BitsAndBytesConfig (nf4, double quantization, computed in `dtype`), LoRA of peft over it."""
    import bitsandbytes as bnb
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    asked = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )

    def quantize(layer: nn.Module) -> None:
        weights = {name: linear.weight.data for name, linear in _linears(layer)}
        replace_with_bnb_linear(layer, quantization_config=asked)
        for name, linear in _linears(layer):
            # as transformers' Bnb4bitQuantize does when it loads a checkpoint
            linear.weight = bnb.nn.Params4bit(weights.pop(name), **linear.weight.__dict__).to(device)

    model = _model(config, device, dtype, quantize)
    model.is_loaded_in_4bit = True
    glue(model)
    return _peft(model)


def packed(config: LlamaConfig, device: str, dtype: torch.dtype) -> nn.Module:
    """Ours from random bytes, for sizes too large to quantize just for a test; adapters in `dtype`.

    Codes and their constants are random, absmax within a quarter of what gives weights a std of K ** -0.5.
    """

    def fill(layer: nn.Module) -> None:
        for name, linear in _linears(layer):
            N, K = linear.weight.shape
            frame = NF4LoRALinear(K, N, bias=False, r=RANK, lora_alpha=ALPHA, device="meta", dtype=dtype)
            absmax = K**-0.5 / _NF4_RMS
            constants = {"weight_nested_absmax": absmax / 4, "weight_nested_offset": absmax}
            values = {}
            for own, p in frame.named_parameters():
                if own in constants:
                    values[own] = torch.full(p.shape, constants[own], dtype=torch.float32, device=device).view(p.dtype)
                elif p.dtype == torch.uint8:
                    values[own] = torch.randint(256, p.shape, dtype=p.dtype, device=device)
                else:
                    values[own] = torch.empty(p.shape, dtype=dtype, device=device)
            frame.load_state_dict(values, assign=True)
            layer.set_submodule(name, frame)
        group_blocks(layer)

    return _with_adapters(_model(config, device, dtype, fill, draw=False))


def adapters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
    """Name of the linear, lora_A [r, K], lora_B [N, r]: of ours and of peft's layers alike."""
    for name, module in model.named_modules():
        A, B = getattr(module, "lora_A", None), getattr(module, "lora_B", None)
        if isinstance(A, nn.ModuleDict):
            A, B = A["default"].weight, B["default"].weight
        if isinstance(A, nn.Parameter):
            yield name.removeprefix("base_model.model."), A, B


def in_one_dtype(build: Callable[..., nn.Module], config: LlamaConfig, device: str, dtype: torch.dtype) -> nn.Module:
    """A model whose adapters are in `dtype` too, as one that is done with training."""
    model = build(config, device, dtype)
    for _, *pair in adapters(model):
        for p in pair:
            p.data = p.data.to(dtype)
    return model


def absent(package: str) -> str | None:
    """Why a package is not used here, or None."""
    return "not installed" if find_spec(package) is None else None


def absent_peers() -> list[str]:
    """Those that no case asks for here, and why. Unsloth is not imported: that alone changes transformers' Llama."""
    unsloth = absent("unsloth") or "it replaces the Llama of the whole process, so it cannot take turns with others"
    liger = absent("liger_kernel")
    return [f"Unsloth: {unsloth}"] + ([f"Liger's RMSNorm, RoPE and cross-entropy: {liger}"] if liger else [])


def _model(
    config: LlamaConfig, device: str, dtype: torch.dtype, convert: Callable[[nn.Module], Any], draw: bool = True
) -> LlamaForCausalLM:
    """Frozen, of random weights; `convert` takes each decoder layer, its linears drawn (or on the meta device)."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype).requires_grad_(False)
    with torch.device(device):
        model.model.rotary_emb = LlamaRotaryEmbedding(config)  # its table is computed, not a parameter
    for name, p in list(model.named_parameters()):
        if p.ndim == 1:
            _set(model, name, torch.ones(p.shape, dtype=dtype, device=device))
        elif not name.startswith("model.layers."):
            std = 1.0 if "embed" in name else p.shape[1] ** -0.5
            _set(model, name, _drawn(name, p.shape, std, device, dtype))
    for index, layer in enumerate(model.model.layers):
        for name, linear in _linears(layer) if draw else ():
            weight = _drawn(f"{index} {name}", linear.weight.shape, linear.in_features**-0.5, device, dtype)
            linear.weight = nn.Parameter(weight, requires_grad=False)
        convert(layer)
    return model


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, own = name.rpartition(".")
    setattr(model.get_submodule(owner), own, nn.Parameter(value, requires_grad=False))


def _drawn(name: str, shape: tuple[int, ...], std: float, device: Any, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator, dtype=dtype, device=device).mul_(std)


def _linears(layer: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, m) for name, m in layer.named_modules() if isinstance(m, nn.Linear)]


def _decode(layer: nn.Module) -> None:
    for _, linear in _linears(layer):
        linear.weight = nn.Parameter(NF4Linear.from_linear(linear).dequantize(), requires_grad=False)


def _peft(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    asked = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    return _with_adapters(get_peft_model(model, asked))


@torch.no_grad()
def _with_adapters(model: nn.Module) -> nn.Module:
    """Adapters as after some training: at zero, B would hide what is wrong with them."""
    for name, A, B in adapters(model):
        A.copy_(_drawn(f"{name} A", A.shape, A.shape[1] ** -0.5, A.device, torch.float32))
        B.copy_(_drawn(f"{name} B", B.shape, 0.02, B.device, torch.float32))
    return model
