"""The optimizers as a user has them: torch's contract, what a step gives, states saved, taken and given back.

The step's bits on every back end are tests/test_optim_step.py's, paging tests/test_pager.py's and its neighbours'.
"""

import copy
import gc
import io
import pickle
import weakref
from functools import partial
from inspect import Parameter, signature

import pytest
import torch
import torch._dynamo
from torch import nn

import nf4lora
from nf4lora.optim import AdamW8bit, PagedAdamW, PagedAdamW8bit, PagedLion, PagedLion8bit, base, placement, pool, skipping
from nf4lora.optim.memory import Resident
from nf4lora.optim.simulated import Simulated
from nf4lora.optim.staged import Staged

ALL = (PagedAdamW, PagedAdamW8bit, AdamW8bit, PagedLion, PagedLion8bit)
SHAPES = ((300, 17), (5000,), (64, 128), (3,), (1,), (2, 2048))
HYPERS = {"lr": 3e-3, "betas": (0.8, 0.95), "weight_decay": 0.1}

pytestmark = pytest.mark.filterwarnings("ignore:paged optimizer. nothing pages")


def params(dtype=torch.float32, shapes=SHAPES):
    made = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(s, generator=made).to(dtype)) for s in shapes]


def hypers(cls):
    return HYPERS if "Lion" in cls.__name__ else HYPERS | {"eps": 1e-6}


def give_grads(ps, seed):
    made = torch.Generator().manual_seed(seed)
    for p in ps:
        p.grad = torch.randn(p.shape, generator=made).to(p.dtype)


def run(optimizer, ps, count, first=0):
    for i in range(count):
        give_grads(ps, first + i)
        optimizer.step()


def copies(ps):
    return [nn.Parameter(p.detach().clone()) for p in ps]


def equal(ps, qs):
    return all(torch.equal(p.detach(), q.detach()) for p, q in zip(ps, qs, strict=True))


def bytes_of(optimizer, ps):
    found = [p.detach().clone() for p in ps]
    for _, entry in sorted(optimizer.state_dict()["state"].items()):
        found += [torch.as_tensor(entry[name]) for name in sorted(entry)]
    return found


# ---- what a step gives


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_adamw_is_torchs(dtype):
    """200 steps, every hyper-parameter away from its default; in 16 bits one rounding a step, as torch has it."""
    ours, theirs = params(dtype), params(dtype)
    run(PagedAdamW(ours, **hypers(PagedAdamW)), ours, 200)
    # torch keeps 16-bit states of 16-bit parameters: its truth is float32 with the parameter rounded after each step
    wide = [nn.Parameter(p.detach().float()) for p in theirs]
    optimizer = torch.optim.AdamW(wide, **hypers(PagedAdamW))
    for i in range(200):
        give_grads(theirs, i)
        for w, p in zip(wide, theirs, strict=True):
            w.grad = p.grad.float()
        optimizer.step()
        for w in wide:
            w.data.copy_(w.data.to(dtype))
    # A value of a 16-bit type is off by a neighbour where float32 lies at the edge between two, then and when.
    tolerance = (
        {"atol": 1e-6, "rtol": 1e-5}
        if dtype == torch.float32
        else {"atol": 1e-3, "rtol": 2**-7 if dtype == torch.bfloat16 else 2**-10}
    )
    for p, w in zip(ours, wide, strict=True):
        torch.testing.assert_close(p.detach().float(), w.detach(), **tolerance)


