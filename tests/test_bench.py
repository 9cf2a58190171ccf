"""The measuring harness, on fakes: what it does with times, wrong results and stopped runs. No test reads the clock."""

import json
import os
import signal
import subprocess
import sys
import time
import types
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nf4lora import dequantize_4bit, quantize_4bit

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # behind what is installed: bench is not

from bench import (
    bench_linear,
    bench_quantize,
    environment,
    files,
    gpu_report,
    harness,
    report,
    roofline,
    sanitize,
    timing,
)
from bench.harness import Case, GateFailed, compare
from bench.roofline import Mix, Traffic
from bench.timing import Contender, CudaMeter, Spread, WallMeter

pytestmark = pytest.mark.usefixtures("one_thread")
OURS = Contender((lambda: torch.ones(4),), ours=True)
PEER = Contender((lambda: torch.ones(4),))


class Scripted:
    """A meter whose contenders take the times told, by the number of their turn; the self-pair comes last."""

    def __init__(self, *times, eager=None, energy=None):
        self.times, self.eager, self.energy, self.log = times, eager, energy, []

    def prepare(self, contender, check):
        if check:
            check(contender.calls[0]())
        number = len([1 for what, _ in self.log if what == "prepared"])
        self.log.append(("prepared", number))
        taken = iter(self.times[number])

        def kernel_ms():
            self.log.append(("timed", number))
            return next(taken)

        return types.SimpleNamespace(
            timed="told", kernel_ms=kernel_ms, eager_ms=lambda: self.eager, energy_mj=lambda: self.energy
        )


def case(gate=lambda result: None, **kinds):
    return Case("group", "case", kinds or {"ours": OURS, "peer": PEER}, gate, bytes_moved=100)


# ---- comparing


def test_medians_and_ratios_are_of_each_round():
    meter = Scripted([1.0, 2.0, 4.0], [3.0, 2.0, 4.0], [1.0, 3.0, 4.0], eager=7.0, energy=9.0)
    ours, peer, again = compare(replace(case(), energy=True), meter, rounds=3)
    assert [r.contender for r in (ours, peer, again)] == ["ours", "peer", "ours (again)"]
    assert ours.time_ms == Spread(2.0, 1.0, 4.0) and peer.time_ms == Spread(3.0, 2.0, 4.0)
    assert ours.ratio == Spread(1.0, 1.0, 1.0) and peer.ratio == Spread(1.0, 1.0, 3.0)
    assert again.ratio == Spread(1.0, 1.0, 1.5)
    assert (
        ours.eager_ms == Spread(7.0, 7.0, 7.0)
        and ours.energy_mj == 9.0
        and ours.of_ceiling is None
        and ours.timed == "told"
    )


def test_times_are_also_compared_with_the_bases_round_by_round():
    meter = Scripted([1.0, 4.0], [2.0, 2.0], [1.0, 1.0])
    ours, peer, again = compare(replace(case(), bases=("peer", "gone"), flops=7), meter, rounds=2)
    assert ours.over == {"peer": Spread(1.25, 0.5, 2.0)} and peer.over == {"peer": Spread(1.0, 1.0, 1.0)}
    assert again.over == {"peer": Spread(0.5, 0.5, 0.5)} and ours.ratio == Spread(1.0, 1.0, 1.0) and ours.flops == 7
    assert compare(case(), Scripted([1.0], [1.0], [1.0]), rounds=1)[0].over is None


def test_a_host_goes_round_the_calls_and_each_must_pass():
    log = []

    @contextmanager
    def within():
        log.append("in")
        yield
        log.append("out")

    contender = Contender(tuple((lambda i=i: log.append(i) or i) for i in range(3)), ours=True, within=within)
    sample = WallMeter().prepare(contender, lambda result: log.append(f"checked {result}"))
    assert log == [entry for i in range(3) for entry in ("in", i, "out", f"checked {i}")]
    log.clear()
    assert sample.kernel_ms() > 0 and log == ["in", 0, 1, 2, "out"]


