"""The optimizers under transformers' Trainer and under accelerate: a run that was resumed has the bits of one that was not."""

from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, get_scheduler

from nf4lora.nn import replace_linears
from nf4lora.optim import AdamW8bit, PagedAdamW, PagedAdamW8bit, PagedLion, PagedLion8bit

STEPS, SAVED = 6, 3
ROWS = [{"input_ids": row, "labels": row} for row in torch.randint(64, (24, 12), generator=torch.Generator().manual_seed(0))]
CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=16,
    bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:paged optimizer. nothing pages")


def new_model(dtype) -> nn.Module:
    """As a new process makes it: no two are alike, so that what a checkpoint lacks would differ."""
    model = LlamaForCausalLM(CONFIG)
    for p in model.parameters():
        p.requires_grad_(p.ndim == 1)  # norms: states of 32 bits beside those of 8
    return replace_linears(model, ["q_proj", "o_proj", "up_proj"], r=64, lora_dropout=0.1).to(dtype)


def trained(model) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def everything(model, optimizer) -> dict[str, torch.Tensor]:
    """Bytes of the model, of the states and of torch's generator."""
    found = {f"model.{name}": t.clone() for name, t in model.state_dict().items()}
    for i, entry in optimizer.state_dict()["state"].items():
        found |= {f"{i}.{name}": torch.as_tensor(value) for name, value in entry.items()}
    return found | {"generator": torch.get_rng_state()}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    assert not [name for name in found if not torch.equal(found[name], wanted[name])]


def states_are_of(optimizer, cls):
    """Both widths were at work."""
    made = {entry["state1"].dtype for entry in optimizer.state_dict()["state"].values()}
    assert made == ({torch.float32} if cls is PagedAdamW else {torch.float32, torch.uint8})


def addresses(optimizer) -> set[int]:
    return {t.data_ptr() for entry in optimizer.state.values() for t in entry.values() if isinstance(t, torch.Tensor)}


# ---- Trainer


def new_trainer(cls, dtype, folder, how, options, **arguments) -> Trainer:
    model = new_model(dtype)
    args = TrainingArguments(
        folder, max_steps=STEPS, save_steps=SAVED, per_device_train_batch_size=2, learning_rate=1e-2, warmup_steps=2, seed=5,
        lr_scheduler_type="cosine", weight_decay=0.1, use_cpu=True, report_to="none", disable_tqdm=True,
        logging_steps=1, **arguments,
    )  # fmt: skip
    if how == "optimizers":
        optimizer = cls(trained(model), lr=1e-2, weight_decay=0.1, **options)
        made = {"optimizers": (optimizer, get_scheduler("cosine", optimizer, 2, STEPS))}
    else:
        made = {"optimizer_cls_and_kwargs": (cls, {"lr": 1e-2, **options})}
    return Trainer(model, args, train_dataset=ROWS, **made)


TRAINED = {
    "fp32, given": (PagedAdamW8bit, torch.float32, "optimizers", {}, {"max_grad_norm": 0.0}),
    "bf16, class": (PagedAdamW8bit, torch.bfloat16, "class", {"stochastic_rounding": True}, {"gradient_accumulation_steps": 2}),
    "bf16, given": (
        PagedAdamW, torch.bfloat16, "optimizers", {"stochastic_rounding": True, "skip_nonfinite": True},
        {"gradient_accumulation_steps": 2, "max_grad_norm": 0.3},
    ),
    "bf16 autocast": (AdamW8bit, torch.float32, "class", {"skip_nonfinite": True}, {"bf16": True, "max_grad_norm": 0.3}),
    "lion": (PagedLion8bit, torch.bfloat16, "class", {"stochastic_rounding": True}, {"max_grad_norm": 0.3}),
}  # fmt: skip


@pytest.mark.parametrize("which", TRAINED)
def test_the_trainer_resumes_to_the_bit(which, tmp_path, one_thread):
    cls, dtype, how, options, arguments = TRAINED[which]
    make = partial(new_trainer, cls, dtype, str(tmp_path), how, options, **arguments)
    whole = make()
    whole.train()
    wanted, losses = everything(whole.model, whole.optimizer), [entry for entry in whole.state.log_history if "loss" in entry]
    states_are_of(whole.optimizer, cls)
    resumed = make()
    assert not resumed.optimizer or not resumed.optimizer.state
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{SAVED}"))
    assert_same(everything(resumed.model, resumed.optimizer), wanted)
    assert [entry for entry in resumed.state.log_history if "loss" in entry] == losses and len(losses) == STEPS
    assert type(resumed.optimizer.optimizer) is cls and resumed.state.global_step == STEPS
    saved = torch.load(tmp_path / f"checkpoint-{SAVED}" / "optimizer.pt", weights_only=True)
    assert {entry["step"] for entry in saved["state"].values()} == {SAVED}
    assert all(t.device.type == "cpu" for entry in saved["state"].values() for t in entry.values() if isinstance(t, torch.Tensor))


