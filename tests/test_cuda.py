"""What only a GPU shows: streams, graphs, launches, synchronization, memory that pages, and sizes beyond 32 bits. The bytes are
checked where every back end's are, in test_quantize.py, test_dequantize.py, test_optim_step.py and test_bitsandbytes.py."""

import gc
import subprocess
import sys
from functools import partial

import pytest
import torch

from nf4lora import backends, dequantize_4bit, linear_4bit, managed, native_cuda, ops, quantize_4bit, reference, staging
from nf4lora.abi import COUNTERS
from nf4lora.cases import random_case
from nf4lora.nn import NF4LoRALinear
from nf4lora.optim import AdamW8bit, PagedAdamW, PagedAdamW8bit, PagedLion, PagedLion8bit, base
from nf4lora.optim.managed import Managed
from nf4lora.optim.memory import Resident
from nf4lora.optim.staged import Staged

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
SHAPE = (1024, 4096)


@pytest.fixture(params=["cuda", "triton"])
def gpu(request):
    with backends.use_backend(request.param):
        yield request.param


def weight(shape=SHAPE, dtype=torch.bfloat16, seed=0):
    return torch.randn(shape, dtype=dtype, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))


def round_trip(a):
    packed, state = quantize_4bit(a, compress_statistics=True, check_finite=False)
    return packed, state.absmax, state.nested_absmax, dequantize_4bit(packed, state)


def equal(found, wanted):
    return all(torch.equal(f.cpu().view(torch.uint8), w.cpu().view(torch.uint8)) for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 64, 256, 4096])
