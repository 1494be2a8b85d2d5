"""What of several runs compares: tokenizers, held-out text, tasks and timing are alike, or it is said what differs.

tasks, notes = common_tasks(groups)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from layerscalpel.errors import UserError
from layerscalpel.gather import TEXT_SETTINGS, Group, Run

TIMING = ("device", "threads", "mode", "batch_size", "prompt_tokens", "new_tokens")
"""What a speed-up depends on."""
UNKNOWN = "not kept by "
OLD = ", or in one that an older version did not keep - measure anew: scalpel evaluate DIR"


def require_one_tokenizer(runs: Sequence[Run]) -> None:
    """Refuse runs whose tokens are not the same.

    Raises:
        UserError: two tokenizers differ.
    """
    known: dict[str, Run] = {}
    for run in runs:
        blocks = run.blocks("parent")
        if blocks:
            known.setdefault(blocks.tokenizer, run)
    if len(known) > 1:
        one, other = list(known.values())[:2]
        raise UserError(
            f"the tokenizers of {one.path} and {other.path} differ, so a token is not the same in both"
            " - allowed: runs of parents with one tokenizer - compare them apart"
        )


def parent_notes(groups: Sequence[Group]) -> Iterator[str]:
    """Yield what is to be said where parents differ."""
    parents = dict.fromkeys(group.first.parent for group in groups)
    if len(parents) > 1:
        names = ", ".join(dict.fromkeys(Path(place).name for place, _, _ in parents))
        yield f"the parents differ ({names}): figures are those against each own parent, and the best is of one parent"


def seed_notes(groups: Sequence[Group]) -> Iterator[str]:
    """Yield what is to be said where seeds differ."""
    if len({tuple(sorted(group.runs)) for group in groups}) > 1:
        seeds = "; ".join(f"{group.name}: {', '.join(map(str, sorted(group.runs)))}" for group in groups)
        yield f"seeds differ ({seeds}): tests take those that both have"


def other_text(first: Group, other: Group) -> str | None:
    """Return in words how the held-out text differs from the first group's by more than the seed, or None."""
    shared = [seed for seed in first.runs if seed in other.runs]
    if any(first.runs[seed].text != other.runs[seed].text for seed in shared):
        return "was measured on other held-out text"
    settings = [[group.first.settings["data"].get(key) for key in TEXT_SETTINGS] for group in (first, other)]
    if not shared and settings[0] != settings[1]:
        return "was measured on held-out text of other settings"
    return None


def other_timing(first: Group, other: Group) -> str | None:
    """Return in words that a group was timed in another way than the first one that was timed, or None."""
    found = [run.results["benchmark"] for group in (first, other) for run in group.runs.values() if _timed(run)]
    ways = [{name: row.get(name) for name in TIMING} for row in found]
    differ = sorted({name for way in ways for name in TIMING if way[name] != ways[0][name]})
    return f"was timed with another {', '.join(differ)}" if differ else None


def _timed(run: Run) -> bool:
    return "speedup" in run.results.get("benchmark", {})


def common_tasks(groups: Sequence[Group]) -> tuple[list[str], list[str]]:
    """Return the tasks that all groups with tasks have measured alike, and notes on the others."""
    asked = {group.name: ways(group) for group in groups}
    having = {name: found for name, found in asked.items() if found}
    if not having:
        return [], []
    notes = [f"no task was measured on {name}: its retentions are left out" for name in asked if name not in having]
    tasks, first = [], next(iter(having.values()))
    for task in dict.fromkeys(task for found in having.values() for task in found):
        absent = [name for name, found in having.items() if task not in found]
        other = [name for name, found in having.items() if task in found and found[task] != first.get(task, ())[:1]]
        if absent:
            notes.append(f"{task} is left out of the retentions: it was not measured on {', '.join(absent)}")
        elif other:
            old = any(UNKNOWN in way for found in having.values() for way in found[task])
            why = f"measured it in another way{OLD if old else ''}"
            notes.append(f"{task} is left out of the retentions: {', '.join(other)} {why}")
        else:
            tasks.append(task)
    return tasks, notes


def ways(group: Group) -> dict[str, tuple[str, ...]]:
    """Return {task: the ways in which the runs of a group measured it} of the tasks that all of them have."""
    found = [signatures_of(run) for run in group.runs.values()]
    shared = (task for task in found[0] if all(task in other for other in found))
    return {task: tuple(dict.fromkeys(other[task] for other in found)) for task in shared}


def signatures_of(run: Run) -> dict[str, str]:
    """Return {task: how it was measured}: settings, software, and a hash of its prompts, metrics and items."""
    harness = run.results["evaluate"].get("harness", {})
    shared = [harness.get(name) for name in ("lm_eval", "limit", "chat_template")]
    names = ("metric", "num_items", "num_fewshot", "version", "task_tokens")
    return {
        task: json.dumps([*shared, *(how.get(name) for name in names), how.get("definition", f"{UNKNOWN}{run.path}")])
        for task, how in harness.get("tasks", {}).items()
    }
