"""Every method has one form and finds the planted segment; the certificate and the targets keep their word."""

from __future__ import annotations

import inspect
import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from families import tiny, tokens
from planted import silence

from layerscalpel.clp import certificate
from layerscalpel.data import TokenBlocks
from layerscalpel.errors import UserError
from layerscalpel.exact import WindowScores
from layerscalpel.layers import Decoder
from layerscalpel.probe import find_layers
from layerscalpel.search import SEARCHES, uses_gate
from layerscalpel.segment import Segment
from layerscalpel.settings import HealSettings, SearchName, SearchSettings, TargetSettings
from layerscalpel.similarity import Similarity
from layerscalpel.targets import given_segment, num_removed_of
from layerscalpel.task import Pilots, Raced, SearchResult, Task

METHODS = get_args(SearchName)
SETTINGS = SearchSettings(num_blocks=4, gate_blocks=3, num_starts=3, batch_size=2, pilot_steps=1, pilot_count=2)


def planted(family: str = "llama", start: int = 3, num_removed: int = 2) -> Decoder:
    """Return a random decoder of 8 layers whose layers [start, start + num_removed) are the identity."""
    decoder = find_layers(tiny(family))
    for layer in decoder.layers[start : start + num_removed]:
        silence(layer)
    return decoder


def found_by(method: SearchName, decoder: Decoder, num_removed: int = 2, seed: int = 0) -> SearchResult:
    return SEARCHES[method].find(task_of(decoder, num_removed=num_removed, seed=seed))


def task_of(decoder: Decoder, ids: torch.Tensor | None = None, **changes: Any) -> Task:
    """Return a task with all that any method needs."""
    given = tokens(4) if ids is None else ids
    healing = TokenBlocks(tokens(2, seed=5), torch.ones(2, given.shape[1], dtype=torch.bool), "random", 2, {})
    healing.labelled[:, 0] = False
    pilots = Pilots(healing, healing, HealSettings(batch_size=2, micro_batch_size=2), Path(tempfile.mkdtemp()))
    return Task(decoder, given, **({"num_removed": 2, "settings": SETTINGS, "pilots": pilots} | changes))


def test_table_holds_exactly_the_methods_of_the_settings() -> None:
    assert tuple(SEARCHES) == METHODS
    assert all(row.sentence and row.paper for row in SEARCHES.values())


def test_methods_have_one_signature() -> None:
    signatures = {str(inspect.signature(row.find)) for row in SEARCHES.values()}
    assert len(signatures) == 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_removed", [1, 6])
def test_result_is_a_segment_within_the_model_and_plain_json(method: SearchName, num_removed: int) -> None:
    result = found_by(method, planted(), num_removed)
    assert (result.method, len(result.segment), result.segment.num_layers) == (method, num_removed, 8)
    written = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert written == result.to_dict()
    assert written["segment"] == [result.segment.start, result.segment.stop]


@pytest.mark.parametrize("method", METHODS)
def test_one_block_gives_json_without_nan(method: SearchName) -> None:
    result = SEARCHES[method].find(task_of(planted(), tokens(1)))
    json.dumps(result.to_dict(), allow_nan=False)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("method", ["exact", "clp", "angular", "influence"])
def test_planted_identity_ranks_first(family: str, method: SearchName) -> None:
    result = found_by(method, planted(family, 4))
    assert result.segment == Segment(4, 6, 8)
    measure = next(iter(result.scores["4"]))
    values = {start: row[measure] or 0.0 for start, row in result.scores.items()}
    assert len(values) == 7
    assert min(values, key=lambda start: values[start]) == "4"


def test_influence_names_the_layers_of_the_paper() -> None:
    decoder = find_layers(tiny("llama"))
    for i in (1, 6):  # not adjacent
        silence(decoder.layers[i])
    assert found_by("influence", decoder).to_dict()["paper_layers"] == [1, 6]


@pytest.mark.parametrize("method", ["angular", "influence"])
def test_similarity_methods_bring_the_heat_map(method: SearchName) -> None:
    heat = torch.tensor(found_by(method, planted()).to_dict()["similarity"])
    assert heat.shape == (9, 9)


@pytest.mark.parametrize("seed", range(4))
def test_certificate_of_clp_names_the_exact_optimum_and_no_negative_difference(seed: int) -> None:
    decoder = find_layers(tiny("llama", seed))
    clp, exact = found_by("clp", decoder), found_by("exact", decoder)
    found = clp.details["certificate"]
    difference = found["difference_kl_nats"]["value"]
    assert clp.segment == exact.segment
    assert clp.scores == exact.scores
    assert found["exact_start"] == exact.segment.start
    assert difference >= 0
    assert (difference == 0) == (found["gate_start"] == found["exact_start"])
    expected = clp.scores[str(found["gate_start"])]["kl_nats"] - clp.scores[str(found["exact_start"])]["kl_nats"]
    assert difference == pytest.approx(expected, abs=1e-9)
    assert found["gate_start"] in clp.details["gate"]["ends"]
    assert found["num_starts"] == 3


