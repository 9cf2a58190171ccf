"""Trainer makes our optimizers by the names it knows, and keeps a 4-bit model on one GPU."""

import inspect
import re
import sys
import warnings
from functools import partial

import pytest
import tiny
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from nf4lora import NF4Linear, replace_linears
from nf4lora.hf import trainer as patches
from nf4lora.hf.trainer import keep_one_gpu_per_process, patch_trainer_optimizers, unpatch_trainer_optimizers
from nf4lora.optim import AdamW8bit, PagedAdamW, PagedAdamW8bit, PagedLion, PagedLion8bit

STEPS, SAVED = 4, 2
ROWS = [{"input_ids": row, "labels": row} for row in tiny.tokens(16, 12)]
NAMES = {
    "adamw_8bit": AdamW8bit,
    "adamw_bnb_8bit": AdamW8bit,
    "paged_adamw_32bit": PagedAdamW,
    "paged_adamw_8bit": PagedAdamW8bit,
    "paged_lion_32bit": PagedLion,
    "paged_lion_8bit": PagedLion8bit,
}

pytestmark = [
    pytest.mark.usefixtures("one_thread", "unpatched"),
    pytest.mark.filterwarnings("ignore:paged optimizer. nothing pages"),
]


@pytest.fixture
def unpatched():
    init, known = Trainer.__init__, dict(patches._originals)
    yield
    unpatch_trainer_optimizers()
    Trainer.__init__ = init
    patches._originals.clear()
    patches._originals.update(known)


@pytest.fixture
def no_bitsandbytes(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError):
        import bitsandbytes  # noqa: F401


def arguments(folder, **more) -> TrainingArguments:
    wanted = {
        "max_steps": STEPS, "save_steps": SAVED, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "warmup_steps": 1,
        "weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6, "seed": 5, "logging_steps": 1,
        "use_cpu": True, "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    return TrainingArguments(str(folder), **wanted | more)


def trainer(folder, given=None, **more) -> Trainer:
    """Of a model that no checkpoint lacks anything of: its adapters start anew each time."""
    model = tiny.llama(dtype=torch.float32).requires_grad_(False)
    replace_linears(model, r=64, lora_dropout=0.1)
    return Trainer(model, arguments(folder, **more), train_dataset=ROWS, **given or {})


def everything(trained) -> dict[str, torch.Tensor]:
    found = {f"model.{name}": t.clone() for name, t in trained.model.state_dict().items()}
    for i, entry in trained.optimizer.state_dict()["state"].items():
        found |= {f"{i}.{name}": torch.as_tensor(value) for name, value in entry.items()}
    return found


# ---- the names


@pytest.mark.parametrize("name", NAMES)
def test_a_name_makes_ours_with_the_numbers_of_the_arguments(name, tmp_path, no_bitsandbytes):
    patch_trainer_optimizers()
    run = trainer(tmp_path, optim=name)
    run.create_optimizer()
    assert type(run.optimizer) is NAMES[name]
    decayed, others = run.optimizer.param_groups
    for group, decay in ((decayed, 0.1), (others, 0.0)):
        assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-2, (0.8, 0.95), decay)
        assert group["eps"] == (1e-6 if "adamw" in name else 0.0)
    assert len(decayed["params"]) == 28 and not others["params"]


def test_options_of_ours_in_optim_args_and_no_others(tmp_path):
    patch_trainer_optimizers()
    given = "min_8bit_size=0, stochastic_rounding=True,budget=None,rank=7"
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, optim="paged_adamw_8bit", optim_args=given))
    assert kwargs == {
        "lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "min_8bit_size": 0, "stochastic_rounding": True, "budget": None,
    }  # fmt: skip
    made = cls([nn.Parameter(torch.ones(8))], **kwargs)
    assert made._options["min_8bit_size"] == 0 and made._options["stochastic_rounding"] is True


def test_a_bad_value_in_optim_args_is_named(tmp_path):
    patch_trainer_optimizers()
    for value in ("yes", "", "1+"):
        args = arguments(tmp_path, optim="paged_lion_8bit", optim_args=f"skip_nonfinite={value}")
        with pytest.raises(ValueError, match=f"optim_args: found 'skip_nonfinite={re.escape(value)}', wanted skip_nonfinite="):
            Trainer.get_optimizer_cls_and_kwargs(args)
    args = arguments(tmp_path, optim="paged_lion_8bit", optim_args="skip_nonfinite=3")
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
    with pytest.raises(ValueError, match="skip_nonfinite: found 3, wanted True or False"):
        cls([nn.Parameter(torch.ones(8))], **kwargs)


