"""Healing trains the seam and nothing else, computes the naive loss, and goes on where it was interrupted.

Renew the golden losses after a change that should change them, and show before and after in dev/LOG.md:

    python tests/test_heal.py
"""

from __future__ import annotations

import copy
import functools
import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F  # noqa: N812, the name everybody knows it by
from families import VOCAB, tiny
from planted import random_blocks
from torch import Tensor

from layerscalpel import losses
from layerscalpel.cut import cut_model
from layerscalpel.errors import UserError
from layerscalpel.heal import (
    HEALERS,
    HealResult,
    PrefixCache,
    SeamLoss,
    Training,
    learning_rate,
    seam_layers,
    tune_endpoints,
)
from layerscalpel.hooks import hidden_at
from layerscalpel.layers import Decoder
from layerscalpel.probe import find_layers
from layerscalpel.segment import Segment
from layerscalpel.settings import HealName, HealSettings, Objective

GOLDEN = Path(__file__).parent / "golden_heal.json"
SEGMENT = Segment(3, 5, 8)
TRAIN, HELD_OUT = random_blocks(5, labelled_fraction=0.6), random_blocks(3, seed=2, labelled_fraction=0.6)
QUICK = HealSettings(lr=2e-3, epochs=2, batch_size=2, micro_batch_size=2, validations=3)
FAMILIES = ("llama", "gemma3_text", "gpt2", "bloom", "opt")


@functools.cache
def parent_of(family: str, dtype: torch.dtype = torch.float32) -> Decoder:
    return find_layers(tiny(family).to(dtype))


@functools.cache
def _cut(family: str, segment: Segment, dtype: torch.dtype) -> Any:
    return cut_model(parent_of(family, dtype), segment)[0]


def cut_apart(family: str = "llama", segment: Segment = SEGMENT, dtype: torch.dtype = torch.float32) -> Decoder:
    """Return the family's model without the segment, sharing no tensor with its parent."""
    return find_layers(copy.deepcopy(_cut(family, segment, dtype)))


def heal(
    student: Decoder, scratch: Path, settings: HealSettings = QUICK, *, seam: int = 3, seed: int = 0, **blocks: Any
) -> HealResult:
    """Heal a cut of the tiny llama on the blocks of this file."""
    parts = {"blocks": TRAIN, "validation": HELD_OUT} | blocks
    return tune_endpoints(student, parent_of("llama"), [seam], **parts, settings=settings, seed=seed, scratch=scratch)


def weights_of(decoder: Decoder) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in decoder.model.state_dict().items()}


def losses_of(result: HealResult) -> list[float]:
    return [row["loss_nats"] for row in [*result.train, *result.validation]]


def naive_loss(student: Decoder, parent: Decoder, objective: Objective, tokens: Tensor, labelled: Tensor) -> Tensor:
    """Return the sum over labelled targets from the full logits of the whole models."""
    counted = labelled[:, 1:]
    log_probs = student.model(tokens, use_cache=False).logits[:, :-1][counted].log_softmax(-1)
    with torch.no_grad():
        wanted = parent.model(tokens, use_cache=False).logits[:, :-1][counted].log_softmax(-1)
    ce = F.nll_loss(log_probs, tokens[:, 1:][counted], reduction="sum")
    kl = F.kl_div(log_probs, wanted, log_target=True, reduction="sum")
    return {"ce": ce, "kl": kl, "both": ce + kl}[objective]


def golden_losses(objective: Objective) -> list[float]:
    """Return the ten training losses that the golden file holds."""
    settings = replace(QUICK, objective=objective, epochs=4, lr=1e-3)
    with tempfile.TemporaryDirectory() as scratch:
        return [row["loss_nats"] for row in heal(cut_apart(), Path(scratch), settings).train[:10]]


def test_table_holds_exactly_the_methods_of_the_settings() -> None:
    assert tuple(HEALERS) == get_args(HealName)


