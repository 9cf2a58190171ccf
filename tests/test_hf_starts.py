"""PiSSA, OLoRA, LoftQ and orthogonal starts: peft's own on a float32 base is the truth for A and B."""

import copy
import inspect
import re

import pytest
import tiny
import torch
from peft import AdaLoraConfig, IA3Config, LoftQConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import loftq_utils
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForSequenceClassification
from transformers.pytorch_utils import Conv1D

import nf4lora.hf  # noqa: F401 (registers the quantizer)
from nf4lora import NF4Linear, NF4LoRALinear, dequantize_4bit, quantize_4bit, replace_linears
from nf4lora.hf.config import NF4Config
from nf4lora.hf.starts import quantize_with_start, save_base
from nf4lora.nn.experts import NF4Experts
from nf4lora.starts import start, with_start

KINDS = ("pissa", "pissa_niter_4", "olora", "loftq", "orthogonal")


def heavy_tailed(N=96, K=160, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(N, K, generator=g) / torch.randn(N, K, generator=g).abs().clamp(min=0.2)


def low_rank(N=96, K=160, rank=8, noise=0.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(N, rank, generator=g) @ torch.randn(rank, K, generator=g)
    return W + noise * torch.randn(N, K, generator=g)


def decoded(W, **options):
    return dequantize_4bit(*quantize_4bit(W, compress_statistics=True, **options), torch.float32)


def config(kind, **changes):
    loftq = {"loftq_config": LoftQConfig(loftq_iter=2)} if kind == "loftq" else {}
    fields = dict(r=8, lora_alpha=16, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **loftq)
    return LoraConfig(init_lora_weights=kind, **(fields | changes))


def assert_near(found, wanted, tolerance=1e-5):
    assert found.dtype == torch.float32 and found.shape == wanted.shape
    assert torch.linalg.norm(found - wanted) <= tolerance * torch.linalg.norm(wanted)


def adapters(model, name="default"):
    return {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer) and name in m.lora_A}


def pefts(W, kind, r, alpha):
    """peft's layer on a dense linear of this weight, after its own start of this kind."""
    holder = nn.Sequential(nn.Linear(W.shape[1], W.shape[0], bias=False))
    holder[0].weight.data.copy_(W)
    layer = get_peft_model(holder, LoraConfig(r=r, lora_alpha=alpha, target_modules=["0"])).get_base_model()[0]
    torch.manual_seed(3)
    own = getattr(layer, kind.split("_")[0].lower() + "_init")
    own("default", kind) if kind.startswith("pissa") else own("default")
    return layer


@pytest.mark.parametrize("shape", [(96, 160), (160, 96)])
@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_3", "olora", "OLoRA", "orthogonal"])
def test_equals_pefts_own_on_a_float32_base(kind, shape):
    W = heavy_tailed(*shape)
    layer = pefts(W, kind, 8, 20)
    A, B, residual = start(W, 8, 20 / 8, kind, generator=torch.Generator().manual_seed(3))
    assert_near(A, layer.lora_A.default.weight)
    assert_near(B, layer.lora_B.default.weight)
    assert_near(residual, layer.base_layer.weight)
    assert A.is_contiguous() and B.is_contiguous() and torch.equal(W, heavy_tailed(*shape))


def pefts_loftq(W, r, rounds):
    """peft's LoftQ, which wants a GPU, with the processor in its place."""
    source = inspect.getsource(loftq_utils.loftq_init).replace('"cuda"', '"cpu"')
    names = dict(vars(loftq_utils))
    exec(compile(source, "loftq_init", "exec"), names)
    return names["loftq_init"](W, num_bits=4, reduced_rank=r, num_iter=rounds)


@pytest.mark.parametrize("rounds", [1, 3])
def test_loftq_equals_pefts_own_where_scaling_is_one(rounds):
    W = heavy_tailed(K=192)  # whole blocks in a row: on the processor bitsandbytes 0.50 decodes others wrong
    base, wanted_A, wanted_B = pefts_loftq(W, 8, rounds)
    A, B, residual = start(W, 8, 1.0, "loftq", iterations=rounds, double_quant=False)
    own = dequantize_4bit(*quantize_4bit(residual))
    assert torch.linalg.norm(W - own - B @ A) <= torch.linalg.norm(W - base - wanted_B @ wanted_A) * 1.0001
    if rounds == 1:
        assert torch.equal(own, base)
        assert_near(A, wanted_A)
        assert_near(B, wanted_B)


def test_loftq_holds_for_any_scaling():
    W = heavy_tailed()
    one, four = (start(W, 8, s, "loftq") for s in (1.0, 4.0))
    assert_near(4.0 * four[1] @ four[0], one[1] @ one[0])


@pytest.mark.parametrize("quant_type, blocksize", [("nf4", 64), ("fp4", 32)])
@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_loftq_is_nearer_than_plain_and_no_round_makes_it_worse(rounds, quant_type, blocksize):
    options = dict(quant_type=quant_type, blocksize=blocksize)
    for W in (heavy_tailed(), low_rank(noise=0.3)):
        errors = [torch.linalg.norm(W - decoded(W, **options))]
        for n in (1, rounds):
            A, B, residual = start(W, 8, 2.0, "loftq", iterations=n, **options)
            lost = W - decoded(residual, **options)
            U, S, Vh = torch.linalg.svd(lost, full_matrices=False)
            assert_near(2.0 * B @ A, U[:, :8] * S[:8] @ Vh[:8], 1e-4)
            errors.append(torch.linalg.norm(lost - 2.0 * B @ A))
        assert errors[2] <= errors[1] * 1.00001 < errors[0]


def test_loftq_keeps_the_best_round_not_the_last(monkeypatch):
    """Of four rounds the second alone fits an adapter, the others leave zeros."""
    W, svd, rounds = heavy_tailed(), torch.linalg.svd, []

    def spoiled(t, **kwargs):
        U, S, Vh = svd(t, **kwargs)
        rounds.append(S)
        return U, S * (len(rounds) == 2), Vh

    wanted = start(W, 8, 1.0, "loftq")
    monkeypatch.setattr(torch.linalg, "svd", spoiled)
    found = start(W, 8, 1.0, "loftq", iterations=4)
    assert len(rounds) == 4 and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_4"])
@pytest.mark.parametrize("W", [heavy_tailed(), low_rank(noise=0.3)], ids=["heavy", "low_rank"])
def test_pissa_leaves_less_error_than_plain(W, kind):
    A, B, residual = start(W, 16, 0.5, kind)
    assert torch.linalg.norm(W - decoded(residual) - 0.5 * B @ A) < torch.linalg.norm(W - decoded(W))


@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_0", "pissa_niter_4", "olora"])
def test_a_weight_of_rank_r_is_taken_whole(kind):
    W = low_rank(rank=8)
    residual = start(W, 8, 1.0, kind)[2]
    assert residual.abs().max() < 1e-4 * W.abs().max()


def test_the_factors_are_what_they_are_said_to_be():
    W, scaling = heavy_tailed(), 2.0
    S = torch.linalg.svdvals(W)[:8]
    A, B, _ = start(W, 8, scaling, "pissa")
    assert_near(A @ A.T, torch.diag(S / scaling))
    assert_near(B.T @ B, torch.diag(S / scaling))
    assert_near(start(W, 8, scaling, "olora")[1].T @ start(W, 8, scaling, "olora")[1], torch.eye(8))
    A, B, residual = start(W, 8, scaling, "orthogonal")
    assert torch.linalg.norm(B @ A) < 1e-6 * torch.linalg.norm(B) * torch.linalg.norm(A) and A.any() and B.any()
    assert torch.equal(residual, W)


@pytest.mark.parametrize("kind", KINDS)
def test_the_dtype_autocast_and_the_generator_change_nothing(kind):
    W = heavy_tailed().bfloat16()
    plain = start(W.float(), 8, 2.0, kind, generator=torch.Generator().manual_seed(5))
    before = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = start(W, 8, 2.0, kind, generator=torch.Generator().manual_seed(5))
    assert all(torch.equal(a, b) and b.dtype == torch.float32 for a, b in zip(plain, again, strict=True))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_an_nf4_lora_linear_with_a_start(kind):
    linear = nn.Linear(160, 96).bfloat16()
    linear.weight.data.copy_(low_rank(noise=0.3))
    W = linear.weight.float()
    first, second = (torch.Generator().manual_seed(0) for _ in range(2))
    layer = with_start(linear, kind, iterations=2, generator=first, r=8, lora_alpha=4, use_rslora=True)
    A, B, residual = start(linear.weight, 8, layer.scaling, kind, iterations=2, generator=second)
    assert type(layer) is NF4LoRALinear and layer.scaling == 4 / 8**0.5
    assert layer.weight_dtype == torch.bfloat16 and layer.lora_A.requires_grad and layer.lora_B.dtype == torch.float32
    assert torch.equal(layer.lora_A, A) and torch.equal(layer.lora_B, B)
    assert torch.equal(layer.weight, quantize_4bit(residual, compress_statistics=True)[0]) and torch.equal(layer.bias, linear.bias)
    plain = torch.linalg.norm(W - decoded(W))
    error = torch.linalg.norm(W - layer.merge(torch.float32).weight)
    assert error < plain if kind != "orthogonal" else abs(error - plain) < 1e-3 * plain


# --- models


def saved(tmp_path, dtype=torch.bfloat16, **changes):
    """A tiny Llama as from_pretrained gives it."""
    tiny.llama(dtype=dtype, **changes).save_pretrained(tmp_path / "dense")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "dense")


