"""`count_parameters`: elements and bytes, of models in 4 bits, in peft's hands and on the meta device."""

import dataclasses

import bitsandbytes
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from nf4lora import NF4Linear, NF4LoRALinear, replace_linears
from nf4lora.hf import store_as_bfloat16
from nf4lora.hf.count import Parameters, count_parameters
from nf4lora.hf.experts import quantize_experts_

EMBEDDINGS = 128 * 64
NORMS = 5 * 64
LINEARS = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96)


def llama(**changes):
    return tiny.llama(intermediate_size=96, **changes)


def bytes_of(model) -> int:
    return sum({id(p): p.numel() * p.element_size() for p in model.parameters()}.values())


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("blocksize", [64, 4096])
def test_a_quantized_model_has_as_many_parameters_as_before(double_quant, blocksize):
    model = llama()
    dense = count_parameters(model)
    assert dense.total == dense.trainable == sum(p.numel() for p in model.parameters()) == 2 * EMBEDDINGS + NORMS + LINEARS
    assert dense.quantized == dense.quantized_bytes == dense.bits_per_quantized == 0 and dense.other_bytes == 2 * dense.total
    replace_linears(model, layer=NF4Linear, blocksize=blocksize, double_quant=double_quant).requires_grad_(False)
    found = count_parameters(model)
    assert (found.total, found.trainable, found.quantized) == (dense.total, 0, LINEARS)
    assert found.other_bytes == 2 * (2 * EMBEDDINGS + NORMS)
    assert found.quantized_bytes + found.other_bytes == bytes_of(model)
    codes = sum(m.weight.numel() for m in model.modules() if isinstance(m, NF4Linear))
    assert codes == LINEARS // 2 < found.quantized_bytes
    if blocksize == 64:
        assert found.bits_per_quantized == pytest.approx(4.127 if double_quant else 4.5, abs=0.02 if double_quant else 0)


def test_adapters_in_peft_and_in_our_layers():
    model = replace_linears(llama(), layer=NF4Linear).requires_grad_(False)
    before = count_parameters(model)
    peft_model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    found = count_parameters(peft_model)
    learned = 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96))
    assert found == dataclasses.replace(
        before, total=before.total + learned, trainable=learned, other_bytes=before.other_bytes + 4 * learned
    )
    theirs = peft_model.get_nb_trainable_parameters()
    assert theirs[0] == found.trainable and theirs[1] < found.total  # they count packed bytes
    own = llama().requires_grad_(False)
    assert count_parameters(replace_linears(own, layer=NF4LoRALinear, r=4)) == found


def test_what_is_shared_counts_once():
    model = replace_linears(llama(tie_word_embeddings=True).requires_grad_(False), layer=NF4Linear)
    assert count_parameters(model).total == EMBEDDINGS + NORMS + LINEARS
    shared = NF4Linear(64, 64, bias=False)
    twice = nn.Sequential(shared, shared)
    assert count_parameters(twice).quantized == 64 * 64 and count_parameters(twice).quantized_bytes == bytes_of(shared)
    tied = NF4Linear(64, 64, bias=False)
    for name, p in shared.named_parameters():
        setattr(tied, name, p)
    assert count_parameters(nn.Sequential(shared, tied)) == count_parameters(shared)


def test_an_odd_count_is_not_rounded_up():
    layer = NF4Linear(7, 5, bias=True)
    found = count_parameters(layer)
    assert (found.total, found.quantized, found.trainable) == (40, 35, 0)
    assert found.quantized_bytes == 18 + 1 + 4 + 4 and found.other_bytes == 4 * 5


def test_experts_count_as_their_stacks():
    model = tiny.qwen3_moe()
    dense = count_parameters(model)
    held = sum(p.numel() for name, p in model.named_parameters() if "experts." in name)
    assert held == 2 * 4 * 3 * 32 * 64
    quantize_experts_(model)
    found = count_parameters(model.requires_grad_(False))
    assert found.total == dense.total and found.quantized == held
    assert found.quantized_bytes + found.other_bytes == bytes_of(model) and found.other_bytes == dense.other_bytes - 2 * held


def test_on_the_meta_device_and_on_its_way_from_a_checkpoint():
    real = count_parameters(NF4Linear(64, 64))
    with torch.device("meta"):
        layer = NF4Linear(64, 64)
    assert count_parameters(layer) == real
    layer.weight = nn.Parameter(torch.empty(64, 64, dtype=torch.bfloat16), requires_grad=False)
    found = count_parameters(layer)
    assert found.quantized == 0 and found.total >= 64 * 64


def test_the_sentence():
    of = Parameters(8_030_000_000, 40_000_000, quantized=7_000_000_000, quantized_bytes=3_500_000_000, other_bytes=5 * 2**20)
    assert str(of) == (
        "trainable 40,000,000 of 8,030,000,000 parameters (0.4981%)\n"
        "in 4 bits 7,000,000,000: 3.26 GiB, 4.000 bits each; the other 1,030,000,000: 5.00 MiB"
    )
    assert str(count_parameters(nn.Identity())).startswith("trainable 0 of 0 parameters")
    with pytest.raises(dataclasses.FrozenInstanceError):
        of.total = 1


def test_weights_of_bitsandbytes_and_weights_stored_as_bfloat16():
    own = replace_linears(llama(), layer=NF4Linear).requires_grad_(False)
    wanted = count_parameters(own)
    for storage in (torch.uint8, torch.bfloat16):
        theirs = llama().requires_grad_(False)
        for name, m in list(theirs.named_modules()):
            if isinstance(m, nn.Linear) and name != "lm_head":
                layer = bitsandbytes.nn.Linear4bit(m.in_features, m.out_features, False, quant_storage=storage, quant_type="nf4")
                layer.weight = bitsandbytes.nn.Params4bit(m.weight.data, requires_grad=False, quant_storage=storage, quant_type="nf4")
                theirs.set_submodule(name, layer.to("cpu"))
        assert count_parameters(theirs) == wanted
    store_as_bfloat16(own)
    assert count_parameters(own) == wanted
    whole = quantize_experts_(moe := tiny.qwen3_moe()) and count_parameters(moe)
    store_as_bfloat16(moe)
    assert count_parameters(moe) == whole
