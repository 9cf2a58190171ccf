"""A copy with any mix of reads and writes: the ceiling of kernels that read more than they write, or less."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def copy_kernel(source, target, READS: tl.constexpr, WRITES: tl.constexpr, BLOCK: tl.constexpr):
    """A program reads READS blocks of int32 and writes their sum to WRITES blocks. Lengths are whole blocks."""
    pid = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    total = tl.load(source + pid * READS * BLOCK + offs)  # [BLOCK]
    for i in tl.static_range(1, READS):
        total += tl.load(source + (pid * READS + i) * BLOCK + offs)
    for i in tl.static_range(WRITES):
        tl.store(target + (pid * WRITES + i) * BLOCK + offs, total)


def copy_blocks(source: Tensor, target: Tensor, reads: int, writes: int, block: int, warps: int) -> Tensor:
    """source int32 [reads * n * block] -> target int32 [writes * n * block], which is returned."""
    copy_kernel[(source.numel() // (reads * block),)](source, target, reads, writes, block, num_warps=warps)
    return target
