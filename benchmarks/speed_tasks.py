"""Items a second of `scalpel evaluate` beside the harness's own `hf` model, in turns on the same items."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from measuring import Row, Rows, seconds
from speed_sizes import SpeedSizes

from layerscalpel.benchmark import median
from layerscalpel.decoder import load_decoder
from layerscalpel.harness import How, measure
from layerscalpel.taskset import quiet_harness, tasks_in

TASKS = "offline:piqa,offline:arc_easy,offline:hellaswag"


def in_turns(model: Any, tokenizer: Any, tasks: list[Any], how: How, rounds: int) -> Row:
    """Measure all tasks by this project and by the harness, one after the other, and compare seconds and scores."""

    def ours() -> list[float]:
        return [measure(model, tokenizer, task, how, label=task.task_name).figures["acc"]["value"] for task in tasks]

    def theirs() -> list[float]:
        lm, named = (
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=how.batch_size),
            {t.task_name: t for t in tasks},
        )
        with quiet_harness():
            found: Any = evaluate(lm=lm, task_dict={"tasks": named}, limit=how.limit, bootstrap_iters=0)
        return [found["results"][name]["acc,none"] for name in named]

    ours()  # warm-up
    took: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(rounds):
        (own, own_s), (other, other_s) = seconds(ours), seconds(theirs)
        if own != other:
            raise AssertionError(f"scores differ: {own} and {other}")
        took["ours"].append(own_s)
        took["theirs"].append(other_s)
    ratios = [other_s / own_s for own_s, other_s in zip(took["ours"], took["theirs"], strict=True)]
    items = how.limit * len(tasks) if how.limit else None
    return {"items": items, "wall_s": took, "speedup": median(ratios).to_dict()}


def evaluation(rows: Rows, given: argparse.Namespace, sizes: SpeedSizes) -> None:
    """Measure tasks on the real model on a CPU."""

    def measured() -> Row:
        torch.set_num_threads(given.threads)
        model, tokenizer, _ = load_decoder(given.model, device="cpu", dtype="float32")
        tasks = [part for each in tasks_in(TASKS) for part in each.parts]
        return in_turns(model, tokenizer, tasks, How(limit=sizes.task_items), sizes.task_rounds)

    rows.measure(measured, part="tasks", model=given.model, threads=given.threads, limit=sizes.task_items)
