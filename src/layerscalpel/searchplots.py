"""Draw what a search saw of the windows: the score of each, the gate's paths, and all lengths at once.

svg = kl_curve(results["search"], [[13, 19]])
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import LogLocator, MaxNLocator

from layerscalpel.plots import MARK, MODELS, PAGE, PLAIN, QUIET, canvas, log_where_needed, svg_of

Runs = Sequence[Sequence[int]]
"""The removed segments [start, stop)."""
MEASURES = {
    "kl_nats": ("KL to the parent (nats per token)", "changes the predictions least", "KL to the parent"),
    "angular_distance": ("angular distance (share of half a turn)", "turns the hidden state least", "Angular distance"),
    "block_influence": ("sum of block influence (1 - cosine)", "has the least block influence", "Block influence"),
}
"""{key of a score: (axis label, what the lowest window does, name)}."""
CURVE = MODELS["stitched"]


def measure_of(search: dict[str, Any]) -> str:
    """Return the key that the method's scores carry."""
    first = next(iter(search["scores"].values()))
    return next(key for key in MEASURES if key in first)


def best_start(search: dict[str, Any]) -> int:
    """Return the start that the exact scores chose; without a certificate the lowest, the smaller one of equals."""
    if search.get("certificate"):
        return search["certificate"]["exact_start"]
    measure, scores = measure_of(search), search["scores"]
    return min(map(int, scores), key=lambda start: (scores[str(start)][measure], start))


def layer_names(runs: Runs) -> str:
    """Return the removed layers as words."""
    names = [f"layer {start}" if stop - start == 1 else f"layers {start}..{stop - 1}" for start, stop in runs]
    return " and ".join(names)


def kl_curve(search: dict[str, Any], runs: Runs) -> str:
    """Draw the score of every window by its first layer, and mark what was removed and where the gate's starts ended.

    Windows that saw fewer blocks than the others are hollow. A pilot is an arrow to the KL after its healing.
    """
    label, _, name = MEASURES[measure_of(search)]
    with canvas(PAGE, 3.3) as figure:
        axes = figure.subplots()
        values = _windows(axes, search, runs)
        chosen = str(runs[0][0])
        if len(runs) == 1 and chosen in search["scores"]:
            kind = {"color": MARK, "markersize": 7, "zorder": 4, "label": f"removed: {layer_names(runs)}"}
            axes.plot(int(chosen), search["scores"][chosen][measure_of(search)], "o", **kind)
        values += _arrows(axes, search)
        log_where_needed(axes, values)
        _mark_ends(axes, search.get("gate", {}).get("ends", []))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="first removed layer", ylabel=label, title=_verdict(search, runs))
        axes.legend(loc="best")
        return svg_of(figure, "kl-curve", f"{name} by first removed layer")


def _windows(axes: Axes, search: dict[str, Any], runs: Runs) -> list[float]:
    """Draw every window with its error, hollow where it saw fewer blocks; return the values."""
    measure, starts = measure_of(search), sorted(map(int, search["scores"]))
    scores = [search["scores"][str(start)] for start in starts]
    values, errors = [score[measure] for score in scores], [score.get("se") or 0.0 for score in scores]
    blocks = [score.get("num_blocks") or 0 for score in scores]
    if starts == list(range(starts[0], starts[-1] + 1)):
        axes.plot(starts, values, color=CURVE, linewidth=1, alpha=0.55)
    few, n = [seen < max(blocks) for seen in blocks], sum(stop - start for start, stop in runs)
    for is_few in sorted(set(few)):
        rows = [i for i, flag in enumerate(few) if flag == is_few]
        kind = {
            "color": CURVE,
            "fmt": "o",
            "markersize": 3.6,
            "capsize": 2,
            "elinewidth": 0.8,
            "alpha": 1 - 0.25 * is_few,
        }
        seen = sorted({blocks[i] for i in rows})
        told = (
            f" that saw {'only ' * is_few}{' to '.join(map(str, seen[:1] + seen[1:][-1:]))} blocks" if seen[-1] else ""
        )
        label = f"runs of {n}{told}"
        marks = axes.errorbar(
            [starts[i] for i in rows], [values[i] for i in rows], yerr=[errors[i] for i in rows], label=label, **kind
        )
        if is_few:
            marks.lines[0].set_markerfacecolor("none")
    return values


def _arrows(axes: Axes, search: dict[str, Any]) -> list[float]:
    """Draw an arrow from the KL before a pilot to that after it; return the latter."""
    pilots = search.get("pilots", [])
    if pilots:
        starts, after = [pilot["start"] for pilot in pilots], [pilot["kl_nats"] for pilot in pilots]
        axes.plot(starts, after, "v", color=MODELS["healed"], markersize=6, label="after the pilot's healing", zorder=5)
        before = [search["scores"][str(start)]["kl_nats"] for start in starts]
        axes.vlines(starts, after, before, color=MODELS["healed"], linewidth=1.1, zorder=1)
    return [pilot["kl_nats"] for pilot in pilots]


def _verdict(search: dict[str, Any], runs: Runs) -> str:
    """Return what the curve shows, in one line."""
    _, does_least, name = MEASURES[measure_of(search)]
    race, num_windows = search.get("race") or {}, len(search["scores"])
    left = race.get("left", []) if race.get("confidence") else []
    if len(runs) > 1:
        return f"{name} of single runs; two were removed: {layer_names(runs)}"
    if search.get("pilots"):
        return f"{layer_names(runs).capitalize()} healed best in the pilots"
    if len(left) > 1 and runs[0][0] in left:
        return f"{len(left)} of {num_windows} windows could not be told apart; {layer_names(runs)} had the lowest mean"
    is_best = runs[0][0] == best_start(search)
    return f"Removing {layer_names(runs)} {does_least}" if is_best else f"{name} of the windows"


