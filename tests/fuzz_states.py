"""F1: 4-bit weights with random damage: quantization states, state dicts of layers, checkpoint folders of both formats.

Each is refused with an error of a kind that is meant, and then nothing has changed; or it is taken, and then what is held
is what was written, bit for bit, and can be computed with.
"""

import functools
import json
import os
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import safetensors.torch
import tiny
import torch
import transformers
from fuzzing import OURS, anything, bits, damage, damaged_bytes, damaged_json, damaged_tensor, json_value, main, peak, whose
from torch import Tensor, nn

from nf4lora import NF4Linear, NF4LoRALinear, QuantState, backends, dequantize_4bit, quantize_4bit
from nf4lora.codebook import BLOCKSIZES, QUANT_TYPES
from nf4lora.hf import save_bitsandbytes
from nf4lora.hf.loading import from_pretrained

transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
STATE_KEYS = ("absmax", "nested_absmax", "quant_map", "nested_quant_map", "nested_offset", "shape", "dtype", "blocksize", "nested_dtype", "x", "a.b", 0)
CONFIG_KEYS = ("quantization_config", "blocksize", "quant_type", "double_quant", "modules_to_not_convert", "checkpoint_format", "compute_dtype", "text_config", "x")
GROWTH = 128 << 20  # bytes of memory that no load of these folders, of 100 KB, takes beyond what whole ones take
# Seeds that once found something.
CORPUS = (24, 66, 504, 641, 1820, 8290, 69731)


