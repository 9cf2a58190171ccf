"""The table of the host's instruction sets, at toy size and from figures made up. No test reads the clock."""

import json
import os
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))  # behind what is installed: bench is not

from bench import bench_cpu, cpu_isas, cpu_memory, cpu_targets, harness, report
from bench.cpu_isas import isas
from bench.cpu_targets import MEBIBYTE, TARGETS
from bench.timing import WallMeter
from nf4lora import native, ops

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPES = {"q_proj": (96, 64), "k_proj": (32, 64), "v_proj": (32, 64)}


@pytest.fixture
def two(monkeypatch):
    """The best and the worst of the sets that are here, by name."""
    monkeypatch.setattr(bench_cpu, "last_cache", lambda: 5000)
    found = isas()
    chosen = {name: found[name] for name in (next(iter(found)), "portable")}
    monkeypatch.setattr(bench_cpu, "isas", lambda: chosen)
    return chosen


def tiny():
    absent = []
    return [
        partial(bench_cpu.quantize_case, 96, 64), partial(bench_cpu.dequantize_case, 96, 64),
        *(partial(bench_cpu.forward_case, M, cold, 96, 64) for M, cold in ((1, True), (16, True), (512, True), (1, False))),
        partial(bench_cpu.training_case, absent, 96, 64), partial(bench_cpu.group_case, tuple(SHAPES), absent, SHAPES),
    ], absent  # fmt: skip


def test_every_set_has_a_library_of_its_own(monkeypatch):
    monkeypatch.setenv("NF4LORA_CPU_ISA", "")
    before, prepared = native.host.isa(), ops.linear_fwd.prepared
    for name, isa in isas().items():
        with isa.used():
            assert native.host.isa() == name and ops.linear_fwd.prepared is not prepared
        assert native.host.isa() == before and ops.linear_fwd.prepared is prepared
    assert "portable" in isas() and list(isas()) == [name for name in cpu_targets.ISAS if name in isas()]
    cpu_isas.isas.__wrapped__()
    assert os.environ["NF4LORA_CPU_ISA"] == ""


def test_all_rows_pass_and_make_the_table(two, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cpu_memory, "peak", lambda isa, *shape: 3 * MEBIBYTE)
    best = next(iter(two))
    chosen, absent = tiny()
    assert bench_cpu.measure(tmp_path, chosen, absent, 2, 96, 64) == 0
    document, printed = json.loads((tmp_path / "cpu_isas.json").read_text()), capsys.readouterr().out
    assert document["isas"] == list(two) and document["failed"] == []
    assert ("amx" in two) != ("amx: not run here, this processor lacks it" in absent)
    rows = {(row["case"], row["contender"]): row for row in document["rows"]}
    for case in ("quantize", "dequantize", "forward M=1", "forward M=16", "forward M=512", "forward M=1, weight in a cache",
                 "forward + backward M=512", "q, k, v M=512"):  # fmt: skip
        assert rows[case, best]["over"] == {best: [1.0] * 3, "portable": rows[case, best]["over"]["portable"]}
        assert rows[case, "portable"]["ratio"] == rows[case, "portable"]["over"][best]
    assert {c for of, c in rows if of == "forward M=1"} == {
        best, "portable", "bitsandbytes in eval()", "bitsandbytes in eval() + LoRA", "bitsandbytes + LoRA", "torch's bf16 linear",
        "read", f"{best} (again)",
    }  # fmt: skip
    assert rows["forward M=1", best]["of_ceiling"] and rows["forward M=512", best]["flops"] == 2 * 512 * 96 * 64
    assert {c for of, c in rows if of == "q, k, v M=512"} >= {best, f"{best} one by one", "portable one by one"}
    header, lines = report.contents(document)[0]
    assert header[1:] == ["wanted", *two, *(name for name in cpu_targets.ISAS if name not in two)]
    assert all(line[-1] == "not run here" and len(line) == len(header) for line in lines)
    assert lines[-1][:3] == ["forward + backward M=512, peak extra memory", "≤ 8 MiB", "3.0 MiB"]
    measured = [line[0] for line in lines if line[2] != "not measured"]
    assert len(measured) == len(TARGETS) - 3 + 3  # without gate and up and both trainings; with the limits and the memory
    assert report.markdown(document, 1).count("|---|") == 1 and printed.count("reached") >= 2


