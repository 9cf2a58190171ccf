"""Bytes as people write them, and the cards they write instead."""

import re

from ..settings import UserError

UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}

# Memory as the makers name it, which they count in GiB.
CARDS = {
    "T4": 16, "V100": 32, "RTX2080TI": 11, "RTX3060": 12, "RTX3090": 24, "RTX4060": 8, "RTX4080": 16, "RTX4090": 24, "RTX5090": 32,
    "A10": 24, "L4": 24, "L40S": 48, "A6000": 48, "A100-40": 40, "A100": 80, "H100": 80, "H200": 141, "B200": 180,
}  # fmt: skip
_BY_NAME = {name.replace("-", ""): size for name, size in CARDS.items()}
_AROUND = r"^(NVIDIA)?(GEFORCE|TESLA|RTX(?=A))?|SXM\d?|PCIE|HBM\d?E?$"


def card_bytes(text: str) -> int:
    """Of "24GiB", "80GB", "RTX4090", "H100 80GB", or as nvidia-smi names a card. Raises: UserError naming --gpu."""
    name = re.sub(r"(?<=\d)GI?B?$", "", re.sub(_AROUND, "", re.sub(r"[\s_-]", "", text.upper())))
    for known, size in _BY_NAME.items():
        if name in (known, f"{known}{size}"):
            return size * 2**30
    return parse_bytes(text, "--gpu", f"a size such as 24GiB or 80GB, or one of {', '.join(CARDS)}")


def parse_bytes(text: str, option: str, wanted: str = "a size such as 512MiB or 24GB") -> int:
    """Whole bytes of a number and a unit. Raises: UserError naming `option` for anything else, and for less than 0."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text, re.IGNORECASE | re.ASCII)
    if not found or (unit := found[2].upper()) not in UNITS:
        raise UserError(f"{option}: found {text!r}, wanted {wanted}")
    if not unit and "." in found[1]:
        raise UserError(f"{option}: found {text!r}, a number without a unit; wanted {wanted}")
    count = float(found[1]) * UNITS[unit]
    if count >= 2**60:
        raise UserError(f"{option}: found {text!r}, more than any machine has; wanted {wanted}")
    return int(count)


def shown(count: float) -> str:
    """Three digits of GiB, MiB or KiB; plain bytes below one."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= size:
            value = count / size
            return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
    return f"{count:,.0f} B"
