"""`NF4Linear` and `NF4LoRALinear`: what they hold, compute, save and learn, and how others' code takes them."""

import copy
import inspect
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from nf4lora import NF4Linear, NF4LoRALinear, QuantState, dequantize_4bit, ops, quantize_4bit
from nf4lora.testing import assert_error_ratio

pytestmark = pytest.mark.usefixtures("one_thread")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WEIGHT = {"weight", "weight_absmax", "weight_nested_absmax", "weight_nested_offset"}


def make(K=96, N=40, r=4, seed=0, cls=NF4LoRALinear, **kwargs):
    """A layer whose adapter does something."""
    torch.manual_seed(seed)
    layer = cls(K, N, r=r, **kwargs) if cls is NF4LoRALinear else cls(K, N, **kwargs)
    if getattr(layer, "lora_B", None) is not None:
        nn.init.normal_(layer.lora_B, std=0.1)
    return layer


def raw(t):
    return t.detach().contiguous().reshape(-1).view(torch.uint8)


def state_bytes(module):
    return {n: (p.dtype, raw(p).tolist()) for n, p in module.state_dict().items()}


# What is constructed


def test_signatures():
    lora = {
        "in_features": ..., "out_features": ..., "bias": True, "r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "blocksize": 64,
        "quant_type": "nf4", "double_quant": True, "compute_dtype": None, "use_rslora": False, "device": None, "dtype": None,
    }  # fmt: skip
    base = {k: v for k, v in lora.items() if k not in ("r", "lora_alpha", "lora_dropout", "use_rslora")}
    for cls, wanted in ((NF4LoRALinear, lora), (NF4Linear, base)):
        found = inspect.signature(cls).parameters
        assert {k: ... if p.default is p.empty else p.default for k, p in found.items()} == wanted
        assert list(found) == list(wanted) and {p.kind for p in found.values()} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
        assert issubclass(cls, nn.Linear)
        assert next(iter(inspect.signature(cls.from_linear).parameters)) == "linear"


@pytest.mark.parametrize("K", [64, 400])
def test_initialization(K):
    torch.manual_seed(0)
    layer = NF4LoRALinear(K, 300, r=32)
    bound = 1 / math.sqrt(K)  # kaiming uniform, a = sqrt 5
    for t in (layer.lora_A, layer.bias, layer.dequantize()):
        assert 0.97 * bound < t.abs().max() <= bound * 1.001
        assert abs(t.mean()) < 0.06 * bound and abs(t.double().std() / (bound / math.sqrt(3)) - 1) < 0.06
    assert torch.equal(layer.lora_B, torch.zeros(300, 32))
    before = state_bytes(layer)
    layer.reset_parameters()
    after = state_bytes(layer)
    assert {n for n in before if before[n] != after[n]} == WEIGHT | {"bias", "lora_A"}


