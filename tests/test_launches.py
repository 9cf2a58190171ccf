"""How many launches a call of a layer takes, and that the published table is of these kernels."""

import json

import pytest
from cuda_on_host import backend, launches  # which finds bench

from bench import codegen
from nf4lora import heuristics

MOST = {"forward": 3, "backward": 4}


@pytest.fixture(scope="module")
def counted():
    return launches.of_calls(backend.machine("checker"))


@pytest.mark.parametrize("path", launches.TOKENS)
@pytest.mark.parametrize("call", launches.CALLS)
def test_a_layer_takes_few_launches(counted, call, path, figures):
    """Memsets and torch's own among them. Where x is much wider than y, extending it would cost more than one launch more."""
    made = counted[call][path]
    most = next(n for how, n in MOST.items() if call.startswith(how)) + (path == "dense" and "K at least 2 N" in call)
    assert 1 <= len(made) <= most, made
    figures[f"launches of a {call}, at most"] = max(figures.get(f"launches of a {call}, at most", 0), len(made))


def test_nothing_is_copied_on_the_way(counted):
    """Neither x nor dy is copied or put together by torch, on any path."""
    torch_ops = {name for paths in counted.values() for made in paths.values() for name in made if name.startswith("torch ")}
    assert torch_ops <= {"torch mm", "torch addmm_"}


def test_the_published_table_is_of_these_kernels(counted):
    published = json.loads(launches.RESULTS.read_text())
    assert published["calls"] == counted
    assert published["kernels"] == launches.kernels(backend.machine("checker"))


def test_occupancy():
    """Of sm_90's 65,536 registers, 64 warps and 228 KiB of shared memory, by hand."""
    assert codegen.resident_blocks("sm_90a", 32, 256, 0) == 8  # warps
    assert codegen.resident_blocks("sm_90a", 128, 256, 68 << 10) == 2  # registers
    assert codegen.resident_blocks("sm_90a", 40, 256, 75 << 10) == 3  # shared memory, of which each block's first KiB is taken
    assert codegen.resident_blocks("sm_90a", 40, 256, 76 << 10) == 2
    assert codegen.resident_blocks("sm_86", 16, 32, 0) == 16  # blocks


def test_as_many_blocks_are_resident_as_the_tables_say():
    """The splits of `heuristics` count on them."""
    rows = {(row.kernel, row.arch): row.resident_blocks for row in codegen.committed()}
    names = (
        (heuristics._FORWARD, "SMALL", "small_kernel<__nv_bfloat16, {0}"), (heuristics._FORWARD, "WGMMA", "linear_fwd_kernel<__nv_bfloat16, {0}>"),
        (heuristics._BACKWARD, "MMA", "dx_kernel<__nv_bfloat16, Plan<{0}>"),
    )  # fmt: skip
    for table, path, name in names:
        for _, tokens, _, resident in table[heuristics.CudaPath[path]]:
            found = [n for (kernel, arch), n in rows.items() if arch == "sm_90a" and n and kernel.startswith(name.format(tokens))]
            assert found and min(found) >= resident, (path, tokens, found)
