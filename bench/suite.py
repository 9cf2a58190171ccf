"""What `nf4lora bench` runs: each benchmark of this folder, in sizes that take a laptop seconds, or in its own."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from . import bench_host, bench_layer, bench_linear, bench_model, bench_optim, bench_quantize, methods, models, peers
from .bench_optim_meter import OptimMeter
from .bench_optim_steps import Work as Steps
from .bench_optim_steps import lora_shapes
from .harness import Case, meter_for, run
from .model_steps import StepMeter

Cases = Iterable[Callable[[], Case]]
Watch = Callable[[Cases], Cases]


@dataclass(frozen=True)
class Quick:
    """Sizes and rounds of a short run; on a GPU, where the repository's own rows come most important first, how many of them."""

    shape: tuple[int, int] = (2048, 2048)
    rows: tuple[int, ...] = (1, 16, 256)
    layer_rows: int = 32
    layers: int = 4
    rounds: int = 7
    first: int = 4
    steps: int = 60


QUICK = Quick()


def suite(what: str, device: str, out: Path, full: bool, watch: Watch = iter) -> int:
    """Run one of WHATS and write its results into `out`: `stem(what, device)`.json. Returns 1 if anything failed, else 0.

    watch: sees the cases go by, each a function that builds one
    """
    warnings.filterwarnings("ignore", message=".*(kernels-community|nothing pages|not supported on CPU|heckpointing).*")
    torch.manual_seed(0)
    return WHATS[what](device, out, None if full else QUICK, watch)


def stem(what: str, device: str) -> str:
    return what if what == "methods" else f"{device}_{what}"


def _quantize(device: str, out: Path, quick: Quick | None, watch: Watch) -> int:
    meter = meter_for(device)
    if device == "cuda":
        cases = _first(bench_quantize.cuda_cases(bench_quantize.cuda_setting(meter)), quick)
    elif quick:
        cases = bench_quantize.cpu_cases(quick.shape)
    else:
        cases = bench_quantize.cpu_cases(sweep=bench_quantize.CPU_SWEEP)
    return run(stem("quantize", device), watch(list(cases)), meter, quick.rounds if quick else 15, out, _without_bitsandbytes(device))


def _linear(device: str, out: Path, quick: Quick | None, watch: Watch) -> int:
    meter, rounds, absent = meter_for(device), quick.rounds if quick else 11, _without_bitsandbytes(device)
    if device == "cuda":
        rounds, absent = 9, []
        cases = [partial(bench_linear.cuda_case, *of, "cuda", absent) for of in _first(bench_linear.cuda_works(meter.l2_bytes), quick)]
    elif quick:
        dtype, last = bench_linear.dtypes()[-1], quick.rows[-1]
        rows = [(M, dtype, False) for M in quick.rows] + [(last, dtype, True)]
        cases = [partial(bench_linear.linear_case, *row, *quick.shape) for row in rows]
    else:
        cases = list(bench_linear.cpu_cases())
    return run(stem("linear", device), watch(cases), meter, rounds, out, absent)


def _layer(device: str, out: Path, quick: Quick | None, watch: Watch) -> int:
    absent: list[str] = []
    if device == "cuda":
        meter = bench_layer.LayerMeter()
        works = _first(bench_layer.gpu_works(meter.l2_bytes), quick)
    else:
        meter, works = meter_for(device), bench_layer.cpu_works()
        works = [replace(work, M=quick.layer_rows) for work in works] if quick else works
    cases = list(bench_layer.work_cases(works, device, absent))
    return run(stem("layer", device), watch(cases), meter, 9 if device == "cuda" else 5, out, absent)


def _optim(device: str, out: Path, quick: Quick | None, watch: Watch) -> int:
    absent: list[str] = []
    made: list[Case] = []
    only = bench_optim.KINDS[:-1] if device == "cuda" and not quick else bench_optim.KINDS[:1]  # without what others would feel
    work = Steps(f"r = 16 of {quick.layers} layers of Llama-3-8B", lora_shapes(layers=quick.layers), device=device) if quick else None
    cases = list(bench_optim.cases(device, only, absent, made, adapters=work))
    return bench_optim.measure(stem("optim", device), watch(cases), made, device, out, absent, rounds=5)


def _host(device: str, out: Path, quick: Quick | None, watch: Watch) -> int:
    return bench_host.measure(stem("host", device), bench_host.works(device), out, device, quick.rounds if quick else bench_host.ROUNDS, watch)


def _model(device: str, out: Path, quick: Quick | None, watch: Watch) -> int:
    absent = models.absent_peers()
    only = ("train", "decode") if quick else bench_model.KINDS
    cases = bench_model.cases(device, only, 2 if quick else None, False, absent)  # not a list: the last is built within a limit
    return run(stem("model", device), watch(cases), StepMeter(device), 5 if quick else 7, out, absent)


def _methods(device: str, out: Path, quick: Quick | None, watch: Watch) -> int:
    return methods.measure(out, replace(methods.DEMO, max_steps=quick.steps) if quick else methods.DEMO)


WHATS = {
    "quantize": _quantize, "linear": _linear, "layer": _layer, "optim": _optim, "host": _host, "model": _model, "methods": _methods,
}  # fmt: skip


def _first(items: Iterable, quick: Quick | None) -> Iterator:
    return islice(items, quick.first if quick else None)


def _without_bitsandbytes(device: str) -> list[str]:
    why = peers.why_not("bitsandbytes", device=device)
    return [f"bitsandbytes: {why}"] if why else []
