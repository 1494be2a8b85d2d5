"""What the tests of the search and of healing share: naive references, planted identity layers, random token blocks."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from families import tokens
from torch import Tensor, nn

from layerscalpel.data import TokenBlocks
from layerscalpel.layers import Decoder
from layerscalpel.streams import Removal

Change = Callable[[Tensor, Tensor], Tensor]
LAST_PROJECTIONS = ("o_proj", "down_proj", "c_proj", "dense", "dense_4h_to_h", "out_proj", "fc2")
"""What the families call the projections that add to the residual stream."""


@torch.no_grad()
def silence(layer: nn.Module) -> None:
    """Make a layer the identity: nothing is added to the residual stream."""
    for name, module in layer.named_modules():
        if name.rpartition(".")[2] in LAST_PROJECTIONS:
            for parameter in module.parameters():
                parameter.zero_()


@contextlib.contextmanager
def changed_layers(layers: nn.ModuleList, changes: dict[int, Change]) -> Iterator[None]:
    """Within, layer i returns `changes[i](its input, its output)`; plain torch, nothing of the package."""

    def hook(change: Change) -> Callable[..., Any]:
        def change_output(_module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            given = args[0] if args else kwargs["hidden_states"]
            if isinstance(output, tuple):
                return change(given, output[0]), *output[1:]
            return change(given, output)

        return change_output

    handles = [layers[i].register_forward_hook(hook(change), with_kwargs=True) for i, change in changes.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def without(layers: nn.ModuleList, start: int, stop: int) -> contextlib.AbstractContextManager[None]:
    """Within, the layers [start, stop) return what they are given."""
    return changed_layers(layers, dict.fromkeys(range(start, stop), lambda given, _output: given))


def mean_kl(parent_logits: Tensor, logits: Tensor) -> Tensor:
    """Return KL(parent || model) per block, mean over tokens, from full logits in float64."""
    parent, child = parent_logits.double().log_softmax(-1), logits.double().log_softmax(-1)
    return (parent.exp() * (parent - child)).sum(-1).mean(-1)


def random_blocks(count: int, length: int = 16, seed: int = 1, labelled_fraction: float = 1.0) -> TokenBlocks:
    """Return random blocks with a random share of labelled tokens, never the first of a block."""
    labelled = torch.rand(count, length, generator=torch.Generator().manual_seed(seed + 1000)) < labelled_fraction
    labelled[:, 0] = False
    return TokenBlocks(tokens(count, length, seed), labelled, "random", count, {})


@torch.no_grad()
def naive_scores(decoder: Decoder, ids: Tensor, removals: list[Removal]) -> Tensor:
    """Return the KL [R, N] from one full forward per removal."""
    parent, rows = decoder.model(ids, use_cache=False).logits, []
    for removal in removals:
        with changed_layers(decoder.layers, dict.fromkeys(removal, lambda given, _output: given)):
            rows.append(mean_kl(parent, decoder.model(ids, use_cache=False).logits))
    return torch.stack(rows)


def one_by_one(decoder: Decoder, turns: list[int] | None = None) -> Decoder:
    """Return the decoder as if its layers came in one by one; `turns` gets the number of each that came."""

    def resident() -> Iterator[int]:
        for i in range(len(decoder)):
            if turns is not None:
                turns.append(i)
            yield i

    return dataclasses.replace(decoder, resident=resident)
