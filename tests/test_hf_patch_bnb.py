"""`patch_bitsandbytes`: bitsandbytes' layers and peft's on them have the bits of ours; what is not ours is as it was."""

import copy
import importlib.util
import sys

import pytest
import tiny
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module
from bitsandbytes.nn import Linear4bit, LinearNF4, Params4bit
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

from nf4lora import NF4Linear, NF4LoRALinear, autograd
from nf4lora.hf import bnb_layer, patch_bnb
from nf4lora.hf.from_bnb import from_bitsandbytes_
from nf4lora.hf.patch_bnb import patch_bitsandbytes, unpatch_bitsandbytes

K, N, R = 128, 64, 8  # bitsandbytes 0.50.2 decodes rows of 96 with the wrong absmax where there is AVX-512
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def eager_and_unpatched():
    with torch.compiler.set_stance("force_eager"):  # bitsandbytes compiles some of its CPU code
        yield
    unpatch_bitsandbytes()


@pytest.fixture
def patched():
    patch_bitsandbytes()


@pytest.fixture
def calls(monkeypatch):
    """The scaling of each call of ours that had an adapter, None of each that had none."""
    made, original = [], autograd.linear

    def linear(*args):
        made.append(None if args[6] is None else args[12])
        return original(*args)

    monkeypatch.setattr(autograd, "linear", linear)
    return made


def theirs(quant_type="nf4", nested=True, compute=torch.float32, storage=torch.uint8, bias=True, cls=Linear4bit):
    """A layer of bitsandbytes, quantized, from a seed."""
    torch.manual_seed(1)
    options = {} if cls is LinearNF4 else {"quant_type": quant_type}
    layer = cls(K, N, bias=bias, compute_dtype=compute, compress_statistics=nested, quant_storage=storage, **options)
    return layer.to("cpu")


def ours(layer, kind=NF4Linear, **options) -> NF4Linear:
    """Our layer on the very bytes of theirs."""
    state = layer.weight.quant_state
    made = kind(
        layer.in_features, layer.out_features, layer.bias is not None, blocksize=state.blocksize, quant_type=state.quant_type,
        double_quant=state.nested, compute_dtype=layer.compute_dtype, device="meta", **options,
    )  # fmt: skip
    with torch._C.DisableTorchFunctionSubclass():
        packed = layer.weight.data.view(torch.uint8).reshape(-1, 1)
    made._freeze("weight", packed)
    made._freeze("weight_absmax", state.absmax if state.nested else state.absmax.view(torch.int32))
    if state.nested:
        made._freeze("weight_nested_absmax", state.state2.absmax.view(torch.int32))
        made._freeze("weight_nested_offset", state.offset.reshape(1).view(torch.int32))
    if layer.bias is not None:
        made._freeze("bias", layer.bias.detach())
    return made


class Model(nn.Module):
    """peft wants a model with a config to say that it is in 4 bits."""

    is_loaded_in_4bit = True

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def with_lora(layer, seed=2, **config) -> PeftModel:
    torch.manual_seed(seed)
    model = get_peft_model(Model(layer), LoraConfig(target_modules=["layer"], **{"r": R, "lora_alpha": 12, **config}))
    fill(model)
    return model


def fill(model):
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)


