"""The layer's benchmark at sizes of a toy: everybody computes the same from the same bytes, and nothing wrong gets a time."""

import contextlib
import json
import sys
import types
from dataclasses import replace
from pathlib import Path

import bitsandbytes
import peft
import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))  # behind what is installed: bench is not

from bench import bench_host, bench_layer, bench_linear, harness, layer, peers, report, timing
from bench.harness import GateFailed, compare
from bench.layer import MLP, SEVEN, WITH_SWIGLU, Work
from bench.timing import WallMeter

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*kernels-community.*"),
]
SHAPES = {
    "q_proj": (128, 128), "k_proj": (64, 128), "v_proj": (64, 128), "o_proj": (128, 128),
    "gate_proj": (256, 128), "up_proj": (256, 128), "down_proj": (128, 256),
}  # fmt: skip
TINY = Work(24, shapes=SHAPES, device="cpu")
FOUR_BIT = {layer.GROUPED, layer.ALONE, layer.UNSLOTH, layer.AUTOCAST, layer.NO_AUTOCAST}


def tiny(absent=None, **changes):
    return bench_layer.case(replace(TINY, **changes), "toy", "cpu", [] if absent is None else absent)


def computed(case, name):
    contender = case.contenders[name]
    with contender.forced():
        return [t.clone() for t in contender.calls[0]()]


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("groups", [SEVEN, WITH_SWIGLU], ids=["linears", "swiglu"])
def test_everybody_computes_the_same(groups, gradients):
    """Those whose arithmetic is not ours to judge too: on a CPU all of them are as exact as plain torch."""
    absent = []
    case = tiny(absent, groups=groups, gradients=gradients)
    wanted = FOUR_BIT | {layer.DENSE, layer.DENSE_PEFT} | (set() if gradients else {layer.NO_LORA})
    assert not absent and set(case.contenders) == wanted
    outputs = 5 if groups is WITH_SWIGLU else 7
    for name in FOUR_BIT | {layer.DENSE_PEFT}:
        result = computed(case, name)
        assert len(result) == outputs + gradients * (len(groups) + 2 * 7)
        case.gate(result)
    names = [name for name, contender in case.contenders.items() if contender.ours]
    assert names == [layer.GROUPED, layer.ALONE, layer.UNSLOTH]


def test_every_wrong_output_and_gradient_is_refused(monkeypatch):
    case = tiny(gradients=True)
    result = computed(case, layer.GROUPED)
    case.gate(result)
    for i, t in enumerate(result):
        wrong = t.clone()
        wrong[0, 0] += 0.25 * t.abs().max()
        with pytest.raises(AssertionError, match=f"result {i}:"):
            case.gate([*result[:i], wrong, *result[i + 1 :]])
    with pytest.raises(ValueError, match="zip"):
        case.gate(result[:-1])

    def broken(ctx, *dys):
        dx, *rest = backward(ctx, *dys)
        return (dx * 1.05, *rest)

    backward = peers.UnslothFunction.backward
    monkeypatch.setattr(peers.UnslothFunction, "backward", staticmethod(broken))
    with pytest.raises(GateFailed, match="Unsloth's schedule: result 7:"):
        compare(case, WallMeter(), rounds=1)


def test_float32_has_no_autocast():
    absent = []
    case = tiny(absent, dtype=torch.float32, gradients=True)
    assert (
        absent == [f"{layer.AUTOCAST}: autocast does not compute in float32"] and layer.NO_AUTOCAST in case.contenders
    )
    for name in FOUR_BIT & set(case.contenders):
        case.gate(computed(case, name))


def test_peers_are_those_of_peft_and_bitsandbytes_on_our_bytes():
    linears = bench_layer.quantized(TINY)
    packed = {name: peers.bitsandbytes_linear(own, torch.bfloat16) for name, own in linears.items()}
    for name, found in peers.with_peft(packed, linears, torch.float32).items():
        base = found.base_layer
        assert isinstance(found, peft.tuners.lora.LoraLayer) and isinstance(base, bitsandbytes.nn.Linear4bit)
        assert type(found).__name__ == "Linear4bit" and base.weight.data_ptr() == linears[name].weight.data_ptr()
        assert base.weight.quant_state.nested and found.scaling == {"default": TINY.scaling}
        decoded = bitsandbytes.functional.dequantize_4bit(base.weight.data, base.weight.quant_state)
        assert torch.equal(decoded, linears[name].dequantize(torch.bfloat16))
        for adapter, own in zip(
            peers.peft_adapters([found]), (linears[name].lora_A, linears[name].lora_B), strict=True
        ):
            assert adapter.dtype == torch.float32 and torch.equal(adapter, own) and adapter.data_ptr() != own.data_ptr()
    dense = {name: peers.dense_linear(own, torch.bfloat16) for name, own in linears.items()}
    for found in peers.with_peft(dense, linears, torch.bfloat16).values():
        assert isinstance(found, peft.tuners.lora.LoraLayer) and type(found.base_layer) is torch.nn.Linear
        assert {p.dtype for p in found.parameters() if p.requires_grad} == {torch.bfloat16}


