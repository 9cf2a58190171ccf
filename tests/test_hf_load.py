"""Loading into 4 bits: the bytes, the memory it takes, what is skipped, and checkpoints of ours and of bitsandbytes, both ways."""

import copy
import gc
import json
import pickle
import weakref

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM
from transformers.quantizers.quantizers_utils import should_convert_module

import nf4lora.hf  # noqa: F401 (registers NF4Config)
from nf4lora import NF4Linear, NF4LoRALinear, quantize_4bit, replace_linears
from nf4lora.hf.bnb_format import save_bitsandbytes
from nf4lora.hf.config import NF4Config
from nf4lora.hf.conversion import Quantize
from nf4lora.hf.loaded import not_converted
from nf4lora.hf.loading import from_pretrained
from nf4lora.hf.quantizer import SENTENCE

pytestmark = pytest.mark.usefixtures("one_thread")
# These cast what they read to the dtype of the parameter they expect.
OLD_TRANSFORMERS = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 18)
IDS = tiny.tokens()
MIXED = ["lm_head", "model.layers.1.self_attn", "model.layers.0.mlp.down_proj"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    tiny.llama().save_pretrained(folder)
    return folder


def logits(model, train=False):
    """bitsandbytes in eval() packs its weights anew, and differently."""
    model.train(train)
    with torch.no_grad():
        return model(input_ids=IDS).logits


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, NF4Linear)}


def same_tensors(one, other):
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def with_bitsandbytes(folder, **options):
    options = {"bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, **options}
    config = BitsAndBytesConfig(load_in_4bit=True, **options)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config).train()


def same_bytes(ours, theirs):
    """Every 4-bit layer of ours holds what bitsandbytes' layer of that name does."""
    found = layers(ours)
    assert found and found.keys() == {n for n, m in theirs.named_modules() if type(m).__name__ == "Linear4bit"}
    for name, layer in found.items():
        weight, state = theirs.get_submodule(name).weight, layer.quant_state
        want = weight.quant_state
        assert torch.equal(layer.weight.view(-1), weight.data.view(-1).view(torch.uint8)), name
        assert torch.equal(state.absmax, want.absmax) and (state.blocksize, state.quant_type) == (want.blocksize, want.quant_type)
        assert state.nested == want.nested and (not state.nested or torch.equal(state.nested_absmax, want.state2.absmax))
    return len(found)


