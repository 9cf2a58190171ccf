"""What ptxas made of every kernel for every architecture: registers, spills, opcodes, instructions per weight. No GPU needed.

`python -m bench.codegen` prints the table of the installed library, `--update` also writes bench/results/codegen.json;
tests/test_codegen.py holds a build against the limits below and against that file.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import nf4lora

LIBRARY = Path(nf4lora.__file__).with_name("libnf4lora_cuda.so")
RESULTS = Path(__file__).parent / "results" / "codegen.json"
LAUNCHES = RESULTS.with_name("launches.json")  # threads and dynamic shared memory: tests/cuda_on_host/launches.py
DEFAULT_ARCHS = "75 80 86 89 90a 100 120"
# What a hot loop has no business with: local and generic memory, doubles, calls, and atomics, whose order is nobody's.
SLOW = tuple("LDL STL LD ST DADD DMUL DFMA DSETP CALL ATOM ATOMG ATOMS RED REDG".split())
_ATOMIC = ("ATOM", "ATOMG", "ATOMS", "RED", "REDG")
# Nowhere: in which order they add is nobody's.
FLOAT_ATOMICS = tuple(f"{name}.FLOAT" for name in _ATOMIC)
_MEMORY = ("LDG", "STG", "LDS", "STS", "LDL", "STL", "LD", "ST")
_OF_INTEREST = re.compile(r"LD|ST|ATOM|RED|UTMA|UBLKCP|\w*MMA|SHFL|MUFU|BAR|SYNCS|CALL|D(ADD|MUL|FMA|SETP)\b|F2FP")


@dataclass(frozen=True)
class Instruction:
    """One line of SASS. `opcode` with all modifiers: LDG.E.128.CONSTANT."""

    address: int
    opcode: str
    operands: str
    predicated: bool = False

    @property
    def name(self) -> str:
        """The opcode without modifiers, but with the width of a memory access in bits: LDG.128, LDS.32, FMUL, ATOMG.FLOAT."""
        base, *modifiers = self.opcode.split(".")
        if base in _MEMORY:
            widths = [m.strip("US") for m in modifiers if m.strip("US") in ("8", "16", "64", "128")]
            return f"{base}.{widths[0] if widths else 32}"
        if base in _ATOMIC and any(re.fullmatch(r"B?F\d\d\w*", m) for m in modifiers):
            return f"{base}.FLOAT"
        return self.opcode if "MMA" in base or base == "MUFU" else base

    @property
    def target(self) -> int | None:
        """The address a branch or call goes to."""
        found = re.search(r"0x([0-9a-f]+)\s*$", self.operands) if self.opcode.split(".")[0] in ("BRA", "CALL") else None
        return int(found[1], 16) if found else None


@dataclass(frozen=True)
class Resources:
    """What a kernel asks of the machine, as the cubin has it; `shared_bytes` is the static part."""

    registers: int
    stack_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class Rule:
    """For the kernels whose name matches the pattern `kernel`: what their hot loop must hold and must not.

    The hot loop is the innermost one that holds all of `must`; each `wide` in it moves `weights` weights of a thread. Where
    `path` is set, only the shortest way round it that meets the most `wide` counts: what is left out is a branch not taken
    where shapes are aligned and blocks are of 64 or more.
    Instructions are given by `Instruction.name`, without a width any: LDG is every LDG. Without `wide`, the rule is
    about the whole kernel.
    """

    kernel: str
    wide: str | None = None
    weights: int = 0
    must: tuple[str, ...] = ()
    must_not: tuple[str, ...] = SLOW
    path: bool = False
    archs: str = r"sm_\d+a?"  # where its verbs are; elsewhere the kernel is a trap that nobody launches


@dataclass(frozen=True)
class KernelRow:
    """One kernel on one architecture. An instruction counts once for the thread that issues it; NOPs do not."""

    kernel: str
    arch: str
    compiler: str
    registers: int
    spill_bytes: int  # that the kernel's text stores to or loads from local memory
    stack_bytes: int
    shared_bytes: int  # static, with the KiB that the system takes of a block from sm_80 on
    instructions: int
    loop_instructions: int  # 0, as the next two, where no rule names a hot loop
    weights_per_iteration: int
    instructions_per_weight: float
    opcodes: dict[str, int]  # those of interest, in the hot loop or else in the kernel
    dynamic_shared_bytes: int = 0  # as threads and resident_blocks, of a kernel that launches.json does not have
    threads: int = 0
    resident_blocks: int = 0  # that a multiprocessor holds at once


# Warps, blocks and bytes of shared memory of a multiprocessor. Source: CUDA C++ Programming Guide, table of compute capabilities.
_MULTIPROCESSOR = {
    "sm_75": (32, 16, 64 << 10), "sm_80": (64, 32, 164 << 10), "sm_86": (48, 16, 100 << 10), "sm_89": (48, 24, 100 << 10),
    "sm_90a": (64, 32, 228 << 10), "sm_100": (64, 32, 228 << 10), "sm_120": (48, 24, 100 << 10),
}  # fmt: skip


def resident_blocks(arch: str, registers: int, threads: int, shared_bytes: int) -> int:
    """Blocks that a multiprocessor holds at once: what its 64 Ki registers, warps and shared memory are enough for.

    shared_bytes: dynamic; nothing in csrc is static, and what the system takes of each block comes on top.
    """
    warps, blocks, shared = _MULTIPROCESSOR[arch]
    of_block = -(-threads // 32)
    reserved = 0 if arch == "sm_75" else 1024
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * of_block)
    return min(blocks, warps // of_block, by_registers, shared // max(-(-shared_bytes // 256) * 256 + reserved, 1))


def _rules() -> Iterator[Rule]:
    for dtype, weights in (("float", 4), ("__nv_bfloat16", 8), ("__half", 8)):
        yield Rule(rf"decode_tiles<{dtype},", "STG.128", weights, ("LDG.16" if weights == 4 else "LDG.32", "LDS.32"))
        yield Rule(rf"decode_members<{dtype},", "STG.128", weights, ("LDG.16" if weights == 4 else "LDG.32", "LDS.32"))
        yield Rule(rf"encode_\w+<{dtype},", "LDG.128", weights, ("LDS.64", "STG.16" if weights == 4 else "STG.32"))


    # Of the products a byte_perm finds the two weights of a byte in a table; a trap stands where a card lacks the verbs.
    mma, wgmma = r"sm_(?!75)\w+", "sm_90a"
    for kernel, must, archs in (
        (r"small_kernel<\w+, \d+, 1>", ("HMMA", "LDG.64"), mma), (r"linear_tiles<", ("HMMA", "LDS.64"), mma),
        (r"dx_kernel<\w+, Plan", ("HMMA", "LDS.64"), mma),
        (r"linear_fwd_kernel<", ("HGMMA", "LDS.64"), wgmma), (r"bwd_kernel<", ("HGMMA", "LDS.64"), wgmma),
    ):  # fmt: skip
        yield Rule(kernel, "PRMT", 2, must, (*(o for o in SLOW if o != "LD"), *FLOAT_ATOMICS), True, archs)
    # Double arithmetic is where steps are counted on the device, once a tensor.
    doubles = [o for o in SLOW if re.match(r"D[AMFS]", o)]
    yield Rule(r"step_units<", must_not=(*(o for o in _of_whole_kernels() if o not in doubles),))


def _of_whole_kernels() -> Iterator[str]:
    """What no kernel holds anywhere: division has a rare branch that is a call, blocks that share a sum count themselves, and
    an odd tail goes through a pointer that may be of either memory."""
    yield from (o for o in SLOW if o not in ("CALL", "LD", "ST", *_ATOMIC))
    yield from FLOAT_ATOMICS


RULES = tuple(_rules())
# Instructions a weight may take, by kernel and architecture.
LIMITS = {
    ("decode_members<__nv_bfloat16, true>", "sm_90a"): 8.0,
    ("small_kernel<__nv_bfloat16, 8, 1>", "sm_90a"): 2.5,
    ("linear_fwd_kernel<__nv_bfloat16, 128>", "sm_90a"): 4.0,
    ("linear_fwd_kernel<__nv_bfloat16, 256>", "sm_90a"): 4.0,
    ("bwd_kernel<__nv_bfloat16, 1>", "sm_90a"): 4.0,
    ("bwd_kernel<__nv_bfloat16, 2>", "sm_90a"): 4.0,
    ("decode_tiles<__nv_bfloat16, true>", "sm_90a"): 8.0,
    ("encode_blocks<__nv_bfloat16, (QuantType)0, 8>", "sm_90a"): 16.0,
}


def expected_archs() -> list[str]:
    """The architectures the library was to be built for: sm_ names of NF4LORA_CUDA_ARCHS."""
    return [f"sm_{a}" for a in re.split(r"[\s;,]+", os.environ.get("NF4LORA_CUDA_ARCHS", DEFAULT_ARCHS)) if a]


@cache
def tool(name: str) -> Path:
    """A tool of the CUDA toolkit: on PATH, in CUDA_HOME, or in Triton's wheel."""
    triton = importlib.util.find_spec("triton")
    folders = [Path(os.environ[v], "bin") for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    folders += [Path(p, "backends", "nvidia", "bin") for p in (triton.submodule_search_locations if triton else ())]
    for found in (shutil.which(name), *(shutil.which(name, path=str(f)) for f in folders)):
        if found:
            return Path(found)
    raise FileNotFoundError(f"{name} is neither on PATH, nor in CUDA_HOME, nor in an installed triton (pip install triton has it)")


def compiler_of(library: Path) -> str:
    """nvcc of the library's cubins, which carry its version."""
    found = re.search(rb"V(\d+\.\d+\.\d+)\0", library.read_bytes())
    return f"nvcc {found[1].decode()}" if found else "nvcc of an unknown version"


def _output(*command: str | Path, given: str | None = None) -> str:
    return subprocess.run(list(map(str, command)), input=given, capture_output=True, text=True, check=True).stdout


def _dump(what: str, path: Path) -> Iterator[tuple[str, str, str]]:
    """(arch, kernel, text) for each kernel in what cuobjdump says of a cubin or of a library of many."""
    text = _output(tool("cuobjdump"), what, path)
    if not re.search(r"(?m)^\s*(arch = |code for )", text):  # a bare cubin, of whose arch only -sass speaks
        text = "arch = " + re.search(r"code for (\w+)", _output(tool("cuobjdump"), "-sass", path))[1] + "\n" + text
    arch = ""
    for part in re.split(r"(?m)^(?=\s*(?:arch = |code for |Function\b))", text):
        if found := re.match(r"\s*(?:arch =|code for) (\w+)", part):
            arch = found[1]
        elif found := re.match(r"\s*Function\s*:?\s*(\S+?):?\n", part):
            yield arch, found[1], part[found.end() :]


def disassemble(cubin_path: Path) -> dict[tuple[str, str], list[Instruction]]:
    """(arch, mangled kernel) -> its SASS, of a cubin or of every cubin in a library."""
    line = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
    return {
        (arch, kernel): [Instruction(int(a, 16), opcode, operands.strip(), bool(p)) for a, p, opcode, operands in line.findall(text)]
        for arch, kernel, text in _dump("-sass", cubin_path)
    }


def resource_usage(cubin_path: Path) -> dict[tuple[str, str], Resources]:
    """(arch, mangled kernel) -> registers, stack and shared memory, of a cubin or of every cubin in a library."""
    number = {}
    for arch, kernel, text in _dump("-res-usage", cubin_path):
        found = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", text)}
        number[arch, kernel] = Resources(found["REG"], found["STACK"] + found["LOCAL"], found["SHARED"])
    return number


def demangle(kernels: Sequence[str]) -> list[str]:
    """encode_blocks<__half, (QuantType)0, 8> for its mangled name; arguments and namespaces dropped."""
    return [plain(name) for name in _output("c++filt", given="\n".join(kernels)).splitlines()]


def plain(name: str) -> str:
    """The same of a demangled name."""
    return re.sub(r"^void |nf4lora::|\(anonymous namespace\)::|\([^()<>]*\)$", "", re.sub(r">\(.*", ">", name))


def hot_loop(instructions: Sequence[Instruction], must: Sequence[str]) -> list[Instruction]:
    """The innermost loop that holds all of `must`, from its head to its back edge; empty where there is none."""
    loops = [(i.target, i.address) for i in instructions if i.target is not None and i.target < i.address and i.name != "CALL"]
    bodies = [[i for i in instructions if head <= i.address <= edge] for head, edge in loops]
    return min((b for b in bodies if all(any(_is(i.name, name) for i in b) for name in must)), key=len, default=[])


def hot_path(loop: Sequence[Instruction], wide: str) -> list[Instruction]:
    """The way from the loop's head to its back edge that meets the most `wide`, and of those the shortest.

    Branches back inside the loop are taken as not taken.
    """
    at = {i.address: n for n, i in enumerate(loop)}
    # Of the ways from instruction n to the back edge: (how many `wide`, minus how many instructions), and the next one.
    best: list[tuple[tuple[int, int], int]] = [((-1, 0), 0)] * len(loop)
    for n in range(len(loop) - 1, -1, -1):
        i = loop[n]
        branch = i.opcode.split(".")[0] == "BRA" and n + 1 < len(loop)
        conditional = i.predicated or bool(re.match(r"!?U?P", i.operands))
        following = [] if n + 1 == len(loop) or (branch and not conditional) else [n + 1]
        if branch and (to := at.get(i.target, -1)) > n:
            following.append(to)
        met = (int(_is(i.name, wide)), -1)
        ways = [((best[m][0][0] + met[0], best[m][0][1] + met[1]), m) for m in following if best[m][0][0] >= 0]
        best[n] = max(ways, default=((-1, 0), 0)) if n + 1 < len(loop) else (met, n)
    path, n = [], 0
    while best and best[0][0][0] >= 0:
        path.append(loop[n])
        if n + 1 == len(loop):
            break
        n = best[n][1]
    return path


def rows_of(cubin_path: Path, compiler: str, rules: Sequence[Rule] = RULES) -> list[KernelRow]:
    """A row for each kernel and architecture of a cubin or library, sorted."""
    resources = resource_usage(cubin_path)
    listings = disassemble(cubin_path)
    launched = {k["kernel"]: k for k in json.loads(LAUNCHES.read_text())["kernels"]}
    named = dict(zip([k for _, k in listings], demangle([k for _, k in listings]), strict=True))
    rows = []
    for (arch, kernel), listing in listings.items():
        listing = [i for i in listing if i.name != "NOP"]
        rule = _rule_of(named[kernel], arch, rules)
        loop = hot_loop(listing, (rule.wide, *rule.must)) if rule.wide else []
        loop = hot_path(loop, rule.wide) if rule.path else loop
        weights = rule.weights * sum(_is(i.name, rule.wide) for i in loop)
        local = [int(i.name.split(".")[1]) // 8 for i in listing if i.name.split(".")[0] in ("LDL", "STL")]
        # On sm_80 to sm_89, ptxas writes some loops' exits as calls of what follows the loop.
        text = [i for i in loop if i.name != "CALL" or i.target != loop[-1].address + 16] or listing
        opcodes = Counter(i.name for i in text if _OF_INTEREST.match(i.name))
        opcodes |= Counter(i.name for i in listing if i.name in FLOAT_ATOMICS)
        has, launch = resources[arch, kernel], launched.get(named[kernel], {"threads": 0, "shared_bytes": 0})
        threads, dynamic = launch["threads"], launch["shared_bytes"]
        resident = resident_blocks(arch, has.registers, threads, dynamic) if threads else 0
        rows.append(KernelRow(
            named[kernel], arch, compiler, has.registers, sum(local), has.stack_bytes, has.shared_bytes, len(listing),
            len(loop), weights, round(len(loop) / weights, 3) if weights else 0.0, dict(sorted(opcodes.items())),
            dynamic, threads, resident,
        ))  # fmt: skip
    return sorted(rows, key=lambda row: (row.kernel, row.arch))


def faults(row: KernelRow, rules: Sequence[Rule] = RULES) -> list[str]:
    """What is wrong with a kernel whatever it was before, one sentence each."""
    rule, found = _rule_of(row.kernel, row.arch, rules), []
    if row.spill_bytes or row.stack_bytes:
        found.append(f"{row.spill_bytes} bytes through local memory, stack frame of {row.stack_bytes}")
    if rule.wide and not row.loop_instructions:
        found.append(f"no loop holds {', '.join((rule.wide, *rule.must))}")
    found += [f"no {name}" for name in rule.must if not any(_is(o, name) for o in row.opcodes)]
    found += [f"{count} {o}" for o, count in row.opcodes.items() if any(_is(o, name) for name in rule.must_not)]
    if row.instructions_per_weight > (limit := LIMITS.get((row.kernel, row.arch), float("inf"))):
        found.append(f"{row.instructions_per_weight} instructions a weight, at most {limit}")
    return [f"{row.kernel} {row.arch}: {sentence}" for sentence in found]


def regressions(rows: Sequence[KernelRow], committed: Sequence[KernelRow]) -> list[str]:
    """Where rows take more registers or instructions a weight than those committed; the same compiler only."""
    before = {(row.kernel, row.arch, row.compiler): row for row in committed}
    found = []
    for row in rows:
        was = before.get((row.kernel, row.arch, row.compiler))
        for figure in ("registers", "instructions_per_weight") if was else ():
            if getattr(row, figure) > getattr(was, figure):
                found.append(f"{row.kernel} {row.arch}: {figure} {getattr(row, figure)}, committed {getattr(was, figure)}")
    return found


def committed() -> list[KernelRow]:
    """The rows of bench/results/codegen.json."""
    return [KernelRow(**row) for row in json.loads(RESULTS.read_text())["rows"]]


def _is(opcode: str, name: str) -> bool:
    return opcode == name or opcode.startswith(name + ".")


def _rule_of(kernel: str, arch: str, rules: Sequence[Rule]) -> Rule:
    others = Rule(kernel, must_not=tuple(_of_whole_kernels()))
    return next((rule for rule in rules if re.match(rule.kernel, kernel) and re.fullmatch(rule.archs, arch)), others)


def main() -> None:
    if not LIBRARY.exists():
        raise SystemExit(f"{LIBRARY.name} was not built into {LIBRARY.parent}: install nf4lora where nvcc is found")
    rows = rows_of(LIBRARY, compiler_of(LIBRARY))
    print(f"{'kernel':48} {'arch':7} registers  stack  spill  shared  threads  resident  instructions  loop  weights  a weight")
    for row in rows:
        print(f"{row.kernel:48} {row.arch:7} {row.registers:9} {row.stack_bytes:6} {row.spill_bytes:6} "
              f"{row.shared_bytes + row.dynamic_shared_bytes:7} {row.threads:8} {row.resident_blocks:9} {row.instructions:13} "
              f"{row.loop_instructions:5} {row.weights_per_iteration:8} {row.instructions_per_weight:9.2f}")  # fmt: skip
    print(*(fault for row in rows for fault in faults(row)), sep="\n")
    if "--update" in sys.argv[1:]:
        lines = ",\n".join("  " + json.dumps(asdict(row)) for row in rows)
        RESULTS.write_text(f'{{\n "compiler": "{compiler_of(LIBRARY)}",\n "rows": [\n{lines}\n ]\n}}\n')


if __name__ == "__main__":
    main()
