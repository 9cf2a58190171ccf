"""An adapter in a pickle: refused by us, and by peft on our base; the payload does not run."""

import re
import shutil

import peft
import peft.utils.hotswap
import pytest
import safetensors.torch
import tiny
import torch

from nf4lora import NF4Linear, replace_linears
from nf4lora.hf import load_adapter


def base():
    return replace_linears(tiny.llama(dtype=torch.float32), layer=NF4Linear).requires_grad_(False)


def lora(model):
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors"])
def test_by_us(copy, model, payload, name):
    file, ran = payload
    folder = copy("adapter")
    (folder / "adapter_model.safetensors").unlink()
    shutil.copy(file, folder / name)
    with pytest.raises(ValueError, match="adapter_model.safetensors: (no such file|truncated or damaged)"):
        load_adapter(model, folder)
    assert not ran.exists()


def test_by_peft_on_our_base_only(tmp_path, payload):
    file, ran = payload
    folder, pickle = tmp_path / "a", tmp_path / "a" / "adapter_model.bin"
    lora(base()).save_pretrained(folder)
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, pickle)
    ways = (
        lambda: peft.PeftModel.from_pretrained(base(), folder), lambda: lora(base()).load_adapter(folder, "second"),
        lambda: peft.utils.hotswap.hotswap_adapter(lora(base()), str(folder), "default", torch_device="cpu"),
        lambda: base().load_adapter(str(folder), use_safetensors=False),
    )  # fmt: skip
    for way in ways:
        with pytest.raises(ValueError, match=f"{re.escape(str(pickle))}: found an adapter in a pickle file, which can run code"):
            way()
    on_others = peft.PeftModel.from_pretrained(tiny.llama(), folder)
    assert sum(isinstance(m, peft.tuners.lora.Linear) for m in on_others.modules()) == 4
    tiny.llama().load_adapter(str(folder), use_safetensors=False)
    shutil.copy(file, pickle)
    for way in ways:
        with pytest.raises(ValueError, match="pickle file"):
            way()
    assert not ran.exists()
