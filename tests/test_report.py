"""The page says what results.json says, all of it, and nothing breaks out of it."""

from __future__ import annotations

import copy
import functools
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from findings import EVIL, PROVENANCE, STAGES, full_results, quantities

from layerscalpel import plots
from layerscalpel.card import headline, model_card
from layerscalpel.config import Config, to_dict
from layerscalpel.report import render_report

SECTIONS = {stage: stage for stage in STAGES} | {"cut": "proof", "evaluate": "samples"}


@pytest.fixture
def results() -> dict[str, Any]:
    return full_results()


def page_of(results: dict[str, Any]) -> str:
    return render_report(results, to_dict(Config()), PROVENANCE)


@functools.cache
def full_page() -> str:
    return page_of(full_results())


@pytest.fixture
def without_drawings(monkeypatch):
    """For properties of the words: drawing takes most of a page's time."""
    monkeypatch.setattr("layerscalpel.report._figures", lambda results: {})


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


def test_page_is_well_formed_and_ids_are_unique():
    reader = Reader(full_page())
    assert reader.open == []
    assert len(reader.ids) == len(set(reader.ids))


def test_page_loads_nothing_and_runs_nothing():
    page = full_page()
    reader = Reader(page)
    assert all(load.startswith(("#", "data:")) for load in reader.loads)
    assert not reader.tags & {"script", "link"}
    assert not re.search(r"@import|url\((?!#)", page)


def test_the_page_holds_the_measured_numbers(results):
    text = Reader(full_page()).text
    missing = [number for number in quantities(results) if number not in text]
    assert missing == []
    sizes = "134,515,008 269.0 98.4 113,274,432 226.5 7,080,192 51,200 60.1 812.0 1,913.0 1.25 25.1 ± 0.4 128 x 256"
    assert [number for number in re.split(r" (?![±x]|0\.4|256)", sizes) if number not in text] == []


def test_foreign_text_is_escaped(results, without_drawings):
    results["data"]["healing"]["source"] = "<img src=x onerror=alert(1)>"
    reader = Reader(page_of(results))
    assert not reader.tags & {"script", "img"}
    assert " ".join(EVIL.split()) in reader.text


@pytest.mark.parametrize("missing", STAGES)
def test_an_absent_stage_has_no_section(results, missing):
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
    for name in ("gate", "certificate", "similarity", "wall_s", "peak_memory_bytes"):
        del results["search"][name]
    results["search"]["scores"] = {}  # as the search `last` leaves it
    page = page_of(results)
    assert '<section id="search">' in page
    assert not re.search("Certificate|gate-paths", page)


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
            "The decode speed-up of 1.2 ± 0.2 times lies within two standard errors of 1",
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
    assert "The learned gate chose start 3; the exact optimum over all 25 windows is start 13." in text
    assert "costs 1.23 ± 0.05 nats more" in text
    assert "0 of 5 starts of the gate ended at the optimum" in text


def test_same_results_give_the_same_bytes(results):
    again = copy.deepcopy(results)
    assert page_of(results) == full_page()
    assert results == again  # nothing was changed on the way


@functools.cache
def drawings() -> dict[str, str]:
    results = full_results()
    search, segment = results["search"], results["segment"]
    angular = {s: {"angular_distance": 0.1 + int(s) / 100, "se": 0.01} for s in search["scores"]}
    influence = {s: {"block_influence": 0.1 + int(s) / 100} for s in search["scores"]}
    return {
        "kl": plots.kl_curve(search, segment),
        "angular": plots.kl_curve({"scores": angular}, segment),
        "influence": plots.kl_curve({"scores": influence}, segment),
        "gate": plots.gate_paths(search),
        "similarity": plots.similarity_map(search, segment),
        "loss": plots.loss_curve(results["heal"]),
        "quality": plots.quality_bars(results["evaluate"]),
        "speed": plots.speed_bars(results["benchmark"]),
    }


@pytest.mark.parametrize("name", ["kl", "angular", "influence", "gate", "similarity", "loss", "quality", "speed"])
def test_every_plot_is_an_svg_with_marks_and_labels(name):
    svg = drawings()[name]
    reader = Reader(svg)
    assert svg.startswith("<svg")
    assert reader.open == []
    assert {"path", "text"} <= reader.tags
    assert plots.INK not in svg
    assert "currentColor" in svg


def test_the_kl_curve_is_logarithmic_only_where_it_needs_to_be(results):
    assert "Removing layers 13..18 changes the predictions least" in drawings()["kl"]
    assert "Angular distance of the windows" in drawings()["angular"]
    assert ">100</text>" not in drawings()["kl"]
    results["search"]["scores"]["0"]["kl_nats"] = 100.0
    assert ">100</text>" in plots.kl_curve(results["search"], results["segment"])
