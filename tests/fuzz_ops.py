"""F3: ops with random operands, right and wrong ones, on the CUDA kernels under AddressSanitizer, against the reference.

An op either raises one of the errors it documents, or gives what the reference gives; operands are exact (nf4lora.cases),
so both give the same bits. Anything else, a sanitizer's report above all, is a finding. From the folder of the tests:

    LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so.6)" ASAN_OPTIONS=detect_leaks=0 python -m fuzz_ops --seconds 60 --first 0

A case is its seed: `--first SEED --count 1` runs one again. Seeds in CORPUS run first, always.
"""

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from cuda_on_host import backend
from torch import Tensor

from nf4lora import backends, heuristics, ops, reference
from nf4lora.cases import exact_case

# Seeds that once found something.
CORPUS: tuple[int, ...] = ()
ERRORS = (ValueError, TypeError, NotImplementedError)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PATHS = (None, "small", "mma", "wgmma", "dense")


def valid(draw: random.Random) -> tuple[str, list[Any], bool]:
    """An op, arguments it takes, and whether its result is rounded once, so that it is the reference's to the bit."""
    products = ["linear_fwd", "linear_bwd", "lora_bwd", "linear_grads", "group_fwd", "group_bwd", "group_lora_bwd", "group_grads"]
    name = draw.choice(["quantize", "quantize_absmax", "dequantize", "swiglu_fwd", "swiglu_bwd", *3 * products])
    M, N = draw.choice([0, 1, 2, 7, 8, 9, 17, draw.randint(0, 80)]), draw.choice([1, 2, 15, 16, 17, 33, draw.randint(1, 80)])
    K, r = draw.choice([64, 64, 128, 192, 256, draw.randint(1, 130)]), draw.choice([0, 1, 2, 3, 8, 16, 17])
    if "lora" in name:
        r = max(r, 1)
    dtype, adapter, nested = draw.choice(FLOATS), draw.choice(FLOATS), draw.random() < 0.5
    blocksize, quant_type, p = draw.choice([32, 64, 64, 128, 256, 4096]), draw.choice(["nf4", "nf4", "fp4"]), draw.choice([0.0, 0.0, 0.5])
    count = draw.randint(1, 3) if name.startswith("group") else 1
    cases = [
        exact_case(M, N + 3 * i, K, r, dtype, adapter, bias=draw.random() < 0.5 if i == 0 else True, blocksize=blocksize,
                   quant_type=quant_type, nested=nested, seed=draw.randrange(2**31))
        for i in range(count)
    ]  # fmt: skip
    case, has_bias = cases[0], cases[0].bias is not None
    seed = case.seed if p else None
    weights = [[getattr(c, n) if n == "packed" else getattr(c.state, n) for c in cases] for n in ("packed", "absmax", "nested_absmax", "offset")]
    bias, A, B = ([c.bias if has_bias else None for c in cases], [c.lora_A for c in cases], [c.lora_B for c in cases])
    dy = torch.cat([c.dy for c in cases], 1)
    scaling, rows = [c.scaling for c in cases], [c.state.shape[0] for c in cases]
    xa = dyb = None
    if r:
        side = [reference.lora_bwd(c.dy, case.x, case.x[:, :0], c.lora_A, c.lora_B, None, c.scaling, 0.0, False, False)[0] for c in cases]
        dyb = torch.cat(side, 1)
        xa = torch.cat([(case.x.float() @ c.lora_A.float().T).to(dtype) for c in cases], 1)
    need = draw.random() < 0.8, draw.random() < 0.8
    grads = draw.random() < 0.8, *(r > 0 and n for n in need)
    dys = [dy] if draw.random() < 0.5 else [c.dy for c in cases]
    one = name.startswith(("linear", "lora"))
    listed = [column[0] if one else [t for t in column if t is not None] for column in (*weights, bias, A, B)]
    args = {
        "quantize": lambda: [case.x, blocksize, quant_type],
        "quantize_absmax": lambda: [torch.rand(draw.randint(0, 700)), torch.rand(())],
        "dequantize": lambda: [*(column[0] for column in weights), list(case.state.shape), blocksize, quant_type, dtype],
        "swiglu_fwd": lambda: [case.x[:, : K // 2 * 2].contiguous() / 8],
        "swiglu_bwd": lambda: [case.x[:, : K // 2 * 2].contiguous() / 8, case.x[:, : K // 2].contiguous()],
        "linear_fwd": lambda: [case.x, *listed, seed, N, blocksize, quant_type, scaling[0], p],
        "linear_bwd": lambda: [dy, *listed[:4], listed[5], dyb, seed, K, blocksize, quant_type, p],
        "lora_bwd": lambda: [dy, case.x, xa, *listed[5:], seed, scaling[0], p, *need],
        "linear_grads": lambda: [dy, case.x, xa, *listed[:4], *listed[5:], seed, K, blocksize, quant_type, scaling[0], p, *grads],
        "group_grads": lambda: [
            dys, case.x, xa, *listed[:4], *listed[5:], seed, rows, K, blocksize, quant_type, scaling, p, *grads,
        ],
        "group_fwd": lambda: [case.x, *listed, seed, rows, blocksize, quant_type, scaling, p],
        "group_bwd": lambda: [dy, *listed[:4], listed[5], dyb, seed, rows, K, blocksize, quant_type, p],
        "group_lora_bwd": lambda: [dy, case.x, xa, *listed[5:], seed, scaling, p, *need],
    }[name]()  # fmt: skip
    # swiglu has exp; where W is decoded, dx begins as the adapter's part: alone always, among the gradients under a mask
    twice = "swiglu" in name or (r > 0 and (name in ("linear_bwd", "group_bwd") or (name.endswith("_grads") and p > 0)))
    return name, args, not twice


def inside_nan(t: Tensor, draw: random.Random) -> Tensor:
    """The same values somewhere in a larger buffer."""
    offset = draw.randint(1, 15)
    buffer = torch.full((t.numel() + offset + draw.randint(0, 9),), torch.nan if t.is_floating_point() else 0x5A, dtype=t.dtype)
    return buffer[offset : offset + t.numel()].view(t.shape).copy_(t)


def strided(t: Tensor, draw: random.Random) -> Tensor:
    if t.ndim != 2:
        return t
    if draw.random() < 0.5:
        return t.T.contiguous().T
    wide = torch.full((t.shape[0] + 1, 2 * t.shape[1] + 1), torch.nan if t.is_floating_point() else 0x5A, dtype=t.dtype)
    wide[1:, 1::2] = t
    return wide[1:, 1::2]


def other_size(t: Tensor, draw: random.Random) -> Tensor:
    flat = t.reshape(-1)
    if draw.random() < 0.5 or t.ndim == 0:
        return torch.cat((flat, flat[:1])) if draw.random() < 0.5 else flat[: max(0, t.numel() - draw.randint(1, 9))]
    return t[:-1] if draw.random() < 0.5 else t[..., :-1]


def other_dtype(t: Tensor, draw: random.Random) -> Tensor:
    dtype = draw.choice([torch.float64, torch.int32, torch.uint8, torch.bfloat16, torch.int64, torch.float32])
    return t.view(dtype) if (t.dtype, dtype) == (torch.float32, torch.int32) and t.is_contiguous() else t.to(dtype)  # as layers keep scales


def other_number(v: Any, draw: random.Random) -> Any:
    if isinstance(v, bool):
        return not v
    if isinstance(v, str):
        return draw.choice(["int4", "", "NF4"])  # the other code would make the operands inexact
    if isinstance(v, float):
        return draw.choice([float("nan"), -0.5, 1.0, 1.5])  # not inf, whose product with 0 is where the adapter is scaled
    return draw.choice([v + 1, v - 1, 0, -v, 2 * v, 2**40, 64])


def mangled(value: Any, draw: random.Random) -> Any:
    """Other values of an argument: benign ones, wrong ones, or none at all."""
    if isinstance(value, Tensor):
        change: Callable = draw.choice([inside_nan, inside_nan, strided, other_size, other_dtype, lambda t, draw: None])
        return change(value, draw)
    if isinstance(value, list) and value:
        i = draw.randrange(len(value))
        return draw.choice([value[:-1], [*value, value[0]], [*value[:i], mangled(value[i], draw), *value[i + 1 :]]])
    return other_number(value, draw) if isinstance(value, (int, float, str)) else value


def flat(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else [t for o in outputs for t in flat(o)]


def run(seed: int) -> str:
    """What came of one case: "equal" or "refused". Raises: AssertionError for anything else."""
    draw = random.Random(seed)
    name, args, once = valid(draw)
    changes = draw.choice([0, 1, 1, 2, 3])
    for _ in range(changes):
        i = draw.randrange(len(args))
        args[i] = mangled(args[i], draw)
    path = draw.choice(PATHS)
    kwargs = {"seed": seed, "op": name, "path": path}
    try:
        with backends.use_backend("cuda_on_host", path):
            found = getattr(ops, name)(*args)
    except ERRORS as error:
        assert changes or isinstance(error, NotImplementedError), (kwargs, error)
        return "refused"
    except RuntimeError as error:
        # torch's own refusal of what is no argument of the schema; the machine's reports name the back end.
        assert changes and "cuda_on_host" not in str(error), (kwargs, error)
        return "refused"
    with backends.use_backend("reference"):
        wanted = getattr(ops, name)(*args)
    for f, w in zip(flat(found), flat(wanted), strict=True):
        assert f.shape == w.shape and f.dtype == w.dtype, (kwargs, f.shape, w.shape)
        if once:
            same = (f == w) | (f.isnan() & w.isnan()) if f.is_floating_point() else f == w
            assert same.all(), (kwargs, int((~same).sum()), "differ")
        else:
            slack = {torch.float32: 1e-5}.get(f.dtype, 2.0**-6)
            torch.testing.assert_close(f, w, rtol=slack, atol=slack * float(w.nan_to_num(0, 0, 0).abs().max()) if w.numel() else 0.0, equal_nan=True)
    return "equal"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=2**62)
    parser.add_argument("--build", default="address", choices=("plain", "address", "checker"))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    # One rounding wherever there can be, so that equal is equal.
    heuristics.cuda_extend_fwd = heuristics.cuda_extend_bwd = lambda N, K: True
    machine = backend.machine(chosen.build)
    machine.enter()
    counts, end, seed = Counter(), time.monotonic() + chosen.seconds, chosen.first
    seeds = iter(CORPUS)
    while time.monotonic() < end and counts.total() < chosen.count:
        case = next(seeds, None)
        if case is None:
            case, seed = seed, seed + 1
        print(case, file=sys.stderr, end=" ", flush=True)  # the last one is the one that a sanitizer ended
        machine.seed = case % 4
        counts[run(case)] += 1
    print(json.dumps(counts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
