"""What the trials of benchmarks/recipes.py are chosen by, and what is reported of those that are final.

Chosen by: cross-entropy of held-out Alpaca answers, KL on held-out C4 blocks, accuracy on the tasks of selection.py.
Reported: PIQA, ARC-easy and HellaSwag whole, perplexity of WikiText-2, KL on further C4 blocks. No text or task is in
both. All in float32, on a GPU with products in TF32, which holds every weight in bfloat16 exactly.

Dimensions: N blocks, T tokens, D hidden size.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import selection
import torch
from measuring import Row
from recipe_data import Prepared
from tasks import accuracies, read_items
from torch import Tensor

from layerscalpel.data import TokenBlocks
from layerscalpel.evaluate import Reference, evaluate, final_hidden
from layerscalpel.hooks import hidden_at
from layerscalpel.layers import Decoder, device_of
from layerscalpel.probe import keeps_documents_apart


@dataclass(frozen=True)
class MeasureSizes:
    """How much is measured."""

    held_out: int = 128
    """Blocks of C4, for each purpose."""
    block_tokens: int = 256
    healing_block_tokens: int = 512
    items: int | None = None
    """Of every task; None takes all."""
    window: int = 2048
    windows: int | None = None
    batch_size: int = 16
    """Blocks of C4 at once; fewer where blocks are longer."""
    tokens_at_once: int = 1 << 15
    """Of task items."""


class Measures:
    """Measures models against one parent, which is measured by the same code."""

    def __init__(
        self, parent: Decoder, tokenizer: Any, prepared: Prepared, chosen_by: Path, sizes: MeasureSizes
    ) -> None:
        self.parent, self.tokenizer, self.prepared, self.sizes = parent, tokenizer, prepared, sizes
        self.chosen_by = chosen_by

    def select(self, child: Decoder) -> Row:
        """Return what trials are chosen by."""
        with tf32():
            blocks = self._instructions()
            answers = evaluate(child, blocks, None, self._apart(child, blocks), batch_size=self._at_once(blocks))
            text, reference = self._text("select"), self._reference("select")
            quality = evaluate(child, text, None if child is self.parent else reference, batch_size=self._at_once(text))
            found = accuracies(child, self.tokenizer, self._chosen_by(), tokens_at_once=self.sizes.tokens_at_once)
        ce = answers.ppl
        return {
            "alpaca_ce_nats": {"value": math.log(ce.value), "se": ce.se / ce.value, "n": ce.n},
            "c4": quality.to_dict(),
            "tasks": found,
        }

    def report(self, child: Decoder) -> Row:
        """Return what is reported."""
        found = {}
        with tf32():
            for name in ("report", "wikitext2"):
                text, reference = self._text(name), self._reference(name)
                against = None if child is self.parent else reference
                found[name] = evaluate(child, text, against, batch_size=self._at_once(text)).to_dict()
            items = read_items(self.prepared.data / "tasks", self.sizes.items)
            right = accuracies(child, self.tokenizer, items, tokens_at_once=self.sizes.tokens_at_once)
        return {"c4": found["report"], "wikitext2": found["wikitext2"], "tasks": right}

    @functools.cache  # noqa: B019, lives as long as its process
    def _text(self, part: str) -> TokenBlocks:
        sizes = self.sizes
        if part == "wikitext2":
            return self.prepared.corpus(self.tokenizer, sizes.window, sizes.windows)
        return self.prepared.held_out(self.tokenizer, part, sizes.held_out, sizes.block_tokens)

    @functools.cache  # noqa: B019
    def _reference(self, part: str) -> Reference:
        text = self._text(part)
        return Reference(self.parent, final_hidden(self.parent, text.tokens, batch_size=self._at_once(text)))

    @functools.cache  # noqa: B019
    def _instructions(self) -> TokenBlocks:
        return self.prepared.instructions(self.tokenizer, self.sizes.healing_block_tokens)

    @functools.cache  # noqa: B019
    def _chosen_by(self) -> selection.Items:
        return selection.read(self.chosen_by, self.sizes.items)

    def _at_once(self, blocks: TokenBlocks) -> int:
        return max(1, self.sizes.batch_size * self.sizes.block_tokens // blocks.tokens.shape[1])

    @torch.no_grad()
    def _apart(self, decoder: Decoder, blocks: TokenBlocks) -> Tensor:
        """Return hidden states [N, T, D] at boundary L, packed conversations kept apart."""
        assert blocks.positions is not None
        assert keeps_documents_apart(decoder), "conversations are measured one by one"
        device, size = device_of(decoder.model), self._at_once(blocks)
        pairs = zip(blocks.tokens.split(size), blocks.positions.split(size), strict=True)
        found = [hidden_at(decoder, ids.to(device), len(decoder), at.to(device)).cpu() for ids, at in pairs]
        return torch.cat(found)


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    """Within, products of float32 matrices are in TF32, where the device has it."""
    own = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(own)