def test_contenders_take_turns_and_each_round_starts_with_the_next():
    meter = Scripted([1.0] * 3, [1.0] * 3, [1.0] * 3)
    compare(case(), meter, rounds=3)
    assert [n for what, n in meter.log if what == "timed"] == [1, 2, 0, 2, 0, 1, 0, 1, 2]


def test_the_share_of_the_ceiling_counts_bytes():
    copy = Contender((lambda: None,), ceiling=True, bytes_moved=50)
    ours, ceiling, _ = compare(case(ours=OURS, copy=copy), Scripted([4.0, 4.0], [1.0, 2.0], [4.0, 4.0]), rounds=2)
    # 100 bytes in 4 ms beside 50 bytes in 1 or 2
    assert ours.of_ceiling == Spread(0.75, 0.5, 1.0) and ceiling.of_ceiling == Spread(1.0, 1.0, 1.0)
    assert (ours.bytes_moved, ceiling.bytes_moved) == (100, 50) and ceiling.error is None


def red(result):
    raise AssertionError("3 bytes differ")


def test_a_red_gate_gives_no_time():
    meter = Scripted([1.0], [1.0], [1.0])
    with pytest.raises(GateFailed, match="group: case: ours: 3 bytes differ"):
        compare(case(red), meter, rounds=1)
    assert meter.log == []
    with pytest.raises(GateFailed):
        compare(case(red), WallMeter(), rounds=1)


def test_run_goes_on_after_a_red_gate_and_ends_red(tmp_path, capsys):
    def broken():
        raise torch.OutOfMemoryError("no memory for this one")

    rc = harness.run("few", [lambda: case(red), broken, lambda: replace(case(), name="good")], WallMeter(), 3, tmp_path)
    printed, document = capsys.readouterr().out, json.loads((tmp_path / "few.json").read_text())
    assert (
        rc == 1 and "gate failed: group: case: ours: 3 bytes differ" in printed and "no memory for this one" in printed
    )
    assert len([line for line in printed.splitlines() if " ms " in line]) == 3 and "group: case " not in printed
    assert {row["case"] for row in document["rows"]} == {"good"} and len(document["failed"]) == 2
    assert document["environment"]["torch"] == torch.__version__ and document["environment"]["commit"]


def test_only_the_red_one_of_ours_gets_no_time(tmp_path, capsys):
    wrong = Contender((lambda: torch.zeros(4),), ours=True)

    def gate(result):
        assert bool(result.all()), "zeros"

    both = case(gate, cuda=wrong, triton=OURS, peer=PEER)
    assert harness.run("one", [lambda: both], WallMeter(), 2, tmp_path) == 1
    rows = json.loads((tmp_path / "one.json").read_text())["rows"]
    assert [row["contender"] for row in rows] == [
        "triton",
        "peer",
        "triton (again)",
    ] and "cuda: zeros" in capsys.readouterr().out
    assert harness.run("none", [lambda: case(gate, cuda=wrong, peer=PEER)], WallMeter(), 2, tmp_path) == 1
    assert harness.run("empty", [lambda: case(gate, peer=PEER)], WallMeter(), 2, tmp_path) == 1
    assert not any(json.loads((tmp_path / f"{stem}.json").read_text())["rows"] for stem in ("none", "empty"))


def test_a_run_that_is_green_says_so(tmp_path):
    assert harness.run("good", [case], WallMeter(), 2, tmp_path) == 0


def test_errors():
    wanted = (torch.arange(4.0), torch.arange(3))
    found = (torch.tensor([0.0, 1.0, 2.0, -3.0]), torch.tensor([0, 1, 258]))
    assert harness.differing_bytes(wanted, wanted) == 0 and harness.differing_bytes(found, wanted) == 2
    with pytest.raises(AssertionError, match="wanted"):
        harness.differing_bytes(found[:1], wanted)
    truth = torch.tensor([3.0, -4.0], dtype=torch.float64)
    assert harness.relative_error(torch.tensor([3.0, -3.0]), truth) == {"max": 0.25, "rms": 0.2}
    with pytest.raises(AssertionError, match="NaN"):
        harness.relative_error(torch.tensor([3.0, torch.nan]), truth)


