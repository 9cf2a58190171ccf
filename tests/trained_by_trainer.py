"""A script as users write it, for `accelerate launch`: Trainer, peft and a paged optimizer of ours on an NF4 base."""

import json
import sys
import warnings
from pathlib import Path

import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

import nf4lora
from nf4lora import optim


def main(folder: Path, batch: int, kind: str) -> None:
    warnings.filterwarnings("ignore", message="paged optimizer")
    torch.set_num_threads(1)
    base = folder.with_name(f"{folder.name}-base-{batch}-{torch.randint(1 << 30, ()).item()}")
    tiny.llama(dtype=torch.float32).save_pretrained(base)
    torch.manual_seed(0)
    model = get_peft_model(nf4lora.from_pretrained(base), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    data = [{"input_ids": row, "labels": row} for row in tiny.tokens(16)]
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=batch, max_steps=4, logging_steps=1, save_steps=4, report_to=[], use_cpu=True,
        disable_tqdm=True, learning_rate=2e-3, seed=1,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data, optimizer_cls_and_kwargs=(getattr(optim, kind), {"lr": 2e-3}))
    trainer.train()
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found = {"losses": losses, "processes": arguments.world_size, "optimizer": type(trainer.optimizer.optimizer).__name__}
        (folder / "losses.json").write_text(json.dumps(found))
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
