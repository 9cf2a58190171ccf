"""What the host kernels must reach: every instruction set of theirs that this processor has beside bitsandbytes and torch.

All of a row take turns in one process: of each instruction set a copy of the library, bitsandbytes' modes, torch in
bfloat16, and a copy, a read or a product as the limit. Weights of the forward come from memory, in as many copies as no
cache holds; "in cache" is one weight again and again. `bench/cpu_targets.py` has what is wanted.
"""

import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nf4lora import backends, functional
from nf4lora.cli.settings import DEMO as DEMO_SETTINGS
from nf4lora.cli.settings import RunFailed, Settings
from nf4lora.testing import assert_error_ratio

from . import bench_quantize, cpu_memory
from .bench_layer import case as layer_case
from .bench_linear import SCALING, DenseLoRA, layers
from .bench_quantize import Format, Setting
from .cpu_isas import isas
from .cpu_targets import APART, DEMO, EVAL, EVAL_LORA, ISAS, LORA, NOT_HERE, PEAK, READ, STEP, TORCH, TRAIN_LORA, text
from .files import load, write
from .harness import Case, options, run
from .layer import ALONE, DENSE_PEFT, GROUPED, OURS, UNSLOTH, Work
from .roofline import dequantize_traffic
from .shapes import LLAMA_3_8B_LAYER
from .timing import Contender, WallMeter, cold_sets

STEM = "cpu_isas"
ROUNDS = 7
N = K = 4096
FEW = 16  # rows of x at which reading the weight takes longer than computing
CACHE_BYTES = 32 * 2**20  # where Linux does not tell
# gate and up have a quarter of their widths: the portable code would take a minute
GATE_UP = {"gate_proj": (3584, 4096), "up_proj": (3584, 4096)}
# The model whose fine-tuning is timed: a Llama of this width, that many layers
HIDDEN, LAYERS = 2048, 2
SEQUENCE = 512


def last_cache() -> int:
    """Bytes of the largest cache of the first processor."""
    found = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(size.read_text().strip().removesuffix("K")) * 1024 for size in found), default=CACHE_BYTES)


def by_isa(case: Case, names: dict[str, str], *dropped: str) -> Case:
    """`case` with the contenders `names`, ours, once for each instruction set: "avx2" and what `names` says they end with."""
    ours = {
        isa + ending: replace(case.contenders[name], within=library.used)
        for isa, library in isas().items()
        for name, ending in names.items()
    }
    others = {name: c for name, c in case.contenders.items() if name not in (*names, *dropped)}
    return replace(case, contenders=ours | others, bases=tuple(isas()), sweep=None, x=None)


def quantize_case(N: int = N, K: int = K) -> Case:
    found = bench_quantize.quantize_case((N, K), Format(), Setting(l2_bytes=last_cache()))
    return by_isa(replace(found, name="quantize"), {OURS: ""})


def dequantize_case(N: int = N, K: int = K) -> Case:
    """Into memory that is there, as the copy; bitsandbytes has no way to do so on a CPU."""
    found = bench_quantize.dequantize_case((N, K), Format(), Setting(l2_bytes=last_cache()))
    packed, state = functional.quantize_4bit(bench_quantize.weights((N, K), torch.bfloat16, "cpu"), 64, True)
    sets = len(found.contenders[OURS].calls)
    operands = zip(bench_quantize._copies(packed, sets), bench_quantize._states(state, sets), strict=True)
    into = [torch.full((N, K), torch.nan, dtype=torch.bfloat16) for _ in range(sets)]
    calls = [partial(functional.dequantize_4bit, *of, out=out) for of, out in zip(operands, into, strict=True)]
    ours = replace(found.contenders[OURS], calls=tuple(calls))

    def error(result: Tensor) -> dict[str, float]:
        found_error = found.error(result)
        result.fill_(torch.nan)  # the next one must write it anew
        return found_error

    return by_isa(replace(found, name="dequantize", contenders=found.contenders | {OURS: ours}, error=error), {OURS: ""})


