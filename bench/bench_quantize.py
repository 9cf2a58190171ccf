"""Quantize and dequantize beside bitsandbytes and beside a copy that moves as many bytes in the same mix.

Bytes moved, for n weights of 2 bytes: quantize reads 2n and writes n/2 and the statistics; dequantize the other way
round. On a GPU: each shape with the kernel time of CUDA graphs over cold buffers, then a sweep over sizes.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nf4lora import QuantState, backends, functional

from .files import COPY
from .harness import Case, differing_bytes, meter_for, options, relative_error, run
from .roofline import TILES, Mix, Tile, copy, dequantize_traffic, fastest_tile, quantize_traffic
from .timing import Contender, CudaMeter, cold_sets

SHAPES = ((14336, 4096), (4096, 4096), (1024, 4096))
SWEEP = tuple(2**k for k in range(18, 30, 2))
CPU_SWEEP = tuple(2**k for k in range(14, 26, 2))


@dataclass(frozen=True)
class Format:
    """What a row quantizes, and how."""

    dtype: torch.dtype = torch.bfloat16
    quant_type: str = "nf4"
    nested: bool = True

    def theirs(self, w: Tensor) -> tuple[Tensor, Any]:
        """What bitsandbytes makes of it: packed, and its QuantState."""
        return bitsandbytes().quantize_4bit(w, compress_statistics=self.nested, quant_type=self.quant_type)

    def __str__(self) -> str:
        return f"{str(self.dtype)[6:]}, {self.quant_type.upper()}{' + double quantization' if self.nested else ''}"


@dataclass(frozen=True)
class Setting:
    """Where the cases run: our back ends in order, the bytes of the cache that must be cold, and the copy's tiles."""

    device: str = "cpu"
    backends: tuple[str, ...] = ("cpu",)
    l2_bytes: int = 0
    tiles: tuple[tuple[Mix, Tile], ...] = ()

    def sets(self, bytes_moved: int) -> int:
        return cold_sets(bytes_moved, self.l2_bytes) if self.l2_bytes else 1

    def tile(self, mix: Mix) -> Tile:
        return dict(self.tiles).get(mix, TILES[0])


