"""Calls of an op that go past torch's dispatcher, which takes longer than all else a call does on the host."""

import re
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from . import backends

_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch  # of make_fx(pre_dispatch=True), which counts no mode
_KNOWN: dict[int, bool] = {}  # key set -> whether a tensor that has it is plain
_PLAIN = {"CPU", "CUDA", "ADInplaceOrView", "AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA"}
_NUMBERS = {int, float, bool, str, type(None)}
_TYPES = {Tensor, Parameter}
MOST = 4096  # prepared calls of an op


class Op:
    """An op of torch, which compilers, dispatch modes and transforms see as one; eager code goes past the dispatcher.

    call:    checks its arguments and runs them
    prepare: checks its arguments -> a callable for them and for all arguments of the same `signature`
    fresh:   positions of arguments whose memory is new in each call; an op without any prepares nothing
    """

    def __init__(
        self,
        overload: Callable[..., Any],
        call: Callable[..., Any],
        prepare: Callable[..., Callable[..., Any]],
        fresh: frozenset[int],
    ) -> None:
        self.overload, self.call, self.prepare, self.fresh = overload, call, prepare, fresh
        self.prepared: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs or not _eager():
            return self.overload(*args, **kwargs)
        signature = self.signature(args) if self.fresh else None
        if signature is not None and (prepared := self.prepared.get(signature)) is not None:
            return prepared(*args)
        if not _plain(args):
            return self.overload(*args)
        try:
            return self.call(*args) if signature is None else self._first(signature, args)
        except (AttributeError, IndexError, TypeError):
            self.overload(*args)  # whose schema names an argument of a wrong kind
            raise

    def _first(self, signature: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
        """The first call of its signature."""
        prepared = self.prepare(*args)
        found = prepared(*args)
        if len(self.prepared) >= MOST:
            self.prepared.clear()
        self.prepared[signature] = prepared
        return found

    def signature(self, args: Sequence[Any]) -> tuple[Any, ...] | None:
        """All that checks, the choice of a back end and launch parameters depend on, as values: no tensor is kept alive.

        Memory that a later tensor got is as good as the old one's, if that tensor is alike. None for what cannot be told.
        """
        try:
            return *backends.chosen(), torch.get_num_threads(), *_described(args, self.fresh)
        except (RuntimeError, TypeError):  # of tensors without memory or sizes, and of what is neither tensor nor number
            return None


def _described(args: Sequence[Any], fresh: Container[int]) -> list[Any]:
    """What each argument adds to a signature."""
    found: list[Any] = []
    for i, a in enumerate(args):
        kind = type(a)
        if kind is Parameter or kind is Tensor:
            found += _fresh(a) if i in fresh else _kept(a)
        elif kind in _NUMBERS:
            found += kind, a
        elif kind is list or kind is tuple:
            found += list, *_described(a, range(len(a)) if i in fresh else ())
        else:
            raise TypeError(kind)
    return found


def _fresh(t: Tensor) -> tuple[Any, ...]:
    """Of memory that is new in each call: how it lies, and that it is there."""
    return t.dtype, t.shape, t.stride(), t.device, t.is_neg(), t.data_ptr() != 0


def _kept(t: Tensor) -> tuple[Any, ...]:
    """Of a layer's own memory: where it is, too."""
    return t.dtype, t.shape, t.data_ptr() or t.device, t.get_device(), t.is_contiguous(), t.is_neg()


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
        of = (a,) if isinstance(a, Tensor) else a if type(a) in (list, tuple) and a and isinstance(a[0], Tensor) else ()
        if of:
            found = {keys.raw_repr(): keys for keys in map(torch._C._dispatch_keys, of)}  # few, of hundreds of tensors
            if not (_TYPES.issuperset(map(type, of)) and all(_KNOWN.get(raw) or _is_plain(keys) for raw, keys in found.items())):
                return False
    return True


def _is_plain(keys: Any) -> bool:
    found = _KNOWN[keys.raw_repr()] = set(re.findall(r"\w+", str(keys).removeprefix("DispatchKeySet"))) <= _PLAIN
    return found
