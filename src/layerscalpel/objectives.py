"""The loss of a batch and its gradient: cross-entropy, KL to the parent, squared errors of hidden states.

Head and loss run on labelled places only, a chunk at a time, and each chunk's backward frees its logits at once; so
full logits never exist, and the layers see one backward for the whole batch.

ce    negative log likelihood of the labelled tokens, nats
kl    KL(parent || student) where they are predicted, nats; of the k largest probabilities and the rest as one, if only
      those were kept
seam  |h - h*|^2 / |h*|^2 at every token, h after the trained layers behind the seam, h* the parent's
end   the same after the last layer, at labelled places

Dimensions: B blocks, T tokens, D hidden size, M labelled places, K kept probabilities, V vocabulary.

    terms = SeamLoss(student, parent, plan, weights_of(settings))(batch, num_labelled=900.0, num_tokens=2048.0)
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from layerscalpel.frozen import Batch
from layerscalpel.hooks import caught_at, hidden_at, resume_from
from layerscalpel.layers import Decoder
from layerscalpel.losses import kl_to_parent, token_chunks, token_nll, top_k_kl
from layerscalpel.rows import Plan, log_probs_at
from layerscalpel.settings import HealSettings


def weights_of(settings: HealSettings) -> dict[str, float]:
    """Return {term: its weight} of the terms that the settings ask for."""
    objective = settings.objective
    weights = {
        "ce": float(objective in ("ce", "both")),
        "kl": {"kl": 1.0, "both": settings.kl_weight}.get(objective, 0.0),
        "seam": settings.seam_weight + (objective == "seam"),
        "end": settings.end_weight + (objective == "end"),
    }
    return {term: weight for term, weight in weights.items() if weight}


@dataclass(frozen=True)
class SeamLoss:
    """The loss of batches whose hidden states enter at the plan's boundary."""

    student: Decoder
    parent: Decoder | None
    """Its head makes the parent's distribution again; None where nothing is asked of it, or its k largest were kept."""
    plan: Plan
    weights: Mapping[str, float]

    @property
    def name(self) -> str:
        """Name of the weighted sum in results.json; errors of hidden states have no unit."""
        return "loss" if {"seam", "end"} & set(self.weights) else "loss_nats"

    def __call__(self, batch: Batch, num_labelled: float, num_tokens: float) -> dict[str, Tensor]:
        """Return {term: a sum over the batch's places, divided by their number}; all terms that have a weight.

        Args:
            batch: the blocks.
            num_labelled: labelled places to divide by, those of all batches of a step.
            num_tokens: likewise tokens.

        Where gradients are on, the gradient of the weighted sum is added to the trained weights.
        """
        final_BTD, seam_BTD = self._student_hidden(batch)
        final_MD = final_BTD.flatten(0, 1)[batch.sent.places_M]
        leaf_MD = final_MD.detach().requires_grad_(final_MD.requires_grad)
        terms = {name: torch.zeros((), device=leaf_MD.device) for name in self.weights}
        places = 0 if set(self.weights) == {"seam"} else len(leaf_MD)
        for part in token_chunks(1, places, self.student.vocab_size, leaf_MD.device):
            rows = {name: value[part] for name, value in batch.parent.items() if name != "seam"}
            sums = self._sums(leaf_MD[part], batch.sent.targets_M[part], rows)
            found = {name: value / num_labelled for name, value in sums.items()}
            if leaf_MD.requires_grad:
                self.total(found).backward()  # frees the chunk's logits at once
            terms |= {name: terms[name] + value.detach() for name, value in found.items()}
        ends: list[Tensor] = []
        if seam_BTD is not None:
            error = relative_error(seam_BTD.flatten(0, 1), batch.parent["seam"]).sum() / num_tokens
            terms["seam"] = error.detach()
            ends.append(self.weights["seam"] * error)
        self._backward(ends, final_MD, leaf_MD)
        return terms

    def _backward(self, ends: list[Tensor], final_MD: Tensor, leaf_MD: Tensor) -> None:
        """Go back through the layers once, from all that depends on them."""
        gradients: list[Tensor | None] = [None] * len(ends)
        if {"ce", "kl", "end"} & set(self.weights):  # even where nothing is labelled: several processes go back as one
            gradient = torch.zeros_like(leaf_MD) if leaf_MD.grad is None else leaf_MD.grad
            ends, gradients = [*ends, final_MD], [*gradients, gradient]
        if ends and leaf_MD.requires_grad:
            torch.autograd.backward(ends, gradients)

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum of the terms."""
        return torch.stack([self.weights[name] * value for name, value in terms.items()]).sum()

    def _student_hidden(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return the hidden states at the last boundary that the loss needs, and those after the seam if compared."""
        student, hidden, plan = self.student, batch.hidden_BTD, self.plan
        tokens, positions = batch.sent.tokens_BT, batch.sent.positions_BT
        last = plan.seam if set(self.weights) == {"seam"} else len(student)
        watched = caught_at(student, plan.seam) if "seam" in self.weights else contextlib.nullcontext([])
        with watched as caught:
            if hidden is None:
                final = hidden_at(student, tokens, last, positions)
            else:
                final = resume_from(student, tokens, plan.boundary, hidden, positions, until=last)
        return final, caught[0] if caught else None

    def _sums(self, hidden_MD: Tensor, targets_M: Tensor, parent: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the sums over a chunk of the terms that are taken at labelled places."""
        sums: dict[str, Tensor] = {}
        if "end" in self.weights:
            sums["end"] = relative_error(hidden_MD, parent["final"]).sum()
        if not {"ce", "kl"} & set(self.weights):
            return sums
        log_probs = log_probs_at(self.student, hidden_MD)
        if "ce" in self.weights:
            sums["ce"] = token_nll(log_probs, targets_M).sum()
        if "kl" in self.weights:
            sums["kl"] = self._kl(log_probs, parent).sum()
        return sums

    def _kl(self, log_probs_MV: Tensor, parent: Mapping[str, Tensor]) -> Tensor:
        if "top_ids" in parent:
            return top_k_kl(parent["top_log_probs"], parent["top_ids"].long(), log_probs_MV)
        assert self.parent is not None, "a KL to the whole distribution needs the parent's head"
        with torch.no_grad():
            wanted = log_probs_at(self.parent, parent["final"].to(_dtype_of(self.parent)))
        return kl_to_parent(wanted, log_probs_MV)


def relative_error(hidden_MD: Tensor, wanted_MD: Tensor) -> Tensor:
    """Return |h - h*|^2 / |h*|^2 [M] in float32."""
    wanted = wanted_MD.float()
    return (hidden_MD.float() - wanted).square().sum(-1) / wanted.square().sum(-1).clamp(min=1e-12)


def _dtype_of(decoder: Decoder) -> torch.dtype:
    return next(decoder.model.parameters()).dtype


def asks_parent(settings: HealSettings) -> bool:
    """Tell whether the loss has a term that needs the parent."""
    return bool(set(weights_of(settings)) - {"ce"})
