"""Whose quantizer it is: what transformers asks the quantizer of a model about that model."""

import copy
import weakref
from typing import Any, Self

from torch import nn

from ..nn import NF4LoRALinear


class Owned:
    """A quantizer that knows its model, and whose copy, made with a copy of the model, knows that one."""

    _model: weakref.ref | None = None

    def owned_by(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    @property
    def is_qat_trainable(self) -> bool:
        """Whether Trainer may train the model without peft: when it holds adapters of ours."""
        model = self._model and self._model()
        return model is not None and any(isinstance(m, NF4LoRALinear) and m.r for m in model.modules())

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_model"}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        made = memo[id(self)] = type(self).__new__(type(self))
        vars(made).update(copy.deepcopy(self.__getstate__(), memo))
        if (model := self._model and self._model()) is not None and id(model) in memo:
            made.owned_by(memo[id(model)])
        return made
