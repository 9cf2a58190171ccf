"""The states of an optimizer as plain tensors, and back into the memory they page in."""

from collections import defaultdict
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..codebook import codebook
from .base import FlatOptimizer
from .hypers import check_group
from .saved import CODES, Entry, parts, taken
from .sharded import as_shares

_NOT_OURS = {"params", "foreach", "fused", "capturable", "differentiable"}  # how torch took its steps


class Checkpointed(FlatOptimizer):
    """`state_dict`, `load_state_dict`, copies and pickles of a `FlatOptimizer`."""

    def state_dict(self) -> dict[str, Any]:
        """As of every torch optimizer; the states are copies on the CPU, under the names bitsandbytes has for them.

        {"step": int, "state1", "state2": of p's shape, and with states of 8 bits "absmax1", "absmax2" float32
        [ceil(n/256)], "qmap1", "qmap2" float32 [256]}; Lion has no second. With stochastic rounding also "place", int64 [2].
        """
        live = self.state
        self.state = {**live, **self._plain()}
        try:
            return super().state_dict()
        finally:
            self.state = live

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copies the states into the memory that they page in. Takes what `state_dict` and bitsandbytes' optimizers of the
        same rule and width give, and, with 32 bits, torch's AdamW.

        Raises: ValueError naming the first group, parameter or tensor that does not fit; the optimizer is then as it was.
        """
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        groups, (entries, saved_groups) = self.param_groups, parts(state_dict)
        found, wanted = [len(g["params"]) for g in saved_groups], [len(g["params"]) for g in groups]
        if found != wanted:
            raise ValueError(f"param_groups: found groups of {found} parameters, wanted {wanted}")
        of = dict(zip(chain(*(g["params"] for g in saved_groups)), chain(*(g["params"] for g in groups)), strict=True))
        if foreign := [i for i in entries if i not in of]:
            raise ValueError(f"state: found entries {foreign} of no parameter of param_groups")
        entries = {
            of[i]: taken(entry, of[i], self._options["rule"], self._bits(of[i]), f"state[{i}]")
            for i, entry in entries.items()
            if entry != {}
        }
        new_groups = [
            {**group, **deepcopy({k: v for k, v in saved.items() if k not in _NOT_OURS})}
            for group, saved in zip(groups, saved_groups, strict=True)
        ]
        for group in new_groups:
            check_group(group)
        self._take(entries)
        self.__setstate__({"param_groups": new_groups})
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    @torch.no_grad()
    def _take(self, entries: dict[Tensor, Entry]) -> None:
        """Make these the states; a parameter without an entry starts anew."""
        if not self._pool_of and all(place for *_, place in entries.values()):
            pools: dict[int, list[Tensor]] = {}
            for p, (*_, place) in sorted(entries.items(), key=lambda item: item[1][2]):
                pools.setdefault(place[0], []).append(p)
            for params in pools.values():
                self._allocate(params)
        self._allocate(entries)
        self._plan = None
        self._write({p: entries.get(p, (0, {}, None)) for p in self._pool_of})

    def _plain(self) -> dict[Tensor, dict[str, Any]]:
        """Copies of all states on the CPU, which own their memory; maps are the same for all."""
        self._settle(p for p in self._pool_of if self.state.get(p))
        self._bring_home()
        maps = {name: codebook(code).clone() for name, code in (("qmap1", CODES["state1"]), ("qmap2", CODES["state2"]))}
        found: dict[Tensor, dict[str, Any]] = {}
        for p, pool in self._pool_of.items():
            if not self.state.get(p):  # cleared
                continue
            shown = self._shown[p]
            found[p] = {"step": int(shown["step"]), **as_shares(p, {name: t.to("cpu", copy=True) for name, t in shown.own.items()})}
            found[p] |= {name: t for name, t in maps.items() if f"absmax{name[-1]}" in shown.own}
            if self._options["stochastic_rounding"]:
                found[p]["place"] = torch.tensor([self._pools.index(pool), pool.offsets[p]])
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "state": self._plain(), "_options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        entries = state.pop("state", None)
        copied = "_options" in state  # this is a new object, of `copy`, `deepcopy` or pickle
        super().__setstate__(state if not copied else {**state, "state": defaultdict(dict)})
        if copied:
            self._forget()
            rule = self._options["rule"]
            self._take({p: taken(entry, p, rule, self._bits(p), "state") for p, entry in entries.items()})
