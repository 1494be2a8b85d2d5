"""What a person reads of the healing: phases, terms, what was kept, what ran short, and whether it failed."""

from __future__ import annotations

import functools
import html
import re
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from findings import PROVENANCE, failed_results, full_results, two_phase_results
from rich.console import Console

from layerscalpel.card import model_card, warnings
from layerscalpel.healwords import healing_words, objective_words
from layerscalpel.report import render_report
from layerscalpel.tables import print_results


def text_of(page: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).replace("\u00a0", " ").split())


def page_of(results: dict[str, Any]) -> str:
    return render_report(results, {}, PROVENANCE)


@functools.cache
def two_phase_page() -> str:
    return page_of(two_phase_results())


def printed(results: dict[str, Any], folder: Path) -> str:
    console = Console(file=StringIO(), width=400)
    print_results(results, folder, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_two_phases_are_told_one_by_one() -> None:
    results = two_phase_results()
    for text in (text_of(two_phase_page()), model_card(results, {}, PROVENANCE).replace("`", "")):
        assert "7,080,192 parameters in layers 12..13 of the cut model (linear layers as products of 2 times" in text
        assert "1,953,792 parameters in layers 0..23 of the cut model were trained (lora, objective both:" in text
        assert "cross-entropy + 0.5 x KL to the parent + 0.1 x hidden-state error after the seam" in text
        assert "tokens, with a learning rate of 5e-05; step 50 was kept" in text
        assert "Healing took the KL to the parent from 0.714 ± 0.019 to 0.441 ± 0.016 nats per token on cal" in text


def test_the_page_shows_terms_and_what_was_kept_and_ran_short() -> None:
    page = two_phase_page()
    text = text_of(page)
    assert "First phase." in text
    assert "1 KL to the parent 0.5 1.08 nats 0.7636 nats" in text
    assert "2 hidden-state error after the seam 0.1 1.95 1.75" in text
    assert "computed once and kept 1.2 GB (88 % of the blocks) then 300.0 MB (100 % of the blocks)" in text
    assert "number format kept bfloat16" in text
    assert "documents packed into one block kept apart in attention" in text
    assert "blocks at once 1, halved 2 times: memory ran out" in text
    assert "steps 100 + 50" in text
    assert "targets of the loss 36,000" in text
    assert "processes 4" in text
    assert "second phase begins" in page
    assert "lowest at step 90 of the first phase, 50 of the second" in page
    assert "(nats, and relative squared errors)" in page


def test_one_phase_is_told_without_a_number_and_old_runs_are_read(without_drawings) -> None:
    text = text_of(page_of(full_results()))
    assert "(endpoint, objective both: cross-entropy + KL to the parent) for 100 steps on 51,200 tokens; step" in text
    assert "First phase" not in text
    assert "halved" not in text
    assert "documents packed" not in text


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"ce": 1.0}, "cross-entropy"),
        ({"kl": 1.0, "end": 2.5}, "KL to the parent + 2.5 x hidden-state error after the last layer"),
        ({"seam": 1.5}, "1.5 x hidden-state error after the seam"),
    ],
)
def test_the_objective_is_told_with_its_weights(weights: dict[str, float], expected: str) -> None:
    assert objective_words({"objective": "ce", "weights": weights}) == expected


def test_a_failed_healing_is_said_on_every_page(tmp_path: Path, without_drawings) -> None:
    results = failed_results()
    said = (
        "Healing failed: it took the KL to the parent from 0.714 ± 0.019 to 0.90 ± 0.02 nats per token on calibration"
    )
    assert warnings(results)[0].startswith(said)
    page = page_of(results)
    assert said in text_of(page)
    assert said in model_card(results, {}, PROVENANCE)
    assert said in printed(results, tmp_path)
    assert "These weights are not kept" in text_of(page)
    assert 'class="trained"' not in page


def test_the_terminal_tells_methods_and_what_they_did(tmp_path: Path) -> None:
    assert "healed by endpoint (both), then lora (both): KL 0.714 ± 0.019 to 0.441 ± 0.016 nats on calibration" in (
        printed(two_phase_results(), tmp_path)
    )
    assert "healed by endpoint (both)\n" in printed(full_results(), tmp_path)
    cut = full_results()
    del cut["heal"]
    assert "healed by" not in printed(cut, tmp_path)
    assert healing_words(cut)["healing"] == []


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (0, 0, "No step of healing lowered the held-out loss: the healed model is the one it began with."),
        (90, 0, "No step of the second phase of healing lowered the held-out loss."),
        (0, 50, "No step of the first phase of healing lowered the held-out loss."),
    ],
)
def test_a_phase_without_effect_is_a_warning(first: int, second: int, said: str) -> None:
    results = two_phase_results()
    results["heal"]["best_step"], results["heal"]["second"]["best_step"] = first, second
    assert [text for text in warnings(results) if text.startswith("No step")] == [said]