def test_lion_is_the_papers():
    ps, truth = params(), [p.detach().double() for p in params()]
    optimizer, m = PagedLion(ps, **HYPERS), [torch.zeros_like(t) for t in truth]
    lr, (beta1, beta2), decay = HYPERS["lr"], HYPERS["betas"], HYPERS["weight_decay"]
    for i in range(20):
        give_grads(ps, i)
        optimizer.step()
        for t, state, p in zip(truth, m, ps, strict=True):
            g = p.grad.double()
            t.mul_(1 - lr * decay).sub_(lr * (beta1 * state + (1 - beta1) * g).sign())
            state.mul_(beta2).add_((1 - beta2) * g)
    for p, t in zip(ps, truth, strict=True):
        torch.testing.assert_close(p.detach().double(), t, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("cls", ALL)
def test_groups_have_their_own_numbers_and_steps_their_own_counts(cls):
    """Two groups, one parameter that misses steps: as three optimizers of one parameter each."""
    together, apart = params(shapes=((5000,),) * 3), params(shapes=((5000,),) * 3)
    optimizer = cls([{"params": together[:2]}, {"params": together[2:], "lr": 1e-2, "weight_decay": 0.5}], **hypers(cls))
    alone = [cls([p], **(hypers(cls) | ({"lr": 1e-2, "weight_decay": 0.5} if i == 2 else {}))) for i, p in enumerate(apart)]
    for step in range(6):
        give_grads(together, step)
        give_grads(apart, step)
        if step % 2:
            together[1].grad = apart[1].grad = None
        optimizer.step()
        for one in alone:
            one.step()
    assert equal(together, apart)
    assert [optimizer.state[p]["step"] for p in together] == [6, 3, 6]


def test_small_tensors_keep_32_bits():
    ps = params(shapes=((4095,), (4096,)))
    optimizer = PagedAdamW8bit(ps)
    run(optimizer, ps, 1)
    assert [optimizer.state[p]["state1"].dtype for p in ps] == [torch.float32, torch.uint8]
    small = PagedAdamW8bit(ps, min_8bit_size=1)
    run(small, ps, 1)
    assert {small.state[p]["state2"].dtype for p in ps} == {torch.uint8}


def test_one_call_steps_448_tensors(monkeypatch):
    calls = []
    original = nf4lora.ops.optim_step.call
    monkeypatch.setattr(nf4lora.ops.optim_step, "call", lambda *args: (calls.append(len(args[0])), original(*args)))
    ps = params(shapes=((16, 64), (64, 16)) * 224)
    optimizer = PagedAdamW8bit(ps, min_8bit_size=1024)
    run(optimizer, ps, 2)
    assert calls == [448, 448]


def test_stochastic_rounding_keeps_what_nearest_loses():
    """Steps of an eighth of a bfloat16's spacing: to nearest none of them moves it, stochastically they do on average."""
    start, lr = torch.ones(100_000, dtype=torch.bfloat16), 2.0**-10  # an ulp below 1 is 2^-8, above 2^-7
    means = []
    for stochastic in (False, True):
        torch.manual_seed(0)
        p = nn.Parameter(start.clone())
        optimizer = PagedLion([p], lr=lr, stochastic_rounding=stochastic)
        for _ in range(8):
            p.grad = torch.full_like(p, -1.0)
            optimizer.step()
        means.append(p.detach().double().mean().item())
    assert means[0] == 1.0
    assert abs(means[1] - (1 + 8 * lr)) < 1e-4


def test_stochastic_rounding_follows_torchs_seed():
    results = []
    for seed in (0, 0, 1):
        ps = params(torch.bfloat16)
        torch.manual_seed(seed)
        run(PagedAdamW8bit(ps, stochastic_rounding=True, **hypers(PagedAdamW8bit)), ps, 3)
        results.append(ps)
    assert equal(results[0], results[1]) and not equal(results[0], results[2])


# ---- NaN and Inf


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("value", (torch.nan, torch.inf, -torch.inf))
@pytest.mark.parametrize("kinds", ((torch.float32,), (torch.float32, torch.bfloat16)), ids=("one dtype", "two"))
def test_skip_nonfinite_leaves_every_byte(cls, value, kinds):
    ps = [p for dtype in kinds for p in params(dtype)]
    optimizer = cls(ps, skip_nonfinite=True, **hypers(cls))
    run(optimizer, ps, 2)
    before = bytes_of(optimizer, ps)
    give_grads(ps, 7)
    ps[-1].grad.view(-1)[-1] = value
    optimizer.step()
    assert all(map(torch.equal, before, bytes_of(optimizer, ps)))
    run(optimizer, ps, 1, first=9)
    assert {entry["step"] for entry in optimizer.state_dict()["state"].values()} == {3}
    plain, other = [p for dtype in kinds for p in params(dtype)], None
    other = cls(plain, **hypers(cls))
    run(other, plain, 2)
    run(other, plain, 1, first=9)
    assert equal(ps, plain)  # as if the skipped step had not been


def test_by_default_nan_flows_as_in_torch():
    ps = params()
    optimizer = PagedAdamW(ps)
    give_grads(ps, 0)
    ps[0].grad[0, 0] = torch.nan
    optimizer.step()
    assert ps[0].isnan().sum() == 1 and not any(p.isnan().any() for p in ps[1:])


# ---- memory that ends


class Limited:
    """Memories of which number `last` and later are not to be had."""

    def __init__(self, last):
        self.left, self.made = last, []

    def __call__(self, *options):
        return self.make

    def make(self, layout, device):
        if self.left == 0:
            raise RuntimeError("out of memory")
        self.left -= 1
        made = Resident(layout, device)
        self.made.append(weakref.ref(made))
        return made


@pytest.mark.parametrize("last", range(4))
def test_all_states_are_there_before_any_parameter_moves(monkeypatch, last):
    """Three kinds of state are three memories: two widths in float32, one in bfloat16."""
    ps = params() + params(torch.bfloat16, shapes=((5000,),))
    limited = Limited(last)
    monkeypatch.setattr(base, "chooser", limited)
    optimizer = PagedAdamW8bit(ps)
    give_grads(ps, 0)
    before = [p.detach().clone() for p in ps]
    if last < 3:
        with pytest.raises(RuntimeError, match="out of memory"):
            optimizer.step()
        assert all(map(torch.equal, before, [p.detach() for p in ps])) and not optimizer.state
        gc.collect()
        assert not any(made() for made in limited.made)
        limited.left = 3
    optimizer.step()
    monkeypatch.undo()
    others = copies(before)
    give_grads(others, 0)
    AdamW8bit(others).step()
    assert equal(ps, others)


@pytest.mark.parametrize("cls", ALL)
def test_memory_returns_when_the_optimizer_goes(cls):
    ps = params()
    optimizer = cls(ps)
    run(optimizer, ps, 1)
    alive = [weakref.ref(pool.memory) for pool in {optimizer._pool_of[p] for p in ps}]
    alive += [weakref.ref(optimizer.state[p]["state1"]) for p in ps]
    del optimizer
    gc.collect()
    assert not any(found() for found in alive)


def test_gradients_are_announced_while_the_optimizer_lives(monkeypatch):
    fetched = []

    class Watched:
        def __init__(self, layout, device):
            self.inner = Resident(layout, device)

        def __getattr__(self, name):
            return getattr(self.inner, name)

    monkeypatch.setattr(base, "chooser", lambda *options: Watched)
    monkeypatch.setattr(base.Pool, "prefetch", lambda pool, p: fetched.append(p))
    ps = params(shapes=((8, 8), (8,)))
    optimizer = PagedAdamW(ps)
    x = torch.randn(4, 8)
    torch.nn.functional.linear(x, *ps).sum().backward()
    assert not fetched  # no state yet
    optimizer.step()
    torch.nn.functional.linear(x, *ps).sum().backward()
    assert {id(p) for p in fetched} == {id(p) for p in ps}
    fetched.clear()
    with monkeypatch.context() as patch:  # a backward that a CUDA graph captures
        patch.setattr(nn.Parameter, "is_cuda", True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        torch.nn.functional.linear(x, *ps).sum().backward()
    assert not fetched
    del optimizer
    gc.collect()
    assert not any(p._post_accumulate_grad_hooks for p in ps)
    torch.nn.functional.linear(x, *ps).sum().backward()
    assert not fetched


# ---- pages that move

BUDGETS = {"all fits": None, "a few chunks": 40_000, "less than one": 1}


def paging_in(kind, monkeypatch):
    """Chunks of 8 KiB, in a memory that pages on a CPU and checks its orders."""
    monkeypatch.setattr(pool, "CHUNK_BYTES", 8192)
    make = {
        "simulated": lambda budget: lambda layout, device: Simulated(layout, 10**9),
        "staged": lambda budget: lambda layout, device: Staged(layout, device, budget),
    }
    monkeypatch.setattr(base, "chooser", lambda paged, budget, allow: make[kind](budget))


@pytest.mark.parametrize("cls", (PagedAdamW, PagedAdamW8bit, PagedLion8bit))
@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("kind", ("simulated", "staged"))
def test_paged_is_not_paged_bit_for_bit(monkeypatch, kind, budget, cls):
    """Through backward hooks, a missing gradient, saving, loading, and stochastic rounding."""
    runs = []
    for paged in (False, True):
        with monkeypatch.context() as patch:
            if paged:
                paging_in(kind, patch)
            torch.manual_seed(0)
            layers = [nn.Linear(100, 130, dtype=torch.bfloat16) for _ in range(4)]
            ps = [p for layer in layers for p in layer.parameters()]
            options = {"stochastic_rounding": True, "skip_nonfinite": budget == 1, "budget": budget if paged else None}
            optimizer = cls(ps, lr=1e-2, **options)
            for step in range(5):
                optimizer.zero_grad()
                used = layers if step != 2 else layers[1:]
                x = torch.randn(8, 100, dtype=torch.bfloat16)
                sum(layer(x).square().mean() for layer in used).backward()
                optimizer.step()
                if step == 3:
                    optimizer.load_state_dict(optimizer.state_dict())
            runs.append(bytes_of(optimizer, ps))
            if paged:
                assert any(type(optimizer._pool_of[p].memory) is not Resident for p in ps)
    assert all(map(torch.equal, *runs))


# ---- saved and taken


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("options", ({}, {"skip_nonfinite": True, "stochastic_rounding": True}), ids=("plain", "options"))
def test_resuming_gives_the_bits_of_the_run_that_was_not_interrupted(cls, options):
    dtype = torch.bfloat16 if options else torch.float32
    ps = params(dtype)
    optimizer = cls(ps, **hypers(cls), **options)
    torch.manual_seed(3)
    run(optimizer, ps, 10)
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "params": [p.detach() for p in ps], "rng": torch.get_rng_state()}, file)
    run(optimizer, ps, 10, first=10)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = [nn.Parameter(p) for p in saved["params"]]
    other = cls(resumed, lr=1.0, **options)
    other.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["rng"])
    run(other, resumed, 10, first=10)
    assert equal(ps, resumed)
    assert all(map(torch.equal, bytes_of(optimizer, ps), bytes_of(other, resumed)))


