"""AdaLoRA on an NF4 base: against peft's own on the decoded base, in Trainer, and as the continuation of a LoRA adapter."""

import copy
import json
import shutil
from types import SimpleNamespace

import pytest
import safetensors.torch
import tiny
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.adalora import SVDLinear
from torch import nn
from transformers import Trainer, TrainingArguments

from nf4lora import autograd
from nf4lora.hf import peft_adalora
from nf4lora.hf.adalora import RECORDS, STATE, AdaLoraCallback
from nf4lora.hf.adalora_continue import continue_as_adalora
from nf4lora.hf.adalora_records import plot_ranks, read_records
from nf4lora.hf.adalora_state import load_state, singular_values, triplet_scores, tuner_of
from nf4lora.hf.peft_adalora import NF4SVDLinear
from nf4lora.nn import NF4Linear, NF4LoRALinear, replace_linears
from nf4lora.optim import PagedAdamW8bit

TARGETS = ["q_proj", "v_proj", "down_proj"]
X = tiny.tokens(4, 16)


@pytest.fixture(autouse=True)
def _installed():
    peft_adalora.install()
    yield
    peft_adalora.install()


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """These products are too small to share; of the run that others compare with, too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def base(dtype=torch.float32, **changes):
    return replace_linears(tiny.llama(dtype=dtype, **changes), layer=NF4Linear).requires_grad_(False)


def decoded(model):
    """A dense copy that holds the decoded weights."""
    dense = copy.deepcopy(model)
    for name, m in list(dense.named_modules()):
        if isinstance(m, NF4Linear):
            linear = nn.Linear(m.in_features, m.out_features, bias=m.bias is not None)
            linear.weight = nn.Parameter(m.dequantize(torch.float32), requires_grad=False)
            dense.set_submodule(name, linear)
    return dense


def config(**changes):
    schedule = {"init_r": 6, "target_r": 3, "tinit": 2, "tfinal": 3, "deltaT": 2, "total_step": 12}
    return AdaLoraConfig(**{**schedule, "lora_alpha": 16, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **changes})


def tuned(model, adalora, seed=1):
    torch.manual_seed(seed)
    return get_peft_model(model, adalora)


def started(model, seed=2):
    """Adapters as after some training: no zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * (3 if "lora_E" in name else 0.1))
    return model


def first(model):
    return model.base_model.model.model.layers[0].self_attn.q_proj


def step(model, optimizer, number):
    loss = model(input_ids=X, labels=X).loss
    loss.backward()
    optimizer.step()
    model.base_model.update_and_allocate(number)
    optimizer.zero_grad()
    return loss.item()


def relative(found, wanted):
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def test_a_run_is_that_of_peft_on_the_decoded_base():
    ours = base()
    models = [tuned(m, config(tinit=5, tfinal=8, total_step=36)).train() for m in (ours, decoded(ours))]
    assert type(first(models[0])) is NF4SVDLinear and type(first(models[1])) is SVDLinear
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in models]
    patterns = set()
    for number in range(1, 37):
        losses = [step(m, o, number) for m, o in zip(models, optimizers, strict=True)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        found, wanted = (m.peft_config["default"].rank_pattern for m in models)
        assert found == wanted, number
        patterns.add(json.dumps(found))
        if number < 28:
            scores = [triplet_scores(m.base_model) for m in models]
            assert scores[0].keys() == scores[1].keys()
            assert all(relative(s, scores[1][layer]) < 1e-3 for layer, s in scores[0].items()), number
    assert len(patterns) > 8 and sum(map(sum, found.values())) == 3 * 6
    for m in models:
        m.peft_config["default"].orth_reg_weight = 0.0
    plain = [m(input_ids=X, labels=X).loss.item() for m in models]
    assert losses[0] - plain[0] > 0.05 and losses[0] - plain[0] == pytest.approx(losses[1] - plain[1], rel=1e-2)
    found, wanted = (m.eval()(X).logits for m in models)
    assert relative(found, wanted) < 1e-5


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_one_call_computes_what_peft_does(dtype, tolerance, monkeypatch):
    layer = first(started(tuned(base(dtype), config())))
    calls, fused = [], autograd.linear
    monkeypatch.setattr(autograd, "linear", lambda *args: calls.append(args) or fused(*args))
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    parameters = [layer.lora_A["default"], layer.lora_E["default"], layer.lora_B["default"]]
    results = []
    for forward in (layer.forward, super(NF4SVDLinear, layer).forward):
        calls.clear()
        leaf = x.clone().requires_grad_()
        y = forward(leaf)
        assert len(calls) == 1 and y.dtype == dtype
        results.append([y, *torch.autograd.grad(y.float().square().sum(), [leaf, *parameters])])
        assert (calls[0][6] is not None) == (forward == layer.forward)  # lora_A is in the call, or peft added the rest
    for found, wanted in zip(*results, strict=True):
        assert found.dtype == wanted.dtype and relative(found.float(), wanted.float()) < tolerance
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.float()).dtype == torch.bfloat16


