"""Tasks on the models of a run: the same items, settings and software for all, and nothing is measured twice.

Each finished (model, task) is written at once, under a key of all that it depends on. So an interrupted evaluation goes
on, and one that is done again with another task measures that task only.

    exam = prepare_exam(settings, tokenizer, folder)
    exam.measure("parent", model, "what tells this model from others")  # {"tasks": {"piqa": {"acc": {...}}}}
    exam.summary()  # {"harness": {...}}, how it was measured
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from layerscalpel.errors import UserError
from layerscalpel.harness import BATCH_SIZES, ON_DEVICE, How, definition_of, key_of, measure
from layerscalpel.items import TaskResult, items_file, load_items, pooled, save_items
from layerscalpel.layers import device_of
from layerscalpel.progress import say
from layerscalpel.settings import EvaluateSettings
from layerscalpel.tasknames import words_of
from layerscalpel.taskset import TaskSet, tasks_in

PARTS = "parts"
"""Ends the name of a model under which the tasks of groups are kept."""


class Exam:
    """Measures tasks on one model after the other."""

    def __init__(self, sets: Iterable[TaskSet], how: How, tokenizer: Any, folder: Path, earlier: Path | None) -> None:
        """Take what `prepare_exam` prepares."""
        self._sets, self._how, self._tokenizer = tuple(sets), how, tokenizer
        self._folder, self._earlier = folder, earlier
        self._definitions: dict[str, str] = {}
        self._sizes: dict[str, int] = {}  # of batches that had to be halved
        self._facts: dict[str, dict[str, Any]] = {}
        self.results: dict[str, dict[str, TaskResult]] = {}
        """{model: {task: result}} of the models measured so far."""

    def measure(self, name: str, model: PreTrainedModel, identity: str) -> dict[str, Any]:
        """Return {tasks: {task: {metric: {value, se, n}}}}, and keep every item's result; nothing without tasks.

        Args:
            name: of the model.
            model: loaded.
            identity: what tells it and its tokenizer from others, as a checkpoint's files.
        """
        if not self._sets:
            return {}
        known = self._kept(name)
        done: dict[str, dict[str, TaskResult]] = {name: {}, f"{name}.{PARTS}": {}}
        found: dict[str, TaskResult] = {}
        for number, one in enumerate(self._sets, 1):
            owner = f"{name}.{PARTS}" if one.grouped else name
            for part in one.parts:
                label = f"{name}, task {number} of {len(self._sets)}: {part.task_name}"
                result = self._one(model, part, identity, known, label)
                done[owner][result.name] = result
                save_items(self._folder, owner, known | done[owner])
            own = [done[owner][part.task_name] for part in one.parts]
            found[one.name] = pooled(one.name, own) if one.grouped else own[0]
            self._note(one, found[one.name])
        save_items(self._folder, name, found)
        if done[f"{name}.{PARTS}"]:
            save_items(self._folder, f"{name}.{PARTS}", done[f"{name}.{PARTS}"])
        self.results[name] = found
        return {"tasks": {task: dict(result.figures) for task, result in found.items()}}

    def summary(self) -> dict[str, Any]:
        """Return {harness}, how tasks were measured, for results.json; nothing without tasks."""
        if not self._sets:
            return {}
        how = {"limit": self._how.limit, "chat_template": self._how.chat_template}
        return {"harness": {"lm_eval": version("lm-eval"), **how, "tasks": self._facts}}

    def texts(self) -> dict[str, list[str]]:
        """Return {task: all text of each item that is measured}."""
        return {
            one.name: [_text_of(item) for part in one.parts for item in islice(part.eval_docs, self._how.limit)]
            for one in self._sets
        }

    def _kept(self, name: str) -> dict[str, TaskResult]:
        """Return what an earlier call measured on a model of this name."""
        found: dict[str, TaskResult] = {}
        for folder in filter(None, (self._earlier, self._folder)):
            for owner in (name, f"{name}.{PARTS}"):
                try:
                    found |= load_items(folder, owner) if items_file(folder, owner).exists() else {}
                except UserError as error:
                    say(f"{str(error).partition(' - measure anew')[0]}: measured again")
        return found

    def _one(
        self, model: PreTrainedModel, task: Any, identity: str, known: dict[str, TaskResult], label: str
    ) -> TaskResult:
        name = task.task_name
        if name not in self._definitions:
            self._definitions[name] = definition_of(task, self._how.limit)
        old = known.get(name)
        if old and old.facts.get("key") == self._key(model, identity, name, old.facts["batch_size"]):
            say(f"{label}: measured already")
            self._sizes[name] = min(old.facts["batch_size"], self._sizes.get(name, self._how.batch_size))
            return old
        while True:
            size = self._sizes.get(name, self._how.batch_size)
            try:
                result = measure(model, self._tokenizer, task, replace(self._how, batch_size=size), label=label)
            except torch.OutOfMemoryError as error:
                self._halve(name, size, error)
                continue
            return replace(result, facts={**result.facts, "key": self._key(model, identity, name, size)})

    def _key(self, model: PreTrainedModel, identity: str, task: str, size: int) -> str:
        """Return a result's key; one whose batch had to be halved is as good as one of the size that was asked for."""
        asked = self._how.batch_size
        if size not in {asked >> times for times in range(asked.bit_length())}:
            return ""
        how, commit = replace(self._how, batch_size=size), getattr(model.config, "_commit_hash", None)
        computes = [device_of(model).type, str(model.dtype)]
        return key_of(f"{identity}|{commit}", self._definitions[task], how, computes)

    def _halve(self, name: str, size: int, error: torch.OutOfMemoryError) -> None:
        """Let a task go on with half the sequences at once, for the other models, too."""
        if size == 1:
            raise UserError(
                f"memory runs out on a single item of {name} - lower evaluate.task_tokens, or leave the task out"
            ) from error
        self._sizes[name] = size // 2
        torch.cuda.empty_cache()
        say(f"memory ran out: {name} goes on with {size // 2} sequences at once")

    def _note(self, one: TaskSet, result: TaskResult) -> None:
        """Keep what is told of a task once; tell what was cut short."""
        own = {k: v for k, v in result.facts.items() if k not in ("key", "choices", "labels", "cut_short")}
        about = {"metric": result.metric, "chance": result.chance, "num_items": len(result.ids), "source": one.source}
        parts = "".join(self._definitions[part.task_name] for part in one.parts)
        definition = hashlib.sha256(parts.encode()).hexdigest()
        about |= {"task_tokens": self._how.max_length, "definition": definition}
        noted = self._facts.setdefault(one.name, {**about, **own, "cut_short": 0})
        cut_short = int(result.facts.get("cut_short", 0))
        if cut_short > noted["cut_short"]:
            noted["cut_short"] = cut_short
            whole = f"evaluate.task_tokens, {self._how.max_length:,}" if self._how.max_length else "the context"
            say(f"{one.name}: sequences that lost their beginning, being longer than {whole}: {cut_short:,}")


