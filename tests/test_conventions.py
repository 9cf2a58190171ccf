"""What the code promises about its own shape: who imports whom, one place for each fact, small files, a row for each op."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nf4lora import backends, grad_rows, ops, reference, reference_optim

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nf4lora"
CODE = ("*.py", "*.cpp", "*.h", "*.cu", "*.cuh", "*.csv", "*.toml", "*.sh")

# Imports run down only: a module may import those of lower floors, and neighbours named beside it.
FLOORS = (
    {"codebook", "heuristics", "quant_keys", "abi", "dropout", "matrices"},
    {"quant_state", "reference", "reference_optim", "backends", "triton_tiles", "tuned"},
    {"native_optim"},
    {"native_linear"},
    {"native", "operands", "triton_kernels", "grad_rows", "eager"},
    {"cuda_paths", "checks", "checks_optim"},
    {"cuda_launch"},
    {"cuda_linear", "cuda_backward"},
    {"cuda_grads"},
    {"native_cuda", "triton_rows"},
    {"triton_linear", "triton_optim"},
    {"ops"},
    {"autograd", "staging", "managed"},
    {"functional"},
    {"nn", "cases", "optim", "quant_error"},
    {"testing", "starts"},
    {"selftest", "hf"},
    {"cli", "bench"},
)
NEIGHBOURS = {("quant_keys", "codebook"), ("native", "abi"), ("hf", "hf"), ("nn", "nn"), ("cli", "cli"), ("cli", "bench"), ("optim", "optim")}
# For annotations only, under TYPE_CHECKING
TYPES = {("quant_keys", "quant_state")}


def files(*folders, suffixes=CODE):
    return [p for folder in folders for s in suffixes for p in sorted((ROOT / folder).rglob(s)) if "build" not in p.parts]


def floor(module):
    return next(i for i, names in enumerate(FLOORS) if module in names)


def imports(path):
    """Top-level names inside the package that a file of it imports: "codebook", "nn", …"""
    package = ("nf4lora", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [a.name.split(".") for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            names = [base] if len(base) > 1 else [[*base, a.name] for a in node.names]
        else:
            continue
        yield from (n[1] for n in names if n[0] == "nf4lora" and len(n) > 1 and n[1] != "__version__")


def test_imports_run_down_only():
    for path in files("nf4lora", suffixes=("*.py",)):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts in (("__init__",), ("cli", "__main__")):
            continue
        for imported in imports(path):
            pair = parts[0], imported
            allowed = floor(imported) < floor(parts[0]) or pair in NEIGHBOURS or pair in TYPES
            assert allowed, f"{path.relative_to(ROOT)} imports {imported}, which is not below it"


def test_heuristics_and_codebook_import_nothing_of_ours():
    for leaf in ("heuristics", "codebook", "abi"):
        assert not list(imports(PACKAGE / f"{leaf}.py"))


def test_import_loads_torch_numpy_safetensors_and_the_standard_library_only():
    code = """
