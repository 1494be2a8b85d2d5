"""Score every window of n layers in one parent forward.

The window that starts at s skips the layers [s, s + n): its stream is the parent's hidden state at boundary s, entered
into layer s + n. While the parent runs, each layer i therefore also advances the streams s = 0 .. i - n, stacked in the
batch: (L - n)(L - n + 1) / 2 layer passes beside the parent's L, in place of the (L - n) W of one forward per window.
At the end each stream goes through the model's own head, chunk by chunk, and is compared with the parent.

Source: this project, docs/methods.md#exact.

Dimensions: W windows, N blocks, B blocks at once, T tokens, D hidden size, V vocabulary.

    scores = score_windows(decoder, blocks.tokens, num_removed=6)
    scores.mean(13)  # Measured(value=0.72, se=0.01, n=65536), nats
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerscalpel.errors import UserError
from layerscalpel.layers import Decoder, Step, device_of, head_logits, hidden_at, replay, require_finite
from layerscalpel.losses import Measured, block_mean, kl_to_parent, log_probabilities, token_chunks
from layerscalpel.progress import track


@dataclass(frozen=True)
class WindowScores:
    """KL to the parent of windows of one length."""

    starts: tuple[int, ...]
    num_removed: int
    kl_WN: Tensor
    """Mean KL over a block's tokens, in nats, float64, on the CPU."""
    block_tokens: int

    def mean(self, start: int) -> Measured:
        """Return the mean KL of the window that begins at `start`."""
        row = self.kl_WN[self.starts.index(start)]
        return block_mean(row, torch.full_like(row, self.block_tokens))

    def best(self) -> int:
        """Return the start with the lowest mean KL, the smaller one of equals."""
        return self.starts[int(self.kl_WN.mean(dim=1).argmin())]

    def margin(self, start: int, other: int) -> Measured:
        """Return the mean of KL(other) - KL(start), paired over blocks."""
        difference = self.kl_WN[self.starts.index(other)] - self.kl_WN[self.starts.index(start)]
        return block_mean(difference, torch.full_like(difference, self.block_tokens))

    def to_dict(self) -> dict[str, dict[str, float | None]]:
        """Return {start: {kl_nats, se}}."""
        means = {start: self.mean(start).to_dict() for start in self.starts}
        return {str(start): {"kl_nats": mean["value"], "se": mean["se"]} for start, mean in means.items()}


@torch.no_grad()
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
        UserError: the output of a layer, or of the model without a window, is not finite.
    """
    wanted = tuple(sorted(set(starts))) if starts is not None else tuple(range(len(decoder) - num_removed + 1))
    batches = tokens.split(batch_size)
    scored = [
        _score_batch(decoder, batch.to(device_of(decoder.model)), num_removed, wanted)
        for batch in track(batches, f"exact search n={num_removed}", len(batches))
    ]
    return WindowScores(wanted, num_removed, torch.cat(scored, dim=1), tokens.shape[1])


def _score_batch(decoder: Decoder, tokens_BT: Tensor, num_removed: int, starts: tuple[int, ...]) -> Tensor:
    """Return the KL [W, B] of a batch, float64 on the CPU."""
    streams = _Streams(num_removed, starts)
    with replay(decoder, streams.visit):
        parent_hidden = hidden_at(decoder, tokens_BT, len(decoder))
    require_finite(len(decoder), parent_hidden)
    sums = torch.zeros(len(starts), len(tokens_BT), dtype=torch.float64, device=tokens_BT.device)
    batch, length = tokens_BT.shape
    for part in token_chunks(batch, length, decoder.vocab_size, tokens_BT.device):
        parent = log_probabilities(head_logits(decoder, parent_hidden[:, part]))
        probs = parent.exp()
        for row in range(len(starts)):
            child = log_probabilities(head_logits(decoder, streams.hidden_WBTD[row, :, part]))
            sums[row] += kl_to_parent(parent, child, probs).sum(-1)
    void = [start for start, row in zip(starts, sums, strict=True) if not row.isfinite().all()]
    if void:
        window = f"[{void[0]}, {void[0] + num_removed})"
        raise UserError(f"without the segment {window} the model's output is not finite - try another --dtype")
    return sums.cpu() / tokens_BT.shape[1]


class _Streams:
    """The hidden states of all windows while a parent forward passes by; row w is the window of starts[w].

    A row is filled when its boundary passes, waits for its window to end, and is advanced by every layer after it.
    """

    def __init__(self, num_removed: int, starts: tuple[int, ...]) -> None:
        self.num_removed = num_removed
        self.starts = starts
        self.hidden_WBTD = torch.empty(0)

    def visit(self, i: int, hidden_BTD: Tensor, step: Step) -> None:
        require_finite(i, hidden_BTD)
        self.enter(i, hidden_BTD)
        live = sum(start + self.num_removed <= i for start in self.starts)  # starts are ascending
        if live:
            self.hidden_WBTD[:live] = step(self.hidden_WBTD[:live].flatten(0, 1)).unflatten(0, (live, -1))

    def enter(self, boundary: int, hidden_BTD: Tensor) -> None:
        if self.hidden_WBTD.numel() == 0:
            self.hidden_WBTD = hidden_BTD.new_empty(len(self.starts), *hidden_BTD.shape)
        if boundary in self.starts:
            self.hidden_WBTD[self.starts.index(boundary)] = hidden_BTD
