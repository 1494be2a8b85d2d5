"""What tasks found, in rows and sentences: scores, both retentions, what makes them misleading, and overlaps.

task_words(results)["task_rows"]  # [{"task": "piqa", "chance": "50", "scores": {"parent": {...}, ...}, ...}]
"""

from __future__ import annotations

from typing import Any

from layerscalpel.summary import MODELS, Results, measured

Row = dict[str, Any]
RETENTIONS = {"plain_fraction": "plain retention", "adjusted_fraction": "adjusted retention"}
UNCOUNTED = (
    "* does not count in the adjusted retention: the parent is not shown to be better than guessing, or chance is not"
    " known"
)
MANY = 0.01
"""Share of a task's items from which on an overlap is warned of."""


def task_words(results: Results) -> dict[str, Any]:
    """Return what the templates read."""
    return {
        "task_models": task_models(results),
        "task_rows": task_rows(results),
        "retention_rows": retention_rows(results),
        "task_text": task_text(results),
        "uncounted": UNCOUNTED,
        "overlap_text": overlap_text(results),
    }


def task_models(results: Results) -> list[str]:
    """Return the models that tasks were measured on, in order."""
    evaluated = results.get("evaluate", {})
    return [name for name in MODELS if evaluated.get(name, {}).get("tasks")]


def retained(results: Results) -> dict[str, Row]:
    """Return {child: its retention}, in order."""
    evaluated = results.get("evaluate", {})
    return {name: evaluated[name]["retention"] for name in task_models(results) if "retention" in evaluated[name]}


def task_rows(results: Results) -> list[Row]:
    """Return one row {task, name, metric, chance, counts, scale, scores, kept} a task.

    The name tells the metric, and has a * where the task does not count; `kept` has each child's retentions.
    """
    models, rows = task_models(results), []
    if not models:
        return rows
    evaluated, children = results["evaluate"], retained(results)
    for task, about in evaluated["harness"]["tasks"].items():
        kept = {name: found["by_task"].get(task, {}) for name, found in children.items()}
        metric, chance = about["metric"], about["chance"]
        counts = next((item["counts"] for item in kept.values() if item), None)
        rows.append(
            {
                "task": task,
                "name": f"{task} ({metric}){' *' if counts is False else ''}",
                "metric": metric,
                "chance": "–" if chance is None else f"{100 * chance:.1f}",
                "counts": counts,
                "scale": 1 if chance is None else 100,
                "scores": {name: evaluated[name]["tasks"].get(task, {}).get(metric) for name in models},
                "kept": kept,
            }
        )
    return rows


def retention_rows(results: Results) -> list[Row]:
    """Return one row {key, name, of, kept: {child: measured}} a retention; None where no task counts."""
    children = retained(results)
    by_task = next(iter(children.values()))["by_task"].values() if children else ()
    rows = []
    for key, name in RETENTIONS.items() if by_task else ():
        kept = {child: found.get(key) for child, found in children.items()}
        rows.append({"key": key, "name": name, "of": _many(sum(key in item for item in by_task), "task"), "kept": kept})
    return rows


def _many(number: int, word: str) -> str:
    return f"{number:,} {word}{'s' * (number != 1)}"


def task_text(results: Results) -> str:
    """Say how tasks were measured; nothing where none were."""
    if not task_models(results):
        return ""
    harness = results["evaluate"]["harness"]
    tasks, limit = harness["tasks"], harness.get("limit")
    *less, shots = sorted({about["num_fewshot"] for about in tasks.values()})
    said = [
        f"Measured by lm-evaluation-harness {harness['lm_eval']}, the same items and batches for all models,"
        f" {' or '.join([*map(str, less), _many(shots, 'example')])} before each item"
        f"{', at most ' + _many(limit, 'item') + ' a task' if limit else ''}."
    ]
    said += [_cut_short(task, about) for task, about in tasks.items() if about.get("cut_short")]
    left_out = {task: why for found in retained(results).values() for task, why in found["left_out"].items()}
    said += [f"{task} has no retention: {why}." for task, why in left_out.items()]
    return " ".join(said)


def _cut_short(task: str, about: Row) -> str:
    tokens, count = about.get("task_tokens"), about["cut_short"]
    whole = f"evaluate.task_tokens, {tokens:,}" if tokens else "the context"
    lost = f"lost {'its' if count == 1 else 'their'} beginning"
    return f"{_many(count, 'sequence')} of {task} {lost}, being longer than {whole}."


