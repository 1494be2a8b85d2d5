"""The short table of a run: one row a model, for the terminal, the report and the model card."""

from __future__ import annotations

from typing import Any

MODELS = ("parent", "cut", "stitched", "healed", "model")
MEASURES = ("kl_nats", "top1_agreement_fraction", "ppl")


def summary_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return rows {model, parameters, bytes, kl_nats, top1_agreement_fraction, ppl} of the models there are.

    The last three are {value, se, n}, or None where they were not measured.
    """
    sizes = {"parent": "parent", "cut": "cut", "stitched": "stitch", "healed": "heal", "model": "model"}
    evaluated = results.get("evaluate", {})
    rows = []
    for name in MODELS:
        size, figures = results.get(sizes[name], {}), evaluated.get(name, {})
        if not figures and (name == "model" or "bytes" not in size):
            continue
        row = {"model": name, "parameters": size.get("parameters"), "bytes": size.get("bytes")}
        rows.append(row | {measure: figures.get(measure) for measure in MEASURES})
    return rows


def with_error(measured: dict[str, float] | None, digits: int = 3, percent: bool = False) -> str:
    """Return `value ± standard error`, or a dash where nothing was measured."""
    if measured is None:
        return "-"
    value, error, unit = measured["value"], measured["se"], ""
    if percent:
        value, error, digits, unit = 100 * value, None if error is None else 100 * error, 1, " %"
    return f"{value:.{digits}f} ± {'unknown' if error is None else f'{error:.{digits}f}'}{unit}"
