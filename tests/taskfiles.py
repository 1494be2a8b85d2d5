"""Small tasks in the harness's form, their data beside them: choices, written answers, pages of text, a group."""

from __future__ import annotations

import json
import random
from pathlib import Path

import yaml

COLOURS = ("red", "blue", "green", "grey")
DIGITS = {"function": "regex", "regex_pattern": r"(\d+)"}


def write_tasks(folder: Path, count: int = 8) -> Path:
    """Write the tasks colours, fixed, sums, pages, and the group both, which has one score over colours and fixed."""
    folder.mkdir(parents=True)
    draw = random.Random(0)
    colours = [
        {"q": f"mill {i}", "options": draw.sample(COLOURS, 2 + i % 3), "gold": i % 2, "even": int(i % 3 == 0)}
        for i in range(count)
    ]
    sums = [{"q": f"{i} + 1", "a": str(i + 1)} for i in range(count)]
    pages = [{"page": " ".join(draw.choices(COLOURS, k=5 + i))} for i in range(count)]
    choices = {"output_type": "multiple_choice", "doc_to_text": "{{q}}:"}
    both = [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")]
    write_task(
        folder,
        "colours",
        colours,
        choices | {"doc_to_target": "gold", "doc_to_choice": "options", "metric_list": both},
    )
    write_task(
        folder,
        "fixed",
        colours,
        choices | {"doc_to_target": "even", "doc_to_choice": ["no", "yes"], "metric_list": both[:1]},
    )
    written = {
        "output_type": "generate_until",
        "doc_to_text": "{{q}}=",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "filter_list": [
            {"name": "strict", "filter": [{"function": "take_first"}]},
            {
                "name": "digits",
                "filter": [{"function": "regex", "regex_pattern": "(\\d+)"}, {"function": "take_first"}],
            },
        ],
    }
    write_task(folder, "sums", sums, written)
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{page}}"}
    perplexities = [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}]
    write_task(folder, "pages", pages, rolling | {"metric_list": perplexities})
    group = {"group": "both", "task": ["colours", "fixed"], "aggregate_metric_list": [{"metric": "acc"}]}
    (folder / "both.yaml").write_text(yaml.safe_dump(group), encoding="utf-8")
    return folder


def write_task(folder: Path, name: str, items: list[dict], definition: dict) -> Path:
    """Write one task and its items; return the definition."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("\n".join(map(json.dumps, items)), encoding="utf-8")
    head = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(head | {"test_split": "test"} | definition, sort_keys=False), encoding="utf-8")
    return path