CHOICES = {
    "all-linear": dict(target_modules="all-linear"),
    "patterns": dict(rank_pattern={"layers.1.self_attn.q_proj": 4}, alpha_pattern={"down_proj": 3}, use_rslora=True),
    "exclude": dict(target_modules=["q_proj", "v_proj"], exclude_modules=["layers.0.self_attn.q_proj"]),
    "layers": dict(layers_to_transform=[1]),
    "regex": dict(target_modules=r".*\.(gate|up)_proj"),
    "head": dict(target_modules=["lm_head", "k_proj"]),
    "kept": dict(target_modules="all-linear", modules_to_save=["mlp"]),
    "one kept": dict(target_modules=["q_proj"], modules_to_save=["gate_proj"]),
}


@pytest.mark.parametrize("changes", CHOICES.values(), ids=CHOICES)
def test_peft_chooses_layers_ranks_and_scalings(changes):
    wanted = get_peft_model(tiny.llama(dtype=torch.float32), config("pissa", **changes))
    made = quantize_with_start(tiny.llama(dtype=torch.float32), config("pissa", **changes))
    wanted, made = adapters(wanted), adapters(made)
    assert made.keys() == wanted.keys()
    for name, layer in made.items():
        assert layer.scaling == wanted[name].scaling and layer.r == wanted[name].r
        assert_near(layer.lora_A.default.weight, wanted[name].lora_A.default.weight)
        assert_near(layer.lora_B.default.weight, wanted[name].lora_B.default.weight)
        base, residual = layer.get_base_layer(), wanted[name].base_layer.weight
        assert type(base) is NF4Linear and torch.linalg.norm(base.dequantize() - residual) < 0.15 * torch.linalg.norm(residual)


