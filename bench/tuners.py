"""peft's tuners on a 4-bit base, tried one by one: `python -m bench.tuners` prints the table, `--write` renews
bench/results/tuners.json. tests/test_hf_tuners.py holds every row of it."""

import argparse
import copy
import tempfile
import warnings
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from nf4lora import NF4Linear, replace_linears
from nf4lora.hf import merge_and_unload

from .environment import environment, version
from .files import RESULTS, write

STEPS = 12
_TARGETS = ["q_proj", "v_proj", "down_proj"]
_LORA = {"target_modules": _TARGETS, "r": 4}
_VIRTUAL = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
TUNERS: dict[str, peft.PeftConfig] = {
    "LoRA": peft.LoraConfig(target_modules="all-linear", r=4),
    "rsLoRA": peft.LoraConfig(use_rslora=True, **_LORA),
    "DoRA": peft.LoraConfig(use_dora=True, **_LORA),
    "AdaLoRA": peft.AdaLoraConfig(target_modules=_TARGETS, init_r=4, target_r=2, total_step=100, tinit=1, tfinal=10),
    "IA3": peft.IA3Config(target_modules=_TARGETS, feedforward_modules=["down_proj"]),
    "prefix": peft.PrefixTuningConfig(**_VIRTUAL),
    "P-tuning v2": peft.PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=32, **_VIRTUAL),
    "prompt": peft.PromptTuningConfig(**_VIRTUAL),
    "P-tuning": peft.PromptEncoderConfig(encoder_hidden_size=32, **_VIRTUAL),
    "OFT": peft.OFTConfig(target_modules=_TARGETS, r=0, oft_block_size=16),
    "BOFT": peft.BOFTConfig(target_modules=_TARGETS, boft_block_size=8),
    "VeRA": peft.VeraConfig(target_modules=["q_proj", "o_proj"], r=8),
    "MiSS": peft.MissConfig(target_modules=_TARGETS, r=4),
    "RandLora": peft.RandLoraConfig(target_modules=_TARGETS, r=4),
    "FourierFT": peft.FourierFTConfig(target_modules=_TARGETS, n_frequency=50),
    "VB-LoRA": peft.VBLoRAConfig(target_modules=_TARGETS, r=4, num_vectors=16, vector_length=16),
    "C3A": peft.C3AConfig(target_modules=_TARGETS, block_size=16),
    "LN tuning": peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "LoHa": peft.LoHaConfig(target_modules=_TARGETS, r=4),
    "LoKr": peft.LoKrConfig(target_modules=_TARGETS, r=4),
    "HRA": peft.HRAConfig(target_modules=_TARGETS, r=4),
}
# These add tokens; there is no weight to merge them into.
PROMPTS = ("prefix", "P-tuning v2", "prompt", "P-tuning")
# These multiply by the base's weight as if it were floats, and fail on bitsandbytes' too.
FAIL = ("LoHa", "LoKr", "HRA")


def base() -> nn.Module:
    """The same small Llama every time, its linears in NF4, all of it frozen."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return replace_linears(LlamaForCausalLM(config).eval(), layer=NF4Linear).requires_grad_(False)


def tried(name: str) -> dict[str, Any]:
    """One row: the loss before and after `STEPS` steps on one batch, whether a saved adapter comes back to equal bits,
    and the relative error of the merged model's logits in float32; or why the tuner fails."""
    tokens = torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        try:
            torch.manual_seed(1)
            model = peft.get_peft_model(base(), copy.deepcopy(TUNERS[name]))
            losses = _train(model, tokens)
        except (RuntimeError, TypeError, ValueError) as error:
            return {"tuner": name, "fails": str(error).split("\n")[0]}
        wanted = _logits(model, tokens)
        model.save_pretrained(folder)
        again = peft.PeftModel.from_pretrained(base(), folder)
        row = {
            "tuner": name, "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "loss_before": losses[0], "loss_after": losses[-1], "reloads": torch.equal(_logits(again, tokens), wanted),
        }  # fmt: skip
        if name not in PROMPTS:
            merged = _logits(merge_and_unload(model, torch.float32), tokens)
            row["merge_error"] = ((merged - wanted).norm() / wanted.norm()).item()
        return row


def _train(model: nn.Module, tokens: Tensor) -> list[float]:
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02), []
    for _ in range(STEPS):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits.double()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="renew bench/results/tuners.json")
    write_it = parser.parse_args().write
    rows = [tried(name) for name in TUNERS]
    for row in rows:
        print(row)
    if write_it:
        versions = {name: version(name) for name in ("peft", "transformers", "torch")}
        write(RESULTS / "tuners.json", {"environment": environment(), "versions": versions, "rows": rows})


if __name__ == "__main__":
    main()
