"""Draw what is kept of the parent's scores, with standard errors.

svg = retention_bars(retention_rows(results), task_rows(results))
"""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes

from layerscalpel.plots import INK, MODELS, OTHER_MODEL, PAGE, QUIET, canvas, svg_of

Row = dict[str, Any]
WIDTH = 0.36
"""Of a bar, where 1 is from one group of bars to the next."""


def retention_bars(retentions: list[Row], tasks: list[Row]) -> str:
    """Draw both retentions of each child and, beside it, the adjusted one of every task that counts.

    Args:
        retentions: those of taskwords.retention_rows that a task counts in.
        tasks: as taskwords.task_rows returns them.
    """
    counting = [row for row in tasks if row["counts"]]
    with canvas(PAGE, 3.0) as figure:
        left, *right = figure.subplots(
            1, 1 + bool(counting), squeeze=False, width_ratios=[1, 1.5][: 1 + bool(counting)]
        )[0]
        _means(left, retentions)
        for axes in right:
            _tasks(axes, counting)
        return svg_of(figure, "retention-bars", "What is kept of the parent's scores")


def _means(axes: Axes, rows: list[Row]) -> None:
    children = list(rows[0]["kept"])
    for number, row in enumerate(rows):
        for place, name in enumerate(children):
            found = row["kept"][name]
            if found:
                at = place + (number - (len(rows) - 1) / 2) * WIDTH
                adjusted = row["key"] == "adjusted_fraction"
                look = {"color": MODELS.get(name, OTHER_MODEL), "alpha": 1.0 if adjusted else 0.4}
                axes.bar(at, 100 * found["value"], width=0.92 * WIDTH, **look)
                _error(axes, at, found, INK)
                above = 100 * (max(found["value"], 0) + (found["se"] or 0))
                axes.annotate(
                    f"{100 * found['value']:.0f}", (at, above), xytext=(0, 4), textcoords="offset points", ha="center"
                )
    axes.axhline(100, color=QUIET, linewidth=1, linestyle="--")
    axes.set_xticks(range(len(children)), children)
    axes.tick_params(axis="x", length=0)
    axes.margins(y=0.16)
    axes.set(ylabel="% of the parent's", title="Kept: pale plain, solid adjusted" if len(rows) > 1 else "Kept")


def _tasks(axes: Axes, rows: list[Row]) -> None:
    """Draw the adjusted retention of each task as a point with its error, the children beside each other."""
    children = list(rows[0]["kept"])
    for number, name in enumerate(children):
        color = MODELS.get(name, OTHER_MODEL)
        for place, row in enumerate(rows):
            if found := row["kept"].get(name, {}).get("adjusted_fraction"):
                at = place + (number - (len(children) - 1) / 2) * 0.8 / len(children)
                axes.plot([at], [100 * found["value"]], "o", color=color, markersize=4, label="" if place else name)
                _error(axes, at, found, color)
    axes.axhline(100, color=QUIET, linewidth=1, linestyle="--")
    axes.set_xticks(range(len(rows)), [row["task"] for row in rows], rotation=30, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.6, len(rows) - 0.4)
    axes.margins(y=0.12)
    axes.set_title("Adjusted for chance, task by task")
    axes.legend(loc="best", ncols=len(children))


def _error(axes: Axes, at: float, found: dict[str, Any], color: str) -> None:
    error = 100 * (found["se"] or 0.0)
    axes.errorbar(at, 100 * found["value"], yerr=error, color=color, elinewidth=0.9, capsize=3)
