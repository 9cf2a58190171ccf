"""What Triton's compiler makes of the kernels, without a GPU: limits on the machine code, and its PTX run on the CPU."""

import ast
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from nf4lora import reference, reference_optim
from nf4lora.cases import exact_case
from nf4lora.codebook import codebook, dynamic_boundaries

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # behind what is installed: bench is not

import ptx_on_host  # noqa: E402
from test_optim_step import Run, same_bytes  # noqa: E402

from bench import codegen_triton as codegen  # noqa: E402
from bench.codegen import Instruction, KernelRow, regressions  # noqa: E402

if find_spec("triton") is None and (sys.platform, os.uname().machine) != ("linux", "x86_64"):
    pytest.skip("Triton has no release for this machine", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder of rows.json and every variant's PTX, compiled in a process that does not interpret Triton."""
    folder = tmp_path_factory.mktemp("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(folder / "cache")}
    code = f"import sys; sys.path.append({str(ROOT)!r}); from bench import codegen_triton; codegen_triton.main()"
    done = subprocess.run([sys.executable, "-c", code, "--out", folder], env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def result(built) -> dict:
    return json.loads((built / "rows.json").read_text())


def same_bits(a, b):
    if a.is_floating_point():
        a, b = (torch.where(t.isnan(), torch.full_like(t, torch.nan), t) for t in (a, b))
    return a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


# ---- limits


def test_every_kernel_on_every_architecture_keeps_the_rules(result, figures):
    wanted = {(v.name, f"sm_{arch}") for v, arch in codegen.variants(codegen.expected_archs())}
    assert {(r["kernel"], r["arch"]) for r in result["rows"]} == wanted
    assert not result["faults"]
    figures["Triton kernels compiled without spills, variants times architectures"] += len(wanted)


def test_nothing_grew_beyond_what_is_committed(result):
    rows = [KernelRow(**r) for r in result["rows"]]
    assert not regressions(rows, codegen.committed())
    pinned = next(line for line in (ROOT / "constraints.txt").read_text().split() if line.startswith("triton=="))
    assert pinned.replace("==", " ") in {r.compiler for r in codegen.committed()}


def test_the_rules_see_what_they_are_for():
    variant = codegen.dequantize("bfloat16")
    opcodes = {"LDG.32": 4, "STG.128": 4, "FMUL": 32}
    row = KernelRow(variant.name, "sm_90", "triton", 32, 0, 0, 0, 200, 200, 32, 6.25, opcodes)
    assert not codegen.faults(variant, row)
    assert "no STG.128" in codegen.faults(variant, replace(row, opcodes={"LDG.32": 4, "STG.64": 8}))[0]
    assert "has FFMA" in codegen.faults(variant, replace(row, opcodes=opcodes | {"FFMA": 1}))[0]
    assert "16 bytes through local memory" in codegen.faults(variant, replace(row, spill_bytes=16))[0]
    assert regressions([replace(row, registers=33)], [row]) and not regressions([row], [row])


def test_the_main_loop_is_the_last_that_holds_the_product():
    names = "S2R HMMA.16816.F32 BRA LDG SHFL HMMA.16816.F32 CALL BRA SHFL STG EXIT".split()
    targets = {2: "0x10", 6: "0x80", 7: "0x30"}
    listing = [Instruction(16 * n, name, targets.get(n, "")) for n, name in enumerate(names)]
    assert [i.opcode for i in codegen.main_loop(listing, ("MMA", "SHFL"))] == ["LDG", "SHFL", "HMMA.16816.F32", "BRA"]
    assert [i.opcode for i in codegen.main_loop(listing[:3], ("MMA",))] == ["HMMA.16816.F32", "BRA"]


def test_a_straight_line_ends_before_its_subroutines():
    names = ["S2R", "EXIT", "CALL.REL.NOINC", "FMUL", "EXIT", "MUFU.RCP", "RET.REL", "NOP"]
    operands = ["R0, SR_TID.X", "", "0x50", "", "", "", "", ""]
    listing = [Instruction(16 * n, name, o) for n, (name, o) in enumerate(zip(names, operands, strict=True))]
    assert [i.opcode for i in codegen.straight_line(listing)] == names[:5]


# ---- the PTX itself, inline asm and masks and all, run on the CPU


def ptx(built, variant):
    return (built / f"{variant.name} sm_{codegen.ONCE_ON}.ptx").read_text()


DEQUANTIZE = {v.name: v for v in codegen.EVERYWHERE + codegen.ONCE if v.kernel.startswith("dequantize")}
QUANTIZE = {v.name: v for v in codegen.EVERYWHERE + codegen.ONCE if v.kernel == "quantize.quantize_kernel"}


def from_byte_1(t):
    return torch.empty(t.numel() + 1, dtype=torch.uint8)[1:].copy_(t.reshape(-1)).unsqueeze(1)


@pytest.mark.parametrize("quant_type", ("nf4", "fp4"))
@pytest.mark.parametrize("name", DEQUANTIZE)
def test_dequantize_as_compiled_gives_the_reference_bytes(built, name, quant_type, figures):
    variant = DEQUANTIZE[name]
    blocksize, tail, huge = variant.constants["BLOCKSIZE"], variant.constants["TAIL"], variant.size_type == "i64"
    dtype = next(d for d, code in codegen.TYPES.items() if code == variant.pointers["out_ptr"])
    numel = 3 * variant.weights + 8 * 77 + 5 * tail
    g = torch.Generator().manual_seed(0)
    packed, absmax = reference.quantize(torch.randn(numel, generator=g), blocksize, quant_type)
    nested_absmax = offset = None
    if "nested_absmax_ptr" in variant.pointers:
        offset = absmax.mean().reshape(1)
        absmax, nested_absmax = reference.quantize_absmax(absmax, offset)
    if not variant.constants["ALIGNED"]:
        packed = from_byte_1(packed)
    out = torch.full((numel,), torch.nan, dtype=getattr(torch, dtype))
    # Of a tensor of more than 2**31 elements only the end exists: its programs are the last, but that of the tail
    before = 2**32 if huge else 0
    if huge and tail:
        before = 0  # the first program decodes the tail and must reach the first blocks too
    operands = {"codebook_ptr": codebook(quant_type), "dynamic_ptr": codebook("dynamic"), "offset_ptr": offset}
    windows = {
        "packed_ptr": (packed, before // 2), "absmax_ptr": (absmax, before // blocksize), "out_ptr": (out, before),
        "nested_absmax_ptr": (nested_absmax, before // blocksize // 256),
    }  # fmt: skip
    operands |= {k: ptx_on_host.Window(*w) for k, w in windows.items() if w[0] is not None}
    first = before // variant.weights
    count = -(-(numel // 8) // (variant.weights // 8))
    ptx_on_host.run(ptx(built, variant), arguments(variant, operands, before + numel), range(first, first + count))
    wanted = reference.dequantize(packed, absmax, nested_absmax, offset, [numel], blocksize, quant_type, out.dtype)
    assert same_bits(out, wanted)
    figures["elements compared with compiled Triton kernels' PTX, run on the CPU"] += numel


def order(variant):
    """The arguments a kernel has at run time, in its order."""
    module, function = variant.kernel.split(".")
    tree = ast.parse((ROOT / "triton_kernels" / f"{module}.py").read_text())
    kernel = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function)
    return [a.arg for a in kernel.args.args if a.arg not in variant.constants]


def arguments(variant, operands, numel):
    """In the kernel's order."""
    return [numel if n == variant.size else operands[n] for n in order(variant)]


@pytest.mark.parametrize("name", QUANTIZE)
def test_quantize_as_compiled_gives_the_reference_bytes(built, name, figures):
    from nf4lora.triton_kernels.nf4 import cells

    variant = QUANTIZE[name]
    blocksize, tail, huge = variant.constants["BLOCKSIZE"], variant.constants["TAIL"], variant.size_type == "i64"
    quant_type = "nf4" if variant.constants["NF4"] else "fp4"
    dtype = getattr(torch, next(d for d, code in codegen.TYPES.items() if code == variant.pointers["a_ptr"]))
    numel = 2 * variant.weights + 8 * 77 + 5 * tail
    a = torch.randn(numel, generator=torch.Generator().manual_seed(0)).to(dtype)
    if blocksize <= 64:
        a[100], a[301], a[450], a[640:704], a[768:832], a[-1] = torch.nan, torch.inf, -torch.inf, 0, 0, torch.nan
        a[770] = 6e-8 if dtype == torch.float16 else 1e-42
    packed, absmax = torch.full((-(-numel // 2), 1), 0xA5, dtype=torch.uint8), torch.full((-(-numel // blocksize),), torch.nan)
    before = 2**32 if huge else 0
    windows = {"a_ptr": (a, before), "packed_ptr": (packed, before // 2), "absmax_ptr": (absmax, before // blocksize)}
    operands = {k: ptx_on_host.Window(*w) for k, w in windows.items()} | {"cells_ptr": cells(quant_type)}
    first = before // variant.weights
    programs = range(first, first - (-numel // variant.weights))
    ptx_on_host.run(ptx(built, variant), arguments(variant, operands, before + numel), programs)
    wanted_packed, wanted_absmax = reference.quantize(a, blocksize, quant_type)
    assert same_bits(packed, wanted_packed) and same_bits(absmax, wanted_absmax)
    figures["elements compared with compiled Triton kernels' PTX, run on the CPU"] += numel


@pytest.mark.parametrize("groups", (1, 256, 700))
def test_quantize_absmax_as_compiled_gives_the_reference_bytes(built, groups):
    variant = codegen.quantize_absmax()
    absmax = torch.rand(groups, generator=torch.Generator().manual_seed(0))
    if groups == 700:
        absmax[300], absmax[600] = torch.nan, torch.inf
    offset = torch.full((1,), 0.5)
    codes, nested_absmax = torch.full((groups,), 0xA5, dtype=torch.uint8), torch.full((-(-groups // 256),), torch.nan)
    operands = {"absmax_ptr": absmax, "offset_ptr": offset, "codes_ptr": codes, "nested_absmax_ptr": nested_absmax}
    operands["boundaries_ptr"] = dynamic_boundaries()
    ptx_on_host.run(ptx(built, variant), arguments(variant, operands, groups), range(-(-groups // 256)))
    assert all(map(same_bits, (codes, nested_absmax), reference.quantize_absmax(absmax, offset)))


OPTIM = {v.name: v for v in codegen.EVERYWHERE + codegen.ONCE if v.kernel == "optim.optim_step_kernel"}
CHECK = {v.name: v for v in codegen.EVERYWHERE + codegen.ONCE if v.kernel == "optim.optim_check_kernel"}


def run_on_tensors(built, variant, operands, table_of, *tensors):
    """Every program of a kernel whose table, `table_of` their lists of addresses, holds addresses of lists of tensors."""
    table, programs = table_of([[0] * len(of) for of in tensors])  # for its size
    each = [t for of in tensors for t in of]
    passed = [*arguments(variant, operands | {"table_ptr": table}, len(tensors[0])), 0, 0, *each]  # two pointers are Triton's own
    memory = ptx_on_host.Memory()
    addresses = iter([memory.add(a) for a in passed if isinstance(a, torch.Tensor)][-len(each) :])
    table.copy_(table_of([[next(addresses) for _ in of] for of in tensors])[0])
    ptx_on_host.run(ptx(built, variant), passed, range(max(programs, 1)))


@pytest.mark.parametrize("name", OPTIM)
def test_optim_step_as_compiled_gives_the_reference_bytes(built, name, figures):
    from nf4lora.triton_kernels import optim

    variant = OPTIM[name]
    c, adamw, coded, counted = variant.constants, "adamw" in name, "8-bit" in name, "counted" in name
    dtype = getattr(torch, next(d for d, code in codegen.TYPES.items() if code == variant.pointers["like_ptr"]))
    shapes = ((8,), (1280,), (4, 512), (1, 1), (257,)) if not c["WHOLE"] else ((8,), (1280,), (4, 512))
    run = Run("adamw" if adamw else "lion", coded, dtype, shapes, shift=lambda i: 0 if c["WHOLE"] else i % 3)
    run.grads[1][5], run.grads[1][700], run.params[2][1, 9] = torch.nan, torch.inf, -torch.inf
    if counted:
        run.steps, run.flag = torch.tensor([9, 9, 1, 2**31 - 1, 1000, 77, 1234567], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    seed, origin = (3 << 40 | 7, 1 << 33) if c["STOCHASTIC"] else (None, 0)
    wanted = run.referenced(seed, origin)
    numels, after = [p.numel() for p in run.params], (run.hyper_of,)
    if counted:
        after = run.hyper_of, run.slots, *optim._bits(run.hypers, run.hyper_of)

    def table_of(addresses):
        return optim._table((seed or 0, origin), (*addresses, numels, run.offsets), numels, after, variant.weights)

    operands = {"like_ptr": run.params[0], "constants_ptr": optim._constants(run.hypers, counted), "halvings": 3 - c["WHOLE"]}
    operands |= {f"{n}_ptr": getattr(run, n) for n in ("state1", "state2", "absmax1", "absmax2", "steps", "flag")}
    for number, code in enumerate(("dynamic", "unsigned_dynamic"), 1):
        operands |= {f"codebook{number}_ptr": codebook(code), f"cells{number}_ptr": optim.cells(code)}
    run_on_tensors(built, variant, operands, table_of, run.params, run.grads)
    assert all(map(same_bytes, run.buffers(), wanted.buffers()))
    figures["elements compared with compiled Triton kernels' PTX, run on the CPU"] += sum(numels)
    if counted:
        run.flag.fill_(1)
        before = run.copy()
        run_on_tensors(built, variant, operands, table_of, run.params, run.grads)
        assert all(map(same_bytes, run.buffers(), before.buffers()))


@pytest.mark.parametrize("name", CHECK)
def test_optim_check_as_compiled_counts_as_the_reference_does(built, name):
    from nf4lora.triton_kernels import optim

    variant = CHECK[name]
    dtype = getattr(torch, next(d for d, code in codegen.TYPES.items() if code == variant.pointers["like_ptr"]))
    whole = variant.constants["WHOLE"]
    few = ((8,), (0,), (4096 + 8,), (16,)) if whole else ((1,), (0,), (4096 + 5,), (33,))
    run = Run("lion", False, dtype, (*few, *256 * ((0,),)), shift=lambda i: 0 if whole else i % 3)
    grads, slots = run.grads, torch.randperm(300, generator=torch.Generator().manual_seed(0))[: len(run.grads)].tolist()
    numels = [g.numel() for g in grads]
    for place, value in ((0, torch.finfo(dtype).min), (2, torch.inf), (0, torch.nan), (3, -torch.inf), (0, torch.finfo(dtype).max)):
        saved = grads[place][-1].clone()
        grads[place][-1] = value
        steps, flag = torch.arange(301, dtype=torch.int32), torch.full((1,), 7, dtype=torch.int32)
        wanted = steps.clone(), flag.clone()
        reference_optim.optim_check(grads, *wanted, slots)

        def table_of(addresses):
            return optim._table((0, 0), (*addresses, numels), numels, (slots,), variant.weights)

        operands = {"like_ptr": grads[0], "steps_ptr": steps, "flag_ptr": flag, "halvings": (len(grads) - 1).bit_length()}
        run_on_tensors(built, variant, operands, table_of, grads)
        assert flag.item() == (not math.isfinite(value)) and torch.equal(steps, wanted[0]) and torch.equal(flag, wanted[1])
        grads[place][-1] = saved


# ---- products: mma.sync, ldmatrix, cp.async and the decoding asm of what is compiled for sm_80

PRODUCTS = {v.name: v for v in codegen.PRODUCTS + codegen.PRODUCTS_ONCE if "r 256" not in v.name}


def product(variant, case):
    """(operands by name, grid, outputs with what they must sum up to) of a product of `case`."""
    state, c, xa = case.state, variant.constants, None
    (M, K), N, p = case.x.shape, case.dy.shape[1], case.dropout_p
    parts = 2 if "*fp32" in (variant.pointers.get("out_ptr"), variant.pointers.get("dyb_ptr"), variant.pointers.get("dA_ptr")) else 1
    operands = {n: getattr(state, n[:-4]) for n in ("absmax_ptr", "nested_absmax_ptr", "offset_ptr")}
    operands |= {"packed_ptr": case.packed, "codebook_ptr": codebook("nf4"), "dynamic_ptr": codebook("dynamic"), "x_ptr": case.x, "dy_ptr": case.dy}
    operands |= {"A_ptr": case.lora_A, "B_ptr": case.lora_B, "seed_ptr": case.seed, "scaling": case.scaling, "threshold": int(p * 2**24)}
    operands |= {"factor": 1 / (1 - p), "M": M, "N": N, "K": K, "r": 0, "dy_ld": N, "xa_ld": 0, "out_ld": N}
    truth = case.truth()
    if case.lora_A is not None:
        r, seed = len(case.lora_A), case.seed if p else None
        dropped = reference.dropout(case.x, seed, p)
        xa, dyb = (dropped @ case.lora_A.T).to(case.x.dtype), (case.scaling * (case.dy.float() @ case.lora_B)).to(case.x.dtype)
        operands |= {"xa_ptr": xa, "dyb_ptr": dyb, "r": r, "xa_ld": r, "dyb_ld": r}

    def cut(size, block):
        return -(-size // c[block])

    def steps(size, block):
        operands["steps"] = -(-cut(size, block) // parts)

    match variant.kernel:
        case "linear_fwd.linear_fwd_kernel":
            grid, outputs = cut(M, "BLOCK_M") * cut(N, "BLOCK_N"), {"out_ptr": (parts, truth.y)}
            steps(K, "BLOCK_K")
        case "linear_bwd.linear_bwd_kernel":
            grid, outputs = cut(M, "BLOCK_M") * cut(K, "BLOCK_K"), {"out_ptr": (parts, truth.dx)}
            steps(N, "BLOCK_N")
        case "lora.xa_kernel":
            grid, outputs = cut(M, "BLOCK_M"), {"out_ptr": (parts, dropped @ case.lora_A.T)}
            steps(K, "BLOCK_K")
        case "lora.dyb_dB_kernel":
            grid, outputs = cut(M, "BLOCK_M"), {"dyb_ptr": (parts, case.scaling * (case.dy.float() @ case.lora_B)), "dB_ptr": (cut(M, "BLOCK_M"), truth.dB)}
            steps(N, "BLOCK_N")
        case "lora.dA_kernel":
            grid, outputs = cut(K, "BLOCK_K"), {"dA_ptr": (parts, truth.dA)}
            steps(M, "BLOCK_M")
    return operands, [(i, j) for i in range(grid) for j in range(parts)], outputs


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_as_compiled_are_exact(built, name, figures):
    """T1: operands whose products are exact in any order, so the one rounding at the end is all that there is."""
    variant = PRODUCTS[name]
    c, r, dtype = variant.constants, int(re.search(r"r (\d+)", name)[1]), torch.float16 if "float16," in name and "bfloat16" not in name else torch.bfloat16
    M = c["BLOCK_M"] + 3 if variant.kernel != "lora.dA_kernel" else 2 * c["BLOCK_M"] + 3
    N, K = (50, 70) if c.get("SPAN") == 1 else (80, 136) if c.get("SPAN") == 8 else (144, 192)
    case = exact_case(M, N, K, r, dtype, bias=False, nested="plain" not in name, dropout_p=0.5 if "dropout" in name else 0.0)
    operands, programs, outputs = product(variant, case)
    found = {}
    for pointer, (parts, truth) in outputs.items():
        kind = next(d for d, code in codegen.TYPES.items() if code == variant.pointers[pointer])
        found[pointer] = operands[pointer] = torch.full((parts, *truth.shape), torch.nan, dtype=getattr(torch, kind))
    ptx_on_host.run(ptx(built, variant), [operands[n] for n in order(variant)], programs)
    for pointer, (_, truth) in outputs.items():
        summed = found[pointer].sum(0, dtype=torch.float64).to(found[pointer].dtype)
        assert torch.equal(summed, truth.to(summed.dtype))
        figures["elements compared with compiled Triton kernels' PTX, run on the CPU"] += summed.numel()


def test_an_access_beyond_an_operand_is_found(built):
    variant = codegen.dequantize("bfloat16", nested=False)
    packed, absmax = reference.quantize(torch.randn(4096), 64, "nf4")
    operands = {"codebook_ptr": codebook("nf4"), "packed_ptr": packed, "absmax_ptr": absmax}
    for change in ({"absmax_ptr": absmax[:-1]}, {"packed_ptr": packed[:-1]}, {"out_ptr": torch.zeros(4095, dtype=torch.bfloat16)}):
        given = operands | {"out_ptr": torch.zeros(4096, dtype=torch.bfloat16)} | change
        with pytest.raises(IndexError, match="beyond the operands"):
            ptx_on_host.run(ptx(built, variant), arguments(variant, given, 4096), range(1))
