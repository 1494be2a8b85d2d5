"""What training does not change is computed once, within its bound, and equals what is computed anew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny
from healing import HELD_OUT, QUICK, TRAIN, cut_apart, heal, losses_of, packed, parent_of, plan_of
from torch import Tensor

from layerscalpel.errors import UserError
from layerscalpel.frozen import Frozen, Plan
from layerscalpel.hooks import hidden_at
from layerscalpel.probe import find_layers
from layerscalpel.settings import HealSettings, TeacherName

BLOCK_BYTES = 16 * 32 * 4
"""Of the hidden states of a block of TRAIN."""
ALL_TERMS = HealSettings(objective="both", seam_weight=1.0, end_weight=1.0, micro_batch_size=2, teacher_top_k=5)


def open_frozen(folder: Path, settings: HealSettings = QUICK, room: int = 1 << 22, **more: Any) -> Frozen:
    """Return what is frozen of the tiny llama's cut, not yet computed."""
    student, parent = cut_apart(), parent_of("llama")
    plan = plan_of(student, parent, settings, 2, 4, **more)
    return Frozen(student, parent, more.pop("blocks", TRAIN), plan, settings, folder / "frozen.bin", room=room)


def counted(frozen: Frozen, monkeypatch: pytest.MonkeyPatch, most: int | None = None) -> list[int]:
    """Note the size of every batch that is computed; one larger than `most` runs out of memory."""
    sizes: list[int] = []
    compute = frozen._computed

    def count(index: Tensor) -> dict[str, Tensor]:
        if most is not None and len(index) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(index))
        return compute(index)

    monkeypatch.setattr(frozen, "_computed", count)
    return sizes


@pytest.mark.parametrize(("cached", "fraction"), [(0, 0.0), (3, 0.6), (5, 1.0)])
def test_cache_does_not_change_the_losses(cached: int, fraction: float, tmp_path: Path) -> None:
    whole = heal(cut_apart(), tmp_path / "whole")
    room = (len(HELD_OUT) + cached + 0.5) * BLOCK_BYTES  # validation blocks have room first
    result = heal(cut_apart(), tmp_path / "some", replace(QUICK, cache_gib=room / 2**30))
    assert (whole.cached_fraction, result.cached_fraction) == (1.0, pytest.approx(fraction))
    assert (whole.cache_bytes, result.cache_bytes) == (8 * BLOCK_BYTES, (3 + cached) * BLOCK_BYTES)
    assert losses_of(result) == pytest.approx(losses_of(whole), rel=1e-5)  # blocks meet in other batches


