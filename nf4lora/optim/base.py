"""`FlatOptimizer`, what the optimizers of this package have in common: pools of flat state, one launch each a step."""

from collections.abc import Callable, Iterable
from operator import is_not
from typing import Any

import torch
from torch import Tensor

from ..operands import FLOATS
from . import sharded, skipping
from .announce import announce
from .hypers import check_group, numbers_of
from .memory import Resident
from .options import check_foreign, foreign_options, options_of
from .placement import chooser
from .plan import Plan, planned
from .pool import Kind, Pool, Work, reserve
from .saved import Entry, taken
from .shown import Shown

_ODD = 0x9E3779B97F4A7C15  # between the seeds of pools


class FlatOptimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` whose states lie in arenas and are stepped by one launch a pool.

    rule: "adamw" or "lion"; bits: of a state's element, 32 or 8 (tensors below min_8bit_size keep 32: their states save
        nothing, and one value of a norm or a bias counts more than one of a matrix; bitsandbytes has the same 4096)
    paged: states in unified memory, which gives way to plain allocations; on a CPU nothing pages, which is said once
    stochastic_rounding: of bfloat16 parameters; draws one number a step from torch's CPU generator
    skip_nonfinite: a step that finds a NaN or Inf in any gradient changes nothing, and is not counted
    budget: bytes of state to keep on a device, None for all that there is room for; allow_oversubscription: hold more managed
        memory than a device has free
    Options of torch's and bitsandbytes' optimizers (amsgrad, fused, optim_bits, …) may have the value that asks for nothing.
    `state` shows each parameter's step and states; other values put there are copied in. Of a parameter that FSDP2 shards
    each process has the states of its share, blocks of 8-bit states within it; those of 32 bits alone are in `state_dict`.
    Raises: ValueError for options and hyper-parameters out of range, and for a parameter of another shape or dtype than at its
        first step; NotImplementedError for sparse gradients, TypeError for other dtypes than float32, bfloat16 and float16 and
        for an option that nobody has; RuntimeError in the capture of a CUDA graph, and where memory for the states is not to
        be had. All of them before any parameter has moved.
    """

    def __init__(self, params: Any, defaults: dict[str, Any], rule: str, bits: int, paged: bool, **options: Any) -> None:
        options = options_of(type(self).__name__, bits, paged, options)
        self._options = {"rule": rule, "bits": bits, "paged": paged, **options}
        self._forget()
        super().__init__(params, defaults)

    def _forget(self) -> None:
        """No states: what a new optimizer has, before its first step."""
        self._pools: list[Pool] = []
        self._pool_of: dict[Tensor, Pool] = {}
        self._shown: dict[Tensor, Shown] = {}
        self._slots = skipping.Slots()
        self._plan: Plan | None = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self._plan = None
        super().add_param_group(param_group)
        o, group = self._options, self.param_groups[-1]
        try:
            if len(set(map(id, group["params"]))) < len(group["params"]):  # of which torch warns, and which it steps twice
                raise ValueError("params: found a parameter twice, wanted each of them once")
            if given := o.keys() & group.keys():
                raise ValueError(f"{min(given)}: found in a group, wanted for the whole optimizer")
            check_foreign(group, foreign_options(o["bits"], o["paged"]))
            check_group(group)
        except ValueError:
            self.param_groups.pop()
            raise

    @torch._disable_dynamo  # torch.compiler.disable would load the compiler with this file
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient; graphs of torch.compile end before it.

        closure: computes the loss again, which is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moved = [(i, p) for i, group in enumerate(self.param_groups) for p in group["params"] if p.grad is not None]
        if moved:
            self._refuse(p for _, p in moved)
            self._step(moved, self._states_of([p for _, p in moved]))
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
                sharded.check(name, p, self._options["skip_nonfinite"])
            if pool and (sharded.local(p).shape != pool.shapes[p] or p.dtype != pool.kind.dtype or p.device != pool.kind.device):
                was = f"{pool.kind.dtype} {list(pool.shapes[p])} on {pool.kind.device}"
                raise ValueError(
                    f"{name}: found a parameter that is {p.dtype} {list(p.shape)} on {p.device} now and was {was} when its states "
                    "were made; make a new optimizer for it"
                )

    def _step(self, moved: list[tuple[int, Tensor]], shown: list[Shown]) -> None:
        skips = self._options["skip_nonfinite"]
        steps = [0 if skips else entry["step"] for entry in shown]
        plan = self._plan = planned(self._plan, moved, steps, self._pool_of, self._slots.of)
        hypers = [v for i in plan.one_of_each for v in numbers_of(self.param_groups[moved[i][0]], steps[i] + 1)]
        reserve(plan.jobs)
        flags = skipping.check(moved, self._slots) if skips else None
        draws = self._options["stochastic_rounding"]
        seed = int(torch.randint(2**63 - 1, (1,), dtype=torch.int64, device="cpu")) if draws else None
        for pool, (params, slots, hyper_of) in plan.jobs.items():
            device = pool.kind.device
            counted = (self._slots.taken[device], flags[device]) if flags else (None, None)
            own = None if seed is None or pool.kind.dtype != torch.bfloat16 else (seed + _ODD * self._pools.index(pool)) % 2**63
            pool.step(params, [p.grad for p in params], slots, hyper_of, Work(*counted, hypers, own))
        if not skips:
            put = dict.__setitem__  # as there is nothing to check
            for entry, step in zip(shown, steps, strict=True):
                put(entry, "step", step + 1)

    # ---- states

    def _bits(self, p: Tensor) -> int:
        return 8 if self._options["bits"] == 8 and p.numel() >= self._options["min_8bit_size"] else 32

    def _states_of(self, params: list[Tensor]) -> list[Shown]:
        """What `state` shows of each, made if it has none and put right if somebody replaced it."""
        found = list(map(self._shown.get, params))
        if not all(found) or any(map(is_not, found, map(self.state.get, params))):
            self._allocate(params)
            self._settle(params)
            found = [self._shown[p] for p in params]
        return found

    def _settle(self, params: Iterable[Tensor]) -> None:
        """States that somebody cleared start anew; what somebody put in the place of others is copied to where they lie.

        Raises: ValueError for what does not fit; nothing has changed.
        """
        strange = {p: entry for p in params if (entry := self.state.get(p)) is not self._shown[p] or "step" not in entry}
        if not strange:
            return
        self._bring_home()
        entries = {}
        for p, entry in strange.items():
            where = f"state of a parameter {list(p.shape)}"
            step, tensors, place = taken(entry, p, self._options["rule"], self._bits(p), where) if entry else (0, {}, None)
            entries[p] = step, {name: t.clone() for name, t in tensors.items()}, place  # they may be another's states
        self._write(entries)

    def _write(self, entries: dict[Tensor, Entry]) -> None:
        """Of parameters that have states."""
        self._bring_home()
        for p, (step, tensors, _) in entries.items():
            self._shown[p].fill(step, tensors)
            self.state[p] = self._shown[p]

    def _bring_home(self) -> None:
        """All states where `state` has views of them."""
        for pool in self._pools:
            pool.memory.home()

    @torch.inference_mode(False)  # states outlive the mode they are first asked for in
    @torch.no_grad()
    def _allocate(self, params: Iterable[Tensor]) -> None:
        """States of zeros for those that have none: of all of them, or, if memory ends, of none."""
        kinds: dict[Kind, list[Tensor]] = {}
        for p in params:
            if p not in self._pool_of:
                kinds.setdefault(Kind(p.device, p.dtype, self._bits(p)), []).append(p)
        o = self._options
        make = chooser(o["paged"], o["budget"], o["allow_oversubscription"])
        made = [(Pool(group, o["rule"], kind, make, o["budget"]), group) for kind, group in kinds.items()]
        for pool, group in made:
            self._pools.append(pool)
            self._slots.add(group)
            self._pool_of |= dict.fromkeys(group, pool)
            for p, state in pool.states().items():
                self.state[p] = self._shown[p] = Shown(state, pool.memory.home)
            if not isinstance(pool.memory, Resident):
                announce(self, pool, [p for p in group if p.requires_grad])
        if o["skip_nonfinite"] and made:  # the counts have a new home
            for p, slot in self._slots.of.items():
                self._shown[p].count_in(self._slots.taken[p.device][slot])
