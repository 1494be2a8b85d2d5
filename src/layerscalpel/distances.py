"""How far a model is from its parent, without any labels: over all text, by position, and by domain.

KL(parent || model) and top-1 agreement need no right answers, so any held-out text will do. A mean hides where a model
departs: with little text before a token, or on one kind of text. So both are also given by position, in bins that
double in length, and by domain, the sources that `data.evaluation` mixes. Whether damage goes on far into long texts is
another question (longtext.py).

Dimensions: N blocks, T tokens.

    found = distances(token_figures(student, blocks, reference), blocks.domains)
    found["kl_nats"], found["kl_by_position"][0]["kl_nats"], found["by_domain"]["alpaca"]["kl_nats"]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from layerscalpel.evaluate import TokenFigures, quality_of
from layerscalpel.longtext import doubling_bins
from layerscalpel.losses import block_mean

FIRST_BIN = 16
"""Where the first bin ends."""


def distances(figures: TokenFigures, domains: Sequence[str] = ()) -> dict[str, Any]:
    """Return the figures of a model for results.json: those of all text, `kl_by_position` and `by_domain`.

    Args:
        figures: of every token; without a parent there are no distances, only perplexities.
        domains: the source of each block, none for text of one source.
    """
    found = quality_of(figures).to_dict()
    if figures.compared:
        found["kl_by_position"] = kl_by_position(figures)
    if domains:
        found["by_domain"] = {name: _domain(figures, domains, name) for name in dict.fromkeys(domains)}
    return found


def kl_by_position(figures: TokenFigures) -> list[dict[str, Any]]:
    """Return rows {from, to, kl_nats, top1_agreement_fraction}; a position is the number of tokens before a token."""
    bins = doubling_bins(figures.kl_NT.shape[1] + 1, FIRST_BIN)
    measures = {"kl_nats": figures.kl_NT, "top1_agreement_fraction": figures.agreement_NT}
    return [
        {"from": low, "to": high} | {name: _mean(item[:, low - 1 : high - 1]) for name, item in measures.items()}
        for low, high in bins
    ]


def _mean(values_NT: Tensor) -> dict[str, Any]:
    per_block_N = values_NT.mean(1)
    return block_mean(per_block_N, torch.full_like(per_block_N, values_NT.shape[1])).to_dict()


def _domain(figures: TokenFigures, domains: Sequence[str], name: str) -> dict[str, Any]:
    rows = torch.tensor([place for place, domain in enumerate(domains) if domain == name])
    return {"num_blocks": len(rows)} | quality_of(figures.of(rows)).to_dict()