def test_the_rest_is_what_from_pretrained_would_quantize(tmp_path):
    model = saved(tmp_path)
    kept = NF4Config(modules_to_not_convert=["lm_head", "o_proj"], blocksize=32, compute_dtype="float32", double_quant=False)
    made = quantize_with_start(model, config("olora"), kept).get_base_model()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=kept)
    for name, layer in again.named_modules():
        found = made.get_submodule(name)
        found = found.get_base_layer() if isinstance(found, LoraLayer) else found
        assert type(found) is type(layer), name
        if isinstance(layer, NF4Linear):
            assert (found.blocksize, found.compute_dtype, found.double_quant) == (32, torch.float32, False)
            assert found.weight_dtype == torch.bfloat16
            assert torch.equal(found.weight, layer.weight) == (name.split(".")[-1] not in ("q_proj", "down_proj"))


@pytest.mark.parametrize("kind", KINDS)
def test_trains_saves_and_reloads_equal(tmp_path, kind):
    lora = config(kind, use_dora=kind == "olora")
    model = quantize_with_start(saved(tmp_path), lora, quantize_rest=kind != "loftq", adapter_name="mine")
    assert lora.init_lora_weights == kind and {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if ".lora_" in n
    }
    x, losses = tiny.tokens(), []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(6):
        loss = model(x, labels=x).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    wanted = model.eval()(x).logits
    model.save_pretrained(tmp_path / "out")
    save_base(model, tmp_path / "base")
    assert torch.equal(model(x).logits, wanted)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(base, tmp_path / "out" / "mine", adapter_name="mine")
    assert torch.equal(again(x).logits, wanted)
    assert type(base.model.layers[0].self_attn.k_proj) is (nn.Linear if kind == "loftq" else NF4Linear)
    assert len(adapters(again, "mine")) == 4


