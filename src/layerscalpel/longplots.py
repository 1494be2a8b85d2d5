"""Draw how each model compares with its parent along a text: perplexity in long ones, KL in blocks.

svg = ratio_by_position(compared(results))
"""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from layerscalpel.longwords import positions
from layerscalpel.plots import MODELS, OTHER_MODEL, PAGE, QUIET, canvas, log_where_needed, svg_of

APART = 1.035
"""Factor on the position that keeps the error bars of two models apart."""


def ratio_by_position(models: dict[str, list[dict[str, Any]]]) -> str:
    """Draw the perplexity over the parent's in each bin of positions, one line a model, with standard errors."""
    with canvas(PAGE, 2.9) as figure:
        axes = figure.subplots()
        _lines(axes, models, "ppl_ratio")
        axes.axhline(1, color=QUIET, linewidth=1, linestyle="--", label="parent")
        axes.set_ylabel("perplexity / parent's")
        axes.set_title(_title(models))
        axes.legend(loc="best", ncols=len(models) + 1)
        return svg_of(figure, "ratio-by-position", "Perplexity over the parent's by position in the text")


def kl_by_position(models: dict[str, list[dict[str, Any]]]) -> str:
    """Draw the KL to the parent in each bin of positions of a block, one line a model, with standard errors."""
    with canvas(PAGE, 2.9) as figure:
        axes = figure.subplots()
        _lines(axes, models, "kl_nats")
        axes.set_ylabel("KL to the parent (nats per token)")
        name, rows = list(models.items())[-1]
        told = " and ".join(f"{row['kl_nats']['value']:.2f} at {positions(row)}" for row in (rows[0], rows[-1]))
        axes.set_title(f"{name.capitalize()}, KL to the parent: {told}")
        axes.legend(loc="best", ncols=len(models))
        return svg_of(figure, "kl-by-position", "KL to the parent by position in the block")


def _lines(axes: Axes, models: dict[str, list[dict[str, Any]]], measure: str) -> None:
    """Draw a measure along the positions, one line a model; the first axis is logarithmic, the second where needed."""
    values = []
    for place, (name, rows) in enumerate(models.items()):
        middles = [(row["from"] + row["to"]) / 2 * APART ** (place - (len(models) - 1) / 2) for row in rows]
        heights = [row[measure]["value"] for row in rows]
        errors = [row[measure]["se"] or 0.0 for row in rows]
        kind = {"markersize": 4, "linewidth": 1, "elinewidth": 0.9, "capsize": 2.5, "label": name}
        axes.errorbar(middles, heights, yerr=errors, fmt="o-", color=MODELS.get(name, OTHER_MODEL), **kind)
        values += heights
    _position_axis(axes, next(iter(models.values())))
    if not log_where_needed(axes, values):
        axes.margins(y=0.15)


def _position_axis(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Make the first axis logarithmic, with ticks at the edges of the bins; the first bin begins left of it."""
    edges = [row["to"] for row in rows]
    axes.set_xscale("log", base=2)
    axes.set_xlim(edges[0] / 4, edges[-1] * 1.05)
    axes.xaxis.set_major_locator(FixedLocator(edges))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda edge, _: f"{edge:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("position in the text (tokens); each point is the mean between two ticks")
    for edge in edges[:-1]:
        axes.axvline(edge, color=QUIET, linewidth=0.5, alpha=0.25)


def _title(models: dict[str, list[dict[str, Any]]]) -> str:
    name, rows = list(models.items())[-1]
    ends = rows if len(rows) < 3 else (rows[1], rows[-1])
    told = " and ".join(f"{row['ppl_ratio']['value']:.2f} at {positions(row)}" for row in ends)
    return f"{name.capitalize()}, perplexity over the parent's: {told}"