def _mark_ends(axes: Axes, ends: list[int]) -> None:
    """Put a tick with its count at every start where gate runs ended."""
    counts, foot = Counter(ends), axes.get_xaxis_transform()
    if counts:
        kind = {"color": MARK, "markersize": 5, "clip_on": False, "label": "the gate's starts ended here"}
        axes.plot(list(counts), [0.0] * len(counts), "^", transform=foot, **kind)
        axes.margins(y=0.12)
    for end, count in counts.items():
        if count > 1:
            axes.annotate(f"{count}x", (end, 0), (4, 2), xycoords=foot, textcoords="offset points", color=MARK)


def gate_paths(search: dict[str, Any]) -> str:
    """Draw the start index of every stream over the steps, with the gate's steepness on a thin second axis."""
    gate = search["gate"]
    with canvas(PAGE, 3.1) as figure:
        axes = figure.subplots()
        second = axes.twinx()
        steps = range(1, len(gate["steepness"]) + 1)
        second.plot(steps, gate["steepness"], ":", color=QUIET, linewidth=0.9)
        second.set_ylabel("steepness k of the gate (dotted)", color=QUIET)
        second.tick_params(length=0, colors=QUIET)
        second.grid(False)
        second.set_ylim(bottom=0)
        axes.plot(gate["starts"])
        num_starts = len(gate["ends"])
        if search.get("scores"):
            best = best_start(search)
            axes.axhline(best, color=MARK, linewidth=1, linestyle="--", zorder=1)
            num_there = gate["ends"].count(best)
            axes.set_title(
                f"{num_there} of {num_starts} starts of the gate ended at layer {best}, the best one (dashed)"
            )
        else:
            axes.set_title(f"Where {num_starts} starts of the gate went")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="optimiser step", ylabel="first removed layer")
        axes.margins(x=0.01)
        return svg_of(figure, "gate-paths", "Start index of the gate over its steps")


def surface_map(search: dict[str, Any], runs: Runs) -> str:
    """Draw the KL of every window of every length as a heat map and, beside it, the best of each length."""
    surface = {int(n): {int(s): row for s, row in rows.items()} for n, rows in search["surface"].items()}
    rates, lengths = {int(n): row for n, row in search["rates"].items()}, sorted(surface)
    grid = np.full((lengths[-1] - lengths[0] + 1, 1 + max(s for rows in surface.values() for s in rows)), math.nan)
    for n, rows in surface.items():
        for start, row in rows.items():
            grid[n - lengths[0], start] = row["kl_nats"]
    lowest = min((value for value in grid.flat if value > 0), default=1.0)
    with canvas(PAGE, 3.5) as figure:
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.5, 1))
        extent = (-0.5, grid.shape[1] - 0.5, lengths[0] - 0.5, lengths[-1] + 0.5)
        scale = {"norm": LogNorm(lowest, max(np.nanmax(grid), 1.01 * lowest)), "cmap": "cividis"}
        drawn = np.maximum(grid, lowest)
        image = left.imshow(drawn, origin="lower", extent=extent, aspect="auto", interpolation="nearest", **scale)
        bar = figure.colorbar(image, ax=left, location="bottom", label="KL to the parent (nats per token)", aspect=40)
        bar.ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        bar.ax.xaxis.set_major_formatter(PLAIN)
        bar.ax.minorticks_off()
        bar.outline.set_visible(False)  # type: ignore[operator]
        left.plot([rates[n]["start"] for n in rates], list(rates), "o", color=MARK, markersize=3.2)
        left.set(xlabel="first removed layer", ylabel="layers removed", title="All windows; red: the best of each row")
        left.spines[:].set_visible(False)
        left.grid(False)
        left.yaxis.set_major_locator(MaxNLocator(integer=True))
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
        _best_of_lengths(right, rates, search.get("target") or {}, sum(stop - start for start, stop in runs))
        return svg_of(figure, "surface-map", "KL of the windows of every length, and the best of each")


def _best_of_lengths(axes: Axes, rates: dict[int, dict[str, Any]], target: dict[str, Any], chosen: int) -> None:
    """Draw the lowest KL of each length with its error, the chosen length, and what was asked for."""
    values, errors = [row["kl_nats"] for row in rates.values()], [row["se"] or 0.0 for row in rates.values()]
    kind = {"fmt": "o-", "color": CURVE, "markersize": 3.2, "capsize": 2, "elinewidth": 0.8, "linewidth": 1}
    axes.errorbar(values, list(rates), xerr=errors, **kind)
    if chosen in rates:
        axes.plot(rates[chosen]["kl_nats"], chosen, "o", color=MARK, markersize=7, label=f"{chosen} removed", zorder=4)
    if target.get("kind") == "max_kl":
        asked = target["asked_kl_nats"]
        axes.axvline(asked, color=MARK, linewidth=1, linestyle="--", label=f"asked: {asked:g} nats")
    axes.set(xlabel="KL of the best window", title="The best of each length")
    axes.set_xlim(left=0)
    axes.grid(True, axis="x")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right")