def test_other_names_and_unpatched_names_are_as_they_were(tmp_path, monkeypatch):
    before = inspect.getattr_static(Trainer, "get_optimizer_cls_and_kwargs").__func__
    others = [arguments(tmp_path, optim=name) for name in ("adamw_torch", "sgd", "adafactor", "lion_8bit")]
    wanted = list(map(Trainer.get_optimizer_cls_and_kwargs, others))
    patch_trainer_optimizers()
    once = Trainer.get_optimizer_cls_and_kwargs
    patch_trainer_optimizers()
    assert Trainer.get_optimizer_cls_and_kwargs is once and once is not before
    assert list(map(Trainer.get_optimizer_cls_and_kwargs, others)) == wanted
    unpatch_trainer_optimizers()
    unpatch_trainer_optimizers()
    assert inspect.getattr_static(Trainer, "get_optimizer_cls_and_kwargs").__func__ is before
    assert isinstance(inspect.getattr_static(Trainer, "get_optimizer_cls_and_kwargs"), staticmethod)
    cls, _ = Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, optim="paged_adamw_8bit"))
    assert cls.__module__.startswith("bitsandbytes")


@pytest.mark.parametrize("change", ["absent", "different"])
def test_another_transformers_is_refused(change, monkeypatch):
    if change == "absent":
        monkeypatch.delattr(Trainer, "get_optimizer_cls_and_kwargs")
    else:
        monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", lambda self, context: None)
    before = dict(patches._originals)
    with pytest.raises(RuntimeError, match=r"patched nothing; give Trainer\(optimizer_cls_and_kwargs="):
        patch_trainer_optimizers()
    assert patches._originals == before
    monkeypatch.undo()


@pytest.mark.parametrize("how", ["name", "optimizer_cls_and_kwargs"])
def test_a_run_resumes_to_the_bit(how, tmp_path, no_bitsandbytes):
    if how == "name":
        patch_trainer_optimizers()
        make = partial(trainer, tmp_path, optim="paged_adamw_8bit", optim_args="min_8bit_size=0")
    else:
        make = partial(trainer, tmp_path, {"optimizer_cls_and_kwargs": (PagedAdamW8bit, {"lr": 1e-2})})
    whole = make()
    whole.train()
    wanted = everything(whole)
    assert {t.dtype for name, t in wanted.items() if name.endswith("state1")} == (
        {torch.uint8} if how == "name" else {torch.uint8, torch.float32}  # of k_proj and v_proj, below 4096 elements
    )
    resumed = make()
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{SAVED}"))
    found = everything(resumed)
    assert found.keys() == wanted.keys() and not [name for name in found if not torch.equal(found[name], wanted[name])]
    assert type(resumed.optimizer.optimizer) is PagedAdamW8bit and resumed.state.global_step == STEPS
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (whole, resumed)]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS


# ---- several GPUs in one process


def two_gpus(args):
    args._n_gpu = 2
    return args


def test_a_4_bit_model_keeps_to_one_gpu(tmp_path):
    keep_one_gpu_per_process()
    once = Trainer.__init__
    keep_one_gpu_per_process()
    assert Trainer.__init__ is once
    for how in ("by position", "by name"):
        model = replace_linears(tiny.llama(dtype=torch.float32).requires_grad_(False), r=4)
        args = two_gpus(arguments(tmp_path, save_strategy="no"))
        given, named = ((model, args), {}) if how == "by position" else ((), {"args": args, "model": model})
        with pytest.warns(UserWarning, match="found 2 GPUs in one process.*accelerate launch") as told:
            run = Trainer(*given, train_dataset=ROWS, **named)
        assert [w.filename for w in told if "GPUs" in str(w.message)] == [__file__]
        assert args.n_gpu == 1 and run._train_batch_size == 2
        run.train()
        assert not isinstance(run.model_wrapped, nn.DataParallel)


def test_others_are_left_alone(tmp_path):
    keep_one_gpu_per_process()
    spread = replace_linears(tiny.llama(), layer=NF4Linear)
    spread.hf_device_map = {"model": 0, "lm_head": 1}
    plain = tiny.llama()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patches._use_one_gpu(plain, args := two_gpus(arguments(tmp_path)))
        assert args.n_gpu == 2
        patches._use_one_gpu(spread, args)
        patches._use_one_gpu(replace_linears(tiny.llama()), None)
        patches._use_one_gpu(None, args)
        one = arguments(tmp_path)
        patches._use_one_gpu(replace_linears(tiny.llama()), one)
    assert args.n_gpu == 2 and one.n_gpu <= 1
    with pytest.raises(TypeError, match="unexpected keyword argument 'modell'"):
        Trainer(modell=plain)


def test_without_it_trainer_would_wrap_the_model(tmp_path, monkeypatch):
    """The trap is there in the transformers that is installed."""
    keep_one_gpu_per_process()
    monkeypatch.setattr(Trainer, "__init__", Trainer.__init__.__wrapped__)
    model = replace_linears(tiny.llama(dtype=torch.float32).requires_grad_(False), r=4)
    run = Trainer(model, two_gpus(arguments(tmp_path)), train_dataset=ROWS)
    assert isinstance(run._wrap_model(run.model), nn.DataParallel) and run._train_batch_size == 4
