"""Reach into a decoder's layers while its own forward runs.

Two primitives carry the whole package, both made of hooks and never a re-implementation of a model's forward:

replay  during a parent forward, every layer also advances other streams of hidden states with the very keyword
        arguments (masks, rotary tables) that the model made for it.
inject  the layers before a boundary are bypassed and given hidden states enter there, so that the model's own forward
        does the rest: final norm, head, soft-capping, logit scaling.

A third, `bypass`, makes chosen layers the identity: the reference that a cut model must equal.

Dimensions: B blocks, T tokens, D hidden size, V vocabulary, S streams. boundary b: the hidden state entering layer b;
boundary L leaves the last layer.

    with replay(decoder, lambda i, hidden, step: ...): model(tokens, use_cache=False)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from layerscalpel.errors import UserError
from layerscalpel.layers import Decoder, body_of
from layerscalpel.segment import Segment

Step = Callable[[Tensor], Tensor]
"""Advances streams [S * B, T, D] (s-major) through a layer."""
Visit = Callable[[int, Tensor, Step], None]
"""(layer, hidden states [B, T, D] that enter it, step)."""
STACKED_TOKENS = {"cpu": 1024, "cuda": 1 << 17, "mps": 1 << 14}
"""Tokens of all streams that go through a layer at once: a CPU is fastest while they stay in its cache."""
STACKED_NUMBERS = 1 << 27
"""Numbers of a hidden state that go through a layer at once: a wide model's layer holds several times as many."""


class EarlyEndError(Exception):
    """Leaves a forward whose rest nobody needs."""


def require_streams(decoder: Decoder) -> None:
    """Refuse a decoder whose layers hand each other more than hidden states [B, T, D]."""
    if decoder.entangled:
        raise UserError(
            f"layers of {type(decoder.model).__name__} {decoder.entangled}"
            " - it can be cut at a given segment (scalpel cut), but not searched or healed"
        )


def leaves(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """Yield (place, tensor) of all tensors within dicts, tuples and lists."""
    if isinstance(value, Tensor):
        yield place, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*place, key))
    elif isinstance(value, (tuple, list)):
        for key, item in enumerate(value):
            yield from leaves(item, (*place, key))