def test_bytes_of_model_shapes(gpu, blocksize, quant_type, dtype):
    a = weight((14336, 1024), dtype)
    found = ops.quantize(a, blocksize, quant_type)
    wanted = reference.quantize(a, blocksize, quant_type)
    assert equal(found, wanted)
    nested = ops.quantize_absmax(found[1], found[1].mean())
    assert equal(nested, reference.quantize_absmax(found[1], found[1].mean()))
    args = found[0], nested[0], nested[1], found[1].mean(), list(a.shape), blocksize, quant_type, dtype
    assert equal([ops.dequantize(*args)], [reference.dequantize(*args)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_alignment(gpu, dtype):
    """Elsewhere operands are sent to the GPU, where each then begins at an address of its own."""
    memory = weight((20_005,), dtype)
    for start in (1, 2, 3, 5):
        a = memory[start:]
        packed, absmax = ops.quantize(a, 64, "nf4")
        assert equal((packed, absmax), reference.quantize(a, 64, "nf4"))
        shifted = torch.zeros(len(packed) + start, dtype=torch.uint8, device="cuda")[start:].unsqueeze(1).copy_(packed)
        args = absmax, None, None, list(a.shape), 64, "nf4", dtype
        assert equal([ops.dequantize(shifted, *args)], [reference.dequantize(packed, *args)])


def test_runs_on_the_current_stream(gpu):
    a = weight()
    wanted = round_trip(a)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    changing = torch.zeros_like(a)
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # the default stream would read `changing` before it is written
        changing.copy_(a)
        found = round_trip(changing)
    side.synchronize()
    assert equal(found, wanted)


def test_a_graph_replays_it(gpu):
    a = weight()
    round_trip(a)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = round_trip(a)
    for seed in (1, 2):
        a.copy_(weight(seed=seed))
        graph.replay()
        assert equal(captured, round_trip(a))


def test_nothing_synchronizes(gpu):
    a = weight()
    round_trip(a)
    torch.cuda.set_sync_debug_mode("error")
    try:
        round_trip(a)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def kernels_of(call):
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]  # memsets among them


def test_launches(gpu):
    a = weight()
    packed, state = quantize_4bit(a, compress_statistics=True)
    assert len(kernels_of(lambda: dequantize_4bit(packed, state))) == 1
    assert len(kernels_of(lambda: quantize_4bit(a, check_finite=False))) == 1
    assert len(kernels_of(lambda: quantize_4bit(a, compress_statistics=True, check_finite=False))) <= 3


PATHS = ("small", "mma", "wgmma", "dense")


@pytest.fixture(params=PATHS)
def linear(request):
    """A layer's forward and backward on one path of the linear: (x, a call that gives y, dx, dA, dB)."""
    path = request.param
    if path == "wgmma" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("wgmma is of sm_90a")
    case = random_case({"small": 8, "mma": 96, "wgmma": 96, "dense": 300}[path], 512, 1024, 16, torch.bfloat16, device="cuda")
    x, A, B = (t.clone().requires_grad_() for t in (case.x, case.lora_A, case.lora_B))

    def run():
        with backends.use_backend("cuda", path):
            y = linear_4bit(x, case.packed, case.state, case.bias, A, B, case.scaling)
            return y.detach(), *torch.autograd.grad(y, (x, A, B), case.dy)

    with backends.use_backend("cuda", path):
        yield x, run


def test_the_linear_runs_on_the_current_stream(linear):
    x, run = linear
    wanted, values, side = run(), x.detach().clone(), torch.cuda.Stream()
    with torch.no_grad():
        x.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        with torch.no_grad():
            x.copy_(values)
        found = run()
    side.synchronize()
    assert equal(found, wanted)


def test_row_38_a_graph_of_the_linear_equals_eager_bit_for_bit(linear):
    x, run = linear
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed in (1, 2):
        with torch.no_grad():
            x.copy_(weight(tuple(x.shape), seed=seed))
        graph.replay()
        assert equal(captured, run())


def test_graphs_captured_on_one_stream_may_run_at_once(linear):
    """Each has counters of its own for the sums that blocks share."""
    _, run = linear
    wanted, side = run(), torch.cuda.Stream()
    graphs, captured = [torch.cuda.CUDAGraph() for _ in range(2)], []
    for graph in graphs:
        with torch.cuda.graph(graph, stream=side):
            captured.append(run())
    streams = [torch.cuda.Stream() for _ in graphs]
    torch.cuda.synchronize()
    for _ in range(20):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    assert all(equal(found, wanted) for found in captured) and equal(run(), wanted)


def test_launches_leave_their_counters_at_zero(linear):
    x, run = linear
    for _ in range(3):
        run()

    class Counters:
        __cuda_array_interface__ = {
            "shape": (COUNTERS,), "typestr": "<i4", "data": (native_cuda.cuda.counters(x.device), True), "version": 3,
        }  # fmt: skip

    assert not torch.as_tensor(Counters(), device="cuda").any()


def test_nothing_of_a_launch_stays_in_torchs_memory(linear):
    """So that graphs of torch.compile, whose pools want every block back, take the ops."""
    x, run = linear
    run()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        x.detach() @ x.detach().T  # cuBLAS keeps memory for each stream
        before = torch.cuda.memory_allocated()
        run()
    side.synchronize()
    assert torch.cuda.memory_allocated() == before


def test_nothing_of_the_linear_synchronizes(linear):
    _, run = linear
    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_linear_gives_equal_bits_every_time(linear):
    _, run = linear
    wanted = run()
    assert all(equal(run(), wanted) for _ in range(100))


@pytest.mark.parametrize("path", PATHS)
def test_launches_of_the_linear(path):
    """At most 3 forward and 4 backward, the library's product and memsets among them."""
    if path == "wgmma" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("wgmma is of sm_90a")
    case = random_case(96, 1024, 1024, 16, torch.bfloat16, bias=False, device="cuda")
    x, A, B = (t.clone().requires_grad_() for t in (case.x, case.lora_A, case.lora_B))
    with backends.use_backend("cuda", path):
        forward = lambda: linear_4bit(x, case.packed, case.state, None, A, B, case.scaling)  # noqa: E731
        y = forward()  # counters are made for the first call of a stream
        assert len(kernels_of(forward)) <= 3
        backward = lambda: torch.autograd.grad(y, (x, A, B), case.dy, retain_graph=True)  # noqa: E731
        backward()
        assert len(kernels_of(backward)) <= 4


def test_repeats_give_equal_bits(gpu):
    a = weight()
    wanted = round_trip(a)
    assert all(equal(round_trip(a), wanted) for _ in range(100))


def test_row_10_more_than_2_to_the_31_elements(gpu):
    numel, tail = 2**31 + 101, 101
    a = torch.zeros(numel, dtype=torch.bfloat16, device="cuda")
    last = weight((tail,))
    a[-tail:] = last
    packed, absmax = ops.quantize(a, 4096, "nf4")
    wanted = reference.quantize(last, 4096, "nf4")
    assert packed.shape == (numel // 2 + 1, 1) and equal([packed[2**30 :], absmax[-1:]], wanted)
    assert int(absmax[:-1].count_nonzero()) == 0 and bool((packed[: 2**30] == 0x77).all())
    del a
    out = ops.dequantize(packed, absmax, None, None, [numel], 4096, "nf4", torch.bfloat16)
    assert int(out[: 2**31].count_nonzero()) == 0
    assert equal([out[-tail:]], [reference.dequantize(*wanted, None, None, [tail], 4096, "nf4", torch.bfloat16)])


def test_a_second_device_gets_its_own_launch(gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    a = weight().to("cuda:1")
    assert equal(round_trip(a), round_trip(weight()))


def test_a_host_tensor_never_lies_on_the_gpu_whole(monkeypatch, gpu):
    monkeypatch.setattr(staging, "PIECE_BYTES", 1 << 20)
    a = torch.randn(8 << 20)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    packed, state = quantize_4bit(a, device="cuda")
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= packed.numel() + 4 * state.absmax.numel() + (8 << 20)  # of a tensor of 32 MiB; the allocator rounds up
    assert equal([packed, state.absmax], reference.quantize(a, 64, "nf4"))


def test_a_layer_compiles_into_graphs():
    layer = NF4LoRALinear(1024, 512, bias=False, r=8, device="cuda", dtype=torch.bfloat16).to(torch.bfloat16)
    call = torch.compile(layer, mode="reduce-overhead")
    with torch.no_grad(), backends.use_backend("cuda"):
        for i in range(5):
            x = weight((8, 1024), seed=i)
            torch.compiler.cudagraph_mark_step_begin()
            assert equal([call(x).clone()], [layer(x)])


# ---- optimizers

MIB = 2**20
PLACES = {"managed": Managed, "pinned staging": Staged, "resident": Resident}
LARGE = ((4096, 4096),) * 5 + ((333, 1001), (7,))  # 643 MiB of float32 states
ADAPTERS = ((16, 4096), (4096, 16)) * 224  # as many as those of Llama-3-8B


@pytest.fixture
def place(monkeypatch):
    """Sets where the states of new optimizers are."""

    def choose(name):
        def chooser(paged, budget, allow_oversubscription):
            staged = partial(Staged, budget=sys.maxsize if budget is None else budget)  # None gives way, by a test of its own
            return staged if name == "pinned staging" else PLACES[name]

        monkeypatch.setattr(base, "chooser", chooser)

    return choose


def parameters(shapes=ADAPTERS, dtype=torch.float32):
    return [torch.nn.Parameter(weight(shape, dtype, seed)) for seed, shape in enumerate(shapes)]


def give_gradients(params, seed):
    for i, p in enumerate(params):
        p.grad = weight(tuple(p.shape), p.dtype, 1000 * seed + i).mul_(1e-3)


def step_often(optimizer, params, count, first=0):
    for seed in range(first, first + count):
        give_gradients(params, seed)
        optimizer.step()


def pools(optimizer):
    return list(dict.fromkeys(optimizer._pool_of.values()))


def send_home(optimizer):
    for found in pools(optimizer):
        found.pager.make_room(found.pager.resident_bytes)


def states_of(optimizer):
    return [t for entry in optimizer.state_dict()["state"].values() for t in entry.values() if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("stochastic", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("cls", (PagedAdamW, PagedAdamW8bit, PagedLion, PagedLion8bit))
def test_an_optimizer_gives_the_bits_of_the_reference(gpu, cls, dtype, stochastic):
    """Gradients may begin anywhere; every third step has one that is not finite, and is not taken."""
    shapes = ((1,), (255,), (257,), (4096,), (333, 1001), (7, 4099)) + ADAPTERS[:20]
    found = []
    for backend in (gpu, "reference"):
        params = parameters(shapes, dtype)
        optimizer = cls(params, lr=1e-2, weight_decay=0.1, skip_nonfinite=True, stochastic_rounding=stochastic)
        torch.manual_seed(0)
        with backends.use_backend(backend):
            for seed in range(5):
                for i, p in enumerate(params):
                    memory = weight((p.numel() + 3,), dtype, 1000 * seed + i)
                    p.grad = memory[i % 3 : i % 3 + p.numel()].view(p.shape)
                if seed % 3 == 1:
                    params[seed].grad.view(-1)[0] = torch.inf
                try:
                    optimizer.step()
                except NotImplementedError as reason:
                    pytest.skip(str(reason))
        found.append([p.detach() for p in params] + states_of(optimizer))
    assert equal(*found)


@pytest.mark.parametrize(("cls", "budget"), [(PagedAdamW, 256 * MIB), (PagedAdamW8bit, 96 * MIB), (PagedLion8bit, 64 * MIB)])
def test_a_paged_optimizer_gives_the_bits_of_one_that_is_not(place, cls, budget):
    found = {}
    for name, memory in PLACES.items():
        place(name)
        params = parameters(LARGE)
        optimizer = cls(params, budget=None if name == "resident" else budget, weight_decay=0.1)
        for seed in range(4):
            give_gradients(params, seed)
            optimizer.step()
            if seed == 1:
                send_home(optimizer)
        assert isinstance(pools(optimizer)[0].memory, memory)
        if name != "resident":
            assert all(p.pager.resident_bytes <= budget for p in pools(optimizer)) and not pools(optimizer)[0].pager.fits
        found[name] = [p.detach().clone() for p in params] + states_of(optimizer)
    assert equal(found["managed"], found["resident"]) and equal(found["pinned staging"], found["resident"])


@pytest.mark.parametrize("cls", (PagedAdamW, PagedAdamW8bit))
def test_gradients_fetch_the_states_of_an_optimizer(cls):
    params = parameters(ADAPTERS[:64])
    optimizer, other = cls(params), [torch.nn.Parameter(p.detach().clone()) for p in params]
    plain = (AdamW8bit if cls is PagedAdamW8bit else cls)(other)
    for seed in range(3):
        for made, ps in ((optimizer, params), (plain, other)):
            made.zero_grad()
            torch.stack([(p * weight(tuple(p.shape), seed=seed).float()).sum() for p in ps]).sum().backward()
            if seed and made is optimizer:
                (pool,) = pools(made)
                assert pool.pager.resident_bytes == sum(map(pool.memory.layout.nbytes, range(pool.memory.layout.count)))
                assert {managed.places(t)[0] for t in pool.memory.arenas()} == {0}
            made.step()
        send_home(optimizer)
        assert {managed.places(t)[0] for t in pools(optimizer)[0].memory.arenas()} == {managed.HOME}
    assert equal(params, other)


@pytest.mark.parametrize("cls", (PagedAdamW, PagedAdamW8bit))
def test_staged_states_without_a_budget_take_no_room_between_steps(place, monkeypatch, cls):
    place("resident")
    plain, params = parameters(LARGE), parameters(LARGE)
    others, optimizer = cls(plain), cls(params)
    for seed in range(4):
        give_gradients(plain, seed)
        others.step()
        monkeypatch.setattr(base, "chooser", lambda *options: Staged)
        optimizer.zero_grad()
        drawn = [weight(tuple(p.shape), torch.float32, 1000 * seed + i).mul_(1e-3) for i, p in enumerate(params)]
        torch.stack([(p * g).sum() for p, g in zip(params, drawn, strict=True)]).sum().backward()
        before = torch.cuda.memory_allocated()
        found = pools(optimizer)
        resident = sum(pool.pager.resident_bytes for pool in found)
        assert (resident > 0) == (seed > 0)  # the hooks are of the first step
        optimizer.step()
        torch.cuda.synchronize()
        taken = sum(t.nbytes for pool in pools(optimizer) for t in pool.absmax) if not found else 0
        assert abs(torch.cuda.memory_allocated() - before + resident - taken) <= 33 * MIB  # the last chunk is short, its slot is not
    assert equal(params, plain) and equal(states_of(optimizer), states_of(others))


@pytest.mark.parametrize("name", ("managed", "pinned staging"))
def test_the_memory_of_an_optimizer_returns(place, name):
    place(name)
    device = torch.device("cuda", 0)
    params = parameters(LARGE)

    def used_by_one(watch=lambda: None):
        optimizer = PagedAdamW(params)
        step_often(optimizer, params, 1)
        torch.cuda.synchronize()
        watch()
        del optimizer
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    used_by_one()
    free, held = torch.cuda.mem_get_info()[0], managed.room(device).held
    for _ in range(3):
        seen = []
        used_by_one(lambda seen=seen: seen.append((torch.cuda.mem_get_info()[0], managed.room(device).held)))
        ((least, most),) = seen
        assert least <= free - 600 * MIB and (most - held >= 600 * MIB) == (name == "managed")
    assert managed.room(device).held == held and torch.cuda.mem_get_info()[0] >= free - 16 * MIB
    assert not any(p._post_accumulate_grad_hooks for p in params)


@pytest.mark.parametrize("cls", (PagedAdamW, PagedAdamW8bit))
def test_a_resumed_optimizer_gives_the_same_bits_and_still_pages(cls):
    params = parameters(LARGE)
    optimizer = cls(params, budget=96 * MIB)
    step_often(optimizer, params, 2)
    saved, start = optimizer.state_dict(), [p.detach().clone() for p in params]
    step_often(optimizer, params, 2, first=2)
    resumed = [torch.nn.Parameter(t) for t in start]
    other = cls(resumed, budget=96 * MIB)
    other.load_state_dict(saved)
    where = {p: other.state[p]["state1"].data_ptr() for p in resumed}
    other.load_state_dict(saved)
    assert where == {p: other.state[p]["state1"].data_ptr() for p in resumed}
    step_often(other, resumed, 2, first=2)
    assert equal(params, resumed) and equal(states_of(optimizer), states_of(other))
    assert {type(pool.memory) for pool in pools(other)} == {Managed}
    assert other.state[resumed[0]]["state1"].is_cuda and managed.places(pools(other)[0].memory.arenas()[0])[1] == 0


@pytest.mark.parametrize("name", ("managed", "pinned staging"))
@pytest.mark.parametrize("budget", (None, 96 * MIB))
def test_an_optimizer_steps_on_the_current_stream(place, name, budget):
    place("resident")
    plain = parameters(LARGE)
    step_often(PagedAdamW(plain), plain, 4)
    place(name)
    params = parameters(LARGE)
    optimizer = PagedAdamW(params, budget=budget)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for seed in range(4):
        stream = streams[seed % 2]
        stream.wait_stream(streams[1 - seed % 2])
        with torch.cuda.stream(stream):
            late = [torch.full_like(p, torch.nan) for p in params]
            torch.cuda._sleep(50_000_000)  # another stream would read `late` before it is written
            for i, (p, t) in enumerate(zip(params, late, strict=True)):
                p.grad = t.copy_(weight(tuple(p.shape), p.dtype, 1000 * seed + i).mul_(1e-3))
            optimizer.step()
    torch.cuda.synchronize()
    assert equal(params, plain)


def test_two_optimizers_step_on_two_streams_at_once():
    pairs = []
    for _ in range(2):
        params = parameters(LARGE)
        pairs.append((params, PagedAdamW8bit(params, budget=64 * MIB), torch.cuda.Stream()))
        give_gradients(params, 0)
    torch.cuda.synchronize()
    for _ in range(3):
        for _, optimizer, stream in pairs:
            with torch.cuda.stream(stream):
                optimizer.step()
    torch.cuda.synchronize()
    (one, first, _), (two, second, _) = pairs
    plain = parameters(LARGE)
    give_gradients(plain, 0)
    third = AdamW8bit(plain)
    for _ in range(3):
        third.step()
    assert equal(one, plain) and equal(two, plain)
    assert equal(states_of(first), states_of(third)) and equal(states_of(second), states_of(third))


@pytest.mark.parametrize("stepped", (False, True))
def test_a_graph_does_not_capture_an_optimizer(stepped):
    params = parameters(ADAPTERS[:2])
    optimizer = PagedAdamW(params)
    step_often(optimizer, params, int(stepped))
    give_gradients(params, 1)
    before = [p.detach().clone() for p in params]
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.ones(1, device="cuda")  # a graph of something
        optimizer.step()
    torch.cuda.synchronize()
    assert equal(params, before)
    optimizer.step()
    assert not equal(params, before)


@pytest.mark.parametrize("cls", (PagedAdamW, PagedAdamW8bit, AdamW8bit, PagedLion8bit))
def test_launches_of_an_optimizer(cls):
    """Of 448 tensors: the step, and what brings its arguments."""
    params = parameters()
    optimizer = cls(params)
    give_gradients(params, 0)
    optimizer.step()
    assert len(kernels_of(optimizer.step)) <= 2


@pytest.mark.parametrize("skip", (False, True))
@pytest.mark.parametrize("cls", (PagedAdamW, PagedAdamW8bit))
def test_no_step_of_an_optimizer_synchronizes(cls, skip):
    """Neither by torch's own account nor by the clock: the host is through while the device still waits."""
    params = parameters()
    optimizer = cls(params, skip_nonfinite=skip)
    step_often(optimizer, params, 2)
    for value in (0.0, torch.nan)[: 1 + skip]:
        params[-1].grad.view(-1)[-1] = value
        before = [p.detach().clone() for p in params] if skip and value else None
        torch.cuda.synchronize()
        torch.cuda._sleep(400_000_000)
        passed = torch.cuda.Event()
        passed.record()
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert not passed.query()
        torch.cuda.synchronize()
        assert before is None or equal(params, before)
    assert {entry["step"] for entry in optimizer.state_dict()["state"].values()} == {3}


@pytest.mark.parametrize("name", ("managed", "pinned staging"))
def test_no_step_of_an_optimizer_in_chunks_waits_for_the_device(place, name):
    place(name)
    params = parameters(LARGE)
    optimizer = PagedAdamW(params, budget=128 * MIB)
    step_often(optimizer, params, 2)
    torch.cuda.synchronize()
    torch.cuda._sleep(400_000_000)
    passed = torch.cuda.Event()
    passed.record()
    optimizer.step()
    assert not passed.query()


def test_a_child_of_fork_steps_no_optimizer():
    code = """
import os, torch
from nf4lora.optim import PagedAdamW
p = torch.nn.Parameter(torch.ones(5000, device="cuda"))
p.grad = torch.ones_like(p)
optimizer = PagedAdamW([p])
optimizer.step()
torch.cuda.synchronize()
child = os.fork()
if child == 0:
    try:
        optimizer.step()
    except RuntimeError as error:
        os._exit(7 if "fork" in str(error) else 8)
    os._exit(9)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
optimizer.step()
torch.cuda.synchronize()
print(status, p.isfinite().all().item())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.split() == ["7", "True"], done.stdout + done.stderr


def test_row_10_an_optimizer_of_more_than_2_to_the_31_elements():
    numel, tail = 2**31 + 613, 613
    p = torch.nn.Parameter(torch.zeros(numel, dtype=torch.bfloat16, device="cuda"))
    p.grad = torch.zeros_like(p)
    small = torch.nn.Parameter(weight((tail,)))
    small.grad = weight((tail,), seed=1)
    with torch.no_grad():
        p[-tail:] = small
        p.grad[-tail:] = small.grad
    for q in (p, small):
        AdamW8bit([q], weight_decay=0.1, min_8bit_size=1).step()
    assert equal([p[-tail:]], [small]) and int(p[:-tail].count_nonzero()) == 0
