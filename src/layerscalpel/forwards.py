"""How layers run and where they wait while others are trained: compiled, recomputed in the backward pass, set aside.

with dressed(decoder, range(12, 26), compiled=True), parked(decoder, range(12)): ...
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from layerscalpel.layers import Decoder

VARIANTS = 64
"""Compiled forms of one class of layers: with and without gradients, trained or not, by batch and kind of attention.

torch keeps 8 and runs what comes after them uncompiled without a word."""


@contextlib.contextmanager
def dressed(
    decoder: Decoder, layers: Iterable[int], *, compiled: bool = False, recomputed: bool = False
) -> Iterator[None]:
    """Within, these layers are compiled by torch.compile, or keep no activations and run anew in the backward pass."""
    chosen = [decoder.layers[i] for i in layers] if compiled or recomputed else []
    covered = [vars(layer).get("forward") for layer in chosen]
    for layer in chosen:
        forward: Callable[..., Any] = layer.forward
        if compiled:
            forward = torch.compile(forward)
        if recomputed:
            forward = partial(checkpoint, forward, use_reentrant=False)
        layer.forward = forward
    many = torch._dynamo.config.patch(recompile_limit=VARIANTS) if compiled else contextlib.nullcontext()
    try:
        with many:
            yield
    finally:
        for layer, own in zip(chosen, covered, strict=True):
            del layer.forward  # uncovers the class's forward
            if own is not None:
                layer.forward = own


@contextlib.contextmanager
def moved(modules: Iterable[nn.Module], device: torch.device, *, same: bool = False) -> Iterator[None]:
    """Within, these modules are on a device; after it, each is where it was.

    With `same`, weights that ask for no gradient are the same after it as before: they need not be copied back.
    """
    firsts = [(module, next(module.parameters(), None)) for module in modules]
    chosen = [(module, first.device) for module, first in firsts if first is not None]
    before = [(weight, weight.data) for module, _ in chosen for weight in module.parameters() if same]
    for module, _ in chosen:
        module.to(device)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        yield
    finally:
        for weight, data in before:
            if not weight.requires_grad:
                weight.data = data
        for module, home in chosen:
            module.to(home)


def parked(decoder: Decoder, layers: Iterable[int]) -> contextlib.AbstractContextManager[None]:
    """Within, these layers wait in host memory; they must not be run."""
    return moved([decoder.layers[i] for i in layers], torch.device("cpu"))
