"""`FlatOptimizer`, what the optimizers of this package have in common: pools of flat state, one launch each a step."""

import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..operands import FLOATS
from . import skipping
from .memory import Resident
from .placement import chooser
from .pool import Kind, Pool, Work


class _Plan(NamedTuple):
    """ids: of the parameters; one_of_each: (group, parameter) for each set of hypers; jobs: params, slots, hyper_of of each pool."""

    ids: list[int]
    one_of_each: list[tuple[int, Tensor]]
    jobs: dict[Pool, tuple[list[Tensor], list[int], list[int]]]


class FlatOptimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` whose states lie in arenas and are stepped by one launch a pool.

    rule: "adamw" or "lion"; bits: of a state's element, 32 or 8 (tensors below min_8bit_size keep 32: their states save
        nothing, and one value of a norm or a bias counts more than one of a matrix; bitsandbytes has the same 4096)
    paged: states in unified memory, which gives way to plain allocations; on a CPU nothing pages, which is said once
    stochastic_rounding: of bfloat16 parameters; draws one number a step from torch's CPU generator
    skip_nonfinite: a step that finds a NaN or Inf in any gradient changes nothing, and is not counted
    budget: bytes of state to keep on a device, None for all; allow_oversubscription: hold more managed memory than a
        device has free
    Raises: ValueError for hyper-parameters out of range; NotImplementedError for sparse gradients, TypeError for other
        dtypes than float32, bfloat16 and float16, before any parameter has moved; RuntimeError in the capture of a CUDA graph, and where memory for the states is not to be had, before any parameter has moved.
    """

    def __init__(
        self, params: Any, defaults: dict[str, Any], rule: str, bits: int, paged: bool, min_8bit_size: int = 4096,
        stochastic_rounding: bool = False, skip_nonfinite: bool = False, budget: int | None = None,
        allow_oversubscription: bool = False,
    ) -> None:  # fmt: skip
        if budget is not None and budget < 0:
            raise ValueError(f"budget: found {budget}, wanted bytes, or None")
        self._options = {
            "rule": rule, "bits": bits, "paged": paged, "min_8bit_size": min_8bit_size,
            "stochastic_rounding": stochastic_rounding, "skip_nonfinite": skip_nonfinite, "budget": budget,
            "allow_oversubscription": allow_oversubscription,
        }  # fmt: skip
        self._forget()
        super().__init__(params, defaults)

    def _forget(self) -> None:
        """No states: what a new optimizer has, before its first step."""
        self._pool_of: dict[Tensor, Pool] = {}
        self._slots = skipping.Slots()
        self._plan: _Plan | None = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self._plan = None
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient. closure: computes the loss again, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moved = [(i, p) for i, group in enumerate(self.param_groups) for p in group["params"] if p.grad is not None]
        if moved:
            self._refuse(p for _, p in moved)
            self._allocate([p for _, p in moved])
            self._step(moved)
        return loss

    def _refuse(self, params: Iterable[Tensor]) -> None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"{type(self).__name__} cannot be captured in a CUDA graph: its states move; step outside the graph")
        for p in params:
            if p.grad.is_sparse:
                raise NotImplementedError(f"{type(self).__name__}: found a sparse gradient, wanted a dense one")
            if p.dtype not in FLOATS or p.grad.dtype != p.dtype:
                raise TypeError(f"{type(self).__name__}: found {p.dtype} with a gradient of {p.grad.dtype}, wanted both one of {FLOATS}")

    def _step(self, moved: list[tuple[int, Tensor]]) -> None:
        flags = skipping.check(moved, self._slots) if self._options["skip_nonfinite"] else None
        plan = self._plan = self._planned(moved)
        hypers: list[float] = []
        for group, p in plan.one_of_each:
            hypers += _numbers(self.param_groups[group], 0 if flags else self.state[p]["step"] + 1)
        draws = self._options["stochastic_rounding"]
        seed = int(torch.randint(2**63 - 1, (1,), dtype=torch.int64, device="cpu")) if draws else None
        for pool, (params, slots, hyper_of) in plan.jobs.items():
            device = pool.kind.device
            counted = (self._slots.taken[device], flags[device]) if flags else (None, None)
            work = Work(*counted, hypers, seed if pool.kind.dtype == torch.bfloat16 else None)
            pool.step(params, [p.grad for p in params], slots, hyper_of, work)
        if not flags:
            for _, p in moved:
                self.state[p]["step"] += 1

    def _planned(self, moved: list[tuple[int, Tensor]]) -> "_Plan":
        """Who is stepped with whom. Of the same parameters the same as last time: their counts go up together."""
        ids = [id(p) for _, p in moved]
        if self._plan and self._plan.ids == ids:
            return self._plan
        plan = _Plan(ids, [], {})
        sets: dict[tuple[int, int], int] = {}  # (group, count of steps) -> which of hypers
        for group, p in moved:
            key = group, int(self.state[p]["step"]) if not self._options["skip_nonfinite"] else 0
            if key not in sets:
                sets[key] = len(sets)
                plan.one_of_each.append((group, p))
            job = plan.jobs.setdefault(self._pool_of[p], ([], [], []))
            for values, value in zip(job, (p, self._slots.of[p], sets[key]), strict=True):
                values.append(value)
        return plan

    # ---- states

    def _bits(self, p: Tensor) -> int:
        return 8 if self._options["bits"] == 8 and p.numel() >= self._options["min_8bit_size"] else 32

    def _allocate(self, params: Iterable[Tensor]) -> None:
        """States of zeros for those that have none: of all of them, or, if memory ends, of none."""
        kinds: dict[Kind, list[Tensor]] = {}
        for p in params:
            if p not in self._pool_of:
                kinds.setdefault(Kind(p.device, p.dtype, self._bits(p)), []).append(p)
        if not kinds:
            return
        o = self._options
        make = chooser(o["paged"], o["budget"], o["allow_oversubscription"])
        made = [(Pool(group, o["rule"], kind, make, o["budget"]), group) for kind, group in kinds.items()]
        for pool, group in made:
            self._slots.add(group)
            for p, state in pool.states().items():
                self._pool_of[p], self.state[p] = pool, {"step": 0, **state}
            if not isinstance(pool.memory, Resident):
                self._announce(pool, group)
        if o["skip_nonfinite"]:  # the counts have a new home
            for p, slot in self._slots.of.items():
                self.state[p]["step"] = self._slots.taken[p.device][slot]

    def _announce(self, pool: Pool, params: list[Tensor]) -> None:
        """Tell the pool of gradients as backward makes them, as long as this optimizer lives."""
        found = weakref.ref(pool)

        def hook(p: Tensor) -> None:
            if (alive := found()) is not None:
                alive.prefetch(p)

        handles = [p.register_post_accumulate_grad_hook(hook) for p in params]
        weakref.finalize(self, _remove, handles).atexit = False


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def check_group(group: dict[str, Any]) -> None:
    """Raises: ValueError naming the number that is none, or out of range."""
    for name, wanted in _WANTED.items():
        try:
            good = name not in group or _RIGHT[name](group[name])
        except (TypeError, ValueError):
            good = False
        if not good:
            raise ValueError(f"{name}: found {group[name]!r:.80}, wanted {wanted}")


_WANTED = {"lr": "0 or more", "betas": "two of 0 or more, below 1", "eps": "0 or more", "weight_decay": "0 or more"}
_RIGHT = dict.fromkeys(_WANTED, lambda v: 0 <= float(v) < math.inf) | {
    "betas": lambda v: len(v) == 2 and all(0 <= float(beta) < 1 for beta in v)
}


def _numbers(group: dict[str, Any], step: int) -> list[float]:
    """One set of hypers, as `reference_optim.HYPERS` names them."""
    beta1, beta2 = group["betas"]
    return [float(v) for v in (group["lr"], beta1, beta2, group.get("eps", 0.0), group["weight_decay"], step)]
