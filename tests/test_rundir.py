"""The run directory by itself: what makes its stages stale, how a refusal names the cause, what is said of damage."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path

import pytest
import yaml
from taskfiles import write_tasks
from texts import write_jsonl

from layerscalpel.config import build_config
from layerscalpel.errors import UserError
from layerscalpel.fingerprint import STAGES, fingerprints
from layerscalpel.inputs import task_identities
from layerscalpel.rundir import RunDir, finished_results
from layerscalpel.settings import Config


def settings(folder: Path, **changes: object) -> Config:
    """Return settings of a run of a model that is a file."""
    base = {"model.name": str(folder / "model"), "data.calibration": "c4", "evaluate.tasks": "none"}
    return build_config([base | {name.replace("__", "."): value for name, value in changes.items()}])


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A run directory all of whose stages are done."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("1", encoding="utf-8")
    folder = RunDir(tmp_path / "run", settings(tmp_path))
    for stage in STAGES:
        folder.stage(stage, lambda _: {})
    folder.close()
    return tmp_path


def reopened(finished: Path, **changes: object) -> str:
    """Return how a call with these settings is refused."""
    with pytest.raises(UserError) as caught:
        RunDir(finished / "run", settings(finished, **changes))
    said = str(caught.value)
    del caught
    gc.collect()  # it holds the directory's lock
    return said


def test_the_setting_that_is_named_is_one_of_the_stage(finished: Path) -> None:
    said = reopened(finished, heal__lr=1e-3, evaluate__tasks="offline:piqa", heal__epochs=7)
    assert "was made with other settings: heal.lr: 0.0005 -> 0.001; heal.epochs: 2 -> 7 - choose another" in said
    assert f"scalpel run {finished}/model ... --out {finished}/run --redo heal" in said
    assert "evaluate" not in said
    assert "settings: data.healing_blocks: None -> 5 - " in reopened(finished, data__healing_blocks=5)
    assert "settings: quantize.beside: [] -> ['parent8'] - " in reopened(finished, quantize__beside="parent8")


def test_input_files_that_changed_are_named_where_they_are_the_cause(finished: Path) -> None:
    os.utime(finished / "model" / "weights", ns=(1, 1))
    said = reopened(finished, evaluate__tasks="offline:piqa")
    assert "run was made of input files that have changed since - choose another --out" in said
    config = f"--recipe {finished}/run/config.yaml"
    assert said.endswith(f": scalpel run {finished}/model {config} --out {finished}/run --redo search")


@pytest.mark.parametrize(
    "content", ["{}", '{"fingerprint": "a"}', '{"result": {}}', '{"fingerprint": "a", "result": 1}']
)
def test_a_damaged_stage_is_named_and_can_be_done_again(finished: Path, content: str) -> None:
    done = finished / "run" / "evaluate" / "done.json"
    done.write_text(content, encoding="utf-8")
    assert finished_results(finished / "run", settings(finished), None, None) is None
    assert f"{done} is damaged: it lacks the result - remove the file" in reopened(finished)
    done.unlink()
    RunDir(finished / "run", settings(finished)).stage("evaluate", lambda _: {"again": True})
    assert json.loads((finished / "run" / "results.json").read_text(encoding="utf-8"))["evaluate"]["again"]


@pytest.mark.parametrize(("content", "said"), [("x", "holds no sections"), ("search: {steps: 3}", "unknown setting")])
def test_a_damaged_config_is_named(finished: Path, content: str, said: str) -> None:
    config = finished / "run" / "config.yaml"
    config.write_text(content, encoding="utf-8")
    message = reopened(finished, seed=5)
    assert f"the settings in {config} cannot be read" in message
    assert said in message


# What the tasks are read from.


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Tasks in a folder, one of them deeper, one with code, one that includes another."""
    folder = write_tasks(tmp_path / "tasks")
    (folder / "deep").mkdir()
    (folder / "colours.yaml").rename(folder / "deep" / "colours.yaml")
    (folder / "words.py").write_text("def text(item): return ''\n", encoding="utf-8")
    (folder / "called.yaml").write_text("task: called\ninclude: sums.yaml\ndoc_to_text: !function words.text\n")
    return folder


def spec_of(tasks: Path, name: str) -> str:
    return f"piqa, {tasks / name}" if name else f"{tasks}/"


@pytest.mark.parametrize(
    ("name", "file", "is_read"),
    [
        ("", "deep/colours.yaml", True),
        ("", "colours.jsonl", True),
        ("", "words.py", True),
        ("deep/colours.yaml", "colours.jsonl", True),
        ("deep/colours.yaml", "fixed.jsonl", False),
        ("deep/colours.yaml", "sums.yaml", False),
        ("called.yaml", "words.py", True),
        ("called.yaml", "sums.yaml", True),
        ("called.yaml", "sums.jsonl", True),
        ("called.yaml", "pages.jsonl", False),
        ("both.yaml", "fixed.yaml", True),
        ("both.yaml", "fixed.jsonl", True),
        ("both.yaml", "colours.jsonl", True),
        ("both.yaml", "sums.yaml", False),
    ],
)
def test_a_file_that_tasks_are_read_from_makes_the_evaluation_stale(tasks, name: str, file: str, is_read: bool) -> None:
    def prints() -> dict[str, str]:
        return fingerprints(settings(tasks, evaluate__tasks=spec_of(tasks, name)))

    before = prints()
    assert prints() == before
    with (tasks / file).open("a", encoding="utf-8") as stream:
        stream.write("\n# more\n")
    changed = {stage for stage, found in prints().items() if found != before[stage]}
    assert changed == ({"evaluate", "report"} if is_read else set())


def test_data_is_found_by_pattern_and_by_folder(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "a.jsonl", [{"q": "1"}])
    for number, kwargs in enumerate(({"data_dir": f"{tmp_path}/data"}, {"data_files": [f"{tmp_path}/data/*.jsonl"]})):
        definition = tmp_path / f"{number}.yaml"
        definition.write_text(yaml.safe_dump({"task": "t", "dataset_kwargs": kwargs}), encoding="utf-8")
        before = task_identities(str(definition))
        assert len(before) == 2 + number
        write_jsonl(tmp_path / "data" / f"{number}.jsonl", [{"q": "2"}])
        assert len(task_identities(str(definition))) == 3 + number


def test_names_stay_names_and_what_the_code_leaves_behind_is_no_input(tasks: Path, monkeypatch) -> None:
    monkeypatch.chdir(tasks.parent)
    (tasks.parent / "piqa").mkdir()
    assert task_identities("piqa, offline:boolq") == ["piqa", "offline:boolq"]
    before = task_identities("./tasks/")
    (tasks / "__pycache__").mkdir()
    (tasks / "__pycache__" / "words.pyc").write_text("", encoding="utf-8")
    assert task_identities("./tasks/") == before
    (tasks / "broken.yaml").write_text("{", encoding="utf-8")
    assert len(task_identities("./tasks/broken.yaml")) == 1
    assert task_identities("./nothing.yaml") == ["./nothing.yaml"]
