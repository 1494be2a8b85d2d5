"""Write what a run found as one HTML page.

page = render_report(results, to_dict(config), provenance)
"""

from __future__ import annotations

from typing import Any

import yaml
from markupsafe import Markup

from layerscalpel import layerplots, longplots, plots, searchplots, taskplots
from layerscalpel.card import environment, words
from layerscalpel.distancewords import by_position
from layerscalpel.longwords import compared
from layerscalpel.summary import Results, removed_segments
from layerscalpel.taskwords import retention_rows, task_rows


def render_report(results: Results, config: dict[str, Any], provenance: dict[str, Any]) -> str:
    """Return one HTML page that needs nothing from outside itself."""
    template = environment(autoescape=True).get_template("report.html.j2")
    figures = {name: Markup(svg) for name, svg in _figures(results).items()}
    settings = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    return template.render(words(results), figures=figures, config_yaml=settings, provenance=provenance)


def _figures(results: Results) -> dict[str, str]:
    """Return every figure that the results allow, as SVG text."""
    kept, along = [row for row in retention_rows(results) if any(row["kept"].values())], by_position(results)
    search, runs = results.get("search", {}), [(run.start, run.stop) for run in removed_segments(results)]
    drawings = {
        "kl_curve": (search.get("scores"), lambda: searchplots.kl_curve(search, runs)),
        "gate_paths": (search.get("gate"), lambda: searchplots.gate_paths(search)),
        "surface_map": (search.get("surface"), lambda: searchplots.surface_map(search, runs)),
        "layer_profiles": (search.get("layers"), lambda: layerplots.layer_profiles(search, runs)),
        "similarity_map": (search.get("similarity"), lambda: layerplots.similarity_map(search, runs)),
        "loss_curve": (results.get("heal"), lambda: plots.loss_curve(results["heal"])),
        "quality_bars": (results.get("evaluate"), lambda: plots.quality_bars(results["evaluate"])),
        "kl_by_position": (along, lambda: longplots.kl_by_position(along)),
        "retention_bars": (kept, lambda: taskplots.retention_bars(kept, task_rows(results))),
        "ratio_by_position": (compared(results), lambda: longplots.ratio_by_position(compared(results))),
        "speed_bars": (results.get("benchmark"), lambda: plots.speed_bars(results["benchmark"])),
    }
    return {name: draw() for name, (material, draw) in drawings.items() if material}