def task_warnings(results: Results) -> list[str]:
    """Return what makes the scores misleading, one sentence each."""
    found = [_above(name, kept, results) for name, kept in retained(results).items() if _plain(kept) > 1]
    return found + _at_chance(results) + _overlaps(results)


def _plain(kept: Row) -> float:
    return kept.get("plain_fraction", {}).get("value", 0.0)


def _above(name: str, kept: Row, results: Results) -> str:
    """Say that a plain retention is above 100 %, and which tasks rose."""
    risen = []
    for row in task_rows(results):
        if _plain(kept["by_task"].get(row["task"], {})) > 1:
            guessing = f" %, where guessing gives {row['chance']}" if row["chance"] != "–" else ""
            values = [row["scale"] * row["scores"][model]["value"] for model in ("parent", name)]
            risen.append(f"{row['task']} rose from {' to '.join(_apart(*values))}{guessing}")
    shown, *error = measured(kept["plain_fraction"], 100).split(" ± ")
    if float(shown.replace(",", "")) == 100:
        shown = _apart(100 * _plain(kept), 100.0)[0]
    told = " ± ".join([shown, *error])
    adjusted = kept.get("adjusted_fraction")
    other = f"Adjusted for chance it is {measured(adjusted, 100)} %." if adjusted else "No task counts in the adjusted."
    return f"The plain retention of the {name} model is {told} %, above 100 %: {'; '.join(risen)}. {other}"


def _apart(first: float, second: float) -> tuple[str, str]:
    """Return two numbers with as many places, one at least, as it takes to tell them apart."""
    places = next((n for n in range(1, 9) if f"{first:.{n}f}" != f"{second:.{n}f}"), 1)
    return f"{first:,.{places}f}", f"{second:,.{places}f}"


def _at_chance(results: Results) -> list[str]:
    """Name the tasks on which the parent, and the last child, are not shown to be better than guessing."""
    children = retained(results)
    if not children:
        return []
    name, last = list(children.items())[-1]
    chances = {task: about["chance"] for task, about in results["evaluate"]["harness"]["tasks"].items()}
    guessed = {
        "parent": [t for t, item in last["by_task"].items() if not item["counts"] and chances[t] is not None],
        f"{name} model": [t for t, item in last["by_task"].items() if item["at_chance"]],
    }
    told = [f"the {who} on {', '.join(tasks)}" for who, tasks in guessed.items() if tasks]
    if not told:
        return []
    rest = " A task where that holds of the parent does not count in the adjusted retention."
    guessing = "guessing (less than three standard errors above it)"
    return [f"Not shown to be better than {guessing}: {'; '.join(told)}.{rest if guessed['parent'] else ''}"]


def _overlaps(results: Results) -> list[str]:
    found = results.get("evaluate", {}).get("overlap", {})
    large = {task: row for task, row in found.items() if row["overlapping"] > MANY * row["num_items"]}
    if not large:
        return []
    return [
        "The model was healed or searched on text of its tasks: "
        + ", ".join(f"{row['overlapping']:,} of {row['num_items']:,} items of {task}" for task, row in large.items())
        + " share 13 words in a row with it. Their scores are no measure of new text."
    ]


def overlap_text(results: Results) -> str:
    """Say how many items of each task overlap with text that the model was made with."""
    found = results.get("evaluate", {}).get("overlap", {})
    if not found:
        return ""
    met = {task: row for task, row in found.items() if row["overlapping"]}
    told = ", ".join(f"{row['overlapping']:,} of {row['num_items']:,} of {task}" for task, row in met.items())
    short = sum(row["too_short"] for row in found.values())
    were = "has fewer words and was" if short == 1 else "have fewer words and were"
    left = f" {_many(short, 'item')} {were} not looked for." if short else ""
    return f"Items that share 13 words in a row with text that healed or calibrated: {told or 'none'}.{left}"


def kept_text(results: Results) -> str:
    """Return both retentions of the last child as a part of a sentence; nothing where none was measured."""
    children = retained(results)
    if not children:
        return ""
    last = list(children.values())[-1]
    names = {"plain_fraction": "plain retention", "adjusted_fraction": "adjusted for chance"}
    if not last["by_task"]:
        return ""
    return ", ".join(
        f"{name} {measured(last[key], 100)} %" if key in last else f"{name}: no task counts"
        for key, name in names.items()
    )