def test_a_checkpoint_of_another_optimizer_is_refused_by_name(tmp_path, one_thread):
    new_trainer(PagedAdamW8bit, torch.float32, str(tmp_path), "class", {}).train()
    other = new_trainer(PagedLion8bit, torch.float32, str(tmp_path), "class", {})
    with pytest.raises(ValueError, match=r"state\[\d+\]: unexpected .*, wanted lion with states of \d+ bits"):
        other.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{SAVED}"))


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("paged_adamw_8bit", PagedAdamW8bit), ("paged_adamw_32bit", PagedAdamW), ("adamw_8bit", AdamW8bit),
        ("paged_lion_8bit", PagedLion8bit), ("paged_lion_32bit", PagedLion), ("adamw_torch_fused", PagedAdamW),
    ],
)  # fmt: skip
def test_what_transformers_gives_an_optimizer_of_that_name_is_taken(name, cls, tmp_path):
    pytest.importorskip("bitsandbytes")
    args = TrainingArguments(str(tmp_path), optim=name, learning_rate=0.5, adam_beta2=0.75, use_cpu=True, report_to="none")
    _, given = Trainer.get_optimizer_cls_and_kwargs(args)
    group = cls([nn.Parameter(torch.ones(1))], **given).param_groups[0]
    assert {"optim_bits", "is_paged", "fused"} & given.keys() and group["lr"] == 0.5 and group["betas"] == (0.9, 0.75)


# ---- accelerate


@pytest.fixture(autouse=True)
def no_accelerator_of_before():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def accelerated(cls, dtype, options, precision="no", accumulation=1):
    """(accelerator, model, optimizer, scheduler, batches), prepared."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulation)
    model = new_model(dtype)
    optimizer = cls(trained(model), lr=1e-2, weight_decay=0.1, **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    batches = torch.utils.data.DataLoader(ROWS, batch_size=2)
    return accelerator, *accelerator.prepare(model, optimizer, scheduler, batches)


def train(accelerator, model, optimizer, scheduler, batches, first, last, clip=None):
    model.train()
    for i, batch in enumerate(batches):
        if not first <= i < last:
            continue
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if clip and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


ACCELERATED = {
    "fp32": (PagedAdamW8bit, torch.float32, {}, {}, None),
    "bf16, accumulated, clipped": (PagedAdamW8bit, torch.bfloat16, {"stochastic_rounding": True}, {"accumulation": 2}, 0.3),
    "mixed": (PagedAdamW, torch.float32, {"skip_nonfinite": True}, {"precision": "bf16"}, 0.3),
    "lion": (PagedLion8bit, torch.bfloat16, {"stochastic_rounding": True}, {}, None),
}


@pytest.mark.parametrize("which", ACCELERATED)
@pytest.mark.parametrize("late", (False, True), ids=("loaded new", "loaded after steps"))
def test_accelerate_resumes_to_the_bit(which, late, tmp_path, one_thread):
    cls, dtype, options, prepared, clip = ACCELERATED[which]
    make = partial(accelerated, cls, dtype, options, **prepared)
    whole = make()
    train(*whole, 0, 4, clip)
    whole[0].save_state(str(tmp_path))
    train(*whole, 4, 8, clip)
    wanted = everything(whole[1], whole[2])
    states_are_of(whole[2], cls)
    resumed = make()
    if late:
        train(*resumed, 6, 10, clip)
    lie = addresses(resumed[2])
    resumed[0].load_state(str(tmp_path))
    assert not late or lie == addresses(resumed[2])
    train(*resumed, 4, 8, clip)
    assert_same(everything(resumed[1], resumed[2]), wanted)
    (file,) = Path(tmp_path).glob("optimizer*")
    assert torch.load(file, weights_only=True)["state"][0]["step"] == 4 // prepared.get("accumulation", 1)
