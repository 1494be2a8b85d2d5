"""The table of tasks for a person at a terminal: scores of all models, what is kept of them, and warnings.

console.print(tasks_table(results))
"""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from layerscalpel.summary import Results, measured, with_error
from layerscalpel.taskwords import UNCOUNTED, overlap_text, retention_rows, task_models, task_rows, task_warnings


def print_tasks(results: Results, console: Console) -> None:
    """Print the scores, and what makes them misleading; nothing where no task was measured."""
    if not task_models(results):
        return
    console.print(tasks_table(results))
    for line in [*task_warnings(results), *([overlap_text(results)] if overlap_text(results) else [])]:
        console.print(escape(line), highlight=False)


def tasks_table(results: Results) -> Table:
    """Return one row a task, and one for each retention."""
    rows, models = task_rows(results), task_models(results)
    starred = any(row["counts"] is False for row in rows)
    note = f"; {UNCOUNTED}" if starred else ""
    table = Table(title=f"in %, ± is one standard error over items{note}", box=box.SIMPLE_HEAD)
    table.title_style, table.title_justify, table.collapse_padding, table.pad_edge = "dim", "left", True, False
    table.add_column("task (metric)", overflow="fold")  # nothing is cut off where there is no room
    table.add_column("chance", justify="right", no_wrap=True)
    for title in models:
        table.add_column(title, justify="right", overflow="fold")
    for row in rows:
        scores = [_score(row["scores"][model], row["scale"]) for model in models]
        table.add_row(escape(row["name"]), row["chance"].replace("–", "-"), *scores)
    for row in retention_rows(results):
        kept = [_score(row["kept"][model], 100) if model in row["kept"] else "" for model in models]
        table.add_row(f"{row['name']}, {row['of']}", "", *kept)
    return table


def _score(found: dict[str, Any] | None, scale: int) -> str:
    if not found:
        return "-"
    return with_error(found, percent=True).removesuffix(" %") if scale == 100 else measured(found)
