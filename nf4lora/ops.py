"""The ops `torch.ops.nf4lora.*`: per op one schema, one fake, and one check of the arguments, which every call passes.

They allocate their outputs, never synchronize and never look at values. What they compute is in `nf4lora.reference`.
"""

from collections.abc import Callable
from typing import Any

import torch

from . import backends, checks, checks_optim, reference_optim
from . import grad_rows as grad_rows  # enters the rows of linear_grads and group_grads that are made of other ops
from . import native as native  # enters the rows of the "cpu" back end
from . import native_cuda as native_cuda  # of "cuda"
from . import reference
from . import triton_linear as triton_linear  # of "triton"
from . import triton_optim as triton_optim
from . import triton_rows as triton_rows
from .codebook import NESTED_BLOCKSIZE
from .eager import Op
from .matrices import rows
from .quant_state import ceil_div

_library = torch.library.Library("nf4lora", "DEF")
_KEYS = {"cpu": "CPU", "cuda": "CUDA"}
_WEIGHT = "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? offset"


def _define(schema: str, fake: Callable[..., Any], check: Callable[..., None], fresh: tuple[str, ...] = ()) -> Op:
    """`fresh`: the arguments with new memory in each call of a layer. An op that has them remembers its calls."""
    name = schema[: schema.index("(")]

    def checked(*args: Any) -> None:
        for i, argument in tensors:
            if args[i] is None:  # which torch takes for any Tensor of a schema
                raise TypeError(f"{name}: {argument}: found None for argument {i + 1}, wanted a tensor")
        check(*args)

    def call(*args: Any) -> Any:
        checked(*args)
        return backends.without_autocast(backends.first_of(args).device.type, backends.run, name, *args)

    def prepare(*args: Any) -> Callable[..., Any]:
        checked(*args)
        return backends.prepare(name, *args)

    def checked_fake(*args: Any) -> Any:
        check(*args)
        return fake(*args)

    arguments = torch._C.parse_schema(f"nf4lora::{schema}").arguments
    tensors = [(i, argument.name) for i, argument in enumerate(arguments) if str(argument.type) == "Tensor"]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    for key in _KEYS.values():
        _library.impl(name, call, key)
    torch.library.register_fake(f"nf4lora::{name}", checked_fake, lib=_library)
    for spec in (reference, reference_optim):
        if hasattr(spec, name):
            backends.implements(name, "reference")(getattr(spec, name))
    overload = getattr(torch.ops.nf4lora, name).default
    return Op(overload, call, prepare, frozenset(i for i, argument in enumerate(arguments) if argument.name in fresh))


quantize = _define(
    "quantize(Tensor a, int blocksize, str quant_type) -> (Tensor, Tensor)",
    lambda a, blocksize, quant_type: (
        a.new_empty((ceil_div(a.numel(), 2), 1), dtype=torch.uint8),
        a.new_empty(ceil_div(a.numel(), blocksize), dtype=torch.float32),
    ),
    checks.quantize,
)
quantize_absmax = _define(
    "quantize_absmax(Tensor absmax, Tensor offset) -> (Tensor, Tensor)",
    lambda absmax, offset: (
        absmax.new_empty(absmax.numel(), dtype=torch.uint8),
        absmax.new_empty(ceil_div(absmax.numel(), NESTED_BLOCKSIZE)),
    ),
    checks.quantize_absmax,
)
dequantize = _define(
    f"dequantize({_WEIGHT}, SymInt[] shape, int blocksize, str quant_type, ScalarType dtype) -> Tensor",
    lambda packed, absmax, nested_absmax, offset, shape, blocksize, quant_type, dtype: packed.new_empty(shape, dtype=dtype),
    checks.dequantize,
)
dequantize_into = _define(
    f"dequantize_into({_WEIGHT}, int blocksize, str quant_type, Tensor(a!) out) -> ()",
    lambda *args: None,
    checks.dequantize_into,
)
linear_fwd = _define(
    f"linear_fwd(Tensor x, {_WEIGHT}, Tensor? bias, Tensor? lora_A, Tensor? lora_B, Tensor? seed, "
    "SymInt N, int blocksize, str quant_type, float scaling, float dropout_p) -> (Tensor, Tensor)",
    lambda x, packed, absmax, nested_absmax, offset, bias, lora_A, lora_B, seed, N, *rest: (
        x.new_empty((*x.shape[:-1], N)),
        x.new_empty((rows(x), 0 if lora_A is None else lora_A.shape[0])),
    ),
    checks.linear_fwd,
    ("x", "seed"),
)
linear_bwd = _define(
    f"linear_bwd(Tensor dy, {_WEIGHT}, Tensor? lora_A, Tensor? dyb, Tensor? seed, "
    "SymInt K, int blocksize, str quant_type, float dropout_p) -> Tensor",
    lambda dy, packed, absmax, nested_absmax, offset, lora_A, dyb, seed, K, *rest: dy.new_empty((dy.shape[0], K)),
    checks.linear_bwd,
)
lora_bwd = _define(
    "lora_bwd(Tensor dy, Tensor x, Tensor xa, Tensor lora_A, Tensor lora_B, Tensor? seed, "
    "float scaling, float dropout_p, bool need_dA, bool need_dB) -> (Tensor, Tensor, Tensor)",
    lambda dy, x, xa, lora_A, lora_B, seed, scaling, dropout_p, need_dA, need_dB: (
        dy.new_empty((dy.shape[0], lora_B.shape[1])),
        torch.empty_like(lora_A) if need_dA else lora_A.new_empty(0),
        torch.empty_like(lora_B) if need_dB else lora_B.new_empty(0),
    ),
    checks.lora_bwd,
)
# What the backward of a layer calls: dx, dA and dB at once, each empty where it is not needed.
linear_grads = _define(
    f"linear_grads(Tensor dy, Tensor? x, Tensor? xa, {_WEIGHT}, Tensor? lora_A, Tensor? lora_B, Tensor? seed, SymInt K, "
    "int blocksize, str quant_type, float scaling, float dropout_p, bool need_dx, bool need_dA, bool need_dB) "
    "-> (Tensor, Tensor, Tensor)",
    lambda dy, x, xa, packed, absmax, nested_absmax, offset, lora_A, lora_B, seed, K, *rest: (
        dy.new_empty((*dy.shape[:-1], K) if rest[-3] else 0),
        torch.empty_like(lora_A) if rest[-2] else dy.new_empty(0),
        torch.empty_like(lora_B) if rest[-1] else dy.new_empty(0),
    ),
    checks.linear_grads,
    ("dy", "x", "xa", "seed"),
)

