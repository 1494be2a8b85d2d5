"""What is said of a quantised model and of others of its size."""

from __future__ import annotations

import pytest
from findings import full_results, quantized_results

from layerscalpel.card import headline, warnings
from layerscalpel.quantwords import byte_rows, quantize_lines, quantize_text
from layerscalpel.speedwords import speed_lines
from layerscalpel.summary import summary_rows


def test_rows_stand_by_size_and_the_beaten_are_marked() -> None:
    rows = byte_rows(quantized_results())
    assert [row["model"] for row in rows] == ["parent", "cut", "healed", "healed8", "quantized", "parent4"]
    assert {row["model"]: row["beaten_by"] for row in rows} == {
        "parent": "",  # its distance from itself is not measured
        "cut": "healed, healed8, quantized, parent4",
        "healed": "parent4",  # healed8 is smaller, but not surely nearer
        "healed8": "parent4",
        "quantized": "parent4",
        "parent4": "",
    }
    assert rows[-1]["share"] == pytest.approx(117000789 / 271170789)


def test_a_model_that_is_beaten_is_warned_of() -> None:
    results = quantized_results()
    said = "No larger than the quantised model, and nearer to the parent: parent4."
    assert said in warnings(results)
    results["evaluate"]["beside"]["parent4"]["bytes"] = 10**9
    assert said not in warnings(results)


def test_rounding_is_no_finding_of_its_own() -> None:
    assert not any("quantized" in text for text in warnings(quantized_results()))


def test_the_text_says_how() -> None:
    text = quantize_text(quantized_results())
    assert text.startswith("By gptq, 4 bits a weight, one scale for 64 weights, zero in the middle of each grid.")
    assert "2 linear layers at the seam have 8 bits." in text
    assert "Dampings tried, with theirs: 0.01 (0.0437 ± 0.0014), 0.05 (0.0412 ± 0.0013)." in text
    assert quantize_text(full_results()) == ""


def test_the_terminal_has_counts_and_rows() -> None:
    lines = quantize_lines(quantized_results())
    assert any(line.startswith("168 of 219 modules with weights are quantised; as they were: 49 x") for line in lines)
    assert "whole folder: 118.0 MB, 228.7 MB before" in lines
    assert "beside, parent4: 117.0 MB, KL 0.093 ± 0.007 nats, perplexity 18.8 ± 0.3" in lines
    assert quantize_lines(full_results()) == []


def test_sizes_of_a_run_that_quantises_are_whole_folders() -> None:
    rows = {row["model"]: row for row in summary_rows(quantized_results())}
    assert (rows["quantized"]["bytes"], rows["healed"]["bytes"]) == (118000123, 228700456)
    assert rows["quantized"]["parameters"] == rows["healed"]["parameters"]
    assert "56.5 % of the bytes" in headline(quantized_results())
    assert rows["parent"]["bytes"] == 271170789
    assert next(row for row in summary_rows(full_results()) if row["model"] == "parent")["bytes"] == 269030016


def test_what_was_not_timed_is_said() -> None:
    found = quantized_results()["benchmark"]
    assert "quantized was not timed: transformers unpacks these weights" in speed_lines(found)
