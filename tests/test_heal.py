"""Healing trains the seam and nothing else, in one phase or two, and its losses are those that they were.

Renew the golden losses after a change that should change them, and show before and after in dev/LOG.md:

    python tests/test_heal.py
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from healing import (
    QUICK,
    SEGMENT,
    TRAIN,
    after_step,
    by_tier,
    changed_in,
    cut_apart,
    heal,
    healed,
    interrupt,
    naive_terms,
    parent_of,
    state_of,
    total,
)

from layerscalpel.errors import UserError
from layerscalpel.heal import HEALERS, heal_model, refuse_contradictions
from layerscalpel.segment import Segment
from layerscalpel.settings import HealName, HealSettings, Objective, SecondName
from layerscalpel.trained import seam_layers
from layerscalpel.training import Training

GOLDEN = Path(__file__).parent / "golden_heal.json"
OBJECTIVES: tuple[Objective, ...] = ("ce", "kl", "both")
FAMILIES = ("llama", "gemma3_text", "gpt2", "bloom", "opt")


def golden_losses(objective: Objective) -> list[float]:
    """Return the ten training losses that the golden file holds."""
    settings = replace(QUICK, objective=objective, epochs=4, lr=1e-3)
    with tempfile.TemporaryDirectory() as scratch:
        return [row["loss_nats"] for row in heal(cut_apart(), Path(scratch), settings).train[:10]]


def test_table_holds_exactly_the_methods_of_the_settings() -> None:
    assert tuple(HEALERS) == get_args(HealName)


FIRST, LAST = Segment(0, 2, 8), Segment(6, 8, 8)


@pytest.mark.parametrize(
    ("segment", "width", "objective"),
    by_tier(
        [(*place, o) for place, o in product([(SEGMENT, 1), (SEGMENT, 2), (FIRST, 1), (LAST, 1)], ["ce", "both"])],
        everyday=[(SEGMENT, 1, "both"), (SEGMENT, 2, "ce"), (FIRST, 1, "both"), (LAST, 1, "ce")],
    ),
)
def test_only_the_seam_changes(segment: Segment, width: int, objective: Objective, tmp_path: Path) -> None:
    student = cut_apart(segment=segment)
    before, parent = state_of(student), state_of(parent_of("llama"))
    settings = replace(QUICK, objective=objective, width=width, lr=1e-4)
    result = heal(student, tmp_path, settings, seam=segment.start, validation=TRAIN)
    chosen = [f"model.layers.{i}." for i in seam_layers(6, segment.start, width)]
    changed = changed_in(student, before)
    assert changed == {name for name in before if name.startswith(tuple(chosen))}
    assert result.best_step > 0
    assert result.trained_parameters == sum(before[name].numel() for name in changed)
    assert changed_in(parent_of("llama"), parent) == set()


@pytest.mark.parametrize("family", by_tier(FAMILIES, everyday=["gemma3_text", "opt"]))  # the rest: test_trained.py
def test_only_the_seam_changes_in_other_families(family: str, tmp_path: Path) -> None:
    student = cut_apart(family, Segment(4, 8, 8))
    before = state_of(student)
    settings = replace(QUICK, objective="kl", lr=1e-4)
    result = heal(student, tmp_path, settings, family=family, seam=4, validation=TRAIN)
    changed = changed_in(student, before)
    assert result.best_step > 0
    assert changed
    assert all(name.startswith(f"{student.path}.3.") for name in changed)


@pytest.mark.parametrize("objective", ["ce", "seam"])
def test_two_seams_are_healed_together(objective: Objective, tmp_path: Path) -> None:
    student = cut_apart()  # without layers 3 and 4, as if 3 and another had gone one by one
    before = state_of(student)
    settings = replace(QUICK, objective=objective, lr=1e-4)
    parts = {"blocks": TRAIN, "validation": TRAIN, "settings": settings, "seed": 0, "scratch": tmp_path}
    result = heal_model(student, parent_of("llama"), [1, 4], **parts)
    assert result.layers == [0, 1, 3, 4]
    assert {int(name.split(".")[2]) for name in changed_in(student, before)} == {0, 1, 3, 4}
    if objective == "seam":
        terms = naive_terms(cut_apart(), parent_of("llama"), 5, TRAIN.tokens, TRAIN.labelled)
        wanted = float(terms["seam"].detach()) / TRAIN.tokens.numel()
        assert total(result.validation[0]) == pytest.approx(wanted, rel=1e-4)


def test_result_is_plain_json_and_the_scratch_folder_empty(tmp_path: Path) -> None:
    result = heal(cut_apart(), tmp_path)
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False)) == result.to_dict()
    assert list(tmp_path.iterdir()) == []
    assert (result.layers, result.steps, result.tokens) == ([2, 3], 6, 2 * 5 * 16)
    assert (result.weights, result.lr, result.documents) == ({"ce": 1.0}, QUICK.lr, "one")
    assert (result.micro_batch_size, result.micro_batch_halvings) == (2, 0)
    assert result.labelled_tokens == 2 * int(TRAIN.labelled.sum())
    assert [row["step"] for row in result.train] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in result.validation] == [0, 2, 4, 6]
    assert "second" not in result.to_dict()


def test_memorizable_set_is_learned(tmp_path: Path) -> None:
    settings = replace(QUICK, lr=1e-2, epochs=25, batch_size=5, micro_batch_size=5, width=2)
    result = heal(cut_apart(), tmp_path, settings, validation=TRAIN)
    assert result.validation[-1]["loss_nats"] < 0.5 * result.validation[0]["loss_nats"]
    assert result.best_step == result.steps


TWO = replace(QUICK, objective="both", lr=3e-4, second_lr=2e-4, second_epochs=1)


@pytest.mark.parametrize(
    ("method", "second"),
    by_tier(
        [("endpoint", "lora"), ("lora", "endpoint"), ("endpoint", "all"), ("all", "endpoint")],
        everyday=[("lora", "endpoint"), ("endpoint", "all")],  # "lora" goes second where one is interrupted
    ),
)
def test_the_second_phase_goes_on_from_the_firsts_best_state(
    method: HealName, second: SecondName, tmp_path: Path
) -> None:
    student, alone = cut_apart(), cut_apart()
    settings = replace(TWO, method=method, second=second, objective="ce")
    result = heal(student, tmp_path, settings, validation=TRAIN)
    assert list(tmp_path.iterdir()) == []
    assert result.second is not None
    first, state = healed(replace(settings, second="none"), validation="train")
    alone.model.load_state_dict(state)
    assert replace(result, second=None) == first
    assert (result.second.method, result.second.lr, result.second.steps) == (second, 2e-4, 3)
    assert result.second.validation[0]["step"] == 0
    assert total(result.second.validation[0]) == pytest.approx(min(map(total, first.validation)), rel=1e-4)
    again = heal(alone, tmp_path, replace(settings, method=second, lr=2e-4, epochs=1, second="none"), validation=TRAIN)
    assert [total(row) for row in again.train] == pytest.approx([total(row) for row in result.second.train], rel=1e-4)
    for name, value in state_of(student).items():
        torch.testing.assert_close(value, state_of(alone)[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["all", "lora"])
def test_the_second_phase_asks_the_parent_and_not_what_the_first_made_of_its_layers(
    method: HealName, tmp_path: Path
) -> None:
    student = cut_apart()
    settings = replace(TWO, method=method, second="endpoint", objective="kl", end_weight=1.0, lr=5e-3)
    result = heal(student, tmp_path, settings, validation=TRAIN)
    assert result.second is not None
    assert result.second.best_step > 0  # so the student is what its last figure was measured on
    naive = naive_terms(student, parent_of("llama"), 4, TRAIN.tokens, TRAIN.labelled)
    wanted = (float(naive["kl"]) + float(naive["end"])) / int(TRAIN.labelled.sum())
    assert min(map(total, result.second.validation)) == pytest.approx(wanted, rel=1e-4)


ENDPOINT_FIRST, LORA_FIRST = ("endpoint", "lora"), ("lora", "endpoint")


@pytest.mark.parametrize(
    ("method", "second", "expand", "broken_at"),
    by_tier(
        [(*phases, *rest) for phases, *rest in product([ENDPOINT_FIRST, LORA_FIRST], [0, 1], [3, 6, 8])],
        everyday=[(*ENDPOINT_FIRST, 1, 3), (*LORA_FIRST, 0, 6), (*ENDPOINT_FIRST, 1, 8)],
    ),
)
def test_interruption_in_either_phase_resumes_bit_for_bit(
    method: HealName, second: SecondName, expand: int, broken_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(TWO, method=method, second=second, expand=expand)
    resumed, (expected, state) = cut_apart(), healed(settings)
    with monkeypatch.context() as broken:
        interrupt(broken, broken_at)  # six steps and three
        with pytest.raises(KeyboardInterrupt):
            heal(cut_apart(), tmp_path, settings)
    assert (tmp_path / "state.pt").exists()
    assert (tmp_path / "state-2.pt").exists() == (broken_at > 6)
    assert heal(resumed, tmp_path, settings) == expected
    assert list(tmp_path.iterdir()) == []
    assert changed_in(resumed, state) == set()


@torch.no_grad()
def test_a_second_phase_that_never_helps_keeps_the_firsts_state(tmp_path: Path, monkeypatch: Any) -> None:
    def spoil(training: Training, _done: int) -> None:
        if training.settings.lr == TWO.second_lr:
            noise = torch.randn(training.masters[0].shape, generator=torch.Generator().manual_seed(0))
            training.masters[0].add_(3 * noise)

    student, (_, state) = cut_apart(), healed(TWO, validation="train")
    after_step(monkeypatch, spoil)
    result = heal(student, tmp_path, replace(TWO, second="endpoint"), validation=TRAIN)
    assert result.second is not None
    assert (result.best_step > 0, result.second.best_step) == (True, 0)
    assert changed_in(student, state) == set()


def test_divergence_in_the_second_phase_leaves_the_firsts_state(tmp_path: Path) -> None:
    student, (_, state) = cut_apart(), healed(TWO, validation="train")
    settings = replace(TWO, second="endpoint", second_lr=1e30, warmup_fraction=0.0)
    with pytest.raises(
        UserError, match=r"diverged: the .*loss is nan at step 1 with learning rate 1e\+30 - .*heal\.second_lr"
    ):
        heal(student, tmp_path / "two", settings, validation=TRAIN)
    assert changed_in(student, state) == set()
    assert {path.name for path in (tmp_path / "two").iterdir()} == {"state.pt"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "none", "second": "lora"}, r"heal\.second=lora follows no first phase - set heal\.method=lora"),
        ({"method": "lora", "expand": 1}, r"heal\.expand=1 has no effect with heal\.method=lora - allowed with"),
        ({"method": "last", "objective": "seam"}, r"heal\.method=last trains no layer at the seam"),
        ({"method": "last", "seam_weight": 0.1}, r"heal\.method=last trains no layer at the seam"),
    ],
)
def test_settings_without_effect_are_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    settings = replace(QUICK, **changes)
    with pytest.raises(UserError, match=said):
        refuse_contradictions(settings)
    if settings.method != "none":
        with pytest.raises(UserError, match=said):
            heal(cut_apart(), tmp_path, settings)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "none"},
        {"method": "lora", "second": "endpoint", "expand": 1},
        {"method": "endpoint", "second": "lora", "expand": 2, "objective": "seam"},
        {"method": "last", "objective": "end", "expand": 1},
    ],
)
def test_settings_that_agree_are_not_refused(changes: dict[str, Any]) -> None:
    refuse_contradictions(HealSettings(**changes))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_first_ten_losses_equal_the_golden_ones(objective: Objective) -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))[objective]
    assert len(golden) == 10
    assert golden_losses(objective) == pytest.approx(golden, abs=1e-5, rel=0)


if __name__ == "__main__":
    renewed = {objective: golden_losses(objective) for objective in OBJECTIVES}
    GOLDEN.write_text(json.dumps(renewed, indent=1) + "\n", encoding="utf-8")
