"""Faults planted into kernels, and which of three builds finds each.

A bug is a text of a kernel, found there exactly once, and what to put in its place; the kernels know nothing of it. It
is found by the machine's message, a sanitizer's report or a wrong result; clean runs show that none of these come
without it. Bugs in the linear's kernels are tried under the checker only, as their files take long to compile: a row
of the table names the builds that tried it. From the folder of the tests:

    python -m cuda_on_host.bugs --write

runs them all and writes bench/results/planted_bugs.json.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from . import build, errors

KERNELS = Path("tests/cuda_on_host/kernels")
MMA, WGMMA, SPLITK, REDUCE = (KERNELS / f"{name}.cu" for name in ("gemm_mma", "gemm_wgmma", "splitk_flags", "reduce"))
QUANTIZE, DEQUANTIZE = Path("csrc/cuda/quantize.cu"), Path("csrc/cuda/dequantize.cu")
LINEAR = {
    case: Path(f"csrc/cuda/{file}.cu")
    for file, cases in {
        "linear_fwd_small": ("linear_fwd_small", "linear_fwd_small_resident"), "linear_fwd_mma": ("linear_fwd_mma",),
        "linear_fwd_wgmma": ("linear_fwd_wgmma",), "linear_bwd_mma": ("linear_bwd_mma",),
        "linear_bwd_wgmma": ("linear_bwd_wgmma",), "decode_group": ("decode_group",),
        "lora_projections": ("lora_xa", "lora_dyb"), "lora_gradients": ("lora_bwd",), "lora_dx": ("lora_dx",), "swiglu": ("swiglu", "swiglu_unaligned"),
        "optim": ("optim_adamw", "optim_lion", "optim_unaligned", "optim_check"),
    }.items()
    for case in cases
}  # fmt: skip
RESULTS = build.ROOT / "bench" / "results" / "planted_bugs.json"
SEEDS = (0, 1, 2, 3)
TIMEOUT = 120

# The source file of each case of driver.py.
SOURCES = {
    "gemm_mma": MMA, "gemm_mma_transposed": MMA, "gemm_wgmma_ss": WGMMA, "gemm_wgmma_rs": WGMMA,
    "splitk_ordered": SPLITK, "splitk_last_arriver": SPLITK, "summary": REDUCE, "summary_many_blocks": REDUCE,
    "reverse": REDUCE, "handoff": REDUCE, "quantize": QUANTIZE, "quantize_absmax": QUANTIZE, "dequantize": DEQUANTIZE,
    "dequantize_unaligned": DEQUANTIZE, **LINEAR,
}  # fmt: skip


def builds(case: str) -> tuple[str, ...]:
    """Those that try out a case: all, but for the linear's large files the one that knows most."""
    return ("checker",) if case in LINEAR else build.VARIANTS


# What a finding of a kind says, in one of the builds; "wrong" is a result that differs.
KINDS = {
    "out-of-bounds global read": r"out of bounds|overflow on|use-after|SEGV",
    "out-of-bounds global write": r"out of bounds|overflow on|use-after|SEGV",
    "out-of-bounds shared": r"out of bounds|use-after-poison|unknown-crash",
    "misaligned access": r"misaligned",
    "read of unwritten shared memory": r"unwritten|uninitiali[sz]ed",
    "read of unwritten global memory": r"unwritten|uninitiali[sz]ed",
    "race between warps: read after write": r"race|uninitiali[sz]ed",
    "race between warps: write after read": r"race",
    "race between lanes of a warp": r"race|uninitiali[sz]ed",
    "race between blocks": r"race",
    "missing wait for another block": r"race",
    "divergent barrier": r"divergent|deadlock|barrier",
    "deadlock": r"deadlock",
    "wrong barrier count": r"deadlock|bad barrier",
    "shuffle after lanes left": r"warp mask.*ended",
    "wrong shuffle mask": r"warp mask",
    "missing wait for cp.async": r"race|unwritten|uninitiali[sz]ed|wrong",
    "cp.async in flight at exit": r"in flight at exit",
    "ring without empty-wait": r"race|wrong|too many arrivals",
    "full-wait skipped": r"race|unwritten|uninitiali[sz]ed|wrong",
    "missing wait for wgmma": r"in flight at exit|race|wrong",
    "wrong expected bytes": r"deadlock|no progress",
    "mbarrier used before its initialisation": r"uninitiali[sz]ed mbarrier",
    "index overflow": r"signed integer overflow|out of bounds|wrong|memory fault",
    "table entry never written": r"unwritten|uninitiali[sz]ed|wrong",
    "wrong fragment": r"wrong",
    "wrong swizzle": r"wrong",
    "nibble order": r"wrong",
    "wrong reduction": r"wrong",
}


