"""`nf4lora bench` in tiny sizes: its tables, its files, who is absent, and what a wrong result does. No test reads the clock."""

import json
import re
from pathlib import Path

import pytest
import torch
from commands import in_process, refused

from nf4lora.bench import bench_quantize, peers, suite
from nf4lora.bench import methods as table
from nf4lora.cli import bench

pytestmark = pytest.mark.usefixtures("one_thread")
MACHINE = {"processor": "p", "cores": 1, "isa": "i", "torch": "t", "commit": "c", "date": "d"}
TINY = suite.Quick(shape=(96, 64), rows=(1, 3), layer_rows=2, layers=1, rounds=3, steps=2)


@pytest.fixture
def nf4lora(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(suite, "QUICK", TINY)
    return in_process(capsys, monkeypatch, tmp_path, "bench")


def test_what_is_asked_for_is_measured_printed_and_kept(nf4lora):
    code, out, err = nf4lora("linear", "quantize", "linear", "--device", "cpu", "--out", "a/b")
    assert code == 0, err
    assert [p.name for p in sorted(Path("a/b").iterdir())] == ["cpu_linear.json", "cpu_quantize.json"]
    assert out.index("forward M=1") < out.index("quantize 96 × 64") and out.count("forward M=1 ") == 1 and out.endswith("saved in a/b\n")
    head = next(line for line in out.splitlines() if "bfloat16, NF4" in line)
    assert [cell.strip() for cell in re.split("[┃│]", head)[2:-1]] == ["nf4lora", "bitsandbytes", "of a copy's speed", "again", "error"]
    assert re.search(r"│ dequantize 96 × 64 +│ +[\d.]+ [mµ]s │ +[\d.]+ \[[\d.]+ … [\d.]+\] │ +\d+% \[\d+ … \d+\] of \d+ GB/s │", out)
    assert "forward + backward M=3" in out and "0 bytes" in out and "commit" in out
    assert "quantize 96 × 64" in err  # a line a row, while it runs


def test_json_alone_on_stdout_is_what_the_files_hold(nf4lora):
    code, out, _ = nf4lora("--json", "quantize", "--device", "cpu")
    assert code == 0
    assert json.loads(out) == {"quantize": json.loads(Path("nf4lora-bench/cpu_quantize.json").read_text())}
    assert {row["rounds"] for row in json.loads(out)["quantize"]["rows"]} == {3}


def test_by_default_kernels_are_measured(nf4lora, monkeypatch):
    ran = []

    def one(device, out, quick, watch):
        ran.append((device, quick))
        (out / f"{suite.stem(bench.DEFAULT[len(ran) - 1], device)}.json").write_text('{"environment": {}, "rows": [], "failed": []}')
        return 0

    monkeypatch.setattr(suite, "WHATS", dict.fromkeys(bench.WHATS, one))
    assert nf4lora("--json")[0] == 0 and ran == [("cuda" if torch.cuda.is_available() else "cpu", TINY)] * 3
    assert tuple(suite.WHATS) == bench.WHATS
    ran.clear()
    assert nf4lora("--json", "--full")[0] == 0 and [quick for _, quick in ran] == [None] * 3


def test_a_wrong_result_gets_no_time_and_exit_code_1(nf4lora, monkeypatch):
    Path("nf4lora-bench").mkdir()
    Path("nf4lora-bench/cpu_quantize.json").write_text("of an earlier run")
    packed_and_state = bench_quantize.functional.quantize_4bit
    exact, wrong = bench_quantize._exact, []

    def quantize_4bit(*args, **kwargs):
        packed, state = packed_and_state(*args, **kwargs)
        return (packed ^ 1 if wrong else packed), state

    def gate(wanted):  # the reference's result is there; from here on ours is wrong
        wrong.append(True)
        return exact(wanted)

    monkeypatch.setattr(bench_quantize.functional, "quantize_4bit", quantize_4bit)
    monkeypatch.setattr(bench_quantize, "_exact", gate)
    code, out, err = nf4lora("quantize", "--device", "cpu")
    assert code == 1 and "Traceback" not in err
    assert "bytes differ from the reference's" in " ".join(out.split())
    rows = json.loads(Path("nf4lora-bench/cpu_quantize.json").read_text())["rows"]
    assert {row["case"] for row in rows} == {"dequantize 96 × 64", "dequantize 96 × 64 into memory that is there"} and "│ quantize" not in out


def test_peers_that_are_not_installed_are_named_and_no_error(nf4lora, monkeypatch):
    def why_not(*packages, device="cpu"):
        return next((f"{name} cannot be imported" for name in packages if name == "bitsandbytes"), None)

    monkeypatch.setattr(peers, "why_not", why_not)
    monkeypatch.setattr(bench_quantize, "bitsandbytes", lambda: None)
    monkeypatch.setattr("nf4lora.bench.bench_optim_cases.why_not", why_not)
    code, out, _ = nf4lora("quantize", "linear", "optim", "--device", "cpu")
    assert code == 0
    said = " ".join(out.split())
    assert said.count("Not there, so not timed: bitsandbytes: bitsandbytes cannot be imported") == 2
    assert "Not there, so not timed: AdamW, 8 bits, bitsandbytes: bitsandbytes cannot be imported" in said
    assert "┃ bitsandbytes" not in out and "torch fused" in out and "launches" not in out


def test_layers_calls_and_models_run_too(nf4lora, monkeypatch):
    code, out, err = nf4lora("layer", "host", "--device", "cpu")
    assert code == 0, out
    assert "forward + backward M=2" in out and "host cost, q, k, v" in out
    assert {p.name for p in Path("nf4lora-bench").iterdir()} == {"cpu_layer.json", "cpu_host.json"}


def test_methods_take_the_demonstrations_settings(nf4lora, monkeypatch):
    seen = []

    def measure(out, settings):
        seen.append(settings)
        document = {"environment": MACHINE, "methods": {"steps": settings.max_steps, "load_before": 0.5}}
        (out / "methods.json").write_text(json.dumps(document | {"rows": [], "failed": ["x: y"]}))
        return 1

    monkeypatch.setattr(table, "measure", measure)
    code, out, _ = nf4lora("methods")
    assert code == 1 and "2 steps each" in out and "Failed, so not timed: x: y" in out
    nf4lora("methods", "--full")
    assert [of.max_steps for of in seen] == [2, table.DEMO.max_steps]


def test_the_cases_of_a_gpu_are_its_first(monkeypatch, tmp_path):
    """Without a GPU: which cases would run, of the repository's own, most important first."""
    taken = []
    monkeypatch.setattr(suite, "run", lambda stem, cases, meter, rounds, out, absent=(): taken.append((stem, len(cases))) or 0)
    monkeypatch.setattr(peers, "why_not", lambda *packages, device: None)
    monkeypatch.setattr(suite, "meter_for", lambda device: type("Meter", (), {"l2_bytes": 50 * 2**20}))
    monkeypatch.setattr(bench_quantize, "cuda_setting", lambda meter: bench_quantize.Setting("cuda", ("cuda",), meter.l2_bytes))
    monkeypatch.setattr(suite.bench_layer, "LayerMeter", lambda: type("Meter", (), {"l2_bytes": 50 * 2**20}))
    for full in (False, True):
        for what in ("quantize", "linear", "layer"):
            assert suite.suite(what, "cuda", tmp_path, full, list) == 0
    assert taken[:3] == [(f"cuda_{what}", TINY.first) for what in ("quantize", "linear", "layer")]
    assert all(count > 10 for _, count in taken[3:])


def test_an_interrupted_run_says_where_the_rows_are(nf4lora, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(suite, "WHATS", {**suite.WHATS, "optim": interrupted})
    code, out, err = nf4lora("optim", "--device", "cpu")
    assert code == 130 and out == "" and err == "nf4lora: stopped: during optim; what was measured before is in nf4lora-bench\n"


def test_bad_input(nf4lora):
    refused(nf4lora("linaer", "quantize"), "WHAT: found linaer, wanted some of quantize, linear")
    refused(nf4lora("--device", "tpu"), "--device: found tpu, wanted cpu or cuda")
    if not torch.cuda.is_available():
        refused(nf4lora("--device", "cuda"), "--device: found cuda, but torch sees no GPU here")
    Path("file").write_text("")
    refused(nf4lora("quantize", "--out", "file/x"), "--out: file/x cannot be written", "wanted a folder")
    assert [p.name for p in Path().iterdir()] == ["file"]


def test_help_has_an_example(nf4lora):
    code, out, _ = nf4lora("--help")
    assert code == 0 and "Example: nf4lora bench linear optim" in " ".join(out.split()) and "methods" in out
    assert all(what in out for what in bench.WHATS)