def test_steps_of_finetune(two, tmp_path):
    assert harness.run("steps", [partial(bench_cpu.step_case, 256, 1, 16), bench_cpu.demo_case], WallMeter(), 2, tmp_path) == 0
    rows = json.loads((tmp_path / "steps.json").read_text())["rows"]
    best = next(iter(two))
    for case, tokens in ((cpu_targets.STEP, 16), (cpu_targets.DEMO, 4 * 128)):
        of = {row["contender"]: row for row in rows if row["case"] == case}
        assert set(of) == {*two, "bf16 LoRA", f"{best} (again)"} and of[best]["tokens"] == tokens
        assert set(of["bf16 LoRA"]["over"]) == set(two)


class Idle:
    """A library whose functions do nothing."""

    def __getattr__(self, name):
        return lambda params: None


@pytest.mark.parametrize("number", [*range(5), 6, 7])
def test_a_set_that_computes_nothing_gets_no_time(two, number, monkeypatch, tmp_path):
    best = next(iter(two))
    fresh = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: fresh(*args, **kwargs).zero_())  # not what was there
    monkeypatch.setattr(two["portable"], "load", lambda: (Idle(), None))
    assert harness.run("wrong", [tiny()[0][number]], WallMeter(), 1, tmp_path) == 1
    document = json.loads((tmp_path / "wrong.json").read_text())
    assert len(document["failed"]) in (1, 2) and all(": portable" in why for why in document["failed"])
    contenders = {row["contender"] for row in document["rows"]}
    assert best in contenders and not any("portable" in name for name in contenders)


@pytest.mark.parametrize("filled", [0.0, torch.nan])
def test_a_step_with_another_loss_or_gradient_gets_no_time(two, filled, monkeypatch, tmp_path):
    fresh = torch.Tensor.new_empty

    def new_empty(*args, **kwargs):
        made = fresh(*args, **kwargs)
        return made.fill_(filled if made.is_floating_point() else 0)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(two["portable"], "load", lambda: (Idle(), None))
    assert harness.run("wrong", [partial(bench_cpu.step_case, 256, 1, 16)], WallMeter(), 1, tmp_path) == 1
    document = json.loads((tmp_path / "wrong.json").read_text())
    assert len(document["failed"]) == 1 and ": portable" in document["failed"][0], document["failed"]
    assert {row["contender"] for row in document["rows"]} >= {next(iter(two)), "bf16 LoRA"}


@pytest.mark.parametrize("cold", [False, True])
def test_weights_take_turns_unless_the_cache_may_hold_them(two, cold):
    case = bench_cpu.forward_case(1, cold, 96, 64)
    for name, contender in case.contenders.items():
        operands = {call.args[0] if hasattr(call, "args") else call.__self__ for call in contender.calls}
        assert len(operands) == (len(contender.calls) if cold else 1) and len(contender.calls) > 1, name
        assert len(contender.calls) * contender.bytes_moved >= 3 * 5000


def test_memory_beyond_what_is_allowed_is_a_failure(two, monkeypatch, tmp_path):
    def peak(isa, *shape):
        if isa != "portable":
            raise RuntimeError("peak memory: no kernels")
        return 9 * MEBIBYTE

    monkeypatch.setattr(cpu_memory, "peak", peak)
    monkeypatch.setattr(two["portable"], "load", lambda: (Idle(), None))
    assert bench_cpu.measure(tmp_path, tiny()[0][:1], [], 1) == 1
    document = json.loads((tmp_path / "cpu_isas.json").read_text())
    assert ": portable: " in document["failed"][0] and document["failed"][1:] == [
        "peak memory: no kernels", "peak extra memory with portable: 9437184 bytes, wanted 8388608 or less"
    ]  # fmt: skip
    header, lines = cpu_targets.summary(document)
    assert {len(line) for line in lines} == {len(header)}  # whatever is missing
    assert lines[0][3] == "not measured" != lines[0][2] and lines[-1][2:4] == ["not measured", "9.0 MiB ✗"]


