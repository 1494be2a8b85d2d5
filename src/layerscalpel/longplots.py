"""Draw how each model compares with its parent along a long text.

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
        values = []
        for place, (name, rows) in enumerate(models.items()):
            middles = [(row["from"] + row["to"]) / 2 * APART ** (place - (len(models) - 1) / 2) for row in rows]
            ratios = [row["ppl_ratio"]["value"] for row in rows]
            errors = [row["ppl_ratio"]["se"] or 0.0 for row in rows]
            kind = {"markersize": 4, "linewidth": 1, "elinewidth": 0.9, "capsize": 2.5, "label": name}
            axes.errorbar(middles, ratios, yerr=errors, fmt="o-", color=MODELS.get(name, OTHER_MODEL), **kind)
            values += ratios
        rows = next(iter(models.values()))
        _position_axis(axes, rows)
        if not log_where_needed(axes, values):
            axes.margins(y=0.15)
        axes.axhline(1, color=QUIET, linewidth=1, linestyle="--", label="parent")
        axes.set_ylabel("perplexity / parent's")
        axes.set_title(_title(models))
        axes.legend(loc="best", ncols=len(models) + 1)
        return svg_of(figure, "ratio-by-position", "Perplexity over the parent's by position in the text")


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
