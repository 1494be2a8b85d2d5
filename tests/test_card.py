"""The model card says what results.json says, and calls proven only what was proven."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import yaml
from findings import IN_PAGE_ONLY, PROVENANCE, STAGES, VARIANTS, full_results, quantities, two_run_results

from layerscalpel.card import headline, model_card, warnings
from layerscalpel.config import to_dict
from layerscalpel.proofwords import is_proven, proof_sentence
from layerscalpel.settings import Config
from layerscalpel.summary import measured, ranges, size, summary_rows


@pytest.fixture
def results() -> dict[str, Any]:
    return full_results()


# ---------------------------------------------------------------------------------------------- words and numbers


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


def test_the_headline_names_every_removed_segment():
    assert headline(two_run_results()).startswith(
        "Layers 10..11 (segment [10, 12)) and layers 17..20 (segment [17, 21)) removed, 6 of 30: 20 % of the layers,"
    )


def test_small_forms():
    assert ranges([1, 2, 3, 5]) == "1..3, 5"
    assert [size(n) for n in (0, 999, 1500, 2e6, 14.5e9)] == ["0 bytes", "999 bytes", "1.5 kB", "2.0 MB", "14.5 GB"]


# ---------------------------------------------------------------------------------------------- warnings


def test_a_sound_run_has_no_warning(results):
    assert warnings(results) == []
    assert "Warning" not in model_card(results, {}, PROVENANCE)


def test_a_stitched_model_stands_between_cut_and_healed(results):
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


# ---------------------------------------------------------------------------------------------- the proof


def proof_with(**changes: Any) -> dict[str, Any]:
    """Return a sound proof with some parts changed: a dict changes fields of a part, None leaves it out."""
    proof = full_results()["cut"]["proof"]
    for part, change in changes.items():
        proof[part] = proof[part] | change if isinstance(change, dict) else change
    return proof


WRONG = {"logits_equal": False, "max_difference": 3e-3, "tolerance": 1e-4}
CLOSE = WRONG | {"tolerance": 1e-2}


@pytest.mark.parametrize(
    ("changes", "proven"),
    [
        ({}, True),
        ({"logits": CLOSE}, True),
        ({"logits": WRONG}, False),
        ({"logits": WRONG | {"max_difference": 0.0}}, False),  # unequal logits without a difference: NaN at both
        ({"logits": WRONG | {"max_difference": math.nan}}, False),
        ({"logits": {"generation_equal": False}}, False),
        ({"logits": {"generation_equal": None}}, True),
        ({"twin": WRONG}, False),
        ({"twin": {"generation_equal": False}}, False),
        ({"twin": None}, True),
        ({"tensors": None}, True),
        ({"twin": None, "tensors": None}, True),
        ({"logits": None}, True),  # the twin and every tensor stand for it
        ({"logits": None, "twin": None}, False),
        ({"logits": None, "tensors": None}, False),
        ({"logits": None, "twin": None, "tensors": None}, False),
    ],
)
def test_a_cut_is_proven_by_its_logits_or_by_its_twin_and_tensors(changes, proven, results):
    proof = proof_with(**changes)
    assert is_proven(proof) == proven
    assert ("FAILED" in proof_sentence(proof)) == (not proven)
    results["cut"]["proof"] = proof
    assert (warnings(results) == []) == (proven and proof["logits"] is not None)


def test_every_step_of_a_cut_is_proven_or_warned_of():
    results = two_run_results()
    assert warnings(results) == []
    assert model_card(results, {}, PROVENANCE).count("Proven (fresh process).") == 2
    results["cut"]["steps"][0] = results["cut"]["steps"][0] | {"proof": proof_with(logits=WRONG)}
    assert "The proof FAILED" in warnings(results)[0]
    assert "Step 1: The proof FAILED" in model_card(results, {}, PROVENANCE)


def test_no_proof_is_no_proof(results):
    assert not is_proven(None)
    results["cut"]["proof"] = None
    assert warnings(results) == ["The cut checkpoint was not verified (--no-verify)."]


def test_a_failed_proof_is_told_from_one_within_tolerance(results):
    results["cut"]["proof"] = proof_with(logits=CLOSE)
    assert warnings(results) == []
    assert "they differ by at most 0.003 where 0.01 is allowed" in model_card(results, {}, PROVENANCE)
    results["cut"]["proof"] = proof_with(logits=WRONG)
    assert "The proof FAILED" in warnings(results)[0]


def test_every_part_of_a_proof_is_told():
    said = proof_sentence(proof_with(twin={"generation_equal": False}))
    assert "The saved cut checkpoint was loaded again (fresh process, float32 on cpu)" in said
    assert "logits on 2 x 24 random tokens" in said
    assert "equal bit for bit" in said
    assert "Greedy tokens with a cache are equal to those without." in said
    assert "All 218 kept tensors (226.5 MB) have the bytes they have in the parent (sha256 `0f3a5c7e9b1d2f4a`)" in said
    assert "The same cut of a tiny random twin of the config was loaded again" in said
    assert "Greedy tokens with a cache are NOT those without." in said


def test_what_was_left_out_of_a_proof_is_told():
    proof = proof_with(logits=None) | {"kind": "three parts", "left_out": {"logits": "it would take 90 minutes"}}
    said = proof_sentence(proof)
    assert said.startswith("Proven (three parts).")
    assert "The saved cut checkpoint was loaded again" not in said
    assert "Not part of the proof, logits: it would take 90 minutes." in said
    assert "Nothing was generated from it." in proof_sentence(proof_with(logits={"generation_equal": None}))


# ---------------------------------------------------------------------------------------------- the card


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
    assert [line.count("|") for line in table] == [8] * 5


@pytest.mark.parametrize("name", VARIANTS)
def test_the_card_holds_the_measured_numbers(name):
    results = VARIANTS[name]()
    card = model_card(results, to_dict(Config()), PROVENANCE)
    told = quantities(results["evaluate"], left_out=IN_PAGE_ONLY) + quantities(results["search"])
    assert [number for number in told if number not in card] == []
    assert "{{" not in card
    assert "\n\n\n" not in card


@pytest.mark.parametrize("missing", STAGES)
def test_an_absent_stage_leaves_a_card(results, missing):
    del results[missing]
    card = model_card(results, {}, PROVENANCE)
    assert ("## Proof" in card) == (missing != "cut")
    assert ("## Data" in card) == (missing != "data")
    assert "{{" not in card


def test_the_parent_alone_makes_a_card():
    parent = {"parent": full_results()["parent"]}
    assert [row["model"] for row in summary_rows(parent)] == ["parent"]
    assert model_card(parent, {}, PROVENANCE).startswith("---\nlibrary_name")


def test_same_results_give_the_same_card(results):
    again = copy.deepcopy(results)
    assert model_card(results, {}, PROVENANCE) == model_card(again, {}, PROVENANCE)
    assert results == again  # nothing was changed on the way


@pytest.mark.parametrize("name", ["/home/someone/secret/model", "demo", "org/model", "gpt2"])
def test_the_title_names_the_parent_but_no_ones_folders(results, name):
    results["parent"]["name"] = name
    card = model_card(results, {}, PROVENANCE)
    shown = name if "/home" not in name else "model"
    assert f"# {shown}, cut by Layer Scalpel" in card
    assert "someone" not in card


def test_cuts_before_this_one_are_told_back_to_the_first(results):
    first = {"parent": "org/model", "segment": [20, 22], "num_layers": 32}
    results["cut"]["history"] = {"parent": "/a/once", "segment": [13, 19], "num_layers": 30, "before": first}
    card = model_card(results, {}, PROVENANCE)
    told = [line for line in card.splitlines() if line.endswith("removed")]
    assert told == [
        "- layers 13..18 (segment [13, 19), 6 of 30) of once removed",
        "- layers 20..21 (segment [20, 22), 2 of 32) of org/model removed",
    ]
    two = two_run_results()
    two["cut"]["history"]["before"]["before"] = first
    card = model_card(two, {}, PROVENANCE)
    assert [line for line in card.splitlines() if line.endswith("removed")] == [
        "- layers 10..11 (segment [10, 12)) and layers 17..20 (segment [17, 21)), 6 of 30 of org/model removed",
        "- layers 20..21 (segment [20, 22), 2 of 32) of org/model removed",
    ]
    results["cut"]["history"] = first  # cut once: the headline says it
    assert "Where it comes from" not in model_card(results, {}, PROVENANCE)
