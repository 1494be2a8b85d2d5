"""Draw what a search saw of the layers themselves: how alike hidden states are, and how measures go over the depth.

svg = layer_profiles(results["search"], [[13, 19]])
"""

from __future__ import annotations

from typing import Any

from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from layerscalpel.plots import MARK, PAGE, QUIET, canvas, log_where_needed, svg_of
from layerscalpel.searchplots import CURVE, Runs, layer_names


def similarity_map(search: dict[str, Any], runs: Runs) -> str:
    """Draw the cosine between the hidden states at all pairs of boundaries, the removed segments outlined."""
    with canvas(5.0, 4.0) as figure:
        axes = figure.subplots()
        image = axes.imshow(search["similarity"], cmap="cividis", origin="lower", interpolation="nearest")
        bar = figure.colorbar(image, ax=axes, shrink=0.85, label="cosine (1 = same direction)")
        bar.outline.set_visible(False)  # type: ignore[operator]
        for start, stop in runs:
            outline = Rectangle((start - 0.5, start - 0.5), stop - start + 1, stop - start + 1, fill=False)
            outline.set(edgecolor=MARK, linewidth=1.8)
            axes.add_patch(outline)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[:].set_visible(False)
        axes.grid(False)
        axes.set(xlabel="boundary (hidden state before that layer)", ylabel="boundary")
        axes.set_title(f"How alike hidden states are; outlined: {layer_names(runs)}")
        return svg_of(figure, "similarity-map", "Cosine between hidden states at all pairs of boundaries")


def layer_profiles(search: dict[str, Any], runs: Runs) -> str:
    """Draw, one above the other, KL and angular distance of every window and the block influence of every layer."""
    kl = {int(start): score["kl_nats"] for start, score in search["scores"].items() if "kl_nats" in score}
    angles, layers = ({int(i): row["value"] for i, row in search.get(key, {}).items()} for key in ("angles", "layers"))
    panels = {
        "KL of the window\nfrom there (nats)": kl,
        "angular distance\nof its two ends": angles,
        "block influence\nof the layer": layers,
    }
    shown = {label: rows for label, rows in panels.items() if rows}
    with canvas(PAGE, 0.6 + 1.15 * len(shown)) as figure:
        every = figure.subplots(len(shown), sharex=True, squeeze=False)[:, 0]
        for axes, (label, rows) in zip(every, shown.items(), strict=True):
            places = sorted(rows)
            lowest = min(places, key=lambda i: rows[i])
            axes.plot(places, [rows[i] for i in places], "o-", color=CURVE, markersize=2.6, linewidth=1)
            axes.plot(lowest, rows[lowest], "o", color=MARK, markersize=5)
            for start, stop in runs:
                axes.axvspan(start - 0.5, stop - 0.5, color=QUIET, alpha=0.15, linewidth=0)
            axes.set_ylabel(label)
            if not log_where_needed(axes, list(rows.values())):
                axes.set_ylim(bottom=0)
        figure.align_ylabels(every)
        every[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        every[-1].set_xlabel("layer, or the window's first one; grey: removed")
        every[0].set_title("Where each measure is lowest (red)")
        return svg_of(figure, "layer-profiles", "KL, angular distance and block influence over the layers")
