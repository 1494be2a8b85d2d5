"""Which of several models is the best, and whether that can be told: paired bootstrap over held-out blocks or items.

Models that saw the same blocks and items are drawn together, so what is hard for all hides nothing. With several seeds
the mean over the seeds that both have is tested, and every one of these seeds must say the same.

The best of its kind is marked only where it beats every other of that kind, each at the level ALPHA.

Source: this project, docs/methods.md#compare.

Dimensions: N blocks, R rows of a bootstrap.

    found = contests(rows, tasks)
    found[0].best, found[0].differences, found[0].told
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from layerscalpel.gather import BASELINE, Run
from layerscalpel.items import TaskResult
from layerscalpel.paired import Difference, difference_of, drawn_means
from layerscalpel.retention import compare_children

ALPHA = 0.05
TESTED = {"kl_nats": -1, "top1_agreement_fraction": 1, "plain_fraction": 1, "adjusted_fraction": 1}
"""{measure: 1 where more is better, -1 where less is}"""
BY_BLOCK = {"kl_nats": "kl_N", "top1_agreement_fraction": "agreement_N"}
RETENTIONS = ("plain_fraction", "adjusted_fraction")


@dataclass(frozen=True)
class Row:
    """One model, over one or several seeds."""

    name: str
    """Of the group of runs."""
    method: str
    model: str
    healing: str
    segments: tuple[str, ...]
    """What was removed, each once; seeds can differ."""
    num_removed: int | None
    parameters: int | None
    num_bytes: int | None
    runs: Mapping[int, Run]
    """{seed: run}"""
    by_seed: Mapping[str, Mapping[int, dict[str, Any] | None]]
    """{measure: {seed: {value, se, n}}}; None where it was not measured or does not compare."""
    tasks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """{retention: the tasks that it is the mean of}"""
    best: tuple[str, ...] = ()
    """Measures by which it is the best of its kind, told by the test."""

    @property
    def label(self) -> str:
        """The name that tells it from all other rows."""
        return self.name if self.model == BASELINE else f"{self.name} {self.model}"

    @property
    def kind(self) -> tuple[Any, ...]:
        """Rows of one kind compete: one parent, as many layers removed, healed or not."""
        return next(iter(self.runs.values())).parent, self.num_removed, self.model == "healed"

    def figure(self, measure: str) -> dict[str, Any] | None:
        """Return the mean over the seeds as {value, se, n}, and of several {num_seeds, sd}; None if one is missing.

        However the runs of these seeds hang together, the error of their mean is at most the mean of their errors.
        Where seeds differ by more, it is that of the mean of so many seeds.
        """
        found = list(self.by_seed.get(measure, {}).values())
        if not found or any(item is None for item in found):
            return None
        return _mean([item for item in found if item is not None])


def _mean(items: list[dict[str, Any]]) -> dict[str, Any]:
    if len(items) == 1:
        return items[0]
    values = torch.tensor([item["value"] for item in items], dtype=torch.float64)
    errors = [item["se"] for item in items]
    spread = values.std().item()
    error = None if None in errors else max(sum(errors) / len(errors), spread / len(items) ** 0.5)
    own = {"value": values.mean().item(), "se": error, "n": sum(item["n"] for item in items)}
    return own | {"num_seeds": len(items), "sd": spread}


@dataclass(frozen=True)
class Contest:
    """One measure of one kind."""

    measure: str
    best: Row
    differences: tuple[tuple[Row, Difference | None], ...]
    """Of the best less each other; None where they cannot be paired."""
    told: bool
    """Whether the best is better than all others of its kind, but for baselines, which are not of it."""
    untested: dict[str, str] = field(default_factory=dict)
    """{label: why there is no test}"""


def contests(rows: Sequence[Row], tasks: Sequence[str]) -> list[Contest]:
    """Return a contest for each kind of at least two rows and each measure that two of them have.

    Args:
        rows: of all models; baselines are compared with the best of every kind of their parent.
        tasks: the tasks that count in retentions.
    """
    kinds: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if row.model != BASELINE:
            kinds[row.kind].append(row)
    found = []
    for kind, members in kinds.items():
        members = members + [row for row in rows if row.model == BASELINE and row.kind[0] == kind[0]]
        for measure in TESTED:
            having = [row for row in members if row.figure(measure)]
            if len(having) > 1 and any(row.model != BASELINE for row in having):
                found.append(_contest(measure, having, tasks))
    return found


def marked(rows: Sequence[Row], found: Sequence[Contest]) -> list[Row]:
    """Return the rows, each with the measures by which it is told to be the best."""
    return [replace(row, best=tuple(one.measure for one in found if one.told and one.best is row)) for row in rows]


def _contest(measure: str, rows: Sequence[Row], tasks: Sequence[str]) -> Contest:
    sign = TESTED[measure]
    own = [row for row in rows if row.model != BASELINE]
    best = max(own, key=lambda row: sign * _value(row, measure))
    others, differences, untested = [row for row in rows if row is not best], [], {}
    for row in others:
        tested = difference(measure, best, row, tasks)
        differences.append((row, tested if isinstance(tested, Difference) else None))
        if isinstance(tested, str):
            untested[row.label] = tested
    rivals = [(row, item) for row, item in differences if row.model != BASELINE]
    told = bool(rivals) and all(item is not None and _beats(measure, best, row, item) for row, item in rivals)
    return Contest(measure, best, tuple(differences), told, untested)


def _value(row: Row, measure: str) -> float:
    found = row.figure(measure)
    assert found is not None
    return found["value"]


def _beats(measure: str, best: Row, other: Row, found: Difference) -> bool:
    """Tell whether the test says so, and every seed that both have."""
    sign, values = TESTED[measure], [row.by_seed[measure] for row in (best, other)]
    each = [values[0][seed]["value"] - values[1][seed]["value"] for seed in _shared(best, other)]  # type: ignore[index]
    return found.p_value < ALPHA and sign * found.value > 0 and all(sign * less > 0 for less in each)


def difference(measure: str, first: Row, second: Row, tasks: Sequence[str]) -> Difference | str:
    """Return a measure of the first row less that of the second, or why they cannot be paired.

    A bootstrap of few samples is too sure: p is at least what a test of signs can reach with so many, 2 / 2^N.
    """
    if not _shared(first, second):
        return "they have no seed in common"
    test = _over_blocks if measure in BY_BLOCK else _over_items
    found = test(measure, first, second, tasks)
    return found if isinstance(found, str) else replace(found, p_value=max(found.p_value, 2.0 ** (1 - found.n)))


def _over_blocks(measure: str, first: Row, second: Row, _tasks: Sequence[str]) -> Difference | str:
    texts: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)  # seeds may have one text
    for seed in _shared(first, second):
        pair = [row.runs[seed].blocks(row.model) for row in (first, second)]
        values = [getattr(item, BY_BLOCK[measure]) for item in pair if item is not None]
        if len(values) < 2 or any(item is None for item in values):
            return "no figures by block were kept - measure anew: scalpel evaluate DIR"
        if pair[0].text != pair[1].text:  # type: ignore[union-attr]
            return "they were measured on different text"
        texts[pair[0].text].append((values[0], values[1]))  # type: ignore[union-attr]
    columns = [torch.cat([_column(pairs, place) for pairs in texts.values()]) for place in (0, 1)]
    means_RK = drawn_means(columns, seed=(0, zlib.crc32(measure.encode())))
    return difference_of(means_RK[:, 0], means_RK[:, 1], len(columns[0]))


def _column(pairs: Sequence[tuple[Tensor, Tensor]], place: int) -> Tensor:
    return torch.stack([pair[place] for pair in pairs]).mean(0)


def _over_items(measure: str, first: Row, second: Row, tasks: Sequence[str]) -> Difference | str:
    seeds = _shared(first, second)
    parent = first.runs[seeds[0]].items("parent") or second.runs[seeds[0]].items("parent")
    children = [[row.runs[seed].items(row.model) for seed in seeds] for row in (first, second)]
    if parent is None or any(item is None for items in children for item in items):
        return "no results by item were kept"
    one, two = (averaged([item for item in items if item is not None], tasks) for items in children)
    found = compare_children({name: parent[name] for name in tasks}, one, two)
    return found[RETENTIONS.index(measure)] or "no task is left to tell"


def averaged(runs: Sequence[Mapping[str, TaskResult]], tasks: Sequence[str]) -> dict[str, TaskResult]:
    """Return the mean over runs of what every item gave."""
    return {name: _averaged([run[name] for run in runs]) for name in tasks}


def _averaged(results: Sequence[TaskResult]) -> TaskResult:
    first = results[0]
    places = [{item: place for place, item in enumerate(result.ids)} for result in results]
    orders = [[place[item] for item in first.ids] for place in places]
    sorted_by = list(zip(results, orders, strict=True))
    values = {
        name: torch.stack([result.values[name][order] for result, order in sorted_by]).mean(0) for name in first.values
    }
    return replace(first, values=values)


def _shared(first: Row, second: Row) -> list[int]:
    return [seed for seed in first.runs if seed in second.runs]