# ---- timing on a GPU, with the host in its place


class OnHost(CudaMeter):
    """Graphs that run their body again and events of a clock that the calls advance; `lost` captures record nothing."""

    def __init__(self, lost=False, **kwargs):
        super().__init__(l2_bytes=1000, **kwargs)
        self.now, self.captured, self.lost = 0.0, [], lost

    def capture(self, body):
        kept = body()
        self.captured.append(kept)

        def replay():
            for old, new in zip(
                timing.tensors(kept), timing.tensors([] if self.lost else body()), strict=not self.lost
            ):
                old.copy_(new)

        return replay, kept

    def _warm_up(self, contender):
        contender.calls[0]()

    def _synchronize(self):
        pass

    def _flush(self):
        return torch.empty(8)

    def _event(self):
        event = types.SimpleNamespace(at=0.0, synchronize=lambda: None)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda end: end.at - event.at
        return event

    def contender(self, ms, sets=3, **kwargs):
        def call(i):
            self.now += ms
            return torch.full((4,), float(i + 1))

        return Contender(tuple((lambda i=i: call(i)) for i in range(sets)), **kwargs)


def test_a_graph_goes_round_cold_buffers_and_its_time_is_that_of_one_call():
    meter = OnHost()
    seen = []
    sample = meter.prepare(meter.contender(0.5), seen.append)
    assert sample.timed == "graph replay" and sample.kernel_ms() == 0.5 and sample.eager_ms() == 0.5
    # a first turn to estimate, then whole turns that fill 4 ms; one output of each set is kept, the poison overwritten
    assert [len(kept) for kept in meter.captured] == [3, 3]
    assert [t.tolist()[0] for t in meter.captured[1]] == [1.0, 2.0, 3.0]
    assert len({t.data_ptr() for t in meter.captured[1]}) == 3
    assert [t.tolist()[0] for t in seen] == [1.0, 1.0, 3.0, 1.0, 3.0]
    assert sample.energy_mj() is None


def test_work_that_is_not_in_the_graph_is_timed_by_events():
    meter = OnHost(lost=True)
    sample = meter.prepare(meter.contender(0.5), None)
    assert sample.timed == "events, L2 flushed" and sample.kernel_ms() == 0.5 and sample.eager_ms() == 0.5


def test_a_wrong_result_of_a_graph_is_a_red_gate():
    meter = OnHost()
    ours = meter.contender(1.0, sets=2, ours=True)

    def first_set_only(result):
        assert result[0] == 1, "wrong in the other buffers"

    with pytest.raises(GateFailed, match="wrong in the other buffers"):
        compare(case(first_set_only, ours=ours), meter, rounds=1)


def test_energy_is_taken_between_two_ticks_of_the_counter():
    ticks = iter([100.0, 100.0, 130.0, 130.0, 130.0, 170.0])
    meter = OnHost(energy=lambda: next(ticks), energy_s=0.0)
    sample = meter.prepare(meter.contender(2.0, sets=2), None)
    # 40 mJ over three replays of two calls
    assert sample.energy_mj() == pytest.approx(40 / 6)


def test_sets_and_replays():
    assert timing.cold_sets(100, 1000) == 30 and timing.cold_sets(10**9, 1000) == 2
    assert timing.calls_per_replay(1.0, 2) == 4 and timing.calls_per_replay(100.0, 3) == 3
    assert timing.calls_per_replay(1e-9, 3) == 1998 and timing.calls_per_replay(1.0, 5000) == 5000


# ---- bytes


