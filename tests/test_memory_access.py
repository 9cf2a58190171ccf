"""How the CUDA kernels touch memory, as the checker of the host machine counts it: sectors and bank wavefronts over the ideal."""

from typing import NamedTuple

import pytest
import torch
from cuda_on_host import backend, errors

from nf4lora import backends, ops

NUMEL = 1 << 16  # whole tiles of every kernel
MOST = 1.05

pytestmark = pytest.mark.usefixtures("one_thread")


class Site(NamedTuple):
    """One line of `cuda_on_host_profile`."""

    where: str
    memory: str
    access: str
    count: int
    ratio: float


@pytest.fixture(scope="module")
def machine():
    checker = backend.machine("checker")
    checker.enter()
    return checker


def sites(machine, call):
    with backends.use_backend(machine.backend):
        result = call()
    lines = errors.resolve(machine.load()[0].cuda_on_host_profile().decode(), machine.path()).splitlines()
    found = [Site(where, memory, access, int(count), float(ratio)) for where, memory, access, count, ratio in map(str.split, lines)]
    assert {(s.memory, s.access) for s in found} >= {("global", "load"), ("global", "store")}
    return found, result


def assert_efficient(found, per_weight=True):
    assert not [s for s in found if s.memory == "global" and s.ratio > MOST]
    hot = [s for s in found if s.memory == "shared" and s.count * 32 >= NUMEL]  # an access a weight
    assert bool(hot) == per_weight and not [s for s in hot if s.ratio > MOST], hot


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 64, 256, 4096])
def test_no_sector_is_moved_twice_and_no_table_has_conflicts(machine, blocksize, quant_type, dtype):
    a = torch.randn(NUMEL, generator=torch.Generator().manual_seed(0)).to(dtype)
    found, (packed, absmax) = sites(machine, lambda: ops.quantize(a, blocksize, quant_type))
    assert_efficient(found)
    offset = absmax.mean()
    found, (codes, nested) = sites(machine, lambda: ops.quantize_absmax(absmax, offset))
    assert_efficient(found, per_weight=False)
    for statistics in ((absmax, None, None), (codes, nested, offset)):
        found, _ = sites(machine, lambda: ops.dequantize(packed, *statistics, [NUMEL], blocksize, quant_type, dtype))
        assert_efficient(found)
