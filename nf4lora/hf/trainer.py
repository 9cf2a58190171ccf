"""transformers' Trainer: our optimizers by the names it knows, and one GPU a process."""

import inspect
import warnings
from ast import literal_eval
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments

from .. import optim
from ..nn import NF4Linear
from ..nn.experts import NF4Experts
from ..optim.options import options_of

OPTIMIZERS = {
    "adamw_8bit": optim.AdamW8bit,
    "adamw_bnb_8bit": optim.AdamW8bit,
    "paged_adamw_32bit": optim.PagedAdamW,
    "paged_adamw_8bit": optim.PagedAdamW8bit,
    "paged_lion_32bit": optim.PagedLion,
    "paged_lion_8bit": optim.PagedLion8bit,
}
_originals: dict[Callable[..., Any], Any] = {}  # by what is in its place


def patch_trainer_optimizers() -> None:
    """Let `TrainingArguments(optim=…)` mean our optimizers by the names in `OPTIMIZERS`; bitsandbytes need not be installed.

    Learning rate, betas, epsilon (not Lion's) and weight decay are those of the arguments, as for bitsandbytes'. `optim_args` may
    hold options of ours ("min_8bit_size=0,stochastic_rounding=True"); other keys change nothing, as transformers has it.
    Embeddings that learn have 8-bit states too, which Trainer keeps in 32 bits for bitsandbytes. A second call changes nothing.
    Without a patch: `Trainer(optimizer_cls_and_kwargs=(PagedAdamW8bit, {"lr": 2e-4}))`.
    Raises: RuntimeError for a transformers that chooses its optimizers elsewhere; ValueError, as a Trainer makes its
        optimizer, for a value of an option that is of another kind than wanted.
    """
    original = getattr(Trainer, _CHOOSES, None)
    if original is None or tuple(inspect.signature(original).parameters) != ("args", "model"):
        raise RuntimeError(
            f"patch_trainer_optimizers: found a transformers whose Trainer has no {_CHOOSES}(args, model), and patched nothing; "
            "give Trainer(optimizer_cls_and_kwargs=(PagedAdamW8bit, {...}))"
        )
    if original not in _originals:

        @wraps(original)
        def chosen(args: TrainingArguments, model: Any = None) -> tuple[Any, dict[str, Any]]:
            cls = OPTIMIZERS.get(getattr(args.optim, "value", args.optim))
            return original(args, model) if cls is None else (cls, _arguments(cls, args))

        _originals[chosen] = original
        setattr(Trainer, _CHOOSES, staticmethod(chosen))


def unpatch_trainer_optimizers() -> None:
    """Undo `patch_trainer_optimizers`; nothing where it was not called."""
    if original := _originals.pop(getattr(Trainer, _CHOOSES), None):
        setattr(Trainer, _CHOOSES, staticmethod(original))


_CHOOSES = "get_optimizer_cls_and_kwargs"


def _arguments(cls: type, args: TrainingArguments) -> dict[str, Any]:
    """What an optimizer of this class is made with, beside its parameters and their weight decay."""
    found = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2)}
    if issubclass(cls, optim.PagedAdamW):
        found["eps"] = args.adam_epsilon
    own = options_of(cls.__name__, 8, True, {})
    given = args.optim_args or ""
    for mapping in given.replace(" ", "").split(",") if given else ():
        name, _, value = mapping.partition("=")
        if name in own:
            try:
                found[name] = literal_eval(value)
            except (SyntaxError, ValueError):
                raise ValueError(
                    f"optim_args: found {mapping!r:.80}, wanted {name}= a number, True, False or None"
                ) from None
    return found


def keep_one_gpu_per_process() -> None:
    """Let a Trainer of a 4-bit model of ours use one GPU, where transformers would wrap it in `nn.DataParallel` for several.

    Warns then, naming `accelerate launch`. A second call changes nothing. `per_device_train_batch_size` is that of the one.
    """
    original = Trainer.__init__
    if original in _originals:
        return

    @wraps(original)
    def __init__(self: Trainer, *args: Any, **kwargs: Any) -> None:
        given = dict(zip(("model", "args"), args, strict=False)) | kwargs
        _use_one_gpu(given.get("model"), given.get("args"))
        original(self, *args, **kwargs)

    _originals[__init__] = original
    Trainer.__init__ = __init__


def _use_one_gpu(model: Any, args: TrainingArguments | None) -> None:
    if (
        args is None
        or not isinstance(model, nn.Module)
        or not any(isinstance(m, NF4Linear | NF4Experts) for m in model.modules())
    ):
        return
    spread = len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1
    if args.n_gpu > 1 and not spread:
        warnings.warn(
            f"found {args.n_gpu} GPUs in one process, for which Trainer would copy a 4-bit model to each in every step: using "
            "one of them. For all of them, start with `accelerate launch` or `torchrun`",
            stacklevel=3,
        )
        args._n_gpu = 1