# The same for linears that read one x: lists hold an operand of each member, or nothing where no member has it. Columns
# of y and dy stand side by side, those of xa and dyb too. All members share blocksize, code, dtypes and dropout's mask.
_WEIGHTS = "Tensor[] packed, Tensor[] absmax, Tensor[] nested_absmax, Tensor[] offset"

group_fwd = _define(
    f"group_fwd(Tensor x, {_WEIGHTS}, Tensor[] bias, Tensor[] lora_A, Tensor[] lora_B, Tensor? seed, "
    "SymInt[] N, int blocksize, str quant_type, float[] scaling, float dropout_p) -> (Tensor, Tensor)",
    lambda x, packed, absmax, nested_absmax, offset, bias, lora_A, lora_B, seed, N, *rest: (
        x.new_empty((*x.shape[:-1], sum(N))),
        x.new_empty((rows(x), sum(A.shape[0] for A in lora_A))),
    ),
    checks.group_fwd,
    ("x", "seed"),
)
group_bwd = _define(
    f"group_bwd(Tensor dy, {_WEIGHTS}, Tensor[] lora_A, Tensor? dyb, Tensor? seed, "
    "SymInt[] N, SymInt K, int blocksize, str quant_type, float dropout_p) -> Tensor",
    lambda dy, packed, absmax, nested_absmax, offset, lora_A, dyb, seed, N, K, *rest: dy.new_empty((dy.shape[0], K)),
    checks.group_bwd,
)
group_lora_bwd = _define(
    "group_lora_bwd(Tensor dy, Tensor x, Tensor xa, Tensor[] lora_A, Tensor[] lora_B, Tensor? seed, "
    "float[] scaling, float dropout_p, bool need_dA, bool need_dB) -> (Tensor, Tensor[], Tensor[])",
    lambda dy, x, xa, lora_A, lora_B, seed, scaling, dropout_p, need_dA, need_dB: (
        dy.new_empty((dy.shape[0], sum(A.shape[0] for A in lora_A))),
        [torch.empty_like(A) for A in lora_A] if need_dA else [],
        [torch.empty_like(B) for B in lora_B] if need_dB else [],
    ),
    checks.group_lora_bwd,
)
group_grads = _define(
    f"group_grads(Tensor[] dy, Tensor? x, Tensor? xa, {_WEIGHTS}, Tensor[] lora_A, Tensor[] lora_B, Tensor? seed, "
    "SymInt[] N, SymInt K, int blocksize, str quant_type, float[] scaling, float dropout_p, "
    "bool need_dx, bool need_dA, bool need_dB) -> (Tensor, Tensor[], Tensor[])",
    lambda dy, x, xa, packed, absmax, nested_absmax, offset, lora_A, lora_B, seed, N, K, *rest: (
        dy[0].new_empty((*dy[0].shape[:-1], K) if rest[-3] else 0),
        [torch.empty_like(A) for A in lora_A] if rest[-2] else [],
        [torch.empty_like(B) for B in lora_B] if rest[-1] else [],
    ),
    checks.group_grads,
    ("dy", "x", "xa", "seed"),
)
swiglu_fwd = _define(
    "swiglu_fwd(Tensor gate_up) -> Tensor",
    lambda gate_up: gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2)),
    checks.swiglu_fwd,
    ("gate_up",),
)
swiglu_bwd = _define(
    "swiglu_bwd(Tensor gate_up, Tensor dh) -> Tensor",
    lambda gate_up, dh: gate_up.new_empty(gate_up.shape),
    checks.swiglu_bwd,
    ("gate_up", "dh"),
)

# In place, every parameter of an optimizer in one call; their states lie in arenas.
optim_check = _define(
    "optim_check(Tensor[] grads, Tensor(a!) steps, Tensor(b!) flag, int[] slots) -> ()",
    lambda *args: None,
    checks_optim.optim_check,
)
optim_step = _define(
    "optim_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!) state1, Tensor(c!)? state2, Tensor(d!)? absmax1, Tensor(e!)? absmax2, "
    "Tensor? steps, Tensor? flag, int[] offsets, int[] slots, int[] hyper_of, float[] hypers, str kind, int? seed, int origin) -> ()",
    lambda *args: None,
    checks_optim.optim_step,
)
