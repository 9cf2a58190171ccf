"""Every tuner of peft on an NF4 base, as bench/tuners.py tries it: training, saving, reloading, merging."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))

from bench import tuners  # noqa: E402

WRITTEN = {row["tuner"]: row for row in json.loads((ROOT / "bench/results/tuners.json").read_text())["rows"]}


@pytest.mark.parametrize("name", tuners.TUNERS)
def test_trains_reloads_and_merges(name):
    row = tuners.tried(name)
    assert row.keys() == WRITTEN[name].keys()  # what README says of it
    if name in tuners.FAIL:
        assert row["fails"]
        return
    assert row["loss_after"] < row["loss_before"] - 0.01 and row["reloads"] is True and row["trainable"] > 0
    assert ("merge_error" in row) == (name not in tuners.PROMPTS)
    assert row.get("merge_error", 0) <= 1e-6


def test_the_written_table_has_every_tuner():
    assert list(WRITTEN) == list(tuners.TUNERS)
