"""Advance every candidate cut while the parent passes by.

A removal is the ascending tuple of the layers that a candidate goes without. Two candidates that have gone without the
same layers so far are in the same state, so the states at a boundary form a trie: each is named by its history, the
removed layers before that boundary, and computed once. The empty history is the parent itself. At layer i a state is
kept (advanced through the layer), skipped (taken over as it is), or both.

For the windows of one length n this makes (L - n)(L - n + 1) / 2 layer passes beside the parent's L.

Source: this project, docs/methods.md#exact.

Dimensions: B blocks at once, T tokens, D hidden size, L layers.

    streams = Streams([(3, 4), (4, 5)], num_layers=8)
    with replay(decoder, streams.visit): ...
    streams.final((3, 4))  # [B, T, D] at boundary L
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, MutableMapping

import torch
from torch import Tensor

from layerscalpel.hooks import FiniteWatch, Step, stacked_streams

Removal = tuple[int, ...]
"""Removed layers, ascending."""


def window(start: int, num_removed: int) -> Removal:
    """Return the removal of one run of layers."""
    return tuple(range(start, start + num_removed))


class Streams:
    """The hidden states of all candidates for one batch of blocks."""

    def __init__(
        self,
        removals: Iterable[Removal],
        num_layers: int,
        *,
        store: MutableMapping[Hashable, Tensor] | None = None,
        name: Hashable = 0,
    ) -> None:
        """Plan which states each layer keeps and skips.

        Args:
            removals: the candidates; none is empty.
            num_layers: L.
            store: where states are kept, under (name, history).
            name: of this batch in the store.
        """
        self.store = {} if store is None else store
        self.name = name
        self.num_layers = num_layers
        self.finite = FiniteWatch()
        self.kept: list[list[Removal]] = []
        self.skipped: list[list[Removal]] = []
        self.ends = set(removals)
        for i in range(num_layers + 1):
            turns = {(tuple(j for j in removal if j < i), i in removal) for removal in self.ends}
            kept = sorted(history for history, skips in turns if history and not skips)
            self.kept.append(kept if i < num_layers else [])
            self.skipped.append(sorted(history for history, skips in turns if skips))

    def visit(self, i: int, hidden_BTD: Tensor, step: Step) -> None:
        """Take all states from boundary i to i + 1; for hooks.replay and passes.pass_blocks.

        Raises:
            UserError: at boundary L, if the parent's hidden states were not finite somewhere.
        """
        self.finite.look(hidden_BTD)
        if i == self.num_layers:
            self.finite.require()
        for history in self.skipped[i]:
            state = self.store[self.name, history] if history else hidden_BTD
            self.store[self.name, (*history, i)] = state
        kept, most = self.kept[i], stacked_streams(hidden_BTD)
        for low in range(0, len(kept), most):
            group = kept[low : low + most]
            stacked = step(torch.cat([self.store[self.name, history] for history in group]))
            for history, state in zip(group, stacked.split(len(hidden_BTD)), strict=True):
                self.store[self.name, history] = state
        for history in set(self.skipped[i]) - set(kept) - {()}:
            del self.store[self.name, history]

    def final(self, removal: Removal) -> Tensor:
        """Return the hidden states [B, T, D] of a candidate at boundary L."""
        return self.store[self.name, removal]

    def forget(self) -> None:
        """Free the states at boundary L."""
        for removal in self.ends:
            del self.store[self.name, removal]
