"""What to do with a model and a card: every value with its reason, from what fits and from what papers found."""

from typing import NamedTuple

from .fit import Fit, fit
from .inventory import Inventory
from .needs import Choice, need, weights_of
from .units import CARDS, shown

SEQUENCES = 16  # in an optimizer step: QLoRA's batch for 7B to 13B
LENGTHS = (4096, 2048, 1024, 512, 256, 128)
TIGHT = 0.1  # of the card: with less than this to spare, states page
SMALL = 0.02  # of the card: states of 32 bits that take less cost nothing that matters


class Advice(NamedTuple):
    """option -> (value, reason); and where it fits, or None. `otherwise` says what would help where nothing does."""

    values: dict[str, tuple[str, str]]
    fit: Fit | None
    otherwise: str


def rank_for(model: Inventory) -> int:
    """A power of two, 16 at most."""
    return max(4, min(16, 1 << (max(model.hidden, 64) // 64).bit_length() - 1))


def advise(model: Inventory, asked: Choice, room: int, margin: float) -> Advice:
    """What to run at `asked`'s length and under its assumptions in `room` bytes, a card less its margin; the rest is chosen."""
    for choice in _candidates(model, asked):
        found = fit(model, choice, room)
        if found.fits:
            return _settled(model, choice, room)
    return Advice({}, None, _otherwise(model, asked, room, margin))


def _candidates(model: Inventory, asked: Choice) -> list[Choice]:
    """In the order of preference: what is exact and fast first, what is small last."""
    r = rank_for(model)
    first = asked.with_(
        batch_size=1, r=r, target_modules=("all-linear",), optim="paged_adamw_8bit", gradient_checkpointing=False
    )
    adaptive = [first.with_(method="adalora", r=12)] if model.is_encoder else []
    lora, qlora = first.with_(method="lora"), first.with_(method="qlora")
    again = [choice.with_(gradient_checkpointing=True) for choice in (lora, qlora)]
    return [*adaptive, lora, qlora, *again, again[-1].with_(r=min(r, 8))]


def _settled(model: Inventory, choice: Choice, room: int) -> Advice:
    why = _why_method(model, choice, room)
    states = need(model, choice.with_(optim="paged_adamw_32bit")).states.total
    wide = states < SMALL * room
    choice = choice.with_(optim="paged_adamw_32bit" if wide else "paged_adamw_8bit")
    found = fit(model, choice, room)
    if not found.fits:
        choice, wide = choice.with_(optim="paged_adamw_8bit"), False
        found = fit(model, choice, room)
    batch = 1 << min(found.largest_batch, SEQUENCES).bit_length() - 1
    spare = room - need(model, choice.with_(batch_size=batch)).total
    paged = spare < TIGHT * room
    if not paged:
        choice = choice.with_(optim="adamw_torch_fused" if wide else "adamw_8bit")
    choice = choice.with_(batch_size=batch, grad_accum=max(SEQUENCES // batch, 1))
    final = fit(model, choice, room)
    return Advice(_reasons(model, choice, final, paged, spare, states, why), final, "")


def _reasons(
    model: Inventory, choice: Choice, found: Fit, paged: bool, spare: int, states: int, why: str
) -> dict[str, tuple[str, str]]:
    caveat = f"; a lower bound was counted, without {model.uncounted}: try it" if model.uncounted else ""
    alpha = 32 if choice.method == "adalora" else 2 * choice.r
    values = {
        "--method": (choice.method, why),
        "--r": _rank(model, choice),
        **({"--target-r": ("8", "the average rank it is to keep, of AdaLoRA's own scripts")} if choice.method == "adalora" else {}),
        "--alpha": (str(alpha), "of AdaLoRA's own scripts" if choice.method == "adalora" else
                    "twice the rank: a branch scaled by 2 at every rank, so that the rate need not change with it"),
        "--target-modules": ("all-linear", _why_targets(model)),
        "--lr": _rate(model, choice),
        "--optim": (choice.optim, _why_optim(paged, spare, states, choice)),
        "--gradient-checkpointing": ("yes", "without it not one sequence fits; it costs a second forward, about a third more time")
        if choice.gradient_checkpointing else ("no", f"what a forward keeps has room; recomputing costs a third more time{caveat}"),
        "--batch-size": (str(choice.batch_size), f"of at most {found.largest_batch} that fit at {choice.seq_len} tokens{caveat}"),
        "--grad-accum": (str(choice.grad_accum), f"{SEQUENCES} sequences a step, QLoRA's batch for 7B to 13B"),
    }  # fmt: skip
    return values


def _rank(model: Inventory, choice: Choice) -> tuple[str, str]:
    if choice.method == "adalora":
        return (
            str(choice.r),
            "AdaLoRA starts at 1.5 times the average rank it is to keep, which is 8, and prunes the least important",
        )
    if choice.r < rank_for(model):
        return str(
            choice.r
        ), f"rank {rank_for(model)} does not fit; QLoRA found that rank hardly matters once every linear is adapted"
    reason = "QLoRA (section 4) found no gain from higher ranks once every linear is adapted"
    return (
        str(choice.r),
        reason
        if choice.r == 16
        else f"a 64th of the width of {model.hidden}: a small model has less to correct; {reason}",
    )


def _rate(model: Inventory, choice: Choice) -> tuple[str, str]:
    if choice.method == "adalora":
        return "5e-4", "AdaLoRA's range for encoders; singular values start at zero and bear more"
    if model.total > 20e9:
        return "1e-4", "QLoRA's rate for 33B and 65B, half of that for smaller models"
    return "2e-4", "QLoRA's rate up to 13B, and that of LoRA's GPT-2 runs"


def _why_method(model: Inventory, choice: Choice, room: int) -> str:
    """choice: as `_candidates` has it, of one sequence."""
    if choice.method == "adalora":
        return "AdaLoRA was shown on encoders, where it beats LoRA of the same budget; its base is in 4 bits here"
    if choice.method == "lora":
        return "the 16-bit base fits, so there is no need to round it; nothing is decoded in a step"
    least = choice.with_(method="lora", r=rank_for(model))
    base = shown(sum(weights_of(model, least).values()))
    plain, again = (need(model, least.with_(gradient_checkpointing=on)).on_device for on in (False, True))
    taken = (
        f"takes {shown(plain)} a sequence and fits only with checkpointing, in {shown(again)}: a third slower; QLoRA's fits without"
        if again <= room
        else f"takes {shown(again)} a sequence even with checkpointing"
    )
    return (
        f"LoRA's step on a 16-bit base of {base} {taken}; on NF4 it matched 16-bit fine-tuning (QLoRA, tables 2 to 4)"
    )


def _why_targets(model: Inventory) -> str:
    if model.stacked:
        share = model.stacked / model.total
        return f"every linear; the experts, {share:.0%} of the model, are 3-D stacks, which take no adapters"
    return "QLoRA found adapters on every linear necessary to match full fine-tuning; on q and v alone they fall short"


def _why_optim(paged: bool, spare: int, states: int, choice: Choice) -> str:
    wide = choice.optim in ("adamw_torch_fused", "paged_adamw_32bit")
    width = (
        "states of 32 bits take under a fiftieth of the card"
        if wide
        else f"32-bit states would take {shown(states)}; 8-bit a quarter"
    )
    if paged:
        return f"{width}; {shown(max(spare, 0))} to spare, so that a long sequence may send them to the host"
    return f"{width}; {shown(spare)} to spare, so nothing needs to page"


def _otherwise(model: Inventory, asked: Choice, room: int, margin: float) -> str:
    least = asked.with_(
        method="qlora",
        batch_size=1,
        r=8,
        optim="paged_adamw_8bit",
        gradient_checkpointing=True,
        target_modules=("all-linear",),
    )
    for length in LENGTHS:
        if length < asked.seq_len and need(model, least.with_(seq_len=length)).on_device <= room:
            caveat = f", if {model.uncounted}, not counted, leave room" if model.uncounted else ""
            return f"QLoRA with checkpointing, rank 8 and batch 1 fits at {length} tokens{caveat}"
    wanted = need(model, least).on_device
    card = min((size for size in CARDS.values() if size * 2**30 * (1 - margin) >= wanted), default=None)
    more = " or more" if model.uncounted else ""
    cards = (
        f"; a card of {card} GiB{more} would do" if card else "; no card of the table holds it: use several with FSDP"
    )
    return f"the least, QLoRA with checkpointing at batch 1, takes {shown(wanted)}{more}{cards}"