def test_clp_goes_on_with_the_exact_optimum_where_the_gate_missed_it() -> None:
    far_away = replace(SETTINGS, num_starts=1, initial_start=0.0, gate_blocks=1)
    result = SEARCHES["clp"].find(task_of(planted(start=5), settings=far_away))
    found = result.details["certificate"]
    assert result.segment == Segment(5, 7, 8)
    assert (found["exact_start"], found["num_starts_at_optimum"]) == (5, 0)
    assert found["gate_start"] in (0, 1)
    assert found["difference_kl_nats"]["value"] > 1e-3


def test_certificate_counts_the_starts_at_the_optimum() -> None:
    scores = WindowScores((0, 1, 2), 2, torch.tensor([[3.0, 3.0], [1.0, 2.0], [2.0, 4.0]]), 8)
    raced = Raced(scores, 1, {}, {}, Similarity(torch.ones(2, 4, 4), torch.ones(2, 4, 4)))
    found = certificate(raced, [2, 2, 0])
    assert (found["exact_start"], found["num_starts_at_optimum"], found["num_starts"]) == (1, 0, 3)
    assert found["difference_kl_nats"] == {"value": 1.5, "se": pytest.approx(0.5), "n": 16}
    assert certificate(raced, [1, 2, 1])["num_starts_at_optimum"] == 2


def test_gate_takes_its_best_end_only() -> None:
    result = found_by("gate", find_layers(tiny("llama")))
    gate, kl = result.details["gate"], {int(start): row["kl_nats"] for start, row in result.scores.items()}
    beside = [(math.floor(a), math.ceil(a)) for a in gate["starts"][-1]]
    assert set(kl) == {start for pair in beside for start in pair}
    assert gate["ends"] == [min(pair, key=lambda start: kl[start]) for pair in beside]
    assert result.segment.start == min(gate["ends"], key=lambda start: kl[start])


def test_last_takes_the_last_layers() -> None:
    assert found_by("last", planted(), 3).segment == Segment(5, 8, 8)


def test_random_repeats_with_its_seed_and_reaches_every_window() -> None:
    decoder = planted()
    starts = [found_by("random", decoder, 5, seed).segment.start for seed in range(40)]
    assert starts == [found_by("random", decoder, 5, seed).segment.start for seed in range(40)]
    assert set(starts) == {0, 1, 2, 3}


def test_methods_read_no_more_blocks_than_the_settings_say() -> None:
    decoder, broken = planted(), tokens(6)
    broken[4:] = 10**6  # no such token: reading it fails
    for method in METHODS:
        SEARCHES[method].find(task_of(decoder, broken))


def test_uses_gate_tells_which_methods_learn() -> None:
    assert [method for method in METHODS if uses_gate(method)] == ["clp", "gate", "pilot"]


@pytest.mark.parametrize(
    ("target", "num_layers", "expected"),
    [
        ({}, 30, 6),
        ({"rate": 0.1}, 30, 3),
        ({"rate": 0.25}, 32, 8),
        ({"rate": 0.26}, 30, 8),  # 7.8
        ({"rate": 0.24}, 30, 7),  # 7.2
        ({"rate": 0.001}, 30, 1),
        ({"layers": 9}, 30, 9),
        ({"layers": 28}, 30, 28),
    ],
)
def test_number_of_layers_is_the_rate_rounded(target: dict, num_layers: int, expected: int) -> None:
    assert num_removed_of(TargetSettings(**target), num_layers) == expected


@pytest.mark.parametrize(
    ("target", "named"), [({"layers": 29}, "--layers 29"), ({"rate": 0.99}, "--rate 0.99"), ({"rate": 0.96}, "--rate")]
)
def test_too_many_layers_are_refused_with_the_flag_and_the_most_allowed(target: dict, named: str) -> None:
    with pytest.raises(UserError, match=rf"{named}.* at least 2 must stay, so remove at most 28"):
        num_removed_of(TargetSettings(**target), 30)


def test_given_segment_is_read_or_absent() -> None:
    assert given_segment(TargetSettings(), 8) is None
    assert given_segment(TargetSettings(segment="2:4"), 8) == Segment(2, 4, 8)
    with pytest.raises(UserError, match="2:9 does not lie in this model's layers"):
        given_segment(TargetSettings(segment="2:9"), 8)
