"""The whole state of a run as checkpoint files and back: adapter, optimizer, schedule, data position, random state."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..hf.adapter import CONFIG, WEIGHTS, files_of
from ..hf.checkpoint import CheckpointError, parse_json, parse_tensors, read
from .checkpoints import ABOUT
from .data import Data, fingerprint
from .processes import Processes, whole
from .settings import Settings, UserError
from .train import Run

TENSORS, STATE = "training_state.safetensors", "training_state.json"
ADVICE = "give the same options and data, or start anew in another --output"


def adapter_files(run: Run) -> dict[str, bytes]:
    """The adapter as peft reads it: name -> bytes. Every process must ask."""
    model = run.processes.unwrap(run.model)
    tensors = {name: whole(t) for name, t in get_peft_model_state_dict(model, save_embedding_layers=False).items()}
    config = model.peft_config[model.active_adapter].to_dict() | {"inference_mode": True}
    about = {"base": "dense" if run.settings.method == "lora" else "nf4"}
    files = files_of(tensors, {name: sorted(v) if isinstance(v, set) else v for name, v in config.items()})
    return files | {ABOUT: json.dumps(about).encode()}


def pack(run: Run) -> dict[str, bytes]:
    """Name -> bytes, for `nf4lora.hf.checkpoint.save`. The step is the number of losses; the data order follows from it.
    Every process must ask."""
    optimizer = run.optimizer.state_dict()
    tensors = {f"optimizer.{i}.{key}": value for i, entry in optimizer["state"].items() for key, value in entry.items()}
    tensors = {key: whole(torch.as_tensor(value)).detach().cpu().clone() for key, value in tensors.items()}
    tensors |= {"losses": torch.tensor(run.losses, dtype=torch.float64)}
    for rank, states in enumerate(run.processes.gathered(_random_state(run))):
        tensors |= {f"rng.{name}.{rank}": value for name, value in states.items()}
    state = {
        "settings": run.settings.must_match(), "data_sha256": fingerprint(run.data), "base_sha256": run.base,
        "processes": run.processes.count,
        "param_groups": optimizer["param_groups"], "scheduler": run.scheduler.state_dict(),
    }  # fmt: skip
    return {
        **adapter_files(run), **(run.adaptive.files() if run.adaptive else {}),
        TENSORS: safetensors.torch.save(tensors, metadata={"format": "pt"}),
        STATE: json.dumps(state).encode(),
    }  # fmt: skip


class Saved:
    """A checkpoint of a run that this one may go on from.

    Raises: UserError when options, data or the number of processes differ; CheckpointError for a damaged or foreign checkpoint.
    """

    def __init__(self, folder: Path, settings: Settings, data: Data, base: str, processes: Processes) -> None:
        self.folder, self._files = folder, read(folder)
        if absent := {TENSORS, STATE, CONFIG, WEIGHTS} - self._files.keys():
            raise CheckpointError(f"{folder}: no {', '.join(sorted(absent))}: not a checkpoint of nf4lora finetune")
        self._state = parse_json(self._files[STATE], folder / STATE)
        self._tensors = parse_tensors(self._files[TENSORS], folder / TENSORS)
        ours, theirs = settings.must_match(), self._state.get("settings")
        theirs = theirs if isinstance(theirs, dict) else {}
        if different := [
            f"--{n.replace('_', '-')} {theirs.get(n)}, now {v}" for n, v in ours.items() if theirs.get(n) != v
        ]:
            raise UserError(f"--resume: {folder} was made with {'; '.join(different)}; {ADVICE}")
        if self._state.get("data_sha256") != fingerprint(data):
            raise UserError(f"--resume: {folder} was made with other data; {ADVICE}")
        if self._state.get("base_sha256") != base:
            raise UserError(f"--resume: {folder} was made with another base, or one in another dtype; {ADVICE}")
        if self._state.get("processes") != processes.count:
            found = f"made by {self._state.get('processes')} processes, now {processes.count}"
            raise UserError(f"--resume: {folder} was {found}; start as many, or anew in another --output")

    def load_adapter(self, model: nn.Module) -> None:
        """Into the whole model, before it is sharded. Raises: CheckpointError."""
        tensors = parse_tensors(self._files[WEIGHTS], self.folder / WEIGHTS)
        own = get_peft_model_state_dict(model, save_embedding_layers=False)
        if {n: t.shape for n, t in tensors.items()} != {n: t.shape for n, t in own.items()}:
            raise CheckpointError(f"{self.folder / WEIGHTS}: not the tensors of this run's adapter; {ADVICE}")
        set_peft_model_state_dict(model, tensors)

    def restore(self, run: Run) -> None:
        """Bring a run at step 0 to the state that was saved. Raises: CheckpointError, ValueError."""
        try:
            self._restore(run)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{self.folder}: not a state this run can take ({what}); {ADVICE}") from error

    def _restore(self, run: Run) -> None:
        optimizer: dict[int, dict[str, Tensor]] = {}
        for key, value in sorted(self._tensors.items()):  # in one order: sharding is done together
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                optimizer.setdefault(int(index), {})[name] = value
        parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
        for index, entry in optimizer.items():
            optimizer[index] = {name: _sharded(value, parameters[index]) for name, value in entry.items()}
        run.optimizer.load_state_dict({"state": optimizer, "param_groups": self._state["param_groups"]})
        run.scheduler.load_state_dict(self._state["scheduler"])
        run.losses = self._tensors["losses"].tolist()
        rank = run.processes.rank
        torch.set_rng_state(self._tensors[f"rng.cpu.{rank}"])
        if run.device.type == "cuda":
            torch.cuda.set_rng_state(self._tensors[f"rng.cuda.{rank}"], run.device)


def _sharded(value: Tensor, like: nn.Parameter) -> Tensor:
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def _random_state(run: Run) -> dict[str, Any]:
    states = {"cpu": torch.get_rng_state()}
    if run.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(run.device)
    return states
