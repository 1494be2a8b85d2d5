"""Repair the seam without training: one least-squares map, folded into a weight that is there already.

The layer before the seam ends by adding M, the output of its last projection, to the residual stream. The map T that
brings x + M T closest to what entered the layer after the segment in the parent is fitted in one pass (ReplaceMe,
arXiv:2505.02819, with the ridge drawn to the identity rather than to zero) and multiplied into that projection, so the
checkpoint keeps its plain form. It is kept only if it lowers the KL on blocks it was not fitted on.

Grams are summed in float64, token by token weighted with 1 / |y|; activations are never stored.

Dimensions: B blocks, T tokens, D hidden size, M = B * T tokens in a row.

    found = stitch_model(student, parent, Segment(13, 19, 30), blocks, StitchSettings("linear"))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from layerscalpel.data import TokenBlocks
from layerscalpel.errors import UserError
from layerscalpel.evaluate import Reference, evaluate, final_hidden
from layerscalpel.hooks import hidden_at, hidden_in, replay
from layerscalpel.layers import Decoder, device_of
from layerscalpel.progress import track
from layerscalpel.segment import Segment
from layerscalpel.settings import StitchName, StitchSettings

STITCHES: dict[StitchName, tuple[str, str]] = {
    "none": ("no repair before healing (default)", "none"),
    "linear": ("least-squares map folded into the projection before the seam", "2505.02819"),
}
"""{name: (sentence, paper)}."""
HELD_OUT_FRACTION = 0.25
"""Share of the calibration blocks that chooses between stitch and none."""


def stitch_model(
    student: Decoder, parent: Decoder, segment: Segment, blocks: TokenBlocks, settings: StitchSettings
) -> dict[str, Any]:
    """Fold the stitch into `student` in place if it lowers the held-out KL; return which was kept and both KLs.

    Raises:
        UserError: the segment starts at layer 0, the layer before it has no projection that a map can be folded in, or
            there are too few blocks.
    """
    if segment.start == 0:
        raise UserError(
            "a stitch needs a layer before the seam, and this segment starts at layer 0 - use --set stitch.method=none"
        )
    held_out = max(2, round(len(blocks) * HELD_OUT_FRACTION))
    if len(blocks) <= held_out:
        raise UserError(
            f"a stitch needs {held_out + 1} calibration blocks, {held_out} of them to choose by, and there are"
            f" {len(blocks)} - raise search.num_blocks, or use --set stitch.method=none"
        )
    fit, choose = blocks.tokens[:-held_out], _last(blocks, held_out)
    reference = Reference(parent, final_hidden(parent, choose.tokens, batch_size=4, label="parent on stitch blocks"))
    before = evaluate(student, choose, reference, label="without stitch").kl_nats
    projection = last_projection(student, segment.start - 1)
    grams = accumulate(parent, segment, fit)
    change = ridge_change(grams, settings.ridge)
    original = projection.weight.detach().clone(), None if projection.bias is None else projection.bias.detach().clone()
    fold(projection, change)
    after = evaluate(student, choose, reference, label="with stitch").kl_nats
    if before is None or after is None:
        raise AssertionError("a reference was given")
    kept = "linear" if after.value < before.value else "none"
    if kept == "none":
        _restore(projection, *original)
    return {"method": kept, "kl_nats": {"none": before.to_dict(), "linear": after.to_dict()}}


def _last(blocks: TokenBlocks, count: int) -> TokenBlocks:
    return TokenBlocks(
        blocks.tokens[-count:], blocks.labelled[-count:], blocks.source, blocks.num_documents, blocks.dropped
    )


def last_projection(decoder: Decoder, layer: int) -> nn.Linear | Conv1D:
    """Find the projection whose output a layer adds to the residual stream last, by trying what a nudge does.

    Raises:
        UserError: no projection's output arrives unchanged at the layer's end (norms after it, several experts).
    """
    width = decoder.hidden_size
    block = decoder.layers[layer]
    for module in reversed(list(block.modules())):
        if not isinstance(module, (nn.Linear, Conv1D)) or module.weight.shape[_out_axis(module)] != width:
            continue
        if _nudge_arrives(decoder, layer, module):
            return module
    raise UserError(
        f"no projection of {type(block).__name__} adds straight to the residual stream"
        " - a linear stitch cannot be folded into this family - use --set stitch.method=none"
    )


def _out_axis(module: nn.Linear | Conv1D) -> int:
    return 1 if isinstance(module, Conv1D) else 0  # Conv1D keeps [in, out]


@torch.no_grad()
def _nudge_arrives(decoder: Decoder, layer: int, module: nn.Module) -> bool:
    tokens = torch.arange(3, 11, device=device_of(decoder.model))[None]
    width = decoder.hidden_size
    nudge = torch.randn(width, generator=torch.Generator().manual_seed(0)).to(device_of(decoder.model))
    plain = hidden_at(decoder, tokens, layer + 1)
    nudge = nudge.to(plain.dtype) * plain.float().std().item()

    def push(_module: nn.Module, _args: Any, output: Any) -> Tensor:
        return output + nudge

    handle = module.register_forward_hook(push)
    try:
        nudged = hidden_at(decoder, tokens, layer + 1)
    finally:
        handle.remove()
    return torch.allclose((nudged - plain).float(), nudge.float().expand_as(plain), rtol=0.05, atol=1e-3)


@dataclass
class Grams:
    """Weighted sums over tokens, float64: M^T M and M^T (y - x) with x the seam's input and y what it should be."""

    inner_DD: Tensor
    outer_DD: Tensor
    num_tokens: int = 0

    def add(self, projected_MD: Tensor, given_MD: Tensor, wanted_MD: Tensor) -> None:
        """Add tokens: the projection's output, the hidden state at the seam, and the one wanted there."""
        weight_M = 1 / wanted_MD.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        self.inner_DD += (projected_MD * weight_M).T @ projected_MD
        self.outer_DD += (projected_MD * weight_M).T @ (wanted_MD - given_MD)
        self.num_tokens += len(projected_MD)


