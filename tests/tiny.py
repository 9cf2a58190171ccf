"""Small models of transformers, the same weights every time: two layers, 64 wide, 128 tokens.

Widths are multiples of 64: where a row is no whole number of blocks, the linear of bitsandbytes 0.50.2 is wrong on a CPU.
"""

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

transformers.utils.logging.disable_progress_bar()
VOCABULARY, WIDTH = 128, 64
_TEXT = dict(
    vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    tie_word_embeddings=False,
)  # fmt: skip


def _built(kind: str, config: Any, seed: int, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(seed)
    return getattr(transformers, kind)(config).to(dtype).eval()


def llama(seed: int = 0, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> PreTrainedModel:
    return _built("LlamaForCausalLM", transformers.LlamaConfig(**{**_TEXT, **changes}), seed, dtype)


def qwen3_moe(seed: int = 0, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> PreTrainedModel:
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, decoder_sparse_step=1, mlp_only_layers=[])
    return _built("Qwen3MoeForCausalLM", transformers.Qwen3MoeConfig(**{**_TEXT, **experts, **changes}), seed, dtype)


def qwen3(seed: int = 0, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> PreTrainedModel:
    return _built("Qwen3ForCausalLM", transformers.Qwen3Config(**{**_TEXT, **changes}), seed, dtype)


def gemma3(seed: int = 0, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> PreTrainedModel:
    """Its head is tied to its embedding."""
    window = dict(tie_word_embeddings=True, sliding_window=8, query_pre_attn_scalar=16)
    return _built("Gemma3ForCausalLM", transformers.Gemma3TextConfig(**{**_TEXT, **window, **changes}), seed, dtype)


def gpt2(seed: int = 0, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> PreTrainedModel:
    """Its linears are Conv1D, [in, out], and its head is tied to its embedding."""
    sizes = dict(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    drops = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return _built("GPT2LMHeadModel", transformers.GPT2Config(**{**sizes, **drops, **changes}), seed, dtype)


def roberta(seed: int = 0, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> PreTrainedModel:
    """Tells two kinds of sequences apart."""
    sizes = dict(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    more = dict(max_position_embeddings=66, type_vocab_size=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return _built("RobertaForSequenceClassification", transformers.RobertaConfig(**{**sizes, **more, **changes}), seed, dtype)


def t5(seed: int = 0, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> PreTrainedModel:
    sizes = dict(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0)
    tokens = dict(decoder_start_token_id=0, pad_token_id=0, eos_token_id=2)
    return _built("T5ForConditionalGeneration", transformers.T5Config(**{**sizes, **tokens, **changes}), seed, dtype)


def llava(seed: int = 0, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> PreTrainedModel:
    """A vision tower that reads 16 x 16 pixels as four patches, and a Llama; token 127 stands for a patch."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    parts = dict(vision_config=vision, text_config=transformers.LlamaConfig(**_TEXT), image_token_index=127, image_seq_length=4)
    return _built("LlavaForConditionalGeneration", transformers.LlavaConfig(**{**parts, **changes}), seed, dtype)


FAMILIES = {f.__name__: f for f in (llama, qwen3, qwen3_moe, gemma3, gpt2, roberta, t5, llava)}


def batch(family: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """What a model of this family is called with to give a loss."""
    ids = tokens(seed=seed).clamp(max=VOCABULARY - 2)
    if family == "roberta":
        return {"input_ids": ids, "labels": torch.tensor([0, 1])}
    if family == "t5":
        return {"input_ids": ids, "labels": tokens(length=8, seed=seed + 1)}
    if family == "llava":
        ids[:, :4] = VOCABULARY - 1
        pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        return {"input_ids": ids, "pixel_values": pixels, "labels": ids}
    return {"input_ids": ids, "labels": ids}


def tokenizer(text: str = "the quick brown fox jumps over the lazy dog ", **more: Any) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 257 tokens and up to 63 merges, those of `text`; <eos> is the first. more: as its class has them."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer, found.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    found.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=found, eos_token="<eos>", **more)


def tokens(batch: int = 2, length: int = 16, seed: int = 0) -> torch.Tensor:
    """int64 [batch, length], without the three special tokens."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