@pytest.mark.parametrize("kind", (None, "simulated", "staged"))
@pytest.mark.parametrize("cls", ALL)
def test_states_are_copied_into_the_memory_there_is(monkeypatch, cls, kind):
    if kind is not None:
        paging_in(kind, monkeypatch)
    ps = params()
    optimizer = cls(ps, budget=40_000, **hypers(cls))
    run(optimizer, ps, 3)
    where = {p: {name: t.data_ptr() for name, t in optimizer.state[p].items() if name != "step"} for p in ps}
    saved, before = optimizer.state_dict(), [p.detach().clone() for p in ps]
    run(optimizer, ps, 3, first=3)
    after = [p.detach().clone() for p in ps]
    for p, b in zip(ps, before, strict=True):
        p.data.copy_(b)
    optimizer.load_state_dict(saved)
    assert where == {p: {name: t.data_ptr() for name, t in optimizer.state[p].items() if name != "step"} for p in ps}
    run(optimizer, ps, 3, first=3)
    assert all(map(torch.equal, after, [p.detach() for p in ps]))


def test_a_saved_state_owns_its_memory():
    ps = params()
    optimizer = PagedAdamW(ps)
    run(optimizer, ps, 1)
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved["state"])
    run(optimizer, ps, 1)
    for i, entry in saved["state"].items():
        assert torch.equal(entry["state1"], kept[i]["state1"]) and entry["state1"].device.type == "cpu"
        assert entry["state1"].untyped_storage().nbytes() == entry["state1"].nbytes


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("how", (copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))), ids=("deepcopy", "pickle"))
def test_a_copy_goes_on_by_itself(cls, how):
    ps = params()
    optimizer = cls(ps, **hypers(cls))
    run(optimizer, ps, 3)
    qs, other = how((ps, optimizer))
    run(optimizer, ps, 3, first=3)
    run(other, qs, 3, first=3)
    assert equal(ps, qs)
    assert {t.data_ptr() for p in ps for t in (optimizer.state[p]["state1"],)}.isdisjoint(
        {other.state[q]["state1"].data_ptr() for q in qs}
    )


def bnb_optimizer(cls, ps):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    name = cls.__name__ if hasattr(bitsandbytes.optim, cls.__name__) else cls.__name__.removeprefix("Paged")
    return getattr(bitsandbytes.optim, name)(ps, **hypers(cls))


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("wrapped", (True, False), ids=("as written", "as before 0.50"))
@pytest.mark.parametrize("cls", ALL)
def test_bitsandbytes_states_are_taken_and_given(cls, wrapped):
    theirs = params()
    optimizer = bnb_optimizer(cls, theirs)
    run(optimizer, theirs, 5)
    file = io.BytesIO()
    saved = optimizer.state_dict()
    if not wrapped:
        saved["state"] = {i: {"step": e["step"], **e["__bnb_optimizer_quant_state__"]} for i, e in saved["state"].items()}
    torch.save(saved, file)
    file.seek(0)
    ours = copies(theirs)
    mine = cls(ours)
    mine.load_state_dict(torch.load(file, weights_only=True))
    for p, q in zip(theirs, ours, strict=True):
        for name in ("state1", "state2", "absmax1", "absmax2"):
            if optimizer.state[p].get(name) is not None:
                assert torch.equal(optimizer.state[p][name], mine.state[q][name])
    assert mine.param_groups[0]["lr"] == HYPERS["lr"]
    back = copies(theirs)
    again = bnb_optimizer(cls, back)
    again.load_state_dict(mine.state_dict())
    run(optimizer, theirs, 3, first=5)
    run(again, back, 3, first=5)
    assert equal(theirs, back)
    run(mine, ours, 3, first=5)
    for p, q in zip(theirs, ours, strict=True):
        # Lion's sign of a sum near 0 may fall either way
        limit = 8 * HYPERS["lr"] if "Lion" in cls.__name__ else 2e-3
        assert (p - q).abs().max() <= limit and (p - q).abs().mean() <= 1e-4