@pytest.mark.parametrize(
    "quant_type, blocksize, double_quant", [("nf4", 64, True), ("fp4", 64, False), ("nf4", 128, False), ("fp4", 32, True)]
)
def test_bytes_and_reload(dense, tmp_path, quant_type, blocksize, double_quant):
    options = {"quant_type": quant_type, "blocksize": blocksize, "double_quant": double_quant, "compute_dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=NF4Config(**options))
    weights = load_file(dense / "model.safetensors")
    assert layers(model).keys() == {n for n, m in tiny.llama().named_modules() if isinstance(m, nn.Linear)} - {"lm_head"}
    for name, layer in layers(model).items():
        packed, state = quantize_4bit(weights[f"{name}.weight"], blocksize, double_quant, quant_type)
        assert torch.equal(layer.weight, packed) and layer.quant_state == state and layer.compute_dtype == torch.float32
    wanted = logits(model)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").is_file()
    for folder in ("whole", "sharded"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert same_tensors(model, again) and torch.equal(logits(again), wanted)
        for name, layer in layers(again).items():
            assert torch.equal(layer.dequantize(), layers(model)[name].dequantize()) and str(layer) == str(layers(model)[name])
    again.save_pretrained(tmp_path / "twice")
    assert load_file(tmp_path / "twice" / "model.safetensors").keys() == model.state_dict().keys() | {SENTENCE}
    assert same_tensors(model, from_pretrained(tmp_path / "twice"))
    faster = from_pretrained(tmp_path / "whole", NF4Config(**options | {"compute_dtype": torch.bfloat16}))
    assert same_tensors(model, faster) and {m.compute_dtype for m in layers(faster).values()} == {torch.bfloat16}
    with pytest.warns(UserWarning, match="blocksize=.* is not used|double_quant=.* is not used|quant_type=.* is not used"):
        other = from_pretrained(tmp_path / "whole", NF4Config(quant_type="nf4" if quant_type == "fp4" else "fp4", blocksize=4096))
    assert same_tensors(model, other) and other.config.quantization_config.compute_dtype == "float32"


@pytest.mark.parametrize(
    "skip, dense_ones",
    [
        (["lm_head", "self_attn.o_proj"], {"model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"}),
        (["lm_head", "model.layers.1"], {f"model.layers.1.{n}" for n in (
            *(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down")))}),
        (MIXED, {"model.layers.0.mlp.down_proj", *(f"model.layers.1.self_attn.{x}_proj" for x in "qkvo")}),
        (["lm_head", r"model\.layers\.\d\.mlp.*"], {
            f"model.layers.{i}.mlp.{x}_proj" for i in (0, 1) for x in ("gate", "up", "down")}),
    ],
)  # fmt: skip
def test_what_is_skipped_is_what_bitsandbytes_skips(dense, tmp_path, skip, dense_ones):
    model = from_pretrained(dense, NF4Config(modules_to_not_convert=skip))
    assert {n for n, m in model.named_modules() if type(m) is nn.Linear} == dense_ones | {"lm_head"}
    # The offset of double quantization is torch's own mean, whose last bit may differ.
    plain = from_pretrained(dense, NF4Config(double_quant=False, modules_to_not_convert=skip))
    same_bytes(plain, with_bitsandbytes(dense, llm_int8_skip_modules=skip, bnb_4bit_use_double_quant=False))
    model.save_pretrained(tmp_path)
    assert same_tensors(model, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_an_empty_list_quantizes_the_head_too(dense, tmp_path):
    model = from_pretrained(dense, NF4Config(modules_to_not_convert=[]))
    assert "lm_head" in layers(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(from_pretrained(tmp_path)), logits(model))


def test_peak_memory(tmp_path, monkeypatch):
    """While a 16-bit model is read, what lives beside the packed layers is no more than the layer at hand.

    Counted: what torch allocates, but for the mapping of the file, of which 16-bit tensors are views on a CPU; and these views.
    """
    made = tiny.llama(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8, head_dim=64
    )
    whole, layer = sum(p.nbytes for p in made.parameters()), 512 * 2048 * 2
    made.save_pretrained(tmp_path)
    del made
    arrived, alive, convert = [], [], Quantize.convert

    def spy(self, input_dict, **kwargs):
        arrived.extend(weakref.ref(v) for values in input_dict.values() for v in values)
        alive.append(sum(t.nbytes for r in arrived if (t := r()) is not None))
        return convert(self, input_dict, **kwargs)

    monkeypatch.setattr(Quantize, "convert", spy)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as profiler:
        model = from_pretrained(tmp_path)
    mapping = (tmp_path / "model.safetensors").stat().st_size
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]" and abs(e.nbytes()) != mapping]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    packed = sum(p.nbytes for p in model.parameters() if not p.is_floating_point())
    assert whole > 60e6 and packed < 0.27 * whole and len(alive) == 56
    assert max(alive) == layer and packed < peak <= packed + layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype(dense, tmp_path, dtype):
    model = from_pretrained(dense, dtype=dtype)
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {dtype} and logits(model).dtype == dtype
    if dtype != torch.float16:  # weights are cast before they are quantized
        assert all(torch.equal(m.weight, layers(from_pretrained(dense))[n].weight) for n, m in layers(model).items())
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    assert same_tensors(model, again) and torch.equal(logits(again), logits(model))
    assert {m.weight_dtype for m in layers(again).values()} == {m.weight_dtype for m in layers(model).values()} == {dtype}


def test_casts_leave_the_bytes_whole(dense):
    model = from_pretrained(dense)
    wanted = {n: m.dequantize(torch.float32) for n, m in layers(model).items()}
    model.to(torch.float16).to(torch.float32).to(torch.bfloat16)
    assert all(torch.equal(m.dequantize(torch.float32), wanted[n]) for n, m in layers(model).items())
    assert logits(model).isfinite().all()


def test_generate_and_dequantize(dense):
    model = from_pretrained(dense, dtype=torch.float32)
    prompt = {
        "input_ids": IDS[:, :4],
        "attention_mask": torch.ones(2, 4, dtype=torch.int64),
        "max_new_tokens": 12,
        "do_sample": False,
    }
    tokens, wanted = model.generate(**prompt), logits(model)
    decoded = model.dequantize(torch.float32)
    assert not layers(decoded) and not hasattr(decoded.config, "quantization_config")
    torch.testing.assert_close(logits(decoded), wanted, rtol=1e-5, atol=1e-6)
    assert tokens.shape == (2, 16) and torch.equal(decoded.generate(**prompt), tokens)


def test_dequantize_takes_the_dtype_as_saving_leaves_it(dense, tmp_path):
    model = from_pretrained(dense, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert {p.dtype for p in model.dequantize().parameters()} == {torch.bfloat16}


def test_dequantize_would_lose_an_adapter(dense):
    model = replace_linears(from_pretrained(dense), r=2)
    with pytest.raises(ValueError, match="q_proj and 13 more hold an adapter"):
        model.dequantize()
    assert len(layers(model)) == 14


@pytest.mark.parametrize("disk", [False, True])
def test_device_map(dense, tmp_path, disk):
    model = from_pretrained(dense)
    model.save_pretrained(tmp_path / "native")
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu",
              "model.layers.1": "disk" if disk else "cpu",
              "model.norm": "cpu", "lm_head": "cpu"}  # fmt: skip
    again = from_pretrained(tmp_path / "native", device_map=places, offload_folder=tmp_path / "offload")
    assert again.get_submodule("model.layers.1.mlp.up_proj").weight.is_meta == disk
    assert torch.equal(logits(again), logits(model))
    if disk:
        with pytest.raises(ValueError, match="disk"):
            again.dequantize()
        with pytest.raises(ValueError, match="disk"):
            save_bitsandbytes(again, tmp_path / "bnb")
        with pytest.raises(ValueError, match='"disk".*save the model quantized'):
            from_pretrained(dense, device_map=places, offload_folder=tmp_path / "offload2")


@pytest.mark.parametrize("folder", ["dense", "native", "bnb"])
def test_auto_and_offloaded(dense, tmp_path, folder):
    """device_map="auto", and from every kind of checkpoint to a CPU; from those in 4 bits to the disk, all of it."""
    model = from_pretrained(dense)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "native")
    save_bitsandbytes(model, tmp_path / "bnb")
    path = dense if folder == "dense" else tmp_path / folder
    for placed in ("auto", "cpu", {"": "cpu"}, torch.device("cpu")):
        assert torch.equal(logits(from_pretrained(path, device_map=placed)), wanted)
    if folder != "dense" and not transformers.__version__.startswith("5.0"):  # which runs no model that is all on the disk
        model = from_pretrained(path, device_map={"": "disk"}, offload_folder=tmp_path / "offload")
        assert all(p.is_meta for p in model.parameters()) and torch.equal(logits(model), wanted)


def test_copies_and_pickles(dense):
    model = from_pretrained(dense)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same_tensors(made, model) and torch.equal(logits(made), logits(model))


def test_compiled(dense):
    model = from_pretrained(dense, dtype=torch.float32)
    wanted = logits(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), wanted, rtol=1e-5, atol=1e-6)


def test_a_new_head_stays_dense_and_can_be_trained(tmp_path):
    """The checkpoint holds nothing for it, so there is nothing to quantize; saved and read again it is still dense."""
    made = tiny.roberta(dtype=torch.float32)
    made.roberta.save_pretrained(tmp_path / "base")
    model = from_pretrained(tmp_path / "base", model_class=transformers.AutoModelForSequenceClassification, num_labels=3)
    heads = {n: m for n, m in model.named_modules() if type(m) is nn.Linear}
    assert heads.keys() == {"classifier.dense", "classifier.out_proj"} and len(layers(model)) == 12
    assert all(m.weight.requires_grad and 0 < m.weight.std() < 0.1 and not m.bias.any() for m in heads.values())
    model.save_pretrained(tmp_path / "native")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "native")
    assert same_tensors(model, again) and again.config.num_labels == 3
    other = from_pretrained(
        tmp_path / "native", model_class=transformers.AutoModelForSequenceClassification, id2label={0: "a", 1: "b", 2: "c"}
    )
    assert same_tensors(model, other) and other.config.id2label[2] == "c"


def test_a_bias_that_the_checkpoint_lacks_is_zero(dense, tmp_path):
    for file in dense.iterdir():
        text = file.read_bytes()
        (tmp_path / file.name).write_bytes(text.replace(b'"attention_bias": false', b'"attention_bias": true'))
    torch.use_deterministic_algorithms(True)  # memory that nobody fills is NaN
    try:
        model = from_pretrained(tmp_path)
    finally:
        torch.use_deterministic_algorithms(False)
    assert sum(m.bias is not None and not m.bias.any() for m in layers(model).values()) == 8
    assert torch.equal(logits(model), logits(from_pretrained(dense)))


def test_our_adapters_on_a_loaded_model(dense):
    """Without peft: `replace_linears` puts them in, and Trainer may train the model then, not before."""
    model = from_pretrained(dense)
    wanted = logits(model)
    assert not model.hf_quantizer.is_qat_trainable
    replace_linears(model, r=4, target_modules=["q_proj", "v_proj"])
    assert torch.equal(logits(model), wanted) and model.hf_quantizer.is_qat_trainable
    assert sum(isinstance(m, NF4LoRALinear) for m in model.modules()) == 4


# bitsandbytes' checkpoints


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
        {"bnb_4bit_quant_storage": "bfloat16"},
        {"bnb_4bit_quant_storage": "float32", "bnb_4bit_use_double_quant": False, "bnb_4bit_quant_type": "fp4"},
        {"llm_int8_skip_modules": MIXED},
    ],
)
def test_bitsandbytes_checkpoints_load_bit_equal(dense, tmp_path, options):
    theirs = with_bitsandbytes(dense, **options)
    theirs.save_pretrained(tmp_path / "bnb")
    ours = from_pretrained(tmp_path / "bnb")
    assert same_bytes(ours, theirs) == (9 if "llm_int8_skip_modules" in options else 14)
    on_load = from_pretrained(dense, NF4Config(
        quant_type=options.get("bnb_4bit_quant_type", "nf4"), double_quant=options.get("bnb_4bit_use_double_quant", True),
        compute_dtype="bfloat16", modules_to_not_convert=options.get("llm_int8_skip_modules")))  # fmt: skip
    if not on_load.config.quantization_config.double_quant:  # whose offset may differ in its last bit
        assert same_tensors(ours, on_load) and torch.equal(logits(ours), logits(on_load))
    torch.testing.assert_close(logits(ours), logits(theirs, train=True), rtol=0.02, atol=0.02)
    assert ours.config.quantization_config.to_dict() == on_load.config.quantization_config.to_dict()
    ours.save_pretrained(tmp_path / "native")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    assert same_tensors(ours, again) and torch.equal(logits(again), logits(ours))
    if not options:
        wide = from_pretrained(
            tmp_path / "bnb", NF4Config(compute_dtype="float32"), dtype=torch.float32, model_class=LlamaForCausalLM
        )
        assert {p.dtype for p in wide.parameters() if p.is_floating_point()} == {torch.float32}
        assert {m.compute_dtype for m in layers(wide).values()} == {torch.float32} and same_bytes(wide, theirs) == 14


@pytest.mark.parametrize("quant_type, blocksize, double_quant", [("nf4", 64, True), ("fp4", 64, False), ("nf4", 128, True)])
def test_export(dense, tmp_path, quant_type, blocksize, double_quant):
    config = NF4Config(quant_type, blocksize, double_quant, modules_to_not_convert=MIXED)
    ours = from_pretrained(dense, config)
    before, said_before = {k: t.clone() for k, t in ours.state_dict().items()}, ours.config.to_dict()
    assert save_bitsandbytes(ours, tmp_path / "bnb", max_shard_size="10KB") == {}
    said = json.loads((tmp_path / "bnb" / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "bitsandbytes" and said["load_in_4bit"] and said["bnb_4bit_quant_type"] == quant_type
    assert said["bnb_4bit_use_double_quant"] == double_quant and said["bnb_4bit_compute_dtype"] == "bfloat16"
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "bnb").train()
    assert same_bytes(ours, theirs) == 9
    if not double_quant:
        skipped = with_bitsandbytes(
            dense, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=False, llm_int8_skip_modules=MIXED
        )
        assert torch.equal(logits(theirs, train=True), logits(skipped, train=True))
    if blocksize == 64:  # a row of 64 and a block of 128 is what its linear cannot do on a CPU
        torch.testing.assert_close(logits(ours), logits(theirs, train=True), rtol=0.02, atol=0.02)
    assert ours.config.to_dict() == said_before and all(torch.equal(t, before[k]) for k, t in ours.state_dict().items())
    back = from_pretrained(tmp_path / "bnb")
    assert same_tensors(ours, back)
    read = back.config.quantization_config
    assert (read.quant_type, read.blocksize, read.double_quant) == (quant_type, blocksize, double_quant)
    back.save_pretrained(tmp_path / "native")
    assert same_tensors(ours, from_pretrained(tmp_path / "native"))
    (tmp_path / "bnb" / "checkpoint-9").mkdir()
    for name in ("tokenizer.json", "checkpoint-9/optimizer.pt"):
        (tmp_path / "bnb" / name).write_text(name)
    save_bitsandbytes(back, tmp_path / "bnb")  # in the place of the checkpoint that is there, not of all else
    for name in ("tokenizer.json", "checkpoint-9/optimizer.pt"):
        assert (tmp_path / "bnb" / name).read_text() == name
    assert same_tensors(ours, from_pretrained(tmp_path / "bnb")) and len(list((tmp_path / "bnb").glob("*.safetensors"))) == 1
    assert {p.name for p in tmp_path.iterdir()} == {"bnb", "native"}


def test_bytes_say_more_than_config_json(dense, tmp_path):
    """What a checkpoint of bitsandbytes says of its format is in each of its tensors."""
    ours = from_pretrained(dense, NF4Config("fp4", 128, False))
    save_bitsandbytes(ours, tmp_path / "bnb")
    path = tmp_path / "bnb" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    path.write_text(json.dumps(config))
    read = from_pretrained(tmp_path / "bnb")
    assert same_tensors(ours, read)
    read.save_pretrained(tmp_path / "native")
    again = from_pretrained(tmp_path / "native")
    assert same_tensors(ours, again) and torch.equal(logits(again), logits(ours))


def test_export_computes_the_same_in_float32(tmp_path):
    tiny.llama(dtype=torch.float32).save_pretrained(tmp_path / "dense")
    ours = from_pretrained(tmp_path / "dense", NF4Config(compute_dtype="float32"))
    save_bitsandbytes(ours, tmp_path / "bnb")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "bnb")
    torch.testing.assert_close(logits(theirs, train=True), logits(ours), rtol=1e-5, atol=1e-6)


def test_export_of_conv1d(tmp_path):
    made = tiny.gpt2()
    made.save_pretrained(tmp_path / "dense")
    ours = from_pretrained(tmp_path / "dense")
    save_bitsandbytes(ours, tmp_path / "bnb")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "bnb").train()
    assert same_bytes(ours, theirs) == 8
    torch.testing.assert_close(logits(ours), logits(theirs, train=True), rtol=0.02, atol=0.02)
    assert same_tensors(from_pretrained(tmp_path / "bnb"), ours)


