"""A comparison in words: one table for terminal, Markdown and page, the tests behind it, and what was left out.

print_comparison(comparison, Console())
(folder / "compare.md").write_text(markdown(comparison))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from layerscalpel.card import shown_name
from layerscalpel.compare import SPEED, Comparison
from layerscalpel.contest import ALPHA, RETENTIONS, Row
from layerscalpel.gather import BASELINE
from layerscalpel.speedwords import tells
from layerscalpel.summary import count, measured

WIDE = 200
"""Columns of a console where no terminal limits it."""
FACTS = ("run", "method", "removed", "n", "healing", "parameters", "MB")
TITLES = {
    "kl_nats": ("KL, nats", 1),
    "top1_agreement_fraction": ("top-1, %", 100),
    "ppl_ratio": ("perplexity\nratio", 1),
    "plain_fraction": ("plain\nretention, %", 100),
    "adjusted_fraction": ("adjusted\nretention, %", 100),
    "prefill_speedup": ("prefill,\ntimes", 1),
    "decode_speedup": ("decode,\ntimes", 1),
}
"""{measure: (title, scale of print)}"""


@dataclass(frozen=True)
class Cell:
    """One cell."""

    text: str
    best: bool = False
    number: bool = False


def headings(comparison: Comparison) -> list[Cell]:
    """Return the titles of the columns; measures that no row has are left out."""
    facts = [Cell(name, number=name in ("n", "parameters", "MB")) for name in FACTS]
    return facts[_named(comparison) :] + [Cell(TITLES[name][0], number=True) for name in _measures(comparison)]


def _named(comparison: Comparison) -> bool:
    """Whether methods name the runs, so that the first column would say it twice."""
    return all(row.name == row.method for row in comparison.rows if row.model != BASELINE)


def table(comparison: Comparison) -> list[list[Cell]]:
    """Return the rows: parents first."""
    measures, named = _measures(comparison), _named(comparison)
    found = []
    for parent in comparison.parents:
        name = shown_name(parent["name"])
        words = [f"{name} (parent)", "–", "–", "–"] if named else [name, "parent", "–", "–", "–"]
        sizes = [count(parent["parameters"], 1e6) + " M", count(parent["bytes"], 1e6)]
        blank = [Cell("–", number=True) for _ in measures]
        found.append([*map(Cell, words), *(Cell(item, number=True) for item in sizes), *blank])
    for row in comparison.rows:
        removed = "–" if row.num_removed is None else str(row.num_removed)
        baseline = f"{row.name} (baseline)" if row.model == BASELINE else row.method
        words = [baseline] if named else [row.name, row.method]
        words += [", ".join(row.segments) or "–", removed, row.healing]
        sizes = [f"{count(row.parameters, 1e6)} M", count(row.num_bytes, 1e6)]
        cells = [*map(Cell, words), *(Cell(item, number=True) for item in sizes)]
        found.append(cells + [Cell(told(row, name), name in row.best, number=True) for name in measures])
    return found


def told(row: Row, measure: str) -> str:
    """Return a measure in words: value, error, and the spread over several seeds."""
    found = row.figure(measure)
    if not found:
        return "–"
    if measure in SPEED and not tells(found):
        return "no difference\ntold"
    text = measured(found, TITLES[measure][1])
    return text if "sd" not in found else f"{text}\nsd {TITLES[measure][1] * found['sd']:.2g}"


def _measures(comparison: Comparison) -> list[str]:
    return [name for name in TITLES if any(row.figure(name) for row in comparison.rows)]


def difference_rows(comparison: Comparison) -> list[list[str]]:
    """Return {measure, best, other, difference, p} in words, of every test that was done."""
    found = []
    for one in comparison.contests:
        title, scale = TITLES[one.measure]
        for other, difference in one.differences:
            if difference is not None:
                told = measured({"value": difference.value, "se": difference.se}, scale)
                labels = [label(comparison, one.best), label(comparison, other)]
                found.append([title.replace("\n", " "), *labels, told, f"{difference.p_value:.4f}"])
    return found


def label(comparison: Comparison, row: Row) -> str:
    """Return what names a row among the others, in words."""
    same = [other for other in comparison.rows if other.name == row.name]
    return row.name if len(same) == 1 else row.label


DIFFERENCES = ("measure", "best", "less the other", "difference", "p")


def legend(comparison: Comparison) -> list[str]:
    """Return what the table's figures are, one sentence each."""
    lines = ["± is one standard error: over blocks of held-out text, over items of tasks, over rounds of timing."]
    if any(len(row.runs) > 1 for row in comparison.rows):
        lines.append(
            "Rows over several seeds are means; sd is the standard deviation over seeds, and the error is the mean of"
            " the runs' own or, where that is more, sd over the root of their number."
        )
        runs = {row.name: ", ".join(str(run.path) for run in row.runs.values()) for row in comparison.rows}
        lines.append(f"The runs: {'; '.join(f'{name} is {paths}' for name, paths in runs.items())}.")
    if comparison.contests:
        lines.append(
            "A mark (* or bold) stands where the best is told from all others of its kind (one parent, as many layers"
            f" removed, healed or not) by a paired bootstrap, p below {ALPHA} each, and every seed agrees."
            " Baselines are tested, but do not compete."
        )
    lines += [line for name in RETENTIONS if (line := _over(comparison, name))]
    if any("no difference" in told(row, name) for row in comparison.rows for name in SPEED):
        lines.append(
            "No difference in speed is told where a ratio is no further from 1 than Student's t over the rounds reaches"
            " at the level of two standard errors."
        )
    return lines


