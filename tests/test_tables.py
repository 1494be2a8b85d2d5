"""What a person reads at a terminal."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
from findings import VARIANTS, full_results, old_results, rates_results, two_run_results
from rich.console import Console

from layerscalpel.tables import print_results


def printed(results: dict[str, Any], width: int = 400) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_results(results, Path("out"), console)
    return console.file.getvalue()


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_prints_its_segments_and_its_table(name):
    said = printed(VARIANTS[name]())
    assert said.startswith("demo without layer")
    assert "113.3 M" in said
    assert "results out/results.json" in said


@pytest.mark.parametrize("name", VARIANTS)
def test_printing_changes_nothing(name):
    results = VARIANTS[name]()
    again = copy.deepcopy(results)
    printed(results)
    assert results == again


def test_the_race_and_its_margin_are_one_line():
    line = next(line for line in printed(full_results()).splitlines() if line.startswith("race: "))
    assert "25 windows, 8 to 32 blocks; start 13 left at 99 % confidence; the closest rival, start 14, costs" in line
    assert line.endswith("6.8 standard errors, paired")
    assert "race: " not in printed(old_results())


def test_target_and_the_best_of_every_length_are_printed():
    said = printed(rates_results())
    assert "At most 0.9 nats of KL to the parent were asked for" in said
    assert "Starts 9..10: layer 10 writes keys" in said
    row = next(line.split() for line in said.splitlines() if line.split()[:2] == ["7", "12"])
    assert row == ["7", "12", "0.844", "±", "0.045", "64", "0.012", "±", "0.009", "11..13"]
    lengths = [line.split()[0] for line in said.splitlines() if line.strip()[:1].isdigit()]
    assert lengths == [str(n) for n in range(1, 16)]


def test_two_runs_are_printed():
    results = two_run_results()
    assert "without layers 10..11 (segment [10, 12)) and layers 17..20 (segment [17, 21)), 6 of 30" in printed(results)
    assert "The best of 133 pairs of runs" in printed(results)


def test_pilots_are_a_table_that_names_the_one_taken():
    said = printed(VARIANTS["pilots"]())
    row = next(line for line in said.splitlines() if "(taken)" in line)
    assert row.split() == ["12", "(taken)", "0.752", "±", "0.043", "0.524", "2.201", "66.4", "%"]