@pytest.mark.parametrize("numel", [1, 63, 64, 65, 16384, 16385, 70_001])
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("nested", [False, True])
def test_byte_formulas_are_those_of_the_tensors(numel, blocksize, nested):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        w = torch.randn(numel).to(dtype)
        packed, state = quantize_4bit(w, blocksize, nested)
        stored = [packed, state.absmax] + ([state.nested_absmax, state.offset] if nested else [])
        few = sum(t.nbytes for t in stored)
        assert roofline.quantize_traffic(numel, dtype, blocksize, nested) == Traffic(w.nbytes, few)
        found = roofline.dequantize_traffic(numel, dtype, blocksize, nested)
        assert found == Traffic(few, dequantize_4bit(packed, state).nbytes) and found.total == few + w.nbytes


def test_the_mixes_are_those_of_the_studies():
    n = 4096 * 4096
    assert str(Mix.of(roofline.dequantize_traffic(n, torch.bfloat16, nested=True))) == "1:4"
    assert str(Mix.of(roofline.quantize_traffic(n, torch.bfloat16, nested=True))) == "4:1"
    assert Mix.of(roofline.dequantize_traffic(n, torch.float32)) == (1, 7)
    assert roofline.dequantize_traffic(n, torch.bfloat16, nested=True).read / n == pytest.approx(0.516, abs=1e-3)


@pytest.mark.parametrize("traffic", [Traffic(25_000, 100_000), Traffic(100_000, 25_000), Traffic(60_000, 60_000)])
def test_the_copy_moves_as_many_bytes(traffic):
    contender = roofline.copy(traffic, "cpu", sets=2)
    written = [call() for call in contender.calls]
    assert contender.ceiling and abs(contender.bytes_moved - traffic.total) <= 4096 * 5 / 2
    reads, writes = Mix.of(traffic)
    assert written[0].nbytes * (reads + writes) == contender.bytes_moved * writes
    assert all(bool((t == 1).all()) for t in written) and written[0].data_ptr() != written[1].data_ptr()
    assert roofline.fastest_tile(traffic, "cpu", 1, None) == roofline.TILES[0]


# ---- the benchmarks themselves


def test_the_host_rows_pass_their_gates(tmp_path):
    assert harness.run("cpu_quantize", bench_quantize.cpu_cases((96, 64)), WallMeter(), 2, tmp_path) == 0
    rows = json.loads((tmp_path / "cpu_quantize.json").read_text())["rows"]
    ours = [row for row in rows if row["contender"] == "nf4lora"]
    assert [row["case"] for row in ours] == ["quantize 96 × 64", "dequantize 96 × 64", "dequantize 96 × 64 into memory that is there"]
    assert all(row["error"]["differing_bytes"] == 0 and row["of_ceiling"] for row in ours)
    assert 0 < ours[1]["error"]["rms"] <= ours[1]["error"]["max"] < 2**-8
    assert {row["contender"] for row in rows} == {"nf4lora", "bitsandbytes", "copy", "nf4lora (again)"}


def test_a_wrong_byte_is_seen():
    found = bench_quantize.quantize_case((96, 64), bench_quantize.Format(), bench_quantize.Setting())
    result = found.contenders["nf4lora"].calls[0]()
    found.gate(result)
    result[0][5] ^= 1
    with pytest.raises(AssertionError, match="1 bytes differ"):
        found.gate(result)


def test_the_gpu_rows_are_the_same_cases(monkeypatch):
    at = bench_quantize.Setting("cpu", ("cpu", "reference"), l2_bytes=50_000)
    monkeypatch.setattr(bench_quantize, "SHAPES", ((96, 64), (64, 64), (32, 64)))
    monkeypatch.setattr(bench_quantize, "SWEEP", (2**12, 2**14))
    cases = [build() for build in bench_quantize.cuda_cases(at)]
    assert [c.name for c in cases[:3]] == ["dequantize 96 × 64", "dequantize 64 × 64", "dequantize 32 × 64"]
    assert [(c.sweep, c.x, c.name) for c in cases if c.x == 2**14] == [
        (s, 2**14, f"{s} 2^14") for s in ("dequantize", "quantize")
    ]
    for c in cases:
        names = list(c.contenders)
        assert names[:2] == ["nf4lora cpu", "nf4lora reference"] and names[-1] == "copy"
        sets = len(c.contenders["copy"].calls)
        assert sets * c.bytes_moved >= 3 * 50_000 and all(len(one.calls) == sets for one in c.contenders.values())
        for name in names[:2]:
            with c.contenders[name].forced():
                for call in c.contenders[name].calls:
                    c.gate(call())


