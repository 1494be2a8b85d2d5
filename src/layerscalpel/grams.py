"""Sums over tokens that every stitch is solved from, taken in one pass over the parent; no activations are kept.

x is the parent's hidden state where the segment starts, y the one where it stops. Whatever a stitch does to x should
bring it to y, each token weighted with 1 / |y|. All have closed forms in a few sums: x^T y and |x|^2 for a scale and a
rotation, f^T f and f^T (y - x) for a change that is linear in features f. Sums are float64.

Source: linear arXiv:2505.02819, the others this project, docs/methods.md#stitch.

Dimensions: B blocks, T tokens, M = B * T tokens in a row, D hidden size, E features: the D outputs of a projection, or
its inputs and, where it has a bias, a one.

    grams = accumulate(parent, Segment(13, 19, 30), tokens, Projection(module, 1.0, ("linear",)))
    change_DD = ridge_change(grams.fits["linear"], ridge=0.01)
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from layerscalpel.hooks import Step, Visit, hidden_at, replay
from layerscalpel.layers import Decoder, device_of
from layerscalpel.memory import free_bytes
from layerscalpel.passes import VisitOf, no_step, pass_blocks
from layerscalpel.progress import track
from layerscalpel.segment import Segment

FREE_FRACTION = 0.5
"""Share of a GPU's free memory that sums may take; larger ones go to the host."""


@dataclass(frozen=True)
class Projection:
    """The last projection before the seam, and the least squares that its tokens are summed for."""

    module: nn.Linear | Conv1D
    factor: float
    """What its output is multiplied with before it is added to the stream."""
    fits: tuple[str, ...]
    """`linear` takes its outputs as features, `ridge` its inputs and a one for its bias."""

    def features(self, inputs_MF: Tensor, outputs_MD: Tensor) -> dict[str, Tensor]:
        """Return {fit: features [M, E]}."""
        found = {}
        if "linear" in self.fits:
            found["linear"] = self.factor * outputs_MD
        if "ridge" in self.fits:
            one = [torch.ones_like(inputs_MF[:, :1])] if self.module.bias is not None else []
            found["ridge"] = self.factor * torch.cat([inputs_MF, *one], dim=1)
        return found

    def sizes(self) -> dict[str, int]:
        """Return {fit: number of features}."""
        inputs, outputs = sizes_of(self.module)
        own = {"linear": outputs, "ridge": inputs + (self.module.bias is not None)}
        return {name: own[name] for name in self.fits}


def sizes_of(module: nn.Linear | Conv1D) -> tuple[int, int]:
    """Return the numbers of inputs and outputs."""
    first, second = module.weight.shape
    return (first, second) if isinstance(module, Conv1D) else (second, first)  # Conv1D keeps [in, out]


@dataclass
class LeastSquares:
    """What a change that is linear in features is solved from: sums of w f^T f and w f^T (y - x), float64."""

    inner_EE: Tensor
    outer_ED: Tensor


@dataclass
class Grams:
    """Weighted sums over tokens, float64."""

    cross_DD: Tensor
    """Of w x^T y."""
    energy: Tensor
    """Of w |x|^2."""
    fits: dict[str, LeastSquares]
    num_tokens: int = 0

    @classmethod
    def empty(cls, width: int, sizes: dict[str, int], device: torch.device) -> Grams:
        """Return sums of no tokens for hidden size D and {fit: number of features}."""
        options = {"dtype": torch.float64, "device": device}
        fits = {
            name: LeastSquares(torch.zeros(size, size, **options), torch.zeros(size, width, **options))
            for name, size in sizes.items()
        }
        return cls(torch.zeros(width, width, **options), torch.zeros((), **options), fits)

    def add(self, given_MD: Tensor, wanted_MD: Tensor, features: dict[str, Tensor]) -> None:
        """Add tokens in float64: hidden states at the seam, those wanted there, and the features [M, E] of each fit."""
        weight_M = 1 / wanted_MD.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        self.cross_DD.addmm_((given_MD * weight_M).T, wanted_MD)
        self.energy += (given_MD.square() * weight_M).sum()
        for name, fit in self.fits.items():
            weighted_EM = (features[name] * weight_M).T
            fit.inner_EE.addmm_(weighted_EM, features[name])
            fit.outer_ED.addmm_(weighted_EM, wanted_MD - given_MD)
        self.num_tokens += len(given_MD)


