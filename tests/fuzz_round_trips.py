"""F5: what is saved and loaded again is what it was, bit for bit: states, layers, models of both formats, adapters, checkpoints.

Shapes, block sizes, types, nesting and dtypes are drawn; every pair of a writer and its reader has its own function.
"""

import copy
import io
import json
import os
import random
import tempfile
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import safetensors.torch
import tiny
import torch
import transformers
from fuzzing import bits, main
from torch import nn

from nf4lora import NF4Linear, NF4LoRALinear, QuantState, quantize_4bit, replace_linears
from nf4lora.codebook import BLOCKSIZES, QUANT_TYPES
from nf4lora.hf import NF4Config, checkpoint, load_adapter, save_adapter, save_bitsandbytes
from nf4lora.hf.loading import from_pretrained

transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Seeds that once found something.
CORPUS: tuple[int, ...] = ()


def case(seed: int) -> str:
    """The kind of one seed. Raises: whatever it found."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    kind = draw.choices((state, layer, adapter, model, by_peft, folder), (150, 150, 12, 3, 3, 12))[0]
    with tempfile.TemporaryDirectory() as at:
        kind(draw, Path(at))
    return kind.__name__


def drawn(draw: random.Random) -> dict[str, Any]:
    return {"blocksize": draw.choice(BLOCKSIZES), "quant_type": draw.choice(QUANT_TYPES), "double_quant": draw.random() < 0.5}


def tensors_of(module: nn.Module) -> dict[str, Any]:
    return bits(dict(module.state_dict()))


def state(draw: random.Random, at: Path) -> None:
    shape = draw.choice([(draw.choice([0, 1, 63, 64, 65, 257, 20000]),), tuple(draw.choice([0, 1, 2, 17, 40]) for _ in range(draw.randint(2, 3)))])
    wide = torch.exp(torch.randn(shape) * draw.choice([1, 8]))  # absmax of every size
    options = drawn(draw)
    x = (torch.randn(shape) * wide).clamp(-6e4, 6e4).to(draw.choice(FLOATS))
    _, made = quantize_4bit(x, options["blocksize"], options["double_quant"], options["quant_type"])
    packed = draw.random() < 0.5
    given = made.as_dict(packed=packed)
    if packed:
        given = safetensors.torch.load(safetensors.torch.save({k: t.contiguous() for k, t in given.items()}))
    prefix = draw.choice(["", "a.weight."])
    read = QuantState.from_dict({prefix + k: v for k, v in given.items()})
    assert read == made
    again = read.as_dict(packed=packed)
    assert again.keys() == given.keys()
    for key, value in again.items():
        same = bits({key: value}) == bits({key: given[key]}) if isinstance(value, torch.Tensor) else value == given[key]
        assert same, key


def layer(draw: random.Random, at: Path) -> None:
    K, N, options = draw.choice([1, 5, 48, 64, 130]), draw.choice([1, 7, 32, 64]), drawn(draw)
    lora = {"r": draw.choice([1, 4])} if draw.random() < 0.5 else {}
    kind, bias, dtype = NF4LoRALinear if lora else NF4Linear, draw.random() < 0.5, draw.choice(FLOATS)
    made, into = (kind(K, N, bias=bias, dtype=dtype, **lora, **options) for _ in range(2))
    if lora:
        nn.init.normal_(made.lora_B)
    way = draw.choice(["memory", "torch", "safetensors", "copy"])
    if way == "copy":
        into = copy.deepcopy(made)
    else:
        given = made.state_dict()
        if way == "torch":
            torch.save(given, buffer := io.BytesIO())
            buffer.seek(0)
            given = torch.load(buffer, weights_only=True)
        elif way == "safetensors":
            given = safetensors.torch.load(safetensors.torch.save(dict(given)))
        into.load_state_dict(given, assign=draw.random() < 0.5)
    assert tensors_of(into) == tensors_of(made)
    assert into.quant_state == made.quant_state and bits({"w": into.dequantize()}) == bits({"w": made.dequantize()})


def some_model(draw: random.Random, dtype: torch.dtype) -> nn.Module:
    sizes = {"hidden_size": draw.choice([32, 64, 96]), "intermediate_size": draw.choice([40, 128]), "num_hidden_layers": draw.choice([1, 2])}
    more = {"num_key_value_heads": draw.choice([1, 2, 4]), "attention_bias": draw.random() < 0.3, "tie_word_embeddings": draw.random() < 0.3}
    return tiny.llama(draw.randrange(100), dtype, head_dim=16, **sizes, **more)


def model(draw: random.Random, at: Path) -> None:
    """Quantized on load, then saved and loaded in our format and in that of bitsandbytes, in one file or in parts."""
    dtype, options = draw.choice(FLOATS), drawn(draw)
    some_model(draw, dtype).save_pretrained(at / "dense")
    keep = draw.choice([None, ["lm_head", "q_proj"]])
    made = from_pretrained(at / "dense", NF4Config(modules_to_not_convert=keep, **options), dtype=dtype)
    ways = {"native": lambda to: made.save_pretrained(to, max_shard_size=draw.choice(["20KB", "1GB"])),
            "bnb": lambda to: save_bitsandbytes(made, to, draw.choice(["20KB", "1GB"]))}  # fmt: skip
    for way, save in ways.items():
        save(at / way)
        read = from_pretrained(at / way, dtype=dtype)
        assert tensors_of(read) == tensors_of(made), way
        read.save_pretrained(at / f"{way} again")
        made.save_pretrained(at / "once")
        for file in (at / "once").glob("*.safetensors"):
            assert file.read_bytes() == (at / f"{way} again" / file.name).read_bytes(), (way, file.name)
        config = read.config.quantization_config
        assert (config.blocksize, config.quant_type, config.double_quant) == tuple(options.values())


def adapter(draw: random.Random, at: Path) -> None:
    """Ours: a rank and an alpha a layer, biases, dtypes."""
    options, dtype = drawn(draw), draw.choice(FLOATS)
    rslora = draw.random() < 0.5

    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        made = nn.ModuleDict({name: nn.Linear(*size, dtype=dtype) for name, size in sizes.items()})
        for name, (r, alpha) in ranks.items():
            replace_linears(made, [name], r=r, lora_alpha=alpha, use_rslora=rslora, **options)
        for name, p in made.named_parameters():
            if "lora_" in name:
                nn.init.normal_(p)
        return made

    sizes = {name: (draw.choice([5, 16, 64]), draw.choice([7, 16, 32])) for name in ("one", "two", "three")}
    ranks = {name: (draw.choice([1, 2, 4]), draw.choice([1, 6, 0.1])) for name in sizes if name != "three"}
    made, into = build(1), build(2)
    save_adapter(made, at / "a", draw.choice([None, "some/base"]))
    load_adapter(into, at / "a")
    lora = [{k: v for k, v in tensors_of(m).items() if "lora_" in k} for m in (made, into)]
    assert lora[0] == lora[1] and len(lora[0]) == 4
    save_adapter(into, at / "b", None)
    weights = "adapter_model.safetensors"
    assert (at / "a" / weights).read_bytes() == (at / "b" / weights).read_bytes()


def by_peft(draw: random.Random, at: Path) -> None:
    """peft's, on our base: saved, loaded, saved again."""
    base, options = some_model(draw, torch.float32), drawn(draw)
    replace_linears(base, layer=NF4Linear, **options)
    targets = draw.sample(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"], draw.randint(1, 6))
    chosen = {"r": draw.choice([1, 2, 4]), "lora_alpha": draw.choice([1, 6]), "use_rslora": draw.random() < 0.5, "use_dora": draw.random() < 0.3}
    config = peft.LoraConfig(target_modules=targets, init_lora_weights=False, **chosen)
    made = peft.get_peft_model(copy.deepcopy(base), config)
    made.save_pretrained(at / "a")
    read = peft.PeftModel.from_pretrained(base, at / "a")
    assert tensors_of(read) == tensors_of(made)
    read.save_pretrained(at / "b")
    weights, config = "adapter_model.safetensors", "adapter_config.json"
    assert (at / "a" / weights).read_bytes() == (at / "b" / weights).read_bytes()
    one, two = (json.loads((at / name / config).read_text()) for name in "ab")
    assert sorted(one.pop("target_modules")) == sorted(two.pop("target_modules")) == sorted(targets) and one == two


def folder(draw: random.Random, at: Path) -> None:
    """Checkpoints: the bytes, and the newest of those kept."""
    files = {}
    for step in range(draw.randint(1, 3)):
        files = {draw.choice("abcdef") + draw.choice(["", ".json", ".é", " "]): draw.randbytes(draw.choice([0, 1, 100])) for _ in range(draw.randint(0, 4))}
        checkpoint.save(at, step, files, keep=draw.choice([1, 2]))
    newest = checkpoint.latest(at)
    assert newest.name == f"checkpoint-{step}" and checkpoint.read(newest) == files


if __name__ == "__main__":
    main(case, CORPUS, __doc__)
