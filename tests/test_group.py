"""Linears that read one x as one operation: the same numbers as one by one, in the modules of transformers' models too."""

import copy
import io
import threading

import pytest
import torch
from transformers import (
    GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config,
    Qwen2ForCausalLM,
)  # fmt: skip

from nf4lora import autograd, linear_4bit, reference
from nf4lora.cases import exact_case, random_case
from nf4lora.nn import NF4Linear, NF4LoRAGatedMLP, NF4LoRALinear, NF4LoRALinearGroup, group_blocks, replace_linears
from nf4lora.testing import assert_error_ratio, assert_exact

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ROWS, RANKS = (40, 17, 33), (3, 5, 2)

pytestmark = pytest.mark.usefixtures("one_thread")


def members(make, count, M, K, dtype, r=True, **kwargs):
    """Cases of a group: they share x; every other operand is their own."""
    cases = [make(M, ROWS[i], K, RANKS[i] if r else 0, dtype, seed=i, **kwargs) for i in range(count)]
    for case in cases[1:]:
        object.__setattr__(case, "x", cases[0].x)
        object.__setattr__(case, "seed", cases[0].seed)
    return cases


def leaf(t):
    return None if t is None else t.detach().clone().requires_grad_()


def operands(cases):
    """Leaves, and the lists of `autograd.linear_group`."""
    bias, A, B = ([leaf(getattr(c, name)) for c in cases] for name in ("bias", "lora_A", "lora_B"))
    states = [c.state for c in cases]
    columns = ([c.packed for c in cases], *([getattr(s, n) for s in states] for n in ("absmax", "nested_absmax", "offset")), bias, A, B)
    return (bias, A, B), tuple([t for t in column if t is not None] for column in columns)


def group_of(cases, p=0.0, swiglu=False):
    state = cases[0].state
    return autograd.Group(tuple(c.state.shape[0] for c in cases), state.blocksize, state.quant_type, tuple(c.scaling for c in cases), p, swiglu)


