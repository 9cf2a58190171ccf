"""The rows of the host kernels under pytest-benchmark: `pytest bench --benchmark-only`. Same cases, same gates.

For a quick look or a comparison of two commits (`--benchmark-autosave`, `--benchmark-compare`); the tables come from
`python -m bench.bench_quantize`, whose contenders take turns. NF4LORA_BENCH_SHAPE=96x64 makes the operands small.
"""

import os
from functools import cache

import pytest

from .bench_quantize import CASES, Format, Setting
from .files import COPY
from .harness import Case

SHAPE = tuple(map(int, os.environ.get("NF4LORA_BENCH_SHAPE", "4096x4096").split("x")))


@cache
def case(name: str) -> Case:
    return CASES[name](SHAPE, Format(), Setting())


@pytest.mark.parametrize("contender", ["nf4lora", "bitsandbytes", COPY])
@pytest.mark.parametrize("name", list(CASES))
def test_row(benchmark, name, contender):
    found = case(name).contenders.get(contender)
    if found is None and contender == "bitsandbytes":
        pytest.skip("bitsandbytes is not installed")
    with found.forced():
        result = found.calls[0]()
        if found.ours:
            case(name).gate(result)
        benchmark.group = f"{name} {SHAPE}"
        benchmark(found.calls[0])
