"""Repair the seam without training: a closed form, folded into weights that are there already.

After a cut, the hidden state x that left layer start - 1 meets the layer that used to get y. Every stitch brings x
closer to y by least squares over the calibration text (grams.py), and changes weights so that the checkpoint keeps its
plain form (fold.py). Which weights is found by trying (anatomy.py), and no real weight is touched before the fold has
been proven on a tiny twin (rehearsal.py). A stitch is kept only if it lowers the KL on blocks it was not fitted on.

Source: docs/methods.md#stitch; `STITCHES` has the papers.

Dimensions: D hidden size, F inputs of the projection before the seam.

    found = stitch_model(student, parent, Segment(13, 19, 30), blocks, StitchSettings("auto"))
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from layerscalpel.data import TokenBlocks
from layerscalpel.decoder import num_parameters
from layerscalpel.errors import UserError
from layerscalpel.evaluate import Reference, evaluate, final_hidden
from layerscalpel.fold import Rewriter, fold
from layerscalpel.grams import Grams, Projection, accumulate, best_rotation, best_scale, ridge_change
from layerscalpel.layers import Decoder, device_of
from layerscalpel.losses import Measured
from layerscalpel.rehearsal import inserted_logits, logits_of, rehearse, relative_difference
from layerscalpel.seam import Repair, Seam
from layerscalpel.segment import Segment
from layerscalpel.settings import StitchName, StitchSettings

STITCHES: dict[StitchName, tuple[str, str]] = {
    "none": ("no repair before healing (default)", "none"),
    "scalar": ("one factor on the stream, folded into all that later layers add", "this project"),
    "linear": ("least-squares map folded into the projection before the seam", "2505.02819"),
    "ridge": ("least-squares refit of that projection itself", "this project"),
    "rotation": (
        "factor and rotation of the stream, folded into later layers; unties embeddings",
        "this project, folded as 2401.15024 (SliceGPT)",
    ),
    "auto": (
        "the best of all by held-out KL, but for those that add parameters",
        "this project",
    ),
}
"""{name: (sentence, paper)}."""
CANDIDATES: tuple[StitchName, ...] = ("scalar", "linear", "ridge", "rotation")
"""What `auto` tries."""
HELD_OUT_FRACTION = 0.25
"""Share of the calibration blocks that chooses between the stitches and none."""
ERROR_TOKENS = 64
"""Tokens of a held-out block on which folded and inserted logits of the real model are compared."""


def stitch_model(
    student: Decoder,
    parent: Decoder,
    segment: Segment,
    blocks: TokenBlocks,
    settings: StitchSettings,
    stored: torch.dtype | None = None,
) -> dict[str, Any]:
    """Fold the stitch with the lowest held-out KL into `student` in place, if that is lower than without.

    Args:
        student: the cut model.
        parent: the uncut one.
        segment: what was removed.
        blocks: calibration blocks; the last quarter chooses.
        settings: which stitch, and its ridge.
        stored: the format the student is saved in; what is folded is rounded to it before it is measured.

    Returns:
        method: the stitch kept, or `none`.
        kl_nats: {stitch: held-out KL to the parent} of all that were tried, and without one.
        refused: {stitch: why it was not tried}.
        fold_error: {stitch: how far logits of its folded weights are from those of the repair itself, as a share of
            their norm}: the effect of the norms' epsilons, and rounding.
        alpha: {stitch: its factor}.
        added_parameters: {stitch: what untied embeddings add}.
        num_tokens: tokens it was fitted on.

    Raises:
        UserError: the named stitch cannot be folded into this model there, or there are too few blocks.
    """
    fit, choose = _split(blocks)
    asked: list[StitchName] = [name for name in CANDIDATES if settings.method in (name, "auto")]
    seam, refused = rehearse(student, segment.start, asked)
    _require(settings.method, refused)
    repairs = _solved(parent, segment, fit, seam, [name for name in asked if name not in refused], settings.ridge)
    refused |= {name: why for name, repair in repairs.items() if (why := _overturns(repair))}
    _require(settings.method, refused)
    reference = Reference(parent, final_hidden(parent, choose.tokens, batch_size=4, label="parent on stitch blocks"))
    kl: dict[StitchName, Measured] = {"none": _kl(student, choose, reference, "without stitch")}
    errors, added = {}, {}
    few, size = choose.tokens[:1, :ERROR_TOKENS].to(device_of(student.model)), num_parameters(student.model)
    for name in asked:
        if name in refused:
            continue
        inserted = inserted_logits(student, seam, repairs[name], few)
        with contextlib.ExitStack() as undo:
            fold(student, seam, repairs[name], Rewriter(undo, stored))
            errors[name] = relative_difference(logits_of(student, few), inserted)
            added[name] = num_parameters(student.model) - size
            kl[name] = _kl(student, choose, reference, f"with the stitch {name}")
    free: list[StitchName] = [name for name in kl if settings.method == name or not added.get(name)]
    kept = min(free, key=lambda name: kl[name].value)  # of equal ones the first: none
    if kept != "none":
        fold(student, seam, repairs[kept], Rewriter(contextlib.ExitStack(), stored))
    return {
        "method": kept,
        "kl_nats": {name: measured.to_dict() for name, measured in kl.items()},
        "refused": refused,
        "fold_error": errors,
        "alpha": {name: repairs[name].alpha for name in errors if not repairs[name].changes_projection},
        "added_parameters": added,
        "num_tokens": fit.numel(),
    }


def _require(method: StitchName, refused: Mapping[StitchName, str]) -> None:
    if method in refused:
        reason = refused[method]
        raise UserError(
            f"stitch.method={method} is not possible here: {reason} - use --set stitch.method=auto, or none"
        )


def _split(blocks: TokenBlocks) -> tuple[Tensor, TokenBlocks]:
    """Return the tokens that stitches are fitted on, and the blocks that choose between them."""
    held_out = max(2, round(len(blocks) * HELD_OUT_FRACTION))
    if len(blocks) <= held_out:
        raise UserError(
            f"a stitch needs {held_out + 1} calibration blocks, {held_out} of them to choose by, and there are"
            f" {len(blocks)} - raise search.num_blocks, or use --set stitch.method=none"
        )
    tokens, labelled = blocks.tokens[-held_out:], blocks.labelled[-held_out:]
    last = TokenBlocks(tokens, labelled, blocks.source, blocks.num_documents, blocks.dropped)
    return blocks.tokens[:-held_out], last


def _kl(student: Decoder, choose: TokenBlocks, reference: Reference, label: str) -> Measured:
    measured = evaluate(student, choose, reference, label=label).kl_nats
    if measured is None:
        raise AssertionError("a reference was given")
    return measured


def _solved(
    parent: Decoder, segment: Segment, tokens: Tensor, seam: Seam, names: Sequence[StitchName], ridge: float
) -> dict[StitchName, Repair]:
    """Return the repair that each stitch finds in one pass over the tokens."""
    fits = tuple(name for name in names if name in ("linear", "ridge"))
    projection = Projection(seam.projection(parent), seam.factor, fits) if fits else None
    grams = accumulate(parent, segment, tokens, projection) if names else None
    return {name: _solve(name, grams, ridge) for name in names if grams}


def _solve(name: StitchName, grams: Grams, ridge: float) -> Repair:
    if name == "scalar":
        return Repair(alpha=best_scale(grams))
    if name == "rotation":
        alpha, turn_DD = best_rotation(grams)
        return Repair(alpha=alpha, turn_DD=turn_DD)
    change = ridge_change(grams.fits[name], ridge)
    return Repair(outputs_DD=change) if name == "linear" else Repair(inputs_ED=change)


def _overturns(repair: Repair) -> str:
    """Return why a repair must not be folded, or nothing: a norm forgets a factor above 0 alone."""
    return "" if 0 < repair.alpha < math.inf else f"its best factor is {repair.alpha:.3g}, which is not above 0"
