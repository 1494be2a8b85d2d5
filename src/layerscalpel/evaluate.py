"""Measure a model against its parent on held-out text: KL, agreement, perplexity.

Every figure comes with its standard error over blocks and its token count, and the parent is measured by the same code.
KL and agreement are taken at every position, perplexity at the labelled ones, token-weighted (never a mean of means).
Text that is hard for one is hard for all: a ratio of perplexities has a smaller error of its own, paired over blocks.

Dimensions: N blocks, B blocks at once, T tokens, D hidden size.

    reference = Reference(parent, parent_hidden(parent, blocks.tokens))
    quality = evaluate(student, blocks, reference)
    quality.kl_nats  # Measured(value=0.44, se=0.02, n=16384)

`token_figures` gives the same by token, for whoever asks where in the text a model departs (distances.py).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, MutableMapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from layerscalpel.data import TokenBlocks
from layerscalpel.hooks import head_logits, require_finite
from layerscalpel.layers import Decoder, device_of
from layerscalpel.losses import Measured, block_mean, exp_of, kl_to_parent, log_probabilities, token_chunks, token_nll
from layerscalpel.passes import pass_blocks


@dataclass(frozen=True)
class Quality:
    """Figures of one model; what compares it with its parent is None for a model without one."""

    kl_nats: Measured | None
    """KL(parent || model) per token."""
    top1_agreement_fraction: Measured | None
    """Share of positions where both hold the same token most likely, 0..1."""
    ppl: Measured
    """exp of the mean negative log likelihood per token."""
    ppl_ratio: Measured | None = None
    """Perplexity over the parent's, its error paired over the blocks; None for a model without a parent."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for results.json; what was not measured is absent."""
        return {name: item.to_dict() for name, item in vars(self).items() if item is not None}


@dataclass(frozen=True)
class Reference:
    """The parent's head and its hidden states at boundary L on the evaluation blocks."""

    decoder: Decoder
    hidden_NTD: Tensor


def final_hidden(
    decoder: Decoder,
    tokens: Tensor,
    *,
    batch_size: int,
    label: str = "parent",
    store: MutableMapping[Hashable, Tensor] | None = None,
) -> Tensor:
    """Return the hidden states [N, T, D] at boundary L, on the CPU; `store` as in passes.pass_blocks."""
    passed = pass_blocks(decoder, tokens.split(batch_size), store=store, label=label)
    hidden = torch.cat([hidden_BTD.cpu() for _, hidden_BTD in passed])
    require_finite(len(decoder), hidden)
    return hidden


@dataclass(frozen=True)
class TokenFigures:
    """What is known of every token of N blocks, [N, T] float64: at position t, of predicting the token after it."""

    nll_NT: Tensor
    """Negative log likelihood of the next token where it is labelled, else 0."""
    parent_nll_NT: Tensor
    kl_NT: Tensor
    agreement_NT: Tensor
    """1 where both hold the same token most likely."""
    labelled_N: Tensor
    """How many targets each block has."""
    compared: bool
    """Whether there was a parent; without one its figures are 0."""
    label: str
    """What was measured, for a message."""

    def of(self, rows: Tensor) -> TokenFigures:
        """Return those of some blocks."""
        tensors = {name: item[rows] for name, item in vars(self).items() if isinstance(item, Tensor)}
        return replace(self, **tensors)


def evaluate(
    decoder: Decoder,
    blocks: TokenBlocks,
    reference: Reference | None,
    hidden_NTD: Tensor | None = None,
    *,
    batch_size: int = 4,
    label: str = "evaluate",
) -> Quality:
    """Return the figures of a model on held-out blocks; arguments as those of `token_figures`."""
    return quality_of(token_figures(decoder, blocks, reference, hidden_NTD, batch_size=batch_size, label=label))


