"""What the tests of healing share: tiny cuts beside their parents, quick settings, naive losses of whole models."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812, the name everybody knows it by
from families import tiny
from planted import changed_layers, random_blocks
from torch import Tensor

from layerscalpel.cut import cut_model
from layerscalpel.data import TokenBlocks
from layerscalpel.frozen import Batch, Frozen, Plan
from layerscalpel.heal import HealResult, heal_model
from layerscalpel.layers import Decoder
from layerscalpel.objectives import SeamLoss, weights_of
from layerscalpel.probe import find_layers
from layerscalpel.segment import Segment
from layerscalpel.settings import HealSettings
from layerscalpel.training import Training

SEGMENT = Segment(3, 5, 8)
TRAIN, HELD_OUT = random_blocks(5, labelled_fraction=0.6), random_blocks(3, seed=2, labelled_fraction=0.6)
QUICK = HealSettings(lr=2e-3, epochs=2, batch_size=2, micro_batch_size=2, validations=3)


@functools.cache
def parent_of(family: str, dtype: torch.dtype = torch.float32) -> Decoder:
    """Return the family's tiny model, one for all tests."""
    return find_layers(tiny(family).to(dtype))


@functools.cache
def _cut(family: str, segment: Segment, dtype: torch.dtype) -> Any:
    return cut_model(parent_of(family, dtype), segment)[0]


def cut_apart(family: str = "llama", segment: Segment = SEGMENT, dtype: torch.dtype = torch.float32) -> Decoder:
    """Return the family's model without the segment, sharing no tensor with its parent."""
    return find_layers(copy.deepcopy(_cut(family, segment, dtype)))


def heal(
    student: Decoder,
    scratch: Path,
    settings: HealSettings = QUICK,
    *,
    family: str = "llama",
    seam: int = 3,
    seed: int = 0,
    **blocks: Any,
) -> HealResult:
    """Heal a cut of a tiny model on the blocks of this file."""
    parts = {"blocks": TRAIN, "validation": HELD_OUT} | blocks
    return heal_model(student, parent_of(family), [seam], **parts, settings=settings, seed=seed, scratch=scratch)


@functools.cache
def healed(
    settings: HealSettings = QUICK, *, dtype: torch.dtype = torch.float32, validation: str = "held out"
) -> tuple[HealResult, dict[str, Tensor]]:
    """Return a healing of the cut llama that nothing disturbs, and the tensors it left; one for all that only read it.

    Ask for it before a training is interrupted or spoilt.
    """
    student, chosen = cut_apart(dtype=dtype), {"held out": HELD_OUT, "train": TRAIN}[validation]
    with tempfile.TemporaryDirectory() as scratch:
        return heal(student, Path(scratch), settings, validation=chosen), state_of(student)


def by_tier(cases: Iterable[Any], everyday: Collection[Any]) -> list[Any]:
    """Return all cases of a parametrised test; those that are not for every day are of the slow tier."""
    found = list(cases)
    assert all(case in found for case in everyday)
    assert everyday
    slow = {case: () if case in everyday else (pytest.mark.slow,) for case in found}
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=slow[case]) for case in found]


def state_of(decoder: Decoder) -> dict[str, Tensor]:
    """Return copies of all tensors of a model."""
    return {name: value.clone() for name, value in decoder.model.state_dict().items()}


def changed_in(decoder: Decoder, before: dict[str, Tensor]) -> set[str]:
    """Return the names of the tensors that are not what they were, bit for bit."""
    return {name for name, value in decoder.model.state_dict().items() if not torch.equal(value, before[name])}


@torch.no_grad()
def logits_of(decoder: Decoder) -> Tensor:
    """Return the logits of the training blocks."""
    return decoder.model(TRAIN.tokens, use_cache=False).logits


def total(row: dict[str, float]) -> float:
    """Return the loss in a row of a result."""
    return row["loss"] if "loss" in row else row["loss_nats"]


def losses_of(result: HealResult) -> list[float]:
    """Return all losses of a healing."""
    return [total(row) for row in [*result.train, *result.validation]]


