"""What of a parent's scores a child keeps: plain, and adjusted for chance, each with a paired standard error.

Plain retention is child / parent. It misleads: who always says yes scores the share of the most common answer, which
is more than some parents reach. Adjusted retention is (child - chance) / (parent - chance), over the tasks where the
parent is at least three standard errors above chance: the parent alone decides what counts. Either is the unweighted
mean of the tasks' ratios. An adjusted one below 0 stays what it is: worse than guessing.

Errors are those of a bootstrap over items, parent and child drawn together (paired.py). Tasks are drawn apart.

Source: this project, docs/methods.md#retention.

Dimensions: I items, R rows: the measured value, and that of each draw.

    found = retentions(load_items(run, "parent"), load_items(run, "healed"))
    found.adjusted  # Measured(value=0.83, se=0.02, n=7500)
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from layerscalpel.errors import UserError
from layerscalpel.items import TaskResult, figure
from layerscalpel.losses import Measured
from layerscalpel.paired import Difference, Floats, difference_of, drawn_means, ratio_above, spread_of

Tasks = Mapping[str, TaskResult]
ABOVE = 3
"""Standard errors above chance from which on a score is more than guessing."""


@dataclass(frozen=True)
class TaskRetention:
    """One task."""

    metric: str
    chance: float | None
    parent: Measured
    child: Measured
    plain: Measured | None
    """Child / parent; None where the parent has 0."""
    adjusted: Measured | None
    """(child - chance) / (parent - chance); None where the task does not count."""
    child_guesses: bool
    """Whether the child is less than three standard errors above chance, or chance is not known."""


@dataclass(frozen=True)
class Retentions:
    """What a child keeps of its parent's scores; None where no task is left to say so."""

    plain: Measured | None
    adjusted: Measured | None
    tasks: dict[str, TaskRetention]
    left_out: dict[str, str]
    """Tasks that have no retention, with the reason."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for results.json; what is None is absent."""
        tasks = {}
        for name, task in self.tasks.items():
            known = {"counts": task.adjusted is not None, "at_chance": task.chance is not None and task.child_guesses}
            tasks[name] = known | _present(plain_fraction=task.plain, adjusted_fraction=task.adjusted)
        found = _present(plain_fraction=self.plain, adjusted_fraction=self.adjusted)
        return found | {"by_task": tasks, "left_out": self.left_out}


def retentions(parent: Tasks, child: Tasks, *, seed: int = 0) -> Retentions:
    """Return both retentions of a child.

    Args:
        parent: what the uncut model scored, item by item.
        child: the same of the other model; the order of items may differ.
        seed: of the bootstrap.

    Raises:
        UserError: the two were asked different items, or judged by different metrics.
    """
    left_out = _left_out(parent, [child])
    tasks, plain, adjusted = {}, _Mean(), _Mean()
    for name in (name for name in parent if name not in left_out):
        own, other = parent[name], child[name]
        means_RK = _drawn(name, [own, other], seed)
        ratios = [
            None if floor is None else mean.taken(ratio_above(means_RK[:, 0], means_RK[:, 1], floor), len(own.ids))
            for mean, floor in zip((plain, adjusted), _floors(own), strict=True)
        ]
        scores = [figure(own.metric, result.values[own.metric]) for result in (own, other)]
        guesses = not above_chance(scores[1], own.chance)
        tasks[name] = TaskRetention(own.metric, own.chance, scores[0], scores[1], ratios[0], ratios[1], guesses)
    return Retentions(plain.measured(), adjusted.measured(), tasks, left_out)


