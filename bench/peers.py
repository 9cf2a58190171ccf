"""How others compute linears with LoRA, on the very weights and adapters of ours: torch, peft over torch and over
bitsandbytes, and the schedule of Unsloth's functions. What needs a package that is not here says so: `why_not`."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from nf4lora import NF4LoRALinear, ops

ADAPTER = "default"  # peft's own name for it


def why_not(*packages: str, device: torch.device | str = "cpu") -> str | None:
    """Why these packages cannot be used here, or None. bitsandbytes may be importable and have no library for a device."""
    for name in packages:
        try:
            module = import_module(name)
            if name == "bitsandbytes":
                module.functional.quantize_4bit(torch.ones(64, device=device))
        except ImportError as error:
            return f"{name} cannot be imported: {error}"
        except (RuntimeError, OSError, AttributeError) as error:
            return f"{name} does not run on {device}: {error}"
    return None


def dense_linear(like: NF4LoRALinear, dtype: torch.dtype) -> nn.Linear:
    """The frozen linear of the decoded weight, without LoRA."""
    layer = nn.Linear(like.in_features, like.out_features, bias=False, device="meta")
    layer.weight = nn.Parameter(like.dequantize(dtype), requires_grad=False)
    return layer


def bitsandbytes_linear(like: NF4LoRALinear, dtype: torch.dtype) -> nn.Module:
    """bitsandbytes' Linear4bit over the bytes of `like`, which it shares; computes in `dtype` at its own dispatch."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    N, K, device = like.out_features, like.in_features, like.weight.device
    layer = Linear4bit(K, N, bias=False, compute_dtype=dtype, quant_type=like.quant_type, device="meta")
    statistics = like.quant_state.as_dict()
    layer.weight = Params4bit.from_prequantized(like.weight.detach(), statistics, device=device, module=layer)
    layer.weight.quant_state.dtype = dtype
    return layer


def with_peft(
    linears: Mapping[str, nn.Module], like: Mapping[str, NF4LoRALinear], adapters: torch.dtype
) -> nn.ModuleDict:
    """The same linears inside peft's LoRA layers, whose adapters start as those of `like`, in dtype `adapters`."""
    from peft import LoraConfig, inject_adapter_in_model

    host = nn.ModuleDict(linears)
    host.is_loaded_in_4bit = True  # how transformers tells peft to look for Linear4bit
    first = next(iter(like.values()))
    config = LoraConfig(r=first.r, lora_alpha=first.lora_alpha, lora_dropout=0.0, target_modules=list(linears))
    inject_adapter_in_model(config, host, ADAPTER)
    for name, own in like.items():
        for found, values in zip(peft_adapters([host[name]]), (own.lora_A, own.lora_B), strict=True):
            found.data = values.detach().to(adapters, copy=True)
    return host


def peft_adapters(layers: Iterable[nn.Module]) -> list[nn.Parameter]:
    """lora_A and lora_B of each of peft's layers."""
    return [pair[ADAPTER].weight for layer in layers for pair in (layer.lora_A, layer.lora_B)]


class UnslothFunction(torch.autograd.Function):
    """Linears on one x as Unsloth's LoRA_QKV, LoRA_MLP and LoRA_W schedule them: y_i = x W_i^T + s (x A_i^T) B_i^T.

    Forward, a linear at a time: W_i decoded into the buffer that all share, the library's product, x A_i^T, an addmm_
    onto y_i. Saved: x, and with `swiglu` (of two linears) gate and up beside each other. Backward, a linear at a time:
    dy_i B_i for dA_i and once more for dx, x A_i^T once more for dB_i, W_i decoded anew into memory of its own, two
    addmm_ onto dx. dx has memory of its own too: Unsloth writes it over x, which saves memory, not time.

    decode: one function a linear, from the memory to write W_i [N_i, K] to, or None, to W_i.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, decode: Sequence[Callable], buffer: Tensor, scaling: float, swiglu: bool, *adapters: Tensor
    ) -> Any:
        rows = [B.shape[0] for B in adapters[1::2]]
        y = x.new_empty(len(x), sum(rows)) if swiglu else None
        ys = tuple(x.new_empty(len(x), n) for n in rows) if y is None else y.split(rows, 1)
        for out, decoded, (A, B) in zip(ys, decode, _pairs(adapters, x.dtype), strict=True):
            torch.mm(x, decoded(buffer).T, out=out)
            out.addmm_(x @ A.T, B.T, alpha=scaling)
        ctx.save_for_backward(x, y, *adapters)
        ctx.decode, ctx.scaling = decode, scaling
        return ys if y is None else ops.swiglu_fwd(y)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_up, *adapters = ctx.saved_tensors
        if gate_up is not None:
            dys = ops.swiglu_bwd(gate_up, dys[0]).chunk(2, 1)
        dx, learned, s = None, [], ctx.scaling
        for dy, decoded, (A, B) in zip(dys, ctx.decode, _pairs(adapters, x.dtype), strict=True):
            dA, dB = torch.empty_like(A), torch.empty_like(B)
            dA.addmm_((dy @ B).T, x, beta=0, alpha=s)
            dB.addmm_(dy.T, x @ A.T, beta=0, alpha=s)
            dx = dy @ decoded(None) if dx is None else dx.addmm_(dy, decoded(None))
            dx.addmm_(dy @ B, A, alpha=s)
            learned += [dA, dB]
        return dx, None, None, None, None, *learned


def unsloth(
    like: Sequence[NF4LoRALinear], buffer: Tensor, dtype: torch.dtype, swiglu: bool = False
) -> Callable[[Tensor], Any]:
    """x [M, K] -> the outputs of `like` by `UnslothFunction`, in `dtype`.

    W is decoded by bitsandbytes' kernels as in Unsloth, three launches for one weight; where it is not installed by
    ours, one launch. buffer: dtype, as many elements as the largest weight; what cannot write there allocates instead:
    ours, and bitsandbytes on a CPU.
    """
    decode = [_decoder(layer, dtype) for layer in like]
    adapters = [t for layer in like for t in (layer.lora_A, layer.lora_B)]
    return lambda x: UnslothFunction.apply(x, decode, buffer, like[0].scaling, swiglu, *adapters)


def _decoder(like: NF4LoRALinear, dtype: torch.dtype) -> Callable[[Tensor | None], Tensor]:
    if why_not("bitsandbytes", device=like.weight.device):
        return lambda buffer: like.dequantize(dtype)
    from bitsandbytes.functional import dequantize_4bit

    shape = like.out_features, like.in_features
    weight = bitsandbytes_linear(like, dtype).weight
    packed, state = weight.data, weight.quant_state

    def decoded(buffer: Tensor | None) -> Tensor:
        into = None if buffer is None or not buffer.is_cuda else buffer[: shape[0] * shape[1]].view(shape)
        return dequantize_4bit(packed, state, out=into)

    return decoded


def _pairs(adapters: Sequence[Tensor], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    cast = [t.to(dtype) for t in adapters]
    return list(zip(cast[::2], cast[1::2], strict=True))
