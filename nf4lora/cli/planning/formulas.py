"""What claims are checked by: sizes by the code of the plan, errors by quantizing a normal sample."""

from functools import cache

import torch
from torch import Tensor

from ...codebook import codebook
from ...functional import dequantize_4bit, quantize_4bit
from .known import model
from .needs import Choice, adapter_sizes, need, weights_of

SAMPLE = 1 << 20
GB = 1e9
# The least that a step of LoRA computes of each frozen weight and token: forward, forward again for checkpointing, and dx.
FLOP = 6


def bits() -> float:
    m = model("llama-2-7b")
    return 8 * (m.packed + sum(m.constants.values())) / m.quantized


def _bits_plain() -> float:
    from .inventory import take
    from .known import config

    m = take(config("llama-2-7b"), double_quant=False)
    return 8 * (m.packed + sum(m.constants.values())) / m.quantized


def bits_saved() -> float:
    return _bits_plain() - bits()


def saved(name: str) -> float:
    return bits_saved() * model(name).quantized / 8 / GB


def double_cost() -> float:
    """The constants that double quantization leaves, in percent of the 4-bit codes."""
    return 100 * (bits() - 4) / 4


def constants_saved() -> float:
    return 100 * bits_saved() / (_bits_plain() - 4)


def full(name: str, each: str) -> float:
    """`each`: bytes of weight, gradient and two states together."""
    return model(name).total * int(each) / GB


def nf4(name: str) -> float:
    return sum(weights_of(model(name), Choice("qlora")).values()) / GB


def sixteen(name: str) -> float:
    """The weights of LoRA's base alone."""
    return sum(weights_of(model(name), Choice("lora")).values()) / GB


def adapter(K: str, N: str, r: str) -> float:
    return int(r) * (int(K) + int(N))


def trainable(name: str, method: str, r: str, *targets: str) -> float:
    return sum(adapter_sizes(model(name), Choice(method, r=int(r), target_modules=targets)))


def share(name: str, r: str, *targets: str) -> float:
    """Of the adapters in all parameters, percent."""
    count = trainable(name, "lora", r, *targets)
    return 100 * count / (model(name).total + count)


def adapter_bytes(name: str, r: str, each: str) -> float:
    return trainable(name, "lora", r, "q_proj", "v_proj") * int(each) / GB


def prefix(name: str, tokens: str) -> float:
    """A key and a value for each token and layer."""
    return sum(2 * b.count * b.hidden for b in model(name).blocks) * int(tokens)


def base_gradients(name: str) -> float:
    """All gradients of a QLoRA step less those of the adapters."""
    found = need(model(name), Choice("qlora"))
    return (found.parts["gradients"] - 4 * found.trainable) / GB


def flops(name: str, rate: str, tokens: str) -> float:
    return FLOP * model(name).quantized * float(rate) * int(tokens) / 1e12


@cache
def _sample(count: int = SAMPLE) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(0))


def _mse(decoded: Tensor, weight: Tensor) -> float:
    """Relative to the mean square of the weight."""
    return ((decoded.double() - weight.double()).square().mean() / weight.double().square().mean()).item()


def _decoded(kind: str) -> Tensor:
    weight = _sample()
    if not kind.startswith("int4"):
        packed, state = quantize_4bit(weight, 64, kind == "nf4-double", kind[:3])
        return dequantize_4bit(packed, state, torch.float32)
    blocks = weight.view(-1, 64)
    if kind == "int4":
        scale = blocks.abs().amax(1, keepdim=True) / 7
        return ((blocks / scale).round() * scale).view(-1)
    low, high = blocks.aminmax(dim=1, keepdim=True)
    scale = (high - low) / 15
    return (((blocks - low) / scale).round() * scale + low).view(-1)


def error(kind: str) -> float:
    return 100 * _mse(_decoded("nf4-double" if kind == "double" else "nf4"), _sample()) ** 0.5


def mse_ratio(kind: str, other: str) -> float:
    return _mse(_decoded(kind), _sample()) / _mse(_decoded(other), _sample())


def naive_error() -> float:
    """Of the next level above each weight instead of the nearest, over a tensor of 4096 x 4096."""
    weight, levels = _sample(1 << 24), codebook("nf4")
    absmax = weight.abs().amax()
    return 100 * _mse(levels[torch.searchsorted(levels, weight / absmax).clamp(max=15)] * absmax, weight) ** 0.5


@cache
def _shares() -> Tensor:
    packed, _ = quantize_4bit(_sample(), 64, False)
    counts = torch.bincount(torch.cat([packed.view(-1) >> 4, packed.view(-1) & 15]).long(), minlength=16)
    return counts.double() / counts.sum()


def bin_share(which: str) -> float:
    return 100 * (_shares().max() if which == "max" else _shares().min()).item()


def entropy() -> float:
    return -(_shares() * _shares().log2()).sum().item()


def quantiles() -> float:
    """Largest distance of the table from quantiles of the normal: 8 of the positive half, 7 of the negative, and zero."""
    outer = 0.5 * ((1 - 1 / 30) + (1 - 1 / 32))
    positive = torch.special.ndtri(torch.linspace(outer, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(outer, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([negative, torch.zeros(1, dtype=torch.float64), positive.flip(0)])
    return (levels / levels.max() - codebook("nf4").double()).abs().max().item()