def inputs(dtype=torch.float32, shape=(3, 5, K)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()


def gradients(module, x, learn=()):
    """y, dx and the gradients of `learn`."""
    y = module(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(y.dtype)
    return y, *torch.autograd.grad(y, [x, *learn], dy)


def assert_same(found, wanted):
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert a.dtype == b.dtype and torch.equal(a, b), i


# ---- the bits


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_plain_layer_has_the_bits_of_ours(quant_type, nested, storage, patched, calls):
    layer = theirs(quant_type, nested, storage=storage)
    for dtype in FLOATS:
        x = inputs(dtype)
        assert_same(gradients(layer, x), gradients(ours(layer), x))
    assert len(calls) == 2 * len(FLOATS)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("compute", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_an_adapter_is_computed_with_its_layer(dtype, compute, bias, patched, calls):
    layer = theirs(compute=compute, bias=bias)
    model = with_lora(layer)
    lora = model.base_model.model.layer
    mine = ours(layer, NF4LoRALinear, r=R, lora_alpha=12)
    mine.lora_A, mine.lora_B = lora.lora_A["default"].weight, lora.lora_B["default"].weight
    x, learn = inputs(dtype), [mine.lora_A, mine.lora_B]
    assert_same(gradients(model, x, learn), gradients(mine, x, learn))
    assert calls == [1.5, 1.5]


def test_what_they_computed_before_is_near():
    """The patch changes roundings, not what is computed."""
    layer = theirs(compute=torch.float32)
    model = with_lora(layer)
    learn = [p for p in model.parameters() if p.requires_grad]
    before = gradients(model, inputs(), learn)
    patch_bitsandbytes()
    for a, b in zip(gradients(model, inputs(), learn), before, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_no_copy_of_the_bytes_is_kept_or_made(patched, monkeypatch):
    seen, original, layer = [], autograd.linear, theirs()
    monkeypatch.setattr(autograd, "linear", lambda *args: seen.append(args) or original(*args))
    before = set(vars(layer)), set(vars(layer.weight)), set(vars(layer.weight.quant_state))
    layer(inputs())
    (_, packed, absmax, nested_absmax, offset, *_), state = seen[0], layer.weight.quant_state
    assert packed.data_ptr() == layer.weight.data_ptr() and absmax is state.absmax
    assert nested_absmax is state.state2.absmax and offset is state.offset
    assert before == (set(vars(layer)), set(vars(layer.weight)), set(vars(layer.weight.quant_state)))


# ---- dtypes, as they have them


def test_the_first_x_decides_an_unset_compute_dtype(patched, calls):
    for first, computed in ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32), (torch.float16, None)):
        layer = theirs(compute=None)
        assert not layer.compute_type_is_set
        assert layer(inputs(first)).dtype == first and layer.compute_dtype == computed
        y = layer(inputs(torch.float32))
        assert y.dtype == torch.float32 and layer.compute_dtype == computed and layer.compute_type_is_set
        mine = ours(layer)
        assert mine.compute_dtype == computed and torch.equal(y, mine(inputs()))
    assert len(calls) == 9


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(compute, patched, calls, monkeypatch):
    model = with_lora(theirs(compute=compute))
    plain = model(inputs())
    linear = autograd.linear  # whose products may be torch's, on other devices
    monkeypatch.setattr(autograd, "linear", lambda *args: linear(*args) if not torch.is_autocast_enabled("cpu") else None)
    with torch.autocast("cpu", torch.bfloat16):
        cast = model(inputs())
    assert cast.dtype == torch.float32 and torch.equal(cast, plain) and len(calls) == 2


def test_cuda_autocast_whose_sum_is_of_another_dtype_is_left_to_peft(patched, calls, monkeypatch):
    model = with_lora(theirs(compute=torch.bfloat16))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: not device)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.float16)
    with torch.no_grad():
        model.base_model.model.layer.lora_A.to(torch.bfloat16), model.base_model.model.layer.lora_B.to(torch.bfloat16)
        model(inputs(torch.bfloat16))
        assert calls == [None]
        model(inputs(torch.float32))
    assert calls == [None, 1.5]


def test_a_bias_is_not_rounded_in_its_place(patched):
    layer = theirs(compute=torch.bfloat16)
    bias = layer.bias.detach().clone()
    layer(inputs())
    assert layer.bias.dtype == torch.float32 and torch.equal(layer.bias, bias)


# ---- adapters


def test_several_adapters_are_one_call(patched, calls):
    layer = theirs()
    model = with_lora(layer)
    model.add_adapter("second", LoraConfig(r=4, lora_alpha=2, target_modules=["layer"]))
    fill(model)
    model.base_model.set_adapter(["default", "second"])
    x, lora = inputs(), model.base_model.model.layer
    learn = [m[name].weight for name in ("default", "second") for m in (lora.lora_A, lora.lora_B)]
    found = gradients(model, x, learn)
    assert calls == [1.0]
    with torch.no_grad():
        wanted = x.double() @ ours(layer).dequantize().double().T + layer.bias
        for name, scaling in (("default", 1.5), ("second", 0.5)):
            wanted += scaling * (x.double() @ lora.lora_A[name].weight.double().T) @ lora.lora_B[name].weight.double().T
    assert torch.allclose(found[0].double(), wanted, atol=1e-5)
    unpatch_bitsandbytes()
    for a, b in zip(found, gradients(model, x, learn), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_dropout_of_one_adapter_is_drawn_from_torchs_generator(patched, calls):
    layer = theirs()
    model = with_lora(layer, lora_dropout=0.5)
    lora = model.base_model.model.layer
    mine = ours(layer, NF4LoRALinear, r=R, lora_alpha=12, lora_dropout=0.5)
    mine.lora_A, mine.lora_B = lora.lora_A["default"].weight, lora.lora_B["default"].weight
    x, learn, results = inputs(), [mine.lora_A, mine.lora_B], []
    for module in (model, mine, model):
        torch.manual_seed(7)
        results.append(gradients(module, x, learn))
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])
    assert not torch.equal(model(x), results[0][0])
    assert torch.equal(model.eval()(x), mine.eval()(x)) and len(calls) == 6