def sums_device(device: torch.device, width: int, sizes: dict[str, int]) -> torch.device:
    """Return where the sums are kept: on a GPU that has room for them, else on the host."""
    numbers = width * width + sum(size * (size + width) for size in sizes.values())
    fits = device.type == "cuda" and 8 * numbers < FREE_FRACTION * free_bytes(device)
    return device if fits else torch.device("cpu")


@torch.no_grad()
def accumulate(
    parent: Decoder, segment: Segment, tokens: Tensor, projection: Projection | None = None, *, batch_size: int = 4
) -> Grams:
    """Return the sums over token ids [N, T], in one pass; nothing after the segment is computed.

    Args:
        parent: in memory, or with layers that come in one by one; then hidden states at the seam wait on the host.
        segment: the layers between x and y.
        tokens: token ids [N, T].
        projection: the parent's last before the segment, for stitches that change it.
        batch_size: blocks per forward.
    """
    sizes, device = projection.sizes() if projection else {}, device_of(parent.model)
    grams = Grams.empty(parent.hidden_size, sizes, sums_device(device, parent.hidden_size, sizes))
    caught: deque[tuple[Tensor, ...]] = deque()  # batches pass a layer in order: the first in is the first out
    at_seam: dict[int, tuple[Tensor, ...]] = {}
    aside = torch.device("cpu") if parent.resident else device

    def catch(_module: nn.Module, args: tuple, output: Tensor) -> None:
        around = (rows.flatten(0, -2).to(aside, copy=True) for rows in (args[0], output))  # Llama 4 adds in place
        caught.append(tuple(around))

    def visit_of(number: int) -> Visit:
        def visit(i: int, hidden_BTD: Tensor, _step: Step) -> None:
            if i == segment.start:
                at_seam[number] = hidden_BTD.flatten(0, 1).to(aside), *(caught.popleft() if projection else ())
            if i == segment.stop:
                given, *around = (_wide(rows, grams.cross_DD) for rows in at_seam.pop(number))
                features = projection.features(*around) if projection else {}
                grams.add(given, _wide(hidden_BTD.flatten(0, 1), grams.cross_DD), features)

        return visit

    handle = projection.module.register_forward_hook(catch) if projection else None
    try:
        _pass_up_to(parent, segment.stop, tokens.split(batch_size), visit_of)
    finally:
        if handle:
            handle.remove()
    return grams


def _wide(rows: Tensor, like: Tensor) -> Tensor:
    return rows.to(like.device).to(like.dtype)  # one after the other: some devices have no float64


def _pass_up_to(parent: Decoder, boundary: int, batches: tuple[Tensor, ...], visit_of: VisitOf) -> None:
    label = "fitting the stitch"
    if parent.resident is not None:
        for _ in pass_blocks(parent, batches, visit_of, label=label):
            pass
        return
    for number, tokens_BT in enumerate(track(batches, label, len(batches))):
        visit = visit_of(number)
        with replay(parent, visit):
            hidden = hidden_at(parent, tokens_BT.to(device_of(parent.model)), boundary)
        visit(boundary, hidden, no_step)


def best_scale(grams: Grams) -> float:
    """Return the alpha that brings alpha x closest to y."""
    return float(grams.cross_DD.trace() / grams.energy)


def best_rotation(grams: Grams) -> tuple[float, Tensor]:
    """Return alpha and the orthogonal Q [D, D], float64, that bring alpha x Q closest to y (weighted Procrustes)."""
    left_DD, stretch_D, right_DD = torch.linalg.svd(grams.cross_DD)
    return float(stretch_D.sum() / grams.energy), left_DD @ right_DD


def ridge_change(fit: LeastSquares, ridge: float) -> Tensor:
    """Return the change C [E, D], float64, that brings x + f C closest to y.

    Args:
        fit: the sums.
        ridge: draws C to 0, as a share of the mean diagonal of the inner sums; 0 takes the smallest C of the best.
    """
    inner_EE, outer_ED = fit.inner_EE, fit.outer_ED
    if ridge > 0:
        damping_E = (ridge * inner_EE.diagonal().mean()).expand(len(inner_EE))
        factor_EE, failed = torch.linalg.cholesky_ex(inner_EE + damping_E.diag())
        if not failed:
            return torch.cholesky_solve(outer_ED, factor_EE)
    return torch.linalg.lstsq(inner_EE.cpu(), outer_ED.cpu(), driver="gelsd").solution.to(outer_ED.device)