def test_an_orthogonal_start_is_the_plain_quantized_model():
    x = tiny.tokens()
    plain = replace_linears(tiny.llama(dtype=torch.float32), layer=NF4Linear)
    model = quantize_with_start(tiny.llama(dtype=torch.float32), config("orthogonal", target_modules="all-linear"))
    for name, layer in adapters(model).items():
        assert torch.equal(layer.get_base_layer().weight, plain.get_submodule(name).weight)
    torch.testing.assert_close(model(x).logits, plain(x).logits, atol=1e-5, rtol=1e-5)


def test_a_start_is_nearer_to_the_dense_model_than_plain():
    x, dense = tiny.tokens(), tiny.llama(dtype=torch.float32)
    for name, m in dense.named_modules():
        if isinstance(m, nn.Linear) and name != "lm_head":
            m.weight.data.copy_(low_rank(*m.weight.shape, noise=0.2) * 0.01)
    wanted, plain = dense(x).logits, replace_linears(copy.deepcopy(dense), layer=NF4Linear)(x).logits
    for kind in ("pissa", "pissa_niter_4", "loftq"):
        model = quantize_with_start(copy.deepcopy(dense), config(kind, target_modules="all-linear"))
        assert torch.linalg.norm(model(x).logits - wanted) < torch.linalg.norm(plain - wanted)


def test_dora_starts_at_the_norms_of_the_start():
    x = tiny.tokens()
    one, other = (quantize_with_start(tiny.llama(dtype=torch.float32), config("pissa", use_dora=d)) for d in (False, True))
    torch.testing.assert_close(other(x).logits, one(x).logits, atol=1e-5, rtol=1e-5)


def test_pefts_own_conversion_gives_a_plain_lora_for_the_dense_model(tmp_path):
    lora = config("pissa", rank_pattern={"down_proj": 4})
    model = quantize_with_start(tiny.llama(dtype=torch.float32), lora)
    first = {n: m.get_delta_weight("default") for n, m in adapters(model).items()}
    model.save_pretrained(tmp_path / "start")
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start")
    plain = adapters(PeftModel.from_pretrained(tiny.llama(dtype=torch.float32), tmp_path / "plain"))
    for name, layer in adapters(model).items():
        assert plain[name].r["default"] == 2 * layer.r["default"]
        assert_near(plain[name].get_delta_weight("default"), layer.get_delta_weight("default") - first[name], 1e-4)


def test_experts_are_quantized_with_the_rest(tmp_path):
    tiny.qwen3_moe().save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    lora = config("pissa", target_modules=["q_proj", "v_proj"])
    model, x = quantize_with_start(model, lora), tiny.tokens()
    assert isinstance(model.get_base_model().model.layers[1].mlp.experts, NF4Experts)
    wanted = model.eval()(x).logits
    model.save_pretrained(tmp_path / "adapter")
    save_base(model, tmp_path / "base")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(again(x).logits, wanted)
    kept = quantize_with_start(tiny.qwen3_moe(), lora, quantize_rest=False).get_base_model()
    assert kept.model.layers[1].mlp.experts.down_proj.dtype == torch.bfloat16
    assert "model.layers.1.mlp.experts" in kept.config.quantization_config.modules_to_not_convert


