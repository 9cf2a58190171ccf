"""`FlatOptimizer`, what the optimizers of this package have in common: pools of flat state, one launch each a step."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..operands import FLOATS
from . import skipping
from .hypers import check_group, numbers_of
from .memory import Resident
from .placement import chooser
from .pool import Kind, Pool, Work


_ODD = 0x9E3779B97F4A7C15  # between the seeds of pools


class _Plan(NamedTuple):
    """ids: of the group and the parameter of each that moves; sets: which of the sets of hypers it takes; one_of_each: for each
    set, who has it; jobs: params, slots, hyper_of of each pool."""

    ids: list[tuple[int, int]]
    sets: list[int]
    one_of_each: list[int]
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
    `state` shows each parameter's step and states; states may be changed in place, not replaced.
    Raises: ValueError for hyper-parameters out of range, and for a parameter of another shape or dtype than at its first step; NotImplementedError for sparse gradients, TypeError for other
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
        self._pools: list[Pool] = []
        self._pool_of: dict[Tensor, Pool] = {}
        self._slots = skipping.Slots()
        self._plan: _Plan | None = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self._plan = None
        super().add_param_group(param_group)
        try:
            if given := self._options.keys() & self.param_groups[-1].keys():
                raise ValueError(f"{min(given)}: found in a group, wanted for the whole optimizer")
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
        name = type(self).__name__
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"{name} cannot be captured in a CUDA graph: its states move; step outside the graph")
        for p in params:
            grad, pool = p.grad, self._pool_of.get(p)
            if grad.is_sparse:
                raise NotImplementedError(f"{name}: found a sparse gradient, wanted a dense one")
            if p.dtype not in FLOATS or grad.dtype != p.dtype:
                raise TypeError(f"{name}: found {p.dtype} with a gradient of {grad.dtype}, wanted both one of {FLOATS}")
            if hasattr(p, "to_local"):
                raise NotImplementedError(f"{name}: found a DTensor, wanted the local tensors of each process")
            if pool and (p.shape != pool.shapes[p] or p.dtype != pool.kind.dtype or p.device != pool.kind.device):
                was = f"{pool.kind.dtype} {list(pool.shapes[p])} on {pool.kind.device}"
                raise ValueError(f"{name}: found a parameter that is {p.dtype} {list(p.shape)} on {p.device} now and was {was} when "
                                 "its states were made; make a new optimizer for it")  # fmt: skip

    def _step(self, moved: list[tuple[int, Tensor]]) -> None:
        skips = self._options["skip_nonfinite"]
        steps = [0 if skips else self.state[p]["step"] for _, p in moved]
        plan = self._plan = self._planned(moved, steps)
        hypers = [v for i in plan.one_of_each for v in numbers_of(self.param_groups[moved[i][0]], steps[i] + 1)]
        flags = skipping.check(moved, self._slots) if skips else None
        draws = self._options["stochastic_rounding"]
        seed = int(torch.randint(2**63 - 1, (1,), dtype=torch.int64, device="cpu")) if draws else None
        for pool, (params, slots, hyper_of) in plan.jobs.items():
            device = pool.kind.device
            counted = (self._slots.taken[device], flags[device]) if flags else (None, None)
            own = None if seed is None or pool.kind.dtype != torch.bfloat16 else (seed + _ODD * self._pools.index(pool)) % 2**63
            pool.step(params, [p.grad for p in params], slots, hyper_of, Work(*counted, hypers, own))
        if not skips:
            for (_, p), step in zip(moved, steps, strict=True):
                self.state[p]["step"] = step + 1

    def _planned(self, moved: list[tuple[int, Tensor]], steps: list[int]) -> "_Plan":
        """Who is stepped with whom: as last time, if the same parameters of the same groups have still taken as many steps as each other."""
        ids = [(i, id(p)) for i, p in moved]
        old = self._plan
        if old and old.ids == ids and all(step == steps[old.one_of_each[s]] for step, s in zip(steps, old.sets, strict=True)):
            return old
        plan = _Plan(ids, [], [], {})
        numbers: dict[tuple[int, int], int] = {}  # (group, count of steps) -> which of hypers
        for i, ((group, p), step) in enumerate(zip(moved, steps, strict=True)):
            if (group, step) not in numbers:
                numbers[group, step] = len(numbers)
                plan.one_of_each.append(i)
            plan.sets.append(numbers[group, step])
            job = plan.jobs.setdefault(self._pool_of[p], ([], [], []))
            for values, value in zip(job, (p, self._slots.of[p], plan.sets[-1]), strict=True):
                values.append(value)
        return plan

    # ---- states

    def _bits(self, p: Tensor) -> int:
        return 8 if self._options["bits"] == 8 and p.numel() >= self._options["min_8bit_size"] else 32

    @torch.inference_mode(False)  # states outlive the mode they are first asked for in
    @torch.no_grad()
    def _allocate(self, params: Iterable[Tensor]) -> None:
        """States of zeros for those that have none: of all of them, or, if memory ends, of none."""
        kinds: dict[Kind, list[Tensor]] = {}
        lost = []
        for p in params:
            if p not in self._pool_of:
                kinds.setdefault(Kind(p.device, p.dtype, self._bits(p)), []).append(p)
            elif "step" not in self.state[p]:  # somebody cleared it, to start anew
                lost.append(p)
        o = self._options
        make = chooser(o["paged"], o["budget"], o["allow_oversubscription"])
        made = [(Pool(group, o["rule"], kind, make, o["budget"]), group) for kind, group in kinds.items()]
        for pool, group in made:
            self._pools.append(pool)
            self._slots.add(group)
            self._pool_of |= dict.fromkeys(group, pool)
            for p, state in pool.states().items():
                self.state[p] = {"step": 0, **state}
            if not isinstance(pool.memory, Resident):
                self._announce(pool, [p for p in group if p.requires_grad])
        for p in lost:
            self.state[p] = {"step": 0, **self._pool_of[p].states()[p]}
            for name, t in self.state[p].items():
                t.zero_() if name != "step" else self._slots.taken[p.device][self._slots.of[p]].zero_()
        if o["skip_nonfinite"] and (made or lost):  # the counts have a new home
            for p, slot in self._slots.of.items():
                self.state[p]["step"] = self._slots.taken[p.device][slot]

    def _announce(self, pool: Pool, params: list[Tensor]) -> None:
        """Tell the pool of gradients as backward makes them, as long as this optimizer lives."""
        found = weakref.ref(pool)

        def hook(p: Tensor) -> None:
            # A graph replays the backward without us: nothing is announced, which costs time only.
            if (alive := found()) is not None and not (p.is_cuda and torch.cuda.is_current_stream_capturing()):
                alive.prefetch(p)

        handles = [p.register_post_accumulate_grad_hook(hook) for p in params]
        weakref.finalize(self, _remove, handles).atexit = False


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
