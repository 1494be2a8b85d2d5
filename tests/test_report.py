"""The page says what results.json says, all of it, and nothing breaks out of it."""

from __future__ import annotations

import copy
import functools
import math
import re
from html.parser import HTMLParser
from typing import Any
from unittest.mock import patch

import pytest
from findings import EVIL, PROVENANCE, STAGES, VARIANTS, full_results, quantities, rates_results, two_run_results

from layerscalpel import layerplots, plots, searchplots
from layerscalpel.card import headline, model_card
from layerscalpel.config import to_dict
from layerscalpel.report import render_report
from layerscalpel.settings import Config

SECTIONS = {stage: stage for stage in STAGES} | {"cut": "proof", "evaluate": "samples"}


@pytest.fixture
def results() -> dict[str, Any]:
    return full_results()


def page_of(results: dict[str, Any]) -> str:
    return render_report(results, to_dict(Config()), PROVENANCE)


@functools.cache
def page_named(name: str) -> str:
    """Return the page of a variant; two have their drawings, which take most of the time."""
    if name in ("full", "rates"):
        return page_of(VARIANTS[name]())
    with patch("layerscalpel.report._figures", lambda results: {}):
        return page_of(VARIANTS[name]())


def full_page() -> str:
    return page_named("full")


class Reader(HTMLParser):
    """Checks that every element is closed in order, and collects the text, the ids and what would be loaded."""

    VOID = ("meta", "br", "link", "img", "input", "hr")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.loads: list[str] = []
        self.feed(page)
        self.close()
        self.text = " ".join(" ".join(self.words).split())

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.note(tag, attrs)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.note(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def note(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1:] == [tag], f"</{tag}> closes nothing"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.mark.parametrize("name", VARIANTS)
def test_page_is_well_formed_and_ids_are_unique(name):
    reader = Reader(page_named(name))
    assert reader.open == []
    assert len(reader.ids) == len(set(reader.ids))


@pytest.mark.parametrize("name", VARIANTS)
def test_page_loads_nothing_and_runs_nothing(name):
    page = page_named(name)
    reader = Reader(page)
    assert all(load.startswith(("#", "data:")) for load in reader.loads)
    assert not reader.tags & {"script", "link"}
    assert not re.search(r"@import|url\((?!#)", page)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_page_holds_the_measured_numbers(name):
    text = Reader(page_named(name)).text
    assert [number for number in quantities(VARIANTS[name]()) if number not in text] == []


def test_the_page_holds_sizes_and_counts():
    text = Reader(full_page()).text
    sizes = "134,515,008 269.0 98.4 113,274,432 226.5 7,080,192 51,200 60.1 812.0 1,913.0 1.25 25.1 ± 0.4 128 x 256"
    assert [number for number in re.split(r" (?![±x]|0\.4|256)", sizes) if number not in text] == []


def test_foreign_text_is_escaped(results, without_drawings):
    results["data"]["healing"]["source"] = "<img src=x onerror=alert(1)>"
    reader = Reader(page_of(results))
    assert not reader.tags & {"script", "img"}
    assert " ".join(EVIL.split()) in reader.text


@pytest.mark.parametrize("missing", STAGES)
def test_an_absent_stage_has_no_section(results, without_drawings, missing):
    assert f'<section id="{SECTIONS[missing]}">' in full_page()
    del results[missing]
    page = page_of(results)
    assert f'<section id="{SECTIONS[missing]}">' not in page
    assert Reader(page).open == []


def test_the_parent_alone_makes_a_page():
    results = {"parent": full_results()["parent"]}
    reader = Reader(page_of(results))
    assert reader.open == []
    assert "svg" not in reader.tags


def test_what_a_stage_may_leave_out_is_not_asked_for(results):
    del results["parent"]["file_bytes"], results["cut"]["config_changes"], results["benchmark"]["threads"]
    for name in ("gate", "certificate", "race", "similarity", "layers", "angles", "wall_s", "peak_memory_bytes"):
        del results["search"][name]
    results["search"]["scores"] = {}  # as the search `last` leaves it
    page = page_of(results)
    assert '<section id="search">' in page
    assert not re.search("Certificate|Race|gate-paths|layer-profiles", page)


def test_without_healing_the_cut_model_is_the_result(results, without_drawings):
    del results["heal"], results["evaluate"]["healed"]
    results["benchmark"]["cut"] = results["benchmark"].pop("healed")
    assert "KL to the parent 0.721 ± 0.018" in headline(results)
    assert re.findall(r"<small>(cut|healed)</small>", page_of(results)) == ["cut", "cut"]


def test_a_sound_run_has_no_warning():
    assert 'class="warning"' not in full_page()


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (
            "evaluate healed kl_nats value",
            0.91,
            "Healing made the KL to the parent worse: 0.721 ± 0.018 nats before, 0.91",
        ),
        ("evaluate healed kl_nats value", math.nan, "Healing made the KL to the parent worse"),
        ("evaluate healed ppl value", 40.0, "Healing made the perplexity worse"),
        ("evaluate healed top1_agreement_fraction value", 0.5, "Healing made the top-1 agreement worse"),
        ("heal best_step", 0, "No step of healing lowered the held-out loss"),
        (
            "benchmark speedup decode se",
            0.2,
            "Speed in decode: no difference can be told: over 5 rounds the ratio spreads by 0.57",
        ),
        ("benchmark speedup prefill value", 0.8, "The result is slower than the parent in prefill: 0.80 ± 0.03 times"),
        ("cut proof", None, "The cut checkpoint was not verified (--no-verify)."),
        ("cut proof logits generation_equal", False, "The proof FAILED"),
    ],
)
def test_what_speaks_against_the_result_is_said(results, without_drawings, path, value, said):
    *parents, last = path.split()
    node = results
    for name in parents:
        node = node[name]
    node[last] = value
    assert said in Reader(page_of(results)).text
    assert said in model_card(results, {}, PROVENANCE)