def test_scaling():
    for r, alpha in ((1, 1), (8, 16), (16, 32), (7, 0.5)):
        assert NF4LoRALinear(32, 32, r=r, lora_alpha=alpha).scaling == alpha / r
        assert NF4LoRALinear(32, 32, r=r, lora_alpha=alpha, use_rslora=True).scaling == alpha / math.sqrt(r)
    plain, rs = make(r=4, lora_alpha=8), make(r=4, lora_alpha=4, use_rslora=True)
    x = torch.randn(3, 96)
    assert torch.equal(plain(x), rs(x))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_tensors(quant_type, blocksize, nested):
    """Frozen integer parameters and no buffers, so that casts, DDP and FSDP leave them whole; the format's own bytes."""
    linear = nn.Linear(100, 41)
    layer = NF4LoRALinear.from_linear(linear, r=2, blocksize=blocksize, quant_type=quant_type, double_quant=nested)
    packed, state = quantize_4bit(linear.weight, blocksize, nested, quant_type)
    blocks = -(-4100 // blocksize)
    sizes = {"weight": (2050, 1), "weight_absmax": (blocks,), "bias": (41,), "lora_A": (2, 100), "lora_B": (41, 2)}
    if nested:
        sizes |= {"weight_nested_absmax": (-(-blocks // 256),), "weight_nested_offset": (1,)}
    own = dict(layer.named_parameters())
    assert {n: tuple(p.shape) for n, p in own.items()} == sizes == {n: tuple(t.shape) for n, t in layer.state_dict().items()}
    assert not list(layer.buffers()) and {n for n, p in own.items() if p.requires_grad} == {"lora_A", "lora_B"}
    assert own["weight"].dtype == torch.uint8 and own["weight_absmax"].dtype == (torch.uint8 if nested else torch.int32)
    assert torch.equal(layer.weight, packed) and layer.quant_state == state
    assert torch.equal(layer.dequantize(), dequantize_4bit(packed, state))
    assert all(own[n].dtype == torch.int32 for n in ("weight_nested_absmax", "weight_nested_offset") if nested)
    shared = layer.quant_state
    assert shared.absmax.untyped_storage().data_ptr() == layer.weight_absmax.untyped_storage().data_ptr()
    y = layer(torch.eye(100))
    torch.testing.assert_close(y, layer.dequantize().T + layer.bias)


@pytest.mark.filterwarnings("ignore:r=16 is more")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("cls", [NF4Linear, NF4LoRALinear])
def test_device_and_dtype(cls, dtype):
    layer = cls(8, 6, device=torch.device("cpu"), dtype=dtype)
    assert layer.bias.dtype == dtype and layer.weight_dtype == layer.dequantize().dtype == layer.quant_state.dtype == dtype
    assert layer(torch.randn(2, 8, dtype=dtype)).dtype == dtype
    if cls is NF4LoRALinear:
        assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    linear = nn.Linear(8, 6, dtype=dtype)
    assert cls.from_linear(linear).weight_dtype == cls.from_linear(linear).bias.dtype == dtype
    cast = cls.from_linear(nn.Linear(8, 6).double(), dtype=dtype)
    assert cast.weight_dtype == cast.bias.dtype == cast.dequantize().dtype == dtype
    try:
        torch.set_default_dtype(dtype)
        assert cls(8, 6).bias.dtype == dtype
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.filterwarnings("ignore:r=16 is more")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cls", [NF4Linear, NF4LoRALinear])
def test_from_linear(cls, bias):
    linear = nn.Linear(8, 6, bias=bias).eval()
    before = copy.deepcopy(linear)
    layer = cls.from_linear(linear, blocksize=32)
    assert type(layer) is cls and not layer.training and (layer.bias is not None) == bias and layer.blocksize == 32
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
    assert linear.weight.requires_grad and all(torch.equal(p, q) for p, q in zip(linear.parameters(), before.parameters(), strict=True))
    assert type(cls.from_linear(linear, device="cpu")) is cls


@pytest.mark.parametrize("assign", [True, False])
def test_meta_device(assign):
    layer = make()
    with torch.device("meta"):
        meta = NF4LoRALinear(96, 40, r=4)
    from_meta = NF4LoRALinear.from_linear(nn.Linear(96, 40, device="meta"), r=4)
    for empty in (meta, from_meta, NF4LoRALinear(96, 40, r=4, device="meta")):
        assert all(p.is_meta for p in empty.parameters())
        shapes = {n: (p.dtype, p.shape, p.requires_grad) for n, p in empty.named_parameters()}
        assert shapes == {n: (p.dtype, p.shape, p.requires_grad) for n, p in layer.named_parameters()}
        assert empty(torch.empty(5, 96, device="meta")).shape == (5, 40)
        target = empty if assign else empty.to_empty(device="cpu")
        target.load_state_dict(layer.state_dict(), assign=assign)
        assert state_bytes(target) == state_bytes(layer) and target.lora_A.requires_grad and not target.weight.requires_grad
        assert torch.equal(target(torch.ones(2, 96)), layer(torch.ones(2, 96)))
    fresh = NF4LoRALinear(96, 40, r=4, bias=False, device="meta").quantize_(torch.randn(40, 96))
    assert not fresh.lora_A.is_meta and fresh.lora_A.any() and not fresh.lora_B.any() and fresh(torch.ones(96)).isfinite().all()


def test_state_dict():
    layer, other = make(), make(seed=1)
    for target in (make(seed=2), make(seed=2).bfloat16()):
        assert not any(target.load_state_dict(layer.state_dict()))
        assert torch.equal(target.dequantize(), layer.dequantize())
        torch.testing.assert_close(target.lora_A.float(), layer.lora_A, rtol=0.01, atol=0)
    assert state_bytes(layer) != state_bytes(other)
    # An adapter alone, and a base alone.
    adapter = {n: t for n, t in layer.state_dict().items() if "lora" in n}
    base = {n: t for n, t in layer.state_dict().items() if "lora" not in n}
    result = other.load_state_dict(adapter, strict=False)
    assert set(result.missing_keys) == WEIGHT | {"bias"} and not result.unexpected_keys
    assert torch.equal(other.lora_B, layer.lora_B) and not torch.equal(other.weight, layer.weight)
    plain = make(cls=NF4Linear, seed=3)
    plain.load_state_dict(base)
    assert state_bytes(plain) == {n: v for n, v in state_bytes(layer).items() if "lora" not in n}
    assert set(make(seed=4).load_state_dict(base, strict=False).missing_keys) == {"lora_A", "lora_B"}
    with pytest.raises(RuntimeError, match="Missing key.*lora_A"):
        other.load_state_dict(base)
    # In a model, with keep_vars, and twice.
    model = nn.Sequential(make(seed=5), nn.ReLU(), make(40, 8, seed=6))
    again = nn.Sequential(make(seed=7), nn.ReLU(), make(40, 8, seed=8))
    again.load_state_dict(model.state_dict(keep_vars=True))
    again.load_state_dict(model.state_dict())
    assert state_bytes(again) == state_bytes(model)
    assert type(layer.state_dict(destination={})) is dict


def test_plain_attributes_and_tools():
    """Nothing hidden: no hooks, and parametrizations of the adapter work."""
    layer, x = make(), torch.randn(3, 96)
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks"):
        assert not getattr(layer, hooks)
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in layer.parameters())

    class Double(nn.Module):
        def forward(self, t):
            return 2 * t

    wanted = layer(x)
    parametrize.register_parametrization(layer, "lora_B", Double())
    with torch.no_grad():
        layer.parametrizations.lora_B.original.mul_(0.5)
    assert torch.equal(layer(x), wanted)
    layer(x).sum().backward()
    assert layer.parametrizations.lora_B.original.grad.any()
    assert "nf4, blocksize=64" in repr(layer) and "r=4" in repr(layer)
    hook = layer.register_forward_hook(lambda m, i, o: o + 1)
    assert torch.equal(layer(x), wanted + 1)
    hook.remove()


# What is computed


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lora_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", FLOATS)
def test_equals_dense(dtype, lora_dtype, bias):
    """Output and every gradient, as near to the truth on the decoded weight as plain torch in the dtype of x."""
    layer = make(130, 70, r=8, bias=bias)
    layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.to(lora_dtype), layer.lora_B.data.to(lora_dtype)
    x, dy = torch.randn(3, 11, 130).to(dtype), torch.randn(3, 11, 70).to(dtype)
    leaves = [x, layer.lora_A.detach(), layer.lora_B.detach()]
    if bias:
        layer.bias.requires_grad_()
        leaves.append(layer.bias.detach())

    def dense(work):
        own = [t.to(work).requires_grad_() for t in leaves]
        y = own[0] @ layer.dequantize(torch.float32).to(work).T + layer.scaling * (own[0] @ own[1].T) @ own[2].T
        y = y + own[3] if bias else y
        return [y.detach(), *torch.autograd.grad(y, own, dy.to(work))]

    given = x.clone().requires_grad_()
    y = layer(given)
    y.backward(dy)
    found = [y.detach(), given.grad, layer.lora_A.grad, layer.lora_B.grad] + ([layer.bias.grad] if bias else [])
    kinds = [dtype, dtype, lora_dtype, lora_dtype, torch.float32]
    assert [t.dtype for t in found] == kinds[: len(found)]
    for name, own, baseline, truth in zip(("y", "dx", "dA", "dB", "dbias"), found, dense(dtype), dense(torch.float64)):
        assert_error_ratio(own, baseline.to(own.dtype), truth, name)


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("dtype", FLOATS)
def test_saves_x_and_xa_only(dtype, p):
    K, N, M, r = 512, 384, 6, 4
    layer = make(K, N, r=r, lora_dropout=p)
    own = {t.untyped_storage().data_ptr() for t in layer.parameters()}

    def saved(*frozen):
        kept = []
        for name in ("lora_A", "lora_B"):
            getattr(layer, name).requires_grad_(name not in frozen)
        x = torch.randn(M, K, dtype=dtype, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            layer(x).float().sum()
        kept = [t for t in kept if t.untyped_storage().data_ptr() not in own]
        assert all(t.dtype in (dtype, torch.int64) for t in kept)
        # The seed is one integer.
        assert sum(t.dtype == torch.int64 for t in kept) == (p > 0 and torch.is_grad_enabled())
        assert all(t.numel() == 1 for t in kept if t.dtype == torch.int64)
        return sorted(t.numel() for t in kept if t.dtype == dtype)

    assert saved() == [M * r, M * K]
    assert saved("lora_A") == [M * r] and saved("lora_B") == [M * K] and saved("lora_A", "lora_B") == []
    with torch.no_grad():
        assert saved() == []


def test_dropout():
    layer = make(lora_dropout=0.5)
    x = torch.randn(5, 96)
    torch.manual_seed(1)
    one, two = layer(x), layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), one) and not torch.equal(one, two)
    wanted = make(lora_dropout=0.0)(x)
    state = torch.get_rng_state()
    assert torch.equal(layer.eval()(x), wanted) and torch.equal(torch.get_rng_state(), state)
    # dropout acts in the adapter's branch only
    with torch.no_grad():
        layer.lora_B.zero_()
    assert torch.equal(layer.train()(x), layer.eval()(x))
    # and keeps the mean
    layer = make(8, 1, r=1, lora_dropout=0.25).train()
    x = torch.ones(40_000, 8)
    branch = layer(x) - layer.eval()(x)
    spread = layer.scaling * (layer.lora_B @ layer.lora_A).square().sum().sqrt() * math.sqrt(0.25 / 0.75)
    assert abs(branch.mean()) < 6 * spread / math.sqrt(40_000) and abs(branch.std() / spread - 1) < 0.05


def test_gradients_accumulate_and_are_deterministic():
    x = torch.randn(7, 96)

    def train():
        layer = make(seed=3, lora_dropout=0.1)
        optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(5):
            layer(x).square().mean().backward()
            layer(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return state_bytes(layer)

    first = train()
    assert first == train()
    fresh = state_bytes(make(seed=3))
    assert {n for n in first if first[n] != fresh[n]} == {"lora_A", "lora_B"}


def test_base_learns_nothing():
    layer, x = make(), torch.randn(3, 96, requires_grad=True)
    before = state_bytes(layer)
    layer(x).sum().backward()
    assert state_bytes(layer) == before and layer.weight.grad is None and layer.bias.grad is None
    plain = make(cls=NF4Linear)
    y = plain(x.detach())
    assert not y.requires_grad and plain(x).requires_grad


def test_no_backward_ops_without_need(monkeypatch):
    for name in ("linear_bwd", "lora_bwd"):
        monkeypatch.setattr(ops, name, lambda *a, name=name: pytest.fail(f"{name} was called"))
    layer = make()
    layer.bias.requires_grad_()
    for name in ("lora_A", "lora_B"):
        getattr(layer, name).requires_grad_(False)
    layer(torch.randn(3, 96)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((40,), 3.0))


@pytest.mark.parametrize("M", [5, 300])
@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_and_inf_stay_in_their_row(dtype, M):
    layer, x = make(), torch.randn(M, 96).to(dtype)
    clean = layer(x)
    x[1, 3], x[4, 95] = math.nan, math.inf
    y = layer(x)
    assert not y[[1, 4]].isfinite().any()
    others = [i for i in range(M) if i not in (1, 4)]
    assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("M", [3, 64])
def test_adapter_of_any_strides(M):
    layer, x = make(), torch.randn(M, 96)
    strided = copy.deepcopy(layer)
    strided.lora_A = nn.Parameter(layer.lora_A.detach().T.contiguous().T)
    strided.lora_B = nn.Parameter(layer.lora_B.detach().T.contiguous().T)
    for own in (layer, strided):
        own(x).square().sum().backward()
    for name in ("lora_A", "lora_B"):
        assert not getattr(strided, name).is_contiguous()
        found, wanted = getattr(strided, name).grad, getattr(layer, name).grad
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())
    torch.testing.assert_close(strided(x), layer(x))


def test_no_grad_and_inference_mode():
    layer, x = make(), torch.randn(3, 96)
    wanted = layer(x).detach()
    with torch.no_grad():
        y = layer(x)
    with torch.inference_mode():
        z = layer(x)
    assert torch.equal(y, wanted) and torch.equal(z, wanted) and not y.requires_grad and z.is_inference()


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_merge(quant_type, double_quant):
    layer = make(lora_alpha=3, quant_type=quant_type, double_quant=double_quant).eval()
    before = state_bytes(layer)
    dense = layer.merge()
    assert type(dense) is nn.Linear and not dense.training and (dense.in_features, dense.out_features) == (96, 40)
    exact = layer.dequantize().double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    torch.testing.assert_close(dense.weight.double(), exact, rtol=2e-7, atol=1e-7)
    assert torch.equal(dense.bias, layer.bias) and state_bytes(layer) == before
    x = torch.randn(5, 96)
    torch.testing.assert_close(dense(x), layer(x), rtol=1e-5, atol=1e-5)
    # rounded once: bf16 of the float32 sum
    assert torch.equal(layer.merge(torch.bfloat16).weight, dense.weight.to(torch.bfloat16))
    assert make(bias=False).merge().bias is None


# How others' code takes them


def tiny_llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64,
        )
    )  # fmt: skip


