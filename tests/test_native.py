"""The C ABI: the ctypes structs are csrc/params.h field by field, the library exports what csrc/api.h declares, and every
instruction set of it that this processor has is right."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cpu_builds
import pytest
import torch

from nf4lora import abi, heuristics, native, native_cuda, native_optim, ops, reference_optim

REFUSED = "NF4LORA_CPU_ISA names an instruction set that this processor lacks, or that this library was built without"
CSRC = Path(__file__).parents[1] / "csrc"
ISAS = ("portable", "avx2", "avx512", "avx512vbmi", "avx512bf16", "amx")
KINDS = {
    "int64_t": ctypes.c_int64, "int32_t": ctypes.c_int32, "float": ctypes.c_float, "double": ctypes.c_double, "Weight": abi.Weight,
    "Dropout": abi.Dropout, "LinearConfig": abi.LinearConfig, "CudaConfig": abi.CudaConfig,
    "Member[kMaxGroup]": abi.Member * abi.MAX_GROUP,
}  # fmt: skip


def source(name):
    return re.sub(r"//[^\n]*", "", (CSRC / name).read_text())


def header_structs():
    """struct name -> [(type, field)], a pointer's type as "*"."""
    structs = {}
    for name, body in re.findall(r"struct (\w+) \{(.*?)\};", source("params.h"), re.S):
        fields = []
        for declaration in filter(None, map(str.strip, body.split(";"))):
            kind, field, many = re.fullmatch(r"(?:const )?(\w+ ?\*?)\s*(\w+)(\[kMaxGroup\])?", declaration).groups()
            fields.append(("*" if "*" in kind else kind.strip() + (many or ""), field))
        structs[name] = fields
    return structs


def ctypes_structs():
    return {c.__name__: c for c in vars(abi).values() if isinstance(c, type) and issubclass(c, ctypes.Structure) and c is not ctypes.Structure}


def test_the_header_was_parsed():
    structs = header_structs()
    assert structs["DequantizeParams"] == [("Weight", "w"), ("*", "out"), ("int32_t", "dtype"), ("int32_t", "workers")]
    assert sum(len(fields) for fields in structs.values()) == source("params.h").count(";") - source("params.h").count("};") - source("params.h").count("constexpr")
    assert f"constexpr int kMaxGroup = {abi.MAX_GROUP};" in source("params.h")
    assert abi.COUNTERS == 1 << 14 and "constexpr int64_t kCounters = 1 << 14;" in source("params.h")


@pytest.mark.parametrize("name", ctypes_structs())
def test_struct_equals_the_header(name):
    wanted = [(field, ctypes.c_void_p if kind == "*" else KINDS[kind]) for kind, field in header_structs()[name]]
    assert ctypes_structs()[name]._fields_ == wanted


def test_sizes_and_offsets_equal_the_compilers(tmp_path):
    """What g++ makes of params.h, byte by byte."""
    structs = {n: c for n, c in ctypes_structs().items()}
    lines = [f'printf("{n} %zu\\n", sizeof(nf4lora::{n}));' for n in structs]
    lines += [f'printf("{n}.{f} %zu\\n", offsetof(nf4lora::{n}, {f}));' for n, c in structs.items() for f, *_ in c._fields_]
    program = '#include <cstddef>\n#include <cstdio>\n#include "params.h"\nint main() {' + "".join(lines) + "}"
    binary = tmp_path / "offsets"
    cxx = os.environ.get("CXX", "c++").split()
    subprocess.run([*cxx, "-x", "c++", "-", f"-I{CSRC}", "-o", binary], input=program, text=True, check=True)
    found = dict(line.split() for line in subprocess.run([binary], capture_output=True, text=True, check=True).stdout.splitlines())
    wanted = {n: str(ctypes.sizeof(c)) for n, c in structs.items()}
    wanted |= {f"{n}.{f}": str(getattr(c, f).offset) for n, c in structs.items() for f, *_ in c._fields_}
    assert found == wanted