def forward_case(M: int, cold: bool = True, N: int = N, K: int = K) -> Case:
    """Without gradients; ours with LoRA, bitsandbytes with and without it, in both its modes, torch without. T2 against float64."""
    ours, dense, theirs = layers(N, K, torch.bfloat16)
    x = torch.randn(M, K, dtype=torch.bfloat16)
    w = ours.dequantize(torch.float32).double()
    truth = (x.double() @ w.T + SCALING * (x.double() @ ours.lora_A.double().T) @ ours.lora_B.double().T).detach()
    baseline = DenseLoRA(dense, ours)(x).detach()
    packed, cache = dequantize_traffic(N * K, torch.bfloat16, nested=True).read, last_cache()
    few = M <= FEW

    def contender(layer: nn.Module, moved: int = packed, **kinds: Any) -> Contender:
        sets = cold_sets(moved, cache) if few else 1
        layers = [deepcopy(layer) for _ in range(sets)] if cold else [layer] * sets
        return Contender(tuple(partial(_forward, each, x) for each in layers), bytes_moved=moved, **kinds)

    found = {OURS: contender(ours, backend="cpu", ours=True)}
    if theirs is not None:
        fast = deepcopy(theirs).eval()
        _forward(fast, x)  # repacks the weight where the processor has what that mode takes
        with_lora = DenseLoRA(fast, ours).eval(), DenseLoRA(theirs, ours)
        found |= dict(zip((EVAL, EVAL_LORA, TRAIN_LORA), map(contender, (fast, *with_lora)), strict=True))
    found[TORCH] = contender(dense, dense.weight.nbytes)
    if few:
        found[READ] = reads(packed, cold_sets(packed, cache), cold)
    name = f"forward M={M}{'' if cold else ', weight in a cache'}"
    gate = partial(assert_error_ratio, baseline=baseline, truth=truth)
    return by_isa(Case("forward, bfloat16, r = 16", name, found, gate, flops=2 * M * N * K), {OURS: ""})


