"""Published baselines that read hidden states only: how little a layer, or a run of layers, turns them.

One pass collects the cosine between every pair of boundaries. It serves angular distance, block influence and the
report's heat map; a search that scores windows has it for nothing, by a watch on its first pass.

Sources: angular distance arXiv:2403.17887 (last token of each sample), block influence arXiv:2403.03853.

Dimensions: L layers, N blocks, B blocks at once, T tokens, D hidden size.

    similarity = boundary_cosines(decoder, blocks.tokens)
    similarity.angular_distance(start=13, num_removed=6)
"""

from __future__ import annotations

import math
from collections.abc import Hashable, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812, the name everybody knows it by
from torch import Tensor

from layerscalpel import parallel
from layerscalpel.hooks import FiniteWatch, Step, Visit
from layerscalpel.layers import Decoder
from layerscalpel.losses import Measured, block_mean
from layerscalpel.passes import pass_blocks

FEW_POSITIONS = 32
"""Positions of a block whose hidden states are kept at every boundary where memory is short."""


@dataclass(frozen=True)
class Similarity:
    """Cosines between the hidden states at boundaries 0..L, per block, float64 on the CPU."""

    mean_NBB: Tensor
    """[N, L + 1, L + 1] mean over a block's tokens."""
    last_NBB: Tensor
    """[N, L + 1, L + 1] of each block's last token."""

    def angular_distance(self, start: int, num_removed: int) -> Measured:
        """Return arccos(cosine) / pi, 0..1, between boundaries start and start + n, over the blocks' last tokens."""
        cosines = self.last_NBB[:, start, start + num_removed].clamp(-1, 1)
        return _over_blocks(torch.arccos(cosines) / math.pi)

    def block_influence(self, layer: int) -> Measured:
        """Return 1 - cosine between a layer's input and output, over all tokens."""
        return _over_blocks(1 - self.mean_NBB[:, layer, layer + 1])

    def influences(self) -> dict[str, Any]:
        """Return {layer: its block influence} as plain values."""
        return {str(i): self.block_influence(i).to_dict() for i in range(self.mean_NBB.shape[1] - 1)}

    def angles(self, num_removed: int) -> dict[str, Any]:
        """Return {start: angular distance of the window's ends} as plain values."""
        last_start = self.last_NBB.shape[1] - 1 - num_removed
        return {str(s): self.angular_distance(s, num_removed).to_dict() for s in range(last_start + 1)}

    def heat_map(self) -> list[list[float]]:
        """Return the mean cosines [L + 1][L + 1]."""
        return self.mean_NBB.mean(0).tolist()


def _over_blocks(per_block: Tensor) -> Measured:
    return block_mean(per_block, torch.ones_like(per_block))


class BoundaryWatch:
    """Collects the cosines of every batch of a pass, as its visitors see the boundaries go by."""

    def __init__(self, decoder: Decoder, most_positions: int | None = None) -> None:
        """Watch a decoder.

        Args:
            decoder: whose boundaries are seen.
            most_positions: positions of a block that are kept, evenly spaced, the last one included; None keeps all.
        """
        self.num_layers = len(decoder)
        self.most_positions = most_positions
        self.found: dict[int, tuple[Tensor, Tensor]] = {}

    def visit_of(self, number: int) -> Visit:
        """Return the visitor of a batch."""
        boundaries: list[Tensor] = []
        finite = FiniteWatch()

        def visit(i: int, hidden_BTD: Tensor, _step: Step) -> None:
            finite.look(hidden_BTD)
            boundaries.append(F.normalize(self._positions(hidden_BTD).float(), dim=-1))
            if i == self.num_layers:
                finite.require()
                self.found[number] = _cosines(torch.stack(boundaries, dim=1))
                boundaries.clear()

        return visit

    def _positions(self, hidden_BTD: Tensor) -> Tensor:
        length = hidden_BTD.shape[1]
        if self.most_positions is None or length <= self.most_positions:
            return hidden_BTD
        return hidden_BTD[:, torch.linspace(0, length - 1, self.most_positions).round().long()]

    def similarity(self) -> Similarity:
        """Return the cosines of all batches that have passed, of all processes."""
        parts = [part for found in parallel.gather(list(self.found.values())) for part in found]
        return Similarity(torch.cat([mean for mean, _ in parts]), torch.cat([last for _, last in parts]))


def boundary_cosines(
    decoder: Decoder, tokens: Tensor, *, batch_size: int = 4, store: MutableMapping[Hashable, Tensor] | None = None
) -> Similarity:
    """Return the cosines between all pairs of boundaries for token ids [N, T].

    Where layers come in one by one (`store`), 32 positions of a block are kept instead of all.
    """
    watch = BoundaryWatch(decoder, FEW_POSITIONS if decoder.resident else None)
    mine = tokens.split(batch_size)[parallel.rank() :: parallel.world()]
    for _ in pass_blocks(decoder, mine, watch.visit_of, store=store, label="layer similarity"):
        pass
    return watch.similarity()


def _cosines(unit_BLTD: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosines [B, L + 1, L + 1], of the mean over positions and of the last position."""
    mean = torch.einsum("bitd,bjtd->bij", unit_BLTD, unit_BLTD) / unit_BLTD.shape[2]
    last = torch.einsum("bid,bjd->bij", unit_BLTD[:, :, -1], unit_BLTD[:, :, -1])
    return mean.double().cpu(), last.double().cpu()