@torch.no_grad()
def token_figures(
    decoder: Decoder,
    blocks: TokenBlocks,
    reference: Reference | None,
    hidden_NTD: Tensor | None = None,
    *,
    batch_size: int = 4,
    label: str = "evaluate",
) -> TokenFigures:
    """Return what is known of every token of held-out blocks.

    Args:
        decoder: the model to measure.
        blocks: evaluation blocks [N, T].
        reference: the parent; None measures perplexity alone.
        hidden_NTD: the model's hidden states at boundary L, where they are known already.
        batch_size: blocks per forward.
        label: what the progress line says.
    """
    found = []
    for number, hidden in _final_batches(decoder, blocks.tokens, hidden_NTD, batch_size, label):
        rows = slice(number * batch_size, (number + 1) * batch_size)
        require_finite(len(decoder), hidden)
        parent = None if reference is None else reference.hidden_NTD[rows].to(hidden.device)
        found.append(_by_token(decoder, hidden, blocks.tokens[rows], blocks.labelled[rows], reference, parent))
    nll_NT, parent_NT, kl_NT, agreement_NT = torch.cat(found, dim=1)
    labelled_N = blocks.labelled[:, 1:].sum(1).double()
    return TokenFigures(nll_NT, parent_NT, kl_NT, agreement_NT, labelled_N, reference is not None, label)


def quality_of(figures: TokenFigures) -> Quality:
    """Return the means over all tokens, with their errors over the blocks.

    Raises:
        UserError: a perplexity is no finite number.
    """
    labelled_N = figures.labelled_N
    nll_N, parent_N = figures.nll_NT.sum(1), figures.parent_nll_NT.sum(1)
    tokens_N, targets_N = torch.full_like(labelled_N, figures.kl_NT.shape[1]), labelled_N.clamp(min=1)
    ppl = exp_of(block_mean(nll_N / targets_N, labelled_N), f"{figures.label}: the perplexity")
    if not figures.compared:
        return Quality(None, None, ppl)
    return Quality(
        kl_nats=block_mean(figures.kl_NT.mean(1), tokens_N),
        top1_agreement_fraction=block_mean(figures.agreement_NT.mean(1), tokens_N),
        ppl=ppl,
        ppl_ratio=exp_of(block_mean((nll_N - parent_N) / targets_N, labelled_N), f"{figures.label}: the perplexity"),
    )


def _final_batches(
    decoder: Decoder, tokens: Tensor, hidden_NTD: Tensor | None, batch_size: int, label: str
) -> Iterator[tuple[int, Tensor]]:
    if hidden_NTD is None:
        return pass_blocks(decoder, tokens.split(batch_size), label=label)
    device = device_of(decoder.model)
    return ((number, part.to(device)) for number, part in enumerate(hidden_NTD.split(batch_size)))


def _by_token(
    decoder: Decoder,
    hidden_BTD: Tensor,
    tokens_BT: Tensor,
    labelled_BT: Tensor,
    reference: Reference | None,
    parent_BTD: Tensor | None,
) -> Tensor:
    """Return [4, B, T]: nll of labelled targets, and the parent's; KL and agreement."""
    device, (batch, length) = hidden_BTD.device, tokens_BT.shape
    targets = torch.cat([tokens_BT[:, 1:], tokens_BT[:, :1]], dim=1).to(device)  # the last position predicts nothing
    counted = torch.cat([labelled_BT[:, 1:], torch.zeros_like(labelled_BT[:, :1])], dim=1).to(device)
    found = torch.zeros(4, batch, length, dtype=torch.float64)
    for part in token_chunks(batch, length, decoder.vocab_size, device):
        log_probs = log_probabilities(head_logits(decoder, hidden_BTD[:, part]))
        found[0, :, part] = (token_nll(log_probs, targets[:, part]) * counted[:, part]).double().cpu()
        if reference is not None and parent_BTD is not None:
            parent = log_probabilities(head_logits(reference.decoder, parent_BTD[:, part]))
            found[1, :, part] = (token_nll(parent, targets[:, part]) * counted[:, part]).double().cpu()
            found[2, :, part] = kl_to_parent(parent, log_probs).double().cpu()
            found[3, :, part] = (parent.argmax(-1) == log_probs.argmax(-1)).double().cpu()
    return found