def test_a_classifiers_head_stays_dense_and_learns():
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(**tiny.llama().config.to_diff_dict() | {"num_labels": 3}))
    lora = config("pissa", task_type="SEQ_CLS", target_modules="all-linear")
    model = quantize_with_start(model, lora)
    model(tiny.tokens(1)).logits.sum().backward()
    head = model.get_base_model().score
    assert type(head.modules_to_save.default) is nn.Linear and head.modules_to_save.default.weight.grad is not None
    assert len(adapters(model)) == 14 and lora.modules_to_save is None
    assert model.peft_config["default"].modules_to_save == ["classifier", "score"]


def test_loftq_of_a_model_takes_the_rounds_of_its_config():
    dense = tiny.llama(dtype=torch.float32)
    model = quantize_with_start(copy.deepcopy(dense), config("loftq"))
    for name, layer in adapters(model).items():
        one, two = (start(dense.get_submodule(name).weight, 8, 2.0, "loftq", iterations=n) for n in (1, 2))
        assert torch.equal(layer.lora_A.default.weight, two[0]) and torch.equal(layer.lora_B.default.weight, two[1])
        assert not torch.equal(one[0], two[0])
    assert model.peft_config["default"].init_lora_weights is True and model.peft_config["default"].loftq_config == {}


def test_a_model_that_is_none_of_transformers():
    net = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.Linear(64, 8))
    lora, kept = LoraConfig(init_lora_weights="olora", r=4, target_modules=["0"]), NF4Config(modules_to_not_convert=["3"])
    model = quantize_with_start(net, lora, kept)
    assert [type(m) for m in net[2:]] == [NF4Linear, nn.Linear] and type(net[0].get_base_layer()) is NF4Linear
    with pytest.raises(TypeError, match="wanted a model of transformers"):
        save_base(model, "nowhere")


def test_the_same_generator_gives_the_same_model():
    one, two, other = (
        quantize_with_start(tiny.llama(), config("orthogonal"), generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    )
    first, same, third = ([m.lora_A.default.weight for m in adapters(p).values()] for p in (one, two, other))
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True)) and not torch.equal(first[0], third[0])
    assert not torch.equal(first[0], first[2])  # two layers of one shape


# --- bad input


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(kind="pisa"), "'pisa', wanted one of .*; did you mean 'pissa'"),
        (dict(kind="pissa_niter_"), "did you mean 'pissa_niter_4'"),
        (dict(kind=True), "found True, wanted one of"),
        (dict(r=0), "r: found 0"),
        (dict(r=2.0), "r: found 2.0"),
        (dict(r=97), r"r: found 97, wanted at most 96 for a weight of shape \(96, 160\)"),
        (dict(kind="orthogonal", r=7), "r: found 7, wanted an even rank"),
        (dict(scaling=0.0), "scaling: found 0.0"),
        (dict(scaling=float("nan")), "scaling: found nan"),
        (dict(kind="loftq", iterations=0), "iterations: found 0"),
        (dict(weight=torch.zeros(4)), r"found shape \(4,\)"),
        (dict(weight=torch.zeros(4, 4, device="meta")), "meta device"),
        (dict(weight=torch.full((4, 4), float("nan"))), "weight: .*NaN"),
        (dict(weight=torch.zeros(4, 4, dtype=torch.uint8)), "found torch.uint8, wanted one of"),
        (dict(weight=None), "found NoneType"),
    ],
)
def test_bad_arguments_of_start(changes, message):
    arguments = {"weight": heavy_tailed(), "r": 2, "scaling": 1.0, "kind": "pissa"} | changes
    with pytest.raises((ValueError, TypeError), match=message):
        start(**arguments)


def _nan(model):
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")


def _conv(model):
    model.model.layers[0].mlp.up_proj = Conv1D(96, 64)