def test_a_gpu_is_asked_for_what_runs_there_and_for_the_copy_of_every_mix(monkeypatch, capsys):
    found = [("cuda", "cuda", None), ("cuda", "triton", "no triton"), ("cuda", "reference", None), ("cpu", "cpu", None)]
    monkeypatch.setattr(bench_quantize.backends, "report", lambda: found)
    monkeypatch.setattr(bench_quantize, "fastest_tile", lambda traffic, *rest: Mix.of(traffic))
    at = bench_quantize.cuda_setting(OnHost())
    assert at.backends == ("cuda",) and at.device == "cuda" and at.l2_bytes == 1000
    assert "triton is not measured: no triton" in capsys.readouterr().out
    for form in (bench_quantize.Format(), bench_quantize.Format(torch.float16), bench_quantize.Format(torch.float32)):
        for traffic in (roofline.dequantize_traffic, roofline.quantize_traffic):
            mix = Mix.of(traffic(4096 * 4096, form.dtype, nested=form.nested))
            assert at.tile(mix) == mix


def test_the_linear_rows_pass_their_gates():
    for backward in (False, True):
        rows = compare(bench_linear.linear_case(8, torch.float32, backward, N=64, K=96), WallMeter(), rounds=1)
        assert rows[0].contender == "nf4lora" and rows[0].error["max"] < 1e-5 and rows[0].x == 8


