"""The table of back ends: what is forced runs or refuses with its reasons, and never falls back."""

import threading

import pytest
import torch

from nf4lora import backends, heuristics, linear_4bit, native, ops, selftest, triton_rows
from nf4lora.testing import random_case

pytestmark = pytest.mark.usefixtures("one_thread")
A = torch.zeros(64)


@pytest.fixture
def calls(monkeypatch):
    """(op, back end) of every op that runs."""
    seen = []

    def spy(key, row):
        def call(*args):
            seen.append(key)
            return row.call(*args)

        return backends.Row(call, row.why_not, row.configure)

    monkeypatch.setattr(backends, "_ROWS", {key: spy(key, row) for key, row in backends._ROWS.items()})
    return seen


def test_the_first_that_can_runs(calls):
    ops.quantize(A, 64, "nf4")
    with backends.use_backend("reference"):
        ops.quantize(A, 64, "nf4")
    assert calls == [("quantize", "cpu"), ("quantize", "reference")]


def test_unknown_name():
    with pytest.raises(ValueError, match=r"found 'tpu', wanted one of \('cuda', 'triton', 'reference', 'cpu'"), backends.use_backend("tpu"):
        pass
    assert backends.forced() is None


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_forced_back_end_never_falls_back(calls, monkeypatch, name):
    monkeypatch.setattr(triton_rows, "interpreted", lambda: False)
    with backends.use_backend(name), pytest.raises(NotImplementedError, match=rf"nf4lora::quantize on cpu.*\n  {name}: "):
        ops.quantize(A, 64, "nf4")
    assert calls == []


def test_a_refusal_lists_every_back_end_and_its_reason(monkeypatch):
    def refuse(reason):
        return lambda *args: reason

    rows = {("quantize", n): backends.Row(None, refuse(f"{n} is ill"), None) for n in ("cpu", "reference")}
    monkeypatch.setattr(backends, "_ROWS", rows)
    with pytest.raises(NotImplementedError) as error:
        ops.quantize(A, 64, "nf4")
    assert str(error.value).splitlines()[1:] == ["  cpu: cpu is ill", "  reference: reference is ill"]
    monkeypatch.setattr(backends, "_ROWS", {})
    with pytest.raises(NotImplementedError, match="has no kernel for this op"):
        ops.quantize(A, 64, "nf4")


def test_row_42_without_the_library_the_reference_runs_and_the_reason_is_kept(monkeypatch, calls):
    monkeypatch.setattr(native.host, "load", lambda: (None, "libnf4lora_cpu.so was not built"))
    ops.quantize(A, 64, "nf4")
    assert calls == [("quantize", "reference")]
    with backends.use_backend("cpu"), pytest.raises(NotImplementedError, match="cpu: libnf4lora_cpu.so was not built"):
        ops.quantize(A, 64, "nf4")
    assert native.host.isa() is None
    assert ("cpu", "cpu", "libnf4lora_cpu.so was not built") in backends.report()


def test_the_library_says_why_it_does_not_load(monkeypatch, tmp_path):
    (tmp_path / "libnf4lora_cpu.so").write_text("no ELF")
    for folder, words in ((tmp_path, "does not load"), (tmp_path / "elsewhere", "was not built")):
        monkeypatch.setattr(native, "__file__", str(folder / "native.py"))
        assert words in native.HostLibrary.load.__wrapped__(native.host)[1]


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_the_backward_follows_the_forward(calls, name):
    case = random_case(5, 12, 64, 3)
    calls.clear()
    x, lora_A = case.x.requires_grad_(), case.lora_A.requires_grad_()
    with backends.use_backend(name):
        y = linear_4bit(x, case.packed, case.state, None, lora_A, case.lora_B)
    y.sum().backward()
    assert calls == [(op, name) for op in ("linear_fwd", "linear_grads", "lora_bwd", "linear_bwd")]
    assert backends.forced() is None


def test_nested_uses_restore_the_outer_one():
    with backends.use_backend("cpu"):
        with pytest.raises(ZeroDivisionError), backends.use_backend("reference"):
            assert backends.forced() == "reference"
            1 / 0
        assert backends.forced() == "cpu"
    assert backends.forced() is None


def test_another_thread_is_not_forced():
    seen = []
    with backends.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(backends.forced()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_float64_is_for_the_reference_by_name_only():
    case = random_case(5, 12, 64, 3)
    with pytest.raises(TypeError, match="float64"):
        linear_4bit(case.x.double(), case.packed, case.state)
    with backends.use_backend("cpu"), pytest.raises(TypeError, match="float64"):
        linear_4bit(case.x.double(), case.packed, case.state)
    with backends.use_backend("reference"):
        assert linear_4bit(case.x.double(), case.packed, case.state).dtype == torch.float64


def test_report_names_every_back_end_once():
    report = backends.report()
    assert [(r.device, r.backend) for r in report] == [(d, b) for d, order in backends.PRIORITY.items() for b in order]
    by_name = {(r.device, r.backend): r.why_not for r in report}
    assert by_name["cpu", "cpu"] is None and by_name["cpu", "reference"] is None
    if not torch.cuda.is_available():
        assert all(by_name["cuda", b] for b in backends.PRIORITY["cuda"])


@pytest.mark.parametrize("choose", [heuristics.cpu_linear_fwd, heuristics.cpu_linear_bwd, heuristics.cpu_lora_bwd])
def test_host_tiles_fit_their_scratch(choose):
    for threads in (1, 2, 3, 16, 64, 255):
        for M in (0, 1, 8, 9, 64, 65, 512, 10**6, 2**40):
            config = choose(M, threads)
            assert config.scratch_bytes <= max(4 * 2**20, threads * 2**17) and config.block_k % 64 == 0
            assert config.threads == threads and min(config.block_m, config.block_n) >= 1
            assert heuristics.on_path(config, "rows").block_k == 1024  # it would change bits there, and threads must not


def test_selftest_says_which_ops_a_back_end_has_no_kernels_for(monkeypatch):
    rows = {key: row for key, row in backends._ROWS.items() if key[1] != "cpu" or key[0] in selftest.FORMAT}
    monkeypatch.setattr(backends, "_ROWS", rows)
    monkeypatch.setattr(selftest, "DTYPES", (torch.float32,))
    found = [(checked, failure) for _, _, _, checked, failure in selftest.run(["cpu"])]
    assert all(failure is None for _, failure in found)
    assert [checked.partition(":")[2] for checked, _ in found][2:] == [" no kernels yet for linear_fwd, linear_bwd, lora_bwd"] * 2
