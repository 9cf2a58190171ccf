"""What Triton and ptxas made of every Triton kernel for every architecture, beside bench/codegen.py. No GPU needed.

`python -m bench.codegen_triton` prints the table for the installed Triton. `--update` also writes its rows to
bench/results/codegen_triton.json, `--out DIR` writes rows.json and each kernel's PTX there. Not under TRITON_INTERPRET=1.
"""

import argparse
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from nf4lora import triton_optim, triton_tiles
from nf4lora.codebook import NESTED_BLOCKSIZE
from nf4lora.reference_optim import STATE_BLOCKSIZE
from nf4lora.triton_tiles import TritonTile

from .codegen import DEFAULT_ARCHS, SLOW, Instruction, KernelRow, disassemble, hot_loop, regressions, resource_usage

RESULTS = Path(__file__).parent / "results" / "codegen_triton.json"
TYPES = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
MOST_SHARED = 99 << 10  # bytes of shared memory a program may have on sm_86, 89 and 120


@dataclass(frozen=True)
class Variant:
    """One compilation of a kernel: what its launch would give the JIT. `weights`: of one program.

    must, must_not: `Instruction.name`s; "CALL" is the rare branch of a correctly rounded division, "MMA" the tensor cores',
    whatever their instruction is called on the architecture.
    loop: what the main loop holds, of one step of which `weights` and the instructions are then; empty: there is none.
    """

    name: str
    kernel: str  # of nf4lora.triton_kernels: "module.function"
    pointers: dict[str, str]
    size: str  # the argument that counts, not specialized on
    size_type: str
    constants: dict[str, Any]
    warps: int
    weights: int
    must: tuple[str, ...]
    must_not: tuple[str, ...]
    loop: tuple[str, ...] = ()
    numbers: dict[str, str] = field(default_factory=dict)  # more arguments that are none
    divisible: tuple[str, ...] = ()  # those of them that are multiples of 16
    stages: int = 3


