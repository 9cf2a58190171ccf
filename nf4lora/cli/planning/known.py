"""Published shapes of models that claims are about."""

from functools import cache
from typing import Any

from .inventory import Inventory, take

_LLAMA = {
    "llama-2-7b": (32000, 4096, 11008, 32, 32, 32),
    "llama-2-13b": (32000, 5120, 13824, 40, 40, 40),
    "llama-65b": (32000, 8192, 22016, 80, 64, 64),
    "llama-2-70b": (32000, 8192, 28672, 80, 64, 8),
    "llama-3-8b": (128256, 4096, 14336, 32, 32, 8),
    "llama-3-70b": (128256, 8192, 28672, 80, 64, 8),
}


def config(name: str) -> Any:
    """Of transformers. Raises: KeyError for another name."""
    from transformers import LlamaConfig, OPTConfig

    if name == "opt-125m":
        return OPTConfig(
            vocab_size=50272,
            hidden_size=768,
            ffn_dim=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            word_embed_proj_dim=768,
        )
    vocabulary, hidden, intermediate, layers, heads, kv_heads = _LLAMA[name]
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=8192 if vocabulary > 100_000 else 4096,
    )  # fmt: skip


@cache
def model(name: str) -> Inventory:
    return take(config(name))
