"""How figures are printed, and the short table of a run: one row a model, for terminal, report and model card."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from layerscalpel.segment import Segment

Results = dict[str, Any]
MODELS = ("parent", "cut", "stitched", "healed", "quantized", "model")
STAGE_OF = dict(zip(MODELS, ("parent", "cut", "stitch", "heal", "quantize", "model"), strict=True))
"""{model: the part of the results that tells its size}."""
MEASURES = ("kl_nats", "top1_agreement_fraction", "ppl", "ppl_ratio")


def summary_rows(results: Results) -> list[dict[str, Any]]:
    """Return rows {model, parameters, bytes} and MEASURES of the models there are.

    The measures are {value, se, n}, or None where they were not measured.
    """
    evaluated = results.get("evaluate", {})
    rows = []
    for name, stage in STAGE_OF.items():
        found, figures = results.get(stage, {}), evaluated.get(name, {})
        if not figures and (name == "model" or "bytes" not in found):
            continue
        source = results.get(found.get("of"), results["parent"]) if name == "quantized" else found
        row = {"model": name, "parameters": source.get("parameters"), "bytes": num_bytes(results, stage)}
        rows.append(row | {measure: figures.get(measure) for measure in MEASURES})
    return rows


def num_bytes(results: Results, stage: str) -> int | None:
    """Return a model's bytes: of its whole folder in a run that quantises, of its weights in others."""
    folders = results.get("quantize", {}).get("folder_bytes", {})
    return folders.get(stage, results.get(stage, {}).get("bytes"))


def removed_segments(results: Results) -> list[Segment]:
    """Return the segments that were removed, in order; none where nothing was cut. Old files know one segment only."""
    runs = results.get("segments") or ([results["segment"]] if results.get("segment") else [])
    return [Segment(start, stop, results["parent"]["num_layers"]) for start, stop in runs]


def with_error(measured: dict[str, float] | None, digits: int = 3, percent: bool = False) -> str:
    """Return `value ± standard error`, or a dash where nothing was measured."""
    if measured is None:
        return "-"
    value, error, unit = measured["value"], measured["se"], ""
    if percent:
        value, error, digits, unit = 100 * value, None if error is None else 100 * error, 1, " %"
    return f"{value:.{digits}f} ± {'unknown' if error is None else f'{error:.{digits}f}'}{unit}"


def measured(item: dict[str, Any] | None, scale: float = 1) -> str:
    """Return `value ± error`, rounded to the error's first digit, or to two digits if the first is a 1.

    Of a value of a million or more, as a ruined model's perplexity, three digits.
    """
    if not item:
        return "–"
    value, error = scale * item["value"], scale * (math.nan if item.get("se") is None else item["se"])
    if error == 0 or not math.isfinite(value + error):
        return plain(value) if error == 0 else f"{plain(value)} ± unknown"
    if abs(value) >= 1e6:
        return f"{value:.3g} ± {error:.1g}"
    places = min(max((f"{error:e}"[0] == "1") - math.floor(math.log10(error)), 0), 6)
    return f"{value:,.{places}f} ± {error:,.{places}f}"


def plain(value: float) -> str:
    """Return a number with three digits, or all of them before the point."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"


def count(number: int | None, unit: float = 1) -> str:
    """Return a whole number with separators, or one decimal of it in a larger unit."""
    return "–" if number is None else f"{number / unit:,.{int(unit > 1)}f}"


def size(num_bytes: int) -> str:
    """Return bytes in a unit that suits them."""
    unit, name = next(
        (unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (0, "bytes")) if num_bytes >= unit
    )
    return f"{num_bytes / unit:,.1f} {name}" if unit else f"{num_bytes} {name}"


def ranges(numbers: Sequence[int]) -> str:
    """Return rising numbers as `1..3, 5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)
