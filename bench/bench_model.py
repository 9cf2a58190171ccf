"""Whole models: a training step and decoding of Llama-3-8B's configuration, a training step of Llama-3-70B's in 48 GiB.

Random weights, LoRA of rank 16 on all seven linears of a layer, attention by torch's scaled dot product. Contenders are
in one process and take turns; each has a model of its own. `memory` is what a contender's steps hold at their peak, its
model included: torch's allocator counts tensors, so models that wait their turn are subtracted exactly; `managed` are the
states of PagedAdamW8bit, which steps ours, where the others have torch's fused AdamW. Models are in `dtype`, adapters in
float32, as transformers and peft load them; without prepare_model_for_kbit_training, whose float32 head and residuals
would cost the peers more.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import models
from .harness import Case, options, run
from .model_memory import clear, measured, within
from .model_sizes import LLAMA_3_8B, LLAMA_3_70B, TOY, Llama
from .model_steps import Decoding, Found, StepMeter, Training, fused, paged
from .timing import Contender

KINDS = ("train", "decode", "70b")
LIMIT_BYTES = 48 * 2**30
# Relative: each loss; of logits and gradients the rms of the difference over their own. At 32 layers in bfloat16 two
# dense models, one under autocast, differ by 4e-4, 2.4e-2 and 3.6e-2 (256 wide, on a CPU).
LOSSES, LOGITS, GRADIENTS = 2e-3, 5e-2, 1e-1


def train_case(llama: Llama, batch: Tensor, dtype: torch.dtype, absent: list[str], liger: bool = False) -> Case:
    """Steps over batch, int64 [batch, tokens]. Ours must lose what the dense model of the decoded weights loses."""
    clear()
    device, glue = batch.device.type, models.liger_glue if liger else models.no_glue

    def make(build: Callable[..., nn.Module], autocast: torch.dtype | None, optimizer: Any = fused) -> dict[str, Any]:
        model = partial(build, llama.config, device, dtype, glue=glue)
        training, memory = measured(model, lambda model: Training(model, batch, autocast, optimizer))
        return {"calls": (training,), "memory": memory}

    mixed = None if dtype == torch.float32 else dtype
    note = ", autocast" if mixed else ""
    dense = make(models.dense_peft, mixed)
    wanted = dense["calls"][0].found
    contenders = {
        "nf4lora": Contender(**make(models.ours, None, paged), ours=True),
        "nf4lora, not grouped": Contender(**make(partial(models.ours, group=False), None, paged), ours=True),
    }
    for name, autocast in {f"bitsandbytes + peft{note}": mixed, "bitsandbytes + peft": None}.items():
        with _or_absent(absent, f"{llama.title}, {name}"):
            contenders[name] = Contender(**make(models.bitsandbytes_peft, autocast))
    contenders[f"{str(dtype)[6:]} + peft{note}"] = Contender(**dense)

    def error(found: Found) -> dict[str, float]:
        losses = ((found.losses - wanted.losses) / wanted.losses).abs().max().item()
        return {"losses": losses, **{name: _relative(getattr(found, name), getattr(wanted, name)) for name in ("logits", "gradients")}}

    def gate(found: Found) -> None:
        errors = error(found)
        near = errors["losses"] <= LOSSES and errors["logits"] <= LOGITS and errors["gradients"] <= GRADIENTS
        assert near, f"from the dense model's: {errors}"

    title = f"{llama.title}, {_tokens(batch)}, {str(dtype)[6:]}" + (", all with Liger" if liger else "")
    return Case(title, "training step", contenders, gate, error, tokens=batch.numel())


def decode_case(
    llama: Llama, prompt: Tensor, count: int, dtype: torch.dtype, absent: list[str], compiled: bool = False
) -> Case:
    """`count` tokens after prompt, int64 [1, P]; adapters in `dtype`.

    What a graph computes must be what it was recorded from, bit for bit, and its first step what the whole sequence
    gives without a cache.
    """
    clear()
    contenders = {}

    def add(name: str, build: Callable[..., nn.Module], ours: bool = False, compile: bool = False) -> None:
        model = partial(models.in_one_dtype, build, llama.config, prompt.device.type, dtype)
        decoding, memory = measured(model, lambda model: Decoding(model, prompt, count, compile))
        try:
            if prompt.is_cuda:
                decoding.capture()
        except RuntimeError as error:
            if ours:
                raise
            torch.cuda.synchronize()
            absent.append(f"{llama.title}, {name}, in a CUDA graph: {_reason(error)}")
            name += ", no graph"
        contenders[name] = Contender((decoding,), ours=ours, memory=memory)

    add("nf4lora", models.ours, ours=True)
    if compiled:
        add("nf4lora, compiled", models.ours, ours=True, compile=True)
    for compile in (False, True) if compiled else (False,):
        for peer, build in {f"{str(dtype)[6:]}, no adapters": models.dense, "bitsandbytes + peft": models.bitsandbytes_peft}.items():
            name = peer + (", compiled" if compile else "")
            with _or_absent(absent, f"{llama.title}, decoding, {name}"):
                add(name, build, compile=compile)

    def error(found: tuple[Tensor, Tensor, Tensor]) -> dict[str, float]:
        logits, eager, full = found
        return {"differing": int((logits != eager).sum()), "logits": _relative(logits[0].float(), full.float())}

    def gate(found: tuple[Tensor, Tensor, Tensor]) -> None:
        errors = error(found)
        assert errors["differing"] == 0 and errors["logits"] <= LOGITS, f"from eager and full forwards: {errors}"

    title = f"{llama.title}, {prompt.shape[1]} tokens before, {str(dtype)[6:]}"
    return Case(title, "decoding", contenders, gate, error, tokens=count)


def packed_case(llama: Llama, batch: Tensor, dtype: torch.dtype, limit_bytes: int | None = None) -> Case:
    """Steps of a model of random bytes, its adapters in `dtype`: losses and adapters stay finite, memory in the limit."""
    clear()
    model = partial(models.packed, llama.config, batch.device.type, dtype)
    training, memory = measured(model, lambda model: Training(model, batch, optimizer=paged), alone=True)

    def gate(found: Found) -> None:
        assert bool(found.losses.isfinite().all()), f"losses {found.losses.tolist()}"
        assert bool(found.gradients.isfinite().all()), "gradients not finite"
        pairs = [(name, p) for name, *pair in models.adapters(training.model) for p in pair]
        wrong = [name for name, p in pairs if not bool(p.isfinite().all())]
        assert not wrong, f"adapters not finite: {wrong}"
        assert not (limit_bytes and memory) or memory["reserved"] + memory["managed"] <= limit_bytes, f"{memory}"

    limit = f", in {limit_bytes / 2**30:.0f} GiB" if limit_bytes else ""
    title = f"{llama.title}, {_tokens(batch)}, adapters {str(dtype)[6:]}{limit}"
    contenders = {"nf4lora": Contender((training,), ours=True, memory=memory)}
    return Case(title, "training step", contenders, gate, tokens=batch.numel())


def cases(
    device: str, only: list[str], layers: int | None, compiled: bool, absent: list[str]
) -> Iterator[Callable[[], Case]]:
    """Most important first. On a CPU every size is a toy's."""
    cuda = device == "cuda"
    small = Llama("Llama-3-8B", LLAMA_3_8B, layers) if cuda else Llama("toy", TOY, layers)
    large = Llama("Llama-3-70B", LLAMA_3_70B) if cuda else small
    tokens, prompt, dtype = (2048, 512, torch.bfloat16) if cuda else (128, 32, torch.float32)
    limit = LIMIT_BYTES if cuda else None

    def batch(rows: int, tokens: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(small.sizes["vocab_size"], (rows, tokens), generator=generator).to(device)

    if "train" in only:
        yield lambda: train_case(small, batch(2, tokens), dtype, absent)
    if "decode" in only:
        yield lambda: decode_case(small, batch(1, prompt), prompt // 8, dtype, absent, compiled)
    if "70b" in only:
        with within(limit):
            yield lambda: packed_case(large, batch(1, tokens), dtype, limit)
    if "train" in only and cuda and not models.absent("liger_kernel"):
        # Last: from here on every model of this process has Liger's RoPE
        yield lambda: train_case(small, batch(2, tokens), dtype, absent, liger=True)


@contextmanager
def _or_absent(absent: list[str], name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001 a peer that cannot run here is named, with its reason, and ours goes on
        absent.append(f"{name}: {_reason(error)}")
        print(f"absent: {absent[-1]}", flush=True)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"


def _relative(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def _tokens(batch: Tensor) -> str:
    return f"{batch.shape[0]} × {batch.shape[1]} tokens"


def main() -> int:
    warnings.filterwarnings("ignore", message=".*(kernels-community|heckpointing|nothing pages).*")
    asked = options(
        __doc__,
        only={"default": ",".join(KINDS), "help": "what to measure, with commas between: %(default)s"},
        layers={"type": int, "help": "of the 32 of the 8B model; all of them by default"},
        compile={"action": "store_true", "help": "decode also by what torch.compile makes of the models"},
    )
    absent = models.absent_peers()
    only = asked.only.split(",")
    if unknown := set(only) - set(KINDS):
        sys.exit(f"--only: found {sorted(unknown)}, wanted some of {KINDS}")
    todo = cases(asked.device, only, asked.layers, asked.compile, absent)
    return run(f"{asked.device}_model", todo, StepMeter(asked.device), 7, asked.out, absent)


if __name__ == "__main__":
    sys.exit(main())
