"""`nf4lora plan --claims`: numbers about QLoRA in circulation, each computed again."""

import csv
import json
from dataclasses import asdict, dataclass
from importlib.resources import files

from . import formulas

NEAR = 0.01  # of what was said: what its last digits leave open
NOTHING = 1e-4  # what counts as a difference of 0


@dataclass(frozen=True)
class Claim:
    """What was said, what comes out, and whether they agree."""

    claim: str
    said: str
    computed: str
    value: float
    right: bool

    @property
    def verdict(self) -> str:
        return "right" if self.right else "wrong"


def check() -> list[Claim]:
    """Every row of claims.csv: the claim, what was said, its value and unit, how the computed one must stand to it, and the
    formula with its arguments."""
    text = files(__package__).joinpath("claims.csv").read_text(encoding="utf-8")
    return [_checked(row) for row in csv.DictReader(text.splitlines())]


def _checked(row: dict[str, str]) -> Claim:
    said, value = float(row["value"]), float(getattr(formulas, row["formula"])(*row["arguments"].split()))
    right = {"=": abs(value - said) <= max(NEAR * abs(said), NOTHING), "<=": value <= said, "<": value < said}
    return Claim(row["claim"], row["said"], f"{_number(value)} {row['unit']}".strip(), value, right[row["relation"]])


def _number(value: float) -> str:
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    if value >= 1e6:
        return f"{value / 1e6:.2f} M"
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.4g}"


def show(claims: list[Claim], how: str) -> None:
    """On stdout as "table", "markdown" or "json"."""
    if how == "json":
        print(json.dumps([asdict(claim) | {"verdict": claim.verdict} for claim in claims]))
    elif how == "markdown":
        print("| claim | said | computed | |\n|---|--:|--:|---|")
        for c in claims:
            print(f"| {c.claim} | {c.said} | {c.computed} | {c.verdict} |")
    else:
        from rich.table import Table

        from ..report import wide_console

        table = Table("claim", "said", "computed", "", title="claims about QLoRA, computed again")
        for c in claims:
            table.add_row(c.claim, c.said, c.computed, c.verdict)
        wide_console().print(table)