def test_export_decodes_experts_and_says_so(tmp_path):
    made = tiny.qwen3_moe()
    made.save_pretrained(tmp_path / "dense")
    ours = from_pretrained(tmp_path / "dense")
    with pytest.warns(UserWarning, match="4 stacks of experts .* written decoded, 98,304 bytes"):
        decoded = save_bitsandbytes(ours, tmp_path / "bnb")
    assert sum(decoded.values()) == 98304 and set(decoded.values()) == {2 * 4 * 64 * 64, 2 * 4 * 64 * 32}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "bnb").train()
    assert same_bytes(ours, theirs) == 8
    torch.testing.assert_close(logits(ours), logits(theirs, train=True), rtol=0.02, atol=0.02)
    back = from_pretrained(tmp_path / "bnb")
    experts = back.model.layers[0].mlp.experts.gate_up_proj
    assert experts.dtype == torch.bfloat16 and torch.equal(experts, ours.model.layers[0].mlp.experts.dequantize("gate_up_proj"))
    back.save_pretrained(tmp_path / "native")
    assert same_tensors(back, from_pretrained(tmp_path / "native"))


@pytest.mark.skipif(
    OLD_TRANSFORMERS, reason="casts what it reads to the dtype of the layer it expects; refused in test_hf_bad_input"
)
def test_what_the_checkpoint_holds_decides(dense, tmp_path):
    """Unsloth's lists may have paths of an older transformers: layers they name no more, and some they name by chance."""
    theirs = with_bitsandbytes(dense, llm_int8_skip_modules=MIXED)
    theirs.save_pretrained(tmp_path / "bnb")
    path = tmp_path / "bnb" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["llm_int8_skip_modules"] = ["lm_head", "model.language_model.layers.1.self_attn", "gate_proj"]
    path.write_text(json.dumps(config))
    ours = from_pretrained(tmp_path / "bnb")
    assert same_bytes(ours, theirs) == 9
    weights = load_file(tmp_path / "bnb" / "model.safetensors")
    assert torch.equal(ours.model.layers[1].self_attn.q_proj.weight, weights["model.layers.1.self_attn.q_proj.weight"])
    ours.save_pretrained(tmp_path / "native")
    again = from_pretrained(tmp_path / "native")
    assert same_tensors(ours, again) and same_bytes(again, theirs) == 9