def test_the_certificate_says_what_the_gate_missed(results, without_drawings):
    missed = {
        "gate_start": 3,
        "difference_kl_nats": {"value": 1.234, "se": 0.05, "n": 8192},
        "num_starts_at_optimum": 0,
    }
    results["search"]["certificate"] |= missed
    text = Reader(page_of(results)).text
    assert "The learned gate chose start 3; the best of all 25 windows by their exact scores is start 13." in text
    assert "costs 1.23 ± 0.05 nats more" in text
    assert "0 of 5 starts of the gate ended at the best one" in text


def test_every_removed_layer_is_a_gap_in_the_strip(without_drawings):
    strip = re.findall(r'class="(removed|trained|kept)" title="layer (\d+)', page_of(two_run_results()))
    places = {state: [int(i) for kind, i in strip if kind == state] for state in ("removed", "trained")}
    assert places == {"removed": [10, 11, 17, 18, 19, 20], "trained": [9, 12, 16, 21]}


def test_a_parent_that_was_not_timed_is_said(without_drawings):
    text = Reader(page_of(rates_results())).text
    assert "The parent does not fit into memory and was not timed." in text
    assert "times the parent's speed" not in text


def test_windows_that_cannot_be_cut_are_listed(without_drawings):
    text = Reader(page_of(rates_results())).text
    assert "start reason 9..10 layer 10 writes keys that layer 19 reads - remove both, or none" in text


def test_same_results_give_the_same_bytes(results):
    again = copy.deepcopy(results)
    assert page_of(results) == full_page()
    assert results == again  # nothing was changed on the way


