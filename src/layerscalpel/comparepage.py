"""Write a comparison as one HTML page that needs nothing from outside itself, as Markdown and as JSON.

write_comparison(comparison, Path("runs/compared"))
"""

from __future__ import annotations

from pathlib import Path

from layerscalpel.card import environment
from layerscalpel.compare import Comparison
from layerscalpel.comparewords import DIFFERENCES, difference_rows, headings, legend, markdown, table
from layerscalpel.rundir import write_json

PAGE = "compare.html"


def render_comparison(comparison: Comparison) -> str:
    """Return the page."""
    template = environment(autoescape=True).get_template("compare.html.j2")
    return template.render(
        headings=headings(comparison),
        rows=table(comparison),
        difference_headings=DIFFERENCES,
        differences=difference_rows(comparison),
        legend=legend(comparison),
        notes=comparison.notes,
        num_runs=len({run.path for row in comparison.rows for run in row.runs.values()}),
    )


def write_comparison(comparison: Comparison, folder: Path) -> Path:
    """Write compare.html, compare.md and compare.json; return the page."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PAGE).write_text(render_comparison(comparison), encoding="utf-8")
    (folder / "compare.md").write_text(markdown(comparison), encoding="utf-8")
    write_json(folder / "compare.json", comparison.to_dict())
    return folder / PAGE
