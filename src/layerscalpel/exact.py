"""Score candidate cuts in one parent forward.

The score of a cut is the mean over tokens of KL(parent || parent without the layers), in nats. While the parent runs,
every candidate is advanced beside it (streams.py): for the windows of n layers (L - n)(L - n + 1) / 2 layer passes
beside the parent's L, in place of the (L - n) W of one forward per window. At the end each candidate goes through the
model's own head, chunk by chunk, and is compared with the parent.

Source: this project, docs/methods.md#exact.

Dimensions: R removals, W windows, N blocks, B blocks at once, T tokens, D hidden size, V vocabulary.

    scores = score_windows(decoder, blocks.tokens, num_removed=6)
    scores.mean(13)  # Measured(value=0.72, se=0.01, n=65536), nats
"""

from __future__ import annotations

import math
from collections.abc import Hashable, MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerscalpel import parallel
from layerscalpel.errors import UserError
from layerscalpel.hooks import Step, Visit, head_logits
from layerscalpel.layers import Decoder
from layerscalpel.losses import Measured, block_mean, kl_to_parent, log_probabilities, token_chunks
from layerscalpel.passes import VisitOf, nobody, pass_blocks
from layerscalpel.segment import segments_of, spoken
from layerscalpel.streams import Removal, Streams, window


@dataclass(frozen=True)
class WindowScores:
    """KL to the parent of windows of one length."""

    starts: tuple[int, ...]
    num_removed: int
    kl_WN: Tensor
    """Mean KL over a block's tokens, in nats, float64, on the CPU; NaN where a window did not see a block."""
    block_tokens: int

    def blocks(self, start: int) -> int:
        """Return how many blocks a window saw: the first ones."""
        return int(self._row(start).isfinite().sum())

    def mean(self, start: int) -> Measured:
        """Return the mean KL of the window that begins at `start`, over the blocks it saw."""
        return self._over_blocks(self._row(start))

    def best(self) -> int:
        """Return the start with the lowest mean KL, the smaller one of equals."""
        return self.starts[int(self.kl_WN.nanmean(dim=1).argmin())]

    def margin(self, start: int, other: int) -> Measured:
        """Return the mean of KL(other) - KL(start), paired over the blocks that both saw."""
        return self._over_blocks(self._row(other) - self._row(start))

    def only(self, starts: Sequence[int]) -> WindowScores:
        """Return the scores of some of the windows."""
        rows = [self.starts.index(start) for start in starts]
        return WindowScores(tuple(starts), self.num_removed, self.kl_WN[rows], self.block_tokens)

    def to_dict(self) -> dict[str, dict[str, float | int | None]]:
        """Return {start: {kl_nats, se, num_blocks}}."""
        found = {}
        for start in self.starts:
            mean = self.mean(start).to_dict()
            found[str(start)] = {"kl_nats": mean["value"], "se": mean["se"], "num_blocks": self.blocks(start)}
        return found

    def _row(self, start: int) -> Tensor:
        return self.kl_WN[self.starts.index(start)]

    def _over_blocks(self, row: Tensor) -> Measured:
        seen = row[row.isfinite()]
        return block_mean(seen, torch.full_like(seen, self.block_tokens))


def score_windows(
    decoder: Decoder,
    tokens: Tensor,
    *,
    num_removed: int,
    batch_size: int = 4,
    starts: Sequence[int] | None = None,
) -> WindowScores:
    """Return KL(parent || parent without the window) for windows of `num_removed` layers.

    Args:
        decoder: the parent.
        tokens: [N, T] token ids.
        num_removed: n, 1 .. L - 1.
        batch_size: blocks per parent forward; changes the scores by rounding only.
        starts: the windows to score; None is all, 0 .. L - n.

    Raises:
        UserError: as `score`.
    """
    wanted = tuple(sorted(set(starts))) if starts is not None else tuple(range(len(decoder) - num_removed + 1))
    kl_WN = score(decoder, tokens, [window(start, num_removed) for start in wanted], batch_size=batch_size)
    return WindowScores(wanted, num_removed, kl_WN, tokens.shape[1])


@torch.no_grad()
def score(
    decoder: Decoder,
    tokens: Tensor,
    removals: Sequence[Removal],
    *,
    batch_size: int = 4,
    store: MutableMapping[Hashable, Tensor] | None = None,
    watch: VisitOf = nobody,
) -> Tensor:
    """Return KL(parent || parent without the layers) [R, N] per block, float64, on the CPU.

    Where several processes were launched, each scores its share of the batches and all return the same.

    Args:
        decoder: the parent.
        tokens: [N, T] token ids.
        removals: the candidates, each a tuple of removed layers, ascending, not empty.
        batch_size: blocks per parent forward; changes the scores by rounding only.
        store: where hidden states wait while layers come in one by one.
        watch: gives a further visitor for each batch of this process.

    Raises:
        UserError: the output of a layer, or of the model without the layers, is not finite.
    """
    size = min(batch_size, math.ceil(len(tokens) / parallel.world()))
    spans = [slice(at, at + size) for at in range(0, len(tokens), size)][parallel.rank() :: parallel.world()]
    store = {} if store is None else store
    streams: dict[int, Streams] = {}

    def visit_of(number: int) -> Visit:
        streams[number] = Streams(removals, len(decoder), store=store, name=number)
        return _both(streams[number].visit, watch(number))

    kl_RN = torch.zeros(len(removals), len(tokens), dtype=torch.float64)
    passed = pass_blocks(
        decoder, [tokens[span] for span in spans], visit_of, store=store, label=f"{len(removals)} candidates"
    )
    for number, parent_BTD in passed:
        kl_RN[:, spans[number]] = _compare(decoder, parent_BTD, streams.pop(number), removals)
    return parallel.add_up(kl_RN)


def _both(first: Visit, second: Visit) -> Visit:
    def visit(i: int, hidden_BTD: Tensor, step: Step) -> None:
        first(i, hidden_BTD, step)
        second(i, hidden_BTD, step)

    return visit


def _compare(decoder: Decoder, parent_BTD: Tensor, streams: Streams, removals: Sequence[Removal]) -> Tensor:
    """Return the KL [R, B] of a batch from the hidden states at boundary L; the states are forgotten."""
    batch, length = parent_BTD.shape[:2]
    sums_CRB = []
    for part in token_chunks(batch, length, decoder.vocab_size, parent_BTD.device):
        parent = log_probabilities(head_logits(decoder, parent_BTD[:, part]))
        probs = parent.exp()
        rows = []
        for removal in removals:
            child = log_probabilities(head_logits(decoder, streams.final(removal)[:, part]))
            rows.append(kl_to_parent(parent, child, probs).sum(-1))
        sums_CRB.append(torch.stack(rows).cpu().double())
    streams.forget()
    kl_RB = torch.stack(sums_CRB).sum(0) / length
    void = [removal for removal, row in zip(removals, kl_RB, strict=True) if not row.isfinite().all()]
    if void:
        where = spoken(segments_of(void[0], len(decoder)))
        raise UserError(f"without {where} the model's output is not finite - try another --dtype")
    return kl_RB
