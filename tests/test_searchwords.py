"""The sentences about a search claim no more than it found, and say what speaks against it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from findings import full_results, pilot_results, quantity, rates_results, two_run_results

from layerscalpel.card import warnings
from layerscalpel.race import race
from layerscalpel.racewords import confidence_text, margin_text, race_line, race_text
from layerscalpel.searchwords import search_paragraphs, two_runs_text
from layerscalpel.targetwords import step_ms


def search_with(**changes: Any) -> dict[str, Any]:
    """Return a search whose race differs in some points."""
    search = full_results()["search"]
    search["race"] |= changes
    return search


def margin(value: float, se: float | None, errors: float | None) -> dict[str, Any]:
    return {"rival": 14, "difference_kl_nats": {"value": value, "se": se, "n": 32}, "standard_errors": errors}


# ---------------------------------------------------------------------------------------------- the race


def test_a_decided_race_states_blocks_confidence_and_margin():
    said = race_text(search_with())
    assert said.startswith("All 25 windows were scored on the same 8 blocks of text.")
    assert "the rest went on, to 32 blocks, until one was left." in said
    assert "Start 13 was left: with a confidence of at least 99 % it is the best window for text of this kind" in said
    assert said.endswith(
        "The closest rival, start 14, costs 0.041 ± 0.006 nats more on the 32 blocks that both saw: 6.8 standard"
        " errors, paired."
    )


def test_an_undecided_race_does_not_name_one_window_the_best():
    said = race_text(search_with(left=[12, 13, 14]))
    assert "3 windows were left and could not be told apart (starts 12..14)" in said
    assert "the best window for text of this kind (lowest mean KL) is one of them" in said
    assert "it is the best" not in said
    assert "until the text ended" in said
    assert "The closest rival, start 14, one of those left, costs" in said
    assert "starts 12..14 not told apart at 99 % confidence" in race_line(search_with(left=[12, 13, 14]))


def test_a_rival_that_was_dropped_is_not_taken_for_one_that_is_left():
    assert "start 14, dropped before, costs" in race_text(search_with(left=[12, 13]))


def test_without_a_race_no_confidence_is_stated():
    search = search_with(confidence=0.0, first_blocks=32, left=list(range(25)))
    said = race_text(search)
    assert said.startswith("All 25 windows were scored on all 32 blocks of text, without a race: no confidence is")
    assert not any(word in said for word in ("told apart", "dropped", "left"))
    assert confidence_text(search["race"]) == ""
    assert "confidence" not in race_line(search)
    assert warnings(full_results() | {"search": search}) == []


def test_one_look_is_not_told_as_several():
    assert "the rest went on" not in race_text(search_with(first_blocks=32))
    assert race_line(search_with(first_blocks=32)).startswith("race: 25 windows, 32 blocks; start 13 left")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (margin(0.04, 0.006, 6.67), "costs 0.040 ± 0.006 nats more on the 32 blocks that both saw: 6.7 standard"),
        (margin(0.04, 0.0, None), "costs 0.04 nats more on the 32 blocks that both saw."),
        (margin(0.0, 0.0, None), "costs 0 nats more on the 32 blocks that both saw."),
        (margin(-0.01, 0.004, -2.5), "Start 14 costs 0.010 ± 0.004 nats less on the 32 blocks that both saw, but"),
        (None, ""),
    ],
)
def test_the_margin_is_told_with_its_sign_and_error(given, said):
    told = margin_text(search_with(margin=given)["race"])
    assert said in told
    assert bool(told) == bool(said)
    assert race_text(search_with(margin=given)).strip() == race_text(search_with(margin=given))


def test_the_confidence_is_said_to_hold_for_windows_that_can_be_cut():
    search = search_with() | {"refused": {"12": "it would leave a key unread"}}
    assert "it is the best window that can be cut for text of this kind" in race_text(search)


def test_the_share_of_lost_races_follows_from_the_confidence():
    assert "is dropped in 1 % at most" in confidence_text(search_with()["race"])
    assert "is dropped in 0.1 % at most" in confidence_text(search_with(confidence=0.999)["race"])


def test_what_a_race_really_returns_can_be_told():
    import torch

    noise_CN = torch.randn(4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kl_CN = torch.linspace(1, 2, 4).double().unsqueeze(1) + 0.01 * noise_CN
    held = race(lambda blocks, rows: kl_CN[rows, blocks], [0] * 4, 16, confidence=0.99)
    search = {"race": held.to_dict(0, range(4)), "scores": {str(i): {"kl_nats": 1.0} for i in range(4)}}
    assert "Start 0 was left" in race_text(json.loads(json.dumps(search)))


# ---------------------------------------------------------------------------------------------- the rest


def test_topics_are_told_only_where_there_is_something():
    assert search_paragraphs({"parent": full_results()["parent"]}) == {}
    assert list(search_paragraphs(full_results())) == ["certificate", "race", "confidence"]
    topics = {topic for make in (rates_results, two_run_results, pilot_results) for topic in search_paragraphs(make())}
    assert topics == {
        *("target", "certificate", "race", "confidence", "pilots", "two runs", "refused", "every length"),
        "memory and processes",
    }


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (rates_results, "At most 0.9 nats of KL to the parent were asked for: 7 layers is the most whose best window"),
        (rates_results, "Runs of up to 15 layers were tried. On held-out text the cut model costs 0.721 ± 0.018 nats."),
        (
            pilot_results,
            "At most 114,000,000 parameters were asked for: 6 layers is the least that leaves so few, at 7",
        ),
        (pilot_results, "at 7 of 25 places. 113,274,432 are left."),
        (two_run_results, "6 layers is the least whose prediction, 60.4 ± 0.8 ms, keeps to that. Fitted on cpu,"),
        (
            two_run_results,
            "23 layers: 58.2 ± 0.7 ms predicted, 58.9 ± 0.6 ms measured, the prediction 1.2 ± 0.6 % below",
        ),
        (two_run_results, "The result itself took 59.2 ± 1.4 ms in the benchmark."),
    ],
)
def test_a_target_is_told_with_what_was_measured(make, said):
    assert said in search_paragraphs(make())["target"]


def test_a_step_counts_every_sequence_of_the_batch():
    results = full_results()
    results["benchmark"] |= {"batch_size": 4, "healed": {"decode_tokens_per_s": quantity(80.0, 2.0)}}
    assert step_ms(results) == {"value": 50.0, "se": 1.25, "n": 64}
    assert step_ms({}) is None


def test_two_runs_are_told_whichever_way_it_went():
    results = two_run_results()
    assert "costs 0.61 ± 0.02 nats against 0.703 of the best single run: 0.092 ± 0.012 less" in two_runs_text(results)
    assert "so the two runs were taken." in two_runs_text(results)
    found = results["search"]["two_runs"]
    found |= {"wins": False, "single_less_two_kl_nats": quantity(-0.04, 0.01, 16)}
    found["race"]["left"] = ["10:12+17:21", "13:19"]
    said = two_runs_text(results)
    assert "costs 0.61 ± 0.02 nats: 0.040 ± 0.010 more, paired over 16 blocks; so the single run was kept." in said
    assert "could not tell 2 apart, the single run among them at 99 % confidence" in said


def test_lengths_of_which_nothing_can_be_cut_are_told():
    results = rates_results()
    del results["search"]["rates"]["3"]
    assert "No window of n = 3 can be cut." in search_paragraphs(results)["every length"]


def test_states_that_stayed_in_memory_took_no_file():
    results = rates_results()
    assert "4 passes of 14.5 GB each. Hidden states took up to 3.2 GB of a file. 4 processes" in str(
        search_paragraphs(results)
    )
    results["search"]["offload"]["file_bytes"] = 0
    assert "Hidden states stayed in memory." in search_paragraphs(results)["memory and processes"]


# ---------------------------------------------------------------------------------------------- warnings


def set_in(results: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split()
    for name in parents:
        results = results[name]
    results[last] = value


@pytest.mark.parametrize(
    ("make", "path", "value", "said"),
    [
        (full_results, "search race left", [12, 13], "could not tell 2 windows (starts 12..13) apart on 32 blocks"),
        (full_results, "search race num_blocks", 4, "The candidates were compared on 4 blocks of text only."),
        (
            two_run_results,
            "search two_runs race left",
            ["13:19", "1:3+5:9"],
            "could not tell 2 ways to cut apart on 64",
        ),
        (rates_results, "search target most_layers_tried", 7, "7 layers is the most that was tried: more might stay"),
        (rates_results, "search target asked_kl_nats", 0.7, "The target of 0.7 nats is not met on held-out text"),
        (
            two_run_results,
            "search target asked_ms",
            59.0,
            "The target of 59 ms is not met in the benchmark: the result",
        ),
        (
            two_run_results,
            "search target latency check error_fraction",
            quantity(-0.2, 0.01),
            "At a depth that was not fitted the predicted latency is 20.0 ± 1.0 % below the measured one.",
        ),
    ],
)
def test_what_speaks_against_the_choice_is_warned_of(make, path, value, said):
    results = make()
    before = warnings(results)
    set_in(results, path, value)
    assert [said in warning for warning in warnings(results) if warning not in before] == [True]


def test_pilots_that_decide_by_another_measure_are_not_warned_of():
    results = pilot_results()
    results["search"]["race"]["left"] = [12, 13]
    assert warnings(results) == []
