"""Trainer, and trl's SFTTrainer and DPOTrainer, on a base in 4 bits: they train, save, and resume bit for bit."""

import json

import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

import nf4lora.hf  # noqa: F401 (registers NF4Config)
from nf4lora import NF4Linear, replace_linears
from nf4lora.hf.config import NF4Config
from nf4lora.hf.loading import from_pretrained

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = [{"input_ids": row, "labels": row} for row in tiny.tokens(2, 12, seed=3).repeat(8, 1)]  # two, to be learnt
COMMON = dict(
    max_steps=6, save_steps=3, logging_steps=1, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], use_cpu=True,
    disable_tqdm=True, seed=5, gradient_checkpointing=False, bf16=False,
)  # fmt: skip
LORA = dict(r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear")


class Stop(TrainerCallback):
    """As a run that is killed after its third step."""

    def on_save(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 3


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    tiny.llama(dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, tiny.VOCABULARY)}}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def text(row):
    return " ".join(f"w{i}" for i in row.tolist())


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def interrupted(build, folder):
    """Runs 6 steps; 3 steps and then 3 more of another process' objects; -> both trainers."""
    whole = build(folder / "whole", [])
    whole.train()
    build(folder / "parts", [Stop()]).train()
    assert not (folder / "parts" / "checkpoint-6").exists()
    rest = build(folder / "parts", [])
    rest.train(resume_from_checkpoint=True)
    found = losses(whole)
    assert len(found) == 6 and losses(rest)[-3:] == found[3:] and sum(found[3:]) < sum(found[:3])
    return whole, rest


def same_files(folder, name):
    one, other = (load_file(folder / run / "checkpoint-6" / name) for run in ("whole", "parts"))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    return one


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_with_peft_resumes(dense, tmp_path, checkpointing):
    def build(folder, callbacks):
        torch.manual_seed(1)
        model = peft.get_peft_model(from_pretrained(dense), peft.LoraConfig(**LORA))
        args = TrainingArguments(output_dir=folder, **COMMON | {"gradient_checkpointing": checkpointing})
        return Trainer(model, args, train_dataset=ROWS, callbacks=callbacks)

    whole, rest = interrupted(build, tmp_path)
    tensors = same_files(tmp_path, "adapter_model.safetensors")
    assert len(tensors) == 28 and not (tmp_path / "whole" / "checkpoint-6" / "model.safetensors").exists()
    base = from_pretrained(dense)
    assert all(torch.equal(a, b) for a, b in zip(
        (m.weight for m in base.modules() if isinstance(m, NF4Linear)),
        (m.weight for m in rest.model.modules() if isinstance(m, NF4Linear)), strict=True))  # fmt: skip
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "parts" / "checkpoint-6").eval()
    with torch.no_grad():
        ids = tiny.tokens()
        assert torch.equal(loaded(ids).logits, whole.model.eval()(ids).logits)


def test_trainer_with_our_layers_resumes(dense, tmp_path):
    """Without peft: refused until the model holds adapters; checkpoints are of the whole model."""
    args = TrainingArguments(output_dir=tmp_path, **COMMON)
    with pytest.raises(ValueError, match="quantized"):
        Trainer(from_pretrained(dense), args, train_dataset=ROWS)

    def build(folder, callbacks):
        torch.manual_seed(1)
        model = replace_linears(from_pretrained(dense), r=4, lora_alpha=8, lora_dropout=0.1)
        model.requires_grad_(False)
        for name, p in model.named_parameters():
            p.requires_grad_(name.endswith(("lora_A", "lora_B")))
        return Trainer(model, TrainingArguments(output_dir=folder, **COMMON), train_dataset=ROWS, callbacks=callbacks)

    interrupted(build, tmp_path)
    tensors = same_files(tmp_path, "model.safetensors")
    assert sum(name.endswith("lora_B") and bool(t.any()) for name, t in tensors.items()) == 14


def test_sft_resumes(dense, tmp_path, tokenizer):
    """From the path of a 16-bit model, as its documentation has it, and adapters of peft."""
    import datasets
    import trl

    data = datasets.Dataset.from_dict({"text": [text(row["input_ids"]) for row in ROWS]})

    def build(folder, callbacks):
        torch.manual_seed(1)
        args = trl.SFTConfig(
            output_dir=folder, max_length=16, model_init_kwargs={"dtype": "float32"}, **COMMON | {"gradient_checkpointing": True}
        )
        return trl.SFTTrainer(
            str(dense), args, train_dataset=data, processing_class=tokenizer, quantization_config=NF4Config(),
            peft_config=peft.LoraConfig(task_type="CAUSAL_LM", **LORA), callbacks=callbacks,
        )  # fmt: skip

    whole, _ = interrupted(build, tmp_path)
    assert sum(isinstance(m, NF4Linear) for m in whole.model.modules()) == 14
    assert len(same_files(tmp_path, "adapter_model.safetensors")) == 28
    said = json.loads((tmp_path / "whole" / "checkpoint-6" / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(dense)


def test_dpo_takes_the_base_as_its_reference(dense, tmp_path, tokenizer):
    """With its adapter switched off: what it compares with is the 4-bit model, before and after training."""
    import datasets
    import trl

    rows = [row["input_ids"] for row in ROWS]
    data = datasets.Dataset.from_dict({
        "prompt": [text(r[:4]) for r in rows], "chosen": [" " + text(r[4:8]) for r in rows],
        "rejected": [" " + text(r[8:]) for r in rows],
    })  # fmt: skip
    args = trl.DPOConfig(output_dir=tmp_path, max_length=16, beta=0.5, **COMMON | {"save_strategy": "no"})
    model = from_pretrained(dense)
    trainer = trl.DPOTrainer(
        model, None, args, train_dataset=data, processing_class=tokenizer,
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", **LORA | {"lora_dropout": 0.0}),
    )  # fmt: skip
    assert trainer.ref_model is None
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.train()
    found = losses(trainer)
    assert abs(found[0] - 0.6931) < 1e-3 and found[-1] < found[0]

    base = from_pretrained(dense)
    ids, answers = batch["input_ids"], batch["completion_mask"].bool()
    with torch.no_grad():
        logits = base(ids, attention_mask=batch["attention_mask"]).logits
        wanted = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0].mul(answers[:, 1:]).sum(1)
        trainer.model.eval()
        with trainer.model.disable_adapter():
            assert torch.equal(trainer.model(ids, attention_mask=batch["attention_mask"]).logits, logits)
        trained = trainer.model(ids, attention_mask=batch["attention_mask"]).logits
    assert not torch.allclose(trained, logits, atol=1e-2)
    reference = torch.cat(trainer.compute_ref_log_probs(trainer.model, batch))
    torch.testing.assert_close(reference, wanted, rtol=1e-5, atol=1e-4)
