"""nf4lora inside transformers and peft. Importing it registers `NF4Config` with transformers and the fused layers with peft.

    import nf4lora.hf
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=nf4lora.hf.NF4Config())
    model = get_peft_model(model, LoraConfig(target_modules="all-linear"))

| what | in |
|---|---|
| quantize on load, save, reload | config, quantizer, owned, conversion, experts, loaded, shards |
| models quantized in memory, saved as such | saying |
| any checkpoint in one call; bitsandbytes' format in and out | loading, bnb_format, from_bnb |
| LoRA of peft, computed with the base; merging of every tuner | peft_dispatch, peft_lora, peft_merge, merging, merge_shards, decoded |
| AdaLoRA; a LoRA continued as AdaLoRA | peft_adalora, adalora, adalora_state, adalora_records, adalora_continue, trained_lora |
| 4-bit weights as bfloat16, for FSDP2 before torch 2.12 | bf16_storage |
| PiSSA, OLoRA, LoftQ, orthogonal starts | starts |
| scripts for bitsandbytes, unchanged | patch_bnb, bnb_layer, trainer |
| `NF4LoRALinear`s without peft; checkpoints of `nf4lora finetune` | adapter, checkpoint, atomic |
"""

from . import peft_dispatch, quantizer, saying  # noqa: F401 (the quantizer registers itself)
from .adalora import AdaLoraCallback
from .adalora_continue import continue_as_adalora
from .adalora_records import plot_ranks, read_records
from .adapter import load_adapter, save_adapter
from .bf16_storage import store_as_bfloat16
from .bnb_format import save_bitsandbytes
from .checkpoint import CheckpointError
from .config import NF4Config
from .count import count_parameters
from .experts import left_in_16_bits, quantize_experts_
from .from_bnb import from_bitsandbytes_
from .loading import from_pretrained
from .merge_shards import save_merged
from .merging import MergedIn4Bit, merge_and_unload, merge_in_4bit_
from .patch_bnb import patch_bitsandbytes, unpatch_bitsandbytes
from .starts import quantize_with_start, save_base
from .trainer import keep_one_gpu_per_process, patch_trainer_optimizers, unpatch_trainer_optimizers

peft_dispatch.install()
saying.install()
keep_one_gpu_per_process()

__all__ = [
    "AdaLoraCallback", "CheckpointError", "MergedIn4Bit", "NF4Config", "continue_as_adalora",
    "count_parameters", "from_bitsandbytes_", "from_pretrained", "left_in_16_bits", "load_adapter",
    "merge_and_unload", "merge_in_4bit_", "patch_bitsandbytes", "patch_trainer_optimizers", "plot_ranks",
    "quantize_experts_", "quantize_with_start", "read_records", "save_adapter", "save_base",
    "save_bitsandbytes", "save_merged", "store_as_bfloat16", "unpatch_bitsandbytes", "unpatch_trainer_optimizers",
]  # fmt: skip