def test_dropout_is_the_operations_and_of_training_alone():
    layer = first(started(tuned(base(), config(lora_dropout=0.5)))).train()
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    plain = layer.base_layer(x)
    torch.manual_seed(5)
    one, other = layer(x), layer(x)
    torch.manual_seed(5)
    assert torch.equal(layer(x), one) and not torch.equal(one, other)
    torch.manual_seed(5)
    seed = torch.randint(2**63 - 1, (1,))
    mask = autograd.linear(
        torch.ones_like(x), *layer.base_layer._weight_args(), None, torch.eye(64), torch.eye(64), seed, 64, 64, "nf4", 1.0, 0.5
    ) - layer.base_layer(torch.ones_like(x))
    dropped = (x * mask.round()) @ (layer.lora_A["default"] * layer.lora_E["default"]).T @ layer.lora_B["default"].T
    assert 0.4 < (mask.round() == 0).float().mean() < 0.6
    assert relative(one - plain, dropped * 16 / (6 + 1e-5)) < 1e-5
    assert torch.equal(layer.eval()(x), layer(x))


def test_the_divisor_follows_its_parameter_and_is_read_once():
    layer = first(started(tuned(base(), config())))
    x = torch.randn(3, 64)
    peft_forward = super(NF4SVDLinear, layer).forward

    def same():
        return relative(layer(x), peft_forward(x)) < 1e-6

    assert same() and (read := layer._ranknums["default"])[2] == 6
    assert same() and layer._ranknums["default"] is read
    layer.load_state_dict(layer.state_dict() | {"ranknum.default": torch.tensor([9.0])})
    assert same() and layer._ranknums["default"][2] == 9
    with torch.no_grad():
        layer.ranknum["default"].fill_(2)
    assert same() and layer._ranknums["default"][2] == 2
    layer.update_layer("default", 4, 16, config=config())
    started(layer)
    assert same() and layer._ranknums["default"][2] == 4
    layer.update_layer("default", 5, 16, config=config())
    started(layer)
    assert same() and layer._ranknums["default"][2] == 5
    assert layer.double() is layer and layer._ranknum("default") == 5
    layer.float().update_layer("default", 0, 16, config=config())
    assert torch.equal(layer(x), layer.base_layer(x))
    with torch.inference_mode():
        inference = first(started(tuned(base(), config())))
        assert relative(inference(x), super(NF4SVDLinear, inference).forward(x)) < 1e-6


def test_the_rank_is_never_trained(tmp_path):
    """Also where peft casts adapters to what the base computes in, as on a checkpoint of bitsandbytes, and makes new parameters."""

    def on_bfloat16():
        return replace_linears(tiny.llama(), layer=NF4Linear, compute_dtype=torch.bfloat16).requires_grad_(False)

    model = tuned(on_bfloat16(), config())
    with pytest.raises(ValueError, match="only 1 trainable adapter"):
        model.add_adapter("second", config())
    model.add_adapter("second", config(inference_mode=True))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(on_bfloat16(), tmp_path, is_trainable=True, low_cpu_mem_usage=True)
    for m, adapters in ((model, 2), (loaded, 1)):
        ranks = {n: p for n, p in m.named_parameters() if ".ranknum." in n}
        assert len(ranks) == adapters * 2 * len(TARGETS) and not [n for n, p in ranks.items() if p.requires_grad]
        assert all(p.item() == 6 for p in ranks.values())
    loaded(input_ids=X, labels=X).loss.backward()
    assert not [n for n, p in loaded.named_parameters() if p.requires_grad and p.grad is None]  # what DDP would wait for


def test_compiled_whole_it_computes_the_same():
    layer = first(started(tuned(base(), config())))
    x = torch.randn(3, 64)
    assert relative(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x)) < 1e-6


