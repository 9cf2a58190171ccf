"""The back ends a test can be run on, by name: each takes and gives CPU tensors, wherever its kernels run."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from nf4lora import backends, native, triton_rows
from nf4lora.abi import CUDA_FUNCTIONS

GPU = torch.cuda.is_available()
# Of the ops that have kernels for a GPU: with a GPU, the kernels there; without, the same kernels on the host.
KERNELS = ("cpu", "cuda_on_host", "triton") + (("cuda",) if GPU else ())


GROUPS = ("group_fwd", "group_bwd", "group_lora_bwd", "linear_grads", "group_grads")


IN_PLACE = ("optim_check", "optim_step", "dequantize_into")


def _fetch(here: Any, there: Any) -> None:
    """Copies tensors back, those of lists too."""
    for a, b in zip(here, there, strict=True):
        if isinstance(a, Tensor):
            a.copy_(b)
        elif isinstance(a, (tuple, list)):
            _fetch(a, b)


def moved(value: Any, device: str) -> Any:
    """Tensors to a device, in tuples and lists too."""
    if isinstance(value, (tuple, list)):
        return type(value)(moved(v, device) for v in value)
    return value.to(device) if isinstance(value, Tensor) else value


@contextmanager
def force(name: str, path: str | None = None) -> Iterator[str]:
    """`use_backend` for a test. A back end that is not there is an error, never a skip."""
    if name == "cpu" and (why_not := native.host.load()[1]):
        raise RuntimeError(why_not)
    if name == "cuda_on_host":
        from cuda_on_host import backend

        # CUDA_ON_HOST=plain CUDA_ON_HOST_SEED=2 pytest -k cuda_on_host: another build, another schedule
        machine = backend.machine(os.environ.get("CUDA_ON_HOST", "checker"))
        machine.seed = int(os.environ.get("CUDA_ON_HOST_SEED", "1"))
        machine.enter()
    if name in ("cuda", "triton"):
        name = _by_way_of_the_gpu(name) if GPU else _interpreted()
    with backends.use_backend(name, path):
        yield name


def fewer(items: Iterable[Any], name: str, step: int) -> list[Any]:
    """Every step-th of the items where back end `name` is Triton's interpreter, which takes milliseconds a program."""
    return list(items)[:: step if name == "triton" and not GPU else 1]


@cache
def _by_way_of_the_gpu(name: str) -> str:
    """Rows that send CPU operands to the GPU, run `name`'s rows there and fetch the results."""

    def sent(op: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            there = moved(args, "cuda")
            with backends.use_backend(name, backends.forced_path()):
                result = moved(backends.run(op, *there), "cpu")
            if op in IN_PLACE:
                _fetch(args, there)
            return result

        return call

    for op in {*CUDA_FUNCTIONS, *GROUPS, *IN_PLACE}:
        backends.implements(op, f"{name} by way of the GPU")(sent(op))
    return f"{name} by way of the GPU"


@cache
def _interpreted() -> str:
    """Triton's interpreter, which truncates where it should round to bfloat16: that one cast is torch's here."""
    if why_not := triton_rows.why_not():
        raise RuntimeError(why_not)

    def dequantize(*args: Any) -> Tensor:
        *rest, dtype = args
        with backends.use_backend("triton"):
            if dtype == torch.bfloat16:
                return backends.run("dequantize", *rest, torch.float32).to(dtype)
            return backends.run("dequantize", *args)

    def dequantize_into(*args: Any) -> None:
        *rest, out = args
        out.copy_(dequantize(*rest[:4], out.shape, *rest[4:], out.dtype))

    name = "triton, interpreted"
    for op in (o for o in {*CUDA_FUNCTIONS, *GROUPS, *IN_PLACE} if backends.has(o, "triton")):
        row = backends._ROWS[op, "triton"]
        backends.implements(op, name, row.why_not, row.configure)(row.call)
    for own in (dequantize, dequantize_into):
        backends.implements(own.__name__, name, backends._ROWS[own.__name__, "triton"].why_not)(own)
    return name
