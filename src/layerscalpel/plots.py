"""Draw parts of results.json as SVG text that stands inside an HTML page; searchplots.py draws the search.

Text and axes take the page's own colour (`currentColor`), so one drawing reads well on a light and on a dark page. The
same values give the same bytes. The global state of pyplot is never touched.

    svg = loss_curve(results["heal"])
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from layerscalpel.healwords import loss_unit, objective_words, phases_of, total_loss

INK = "#010203"
"""Stands for the page's text colour until the SVG is written."""
QUIET, MARK, OTHER_MODEL = "#8a8f98", "#d2603f", "#9a6fb8"
MODELS = {"parent": "#8a8f98", "cut": "#bd8a2e", "stitched": "#4a86c5", "healed": "#3f8f86", "quantized": "#8a5fb0"}
"""Middle tones: a contrast of 2.9 or more to the page, light and dark."""
PAGE = 6.6
"""Width of a figure that fills the page, in inches."""
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.linewidth", "xtick.major.width", "ytick.major.width"), 0.6),
    **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 3),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.formatter.useoffset", "legend.frameon"), False),
    **dict.fromkeys(("grid.color", "legend.labelcolor"), INK),
    **dict.fromkeys(("axes.axisbelow", "axes.grid"), True),
    "axes.grid.axis": "y",
    "axes.prop_cycle": cycler(color=["#4a86c5", "#3f8f86", "#bd8a2e", "#9a6fb8", "#6f9a3f", "#c2607f"]),
    "grid.alpha": 0.13,
    "grid.linewidth": 0.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "layerscalpel",
    "text.parse_math": False,
}
LONGEST_LABEL = 40
"""Letters beside an axis that is as high as a figure of healing."""
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")


