"""Calls of an op that go past torch's dispatcher, which takes longer than all else a call does on the host."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch  # of make_fx(pre_dispatch=True), which counts no mode
_KNOWN: dict[int, bool] = {}  # key set -> whether a tensor that has it is plain
_PLAIN = {"CPU", "CUDA", "ADInplaceOrView", "AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA"}


class Op:
    """An op of torch, which compilers, dispatch modes and transforms see as one; eager code goes past the dispatcher."""

    def __init__(self, overload: Callable[..., Any], call: Callable[..., Any]) -> None:
        self.overload, self.call = overload, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs or not (_eager() and _plain(args)):
            return self.overload(*args, **kwargs)
        try:
            return self.call(*args)
        except (AttributeError, IndexError, TypeError):
            self.overload(*args)  # whose schema names an argument of a wrong kind
            raise


def _eager() -> bool:
    """Whether no one but the kernels would see a call; inside a `torch.autograd.Function`, where no gradients are recorded."""
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and not torch._C._autograd._profiler_enabled()
        and torch._C._len_torch_function_stack() == 0
        and not torch._C._dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)
    )


def _plain(args: Iterable[Any]) -> bool:
    """Whether all tensors are memory that kernels can read: no subclass, no view that negates, no zeros without memory."""
    for a in args:
        if isinstance(a, Tensor):
            keys = torch._C._dispatch_keys(a)
            known = _KNOWN.get(keys.raw_repr())
            if type(a) not in (Tensor, torch.nn.Parameter) or not (_is_plain(keys) if known is None else known):
                return False
        elif type(a) in (list, tuple) and not _plain(a):
            return False
    return True


def _is_plain(keys: Any) -> bool:
    found = _KNOWN[keys.raw_repr()] = set(re.findall(r"\w+", str(keys).removeprefix("DispatchKeySet"))) <= _PLAIN
    return found
