"""`nf4lora plan --claims`: every row computes, and comes out as the study of these claims found it."""

import csv
import json
import subprocess
import sys
from importlib.resources import files

import pytest

from nf4lora.cli.planning import claims, formulas

# What each said value is: from the study, where it says so.
RIGHT = 16
COMPUTED = {
    "LoRA on 7B, q v, rank 16": 8_388_608, "LoRA on 7B, q k v o gate, rank 16": 24.5e6, "LoRA on 7B, all seven linears, rank 16": 39.98e6,
    "LoRA on 13B, q v, rank 16": 13.11e6, "LoRA on 7B, q k v o, rank 16": 16.78e6, "LoRA on 7B, q v, rank 64": 33.55e6,
    "weights of LoRA on 7B, q v, rank 8, in bf16": 0.0084, "their Adam states in float32": 0.0336,
    "AdaLoRA on OPT-125m, q v, init_r 12": 442_656, "prefix tuning of 7B, 20 tokens": 5_242_880, "weights of 65B in 4 bits": 34.46,
    "gradients of a 65B base under QLoRA": 0, "LoRA on 65B in 16 bits": 131, "LoRA on 65B in 16 bits, elsewhere": 131,
    "full fine-tuning of 70B (least: 16-bit with Adam)": 828, "full fine-tuning of 70B (float32 with Adam)": 1104,
    "70B fits 24 GB: its weights": 36.36,
    "70B at 2.5 steps/s of 512 tokens on a card of 165 TFLOP/s: what that takes": 525,
    "7B at 15 steps/s of 4 x 512 tokens on the same card": 7.2 * 165.2,
    "double quantization saves of the constants": 75, "the fullest of the NF4 bins holds on normal data": 9.2,
    "the emptiest of the NF4 bins holds on normal data": 1.7, "entropy of NF4 codes on normal data": 3.88,
    "FP4 errs less than symmetric INT4: its error over that": 0.0149 / 0.0116,
    "FP4 errs less than asymmetric INT4: its error over that": 0.0149 / 0.0080,
}  # fmt: skip


@pytest.fixture(scope="module")
def checked():
    return {claim.claim: claim for claim in claims.check()}


def test_every_row_computes_once(checked):
    rows = list(csv.DictReader(files("nf4lora.cli.planning").joinpath("claims.csv").read_text().splitlines()))
    assert len(rows) == len(checked) >= 40 and {row["claim"] for row in rows} == checked.keys()
    assert all(hasattr(formulas, row["formula"]) for row in rows)


def test_the_verdicts_are_those_of_the_study(checked):
    order = list(checked.values())
    assert all(claim.right for claim in order[:RIGHT])
    assert {claim.claim for claim in order[RIGHT:] if claim.right} == {"NF4's error over that of symmetric INT4 is below 1"}


@pytest.mark.parametrize("claim", COMPUTED)
def test_what_is_computed_is_what_the_study_computed(checked, claim):
    assert checked[claim].value == pytest.approx(COMPUTED[claim], rel=0.012, abs=1e-9) and not checked[claim].right


def test_relative_squared_errors_of_the_study():
    found = {kind: formulas._mse(formulas._decoded(kind), formulas._sample()) for kind in ("nf4", "int4", "fp4", "int4-asymmetric")}
    assert found == pytest.approx({"nf4": 0.0085, "int4": 0.0116, "fp4": 0.0149, "int4-asymmetric": 0.0080}, rel=0.01)


def test_quantizing_upwards_by_the_tensors_absmax_errs_three_times_as_much(checked):
    claim = next(c for c in checked.values() if c.claim.startswith("searchsorted"))
    assert 25 < claim.value < 30 and not claim.right


def test_a_said_value_that_is_off_by_more_than_its_digits_is_wrong():
    row = {"claim": "c", "said": "4.2", "value": "4.2", "unit": "bits", "relation": "=", "formula": "bits", "arguments": ""}
    assert not claims._checked(row).right and claims._checked(row | {"value": "4.127"}).right
    assert claims._checked(row | {"relation": "<="}).right and not claims._checked(row | {"value": "4", "relation": "<"}).right


def test_the_command_prints_a_table_markdown_and_json(capsys, monkeypatch):
    found = [claims.Claim("a claim", "1 GB", "2 GB", 2.0, False), claims.Claim("another", "3", "3", 3.0, True)]
    for how, wanted in (("table", "a claim"), ("markdown", "| a claim | 1 GB | 2 GB | wrong |"), ("json", '"verdict": "right"')):
        claims.show(found, how)
        out = capsys.readouterr().out
        assert wanted in out
    assert [row["claim"] for row in json.loads(out)] == ["a claim", "another"]


def test_plan_claims_as_a_user_runs_it():
    command = [sys.executable, "-P", "-m", "nf4lora.cli", "plan", "--claims", "--markdown"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "| LoRA on 7B, q v, rank 16 | 20.97 M | 8.39 M parameters | wrong |" in done.stdout
    done = subprocess.run([*command, "model"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stdout == "" and "--claims: found MODEL_OR_CONFIG" in done.stderr
