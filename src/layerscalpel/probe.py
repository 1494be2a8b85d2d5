"""Learn by tiny forwards how a model's layers are called, and whether they can be run alone.

decoder = find_layers(model)
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from layerscalpel.errors import UserError, one_line
from layerscalpel.hooks import EarlyEndError, hidden_at, hidden_in, leaves, split_hidden, swapped
from layerscalpel.layers import REFUSALS, Decoder, body_of, device_of, find_layer_list, refuse_shared_keys


def find_layers(model: PreTrainedModel, *, like: Decoder | None = None) -> Decoder:
    """Find the layers of a causal language model and learn by tiny forwards how they are called.

    One forward, up to the first layer of every class, shows what layers return. In two more all layers are bypassed and
    note their arguments at batch 2 and 3, which tells the arguments that grow with the batch from the broadcast ones.
    The last two show whether a layer takes anything from those before it but the hidden states.

    Args:
        model: the model.
        like: another model of the same class and layers, whose layers return the same; for a model whose own layers
            cannot run because their weights are elsewhere.
    """
    path, layers = find_layer_list(model)
    refuse_shared_keys(model)
    returns, hidden_dims = (like.returns, like.hidden_dims) if like else _returns(model, layers)
    blind = Decoder(model, layers, path, returns, hidden_dims, frozenset(), frozenset())
    try:
        small, large = _arguments(blind, 2), _arguments(blind, 3)
    except REFUSALS as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(
            f"{type(model).__name__} does not run with its layers bypassed ({reason}) - this model cannot be cut"
        ) from error
    growing = {place for place, size in small.items() if size and 2 * large.get(place, 0) == 3 * size}
    known = replace(blind, per_row=frozenset(growing), seen=frozenset(small))
    return replace(known, entangled=like.entangled if like else _entangled(known))


def _probe_tokens(model: nn.Module, batch: int) -> Tensor:
    return torch.ones(batch, 5, dtype=torch.long, device=device_of(model))


def _returns(model: PreTrainedModel, layers: nn.ModuleList) -> tuple[tuple[tuple[type, int] | None, ...], int]:
    """Return what each layer returns, and the number of dimensions of the hidden states."""
    first_of = {type(layer): layer for layer in reversed(layers)}
    seen: dict[type, tuple[type, int] | None] = {}
    dims: set[int] = set()

    def look(module: nn.Module, _args: Any, output: Any) -> None:
        seen[type(module)] = None if isinstance(output, Tensor) else (type(output), len(output))
        dims.add(hidden_in(output).dim())
        if len(seen) == len(first_of):
            raise EarlyEndError

    handles = [layer.register_forward_hook(look) for layer in first_of.values()]
    try:
        with torch.no_grad(), contextlib.suppress(EarlyEndError):
            model(input_ids=_probe_tokens(model, 1), use_cache=False)  # whole: quantised ones unpack at its door
    finally:
        for handle in handles:
            handle.remove()
    if asleep := [item.__name__ for item in first_of if item not in seen]:
        raise UserError(
            f"{', '.join(asleep)} of {type(model).__name__} take no part in a forward of text alone"
            " - what removing them does cannot be compared, so this model cannot be cut"
        )
    return tuple(seen[type(layer)] for layer in layers), max(dims)


@torch.no_grad()
def _entangled(decoder: Decoder) -> str:
    """Return why a stream beside the parent's would not be what a cut model computes, or nothing.

    What a layer is given beside the hidden states must be the same when all other layers are bypassed, or not matter.
    """
    if decoder.hidden_dims != 3:
        return f"pass on {decoder.hidden_dims}-dimensional hidden states, not [B, T, D]"
    tokens, alone, found = _probe_tokens(decoder.model, 1), {}, []
    handed: dict[int, Tensor] = {}

    def note(i: int, hidden: Tensor, args: tuple, kwargs: dict) -> Tensor:
        alone[i] = args, kwargs
        return hidden

    def look(i: int, layer: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        hidden, *rest = split_hidden(args, kwargs)
        handed[i + 1] = hidden_in(output)
        if hidden.shape[1] != tokens.shape[1]:
            found.append("see other positions than the tokens have")
        elif not _alike(hidden, handed.get(i, hidden)):
            found.append("get hidden states that the model changes between them")
        elif not _alike(tuple(rest), alone[i]) and not _alike(
            _tried(layer, hidden, *alone[i]), hidden_in(output), 1e-2
        ):
            found.append("read what layers before them found, beside the hidden states")

    with swapped(decoder, {i: partial(note, i) for i in range(len(decoder))}):
        body_of(decoder.model)(input_ids=tokens, use_cache=False)
    handles = [
        layer.register_forward_hook(partial(look, i), with_kwargs=True) for i, layer in enumerate(decoder.layers)
    ]
    try:
        decoder.model(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return next(iter(found), "")


def _tried(layer: nn.Module, hidden: Tensor, args: tuple, kwargs: dict) -> Tensor | None:
    try:
        return hidden_in(layer.forward(hidden, *args, **kwargs))
    except REFUSALS:
        return None


def _alike(one: Any, other: Any, tolerance: float = 0.0) -> bool:
    """Whether two values hold the same tensors at the same places, up to a share of the largest number."""
    ours, theirs = dict(leaves(one)), dict(leaves(other))
    if {place: leaf.shape for place, leaf in ours.items()} != {place: leaf.shape for place, leaf in theirs.items()}:
        return False
    room = {place: float(tolerance * leaf.abs().max()) if tolerance else 0.0 for place, leaf in theirs.items()}
    return all(
        torch.allclose(ours[place].to(leaf), leaf, rtol=0, atol=room[place], equal_nan=True)
        for place, leaf in theirs.items()
    )


def _arguments(decoder: Decoder, batch: int) -> dict[tuple[Any, ...], int]:
    sizes: dict[tuple[Any, ...], int] = {}

    def note(hidden: Tensor, args: tuple, kwargs: dict) -> Tensor:
        for place, leaf in leaves((args, kwargs)):
            sizes[place] = leaf.shape[0] if leaf.dim() else 0
        return hidden

    with torch.no_grad(), swapped(decoder, dict.fromkeys(range(len(decoder)), note)):
        body_of(decoder.model)(input_ids=_probe_tokens(decoder.model, batch), use_cache=False)
    return sizes


@torch.no_grad()
def keeps_documents_apart(decoder: Decoder) -> bool:
    """Tell whether position ids that begin anew keep a packed document from seeing the one before it.

    Two blocks of two documents that differ in the first one alone: what leaves the second must be the same. A family
    that knows no position ids, or makes no mask of them, as a recurrent one, does not pass.
    """
    half = 6
    tokens = torch.arange(1, 1 + 2 * half, device=device_of(decoder.model))[None] % decoder.vocab_size
    others = torch.cat([tokens[:, half:], tokens[:, half:]], dim=1)
    positions = torch.arange(half, device=tokens.device).repeat(2)[None]
    try:
        one, other = (hidden_at(decoder, ids, len(decoder), positions)[:, half:].float() for ids in (tokens, others))
    except REFUSALS:
        return False
    return bool((one - other).abs().max() <= 0.01 * one.std())
