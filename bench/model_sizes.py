"""Configurations of the models that are measured whole, as transformers' LlamaConfig takes them."""

from typing import Any, NamedTuple

from transformers import LlamaConfig

LLAMA_3_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}  # fmt: skip
LLAMA_3_70B = LLAMA_3_8B | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
}  # fmt: skip
TOY = LLAMA_3_8B | {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512,
}  # fmt: skip


class Llama(NamedTuple):
    """A configuration, cut to its first `layers`; None for all."""

    name: str
    sizes: dict[str, Any]
    layers: int | None = None

    @property
    def config(self) -> LlamaConfig:
        layers = min(self.layers or self.sizes["num_hidden_layers"], self.sizes["num_hidden_layers"])
        return LlamaConfig(**self.sizes | {"num_hidden_layers": layers})

    @property
    def title(self) -> str:
        return f"{self.name}, {self.config.num_hidden_layers} of {self.sizes['num_hidden_layers']} layers"
