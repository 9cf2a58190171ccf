"""The verbs on the host machine: equal to the PTX manual in numpy, and to what cards gave where that was recorded."""

import json
import shutil

import numpy as np
import pytest
from cuda_on_host import golden

RECORDED = sorted(golden.FOLDER.glob("*.npz"))


@pytest.fixture(scope="module")
def on_host():
    return golden.on_host()


@pytest.fixture(scope="module")
def recorded_here(on_host, tmp_path_factory):
    """A record of the host machine itself."""
    path = tmp_path_factory.mktemp("golden") / "host.npz"
    golden.record(path, on_host, "the host machine")
    return path


@pytest.mark.parametrize("which", range(len(golden.WRAPPERS)), ids=[w.name for w in golden.WRAPPERS])
def test_the_host_machine_does_what_the_manual_says(on_host, figures, which):
    wrapper = golden.WRAPPERS[which]
    for given in wrapper.inputs():
        expected = wrapper.formula(given)
        got = on_host(which, given, expected.nbytes, wrapper.elements)
        different = np.flatnonzero(got != expected)
        assert different.size == 0, f"{different.size} of {expected.nbytes} bytes differ, the first at {different[0]}"
        figures["bytes of verbs on the host machine, equal to the manual's formulas"] += expected.nbytes


def test_golden_vectors_from_cards(on_host, figures):
    figures["golden vectors from a card: files"] += len(RECORDED)
    for path in RECORDED:
        compared, different = golden.replay(path, on_host)
        assert not different, f"{path.name}: {different}"
        figures["bytes of golden vectors from a card, equal on the host machine"] += compared


def test_a_record_replays_equal(recorded_here, on_host):
    compared, different = golden.replay(recorded_here, on_host)
    assert compared > 100_000 and not different
    assert recorded_here.stat().st_size < 1_000_000
    with np.load(recorded_here) as record:
        assert json.loads(str(record["about"]))["made_by"] == "the host machine"


def test_the_command_records_and_compares(monkeypatch, on_host, tmp_path, capsys):
    """As bench.gpu_report runs it, `python -m cuda_on_host.golden FILE`, with the host machine in place of a card."""
    monkeypatch.setattr(golden, "on_card", lambda: (on_host, "no card"))
    assert golden.main(tmp_path / "card.npz") == 0 and "differs in 0 outputs" in capsys.readouterr().out
    monkeypatch.setattr(golden, "on_card", lambda: (lambda *given: on_host(*given) ^ 1, "another card"))
    assert golden.main(tmp_path / "card.npz") == 1 and "ldmatrix_x1/0: " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["ldmatrix_x4/1", "wgmma_n128_rs_fp16/0", "byte_perm/2"])
def test_a_changed_byte_is_caught(recorded_here, on_host, tmp_path, name):
    with np.load(recorded_here) as record:
        arrays = dict(record)
    arrays[f"{name}/out"][17] ^= 1
    np.savez_compressed(tmp_path / "changed.npz", **arrays)
    assert golden.replay(tmp_path / "changed.npz", on_host)[1] == [
        f"{name}: 1 of {arrays[f'{name}/out'].nbytes} bytes differ, the first at 17"
    ]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_recording_without_a_card_says_so(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(RuntimeError, match="no card"):
        golden.on_card()
