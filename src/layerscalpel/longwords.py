"""What the long-context check found, in sentences: the ratio to the parent near and far, and whether damage grows.

long_text(results)  # "On 4 texts of 4,096 tokens the healed model's perplexity is 1.40 ± 0.10 times the parent's ..."
"""

from __future__ import annotations

from typing import Any

from layerscalpel.student import two_errors
from layerscalpel.summary import MODELS, Results, measured

Row = dict[str, Any]


def long_words(results: Results) -> dict[str, Any]:
    """Return what the templates read."""
    return {"long_text": long_text(results), "long_rows": long_rows(results)}


def compared(results: Results) -> dict[str, list[Row]]:
    """Return {model: rows of by_position} of the models that were compared with the parent on long texts, in order."""
    evaluated = results.get("evaluate", {})
    rows = {name: evaluated.get(name, {}).get("by_position") for name in MODELS}
    return {name: bins for name, bins in rows.items() if bins and "ppl_ratio" in bins[0]}


def long_rows(results: Results) -> list[Row]:
    """Return one row {positions, parent, ratios} a bin for a table; none where nothing was compared."""
    found, parent = compared(results), results.get("evaluate", {}).get("parent", {}).get("by_position", [])
    return [
        {
            "positions": positions(row),
            "parent": row["ppl"],
            "ratios": {name: bins[place]["ppl_ratio"] for name, bins in found.items()},
        }
        for place, row in enumerate(parent)
        if found
    ]


def positions(row: Row) -> str:
    """Return the positions of a bin as `64..127`."""
    return f"{row['from']:,}..{row['to'] - 1:,}"


def long_text(results: Results) -> str:
    """Say how the last model does far into a text, what the texts were, and what was left out; nothing if not asked."""
    said, found = [], compared(results)
    if found:
        name, bins = list(found.items())[-1]
        said.append(f"{_texts(results, bins).capitalize()} {_near_and_far(results, name)}.")
        said += _verdict(results, list(found))
        said += _joined(results)
    if note := results.get("evaluate", {}).get("long_note"):
        said.append(f"Left out: {note}.")
    return " ".join(said)


def long_warnings(results: Results) -> list[str]:
    """Say that the last model was not measured, or that its damage grows by more than chance explains."""
    evaluated, found = results.get("evaluate", {}), compared(results)
    if "by_position" not in evaluated.get("parent", {}):
        return []
    name = [name for name in MODELS if name in evaluated][-1]
    if name not in found:
        return [f"The {name} model could not be measured on long texts: {evaluated['long_note']}."] * (name != "parent")
    grown = _growth(results, name)
    if not grown or not _away(results, grown["value"] - 1, grown):
        return []
    told = f"{_texts(results, found[name])} {_near_and_far(results, name)}"
    return [f"The damage grows with position: {told}, {measured(grown)} times as much."]


def long_lines(results: Results) -> list[str]:
    """Return the lines for a terminal: growing damage, and what was left out."""
    note = results.get("evaluate", {}).get("long_note")
    return long_warnings(results) + ([f"long context: {note}"] if note else [])


def _growth(results: Results, name: str) -> dict[str, Any] | None:
    return results["evaluate"][name].get("ppl_ratio_growth")


def _away(results: Results, effect: float, grown: dict[str, Any]) -> bool:
    """Tell whether an effect is above 0 by more than chance explains: Student's t over the texts."""
    texts = results["data"]["long"]["num_blocks"]
    return grown["se"] is not None and effect > two_errors(texts - 1) * grown["se"]


def _texts(results: Results, bins: list[Row]) -> str:
    blocks = results["data"]["long"]["num_blocks"]
    return f"on {blocks} text{'s' if blocks > 1 else ''} of {bins[-1]['to']:,} tokens"


def _near_and_far(results: Results, name: str) -> str:
    found = results["evaluate"][name]
    near, *far = found.get("near_and_far", found["by_position"])
    said = f"the {name} model's perplexity is {measured(near['ppl_ratio'])} times the parent's at positions"
    return " and ".join(
        [f"{said} {positions(near)}", *(f"{measured(row['ppl_ratio'])} times at {positions(row)}" for row in far)]
    )


def _verdict(results: Results, names: list[str]) -> list[str]:
    """Say whether the last model's damage grows, beside that of those it was made from."""
    *others, last = names
    grown = _growth(results, last)
    if grown is None:
        return []
    told = ", ".join(f"{name} model: {measured(other)}" for name in others if (other := _growth(results, name)))
    said = f"The far ratio is {measured(grown)} times the near one{f' ({told})' if told else ''}"
    if grown["se"] is None:
        return [f"{said}: one text tells no error."]
    if _away(results, grown["value"] - 1, grown):
        return [f"{said}: the damage grows with position."]
    shrinks = _away(results, 1 - grown["value"], grown)
    return [f"{said}: {'the damage shrinks with position' if shrinks else 'these texts do not tell it from 1'}."]


def _joined(results: Results) -> list[str]:
    found = results["data"]["long"]
    if not found["joined"]:
        return []
    return [
        f"The source has too few documents that long, so these texts join {found['num_documents']:,}: what lies far"
        " back is other text, which tries positions more than memory."
    ]
