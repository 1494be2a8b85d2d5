"""Tasks on the models of a run: nothing is measured twice, an interruption goes on, bad input ends before loading."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import tiny
from taskfiles import write_tasks
from world import byte_tokenizer, write_model, write_recipe, write_texts

from layerscalpel import exam, harness, taskset
from layerscalpel.cli import main
from layerscalpel.errors import UserError
from layerscalpel.exam import Exam, prepare_exam, require_tasks
from layerscalpel.harness import measure
from layerscalpel.items import load_items, save_items
from layerscalpel.settings import EvaluateSettings
from layerscalpel.taskset import tasks_in

pytest.importorskip("lm_eval", reason="needs the extra eval")


@pytest.fixture(scope="module")
def model():
    return tiny("llama", vocab_size=260)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("own") / "tasks")


def settings(folder: Path | str, **changes) -> EvaluateSettings:
    return EvaluateSettings(tasks=str(folder), **changes)


def prepared(folder: Path | str, kept: Path, **changes) -> Exam:
    cpu = torch.device("cpu")
    return prepare_exam(settings(folder, **changes), byte_tokenizer(), kept, device=cpu)


@pytest.fixture
def counted(monkeypatch) -> list[str]:
    """The tasks that were measured."""
    names: list[str] = []

    def watched(model, tokenizer, task, how, *, label):
        names.append(task.task_name)
        return measure(model, tokenizer, task, how, label=label)

    monkeypatch.setattr(exam, "measure", watched)
    return names


def test_nothing_is_measured_twice(model, folder, tmp_path, counted) -> None:
    only = f"{folder}/colours.yaml"
    first = prepared(only, tmp_path, limit=4).measure("cut", model, "a")
    assert prepared(only, tmp_path, limit=4).measure("cut", model, "a") == first
    assert counted == ["colours"]
    prepared(f"{only},{folder}/fixed.yaml", tmp_path, limit=4).measure("cut", model, "a")
    assert counted == ["colours", "fixed"]
    assert set(load_items(tmp_path, "cut")) == {"colours", "fixed"}


@pytest.mark.parametrize("change", ["model", "limit", "batch", "dtype", "definition"])
def test_what_could_differ_is_measured_anew(model, tmp_path, counted, change) -> None:
    own = write_tasks(tmp_path / "tasks") / "colours.yaml"
    kept = tmp_path / "kept"
    prepared(own, kept, limit=4).measure("cut", model, "a")
    how = {"limit": 5 if change == "limit" else 4} | ({"task_batch_size": 3} if change == "batch" else {})
    other = tiny("llama", vocab_size=260).bfloat16() if change == "dtype" else model
    if change == "definition":
        own.write_text(own.read_text().replace("{{q}}:", "{{q}}?"))
        tasks_in.cache_clear()
    prepared(own, kept, **how).measure("cut", other, "b" if change == "model" else "a")
    assert counted == ["colours", "colours"]


def test_the_same_prompts_and_items_elsewhere_have_the_same_definition(model, folder, tmp_path) -> None:
    def definitions(tasks: Path) -> list[str]:
        tasks_in.cache_clear()
        first = prepared(f"{tasks}/both.yaml,{tasks}/pages.yaml", tmp_path / "kept", limit=2)
        first.measure("cut", model, "a")
        return [how["definition"] for how in first.summary()["harness"]["tasks"].values()]

    other = write_tasks(tmp_path / "tasks")
    before = definitions(folder)
    assert definitions(other) == before
    for file, old, new in (("colours.yaml", "{{q}}:", "{{q}}?"), ("colours.jsonl", "mill 0", "mill 9")):
        text = (other / file).read_text(encoding="utf-8")
        (other / file).write_text(text.replace(old, new), encoding="utf-8")
        after = definitions(other)
        assert (after[0] != before[0], after[1]) == (True, before[1])
        before = after


def test_an_interrupted_model_goes_on_with_the_next_task(model, folder, tmp_path, monkeypatch, counted) -> None:
    watched = exam.measure

    def interrupted(model, tokenizer, task, how, *, label):
        if task.task_name == "fixed":
            raise KeyboardInterrupt
        return watched(model, tokenizer, task, how, label=label)

    monkeypatch.setattr(exam, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepared(folder, tmp_path).measure("cut", model, "a")
    monkeypatch.setattr(exam, "measure", watched)
    found = prepared(folder, tmp_path).measure("cut", model, "a")
    assert counted == ["colours", "fixed", "pages", "sums"]
    assert set(found["tasks"]) == set(counted)


def test_a_batch_that_does_not_fit_is_halved_and_stays_so(model, folder, tmp_path, monkeypatch) -> None:
    sizes: list[int] = []

    def small(model, tokenizer, task, how, *, label):
        sizes.append(how.batch_size)
        if how.batch_size > 4:
            raise torch.OutOfMemoryError
        return measure(model, tokenizer, task, how, label=label)

    monkeypatch.setattr(exam, "measure", small)
    first = prepared(f"{folder}/colours.yaml", tmp_path)
    first.measure("parent", model, "a")
    first.measure("cut", model, "b")
    assert sizes == [16, 8, 4, 4]
    assert first.summary()["harness"]["tasks"]["colours"]["batch_size"] == 4
    prepared(f"{folder}/colours.yaml", tmp_path).measure("parent", model, "a")
    assert len(sizes) == 4  # halved or not, it is measured
    with pytest.raises(UserError, match="memory runs out on a single item of colours"):
        first._halve("colours", 1, torch.OutOfMemoryError())


def test_a_group_with_a_score_is_one_task(model, folder, tmp_path, counted) -> None:
    found = prepared(f"{folder}/both.yaml", tmp_path).measure("cut", model, "a")
    assert set(found["tasks"]) == {"both"}
    kept = load_items(tmp_path, "cut")["both"]
    parts = load_items(tmp_path, "cut.parts")
    assert kept.values["acc"].tolist() == [*parts["colours"].values["acc"], *parts["fixed"].values["acc"]]
    assert found["tasks"]["both"]["acc"]["value"] == pytest.approx(kept.values["acc"].mean().item())
    prepared(f"{folder}/both.yaml", tmp_path).measure("cut", model, "a")
    assert counted == ["colours", "fixed"]


def test_damaged_items_are_told_and_measured_again(model, folder, tmp_path, counted, capsys) -> None:
    kept, earlier = tmp_path / "kept", tmp_path / "earlier"
    for where in (kept, earlier):
        save_items(where, "cut", {}).write_bytes(b"damaged")
    only, cpu = f"{folder}/colours.yaml", torch.device("cpu")
    first = prepare_exam(settings(only, limit=4), byte_tokenizer(), kept, device=cpu, earlier=earlier)
    first.measure("cut", model, "a")
    told = " ".join(capsys.readouterr().err.split())
    assert all(told.count(f"the items in {where}/cut.items.json.gz cannot be read") == 1 for where in (kept, earlier))
    assert told.count("): measured again") == 2
    prepared(only, kept, limit=4).measure("cut", model, "a")
    assert counted == ["colours"]


@pytest.mark.parametrize(("tokens", "whole"), [(9, "evaluate.task_tokens, 9"), (None, "the context")])
def test_what_is_cut_short_says_by_what(model, folder, tmp_path, capsys, tokens, whole) -> None:
    own = prepared(f"{folder}/colours.yaml", tmp_path, limit=4, task_tokens=tokens)
    own.measure("cut", model if tokens else tiny("llama", vocab_size=260, max_position_embeddings=9), "a")
    about = own.summary()["harness"]["tasks"]["colours"]
    assert about["task_tokens"] == tokens
    assert about["cut_short"] > 0
    said = f"colours: sequences that lost their beginning, being longer than {whole}: {about['cut_short']}"
    assert said in " ".join(capsys.readouterr().err.split())


def test_what_cannot_be_measured_is_refused_before_loading(folder, monkeypatch) -> None:
    require_tasks(settings("none"), 128, offload="disk")
    with pytest.raises(UserError, match=r"layers stay elsewhere \(--offload disk\)"):
        require_tasks(settings(folder), 128, offload="disk")
    with pytest.raises(UserError, match="200 tokens are longer than the model's context of 128"):
        require_tasks(settings(folder, task_tokens=200), 128)
    monkeypatch.setattr(taskset, "find_spec", lambda name: None)
    tasks_in.cache_clear()
    with pytest.raises(UserError, match=r"lm-eval, which is not installed - pip install 'layerscalpel\[eval\]'"):
        require_tasks(settings(folder), 128)


def test_a_chat_template_must_be_there(folder, tmp_path, model) -> None:
    tokenizer, cpu = byte_tokenizer(), torch.device("cpu")
    found = {
        chat: prepare_exam(settings(f"{folder}/colours.yaml", chat_template=chat), tokenizer, tmp_path, device=cpu)
        .measure(f"chat {chat}", model, "a")
        .get("tasks")
        for chat in (True, False)
    }
    values = [load_items(tmp_path, f"chat {chat}")["colours"].facts["key"] for chat in found]
    assert len(set(values)) == 2
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        prepare_exam(settings(f"{folder}/colours.yaml", chat_template=True), tokenizer, tmp_path, device=cpu)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_model(folder / "model")
    write_recipe(folder / "recipe.yaml", write_texts(folder / "texts.jsonl"), evaluate__long_blocks=0)
    write_tasks(folder / "tasks")
    return folder


def scalpel(world: Path, command: str, target: str, *more: str) -> int:
    return main([command, str(world / target), "--recipe", str(world / "recipe.yaml"), *more])


def test_a_run_measures_all_its_models(world, capfd, counted) -> None:
    given = ["--out", str(world / "run"), "--tasks", f"{world}/tasks/both.yaml,{world}/tasks/pages.yaml"]
    quick = ["--search", "last", "--no-verify", "--until", "evaluate", "--limit", "4", "--json"]
    assert scalpel(world, "run", "model", *given, *quick) == 0
    found = json.loads(capfd.readouterr().out)["evaluate"]
    models = [name for name in ("parent", "cut", "healed") if name in found]
    assert models == ["parent", "cut", "healed"]
    for name in models:
        assert {"acc"} == set(found[name]["tasks"]["both"])
        assert found[name]["tasks"]["both"]["acc"]["n"] == 8
        assert {"colours", "fixed"} == set(load_items(world / "run" / "evaluate", f"{name}.parts"))
        ids = {name: load_items(world / "run" / "evaluate", name)["both"].ids for name in models}
    assert len(set(ids.values())) == 1
    assert found["harness"]["tasks"]["pages"]["source"] == "file"
    assert found["harness"]["limit"] == 4
    assert sorted(set(counted)) == ["colours", "fixed", "pages"]
    done = len(counted)
    assert main(["evaluate", str(world / "run"), "--tasks", f"{world}/tasks", "--limit", "4", "--quiet"]) == 0
    assert sorted(set(counted[done:])) == ["sums"]  # the others are known from before
    assert set(load_items(world / "run" / "evaluate", "cut")) == {"colours", "fixed", "pages", "sums"}


def test_one_model_alone_goes_on_after_an_interruption(world, monkeypatch, counted) -> None:
    watched = exam.measure

    def interrupted(model, tokenizer, task, how, *, label):
        if task.task_name == "pages":
            raise KeyboardInterrupt
        return watched(model, tokenizer, task, how, label=label)

    given = ["--out", str(world / "alone"), "--tasks", f"{world}/tasks", "--limit", "3", "--quiet"]
    monkeypatch.setattr(exam, "measure", interrupted)
    assert scalpel(world, "evaluate", "model", *given) == 130
    monkeypatch.setattr(exam, "measure", watched)
    assert scalpel(world, "evaluate", "model", *given) == 0
    assert counted == ["colours", "fixed", "pages", "sums"]
    results = json.loads((world / "alone" / "results.json").read_text(encoding="utf-8"))
    assert set(results["evaluate"]["model"]["tasks"]) == set(counted)
    assert scalpel(world, "evaluate", "model", *given) == 2  # it is finished


def test_a_bad_task_ends_before_anything_is_written(world, capsys, monkeypatch) -> None:
    monkeypatch.setattr(harness, "measure", lambda *a, **k: pytest.fail("measured"))
    for command in ("run", "evaluate"):
        assert scalpel(world, command, "model", "--out", str(world / "bad"), "--tasks", "offline:pica") == 2
        assert "did you mean 'offline:piqa'" in capsys.readouterr().err
        assert not (world / "bad").exists()