def test_what_is_not_one_adapter_on_a_plain_base_is_left_to_peft(tmp_path):
    model = started(tuned(base(), config()))
    started(model, seed=3).save_pretrained(tmp_path)
    layer, x = first(model), torch.randn(3, 64)
    alone = layer(x)
    model.load_adapter(tmp_path, "second")
    assert type(first(model)) is NF4SVDLinear
    layer.set_adapter(["default", "second"])
    plain = layer.base_layer(x)
    assert relative(layer(x) - plain, 2 * (alone - plain)) < 1e-5
    layer.set_adapter("default")
    assert torch.equal(layer(x), alone)
    with model.disable_adapter():
        assert torch.equal(layer(x), plain)
    seen = []
    handle = layer.base_layer.register_forward_hook(lambda *args: seen.append(args))
    assert relative(layer(x), alone) < 1e-6 and len(seen) == 1
    handle.remove()


def test_layers_that_compute_more_than_the_base_and_peft_without_us():
    own = replace_linears(tiny.llama(dtype=torch.float32), layer=NF4LoRALinear, r=0).requires_grad_(False)
    assert type(first(tuned(own, config()))) is SVDLinear
    peft_adalora.uninstall()
    assert type(first(tuned(base(), config()))) is SVDLinear


def test_saved_and_loaded_it_is_the_same_also_cut_to_its_ranks(tmp_path):
    model = tuned(base(), config()).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for number in range(1, 13):
        step(model, optimizer, number)
    wanted = model.eval()(X).logits
    model.save_pretrained(tmp_path)
    kept = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    assert sum(map(sum, kept.values())) == 18 and len(set(map(sum, kept.values()))) > 1
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert type(first(loaded)) is NF4SVDLinear
    assert len(first(loaded).lora_E["default"]) == sum(kept["model.layers.0.self_attn.q_proj.lora_E"])
    assert relative(loaded(X).logits, wanted) < 1e-6
    again = PeftModel.from_pretrained(base(), tmp_path, adapter_name="other").eval()
    assert torch.equal(again(X).logits, loaded(X).logits)
    # peft alone, on the decoded base
    peft_adalora.uninstall()
    assert relative(PeftModel.from_pretrained(decoded(base()), tmp_path).eval()(X).logits, wanted) < 1e-5


def test_paged_8_bit_optimizer_trains_it():
    model = tuned(base(), config()).train()
    optimizer = PagedAdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = [step(model, optimizer, number) for number in range(1, 13)]
    assert losses[-1] < losses[0] - 0.3
    assert sum(map(sum, model.peft_config["default"].rank_pattern.values())) == 18


DATA = [{"input_ids": row, "labels": row} for row in tiny.tokens(32, 12)]


