"""The whole state of a run as checkpoint files and back: adapter, optimizer, schedule, data position, random state."""

import json
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ..hf.adapter import adapter_files, load_adapter_files
from ..hf.checkpoint import CheckpointError, parse_json, parse_tensors, read
from .data import fingerprint
from .settings import UserError
from .train import Run

TENSORS, STATE = "training_state.safetensors", "training_state.json"
ADVICE = "give the same options and data, or start anew in another --output"


def pack(run: Run) -> dict[str, bytes]:
    """Name -> bytes, for `nf4lora.hf.checkpoint.save`. The step is the number of losses; the data order follows from it."""
    optimizer = run.optimizer.state_dict()
    tensors = {f"optimizer.{i}.{key}": value for i, entry in optimizer["state"].items() for key, value in entry.items()}
    tensors = {key: torch.as_tensor(value).detach().cpu().clone() for key, value in tensors.items()}
    tensors |= {"losses": torch.tensor(run.losses, dtype=torch.float64)} | _random_state(run)
    state = {
        "settings": run.settings.must_match(), "data_sha256": fingerprint(run.blocks),
        "param_groups": optimizer["param_groups"], "scheduler": run.scheduler.state_dict(),
    }  # fmt: skip
    return {
        **adapter_files(run.model, run.settings.model),
        TENSORS: safetensors.torch.save(tensors, metadata={"format": "pt"}),
        STATE: json.dumps(state).encode(),
    }


def restore(run: Run, folder: Path) -> None:
    """Bring a run at step 0 to the state saved in `folder`.

    Raises: UserError when options or data differ; CheckpointError or ValueError for a damaged or foreign checkpoint.
    """
    files = read(folder)
    if absent := {TENSORS, STATE} - files.keys():
        raise CheckpointError(f"{folder}: no {', '.join(sorted(absent))}: not a checkpoint of nf4lora finetune")
    state, tensors = parse_json(files[STATE], folder / STATE), parse_tensors(files[TENSORS], folder / TENSORS)
    try:
        _check(run, state, folder)
        _apply(run, files, state, tensors, folder)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{folder}: not a state this run can take ({type(error).__name__}: {error}); {ADVICE}") from error


def _apply(run: Run, files: dict[str, bytes], state: dict, tensors: dict[str, Tensor], folder: Path) -> None:
    optimizer: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            optimizer.setdefault(int(index), {})[name] = value
    load_adapter_files(run.model, files, folder)
    run.optimizer.load_state_dict({"state": optimizer, "param_groups": state["param_groups"]})
    run.scheduler.load_state_dict(state["scheduler"])
    run.losses = tensors["losses"].tolist()
    torch.set_rng_state(tensors["rng.cpu"])
    if run.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["rng.cuda"], run.device)


def _check(run: Run, state: dict, folder: Path) -> None:
    ours, theirs = run.settings.must_match(), state.get("settings", {})
    if different := [
        f"--{n.replace('_', '-')} {theirs.get(n)}, now {v}" for n, v in ours.items() if theirs.get(n) != v
    ]:
        raise UserError(f"--resume: {folder} was made with {'; '.join(different)}; {ADVICE}")
    if state.get("data_sha256") != fingerprint(run.blocks):
        raise UserError(f"--resume: {folder} was made with other data; {ADVICE}")


def _random_state(run: Run) -> dict[str, Tensor]:
    states = {"rng.cpu": torch.get_rng_state()}
    if run.device.type == "cuda":
        states["rng.cuda"] = torch.cuda.get_rng_state(run.device)
    return states
