"""The page and the card say what results.json says, all of it, and nothing breaks out of them."""

from __future__ import annotations

import copy
import functools
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest
import yaml

from layerscalpel import plots
from layerscalpel.config import Config, to_dict
from layerscalpel.report import headline, measured, model_card, render_report, warnings
from layerscalpel.summary import summary_rows

STAGES = ("data", "search", "cut", "stitch", "heal", "evaluate", "benchmark")
SECTIONS = {stage: stage for stage in STAGES} | {"cut": "proof", "evaluate": "samples"}
PROVENANCE = {
    "layerscalpel": "0.1.0",
    "torch": "2.9.1",
    "transformers": "5.23.0",
    "python": "3.11.7",
    "platform": "Linux x86_64",
    "device": "cpu",
    "started": "2026-11-22T02:00:00Z",
    "wall_s": 213.4,
    "seed": 0,
    "settings": {"name": "demo"},
}
EVIL = "Once <script>alert('x')</script> & \"so on\""


RESULTS = """
parent: {name: demo, num_layers: 30, parameters: 134515008, bytes: 269030016, dtype: bfloat16, file_bytes: 98362432}
segment: [13, 19]
data:
  calibration: &blocks {source: c4, num_blocks: 128, block_tokens: 256, labelled_tokens: 32640, num_documents: 384,
    dropped: {}, sha256: 00c4}
  evaluation: {<<: *blocks, num_blocks: 64, dropped: {repeated: 3}, sha256: 01c4}
  healing: {<<: *blocks, source: alpaca, num_blocks: 400, dropped: {empty: 2, repeated: 17}, sha256: 02a1}
  validation: {<<: *blocks, source: alpaca, num_blocks: 21, sha256: 03a1}
search:
  method: clp
  certificate: {gate_start: 13, exact_start: 13, difference_kl_nats: {value: 0.0, se: 0.0, n: 8192},
    num_starts_at_optimum: 2, num_starts: 5}
  wall_s: 60.1
  peak_memory_bytes: 812000000
cut:
  parameters: 113274432
  bytes: 226548864
  config_changes: {num_hidden_layers: 30 -> 24}
  proof: {kind: fresh process, logits_equal: true, max_difference: 0.0, tolerance: 0.0, generation_equal: true,
    dtype: float32, device: cpu}
stitch: {method: linear, kl_nats: {none: {value: 0.69, se: 0.02, n: 512}, linear: {value: 0.47, se: 0.01, n: 512}}}
heal: {method: endpoint, objective: both, layers: [12, 13], trained_parameters: 7080192, steps: 100, tokens: 51200,
  best_step: 90, parameters: 113274432, bytes: 226548864, wall_s: 311.7, peak_memory_bytes: 1913000000}
evaluate:
  parent: {ppl: {value: 17.21, se: 0.31, n: 16320}}
  cut: {kl_nats: {value: 0.7213, se: 0.018, n: 16384}, top1_agreement_fraction: {value: 0.6114, se: 0.0052, n: 16384},
    ppl: {value: 33.84, se: 0.77, n: 16320}}
  healed: {kl_nats: {value: 0.4418, se: 0.021, n: 16384}, ppl: {value: 25.13, se: 0.42, n: 16320},
    top1_agreement_fraction: {value: 0.7012, se: 0.0047, n: 16384}}
  wall_s: 40.2
benchmark:
  device: cpu
  threads: 2
  prompt_tokens: 128
  new_tokens: 32
  batch_size: 1
  parent: {prefill_s: {value: 0.512, se: 0.011, n: 5}, decode_tokens_per_s: {value: 14.2, se: 0.3, n: 5}}
  healed: {prefill_s: {value: 0.421, se: 0.009, n: 5}, decode_tokens_per_s: {value: 16.9, se: 0.4, n: 5}}
  speedup: {of: healed, prefill: {value: 1.216, se: 0.034, n: 5}, decode: {value: 1.19, se: 0.038, n: 5}}
  ideal_speedup: 1.25
"""


def full_results() -> dict[str, Any]:
    """Return a sound run with every stage."""
    results = yaml.safe_load(RESULTS)
    kl = {s: 0.72 + 0.045 * abs(s - 13) ** 1.25 + (7.4 if s == 0 else 0) for s in range(25)}
    began, ends = [0, 6, 12, 18, 24], [3, 13, 13, 16, 22]
    results["search"] |= {
        "scores": {str(s): {"kl_nats": value, "se": 0.02 + 0.03 * value} for s, value in kl.items()},
        "gate": {
            "starts": [[a + (b - a) * t / 32 for a, b in zip(began, ends, strict=True)] for t in range(33)],
            "losses": [[1.0] * 5] * 32,
            "steepness": [5 ** (t / 31) for t in range(32)],
            "ends": ends,
        },
        "similarity": [[math.exp(-abs(i - j) / (6 + i)) for j in range(31)] for i in range(31)],
    }
    loss = {t: 1.9 + 0.8 * math.exp(-t / 20) + 0.05 * (t == 100) for t in range(101)}
    results["heal"] |= {
        "train": [{"step": t, "loss_nats": loss[t] + 0.05 * math.sin(7 * t), "lr": 1e-4} for t in range(1, 101)],
        "validation": [{"step": t, "loss_nats": loss[t]} for t in range(0, 101, 10)],
    }
    for model in ("parent", "cut", "healed"):
        results["evaluate"][model]["samples"] = [
            {"prompt": "The river", "text": EVIL},
            {"prompt": "Why?", "text": model},
        ]
    return results


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


