"""What training does not change about a block: hidden states below the trained layers, and what the parent says there.

Each part of it is a matrix, the rows of one block below those of another.

Dimensions: B blocks, T tokens, D hidden size, M labelled places, K kept probabilities.

    plan = Plan(boundary=12, seam=14, removed=6, kl=True)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from layerscalpel.data import TokenBlocks
from layerscalpel.hooks import caught_at, head_logits, hidden_at, resume_from
from layerscalpel.layers import Decoder, device_of
from layerscalpel.losses import log_probabilities, token_chunks
from layerscalpel.origin import DTYPES
from layerscalpel.settings import HealSettings
from layerscalpel.transfer import Sent


@dataclass(frozen=True)
class Plan:
    """Where training begins, and what its loss asks of the parent."""

    boundary: int
    """Of the student: where the hidden states enter the first trained layer; 0 trains from the tokens on."""
    seam: int
    """Of the student: after the trained layers behind the seam, where hidden states are compared."""
    removed: int
    """Layers that the parent has more of, all of them below `seam`."""
    kl: bool = False
    """Whether the loss has a term of the parent's distribution."""
    seam_error: bool = False
    end_error: bool = False
    same_prefix: bool = True
    """Whether the parent's layers below `boundary` are the student's."""
    apart: bool = False
    """Whether packed documents are kept apart."""

    @property
    def asks_parent(self) -> bool:
        """Whether anything of the parent is needed."""
        return self.kl or self.seam_error or self.end_error


class Rows:
    """What two models compute of a set of blocks while neither is trained."""

    def __init__(
        self, student: Decoder, parent: Decoder | None, blocks: TokenBlocks, plan: Plan, settings: HealSettings
    ) -> None:
        self.student, self.parent, self.blocks, self.plan = student, parent, blocks, plan
        self.top_k = min(settings.teacher_top_k, student.vocab_size) if settings.teacher == "topk" else 0
        self.device = device_of(student.model)
        weight = next(student.model.parameters()).dtype
        self.dtype = weight if settings.cache_dtype == "auto" else DTYPES[settings.cache_dtype]
        self.compute_dtype = weight
        self.online = settings.teacher == "online"

    def _sent(self, index: Tensor) -> Sent:
        blocks, apart = self.blocks, self.plan.apart and self.blocks.positions is not None
        positions = blocks.positions[index] if apart and blocks.positions is not None else None
        return Sent.to(self.device, blocks.tokens[index], blocks.labelled[index], positions)

    @torch.no_grad()
    def _prefix(self, index: Tensor) -> dict[str, Tensor]:
        """Return the student's part of blocks' records."""
        sent = self._sent(index)
        hidden = hidden_at(self.student, sent.tokens_BT, self.plan.boundary, sent.positions_BT).to(self.dtype)
        return {"prefix": hidden.flatten(0, 1)}

    @torch.no_grad()
    def _computed(self, index: Tensor) -> dict[str, Tensor]:
        """Return the parts of blocks' records, one block below the other."""
        plan, sent, rows, hidden = self.plan, self._sent(index), {}, None
        if plan.boundary:
            hidden = hidden_at(self.student, sent.tokens_BT, plan.boundary, sent.positions_BT).to(self.dtype)
            rows["prefix"] = hidden.flatten(0, 1)
            hidden = hidden.to(self.compute_dtype)
        if plan.asks_parent and not self.online:
            rows |= self._of_parent(sent, hidden)
        return rows

    @torch.no_grad()
    def _of_parent(self, sent: Sent, hidden: Tensor | None) -> dict[str, Tensor]:
        assert self.parent is not None, "a loss that asks the parent has one"
        plan, parent, seam = self.plan, self.parent, self.plan.seam + self.plan.removed
        last = len(parent) if plan.kl or plan.end_error else seam
        tokens, positions = sent.tokens_BT, sent.positions_BT
        with caught_at(parent, seam) as caught:
            if hidden is None or not plan.same_prefix:
                final = hidden_at(parent, tokens, last, positions)
            else:
                final = resume_from(parent, tokens, plan.boundary, hidden, positions, until=last)
        rows = {"seam": caught[0].flatten(0, 1)} if plan.seam_error else {}
        final_MD = final.flatten(0, 1)[sent.places_M]
        if plan.end_error or (plan.kl and not self.top_k):
            rows["final"] = final_MD
        if plan.kl and self.top_k:
            rows |= self._top(final_MD)
        return rows

    def _top(self, final_MD: Tensor) -> dict[str, Tensor]:
        assert self.parent is not None
        values, ids = [], []
        for part in token_chunks(1, len(final_MD), self.parent.vocab_size, final_MD.device):
            log_probs = log_probs_at(self.parent, final_MD[part])
            top = log_probs.topk(self.top_k)
            values.append(top.values)
            ids.append(top.indices.int())
        empty = final_MD.new_empty(0, self.top_k)
        return {
            "top_log_probs": torch.cat(values) if values else empty.float(),
            "top_ids": torch.cat(ids) if ids else empty.int(),
        }


def log_probs_at(decoder: Decoder, final_MD: Tensor) -> Tensor:
    """Return log probabilities [M, V] of hidden states at boundary L.

    Each place is a block of one token, so there is no mask, and there may be more places than the model has positions.
    """
    return log_probabilities(head_logits(decoder, final_MD[:, None]))[:, 0]