def case(seed: int) -> str:
    """The outcome of one seed. Raises: whatever it found."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    kind = draw.choices((state, layer, folder), (40, 40, 1 + 4))[0]
    return f"{kind.__name__} {kind(draw)}"


def state(draw: random.Random) -> str:
    """A state as its dict, or as bitsandbytes packs it."""
    shape = tuple(draw.choice([1, 3, 17, 64, 80]) for _ in range(draw.randint(1, 3)))
    made = quantize_4bit(torch.randn(shape).to(draw.choice(FLOATS)), draw.choice(BLOCKSIZES), draw.random() < 0.5, draw.choice(QUANT_TYPES))[1]
    given: dict[Any, Any] = made.as_dict(packed=draw.random() < 0.6)
    for _ in range(draw.choice([0, 1, 1, 1, 2, 3])):
        key = draw.choice(list(given)) if given else None
        if "bitsandbytes__" in str(key) and isinstance(given[key], Tensor) and given[key].dtype == torch.uint8 and draw.random() < 0.8:
            text = damaged_json(draw, bytes(given[key].view(-1).tolist()), STATE_KEYS[:-1])
            given[key] = torch.tensor(list(text), dtype=torch.uint8)
        elif isinstance(given.get(key), Tensor) and draw.random() < 0.7 and given[key].layout == torch.strided and not given[key].is_meta:
            given[key] = damaged_tensor(draw, given[key])
        else:
            damage(draw, given, STATE_KEYS)
    try:
        read = QuantState.from_dict(given)
    except (ValueError, TypeError) as error:
        assert str(error), "an error without a word"
        return "refused"
    for key in ("absmax", "nested_absmax"):
        if (held := getattr(read, key)) is not None:
            wanted = given[key].float() if given[key].is_floating_point() else given[key]
            assert bits({key: held.view(-1)}) == bits({key: wanted.reshape(-1)}), f"{key} is not what was given"
    assert QuantState.from_dict(read.as_dict()) == read, "what was read is not what it writes"
    packed = torch.randint(0, 256, ((read.numel + 1) // 2, 1), dtype=torch.uint8)
    decoded = dequantize_4bit(packed, read)
    with backends.use_backend("reference"):
        assert bits({"w": decoded}) == bits({"w": dequantize_4bit(packed, read)}) or not decoded.isfinite().all()
    return "taken"


def layer(draw: random.Random) -> str:
    """The state dict of a layer, into another one."""
    options = {"blocksize": draw.choice([32, 64]), "quant_type": draw.choice(QUANT_TYPES), "double_quant": draw.random() < 0.5}

    def build() -> NF4Linear:
        made = NF4LoRALinear(48, 24, r=2, **options) if lora else NF4Linear(48, 24, **options)
        return made.to(dtype)

    lora, dtype = draw.random() < 0.5, draw.choice(FLOATS[:2])
    given, into, assign = build().state_dict(), build(), draw.random() < 0.3
    for _ in range(draw.choice([0, 1, 1, 1, 2, 3])):
        key = draw.choice(list(given)) if given else None
        if isinstance(given.get(key), Tensor) and draw.random() < 0.7 and given[key].layout == torch.strided and not given[key].is_meta:
            given[key] = damaged_tensor(draw, given[key])
        elif draw.random() < 0.3:
            damage(draw, given._metadata[""], ("nf4lora", "version", "shape", "blocksize"), json_value)
        else:
            damage(draw, given, ("weight", "weight_absmax", "weight_nested_absmax", "weight_nested_offset", "bias", "lora_A", "x", "weight.absmax"))
    before = bits(dict(into.named_parameters()))
    try:
        into.load_state_dict(given, strict=draw.random() < 0.5, assign=assign)
    except RuntimeError as error:  # nn.Module's, which lists what is wrong
        assert "Error(s) in loading state_dict" in str(error), error
        quantized = {k: v for k, v in bits(dict(into.named_parameters())).items() if k.startswith("weight")}
        asis = {k: before[k] for k in quantized} == quantized
        assert asis or all(bits({k: given[k]})[k] == quantized[k] for k in quantized), f"refused, and half loaded: {error}"
        return "refused"
    except Exception as error:
        assert whose(error) != "nf4lora" or isinstance(error, OURS), error
        assert bits(dict(into.named_parameters())) == before, f"refused, but changed: {error}"
        return "refused"
    if any(p.is_meta for p in into.parameters()):
        assert assign
        return "taken"
    for key, p in into.named_parameters():
        if key in given:
            assert bits({key: p}) == bits({key: given[key] if assign else given[key].to(p.dtype)}), f"{key} is not what was given"
        else:
            assert bits({key: p})[key] == before[key], f"{key} has changed, and was not given"
    try:
        into(torch.ones(2, 48))
    except TypeError as error:
        assert assign and "found torch.float" in str(error), error  # a float of another kind was put in, as asked
    return "taken"


@functools.cache
def whole(kind: str) -> dict[str, bytes]:
    """The files of a tiny model, saved in 4 bits: in one file, or in parts with an index."""
    with tempfile.TemporaryDirectory() as at:
        tiny.llama(num_hidden_layers=1).save_pretrained(Path(at, "dense"))
        model = from_pretrained(Path(at, "dense"))
        size = "30KB" if "parts" in kind else "1GB"
        if "bnb" in kind:
            save_bitsandbytes(model, Path(at, "saved"), size)
        else:
            model.save_pretrained(Path(at, "saved"), max_shard_size=size)
        return {p.name: p.read_bytes() for p in sorted(Path(at, "saved").iterdir())}


@functools.cache
def usual_peak() -> int:
    """The memory at most, once whole folders of every kind have been loaded."""
    for kind in ("native", "bnb", "native parts", "bnb parts"):
        load(whole(kind))
    return peak()


def load(files: dict[str, bytes]) -> nn.Module:
    at = tempfile.mkdtemp()
    try:
        for name, data in files.items():
            Path(at, name).write_bytes(data)
        return from_pretrained(at)
    finally:
        shutil.rmtree(at)


def folder(draw: random.Random) -> str:
    """A folder as save_pretrained or save_bitsandbytes wrote it, with other bytes in it."""
    kind = draw.choice(("native", "bnb", "native parts", "bnb parts"))
    usual, files = usual_peak(), dict(whole(kind))
    for _ in range(draw.choice([0, 1, 1, 1, 1, 2])):
        name = draw.choice([n for n in files if n != "generation_config.json"] or ["config.json"])
        if draw.random() < 0.03:
            files.pop(name, None)
        elif name == "config.json":
            files[name] = damaged_config(draw, files.get(name, b"{}"))
        elif name.endswith(".json"):
            files[name] = damaged_json(draw, files[name], ("weight_map", "lm_head.weight", "x"))
        elif draw.random() < 0.5:
            files[name] = damaged_bytes(draw, files[name])
        elif tensors := parsed(files[name]):
            key = draw.choice(sorted(tensors))
            how = draw.choice(["tensor", "tensor", "state", "state", "remove", "swap", "rename"])
            if how == "state" and (states := [k for k in sorted(tensors) if "bitsandbytes__" in k and tensors[k].numel() and tensors[k].dtype == torch.uint8]):
                key = draw.choice(states)
                tensors[key] = torch.tensor(list(damaged_json(draw, bytes(tensors[key].view(-1).tolist()), STATE_KEYS[:-1])), dtype=torch.uint8)
            elif how in ("remove", "rename"):
                value = tensors.pop(key)
                if how == "rename":
                    tensors[draw.choice(["x", key + ".absmax", key.replace("0", "7"), key.replace("weight", "bias"), "lm_head.weight"])] = value
            elif how == "swap":
                other = draw.choice(sorted(tensors))
                tensors[key], tensors[other] = tensors[other], tensors[key]
            else:
                tensors[key] = damaged_tensor(draw, tensors[key])
            files[name] = safetensors.torch.save(tensors, metadata={"format": "pt"})
    try:
        model = load(files)
    except Exception as error:
        assert peak() - usual < GROWTH, f"{peak() - usual:,} bytes taken to refuse it"
        assert str(error), "an error without a word"
        if whose(error) == "nf4lora":
            assert isinstance(error, OURS), "an error of a kind that is not meant"
            return "refused"
        return f"refused by {whose(error)}"
    assert peak() - usual < GROWTH, f"{peak() - usual:,} bytes taken to load it"
    given: dict[str, Tensor] = {}
    parts = json.loads(files["model.safetensors.index.json"])["weight_map"] if "model.safetensors" not in files else {}
    for name in sorted({*parts.values()} if parts else {"model.safetensors"}):
        given |= {k: t for k, t in safetensors.torch.load(files[name]).items()}
    for name, module in model.named_modules():
        if isinstance(module, NF4Linear):
            as_given(name, module, given)
    dense = [p for name, p in model.named_parameters() if not isinstance(model.get_submodule(name.rpartition(".")[0]), NF4Linear)]
    if files["config.json"] == whole(kind)["config.json"] and all(p.is_floating_point() for p in dense):  # transformers takes integers for them
        with torch.no_grad():
            model(input_ids=tiny.tokens())
    return "taken"


def as_given(name: str, module: NF4Linear, given: dict[str, Tensor]) -> None:
    own = {"weight": module.weight, "absmax": module.weight_absmax, "nested_absmax": module.weight_nested_absmax}
    for key, p in own.items():
        names = (f"{name}.weight",) if key == "weight" else (f"{name}.weight_{key}", f"{name}.weight.{key}")
        found = [given[n] for n in names if n in given]
        assert bool(found) == (p is not None), f"{name}.{key}"
        if found and found[0].dtype not in FLOATS[1:]:  # those are upcast
            assert bits({key: p.view(-1).view(torch.uint8)}) == bits({key: found[0].reshape(-1).view(torch.uint8)}), f"{name}.{key} is not what was given"


def parsed(data: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except Exception:  # damaged already
        return {}


def damaged_config(draw: random.Random, data: bytes) -> bytes:
    """Mostly within what is ours of it. Sizes of the model are left: what a model of 2^31 layers takes is transformers' to say."""
    try:
        config = json.loads(data)
        quantization = json.dumps(config["quantization_config"]).encode()
    except (ValueError, KeyError, TypeError):
        return data
    if draw.random() < 0.8:
        try:
            config["quantization_config"] = json.loads(damaged_json(draw, quantization, CONFIG_KEYS))
        except (ValueError, RecursionError):
            config["quantization_config"] = draw.choice([[], "x", 3, None, {}, [[]]])
        return json.dumps(config).encode()
    for _ in range(10):
        changed = damaged_json(draw, data, CONFIG_KEYS)
        try:
            sizes = [v for v in json.loads(changed).values() if isinstance(v, (int, float)) and abs(v) > 1e6]
        except (ValueError, RecursionError, AttributeError):
            return changed
        if not sizes:
            return changed
    return data


if __name__ == "__main__":
    main(case, CORPUS, __doc__)
