"""One task on one model, measured by lm-evaluation-harness, item by item.

Requests, log likelihoods, metrics and their means are the harness's own, as its command computes them with the same
batch size; the seeds of few-shot examples and of sampled answers are its defaults. What this adds: a value for every
item, the score of guessing, and standard errors of perplexities, which the harness does not give.

    result = measure(model, tokenizer, task, How(limit=200), label="piqa of healed")
    result.figures["acc_norm"]  # {"value": 0.71, "se": 0.03, "n": 200}
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from layerscalpel.errors import UserError, kind_and_line
from layerscalpel.items import TaskResult, figure, primary_metric
from layerscalpel.taskset import UNSOUND, quiet_harness

BATCH_SIZES = {"cpu": 16}
"""Sequences at once where none are asked for, by device."""
ON_DEVICE = 64
"""The same of any other device; halved until it fits the memory."""
WINDOW_TOKENS = 512
"""Length up to which windows of a perplexity fill the whole batch; of longer ones there are fewer at once."""
DRAWS = 1000
"""Of the harness's bootstrap, for metrics that are no mean."""
WEIGHTED = {"word_perplexity": 1.0, "byte_perplexity": 1.0, "bits_per_byte": math.log(2)}
"""Metrics whose items are (log likelihood, words or bytes), and the nats of their unit."""
CHOSEN, WRITTEN = "acc", "exact_match"
"""Beginnings of the names of metrics that are shares of right answers: of those chosen, of those written."""
FORM = 2
"""Raise it when what is kept of a task changes."""


@dataclass(frozen=True)
class How:
    """What is the same for all models of a comparison."""

    limit: int | None = None
    """The first so many items of each task."""
    batch_size: int = 16
    """Sequences at once."""
    max_length: int | None = None
    """Longest sequence in tokens; None for the model's context limit."""
    chat_template: bool = False
    """Put each item into the tokenizer's chat template."""