@pytest.mark.parametrize(
    ("num_layers", "seam", "width", "expected"),
    [
        (6, 3, 1, [2, 3]),
        (6, 3, 2, [1, 2, 3, 4]),
        (6, 0, 1, [0]),
        (6, 6, 1, [5]),
        (6, 6, 2, [4, 5]),
        (6, 1, 2, [0, 1, 2]),
        (6, 3, 9, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_seam_layers_are_those_beside_the_seam(num_layers: int, seam: int, width: int, expected: list[int]) -> None:
    assert list(seam_layers(num_layers, seam, width)) == expected


@pytest.mark.parametrize(
    ("segment", "width"), [(SEGMENT, 1), (SEGMENT, 2), (Segment(0, 2, 8), 1), (Segment(6, 8, 8), 1)]
)
@pytest.mark.parametrize("objective", ["ce", "both"])
def test_only_the_seam_changes(segment: Segment, width: int, objective: Objective, tmp_path: Path) -> None:
    student = cut_apart(segment=segment)
    before, parent = weights_of(student), weights_of(parent_of("llama"))
    settings = replace(QUICK, objective=objective, width=width, lr=1e-4)
    result = heal(student, tmp_path, settings, seam=segment.start, validation=TRAIN)
    changed = {name for name, value in student.model.state_dict().items() if not torch.equal(value, before[name])}
    chosen = [f"model.layers.{i}." for i in seam_layers(6, segment.start, width)]
    assert changed == {name for name in before if name.startswith(tuple(chosen))}
    frozen = [value for name, value in student.model.named_parameters() if name not in changed]
    assert all(value.grad is None for value in frozen)
    assert result.best_step > 0
    assert result.trained_parameters == sum(before[name].numel() for name in changed)
    assert all(torch.equal(value, parent[name]) for name, value in parent_of("llama").model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_seam_changes_in_other_families(family: str, tmp_path: Path) -> None:
    student = cut_apart(family, Segment(4, 8, 8))
    before = weights_of(student)
    settings = replace(QUICK, objective="kl", lr=1e-4)
    result = tune_endpoints(student, parent_of(family), [4], TRAIN, TRAIN, settings, seed=0, scratch=tmp_path)
    changed = {name for name, value in student.model.state_dict().items() if not torch.equal(value, before[name])}
    assert result.best_step > 0
    assert changed
    assert all(name.startswith(f"{student.path}.3.") for name in changed)


def test_result_is_plain_json_and_the_scratch_folder_empty(tmp_path: Path) -> None:
    result = heal(cut_apart(), tmp_path)
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False)) == result.to_dict()
    assert list(tmp_path.iterdir()) == []
    assert (result.layers, result.steps, result.tokens) == ([2, 3], 6, 2 * 5 * 16)
    assert result.labelled_tokens == 2 * int(TRAIN.labelled.sum())
    assert [row["step"] for row in result.train] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in result.validation] == [0, 2, 4, 6]


def test_memorizable_set_is_learned(tmp_path: Path) -> None:
    settings = replace(QUICK, lr=1e-2, epochs=25, batch_size=5, micro_batch_size=5, width=2)
    result = heal(cut_apart(), tmp_path, settings, validation=TRAIN)
    assert result.validation[-1]["loss_nats"] < 0.5 * result.validation[0]["loss_nats"]
    assert result.best_step == result.steps


@pytest.mark.parametrize(("cached", "fraction"), [(0, 0.0), (3, 0.6), (5, 1.0)])
def test_cache_does_not_change_the_losses(cached: int, fraction: float, tmp_path: Path) -> None:
    block_bytes = 16 * 32 * 4
    whole = heal(cut_apart(), tmp_path / "whole")
    result = heal(cut_apart(), tmp_path / "some", replace(QUICK, cache_gib=(cached + 0.5) * block_bytes / 2**30))
    assert (whole.cached_fraction, result.cached_fraction) == (1.0, pytest.approx(fraction))
    assert losses_of(result) == pytest.approx(losses_of(whole), rel=1e-5)  # blocks meet in other batches


def test_cache_holds_the_hidden_states_at_its_boundary(tmp_path: Path) -> None:
    student = cut_apart()
    cache = PrefixCache(student, TRAIN, 2, QUICK, tmp_path / "prefix.bin")
    tokens, labelled, hidden = cache.batch(torch.tensor([3, 1]))
    assert torch.equal(tokens, TRAIN.tokens[[3, 1]])
    assert torch.equal(labelled, TRAIN.labelled[[3, 1]])
    torch.testing.assert_close(hidden, hidden_at(student, tokens, 2).detach(), rtol=1e-5, atol=1e-5)
    cache.close()
    assert not (tmp_path / "prefix.bin").exists()


@pytest.mark.parametrize("objective", get_args(Objective))
def test_micro_batches_do_not_change_the_losses(objective: Objective, tmp_path: Path) -> None:
    settings = replace(QUICK, objective=objective, batch_size=4)
    results = [heal(cut_apart(), tmp_path, replace(settings, micro_batch_size=size)) for size in (1, 3, 4)]
    for result in results[1:]:  # float32 sums in another order, over six Adam steps
        assert losses_of(result) == pytest.approx(losses_of(results[0]), rel=1e-4)


def test_both_is_cross_entropy_plus_kl_at_the_first_step(tmp_path: Path) -> None:
    first = {
        objective: heal(cut_apart(), tmp_path, replace(QUICK, objective=objective)) for objective in get_args(Objective)
    }
    for where in ("train", "validation"):
        ce, kl, both = (getattr(first[objective], where)[0]["loss_nats"] for objective in ("ce", "kl", "both"))
        assert both == pytest.approx(ce + kl, rel=1e-6)
        assert min(ce, kl) > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_kl_of_a_model_to_itself_is_zero(family: str) -> None:
    parent = parent_of(family)
    student = find_layers(copy.deepcopy(parent.model))
    hidden = hidden_at(parent, TRAIN.tokens, 3)
    with torch.no_grad():
        assert SeamLoss(student, parent, 3, "kl")(TRAIN.tokens, TRAIN.labelled, hidden, 1.0) == 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("objective", get_args(Objective))
@pytest.mark.parametrize("chunk", [VOCAB, 7])
def test_loss_and_gradient_equal_the_whole_models(
    family: str, objective: Objective, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(losses.LOGITS_BYTES, "cpu", 4 * VOCAB * chunk)
    student, parent, denominator = cut_apart(family, Segment(4, 8, 8)), parent_of(family), 17.0
    tokens, labelled = TRAIN.tokens[:2], TRAIN.labelled[:2]
    parameters = list(student.layers[3].parameters())
    wanted = naive_loss(student, parent, objective, tokens, labelled) / denominator
    gradients = torch.autograd.grad(wanted, parameters)
    hidden = hidden_at(student, tokens, 3).detach()
    loss = SeamLoss(student, parent if objective != "ce" else None, 3, objective)
    found = loss(tokens, labelled, hidden, denominator)
    assert found == pytest.approx(wanted.item(), rel=1e-5)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_more_labelled_positions_than_the_models_context(family: str) -> None:
    blocks = random_blocks(4, length=60)  # 236 targets, a context of 128
    student, parent = cut_apart(family), parent_of(family)
    with torch.no_grad():
        wanted = naive_loss(student, parent, "both", blocks.tokens, blocks.labelled).item()
        hidden = hidden_at(student, blocks.tokens, 2)
        found = SeamLoss(student, parent, 2, "both")(blocks.tokens, blocks.labelled, hidden, 1.0)
    assert found == pytest.approx(wanted, rel=1e-5)


def test_blocks_without_labels_add_nothing() -> None:
    student, tokens = cut_apart(), TRAIN.tokens[:2]
    none = torch.zeros_like(tokens, dtype=torch.bool)
    assert SeamLoss(student, None, 2, "ce")(tokens, none, hidden_at(student, tokens, 2), 1.0) == 0


@pytest.mark.parametrize("broken_at", [0, 1, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_training_equals_an_unbroken_one(
    broken_at: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken, resumed = cut_apart(dtype=dtype), cut_apart(dtype=dtype)
    expected = heal(unbroken, tmp_path / "unbroken")
    whole_step = Training._step

    def interrupted(self: Training, step: int, *rest: Any) -> None:
        if step == broken_at:
            raise KeyboardInterrupt
        whole_step(self, step, *rest)

    monkeypatch.setattr(Training, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        heal(cut_apart(dtype=dtype), tmp_path / "resumed")
    monkeypatch.undo()
    assert (tmp_path / "resumed" / "state.pt").exists() == (broken_at > 1)  # validated after steps 2, 4 and 6
    assert heal(resumed, tmp_path / "resumed") == expected
    for name, value in unbroken.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value)


def after_step(monkeypatch: pytest.MonkeyPatch, act: Callable[[Training, int], None]) -> None:
    """Let `act(training, steps done)` follow every step."""
    whole_step = Training._step

    def step_and_act(self: Training, step: int, *rest: Any) -> None:
        whole_step(self, step, *rest)
        act(self, step + 1)

    monkeypatch.setattr(Training, "_step", step_and_act)


@torch.no_grad()
def test_best_state_is_kept_when_later_ones_are_worse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states: dict[int, list[Tensor]] = {}

    def spoil_later(training: Training, done: int) -> None:
        states[done] = [master.detach().clone() for master in training.masters]
        if done == 4:
            training.masters[0].add_(torch.randn_like(training.masters[0]))

    after_step(monkeypatch, spoil_later)
    student = cut_apart()
    result = heal(student, tmp_path, replace(QUICK, lr=1e-4), validation=TRAIN)
    values = {row["step"]: row["loss_nats"] for row in result.validation}
    assert result.best_step == 2
    assert values[0] > values[2] < values[6]
    trained = [parameter for i in (2, 3) for parameter in student.layers[i].parameters()]
    assert all(torch.equal(now, then) for now, then in zip(trained, states[2], strict=True))


def test_unhealed_weights_are_kept_when_healing_never_helps(tmp_path: Path) -> None:
    student = cut_apart()
    before = weights_of(student)
    result = heal(student, tmp_path, replace(QUICK, lr=0.5, objective="kl"))
    assert result.best_step == 0
    assert all(torch.equal(value, before[name]) for name, value in student.model.state_dict().items())


def test_bfloat16_weights_keep_masters_that_add_up_small_steps(tmp_path: Path) -> None:
    settings = replace(QUICK, lr=5e-4, epochs=20, batch_size=5, micro_batch_size=5, warmup_fraction=0.0)
    student = cut_apart(dtype=torch.bfloat16)
    norm = student.layers[2].input_layernorm.weight
    before = norm.detach().clone()
    assert torch.equal(before + settings.lr, before)  # one step alone is lost in bfloat16
    heal(student, tmp_path, settings, validation=TRAIN)
    assert norm.dtype == torch.bfloat16
    assert (norm != before).float().mean() > 0.3


def test_gradients_of_micro_batches_add_up_in_the_masters(tmp_path: Path) -> None:
    student = cut_apart(dtype=torch.bfloat16)
    training = Training(student, range(2, 4), QUICK, num_blocks=5, seed=0, state_file=tmp_path / "state.pt")
    cache, loss = PrefixCache(student, TRAIN, 2, QUICK, tmp_path / "prefix.bin"), SeamLoss(student, None, 2, "ce")
    alone = []
    for index in (torch.tensor([0]), torch.tensor([1, 2])):
        loss(*cache.batch(index), 1.0)
        alone.append([parameter.grad.float() for parameter in training.parameters])
        training._collect_gradients()
    for master, first, second in zip(training.masters, *alone, strict=True):
        assert master.dtype == torch.float32
        assert torch.equal(master.grad, first + second)
    assert all(parameter.grad is None for parameter in training.parameters)


@pytest.mark.parametrize("lr", [1e30, 1e20])
def test_divergence_names_step_and_learning_rate(lr: float, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"loss is (nan|inf) at step 2 with learning rate [\d.]+e\+\d+ - lower heal\.lr"
    ):
        heal(cut_apart(), tmp_path, replace(QUICK, lr=lr, warmup_fraction=0.0))


def test_weights_that_are_nan_before_healing_are_a_user_error(tmp_path: Path) -> None:
    student = cut_apart()
    student.layers[4].mlp.down_proj.weight.data[0, 0] = math.nan
    with pytest.raises(UserError, match="loss is nan"):
        heal(student, tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("poisoned", [2, 6])
def test_divergence_that_only_validation_sees_spoils_neither_result_nor_state(
    poisoned: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poison(training: Training, done: int) -> None:
        if done == poisoned:
            training.masters[0].fill_(math.nan)

    after_step(monkeypatch, poison)
    with pytest.raises(UserError, match=rf"loss is nan at step {poisoned} with learning rate"):
        heal(cut_apart(), tmp_path)
    state = tmp_path / "state.pt"
    assert state.exists() == (poisoned > 2)
    if state.exists():
        assert all(master.isfinite().all() for master in torch.load(state)["masters"])


def test_seed_orders_the_blocks(tmp_path: Path) -> None:
    first, again, other = (losses_of(heal(cut_apart(), tmp_path, seed=seed)) for seed in (0, 0, 1))
    assert first == again
    assert first != other


@pytest.mark.parametrize("num_blocks", [5, 6, 7])
def test_every_epoch_reads_every_block_once(num_blocks: int, tmp_path: Path) -> None:
    training = Training(cut_apart(), range(2, 4), QUICK, num_blocks=num_blocks, seed=0, state_file=tmp_path / "s.pt")
    order = torch.cat([training._batch_index(step) for step in range(training.steps)]).tolist()
    first, second = order[:num_blocks], order[num_blocks:]
    assert sorted(first) == sorted(second) == list(range(num_blocks))
    assert first != second


@pytest.mark.parametrize("steps", [1, 2, 10, 137])
@pytest.mark.parametrize("warmup_fraction", [0.0, 0.05, 0.5, 1.0])
def test_learning_rate_rises_to_its_peak_and_falls(steps: int, warmup_fraction: float) -> None:
    settings = HealSettings(lr=3e-4, warmup_fraction=warmup_fraction)
    rates, warmup = [learning_rate(step, steps, settings) for step in range(steps)], round(steps * warmup_fraction)
    assert len(rates) == steps
    assert min(rates) > 0
    assert max(rates) == pytest.approx(3e-4)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    if warmup_fraction <= 0.5 and steps == 137:
        assert rates[-1] < 0.001 * max(rates)


@pytest.mark.parametrize("objective", get_args(Objective))
def test_first_ten_losses_equal_the_golden_ones(objective: Objective) -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))[objective]
    assert len(golden) == 10
    assert golden_losses(objective) == pytest.approx(golden, abs=1e-5, rel=0)


if __name__ == "__main__":
    renewed = {objective: golden_losses(objective) for objective in get_args(Objective)}
    GOLDEN.write_text(json.dumps(renewed, indent=1) + "\n", encoding="utf-8")