def reads(count: int, sets: int, cold: bool = True) -> Contender:
    """Reads so many bytes and does next to nothing with them."""
    memory = [torch.ones(count // 4) for _ in range(sets if cold else 1)] * (1 if cold else sets)
    return Contender(tuple(t.amax for t in memory), ceiling=True, bytes_moved=count // 4 * 4)


def training_case(absent: list[str], N: int = N, K: int = K) -> Case:
    """Forward and backward of one linear; T2 in every output and gradient."""
    work = Work(512, (("o_proj",),), True, {"o_proj": (N, K)}, torch.bfloat16, "cpu")
    return by_isa(layer_case(work, "forward + backward, bfloat16, r = 16", "cpu", absent), {OURS: ""}, UNSLOTH)


def group_case(names: tuple[str, ...], absent: list[str], shapes: dict[str, tuple[int, int]]) -> Case:
    """Linears that read one x, together and one by one."""
    work = Work(512, (names,), True, shapes, torch.bfloat16, "cpu")
    title = ", ".join(name.removesuffix("_proj") for name in names)
    found = layer_case(work, "groups, forward + backward, bfloat16, r = 16", "cpu", absent)
    others = [name for name in found.contenders if name not in (GROUPED, ALONE, DENSE_PEFT)]
    return by_isa(replace(found, name=f"{title} M=512"), {GROUPED: "", ALONE: APART}, *others)


def tuning_case(name: str, prepared: Callable[[str], Any]) -> Case:
    """Steps of QLoRA and of LoRA on the same base in bfloat16, as `nf4lora finetune` makes them. prepared: method -> its run.

    Of the first step, in which all drop the same, the loss and the norm of the gradients must be the reference's within 1 %.
    """
    from nf4lora.cli.train import train_step

    def stepping(run: Any) -> Contender:
        def step() -> tuple[int, float, float]:
            if not run.step:
                torch.manual_seed(0)
            try:
                return run.step, train_step(run), run.grad_norm
            except RunFailed as why:
                raise AssertionError(str(why)) from why

        return Contender((step,), ours=True)

    def gate(found: tuple[int, float, float]) -> None:
        step, *figures = found
        near = [abs(f - w) <= 0.01 * w for f, w in zip(figures, wanted, strict=True)]
        assert step or all(near), f"loss and norm of the gradients: {figures}, the reference's {wanted}"

    checked = prepared("qlora")
    tokens = checked.tokens(checked.indices())
    with backends.use_backend("reference"):
        wanted = stepping(checked).calls[0]()[1:]
    ours = {isa: replace(stepping(prepared("qlora")), within=library.used) for isa, library in isas().items()}
    lora = replace(stepping(prepared("lora")), ours=False)
    return Case("`nf4lora finetune`", name, ours | {LORA: lora}, gate, tokens=tokens, bases=tuple(isas()))


def demo_case() -> Case:
    """The demonstration's model and text."""
    from nf4lora.cli import methods

    with tempfile.TemporaryDirectory() as folder:
        compute, _ = _compute()
        _save(methods.MODEL, Path(folder) / "base")
        settings = replace(DEMO_SETTINGS, output=folder)
        return tuning_case(DEMO, lambda method: methods.prepared(method, settings, compute)[0])


def step_case(hidden: int = HIDDEN, layers: int = LAYERS, sequence: int = SEQUENCE) -> Case:
    """A user's model, one sequence a step."""
    from nf4lora.cli import model as models
    from nf4lora.cli.train import start

    compute, device = _compute()
    shape = {
        "hidden_size": hidden, "intermediate_size": hidden * 11 // 4, "num_hidden_layers": layers, "vocab_size": 256,
        "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 256, "max_position_embeddings": sequence,
    }  # fmt: skip
    blocks = torch.randint(256, (64, sequence))
    with tempfile.TemporaryDirectory() as folder:
        _save(shape, Path(folder))
        asked = Settings(model=folder, max_steps=10_000, batch_size=1, grad_accum=1, seq_len=sequence)

        def prepared(method: str) -> Any:
            settings = replace(asked, method=method)
            base = models.load_base(settings, device, compute)
            return start(models.add_adapters(base, settings, settings.max_steps), blocks, settings)

        return tuning_case(STEP, prepared)


def _compute() -> tuple[torch.dtype, torch.device]:
    from nf4lora.cli import model as models
    from nf4lora.cli.compute import compute_dtype

    models.quiet_transformers()
    device = torch.device("cpu")
    return compute_dtype(device, "auto")[0], device


def _save(shape: dict[str, Any], folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**shape)).to(torch.bfloat16).save_pretrained(folder)


def _forward(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer(x)


def cases(absent: list[str]) -> Iterator[Callable[[], Case]]:
    """All rows. `absent` grows by who is not there."""
    q_k_v = {name: LLAMA_3_8B_LAYER[name] for name in ("q_proj", "k_proj", "v_proj")}
    yield quantize_case
    yield dequantize_case
    for M, cold in ((1, True), (16, True), (512, True), (1, False), (16, False)):
        yield partial(forward_case, M, cold)
    yield partial(training_case, absent)
    for shapes in (q_k_v, GATE_UP):
        yield partial(group_case, tuple(shapes), absent, shapes)
    yield demo_case
    yield step_case


def measure(
    out: Path, chosen: Iterable[Callable[[], Case]], absent: list[str], rounds: int = ROUNDS, N: int = N, K: int = K
) -> int:
    """Writes cpu_isas.json into `out`; returns 1 if anything is wrong or takes more memory than it may, else 0."""
    absent += [f"{isa}: {NOT_HERE}, this processor lacks it" for isa in ISAS if isa not in isas()]
    code = run(STEM, chosen, WallMeter(), rounds, out, absent)
    memory, more = {}, []
    for isa in isas():
        try:
            memory[isa] = cpu_memory.peak(isa, N, K, 512)
        except RuntimeError as why:
            more.append(str(why))
    more += [f"peak extra memory with {isa}: {count} bytes, wanted {PEAK} or less" for isa, count in memory.items() if count > PEAK]
    document = load(out)[STEM]
    document |= {"isas": list(isas()), "memory": memory, "failed": document["failed"] + more}
    write(out / f"{STEM}.json", document)
    print(text(document))
    return 1 if more else code


def main() -> int:
    warnings.filterwarnings("ignore", message=".*kernels-community.*|.*nothing pages.*")
    asked = options(__doc__)
    torch.manual_seed(0)
    absent: list[str] = []
    return measure(asked.out, cases(absent), absent)


if __name__ == "__main__":
    sys.exit(main())
