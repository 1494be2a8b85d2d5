"""Calibration text sampled from the parent itself: `data.calibration=self`, for when no text is at hand.

A block is one independent sample of the model's own distribution: temperature 1, nothing cut off, going on past
end-of-text tokens. So the mean KL(parent || cut model) over the tokens of such blocks is an unbiased estimate of the KL
between the two as distributions over whole texts, which no other text gives (docs/methods.md#self). Similar in spirit
to the data of LLM-QAT (arXiv:2305.17888).

Dimensions: N blocks, B blocks at once, T tokens, V vocabulary.

    blocks = sample_blocks(model, tokenizer, num_blocks=32, block_tokens=256, seed=0)
    blocks.tokens  # [N, T] int64
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from layerscalpel.data import TokenBlocks
from layerscalpel.errors import UserError
from layerscalpel.layers import device_of
from layerscalpel.progress import track
from layerscalpel.records import SELF


def sample_blocks(
    model: Any, tokenizer: Any, *, num_blocks: int, block_tokens: int, seed: int, batch_size: int = 16
) -> TokenBlocks:
    """Sample blocks from a model; the caller's random state on CPU and CUDA stays as it is.

    Source: this project, docs/methods.md#self.

    Args:
        model: a causal language model with all its weights in memory, in evaluation mode.
        tokenizer: names the first token of each block.
        num_blocks: blocks N.
        block_tokens: length T of each, 2 or more, the first token included.
        seed: with the same device and batch size it names the blocks.
        batch_size: blocks B at once.

    Returns:
        Blocks on the CPU, every token but the first a target.

    Raises:
        UserError: there is no tokenizer, or the model's logits are not finite.
    """
    if tokenizer is None:
        raise UserError("the checkpoint has no tokenizer, so its text has no first token - add its tokenizer files")
    starts = range(0, num_blocks, batch_size)
    written: list[Tensor] = []
    with seeded(seed), without_own_settings(model):
        for low in track(starts, "sampling from the parent", len(starts)):
            first_B1 = first_tokens(tokenizer, min(batch_size, num_blocks - low)).to(device_of(model))
            written.append(_continued(model, first_B1, block_tokens).cpu())
    tokens_NT = torch.cat(written)
    labelled_NT = torch.ones_like(tokens_NT, dtype=torch.bool)
    labelled_NT[:, 0] = False  # nothing stands before it
    return TokenBlocks(tokens_NT, labelled_NT, source=SELF, num_documents=num_blocks, dropped={})


def first_tokens(tokenizer: Any, count: int) -> Tensor:
    """Return what blocks begin with [count, 1]: the token that begins a text, else the one that ends it, else any."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return torch.full((count, 1), token)
    ordinary = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    return torch.tensor(ordinary)[torch.randint(len(ordinary), (count, 1))]


def _continued(model: Any, first_B1: Tensor, block_tokens: int) -> Tensor:
    """Return blocks [B, T] that go on from their first token; there is no end token, so all have the same length."""
    settings = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=block_tokens - 1, eos_token_id=None
    )
    return model.generate(
        first_B1,
        attention_mask=torch.ones_like(first_B1),
        generation_config=settings,
        logits_processor=LogitsProcessorList([RequireFinite()]),
    )


class RequireFinite(LogitsProcessor):
    """Stops at logits that no token can be drawn from; on a GPU drawing from them would end the process."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # the names are those of the base class
        """Return the scores as they are."""
        if not torch.isfinite(scores.amax(-1)).all():  # single tokens may well be ruled out by -inf
            raise UserError(
                "the model's logits are not finite (NaN or infinity), so no text can be sampled"
                " - try another --dtype, as bfloat16 for float16"
            )
        return scores


@contextlib.contextmanager
def without_own_settings(model: Any) -> Iterator[None]:
    """Within, the checkpoint's generation settings are absent: they would fill whatever a call leaves open."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within, random numbers follow from the seed; after it the generators are where they were."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(gpus, device_type="cuda"):
        torch.manual_seed(seed)
        yield