@dataclass(frozen=True)
class Bug:
    """`text` stands once in the source of `case`; `replacement` takes its place."""

    name: str
    kind: str
    case: str
    text: str
    replacement: str

    @property
    def source(self) -> Path:
        return SOURCES[self.case]

    def plant(self) -> str:
        """The source with the bug in it. Raises: ValueError unless the text is there exactly once."""
        source = (build.ROOT / self.source).read_text()
        if (found := source.count(self.text)) != 1:
            raise ValueError(f"{self.name}: its text stands {found} times in {self.source}, not once:\n{self.text}")
        return source.replace(self.text, self.replacement)


BUGS = (
    # ---- gemm_mma.cu
    Bug("mma-row-tail-read", "out-of-bounds global read", "gemm_mma",
        "row0 + row < from.rows && column0", "column0"),
    Bug("mma-row-tail-write", "out-of-bounds global write", "gemm_mma",
        "if (m0 + row < M && n0 + column < N)", "if (n0 + column < N)"),
    Bug("mma-shared-too-small", "out-of-bounds shared", "gemm_mma",
        "4 * kTileBytes + kTile * sizeof(float);", "4 * kTileBytes + kTile / 2 * sizeof(float);"),
    Bug("mma-bias-half-loaded", "read of unwritten shared memory", "gemm_mma",
        "if (threadIdx.x < kTile)\n", "if (threadIdx.x < kTile / 2)\n"),
    Bug("mma-no-barrier-after-wait", "race between warps: read after write", "gemm_mma",
        "__syncthreads();  // everyone's", "// everyone's"),
    Bug("mma-no-barrier-before-reuse", "race between warps: write after read", "gemm_mma",
        "__syncthreads();  // the next", "// the next"),
    Bug("mma-no-copy-wait", "missing wait for cp.async", "gemm_mma", "        cp_async_wait<1>();\n", ""),
    Bug("mma-copy-wait-one-short", "missing wait for cp.async", "gemm_mma",
        "cp_async_wait<1>();", "cp_async_wait<2>();"),
    Bug("mma-copies-past-the-end", "cp.async in flight at exit", "gemm_mma",
        "        if (step + 1 < steps)\n            load(step + 1);", "        load(step + 1);"),
    Bug("mma-misaligned-copy", "misaligned access", "gemm_mma",
        "const int64_t at = inside ? (row0 + row) * from.columns",
        "const int64_t at = inside ? (row0 + row) * (from.columns + 1)"),
    Bug("mma-ldmatrix-row", "wrong fragment", "gemm_mma",
        "warp_m + i * 16 + lane % 16", "warp_m + i * 16 + lane / 2"),
    Bug("mma-ldmatrix-not-transposed", "wrong fragment", "gemm_mma_transposed", "ldmatrix_x2_trans(", "ldmatrix_x2("),
    Bug("mma-accumulator-layout", "wrong fragment", "gemm_mma",
        "e / 2 * 8, column = warp_n + j * 8 + lane % 4 * 2 + e % 2",
        "e % 2 * 8, column = warp_n + j * 8 + lane % 4 * 2 + e / 2"),
    Bug("mma-swizzle-on-one-side", "wrong swizzle", "gemm_mma",
        "return tile + swizzle128(row * 128 + column * 2);", "return tile + row * 128 + column * 2;"),
    # ---- gemm_wgmma.cu
    Bug("ring-no-empty-wait", "ring without empty-wait", "gemm_wgmma_ss",
        "            mbarrier_wait(shared->empty + stage, (step / kStages - 1) % 2);", "            {}"),
    Bug("ring-empty-parity", "ring without empty-wait", "gemm_wgmma_ss",
        "mbarrier_wait(shared->empty + stage, (step / kStages - 1) % 2)",
        "mbarrier_wait(shared->empty + stage, step / kStages % 2)"),
    Bug("ring-no-full-wait", "full-wait skipped", "gemm_wgmma_ss",
        "            mbarrier_wait(shared->full + stage, step / kStages % 2);\n", ""),
    Bug("ring-bytes-without-tail", "wrong expected bytes", "gemm_wgmma_ss",
        "static_cast<uint32_t>(rows) * kRowBytes);", "kTile * kRowBytes);"),
    Bug("ring-bytes-without-codes", "wrong expected bytes", "gemm_wgmma_rs",
        "kTileBytes + static_cast<uint32_t>(rows) * kRowBytes);", "kTileBytes);"),
    Bug("ring-count-of-arrivals", "deadlock", "gemm_wgmma_ss",
        "mbarrier_init(shared->empty + stage, kConsumers)", "mbarrier_init(shared->empty + stage, kThreads)"),
    Bug("ring-no-barrier-after-init", "mbarrier used before its initialisation", "gemm_wgmma_ss",
        "        fence_mbarrier_init();\n    }\n    __syncthreads();", "        fence_mbarrier_init();\n    }"),
    Bug("wgmma-no-barrier-after-decode", "race between warps: read after write", "gemm_wgmma_ss",
        "            bar_sync(kConsumersMet, kConsumers);\n", ""),
    Bug("wgmma-barrier-count", "wrong barrier count", "gemm_wgmma_ss",
        "bar_sync(kConsumersMet, kConsumers);", "bar_sync(kConsumersMet, kThreads);"),
    Bug("wgmma-wait-one-short", "missing wait for wgmma", "gemm_wgmma_ss",
        "wgmma_wait<0>(sum);\n            mbarrier_arrive(shared->empty + stage);\n        }\n        const int lane",
        "wgmma_wait<1>(sum);\n            mbarrier_arrive(shared->empty + stage);\n        }\n        const int lane"),
    Bug("wgmma-tail-decoded", "read of unwritten shared memory", "gemm_wgmma_ss",
        "if (row < rows)\n", "if (row <= rows)\n"),
    Bug("wgmma-nibbles", "nibble order", "gemm_wgmma_ss",
        "decode_pair(word >> 4 & 15, word & 15)", "decode_pair(word & 15, word >> 4 & 15)"),
    Bug("wgmma-step-of-descriptor", "wrong fragment", "gemm_wgmma_ss",
        "wgmma_descriptor(decoded + k * 2)", "wgmma_descriptor(decoded + k)"),
    Bug("wgmma-register-order", "wrong fragment", "gemm_wgmma_rs",
        "const int r = row + i % 2 * 8;", "const int r = row + i / 2 * 8;"),
    # ---- splitk_flags.cu
    Bug("splitk-no-flag-wait", "missing wait for another block", "splitk_ordered",
        "    if (threadIdx.x == 0)\n        wait_acquire(flags + blockIdx.x, split);\n", ""),
    Bug("splitk-released-too-soon", "missing wait for another block", "splitk_ordered",
        "    __syncthreads();  // all have stored", "    // all have stored"),
    Bug("splitk-cycle", "deadlock", "splitk_ordered",
        "wait_acquire(flags + blockIdx.x, split);", "wait_acquire(flags + blockIdx.x, (split + 1) % splits);"),
    Bug("splitk-counted-too-soon", "race between blocks", "splitk_last_arriver",
        "= part;\n    __syncthreads();\n    if (threadIdx.x == 0)\n        *arrived",
        "= part;\n    if (threadIdx.x == 0)\n        *arrived"),
    Bug("splitk-workspace-tail", "read of unwritten global memory", "splitk_last_arriver",
        "    if (column < N)\n        workspace", "    if (column + 1 < N)\n        workspace"),
    # ---- reduce.cu
    Bug("reduce-lanes-leave", "shuffle after lanes left", "summary",
        "const int32_t v = inside ? x[i + lane] : 0;",
        "if (!inside)\n            return;\n        const int32_t v = x[i + lane];"),
    Bug("reduce-mask-of-absent", "wrong shuffle mask", "summary", "(1u << kWarps) - 1, kWarps)", "kAllLanes, kWarps)"),
    Bug("reduce-mask-without-caller", "wrong shuffle mask", "summary",
        "(1u << kWarps) - 1, kWarps)", "(1u << kWarps) - 2, kWarps)"),
    Bug("reduce-plain-add", "race between blocks", "summary",
        "atomicAdd(&summary->sum, mine.sum);", "summary->sum += mine.sum;"),
    Bug("reduce-plain-bins", "race between warps: read after write", "summary",
        "atomicAdd(bins + (v & (kBins - 1)), 1);", "bins[v & (kBins - 1)] += 1;"),
    Bug("reduce-barrier-in-branch", "divergent barrier", "summary",
        "    if (threadIdx.x < kBins)\n        bins[threadIdx.x] = 0;\n    __syncthreads();",
        "    if (threadIdx.x < kBins) {\n        bins[threadIdx.x] = 0;\n        __syncthreads();\n    }"),
    Bug("reduce-bin-not-cleared", "table entry never written", "summary",
        "if (threadIdx.x < kBins)\n", "if (threadIdx.x < kBins - 1)\n"),
    Bug("reduce-32-bit-share", "index overflow", "summary_many_blocks",
        "const int64_t begin = numel * blockIdx.x / gridDim.x, end = numel * (blockIdx.x + 1) / gridDim.x;",
        "const int count = static_cast<int>(numel), blocks = gridDim.x;\n"
        "    const int begin = count * int(blockIdx.x) / blocks, end = count * int(blockIdx.x + 1) / blocks;"),
    Bug("reverse-no-syncwarp", "race between lanes of a warp", "reverse",
        "        __syncwarp();\n        if (lane < length)\n            y[",
        "        if (lane < length)\n            y["),
    Bug("reverse-no-syncwarp-at-reuse", "race between lanes of a warp", "reverse",
        "= mine[length - 1 - lane];\n        __syncwarp();", "= mine[length - 1 - lane];"),
    Bug("handoff-count", "wrong barrier count", "handoff",
        "bar_arrive(kFull + b, kThreads);", "bar_arrive(kFull + b, kThreads + 32);"),
    Bug("handoff-no-empty-wait", "race between warps: write after read", "handoff",
        "            if (round >= 2)\n                bar_sync(kEmpty + b, kThreads);\n", ""),
    # ---- csrc/cuda/quantize.cu
    Bug("quantize-no-barrier-after-table", "race between warps: read after write", "quantize",
        "        tables->codes[i] = kRanks[quant_type].codes[i];\n    __syncthreads();",
        "        tables->codes[i] = kRanks[quant_type].codes[i];"),
    Bug("quantize-nibbles", "nibble order", "quantize",
        "static_cast<uint8_t>(high << 4 | low)", "static_cast<uint8_t>(low << 4 | high)"),
    Bug("quantize-short-block-as-long", "out-of-bounds global read", "quantize",
        "const int64_t end = first + p.blocksize < p.numel ? first + p.blocksize : p.numel;",
        "const int64_t end = first + p.blocksize;"),
    Bug("quantize-half-a-group", "wrong reduction", "quantize",
        "for (int apart = kGroup / 2; apart > 0;", "for (int apart = kGroup / 4; apart > 0;"),
    Bug("quantize-absmax-boundaries", "table entry never written", "quantize_absmax",
        "for (unsigned i = threadIdx.x; i < kDynamicCodes - 1; i += kThreads)",
        "for (unsigned i = threadIdx.x; i < kDynamicCodes - 2; i += kThreads)"),
    Bug("quantize-absmax-lane-left", "shuffle after lanes left", "quantize_absmax",
        "const float offset = *p.offset;", "if (first >= end)\n        return;\n    const float offset = *p.offset;"),
    # ---- csrc/cuda/dequantize.cu
    Bug("dequantize-no-barrier-after-table", "race between warps: read after write", "dequantize",
        "    __syncthreads();\n\n    const unsigned lane", "    const unsigned lane"),
    Bug("dequantize-odd-tail", "out-of-bounds global write", "dequantize", "        if (i + 1 < numel)\n", ""),
    Bug("dequantize-scale-of-idle-lane", "out-of-bounds global read", "dequantize",
        "(lane < last_block ? lane : last_block)", "(last_block > 0 ? lane : 0)"),
    Bug("dequantize-alignment-not-looked-at", "misaligned access", "dequantize_unaligned",
        "aligned(w.packed, sizeof(typename Wide<T>::Codes)) && aligned(p.out", "aligned(p.out"),
    Bug("dequantize-map-not-filled", "table entry never written", "dequantize",
        "        fill_map_copies(map);\n", "        (void)map;\n"),
    Bug("dequantize-nibbles", "nibble order", "dequantize",
        "__fmul_rn(book.value[codes >> 4], scale)", "__fmul_rn(book.value[codes & 15], scale)"),
    # ---- csrc/cuda/linear_fwd_small.cu
    Bug("small-fragment-bytes", "wrong fragment", "linear_fwd_small",
        "byte_selector(step % 2 * 2 + e / 2)", "byte_selector(step % 2 * 2 + e % 2)"),
    Bug("small-copy-wait-one-short", "missing wait for cp.async", "linear_fwd_small",
        "cp_async_wait<kBuffers - 1>();", "cp_async_wait<kBuffers>();"),
    Bug("small-row-tail", "out-of-bounds global read", "linear_fwd_small",
        "row = r < tile.rows ? r : tile.rows - 1;", "row = r;"),
    Bug("small-warps-not-added", "wrong reduction", "linear_fwd_small",
        "sum = turn == 0 ? total[m][t][e] : sum + total[m][t][e];", "sum = total[m][t][e];"),
    Bug("small-xa-released-too-soon", "missing wait for another block", "linear_fwd_small_resident",
        "    __syncthreads();  // all have stored before one says so\n", ""),
    Bug("small-xa-not-waited-for", "read of unwritten global memory", "linear_fwd_small_resident",
        "is_there = plan.slices > 0 && xa_is_there(*word);", "is_there = plan.slices > 0;"),
    Bug("small-no-barrier-before-copy", "race between warps: write after read", "linear_fwd_small",
        "__syncthreads();  // the copies overwrite this chunk", "// the copies overwrite this chunk"),
    Bug("small-map-read-too-soon", "read of unwritten shared memory", "linear_fwd_small",
        "bool needs_map() const { return nested_absmax && shift != kWords; }", "bool needs_map() const { return false; }"),
    Bug("small-claims-not-taken-back", "wrong reduction", "linear_fwd_small_resident",
        "add_relaxed(state, -(kThere + claims));", "add_relaxed(state, -(kThere + claims / 64));"),
    Bug("small-late-producers-not-counted", "race between blocks", "linear_fwd_small",
        "plan.tiles * kThere - plan.slices", "plan.tiles * kThere"),
    Bug("small-there-for-one-tile-less", "race between blocks", "linear_fwd_small",
        "plan.tiles * kThere - plan.slices", "(plan.tiles - 1) * kThere - plan.slices"),
    Bug("small-parts-one-short", "read of unwritten global memory", "linear_fwd_small",
        "comes_last(arrivals, split, word)", "comes_last(arrivals, split - 1, word)"),
    # ---- csrc/cuda/linear_fwd_mma.cu
    Bug("fwd-mma-no-barrier-in-loop", "race between warps: write after read", "linear_fwd_mma",
        "__syncthreads();  // this stage of x has come", "// this stage of x has come"),
    Bug("fwd-mma-wait-one-short", "missing wait for cp.async", "linear_fwd_mma",
        "cp_async_wait<0>();\n                __syncthreads();", "cp_async_wait<1>();\n                __syncthreads();"),
    Bug("fwd-mma-swizzle-of-second-half", "wrong swizzle", "linear_fwd_mma",
        "x + piece_at(g, 2 * c + 1)};", "x + piece_at(g, 2 * c) + kPiece};"),
    Bug("fwd-mma-register-order", "wrong fragment", "linear_fwd_mma",
        "a[i / 2][byte / 2][i % 2 + byte % 2 * 2]", "a[i / 2][byte % 2][i % 2 + byte / 2 * 2]"),
    Bug("fwd-mma-table-copies", "table entry never written", "linear_fwd_mma",
        "for (int i = 0; i < kHalf / kPiece; ++i)\n        *reinterpret_cast<uint4 *>(shared + byte",
        "for (int i = 0; i + 1 < kHalf / kPiece; ++i)\n        *reinterpret_cast<uint4 *>(shared + byte"),
    Bug("fwd-mma-absmax-past-the-end", "out-of-bounds global read", "linear_fwd_mma",
        "left > kStep ? kStep / kPieceWeights : 0;", "left > 0 ? kStep / kPieceWeights : 0;"),
    # ---- csrc/cuda/linear_fwd_wgmma.cu
    Bug("fwd-wgmma-byte-of-a-fragment", "wrong fragment", "linear_fwd_wgmma",
        "byte_selector(i / 2)", "byte_selector(i % 4)"),
    Bug("fwd-wgmma-no-empty-wait", "ring without empty-wait", "linear_fwd_wgmma",
        "    mbarrier_wait(shared->empty + stage_of(number), phase_of(number) ^ 1);\n", ""),
    Bug("fwd-wgmma-no-full-wait", "full-wait skipped", "linear_fwd_wgmma",
        "            mbarrier_wait(shared->full + at, phase_of(turn));\n", ""),
    Bug("fwd-wgmma-stage-freed-early", "missing wait for wgmma", "linear_fwd_wgmma",
        "wgmma_wait<1>(sum);  // the step before has read its stage", "wgmma_wait<2>(sum);"),
    Bug("fwd-wgmma-empty-count", "deadlock", "linear_fwd_wgmma",
        "mbarrier_init(shared->empty + stage, kConsumerWarps);",
        "mbarrier_init(shared->empty + stage, kConsumerWarps + 1);"),
    Bug("fwd-wgmma-last-part-lost", "wrong reduction", "linear_fwd_wgmma",
        "for (unsigned s = 0; s < gridDim.y; ++s)", "for (unsigned s = 0; s + 1 < gridDim.y; ++s)"),
    Bug("fwd-wgmma-any-part-sums", "race between blocks", "linear_fwd_wgmma",
        "if (!comes_last(p.counters + blockIdx.x, gridDim.y, &shared->arrived_before))",
        "if (blockIdx.y + 1 < gridDim.y)"),
    Bug("fwd-wgmma-token-tail-read", "out-of-bounds global read", "linear_fwd_wgmma",
        "i * kTokensApart < tokens);", "i < kTokens);"),
    Bug("fwd-wgmma-copy-wait-one-short", "missing wait for cp.async", "linear_fwd_wgmma",
        "        cp_async_wait<kLag>();", "        cp_async_wait<kLag + 1>();"),
    Bug("fwd-wgmma-bytes-of-a-lane", "wrong fragment", "linear_fwd_wgmma",
        "out[1] = __byte_perm(upper[0], upper[1], 0x7632);", "out[1] = __byte_perm(upper[1], upper[0], 0x7632);"),
    # ---- csrc/cuda/linear_bwd_mma.cu
    Bug("bwd-mma-no-barrier-in-loop", "race between warps: read after write", "linear_bwd_mma",
        "__syncthreads();                      // everyone's copies of this step", "// everyone's copies of this step"),
    Bug("bwd-mma-copy-wait-one-short", "missing wait for cp.async", "linear_bwd_mma",
        "cp_async_wait<P::kCodeStages - 2>();", "cp_async_wait<P::kCodeStages - 1>();"),
    Bug("bwd-mma-no-syncwarp", "race between lanes of a warp", "linear_bwd_mma",
        "        __syncwarp();  // the scales are there\n", ""),
    Bug("bwd-mma-row-tail-read", "out-of-bounds global read", "linear_bwd_mma",
        "row + pass < left);", "row != kNever);"),
    Bug("bwd-mma-nibbles", "nibble order", "linear_bwd_mma",
        "v[i] = make_float2(__fmul_rn(v[i].x, scale), __fmul_rn(v[i].y, scale));",
        "v[i] = make_float2(__fmul_rn(v[i].y, scale), __fmul_rn(v[i].x, scale));"),
    Bug("bwd-mma-part-left-out", "wrong reduction", "linear_bwd_mma",
        "for (unsigned i = 0; i < gridDim.z; ++i)", "for (unsigned i = 0; i + 1 < gridDim.z; ++i)"),
    # ---- csrc/cuda/linear_bwd_wgmma.cu
    Bug("bwd-wgmma-register-order", "wrong fragment", "linear_bwd_wgmma",
        "a[2 * i + 1] = round_pair<T>(w[2 * i].y, w[2 * i + 1].y);",
        "a[2 * i + 1] = round_pair<T>(w[2 * i + 1].y, w[2 * i].y);"),
    Bug("bwd-wgmma-no-empty-wait", "ring without empty-wait", "linear_bwd_wgmma",
        "        if (i >= kStages)\n            mbarrier_wait(shared->empty + turn.stage, turn.parity ^ 1);\n", ""),
    Bug("bwd-wgmma-wait-one-short", "missing wait for wgmma", "linear_bwd_wgmma",
        "wgmma_wait<1>(sum[tile]);", "wgmma_wait<3>(sum[tile]);"),
    Bug("bwd-wgmma-copy-wait-one-short", "missing wait for cp.async", "linear_bwd_wgmma",
        "            cp_async_wait<kLag>();", "            cp_async_wait<kLag + 1>();"),
    Bug("bwd-wgmma-swizzle-on-one-side", "wrong swizzle", "linear_bwd_wgmma",
        "tile + swizzle128(first * kRowBytes + piece * 16)", "tile + first * kRowBytes + piece * 16"),
    Bug("bwd-wgmma-full-count", "deadlock", "linear_bwd_wgmma",
        "mbarrier_init(shared->full + stage, kProducers / kLanes);",
        "mbarrier_init(shared->full + stage, kProducers / kLanes + 1);"),
    Bug("bwd-wgmma-bytes-of-a-lane", "wrong fragment", "linear_bwd_wgmma",
        "lane.source / 32 * 16);", "lane.source / 64 * 32);"),
    Bug("bwd-wgmma-row-beyond-the-member", "out-of-bounds global read", "linear_bwd_wgmma",
        "(row < step.rows ? row : step.rows - 1)", "row"),
    Bug("bwd-wgmma-tokens-write", "out-of-bounds global write", "linear_bwd_wgmma",
        "i < tokens * kPieces;", "i < (tokens > 0 ? Shape<kTiles>::kTokens : 0) * kPieces;"),
    Bug("bwd-wgmma-parts-counted-too-soon", "race between blocks", "linear_bwd_wgmma",
        "        consumers_meet();  // all have stored\n", ""),
    # ---- csrc/cuda/decode_group.cu
    Bug("decode-no-barrier-after-table", "race between warps: read after write", "decode_group",
        "    __syncthreads();\n\n    constexpr uint32_t kBlockStores", "    constexpr uint32_t kBlockStores"),
    Bug("decode-part-of-a-tile", "out-of-bounds global write", "decode_group",
        "if (kWhole || store < from.stores)\n", "if (kWhole || store < from.stores + kLanes)\n"),
    Bug("decode-scale-of-idle-lane", "out-of-bounds global read", "decode_group",
        "(lane < last_block ? lane : last_block)", "(last_block > 0 ? lane : 0)"),
    Bug("decode-gaps-of-rows", "race between blocks", "decode_group",
        "p.stores_of_row.quotient(store)", "p.stores_of_row.quotient(first)"),
    Bug("decode-row-of-the-group", "out-of-bounds global read", "decode_group",
        "(row - place.row0) * of.r + rank", "row * of.r + rank"),
    Bug("decode-zeros-below", "wrong reduction", "decode_group",
        "        if (of == p.count)\n            return Loaded{0, 1.0f};\n", "        of = of < p.count ? of : 0;\n"),
    # ---- csrc/cuda/lora_projections.cu
    Bug("lora-copy-wait-one-short", "missing wait for cp.async", "lora_xa",
        "cp_async_wait<kStages - 2>();\n        finish_source",
        "cp_async_wait<kStages - 1>();\n        finish_source"),
    Bug("lora-dy-ext-of-the-member", "race between blocks", "lora_dyb",
        "token * p.ld + place.row0 + n", "token * p.ld + n"),
    # ---- csrc/cuda/lora_gradients.cu
    Bug("lora-parts-not-met", "missing wait for another block", "lora_bwd",
        "if (!comes_last(gradient.counters + slot, gridDim.y, reinterpret_cast<uint32_t *>(shared)))",
        "if (blockIdx.y + 1 < gridDim.y)"),
    Bug("lora-dyb-slab", "wrong reduction", "lora_bwd",
        "(first + i, p.M * kRanks, slabs)", "(first + i, p.M * kRanks, slabs - 1)"),
    Bug("lora-dyb-counted-too-soon", "missing wait for another block", "lora_bwd",
        "summed = step - 2, counted = step - 1;", "summed = step - 2, counted = step;"),
    Bug("lora-not-transposed", "wrong fragment", "lora_bwd",
        "ldmatrix_x4_trans(a[i], source", "ldmatrix_x4(a[i], source"),
    Bug("lora-stride-of-dy", "out-of-bounds global read", "lora_bwd", "stride(member.ld_dy)", "stride(p_.N)"),
    Bug("lora-zeros-of-every-member", "race between blocks", "lora_bwd",
        "if (extends && of + 1 == p.count)", "if (extends)"),
    Bug("lora-A-read-too-soon", "race between warps: read after write", "lora_bwd",
        "            __syncthreads();\n#pragma unroll\n            for (int k = 0; k < kDxRanks; ++k)\n",
        "#pragma unroll\n            for (int k = 0; k < kDxRanks; ++k)\n"),
    Bug("lora-dx-over-x", "race between lanes of a warp", "lora_bwd", "__syncwarp();  // all have read their x\n", "\n"),
    Bug("lora-dx-stored-too-soon", "race between warps: read after write", "lora_bwd",
        "        __syncthreads();\n        store_dx(steps - 1);", "        store_dx(steps - 1);"),
    Bug("lora-dx-columns", "wrong fragment", "lora_bwd",
        "factor_of_dx[k][j + 1][0] = b[2]", "factor_of_dx[k][j + 1][0] = b[1]"),
    # ---- csrc/cuda/lora_dx.cu
    Bug("lora-dx-no-barrier", "race between warps: write after read", "lora_dx",
        "__syncthreads();  // the next ranks, or dx,", "// the next ranks, or dx,"),
    # ---- csrc/cuda/swiglu.cu
    Bug("swiglu-alignment-not-looked-at", "misaligned access", "swiglu_unaligned",
        "accesses < kMostDivided && aligned(p.gate_up, sizeof(uint4)) &&", "accesses < kMostDivided &&"),
    Bug("swiglu-one-access-more", "out-of-bounds global read", "swiglu",
        "static_cast<uint32_t>(accesses), static_cast", "static_cast<uint32_t>(accesses + 1), static_cast"),
    Bug("swiglu-slope", "wrong reduction", "swiglu",
        "__fmul_rn(gate, s.rest)", "__fmul_rn(gate, s.value)"),
    # ---- csrc/cuda/optim.cu
    Bug("optim-element-beyond-the-end", "out-of-bounds global read", "optim_adamw",
        "return place(i) < left; }", "return place(i) <= left; }"),
    Bug("optim-unit-taken-for-whole", "out-of-bounds global write", "optim_lion",
        "const bool full = left >= kStateBlock;", "const bool full = left > 0;"),
    Bug("optim-alignment-not-looked-at", "misaligned access", "optim_unaligned",
        "full && table.aligned && addresses % (kRun * sizeof(T)) == 0;", "full && table.aligned;"),
    Bug("optim-no-barrier-after-cells", "race between warps: read after write", "optim_adamw",
        "[i];\n    __syncthreads();\n}", "[i];\n}"),
    Bug("optim-cells-of-one-map", "table entry never written", "optim_adamw",
        "sizeof(uint4) << both;", "sizeof(uint4);"),
    Bug("optim-constants-read-too-soon", "race between lanes of a warp", "optim_adamw",
        "constants_of(table, tensor);\n            __syncwarp();", "constants_of(table, tensor);"),
    Bug("optim-absmax-stored-too-soon", "race between lanes of a warp", "optim_lion",
        "__syncwarp();  // all have read", ";  // all have read"),
    Bug("optim-absmax-of-half-a-warp", "wrong reduction", "optim_adamw",
        "apart = kLanes / 2; apart > 0", "apart = kLanes / 4; apart > 0"),
    Bug("optim-codes-beyond-the-end", "wrong reduction", "optim_adamw", "m[i] = share.has(i) ? m[i] : 0.0f;", ""),
    Bug("optim-map-of-the-first-state", "wrong fragment", "optim_adamw", "decode(cells[1], v_word", "decode(cells[0], v_word"),
    Bug("optim-one-word-for-two", "wrong fragment", "optim_lion",
        "stochastically_rounded(p[i + 1], word.y)", "stochastically_rounded(p[i + 1], word.x)"),
    Bug("optim-place-of-the-arenas", "index overflow", "optim_adamw",
        "index = int64_t{block} * kStateBlock;", "index = int64_t{block * kStateBlock};"),
    Bug("optim-constants-of-the-tensor-before", "wrong reduction", "optim_adamw",
        "tensor_end = table.first[tensor + 1];", "tensor_end = table.first[table.count];"),
    Bug("optim-range-of-the-thread-block", "race between blocks", "optim_adamw",
        "* block / gridDim.x);", "* block / gridDim.x + (block > 0 && block < gridDim.x ? blockIdx.x == 0 : 0));"),
    Bug("optim-flag-set-too-soon", "wrong reduction", "optim_check",
        "!comes_last(table.counters, gridDim.x, word))", "blockIdx.x + 1 < gridDim.x)"),
    Bug("optim-counter-left", "wrong reduction", "optim_check", "        table.counters[1] = 0;\n", ""),
    Bug("optim-counter-cleared-too-soon", "race between warps: write after read", "optim_check",
        "    __syncthreads();  // all have read it\n", ""),
)  # fmt: skip


