"""The machine code of every CUDA kernel of the installed library, for every architecture, without a GPU; and that the
reader of it is not fooled. The table is bench/codegen.py's."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # behind what is installed: bench is not

from bench import codegen  # noqa: E402

NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(not NVCC, reason="nvcc compiles the kernels of these tests")


@pytest.fixture(scope="module")
def rows():
    if not codegen.LIBRARY.exists():
        if not NVCC or not codegen.expected_archs():
            pytest.skip("nf4lora was installed without nvcc, so without CUDA kernels")
        pytest.fail(f"nvcc is here, {codegen.LIBRARY} is not: reinstall nf4lora")
    return codegen.rows_of(codegen.LIBRARY, codegen.compiler_of(codegen.LIBRARY))


def test_every_kernel_is_there_for_every_architecture(rows):
    kernels, archs = {row.kernel for row in rows}, codegen.expected_archs()
    if NVCC:  # setup.py leaves out, with a sentence, what its nvcc does not know
        known = subprocess.run([NVCC, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
        archs = [a for a in archs if a.rstrip("af") in known]
    assert {(row.kernel, row.arch) for row in rows} == {(k, a) for k in kernels for a in archs}
    for of_ours in ("decode_tiles<__nv_bfloat16, true>", "encode_blocks<__half, (QuantType)1, 8>", "encode_absmax"):
        assert of_ours in kernels


def test_no_spill_no_stack_no_forbidden_instruction_and_within_the_limits(rows, figures):
    assert not [fault for row in rows for fault in codegen.faults(row)]
    assert {kernel for kernel, _ in codegen.LIMITS} <= {row.kernel for row in rows}
    figures["machine code: kernels without a spill or a stack frame, over all architectures"] = len(rows)


def test_no_more_registers_or_instructions_than_committed(rows, figures):
    committed = codegen.committed()
    if rows[0].compiler != committed[0].compiler:
        figures[f"machine code: rows not held against bench/results/codegen.json, for {rows[0].compiler} built them"] = len(rows)
        return
    known = {(row.kernel, row.arch) for row in committed}
    new = [row for row in rows if (row.kernel, row.arch) not in known and row.arch in {arch for _, arch in known}]
    assert not new, "not in bench/results/codegen.json: python -m bench.codegen --update"
    assert not codegen.regressions(rows, committed)


def test_regressions_are_seen(rows):
    first = codegen.committed()[0]
    worse = [codegen.KernelRow(**{**vars(first), "registers": first.registers + 1}),
             codegen.KernelRow(**{**vars(first), "instructions_per_weight": first.instructions_per_weight + 0.1})]  # fmt: skip
    assert [len(codegen.regressions([row], [first])) for row in (first, *worse)] == [0, 1, 1]
    assert not codegen.regressions([codegen.KernelRow(**{**vars(worse[0]), "compiler": "another"})], [first])


# Each is a kernel that the rule below it must refuse, and a word of why.
HEAD = "#include <cstdint>\nextern \"C\" __global__ void "
COPY = HEAD + """copy(const uint4 *in, uint4 *out, int64_t n) {
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x)
        out[i] = BODY;
}"""  # fmt: skip
SPILLS = HEAD + """copy(const float4 *in, float4 *out, int64_t n) {
    float4 kept[24];
    for (int k = 0; k < 24; ++k)
        kept[k] = in[k * n + threadIdx.x];
    __syncthreads();
    for (int64_t i = 0; i < n; ++i)
        for (int k = 0; k < 24; ++k)
            kept[k] = make_float4(kept[k].x * kept[23 - k].y, kept[k].y, kept[k].z, kept[k].w + kept[k].x);
    for (int k = 0; k < 24; ++k)
        out[k * n + threadIdx.x] = kept[k];
}"""  # fmt: skip
LOCAL_ARRAY = HEAD + """copy(const uint4 *in, uint4 *out, int64_t n) {
    uint32_t kept[32];
    for (int k = 0; k < 32; ++k)
        kept[in[k].x & 31] = in[k].y;
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x)
        out[i] = make_uint4(kept[in[i].x & 31], in[i].y, in[i].z, in[i].w);
}"""  # fmt: skip
ONCE = HEAD + """copy(const uint4 *in, uint4 *out, int64_t n) {
    if (threadIdx.x < n)
        out[threadIdx.x] = in[threadIdx.x];
    for (int64_t i = 0; i < n; ++i)
        reinterpret_cast<uint32_t *>(out)[n * 4 + i * 2] = threadIdx.x;
}"""  # fmt: skip
RULE = codegen.Rule("copy", "STG.128", 8, ("LDG.128",))


def compiled(source, folder, *flags):
    (folder / "kernel.cu").write_text(source)
    command = [NVCC, "-std=c++17", "-O3", "-cubin", "-arch=sm_90a", *flags, folder / "kernel.cu", "-o", folder / "kernel.cubin"]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True), folder / "kernel.cubin"


def row_of(source, folder, *flags):
    done, cubin = compiled(source, folder, *flags)
    assert done.returncode == 0, done.stderr
    (row,) = codegen.rows_of(cubin, "nvcc", [RULE])
    return row


@needs_nvcc
def test_a_plain_copy_passes(tmp_path):
    row = row_of(COPY.replace("BODY", "in[i]"), tmp_path)
    assert codegen.faults(row, [RULE]) == [] and row.spill_bytes == row.stack_bytes == 0
    assert row.weights_per_iteration == 8 * row.opcodes["STG.128"] and row.kernel == "copy" and row.arch == "sm_90a"
    assert row.instructions_per_weight == pytest.approx(row.loop_instructions / row.weights_per_iteration, abs=1e-3)
    assert row.loop_instructions <= 16 * row.opcodes["STG.128"]


@needs_nvcc
@pytest.mark.parametrize(
    ("source", "flags", "reason"),
    [
        (SPILLS, ["-maxrregcount=32"], "through local memory"),
        (LOCAL_ARRAY, [], "stack frame of 128"),
        (ONCE, [], "no loop holds STG.128"),
        (COPY.replace("BODY", "make_uint4(in[i].x, uint32_t(in[i].y * 1.1), in[i].z, in[i].w)"), [], "DMUL"),
        (COPY.replace("BODY", "make_uint4(in[i].x, in[i].y, atomicAdd((uint32_t *)in, 1), in[i].w)"), [], "ATOMG"),
        (COPY.replace("BODY", "make_uint4(((uint32_t *)in)[5 * i], 0, 0, 0)"), [], "no LDG.128"),
    ],
)  # fmt: skip
def test_the_reader_is_not_fooled(tmp_path, source, flags, reason):
    faults = codegen.faults(row_of(source, tmp_path, *flags), [RULE])
    assert any(reason in fault for fault in faults), faults


@needs_nvcc
@pytest.mark.parametrize(("source", "flags"), [(SPILLS, ["-maxrregcount=32"]), (LOCAL_ARRAY, [])])
def test_the_build_refuses_spills_and_local_arrays_itself(tmp_path, source, flags):
    tree = ast.parse((ROOT / "setup.py").read_text())
    wanted = ("NVCC_FLAGS", "STRICT")
    values = [n.value for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") in wanted]
    of_build = " ".join(ast.literal_eval(value.func.value) for value in values).split()
    assert {"-warn-spills,-warn-lmem-usage", "-Werror"} <= set(of_build)
    done, _ = compiled(source, tmp_path, *flags, *[f for f in of_build if not f.startswith("-I")])
    assert done.returncode != 0 and re.search("spill|local memory", done.stderr, re.IGNORECASE), done.stderr


def test_a_missing_tool_is_named(monkeypatch):
    codegen.tool.cache_clear()
    with pytest.raises(FileNotFoundError, match="no-such-tool.*pip install triton"):
        codegen.tool("no-such-tool")


def test_the_architectures_wanted_are_those_of_the_build(monkeypatch):
    assert f'"{codegen.DEFAULT_ARCHS}"' in (ROOT / "setup.py").read_text()
    monkeypatch.setitem(os.environ, "NF4LORA_CUDA_ARCHS", "80;90a, 120")
    assert codegen.expected_archs() == ["sm_80", "sm_90a", "sm_120"]