@torch.no_grad()
def accumulate(parent: Decoder, segment: Segment, tokens: Tensor, *, batch_size: int = 4) -> Grams:
    """Return the Grams of the parent's hidden states at both ends of the segment, in one pass."""
    width = parent.hidden_size
    grams = Grams(torch.zeros(width, width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64))
    projection = last_projection(parent, segment.start - 1)
    seen: dict[str, Tensor] = {}

    def catch(_module: nn.Module, _args: Any, output: Any) -> None:
        seen["projected"] = output

    handle = projection.register_forward_hook(catch)

    def keep(i: int, hidden_BTD: Tensor, _step: Any) -> None:
        if i == segment.start:
            seen["given"] = hidden_BTD

    batches = tokens.split(batch_size)
    try:
        for batch in track(batches, "fitting the stitch", len(batches)):
            with replay(parent, keep):
                seen["wanted"] = hidden_at(parent, batch.to(device_of(parent.model)), segment.stop)
            rows = {name: hidden_in(item).flatten(0, 1).double().cpu() for name, item in seen.items()}
            grams.add(rows["projected"].view(-1, width), rows["given"], rows["wanted"])
    finally:
        handle.remove()
    return grams


def ridge_change(grams: Grams, ridge: float) -> Tensor:
    """Return T - 1 [D, D], float64: the least-squares change of the map, drawn to 0 by the ridge."""
    scale = ridge * grams.inner_DD.diagonal().mean()
    damped = grams.inner_DD + scale * torch.eye(len(grams.inner_DD), dtype=torch.float64)
    return torch.linalg.lstsq(damped, grams.outer_DD).solution  # the smallest one where the Gram is singular


@torch.no_grad()
def fold(projection: nn.Linear | Conv1D, change_DD: Tensor) -> None:
    """Multiply 1 + change into a projection, so that its output y becomes y (1 + change)."""
    map_DD = change_DD + torch.eye(len(change_DD), dtype=torch.float64)
    weight = projection.weight.double().cpu()
    folded = weight @ map_DD if isinstance(projection, Conv1D) else map_DD.T @ weight
    projection.weight.copy_(folded)
    if projection.bias is not None:
        projection.bias.copy_(projection.bias.double().cpu() @ map_DD)


@torch.no_grad()
def _restore(projection: nn.Linear | Conv1D, weight: Tensor, bias: Tensor | None) -> None:
    projection.weight.copy_(weight)
    if bias is not None:
        projection.bias.copy_(bias)
