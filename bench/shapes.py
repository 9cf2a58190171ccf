"""Shapes of the models that are measured: out_features N and in_features K of each linear."""

# Llama-3-8B.
LLAMA_3_8B = {"q, o": (4096, 4096), "k, v": (1024, 4096), "gate, up": (14336, 4096), "down": (4096, 14336)}
# The same as groups: q, k, v and gate, up side by side.
LLAMA_3_8B_GROUPS = {"q k v": (6144, 4096), "gate up": (28672, 4096)}
# The linears of one of its decoder layers, by their names in transformers.
LLAMA_3_8B_LAYER = {
    "q_proj": (4096, 4096), "k_proj": (1024, 4096), "v_proj": (1024, 4096), "o_proj": (4096, 4096),
    "gate_proj": (14336, 4096), "up_proj": (14336, 4096), "down_proj": (4096, 14336),
}  # fmt: skip