import sys
before = set(sys.modules)
import numpy, safetensors.torch, torch
torch_brings = set(sys.modules)
import nf4lora, nf4lora.selftest
print(*sorted({n.split(".")[0] for n in set(sys.modules) - torch_brings}))
print(*sorted(n for n in ("transformers", "peft", "accelerate", "bitsandbytes", "scipy", "typer", "rich") if n in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded, foreign = done.stdout.split("\n")[:2]
    assert not foreign
    assert set(loaded.split()) <= {"nf4lora", "torch", "numpy", "safetensors"} | set(sys.stdlib_module_names)


def test_the_codebook_is_written_once():
    pattern = re.compile(r"0\.6961|0\.72295|0\.0795803|bf3239b1")
    found = {p.relative_to(ROOT).as_posix() for p in files("nf4lora", "csrc", "triton_kernels", "bench") if pattern.search(p.read_text())}
    assert found == {"nf4lora/nf4_codebook.csv"}


def test_asm_is_in_ptx_cuh_only():
    pattern = re.compile(r"\b(asm|__asm__)\b\s*(volatile)?\s*\(|inline_asm")
    found = {p.relative_to(ROOT).as_posix() for p in files("csrc", "nf4lora", "triton_kernels") if pattern.search(p.read_text())}
    assert found <= {"csrc/ptx.cuh", "triton_kernels/nf4.py"}


def test_kernel_text_is_plain():
    """What differs between the device and the host machine is in ptx.cuh alone, so kernels need no case for either."""
    pattern = re.compile(r"^\s*#\s*(if|ifdef|ifndef|elif)\b|<<<|\b__shared__\b|\bcub::|\bcute::", re.M)
    kernels = files("csrc", suffixes=("*.cu",))
    assert len(kernels) > 2 and not [p for p in kernels if pattern.search(p.read_text())]


def test_no_fast_math():
    setup = (ROOT / "setup.py").read_text()
    assert not re.search("fast.?math|-Ofast|-funsafe", setup) and "-ffp-contract=off" in setup


def test_no_torch_header_in_csrc():
    assert not [p for p in files("csrc") if re.search(r"#include\s*[<\"](torch|ATen|c10|pybind11|Python)", p.read_text())]


def test_files_are_small():
    long = {p.relative_to(ROOT).as_posix(): n for p in files("nf4lora", suffixes=("*.py",)) if (n := len(p.read_text().splitlines())) > 200}
    assert not long
    assert len((ROOT / "setup.py").read_text().splitlines()) <= 95


def test_nothing_is_left_to_do():
    mark = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    here = Path(__file__)
    assert not [p for p in files("nf4lora", "csrc", "tests", "bench", "triton_kernels") if p != here and mark.search(p.read_text())]


def test_no_bare_assert_and_no_swallowed_error_in_the_package():
    for path in files("nf4lora", suffixes=("*.py",)):
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            assert not isinstance(node, ast.Assert), f"{where}: assert vanishes under -O; raise with a message"
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{where}: bare except"
                assert not (len(node.body) == 1 and isinstance(node.body[0], ast.Pass)), f"{where}: an error passes silently"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "exit", "quit"), where


BANNED = {
    "subprocess", "multiprocessing", "pty", "socket", "ssl", "http", "urllib", "ftplib", "requests", "httpx", "aiohttp", "pickle", "cloudpickle", "dill",
    "marshal", "shelve", "runpy", "code",
}  # fmt: skip
BANNED_CALLS = re.compile(r"eval|exec|compile|__import__|(os\.(system|popen|exec|spawn|posix_spawn|fork).*)|(importlib\.)?import_module|torch\.(load|hub\..*)")
# The demo measures each of its runs in a process of its own.
STARTS = {("cli/demo.py", "subprocess")}


def test_nothing_is_evaluated_unpickled_fetched_or_started():
    found = set()
    for path in files("nf4lora", suffixes=("*.py",)):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names = [n for n in names if n.split(".")[0] in BANNED and not getattr(node, "level", 0)]
            if isinstance(node, ast.Call) and BANNED_CALLS.fullmatch(called := ast.unparse(node.func)):
                names.append(called)
            found |= {(path.relative_to(PACKAGE).as_posix(), name) for name in names}
    assert found <= STARTS


def test_no_global_is_rebound():
    for path in files("nf4lora", suffixes=("*.py",)):
        assert not [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Global)], path


def op_names():
    return [n for n in vars(ops) if isinstance(getattr(ops, n), ops.Op)]


def test_the_ops_are_those():
    assert op_names() == [
        "quantize", "quantize_absmax", "dequantize", "dequantize_into", "linear_fwd", "linear_bwd", "lora_bwd", "linear_grads",
        "group_fwd", "group_bwd", "group_lora_bwd", "group_grads", "swiglu_fwd", "swiglu_bwd", "optim_check", "optim_step",
    ]


@pytest.mark.parametrize("name", op_names())
def test_one_op_one_row(name):
    """Every op has a schema, a fake, a check, a documented reference of the same arguments, kernels and a test of its stem."""
    schema = getattr(ops, name).overload._schema
    steps = name.startswith("optim")  # in place
    assert schema.name == f"nf4lora::{name}" and schema.is_mutable == (steps or name == "dequantize_into")
    function = getattr(grad_rows if name.endswith("_grads") else reference_optim if steps else reference, name)
    wanted = [a.name for a in schema.arguments]
    assert list(function.__code__.co_varnames[: function.__code__.co_argcount]) == wanted and function.__doc__
    assert torch._C._dispatch_has_kernel_for_dispatch_key(schema.name, "CPU")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(schema.name, "CUDA")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(schema.name, "Meta")
    assert {"reference", "cpu"} <= {b for op, b in backends._ROWS if op == name}
    assert hasattr(sys.modules["nf4lora.checks_optim" if steps else "nf4lora.checks"], name)
    tested = "test_optim_step.py" if steps else "test_ops.py"
    assert re.search(rf"\b{name}\b", (ROOT / "tests" / tested).read_text())


def test_public_functions_are_documented():
    for path in files("nf4lora", suffixes=("*.py",)):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree) or path.name == "__main__.py", f"{path} has no docstring"
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node) or path.stem == "abi", f"{path.name}: {node.name} has no docstring"