def measure(model: PreTrainedModel, tokenizer: Any, task: Any, how: How, *, label: str) -> TaskResult:
    """Return a task's result on a loaded model.

    Args:
        model: where it is to compute.
        tokenizer: its own, or its parent's.
        task: as TaskSet.parts holds them.
        how: the same for all models that are compared.
        label: what the progress line says.

    Raises:
        UserError: the model's output is not finite, no answer fits its context, or the task does not fit its data.
        torch.OutOfMemoryError: the batch is too large.
    """
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    from layerscalpel.examinee import Examinee

    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)  # else the next model would see other examples
    devices = [model.device] if model.device.type == "cuda" else []
    with quiet_harness(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(DEFAULT_OTHER_SEED)
        examinee = Examinee(model, tokenizer, batch_size=how.batch_size, max_length=how.max_length, label=label)
        if task.OUTPUT_TYPE == "loglikelihood_rolling":
            examinee.batch_size_per_gpu = max(1, how.batch_size * WINDOW_TOKENS // examinee.max_length)
        found = _evaluated(examinee, task, how)
    facts = {
        "version": found["versions"].get(task.task_name),
        "num_fewshot": found["n-shot"].get(task.task_name) or 0,
        "batch_size": how.batch_size,
        "cut_short": examinee.cut_short,
    }
    return _result(task, found, facts)


def _evaluated(examinee: Any, task: Any, how: How) -> Any:
    """Return what the harness returns."""
    from jinja2 import TemplateError
    from lm_eval.evaluator import evaluate

    try:
        return evaluate(
            lm=examinee,
            task_dict={"tasks": {task.task_name: task}},
            limit=how.limit,
            bootstrap_iters=DRAWS,
            log_samples=True,
            apply_chat_template=how.chat_template,
            fewshot_as_multiturn=how.chat_template,
        )
    except torch.OutOfMemoryError:
        raise
    except OverflowError as error:
        raise UserError(
            f"the perplexity on {task.task_name} is too large for a number: the model is ruined - measure another"
        ) from error
    except (*UNSOUND, TemplateError) as error:
        said = kind_and_line(error)[:200]
        raise UserError(
            f"the task {task.task_name} cannot be measured: {said} - check its definition and its data"
        ) from error


def definition_of(task: Any, limit: int | None) -> str:
    """Return a hash of a task's prompts, metrics, number of examples, and of its items up to the limit."""
    config = dict(task.dump_config())
    metadata = {k: v for k, v in (config.pop("metadata", None) or {}).items() if k != "config_source"}
    for place in ("dataset_path", "dataset_name", "dataset_kwargs"):  # the items themselves are hashed
        config.pop(place, None)
    digest = hashlib.sha256(json.dumps([config, metadata], sort_keys=True, default=str).encode())
    for item in islice(task.eval_docs, limit):
        digest.update(json.dumps(item, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def key_of(model: str, definition: str, how: How, computes: Sequence[str]) -> str:
    """Return what a result depends on, as a hash: model, task, settings, and the versions of what computes it.

    Args:
        model: what tells one model and tokenizer from another.
        definition: of the task, as definition_of returns it.
        how: settings.
        computes: device and number format.
    """
    versions = [version(name) for name in ("lm-eval", "transformers", "torch")]
    parts = [FORM, model, definition, asdict(how), list(computes), versions]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _result(task: Any, found: Mapping[str, Any], facts: dict[str, Any]) -> TaskResult:
    """Turn what the harness returns of one task into ours."""
    name = task.task_name
    by_filter: dict[str, list[Any]] = {}
    for sample in found["samples"][name]:
        by_filter.setdefault(sample["filter"], []).append(sample)
    figures: dict[str, Any] = {}
    values: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for own, samples in by_filter.items():
        for metric in samples[0]["metrics"]:
            shown = metric if own == "none" else f"{metric},{own}"
            per_item = _per_item(metric, [sample.get(metric) for sample in samples])
            if per_item:
                values[shown] = per_item[0]
            if per_item and per_item[1] is not None:
                weights[shown] = per_item[1]
            if measured := _measured(found["results"][name], metric, own, per_item, len(samples)):
                figures[shown] = measured
    for shown, measured in figures.items():
        if not math.isfinite(measured["value"]):
            raise UserError(f"{shown} of {name} is {measured['value']}: the model is ruined - measure another")
    first = next(iter(by_filter.values()))
    metric, choices = primary_metric(figures), _choices(task)
    labels = _labels(first) if choices else None
    return TaskResult(
        name=name,
        metric=metric,
        chance=_chance(task, first, metric, labels),
        values=values,
        higher_is_better=bool(found["higher_is_better"][name].get(metric.partition(",")[0], True)),
        ids=tuple(str(sample["doc_hash"])[:16] for sample in first),
        weights=weights,
        figures=figures,
        facts=facts | {"choices": choices, "labels": labels},
    )


def _per_item(metric: str, raw: list[Any]) -> tuple[Tensor, Tensor | None] | None:
    """Return (values, weights) of a metric that has a number for each item; None for another."""
    if metric in WEIGHTED and all(isinstance(item, tuple) and len(item) == 2 for item in raw):
        pairs = torch.tensor(raw, dtype=torch.float64)
        return -pairs[:, 0] / pairs[:, 1] / WEIGHTED[metric], pairs[:, 1]
    if not all(isinstance(item, (bool, int, float)) for item in raw):
        return None
    values = torch.tensor([float(item) for item in raw], dtype=torch.float64)
    return (-values if metric == "perplexity" else values), None


def _measured(
    results: Mapping[str, Any], metric: str, own: str, per_item: tuple[Tensor, Tensor | None] | None, count: int
) -> dict[str, float | int | None] | None:
    """Return {value, se, n}: the harness's value, and its error or, where it has none, that over items."""
    value, error = results.get(f"{metric},{own}"), results.get(f"{metric}_stderr,{own}")
    if not isinstance(value, (int, float)):
        return None
    if not isinstance(error, (int, float)):
        error = figure(metric, *per_item).se if per_item else math.nan
    return {"value": float(value), "se": float(error) if math.isfinite(error) else None, "n": count}


def _choices(task: Any) -> list[str] | None:
    """Return the choices of a task all of whose items have the same."""
    choices = task.get_config("doc_to_choice")
    if task.OUTPUT_TYPE != "multiple_choice" or not isinstance(choices, (list, dict)):
        return None
    return [str(choice) for choice in (choices.values() if isinstance(choices, dict) else choices)]


def _labels(samples: list[Any]) -> dict[str, int]:
    """Return how often each answer is right."""
    return dict(Counter(str(answer) for sample in samples for answer in _right(sample)))


def _right(sample: Any) -> set[Any]:
    """Return the right answers of an item, which may be several."""
    target = sample["target"]
    return set(target) if isinstance(target, list) else {target}


def _chance(task: Any, samples: list[Any], metric: str, labels: Mapping[str, int] | None) -> float | None:
    """Return a metric's value by guessing; None where it is not known, as where a task judges choices by code."""
    if metric.startswith(WRITTEN):
        return 0.0
    if not metric.startswith(CHOSEN) or _judges_itself(task):
        return None
    if task.OUTPUT_TYPE != "multiple_choice":
        return 0.0
    if labels:
        return max(labels.values()) / len(samples)
    twice = 2 if "acc_mutual_info" in samples[0]["metrics"] else 1  # each choice is asked for without context, too
    return sum(twice * len(_right(sample)) / len(sample["arguments"]) for sample in samples) / len(samples)


def _judges_itself(task: Any) -> bool:
    from lm_eval.api.task import ConfigurableTask

    own = type(task).process_results is not ConfigurableTask.process_results
    return own or callable(task.get_config("process_results"))
