"""The training loop: what it does not depend on, how it ends, and that it goes on where it stopped."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from healing import (
    QUICK,
    TRAIN,
    after_step,
    by_tier,
    changed_in,
    cut_apart,
    heal,
    healed,
    interrupt,
    losses_of,
    state_of,
)
from test_store import file_limit
from torch import Tensor

from layerscalpel.errors import UserError
from layerscalpel.frozen import Batch, Frozen, Plan
from layerscalpel.objectives import SeamLoss
from layerscalpel.resume import StateFile
from layerscalpel.schedule import learning_rate
from layerscalpel.segment import Segment
from layerscalpel.settings import HealName, HealSettings, Objective
from layerscalpel.training import Training

OBJECTIVES: tuple[Objective, ...] = ("ce", "kl", "both")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_micro_batches_do_not_change_the_losses(objective: Objective, tmp_path: Path) -> None:
    settings = replace(QUICK, objective=objective, batch_size=4, epochs=1, validations=1)
    results = [heal(cut_apart(), tmp_path, replace(settings, micro_batch_size=size)) for size in (1, 3, 4)]
    for result in results[1:]:  # float32 sums in another order, over two Adam steps
        assert losses_of(result) == pytest.approx(losses_of(results[0]), rel=1e-4)


@pytest.mark.parametrize(
    ("broken_at", "dtype"),
    by_tier(
        product([0, 1, 3, 5], [torch.float32, torch.bfloat16]),
        everyday=[(0, torch.float32), (1, torch.bfloat16), (3, torch.bfloat16), (5, torch.float32)],
    ),
)
def test_resumed_training_equals_an_unbroken_one(
    broken_at: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resumed, (expected, state) = cut_apart(dtype=dtype), healed(dtype=dtype)
    interrupt(monkeypatch, broken_at)
    with pytest.raises(KeyboardInterrupt):
        heal(cut_apart(dtype=dtype), tmp_path / "resumed")
    monkeypatch.undo()
    assert (tmp_path / "resumed" / "state.pt").exists() == (broken_at > 1)  # validated after steps 2, 4 and 6
    assert (tmp_path / "resumed" / "frozen-training.json").exists()
    assert heal(resumed, tmp_path / "resumed") == expected
    assert changed_in(resumed, state) == set()


@pytest.mark.parametrize(
    ("method", "expand"),
    by_tier(
        [("lora", 0), ("last", 0), ("last", 1), ("all", 0), ("all", 1)],
        everyday=[("lora", 0), ("last", 0), ("all", 1)],
    ),
)
def test_every_method_resumes_bit_for_bit(
    method: HealName, expand: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(QUICK, method=method, objective="both", expand=expand, end_weight=0.5)
    unbroken, resumed = cut_apart(), cut_apart()
    expected = heal(unbroken, tmp_path / "unbroken", settings)
    interrupt(monkeypatch, 3)
    broken = cut_apart()
    with pytest.raises(KeyboardInterrupt):
        heal(broken, tmp_path / "resumed", settings)
    monkeypatch.undo()
    assert list(broken.model.state_dict()) == list(unbroken.model.state_dict())  # nothing added is left there either
    assert heal(resumed, tmp_path / "resumed", settings) == expected
    assert all(torch.equal(value, state_of(unbroken)[name]) for name, value in state_of(resumed).items())


@pytest.mark.parametrize("turn", [0, 1, 3])
def test_an_interruption_while_frozen_layers_are_computed_goes_on(
    turn: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(QUICK, objective="kl")
    expected, _ = healed(settings)
    compute, turns = Frozen._computed, iter(range(1 << 20))

    def interrupted(self: Frozen, *rest: Any) -> Any:
        if next(turns) == turn:
            raise KeyboardInterrupt
        return compute(self, *rest)

    with monkeypatch.context() as broken:
        broken.setattr(Frozen, "_computed", interrupted)
        with pytest.raises(KeyboardInterrupt):
            heal(cut_apart(), tmp_path, settings)
    kept = tmp_path / ("frozen-training.json" if turn > 1 else "frozen-validation.json")  # two turns each
    assert json.loads(kept.read_text(encoding="utf-8"))["filled"] == (2 if turn % 2 else 0)
    assert heal(cut_apart(), tmp_path, settings) == expected
    assert list(tmp_path.iterdir()) == []


@torch.no_grad()
def test_best_state_is_kept_when_later_ones_are_worse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states: dict[int, list[Tensor]] = {}

    def spoil_later(training: Training, done: int) -> None:
        states[done] = [master.detach().clone() for master in training.masters]
        if done == 4:
            noise = torch.randn(training.masters[0].shape, generator=torch.Generator().manual_seed(0))
            training.masters[0].add_(3 * noise)

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
    before = state_of(student)
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
    parameters = [parameter for i in (2, 3) for parameter in student.layers[i].parameters()]
    training = Training(parameters, QUICK, num_blocks=5, seed=0, state=StateFile(tmp_path / "state.pt", "key"))
    plan = Plan(2, 4, 2)
    frozen = Frozen(student, None, TRAIN, plan, QUICK, tmp_path / "prefix.bin", room=0)
    loss, alone = SeamLoss(student, None, plan, {"ce": 1.0}), []
    for index in (torch.tensor([0]), torch.tensor([1, 2])):
        loss(frozen.batch(index), 1.0, 1.0)
        alone.append([parameter.grad.float() for parameter in training.parameters])
        training._collect_gradients()
    for master, first, second in zip(training.masters, *alone, strict=True):
        assert master.dtype == torch.float32
        assert torch.equal(master.grad, first + second)
    assert all(parameter.grad is None for parameter in training.parameters)


def short_of_memory(monkeypatch: pytest.MonkeyPatch, most: int, *, from_call: int = 0, only: str = "") -> list[int]:
    """Let a loss of more than `most` blocks run out of memory, from some call on; return the sizes that went well."""
    whole, calls, sizes = SeamLoss.__call__, iter(range(1 << 20)), []

    def lacking(self: SeamLoss, batch: Batch, *rest: Any) -> dict[str, Tensor]:
        concerned = only in ("", "training" if torch.is_grad_enabled() else "validation")
        if concerned and next(calls) >= from_call and len(batch.sent.tokens_BT) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(batch.sent.tokens_BT))
        return whole(self, batch, *rest)

    monkeypatch.setattr(SeamLoss, "__call__", lacking)
    return sizes


@pytest.mark.parametrize(
    ("where", "from_call"),
    by_tier(product(["training", "validation"], [0, 3]), everyday=[("training", 3), ("validation", 0)]),
)
def test_memory_that_runs_out_halves_the_micro_batches_and_changes_no_loss(
    where: str,
    from_call: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = replace(QUICK, objective="both", batch_size=5, micro_batch_size=4, epochs=4, validations=4)
    small, _ = healed(replace(settings, micro_batch_size=1))
    short_of_memory(monkeypatch, 1, from_call=from_call, only=where)
    result = heal(cut_apart(), tmp_path / "large", settings)
    assert (result.micro_batch_size, result.micro_batch_halvings) == (1, 2)
    assert losses_of(result) == pytest.approx(losses_of(small), rel=1e-4)
    said = capsys.readouterr().err
    for size in (2, 1):
        assert said.count(f"out of memory: a step of healing takes {size} blocks at once instead of {2 * size}") == 1


def test_a_training_that_ran_out_of_memory_resumes_with_smaller_micro_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(QUICK, batch_size=4, micro_batch_size=4, validations=4)
    sizes = short_of_memory(monkeypatch, 2)
    expected = heal(cut_apart(), tmp_path / "unbroken", settings)
    with monkeypatch.context() as broken:
        interrupt(broken, 3)
        with pytest.raises(KeyboardInterrupt):
            heal(cut_apart(), tmp_path, settings)
    sizes.clear()
    resumed = heal(cut_apart(), tmp_path, settings)
    assert max(sizes) == 2
    assert resumed == expected
    assert resumed.micro_batch_halvings == 1


@pytest.mark.parametrize("where", ["training", "validation"])
def test_a_single_block_that_does_not_fit_is_a_user_error(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_of_memory(monkeypatch, 0, only=where)
    student = cut_apart()
    before = state_of(student)
    with pytest.raises(UserError, match=r"out of memory: a step of healing does not fit with a single block - shorten"):
        heal(student, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in state_of(student).items())
    assert not list(tmp_path.iterdir())


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


@pytest.mark.parametrize(
    ("what", "step"),
    by_tier(product(["loss", "gradient"], [1, 4]), everyday=[("loss", 1), ("loss", 4), ("gradient", 4)]),
)
def test_a_loss_or_gradient_that_is_not_finite_gives_the_best_state_back(
    what: str, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, best = Training._gradients, {}

    def poisoned(self: Training, *rest: Any) -> Any:
        terms = whole(self, *rest)
        if self.progress.step + 1 == step:
            best.update(enumerate(tensor.clone() for tensor in self.best))
            if what == "loss":
                return {name: value * math.nan for name, value in terms.items()}
            self.masters[3].grad[0] = math.inf
        return terms

    monkeypatch.setattr(Training, "_gradients", poisoned)
    student, before = cut_apart(), state_of(cut_apart())
    with pytest.raises(UserError, match=rf"the {what} is (nan|inf) at step {step} with learning rate [\d.]+e?-?\d*"):
        heal(student, tmp_path, replace(QUICK, lr=1e-4), validation=TRAIN)
    trained = [parameter for i in (2, 3) for parameter in student.layers[i].parameters()]
    assert all(torch.equal(parameter, best[place]) for place, parameter in enumerate(trained))
    unchanged = all(torch.equal(value, before[name]) for name, value in state_of(student).items())
    assert unchanged == (step == 1)
    assert (tmp_path / "state.pt").exists() == (step > 1)
    if step > 1:
        state = torch.load(tmp_path / "state.pt")
        assert state["progress"]["step"] == 2
        assert all(master.isfinite().all() for master in state["masters"])


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


def test_the_same_settings_diverge_with_the_same_words_and_others_begin_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def poison(training: Training, done: int) -> None:
        if done == 3 and training.settings.lr == QUICK.lr:
            training.masters[0].data.fill_(math.nan)

    after_step(monkeypatch, poison)
    told = []
    for _ in range(2):
        with pytest.raises(UserError) as found:
            heal(cut_apart(), tmp_path)
        told.append(str(found.value))
    assert told[0] == told[1]
    assert "the loss is nan at step 4 with learning rate" in told[0]
    assert "healing goes on from step 2 of 6" in capsys.readouterr().err
    settings = replace(QUICK, lr=1e-3)
    fresh = heal(cut_apart(), tmp_path / "fresh", settings)
    assert heal(cut_apart(), tmp_path, settings) == fresh
    assert "had other settings, text or weights: healing begins anew" in capsys.readouterr().err


def test_a_state_that_cannot_be_written_is_a_user_error_and_the_last_one_stays(tmp_path: Path) -> None:
    weights, state = [torch.nn.Parameter(torch.zeros(1 << 18))], StateFile(tmp_path / "s.pt", "key")
    training = Training(weights, QUICK, num_blocks=4, seed=0, state=state)
    training._store()
    kept = (tmp_path / "s.pt").read_bytes()
    with (
        file_limit(1 << 20),
        pytest.raises(UserError, match=r"state of healing cannot be written to .* free some space"),
    ):
        training._store()
    assert [path.name for path in tmp_path.iterdir()] == ["s.pt"]
    assert (tmp_path / "s.pt").read_bytes() == kept


def test_seed_orders_the_blocks(tmp_path: Path) -> None:
    first, again, other = (
        losses_of(result) for result in (healed()[0], *(heal(cut_apart(), tmp_path, seed=seed) for seed in (0, 1)))
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("num_blocks", [5, 6, 7])
def test_every_epoch_reads_every_block_once(num_blocks: int, tmp_path: Path) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    training = Training(parameters, QUICK, num_blocks=num_blocks, seed=0, state=StateFile(tmp_path / "s.pt", "key"))
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


@pytest.mark.parametrize("method", ["endpoint", "lora", "all"])
def test_recomputed_layers_train_alike(method: HealName, tmp_path: Path) -> None:
    settings = replace(QUICK, method=method, objective="both", seam_weight=0.5, epochs=1, validations=1)
    plain, recomputed = cut_apart(), cut_apart()
    expected = heal(plain, tmp_path, settings)
    found = heal(recomputed, tmp_path, replace(settings, checkpointing=True))
    assert losses_of(found) == losses_of(expected)  # the same operations in the same order
    assert all(torch.equal(value, state_of(plain)[name]) for name, value in state_of(recomputed).items())


@pytest.mark.slow  # the compiler takes a minute
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_train_alike(checkpointing: bool, tmp_path: Path) -> None:
    segment, blocks = Segment(6, 8, 8), TRAIN.first(4)  # one layer, batches of one size: little to compile
    settings = replace(QUICK, objective="both", seam_weight=0.5, validations=1, checkpointing=checkpointing)
    expected, found = (
        heal(cut_apart(segment=segment), tmp_path, chosen, seam=6, blocks=blocks, validation=blocks)
        for chosen in (settings, replace(settings, compile=True))
    )
    assert losses_of(found) == pytest.approx(losses_of(expected), rel=1e-4)


@pytest.mark.parametrize(
    "segment",
    [Segment(6, 8, 8), pytest.param(Segment(3, 5, 8), marks=pytest.mark.slow)],  # one layer is traced, or four
    ids=str,
)
def test_no_layer_is_left_uncompiled(segment: Segment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # traced and guarded all the same
    settings = replace(QUICK, objective="both", compile=True, epochs=1)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        found = heal(cut_apart(segment=segment), tmp_path, settings, seam=segment.start)
    expected = heal(cut_apart(segment=segment), tmp_path, replace(settings, compile=False), seam=segment.start)
    assert losses_of(found) == pytest.approx(losses_of(expected), rel=1e-4)
