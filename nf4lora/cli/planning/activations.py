"""What autograd keeps of a forward, in bytes a token, by formulas over the shapes of a layer.

With c bytes an element of the compute dtype, h the hidden width, m the MLP's, K the width of an x, r the rank, a layer keeps:

    norms          RMSNorm 4h + 4 (x and its factor in float32); LayerNorm c h + 8; and where its weight trains, c h more
    attention      c (q + k + v + out) widths, and 4 a head (log-sum-exp): flash. "efficient": k and v as wide as q.
                   "eager": the scores too, S a head and token in float32 and again in the compute dtype
    x of linears   QLoRA (ours): c K once for all linears that read one x, and c r each; attention's output counts above
                   LoRA (peft): for each linear of its own, in float32, dropout(x) 4K, its mask (1 byte an element on a GPU, 4
                   on a CPU) and 4r; without dropout, x in float32 where the compute dtype is another
                   full: c K once; under autocast once for each linear
    MLP            gated 3 c m (gate, its activation, up); plain c m, or more where the activation is not one kernel
    experts        each token in k of them: k c (3m + h) and 8 E for the router; when they train, k c (h + m) more
    dropouts       of hidden states: a mask of h
    checkpointing  c h for each layer, and all of the above for one layer at a time

and beside the layers: the final norm, the head's x if it trains, the ids, and 4 a vocabulary entry for log-softmax.
"""

from dataclasses import dataclass

from .blocks import Block, Mlp, Norm, Read
from .inventory import means

ATTENTIONS = ("flash", "efficient", "eager")


@dataclass(frozen=True)
class Mode:
    """How a model computes. method: "full", "lora" (peft on 16 bits), "qlora" or "adalora" (ours)

    compute, weights: bytes an element; they differ only in full fine-tuning under autocast
    targets: names of linears with adapters; cuda: a GPU and not a CPU; length: of a sequence, for "eager" alone
    """

    method: str
    compute: int = 2
    weights: int = 2
    r: int = 16
    targets: tuple[str, ...] = ("all-linear",)
    dropout: float = 0.05
    attention: str = "flash"
    cuda: bool = True
    length: int = 0

    @property
    def full(self) -> bool:
        return self.method == "full"

    @property
    def mixed(self) -> bool:
        return self.full and self.weights != self.compute

    @property
    def stream(self) -> int:
        """Bytes an element of the hidden states between layers."""
        return self.weights if self.full else self.compute

    def adapted(self, read: Read) -> int:
        """How many of these linears have an adapter."""
        if self.full:
            return 0
        return sum(
            self.targets == ("all-linear",) or any(means(t, path) for t in self.targets) for path, _ in read.linears
        )


def of_layer(block: Block, mode: Mode) -> float:
    """Bytes a token that autograd keeps in one layer."""
    kept = sum(of_norm(n, mode) for n in block.norms) + block.dropouts * block.hidden * (
        1 if mode.cuda else mode.compute
    )
    for attention in block.attention:
        q = attention.out.K
        wide = 4 * q if mode.attention != "flash" else attention.into.N + q
        kept += mode.compute * wide + (4 * attention.heads if mode.attention != "eager" else 0)
        if mode.attention == "eager":
            kept += attention.heads * mode.length * (4 + (mode.compute if mode.compute < 4 else 0))
        kept += of_x(attention.into, mode) + of_x(attention.out, mode, is_kept=True)
    for mlp in block.mlps:
        kept += of_x(mlp.into, mode)
        if mlp.down:
            kept += mode.compute * mlp.down.K * (mlp.kept + 2 if mlp.gated else mlp.kept) + of_x(mlp.down, mode)
    if e := block.experts:
        kept += e.chosen * mode.compute * (3 * e.width + e.hidden) + 8 * e.count
        kept += e.chosen * mode.compute * (e.hidden + e.width) if mode.full else 0
    return kept


def of_norm(norm: Norm, mode: Mode) -> float:
    """Bytes a token."""
    kept = 4 * norm.width + 4 if norm.rms else mode.stream * norm.width + 8
    return kept + mode.stream * norm.width if mode.full and norm.rms else kept


def of_x(read: Read, mode: Mode, is_kept: bool = False) -> float:
    """Bytes a token of the x of linears that read it, and of what adapters keep; `is_kept`: x itself is counted elsewhere."""
    n, K = mode.adapted(read), read.K
    if mode.full:
        return 0 if is_kept else mode.compute * K * (len(read.linears) if mode.mixed else 1)
    if mode.method == "lora":
        own = 4 + (1 if mode.cuda else 4) if mode.dropout else 4 * (mode.compute != 4)
        shared = 4 * K if n and mode.compute == 4 and not mode.dropout and not is_kept else 0
        return shared + n * (own * K + 4 * mode.r)
    return (0 if is_kept or not n else mode.compute * K) + n * mode.compute * mode.r


def of_backward(block: Block, mode: Mode) -> float:
    """Bytes a token that the backward of a layer holds at most beyond what its forward kept, less what it has let go of.

    In the MLP, where the gradients of gate, up and their product live side by side; or in peft's adapter of the down linear.
    """
    most = 0.0
    for mlp in block.mlps:
        if mlp.down:
            most = max(most, _of_mlp(mlp, mode) + mode.compute * block.hidden)
    if e := block.experts:
        most = max(most, e.chosen * mode.compute * 3 * e.width + mode.compute * block.hidden)
    if mode.attention == "eager":
        most = max([most, *(8 * a.heads * mode.length for a in block.attention)])
    return most


def _of_mlp(mlp: Mlp, mode: Mode) -> float:
    m, x = mlp.down.K, of_x(mlp.down, mode)
    at_product = (3 if mlp.gated else 2) * mode.compute * m - x
    if mode.method != "lora" or not mode.adapted(mlp.down):
        return at_product
    if mode.compute < 4:  # x and the sum of both gradients are cast, so that they live in both dtypes
        in_adapter = (2 if mode.dropout else 3) * mode.compute + 4
    else:
        in_adapter = 8 if mode.dropout else 8 - x / m
    return max(at_product, in_adapter * m)


def of_head(mode: Mode, hidden: int, final_norm: bool, vocabulary: int) -> float:
    """Bytes a token beside the layers, log-softmax among them."""
    norm = of_norm(Norm(hidden, True), mode) if final_norm else 0
    return norm + (mode.compute * hidden if mode.full else 0) + 4 * vocabulary + 8


def of_loss(mode: Mode, vocabulary: int) -> float:
    """Bytes a token, beyond log-softmax, at the loss: logits and their float32 copy, or the two gradients of it in float32."""
    return vocabulary * max(mode.compute + (4 if mode.compute < 4 else 0), 8)
