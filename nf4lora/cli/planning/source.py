"""From what a user names as MODEL_OR_CONFIG to a model on the meta device, which has shapes and no weights."""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from ..model import quiet_transformers
from ..settings import UserError

_HEADS = {
    "ForCausalLM": ("AutoModelForCausalLM",),
    "LMHeadModel": ("AutoModelForCausalLM",),
    "ForConditionalGeneration": ("AutoModelForSeq2SeqLM", "AutoModelForImageTextToText", "AutoModelForSpeechSeq2Seq"),
    "ForMaskedLM": ("AutoModelForMaskedLM",),
    "ForSequenceClassification": ("AutoModelForSequenceClassification",),
    "ForTokenClassification": ("AutoModelForTokenClassification",),
    "ForQuestionAnswering": ("AutoModelForQuestionAnswering",),
}
_ANY = (
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForImageTextToText",
    "AutoModelForMaskedLM",
    "AutoModel",
)

# What a config with odd numbers makes a model's constructor raise.
_ODD = (
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, ImportError, StrictDataclassError,
)  # fmt: skip


def read_config(named: str) -> Any:
    """The config of a folder with config.json, of a .json file, or of a Hub id that is on this disk; nothing is downloaded.

    Raises: UserError.
    """
    from transformers import AutoConfig

    quiet_transformers()
    path = Path(named)
    if path.is_dir():
        path = path / "config.json"
    if path.suffix == ".json" or path.exists():
        _check_file(path)
    elif named.startswith((".", "/", "~")) or named.count("/") > 1:
        raise UserError(
            f"MODEL_OR_CONFIG: no such folder or file: {named}; wanted a folder with config.json, or that file"
        )
    try:
        config = AutoConfig.from_pretrained(path if path.exists() else named, local_files_only=True)
    except OSError as error:
        raise UserError(
            f"MODEL_OR_CONFIG: {named} is neither a folder, nor a config.json, nor a model in the Hub's cache on this disk; "
            "give the path of its config.json (plan reads no weights and no network)"
        ) from error
    except _ODD as error:
        raise UserError(
            f"MODEL_OR_CONFIG: {named} cannot be read ({_first_line(error)}); wanted a config of transformers"
        ) from error
    found = getattr(config, "architectures", None) or []
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise UserError(
            f"MODEL_OR_CONFIG: {named} has architectures {found!r}; wanted a list of names of classes, or none"
        )
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the plan is of its shapes, whatever format they were saved in
    return config


def _check_file(path: Path) -> None:
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"MODEL_OR_CONFIG: {path} cannot be read ({error.strerror}); wanted a config.json") from error
    except ValueError as error:
        raise UserError(f"MODEL_OR_CONFIG: {path} is not JSON ({_first_line(error)}); wanted a config.json") from error
    if not isinstance(found, dict) or "model_type" not in found:
        raise UserError(f"MODEL_OR_CONFIG: {path} has no model_type; wanted the config.json of a model of transformers")


def on_meta(config: Any, dtype: torch.dtype) -> nn.Module:
    """The model of a config with floats of `dtype` on the meta device. Raises: UserError for a config that makes none."""
    auto = auto_class(config)
    reason = "no class of transformers is known for it"
    try:
        if auto is not None:
            with torch.device("meta"):
                return auto.from_config(config, dtype=dtype)
    except _ODD as error:
        reason = _first_line(error)
    raise UserError(f"MODEL_OR_CONFIG: no model can be made of a {type(config).__name__} ({reason})")


def auto_class(config: Any) -> Any:
    """The Auto class of transformers that makes what `config.architectures` names, or else what it can make; None for nothing."""
    import transformers

    architecture = (getattr(config, "architectures", None) or [""])[0]
    classes = next((autos for end, autos in _HEADS.items() if architecture.endswith(end)), ())
    found = (getattr(transformers, name) for name in dict.fromkeys((*classes, *_ANY)))
    return next((auto for auto in found if type(config) in auto._model_mapping), None)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