@dataclass
class Found:
    """What each build said of one source: the messages of its runs, none where it is clean."""

    says: dict[str, list[str]] = field(default_factory=dict)

    @property
    def by(self) -> list[str]:
        return [variant for variant in build.VARIANTS if self.says.get(variant)]

    def of_its_kind(self, kind: str) -> bool:
        return any(re.search(KINDS[kind], message) for messages in self.says.values() for message in messages)


def try_out(case: str, planted: Bug | None = None) -> Found:
    """Runs a case under its builds, with a bug in its source or none."""
    source = build.ROOT / SOURCES[case] if planted is None else _write(planted)
    return Found({v: _run(build.library([source], v), v, case) for v in builds(case)})


def try_out_all(bugs: Iterable[Bug] = BUGS) -> dict[Bug, Found]:
    """Each bug with what was found of it, on two cores. Raises: ValueError before any is run, as `Bug.plant`."""
    bugs = tuple(bugs)
    for bug in bugs:
        bug.plant()
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(bugs, pool.map(lambda bug: try_out(bug.case, bug), bugs), strict=True))


def _write(bug: Bug) -> Path:
    """The source with the bug, beside links to what it includes; at a path that stays, which the build cache knows."""
    folder = Path(tempfile.gettempdir()) / f"nf4lora-planted-{os.getuid()}" / bug.name
    source = folder / "cuda" / bug.source.name
    source.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    for header in (h for kind in ("*.h", "*.cuh") for h in (*build.CSRC.glob(kind), *(build.CSRC / "cuda").glob(kind))):
        link = folder / header.relative_to(build.CSRC)
        if not link.is_symlink() or link.readlink() != header:
            link.unlink(missing_ok=True)
            link.symlink_to(header)
    text = bug.plant()
    if not source.exists() or source.read_text() != text:
        temporary = source.with_suffix(f".{os.getpid()}")
        temporary.write_text(text)
        temporary.rename(source)
    return source


