"""Write on from prompts of unequal length, many at once, each as if it were alone.

Nothing is padded: all prompts of a batch go in up to the length of the shortest, and what the longer ones have left is
put in step by step while the shorter ones are continued already. So every row is computed as if it were alone, whatever
the family does with positions, masks and recurrent states. Batches hold neighbours in length, so few steps are spent
that way. The checkpoint's own generation settings are off: they would fill whatever a call leaves open.

Dimensions: B prompts at once, T tokens, V vocabulary.

    for batch in batches_of(prompts, 16):
        written = continued(model, batch, ends=[2], drawing=Drawing(1.0, 1.0), seed=0)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from layerscalpel.layers import device_of
from layerscalpel.selftext import RequireFinite, seeded, without_own_settings

MOST_SPREAD = 32
"""Tokens by which the prompts of a batch differ in length, at most; each costs a step that some rows do not need."""


@dataclass(frozen=True)
class Prompt:
    """What is to be continued."""

    key: str
    """Names it; what is drawn depends on the keys of the batch."""
    ids: list[int]
    most: int
    """Tokens that the continuation may have."""


@dataclass(frozen=True)
class Drawing:
    """How tokens are drawn."""

    temperature: float
    top_p: float


def batches_of(prompts: list[Prompt], size: int) -> Iterator[list[Prompt]]:
    """Yield neighbours in length, at most `size` at once."""
    batch: list[Prompt] = []
    for prompt in sorted(prompts, key=lambda prompt: len(prompt.ids)):
        if batch and (len(batch) == size or len(prompt.ids) - len(batch[0].ids) > MOST_SPREAD):
            yield batch
            batch = []
        batch.append(prompt)
    if batch:
        yield batch


def continued(
    model: Any, batch: list[Prompt], *, ends: list[int], drawing: Drawing | None, seed: int
) -> list[tuple[list[int], bool]]:
    """Return (ids without the end, whether there is no end) of the continuation of each prompt.

    Args:
        model: a causal language model with all its weights in memory, in evaluation mode.
        batch: as `batches_of` yields it, the shortest first.
        ends: tokens that end a continuation.
        drawing: None takes the likeliest token each time.
        seed: with the keys of the batch it names what is drawn; the caller's random state stays as it is.

    Raises:
        UserError: the model's logits are not finite.
    """
    shortest, device = len(batch[0].ids), device_of(model)
    first_BT = torch.tensor([prompt.ids[:shortest] for prompt in batch], device=device)
    steps = max(len(prompt.ids) + prompt.most for prompt in batch) - shortest
    plain = {"do_sample": True, "top_k": 0, **vars(drawing)} if drawing else {}
    with seeded(_seed_of(seed, batch)), without_own_settings(model):
        rows = model.generate(
            first_BT,
            attention_mask=torch.ones_like(first_BT),
            generation_config=GenerationConfig(max_new_tokens=steps, eos_token_id=None, **plain),
            logits_processor=LogitsProcessorList([RequireFinite(), _RestOfPrompts(batch, device)]),
            stopping_criteria=StoppingCriteriaList([_AllEnded(batch, ends, device)]),
        ).tolist()
    found = []
    for prompt, row in zip(batch, rows, strict=True):
        ids = row[len(prompt.ids) : len(prompt.ids) + prompt.most]
        end = next((i for i, token in enumerate(ids) if token in ends), None)
        found.append((ids[:end], end is None))
    return found


def _seed_of(seed: int, batch: list[Prompt]) -> int:
    """Return a seed of the batch's own, so that what is drawn does not depend on the batches before it."""
    said = "|".join([str(seed), *(prompt.key for prompt in batch)])
    return int.from_bytes(hashlib.sha256(said.encode()).digest()[:7])


class _RestOfPrompts(LogitsProcessor):
    """Lets a row go on with its own prompt as long as there is some left."""

    def __init__(self, batch: list[Prompt], device: torch.device) -> None:
        self.length_B = torch.tensor([len(prompt.ids) for prompt in batch], device=device)
        longest = max(len(prompt.ids) for prompt in batch)
        rows = [prompt.ids + [0] * (longest - len(prompt.ids)) for prompt in batch]
        self.prompt_BT = torch.tensor(rows, device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # the names are those of the base class
        at = input_ids.shape[1]
        if at >= self.prompt_BT.shape[1]:
            return scores
        wanted_BV = torch.full_like(scores, -torch.inf).scatter(1, self.prompt_BT[:, at, None], 0.0)
        return torch.where((self.length_B > at)[:, None], wanted_BV, scores)


class _AllEnded(StoppingCriteria):
    """Tells which rows have come to their end; the tokens of a prompt are none."""

    def __init__(self, batch: list[Prompt], ends: list[int], device: torch.device) -> None:
        self.length_B = torch.tensor([len(prompt.ids) for prompt in batch], device=device)
        self.most_B = torch.tensor([prompt.most for prompt in batch], device=device)
        self.ends = torch.tensor(ends, device=device, dtype=torch.long)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:  # as above
        written_B = input_ids.shape[1] - self.length_B
        return (written_B >= self.most_B) | ((written_B > 0) & torch.isin(input_ids[:, -1], self.ends))