def test_enums_equal_the_tables():
    enums = {n: dict(re.findall(r"(\w+) = (\d+)", body)) for n, body in re.findall(r"enum (\w+) : int32_t \{(.*?)\}", source("params.h"), re.S)}
    codes = {f"k{str(d).removeprefix('torch.').capitalize().replace('f', 'F')}": str(c) for d, c in native_optim.DTYPE.items()}
    codes["kBFloat16"] = codes.pop("kBFloat16", codes.pop("kBfloat16", None))
    assert {k.lower(): v for k, v in enums["Dtype"].items()} == {k.lower(): v for k, v in codes.items()}
    assert enums["QuantType"] == {f"k{q.upper()}": str(i) for i, q in enumerate(native.QUANT_TYPES)}
    assert enums["CudaPath"] == {f"k{p.name.capitalize()}": str(p.value) for p in heuristics.CudaPath}
    assert enums["OptimKind"] == {n: str(i) for i, n in enumerate(("kAdamW", "kLion"))} and native_optim.KINDS == reference_optim.KINDS
    assert enums["LinearPath"] == {f"k{p.name.capitalize()}": str(p.value) for p in heuristics.LinearPath}


def libraries():
    """The host library always; the CUDA library wherever there is a compiler for it."""
    return [native.host, native_cuda.cuda] if shutil.which("nvcc") else [native.host]


@pytest.mark.parametrize("library", libraries(), ids=lambda library: library.prefix)
def test_the_functions_of_the_api_are_exported_and_nothing_else(library):
    loaded, why_not = library.load()
    assert why_not is None, why_not
    declared = re.findall(r"NF4LORA_API (?:const char \*|u?int64_t |uint32_t \*)(\w+)\((?:const nf4lora::(\w+) \*)?((?:int32_t device)?(?:, )?void \*stream)?\)", source("api.h"))
    assert len(declared) == source("api.h").count("NF4LORA_API ") - 1  # one is the macro's own definition
    mine = {name: (params, bool(stream)) for name, params, stream in declared if name.startswith(f"nf4lora_{library.prefix}_")}
    for name, params in library.functions.items():
        assert mine[f"nf4lora_{library.prefix}_{name}"] == (params.__name__, library.stream)
        argtypes = getattr(loaded, f"nf4lora_{library.prefix}_{name}").argtypes
        assert argtypes[0]._type_ is params and len(argtypes) == 1 + library.stream
    symbols = subprocess.run(["nm", "-D", "--defined-only", library.path()], capture_output=True, text=True, check=True).stdout
    named = {line.split()[-1] for line in symbols.splitlines() if line.split()[-2] in "TDB"}
    assert {n for n in named if not n.startswith("_")} == set(mine)


def processor_has(isa):
    flags = set(Path("/proc/cpuinfo").read_text().split()) if Path("/proc/cpuinfo").exists() else set()
    wanted = {"portable": set(), "avx2": {"avx2", "fma", "f16c"}, "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx2"}}
    wanted["avx512vbmi"] = wanted["avx512"] | {"avx512vbmi"}
    wanted["avx512bf16"] = wanted["avx512vbmi"] | {"avx512_bf16"}
    wanted["amx"] = wanted["avx512bf16"] | {"amx_tile", "amx_bf16"}
    return wanted[isa] <= flags


@pytest.mark.parametrize("isa", ISAS)
def test_selftest_under_each_instruction_set(isa):
    env = os.environ | {"NF4LORA_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-m", "nf4lora.selftest", "cpu"], env=env, capture_output=True, text=True)
    if processor_has(isa):
        assert done.returncode == 0 and f"host kernels: {isa}" in done.stdout, done.stdout + done.stderr
        assert " 0 failed" in f" {done.stdout.splitlines()[-1]}"
    else:
        assert done.returncode == 1 and REFUSED in done.stdout and "portable" in done.stdout, done.stdout + done.stderr
        pytest.skip(f"not run here: this processor has no {isa}, and that was said")


@pytest.mark.parametrize("isa", ["avx1024", "AVX2", "portable,avx2", "avx2 "])
def test_an_unknown_instruction_set_is_refused(isa):
    code = "import torch, nf4lora; from nf4lora import native; print(native.host.isa()); nf4lora.quantize_4bit(torch.zeros(64))"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"NF4LORA_CPU_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "None\n"
    assert REFUSED in done.stderr and all(f" {built}" in done.stderr for built in ISAS)


