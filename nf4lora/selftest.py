"""`python -m nf4lora.selftest [BACKEND …]`: are the kernels right on this machine? Seconds; core dependencies only.

Every back end that can run here (or those named), on every kind of device it serves: the bytes of quantize and dequantize against the
reference, exact cases (T1) and the error ratio (T2) of `nf4lora.testing`. Prints a table; exit status 1 on a failure.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from . import backends, native, ops, reference
from .codebook import BLOCKSIZES, QUANT_TYPES
from .testing import assert_exact, check_error_ratio, check_exact, exact_case, random_case

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# M, N, K: one token, tails in every direction, more than one tile of each kernel
EXACT_SHAPES = ((0, 5, 7), (1, 1, 1), (1, 130, 129), (3, 17, 64), (8, 64, 33), (9, 66, 130), (33, 127, 65), (130, 97, 258))
RATIO_SHAPES = ((1, 512, 1000), (17, 333, 512), (257, 300, 500))


def quantize_bytes(dtype: torch.dtype, device: str) -> int:
    """Codes, absmax and 8-bit absmax equal to the reference's; returns how many elements were compared."""
    g = torch.Generator().manual_seed(0)
    count = 0
    for quant_type in QUANT_TYPES:
        for blocksize in BLOCKSIZES:
            for numel in (1, 255, 40_001):
                a = (torch.randn(numel, generator=g) * 10.0 ** float(torch.randint(-3, 3, (), generator=g))).to(device, dtype)
                found, wanted = ops.quantize(a, blocksize, quant_type), reference.quantize(a, blocksize, quant_type)
                offset = wanted[1].mean()
                found += ops.quantize_absmax(wanted[1], offset)
                wanted += reference.quantize_absmax(wanted[1], offset)
                for name, f, w in zip(("packed", "absmax", "codes", "nested_absmax"), found, wanted, strict=True):
                    assert_exact(f, w, f"{name} of {numel} elements, {quant_type}, blocksize {blocksize}")
                count += numel
    return count


def dequantize_bytes(dtype: torch.dtype, device: str) -> int:
    """Every byte under a range of scales equal to the reference; returns how many elements were compared."""
    scales = torch.tensor([0.0, 1e-40, 1e-30, 3e-5, 0.017, 1 / 3, 1.0, 7.7, 60000.0, 1e30], device=device)
    packed = torch.arange(256, device=device).to(torch.uint8).repeat(len(scales)).unsqueeze(1)
    count = 0
    for quant_type in QUANT_TYPES:
        for blocksize, absmax in ((512, scales), (32, scales.repeat_interleave(16))):
            args = packed, absmax, None, None, [2 * len(packed)], blocksize, quant_type, dtype
            assert_exact(ops.dequantize(*args), reference.dequantize(*args), f"{quant_type}, blocksize {blocksize}")
            count += 2 * len(packed)
    return count


def exact_cases(dtype: torch.dtype, device: str) -> int:
    """T1 over small shapes; returns how many cases passed."""
    count = 0
    for M, N, K in EXACT_SHAPES:
        for i, blocksize in enumerate((32, 64, 256)):
            check_exact(exact_case(
                M, N, K, r=(0, 3, 16)[i], dtype=dtype, bias=i > 0, blocksize=blocksize, quant_type=QUANT_TYPES[i % 2],
                nested=i == 2, dropout_p=0.5 * (i == 1), seed=count, device=device,
            ))  # fmt: skip
            count += 1
    return count


def error_ratio(dtype: torch.dtype, device: str) -> int:
    """T2 over shapes of a small model; returns how many cases passed."""
    for i, (M, N, K) in enumerate(RATIO_SHAPES):
        check_error_ratio(random_case(M, N, K, r=16, dtype=dtype, dropout_p=0.1 * (i == 1), seed=i, device=device))
    return len(RATIO_SHAPES)


FORMAT, PRODUCT = ("quantize", "quantize_absmax", "dequantize"), ("linear_fwd", "linear_bwd", "lora_bwd")
# What is checked, whether on one thread (for small checks the second one would only wait), and the ops it takes
CHECKS: dict[str, tuple[Callable[[torch.dtype, str], int], bool, tuple[str, ...]]] = {
    "quantize bytes": (quantize_bytes, False, FORMAT),
    "dequantize bytes": (dequantize_bytes, False, FORMAT),
    "T1 exact cases": (exact_cases, False, PRODUCT),
    "T2 error ratio": (error_ratio, True, PRODUCT),
}


def run(names: Sequence[str]) -> Iterator[tuple[str, str, str, str, str | None]]:
    """Yields device, back end, dtype, what was checked, and the failure or None.

    A back end may be absent, except the host library, which every installation has.
    """
    threads = torch.get_num_threads()
    for device, backend, why_not in backends.report():
        if backend not in names:
            continue
        if why_not:
            yield device, backend, "", f"absent: {why_not}", "wanted in every installation" if backend == "cpu" else None
            continue
        for dtype in DTYPES:
            for name, (check, threaded, needed) in CHECKS.items():
                if missing := [op for op in needed if not backends.has(op, backend)]:
                    yield device, backend, "", f"{name}: no kernels yet for {', '.join(missing)}", None
                    continue
                torch.set_num_threads(threads if threaded else 1)
                try:
                    with backends.use_backend(backend):
                        checked = f"{name}: {check(dtype, device):,}"
                    failure = None
                except (AssertionError, RuntimeError) as error:
                    checked, failure = name, str(error)
                finally:
                    torch.set_num_threads(threads)
                yield device, backend, str(dtype).removeprefix("torch."), checked, failure


def main(names: Sequence[str]) -> int:
    if unknown := set(names) - set(backends.names()):
        print(f"no such back end: {sorted(unknown)}; wanted some of {backends.names()}", file=sys.stderr)
        return 2
    start, failures = time.perf_counter(), 0
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, host kernels: {native.host.isa() or 'absent'}")
    for device, backend, dtype, checked, failure in run(names or backends.names()):
        failures += failure is not None
        verdict = "FAILED" if failure else "ok" if dtype else ""
        print(f"{device:5} {backend:10} {dtype:9} {verdict:7} {checked}{': ' + failure if failure else ''}", flush=True)
    print(f"{failures} failed, {time.perf_counter() - start:.1f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