def test_what_is_not_installed_is_left_out_with_its_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(peers, "import_module", lambda name: (_ for _ in ()).throw(ImportError(f"no {name} here")))
    rc = bench_layer.measure("toy", [TINY, replace(TINY, gradients=True)], WallMeter(), tmp_path, "cpu", rounds=1)
    document = json.loads((tmp_path / "toy.json").read_text())
    assert rc == 0 and {row["contender"].removesuffix(" (again)") for row in document["rows"]} == {
        layer.GROUPED, layer.ALONE, layer.DENSE, layer.UNSLOTH,
    }  # fmt: skip
    why = "bitsandbytes cannot be imported: no bitsandbytes here"
    assert document["absent"] == [
        f"{layer.DENSE_PEFT}: peft cannot be imported: no peft here",
        f"{layer.AUTOCAST}: peft cannot be imported: no peft here",
        f"{layer.NO_AUTOCAST}: peft cannot be imported: no peft here",
        f"{layer.NO_LORA}: {why}",
        f"{layer.UNSLOTH} by bitsandbytes' kernels, not ours: {why}",
    ]
    assert f"Not there, so not timed: {layer.NO_LORA}: {why}" in report.markdown(document)


def test_bitsandbytes_without_a_library_for_the_device_is_not_there(monkeypatch):
    def broken(*args):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", broken)
    absent = []
    case = tiny(absent, gradients=True)
    assert layer.DENSE_PEFT in case.contenders and layer.NO_AUTOCAST not in case.contenders
    assert f"{layer.NO_AUTOCAST}: bitsandbytes does not run on cpu: no kernel image" in absent
    case.gate(computed(case, layer.UNSLOTH))


def test_calls_go_round_operands_of_their_own():
    case = tiny(gradients=True, sets=3)
    for name, contender in case.contenders.items():
        assert len(contender.calls) == 3
        first, second, _ = contender.calls
        assert {x.data_ptr() for x in first.inputs} & {x.data_ptr() for x in second.inputs} == set()
        assert {a.data_ptr() for a in first.layer.adapters} & {a.data_ptr() for a in second.layer.adapters} == set()
        assert all(x.is_leaf and x.grad_fn is None for x in first.inputs)
        with contender.forced():
            assert all(map(torch.equal, first(), second())), name


def test_rows_of_a_gpu():
    works = bench_layer.gpu_works(l2_bytes=60 << 20)
    assert all(work.sets == 2 and work.device == "cuda" and work.dtype == torch.bfloat16 for work in works)
    rows = [(work.M, work.gradients) for work in works if work.groups == SEVEN]
    assert set(rows) == {(M, False) for M in (16, 32, 64, 128, 256, 512, 1024, 4096)} | {(4096, True), (8192, True)}
    assert [work.M for work in works if MLP in work.groups] == [4096, 4096] and len(set(works)) == len(works) == 12
    of_one = bench_linear.cuda_works(l2_bytes=60 << 20)
    forward = {(name, work.M) for name, work in of_one if not work.gradients}
    assert forward >= {(name, M) for name in ("q, o", "gate, up") for M in (1, 4, 8, 16)}
    assert all(3 * (60 << 20) <= work.sets * _bytes(work) or work.sets == 2 for _, work in of_one)


def _bytes(work):
    ((name,),) = work.groups
    N, K = work.shape(name)
    return N * K // 2 + 2 * work.M * (N + K)


def test_one_linear_on_a_gpu_has_its_paths():
    work = replace(TINY, M=16, groups=(("o_proj",),))
    case = bench_linear.cuda_case("q, o", work, "cpu", [])
    assert list(case.contenders) == [
        "nf4lora", "nf4lora small", "nf4lora mma", "nf4lora triton", layer.DENSE, layer.UNSLOTH, layer.DENSE_PEFT,
        layer.NO_LORA, layer.AUTOCAST, layer.NO_AUTOCAST,
    ]  # fmt: skip
    assert case.contenders["nf4lora mma"].path == "mma" and case.contenders["nf4lora triton"].backend == "triton"
    assert case.sweep == "forward q, o" and case.x == 16
    case.gate(computed(case, "nf4lora"))