def test_torchs_adamw_states_are_taken():
    theirs = params()
    optimizer = torch.optim.AdamW(theirs, **hypers(PagedAdamW))
    run(optimizer, theirs, 5)
    ours = copies(theirs)
    mine = PagedAdamW(ours)
    mine.load_state_dict(optimizer.state_dict())
    run(optimizer, theirs, 5, first=5)
    run(mine, ours, 5, first=5)
    for p, q in zip(theirs, ours, strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


WRONG = {
    "another width": (
        lambda s: s["state"][1].update(state1=s["state"][1]["state1"].float()),
        r"state\[1\].state1: found torch.float32",
    ),
    "another shape": (
        lambda s: s["state"][0].update(state2=torch.zeros(3, dtype=torch.uint8)),
        r"state\[0\].state2: found torch.uint8 \[3\]",
    ),
    "no absmax": (lambda s: s["state"][0].pop("absmax1"), r"state\[0\]: no absmax1"),
    "something else": (lambda s: s["state"][0].update(momentum=torch.zeros(1)), r"state\[0\]: unexpected momentum"),
    "another map": (lambda s: s["state"][0].update(qmap2=torch.zeros(256)), r"state\[0\].qmap2: found another map"),
    "no memory": (
        lambda s: s["state"][0].update(state1=s["state"][0]["state1"].to("meta")), r"state\[0\].state1: found torch.uint8 .* on meta",
    ),
    "no memory of a map": (lambda s: s["state"][0].update(qmap1=torch.zeros(256, device="meta")), r"qmap1: found .* on meta"),
    "a sparse one": (
        lambda s: s["state"][0].update(absmax1=s["state"][0]["absmax1"].to_sparse()), r"absmax1: found .*torch.sparse_coo",
    ),
    "a step on meta": (lambda s: s["state"][0].update(step=torch.ones((), device="meta")), r"state\[0\].step: found tensor"),
    "no tensor": (lambda s: s["state"][0].update(state1=[1.0]), r"state\[0\].state1: found \[1.0\]"),
    "a step of nothing": (lambda s: s["state"][0].update(step=-1), r"state\[0\].step: found -1"),
    "half a step": (lambda s: s["state"][0].update(step=1.5), r"state\[0\].step: found 1.5"),
    "a parameter too many": (lambda s: s["state"].update({99: s["state"][0]}), r"entries \[99\] of no parameter"),
    "no entry": (lambda s: s["state"].update({0: None}), r"state\[0\]: found None, wanted states by name"),
    "no groups": (lambda s: s.pop("param_groups"), "state dict: wanted"),
    "no list": (lambda s: s.update(state=[1]), "state dict: wanted"),
    "a rate of nothing": (lambda s: s["param_groups"][0].update(lr=float("nan")), "lr: found nan"),
    "betas of nothing": (lambda s: s["param_groups"][0].update(betas=None), "betas: found None"),
    "another group": (lambda s: s["param_groups"].append({"params": [99]}), r"found groups of \[6, 1\] parameters, wanted \[6\]"),
    "a parameter twice": (lambda s: s["param_groups"].append(s["param_groups"][0]), "each of them once"),
    "other parameters": (lambda s: s["param_groups"][0]["params"].pop(), r"found groups of \[5\] parameters, wanted \[6\]"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_is_one_clear_error_and_changes_nothing(wrong):
    ps = params()
    optimizer = PagedAdamW8bit(ps, **hypers(PagedAdamW8bit))
    run(optimizer, ps, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    run(optimizer, ps, 1, first=2)
    before = bytes_of(optimizer, ps)
    damage, words = WRONG[wrong]
    damage(saved)
    if wrong not in ("no groups", "a rate of nothing"):
        saved["param_groups"][0]["lr"] = 99.0
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(saved)
    assert all(map(torch.equal, before, bytes_of(optimizer, ps))) and optimizer.param_groups[0]["lr"] == HYPERS["lr"]
    fresh = PagedAdamW8bit(copies(ps))
    with pytest.raises(ValueError, match=words):
        fresh.load_state_dict(saved)
    assert not fresh.state


# ---- torch's contract


@pytest.mark.parametrize("cls", ALL)
def test_closures_schedulers_hooks_and_late_groups(cls):
    ps = params()
    optimizer = cls(ps[:3], **hypers(cls))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    seen = []
    optimizer.register_step_pre_hook(lambda *args: seen.append("before"))
    optimizer.register_step_post_hook(lambda *args: seen.append("after"))
    give_grads(ps, 0)
    assert optimizer.step(lambda: torch.tensor(3.0)) == 3.0
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == HYPERS["lr"] / 2
    late = [p.detach().clone() for p in ps[3:]]
    optimizer.add_param_group({"params": ps[3:], "lr": 0.0, "weight_decay": 0.0})
    give_grads(ps, 1)
    optimizer.step()
    assert all(map(torch.equal, late, [p.detach() for p in ps[3:]])) and len(optimizer.state) == len(ps)
    optimizer.zero_grad()
    assert all(p.grad is None for p in ps) and seen == ["before", "after"] * 2
    with pytest.raises(ValueError, match="betas"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "betas": (0.9, 1.0)})
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("cls", ALL)
def test_gradients_of_any_strides_and_parameters_of_any_size(cls):
    ps, qs = params(shapes=((64, 80),)), params(shapes=((64, 80),))
    a, b = cls(ps, **hypers(cls)), cls(qs, **hypers(cls))
    for i in range(2):
        give_grads(ps, i)
        qs[0].grad = torch.empty_strided((64, 80), (1, 64)).copy_(ps[0].grad)
        a.step()
        b.step()
    assert equal(ps, qs)
    lying = params(shapes=((64, 80),))
    across = [nn.Parameter(lying[0].detach().t().contiguous().t()), nn.Parameter(torch.ones(3, 5))]
    assert not across[0].is_contiguous()
    c = cls(across, **hypers(cls))
    for i in range(2):
        give_grads(lying, i)
        across[0].grad, across[1].grad = lying[0].grad, torch.ones(3, 5)
        c.step()
    assert equal(ps, across[:1]) and not across[0].is_contiguous()
    empty = [nn.Parameter(torch.zeros(0, 4))]
    run(cls(empty), empty, 2)


def test_grad_scaler_skips_what_overflows():
    ps = params()
    optimizer, scaler = PagedAdamW(ps), torch.amp.GradScaler("cpu", init_scale=4.0)
    give_grads(ps, 0)
    ps[0].grad[0, 0] = torch.inf
    before = [p.detach().clone() for p in ps]
    scaler.scale(torch.ones(1))
    scaler.step(optimizer)
    scaler.update()
    assert all(map(torch.equal, before, [p.detach() for p in ps])) and scaler.get_scale() == 2.0


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize(
    "wrong", ({"lr": -1.0}, {"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)}, {"weight_decay": -1.0}, {"budget": -1})
)
def test_numbers_out_of_range_are_refused(cls, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        cls(params(), **wrong)


def test_other_bad_inputs():
    ps = params()
    with pytest.raises(TypeError, match="momentum"):
        PagedAdamW(ps, momentum=0.9)
    with pytest.raises(ValueError, match="empty"):
        PagedAdamW([])
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = PagedAdamW(embedding.parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(NotImplementedError, match="sparse"):
        optimizer.step()
    for wrong in (torch.float64, torch.complex64):
        mixed = [*params(), nn.Parameter(torch.zeros(4, dtype=wrong))]
        before = [p.detach().clone() for p in mixed]
        with pytest.raises(TypeError, match=str(wrong)):
            run(PagedAdamW(mixed), mixed, 1)
        assert all(map(torch.equal, before, [p.detach() for p in mixed]))  # none of them moved


def test_steps_tell_autograd_that_parameters_changed():
    p = nn.Parameter(torch.randn(5000))
    optimizer = PagedAdamW([p])
    saved = (p * p).sum()
    p.grad = torch.randn(5000)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


def test_a_cpu_says_once_that_nothing_pages():
    placement._say.cache_clear()
    with pytest.warns(RuntimeWarning, match="nothing pages on cpu") as found:
        for _ in range(2):
            ps = params()
            run(PagedAdamW(ps), ps, 2)
    assert len([w for w in found if "nothing pages" in str(w.message)]) == 1


def test_slots_are_a_devices_own():
    slots = skipping.Slots()
    cpu, meta = params(shapes=((2,), (2,))), [nn.Parameter(torch.zeros(2, device="meta"))]
    slots.add([cpu[0], meta[0]])
    slots.add([cpu[1]])
    assert [slots.of[p] for p in (*cpu, *meta)] == [0, 1, 0] and slots.taken[torch.device("cpu")].tolist() == [0, 0]


# ---- what users do to parameters, groups and states


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("shape", ((100, 80), (16, 80), (80, 64)), ids=("grown", "shrunk", "of another shape"))
def test_a_parameter_that_changed_is_refused_before_any_moves(cls, shape):
    ps = params(shapes=((10,), (64, 80), (64, 80)))
    optimizer = cls(ps, skip_nonfinite=True, **hypers(cls))
    run(optimizer, ps, 1)
    ps[1].data = torch.randn(shape)
    before = bytes_of(optimizer, ps)
    give_grads(ps, 1)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"now and was torch.float32 \[64, 80\]"):
            optimizer.step()
    assert all(map(torch.equal, before, bytes_of(optimizer, ps)))
    ps[1].data = torch.randn(64, 80).bfloat16()
    ps[1].grad = torch.randn(64, 80).bfloat16()
    with pytest.raises(ValueError, match="found a parameter that is torch.bfloat16"):
        optimizer.step()


def test_groups_may_be_rearranged():
    ours, theirs = params(shapes=((10,),) * 3), params(shapes=((10,),) * 3)
    made = [
        cls([{"params": ps[:1], "lr": 1e-2}, {"params": ps[1:], "lr": 0.0}], weight_decay=0.0)
        for cls, ps in ((PagedAdamW, ours), (torch.optim.AdamW, theirs))
    ]
    for step in range(4):
        for optimizer, ps in zip(made, (ours, theirs), strict=True):
            groups = optimizer.param_groups
            if step == 1:
                groups[0]["params"].append(groups[1]["params"].pop(0))
            if step == 2:
                groups[0]["params"] += groups[1]["params"]
                del groups[1]
            if step == 3:
                optimizer.state[ps[0]]["step"] = 0 if optimizer is made[0] else torch.tensor(0.0)
            give_grads(ps, step)
            optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("skips", (False, True))
def test_a_cleared_state_starts_anew(cls, skips):
    ps, qs = params(), params()
    optimizer = cls(ps, skip_nonfinite=skips, **hypers(cls))
    run(optimizer, ps, 3)
    saved = optimizer.state_dict()
    for p, q in zip(ps, qs, strict=True):
        p.data.copy_(q.data)
    optimizer.state.clear()
    run(optimizer, ps, 2)
    run(other := cls(qs, skip_nonfinite=skips, **hypers(cls)), qs, 2)
    assert equal(ps, qs) and all(map(torch.equal, bytes_of(optimizer, ps), bytes_of(other, qs)))
    optimizer.state.clear()
    optimizer.load_state_dict(saved)
    other.load_state_dict(saved)
    run(optimizer, ps, 1)
    run(other, qs, 1)
    assert equal(ps, qs) and len(optimizer.state_dict()["state"]) == len(ps)


def test_looking_at_a_state_that_is_not_there_changes_nothing():
    ps = params()
    optimizer = PagedAdamW8bit(ps)
    ps[0].grad = torch.ones_like(ps[0])
    optimizer.step()
    saved = optimizer.state_dict()
    assert optimizer.state[ps[1]].get("step") is None
    optimizer.state[ps[0]]["mine"] = torch.zeros(3)
    again = optimizer.state_dict()
    assert {i: sorted(e) for i, e in again["state"].items() if e} == {0: sorted(saved["state"][0])}
    optimizer.load_state_dict(again)
    copy.deepcopy((ps, optimizer))
    run(optimizer, ps, 1)


def test_hooks_of_the_state_dict_see_what_is_saved():
    ps = params()
    optimizer = AdamW8bit(ps)
    run(optimizer, ps, 1)
    optimizer.register_state_dict_post_hook(lambda _, saved: {"optimizer": saved})
    saved = optimizer.state_dict()["optimizer"]
    assert saved["state"][0]["state1"].device.type == "cpu" and "qmap1" in saved["state"][0]
    assert (
        optimizer.state[ps[0]]["state1"].untyped_storage().nbytes() > optimizer.state[ps[0]]["state1"].nbytes
    )  # still the arena's


@pytest.mark.parametrize("late", ("gradients", "a group"))
def test_stochastic_rounding_resumes_whatever_order_states_were_made_in(late):
    ps = params(torch.bfloat16, shapes=((64, 80), (50, 100), (7,)))
    optimizer = PagedAdamW8bit(ps[:1] if late == "a group" else ps, lr=1e-3, stochastic_rounding=True)
    give_grads(ps[:1], 0)
    optimizer.step()
    if late == "a group":
        optimizer.add_param_group({"params": ps[1:]})
    run(optimizer, ps, 1)
    qs = copies(ps)
    resumed = PagedAdamW8bit([{"params": qs[:1]}, {"params": qs[1:]}] if late == "a group" else qs, stochastic_rounding=True)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    pairs = [(ps, optimizer), (qs, resumed), copy.deepcopy((ps, optimizer))]
    for ts, made in pairs:
        torch.manual_seed(4)
        run(made, ts, 2, first=5)
    assert equal(ps, qs) and equal(ps, pairs[2][0])


def test_pools_round_by_draws_of_their_own():
    ps = [nn.Parameter(torch.ones(4096, dtype=torch.bfloat16)), nn.Parameter(torch.ones(4095, dtype=torch.bfloat16))]
    optimizer = PagedLion8bit(ps, lr=2.0**-9, stochastic_rounding=True)
    for p in ps:
        p.grad = -torch.ones_like(p)
    torch.manual_seed(0)
    optimizer.step()
    a, b = (p.detach()[:4095] > 1 for p in ps)
    assert 0.1 < (a != b).float().mean() < 0.9


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float64))
def test_the_default_dtype_is_none_of_its_business(cls, dtype):
    ps, qs = params(), params()
    run(cls(qs, **hypers(cls)), qs, 2)
    grads = [q.grad for q in qs]
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        optimizer = cls(ps, **hypers(cls))
        for seed in range(2):
            made = torch.Generator().manual_seed(seed)
            for p in ps:
                p.grad = torch.randn(p.shape, generator=made, dtype=torch.float32)
            optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
    finally:
        torch.set_default_dtype(before)
    assert all(map(torch.equal, grads, [p.grad for p in ps])) and equal(ps, qs)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("cls", ALL)
def test_a_fresh_state_of_ours_steps_in_bitsandbytes(cls):
    ps = params()
    optimizer = cls(ps, **hypers(cls))
    run(optimizer, ps, 2)
    theirs = copies(ps)
    other = bnb_optimizer(cls, theirs)
    other.load_state_dict(optimizer.state_dict())
    run(other, theirs, 1, first=2)
    run(optimizer, ps, 1, first=2)
    assert all((p - q).abs().max() <= 8 * HYPERS["lr"] for p, q in zip(ps, theirs, strict=True))


@pytest.mark.parametrize("given", ({"maximize": True}, {"amsgrad": True}, {"decoupled_weight_decay": False}, {"min_8bit_size": 0}))
def test_what_it_would_not_do_is_refused(given):
    (name,) = given
    with pytest.raises(ValueError, match=name):
        PagedAdamW8bit([{"params": params(), **given}])
    ps = params()
    if name != "min_8bit_size":
        optimizer = PagedAdamW(ps)
        saved = optimizer.state_dict()
        saved["param_groups"][0] |= given
        with pytest.raises(ValueError, match=name):
            optimizer.load_state_dict(saved)


def test_states_without_their_maps_are_taken():
    """As torch.distributed.checkpoint gives them, which names what `state` shows."""
    ps = params()
    optimizer = AdamW8bit(ps)
    run(optimizer, ps, 1)
    saved = optimizer.state_dict()
    for entry in saved["state"].values():
        entry.pop("qmap1", None), entry.pop("qmap2", None)
    optimizer.load_state_dict(saved)


def test_frozen_parameters_that_page_have_no_hooks(monkeypatch):
    paging_in("simulated", monkeypatch)
    ps = params()
    ps[1].requires_grad_(False)
    run(PagedAdamW(ps), ps, 2)
    assert not ps[1]._post_accumulate_grad_hooks


def test_a_first_step_in_inference_mode():
    ps = params()
    optimizer = PagedAdamW(ps)
    give_grads(ps, 0)
    with torch.inference_mode():
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())


# ---- what people had before: options of other optimizers, wrong ones, numbers changed later, states replaced


NOTHING_ASKED = {
    "amsgrad": (False,), "maximize": (False,), "capturable": (False,), "differentiable": (False,),
    "decoupled_weight_decay": (True,), "foreach": (None, False, True), "fused": (None, False, True), "args": (None,),
    "percentile_clipping": (100,), "block_wise": (True,),
}  # fmt: skip
OF_THE_CLASS = {
    PagedAdamW: (32, True), PagedAdamW8bit: (8, True), AdamW8bit: (8, False), PagedLion: (32, True), PagedLion8bit: (8, True),
}  # fmt: skip


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("which", (0, -1))
def test_options_of_other_optimizers_that_ask_for_nothing_change_nothing(cls, which):
    foreign = {name: values[which] for name, values in NOTHING_ASKED.items()}
    bits, paged = OF_THE_CLASS[cls]
    foreign |= {"optim_bits": (bits, 32)[which], "is_paged": paged}
    ps, qs = params(), params()
    run(cls(ps, **hypers(cls)), ps, 2)
    run(other := cls(qs, **hypers(cls), **foreign), qs, 2)
    assert equal(ps, qs) and not foreign.keys() & other.param_groups[0].keys()
    group = {"params": params(), **{name: value for name, value in foreign.items() if name != "args"}}
    run(cls([group], **hypers(cls)), group["params"], 2)
    assert equal(ps, group["params"])


@pytest.mark.parametrize("cls", ALL)
def test_whatever_theirs_have_by_default_may_be_said(cls):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for theirs in (getattr(bitsandbytes.optim, cls.__name__), *((torch.optim.AdamW,) if cls is PagedAdamW else ())):
        said = {p.name: p.default for p in signature(theirs).parameters.values() if p.default is not Parameter.empty}
        cls(params(), **said)
        assert said["lr"] and {"args", "foreach"} & said.keys()


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_a_parameter_twice_in_a_group_is_refused():
    p, q = params()[:2]
    with pytest.raises(ValueError, match="params: found a parameter twice"):
        PagedAdamW([p, q, p])
    optimizer = PagedAdamW([p])
    with pytest.raises(ValueError, match="params: found a parameter twice"):
        optimizer.add_param_group({"params": [q, q]})
    assert [g["params"] for g in optimizer.param_groups] == [[p]]


ASKED = {
    "amsgrad": (True, "wanted False: these optimizers do not do it"), "maximize": (True, "wanted False: these"),
    "capturable": (True, "wanted False: .* CUDA graph"), "differentiable": (True, "wanted False"),
    "decoupled_weight_decay": (False, "wanted True: weight decay is apart"), "foreach": ("yes", "wanted None or False or True"),
    "fused": (torch.ones(2), "wanted None or False or True: one launch"), "args": (object(), "wanted None"),
    "optim_bits": (16, "wanted (8 or )?32: the name of a class"), "is_paged": (None, "wanted (True|False): the name of a class"),
    "percentile_clipping": (5, "wanted 100: clip gradients"), "block_wise": (False, "wanted True"),
}  # fmt: skip


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("name", ASKED)
def test_options_of_other_optimizers_that_ask_for_something_are_refused(cls, name):
    value, words = ASKED[name]
    with pytest.raises(ValueError, match=f"^{name}: found .*, {words}"):
        cls(params(), **{name: value})
    optimizer = cls(params())
    with pytest.raises(ValueError, match=f"^{name}: found .*, {words}"):
        optimizer.add_param_group({"params": params(), name: value})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("cls", ALL)
def test_an_option_that_nobody_has_names_the_class_it_was_given_to(cls):
    with pytest.raises(TypeError, match=rf"^{cls.__name__}\(\) got an unexpected keyword argument 'momentum'$"):
        cls(params(), momentum=0.9)


@pytest.mark.parametrize("cls", (PagedAdamW8bit, PagedLion))
@pytest.mark.parametrize(
    ("name", "wrong"),
    [("budget", v) for v in ("1GB", 1.5, -1, True, 1e9)]
    + [("min_8bit_size", v) for v in (None, -1, "4096", 4096.0, False)]
    + [(name, v) for name in ("stochastic_rounding", "skip_nonfinite", "allow_oversubscription") for v in ("yes", 1, None)],
)
def test_options_of_another_kind_are_refused_at_once(cls, name, wrong):
    with pytest.raises(ValueError, match=rf"^{name}: found {wrong!r}, wanted "):
        cls(params(), **{name: wrong})


META = torch.ones((), device="meta")
BAD_NUMBERS = [
    *(
        (name, v)
        for name in ("lr", "eps", "weight_decay")
        for v in (torch.nan, torch.inf, -1e-3, "1e-4", None, 10**400, torch.ones(2), META)
    ),
    *(
        ("betas", v)
        for v in ((0.9, 1.0), (torch.nan, 0.9), (0.9,), (0.9, 0.9, 0.9), 0.9, None, ("0.9", "0.9"), (torch.ones(2), 0.9))
    ),
]


@pytest.mark.parametrize(("name", "wrong"), BAD_NUMBERS, ids=lambda v: f"{v!r:.20}")
@pytest.mark.parametrize("skips", (False, True))
def test_numbers_changed_to_something_wrong_are_refused_before_any_parameter_moves(name, wrong, skips):
    """In the second of two groups, so that the first has moved if anything has."""
    ps = params()
    optimizer = PagedAdamW8bit([{"params": ps[:3]}, {"params": ps[3:]}], skip_nonfinite=skips, stochastic_rounding=True)
    run(optimizer, ps, 2)
    before, drawn, kept = bytes_of(optimizer, ps), torch.get_rng_state(), optimizer.param_groups[1][name]
    optimizer.param_groups[1][name] = wrong
    for _ in range(2):
        give_grads(ps, 2)
        with pytest.raises(ValueError, match=f"^{name}: found .*, wanted (0|two)"):
            optimizer.step()
    optimizer.param_groups[1][name] = kept
    assert all(map(torch.equal, before, bytes_of(optimizer, ps))) and torch.equal(drawn, torch.get_rng_state())
    optimizer.step()
    assert {entry["step"] for entry in optimizer.state_dict()["state"].values()} == {3}
    with pytest.raises(ValueError, match=f"^{name}: found .*, wanted (0|two)"):
        PagedAdamW8bit(params(), **{name: wrong})


@pytest.mark.parametrize("cls", ALL)
def test_numbers_may_be_tensors(cls):
    """As torch has it: schedulers write into a rate that is a tensor, which stays the same one."""
    runs = []
    for wrap in (float, torch.tensor):
        ps = params()
        given = hypers(cls) | {"lr": wrap(2.0**-8), "betas": (wrap(0.5), wrap(0.75))}
        optimizer = cls(ps, **given)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        for step in range(3):
            run(optimizer, ps, 1, first=step)
            scheduler.step()
        assert optimizer.param_groups[0]["lr"] == 2.0**-11 and (wrap is float or optimizer.param_groups[0]["lr"] is given["lr"])
        other = cls(copies(ps))
        other.load_state_dict(optimizer.state_dict())
        run(other, other.param_groups[0]["params"], 1)
        run(optimizer, ps, 1)
        assert equal(ps, other.param_groups[0]["params"])
        runs.append(ps)
    assert equal(*runs)


@pytest.mark.parametrize("kind", (None, "simulated", "staged"))
@pytest.mark.parametrize("skips", (False, True))
@pytest.mark.parametrize("how", ("one by one", "update", "|=", "the whole", "all of them"))
@pytest.mark.parametrize("cls", (PagedAdamW8bit, PagedLion))
def test_states_that_are_replaced_are_copied_to_where_they_lie(monkeypatch, cls, how, skips, kind):
    if kind is not None:
        paging_in(kind, monkeypatch)
    ps, qs = params(), params()
    options = {"skip_nonfinite": skips, "budget": 40_000, **hypers(cls)}
    optimizer, other = cls(ps, **options), cls(qs, **options)
    run(optimizer, ps, 3)
    run(other, qs, 1, first=7)
    lie = {p: {name: t.data_ptr() for name, t in other.state[p].items() if isinstance(t, torch.Tensor)} for p in qs}
    optimizer.state_dict()  # all at home
    entries = copy.deepcopy([optimizer.state[p] for p in ps])
    assert {type(entry) for entry in entries} == {dict}
    for q, entry in zip(qs, entries, strict=True):
        if how == "one by one":
            for name, value in entry.items():
                other.state[q][name] = value
        elif how == "update":
            other.state[q].update(entry)
        elif how == "|=":
            other.state[q] |= entry
        elif how == "the whole":
            other.state[q] = entry
    if how == "all of them":
        other.state = dict(zip(qs, entries, strict=True))
    for p, q in zip(ps, qs, strict=True):
        q.data.copy_(p.data)
    assert all(map(torch.equal, bytes_of(optimizer, ps), bytes_of(other, qs)))  # a state dict has them even before a step
    run(optimizer, ps, 2, first=3)
    run(other, qs, 2, first=3)
    assert all(map(torch.equal, bytes_of(optimizer, ps), bytes_of(other, qs)))
    assert all(other.state[q][name].data_ptr() == where for q, names in lie.items() for name, where in names.items())


def test_states_sent_to_the_cpu_and_back_one_by_one_are_what_they_were():
    """As trainers of language models do between phases."""
    runs = []
    for sends in (False, True):
        ps = params()
        optimizer = PagedAdamW8bit(ps)
        run(optimizer, ps, 2)
        for entry in optimizer.state.values() if sends else ():
            for name, value in entry.items():
                if isinstance(value, torch.Tensor):
                    entry[name] = value.to("cpu", copy=True).requires_grad_(value.is_floating_point())
                    assert not entry[name].requires_grad
        run(optimizer, ps, 2, first=2)
        runs.append(bytes_of(optimizer, ps))
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("kind", (None, "simulated", "staged"))
def test_states_may_change_places(monkeypatch, kind):
    if kind is not None:
        paging_in(kind, monkeypatch)
    ps = params(shapes=((64, 80), (64, 80)))
    optimizer, other = (PagedAdamW8bit(ts, budget=15_000) for ts in (ps, copies(ps)))
    for o in (optimizer, other):
        run(o, o.param_groups[0]["params"], 2)
    first, second = other.state_dict()["state"].values()
    optimizer.state[ps[0]], optimizer.state[ps[1]] = optimizer.state[ps[1]], optimizer.state[ps[0]]
    for entry, wanted in zip(optimizer.state_dict()["state"].values(), (second, first), strict=True):
        assert all(torch.equal(torch.as_tensor(entry[name]), torch.as_tensor(wanted[name])) for name in wanted)


@pytest.mark.parametrize("skips", (False, True))
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(skips):
    ps = params()
    optimizer = PagedAdamW8bit(ps, skip_nonfinite=skips)
    run(optimizer, ps, 2)
    before, state = bytes_of(optimizer, ps), optimizer.state[ps[0]]
    for name, wrong in (
        ("state1", state["state1"].float()), ("state2", state["state2"][1:]), ("absmax1", None), ("step", -1),
        ("step", torch.ones(2)), ("step", 0.5), ("state1", state["state1"].to("meta")), ("step", torch.ones((), device="meta")),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name}: found .*, wanted"):
            state[name] = wrong
    assert all(map(torch.equal, before, bytes_of(optimizer, ps)))
    for wrong, words in (
        ({"step": 1}, "no absmax1"),
        ([1], r"found \[1\]"),
        ({**state, "state1": torch.ones(2)}, "state1: found torch.float32"),
    ):
        optimizer.state[ps[0]] = wrong
        give_grads(ps, 1)
        for call in (optimizer.step, optimizer.state_dict):
            with pytest.raises(ValueError, match=rf"^state of a parameter \[300, 17\].*{words}"):
                call()
    optimizer.state[ps[0]] = state
    assert all(map(torch.equal, before, bytes_of(optimizer, ps)))
    state["mine"] = 3
    optimizer.step()
    assert optimizer.state[ps[0]]["mine"] == 3


def test_a_cleared_entry_starts_anew():
    ps, qs = params(), params()
    optimizer, fresh = AdamW8bit(ps, skip_nonfinite=True), AdamW8bit(qs, skip_nonfinite=True)
    run(optimizer, ps, 2)
    for p, q in zip(ps, qs, strict=True):
        p.data.copy_(q.data)
        optimizer.state[p].clear()
    assert not any(optimizer.state_dict()["state"].values())
    run(optimizer, ps, 2)
    run(fresh, qs, 2)
    assert equal(ps, qs) and all(map(torch.equal, bytes_of(optimizer, ps), bytes_of(fresh, qs)))


def test_how_torch_stepped_is_not_taken_with_its_states():
    theirs = params()
    optimizer = torch.optim.AdamW(theirs, lr=0.5, capturable=True, foreach=True)
    run(torch.optim.AdamW(theirs), theirs, 1)
    mine = PagedAdamW(copies(theirs))
    mine.load_state_dict(optimizer.state_dict())
    assert (
        mine.param_groups[0]["lr"] == 0.5 and not {"capturable", "foreach", "fused", "differentiable"} & mine.param_groups[0].keys()
    )
    saved = torch.optim.Adam(theirs).state_dict()  # without weight decay, which it would not decouple
    mine.load_state_dict(saved)
    saved["param_groups"][0]["weight_decay"] = 0.1
    with pytest.raises(ValueError, match="decoupled_weight_decay: found False"):
        mine.load_state_dict(saved)


# ---- compiled loops


@pytest.mark.parametrize("kind", (None, "staged"))
@pytest.mark.parametrize("how", ("step", "closure", "both in one"))
def test_a_compiled_loop_gives_the_bits_of_a_plain_one_and_compiles_once(monkeypatch, how, kind):
    if kind is not None:
        paging_in(kind, monkeypatch)
    torch._dynamo.reset()
    runs = []
    for compiled in (False, True):
        compile = partial(torch.compile, backend="aot_eager") if compiled else lambda f: f
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 80), nn.ReLU(), nn.Linear(80, 64)).bfloat16()
        optimizer = PagedAdamW8bit(model.parameters(), lr=1e-2, min_8bit_size=1000, stochastic_rounding=True)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1)) if how != "both in one" else None
        forward = model if how == "both in one" else compile(model)

        def loss(x, forward=forward):
            return forward(x).square().mean()

        def closure(x, optimizer=optimizer, loss=loss):
            optimizer.zero_grad()
            found = loss(x)
            found.backward()
            return found

        def whole(x, optimizer=optimizer, closure=closure):
            closure(x)
            optimizer.step()

        step = compile(optimizer.step if how != "both in one" else whole)
        for turn in range(14):
            frames = torch._dynamo.utils.counters["frames"]["total"]
            x = torch.randn(4, 64, dtype=torch.bfloat16)
            if how == "step":
                closure(x)
                step()
            elif how == "closure":
                step(partial(closure, x))
            else:
                step(x)
            if scheduler is not None:
                scheduler.step()
            # The second turn has what the first had not: states, hooks, gradients of before.
            assert turn < 2 or torch._dynamo.utils.counters["frames"]["total"] == frames
        runs.append(bytes_of(optimizer, list(model.parameters())))
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    assert all(map(torch.equal, *runs))