@pytest.mark.parametrize("r", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_group_is_its_members(backend, count, dtype, p, r):
    """Outputs and gradients of adapters and biases to the bit; dx is the exact sum, rounded once."""
    for M, K, nested in ((7, 64, True), (20, 65, False), (1, 130, True), (0, 33, True)):
        cases = members(exact_case, count, M, K, dtype, r, nested=nested, bias=M != 20)
        seed = cases[0].seed if p else None
        (bias, A, B), lists = operands(cases)
        x = leaf(cases[0].x)
        ys = autograd.linear_group(x, lists, seed, group_of(cases, p))
        torch.autograd.backward(ys, [c.dy for c in cases])
        dx = torch.zeros(M, K, dtype=torch.float64)
        for i, case in enumerate(cases):
            alone = [leaf(t) for t in (case.x, case.bias, case.lora_A, case.lora_B)]
            y = linear_4bit(alone[0], case.packed, case.state, *alone[1:], case.scaling, p, seed)
            y.backward(case.dy)
            assert torch.equal(y, ys[i])
            for found, wanted in zip((bias[i], A[i], B[i]), alone[1:], strict=True):
                assert wanted is None or torch.equal(found.grad, wanted.grad)
            object.__setattr__(case, "dropout_p", p)
            dx += case.truth().dx
        assert_exact(x.grad, dx.to(dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_swiglu_in_the_group(backend, dtype):
    """silu(gate) * up of the group's own outputs, and the gradients of the two layers through it."""
    cases = members(random_case, 2, 30, 200, dtype)
    object.__setattr__(cases[1], "packed", cases[0].packed.flip(0).contiguous())
    for name in ("state", "dy", "bias"):
        object.__setattr__(cases[1], name, getattr(cases[0], name))
    object.__setattr__(cases[1], "lora_B", cases[1].lora_B.new_ones(ROWS[0], RANKS[1]) * 0.1)
    (bias, A, B), lists = operands(cases)
    x = leaf(cases[0].x)
    h = autograd.linear_group(x, lists, None, group_of(cases, swiglu=True))
    h.backward(cases[0].dy)
    found = [h.detach(), x.grad, *(t.grad for t in (*A, *B, *bias))]

    def dense(dtype):
        x, A, B, bias = ([leaf(t.to(dtype)) for t in ts] for ts in ([cases[0].x], *((c.lora_A for c in cases), (c.lora_B for c in cases), (c.bias for c in cases))))
        gate, up = (
            x[0] @ w.T + b + s * (x[0] @ a.T) @ bb.T
            for w, a, bb, b, s in zip((dequantized(c, dtype) for c in cases), A, B, bias, (c.scaling for c in cases), strict=True)
        )
        h = torch.nn.functional.silu(gate) * up
        h.backward(cases[0].dy.to(dtype))
        return [h.detach(), x[0].grad, *(t.grad for t in (*A, *B, *bias))]

    for f, b, t in zip(found, dense(dtype), dense(torch.float64), strict=True):
        if dtype == torch.float32:  # the errors of either are a few ulp, of which a ratio says nothing
            assert (f - t).abs().max() <= 2e-6 * t.abs().max()
        else:
            assert_error_ratio(f, b.to(f.dtype), t)


def dequantized(case, dtype):
    s = case.state
    return reference.dequantize(case.packed, s.absmax, s.nested_absmax, s.offset, s.shape, s.blocksize, s.quant_type, dtype)


def test_a_gradient_nobody_asked_for_is_not_computed(cpu):
    cases = members(exact_case, 2, 5, 64, torch.float32)
    (bias, A, B), lists = operands(cases)
    A[0].requires_grad_(False)
    for t in bias:
        t.requires_grad_(False)
    x = cases[0].x.clone()
    first, second = autograd.linear_group(x, lists, None, group_of(cases))
    (first.sum() + 0 * second.sum()).backward()
    assert A[0].grad is None and A[1].grad is not None and B[0].grad is not None and bias[0].grad is None and x.grad is None


# ---- modules


def layers(count=3, K=64, r=4, **kwargs):
    torch.manual_seed(0)
    made = [NF4LoRALinear.from_linear(torch.nn.Linear(K, ROWS[i], bias=kwargs.pop("bias", False)), r=r, **kwargs) for i in range(count)]
    for layer in made:
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    return made


def test_the_module(cpu):
    q, k, v = layers()
    group = NF4LoRALinearGroup(q_proj=q, k_proj=k, v_proj=v)
    assert {n.split(".")[0] for n in group.state_dict()} == {"q_proj", "k_proj", "v_proj"}
    x = torch.randn(2, 5, 64)
    outputs = group(x)
    assert [y.shape for y in outputs] == [(2, 5, n) for n in ROWS]
    assert all(torch.equal(y, m(x)) for y, m in zip(outputs, (q, k, v), strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        assert [y.dtype for y in group(x)] == [torch.bfloat16] * 3
    assert group(x[:, :0])[0].shape == (2, 0, 40)


def test_row_35_compiled_without_a_break(cpu):
    q, k, v = layers()
    group, x = NF4LoRALinearGroup(q=q, k=k, v=v), torch.randn(5, 64, requires_grad=True)
    mlp = NF4LoRAGatedMLP(*(NF4LoRALinear.from_linear(torch.nn.Linear(64, 32, bias=False), r=4) for _ in range(2)), torch.nn.Linear(32, 64))
    for call in (lambda x: sum(y.square().sum() for y in group(x)), lambda x: mlp(x).square().sum()):
        wanted = call(x)
        (gradient,) = torch.autograd.grad(wanted, x)
        found = torch.compile(call, fullgraph=True, backend="aot_eager")(x)
        assert torch.allclose(found, wanted) and torch.allclose(torch.autograd.grad(found, x)[0], gradient)


def test_row_35_a_grouped_model_compiles_without_a_break(cpu):
    model, tokens = model_of("llama", True), torch.arange(12).reshape(2, 6)
    wanted = model(tokens).logits
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(tokens).logits
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_dropout_is_one_mask_for_all_and_off_in_eval(cpu):
    q, k = layers(2, lora_dropout=0.5)
    group = NF4LoRALinearGroup(q=q, k=k).eval()
    x = torch.randn(50, 64)
    assert all(torch.equal(y, m(x)) for y, m in zip(group(x), (q, k), strict=True))
    group.train()
    first, second = group(x), group(x)
    assert not torch.equal(first[0], second[0])
    torch.manual_seed(3)
    third = group(x)
    torch.manual_seed(3)
    assert torch.equal(third[0], q(x))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: [layers(1)[0]], "found 1 layers, wanted 2 to 3"),
        (lambda: [*layers(2), NF4LoRALinear(32, 8)], "in_features"),
        (lambda: [layers(1)[0], NF4LoRALinear(64, 8, bias=False, r=4, blocksize=128)], "blocksize"),
        (lambda: [layers(1)[0], NF4LoRALinear(64, 8, bias=True, r=4)], "bias"),
        (lambda: [layers(1)[0], NF4Linear(64, 8, bias=False)], "adapters"),
        (lambda: [layers(1)[0], NF4LoRALinear(64, 8, bias=False, r=4, lora_dropout=0.1)], "lora_dropout"),
    ],
)
def test_layers_that_do_not_fit_are_refused(make, reason):
    made = make()
    with pytest.raises(ValueError, match=reason):
        NF4LoRALinearGroup(**{f"m{i}": m for i, m in enumerate(made)})


MODELS = {
    "llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM), "gemma": (GemmaConfig, GemmaForCausalLM),
}  # fmt: skip


def model_of(kind, group, **kwargs):
    config, cls = MODELS[kind]
    torch.manual_seed(0)
    model = cls(config(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                       vocab_size=50, head_dim=16))  # fmt: skip
    torch.manual_seed(1)
    replace_linears(model, r=4, group=group, **kwargs)
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    return model


def step(model, seed=5):
    ids = torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(seed))
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    model.zero_grad()
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad]


