"""Pilots heal alike and apart from the parent, and decide for what heals best, not for what costs least before."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import tiny, tokens
from planted import random_blocks, silence

from layerscalpel import pilot
from layerscalpel.exact import WindowScores
from layerscalpel.heal import heal_model
from layerscalpel.layers import Decoder
from layerscalpel.pilot import Pilot, best_pilot, candidates, find_pilot, own_seam
from layerscalpel.probe import find_layers
from layerscalpel.segment import Segment
from layerscalpel.settings import HealSettings, SearchSettings
from layerscalpel.task import Pilots, Task
from layerscalpel.trained import seam_layers

SETTINGS = SearchSettings(
    num_blocks=4, batch_size=2, gate_blocks=2, num_starts=2, pilot_steps=3, pilot_count=3, confidence=0.0
)
HEALING = HealSettings(batch_size=2, micro_batch_size=2, lr=1e-2)


def curve(*kl: float) -> WindowScores:
    return WindowScores(tuple(range(len(kl))), 2, torch.tensor(kl, dtype=torch.float64)[:, None], 16)


def task_of(decoder: Decoder, scratch: Path, **changes: Any) -> Task:
    blocks = random_blocks(12, seed=5)
    pilots = Pilots(blocks, random_blocks(2, seed=6), HEALING, scratch)
    return Task(decoder, tokens(4), **({"num_removed": 2, "settings": SETTINGS, "pilots": pilots} | changes))


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        ((3, 1, 2), [1]),
        ((3, 1, 2, 0.5, 4), [3, 1]),  # the lower one first
        ((1, 2, 3), [0]),
        ((3, 2, 1), [2]),
        ((1, 2, 1), [0, 2]),
        ((2, 1, 1, 3), [1]),  # a plateau is one minimum
        ((1, 1, 2), [0]),
        ((2, 1, 1), [1]),
        ((3, 2, 2, 1), [3]),  # a shelf on the way down is none
        ((1, 2, 2, 3), [0]),
        ((1, 2, 2, 1), [0, 3]),
        ((1, 1, 1), [0]),
        ((5,), [0]),
        ((0, 3, 0, 3, 0), [0, 2, 4]),
    ],
)
def test_candidates_are_the_local_minima(kl: tuple[float, ...], expected: list[int]) -> None:
    assert candidates(curve(*kl), []) == expected


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ([], [3, 1]),
        ([2], [3, 1, 2]),
        ([3, 1, 3], [3, 1]),  # each once
        ([4, 0], [3, 1, 0, 4]),
    ],
)
def test_ends_of_the_gate_are_candidates_too_and_the_lowest_go_first(ends, expected) -> None:
    assert candidates(curve(3, 1, 2, 0.5, 4), ends) == expected


def test_candidates_are_named_by_their_starts_and_compared_on_the_blocks_that_all_saw() -> None:
    nan = math.nan
    rows = torch.tensor([[2.0, 2.0, 9.0], [1.0, 1.0, 9.0], [2.0, nan, nan], [1.5, 1.5, 0.0]], dtype=torch.float64)
    assert candidates(WindowScores((3, 4, 5, 6), 2, rows, 16), [5]) == [4, 6, 5]


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("start", [0, 1, 3, 6])
def test_a_seam_of_its_own_leaves_the_parent_as_it_was(start: int, width: int, tmp_path: Path) -> None:
    decoder = find_layers(tiny("llama"))
    before = {name: tensor.clone() for name, tensor in decoder.model.state_dict().items()}
    child = own_seam(task_of(decoder, tmp_path), start, width)
    seam = {f"model.layers.{i}." for i in seam_layers(6, start, width)}
    ours, theirs = child.model.state_dict(), {tensor.data_ptr() for tensor in decoder.model.state_dict().values()}
    for name, tensor in ours.items():
        assert (tensor.data_ptr() in theirs) != any(name.startswith(prefix) for prefix in seam), name
    settings = replace(HEALING, width=width, epochs=1)
    blocks = random_blocks(4, seed=5)
    fresh = {name: tensor.clone() for name, tensor in ours.items()}
    heal_model(child, decoder, [start], blocks, blocks, settings, seed=0, scratch=tmp_path)
    changed = {name for name, tensor in child.model.state_dict().items() if not torch.equal(tensor, fresh[name])}
    assert changed
    assert all(any(name.startswith(prefix) for prefix in seam) for name in changed)
    assert all(torch.equal(tensor, before[name]) for name, tensor in decoder.model.state_dict().items())
    assert len(decoder.layers) == len(decoder.model.model.layers) == decoder.model.config.num_hidden_layers == 8


def test_a_search_leaves_the_parent_and_the_disk_as_they_were(tmp_path: Path) -> None:
    decoder, ids = find_layers(tiny("gemma3_text")), tokens(3)
    before = {name: tensor.clone() for name, tensor in decoder.model.state_dict().items()}
    logits = decoder.model(ids, use_cache=False).logits
    result = find_pilot(task_of(decoder, tmp_path))
    assert len(result.details["pilots"]) > 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in decoder.model.state_dict().items())
    assert torch.equal(decoder.model(ids, use_cache=False).logits, logits)
    assert list(tmp_path.rglob("*")) == []
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False)) == result.to_dict()


@pytest.mark.parametrize(("steps", "expected"), [(3, 3), (1, 1), (100, 6)])  # twelve blocks, two a step, once
def test_all_pilots_take_the_same_steps(steps: int, expected: int, tmp_path: Path) -> None:
    task = task_of(find_layers(tiny("llama")), tmp_path)
    found = find_pilot(replace(task, settings=replace(SETTINGS, pilot_steps=steps))).details["pilots"]
    assert 2 <= len(found) <= 3
    assert {row["steps"] for row in found} == {expected}
    assert [row["start"] for row in found] == sorted({row["start"] for row in found})


def pilot_of(start: int, loss: float, agreement: float = 0.5, kl: float = 1.0) -> Pilot:
    return Pilot(start, loss, kl, agreement, 3, 0.1)


@pytest.mark.parametrize(
    ("pilots", "best"),
    [
        ([pilot_of(1, 2.0, 0.9, kl=0.1), pilot_of(4, 1.0, 0.2, kl=3.0)], 4),  # the loss decides
        ([pilot_of(1, 1.009, 0.6), pilot_of(4, 1.0, 0.5)], 1),  # as good as equal: who agrees more
        ([pilot_of(1, 1.011, 0.6), pilot_of(4, 1.0, 0.5)], 4),
        ([pilot_of(1, 1.0, 0.5), pilot_of(4, 1.0, 0.5)], 1),  # wholly equal: the first
        ([pilot_of(1, 1.018, 0.9), pilot_of(4, 1.009, 0.6), pilot_of(6, 1.0, 0.5)], 4),  # near the best, not a chain
        ([pilot_of(2, 1.0)], 2),
    ],
)
def test_the_best_pilot_has_the_lowest_loss_then_agrees_most(pilots: list[Pilot], best: int) -> None:
    assert best_pilot(pilots).start == best
    assert best_pilot(pilots[::-1]).start == best


def healing_as(losses: dict[int, float], healed: list[int]) -> Callable[..., Any]:
    """Return a healing that trains nothing and ends with a loss known for each start."""

    def heal(_student, _parent, seams, blocks, _validation, settings, *, seed: int, scratch: Path) -> Any:
        (start,) = seams
        healed.append(start)
        rows = [
            {"step": 0, "loss_nats": 9.0},
            {"step": 1, "loss_nats": losses.get(start, 8.0)},
            {"step": 2, "loss_nats": 9.5},
        ]
        return SimpleNamespace(steps=math.ceil(len(blocks) / settings.batch_size), validation=rows)

    return heal


def test_what_heals_best_wins_over_what_costs_least(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, healed = find_layers(tiny("llama")), []
    for i in (2, 3):
        silence(decoder.layers[i])  # nothing costs less than this window
    task = task_of(decoder, tmp_path)
    curve_of = pilot.raced_windows(task).scores
    wanted = candidates(curve_of, [])[:3]
    assert (curve_of.best(), wanted[0]) == (2, 2)
    other = next(start for start in wanted if start != 2)
    monkeypatch.setattr(pilot, "heal_model", healing_as({2: 3.0, other: 1.0}, healed))
    result = find_pilot(task)
    assert result.segment == Segment(other, other + 2, 8)
    assert result.details["certificate"]["exact_start"] == 2
    assert {2, other} <= set(healed)
    losses = {row["start"]: row["validation_loss_nats"] for row in result.details["pilots"]}
    assert (losses[2], losses[other]) == (3.0, 1.0)  # the lowest on the way, not the last


def test_a_pilot_that_learned_nothing_has_the_kl_of_its_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pilot, "heal_model", healing_as({}, []))
    result = find_pilot(task_of(find_layers(tiny("llama")), tmp_path))
    for row in result.details["pilots"]:
        assert row["kl_nats"] == pytest.approx(result.scores[str(row["start"])]["kl_nats"], abs=1e-5)
        assert row["kl_nats"] > 1e-2


@pytest.mark.parametrize("count", [2, 5])
def test_as_many_are_healed_as_the_settings_allow(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    healed: list[int] = []
    monkeypatch.setattr(pilot, "heal_model", healing_as({}, healed))
    monkeypatch.setattr(pilot, "better_neighbours", lambda *_: list(range(7)))  # every window is a candidate
    task = task_of(find_layers(tiny("llama")), tmp_path, settings=replace(SETTINGS, pilot_count=count))
    find_pilot(task)
    assert healed == candidates(pilot.raced_windows(task).scores, list(range(7)))[:count]


def test_the_choice_is_as_good_as_the_best(tmp_path: Path) -> None:
    result = find_pilot(task_of(find_layers(tiny("llama")), tmp_path))
    rows = {row["start"]: row["validation_loss_nats"] for row in result.details["pilots"]}
    assert rows[result.segment.start] <= min(rows.values()) + pilot.EQUAL_NATS


def test_windows_that_cannot_be_cut_are_not_healed_and_others_take_their_place(tmp_path, monkeypatch) -> None:
    healed: list[int] = []
    monkeypatch.setattr(pilot, "heal_model", healing_as({}, healed))
    decoder = find_layers(tiny("llama"))
    ranked = candidates(pilot.raced_windows(task_of(decoder, tmp_path)).scores, list(range(7)))
    monkeypatch.setattr(pilot, "better_neighbours", lambda *_: list(range(7)))  # every window is a candidate
    refused = ranked[:4]
    sound = lambda removal: "a rule would shift" if removal[0] in refused else None  # noqa: E731
    result = find_pilot(task_of(decoder, tmp_path, sound=sound))
    assert sorted(healed) == sorted(ranked[4:7])
    assert result.segment.start in ranked[4:7]


def test_the_parent_teaches_only_where_the_objective_needs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, given = find_layers(tiny("llama")), []
    heal = healing_as({}, [])

    def noting(student: Decoder, parent: Decoder | None, *rest: Any, **more: Any) -> Any:
        given.append(parent)
        return heal(student, parent, *rest, **more)

    monkeypatch.setattr(pilot, "heal_model", noting)
    for objective, teacher in (("ce", None), ("kl", decoder), ("both", decoder)):
        task = task_of(decoder, tmp_path)
        settings = replace(HEALING, objective=objective)
        find_pilot(replace(task, pilots=replace(task.pilots, settings=settings)))
        assert given
        assert all(item is teacher for item in given)
        given.clear()


def test_pilots_are_healed_alone_beside_a_parent_that_stays_where_it_is(tmp_path: Path, monkeypatch) -> None:
    heal, given = healing_as({}, []), []

    def noting(*blocks: Any, **more: Any) -> Any:
        given.append((blocks[-1].frozen, blocks[-1].shard, "team" in more))
        return heal(*blocks, **more)

    monkeypatch.setattr(pilot, "heal_model", noting)
    for changes in ({"frozen": "cpu"}, {"frozen": "4bit"}, {"shard": True}):
        task = task_of(find_layers(tiny("llama")), tmp_path)
        find_pilot(replace(task, pilots=replace(task.pilots, settings=replace(HEALING, **changes))))
    assert set(given) == {("device", False, False)}
