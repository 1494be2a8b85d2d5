"""How a race over windows went, in sentences: blocks seen, windows left, what the confidence means, the margin.

race_text(results["search"])  # "All 25 windows were scored on the same 8 blocks of text. ..."
"""

from __future__ import annotations

from typing import Any

from layerscalpel.summary import measured, plain, ranges

FEW_BLOCKS = 8
"""Fewer blocks than these say little of other text."""


def race_text(search: dict[str, Any]) -> str:
    """Say how the race went: blocks seen, windows left, the margin."""
    race, windows = search["race"], len(search["scores"])
    first, most = race["first_blocks"], race["num_blocks"]
    if not race["confidence"]:
        said = f"All {windows} windows were scored on all {most} blocks of text, without a race"
        return f"{said}: no confidence is stated. {margin_text(race)}".strip()
    said = [f"All {windows} windows were scored on the same {first} blocks of text."]
    ahead = "another was ahead of it by more than chance explains"
    if first == most:
        said.append(f"A window was dropped if {ahead}.")
    else:
        ended = "one was left" if len(race["left"]) == 1 else "the text ended"
        said.append(f"A window was dropped as soon as {ahead}; the rest went on, to {most} blocks, until {ended}.")
    return " ".join([*said, _verdict(search), margin_text(race)]).strip()


def confidence_text(race: dict[str, Any]) -> str:
    """Say what the stated confidence means and what it rests on; nothing where none is stated."""
    if not race["confidence"]:
        return ""
    return (
        f"At least {percent(race['confidence'])} means: of many such races, each on fresh text of this kind, the best"
        f" window is dropped in {percent(1 - race['confidence'])} at most. It is paired Student t over blocks, with a"
        " union bound over rivals and looks. It takes blocks as independent and their differences as close to normal,"
        " and it says nothing of other kinds of text, or of what healing wins back."
    )


def _verdict(search: dict[str, Any]) -> str:
    """Say which windows were left, and with what confidence the best is among them."""
    race, left = search["race"], search["race"]["left"]
    window = "window that can be cut" if search.get("refused") else "window"
    best = f"the best {window} for text of this kind (lowest mean KL)"
    sure = f"with a confidence of at least {percent(race['confidence'])}"
    if len(left) == 1:
        return f"Start {left[0]} was left: {sure} it is {best}."
    lowest = min(left, key=lambda start: search["scores"][str(start)]["kl_nats"])
    return (
        f"{len(left)} windows were left and could not be told apart (starts {ranges(left)}): {sure} {best} is one of"
        f" them. Start {lowest} has the lowest mean so far."
    )


def percent(fraction: float) -> str:
    """Return a share as percent, with all of its digits."""
    return f"{100 * fraction:.6g} %"


def margin_text(race: dict[str, Any]) -> str:
    """Say how far the closest rival is behind; nothing if there is none."""
    if race["margin"] is None:
        return ""
    rival, found, errors = (race["margin"][key] for key in ("rival", "difference_kl_nats", "standard_errors"))
    behind, blocks = plain(abs(found["value"])), found["n"]
    if found["value"] and found["se"]:
        behind = measured(found | {"value": abs(found["value"])})
    name = f"start {rival}" if isinstance(rival, int) else rival
    seen = f"on the {blocks} blocks that both saw"
    if found["value"] < 0:
        return f"{name.capitalize()} costs {behind} nats less {seen}, but another one had dropped it."
    away = f": {errors:.1f} standard errors, paired" if errors is not None else ""
    is_open = race["confidence"] and len(race["left"]) > 1
    which = (", one of those left" if rival in race["left"] else ", dropped before") if is_open else ""
    return f"The closest rival, {name}{which}, costs {behind} nats more {seen}{away}."


def race_line(search: dict[str, Any]) -> str:
    """Return the race in one line."""
    race, left = search["race"], search["race"]["left"]
    first, most = race["first_blocks"], race["num_blocks"]
    blocks = f"{most}" if first == most else f"{first} to {most}"
    said = f"race: {len(search['scores'])} windows, {blocks} blocks"
    if race["confidence"]:
        told = f"start {left[0]} left" if len(left) == 1 else f"starts {ranges(left)} not told apart"
        said += f"; {told} at {percent(race['confidence'])} confidence"
    behind = margin_text(race)
    return f"{said}; {behind[0].lower()}{behind[1:].rstrip('.')}" if behind else said


def race_warnings(search: dict[str, Any]) -> list[str]:
    """Return what speaks against the choice of the race that decided, one sentence each."""
    runs = search.get("two_runs")
    won = bool(runs and runs["wins"])
    race = runs["race"] if runs and won else search.get("race")
    if race is None:
        return []
    found, left = [], race["left"]
    by_kl = won or search["method"] != "pilot"  # pilots decide by what they healed to
    if race["confidence"] and len(left) > 1 and by_kl:
        which = f"{len(left)} ways to cut" if won else f"{len(left)} windows (starts {ranges(left)})"
        found.append(
            f"The search could not tell {which} apart on {race['num_blocks']} blocks: another of them may be better"
            " than the one removed."
        )
    if race["num_blocks"] < FEW_BLOCKS:
        found.append(f"The candidates were compared on {race['num_blocks']} blocks of text only.")
    return found