@pytest.mark.parametrize(("ms", "eager"), [(2.0, 7.0), (3.0, None)])
def test_eager_calls_of_what_keeps_the_device_busy_are_not_timed(monkeypatch, ms, eager):
    sample = types.SimpleNamespace(kernel_ms=lambda: ms, eager_ms=lambda: 7.0)
    monkeypatch.setattr(timing.CudaMeter, "prepare", lambda self, contender, check=None: sample)
    assert bench_layer.LayerMeter(l2_bytes=1).prepare(None).eager_ms() == eager


# ---- the host's cost


def test_the_host_rows(tmp_path):
    rc = bench_host.measure("toy", bench_host.works("cpu"), tmp_path, "cpu", rounds=1)
    document = json.loads((tmp_path / "toy.json").read_text())
    assert rc == 0 and not document["failed"]
    rows = document["rows"]
    assert {row["case"] for row in rows} == {"forward M=1", "forward, recorded M=1", "backward M=1"}
    assert {row["timed"] for row in rows} == {"host"} and all(row["time_ms"][0] > 0 for row in rows)
    assert {row["launches"] for row in document["launches"]} == {None}
    assert len(document["launches"]) == len([row for row in rows if not row["contender"].endswith("(again)")])
    assert bench_host.counted([types.SimpleNamespace(group="g", name="c", contenders={"red": None})], rows, bench_host.launches) == []
    text = report.markdown(document)
    assert "| launches, host cost, q, k, v, K = 64, bfloat16, r = 16 | nf4lora grouped | nf4lora one by one |" in text
    assert "| backward M=1 | not measured | not measured |" in text and "†" not in text
    document["environment"]["gpu"] = dict.fromkeys(
        ("name", "sm_mhz", "sm_max_mhz", "memory_mhz", "memory_max_mhz", "power_limit_w", "driver", "cuda_runtime")
    )
    document["launches"][0]["launches"] = 3
    text = report.markdown(document)
    assert "of a copy's speed" not in text and "| forward M=1 | 3 | not measured |" in text


def test_launches_are_what_ran_on_the_device(monkeypatch):
    """Counted in a profile that a GPU might have given: kernels and copies, but no annotation and nothing of the host."""
    cpu, cuda = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA
    events = [
        types.SimpleNamespace(device_type=d, is_user_annotation=a)
        for d, a in ((cpu, False), (cuda, True), (cuda, False), (cuda, False))
    ]

    class Profile:
        def __enter__(self):
            return types.SimpleNamespace(events=lambda: events)

        def __exit__(self, *why):
            pass

    call = types.SimpleNamespace(outputs=lambda: None, mode=contextlib.nullcontext)
    contender = timing.Contender((bench_host.Alone(call, backward=False),))
    assert bench_host.launches(contender) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.profiler, "profile", Profile)
    assert bench_host.launches(contender) == 2
    events.clear()
    assert bench_host.launches(contender) is None


def test_only_the_part_named_is_timed():
    """Forwards alone, or backwards of forwards done before."""
    log = []
    call = types.SimpleNamespace(
        **{name: lambda *_, n=name: log.append(n) for name in ("forward", "outputs", "backward")}
    )
    for backward, wanted in ((False, ["outputs"] * 3), (True, ["backward"] * 3)):
        batch = bench_host.Alone(call, backward).ready(3)
        assert log == ["forward"] * (3 * backward)
        log.clear()
        for one in batch:
            one()
        assert log == wanted
        log.clear()


def test_a_wrong_result_has_no_host_cost(monkeypatch):
    work = Work(1, (("o_proj",),), True, {"o_proj": (64, 64)}, device="cpu")
    case = bench_layer.case(work, "toy", "cpu", [], lambda call: bench_host.Alone(call, True))
    monkeypatch.setattr(case.contenders["nf4lora"].calls[0].call.inputs[0], "data", torch.ones(1, 64).bfloat16())
    with pytest.raises(GateFailed, match="nf4lora: result 0"):
        compare(case, bench_host.HostMeter(), rounds=1)
    assert harness.run  # the harness tells no time of what failed: tests/test_bench.py
