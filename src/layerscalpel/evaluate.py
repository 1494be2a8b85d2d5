"""Measure a model against its parent on held-out text: KL, agreement, perplexity, and what it writes.

Every figure comes with its standard error over blocks and its token count, and the parent is measured by the same code.
KL and agreement are taken at every position, perplexity at the labelled ones, token-weighted (never a mean of means).
Text that is hard for one is hard for all: a ratio of perplexities has a smaller error of its own, paired over blocks.

Dimensions: N blocks, B blocks at once, T tokens, D hidden size.

    reference = Reference(parent, parent_hidden(parent, blocks.tokens))
    quality = evaluate(student, blocks, reference)
    quality.kl_nats  # Measured(value=0.44, se=0.02, n=16384)
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layerscalpel.data import TokenBlocks
from layerscalpel.hooks import head_logits, require_finite
from layerscalpel.layers import Decoder, device_of
from layerscalpel.losses import Measured, block_mean, kl_to_parent, log_probabilities, token_chunks, token_nll
from layerscalpel.passes import pass_blocks
from layerscalpel.progress import track

PROMPTS = (
    "What causes the seasons on Earth?",
    "Give me three tips for learning a new language.",
    "Write two sentences about a lighthouse.",
)


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


@torch.no_grad()
def evaluate(
    decoder: Decoder,
    blocks: TokenBlocks,
    reference: Reference | None,
    hidden_NTD: Tensor | None = None,
    *,
    batch_size: int = 4,
    label: str = "evaluate",
) -> Quality:
    """Return the figures of a model on held-out blocks.

    Args:
        decoder: the model to measure.
        blocks: evaluation blocks [N, T].
        reference: the parent; None measures perplexity alone.
        hidden_NTD: the model's hidden states at boundary L, where they are known already.
        batch_size: blocks per forward.
        label: what the progress line says.
    """
    sums = []
    for number, hidden in _final_batches(decoder, blocks.tokens, hidden_NTD, batch_size, label):
        rows = slice(number * batch_size, (number + 1) * batch_size)
        require_finite(len(decoder), hidden)
        parent = None if reference is None else reference.hidden_NTD[rows].to(hidden.device)
        sums.append(_sums(decoder, hidden, blocks.tokens[rows], blocks.labelled[rows], reference, parent))
    nll_N, parent_N, kl_N, agreement_N = torch.cat(sums, dim=1)
    labelled_N = blocks.labelled.sum(1).double()
    tokens_N, targets_N = torch.full_like(labelled_N, blocks.tokens.shape[1]), labelled_N.clamp(min=1)
    ppl = exp_of(block_mean(nll_N / targets_N, labelled_N))
    if reference is None:
        return Quality(None, None, ppl)
    return Quality(
        kl_nats=block_mean(kl_N / tokens_N, tokens_N),
        top1_agreement_fraction=block_mean(agreement_N / tokens_N, tokens_N),
        ppl=ppl,
        ppl_ratio=exp_of(block_mean((nll_N - parent_N) / targets_N, labelled_N)),
    )


def exp_of(mean: Measured) -> Measured:
    """Return exp of a mean with its first-order error: a perplexity, or a ratio of two from the mean difference."""
    value = math.exp(mean.value)
    return Measured(value, value * mean.se, mean.n)


def _final_batches(
    decoder: Decoder, tokens: Tensor, hidden_NTD: Tensor | None, batch_size: int, label: str
) -> Iterator[tuple[int, Tensor]]:
    if hidden_NTD is None:
        return pass_blocks(decoder, tokens.split(batch_size), label=label)
    device = device_of(decoder.model)
    return ((number, part.to(device)) for number, part in enumerate(hidden_NTD.split(batch_size)))


def _sums(
    decoder: Decoder,
    hidden_BTD: Tensor,
    tokens_BT: Tensor,
    labelled_BT: Tensor,
    reference: Reference | None,
    parent_BTD: Tensor | None,
) -> Tensor:
    """Return per block the sums [4, B]: nll of labelled targets, and the parent's; KL and agreement over positions."""
    device, (batch, length) = hidden_BTD.device, tokens_BT.shape
    targets = torch.cat([tokens_BT[:, 1:], tokens_BT[:, :1]], dim=1).to(device)  # the last position predicts nothing
    counted = torch.cat([labelled_BT[:, 1:], torch.zeros_like(labelled_BT[:, :1])], dim=1).to(device)
    sums = torch.zeros(4, batch, dtype=torch.float64)
    for part in token_chunks(batch, length, decoder.vocab_size, device):
        log_probs = log_probabilities(head_logits(decoder, hidden_BTD[:, part]))
        sums[0] += (token_nll(log_probs, targets[:, part]) * counted[:, part]).sum(1).double().cpu()
        if reference is not None and parent_BTD is not None:
            parent = log_probabilities(head_logits(reference.decoder, parent_BTD[:, part]))
            sums[1] += (token_nll(parent, targets[:, part]) * counted[:, part]).sum(1).double().cpu()
            sums[2] += kl_to_parent(parent, log_probs).sum(1).double().cpu()
            sums[3] += (parent.argmax(-1) == log_probs.argmax(-1)).sum(1).double().cpu()
    return sums


@torch.no_grad()
def write_samples(model: Any, tokenizer: Any, *, num_tokens: int, label: str) -> list[dict[str, str]]:
    """Return [{prompt, text}]: what the model writes greedily after each of PROMPTS, in its own chat template."""
    samples = []
    for prompt in track(PROMPTS if num_tokens else (), label, len(PROMPTS)):
        if tokenizer.chat_template:
            message = [{"role": "user", "content": prompt}]
            rendered = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            encoded = tokenizer(rendered, return_tensors="pt", add_special_tokens=False)
        else:
            encoded = tokenizer(prompt, return_tensors="pt")
        ids = encoded.input_ids.to(device_of(model))
        mask = torch.ones_like(ids)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        written = model.generate(ids, attention_mask=mask, max_new_tokens=num_tokens, do_sample=False, pad_token_id=pad)
        samples.append(
            {"prompt": prompt, "text": tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)}
        )
    return samples
