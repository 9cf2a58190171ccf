"""What the fuzz targets share: damage to data, tensors, JSON and files; whose an error is; and the loop over seeds.

A case is its seed: `python -m fuzz_states --seconds 0 --first SEED` runs the corpus and that one.
"""

import argparse
import copy
import faulthandler
import json
import random
import resource
import struct
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import nf4lora

OURS = (ValueError, TypeError, OSError)  # what our code may raise for what it was given; anything else is a finding
JSON_VALUES = (
    None, True, False, -1, 0, 1, 2, 64, 2**31, 2**63, 2**70, -(2**63), 10**4000, 0.5, 64.0, 1e300, float("nan"), float("inf"), "", "x", "nf4", "float16",
    "../x", "/etc/passwd", "__class__", "a\0b", [], [[]], [1, 2], ["x"], {}, {"x": {}}, {"0": 1}, [2**62, 0], [2**70, 0], [-1, -1],
)  # fmt: skip


def anything(draw: random.Random) -> Any:
    """A value that has no business in a state dict, or might."""
    return draw.choice([
        None, True, -1, 0, 1, 2**31, 2**70, 0.5, float("nan"), float("inf"), "", "state", b"x", [], [1, 2], (), {}, {1: 2}, {"state1": 3}, set(), object(),
        torch.zeros(()), torch.zeros(0), torch.zeros(1), torch.zeros(3, dtype=torch.uint8), torch.zeros(300), torch.zeros(300, dtype=torch.uint8),
        torch.zeros(17, 16).t(), torch.zeros(300, dtype=torch.float64), torch.full((2,), torch.nan), torch.zeros(300, 2)[:, 0], torch.zeros(300, device="meta"),
        torch.sparse_coo_tensor((300,)), torch.tensor(3), torch.tensor(3.5), torch.tensor(True), torch.zeros(300, dtype=torch.complex64),
    ])  # fmt: skip


def json_value(draw: random.Random) -> Any:
    return copy.deepcopy(draw.choice(JSON_VALUES))


def damage(draw: random.Random, saved: Any, extra: tuple[Any, ...], value: Callable[[random.Random], Any] = anything) -> None:
    """One change somewhere in it. `extra`: keys to add."""
    where: Any = saved
    for _ in range(draw.randint(0, 4)):
        inner = [v for v in (where.values() if isinstance(where, dict) else where) if isinstance(v, (dict, list)) and v]
        if not inner:
            break
        where = draw.choice(inner)
    keys = list(where) if isinstance(where, dict) else list(range(len(where)))
    how = draw.choice(["replace", "replace", "remove", "add", "swap"])
    if how == "add" or not keys:
        if isinstance(where, dict):
            where[draw.choice(extra)] = value(draw)
        else:
            where.append(value(draw))
    elif how == "remove":
        del where[draw.choice(keys)]
    elif how == "swap" and len(keys) > 1:
        a, b = draw.sample(keys, 2)
        where[a], where[b] = where[b], where[a]
    else:
        where[draw.choice(keys)] = value(draw)


def damaged_tensor(draw: random.Random, t: torch.Tensor) -> torch.Tensor:
    """The tensor with other values, another shape or another dtype."""
    t = t.detach().clone(memory_format=torch.contiguous_format)
    how = draw.randrange(7)
    if how == 0 and t.numel():  # still of its kind
        flat = t.view(-1).view(torch.uint8)
        flat[draw.randrange(flat.numel())] ^= 1 << draw.randrange(8)
        return t
    if how == 1:
        return t.to(draw.choice([torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64, torch.uint8, torch.bool]))
    if how == 2:
        return t.reshape(-1)[: draw.randint(0, max(t.numel() - 1, 0))].clone()
    if how == 3:
        return t.repeat(draw.choice([2, 3, 16]), *[1] * max(t.ndim - 1, 0))
    if how == 4:
        return t.reshape(draw.choice([(-1,), (1, -1), (-1, 1)])) if t.numel() else t[None]
    if how == 5 and t.is_floating_point():
        return torch.full_like(t, draw.choice([torch.nan, torch.inf, -torch.inf, 0.0, -1.0, 6e4]))
    return t.view(-1).view(torch.uint8).clone() if t.numel() else t


def damaged_bytes(draw: random.Random, data: bytes) -> bytes:
    """Other bytes: flipped, cut, grown, or (a safetensors file) with another length of its header or other numbers in it."""
    data, how = bytearray(data), draw.randrange(6)
    if how == 0 or len(data) < 16:
        return bytes(data[: draw.randint(0, len(data))])
    if how == 1:
        return bytes(data) + draw.randbytes(draw.choice([1, 8, 1000]))
    if how == 2:
        struct.pack_into("<Q", data, 0, draw.choice([0, 1, len(data), 10**8, 2**31, 2**63 - 1, 2**63, 2**64 - 1]))
    elif how == 3:  # numbers and names of the header, in its length
        size = min(struct.unpack_from("<Q", data)[0], len(data) - 8)
        for _ in range(draw.randint(1, 3)):
            data[8 + draw.randrange(size)] = draw.choice(b'0123456789-,:[]{}"U F')
    else:
        for _ in range(draw.choice([1, 1, 8])):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(data)


def damaged_json(draw: random.Random, data: bytes, extra: tuple[str, ...]) -> bytes:
    if draw.random() < 0.1:
        return draw.choice([b"", b"[]", b"null", b"3", b"NaN", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b" " * 2**20 + b"{}", b'{"a": 1' + b"0" * 5000 + b"}"])
    if draw.random() < 0.2:
        return damaged_bytes(draw, data)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):  # damaged already
        return data
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        if isinstance(value, (dict, list)):
            damage(draw, value, extra, json_value)
    return json.dumps(value).encode()


def whose(error: BaseException) -> str:
    """The package whose code raised: of those that have a say, the one of the innermost frame."""
    roots = {"nf4lora": str(Path(nf4lora.__file__).parent)}
    roots |= {name: str(Path(sys.modules[name].__file__).parent) for name in ("transformers", "peft", "huggingface_hub", "safetensors") if name in sys.modules}
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        for name, root in roots.items():
            if frame.filename.startswith(root):
                return name
    return "none"


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[Any, ...]]:
    """What tensors are, to be compared: dtype, shape and bytes."""
    return {k: (t.dtype, tuple(t.shape), bytes(t.detach().contiguous().reshape(-1).view(torch.uint8).numpy())) for k, t in tensors.items()}


def peak() -> int:
    """Bytes of memory this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(case: Callable[[int], str], corpus: tuple[int, ...], doc: str) -> None:
    """Run the corpus, then seeds from --first on until the time is over; print what came of them as JSON."""
    options = argparse.ArgumentParser(description=doc)
    options.add_argument("--seconds", type=float, default=60)
    options.add_argument("--first", type=int, default=0)
    asked = options.parse_args()
    warnings.simplefilter("ignore")
    faulthandler.enable()
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    end = time.monotonic() + asked.seconds
    seeds = [*corpus, asked.first]
    while seeds:
        seed = seeds.pop(0)
        print(seed, file=sys.stderr, end=" ", flush=True)  # the last one is the one that ended the process
        counts[case(seed)] += 1
        if not seeds and time.monotonic() < end:
            seeds.append(max(seed, asked.first) + 1)
    print(json.dumps(counts))