def test_the_rows_run_under_pytest_benchmark():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "bench/test_cpu_rows.py", "--benchmark-disable", "-pno:cacheprovider"],
        cwd=ROOT,
        env={**os.environ, "NF4LORA_BENCH_SHAPE": "96x64"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "6 passed" in done.stdout, done.stdout + done.stderr


def test_the_sanitizers_driver_compares_with_the_reference(monkeypatch, capsys):
    assert sanitize.check("cpu", "cpu") == (288, 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sanitize.main(["cuda"]) == 1 and "cuda: absent" in capsys.readouterr().out


# ---- environment


def nvml(monkeypatch, **readings):
    """A pynvml whose readings are those given; the others are not supported."""

    class NVMLError(Exception):
        pass

    def module_getattr(name):
        def read(*args):
            if name not in readings:
                raise NVMLError(name)
            return readings[name]

        return read

    fake = types.ModuleType("pynvml")
    fake.NVMLError, fake.NVML_CLOCK_SM, fake.NVML_CLOCK_MEM, fake.NVML_TEMPERATURE_GPU = NVMLError, 1, 2, 0
    fake.__getattr__ = module_getattr
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    device = types.SimpleNamespace(
        name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, L2_cache_size=60, total_memory=7, uuid="u"
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


def test_gpu_readings_through_nvml(monkeypatch):
    nvml(monkeypatch, nvmlInit=None, nvmlDeviceGetHandleByUUID="handle", nvmlDeviceGetClockInfo=1980,
         nvmlDeviceGetEnforcedPowerLimit=700_000, nvmlSystemGetDriverVersion="580.1",
         nvmlDeviceGetTotalEnergyConsumption=5)  # fmt: skip
    found = environment.gpu()
    assert (found["name"], found["compute_capability"], found["sm_mhz"], found["power_limit_w"]) == (
        "NVIDIA H200",
        "9.0",
        1980,
        700,
    )
    assert found["driver"] == "580.1" and found["sm_max_mhz"] is None
    assert environment.energy_counter()() == 5.0


def test_what_nvml_cannot_read_is_null(monkeypatch, tmp_path):
    nvml(monkeypatch, nvmlInit=None, nvmlDeviceGetHandleByUUID="handle")
    assert environment.energy_counter() is None
    nvml(monkeypatch)  # not even started
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.energy_counter() is None and environment.gpu()["sm_mhz"] is None
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '580.159.04, 1980, 1980, 3201, [N/A], 700.00, 33'\n")
    smi.chmod(0o755)
    found = environment.gpu()
    assert (found["driver"], found["sm_mhz"], found["memory_max_mhz"], found["power_limit_w"]) == (
        "580.159.04",
        1980.0,
        None,
        700.0,
    )


def test_the_commit_can_be_told(monkeypatch):
    monkeypatch.setenv("NF4LORA_COMMIT", "told")
    assert environment.environment()["commit"] == "told"


# ---- report


def gpu_document():
    gpu = {"name": "NVIDIA H200", "sm_mhz": 1755.0, "sm_max_mhz": 1980, "memory_mhz": None, "memory_max_mhz": 3201,
           "power_limit_w": 700.0, "driver": "580.1", "cuda_runtime": "13.0"}  # fmt: skip
    found = environment.environment() | {
        "gpu": gpu,
        "triton": "3.6.0",
        "bitsandbytes": None,
        "torch": "2.11",
        "commit": "c",
        "date": "d",
    }
    rows = []
    for name, sweep, x in (
        ("dequantize 64 × 64", None, None),
        ("dequantize 2^12", "dequantize", 2**12),
        ("dequantize 2^14", "dequantize", 2**14),
    ):
        row = {"group": "bfloat16, NF4", "case": name, "timed": "graph replay", "rounds": 15, "ratio": [1.0] * 3,
               "eager_ms": [0.05] * 3, "energy_mj": None, "bytes_moved": 42, "sweep": sweep, "x": x,
               "error": {"differing_bytes": 0, "max": 0.002, "rms": 0.001}}  # fmt: skip
        rows += [
            row | {"contender": "nf4lora cuda", "time_ms": [0.0381, 0.038, 0.039], "of_ceiling": [0.92, 0.9, 0.93]},
            row
            | {
                "contender": "bitsandbytes",
                "time_ms": [0.08] * 3,
                "ratio": [2.1] * 3,
                "of_ceiling": [0.4] * 3,
                "timed": "events, L2 flushed",
            },
            row | {"contender": "copy", "time_ms": [1e-5] * 3, "of_ceiling": [1.0] * 3},
            row | {"contender": "nf4lora cuda (again)", "time_ms": [0.04] * 3, "of_ceiling": [0.9] * 3},
        ]
    return {"environment": found, "rows": rows, "failed": ["group: case: nf4lora triton: 3 bytes differ\nmore"]}


def test_readme_is_what_the_report_makes_of_the_results():
    text = (ROOT / "README.md").read_text()
    assert report.renew(text, files.load(ROOT / "bench" / "results")) == text
    regions = {m[2] for m in report.REGION.finditer(text)}
    assert regions >= {"methods", "cpu_isas", "cuda_quantize"}
    assert text.count("<!-- bench:") == text.count("<!-- /bench -->") == len(report.REGION.findall(text))


def test_tables_of_a_gpu():
    text = report.markdown(gpu_document())
    assert text.startswith(
        "NVIDIA H200 (SM 1755 of 1980 MHz, memory ? of 3201 MHz, 700 W), driver 580.1, CUDA 13.0, torch 2.11, "
        "triton 3.6.0, bitsandbytes absent; commit c, d:\n"
    )
    assert (
        "| bfloat16, NF4 | nf4lora cuda | bitsandbytes | of a copy's speed | again | eager call | energy | error |"
        in text
    )
    assert (
        "| dequantize 64 × 64 | 38.1 µs | 2.10† [2.10 … 2.10] | 92% [90 … 93] of 4 GB/s | 1.00 [1.00 … 1.00] | "
        "50.0 µs | not measured | 0 bytes, max 2.0e-03, rms 1.0e-03 |"
    ) in text
    assert (
        text.count("| bfloat16, NF4 |") == 2
        and "Failed, so not timed: group: case: nf4lora triton: 3 bytes differ" in text
    )
    assert report.markdown(gpu_document(), tables=1).count("| bfloat16, NF4 |") == 1


def test_without_the_first_contender_nothing_is_compared():
    document = gpu_document()
    del document["rows"][4]
    assert "| dequantize 2^12 | not measured | – | – | – | – | – | – |" in report.markdown(document)


def test_regions():
    text = "a\n<!-- bench:new -->\nold\n<!-- /bench -->\nb\n<!-- bench:none -->\n<!-- /bench -->\n"
    renewed = report.renew(text, {"new": gpu_document()})
    assert (
        "old" not in renewed
        and "38.1 µs" in renewed
        and renewed.endswith(f"<!-- bench:none -->\n{report.NEEDS_GPU}\n<!-- /bench -->\n")
    )
    assert (
        report.renew(renewed, {"new": gpu_document()}) == renewed and renewed.startswith("a\n") and "\nb\n" in renewed
    )
    with pytest.raises(ValueError, match="no tables"):
        report.renew(text, {"new": {"kernels": []}})


def test_report_writes_plots_and_readme_and_leaves_strange_files_alone(tmp_path, capsys):
    files.write(tmp_path / "gpu.json", gpu_document())
    files.write(tmp_path / "linear.json", json.loads((ROOT / "bench/results/cpu_linear.json").read_text()))
    for name, strange in {
        "odd": {"kernels": {}},
        "odder": {"environment": {}, "rows": {"a": 1}},
        "oddest": {"environment": {}, "rows": [1]},
    }.items():
        files.write(tmp_path / f"{name}.json", strange)
    readme = tmp_path / "README.md"
    readme.write_text("<!-- bench:gpu -->\n<!-- /bench -->\n")
    assert report.main(["--results", str(tmp_path), "--readme", str(readme), "--write"]) == 0
    assert {p.name for p in tmp_path.glob("*.png")} == {"gpu.png", "linear.png"}
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in tmp_path.glob("*.png"))
    assert "38.1 µs" in readme.read_text() and "### linear" in capsys.readouterr().out


def test_a_results_file_is_replaced_whole(tmp_path):
    files.write(tmp_path / "a.json", {"rows": [{"time": Spread(1.0, 2.0, 3.0)}], "empty": []})
    with pytest.raises(ValueError, match="JSON"):
        files.write(tmp_path / "a.json", {"rows": [{"time": float("nan")}]})
    assert files.load(tmp_path) == {"a": {"rows": [{"time": [1.0, 2.0, 3.0]}], "empty": []}}


# ---- the report of a GPU, with small steps


def step(name, *codes, share_s=1.0, gate=True):
    return gpu_report.Step(name, tuple((gpu_report.PYTHON, "-c", code) for code in codes), share_s, gate)


def states(out):
    found = json.loads((out / "gpu_report.json").read_text())
    return {s["name"]: s["state"] for s in found["steps"]}, found["green"]


HANG = "import time; print('begun', flush=True); time.sleep(600)"


def test_steps_fail_hang_and_miss_without_stopping_the_next(tmp_path):
    planned = [
        step("good", "print('one')", "print('two')"),
        step("bad", "print('before'); raise SystemExit(3)", "print('never')"),
        step("hangs", HANG, share_s=0.2),
        gpu_report.Step("missing", (("no-such-program",),), 1.0, gate=False),
        step("last", "import os; print('told', os.environ['TOLD'])", share_s=60.0),
    ]
    outcomes = gpu_report.run(planned, tmp_path, 2.0, {**os.environ, "TOLD": "so"})
    assert states(tmp_path) == (
        {"good": "ok", "bad": "failed", "hangs": "timeout", "missing": "absent", "last": "ok"},
        False,
    )
    by_name = {outcome.name: outcome for outcome in outcomes}
    assert (
        by_name["bad"].rc == 3 and "before" in by_name["bad"].tail and "never" not in by_name["bad"].tail.splitlines()
    )
    assert "begun" in by_name["hangs"].tail and "told so" in by_name["last"].tail and "two" in by_name["good"].tail
    assert "no-such-program is not on the PATH" in (tmp_path / "gpu_report.log").read_text()
    assert not gpu_report.green(outcomes) and gpu_report.green([o for o in outcomes if o.state in ("ok", "absent")])
    text = gpu_report.summary(outcomes, tmp_path)
    assert "### bad: failed" in text and text.endswith("NOT all gates are green")


def test_without_time_nothing_is_begun(tmp_path):
    outcomes = gpu_report.run([step("first", HANG), step("second", HANG)], tmp_path, 0.0, dict(os.environ))
    assert [o.state for o in outcomes] == ["no time left"] * 2 and states(tmp_path)[1] is False


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=lambda s: s.name)
def test_what_was_done_survives_a_kill(tmp_path, how):
    code = f"""
import os, sys
sys.path.append({str(ROOT)!r})
from pathlib import Path
from bench import gpu_report as g
one = g.Step("one", ((g.PYTHON, "-c", "print('done')"),), 10.0)
code = "import os, time; print('pid', os.getpid(), flush=True); time.sleep(600)"
two = g.Step("two", ((g.PYTHON, "-c", code),), 500.0)
g.steps = lambda *args: [one, two]
sys.exit(g.main(["--out", {str(tmp_path)!r}]))
"""
    log = tmp_path / "gpu_report.log"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not (log.exists() and "\npid " in log.read_text()):
            time.sleep(0.05)
        process.send_signal(how)
    child = int(log.read_text().split("\npid ")[1].split()[0])
    assert states(tmp_path) == ({"one": "ok", "two": "running"}, False) and "done" in log.read_text()
    if how == signal.SIGTERM:
        assert process.returncode == 143
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)
    else:
        os.kill(child, signal.SIGKILL)


