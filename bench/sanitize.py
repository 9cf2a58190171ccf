"""A few ops on small, odd shapes, for compute-sanitizer: `compute-sanitizer --tool memcheck python -m bench.sanitize`.

Operands are made and results compared on the host, so that nearly every kernel it watches is one of ours. Arguments:
the back ends, by default all that run here. A later part adds its op to OPS.
"""

import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from nf4lora import backends, ops
from nf4lora.cases import exact_case

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = ((1,), (63,), (4097,), (70, 33), (130, 256))


def quantize_dequantize(device: str) -> Iterator[tuple[Tensor, ...]]:
    """Every dtype and type in blocks of 64, and the other sizes of blocks; double quantization of each."""
    settings = [(dtype, quant_type, 64) for dtype in DTYPES for quant_type in ("nf4", "fp4")]
    settings += [(torch.bfloat16, "nf4", 32), (torch.bfloat16, "nf4", 4096)]
    for dtype, quant_type, blocksize in settings:
        for shape in SHAPES:
            a = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
            packed, absmax = ops.quantize(a.to(device), blocksize, quant_type)
            offset = absmax.cpu().mean().to(device)
            codes, nested = ops.quantize_absmax(absmax, offset)
            plain = ops.dequantize(packed, absmax, None, None, list(shape), blocksize, quant_type, dtype)
            double = ops.dequantize(packed, codes, nested, offset, list(shape), blocksize, quant_type, dtype)
            yield packed, absmax, codes, nested, plain, double


def linears(device: str) -> Iterator[tuple[Tensor, ...]]:
    """Forward and backward on each path, with tails; operands for which every order of summation is exact."""
    backend = backends.forced()
    for path in ("tiled", "dense") if backend == "triton" else ("small", "mma", "wgmma", "dense"):
        if path == "wgmma" and device == "cuda" and torch.cuda.get_device_capability()[0] != 9:
            continue
        for M, N, K, r in ((3, 97, 128, 5), (70, 130, 192, 17)):  # where dense rounds once too
            case = exact_case(M, N, K, r, torch.bfloat16, nested=True, device=device)
            state = case.state
            weight = case.packed, state.absmax, state.nested_absmax, state.offset.reshape(1)
            with backends.use_backend(backend, path):
                y, xa = ops.linear_fwd(case.x, *weight, case.bias, case.lora_A, case.lora_B, None, N, 64, "nf4", case.scaling, 0.0)
                lora = ops.lora_bwd(case.dy, case.x, xa, case.lora_A, case.lora_B, None, case.scaling, 0.0, True, True)
                dx = ops.linear_bwd(case.dy, *weight, case.lora_A, lora[0], None, K, 64, "nf4", 0.0)
            yield y, xa, *lora, dx


OPS: tuple[Callable[[str], Iterator[tuple[Tensor, ...]]], ...] = (quantize_dequantize, linears)


def check(backend: str, device: str) -> tuple[int, int]:
    """Runs OPS there and on the host's reference; how many results there were, and how many have other bytes."""
    results = wrong = 0
    for op in OPS:
        with backends.use_backend("reference"):
            wanted = list(op("cpu"))
        with backends.use_backend(backend):
            found = list(op(device))
        for a, b in zip(found, wanted, strict=True):
            results += len(a)
            wrong += sum(not torch.equal(_bytes(x), _bytes(y)) for x, y in zip(a, b, strict=True))
    return results, wrong


def main(names: Sequence[str]) -> int:
    ready = {b: why_not for d, b, why_not in backends.report() if d == "cuda" and b != "reference"}
    failed = 0
    for backend in names or ready:
        if why_not := ready[backend]:
            print(f"{backend}: absent: {why_not}")
            failed += bool(names)
            continue
        results, wrong = check(backend, "cuda")
        failed += wrong
        print(f"{backend}: {results} results, {wrong} of them with other bytes than the reference's", flush=True)
    return 1 if failed else 0


def _bytes(t: Tensor) -> Tensor:
    return t.cpu().contiguous().reshape(-1).view(torch.uint8)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
