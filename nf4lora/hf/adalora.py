"""AdaLoRA in transformers' Trainer: `AdaLoraCallback` steps peft's allocator, saves its averages and records the ranks."""

import os
from pathlib import Path
from typing import Any

from peft.tuners.adalora import AdaLoraModel
from torch import nn
from transformers import TrainerCallback

from .adalora_records import append_records, importances, ranks, read_records
from .adalora_state import complete_gradients, config_of, load_state, save_state, singular_values, tuner_of
from .peft_adalora import check_ranks

STATE, RECORDS = "adalora_state.safetensors", "adalora.jsonl"


class AdaLoraCallback(TrainerCallback):
    """Trainer(model, callbacks=[AdaLoraCallback()]) trains a `get_peft_model(model, AdaLoraConfig(...))` as AdaLoRA.

    After each optimizer step, its gradients still there, peft's allocator updates its importances and takes ranks away; step
    n of its schedule is the n-th of the Trainer. The orthogonality term is counted once a step, however many batches are
    accumulated. Checkpoints hold the whole adapter and `adalora_state.safetensors`, so that a resumed run is the uninterrupted
    one; at the end the ranks that are left go into the adapter's `rank_pattern`, which makes it small when it is saved.

    `records`, also a line each of `adalora.jsonl` in the output folder: {"step", "budget", "total_rank", "ranks",
    "importances"}, the last two layer -> number (the mean importance of its init_r triplets), one each time ranks are
    allocated. The Trainer's own logs get the newest budget and total rank.

    Args:
        fit_total_step: set the config's total_step to the Trainer's steps where they differ, instead of an error
        log_layers:     rank and importance of each layer into the Trainer's logs, too
        resume_from:    folder of the checkpoint that is resumed, if it is not output_dir/checkpoint-<step>
    Raises, when training begins: TypeError for a model that is not AdaLoRA's; ValueError for a schedule that cannot run, an
        adapter that is not to be trained or has been cut to its final ranks, sharded training, a state of another checkpoint.
    """

    def __init__(
        self, fit_total_step: bool = False, log_layers: bool = False, resume_from: str | os.PathLike | None = None
    ) -> None:
        self.fit_total_step, self.log_layers, self.resume_from = fit_total_step, log_layers, resume_from
        self.records: list[dict[str, Any]] = []
        self._pattern: dict[str, list[bool]] | None = None
        self._orthogonality: OrthogonalityOnce | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        tuner = tuner_of(model)
        if getattr(args, "fsdp", None) or getattr(args, "deepspeed", None):
            raise ValueError(
                "AdaLoraCallback: found FSDP or DeepSpeed; importances need whole gradients: train in one process or with DDP"
            )
        self._check_schedule(tuner, state.max_steps)
        self._pattern, config = None, config_of(tuner)
        config.rank_pattern = None
        tuner.rankallocator.reset_ipt()
        path = Path(args.output_dir) / RECORDS
        self.records = [r for r in read_records(path) if r["step"] <= state.global_step] if state.global_step else []
        if state.global_step:
            folder = self.resume_from or Path(args.output_dir) / f"checkpoint-{state.global_step}"
            self._pattern = load_state(tuner, Path(folder) / STATE, state.global_step)
        if state.is_world_process_zero:
            path.unlink(missing_ok=True)
            append_records(path, self.records)
        if self._orthogonality:
            self._orthogonality.remove()
        self._orthogonality = OrthogonalityOnce(tuner, args.world_size if args.average_tokens_across_devices else 1)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._orthogonality.due = True

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: nn.Module, optimizer: Any = None, **_: Any
    ) -> None:
        tuner, step = tuner_of(model), state.global_step + 1
        config = config_of(tuner)
        final = config.total_step - config.tfinal
        if step < final:
            if getattr(optimizer, "step_was_skipped", False):
                return  # float16 overflowed: these gradients are not finite, and averages would stay so
            complete_gradients(tuner, step)
        scores = importances(tuner) if step == final else None  # peft forgets them there
        config.rank_pattern = self._pattern
        tuner.update_and_allocate(step)
        self._pattern, config.rank_pattern = config.rank_pattern, None
        budget, is_allocated = tuner.rankallocator.budget_schedule(step)
        if step == final or (step < final and is_allocated):
            kept = ranks(self._pattern)
            record = {"step": step, "budget": budget, "total_rank": sum(kept.values()), "ranks": kept}
            self.records.append(record | {"importances": scores or importances(tuner)})
            if state.is_world_process_zero:
                append_records(Path(args.output_dir) / RECORDS, self.records[-1:])

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not self.records or logs is None or "loss" not in logs:
            return
        newest = self.records[-1]
        shown = {f"adalora_{name}": newest[name] for name in ("budget", "total_rank")}
        if self.log_layers:
            shown |= {
                f"adalora_{name}/{layer}": value
                for name in ("ranks", "importances")
                for layer, value in newest[name].items()
            }
        logs.update(shown)
        if state.log_history:
            state.log_history[-1].update(shown)

    def on_save(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            save_state(tuner_of(model), folder / STATE, state.global_step, self._pattern)

    def on_train_end(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        self._orthogonality.remove()
        tuner = tuner_of(model)
        gone = {name: [not kept for kept in row] for name, row in (self._pattern or {}).items()}
        if gone and not any(
            E.detach()[gone[name]].any() for name, E in singular_values(tuner).items()
        ):  # not so of a best model
            config_of(tuner).rank_pattern = self._pattern

    def _check_schedule(self, tuner: AdaLoraModel, steps: int) -> None:
        config, allocator = config_of(tuner), tuner.rankallocator
        if config.total_step != steps:
            if config.total_step and not self.fit_total_step:
                raise ValueError(
                    f"AdaLoraConfig.total_step: found {config.total_step}, but the Trainer will take {steps} steps; "
                    f"wanted total_step={steps}, or AdaLoraCallback(fit_total_step=True), which sets it"
                )
            allocator.set_total_step(steps)
        if not 0 <= config.tinit < steps - config.tfinal <= steps or steps - config.tfinal < 2 or config.deltaT < 1:
            raise ValueError(
                f"AdaLoraConfig: found tinit={config.tinit}, tfinal={config.tfinal}, deltaT={config.deltaT} for {steps} steps, "
                "which leaves no step to take ranks away at; wanted 0 <= tinit < total_step - tfinal, >= 2, and deltaT >= 1"
            )
        check_ranks(config)
        ranks = [len(E) for E in singular_values(tuner).values()]
        if sum(ranks) != allocator.init_bgt or set(ranks) != {config.init_r}:
            raise ValueError(
                f"model: found ranks {sorted(set(ranks))}, wanted init_r={config.init_r} in every layer: this adapter was saved "
                "with its final ranks; train it on without AdaLoraCallback, or start a new one"
            )


class OrthogonalityOnce:
    """Hooks by which peft adds its orthogonality term in one batch of a step, not in all that are accumulated.

    Of a loss that is divided by the items of the whole step already the Trainer takes the sum over batches, and each would
    bring the term again; where it takes the mean, the term belongs in every batch.
    """

    def __init__(self, tuner: AdaLoraModel, processes: int) -> None:
        self.due, self.processes, self.weight = True, processes, None
        self._handles = (
            tuner.register_forward_pre_hook(self.before, with_kwargs=True),
            tuner.register_forward_hook(self.after, always_call=True),
        )

    def before(self, tuner: AdaLoraModel, args: Any, kwargs: dict[str, Any]) -> None:
        config = config_of(tuner)
        self.weight = config.orth_reg_weight
        if tuner.training and kwargs.get("num_items_in_batch") is not None:
            config.orth_reg_weight = self.weight / self.processes if self.due else 0.0
            self.due = False

    def after(self, tuner: AdaLoraModel, args: Any, output: Any) -> None:
        config_of(tuner).orth_reg_weight = self.weight

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