def weights(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Normal, of the size that trained ones have; the same whenever asked for."""
    generator = torch.Generator(device).manual_seed(0)
    return (torch.randn(shape, generator=generator, device=device) * 0.02).to(dtype)


def quantize_case(shape: tuple[int, ...], form: Format, at: Setting, **of_case: Any) -> Case:
    """Every byte must be the reference's: packed, absmax, and with double quantization its codes, scales and offset."""
    w = weights(shape, form.dtype, at.device)
    traffic = quantize_traffic(w.numel(), form.dtype, nested=form.nested)
    inputs = _copies(w, at.sets(traffic.total))

    def ours(a: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        # check_finite waits for the device, and nobody else looks
        check_finite = at.device == "cpu"
        return lambda: _flat(*functional.quantize_4bit(a, 64, form.nested, form.quant_type, check_finite=check_finite))

    with backends.use_backend("reference"):
        wanted = ours(w)()
    contenders = _ours(at, [ours(a) for a in inputs])
    if bitsandbytes():
        contenders["bitsandbytes"] = Contender(tuple((lambda a=a: _flat(*form.theirs(a))) for a in inputs))
    contenders[COPY] = copy(traffic, at.device, len(inputs), at.tile(Mix.of(traffic)))
    return Case(
        str(form), f"quantize {_name(shape)}", contenders, _exact(wanted),
        lambda result: {"differing_bytes": differing_bytes(_same_form(result, wanted), wanted)},
        traffic.total, **of_case,
    )  # fmt: skip


def dequantize_case(shape: tuple[int, ...], form: Format, at: Setting, into: bool = False, **of_case: Any) -> Case:
    """Every bit must be the reference's. The error beside the time is that of the rounding, against float64.

    into: write into memory that is there already, as the copy does; bitsandbytes makes new memory where it can only that.
    """
    w = weights(shape, form.dtype, at.device)
    traffic = dequantize_traffic(w.numel(), form.dtype, nested=form.nested)
    with backends.use_backend("reference"):
        packed, state = functional.quantize_4bit(w, 64, form.nested, form.quant_type)
        wanted = functional.dequantize_4bit(packed, state)
        truth = functional.dequantize_4bit(packed, state, torch.float64)
    sets = at.sets(traffic.total)
    operands = list(zip(_copies(packed, sets), _states(state, sets), strict=True))
    outs = [torch.full_like(wanted, torch.nan) if into else None for _ in operands]
    contenders = _ours(at, [partial(functional.dequantize_4bit, *o, out=out) for o, out in zip(operands, outs, strict=True)])
    if theirs := bitsandbytes():
        pairs = [form.theirs(w) for _ in range(sets)]
        given = [{"out": torch.empty_like(wanted)} if into and at.device != "cpu" else {} for _ in pairs]
        calls = (partial(theirs.dequantize_4bit, *pair, **out) for pair, out in zip(pairs, given, strict=True))
        contenders["bitsandbytes"] = Contender(tuple(calls))
    contenders[COPY] = copy(traffic, at.device, sets, at.tile(Mix.of(traffic)))

    def error(result: Tensor) -> dict[str, float]:
        found = {"differing_bytes": differing_bytes(result, wanted)} | relative_error(result, truth)
        for out in outs if into else ():
            out.fill_(torch.nan)  # whoever is next must write it anew
        return found

    name = f"dequantize {_name(shape)}{' into memory that is there' * into}"
    return Case(str(form), name, contenders, _exact(wanted), error, traffic.total, **of_case)


CASES = {"quantize": quantize_case, "dequantize": dequantize_case}


def cpu_cases(shape: tuple[int, ...] = (4096, 4096), sweep: tuple[int, ...] = ()) -> Iterator[Callable[[], Case]]:
    """The rows of the host kernels, and a sweep over sizes."""
    for make in CASES.values():
        yield lambda make=make: make(shape, Format(), Setting())
    yield lambda: dequantize_case(shape, Format(), Setting(), into=True)
    for numel in sweep:
        for name, make in CASES.items():
            yield lambda name=name, make=make, numel=numel: make((1, numel), Format(), Setting(), sweep=name, x=numel)


def cuda_cases(at: Setting) -> Iterator[Callable[[], Case]]:
    """Most important first: a time limit cuts the end off."""
    for name in ("dequantize", "quantize"):
        for shape in SHAPES:
            yield lambda name=name, shape=shape: CASES[name](shape, Format(), at, energy=True)
    others = (Format(nested=False), Format(torch.float16), Format(torch.float32), Format(quant_type="fp4"))
    for form in others:
        for name in ("dequantize", "quantize"):
            yield lambda name=name, form=form: CASES[name](SHAPES[1], form, at)
    for numel in SWEEP:
        for name in ("dequantize", "quantize"):
            yield lambda name=name, numel=numel: CASES[name]((1, numel), Format(), at, sweep=name, x=numel)


def cuda_setting(meter: CudaMeter) -> Setting:
    """Our back ends that run here, and the fastest copy of each mix."""
    ready = tuple(b for d, b, why_not in backends.report() if d == "cuda" and why_not is None and b != "reference")
    for device, backend, why_not in backends.report():
        if device == "cuda" and why_not:
            print(f"{backend} is not measured: {why_not}")
    at = Setting("cuda", ready, meter.l2_bytes)
    numel, tiles = SHAPES[0][0] * SHAPES[0][1], {}
    for dtype in (torch.bfloat16, torch.float32):
        for traffic in (dequantize_traffic(numel, dtype, nested=True), quantize_traffic(numel, dtype, nested=True)):
            tiles[Mix.of(traffic)] = fastest_tile(traffic, "cuda", at.sets(traffic.total), meter)
    print(
        f"copy tiles (int32 a block, warps) by read:write: { ({str(mix): tuple(tile) for mix, tile in tiles.items()}) }"
    )
    return replace(at, tiles=tuple(tiles.items()))


def bitsandbytes() -> Any:
    """Its functional API, or None where it is not installed."""
    try:
        import bitsandbytes.functional
    except ImportError:
        return None
    return bitsandbytes.functional


def _ours(at: Setting, calls: list[Callable[[], Any]]) -> dict[str, Contender]:
    alone = len(at.backends) == 1
    return {"nf4lora" if alone else f"nf4lora {b}": Contender(tuple(calls), b, ours=True) for b in at.backends}


def _exact(wanted: Any) -> Callable[[Any], None]:
    def gate(result: Any) -> None:
        if n := differing_bytes(result, wanted):
            raise AssertionError(f"{n} bytes differ from the reference's")

    return gate


def _flat(packed: Tensor, state: Any) -> tuple[Tensor, ...]:
    """What quantizing wrote, by us or by bitsandbytes: packed, absmax, and where nested the scales and the offset."""
    if isinstance(state, QuantState):
        return (packed, state.absmax, state.nested_absmax, state.offset) if state.nested else (packed, state.absmax)
    return (packed, state.absmax, state.state2.absmax, state.offset) if state.nested else (packed, state.absmax)


def _same_form(result: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same bytes in other shapes are the same bytes."""
    return tuple(r.reshape(w.shape) if r.numel() == w.numel() else r for r, w in zip(result, wanted, strict=True))


def _copies(t: Tensor, sets: int) -> list[Tensor]:
    return [t, *(t.clone() for _ in range(sets - 1))]


def _states(state: QuantState, sets: int) -> list[QuantState]:
    copied = [{k: t.clone() for k in ("absmax", "nested_absmax", "offset") if (t := getattr(state, k)) is not None}
              for _ in range(sets - 1)]  # fmt: skip
    return [state, *(replace(state, **tensors) for tensors in copied)]


def _name(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape)) if shape[0] > 1 else f"2^{shape[-1].bit_length() - 1}"


def main() -> int:
    asked = options(__doc__)
    meter = meter_for(asked.device)
    if asked.device == "cpu":
        return run("cpu_quantize", cpu_cases(sweep=CPU_SWEEP), meter, out=asked.out)
    return run("cuda_quantize", cuda_cases(cuda_setting(meter)), meter, out=asked.out)


if __name__ == "__main__":
    sys.exit(main())