def left_to_them(model, x, calls):
    """Calls of the base alone; y has the bits that peft gives on it."""
    calls.clear()
    torch.manual_seed(8)
    y = model(x)
    assert not [c for c in calls if c is not None]
    base, lora = len(calls), next(m for m in model.modules() if hasattr(m, "lora_A"))
    torch.manual_seed(8)
    assert torch.equal(patch_bnb._originals[type(lora).forward](lora, x), y)
    assert len(calls) == 2 * base
    return base


def test_several_adapters_with_dropout_are_left_to_peft(patched, calls):
    model = with_lora(theirs(), lora_dropout=0.5)
    model.add_adapter("second", LoraConfig(r=4, target_modules=["layer"]))
    model.base_model.set_adapter(["default", "second"])
    y = model(inputs())
    assert y.shape == (3, 5, N) and calls == [None]
    model.eval()(inputs())
    assert calls == [None, 1.0]


@pytest.mark.parametrize("config", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_variants_are_left_to_peft_on_our_base(config, patched, calls):
    assert left_to_them(with_lora(theirs(), **config), inputs(), calls) == 1


def doubled(lora):
    lora.lora_A.double(), lora.lora_B.double()


OTHER_ADAPTERS = {
    "float64": doubled,
    "all is dropped": lambda lora: lora.lora_dropout.update({"default": nn.Dropout(1.0)}),
    "another dropout": lambda lora: lora.lora_dropout.update({"default": nn.AlphaDropout(0.5)}),
    "no casts of x": lambda lora: setattr(lora, "cast_input_dtype_enabled", False),
}


@pytest.mark.parametrize("which", OTHER_ADAPTERS)
def test_adapters_of_other_kinds_are_left_to_peft_on_our_base(which, patched, calls):
    model = with_lora(theirs())
    OTHER_ADAPTERS[which](model.base_model.model.layer)
    assert left_to_them(model, inputs(), calls) == 1


def test_rslora_is_ours(patched, calls):
    with_lora(theirs(), use_rslora=True)(inputs())
    assert calls == [12 / R**0.5]


def test_disabled_merged_and_mixed_batches(patched, calls):
    layer = theirs()
    plain = ours(layer)(inputs())
    model = with_lora(layer).eval()
    model.add_adapter("second", LoraConfig(r=4, target_modules=["layer"]))
    fill(model)
    lora, x = model.base_model.model.layer, inputs()
    calls.clear()
    with model.disable_adapter():
        assert torch.equal(model(x), plain)
    each = []
    for name in ("default", "second"):
        model.set_adapter(name)
        each.append(model(x))
    assert calls == [None, 1.5, 2.0]
    mixed = lora(x, adapter_names=["second", "__base__", "default"])
    assert calls == [None, 1.5, 2.0, None]
    for row, wanted in zip(mixed, (each[1][0], plain[1], each[0][2]), strict=True):
        assert torch.allclose(row, wanted, atol=1e-5)
    model.set_adapter("default")
    model.merge_adapter()
    calls.clear()
    merged = model(x)
    assert calls == [None] and torch.equal(merged, ours(lora.base_layer)(x)) and not torch.equal(merged, plain)
    model.unmerge_adapter()
    model(x)
    assert calls[1:] == [None, 1.5]  # the first is of ours()


def test_adalora_of_bitsandbytes_stands_on_our_base(patched, calls):
    model = get_peft_model(Model(theirs()), AdaLoraConfig(target_modules=["layer"], init_r=4, total_step=10))
    assert type(model.base_model.model.layer).__name__ == "SVDLinear4bit"
    model(inputs()).sum().backward()
    assert calls == [None] and all(p.grad is not None for p in model.parameters() if p.requires_grad)


# ---- what is not ours


def repacked():
    layer = theirs(nested=False)
    layer.weight.quant_state.packing_format_for_cpu = True
    return layer


def with_table(nested=False):
    layer = theirs(nested=nested)
    state = layer.weight.quant_state
    table = (state.state2 if nested else state).code
    table[3] += 0.01
    return layer


def with_state(**changes):
    layer = theirs(nested=False)
    for name, value in changes.items():
        setattr(layer.weight.quant_state, name, value)
    return layer


def offloaded():
    layer = theirs()
    state, empty = layer.weight.quant_state, torch.empty(N * K // 2, 1, dtype=torch.uint8, device="meta")
    state.to("meta")
    layer.weight = Params4bit(empty, quant_state=state, quant_type="nf4", bnb_quantized=True)
    return layer


NOT_OURS = {
    "not quantized yet": lambda: (Linear4bit(K, N, quant_type="nf4"), inputs()),
    "repacked": lambda: (repacked(), inputs()),
    "another NF4": lambda: (with_table(), inputs()),
    "another dynamic map": lambda: (with_table(nested=True), inputs()),
    "absmax in bfloat16": lambda: (with_state(absmax=torch.ones(N * K // 64, dtype=torch.bfloat16)), inputs()),
    "absmax of fewer blocks": lambda: (with_state(absmax=torch.ones(3)), inputs()),
    "a weight of other sizes": lambda: (with_state(shape=torch.Size((K, N))), inputs()),
    "a blocksize of one's own": lambda: (with_state(blocksize=N * K), inputs()),
    "float64": lambda: (theirs(), inputs(torch.float64)),
    "x of other columns": lambda: (theirs(), inputs(shape=(3, K + 1))),
    "x on another device": lambda: (theirs(), torch.empty(3, K, device="meta")),
    "a weight without its bytes": lambda: (offloaded(), inputs()),
    "a compute dtype of one's own": lambda: (theirs(compute=torch.float64), inputs()),
    "a bias in float64": lambda: (theirs().to(torch.float64), inputs()),
}


@pytest.mark.parametrize("which", NOT_OURS)
def test_everything_else_goes_to_the_forward_that_was_there(which, monkeypatch, calls):
    layer, x = NOT_OURS[which]()
    seen = []
    monkeypatch.setattr(Linear4bit, "forward", lambda self, x: seen.append((self, x)) or "theirs")
    patch_bitsandbytes()
    assert layer(x) == "theirs" and seen == [(layer, x)] and not calls
    unpatch_bitsandbytes()


def test_a_layer_quantized_later_becomes_ours(patched, calls):
    layer = Linear4bit(K, N, quant_type="nf4", compute_dtype=torch.float32)
    model = Model(layer)
    model.to("cpu")
    assert torch.equal(model(inputs()), ours(layer)(inputs())) and len(calls) == 2


def test_evaluation_does_not_repack_and_what_was_repacked_is_theirs(calls):
    layer, again = theirs(nested=False), theirs(nested=False)
    layer.support_avx512bf16_for_cpu = True
    x = inputs().detach()
    patch_bitsandbytes()
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    assert torch.equal(layer.eval()(x), ours(again)(x))
    assert_same(layer.state_dict().values(), before.values())
    unpatch_bitsandbytes()
    if not again.support_avx512bf16_for_cpu:
        return  # nothing here repacks
    wanted = again.eval()(x)
    assert again.weight.quant_state.packing_format_for_cpu
    patch_bitsandbytes()
    calls.clear()
    assert torch.equal(again(x), wanted) and not calls


def test_a_weight_that_is_replaced_or_moved_is_read_anew(patched, calls):
    layer = theirs()
    first = layer(inputs())
    torch.manual_seed(9)
    layer.weight = Params4bit(torch.randn(N, K), requires_grad=False, quant_type="fp4", module=layer).to("cpu")
    second = layer(inputs())
    assert not torch.equal(first, second) and torch.equal(second, ours(layer)(inputs()))
    state, original = layer.weight.quant_state, patch_bnb._originals[Linear4bit.forward]
    state.code, known = state.code + 1, state.code
    calls.clear()
    assert torch.equal(layer(inputs()), original(layer, inputs())) and not calls
    state.code = known
    twin = copy.deepcopy(layer)
    twin.weight.data.zero_()
    assert torch.equal(layer(inputs()), second) and not torch.equal(twin(inputs()), second)


def test_hooks_within_a_layer_are_called(patched, calls):
    layer = theirs()
    model = with_lora(layer)
    lora, seen = model.base_model.model.layer, []
    for module in (layer, lora.lora_A["default"], lora.lora_B["default"]):
        handle = module.register_forward_hook(lambda *_: seen.append(1))
        model(inputs())
        handle.remove()
        assert len(seen) == 1 and 1.5 not in calls
        seen.clear()
    lora.register_forward_hook(lambda *_: seen.append(1))
    model(inputs())
    assert len(seen) == 1 and 1.5 in calls


def test_hooks_of_accelerate(calls):
    """They keep the forward that was there when they came; those that only move x need not be asked."""
    layer, hooked = theirs(), theirs()
    wanted = ours(layer)(inputs())
    for hook in (AlignDevicesHook("cpu"), ModelHook()):
        add_hook_to_module(hooked, hook)
    model = with_lora(layer)
    add_hook_to_module(layer, AlignDevicesHook("cpu"))
    calls.clear()
    patch_bitsandbytes()
    assert torch.equal(hooked(inputs()), wanted) and calls == [None]
    model(inputs())
    assert calls == [None, 1.5]
    layer._hf_hook.offload = True
    assert not bnb_layer.nobody_listens(layer)
    add_hook_to_module(layer, ModelHook())
    model(inputs())
    assert calls == [None, 1.5, None]
    unpatch_bitsandbytes()
    hooked(inputs()), model(inputs())
    assert len(calls) == 3


# ---- the patch itself


def test_twice_is_once_and_undone_is_undone():
    import peft.tuners.lora.bnb as lora

    before = Linear4bit.forward, lora.Linear4bit.forward
    model = with_lora(theirs())
    patch_bitsandbytes()
    once = Linear4bit.forward, lora.Linear4bit.forward
    patch_bitsandbytes()
    assert (Linear4bit.forward, lora.Linear4bit.forward) == once and not set(once) & set(before)
    model(inputs())
    unpatch_bitsandbytes()
    unpatch_bitsandbytes()
    assert (Linear4bit.forward, lora.Linear4bit.forward) == before and not patch_bnb._originals


def test_subclasses_and_forwards_of_their_own(patched, calls):
    assert theirs(cls=LinearNF4)(inputs()).shape == (3, 5, N) and len(calls) == 1

    class Doubled(Linear4bit):
        def forward(self, x):
            return 2 * super().forward(x)

    layer = theirs(cls=Doubled)
    y = layer(inputs())
    assert torch.equal(y, 2 * ours(layer)(inputs()))
    calls.clear()
    with_lora(layer)(inputs())
    assert calls == [None]


@pytest.mark.parametrize("which", ["bitsandbytes", "peft"])
def test_other_versions_are_refused_before_anything_is_patched(which, monkeypatch):
    import peft.tuners.lora.bnb as lora

    other = {"bitsandbytes": Linear4bit, "peft": lora.Linear4bit}[which]
    monkeypatch.setattr(other, "forward", lambda self, x, state: None)
    before = Linear4bit.forward, lora.Linear4bit.forward
    with pytest.raises(RuntimeError, match=rf"found {which} \d+\.\d+.*patched nothing.*NF4Config"):
        patch_bitsandbytes()
    assert (Linear4bit.forward, lora.Linear4bit.forward) == before
    module = {"bitsandbytes": sys.modules["bitsandbytes"].nn, "peft": lora}[which]
    monkeypatch.delattr(module, "Linear4bit")
    with pytest.raises(RuntimeError, match=rf"found {which} \d+\.\d+"):
        patch_bitsandbytes()


def test_without_bitsandbytes_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match="found no bitsandbytes to patch; load the model with NF4Config"):
        patch_bitsandbytes()
    monkeypatch.undo()


def test_without_peft_bitsandbytes_alone_is_patched(monkeypatch):
    import peft.tuners.lora.bnb as lora

    before = Linear4bit.forward, lora.Linear4bit.forward
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None if name == "peft" else find(name, *args))
    patch_bitsandbytes()
    assert Linear4bit.forward is not before[0] and lora.Linear4bit.forward is before[1]
    unpatch_bitsandbytes()
    assert Linear4bit.forward is before[0]


def test_compiled_graphs_are_theirs(patched, calls):
    layer = theirs()
    model = with_lora(layer)
    with torch.compiler.set_stance("default"):
        y = torch.compile(model, backend="eager")(inputs())
    assert not calls and torch.allclose(y, model(inputs()), rtol=1e-4, atol=1e-4)
    assert calls == [1.5]


# ---- a script


def script(folder, path, compute=torch.float32):
    """As people write it; losses and the model."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=compute)
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=R, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    arguments = TrainingArguments(
        folder, max_steps=4, per_device_train_batch_size=2, learning_rate=2e-2, use_cpu=True, report_to="none", disable_tqdm=True,
        logging_steps=1, save_strategy="no",
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in tiny.tokens(8, 16)]
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], model


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
def test_an_unchanged_script_trains_saves_and_reloads(compute, tmp_path, calls):
    tiny.llama(dtype=compute, intermediate_size=128).save_pretrained(tmp_path / "base")
    before, _ = script(str(tmp_path), tmp_path / "base", compute)
    assert not calls
    patch_bitsandbytes()
    losses, model = script(str(tmp_path), tmp_path / "base", compute)
    assert len(calls) == 14 * 4 * 2 and set(calls) == {2.0}  # layers, steps, and once more for each checkpointed block
    assert losses == pytest.approx(before, abs=1e-4 if compute == torch.float32 else 2e-2) and len(losses) == 4
    model.save_pretrained(tmp_path / "adapter")
    base = model.get_base_model()
    with torch.no_grad():
        wanted = model.eval()(tiny.tokens()).logits
    config = base.config.quantization_config
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, dtype=compute)
    reloaded = PeftModel.from_pretrained(prepare_model_for_kbit_training(reloaded), tmp_path / "adapter").eval()
    calls.clear()
    with torch.no_grad():
        assert torch.equal(reloaded(tiny.tokens()).logits, wanted)
    assert calls == [2.0] * 14


# ---- converted where it is


def loaded(path, **options):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16, **options)
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=torch.bfloat16)


def logits(model):
    with torch.no_grad():
        return model.eval()(tiny.tokens()).logits


@pytest.mark.parametrize("from_their_checkpoint", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_a_model_of_theirs_becomes_ours_in_place(nested, from_their_checkpoint, tmp_path):
    tiny.llama().save_pretrained(tmp_path / "base")
    model = loaded(tmp_path / "base", bnb_4bit_use_double_quant=nested)
    if from_their_checkpoint:
        model.train().save_pretrained(tmp_path / "theirs")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.bfloat16)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Linear4bit)}
    lies = {name: (m.weight.data_ptr(), m.weight.quant_state.absmax.data_ptr()) for name, m in layers.items()}
    patch_bitsandbytes()
    wanted = logits(model)
    assert from_bitsandbytes_(model) is model and torch.equal(logits(model), wanted)
    made = {name: m for name, m in model.named_modules() if isinstance(m, NF4Linear)}
    assert made.keys() == layers.keys() and not any(isinstance(m, Linear4bit) for m in model.modules())
    assert lies == {name: (m.weight.data_ptr(), m.weight_absmax.data_ptr()) for name, m in made.items()}
    assert not hasattr(model, "is_loaded_in_4bit") and model.config.quantization_config.modules_to_not_convert == ["lm_head"]
    model.save_pretrained(tmp_path / "ours")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.bfloat16)), wanted)
    assert torch.equal(made["model.layers.0.mlp.up_proj"](x := torch.ones(1, 64, dtype=torch.bfloat16)),
                       layers["model.layers.0.mlp.up_proj"](x))  # fmt: skip


def test_what_cannot_be_converted_is_refused_whole():
    def refused(model, match):
        before = list(model.modules())
        with pytest.raises(ValueError, match=match):
            from_bitsandbytes_(model)
        assert list(model.modules()) == before

    refused(Model(nn.Linear(3, 3)), "wanted a model with layers of bitsandbytes")
    refused(theirs(), "found Linear4bit, wanted a model with")
    refused(with_lora(theirs()), "found an adapter of peft.*before get_peft_model")
    refused(nn.Sequential(theirs(), Linear4bit(K, N)), "^1: found a weight that is not quantized")
    refused(nn.Sequential(theirs(), repacked()), "^1: found a weight that is not quantized, or not in a format of ours")
    refused(nn.Sequential(theirs(), theirs("fp4")), r"found 4-bit formats \[\('fp4', 64, True\), \('nf4', 64, True\)\].*wanted one")
    hooked = nn.Sequential(add_hook_to_module(theirs(), hook := AlignDevicesHook("cpu")))
    assert from_bitsandbytes_(hooked)[0]._hf_hook is hook and torch.equal(hooked(inputs()), ours(theirs())(inputs()))
