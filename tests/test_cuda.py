"""What only a GPU shows: streams, graphs, launches, synchronization, and sizes beyond 32 bits. The bytes are checked where
every back end's are, in test_quantize.py, test_dequantize.py and test_bitsandbytes.py."""

import pytest
import torch

from nf4lora import backends, dequantize_4bit, linear_4bit, native_cuda, ops, quantize_4bit, reference, staging
from nf4lora.abi import COUNTERS
from nf4lora.cases import random_case
from nf4lora.nn import NF4LoRALinear

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
