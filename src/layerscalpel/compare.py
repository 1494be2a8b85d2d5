"""Compare finished runs: one row a model, what does not compare left out with its reason, the best told by a test.

Runs that differ in the seed alone are one row, mean and spread. Figures on text stand beside each other only where the
text is the same but for the seed, retentions only over the tasks that all have measured alike.

    groups, notes = grouped([read_run("runs/a"), read_run("runs/b")])
    compare(groups, notes=notes).to_dict()
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from layerscalpel.alike import (
    common_tasks,
    other_text,
    other_timing,
    parent_notes,
    require_one_tokenizer,
    seed_notes,
    signatures_of,
)
from layerscalpel.contest import RETENTIONS, Contest, Row, averaged, contests, marked
from layerscalpel.gather import BASELINE, STAGE_OF, Group, Run
from layerscalpel.retention import retentions
from layerscalpel.summary import num_bytes, removed_segments

ON_TEXT = ("kl_nats", "top1_agreement_fraction", "ppl_ratio")
SPEED = {"prefill_speedup": "prefill", "decode_speedup": "decode"}
MEASURES = (*ON_TEXT, *RETENTIONS, *SPEED)
TEXT_OFF = "KL, agreement and perplexity"


@dataclass(frozen=True)
class Comparison:
    """All that is told of several runs."""

    parents: tuple[dict[str, Any], ...]
    rows: tuple[Row, ...]
    contests: tuple[Contest, ...]
    tasks: tuple[str, ...]
    """Those that all have measured alike; which of them a retention is over is said by row."""
    notes: tuple[str, ...]
    """What differs, what was left out and why."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; `best` and `other` of a difference are labels of rows."""
        differences = [
            {"measure": one.measure, "best": one.best.label, "other": other.label}
            | (found.to_dict() if found else {"untested": one.untested[other.label]})
            for one in self.contests
            for other, found in one.differences
        ]
        rows = [_plain(row) for row in self.rows]
        head = {"parents": list(self.parents), "tasks": list(self.tasks), "notes": list(self.notes)}
        return head | {"rows": rows, "differences": differences}


def _plain(row: Row) -> dict[str, Any]:
    own = {name: getattr(row, name) for name in ("label", "name", "method", "model", "healing")}
    own |= {"segments": list(row.segments), "layers_removed": row.num_removed}
    own |= {"parameters": row.parameters, "bytes": row.num_bytes}
    own |= {"seeds": list(row.runs), "runs": [str(run.path) for run in row.runs.values()], "best": list(row.best)}
    own |= {"tasks": {name: list(tasks) for name, tasks in row.tasks.items()}}
    return own | {name: found for name in MEASURES if (found := row.figure(name))}


def compare(groups: Sequence[Group], baselines: Sequence[Group] = (), notes: Sequence[str] = ()) -> Comparison:
    """Compare groups of runs, the first one being what others must match.

    Args:
        groups: runs that differ in the seed alone are one.
        baselines: other models, measured on the text and tasks of the runs.
        notes: what was left out before.

    Raises:
        UserError: tokenizers differ.
    """
    require_one_tokenizer([run for group in groups for run in group.runs.values()])
    told = [*notes, *parent_notes(groups), *seed_notes(groups)]
    left_out: dict[str, set[str]] = {group.name: set() for group in [*groups, *baselines]}
    for differs, measures, words in ((other_text, ON_TEXT, TEXT_OFF), (other_timing, SPEED, "speed-ups")):
        for group in groups:
            if why := differs(groups[0], group):
                left_out[group.name] |= set(measures)
                told.append(f"{group.name} {why} than {groups[0].name}: its {words} are left out")
    tasks, task_notes = common_tasks([*groups, *baselines])
    told += task_notes
    rows = [
        _row(group, model, tasks, left_out[group.name])
        for group in [*groups, *baselines]
        for model in STAGE_OF
        if all(model in run.models for run in group.runs.values())
    ]
    rows = _merged(rows)
    found = contests(rows, tasks)
    told += dict.fromkeys(f"{label} is not tested: {why}" for one in found for label, why in one.untested.items())
    parents = {group.first.parent: group.first.results["parent"] for group in groups}
    rows = marked(rows, found)
    return Comparison(tuple(parents.values()), tuple(rows), tuple(found), tuple(tasks), tuple(told))