def test_peft_trains_on_nf4linear():
    """peft's own LoRA, with no word of ours, on `NF4Linear`s."""
    peft = pytest.importorskip("peft")
    from nf4lora import replace_linears

    model = replace_linears(tiny_llama(), layer=NF4Linear)
    base = state_bytes(model)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    adapted = [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert len(adapted) == 14 and all(type(m.get_base_layer()) is NF4Linear for m in adapted)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.randint(61, (4, 16), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(10):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0], losses
    after = {n.replace(".base_layer", "").removeprefix("base_model.model."): v for n, v in state_bytes(model).items() if "lora" not in n}
    assert after == base


def test_data_parallel_ready():
    """One process of gloo: DDP broadcasts the integer parameters, reduces the adapter's gradients, and finds no buffers."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        layer, x = make(), torch.randn(3, 96)
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(layer))
        wrapped(x).square().sum().backward()
        layer(x).square().sum().backward()
        assert torch.equal(wrapped.module.lora_B.grad, layer.lora_B.grad) and state_bytes(wrapped.module) == state_bytes(layer)
    finally:
        torch.distributed.destroy_process_group()


def test_functional_call_and_transforms():
    """Other weights through `functional_call`; functorch's transforms say that they are not supported."""
    layer, x = make(), torch.randn(3, 96)
    other = torch.randn(40, 4)
    y = torch.func.functional_call(layer, {"lora_B": other}, (x,))
    with torch.no_grad():
        layer.lora_B.copy_(other)
    assert torch.equal(y, layer(x))
    for call in (lambda: torch.vmap(layer)(x), lambda: torch.func.grad(lambda t: layer(t).sum())(x), lambda: torch.func.jvp(layer, (x,), (x,))):
        with pytest.raises(RuntimeError, match="setup_context"):
            call()


def test_export():
    layer = make().eval()
    dynamic = {"x": {0: torch.export.Dim("rows", min=2, max=1000)}}
    program = torch.export.export(layer, (torch.randn(5, 96),), dynamic_shapes=dynamic)
    x = torch.randn(17, 96)
    assert torch.equal(program.module()(x), layer(x))


def test_memory_shared_with_another_process_and_copies():
    layer, x = make(), torch.randn(3, 96)
    wanted = layer(x)
    shallow = copy.copy(layer)
    assert shallow.weight is layer.weight and torch.equal(shallow(x), wanted)
    assert torch.equal(layer.share_memory()(x), wanted) and layer.weight.is_shared()
    tied = make(seed=1)
    tied.lora_A = layer.lora_A
    (layer(x).sum() + tied(x).sum()).backward()
    alone = torch.autograd.grad(layer(x).sum(), layer.lora_A)[0] + torch.autograd.grad(tied(x).sum(), tied.lora_A)[0]
    torch.testing.assert_close(layer.lora_A.grad, alone)


def test_quantize_again():
    layer, weight = make(), torch.randn(40, 96, dtype=torch.bfloat16)
    adapter = layer.lora_A
    assert layer.quantize_(weight) is layer and layer.weight_dtype == torch.bfloat16 and layer.lora_A is adapter
    packed, state = quantize_4bit(weight, compress_statistics=True)
    assert torch.equal(layer.weight, packed) and layer.quant_state == state
    # What was decoded quantizes to the same codes: nothing drifts.
    again = copy.deepcopy(make(double_quant=False)).quantize_(weight)
    codes = again.weight.clone()
    assert torch.equal(again.quantize_(again.dequantize(torch.float32)).weight, codes)
    assert QuantState.from_dict(layer.quant_state.as_dict()) == layer.quant_state