class Recording(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        batch = {name: t.clone() for name, t in inputs.items()} | {"num_items_in_batch": num_items_in_batch}
        self.batches = [*getattr(self, "batches", []), batch]
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def trained(folder, resume=None, model=None, callback=None, **changes):
    torch.manual_seed(1)
    model = model or tuned(base(), config())
    arguments = {"max_steps": 12, "per_device_train_batch_size": 4, "save_steps": 5, "logging_steps": 6, **changes}
    args = TrainingArguments(folder, use_cpu=True, report_to=[], disable_tqdm=True, learning_rate=1e-2, seed=3, **arguments)
    callback = callback or AdaLoraCallback()
    trainer = Recording(model, args, train_dataset=DATA, callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    return trainer, model, callback


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    peft_adalora.install()
    folder = tmp_path_factory.mktemp("run")
    return folder, *trained(folder, callback=AdaLoraCallback(log_layers=True))


def test_trainer_steps_the_allocator_and_writes_what_it_does(run, tmp_path):
    folder, trainer, model, callback = run
    records = callback.records
    assert [r["step"] for r in records] == [4, 6, 8, 9]  # deltaT 2 after tinit 2; total_step - tfinal
    assert records == read_records(folder / RECORDS)
    for r in records:
        assert r["total_rank"] == sum(r["ranks"].values()) == r["budget"] and r["ranks"].keys() == r["importances"].keys()
        assert all(value > 0 for value in r["importances"].values())
    assert records[-1]["total_rank"] == 18
    newest = [r for r in trainer.state.log_history if "loss" in r][-1]
    assert newest["adalora_budget"] == newest["adalora_total_rank"] == 18
    assert newest["adalora_ranks/model.layers.0.self_attn.q_proj"] == records[-1]["ranks"]["model.layers.0.self_attn.q_proj"]
    pattern = model.peft_config["default"].rank_pattern
    assert [sum(kept) for kept in pattern.values()] == list(records[-1]["ranks"].values())
    wanted = model.eval()(X).logits
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < (
        folder / "checkpoint-12/adapter_model.safetensors"
    ).stat().st_size
    for saved in (tmp_path, folder / "checkpoint-12"):  # the checkpoint has all directions, to go on from
        assert relative(PeftModel.from_pretrained(base(), saved).eval()(X).logits, wanted) < 1e-6
    plot_ranks(records, tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and (tmp_path / "ranks.png").stat().st_size > 10_000
    plot_ranks(records[:1], tmp_path / "one.png")
    with pytest.raises(ValueError, match="records: found none"):
        plot_ranks([], tmp_path / "none.png")
    with (folder / RECORDS).open("a") as file:
        file.write('{"step": 1')
    assert read_records(folder / RECORDS) == records


def test_the_trainer_run_is_the_loop_that_peft_wants(run):
    _, trainer, model, _ = run
    alone = tuned(base(), config()).train()
    optimizer = torch.optim.AdamW([p for p in alone.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: (12 - n) / 12)
    assert len(trainer.batches) == 12
    for number, batch in enumerate(trainer.batches, 1):
        alone(**batch).loss.backward()
        optimizer.step()
        rates.step()
        alone.base_model.update_and_allocate(number)
        optimizer.zero_grad()
    found, wanted = model.state_dict(), alone.state_dict()
    assert all(torch.allclose(t, wanted[name], atol=1e-6) for name, t in found.items())
    kept = [model.peft_config["default"].rank_pattern, alone.peft_config["default"].rank_pattern]
    assert [*kept[0].values()] == [*kept[1].values()]


@pytest.mark.parametrize("at", [5, 10])  # before and after the last allocation
def test_a_resumed_run_is_the_uninterrupted_one(run, tmp_path, at):
    folder, _, model, callback = run
    shutil.copytree(folder, tmp_path / "copy")
    _, resumed, again = trained(tmp_path / "copy", resume=tmp_path / f"copy/checkpoint-{at}")
    wanted = model.state_dict()
    assert all(torch.equal(t, wanted[name]) for name, t in resumed.state_dict().items())
    assert again.records == callback.records == read_records(tmp_path / "copy" / RECORDS)
    assert resumed.peft_config["default"].rank_pattern == {
        (name if name.endswith(".default") else name + ".default"): kept
        for name, kept in model.peft_config["default"].rank_pattern.items()
    }


@pytest.mark.parametrize("weight", [0.5, 5.0])
def test_accumulated_batches_are_one_batch(run, tmp_path, weight):
    """The orthogonality term too, which every accumulated batch would bring."""
    found = [
        trained(tmp_path / str(k), model=tuned(base(), config(orth_reg_weight=weight, total_step=4, tfinal=1, tinit=0)),
                max_steps=4, per_device_train_batch_size=8 // k, gradient_accumulation_steps=k, save_steps=100, logging_steps=1,
                max_grad_norm=0)
        for k in (1, 2)
    ]  # fmt: skip
    one, other = (m.state_dict() for _, m, _ in found)
    assert all(torch.allclose(t, other[name], atol=1e-6) for name, t in one.items())
    losses = [[r["loss"] for r in trainer.state.log_history if "loss" in r] for trainer, _, _ in found]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 4
    assert found[1][1].peft_config["default"].orth_reg_weight == weight


def test_the_term_stays_in_every_batch_of_a_mean():
    model = tuned(base(), config()).train()
    cb = AdaLoraCallback()
    args = SimpleNamespace(output_dir="unused", fsdp=None, deepspeed=None, world_size=2, average_tokens_across_devices=True)
    state = SimpleNamespace(max_steps=12, global_step=0, is_world_process_zero=False)
    cb.on_train_begin(args, state, None, model=model)
    terms = []
    for items in (None, None, torch.tensor(60), torch.tensor(60)):
        kwargs = {} if items is None else {"num_items_in_batch": items}
        seen = model(input_ids=X, labels=X, **kwargs).loss.item()
        cb._orthogonality.remove()
        model.peft_config["default"].orth_reg_weight = 0.0
        plain = model(input_ids=X, labels=X, **kwargs).loss.item()
        model.peft_config["default"].orth_reg_weight = 0.5
        due = cb._orthogonality.due
        cb.on_train_begin(args, state, None, model=model)
        cb._orthogonality.due = due
        terms.append(seen - plain)
    assert terms[0] == pytest.approx(terms[1]) and terms[0] > 0.1
    assert terms[2] == pytest.approx(terms[0] / 2, rel=1e-4) and terms[3] == pytest.approx(0, abs=1e-6)  # of two processes, once
    assert model.peft_config["default"].orth_reg_weight == 0.5
    cb._orthogonality.remove()


def test_bfloat16_autocast(tmp_path):
    _, model, callback = trained(tmp_path, bf16=True, save_steps=100, max_steps=12)
    assert callback.records[-1]["total_rank"] == 18
    assert all(p.dtype == torch.float32 and p.isfinite().all() for name, p in model.named_parameters() if "lora_" in name)


def test_the_length_of_the_schedule(tmp_path):
    with pytest.raises(ValueError, match="total_step: found 20, but the Trainer will take 12 steps; wanted total_step=12"):
        trained(tmp_path, model=tuned(base(), config(total_step=20)))
    with pytest.raises(ValueError, match="`total_step` is None"):
        AdaLoraConfig(init_r=6, target_r=3)
    model = tuned(base(), config())
    model.peft_config["default"].total_step = None  # as other tools may leave it
    _, model, callback = trained(tmp_path, model=model, save_steps=100)
    assert model.peft_config["default"].total_step == 12 and [r["step"] for r in callback.records] == [4, 6, 8, 9]
    fits = AdaLoraCallback(fit_total_step=True)
    _, model, _ = trained(
        tmp_path, model=tuned(base(), config(total_step=50, tfinal=2)), callback=fits, max_steps=6, save_steps=100
    )
    assert model.peft_config["default"].total_step == 6 and [r["step"] for r in fits.records] == [4]
    with pytest.raises(ValueError, match="tinit=2, tfinal=3, deltaT=2 for 5 steps"):
        trained(tmp_path, model=tuned(base(), config(total_step=50)), callback=AdaLoraCallback(fit_total_step=True), max_steps=5)


def begun(model, **changes):
    callback = AdaLoraCallback()
    args = SimpleNamespace(output_dir="unused", fsdp=None, deepspeed=None, world_size=1, average_tokens_across_devices=False)
    args.__dict__.update(changes)
    state = SimpleNamespace(max_steps=12, global_step=0, is_world_process_zero=False, log_history=[])
    callback.on_train_begin(args, state, None, model=model)
    return callback, args, state


def test_what_cannot_be_trained_so(tmp_path):
    for found in (base(), get_peft_model(base(), LoraConfig(target_modules=TARGETS))):
        with pytest.raises(TypeError, match="wanted the result of peft.get_peft_model"):
            begun(found)
    with pytest.raises(ValueError, match="target_r: found 7 with init_r 6"):
        tuned(base(), config(target_r=7))
    with pytest.raises(ValueError, match="target_r: found 6 with init_r 6"):
        tuned(base(), config(target_r=6))
    with pytest.raises(ValueError, match="target_r: found 0, wanted a positive integer"):
        tuned(base(), config(target_r=0))
    model = tuned(base(), config())
    for flag in ("fsdp", "deepspeed"):
        with pytest.raises(ValueError, match="FSDP or DeepSpeed"):
            begun(model, **{flag: "on"})
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="without gradients; load it with .*is_trainable=True"):
        begun(PeftModel.from_pretrained(base(), tmp_path))
    frozen = tuned(base(), config()).requires_grad_(False)
    with pytest.raises(ValueError, match="without gradients"):
        begun(frozen)
    for number in range(1, 13):
        with torch.enable_grad():
            (sum((p * p).sum() for n, p in model.named_parameters() if "lora_" in n)).backward()
        model.base_model.update_and_allocate(number)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="was saved with its final ranks"):
        begun(PeftModel.from_pretrained(base(), tmp_path, is_trainable=True))
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(base(hidden_size=32, num_attention_heads=2, num_key_value_heads=2), tmp_path)


def test_gradients_that_are_not_there():
    model = tuned(base(), config()).train()
    callback, args, state = begun(model)
    with torch.no_grad():
        model(input_ids=X, labels=X)
    with pytest.raises(ValueError, match="step 1: found no gradient of lora_A, lora_B, lora_E"):
        callback.on_optimizer_step(args, state, None, model=model)
    model(input_ids=X, labels=X).loss.backward()
    first(model).lora_E["default"].grad = None  # a layer that had no part
    callback.on_optimizer_step(args, state, None, model=model)
    averages = model.base_model.rankallocator.exp_avg_ipt
    name = "model.layers.0.self_attn.q_proj.lora_E.default"
    assert not averages[name].any() and averages[name.replace("lora_E", "lora_A")].any()
    before = {n: t.clone() for n, t in averages.items()}
    for p in model.parameters():
        if p.grad is not None:
            p.grad.fill_(float("inf"))
    state.global_step = 1
    callback.on_optimizer_step(args, state, None, model=model, optimizer=SimpleNamespace(step_was_skipped=True))
    assert all(torch.equal(t, before[n]) for n, t in model.base_model.rankallocator.exp_avg_ipt.items())


def test_a_best_model_from_before_keeps_what_the_last_ranks_would_cut():
    model = tuned(base(), config())
    callback, args, state = begun(model)
    pattern = {name: [True, False] * 3 for name in singular_values(model.base_model)}
    callback._pattern = pattern
    started(model)
    callback.on_train_end(args, state, None, model=model)
    assert model.peft_config["default"].rank_pattern is None
    with torch.no_grad():
        for E in singular_values(model.base_model).values():
            E[1::2] = 0
    callback.on_train_end(args, state, None, model=model)
    assert model.peft_config["default"].rank_pattern == pattern


def test_states_of_other_checkpoints(run, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(run[0], folder)
    path, good = folder / "checkpoint-5" / STATE, (folder / "checkpoint-5" / STATE).read_bytes()
    tensors = safetensors.torch.load(good)
    name = "model.layers.0.self_attn.q_proj.lora_E.default"

    model = PeftModel.from_pretrained(base(), folder / "checkpoint-5", is_trainable=True)

    def refused(match, data):
        path.unlink() if data is None else path.write_bytes(data if isinstance(data, bytes) else safetensors.torch.save(data))
        with pytest.raises(ValueError, match=match):
            load_state(tuner_of(model), path, 5)

    refused("damaged safetensors", good[:200])
    refused("no state of step 5", (folder / "checkpoint-10" / STATE).read_bytes())
    refused("another adapter", tensors | {f"lora_E.{name}": torch.ones(6, 1)})
    refused("averages of 17 tensors", {k: t for k, t in tensors.items() if k != f"exp_avg_ipt.{name}"})
    refused("another shape or kind", tensors | {f"exp_avg_unc.{name}": torch.ones(5, 1)})
    refused("pattern that does not fit", tensors | {f"rank_pattern.{name}": torch.ones(5, dtype=torch.bool)})
    refused("no such file, which a run with AdaLoraCallback leaves", None)
    with pytest.raises(ValueError, match="no such file"):
        trained(folder, resume=folder / "checkpoint-5")
    path.write_bytes(good)
    shutil.move(folder / "checkpoint-5", tmp_path / "moved")
    resumed = trained(folder, resume=tmp_path / "moved", callback=AdaLoraCallback(resume_from=tmp_path / "moved"))
    assert resumed[2].records == run[3].records


def lora(dtype=torch.float32, **changes):
    model = get_peft_model(
        base(dtype), LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **changes})
    )
    return started(model, seed=4).eval()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"q_proj": 3}, "target_modules": "all-linear"},
        {"r": 70},
    ],
)
def test_a_lora_adapter_goes_on_as_adalora(changes, tmp_path):
    model = lora(**changes)
    wanted, plain = model(X).logits, base()(X).logits
    assert relative(plain, wanted) > 0.1
    model.save_pretrained(tmp_path)
    rank = changes.get("r", 4) + 3
    schedule = AdaLoraConfig(init_r=rank, target_r=2, total_step=12, lora_alpha=24)
    both = [continue_as_adalora(base(), schedule, adapter=tmp_path), continue_as_adalora(model, schedule)]
    for found in both:
        assert list(found.peft_config) == ["default"] and relative(found.eval()(X).logits, wanted) < 2e-6
        layer = first(found)
        assert type(layer) is NF4SVDLinear and not any("lora_A.default.weight" in name for name, _ in found.named_parameters())
        E, A, B = layer.lora_E["default"], layer.lora_A["default"], layer.lora_B["default"]
        assert E.shape == (rank, 1) and E.requires_grad and (E[:2] > 0).all() and not E[min(64, rank - 3) :].any()
        if rank <= 64:
            for gram in (A @ A.T, B.T @ B):
                assert torch.allclose(gram, torch.eye(rank), atol=1e-5)
    assert schedule.target_modules is None
    trains = both[1].train()
    optimizer = torch.optim.AdamW([p for p in trains.parameters() if p.requires_grad], lr=3e-3)
    losses = [step(trains, optimizer, number) for number in range(1, 13)]
    assert losses[-1] < losses[0] - 0.05 and sum(map(sum, trains.peft_config["default"].rank_pattern.values())) == 2 * len(
        both[1].base_model.rankallocator.name_set
    )


