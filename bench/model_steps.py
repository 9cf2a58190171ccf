"""What bench_model times: a training step, tokens decoded one by one, each on a model of its own."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import StaticCache

from nf4lora.optim import PagedAdamW8bit

from .models import adapters
from .timing import Contender, Sample

FIRST_LOSSES = 3
PROBE = 16  # tokens of each sequence, its last, whose logits are compared


class Found(NamedTuple):
    """What a gate reads of the first steps, all float32.

    losses:    of each step [FIRST_LOSSES]
    logits:    before them, of the last tokens [batch, PROBE, vocabulary]
    gradients: of the first step, for the adapters of the first decoder layer, where all of the backward has passed [n]
    """

    losses: Tensor
    logits: Tensor
    gradients: Tensor


def fused(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """torch's AdamW."""
    return torch.optim.AdamW(params, lr=1e-4, weight_decay=0.0, fused=True)


def paged(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Ours, with states of 8 bits in unified memory."""
    return PagedAdamW8bit(params, lr=1e-4, weight_decay=0.0)


class Training:
    """Steps of AdamW on the adapters over one batch, int64 [batch, tokens], with gradient checkpointing.

    The first steps are made when this is built. A call is one more, and returns what was `found` in those.
    """

    def __init__(
        self, model: nn.Module, batch: Tensor, autocast: torch.dtype | None = None,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] = fused,
    ) -> None:  # fmt: skip
        self.model, self.batch, self.autocast = model.train(), batch, autocast
        with torch.no_grad(), self._computing():
            logits = model(input_ids=batch, use_cache=False, logits_to_keep=PROBE).logits.float()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimizer = optimizer([p for p in model.parameters() if p.requires_grad])
        losses = [self.backward()]
        first = [p.grad.flatten() for name, *pair in adapters(model) if ".layers.0." in name for p in pair]
        gradients = torch.cat(first).float()
        self.update()
        losses += [self.step() for _ in range(FIRST_LOSSES - 1)]
        self.found = Found(torch.stack(losses), logits, gradients)

    def __call__(self) -> Found:
        self.step()
        return self.found

    def step(self) -> Tensor:
        """The loss, float32 [], before the step."""
        loss = self.backward()
        self.update()
        return loss

    def backward(self) -> Tensor:
        """Gradients, and the loss, float32 []."""
        with self._computing():
            loss = self.model(input_ids=self.batch, labels=self.batch, use_cache=False).loss
        loss.backward()
        return loss.detach().float()

    def update(self) -> None:
        """AdamW by the gradients, which go."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _computing(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.batch.device.type, self.autocast) if self.autocast else nullcontext()


class Decoding:
    """`count` tokens after a prompt, int64 [1, P], one a step, each the likeliest, from a static cache of 2 * P tokens.

    A call decodes them all and returns what a gate reads: the logits of every step [count, vocabulary], those that were
    found when this was built, and those of the first step without a cache [vocabulary]. `capture` makes a step one CUDA
    graph, whose token, position and cache stay where they are.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, prompt: Tensor, count: int, compiled: bool = False) -> None:
        self.prompt = prompt
        self.model = torch.compile(model.eval(), dynamic=False) if compiled else model.eval()
        self.cache = StaticCache(config=model.config, max_cache_len=2 * prompt.shape[1])
        filled = model(input_ids=prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.first = filled.logits[:, -1].argmax(-1, keepdim=True)
        self.token, self.position = self.first.clone(), torch.empty(1, dtype=torch.int64, device=prompt.device)
        self.logits = torch.empty(count, filled.logits.shape[-1], dtype=filled.logits.dtype, device=prompt.device)
        self.step = self._step
        sequence = torch.cat([prompt, self.first], 1)
        self.full = model(input_ids=sequence, use_cache=False, logits_to_keep=1).logits[0, -1]
        self.eager = self.decode().clone()

    def __call__(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.decode(), self.eager, self.full

    @torch.no_grad()
    def decode(self) -> Tensor:
        """All tokens, from the prompt's end."""
        self.rewind()
        for logits in self.logits:
            logits.copy_(self.step()[0])
        return self.logits

    def rewind(self) -> None:
        """To the end of the prompt: what the cache holds beyond is masked, then written again."""
        length = self.prompt.shape[1]
        self.token.copy_(self.first)
        self.position.fill_(length)
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(length)

    @torch.no_grad()
    def capture(self) -> None:
        """Raises: RuntimeError where the model's work cannot be captured."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.rewind()
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._step()
        logits.fill_(float("nan"))

        def replay() -> Tensor:
            graph.replay()
            return logits

        self.step = replay

    def _step(self) -> Tensor:
        logits = self.model(
            input_ids=self.token, position_ids=self.position[None], past_key_values=self.cache, use_cache=True
        ).logits[:, -1]
        self.token.copy_(logits.argmax(-1, keepdim=True))
        self.position.add_(1)
        return logits


class StepMeter:
    """One call at a time, as a program makes it: between events on a GPU, by the clock elsewhere."""

    def __init__(self, device: str) -> None:
        self.device = device

    def prepare(self, contender: Contender, check: Callable[[Any], None] | None = None) -> Sample:
        with contender.forced():
            result = contender.calls[0]()
        if check:
            check(result)
        return _StepSample(contender, self.device)


class _StepSample:
    def __init__(self, contender: Contender, device: str) -> None:
        self._contender, self._device = contender, device
        self.timed = "events" if device == "cuda" else "wall clock"

    def kernel_ms(self) -> float:
        call = self._contender.calls[0]
        with self._contender.forced():
            if self._device == "cuda":
                torch.cuda.synchronize()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                end.record()
                end.synchronize()
                return start.elapsed_time(end)
            begun = time.perf_counter()
            call()
            return (time.perf_counter() - begun) * 1e3

    def eager_ms(self) -> None:
        return None

    def energy_mj(self) -> None:
        return None
