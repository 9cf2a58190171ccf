"""The "triton" rows of the optimizers' ops. The kernels are imported by the first call, as `triton_rows` has it."""

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
    """Why Triton cannot make this step or check, or None; without arguments, any at all."""
    if not args:
        return triton_rows.why_not()
    first = args[0][0]
    if reason := triton_rows.why_not(first):
        return reason
    if triton_rows.interpreted() and first.device.type != "cpu":
        return f"its interpreter follows no addresses of {first.device.type} memory"
    return None


def config(*args: Any) -> TritonConfig:
    """Eight elements a thread, and a block of the states a warp. Source: calculated."""
    return TritonConfig(1024, 4)


def check_config(*args: Any) -> TritonConfig:
    """32 elements a thread, four loads or more in flight: what programs add to one word is few. Source: calculated."""
    return TritonConfig(4096, 4)


@implements("optim_step", "triton", why_not, config)
def optim_step(*args: Any) -> None:
    kernels().optim_step(*args)


@implements("optim_check", "triton", why_not, check_config)
def optim_check(*args: Any) -> None:
    kernels().optim_check(*args)
