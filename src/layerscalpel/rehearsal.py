"""Prove the folds of stitches on a tiny twin before real weights change, and find what keeps a model from one.

The twin has the cut model's class, layer count and per-layer rules, and here its norms have no epsilon. A stitch passes
if logits of folded weights are those of the repair inserted at the seam, for a random repair that is far from nothing.

Source: this project, docs/methods.md#stitch.

    seam, refused = rehearse(student, start=13, names=["scalar", "rotation"])
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from layerscalpel.cut import proof_tokens
from layerscalpel.errors import UserError
from layerscalpel.fold import Rewriter, fold
from layerscalpel.grams import sizes_of
from layerscalpel.layers import REFUSALS, Decoder
from layerscalpel.probe import find_layers
from layerscalpel.progress import say
from layerscalpel.seam import Repair, Seam, find_seam, inserted
from layerscalpel.settings import StitchName
from layerscalpel.twin import twin_model

MOST_DIFFERENCE = 1e-5
"""Of folded from inserted logits, as a share of their norm."""
MOST_IN_16_BIT = 0.05
"""The same for a model in 16 bit of which no twin can be built."""
PLAIN = ("Linear", "Conv1D")
"""Classes of projections that a change can be folded into."""


@torch.no_grad()
def rehearse(student: Decoder, start: int, names: Iterable[StitchName]) -> tuple[Seam, dict[StitchName, str]]:
    """Find what a stitch of a cut decoder's boundary `start` has to do with, and prove the folds.

    Returns:
        What was found, and {name: why not} of the stitches that cannot be folded into this model there.
    """
    refused: dict[StitchName, str] = {}
    subject = _twin(student) or student
    with without_epsilons(subject.model):
        seam = find_seam(subject, start)
        for name in names:
            place = _place_refuses(name, start, len(student))
            own = place or _obstacle(name, seam) or seam.unlike(student) or _prove(subject, seam, name)
            if own:
                refused[name] = own if place else f"{type(student.model).__name__}: {own}"
    return seam, refused


def _twin(student: Decoder) -> Decoder | None:
    """Return a twin in float64, or float32 where the family computes in nothing wider; None if it cannot be built."""
    try:
        model = twin_model(student.model.config)
        for in_format in (model.double, model.float):
            with contextlib.suppress(*REFUSALS):
                twin = find_layers(in_format())
                logits_of(twin, proof_tokens(twin))
                return twin
        reason = "it does not run"
    except UserError as error:
        reason = str(error)
    say(f"no tiny twin of {type(student.model).__name__} ({reason}): its stitches are proven on the model itself")
    return None


@contextlib.contextmanager
def without_epsilons(model: nn.Module) -> Iterator[None]:
    """Within, the epsilons of all norms are 0, so that they forget the length of what they read."""
    found = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, float) and re.fullmatch(r"(\w+_)?eps(ilon)?", name)
    ]
    for module, name, _value in found:
        setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, value in found:
            setattr(module, name, value)


def _place_refuses(name: StitchName, start: int, depth: int) -> str:
    if name in ("linear", "ridge") and start == 0:
        return "it needs a layer before the seam, and this segment starts at layer 0"
    if name == "scalar" and start == depth:
        return "no layer follows the seam, and the final norm forgets a factor"
    return ""


def _obstacle(name: StitchName, seam: Seam) -> str:
    """Return what of the parts found a stitch cannot be folded into, or nothing."""
    if name in ("linear", "ridge"):
        last = seam.last
        plain = last and last.kind in PLAIN and last.factor and last.axes
        found = f"{last.kind} is what adds to it last" if last else "nothing is found that adds to it"
        return "" if plain else f"no plain projection adds to the residual stream last before the seam ({found})"
    found = {writer.kind for writer in seam.after.writers if not (writer.offsets if name == "scalar" else writer.axes)}
    if found:
        verb = "scaled" if name == "scalar" else "turned"
        return f"what {', '.join(sorted(found))} adds to the residual stream cannot be {verb} by its parameters"
    if name == "rotation" and (found := {norm.kind for norm in seam.after.norms if not norm.turns}):
        return f"{', '.join(sorted(found))} reads the residual stream and is not the same in every basis"
    if name == "rotation" and (found := {norm.kind for norm in seam.after.norms if not norm.readers}):
        return f"nothing is found that reads through {', '.join(sorted(found))}"
    return ""


def _prove(subject: Decoder, seam: Seam, name: StitchName) -> str:
    """Return what is wrong with a fold, or nothing."""
    tokens, repair = proof_tokens(subject), _random_repair(subject, seam, name)
    wanted = inserted_logits(subject, seam, repair, tokens)
    try:
        with contextlib.ExitStack() as undo:
            fold(subject, seam, repair, Rewriter(undo))
            found = relative_difference(logits_of(subject, tokens), wanted)
    except UserError as error:
        return str(error)
    most = MOST_DIFFERENCE if torch.finfo(wanted.dtype).eps < 1e-5 else MOST_IN_16_BIT
    if found <= most:
        return ""
    return f"logits of the folded weights differ from those of the repair itself by {found:.1e} of their norm"


def _random_repair(subject: Decoder, seam: Seam, name: StitchName) -> Repair:
    generator, width = torch.Generator().manual_seed(0), subject.hidden_size

    def draw(size: int) -> Tensor:
        return torch.randn(size, width, dtype=torch.float64, generator=generator)

    if name == "scalar":
        return Repair(alpha=2.0)  # exact in every format, so that no rounding grows on the way to the logits
    if name == "rotation":
        return Repair(alpha=0.6, turn_DD=torch.linalg.qr(draw(width))[0])
    if name == "linear":
        return Repair(outputs_DD=0.5 * draw(width) / width**0.5)
    module = seam.projection(subject)
    size = sizes_of(module)[0] + (module.bias is not None)
    return Repair(inputs_ED=0.5 * draw(size) * module.weight.double().std().item())


def inserted_logits(decoder: Decoder, seam: Seam, repair: Repair, tokens: Tensor) -> Tensor:
    """Return the logits [B, T, V] with a repair inserted at the seam."""
    with inserted(decoder, seam, repair):
        return logits_of(decoder, tokens)


@torch.no_grad()
def logits_of(decoder: Decoder, tokens: Tensor) -> Tensor:
    """Return the logits [B, T, V] of token ids [B, T]."""
    return decoder.model(input_ids=tokens, use_cache=False).logits


def relative_difference(one: Tensor, other: Tensor) -> float:
    """Return the norm of a difference as a share of the norm of the second."""
    one, other = one.cpu().double(), other.cpu().double()
    return float((one - other).norm() / other.norm())