def test_dry_run_lists_the_steps_within_the_time(tmp_path, capsys):
    assert gpu_report.main(["--dry-run", "--out", str(tmp_path / "out"), "--minutes", "9"]) == 0
    printed = capsys.readouterr().out
    for part in (
        "build",
        "tests",
        "bench.bench_quantize",
        "bench.bench_optim --only resident,moves,hidden",
        "bench.puzzle",
        "selftest cuda triton",
        "memcheck",
        "synccheck",
        "golden",
        "doctor",
    ):
        assert part in printed
    assert printed.splitlines()[-1].startswith(" 540 s  in all") and not (tmp_path / "out").exists()
    planned = gpu_report.steps(tmp_path, tmp_path)
    assert sum(s.share_s for s in planned) <= 9 * 60 - gpu_report.WRAP_UP_S
    assert [s.name for s in planned[:4]] == ["environment", "build", "machine", "tests"] and len(
        {s.name for s in planned}
    ) == len(planned)
    assert gpu_report.main(["--dry-run", "--only", "build, tests"]) == 0
    assert "memcheck" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        gpu_report.main(["--dry-run", "--only", "nonsense"])


def test_steps_see_the_installed_package_first(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "_arch", lambda: "90a")
    peers = tmp_path / "peers"
    found = gpu_report.environment(tmp_path / "site", peers, "abc")
    paths = found["PYTHONPATH"].split(os.pathsep)
    assert paths[:4] == [str(peers), str(tmp_path / "site"), str(ROOT), str(ROOT / "tests")]
    assert (found["PYTHONSAFEPATH"], found["NF4LORA_COMMIT"], found["NF4LORA_CUDA_ARCHS"]) == ("1", "abc", "90a")
    gpu_report._assemble(tmp_path / "site")
    assert (tmp_path / "site/nf4lora/triton_kernels/__init__.py").is_file() and (
        tmp_path / "site/nf4lora/ops.py"
    ).is_file()
    tests = gpu_report.steps(tmp_path, tmp_path / "site")[3].commands[0]
    assert "tests/test_quantize.py" in tests and "-k" in tests


def test_the_reports_own_process_needs_neither_torch_nor_the_package():
    seen = "print({'torch', 'nf4lora'} & {*sys.modules})"
    code = f"import sys; sys.path.append({str(ROOT)!r}); import bench.gpu_report; {seen}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