def boundary_states(decoder: Decoder, boundary: int, tokens: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Return (hidden states at a boundary, logits) of a plain forward of the whole model; nothing of the package."""
    found: list[Tensor] = []

    def keep(given: Tensor, output: Tensor) -> Tensor:
        found.append(output)
        return output

    with changed_layers(decoder.layers, {boundary - 1: keep}):
        logits = decoder.model(tokens, use_cache=False, **kwargs).logits
    return found[0], logits


def naive_terms(
    student: Decoder, parent: Decoder, seam: int, tokens: Tensor, labelled: Tensor, positions: Tensor | None = None
) -> dict[str, Tensor]:
    """Return every term of the loss as a sum over its places, from plain forwards of the whole models.

    Args:
        student: the cut model.
        parent: the whole one.
        seam: the boundary of the cut model where hidden states are compared.
        tokens: of the blocks.
        labelled: what is a target.
        positions: keep documents apart.
    """
    apart = {} if positions is None else {"position_ids": positions}
    removed, counted = len(parent) - len(student), labelled[:, 1:]
    at_seam, logits = boundary_states(student, seam, tokens, **apart)
    at_end, _ = boundary_states(student, len(student), tokens, **apart)
    with torch.no_grad():
        wanted_seam, wanted_logits = boundary_states(parent, seam + removed, tokens, **apart)
        wanted_end, _ = boundary_states(parent, len(parent), tokens, **apart)
    log_probs, wanted = (both[:, :-1][counted].log_softmax(-1) for both in (logits, wanted_logits))
    ends = [both[:, :-1][counted] for both in (at_end, wanted_end)]
    return {
        "ce": F.nll_loss(log_probs, tokens[:, 1:][counted], reduction="sum"),
        "kl": F.kl_div(log_probs, wanted, log_target=True, reduction="sum"),
        "seam": ((at_seam - wanted_seam).norm(dim=-1) / wanted_seam.norm(dim=-1)).square().sum(),
        "end": ((ends[0] - ends[1]).norm(dim=-1) / ends[1].norm(dim=-1)).square().sum(),
    }


def plan_of(student: Decoder, parent: Decoder, settings: HealSettings, boundary: int, seam: int, **more: Any) -> Plan:
    """Return the plan of a healing whose trained layers begin at a boundary."""
    terms = set(weights_of(settings))
    asked = {"kl": "kl" in terms, "seam_error": "seam" in terms, "end_error": "end" in terms}
    return Plan(boundary, seam, len(parent) - len(student), **(asked | more))


@contextmanager
def prepared(
    student: Decoder,
    parent: Decoder,
    settings: HealSettings,
    folder: Path,
    *,
    plan: Plan,
    blocks: TokenBlocks = TRAIN,
    room: int = 1 << 22,
) -> Iterator[tuple[SeamLoss, Frozen]]:
    """Give the loss and what is frozen of some blocks, computed and kept."""
    frozen = Frozen(student, parent, blocks, plan, settings, folder / "frozen.bin", room=room)
    try:
        frozen.fill("frozen")
        yield SeamLoss(student, parent, plan, weights_of(settings)), frozen
    finally:
        frozen.close(keep=False)


def terms_of(loss: SeamLoss, batch: Batch) -> dict[str, float]:
    """Return every term as a sum over its places, without gradients."""
    with torch.no_grad():
        return {name: float(value) for name, value in loss(batch, 1.0, 1.0).items()}


def after_step(monkeypatch: pytest.MonkeyPatch, act: Callable[[Training, int], None]) -> None:
    """Let `act(training, steps done)` follow every step."""
    whole_step = Training._step

    def step_and_act(self: Training, step: int, *rest: Any) -> None:
        whole_step(self, step, *rest)
        act(self, step + 1)

    monkeypatch.setattr(Training, "_step", step_and_act)


def interrupt(monkeypatch: pytest.MonkeyPatch, broken_at: int) -> None:
    """Let a person press Ctrl-C in the n-th step from now on, 0-based, whichever training takes it."""
    whole_step, taken = Training._step, iter(range(1 << 20))

    def interrupted(self: Training, step: int, *rest: Any) -> None:
        if next(taken) == broken_at:
            raise KeyboardInterrupt
        whole_step(self, step, *rest)

    monkeypatch.setattr(Training, "_step", interrupted)


def packed(blocks: TokenBlocks, lengths: list[int]) -> TokenBlocks:
    """Return the blocks as if each held documents of these lengths; the first token of a document is no target."""
    positions = torch.cat([torch.arange(length) for length in lengths])
    labelled = blocks.labelled & (positions > 0)
    return replace(blocks, positions=positions.expand_as(blocks.tokens).contiguous(), labelled=labelled)