@functools.cache
def drawings() -> dict[str, str]:
    results, rates, two = full_results(), rates_results(), two_run_results()
    search, runs = results["search"], results["segments"]
    angular = {s: {"angular_distance": 0.1 + int(s) / 100, "se": 0.01} for s in search["scores"]}
    influence = {s: {"block_influence": 0.1 + int(s) / 100} for s in search["scores"]}
    return {
        "kl": searchplots.kl_curve(search, runs),
        "angular": searchplots.kl_curve({"scores": angular}, runs),
        "influence": searchplots.kl_curve({"scores": influence}, runs),
        "two runs": searchplots.kl_curve(two["search"], two["segments"]),
        "pilots": searchplots.kl_curve(VARIANTS["pilots"]()["search"], [[12, 18]]),
        "undecided": searchplots.kl_curve(rates["search"], rates["segments"]),
        "gate": searchplots.gate_paths(search),
        "surface": searchplots.surface_map(rates["search"], rates["segments"]),
        "profiles": layerplots.layer_profiles(search, runs),
        "similarity": layerplots.similarity_map(search, runs),
        "similarity of two": layerplots.similarity_map(search, two["segments"]),
        "loss": plots.loss_curve(results["heal"]),
        "quality": plots.quality_bars(results["evaluate"]),
        "speed": plots.speed_bars(results["benchmark"]),
    }


@pytest.mark.parametrize(
    "name", ["kl", "angular", "influence", "gate", "surface", "profiles", "similarity", "loss", "quality", "speed"]
)
def test_every_plot_is_an_svg_with_marks_and_labels(name):
    svg = drawings()[name]
    reader = Reader(svg)
    assert svg.startswith("<svg")
    assert reader.open == []
    assert {"path", "text"} <= reader.tags
    assert plots.INK not in svg
    assert "currentColor" in svg


def test_the_kl_curve_is_logarithmic_only_where_it_needs_to_be(results):
    assert ">5</text>" in drawings()["kl"]  # from 0.7 to 9 nats
    del results["search"]["scores"]["0"]
    even = searchplots.kl_curve(results["search"], results["segments"])
    assert ">5</text>" not in even
    assert ">0.50</text>" not in even
    results["search"]["scores"]["0"] = {"kl_nats": 0.0, "se": 0.0, "num_blocks": 32}  # a logarithm has no place for it
    assert "<svg" in searchplots.kl_curve(results["search"], results["segments"])


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("kl", "Removing layers 13..18 changes the predictions least"),
        ("angular", "Angular distance of the windows"),
        ("two runs", "KL to the parent of single runs; two were removed: layers 10..11 and layers 17..20"),
        ("pilots", "Layers 12..17 healed best in the pilots"),
        ("undecided", "3 of 24 windows could not be told apart; layers 12..18 had the lowest mean"),
    ],
)
def test_the_kl_curve_claims_what_the_search_found(name, title):
    assert f">{title}</text>" in drawings()[name]


def test_windows_that_saw_fewer_blocks_look_so_and_have_a_legend():
    assert ">runs of 6 that saw 32 blocks</text>" in drawings()["kl"]
    assert ">runs of 6 that saw only 8 to 16 blocks</text>" in drawings()["kl"]
    assert "fill: none; stroke: #4a86c5" in drawings()["kl"]
    old = searchplots.kl_curve(VARIANTS["old"]()["search"], [[13, 19]])
    assert ">runs of 6</text>" in old
    assert "blocks</text>" not in old


def test_every_removed_segment_is_outlined_and_shaded():
    outline = re.compile(rf"fill: none; stroke: {plots.MARK}")
    assert [len(outline.findall(drawings()[name])) for name in ("similarity", "similarity of two")] == [1, 2]


def test_the_surface_shows_the_target_and_bears_a_window_that_costs_nothing():
    search, runs = rates_results()["search"], [[12, 19]]
    assert ">asked: 0.9 nats</text>" in drawings()["surface"]
    assert ">7 removed</text>" in drawings()["surface"]
    del search["target"]
    search["surface"]["1"]["18"]["kl_nats"] = 0.0
    assert "asked" not in searchplots.surface_map(search, runs)
