"""The "triton" row of the optimizers' step. The kernel is imported by the first call, as `triton_rows` has it."""

from functools import cache
from types import ModuleType
from typing import Any

from . import triton_rows
from .backends import implements
from .triton_tiles import TritonConfig


@cache
def kernels() -> ModuleType:
    """`nf4lora.triton_kernels.optim`, where `triton_rows.why_not` has nothing against it."""
    from .triton_kernels import optim

    return optim


def why_not(*args: Any) -> str | None:
    """Why Triton cannot make this step, or None; without arguments, any step at all."""
    if not args:
        return triton_rows.why_not()
    first, (steps, flag) = args[0][0], args[6:8]
    if reason := triton_rows.why_not(first):
        return reason
    if steps is not None or flag is not None:
        return "counts of steps on the device and their flag are for CUDA's kernels"
    if triton_rows.interpreted() and first.device.type != "cpu":
        return f"its interpreter follows no addresses of {first.device.type} memory"
    return None


def config(*args: Any) -> TritonConfig:
    """Eight elements a thread, and a block of the states a warp. Source: calculated."""
    return TritonConfig(1024, 4)


@implements("optim_step", "triton", why_not, config)
def optim_step(*args: Any) -> None:
    kernels().optim_step(*args)