def quantities(node: Any, name: str = "") -> list[str]:
    """Return every measured quantity below a node as the page should print it."""
    if not isinstance(node, dict):
        return []
    if set(node) == {"value", "se", "n"}:
        return [measured(node, 100 if name.endswith("_fraction") else 1)]
    return [text for key, item in node.items() for text in quantities(item, key)]


def test_page_and_card_hold_the_measured_numbers(results):
    text = Reader(full_page()).text
    missing = [number for number in quantities(results) if number not in text]
    assert missing == []
    sizes = "134,515,008 269.0 98.4 113,274,432 226.5 7,080,192 51,200 60.1 812.0 1,913.0 1.25 25.1 ± 0.4 128 x 256"
    assert [number for number in re.split(r" (?![±x]|0\.4|256)", sizes) if number not in text] == []
    card = model_card(results, to_dict(Config()), PROVENANCE)
    assert [number for number in quantities(results["evaluate"]) if number not in card] == []


@pytest.mark.parametrize(
    ("value", "se", "expected"),
    [
        (0.4418, 0.0214, "0.44 ± 0.02"),
        (0.4418, 0.0114, "0.442 ± 0.011"),
        (25.13, 0.42, "25.1 ± 0.4"),
        (123456.0, 789.0, "123,456 ± 789"),
        (0.0, 0.0, "0"),
        (1.5, math.nan, "1.5 ± unknown"),
        (1.5, None, "1.5 ± unknown"),
        (math.nan, 0.1, "nan ± unknown"),
    ],
)
def test_numbers_are_rounded_to_their_error(value, se, expected):
    assert measured({"value": value, "se": se, "n": 4}) == expected


def test_headline_states_the_facts(results):
    assert headline(results) == (
        "Layers 13..18 removed (segment [13, 19), 6 of 30): 20 % of the layers, 15.8 % of the parameters;"
        " KL to the parent 0.44 ± 0.02 nats; perplexity 25.1 ± 0.4 against 17.2 ± 0.3 of the parent."
    )


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
    assert model_card(results, {}, PROVENANCE)


def test_the_parent_alone_makes_a_page():
    results = {"parent": full_results()["parent"]}
    reader = Reader(page_of(results))
    assert reader.open == []
    assert "svg" not in reader.tags
    assert [row["model"] for row in summary_rows(results)] == ["parent"]
    assert model_card(results, {}, PROVENANCE)


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


def test_a_sound_run_has_no_warning(results):
    assert warnings(results) == []
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
        ("cut proof generation_equal", False, "The proof FAILED"),
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


def test_a_stitched_model_stands_between_cut_and_healed(results, without_drawings):
    results["stitch"] |= {"parameters": 113274432, "bytes": 226548864}
    stitched = copy.deepcopy(results["evaluate"]["healed"])
    stitched["kl_nats"]["value"] = 0.40
    results["evaluate"]["stitched"] = stitched
    assert [row["model"] for row in summary_rows(results)] == ["parent", "cut", "stitched", "healed"]
    assert warnings(results) == [
        "Healing made the KL to the parent worse: 0.40 ± 0.02 nats before, 0.44 ± 0.02 nats after."
    ]
    stitched["kl_nats"]["value"] = 0.9
    assert warnings(results)[0].startswith("Stitching made the KL to the parent worse")


def test_a_failed_proof_is_told_from_one_within_tolerance(results):
    results["cut"]["proof"] |= {"logits_equal": False, "max_difference": 3e-3, "tolerance": 1e-2}
    assert warnings(results) == []
    results["cut"]["proof"]["tolerance"] = 1e-4
    assert "The proof FAILED" in warnings(results)[0]


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
    assert model_card(results, {}, PROVENANCE) == model_card(again, {}, PROVENANCE)


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


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
        ("gpt2", "gpt2"),
        *[(name, None) for name in ("demo", "/m/x", "./folder", "a/b/c", "model.gguf", "tests")],
    ],
)
def test_the_card_names_a_base_model_only_if_the_hub_has_it(results, name, base, tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    monkeypatch.chdir(tmp_path)
    results["parent"]["name"] = name
    front = yaml.safe_load(model_card(results, {}, PROVENANCE).split("---\n")[1])
    assert front.get("base_model") == base
    assert front["library_name"] == "transformers"
    assert front["tags"] == ["layer-pruning", "layerscalpel"]


def test_the_card_shows_how_to_load_and_what_was_proven(results):
    card = model_card(results, {}, PROVENANCE)
    assert "AutoModelForCausalLM.from_pretrained" in card
    assert "equal bit for bit" in card
    table = [line for line in card.splitlines() if line.startswith("|")]
    assert [line.count("|") for line in table] == [7] * 5
