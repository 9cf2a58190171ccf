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
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from nf4lora import heuristics
from nf4lora.codebook import NESTED_BLOCKSIZE

from .codegen import DEFAULT_ARCHS, SLOW, Instruction, KernelRow, disassemble, regressions, resource_usage

RESULTS = Path(__file__).parent / "results" / "codegen_triton.json"
TYPES = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}


@dataclass(frozen=True)
class Variant:
    """One compilation of a kernel: what its launch would give the JIT. `weights`: of one program.

    must, must_not: `Instruction.name`s; "CALL" is the rare branch of a correctly rounded division.
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


def dequantize(dtype: str, nested: bool = True, numel: int = 1 << 24, **changes: Any) -> Variant:
    """dequantize to `dtype`; `changes` to the constants a launch would give."""
    config = heuristics.triton_dequantize(numel)
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
    config = heuristics.triton_quantize(blocksize)
    constants = {"BLOCKSIZE": blocksize, "NF4": quant_type == "nf4", "TAIL": False, "ASM": True, "WEIGHTS": config.weights} | changes
    pointers = {"a_ptr": TYPES[dtype], "packed_ptr": "*u8", "absmax_ptr": "*fp32", "cells_ptr": "*i64"}
    return Variant(
        _name("quantize", dtype, quant_type, str(blocksize), numel, changes),
        "quantize.quantize_kernel", pointers, "numel", _integer(numel), constants, config.warps, config.weights,
        () if constants["TAIL"] else ("LDG.128", "STG.32"), tuple(s for s in SLOW if s not in ("CALL", "REDUX")),
    )  # fmt: skip


def quantize_absmax() -> Variant:
    config = heuristics.triton_quantize_absmax()
    pointers = dict.fromkeys(("absmax_ptr", "offset_ptr", "nested_absmax_ptr", "boundaries_ptr"), "*fp32") | {"codes_ptr": "*u8"}
    return Variant(
        "quantize_absmax", "quantize.quantize_absmax_kernel", pointers, "groups", "i32", {"BLOCK": NESTED_BLOCKSIZE}, config.warps,
        NESTED_BLOCKSIZE, (), tuple(s for s in SLOW if s not in ("CALL", "REDUX")),
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
)  # fmt: skip
ONCE = (
    dequantize("bfloat16", ASM=False), dequantize("bfloat16", TAIL=True), dequantize("float32", nested=False, TAIL=True),
    dequantize("bfloat16", ALIGNED=False), dequantize("bfloat16", numel=4096), dequantize("float16", BLOCKSIZE=4096),
    dequantize("bfloat16", numel=1 << 32), dequantize("float32", numel=1 << 32, TAIL=True), quantize("bfloat16", numel=1 << 32),
    quantize("bfloat16", "fp4"), quantize("float16"), quantize("bfloat16", TAIL=True), quantize("float32", "fp4", TAIL=True),
    quantize("bfloat16", blocksize=32), quantize("float16", blocksize=4096),
)  # fmt: skip
ONCE_ON = "80"


def variants(archs: Sequence[str]) -> Iterator[tuple[Variant, str]]:
    """Each (variant, arch) that is compiled: `archs`, as NF4LORA_CUDA_ARCHS has them ("80", "90a"), and ONCE_ON."""
    for arch in dict.fromkeys(a.rstrip("af") for a in (*archs, ONCE_ON)):
        for variant in EVERYWHERE + (ONCE if arch == ONCE_ON else ()):
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
    signature = variant.pointers | {variant.size: variant.size_type} | dict.fromkeys(variant.constants, "constexpr")
    attrs = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in variant.pointers}
    source = ASTSource(fn=kernel, signature=signature, constexprs=variant.constants, attrs=attrs)
    options = {"num_warps": variant.warps, "enable_fp_fusion": False}
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
    line = straight_line(listing)
    opcodes = {name: sum(i.name == name for i in line) for name in sorted({i.name for i in line})}
    local = sum(int(i.name.split(".")[1]) // 8 for i in listing if i.name.split(".")[0] in ("LDL", "STL"))
    each = variant.weights // (32 * variant.warps)
    found = KernelRow(
        variant.name, f"sm_{arch}", f"triton {triton.__version__}", resources.registers, local, resources.stack_bytes,
        compiled.metadata.shared, len([i for i in listing if i.name != "NOP"]), len(line), each, round(len(line) / each, 3), opcodes,
    )  # fmt: skip
    return found, faults(variant, found)


def straight_line(listing: Sequence[Instruction]) -> list[Instruction]:
    """What a thread issues: all up to the last EXIT ahead of the subroutines. The kernels have no loops."""
    called = [int(at[0], 16) for i in listing if i.name == "CALL" and (at := re.search("0x[0-9a-f]+", i.operands))]
    body = [i for i in listing if i.name != "NOP" and i.address < min(called, default=1 << 62)]
    last = max((n for n, i in enumerate(body) if i.name == "EXIT"), default=len(body) - 1)
    return body[: last + 1]


def faults(variant: Variant, found: KernelRow) -> list[str]:
    """What is wrong with a kernel whatever it was before."""

    def has(name: str) -> bool:
        return any(o == name or o.startswith(name + ".") for o in found.opcodes)

    sentences = [f"no {name}" for name in variant.must if not has(name)]
    sentences += [f"has {name}" for name in variant.must_not if has(name)]
    if found.spill_bytes or found.stack_bytes:
        sentences.append(f"{found.spill_bytes} bytes through local memory, stack frame of {found.stack_bytes}")
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
    print(f"{'kernel':58} {'arch':7} registers  shared  instructions  weights  a weight")
    for r in found:
        print(f"{r.kernel:58} {r.arch:7} {r.registers:9} {r.shared_bytes:7} {r.loop_instructions:13} "
              f"{r.weights_per_iteration:8} {r.instructions_per_weight:9.2f}")  # fmt: skip
    print(*wrong, *regressions(found, committed()), sep="\n")
    if args.out:
        write(args.out / "rows.json", found, wrong)
    if args.update:
        kept = [r for r in committed() if r.compiler != found[0].compiler]
        write(RESULTS, sorted(kept + found, key=lambda r: (r.compiler, r.kernel, int(r.arch[3:]))), wrong)


if __name__ == "__main__":
    main()