def test_what_is_cut_off_is_told():
    model, schedule = lora(r=8), AdaLoraConfig(init_r=5, target_r=2, total_step=12)
    layers = {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A") and "default" in m.lora_A}
    values = [
        torch.linalg.svdvals(m.scaling["default"] * m.lora_B["default"].weight.double() @ m.lora_A["default"].weight.double())
        for m in layers.values()
    ]
    share = sum(v[5:].square().sum() for v in values) / sum(v.square().sum() for v in values)
    with pytest.raises(ValueError, match="init_r: found 5, but the adapter has rank 8 in model.layers.0.self_attn.q_proj"):
        continue_as_adalora(model, schedule)
    with pytest.warns(UserWarning, match=f"lost {share.item():.4%}"):
        found = continue_as_adalora(model, schedule, truncate=True)
    assert found.base_model.rankallocator.init_bgt == 5 * 6


@pytest.mark.parametrize("changes, match", [
    ({"use_dora": True}, "use_dora"), ({"modules_to_save": ["lm_head"]}, "modules_to_save"), ({"bias": "all"}, "'bias': 'all'"),
    ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens: found Embedding"),
])  # fmt: skip
def test_adapters_that_are_more_than_b_times_a(changes, match):
    with pytest.raises(ValueError, match=match):
        continue_as_adalora(lora(**changes), AdaLoraConfig(init_r=6, target_r=2, total_step=12))


def test_what_does_not_go_on(tmp_path):
    schedule, model = AdaLoraConfig(init_r=6, target_r=2, total_step=12), lora()
    before = model(X).logits
    for targets in (["v_proj"], "all-linear"):
        with pytest.raises(ValueError, match="target_modules: found .* differing in"):
            continue_as_adalora(model, AdaLoraConfig(init_r=6, target_r=2, total_step=12, target_modules=targets))
    with pytest.raises(ValueError, match="target_r: found 9 with init_r 6"):
        continue_as_adalora(model, AdaLoraConfig(init_r=6, target_r=9, total_step=12))
    with pytest.raises(TypeError, match="wanted a PeftModel with a LoRA adapter"):
        continue_as_adalora(base(), schedule)
    model.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="wanted the base alone"):
        continue_as_adalora(model, schedule, adapter=tmp_path)
    for other in (
        {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2},
        {"num_hidden_layers": 1},
        {"num_hidden_layers": 3},
    ):
        with pytest.raises(ValueError, match="belongs to another model"):
            continue_as_adalora(base(**other), schedule, adapter=tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    for key, value, match in (
        ("init_lora_weights", "pissa", "changes the base"),
        ("peft_type", "IA3", "wanted LORA"),
        ("use_dora", True, "use_dora"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(json.loads(text) | {key: value}))
        with pytest.raises(ValueError, match=match):
            continue_as_adalora(base(), schedule, adapter=tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="no such file; wanted .* no pickle"):
        continue_as_adalora(base(), schedule, adapter=tmp_path)
    assert torch.equal(model(X).logits, before)
    first(model).lora_A["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="q_proj: found NaN or Inf"):
        continue_as_adalora(model, schedule)
    model = lora()
    model.add_adapter("second", LoraConfig(r=4, target_modules=TARGETS))
    with pytest.raises(ValueError, match=r"found the adapters \['default', 'second'\], wanted one"):
        continue_as_adalora(model, schedule)