def _row(group: Group, model: str, tasks: Sequence[str], left_out: set[str]) -> Row:
    runs = group.runs.values()
    sizes = [run.results.get(STAGE_OF[model], {}) for run in runs]
    sizes = [run.results[size["of"]] if model == "quantized" else size for run, size in zip(runs, sizes, strict=True)]
    own = model != BASELINE
    return Row(
        name=group.name,
        method=group.method,
        model=model,
        healing=_healing(group.first, model),
        segments=tuple(dict.fromkeys(run.segment for run in runs)) if own else (),
        num_removed=sum(map(len, removed_segments(group.first.results))) if own else None,
        parameters=_mean([size.get("parameters") for size in sizes]),
        num_bytes=_mean([num_bytes(run.results, STAGE_OF[model]) for run in runs]),
        runs=group.runs,
        by_seed={
            name: {seed: _figure(run, model, name, tasks) for seed, run in group.runs.items()}
            for name in MEASURES
            if name not in left_out
        },
        tasks={name: over for name in RETENTIONS if (over := _over(name, [_kept(run, model, tasks) for run in runs]))},
    )


def _over(measure: str, found: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Return the tasks that a retention of some runs is the mean of."""
    tasks = (task for one in found for task, own in one.get("by_task", {}).items() if measure in own)
    return tuple(dict.fromkeys(tasks))


def _mean(numbers: Sequence[int | None]) -> int | None:
    known = [number for number in numbers if number is not None]
    return round(sum(known) / len(known)) if len(known) == len(numbers) else None


def _healing(run: Run, model: str) -> str:
    if model == "healed":
        found = run.results.get("heal", {})
        name = f"{found.get('method', 'healed')}, {found['objective']}" if "objective" in found else "healed"
        return f"{name} (failed)" if found.get("failed") else name
    if model == "quantized":
        found = run.results["quantize"]
        name = {"cut": "cut", "stitch": "stitched", "heal": "healed"}[found["of"]]
        return f"{_healing(run, name)}; {found['method']}, {found['bits']} bits"
    return f"stitch {run.results['stitch']['method']}" if model == "stitched" else "–" if model == BASELINE else "none"


def _figure(run: Run, model: str, measure: str, tasks: Sequence[str]) -> dict[str, Any] | None:
    found = run.results["evaluate"][model]
    if measure in ON_TEXT:
        return found.get(measure)
    if measure in RETENTIONS:
        return _kept(run, model, tasks).get(measure)
    speedup = run.results.get("benchmark", {}).get("speedup", {})
    return speedup.get(SPEED[measure]) if speedup.get("of") == model else None


def _kept(run: Run, model: str, tasks: Sequence[str]) -> dict[str, Any]:
    """Return what a model keeps on the tasks that all have, if anything; computed anew where the run has more."""
    if not tasks or not set(tasks) <= set(signatures_of(run)):
        return {}
    if set(signatures_of(run)) == set(tasks):
        return run.results["evaluate"][model].get("retention", {})
    parent, child = run.items("parent"), run.items(model)
    if parent is None or child is None:
        return {}
    key = ("retention", model, tuple(tasks))
    if key not in run.read:
        run.read[key] = retentions({name: parent[name] for name in tasks}, averaged([child], tasks)).to_dict()
    return run.read[key]


def _merged(rows: Sequence[Row]) -> list[Row]:
    """Return the rows, models that were cut alike, not healed, and measured alike as one."""
    found: dict[Any, Row] = {}
    for row in rows:
        facts = {seed: (run.parent, run.segment, run.text) for seed, run in row.runs.items()}
        tasks = [signatures_of(run) for run in row.runs.values()]
        key = json.dumps([facts, tasks, row.by_seed], sort_keys=True) if row.model == "cut" else row.label
        if key not in found:
            found[key] = row
            continue
        one = found[key]
        method = ", ".join(dict.fromkeys([*one.method.split(", "), *row.method.split(", ")]))
        found[key] = replace(one, name=", ".join(dict.fromkeys([one.name, row.name])), method=method)
    return list(found.values())
