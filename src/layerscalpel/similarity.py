"""Published baselines that read hidden states only: how little a layer, or a run of layers, turns them.

One parent forward per batch collects the cosine between every pair of boundaries. It serves angular distance, block
influence and the report's heat map.

Sources: angular distance arXiv:2403.17887 (last token of each sample), block influence arXiv:2403.03853.

Dimensions: L layers, N blocks, B blocks at once, T tokens, D hidden size.

    similarity = boundary_cosines(decoder, blocks.tokens)
    similarity.angular_distance(start=13, num_removed=6)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812, the name everybody knows it by
from torch import Tensor

from layerscalpel.layers import Decoder, Step, device_of, hidden_at, replay, require_finite
from layerscalpel.losses import Measured, block_mean
from layerscalpel.progress import track


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

    def heat_map(self) -> list[list[float]]:
        """Return the mean cosines [L + 1][L + 1]."""
        return self.mean_NBB.mean(0).tolist()


def _over_blocks(per_block: Tensor) -> Measured:
    return block_mean(per_block, torch.ones_like(per_block))


@torch.no_grad()
def boundary_cosines(decoder: Decoder, tokens: Tensor, *, batch_size: int = 4) -> Similarity:
    """Return the cosines between all pairs of boundaries for token ids [N, T]."""
    means, lasts = [], []
    batches = tokens.split(batch_size)
    for batch in track(batches, "layer similarity", len(batches)):
        mean, last = _batch_cosines(decoder, batch.to(device_of(decoder.model)))
        means.append(mean)
        lasts.append(last)
    return Similarity(torch.cat(means), torch.cat(lasts))


def _batch_cosines(decoder: Decoder, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
    boundaries: list[Tensor] = []

    def keep(i: int, hidden_BTD: Tensor, _step: Step | None = None) -> None:
        require_finite(i, hidden_BTD)
        boundaries.append(F.normalize(hidden_BTD.float(), dim=-1))

    with replay(decoder, keep):
        keep(len(decoder), hidden_at(decoder, tokens_BT, len(decoder)))
    stacked = torch.stack(boundaries, dim=1)  # [B, L + 1, T, D]
    mean = torch.einsum("bitd,bjtd->bij", stacked, stacked) / tokens_BT.shape[1]
    last = torch.einsum("bid,bjd->bij", stacked[:, :, -1], stacked[:, :, -1])
    return mean.double().cpu(), last.double().cpu()