def _text_of(value: Any) -> str:
    """Return all words of an item, field after field."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return value if isinstance(value, str) else "\n".join(map(_text_of, parts))


def prepare_exam(
    settings: EvaluateSettings, tokenizer: Any, folder: Path, *, device: torch.device, earlier: Path | None = None
) -> Exam:
    """Return what measures the tasks of the settings; without tasks it measures nothing.

    Args:
        settings: which tasks, and how.
        tokenizer: of all models that are compared.
        folder: where items are kept.
        device: that the models compute on.
        earlier: where an earlier evaluation of the same models may have kept some.

    Raises:
        UserError: as tasks_in, or the tokenizer has no chat template that is asked for.
    """
    sets = tasks_in(settings.tasks, settings.fewshot)
    if sets and settings.chat_template and not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template - leave out evaluate.chat_template")
    size = settings.task_batch_size or BATCH_SIZES.get(device.type, ON_DEVICE)
    how = How(settings.limit, size, settings.task_tokens, settings.chat_template)
    return Exam(sets, how, tokenizer, folder, earlier)


def require_tasks(settings: EvaluateSettings, max_tokens: int | None, *, offload: str = "none") -> None:
    """Refuse tasks that cannot be measured, before any model is loaded; their data is read.

    Args:
        settings: which tasks, and how.
        max_tokens: the model's context limit, if it is known.
        offload: where the parent's layers are while they are not in use.

    Raises:
        UserError: as tasks_in, task_tokens is longer than the context, or the parent's layers come in for every batch.
    """
    if max_tokens and (settings.task_tokens or 0) > max_tokens:
        raise UserError(
            f"{settings.task_tokens} tokens are longer than the model's context of {max_tokens}"
            " - lower evaluate.task_tokens"
        )
    if words_of(settings.tasks) and offload != "none":
        raise UserError(
            f"tasks take hundreds of passes, too many for a model whose layers stay elsewhere (--offload {offload})"
            " - use --tasks none, and measure the cut checkpoint alone: scalpel evaluate DIR --tasks ..."
        )
    tasks_in(settings.tasks, settings.fewshot)