BAD = {
    "gaussian": (dict(kind="gaussian"), None, "init_lora_weights: .*'gaussian'.*quantize and get_peft_model as usual"),
    "plain": (dict(kind=True), None, "init_lora_weights: "),
    "eight bits": (dict(kind="loftq", loftq_config={"loftq_bits": 8}), None, "found loftq_bits=8, wanted 4"),
    "no round": (dict(kind="loftq", loftq_config={"loftq_iter": 0}), None, "iterations: found 0"),
    "experts": (dict(target_parameters=["mlp.w"]), None, "found {'target_parameters'"),
    "replicated": (dict(layer_replication=[(0, 2), (1, 2)]), None, "found {'layer_replication'"),
    "rank": (dict(rank_pattern={"down_proj": 65}), None, "layers.0.mlp.down_proj: r: found 65, wanted at most 64"),
    "odd": (dict(kind="orthogonal", rank_pattern={"down_proj": 3}), None, "layers.0.mlp.down_proj: r: found 3"),
    "alpha": (dict(lora_alpha=0), None, "q_proj: scaling: found 0"),
    "embedding": (dict(target_modules=["embed_tokens"]), None, "found model.embed_tokens, a Embedding, wanted"),
    "Conv1D": (dict(target_modules=["up_proj"]), _conv, "found model.layers.0.mlp.up_proj, a Conv1D"),
    "kept in 16 bits": ({}, lambda m: ["down_proj"], "layers.0.mlp.down_proj: found it in modules_to_not_convert"),
    "no match": (dict(target_modules=["query"]), None, "query"),
    "NaN beside": ({}, _nan, "layers.1.mlp.up_proj.weight: .*NaN"),
    "tied": (dict(target_modules=["lm_head"]), None, "lm_head: found its weight shared"),
    "quantized": ({}, lambda m: replace_linears(m, layer=NF4Linear), "already .NF4Linear.; pissa needs the 16-bit"),
    "meta": ({}, lambda m: m.to("meta"), "meta device; load the model"),
    "float64": ({}, lambda m: m.double(), "found torch.float64"),
    "adapted": ({}, lambda m: get_peft_model(m, config(True)), "found an adapter at model.layers.0.self_attn.q_proj"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("changes, spoil, message", BAD.values(), ids=BAD)
def test_bad_models_are_refused_before_anything_is_changed(changes, spoil, message):
    model = tiny.llama(tie_word_embeddings=message.startswith("lm_head"))
    kept = spoil(model) if spoil else None
    format = NF4Config(modules_to_not_convert=kept if isinstance(kept, list) else None)
    shape = lambda: {n: (type(m), getattr(m, "training", None)) for n, m in model.named_modules()}
    before, tensors = shape(), {n: (p, p.requires_grad) for n, p in model.named_parameters()}
    with pytest.raises((ValueError, TypeError), match=message):
        quantize_with_start(model, config(**({"kind": "pissa"} | changes)), format)
    after = {n: (p, p.requires_grad) for n, p in model.named_parameters()}
    assert shape() == before and after.keys() == tensors.keys()
    assert all(after[n][0] is p and after[n][1] == grad for n, (p, grad) in tensors.items())
    assert not re.search("quant", str(model.config.to_diff_dict()))


def test_other_configs_are_refused():
    with pytest.raises(TypeError, match="found a IA3Config, wanted a LoraConfig"):
        quantize_with_start(tiny.llama(), IA3Config(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="found {.*target_r.*}, which does not go with"):
        quantize_with_start(tiny.llama(), AdaLoraConfig(init_lora_weights="pissa", total_step=10))
    with pytest.raises(TypeError, match="found a BitsAndBytesConfig, wanted an NF4Config"):
        quantize_with_start(tiny.llama(), config("pissa"), BitsAndBytesConfig(load_in_4bit=True))


def test_a_merged_model_has_no_base_to_save():
    model = quantize_with_start(tiny.llama(), config("pissa"))
    for m in adapters(model).values():
        m.merged_adapters.append("default")
    with pytest.raises(ValueError, match="unmerge_adapter"):
        save_base(model, "nowhere")
