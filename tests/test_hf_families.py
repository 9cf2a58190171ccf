"""Architectures of transformers: each is quantized while it is read, trained with peft, saved, and read again, bit for bit."""

import peft
import pytest
import tiny
import torch
import transformers
from torch import nn
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

import nf4lora.hf  # noqa: F401 (registers NF4Config)
from nf4lora import NF4Linear, quantize_4bit
from nf4lora.hf.config import NF4Config
from nf4lora.nn.experts import NF4Experts

pytestmark = pytest.mark.usefixtures("one_thread")
# What stays in its dtype, of the linears: heads, what is tied to an embedding, and what transformers keeps in float32.
DENSE = {
    "llama": {"lm_head"}, "qwen3": {"lm_head"}, "qwen3_moe": {"lm_head"}, "gemma3": {"lm_head"}, "gpt2": {"lm_head"},
    "roberta": set(), "llava": {"lm_head"},
    "t5": {"lm_head", *(
        f"{half}.block.{i}.layer.{n}.DenseReluDense.wo" for half, n in (("encoder", 1), ("decoder", 2)) for i in (0, 1))},
}  # fmt: skip


def outputs(model, batch):
    model.eval()
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_load_train_save_reload(family, tmp_path):
    made = tiny.FAMILIES[family](dtype=torch.float32)
    made.save_pretrained(tmp_path / "dense")
    kind, batch = type(made), tiny.batch(family)
    model = kind.from_pretrained(tmp_path / "dense", quantization_config=NF4Config())
    linears = {name: m for name, m in made.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    for name, linear in linears.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, NF4Linear) == (name not in DENSE[family]), name
        if isinstance(layer, NF4Linear):
            weight = linear.weight.detach()
            packed, state = quantize_4bit(weight.t() if isinstance(linear, Conv1D) else weight, compress_statistics=True)
            assert torch.equal(layer.weight, packed) and layer.quant_state == state, name
    assert any(isinstance(m, NF4Experts) for m in model.modules()) == (family == "qwen3_moe")
    wanted = outputs(model, batch)
    assert wanted.isfinite().all()

    model.save_pretrained(tmp_path / "native")
    again = kind.from_pretrained(tmp_path / "native")
    assert torch.equal(outputs(again, batch), wanted)
    assert AutoConfig.from_pretrained(tmp_path / "native").quantization_config["quant_method"] == "nf4lora"
    assert {n: p.dtype for n, p in again.named_parameters()} == {n: p.dtype for n, p in model.named_parameters()}

    torch.manual_seed(0)
    # "all-linear" would be, of a mixture, its stacks of experts too.
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if family == "qwen3_moe" else "all-linear"
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    adapted.train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = adapted(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2] > 0, losses
    trained = outputs(adapted, batch)
    assert not torch.equal(trained, wanted)
    if family == "qwen3_moe" and transformers.__version__.startswith("5.0"):
        return  # peft 0.21 reads adapters of mixtures by means that transformers has had since 5.1
    adapted.save_pretrained(tmp_path / "adapter")
    assert torch.equal(outputs(peft.PeftModel.from_pretrained(again, tmp_path / "adapter"), batch), trained)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_dequantize(family, tmp_path):
    made = tiny.FAMILIES[family](dtype=torch.float32)
    made.save_pretrained(tmp_path / "dense")
    batch = tiny.batch(family)
    model = type(made).from_pretrained(tmp_path / "dense", quantization_config=NF4Config())
    wanted = outputs(model, batch)
    decoded = {n: m.dequantize() for n, m in model.named_modules() if isinstance(m, NF4Linear)}
    dense = model.dequantize(torch.float32)
    assert not any(isinstance(m, (NF4Linear, NF4Experts)) for m in dense.modules())
    for name, m in made.named_modules():
        assert type(dense.get_submodule(name)) is type(m), name
        if name in decoded:
            assert torch.equal(dense.get_submodule(name).weight, decoded[name].t() if isinstance(m, Conv1D) else decoded[name])
    torch.testing.assert_close(outputs(dense, batch), wanted, rtol=1e-4, atol=1e-5)
    dense.save_pretrained(tmp_path / "decoded")
    again = type(made).from_pretrained(tmp_path / "decoded")
    assert not hasattr(again.config, "quantization_config")
    assert torch.equal(outputs(again, batch), outputs(dense, batch))