def test_instruction_sets_share_no_code(tmp_path):
    """A function of a header that the linker may take from any object, it may take from one for a better processor."""
    tables = cpu_builds.tables()
    shared = []
    for name, file in cpu_builds.objects(tmp_path, tables["ISAS"], []).items():
        named = subprocess.run(["nm", "-C", "--defined-only", file], capture_output=True, text=True, check=True).stdout
        isa = name.split(".")[-1]
        for kind, symbol in (line.split(maxsplit=2)[1:] for line in named.splitlines() if isa not in tables["ONCE"]):
            if kind in "TWVuC" and f"nf4lora::{isa}::" not in symbol and not symbol.startswith("DW.ref."):
                shared.append(f"{name}: {symbol}")
    assert not shared


FORMAT_BYTES = """
import hashlib, sys, torch
from nf4lora import backends, dequantize_4bit, native, ops, quantize_4bit
from nf4lora.codebook import boundaries

def add(*tensors):
    for t in tensors:
        t = torch.where(t.isnan(), torch.full_like(t, torch.nan), t) if t.is_floating_point() else t
        h.update(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes())

def inputs():
    g = torch.Generator().manual_seed(0)
    words = torch.arange(-(2**15), 2**15).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        for each in (words.view(dtype), words[torch.randperm(2**16, generator=g)].view(dtype)):
            yield each[:65_503], (32, 64, 4096)  # NaN and infinities, too
            yield each[each.isfinite()], (32, 128, 4096)
    a = torch.randn(40_003, generator=g)
    for scale in (1.0, 1e-37, 1e-41, 1e38):
        yield a * scale, (32, 64, 128, 4096)
    yield torch.zeros(99) * torch.tensor(-1.0), (32,)
    for quant_type in ("nf4", "fp4"):  # ties at every place of a block
        b = boundaries(quant_type)
        yield torch.cat([torch.ones(1), b, torch.nextafter(b, torch.tensor(2.0))]).repeat(64), (32, 64)

torch.set_num_threads(1)
h, g = hashlib.sha256(), torch.Generator().manual_seed(1)
with backends.use_backend(sys.argv[1]):
    for a, blocksizes in inputs():
        for blocksize in blocksizes:
            for quant_type in ("nf4", "fp4"):
                packed, absmax = ops.quantize(a, blocksize, quant_type)
                add(packed, absmax)
                if a.isfinite().all():
                    packed, state = quantize_4bit(a, blocksize, True, quant_type)
                    add(state.absmax, state.nested_absmax)
                    for dtype in (torch.float32, torch.bfloat16, torch.float16):
                        add(dequantize_4bit(packed, state, dtype))
    # Every bfloat16 as an absmax, and as the scale of one
    absmax = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).float()
    absmax[-1] = torch.tensor(2**31 - 1, dtype=torch.int32).view(torch.float32)  # NaN that rounding up would make -0
    packed = torch.randint(0, 256, (2**20, 1), dtype=torch.uint8, generator=g)
    codes = torch.randint(0, 256, (2**16,), dtype=torch.uint8, generator=g)
    for quant_type in ("nf4", "fp4"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            add(ops.dequantize(packed, absmax, None, None, [2**21], 32, quant_type, dtype))
            add(ops.dequantize(packed, codes, absmax[77::256].contiguous(), torch.tensor(0.3), [2**21], 32, quant_type, dtype))
    for scale in (1.0, 1e-38, 3e38):
        add(*ops.quantize_absmax(torch.randn(70_001, generator=g) * scale, torch.tensor(0.01 * scale)))
print(native.host.isa(), h.hexdigest())
"""


def test_instruction_sets_give_the_references_bytes():
    """quantize and dequantize give the same bytes whatever the instruction set: of every 16-bit number, denormals and zeros."""
    sums = {}
    for isa in ("reference", *filter(processor_has, ISAS)):
        env = os.environ | {"NF4LORA_CPU_ISA": isa.replace("reference", "")}
        backend = "reference" if isa == "reference" else "cpu"
        done = subprocess.run([sys.executable, "-c", FORMAT_BYTES, backend], env=env, capture_output=True, text=True, check=True)
        name, sums[isa] = done.stdout.split()
        assert isa in (name, "reference")
    assert len(sums) > 1 and len(set(sums.values())) == 1, sums


def test_a_message_of_the_library_becomes_an_error(cpu, monkeypatch):
    class Failing:
        @staticmethod
        def nf4lora_cpu_quantize(params):
            return b"out of memory"

    monkeypatch.setattr(native.host, "load", lambda: (Failing, None))
    with pytest.raises(RuntimeError, match="cpu quantize: out of memory"):
        ops.quantize(torch.zeros(64), 64, "nf4")