def map_leaves(value: Any, change: Callable[[tuple, Tensor], Tensor], place: tuple[Any, ...] = ()) -> Any:
    """Return the value with `change(place, tensor)` in the place of every tensor."""
    if isinstance(value, Tensor):
        return change(place, value)
    if isinstance(value, dict):
        return {key: map_leaves(item, change, (*place, key)) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(map_leaves(item, change, (*place, key)) for key, item in enumerate(value))
    return value


def split_hidden(args: tuple, kwargs: dict) -> tuple[Tensor, tuple, dict]:
    """Part a layer's arguments into hidden states (first positional, or `hidden_states`) and the rest."""
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states"), (), rest


def hidden_in(output: Any) -> Tensor:
    """Return the hidden states of a layer's output: the tensor itself or the first item of a tuple or list."""
    return output if isinstance(output, Tensor) else output[0]


@contextlib.contextmanager
def replay(decoder: Decoder, visit: Visit) -> Iterator[None]:
    """Within, each layer of a forward calls `visit(i, hidden_BTD, step)`.

    `step(streams)` advances streams [S * B, T, D] (s-major) through layer i with the arguments the parent's layer got.
    It calls the layer's `forward`, so it does not fire hooks again. Run the model with use_cache=False: a replay would
    append to a cache.
    """
    require_streams(decoder)

    def hook(i: int, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        hidden, rest_args, rest_kwargs = split_hidden(args, kwargs)
        visit(i, hidden, partial(_step, decoder, module.forward, hidden.shape[0], (rest_args, rest_kwargs)))

    handles = [
        layer.register_forward_hook(partial(hook, i), with_kwargs=True) for i, layer in enumerate(decoder.layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def stacked_streams(hidden_BTD: Tensor) -> int:
    """Return how many streams of that shape go through a layer at once."""
    tokens = min(STACKED_TOKENS[hidden_BTD.device.type], STACKED_NUMBERS // hidden_BTD.shape[-1])
    return max(1, tokens // (hidden_BTD.shape[0] * hidden_BTD.shape[1]))


def _step(
    decoder: Decoder, forward: Callable[..., Any], batch: int, rest: tuple[tuple, dict], streams: Tensor
) -> Tensor:
    most = stacked_streams(streams[:batch])
    group = batch * (most if _stackable(decoder, batch, rest) else 1)
    if streams.shape[0] > group:
        return torch.cat([_step(decoder, forward, batch, rest, part) for part in streams.split(group)])
    repeats = streams.shape[0] // batch

    def tile(place: tuple, leaf: Tensor) -> Tensor:
        grows = place in decoder.per_row
        return leaf.repeat(repeats, *[1] * (leaf.dim() - 1)) if grows and repeats > 1 else leaf

    args, kwargs = map_leaves(rest, tile)
    return hidden_in(forward(streams, *args, **kwargs))


def _stackable(decoder: Decoder, batch: int, rest: tuple[tuple, dict]) -> bool:
    """Whether each tensor is broadcast, or grows with the batch as the probe saw; else streams go one at a time."""
    sizes = {place: leaf.shape[0] if leaf.dim() else 1 for place, leaf in leaves(rest)}
    broadcast = {place for place, size in sizes.items() if size == 1 or (place in decoder.seen and size != batch)}
    return all(size % batch == 0 if place in decoder.per_row else place in broadcast for place, size in sizes.items())


@contextlib.contextmanager
def swapped(decoder: Decoder, forwards: dict[int, Callable[[Tensor, tuple, dict], Tensor]]) -> Iterator[None]:
    """Within, layer i computes `forwards[i](hidden, args, kwargs)` instead of its own forward."""

    def outer(i: int, inner: Callable[[Tensor, tuple, dict], Tensor], *args: Any, **kwargs: Any) -> Any:
        hidden, rest_args, rest_kwargs = split_hidden(args, kwargs)
        return decoder.as_output(i, inner(hidden, rest_args, rest_kwargs))

    covered = {i: vars(decoder.layers[i]).get("forward") for i in forwards}
    for i, inner in forwards.items():
        decoder.layers[i].forward = partial(outer, i, inner)
    try:
        yield
    finally:
        for i, own in covered.items():
            del decoder.layers[i].forward  # uncovers the class's forward
            if own is not None:  # another library had set one on the instance, as accelerate does
                decoder.layers[i].forward = own


def _unchanged(hidden: Tensor, _args: tuple, _kwargs: dict) -> Tensor:
    return hidden


def bypass(decoder: Decoder, segment: Segment) -> contextlib.AbstractContextManager[None]:
    """Within, the layers of the segment are the identity."""
    return swapped(decoder, dict.fromkeys(range(segment.start, segment.stop), _unchanged))


@contextlib.contextmanager
def inject(decoder: Decoder, boundary: int, hidden: Tensor) -> Iterator[None]:
    """Within, a forward of the model starts at a boundary with given hidden states [B, T, D]; 0 <= boundary <= L.

    Call the model with token ids of shape [B, T] (their values do not matter where layers see hidden states only), so
    that it makes masks and rotary tables for that shape.
    """
    require_streams(decoder)
    if boundary == 0:
        first = decoder.layers[0]

        def enter(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            _, rest_args, rest_kwargs = split_hidden(args, kwargs)
            return (hidden, *rest_args), rest_kwargs

        handle = first.register_forward_pre_hook(enter, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
        return
    with swapped(decoder, {i: lambda _hidden, _args, _kwargs: hidden for i in range(boundary)}):
        yield


def visit_layer(decoder: Decoder, i: int, tokens: Tensor, hidden: Tensor, visit: Visit) -> Tensor:
    """Run layer i alone on hidden states [B, T, D] at boundary i, and return those at boundary i + 1.

    The model's own forward makes the layer's arguments for the token ids [B, T]; `visit(i, hidden, step)` may advance
    other streams with them, as in `replay`, before the layer itself advances `hidden`.
    """
    require_streams(decoder)
    caught: list[Tensor] = []

    def alone(_hidden: Tensor, args: tuple, kwargs: dict) -> Tensor:
        step = partial(_step, decoder, forward, tokens.shape[0], (args, kwargs))
        visit(i, hidden, step)
        caught.append(step(hidden))
        raise EarlyEndError

    forward = decoder.layers[i].forward
    forwards = dict.fromkeys(range(i), _unchanged) | {i: alone}
    with contextlib.suppress(EarlyEndError), swapped(decoder, forwards):
        body_of(decoder.model)(input_ids=tokens, use_cache=False)
    return caught[0]


def hidden_at(decoder: Decoder, tokens: Tensor, boundary: int, positions: Tensor | None = None) -> Tensor:
    """Return the hidden states [B, T, D] at a boundary (0..L) for token ids [B, T]; nothing after it is computed.

    `positions` [B, T], each token's place in its own document, keep packed documents apart where the model can.
    """
    return _captured(decoder, tokens, boundary, positions)


def resume_from(
    decoder: Decoder,
    tokens: Tensor,
    boundary: int,
    hidden: Tensor,
    positions: Tensor | None = None,
    *,
    until: int | None = None,
) -> Tensor:
    """Return the hidden states [B, T, D] at boundary `until` (None is L) when `hidden` enters at `boundary`."""
    until = len(decoder) if until is None else until
    if boundary == until:
        return hidden
    with inject(decoder, boundary, hidden):
        return _captured(decoder, tokens, until, positions)


@contextlib.contextmanager
def caught_at(decoder: Decoder, boundary: int) -> Iterator[list[Tensor]]:
    """Within, each forward adds the hidden states that leave layer `boundary` - 1 to a list; boundary is 1..L."""
    caught: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        caught.append(hidden_in(output))

    handle = decoder.layers[boundary - 1].register_forward_hook(keep)
    try:
        yield caught
    finally:
        handle.remove()


def _captured(decoder: Decoder, tokens: Tensor, boundary: int, positions: Tensor | None = None) -> Tensor:
    require_streams(decoder)
    caught: list[Tensor] = []

    def before(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        caught.append(split_hidden(args, kwargs)[0])
        raise EarlyEndError

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        caught.append(hidden_in(output))
        raise EarlyEndError

    apart = {} if positions is None else {"position_ids": positions}
    last = boundary == len(decoder)
    layer = decoder.layers[boundary - 1] if last else decoder.layers[boundary]
    handle = layer.register_forward_hook(after) if last else layer.register_forward_pre_hook(before, with_kwargs=True)
    try:
        with contextlib.suppress(EarlyEndError):
            body_of(decoder.model)(input_ids=tokens, use_cache=False, **apart)
    finally:
        handle.remove()
    return caught[0]


def require_finite(boundary: int, hidden: Tensor) -> None:
    """Refuse a parent whose hidden states overflow: every score after that layer would be void."""
    if not torch.isfinite(hidden).all():
        where = f"layer {boundary - 1}'s output" if boundary else "the embedding"
        raise UserError(f"{where} is not finite (NaN or infinity) - try another --dtype, as bfloat16 for float16")


class FiniteWatch:
    """Tells whether hidden states were finite, all boundaries at once: each answer waits for the device."""

    def __init__(self) -> None:
        self._largest: list[Tensor] = []

    def look(self, hidden: Tensor) -> None:
        """Note the largest number at the next boundary."""
        self._largest.append(torch.linalg.vector_norm(hidden, torch.inf))

    def require(self) -> None:
        """Refuse a parent whose hidden states overflow, by the first boundary at which they did."""
        for boundary, largest in enumerate(torch.stack(self._largest).cpu()):
            require_finite(boundary, largest)


def head_logits(decoder: Decoder, hidden: Tensor) -> Tensor:
    """Return the logits [B, T, V] of hidden states [B, T, D] at boundary L, through the model's own norm and head."""
    tokens = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    with inject(decoder, len(decoder), hidden):
        return decoder.model(input_ids=tokens, use_cache=False).logits
