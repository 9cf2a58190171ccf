"""F2: folders of adapters with random damage, into models with `NF4LoRALinear`s and, by peft, into our base.

Ours are refused with an error of a kind that is meant, and no byte of the model has changed, or taken as written. By peft,
the process lives, no byte of the base changes, and what is taken is what was written.
"""

import functools
import os
import random
import shutil
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import safetensors.torch
import torch
from fuzzing import OURS, bits, damaged_bytes, damaged_json, damaged_tensor, main, peak, whose
from torch import nn

from nf4lora import NF4Linear, NF4LoRALinear
from nf4lora.hf import load_adapter, save_adapter

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
KEYS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias", "use_dora", "modules_to_save", "peft_type", "auto_mapping",
        "target_modules", "layers_to_transform", "init_lora_weights", "x")  # fmt: skip
GROWTH = 128 << 20  # bytes of memory beyond what whole adapters, of 5 KB, take
LAYERS = {"first": (48, 32), "second": (32, 16)}
# Seeds that once found something.
CORPUS: tuple[int, ...] = ()


class Model(nn.Module):
    """Two layers in 4 bits, the same bytes every time."""

    def __init__(self, lora: bool, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, (K, N) in LAYERS.items():
            setattr(self, name, NF4LoRALinear(K, N, r=4, lora_alpha=6) if lora else NF4Linear(K, N))
        torch.manual_seed(seed)
        for name, p in self.named_parameters():
            if "lora_" in name:
                nn.init.normal_(p)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


@functools.cache
def whole(lora: bool) -> dict[str, bytes]:
    """The files of an adapter that we saved, or that peft did."""
    with tempfile.TemporaryDirectory() as at:
        if lora:
            save_adapter(Model(True, seed=1), Path(at, "a"))
        else:
            config = peft.LoraConfig(r=4, target_modules=list(LAYERS), init_lora_weights=False)
            peft.get_peft_model(Model(False), config).save_pretrained(Path(at, "a"))
        return {p.name: p.read_bytes() for p in sorted(Path(at, "a").iterdir()) if p.name in (CONFIG, WEIGHTS)}


@functools.cache
def usual_peak() -> int:
    """The memory at most, once whole adapters have been loaded."""
    for seed in range(40):
        ours(random.Random(seed), damaged=False)
        by_peft(random.Random(seed), damaged=False)
    return peak()


def files_of(draw: random.Random, lora: bool, damaged: bool) -> dict[str, bytes]:
    files = dict(whole(lora))
    for _ in range(draw.choice([0, 1, 1, 1, 2, 3]) if damaged else 0):
        name = draw.choice(list(files) or [CONFIG])
        how = draw.choice(["file", "tensor", "tensor", "bytes"])
        if draw.random() < 0.03 and files:
            data = files.pop(name)
            if draw.random() < 0.5:
                files[draw.choice([PICKLE, "x"])] = data
        elif name == CONFIG:
            files[name] = damaged_json(draw, files.get(name, b"{}"), KEYS)
        elif how == "bytes":
            files[name] = damaged_bytes(draw, files[name])
        elif tensors := tensors_of(files[name]):
            key = draw.choice(sorted(tensors))
            other = draw.choice([*sorted(tensors), key + ".x", key.replace("first", "third"), key.replace("lora_A", "lora_B"), "x"])
            if how == "tensor":
                tensors[key] = damaged_tensor(draw, tensors[key])
            else:
                tensors[other] = tensors.pop(key)
            files[name] = safetensors.torch.save(tensors)
    return files


def tensors_of(data: bytes) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load(data)
    except Exception:  # damaged already
        return {}


def case(seed: int) -> str:
    """The outcome of one seed. Raises: whatever it found."""
    draw, usual = random.Random(seed), usual_peak()
    kind = draw.choice((ours, by_peft))
    outcome = kind(draw)
    assert peak() - usual < GROWTH, f"{peak() - usual:,} bytes taken"
    return f"{kind.__name__} {outcome}"


def ours(draw: random.Random, damaged: bool = True) -> str:
    """`load_adapter`."""
    files, model = files_of(draw, True, damaged), Model(True, seed=2)
    before, at = bits(dict(model.named_parameters())), written(files)
    try:
        load_adapter(model, at)
    except Exception as error:
        assert str(error) and isinstance(error, OURS), "an error of a kind that is not meant"
        assert bits(dict(model.named_parameters())) == before, f"refused, but changed: {error}"
        return "refused"
    finally:
        shutil.rmtree(at)
    given = safetensors.torch.load(files[WEIGHTS])
    assert all(t.is_floating_point() for t in given.values()), "integers are taken for weights"
    after = {name: p for name, p in model.named_parameters() if "lora_" in name}
    wanted = {name: given.pop(f"base_model.model.{name}.weight").to(p.dtype) for name, p in after.items()}
    assert not given and bits(wanted) == bits(after), "what is held is not what was written"
    held = bits(dict(model.named_parameters()))
    assert all(held[name] == before[name] for name in held if "lora_" not in name), "the base has changed"
    model(torch.ones(1, 48))
    return "taken"


def by_peft(draw: random.Random, damaged: bool = True) -> str:
    """`PeftModel.from_pretrained`, or `load_adapter` beside an adapter that is there."""
    files, base = files_of(draw, False, damaged), Model(False)
    packed = {f"{name}.{key}": p for name in LAYERS for key, p in getattr(base, name).named_parameters()}
    before, at, name = bits(packed), written(files), "default"
    try:
        if draw.random() < 0.5:
            model = peft.PeftModel.from_pretrained(base, at)
        else:
            model, name = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["first"])), "other"
            model.load_adapter(at, name)
    except Exception as error:
        assert whose(error) != "nf4lora" or (str(error) and isinstance(error, OURS)), "an error of a kind that is not meant"
        assert bits(packed) == before, f"refused, and the base has changed: {error}"
        return "refused" if whose(error) == "nf4lora" else f"refused by {whose(error)}"
    finally:
        shutil.rmtree(at)
    assert bits(packed) == before, "the base has changed"
    given = safetensors.torch.load(files[WEIGHTS])
    for key, p in model.named_parameters():
        key = key.replace(f".{name}.", ".")
        if key in given and "lora_" in key and given[key].shape == p.shape:  # of others peft warns
            assert bits({key: p}) == bits({key: given[key].to(p.dtype)}), f"{key} is not what was written"
    return "taken"


def written(files: dict[str, bytes]) -> str:
    at = tempfile.mkdtemp()
    for name, data in files.items():
        Path(at, name).write_bytes(data)
    return at


if __name__ == "__main__":
    main(case, CORPUS, __doc__)
