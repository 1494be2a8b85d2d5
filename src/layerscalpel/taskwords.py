"""What tasks found, in rows and sentences: scores, both retentions, what makes them misleading, and overlaps.

task_words(results)["task_rows"]  # [{"task": "piqa", "chance": "50", "scores": {"parent": {...}, ...}, ...}]
"""

from __future__ import annotations

from typing import Any

from layerscalpel.summary import MODELS, Results, measured

Row = dict[str, Any]
RETENTIONS = {"plain_fraction": "plain retention", "adjusted_fraction": "adjusted retention"}
MANY = 0.01
"""Share of a task's items from which on an overlap is warned of."""


def task_words(results: Results) -> dict[str, Any]:
    """Return what the templates read."""
    return {
        "task_models": task_models(results),
        "task_rows": task_rows(results),
        "retention_rows": retention_rows(results),
        "task_text": task_text(results),
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
    """Return one row {task, metric, chance, counts, scale, scores, kept} a task; `kept` has each child's retentions."""
    models, rows = task_models(results), []
    if not models:
        return rows
    evaluated, children = results["evaluate"], retained(results)
    for task, about in evaluated["harness"]["tasks"].items():
        kept = {name: found["by_task"].get(task, {}) for name, found in children.items()}
        metric, chance = about["metric"], about["chance"]
        rows.append(
            {
                "task": task,
                "metric": metric,
                "chance": "–" if chance is None else f"{100 * chance:.1f}",
                "counts": next((item["counts"] for item in kept.values() if item), None),
                "scale": 1 if chance is None else 100,
                "scores": {name: evaluated[name]["tasks"].get(task, {}).get(metric) for name in models},
                "kept": kept,
            }
        )
    return rows


def retention_rows(results: Results) -> list[Row]:
    """Return one row {key, name, of, kept: {child: measured}} a retention that was measured."""
    children = retained(results)
    rows = []
    for key, name in RETENTIONS.items():
        kept = {child: found.get(key) for child, found in children.items()}
        counted = sum(key in item for item in next(iter(children.values()))["by_task"].values()) if children else 0
        if any(kept.values()):
            of = f"{counted} task{'s' * (counted != 1)}"
            rows.append({"key": key, "name": name, "of": of, "kept": kept})
    return rows


def task_text(results: Results) -> str:
    """Say how tasks were measured; nothing where none were."""
    if not task_models(results):
        return ""
    harness = results["evaluate"]["harness"]
    tasks, limit = harness["tasks"], harness.get("limit")
    shots = sorted({about["num_fewshot"] for about in tasks.values()})
    said = [
        f"Measured by lm-evaluation-harness {harness['lm_eval']}, the same items and batches for all models,"
        f" {' or '.join(map(str, shots))} examples before each item"
        f"{f', at most {limit:,} items a task' if limit else ''}."
    ]
    cut_short = {task: about["cut_short"] for task, about in tasks.items() if about.get("cut_short")}
    said += [
        f"{count:,} sequences of {task} lost their beginning: they are longer than the context."
        for task, count in cut_short.items()
    ]
    left_out = {task: why for found in retained(results).values() for task, why in found["left_out"].items()}
    said += [f"{task} has no retention: {why}." for task, why in left_out.items()]
    return " ".join(said)


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
            before, after = (100 * row["scores"][model]["value"] for model in ("parent", name))
            guessing = f", where guessing gives {row['chance']}" if row["chance"] != "–" else ""
            risen.append(f"{row['task']} rose from {before:.1f} to {after:.1f} %{guessing}")
    told = measured(kept["plain_fraction"], 100)
    adjusted = kept.get("adjusted_fraction")
    other = f" Adjusted for chance it is {measured(adjusted, 100)} %." if adjusted else ""
    return f"The plain retention of the {name} model is {told} %, above 100 %: {'; '.join(risen)}.{other}"


def _at_chance(results: Results) -> list[str]:
    """Name the tasks on which the parent, and the last child, are no better than guessing."""
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
    rest = " What the parent guesses does not count in the adjusted retention." if guessed["parent"] else ""
    return [f"No better than guessing: {'; '.join(told)}.{rest}"]


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
    left = f" {short:,} items have fewer words and were not looked for." if short else ""
    return f"Items that share 13 words in a row with text that healed or calibrated: {told or 'none'}.{left}"


def kept_text(results: Results) -> str:
    """Return both retentions of the last child as a part of a sentence; nothing where none was measured."""
    children = retained(results)
    if not children:
        return ""
    last = list(children.values())[-1]
    names = {"plain_fraction": "plain retention", "adjusted_fraction": "adjusted for chance"}
    return ", ".join(f"{name} {measured(last[key], 100)} %" for key, name in names.items() if key in last)
