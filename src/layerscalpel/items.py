"""What each item of a task gave, one compressed file a model, so that two models can be compared item by item later.

A file is JSON in gzip: ids are hashes of the items, so two models are paired by equal ids in equal order.

Dimensions: I items.

    save_items(folder, "healed", {"piqa": result})
    load_items(folder, "healed")["piqa"].values["acc_norm"]  # [I] float64, 1 for a right answer
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerscalpel.errors import UserError
from layerscalpel.losses import Measured, block_mean, exp_of
from layerscalpel.packed import read_packed, write_packed

PREFERRED = ("acc_norm", "acc")
"""Metrics that stand for a task, the first that it has."""


@dataclass(frozen=True)
class TaskResult:
    """A task's result on one model."""

    name: str
    metric: str
    """The one that stands for the task: acc_norm where it has it, else acc, else its first."""
    chance: float | None
    """The metric's value by guessing: the mean of right answers / choices, or the largest share of one answer where all
    items have the same choices; 0 where an answer is written; None where it is not known, or the metric is no share of
    right answers."""
    values: Mapping[str, Tensor]
    """{metric: [I] float64}, one value an item; of a perplexity the nats per word or byte. A metric that is not made of
    one number an item is in `figures` alone."""
    higher_is_better: bool
    ids: tuple[str, ...]
    """A hash of each item."""
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    """{metric: [I] float64} of perplexities: words or bytes of each item."""
    figures: Mapping[str, dict[str, float | int | None]] = field(default_factory=dict)
    """{metric: {value, se, n}} over all items; n counts items."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """How it was measured: version, num_fewshot, batch_size, cut_short, choices (where all items have the same),
    labels (how often each of them is right)."""


def primary_metric(metrics: Mapping[str, Any]) -> str:
    """Return the metric that stands for a task."""
    return next((name for name in PREFERRED if name in metrics), next(iter(metrics)))


def figure(metric: str, values_I: Tensor, weights_I: Tensor | None = None) -> Measured:
    """Return a metric over all items; a perplexity is exp of its mean, weighted by words or bytes. n counts items."""
    mean = block_mean(values_I, torch.ones_like(values_I) if weights_I is None else weights_I)
    if metric.endswith("perplexity"):
        mean = exp_of(mean, f"the {metric}")
    return Measured(mean.value, mean.se, len(values_I))


def pooled(name: str, parts: list[TaskResult]) -> TaskResult:
    """Return the tasks of a group as one: every item counts the same.

    Raises:
        UserError: they share no metric that has a value for each item.
    """
    first = parts[0]
    shared = [metric for metric in first.values if all(metric in part.values for part in parts)]
    if not shared:
        raise UserError(f"the tasks of the group {name} share no metric that items have - name tasks instead")
    values = {metric: torch.cat([part.values[metric] for part in parts]) for metric in shared}
    weights = {
        metric: torch.cat([part.weights[metric] for part in parts]) for metric in shared if metric in first.weights
    }
    ids = tuple(item for part in parts for item in part.ids)
    choices, labels = _answers(parts)
    return TaskResult(
        name=name,
        metric=primary_metric(values),
        chance=max(labels.values()) / len(ids) if labels else _mean_chance(parts),
        values=values,
        higher_is_better=first.higher_is_better,
        ids=ids,
        weights=weights,
        figures={metric: figure(metric, item, weights.get(metric)).to_dict() for metric, item in values.items()},
        facts={
            "num_fewshot": first.facts.get("num_fewshot"),
            "batch_size": min(part.facts.get("batch_size", 0) for part in parts),
            "cut_short": sum(part.facts.get("cut_short", 0) for part in parts),
            "choices": choices,
            "labels": labels,
        },
    )


def _answers(parts: list[TaskResult]) -> tuple[list[str] | None, dict[str, int] | None]:
    """Return (choices, how often each is right) over all parts; None where they do not have one and the same choices.

    The first answer of one list of choices is not the first of another, so their places cannot be added.
    """
    choices = parts[0].facts.get("choices")
    if not choices or any(part.facts.get("choices") != choices for part in parts):
        return None, None
    return choices, dict(sum((Counter(part.facts["labels"]) for part in parts), Counter[str]()))


def _mean_chance(parts: list[TaskResult]) -> float | None:
    """Return the mean over items, so that every item counts the same; None where one part's is not known."""
    known = [part.chance * len(part.ids) for part in parts if part.chance is not None]
    return sum(known) / sum(len(part.ids) for part in parts) if len(known) == len(parts) else None


def save_items(folder: Path, model: str, results: Mapping[str, TaskResult]) -> Path:
    """Write a model's results by rename; return the file."""
    return write_packed(
        items_file(folder, model), {"tasks": {name: _plain(result) for name, result in results.items()}}
    )


def load_items(folder: Path, model: str) -> dict[str, TaskResult]:
    """Read what `save_items` wrote.

    Raises:
        UserError: there is no such file, or it is damaged.
    """

    def unpack(content: dict[str, Any]) -> dict[str, TaskResult]:
        return {name: _result(name, plain) for name, plain in content["tasks"].items()}

    return read_packed(items_file(folder, model), unpack, "the items", "scalpel evaluate DIR --tasks ...")


def items_file(folder: Path, model: str) -> Path:
    """Return where a model's items are."""
    return folder / f"{model}.items.json.gz"


def _plain(result: TaskResult) -> dict[str, Any]:
    tensors = {part: {k: v.tolist() for k, v in getattr(result, part).items()} for part in ("values", "weights")}
    facts = {part: dict(getattr(result, part)) for part in ("figures", "facts")}
    own = {"metric": result.metric, "chance": result.chance, "higher_is_better": result.higher_is_better}
    return own | {"ids": list(result.ids)} | tensors | facts


def _result(name: str, plain: dict[str, Any]) -> TaskResult:
    tensors = {
        part: {metric: torch.tensor(numbers, dtype=torch.float64) for metric, numbers in plain.pop(part).items()}
        for part in ("values", "weights")
    }
    kept: dict[str, Any] = plain | {"ids": tuple(plain["ids"])} | tensors
    return TaskResult(name=name, **kept)
