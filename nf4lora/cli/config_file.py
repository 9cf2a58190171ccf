"""`nf4lora finetune --config FILE.yaml`: the options in a file, under the names they have on the command line."""

import difflib
import reprlib
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from .rows import opened
from .settings import Settings, UserError

LIMIT = 1 << 20
# What others call them: for the advice alone.
ELSEWHERE = {
    "learning_rate": "lr", "lora_r": "r", "rank": "r", "lora_alpha": "alpha", "lora_dropout": "dropout", "optimizer": "optim",
    "lora_target_modules": "target_modules", "lr_scheduler_type": "lr_scheduler", "num_train_epochs": "epochs",
    "num_epochs": "epochs", "base_model": "model", "model_name_or_path": "model", "output_dir": "output", "dataset": "data",
    "datasets": "data", "per_device_train_batch_size": "batch_size", "micro_batch_size": "batch_size",
    "gradient_accumulation_steps": "grad_accum", "sequence_len": "seq_len", "max_length": "seq_len", "max_seq_length": "seq_len",
    "cutoff_len": "seq_len", "sample_packing": "packing", "warmup_steps": "warmup_ratio", "resume_from_checkpoint": "resume",
    "assistant_only_loss": "loss_on", "train_on_inputs": "loss_on", "init_r": "r", "deltaT": "delta_t",
}  # fmt: skip
_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", tuple: "a name or a list of names"}


def read(path: Path) -> dict[str, Any]:
    """The options of a YAML file, by the names of `Settings`; a key may be written with - or _.

    Raises: UserError naming the file and what is wrong in it: a key that does not exist, with the nearest that does.
    """
    try:
        with opened(path) as file:
            data = file.read(LIMIT + 1)
        if len(data) > LIMIT:
            raise UserError(f"--config: {path} has {path.stat().st_size} bytes, wanted at most {LIMIT}")
        found = yaml.load(data, _Loader)
    except OSError as error:
        raise UserError(f"--config: {path} cannot be read ({error.strerror}); wanted a YAML file") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"--config: {path} is not YAML ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(found, dict):
        raise UserError(f"--config: {path} holds a {type(found).__name__}, wanted `option: value` lines")
    kinds = get_type_hints(Settings)
    options = {}
    for key, value in found.items():
        shown = key[:80] if isinstance(key, str) else _shown(key)
        name = shown.replace("-", "_")
        if name not in kinds:
            raise UserError(f"--config: {path} has the key {shown}, which does not exist; {_nearest(name)}")
        if name in options:
            raise UserError(f"--config: {path} has the key {key} twice")
        if value is not None:
            options[name] = _value(value, kinds[name], f"--config: {path}: {key}")
    return options


def write(settings: Settings, path: Path) -> None:
    """All of the options, as `read` takes them."""
    path.write_text(yaml.safe_dump(settings.as_json() | {"resume": False}, sort_keys=False))


class _Loader(yaml.SafeLoader):
    """YAML's safe kinds, no key twice and no merge key, ten levels of which are ten billion keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key in (key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"found the key {key} twice", node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        pass


def _nearest(name: str) -> str:
    names = [field.name for field in fields(Settings)]
    near = difflib.get_close_matches(name, [*names, *ELSEWHERE], 1)
    return f"did you mean {ELSEWHERE.get(near[0], near[0])}?" if near else f"there are {', '.join(names)}"


def _value(value: Any, hint: Any, where: str) -> Any:
    """`value` as the field wants it. YAML 1.1 reads 2e-4 as text, and so does this where a number is wanted."""
    kind = next(
        k for k in (bool, int, float, str, tuple) if hint in (k, k | None) or (k is tuple and "tuple" in str(hint))
    )
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            return float(value)
    if kind is tuple and isinstance(value, str):
        value = value.split(",")
    if kind is tuple and isinstance(value, list) and all(isinstance(v, str) for v in value):
        return tuple(v.strip() for v in value)
    if type(value) is not kind or (kind is int and value.bit_length() > 64):
        raise UserError(f"{where}: found {_shown(value)}, wanted {_KINDS[kind]}")
    return value


def _shown(value: Any) -> str:
    """In short: a list of lists of aliases has no end."""
    try:
        return reprlib.repr(value)[:80]
    except ValueError:  # hex digits, which are read at any length
        return "an integer too long to write, or a list with one"
