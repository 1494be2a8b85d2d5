"""Run blocks of tokens through a decoder, with visitors at every layer.

A model in memory takes one batch of blocks after the other through all of its layers. A model larger than memory takes
all batches through one layer after the other, so that each layer's weights come in once per pass; hidden states wait
in a store meanwhile. Visitors see the same either way.

Dimensions: B blocks at once, T tokens, D hidden size, L layers.

    for number, hidden_BTD in pass_blocks(decoder, tokens.split(4), lambda number: streams[number].visit): ...
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, MutableMapping, Sequence

import torch
from torch import Tensor

from layerscalpel.hooks import Step, Visit, hidden_at, replay, visit_layer
from layerscalpel.layers import Decoder, device_of
from layerscalpel.progress import track

VisitOf = Callable[[int], Visit]
"""Number of a batch to its visitor, asked for when the batch comes first."""


def nobody(_number: int) -> Visit:
    """Visit no layer."""

    def look(_i: int, _hidden: Tensor, _step: Step) -> None: ...

    return look


def no_step(_streams: Tensor) -> Tensor:
    """Stand for the step at boundary L."""
    raise AssertionError("there is no layer after the last boundary")


@torch.no_grad()
def pass_blocks(
    decoder: Decoder,
    batches: Sequence[Tensor],
    visit_of: VisitOf = nobody,
    *,
    store: MutableMapping[Hashable, Tensor] | None = None,
    label: str = "blocks",
) -> Iterator[tuple[int, Tensor]]:
    """Yield (number of the batch, hidden states [B, T, D] at boundary L) in order.

    Visitors see boundary L too, as layer L, where there is no layer to step through.

    Args:
        decoder: in memory, or with layers that come in one by one (`Decoder.resident`).
        batches: token ids [B, T] each.
        visit_of: gives each batch's visitor (see hooks.replay).
        store: where the parent's hidden states wait while layers come in one by one, under ("parent", number).
        label: what the progress line says.
    """
    walk = _block_by_block if decoder.resident is None else _layer_by_layer
    yield from walk(decoder, batches, visit_of, {} if store is None else store, label)


Walk = Iterator[tuple[int, Tensor]]


def _block_by_block(
    decoder: Decoder,
    batches: Sequence[Tensor],
    visit_of: VisitOf,
    _store: MutableMapping[Hashable, Tensor],
    label: str,
) -> Walk:
    device = device_of(decoder.model)
    for number, tokens_BT in enumerate(track(batches, label, len(batches))):
        visit = visit_of(number)
        with replay(decoder, visit):
            hidden = hidden_at(decoder, tokens_BT.to(device), len(decoder))
        visit(len(decoder), hidden, no_step)
        yield number, hidden


def _layer_by_layer(
    decoder: Decoder,
    batches: Sequence[Tensor],
    visit_of: VisitOf,
    store: MutableMapping[Hashable, Tensor],
    label: str,
) -> Walk:
    assert decoder.resident is not None
    device = device_of(decoder.model)
    on_device = [tokens_BT.to(device) for tokens_BT in batches]
    visits = [visit_of(number) for number in range(len(batches))]
    for number, tokens_BT in enumerate(on_device):
        store["parent", number] = hidden_at(decoder, tokens_BT, 0)
    for i in track(decoder.resident(), f"{label}, layer by layer", len(decoder)):
        for number, (tokens_BT, visit) in enumerate(zip(on_device, visits, strict=True)):
            store["parent", number] = visit_layer(decoder, i, tokens_BT, store["parent", number], visit)
    for number, visit in enumerate(visits):
        hidden = store.pop(("parent", number))
        visit(len(decoder), hidden, no_step)
        yield number, hidden
