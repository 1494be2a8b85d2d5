"""Which tasks of several runs compare: the same prompts, metrics and items; the others are left out and named."""

from __future__ import annotations

from typing import Any

import pytest
from comparing import best_of, group_of, printed, right, run_of, task_of, with_tasks

from layerscalpel.alike import common_tasks
from layerscalpel.compare import compare
from layerscalpel.gather import Run
from layerscalpel.items import load_items


def test_retentions_are_over_the_tasks_that_all_have() -> None:
    def run(name: str, share: float, *tasks: str) -> Run:
        parts = {"parent": 0.9, "cut": 0.6, "healed": share}
        return with_tasks(
            run_of(name), **{model: {task: task_of(right(s), task) for task in tasks} for model, s in parts.items()}
        )

    both = run("both", 0.8, "piqa", "boolq")
    both.read[load_items, "healed"]["boolq"] = task_of(right(0.5), "boolq")
    found = compare([group_of(both), group_of(run("one", 0.7, "piqa"))])
    assert found.tasks == ("piqa",)
    assert "boolq is left out of the retentions: it was not measured on one" in found.notes
    healed = {row.name: row for row in found.rows if row.model == "healed"}
    assert healed["both"].figure("plain_fraction")["value"] == pytest.approx(8 / 9)  # type: ignore[index]
    assert healed["one"].figure("adjusted_fraction")["value"] == pytest.approx(0.5)  # type: ignore[index]
    assert best_of(found, "plain_fraction") == ["both healed"]
    assert "The plain retentions are over piqa." in printed(found)


def test_tasks_measured_in_another_way_are_left_out() -> None:
    groups = [
        group_of(with_tasks(run_of(name), **{m: {"piqa": task_of(right(0.8, n))} for m in ("parent", "cut", "healed")}))
        for name, n in (("all", 400), ("few", 100))
    ]
    tasks, notes = common_tasks([*groups, group_of(run_of("none"))])
    assert tasks == []
    assert notes == [
        "no task was measured on none: its retentions are left out",
        "piqa is left out of the retentions: few measured it in another way",
    ]


def test_cuts_that_are_the_same_are_one_row() -> None:
    rows = compare([group_of(run_of("endpoint")), group_of(run_of("lora"))]).rows
    assert [row.label for row in rows] == ["endpoint, lora cut", "endpoint healed", "lora healed"]


def asked(name: str, share: float = 0.8, *, seed: int = 0, **definitions: Any) -> Run:
    """Return a run whose models answered a task piqa; `definitions` are those of its tasks."""
    shares = {"parent": 0.9, "cut": 0.6, "healed": share}
    tasks = {model: {"piqa": task_of(right(own))} for model, own in shares.items()}
    return with_tasks(run_of(name, seed=seed, text=f"{seed}"), definitions, **tasks)


def test_a_task_with_other_prompts_does_not_compare() -> None:
    found = compare([group_of(asked("a")), group_of(asked("b", 0.7, piqa="changed"))])
    assert found.tasks == ()
    assert "piqa is left out of the retentions: b measured it in another way" in found.notes
    assert not any(row.figure("plain_fraction") for row in found.rows)
    assert all(one.measure not in ("plain_fraction", "adjusted_fraction") for one in found.contests)


def test_seeds_that_were_asked_in_another_way_do_not_compare() -> None:
    changed = group_of(asked("a"), asked("a", seed=1, piqa="changed"))
    assert common_tasks([changed]) == ([], ["piqa is left out of the retentions: a measured it in another way"])
    tasks, notes = common_tasks([group_of(asked("b"), asked("b", seed=1)), changed])
    assert (tasks, notes) == ([], ["piqa is left out of the retentions: a measured it in another way"])


def test_older_runs_that_kept_no_definition_are_not_taken_to_be_alike() -> None:
    runs = [asked("a"), asked("b")]
    for run in runs:
        del run.results["evaluate"]["harness"]["tasks"]["piqa"]["definition"]
    assert compare([group_of(runs[0])]).tasks == ("piqa",)
    found = compare([group_of(run) for run in runs])
    assert found.tasks == ()
    said = "b measured it in another way, or in one that an older version did not keep - measure anew: scalpel evaluate"
    assert any(said in note for note in found.notes)


@pytest.mark.parametrize("task_tokens", [None, 512])
def test_a_shorter_limit_of_tokens_is_another_way(task_tokens: int | None) -> None:
    runs = [asked("a"), asked("b")]
    runs[1].results["evaluate"]["harness"]["tasks"]["piqa"]["task_tokens"] = task_tokens
    assert compare([group_of(run) for run in runs]).tasks == (() if task_tokens else ("piqa",))


def test_cuts_with_other_scores_stay_two_rows() -> None:
    def labels(*runs: Run) -> list[str]:
        return [row.label for row in compare([group_of(run) for run in runs]).rows if row.model == "cut"]

    assert labels(asked("a"), asked("b")) == ["a, b cut"]
    assert labels(asked("a"), asked("b", piqa="changed")) == ["a cut", "b cut"]
    other = asked("b")
    other.results["evaluate"]["cut"]["retention"]["plain_fraction"]["value"] = 0.5
    assert labels(asked("a"), other) == ["a cut", "b cut"]


def test_each_retention_names_the_tasks_it_is_over() -> None:
    def run(name: str, **parents: float) -> Run:
        tasks = {"piqa": 0.9, "sums": 0.0, "boolq": 0.5} | parents
        made = {
            m: {task: task_of(right(own), task) for task, own in tasks.items()} for m in ("parent", "cut", "healed")
        }
        return with_tasks(run_of(name), **made)

    said = printed(compare([group_of(run("a")), group_of(run("b"))]))
    assert "The plain retentions are over piqa, boolq." in said
    assert "The adjusted retentions are over piqa." in said
    other = run("b", sums=0.1)
    other.results["parent"]["name"] = "another"
    said = printed(compare([group_of(run("a")), group_of(other)]))
    assert "over piqa, boolq (a cut, a healed); over piqa, sums, boolq (b cut, b healed)." in said