def test_peak_memory_sees_a_temporary():
    assert cpu_memory.peak("portable", 1024, 1024, 8) <= MEBIBYTE < cpu_memory.peak("portable", 1024, 1024, 8, "reference")
    with pytest.raises(RuntimeError, match="peak memory with sse: .*NF4LORA_CPU_ISA"):
        cpu_memory.peak("sse", 64, 64, 1)


def made_up(ours, **others):
    def row(case, contender, ms, **more):
        return {"case": case, "contender": contender, "time_ms": [ms] * 3, "over": {"avx2": [ms / ours] * 3}, "of_ceiling": None,
                "tokens": None} | more  # fmt: skip

    cases = dict.fromkeys(target.case for target in TARGETS)
    found = []
    for case in (*cases, "forward M=512"):
        tokens = 100 if "step" in case else None
        found.append(row(case, "avx2", ours, of_ceiling=[0.5, 0.4, 0.6], bytes_moved=8e6, flops=1e9, tokens=tokens))
        found += [row(case, name.replace("_", " "), ms) for name, ms in others.items()]
        found.append(row(case, cpu_targets.TORCH, 2.0))
    return {"rows": found, "isas": ["avx2"], "memory": {"avx2": 9 * MEBIBYTE}}


def test_what_is_reached():
    document = made_up(2.0, bitsandbytes=100.0, dense_linears_plus_peft=1.0)
    document["rows"].append(document["rows"][0] | {"case": "forward + backward M=512", "contender": "dense linears + peft",
                                                   "time_ms": [1.6, 1.0, 2.0], "over": {"avx2": [0.8, 0.5, 1.0]}})  # fmt: skip
    found = {line[0]: line[1:] for line in cpu_targets.rows(document, "avx2")}
    assert found["quantize, bitsandbytes' time over ours"] == ("2 ms", "50.00 [50.00 … 50.00]", "≥ 50", True)
    assert found["dequantize, of a copy's speed"] == ("2 ms", "50% [40 … 60]", "≥ 60%", False)
    assert found["forward M=1, torch's bf16 linear over ours"] == ("2 ms", "1.00 [1.00 … 1.00]", "≥ 2.2, avx2 ≥ 1", True)
    assert found["forward M=16, torch's bf16 linear over ours"][3] is False
    assert found["forward + backward M=512, ours over bf16 linear + LoRA"] == ("2 ms", "1.25 [1.00 … 2.00]", "≤ 1.05", False)
    assert found["forward M=1, bitsandbytes' faster mode over ours"] == ("not measured", "–", "≥ 1.1", None)
    assert found["forward M=1, of the measured read bandwidth"] == ("4.0 GB/s", "50% [40 … 60]", "–", None)
    assert found["forward M=512, of torch's bf16 product"] == ("500 GFLOP/s", "100% [100 … 100]", "–", None)
    assert found["forward + backward M=512, peak extra memory"] == ("9.0 MiB", "–", "≤ 8 MiB", False)
    header, lines = cpu_targets.summary(document)
    assert header[2:] == ["avx2", *(name for name in cpu_targets.ISAS if name != "avx2")]
    cells = {line[0]: line[2:4] for line in lines}
    assert cells["dequantize, of a copy's speed"] == ["50% [40 … 60] ✗", "not run here"]
    text = cpu_targets.text(document)
    assert text.startswith("amx: not run here\n") and "portable: not run here" in text and text.count("short") == 4, text


def test_the_faster_of_two_peers_counts():
    document = made_up(2.0)
    for name, ms in ((cpu_targets.EVAL, 3.0), (cpu_targets.TRAIN_LORA, 9.0)):
        row = next(row for row in document["rows"] if (row["case"], row["contender"]) == ("forward M=1", cpu_targets.TORCH))
        document["rows"].append(row | {"contender": name, "time_ms": [ms] * 3, "over": {"avx2": [ms / 2] * 3}})
    found = {line[0]: line[1:] for line in cpu_targets.rows(document, "avx2")}
    assert found["forward M=1, bitsandbytes' faster mode over ours"][1:] == ("1.50 [1.50 … 1.50]", "≥ 1.1", True)
