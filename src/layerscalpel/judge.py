"""Whether healing brought a cut model nearer to its parent, or the recipe failed.

The loss that healing lowers is not what the cut raised. So the KL to the parent, the measure that the search removed
layers by, is taken before and after on the search's own text, which healing has not seen. A model that ends farther
away than the bare cut keeps the weights that healing began with. A stitch lowers the KL by itself; what healing gives
back of that, as it gains elsewhere, is reported and kept.

    judge = Judge.of(parent, blocks, Place(device), batch_size=4, store={})
    before = judge.kl(student, "before healing")
    ruined(before, judge.kl(student, "after healing"))
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, MutableMapping
from dataclasses import dataclass

from torch import Tensor

from layerscalpel.data import TokenBlocks
from layerscalpel.evaluate import Reference, evaluate, final_hidden
from layerscalpel.layers import Decoder
from layerscalpel.losses import Measured
from layerscalpel.places import Place


@dataclass(frozen=True)
class Judge:
    """The parent's word on some blocks."""

    reference: Reference
    blocks: TokenBlocks
    place: Place
    batch_size: int

    @classmethod
    def of(
        cls,
        parent: Decoder,
        blocks: TokenBlocks,
        place: Place,
        *,
        batch_size: int,
        store: MutableMapping[Hashable, Tensor],
    ) -> Judge:
        """Run the parent, which must be in its place, over the blocks; `store` as in passes.pass_blocks."""
        final = final_hidden(parent, blocks.tokens, batch_size=batch_size, label="parent, to judge by", store=store)
        return cls(Reference(parent, final), blocks, place, batch_size)

    def kl(self, model: Decoder, when: str) -> Measured:
        """Return the KL of a model to the parent, in nats per token."""
        parent = self.reference.decoder
        with contextlib.ExitStack() as stack:
            if parent.resident is None:
                stack.enter_context(self.place.at_work(parent, ()))
            stack.enter_context(self.place.at_work(model, range(len(model))))
            found = evaluate(model, self.blocks, self.reference, batch_size=self.batch_size, label=f"KL {when}")
        assert found.kl_nats is not None, "a parent to compare with was given"
        return found.kl_nats


def ruined(unhealed: Measured, after: Measured) -> bool:
    """Tell whether a model is farther from its parent than the cut one; so is one whose distance is no number."""
    return not after.value <= unhealed.value
