"""Small pure functions between logits and numbers, all in nats, computed in float32.

Dimensions: B blocks, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812, the name everybody knows it by
from torch import Tensor

from layerscalpel.errors import UserError

LOGITS_BYTES = {"cpu": 24 << 20, "cuda": 1 << 30, "mps": 256 << 20}
"""Float32 logits held at once: what a CPU's cache holds, or what fills a GPU."""
MOST_NATS = math.log(sys.float_info.max)
"""Exp of more is no float."""


def log_probabilities(logits_BTV: Tensor) -> Tensor:
    """Return log softmax [B, T, V] in float32."""
    return F.log_softmax(logits_BTV.float(), dim=-1)


def kl_to_parent(parent_log_probs_BTV: Tensor, log_probs_BTV: Tensor, parent_probs_BTV: Tensor | None = None) -> Tensor:
    """Return KL(parent || model) [B, T] in nats from the log probabilities of both; exactly 0 where they are equal.

    `parent_probs_BTV` saves the exponential where one parent is compared with many models.
    """
    probs_BTV = parent_log_probs_BTV.exp() if parent_probs_BTV is None else parent_probs_BTV
    return torch.linalg.vecdot(probs_BTV, parent_log_probs_BTV - log_probs_BTV)


def top_k_kl(parent_log_probs_MK: Tensor, ids_MK: Tensor, log_probs_MV: Tensor) -> Tensor:
    """Return KL(parent || model) [M] in nats of k tokens and of all others taken as one: at most the whole KL.

    Args:
        parent_log_probs_MK: the parent's log probabilities of k tokens, float32.
        ids_MK: their ids.
        log_probs_MV: the model's log probabilities.
    """
    own_MK = log_probs_MV.gather(-1, ids_MK)
    kept_M = torch.linalg.vecdot(parent_log_probs_MK.exp(), parent_log_probs_MK - own_MK)
    rest_M, own_rest_M = (1 - log_probs.exp().sum(-1) for log_probs in (parent_log_probs_MK, own_MK))
    tiny = torch.finfo(torch.float32).eps  # what a sum of float32 probabilities can miss of 1
    log_ratio_M = rest_M.clamp(min=tiny).log() - own_rest_M.clamp(min=tiny).log()
    return kept_M + rest_M.clamp(min=0) * log_ratio_M


def token_nll(log_probs_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Return the negative log likelihood [B, T] of the target ids in nats."""
    return -log_probs_BTV.gather(-1, targets_BT.unsqueeze(-1)).squeeze(-1)


def token_chunks(batch: int, num_tokens: int, vocab: int, device: torch.device) -> Iterator[slice]:
    """Cut the token axis into chunks whose logits [batch, chunk, vocab] fit LOGITS_BYTES."""
    chunk = max(1, LOGITS_BYTES[device.type] // (4 * vocab * batch))
    for low in range(0, num_tokens, chunk):
        yield slice(low, min(low + chunk, num_tokens))


@dataclass(frozen=True)
class Measured:
    """A sampled quantity: its value, its standard error, and the number of samples behind the value."""

    value: float
    se: float
    n: int

    def to_dict(self) -> dict[str, float | int | None]:
        """Return the form of results.json; the error of a single sample is unknown, null."""
        return {"value": self.value, "se": None if math.isnan(self.se) else self.se, "n": self.n}


def block_mean(per_block: Tensor, tokens_per_block: Tensor) -> Measured:
    """Return the token-weighted mean of block means [N], its standard error over blocks, and the token count.

    Blocks are the independent samples; tokens within one are not. The error is that of a ratio of sums.
    """
    weights = tokens_per_block.double()
    values = per_block.double()
    mean = (values * weights).sum() / weights.sum()
    count = len(values)
    if count < 2:
        return Measured(mean.item(), math.nan, int(weights.sum()))
    residuals = weights / weights.mean() * (values - mean)
    error = residuals.square().sum().div(count - 1).sqrt() / math.sqrt(count)
    return Measured(mean.item(), error.item(), int(weights.sum()))


def exp_of(mean: Measured, what: str = "a perplexity") -> Measured:
    """Return exp of a mean with its first-order error: a perplexity, or a ratio of two from the mean difference.

    Raises:
        UserError: it is no finite number; `what` begins the message.
    """
    value = math.exp(mean.value) if mean.value < MOST_NATS else math.inf
    error = value * mean.se
    if math.isinf(value) or math.isinf(error):
        raise UserError(
            f"{what} is exp of {mean.value:.3g} nats, no finite number: the model is ruined - measure another"
        )
    return Measured(value, error, mean.n)
