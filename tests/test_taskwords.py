"""What a person reads of tasks, writing and distances: every figure, and what makes it misleading."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from findings import PROVENANCE, full_results, quantity, task_results
from test_retention import answers, task
from test_tables import printed

from layerscalpel.card import headline, model_card, warnings
from layerscalpel.distancewords import distance_text, domain_rows
from layerscalpel.longplots import kl_by_position
from layerscalpel.report import render_report
from layerscalpel.retention import retentions
from layerscalpel.summary import measured
from layerscalpel.taskplots import retention_bars
from layerscalpel.taskwords import overlap_text, retention_rows, task_rows, task_warnings
from layerscalpel.writingwords import more_than_chance, writing_warnings

AT_CHANCE = (
    "Not shown to be better than guessing (less than three standard errors above it): the parent on boolq;"
    " the healed model on boolq. A task where that holds of the parent does not count in the adjusted retention."
)
UNCOUNTED = (
    "* does not count in the adjusted retention: the parent is not shown to be better than guessing, or chance is not"
    " known"
)


@pytest.fixture
def results() -> dict[str, Any]:
    return task_results()


def everywhere(results: dict[str, Any]) -> list[str]:
    """Return page, card and terminal, white space aside."""
    page = render_report(results, {}, PROVENANCE).replace("\u00a0", " ")
    return [" ".join(text.split()) for text in (page, model_card(results, {}, PROVENANCE), printed(results, 1000))]


def test_a_task_at_chance_is_a_warning_everywhere(results, without_drawings):
    assert warnings(results) == [AT_CHANCE]
    assert all(AT_CHANCE in text and UNCOUNTED in text for text in everywhere(results))


def test_a_plain_retention_above_all_is_a_warning_everywhere(results, without_drawings):
    kept = results["evaluate"]["healed"]["retention"]
    kept["plain_fraction"]["value"] = kept["by_task"]["boolq"]["plain_fraction"]["value"] = 1.234
    results["evaluate"]["healed"]["tasks"]["boolq"]["acc"]["value"] = 0.622
    said = (
        "The plain retention of the healed model is 123.4 ± 1.4 %, above 100 %: boolq rose from 41.2 to 62.2 %, where"
        " guessing gives 62.2. Adjusted for chance it is 83 ± 5 %."
    )
    assert warnings(results) == [said, AT_CHANCE]
    assert all(said in text for text in everywhere(results))


def test_a_plain_retention_a_little_above_all_shows_the_digits_that_tell_it(results):
    kept = results["evaluate"]["healed"]["retention"]
    kept["plain_fraction"]["value"] = 1.0004
    tasks, about = results["evaluate"], results["evaluate"]["harness"]["tasks"]
    about["boolq"] |= {"metric": "f1", "chance": None}  # no share: it has no percents
    for model, value in (("parent", 0.41203), ("healed", 0.41222)):
        tasks[model]["tasks"]["boolq"] = {"f1": quantity(value, 0.01)}
    kept["by_task"]["boolq"]["plain_fraction"]["value"] = 1.0005
    assert task_warnings(results)[0].startswith(
        "The plain retention of the healed model is 100.04 ± 1.4 %, above 100 %: boolq rose from 0.4120 to 0.4122."
    )
    for model, value in (("parent", 23.1), ("healed", 24.9)):
        tasks[model]["tasks"]["boolq"]["f1"]["value"] = value
    assert "boolq rose from 23.1 to 24.9." in task_warnings(results)[0]


def test_where_no_task_counts_that_is_said_everywhere(results, without_drawings):
    kept = results["evaluate"]["healed"]["retention"]
    del kept["adjusted_fraction"], kept["by_task"]["piqa"]["adjusted_fraction"]
    kept["by_task"]["piqa"]["counts"] = False
    page, card, terminal = everywhere(results)
    assert headline(results).endswith("plain retention 96.9 ± 1.4 %, adjusted for chance: no task counts.")
    assert "adjusted retention<small>0 tasks</small>" in page
    assert "| adjusted retention, 0 tasks | | | – |" in card
    assert "adjusted retention, 0 tasks - " in terminal


def test_words_read_what_retention_writes(results, without_drawings):
    """A child that always says yes, from its items to the warning."""
    yes = answers(2000, 0.622)
    parent = {"boolq": task(answers(2000, 0.41, 1), "boolq", yes.mean().item()), "piqa": task(answers(500, 0.7, 2))}
    child = {"boolq": task(yes, "boolq", yes.mean().item()), "piqa": task(answers(500, 0.7, 3))}
    kept = results["evaluate"]["healed"]["retention"] = retentions(parent, child).to_dict()
    assert [said.split(",")[0] for said in task_warnings(results)] == [
        f"The plain retention of the healed model is {measured(kept['plain_fraction'], 100)} %",
        AT_CHANCE,
    ]
    assert torch.isfinite(torch.tensor(retention_rows(results)[1]["kept"]["healed"]["value"]))


def test_the_terminal_has_a_row_a_task_and_both_retentions(results):
    lines = [" ".join(line.split()) for line in printed(results).splitlines()]
    for row in (
        "task (metric) chance parent healed",
        "piqa (acc_norm) 50.0 68.3 ± 1.5 65.1 ± 1.5",
        "boolq (acc) * 62.2 41.2 ± 1.6 40.6 ± 1.6",
        "wikitext (word_perplexity) - 23.4 ± 0.9 31.7 ± 1.2",
        "plain retention, 2 tasks 96.9 ± 1.4",
        "adjusted retention, 1 task 82.5 ± 5.3",
    ):
        assert row in lines
    assert max(map(len, printed(results, 80).splitlines())) <= 80


def test_the_metric_is_named_everywhere(results, without_drawings):
    page, card, _ = everywhere(results)
    assert "boolq *<small>acc</small>" in page
    assert "| piqa (acc_norm) | 50.0 |" in card
    assert "| boolq (acc) * | 62.2 |" in card


def test_large_perplexities_take_no_name_and_no_chance_away(results):
    evaluated = results["evaluate"]
    for model in ("cut", "stitched", "quantized"):
        evaluated[model] = copy.deepcopy(evaluated["healed"])
    for model in ("parent", "cut", "stitched", "healed", "quantized"):
        evaluated[model]["tasks"]["wikitext"]["word_perplexity"] = quantity(2.345678e10, 1.2e9)
    lines = printed(results, 80).splitlines()
    assert max(map(len, lines)) <= 80
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.strip()}
    assert rows["piqa"][:2] == ["50.0", "68.3"]
    assert rows["boolq"][:2] == ["62.2", "41.2"]
    assert rows["wikitext"][:3] == ["-", "2.35e+10", "±"]
    assert "…" not in "".join(lines)


def test_the_headline_tells_both_retentions(results):
    assert headline(results).endswith("plain retention 96.9 ± 1.4 %, adjusted for chance 83 ± 5 %.")
    assert "retention" not in headline(full_results())


def test_items_that_overlap_are_told_and_many_are_a_warning(results, without_drawings):
    told = "text that healed or calibrated: 7 of 1,000 of boolq. 181 items have fewer words and were not looked for."
    assert all(told in text for text in everywhere(results))
    results["evaluate"]["overlap"]["piqa"]["too_short"] = 1
    assert overlap_text(results).endswith("1 item has fewer words and was not looked for.")
    results["evaluate"]["overlap"]["piqa"]["overlapping"] = 400
    assert "400 of 1,000 items of piqa share 13 words in a row with it." in warnings(results)[-1]
    assert warnings(results)[-1] in everywhere(results)[1]


def test_what_was_cut_short_or_has_no_retention_is_told(results, without_drawings):
    page, card, _ = everywhere(results)
    for said in (
        "3 sequences of boolq lost their beginning",
        "wikitext has no retention: less word_perplexity is better",
    ):
        assert said in page
        assert said in card
    boolq = results["evaluate"]["harness"]["tasks"]["boolq"]
    boolq |= {"cut_short": 1, "task_tokens": 64}
    said = "1 sequence of boolq lost its beginning, being longer than evaluate.task_tokens, 64."
    assert all(said in text for text in everywhere(results)[:2])


def test_without_a_child_there_are_scores_alone(results):
    results["evaluate"]["model"] = results["evaluate"].pop("parent")
    for name in ("cut", "healed"):
        del results["evaluate"][name]
    assert retention_rows(results) == []
    assert warnings(results) == []
    assert [row["scores"]["model"]["value"] for row in task_rows(results)] == [0.683, 0.412, 23.41]
    assert "piqa (acc_norm) 50.0 68.3 ± 1.5" in [" ".join(line.split()) for line in printed(results).splitlines()]


def test_a_run_without_tasks_says_nothing_of_them(without_drawings):
    results = full_results()
    assert (task_rows(results), retention_rows(results), task_warnings(results)) == ([], [], [])
    page, card, terminal = everywhere(results)
    assert '<section id="tasks">' not in page
    assert '<section id="where">' not in page
    assert "None of these figures is a task score" in page
    assert not any(word in text for text in (card, terminal) for word in ("retention", "Writing"))


# ---------------------------------------------------------------------------------------------- writing and distances


def test_more_loops_than_the_parents_are_a_warning_everywhere(results, without_drawings):
    for sample in results["evaluate"]["healed"]["samples"][:7]:
        sample["loops"] = True
    said = (
        "The healed model writes worse than its parent: 7 of 16 texts that it writes greedily end in a loop, against 0."
    )
    assert writing_warnings(results) == [said]
    assert all(said in text for text in everywhere(results))
    for sample in results["evaluate"]["healed"]["samples"]:
        sample["sampled"]["text"] = " \n"
    assert "16 of 16 texts that it writes by lot are empty, against 0" in writing_warnings(results)[1]


@pytest.mark.parametrize(
    ("more", "less", "expected"),
    [(0, 0, False), (4, 0, False), (5, 0, True), (5, 1, False), (9, 2, True), (0, 9, False)],
)
def test_what_chance_explains_is_no_warning(more, less, expected):
    pairs = [(True, False)] * more + [(False, True)] * less + [(True, True), (False, False)] * 3
    assert more_than_chance(pairs) == expected


def test_every_sample_is_on_the_page_and_most_are_folded(results, without_drawings):
    page = render_report(results, {}, PROVENANCE)
    assert page.count('class="prompt"') == 16
    assert "<summary>13 more</summary>" in page
    assert all(f"by {model} {i}<" in page for model in ("parent", "healed") for i in range(16))


def test_positions_and_domains_are_told(results):
    assert distance_text(results) == (
        "The healed model's KL to the parent is 1.40 ± 0.02 nats per token at positions 1..15 of a block and"
        " 0.41 ± 0.02 at 128..256."
    )
    assert [(row["domain"], row["model"]) for row in domain_rows(results)] == [
        (domain, model) for domain in ("c4", "alpaca") for model in ("parent", "cut", "healed")
    ]
    results["evaluate"]["healed"]["kl_by_position"] = results["evaluate"]["cut"]["kl_by_position"] = [
        {"from": 1, "to": 17, "kl_nats": quantity(1, 0.1), "top1_agreement_fraction": quantity(0.5, 0.1)}
    ]
    assert distance_text(results) == ""


def test_plots_have_error_bars_and_say_what_they_show(results):
    svg = retention_bars(retention_rows(results), task_rows(results))
    assert ">Kept: pale plain, solid adjusted</text>" in svg
    assert ">Adjusted for chance, task by task</text>" in svg
    assert ">piqa</text>" in svg
    assert ">boolq</text>" not in svg
    assert ">Healed, KL to the parent: 1.40 at 1..15 and 0.41 at 128..256</text>" in kl_by_position(
        {name: results["evaluate"][name]["kl_by_position"] for name in ("cut", "healed")}
    )
    del results["evaluate"]["healed"]["retention"]["by_task"]["piqa"]
    assert ">Kept</text>" in retention_bars(retention_rows(results)[:1], task_rows(results))