def test_cache_holds_the_hidden_states_at_its_boundary(tmp_path: Path) -> None:
    student = cut_apart()
    frozen = Frozen(student, None, TRAIN, Plan(2, 4, 2), QUICK, tmp_path / "prefix.bin", room=1 << 20)
    frozen.fill("frozen")
    batch = frozen.batch(torch.tensor([3, 1]))
    assert torch.equal(batch.sent.tokens_BT, TRAIN.tokens[[3, 1]])
    tokens, labelled = TRAIN.tokens[[3, 1]], TRAIN.labelled[[3, 1]]
    assert torch.equal(batch.sent.targets_M, tokens[:, 1:][labelled[:, 1:]])
    assert torch.equal(tokens.flatten()[batch.sent.places_M + 1], batch.sent.targets_M)
    assert (batch.sent.places_M % tokens.shape[1] < tokens.shape[1] - 1).all(), "none predicts another block's token"
    assert batch.hidden_BTD is not None
    wanted = hidden_at(student, batch.sent.tokens_BT, 2).detach()
    torch.testing.assert_close(batch.hidden_BTD, wanted, rtol=1e-5, atol=1e-5)
    frozen.close(keep=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("teacher", ["hidden", "topk"])
@pytest.mark.parametrize("cache_dtype", ["float32", "bfloat16"])
def test_rows_past_the_bound_equal_those_that_were_kept(teacher: TeacherName, cache_dtype: Any, tmp_path: Path) -> None:
    settings = replace(ALL_TERMS, teacher=teacher, cache_dtype=cache_dtype, micro_batch_size=1)
    whole = open_frozen(tmp_path / "whole", settings)
    some = open_frozen(tmp_path / "some", settings, room=2 * whole.file.num_bytes // 5)
    none = open_frozen(tmp_path / "none", settings, room=0)
    for frozen in (whole, some, none):
        frozen.fill("frozen")
    assert 0 < some.cached_fraction < 1
    batches = [torch.cat([_flat(frozen.batch(torch.tensor([i]))) for i in (4, 0, 3)]) for frozen in (whole, some, none)]
    assert torch.equal(batches[0], batches[1])  # one block a batch, so nothing rounds otherwise
    assert torch.equal(batches[0], batches[2])
    mixed = [_flat(frozen.batch(torch.tensor([4, 0, 3]))) for frozen in (whole, some, none)]
    for other in mixed[1:]:
        torch.testing.assert_close(other, mixed[0], rtol=2e-2 if cache_dtype == "bfloat16" else 1e-4, atol=1e-2)


def _flat(batch: Any) -> Tensor:
    return torch.cat([part.float().flatten() for _, part in sorted((batch.parent | {"x": batch.hidden_BTD}).items())])


@pytest.mark.parametrize("teacher", ["hidden", "topk", "online"])
def test_a_batch_is_the_one_that_was_asked_for_whatever_was_expected(teacher: TeacherName, tmp_path: Path) -> None:
    frozen = open_frozen(tmp_path, replace(ALL_TERMS, teacher=teacher))
    frozen.fill("frozen")
    index, other = torch.tensor([2, 0]), torch.tensor([1])
    plain = _flat(frozen.batch(index))
    for expected in (index, other, None):
        frozen.expect(expected)
        assert torch.equal(_flat(frozen.batch(index)), plain)


def test_memory_that_runs_out_halves_the_blocks_at_once_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = replace(ALL_TERMS, micro_batch_size=4)
    small = open_frozen(tmp_path / "small", replace(settings, micro_batch_size=1))
    small.fill("frozen")
    frozen = open_frozen(tmp_path / "large", settings)
    sizes = counted(frozen, monkeypatch, most=1)
    frozen.fill("frozen")
    assert sizes == [1] * 5
    assert torch.equal(_flat(frozen.batch(torch.arange(5))), _flat(small.batch(torch.arange(5))))
    said = capsys.readouterr().err
    assert said.count("out of memory: running the frozen layers takes 2 blocks at once instead of 4 from now on") == 1
    assert said.count("takes 1 blocks at once instead of 2") == 1


def test_a_block_that_does_not_fit_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = open_frozen(tmp_path)
    counted(frozen, monkeypatch, most=0)
    with pytest.raises(UserError, match=r"out of memory: .* does not fit with a single block - shorten data\.heal"):
        frozen.fill("frozen")


@pytest.mark.parametrize("done", [0, 1, 2])
def test_filling_goes_on_where_it_was_interrupted(done: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = open_frozen(tmp_path / "whole", ALL_TERMS)
    whole.fill("frozen")
    frozen = open_frozen(tmp_path, ALL_TERMS)
    compute, turns = frozen._computed, iter(range(9))

    def interrupted(index: Tensor) -> dict[str, Tensor]:
        if next(turns) == done:
            raise KeyboardInterrupt
        return compute(index)

    monkeypatch.setattr(frozen, "_computed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        frozen.fill("frozen")
    frozen.close(keep=True)
    again = open_frozen(tmp_path, ALL_TERMS)
    sizes = counted(again, monkeypatch)
    again.fill("frozen")
    looks = [2] * (done > 0)  # whether the first block is what it was
    assert sizes == looks + [2] * (2 - done) + [1]
    assert torch.equal(_flat(again.batch(torch.arange(5))), _flat(whole.batch(torch.arange(5))))


@torch.no_grad()
@pytest.mark.parametrize("who", ["student", "parent"])
def test_what_other_weights_computed_is_computed_anew(
    who: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_frozen(tmp_path, ALL_TERMS)
    first.fill("frozen")
    first.close(keep=True)
    again = open_frozen(tmp_path, ALL_TERMS)
    if who == "student":
        again.student.layers[0].mlp.down_proj.weight.mul_(1.01)
    else:
        again.parent = find_layers(tiny("llama", seed=3))
    sizes = counted(again, monkeypatch)
    again.fill("frozen")
    assert sizes == [2, 2, 2, 1]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_documents_that_are_kept_apart_are_frozen_as_if_each_were_alone(family: str, tmp_path: Path) -> None:
    student, parent, blocks = cut_apart(family), parent_of(family), packed(TRAIN, [5, 11])
    plan = plan_of(student, parent, ALL_TERMS, 2, 4, apart=True)
    frozen = Frozen(student, parent, blocks, plan, ALL_TERMS, tmp_path / "frozen.bin", room=1 << 22)
    frozen.fill("frozen")
    batch = frozen.batch(torch.tensor([1]))
    assert batch.hidden_BTD is not None
    for part in (slice(0, 5), slice(5, 16)):
        alone = blocks.tokens[1:2, part]
        wanted = hidden_at(student, alone, 2), hidden_at(parent, alone, 6)
        found = batch.hidden_BTD[:, part], batch.parent["seam"].view(1, 16, -1)[:, part]
        for own, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)
