"""What is said of a quantised model: how it was made, what was left, and what it is beside others of its size.

quantize_lines(results)   # for a terminal
byte_rows(results)        # the table of sizes, smallest last
"""

from __future__ import annotations

import math
from typing import Any

from layerscalpel.summary import MEASURES, MODELS, Results, measured, size
from layerscalpel.taskwords import RETENTIONS

STAGE_OF = {"cut": "cut", "stitched": "stitch", "healed": "heal"}
SPREAD = 2
"""Standard errors of a difference within which two distances from the parent cannot be told apart."""


def quantize_words(results: Results) -> dict[str, Any]:
    """Return what the templates of report and card read."""
    return {
        "quantize_text": quantize_text(results),
        "quantize_left": _left(results["quantize"]) if "quantize" in results else "",
        "byte_rows": byte_rows(results),
        "needs_library": "quantize" in results,
    }


def quantize_text(results: Results) -> str:
    """Return how the model was quantised, in one or two sentences; nothing where it was not."""
    found = results.get("quantize")
    if not found:
        return ""
    zero = "zero in the middle of each grid" if found["symmetric"] else "a zero of its own for each group"
    text = f"By {found['method']}, {found['bits']} bits a weight, one scale for {found['group_size']} weights, {zero}."
    if found.get("wider"):
        text += f" {len(found['wider'])} linear layers at the seam have {next(iter(found['wider'].values()))} bits."
    if "damping" in found:
        order = "columns with the largest inputs first" if found["act_order"] else "columns as they lie"
        text += f" Damping {found['damping']:g}, {order}."
    if "kl_to_source_nats" in found:
        text += f" KL to the model it was made from: {measured(found['kl_to_source_nats'])} nats per held-out token."
    tried = [f"{row['damping']:g} ({measured(row['kl_to_source_nats'])})" for row in found.get("tried", [])]
    return text + (f" Dampings tried, with theirs: {', '.join(tried)}." if tried else "")


def _left(found: dict[str, Any]) -> str:
    left = ", ".join(f"{number} x {reason}" for reason, number in found["left"].items())
    return f"{found['converted']} of {found['modules']} modules with weights are quantised; as they were: {left}."


def quantize_lines(results: Results) -> list[str]:
    """Return what a terminal shows of a quantised model; nothing where there is none."""
    if "quantize" not in results:
        return []
    found = results["quantize"]
    lines = [quantize_text(results), _left(found)]
    lines.append(f"whole folder: {size(found['bytes'])}, {size(found['source_bytes'])} before")
    for row in byte_rows(results):
        if row["made_beside"]:
            ppl = f", perplexity {measured(row['ppl'])}" if row["ppl"] else ""
            kl = f", KL {measured(row['kl_nats'])} nats" if row["kl_nats"] else ""
            lines.append(f"beside, {row['model']}: {size(row['bytes'])}{kl}{ppl}")
    return [*lines, *quantize_warnings(results)]


def byte_rows(results: Results) -> list[dict[str, Any]]:
    """Return one row a model, the largest first: bytes of its whole folder, and how near it is to the parent.

    `beaten_by` names a model that is no larger and surely nearer to the parent, if there is one.
    """
    if "folder_bytes" not in results.get("quantize", {}):
        return []
    folders, evaluated = results["quantize"]["folder_bytes"], results.get("evaluate", {})
    sizes = {"parent": folders.get("parent"), "quantized": results["quantize"]["bytes"]}
    sizes |= {name: folders.get(stage) for name, stage in STAGE_OF.items()}
    rows = [_row(name, sizes[name], evaluated.get(name, {})) for name in MODELS if sizes.get(name)]
    for name, found in evaluated.get("beside", {}).items():
        rows.append(_row(name, found["bytes"], found) | {"how": found["how"], "made_beside": True})
    rows.sort(key=lambda row: -row["bytes"])
    for row in rows:
        row["share"] = row["bytes"] / folders["parent"]
        row["beaten_by"] = ", ".join(other["model"] for other in rows if _beats(other, row))
    return rows


def _row(name: str, num_bytes: int, found: dict[str, Any]) -> dict[str, Any]:
    kept = found.get("retention", {})
    row = {"model": name, "bytes": num_bytes, "how": "", "made_beside": False}
    row |= {measure: found.get(measure) for measure in MEASURES}
    return row | {"retention": next((kept[key] for key in reversed(list(RETENTIONS)) if kept.get(key)), None)}


def _beats(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Tell whether a model is no larger than another and surely nearer to the parent."""
    near, far = one["kl_nats"], other["kl_nats"]
    if one["bytes"] > other["bytes"] or not near or not far:
        return False
    spread = SPREAD * math.hypot(near["se"] or 0, far["se"] or 0)
    return near["value"] + spread < far["value"]


def quantize_warnings(results: Results) -> list[str]:
    """Return what speaks against the quantised model."""
    row = next((row for row in byte_rows(results) if row["model"] == "quantized"), None)
    if not row or not row["beaten_by"]:
        return []
    return [f"No larger than the quantised model, and nearer to the parent: {row['beaten_by']}."]