def close(found, wanted):
    assert abs(found[0] - wanted[0]) <= 1e-5 * abs(wanted[0])
    for f, w in zip(found[1], wanted[1], strict=True):
        assert (f - w).abs().max() <= 1e-4 * w.abs().max()


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_grouped_is_the_model(cpu, kind):
    plain, grouped = model_of(kind, False), model_of(kind, True)
    assert list(plain.state_dict()) == list(grouped.state_dict())
    assert {n for n, _ in plain.named_parameters()} == {n for n, _ in grouped.named_parameters()}
    mlp = grouped.model.layers[0].mlp
    assert isinstance(mlp, NF4LoRAGatedMLP) == (kind != "gemma")
    calls = []
    for block in grouped.modules():
        if hasattr(block, "q_proj"):
            block.q_proj.register_forward_hook(lambda m, args, y: calls.append(y.grad_fn))
    wanted = step(plain)
    close(step(grouped), wanted)
    assert calls and all("NF4LoRAGroupFunction" in c.name() for c in calls)  # the block's own call of q found the group's output
    close(step(copy.deepcopy(grouped)), wanted)
    for reentrant in (False, True):
        grouped.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
        grouped.enable_input_require_grads()
        close(step(grouped), wanted)


def test_a_grouped_model_is_saved_whole(cpu):
    grouped = model_of("llama", True)
    file = io.BytesIO()
    torch.save(grouped, file)
    file.seek(0)
    close(step(torch.load(file, weights_only=False)), step(grouped))


def test_group_blocks_says_what_it_did():
    model = model_of("llama", False)
    attention = model.model.layers[0].self_attn
    attention.k_proj = NF4LoRALinear(64, 32, bias=False, r=4, blocksize=256)
    done = group_blocks(model)
    assert "blocksize" in done["model.layers.0.self_attn"] and done["model.layers.1.self_attn"] == "grouped"
    assert done["model.layers.0.mlp"] == done["model.layers.1.mlp"] == "swiglu"
    assert group_blocks(model).keys() <= {"model.layers.0.self_attn"}  # a second time changes nothing


class Normed(torch.nn.Module):
    """A block that changes its input before it calls q, k and v."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = layers()

    def forward(self, hidden_states):
        x = hidden_states * 2
        return self.q_proj(x).sum() + self.k_proj(x).sum() + self.v_proj(x).sum()


def test_a_block_with_an_input_of_its_own_is_right_and_said_once(cpu, recwarn):
    block = Normed()
    x = torch.randn(3, 64)
    wanted = block(x)
    assert group_blocks(torch.nn.Sequential(block)) == {"0": "grouped"}
    with pytest.warns(UserWarning, match="not grouped any more"):
        assert torch.equal(block(x), wanted)
    recwarn.clear()
    assert torch.equal(block(x), wanted) and not recwarn.list


def test_an_error_in_a_block_leaves_nothing_waiting(cpu):
    from nf4lora.nn import together

    model = model_of("gemma", True)
    attention = model.model.layers[0].self_attn
    attention.o_proj.forward = None
    with pytest.raises(TypeError):
        step(model)
    assert together._waiting.get() == {}


def test_row_40_eight_threads_two_models(cpu):
    models = [model_of("llama", True), model_of("gemma", True)]
    wanted = [[step(copy.deepcopy(m), seed) for seed in range(4)] for m in models]
    found, failed = {}, []

    def work(i):
        try:
            model = copy.deepcopy(models[i % 2])
            found[i] = [step(model, seed) for seed in range(4)]
        except Exception as error:  # noqa: BLE001
            failed.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failed
    for i, steps in found.items():
        for f, w in zip(steps, wanted[i % 2], strict=True):
            assert torch.equal(f[0], w[0]) and all(map(torch.equal, f[1], w[1]))
