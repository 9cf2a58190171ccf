"""4-bit weights stored as bfloat16, for FSDP2 before torch 2.12: the same bytes in every forward, and no cast."""

import copy

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from nf4lora import NF4Linear, NF4LoRALinear, replace_linears
from nf4lora.hf import NF4Config, merge_and_unload, quantize_experts_, store_as_bfloat16

pytestmark = pytest.mark.filterwarnings("ignore:.*")  # peft's, of many kinds
TOKENS = tiny.tokens()


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def integers(model):
    return [name for name, p in model.named_parameters() if not p.is_floating_point()]


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_layer_of_any_size(double_quant):
    """Of an odd number of bytes too."""
    for K, N, kind in ((7, 3, NF4Linear), (64, 33, NF4Linear), (96, 32, NF4LoRALinear)):
        layer = nn.Sequential(kind(K, N, double_quant=double_quant))
        x, whole = torch.randn(5, K), {n: p.clone() for n, p in layer.named_parameters()}
        wanted = layer(x)
        assert store_as_bfloat16(layer) == len(integers(nn.Sequential(kind(K, N, double_quant=double_quant))))
        assert not integers(layer) and isinstance(layer[0], kind) and layer(x).equal(wanted)
        for name, t in whole.items():
            assert getattr(layer[0], name[2:]).equal(t)
        assert layer[0].dequantize().equal(copy.deepcopy(layer)[0].dequantize()) and copy.deepcopy(layer)(x).equal(wanted)


def test_after_an_error_on_the_way_the_bytes_are_there():
    layer = nn.Sequential(NF4Linear(64, 32, bias=True))
    x = torch.randn(5, 64)
    wanted, _ = layer(x), store_as_bfloat16(layer)
    for dtype in (torch.float32, torch.uint8):  # where the floats are moved, and after them the bytes

        def fails(t, dtype=dtype):
            if t.dtype == dtype:
                raise torch.OutOfMemoryError("no room")
            return t

        with pytest.raises(torch.OutOfMemoryError):
            layer._apply(fails)
        assert layer(x).equal(wanted)


def test_models_compute_train_merge_and_are_saved_as_before(tmp_path):
    tiny.qwen3_moe().save_pretrained(tmp_path / "base")
    model, twin = (AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=NF4Config()) for _ in range(2))
    wanted, names = logits(twin), {n for n, _ in twin.named_parameters()}
    packed = len(integers(twin))
    assert packed > 20 and store_as_bfloat16(model) == packed and store_as_bfloat16(model) == packed  # the second changes nothing
    assert logits(model).equal(wanted)
    for name, one in (("stored", model), ("plain", twin)):
        one.save_pretrained(tmp_path / name)
    assert (tmp_path / "stored" / "model.safetensors").read_bytes() == (tmp_path / "plain" / "model.safetensors").read_bytes()
    assert {n.removesuffix("_bf16") for n, _ in model.named_parameters()} == names
    adapted = []
    for one in (model, twin):
        torch.manual_seed(0)
        one = get_peft_model(one, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        one(input_ids=TOKENS, labels=TOKENS).loss.backward()
        adapted.append({n: p.grad for n, p in one.named_parameters() if p.requires_grad})
    assert all(g.equal(adapted[1][n]) for n, g in adapted[0].items()) and len(adapted[0]) == 8


def test_after_peft_and_with_groups():
    for group in (False, True):
        one, other = (replace_linears(tiny.llama(dtype=torch.float32), layer=NF4Linear, group=group) for _ in range(2))
        one, other = (get_peft_model(m.requires_grad_(False), LoraConfig(r=4, target_modules="all-linear")) for m in (one, other))
        other.load_state_dict(one.state_dict())
        wanted = logits(one)
        store_as_bfloat16(one)
        assert logits(one).equal(wanted)
        assert logits(merge_and_unload(one, torch.float32)).equal(logits(merge_and_unload(other, torch.float32)))


def test_casts_change_nothing_or_are_refused():
    model = replace_linears(tiny.qwen3_moe(), layer=NF4Linear)
    quantize_experts_(model)
    store_as_bfloat16(model)
    wanted = logits(model)
    logits(model.to(torch.float16))
    assert logits(model.to(torch.bfloat16).to("cpu")).equal(wanted)
    assert logits(model.half().bfloat16()).equal(wanted)
    for p in model.parameters():  # as peft's prepare_model_for_kbit_training has it
        p.data = p.data.float()
    message = "found its bytes cast from bfloat16 to torch.float32, which changes them: load the model again"
    with pytest.raises(RuntimeError, match=message):
        logits(model)


def test_meta_parameters_are_refused():
    model = nn.Sequential(NF4Linear(64, 64), NF4Linear(64, 64, device="meta"))
    with pytest.raises(ValueError, match="1.weight: found it on the meta device, wanted it whole"):
        store_as_bfloat16(model)
    assert len(integers(model)) == 8