def dequantize(dtype: str, nested: bool = True, numel: int = 1 << 24, **changes: Any) -> Variant:
    """dequantize to `dtype`; `changes` to the constants a launch would give."""
    config = triton_tiles.triton_dequantize(numel)
    constants = {"BLOCKSIZE": 64, "ALIGNED": True, "TAIL": False, "ASM": True, "WORDS": config.weights // 8} | changes
    pointers = {"packed_ptr": "*u8", "absmax_ptr": "*u8" if nested else "*fp32", "codebook_ptr": "*fp32", "out_ptr": TYPES[dtype]}
    more = ("nested_absmax_ptr", "offset_ptr", "dynamic_ptr")
    pointers |= dict.fromkeys(more, "*fp32") if nested else {}
    # No FFMA: the product of the nested absmax and the sum with the offset round one after the other
    tail = constants["TAIL"] or not constants["ALIGNED"]
    return Variant(
        _name("dequantize", dtype, "nested" if nested else "plain", "64", numel, changes),
        "dequantize.dequantize_kernel", pointers, "numel", _integer(numel), constants | ({} if nested else dict.fromkeys(more)),
        config.warps, config.weights, ("STG.128",) if tail else ("STG.128", "LDG.32"), (*SLOW, "FFMA", "BAR", "STS", "LDS"),
    )  # fmt: skip


def quantize(dtype: str, quant_type: str = "nf4", blocksize: int = 64, numel: int = 1 << 24, **changes: Any) -> Variant:
    config = triton_tiles.triton_quantize(blocksize)
    constants = {"BLOCKSIZE": blocksize, "NF4": quant_type == "nf4", "TAIL": False, "ASM": True, "WEIGHTS": config.weights} | changes
    pointers = {"a_ptr": TYPES[dtype], "packed_ptr": "*u8", "absmax_ptr": "*fp32", "cells_ptr": "*i64"}
    return Variant(
        _name("quantize", dtype, quant_type, str(blocksize), numel, changes),
        "quantize.quantize_kernel", pointers, "numel", _integer(numel), constants, config.warps, config.weights,
        () if constants["TAIL"] else ("LDG.128", "STG.32"), tuple(s for s in SLOW if s not in ("CALL", "REDUX")),
    )  # fmt: skip


def quantize_absmax() -> Variant:
    config = triton_tiles.triton_quantize_absmax()
    pointers = dict.fromkeys(("absmax_ptr", "offset_ptr", "nested_absmax_ptr", "boundaries_ptr"), "*fp32") | {"codes_ptr": "*u8"}
    return Variant(
        "quantize_absmax", "quantize.quantize_absmax_kernel", pointers, "groups", "i32", {"BLOCK": NESTED_BLOCKSIZE}, config.warps,
        NESTED_BLOCKSIZE, (), tuple(s for s in SLOW if s not in ("CALL", "REDUX")),
    )  # fmt: skip


_DOUBLES = ("DADD", "DMUL", "DFMA", "DSETP")


def optim_step(kind: str, dtype: str, coded: bool = True, whole: bool = True, stochastic: bool = False, counted: bool = False) -> Variant:
    """whole: of tensors that begin at multiples of 16 bytes and have multiples of 8 elements. counted: with steps and a flag."""
    config, state, both = triton_optim.config(), "*u8" if coded else "*fp32", kind == "adamw"
    kinds = {"state1_ptr": state, "state2_ptr": state, "absmax1_ptr": "*fp32", "absmax2_ptr": "*fp32", "codebook1_ptr": "*fp32",
             "codebook2_ptr": "*fp32", "cells1_ptr": "*i64", "cells2_ptr": "*i64"}  # fmt: skip
    absent = [n for n in kinds if ("2" in n and not both) or ("state" not in n and not coded)]
    pointers = {"like_ptr": TYPES[dtype], "table_ptr": "*i64", "constants_ptr": "*fp32"}
    pointers |= {n: k for n, k in kinds.items() if n not in absent}
    counts = "steps_ptr", "flag_ptr"
    pointers, absent = (pointers | dict.fromkeys(counts, "*i32"), absent) if counted else (pointers, [*absent, *counts])
    constants = {"STOCHASTIC": stochastic, "WHOLE": whole, "ASM": True, "BLOCK": STATE_BLOCKSIZE, "WEIGHTS": config.weights}
    more = ("" if whole else ", anywhere") + (", stochastic" if stochastic else "") + (", counted" if counted else "")
    # Parameters and gradients in runs of 16 bytes, codes in runs of 8. No FFMA: but of a division or a root, which are made of them
    must = (("LDG.64", "STG.64") if coded else ()) + ("LDG.128", "STG.128") if whole else ()
    must_not = (*(s for s in SLOW if s != "CALL" and not (counted and s in _DOUBLES)), *(() if coded or both else ("CALL", "FFMA")))
    return Variant(
        f"optim_step<{kind}, {dtype}, {'8-bit' if coded else 'float32'}{more}>", "optim.optim_step_kernel", pointers, "count", "i32",
        constants | dict.fromkeys(absent), config.warps, config.weights, must, must_not, numbers={"halvings": "i32"},
    )  # fmt: skip


def optim_check(dtype: str, whole: bool = True) -> Variant:
    """whole: as `optim_step` has it."""
    config = triton_optim.check_config()
    pointers = {"like_ptr": TYPES[dtype], "table_ptr": "*i64", "steps_ptr": "*i32", "flag_ptr": "*i32"}
    return Variant(
        f"optim_check<{dtype}{'' if whole else ', anywhere'}>", "optim.optim_check_kernel", pointers, "count", "i32",
        {"WHOLE": whole, "WEIGHTS": config.weights}, config.warps, config.weights, ("ATOMG", "LDG.128") if whole else ("ATOMG",),
        (*(s for s in SLOW if s != "ATOMG"), "ATOMG.FLOAT"), numbers={"halvings": "i32"},
    )  # fmt: skip


# The models' shapes that the linear's rows are of; 132 multiprocessors, as an H200 has.
_N = _K = 4096
_PROCESSORS = 132
_STEPS = tuple(s for s in SLOW if s != "REDUX")


def _product(name: str, kernel: str, tile: TritonTile, pointers: dict[str, str], numbers: dict[str, str], constants: dict, plain: bool) -> Variant:
    """A product with the weight. `plain`: absmax is not nested."""
    optional = ("nested_absmax_ptr", "offset_ptr", "dynamic_ptr")
    weight = {"packed_ptr": "*u8", "absmax_ptr": "*fp32" if plain else "*u8", "codebook_ptr": "*fp32"}
    weight |= {} if plain else dict.fromkeys(optional, "*fp32")
    sizes = dict.fromkeys(("N", "K", "r", "steps"), "i32") | numbers
    words = constants["SPAN"] > 1
    return Variant(
        name, kernel, weight | pointers, "M", "i32", constants | (dict.fromkeys(optional) if plain else {}), tile.warps,
        tile.cols * tile.steps, ("MMA", "SHFL") if words else ("MMA",), (*_STEPS, "FFMA"), ("MMA", "SHFL") if words else ("MMA",),
        sizes, tuple(n for n in sizes if n in ("N", "K", "r") or n.endswith("_ld")) if words else (), tile.stages,
    )  # fmt: skip


def linear_fwd(M: int, dtype: str = "bfloat16", r: int = 16, plain: bool = False, span: int = 64) -> Variant:
    tile = triton_tiles.linear_fwd(M, _N, _K, span, _PROCESSORS)
    pointers = {"x_ptr": TYPES[dtype], "out_ptr": "*fp32" if tile.split > 1 else TYPES[dtype]}
    pointers |= {"xa_ptr": TYPES[dtype], "B_ptr": "*fp32"} if r else {}
    constants = {"BLOCKSIZE": 64, "SPAN": span, "ASM": True, "BLOCK_M": tile.rows, "BLOCK_N": tile.cols, "BLOCK_K": tile.steps,
                 "RANK": min(64, max(16, r)), "bias_ptr": None} | ({} if r else {"xa_ptr": None, "B_ptr": None})  # fmt: skip
    name = f"linear_fwd<{dtype}, {'plain' if plain else 'nested'}, {M} tokens, r {r}{'' if span == 64 else f', span {span}'}>"
    return _product(name, "linear_fwd.linear_fwd_kernel", tile, pointers, {"xa_ld": "i32", "out_ld": "i32", "scaling": "fp32"}, constants, plain)


def linear_bwd(M: int, dtype: str = "bfloat16", r: int = 16, plain: bool = False, dropout: bool = False) -> Variant:
    tile = triton_tiles.linear_bwd(M, _N, _K, 64, _PROCESSORS)
    pointers = {"dy_ptr": TYPES[dtype], "dyb_ptr": TYPES[dtype], "A_ptr": "*fp32", "out_ptr": "*fp32" if tile.split > 1 else TYPES[dtype]}
    pointers |= {"seed_ptr": "*i64"} if dropout else {}
    constants = {"BLOCKSIZE": 64, "SPAN": 64, "QUADS": True, "ASM": True, "BLOCK_M": tile.rows, "BLOCK_N": tile.steps,
                 "BLOCK_K": tile.cols, "RANK": min(64, max(16, r))} | ({} if dropout else {"seed_ptr": None})  # fmt: skip
    name = f"linear_bwd<{dtype}, {'plain' if plain else 'nested'}, {M} tokens, r {r}{', dropout' if dropout else ''}>"
    return _product(name, "linear_bwd.linear_bwd_kernel", tile, pointers, {"dy_ld": "i32", "threshold": "i32", "factor": "fp32"}, constants, plain)


def lora(kernel: str, M: int = 4096, r: int = 16, dtype: str = "bfloat16", dropout: bool = False) -> Variant:
    """kernel: "xa", "dyb_dB" or "dA"; their weights are elements of x or dy."""
    config, sixteen = triton_tiles.lora_bwd(M, _N, _K, r, _PROCESSORS), TYPES[dtype]
    tile = {"xa": triton_tiles.xa(M, _K, r, _PROCESSORS), "dyb_dB": config.dy, "dA": config.x}[kernel]
    rank = {"RANK": max(16, r), "ASM": True}
    masked = {"threshold": "i32", "factor": "fp32"}
    pointers, numbers, constants = {
        "xa": ({"x_ptr": sixteen, "A_ptr": "*fp32", "out_ptr": "*fp32"}, {"K": "i32"} | masked,
               {"QUADS": True, "BLOCK_M": tile.rows, "BLOCK_K": tile.steps}),
        "dyb_dB": ({"dy_ptr": sixteen, "B_ptr": "*fp32", "xa_ptr": sixteen, "dyb_ptr": "*fp32", "dB_ptr": "*fp32"},
                   dict.fromkeys(("N", "dy_ld", "xa_ld", "dyb_ld"), "i32") | {"scaling": "fp32"},
                   {"BLOCK_M": tile.rows, "BLOCK_N": tile.steps}),
        "dA": ({"x_ptr": sixteen, "dyb_ptr": sixteen, "dA_ptr": "*fp32"}, {"K": "i32"} | masked,
               {"QUADS": True, "BLOCK_M": tile.steps, "BLOCK_K": tile.cols}),
    }[kernel]  # fmt: skip
    if kernel != "dyb_dB":
        pointers |= {"seed_ptr": "*i64"} if dropout else {}
        constants |= {} if dropout else {"seed_ptr": None}
    numbers |= {"r": "i32", "steps": "i32"}
    return Variant(
        f"{kernel}<{dtype}, {M} tokens, r {r}{', dropout' if dropout else ''}>", f"lora.{kernel}_kernel", pointers, "M", "i32",
        constants | rank, tile.warps, (tile.rows or tile.cols) * tile.steps, ("MMA",), _STEPS, ("MMA",), numbers,
        tuple(n for n in numbers if n in ("N", "K", "r") or n.endswith("_ld")), tile.stages,
    )  # fmt: skip


def _name(kernel: str, dtype: str, what: str, blocksize: str, numel: int, changes: dict[str, Any]) -> str:
    size = "small" if numel < 1 << 20 else "huge" if numel >= 1 << 31 else ""
    more = [size, *(f"{name}={value}" for name, value in changes.items() if name != "BLOCKSIZE")]
    return f"{kernel}<{', '.join([dtype, what, str(changes.get('BLOCKSIZE', blocksize)), *filter(None, more)])}>"


def _integer(numel: int) -> str:
    return "i64" if numel >= 1 << 31 else "i32"


# What is launched for a transformer's weights, on every architecture; the rest, which differs little, on one.
EVERYWHERE = (
    dequantize("bfloat16"), dequantize("bfloat16", nested=False), dequantize("float16"), dequantize("float32"),
    quantize("bfloat16"), quantize("float32"), quantize_absmax(),
    optim_step("adamw", "bfloat16"), optim_step("adamw", "float32"), optim_step("lion", "bfloat16"),
    optim_step("adamw", "bfloat16", counted=True), optim_step("lion", "bfloat16", counted=True), optim_check("bfloat16"), optim_check("float32"),
)  # fmt: skip
ONCE = (
    dequantize("bfloat16", ASM=False), dequantize("bfloat16", TAIL=True), dequantize("float32", nested=False, TAIL=True),
    dequantize("bfloat16", ALIGNED=False), dequantize("bfloat16", numel=4096), dequantize("float16", BLOCKSIZE=4096),
    dequantize("bfloat16", numel=1 << 32), dequantize("float32", numel=1 << 32, TAIL=True), quantize("bfloat16", numel=1 << 32),
    quantize("bfloat16", "fp4"), quantize("float16"), quantize("bfloat16", TAIL=True), quantize("float32", "fp4", TAIL=True),
    quantize("bfloat16", blocksize=32), quantize("float16", blocksize=4096),
    optim_step("adamw", "bfloat16", stochastic=True), optim_step("adamw", "float16", whole=False),
    optim_step("lion", "float32", whole=False), optim_step("adamw", "float32", coded=False),
    optim_step("lion", "bfloat16", coded=False, whole=False), optim_step("adamw", "bfloat16", stochastic=True, counted=True),
    optim_step("adamw", "float32", whole=False, counted=True), optim_step("adamw", "float16", coded=False, counted=True),
    optim_check("float16"), optim_check("float16", whole=False), optim_check("float32", whole=False),
)  # fmt: skip
ONCE_ON = "80"
# The products: an architecture for each kind of tensor core that Triton knows (mma.sync, wgmma, tcgen05).
PRODUCTS = (
    linear_fwd(16), linear_fwd(512), linear_bwd(16, dropout=True), linear_bwd(512), lora("xa"), lora("dyb_dB"), lora("dA", dropout=True),
)  # fmt: skip
PRODUCTS_ON = ("80", "90", "100")
PRODUCTS_ONCE = (
    linear_fwd(64, "float16"), linear_fwd(512, plain=True, r=0), linear_fwd(512, span=1), linear_fwd(512, span=8), linear_bwd(512, "float16", r=256, dropout=True),
    lora("xa", r=64, dropout=True), lora("xa", r=256), lora("dyb_dB", r=64), lora("dyb_dB", r=256), lora("dA", r=256, dropout=True),
)  # fmt: skip


def variants(archs: Sequence[str]) -> Iterator[tuple[Variant, str]]:
    """Each (variant, arch) that is compiled: `archs`, as NF4LORA_CUDA_ARCHS has them ("80", "90a"), and ONCE_ON."""
    for arch in dict.fromkeys(a.rstrip("af") for a in (*archs, ONCE_ON)):
        once = ONCE + PRODUCTS_ONCE if arch == ONCE_ON else ()
        for variant in EVERYWHERE + (PRODUCTS if arch in PRODUCTS_ON else ()) + once:
            yield variant, arch


def expected_archs() -> list[str]:
    return os.environ.get("NF4LORA_CUDA_ARCHS", DEFAULT_ARCHS).replace(";", " ").replace(",", " ").split()


def build(variant: Variant, arch: str) -> Any:
    """Triton's compiled kernel, as its JIT would make it for pointers aligned to 16 bytes."""
    from importlib import import_module

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, function = variant.kernel.split(".")
    kernel = getattr(import_module(f"nf4lora.triton_kernels.{module}"), function)
    signature = variant.pointers | {variant.size: variant.size_type} | variant.numbers | dict.fromkeys(variant.constants, "constexpr")
    signature = {name: signature[name] for name in kernel.arg_names}
    attrs = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in (*variant.pointers, *variant.divisible)}
    source = ASTSource(fn=kernel, signature=signature, constexprs=variant.constants, attrs=attrs)
    options = {"num_warps": variant.warps, "num_stages": variant.stages, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", int(arch), 32), options=options)


def row(variant: Variant, arch: str, out: Path | None = None) -> tuple[KernelRow, list[str]]:
    """A variant's row, and its faults, one sentence each. Its PTX goes to `out`."""
    import triton

    compiled = build(variant, arch)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        (listing,), (resources,) = disassemble(cubin).values(), resource_usage(cubin).values()
    if out:
        (out / f"{variant.name} sm_{arch}.ptx").write_text(compiled.asm["ptx"])
    line = main_loop(listing, variant.loop) if variant.loop else straight_line(listing)
    opcodes = {name: sum(i.name == name for i in line) for name in sorted({i.name for i in line})}
    local = sum(int(i.name.split(".")[1]) // 8 for i in listing if i.name.split(".")[0] in ("LDL", "STL"))
    each = variant.weights // (32 * variant.warps)
    found = KernelRow(
        variant.name, f"sm_{arch}", f"triton {triton.__version__}", resources.registers, local, resources.stack_bytes,
        compiled.metadata.shared, len([i for i in listing if i.name != "NOP"]), len(line), each, round(len(line) / each, 3), opcodes,
    )  # fmt: skip
    return found, faults(variant, found)


def main_loop(listing: Sequence[Instruction], holds: Sequence[str]) -> list[Instruction]:
    """The last of the innermost loops that hold these: ahead of it stands the one over the steps of LoRA."""
    mma = next((i.name.split(".")[0] for i in listing if "MMA" in i.name), "MMA")
    names = [mma if name == "MMA" else name for name in holds]
    listing, found = [i for i in listing if i.name != "NOP"], []
    while loop := hot_loop(listing, names):
        found = [i for i in loop if i.name != "CALL" or i.target != loop[-1].address + 16]  # some loops' exit on sm_80 to 89
        listing = [i for i in listing if i.address > loop[-1].address]
    return found


def straight_line(listing: Sequence[Instruction]) -> list[Instruction]:
    """What a thread issues: all up to the last EXIT ahead of the subroutines, of a kernel without loops."""
    called = [int(at[0], 16) for i in listing if i.name == "CALL" and (at := re.search("0x[0-9a-f]+", i.operands))]
    body = [i for i in listing if i.name != "NOP" and i.address < min(called, default=1 << 62)]
    last = max((n for n, i in enumerate(body) if i.name == "EXIT"), default=len(body) - 1)
    return body[: last + 1]


def faults(variant: Variant, found: KernelRow) -> list[str]:
    """What is wrong with a kernel whatever it was before."""

    def has(name: str) -> bool:
        return any(o == name or o.startswith(name + ".") or (name == "MMA" and name in o) for o in found.opcodes)

    sentences = [f"no {name}" for name in variant.must if not has(name)]
    sentences += [f"has {name}" for name in variant.must_not if has(name)]
    if found.spill_bytes or found.stack_bytes:
        sentences.append(f"{found.spill_bytes} bytes through local memory, stack frame of {found.stack_bytes}")
    if found.shared_bytes > MOST_SHARED:
        sentences.append(f"{found.shared_bytes} bytes of shared memory")
    return [f"{found.kernel} {found.arch}: {sentence}" for sentence in sentences]


def rows(archs: Sequence[str], out: Path | None = None) -> tuple[list[KernelRow], list[str]]:
    """Every row and every fault; compiled on all processors."""
    jobs = list(variants(archs))
    with ProcessPoolExecutor(os.cpu_count(), get_context("fork")) as pool:
        results = list(pool.map(row, *zip(*jobs, strict=True), [out] * len(jobs)))
    return sorted((r for r, _ in results), key=lambda r: (r.kernel, int(r.arch[3:]))), [f for _, found in results for f in found]


def committed() -> list[KernelRow]:
    """The rows of bench/results/codegen_triton.json, of every Triton that was measured."""
    return [KernelRow(**row) for row in json.loads(RESULTS.read_text())["rows"]] if RESULTS.exists() else []


def write(path: Path, found: Sequence[KernelRow], faults: Sequence[str] = ()) -> None:
    lines = ",\n".join("  " + json.dumps(asdict(row)) for row in found)
    path.write_text(f'{{\n "faults": {json.dumps(list(faults))},\n "rows": [\n{lines}\n ]\n}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("TRITON_CACHE_DIR", cache)
        found, wrong = rows(expected_archs(), args.out)
    print(f"{'kernel':62} {'arch':7} registers  shared  instructions  weights  a weight")
    for r in found:
        print(f"{r.kernel:62} {r.arch:7} {r.registers:9} {r.shared_bytes:7} {r.loop_instructions:13} "
              f"{r.weights_per_iteration:8} {r.instructions_per_weight:9.2f}")  # fmt: skip
    print(*wrong, *regressions(found, committed()), sep="\n")
    if args.out:
        write(args.out / "rows.json", found, wrong)
    if args.update:
        kept = [r for r in committed() if r.compiler != found[0].compiler]
        write(RESULTS, sorted(kept + found, key=lambda r: (r.compiler, r.kernel, int(r.arch[3:]))), wrong)


if __name__ == "__main__":
    main()