def _over(comparison: Comparison, measure: str) -> str:
    """Say which tasks a retention is over; parents may differ in what counts."""
    rows: dict[str, list[str]] = {}
    for row in comparison.rows:
        if measure in row.tasks and row.figure(measure):
            rows.setdefault(", ".join(row.tasks[measure]), []).append(label(comparison, row))
    told = [tasks if len(rows) == 1 else f"{tasks} ({', '.join(names)})" for tasks, names in rows.items()]
    name = TITLES[measure][0].partition("\n")[0]
    return f"The {name} retentions are over {'; over '.join(told)}." if told else ""


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print table, tests and notes for a person at a terminal."""
    console.print(_rich(headings(comparison), table(comparison)))
    if tests := difference_rows(comparison):
        cells = [[Cell(text, number=place > 2) for place, text in enumerate(row)] for row in tests]
        titles = [Cell(name, number=place > 2) for place, name in enumerate(DIFFERENCES)]
        console.print(_rich(titles, cells))
    for line in [*legend(comparison), *(f"note: {note}" for note in comparison.notes)]:
        console.print(escape(line), highlight=False, soft_wrap=True)


def _rich(titles: Sequence[Cell], rows: Sequence[Sequence[Cell]]) -> Table:
    found = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for title in titles:
        found.add_column(title.text, justify="right" if title.number else "left", no_wrap=title.number)
    for row in rows:
        found.add_row(*(f"[bold]{escape(cell.text)} *[/]" if cell.best else escape(cell.text) for cell in row))
    return found


def markdown(comparison: Comparison) -> str:
    """Return the comparison as Markdown."""
    titles = headings(comparison)
    lines = ["# Comparison", "", _line(cell.text for cell in titles)]
    lines.append(_line("--:" if cell.number else "---" for cell in titles))
    lines += [_line(f"**{cell.text}**" if cell.best else cell.text for cell in row) for row in table(comparison)]
    if tests := difference_rows(comparison):
        lines += ["", _line(DIFFERENCES), _line(["---"] * 3 + ["--:"] * 2), *map(_line, tests)]
    lines += ["", *(f"- {line}" for line in [*legend(comparison), *comparison.notes])]
    return "\n".join(lines) + "\n"


def _line(cells: Any) -> str:
    return "| " + " | ".join(text.replace("|", "\\|").replace("\n", "<br>") for text in cells) + " |"