def _run(library: Path, variant: str, case: str) -> list[str]:
    """What the runs of a case complain of; under a sanitizer one run, as its first report ends the process."""
    environment = dict(os.environ)
    if variant == "address":
        ubsan = subprocess.run(["g++", "-print-file-name=libubsan.so"], capture_output=True, text=True, check=True)
        preload = f"{build.libasan()} {Path(ubsan.stdout.strip()).resolve()}"
        environment |= {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0"}
    seeds = SEEDS[1:2] if variant == "address" else SEEDS
    command = [sys.executable, str(build.HERE / "driver.py"), str(library), case, *map(str, seeds)]
    environment.pop("PYTHONPATH", None)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return [f"no end within {TIMEOUT} s"]
    results = [json.loads(line) for line in done.stdout.split("\n") if line.startswith("{")]
    messages = [errors.resolve(r["error"], library) for r in results if r["error"]]
    messages += [f"wrong: {r['wrong']}" for r in results if r["wrong"]]
    if len(results) < len(seeds):
        report = re.search(r"runtime error: .*|ERROR: AddressSanitizer: .*", done.stderr)
        messages.append(report[0] if report else f"ended with {done.returncode}: {done.stderr[-500:]}")
    return messages


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("names", nargs="*", help="bugs; all if none is named")
    arguments.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(build.ROOT)}")
    given = arguments.parse_args()
    found = try_out_all([b for b in BUGS if not given.names or b.name in given.names])
    rows = [
        {"bug": b.name, "kind": b.kind, "file": str(b.source), **{v: v in f.by for v in builds(b.case)},
         "of_its_kind": f.of_its_kind(b.kind)}
        for b, f in found.items()
    ]  # fmt: skip
    for row, messages in zip(rows, found.values(), strict=True):
        marks = " ".join({True: "found", False: "  -  ", None: "     "}[row.get(v)] for v in build.VARIANTS)
        first = next((m for says in messages.says.values() for m in says), "NOT FOUND")
        print(f"{row['bug']:38} {marks}  {'' if row['of_its_kind'] else 'NOT OF ITS KIND '}{first[:150]}")
    if given.write:
        tried = {v: sum(v in row for row in rows) for v in build.VARIANTS}
        count = {v: sum(row.get(v, False) for row in rows) for v in build.VARIANTS}
        table = {"bugs": len(rows), "found": sum(bool(f.by) for f in found.values()), "tried_by": tried,
                 "found_by": count, "seeds": SEEDS}  # fmt: skip
        RESULTS.write_text(json.dumps({**table, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