def compare_children(
    parent: Tasks, first: Tasks, second: Tasks, *, seed: int = 0
) -> tuple[Difference | None, Difference | None]:
    """Return (plain, adjusted) retention of the first child less the second's; all three models are drawn together.

    Args:
        parent: what the uncut model scored; it decides which tasks count.
        first: the same of one child.
        second: the same of another.
        seed: of the bootstrap.

    Raises:
        UserError: as `retentions`.
    """
    left_out = _left_out(parent, [first, second])
    pairs = [(_Mean(), _Mean()), (_Mean(), _Mean())]  # plain and adjusted, of either child
    for name in (name for name in parent if name not in left_out):
        parent_R, *children = _drawn(name, [parent[name], first[name], second[name]], seed).T
        for pair, floor in zip(pairs, _floors(parent[name]), strict=True):
            if floor is not None:
                for mean, child_R in zip(pair, children, strict=True):
                    mean.taken(ratio_above(parent_R, child_R, floor), len(parent[name].ids))
    plain, adjusted = (one.less(other) for one, other in pairs)
    return plain, adjusted


class _Mean:
    """The unweighted mean of tasks' ratios."""

    def __init__(self) -> None:
        self.rows: list[Floats] = []
        self.num_items = 0

    def taken(self, ratio_R: Floats, num_items: int) -> Measured:
        """Take in a task, and return its own ratio."""
        self.rows.append(ratio_R)
        self.num_items += num_items
        return spread_of(ratio_R, num_items)

    def measured(self) -> Measured | None:
        return spread_of(np.mean(self.rows, axis=0), self.num_items) if self.rows else None

    def less(self, other: _Mean) -> Difference | None:
        if not self.rows:
            return None
        return difference_of(np.mean(self.rows, axis=0), np.mean(other.rows, axis=0), self.num_items)


def above_chance(found: Measured, chance: float | None) -> bool:
    """Tell whether a score is at least three standard errors above chance; no, where chance is not known.

    Where all items came out alike their spread is 0 and tells nothing: the error of guessing takes its place.
    """
    if chance is None or found.n < 2:
        return False
    guessing = max(0.0, chance * (1 - chance) / found.n) ** 0.5
    return found.value > chance and found.value >= chance + ABOVE * (found.se or guessing)


def _floors(parent: TaskResult) -> tuple[float | None, float | None]:
    """Return what is taken off scores for the plain and the adjusted ratio, None where a task has none."""
    found = figure(parent.metric, parent.values[parent.metric])
    return 0.0 if found.value > 0 else None, parent.chance if above_chance(found, parent.chance) else None


def _left_out(parent: Tasks, children: Sequence[Tasks]) -> dict[str, str]:
    """Return {task: reason} of those that have no retention; the others were asked alike."""
    found = {}
    for name in dict.fromkeys([*parent, *(name for child in children for name in child)]):
        if not all(name in tasks for tasks in (parent, *children)):
            found[name] = "not measured on all models"
        elif not parent[name].higher_is_better:
            found[name] = f"less {parent[name].metric} is better"
        elif parent[name].metric not in parent[name].values:
            found[name] = f"{parent[name].metric} has no value an item"
        else:
            for child in children:
                _require_alike(name, parent[name], child[name])
    return found


def _require_alike(name: str, parent: TaskResult, child: TaskResult) -> None:
    if sorted(parent.ids) != sorted(child.ids):
        raise UserError(
            f"the models were asked different items of {name} ({len(parent.ids):,} and {len(child.ids):,})"
            " - allowed: the same items for all - evaluate them with the same --tasks and --limit"
        )
    if parent.metric not in child.values:
        raise UserError(
            f"{name} is judged by {parent.metric} for one model and by {child.metric} for another - allowed: one metric"
            " - evaluate them with the same version of the task"
        )


def _drawn(name: str, results: Sequence[TaskResult], seed: int) -> Floats:
    """Return the mean score of every model, the models drawn together; each task has draws of its own."""
    values = []
    for result in results:
        order = sorted(range(len(result.ids)), key=result.ids.__getitem__)
        values.append(result.values[results[0].metric][order])
    return drawn_means(values, seed=(seed, zlib.crc32(name.encode())))


def _present(**items: Measured | None) -> dict[str, Any]:
    return {name: item.to_dict() for name, item in items.items() if item is not None}
