"""Shapes in, launch parameters out: pure functions of integers. Kernels take what is chosen here and never choose."""

from dataclasses import dataclass, replace
from enum import IntEnum

# Of a call's tiles, or each of many threads'. Few tokens take 2 MiB beside them, more 4 MiB or 192 rows of x or all dy.
SCRATCH_BYTES, THREAD_BYTES = 4 << 20, 128 << 10


class LinearPath(IntEnum):
    """Of the host, as in csrc/params.h. ROWS takes few tokens past a few rows of W at a time, PANELS decodes a tile for a block of tokens."""

    ROWS = 0
    PANELS = 1


@dataclass(frozen=True)
class LinearConfig:
    """How a product with the 4-bit weight is cut into tiles.

    block_m, block_n: rows and columns of the output a tile covers; block_k: reduction steps decoded at a time, twice as
    many where bfloat16 is multiplied as such, a multiple of 64. Only block_k, and on the ROWS path alone, changes a last bit.
    """

    path: LinearPath
    block_m: int
    block_n: int
    block_k: int
    threads: int = 1

    @property
    def scratch_bytes(self) -> int:
        """Of tiles (csrc/cpu/gemm.h, dots.h, few.h), for the widest instruction set."""
        m, n, k = -(-self.block_m // 48) * 48, -(-self.block_n // 32) * 32, self.block_k
        floats = m * n + m * (min(k, 64) + 16) + n * k + max(32 * k, m, n)
        if self.path == LinearPath.ROWS:
            m = -(-self.block_m // 16) * 16
            floats = max(m * n + m * (k + 16) + max(k, n), 17 * m * n + 65 * n + 3 * 1024)
        return 4 * floats * self.threads


class CudaPath(IntEnum):
    """As in csrc/params.h: SMALL streams the codes once, MMA and WGMMA are tiled products, DENSE decodes to memory first."""

    SMALL = 0
    MMA = 1
    WGMMA = 2
    DENSE = 3


# What `backends.use_backend(name, path)` takes: those of the host, those of CUDA (Triton has TILED and DENSE).
PATHS = (*(p.name.lower() for p in LinearPath), *(p.name.lower() for p in CudaPath), "tiled")


@dataclass(frozen=True)
class CudaLinearConfig:
    """How a CUDA product is cut: tokens of M and rows of W (backward: its columns) a tile covers, parts of the reduction."""

    path: CudaPath
    tokens: int = 0
    rows: int = 0
    split: int = 1


ROWS, PANELS = LinearPath.ROWS, LinearPath.PANELS
# (largest M, config); source: calculated, many tokens measured (bench/results/cpu_isas.json).
_CPU_FEW_BF16 = (32, LinearConfig(ROWS, 32, 64, 1024))
_CPU_FORWARD = ((8, LinearConfig(ROWS, 8, 96, 1024)), (2**63, LinearConfig(PANELS, 528, 128, 512)))
_CPU_BACKWARD = ((8, LinearConfig(PANELS, 48, 1024, 128)), (2**63, LinearConfig(PANELS, 528, 512, 256)))
_CPU_LORA_BACKWARD = ((2**63, LinearConfig(PANELS, 240, 256, 128)),)
# Thread blocks resident on a multiprocessor (2048 threads, 256 to a block), and weights a block takes at a time, as in
# csrc/cuda/quantize.cu and dequantize.cu; source: calculated.
CUDA_BLOCKS_PER_SM = 8
CUDA_DECODE_BLOCKS_PER_SM = 5  # 48 registers a thread: csrc/cuda/decode_group.cu
CUDA_QUANTIZE_TILE = 2048
CUDA_DEQUANTIZE_TILE = 8192


def cuda_quantize(numel: int, multiprocessors: int) -> int:
    """Thread blocks to quantize numel weights: those that fit the device at once, but none without work."""
    return max(1, min(-(-numel // CUDA_QUANTIZE_TILE), CUDA_BLOCKS_PER_SM * multiprocessors))


def cuda_dequantize(numel: int, multiprocessors: int, resident: int = CUDA_BLOCKS_PER_SM) -> int:
    """Thread blocks to dequantize numel weights: those that fit the device at once, but none without work."""
    return max(1, min(-(-numel // CUDA_DEQUANTIZE_TILE), resident * multiprocessors))


# From so many tokens on, decoding the weight to memory and the library's product are faster; source: calculated.
CUDA_DENSE_TOKENS = 1024
CUDA_SMALL_TOKENS = 64


def cuda_paths(M: int, hopper: bool) -> tuple[CudaPath, ...]:
    """The paths for M tokens, best first; DENSE, the last, takes every operand."""
    if M <= CUDA_SMALL_TOKENS:
        return CudaPath.SMALL, CudaPath.DENSE
    tiled = CudaPath.WGMMA if hopper else CudaPath.MMA
    return (tiled, CudaPath.DENSE) if M < CUDA_DENSE_TOKENS else (CudaPath.DENSE,)


# (largest M, tokens and rows of a tile, resident blocks) by path, as csrc/cuda/linear_*.cu have them; source: calculated.
_FORWARD = {
    CudaPath.SMALL: ((8, 8, 128, 2), (16, 16, 128, 2), (32, 32, 128, 1), (2**63, 64, 128, 1)),
    CudaPath.MMA: ((64, 64, 256, 1), (2**63, 128, 128, 1)),
    CudaPath.WGMMA: ((128, 128, 128, 1), (2**63, 256, 128, 1)),
}
_SMALL_BACKWARD = ((16, 16, 128, 2), (32, 32, 256, 2), (2**63, 64, 256, 1))
_BACKWARD = {
    CudaPath.SMALL: _SMALL_BACKWARD,
    CudaPath.MMA: _SMALL_BACKWARD,
    CudaPath.WGMMA: ((128, 128, 256, 1), (2**63, 256, 128, 1)),
}


def cuda_linear_fwd(path: CudaPath, M: int, N: int, K: int, multiprocessors: int) -> CudaLinearConfig:
    """Tiles of the forward on a path."""
    return _tiled(_FORWARD, path, M, N, K, multiprocessors)


def cuda_linear_bwd(path: CudaPath, M: int, N: int, K: int, multiprocessors: int) -> CudaLinearConfig:
    """Tiles of dx on a path."""
    return _tiled(_BACKWARD, path, M, K, N, multiprocessors)


def _tiled(table: dict, path: CudaPath, M: int, across: int, along: int, multiprocessors: int) -> CudaLinearConfig:
    """The table's tile for M tokens; parts of the sum over `along` so that tiles of M x `across` keep the device busy."""
    if path == CudaPath.DENSE:
        return CudaLinearConfig(path, split=cuda_dequantize(across * along, multiprocessors, CUDA_DECODE_BLOCKS_PER_SM))
    _, tokens, rows, resident = next(row for row in table[path] if M <= row[0])
    return CudaLinearConfig(path, tokens, rows, _split(-(-M // tokens) * -(-across // rows), along // 64, resident * multiprocessors))


def cuda_extend_fwd(N: int, K: int) -> bool:
    """Whether DENSE extends x by xa and W by B: one more write of x costs less than reading and writing y again."""
    return K < 2 * N


def cuda_extend_bwd(N: int, K: int) -> bool:
    """The same for dx: one more write of dy, by the launch that reads it, against writing and reading dx once more."""
    return N < 2 * K


def cuda_lora_bwd(M: int, N: int, multiprocessors: int) -> int:
    """Parts of the sums over M tokens of the two LoRA gradients. Source: calculated."""
    return max(1, min(-(-M // 256), -(-2 * multiprocessors * 128 // max(N, 1))))


def cuda_swiglu(numel: int, multiprocessors: int) -> int:
    """Thread blocks for numel outputs, 8 a thread and 256 threads a block. Source: calculated."""
    return max(1, min(-(-numel // 2048), CUDA_BLOCKS_PER_SM * multiprocessors))


def cuda_optim(numel: int, multiprocessors: int) -> int:
    """Thread blocks to step numel parameters, 2048 a block at a time; 4 of 64 registers a thread fit. Source: calculated."""
    return max(1, min(-(-numel // 2048), 4 * multiprocessors))


def _split(tiles: int, steps: int, multiprocessors: int) -> int:
    """Parts of a sum of `steps` so that `tiles` tiles of the output keep that many multiprocessors busy; at most 16."""
    return max(1, min(multiprocessors // max(tiles, 1), steps // 4, 16))


def cpu_linear_fwd(M: int, threads: int, bf16: bool = False) -> LinearConfig:
    """Tiles of the host's forward for M tokens, in bfloat16 or not."""
    return _fitted((_CPU_FEW_BF16,) * bf16 + _CPU_FORWARD, M, threads)


def cpu_linear_bwd(M: int, threads: int) -> LinearConfig:
    """Tiles of the host's dx for M tokens."""
    return _fitted(_CPU_BACKWARD, M, threads)


def cpu_lora_bwd(M: int, threads: int) -> LinearConfig:
    """Tiles of the host's products for the two LoRA gradients; only one of each has M rows or columns."""
    return _fitted(_CPU_LORA_BACKWARD, M, threads)


def on_path(config: LinearConfig, path: str | None) -> LinearConfig:
    """The config with the host's path of that name, if it is one of them."""
    block_k = 1024 if path == "rows" else config.block_k  # which threads must not change there
    return next((_fit(replace(config, path=p, block_k=block_k)) for p in LinearPath if p.name.lower() == path), config)


def _fitted(rows: tuple[tuple[int, LinearConfig], ...], M: int, threads: int) -> LinearConfig:
    return _fit(replace(next(config for most, config in rows if M <= most), threads=threads))


def _fit(config: LinearConfig) -> LinearConfig:
    """With smaller tiles, until the scratch fits: none of it changes a bit of the result."""
    most = max(SCRATCH_BYTES, THREAD_BYTES * config.threads)
    while config.scratch_bytes > most and (config.block_n > 32 or config.block_m > 48):
        k = config.block_k
        if config.path == PANELS and k > max(2 * config.block_n, 128):
            config = replace(config, block_k=k // 2)
        elif config.block_n > 32:
            config = replace(config, block_n=config.block_n // 2)
        else:
            config = replace(config, block_m=config.block_m // 2)
    return config