@contextlib.contextmanager
def canvas(width: float, height: float) -> Iterator[Figure]:
    """Give a figure of that many inches in the house style."""
    with matplotlib.rc_context(STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def svg_of(figure: Figure, name: str, label: str) -> str:
    """Return the figure as one <svg> element whose ids begin with `name`; it grows with the page."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue().partition("<svg")[2]
    text = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'url\(#|href="#', lambda found: found.group() + f"{name}-", text)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text)
    style = f"stroke-linejoin: round; max-width: {100 * figure.get_figwidth() / PAGE:.0f}%"
    text = f'<svg role="img" aria-label="{label}" style="{style}"' + text.replace(INK, "currentColor")
    text = text.replace("'DejaVu Sans'", "system-ui, 'Segoe UI', Helvetica, 'DejaVu Sans', sans-serif")
    return "\n".join(line for line in text.splitlines() if line.strip())


def log_where_needed(axes: Axes, values: Sequence[float]) -> bool:
    """Give the second axis a logarithmic scale if the values span more than a decade, and tell whether they do."""
    needed = 0 < 10 * min(values) < max(values)
    if needed:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(PLAIN)
        axes.minorticks_off()
    return needed


def loss_curve(heal: dict[str, Any]) -> str:
    """Draw the training loss as a thin line, the held-out loss as points, and the step kept, phase after phase."""
    phases, began = phases_of(heal), 0
    with canvas(PAGE, 3.1) as figure:
        axes = figure.subplots()
        for number, phase in enumerate(phases):
            _loss_of(axes, phase, began, first=number == 0)
            began += phase["steps"]
            if number < len(phases) - 1:
                axes.axvline(began, color=INK, linewidth=0.8, linestyle=":", label="second phase begins")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        terms = objective_words(heal)
        name = terms if len(terms) <= LONGEST_LABEL else "loss, all of its terms"
        axes.set(xlabel="optimiser step", ylabel=f"{name}\n({loss_unit(heal)})")
        axes.set_title(_loss_title(phases))
        if len(phases) > 1:  # too much to stand beside the lines
            figure.legend(loc="outside lower center", ncols=3)
        else:
            axes.legend(loc="best")
        return svg_of(figure, "loss-curve", "Loss of healing over its steps")


def _loss_of(axes: Axes, phase: dict[str, Any], began: int, *, first: bool) -> None:
    """Draw one phase, whose first step follows `began` others; what the first is called goes for both."""
    train, held_out = (
        [(began + row["step"], total_loss(row)) for row in phase[part]] for part in ("train", "validation")
    )
    axes.plot(*zip(*train, strict=True), color=QUIET, linewidth=0.8, label="training batches" if first else None)
    kind = {"color": MODELS["healed"], "markersize": 4, "linewidth": 1}
    axes.plot(*zip(*held_out, strict=True), "o-", **kind, label="held-out blocks" if first else None)
    kept = f"kept: step {phase['best_step']}" if first else f"kept: its step {phase['best_step']}"
    axes.axvline(began + phase["best_step"], color=MARK, linewidth=1, linestyle="--", label=kept)


def _loss_title(phases: Sequence[dict[str, Any]]) -> str:
    best = [phase["best_step"] for phase in phases]
    if len(best) > 1:
        return f"Held-out loss was lowest at step {best[0]} of the first phase, {best[1]} of the second"
    return f"Held-out loss was lowest at step {best[0]}" if best[0] else "No step lowered the held-out loss"


def _bars(axes: Axes, rows: dict[str, dict[str, Any]]) -> None:
    """Draw one bar per model with its standard error and value."""
    for place, (name, item) in enumerate(rows.items()):
        axes.bar(place, item["value"], width=0.56, color=MODELS.get(name, OTHER_MODEL))
        error = item.get("se") or 0.0
        axes.errorbar(place, item["value"], yerr=error, color=INK, elinewidth=0.9, capsize=3)
        above = (place, float(np.nansum([item["value"], error])))
        axes.annotate(f"{item['value']:.3g}", above, xytext=(0, 4), textcoords="offset points", ha="center")
    axes.set_xticks(range(len(rows)), list(rows))
    axes.set_xlim(-0.6, len(rows) - 0.4)
    axes.margins(y=0.14)
    axes.tick_params(axis="x", length=0)


def quality_bars(evaluate: dict[str, Any]) -> str:
    """Draw KL to the parent per model and, beside it, perplexity with the parent's as a line."""
    models = {name: item for name, item in evaluate.items() if isinstance(item, dict)}
    kl = {name: item["kl_nats"] for name, item in models.items() if item.get("kl_nats")}
    ppl = {name: item["ppl"] for name, item in models.items() if item.get("ppl")}
    with canvas(PAGE, 2.9) as figure:
        *left, right = figure.subplots(1, 2 if kl else 1, squeeze=False)[0]
        for axes in left:
            _bars(axes, kl)
            axes.set(title="Distance from the parent (lower is better)", ylabel="KL to the parent (nats per token)")
        _bars(right, ppl)
        right.set(title="Perplexity (lower is better)", ylabel="perplexity on held-out text")
        if "parent" in ppl:
            right.axhline(ppl["parent"]["value"], color=QUIET, linewidth=1, linestyle="--")
        return svg_of(figure, "quality-bars", "KL to the parent and perplexity per model")


def speed_bars(benchmark: dict[str, Any]) -> str:
    """Draw the time to read the prompt and the speed of writing, per model."""
    models = {name: item for name, item in benchmark.items() if isinstance(item, dict) and "prefill_s" in item}
    with canvas(PAGE, 2.9) as figure:
        prefill, decode = figure.subplots(1, 2)
        _bars(prefill, {name: item["prefill_s"] for name, item in models.items()})
        _bars(decode, {name: item["decode_tokens_per_s"] for name, item in models.items()})
        read, write = benchmark["prompt_tokens"], benchmark["new_tokens"]
        prefill.set(title=f"Reading {read} tokens (lower is better)", ylabel="prefill (s)")
        decode.set(title=f"Writing {write} tokens (higher is better)", ylabel="decode (tokens per s)")
        return svg_of(figure, "speed-bars", "Prefill time and decode speed per model")
