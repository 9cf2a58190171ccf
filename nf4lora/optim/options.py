"""What an optimizer may be told when it is made: its own options, and those of the optimizers it stands in for."""

from typing import Any

_NOT_DONE = "these optimizers do not do it"


def options_of(optimizer: str, bits: int, paged: bool, given: dict[str, Any]) -> dict[str, Any]:
    """The options of an optimizer of this name, width of state and memory: those given, and defaults.

    Raises: ValueError naming the option that is of another kind than wanted; TypeError for one that nobody has.
    """
    found = {name: value for name, (value, *_) in _OWN.items()}
    foreign = foreign_options(bits, paged)
    for name, value in given.items():
        if name in _OWN:
            _, right, wanted = _OWN[name]
            if not right(value):
                raise ValueError(f"{name}: found {value!r:.80}, wanted {wanted}")
            found[name] = value
        elif name not in foreign:
            raise TypeError(f"{optimizer}() got an unexpected keyword argument {name!r}")
    check_foreign(given, foreign)
    return found


def check_foreign(options: dict[str, Any], foreign: dict[str, tuple[tuple[Any, ...], str]]) -> None:
    """Raises: ValueError naming the one of `options` with another value than `foreign` has for it."""
    for name, (wanted, why) in foreign.items():
        # numbers and None alone: a tensor would be compared element by element
        if name in options and not (isinstance(options[name], int | float | None) and options[name] in wanted):
            raise ValueError(f"{name}: found {options[name]!r:.80}, wanted {' or '.join(map(repr, wanted))}: {why}")


def foreign_options(bits: int, paged: bool) -> dict[str, tuple[tuple[Any, ...], str]]:
    """Options of torch's and bitsandbytes' optimizers: the values that ask for nothing, and why no other is taken.

    The 8-bit optimizers of bitsandbytes have optim_bits=32 by default, and take nothing else.
    """
    return GROUP | {
        "capturable": ((False,), "its step cannot be captured in a CUDA graph"),
        "differentiable": ((False,), _NOT_DONE),
        "foreach": ((None, False, True), "one launch steps all parameters anyhow"),
        "fused": ((None, False, True), "one launch steps all parameters anyhow"),
        "optim_bits": ((32,) if bits == 32 else (bits, 32), "the name of a class says how wide its states are"),
        "is_paged": ((paged,), "the name of a class says whether its states page"),
        "args": ((None,), "options are keywords"),
        "percentile_clipping": ((100,), "clip gradients with torch.nn.utils.clip_grad_norm_"),
        "block_wise": ((True,), "states of 8 bits have a scale for each block of 256"),
    }


# Those that a group of a checkpoint has too, and that change what a step gives.
GROUP = {
    "amsgrad": ((False,), _NOT_DONE),
    "maximize": ((False,), _NOT_DONE),
    "decoupled_weight_decay": ((True,), "weight decay is apart from the gradient, as AdamW has it"),
}


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


# Of each its default, what is right, and that in words.
_OWN = {
    "min_8bit_size": (4096, _whole, "a count of elements, 0 or more"),
    "stochastic_rounding": (False, _flag, "True or False"),
    "skip_nonfinite": (False, _flag, "True or False"),
    "budget": (None, lambda value: value is None or _whole(value), "a count of bytes, 0 or more, or None"),
    "allow_oversubscription": (False, _flag, "True or False"),
}