def test_a_vision_model_that_is_mixed(tmp_path):
    """As Unsloth has them: the tower and the projector in 16 bits, and some layers of the text."""
    made = tiny.llava()
    made.save_pretrained(tmp_path / "dense")
    skip = ["lm_head", "model.vision_tower", "model.multi_modal_projector", "model.language_model.layers.1.mlp"]
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16",
        llm_int8_skip_modules=skip)  # fmt: skip
    theirs = type(made).from_pretrained(tmp_path / "dense", quantization_config=quantization).train()
    theirs.save_pretrained(tmp_path / "bnb", save_original_format=False)
    ours = from_pretrained(tmp_path / "bnb", model_class=transformers.AutoModelForImageTextToText)
    assert same_bytes(ours, theirs) == 11 and all("vision" not in n and "layers.1.mlp" not in n for n in layers(ours))
    ours.save_pretrained(tmp_path / "native")
    again = from_pretrained(tmp_path / "native", model_class=transformers.AutoModelForImageTextToText)
    batch = tiny.batch("llava")
    assert same_tensors(ours, again)
    with torch.no_grad():
        assert torch.equal(ours(**batch).logits, again(**batch).logits)


def test_an_adapter_folder(dense, tmp_path):
    """Its base is read in 4 bits, whatever it is."""
    import peft

    with_bitsandbytes(dense).save_pretrained(tmp_path / "bnb")
    for base in (dense, tmp_path / "bnb"):
        model = peft.get_peft_model(
            from_pretrained(base, dtype=torch.float32), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        )
        wanted = logits(model)
        model.save_pretrained(tmp_path / "adapter")
        loaded = from_pretrained(tmp_path / "adapter", dtype=torch.float32)
        assert len(layers(loaded)) == 14
        torch.testing.assert_close(logits(loaded), wanted, rtol=0.02, atol=0.02)
        assert not torch.allclose(wanted, logits(from_pretrained(base, dtype=torch.float32)), rtol=0.02, atol=0.02)


def test_names_of_what_stays_dense_mean_no_other_layer():
    """transformers takes a name for the beginning of a path, for its end, and for a pattern."""
    make = lambda quantized: (NF4Linear if quantized else nn.Linear)(4, 4)  # noqa: E731
    packed = {"proj": False, "q_proj": True, "a.proj_0": True, "a.b": False, "axb": True, "a.c": False, "last": True}
    model = nn.Module()
    for name, quantized in packed.items():
        parent, _, own = name.rpartition(".")
        if parent and not hasattr(model, parent):
            model.add_module(parent, nn.Module())
        model.get_submodule(parent).add_module(own, make(quantized))
    skip = not_converted(model)
    assert {name: should_convert_module(name, skip) for name in packed} == packed and "a.c" in skip


def test_sentence_is_in_every_checkpoint(dense, tmp_path):
    from_pretrained(dense).save_pretrained(tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    assert found.pop(SENTENCE).numel() == 1
    save_file(found, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert layers(from_pretrained(tmp_path))  # nor is it needed
