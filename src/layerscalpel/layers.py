"""Reach into any decoder's layers without an adapter per family.

Two primitives carry the whole package, both made of hooks and never a re-implementation of a model's forward:

replay  during a parent forward, every layer also advances other streams of hidden states with the very keyword
        arguments (masks, rotary tables) that the model made for it.
inject  the layers before a boundary are bypassed and given hidden states enter there, so that the model's own forward
        does the rest: final norm, head, soft-capping, logit scaling.

A third, `bypass`, makes chosen layers the identity: the reference that a cut model must equal.

Dimensions: B blocks, T tokens, D hidden size, V vocabulary, S streams. boundary b: the hidden state entering layer b;
boundary L leaves the last layer.

    decoder = find_layers(model)
    with replay(decoder, lambda i, hidden, step: ...): model(tokens, use_cache=False)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedModel

from layerscalpel.errors import UserError
from layerscalpel.segment import Segment

REFUSALS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, StopIteration, TypeError, ValueError),
    StrictDataclassError,
)
"""What config and model classes raise when they refuse their values."""
MOST_LAYERS = 10_000
"""More are a mistake in a config, which nothing should wait for."""
STACKED_TOKENS = {"cpu": 1024, "cuda": 1 << 17, "mps": 1 << 14}
"""Tokens of all streams that go through a layer at once: a CPU is fastest while they stay in its cache."""
Step = Callable[[Tensor], Tensor]
Visit = Callable[[int, Tensor, Step], None]


@dataclass(frozen=True)
class Decoder:
    """A causal language model and the place of its layers."""

    model: PreTrainedModel
    layers: nn.ModuleList
    path: str
    """Dotted name of the ModuleList, as `model.layers`."""
    returns: tuple[tuple[type, int] | None, ...]
    """For each layer None when it returns a tensor, else class and length of what it returns, hidden states first."""
    hidden_dims: int
    """Dimensions of the hidden states: 3 for [B, T, D]; families with several residual streams have 4."""
    per_row: frozenset[tuple[Any, ...]]
    """Places of the layer arguments whose leading size grows with the batch (as BLOOM's alibi)."""
    seen: frozenset[tuple[Any, ...]]
    """Places of all tensor arguments that a layer was seen to get."""

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def hidden_size(self) -> int:
        """Width D of the residual stream."""
        return self.model.config.get_text_config(decoder=True).hidden_size

    @property
    def vocab_size(self) -> int:
        """Number V of logits."""
        return self.model.config.get_text_config(decoder=True).vocab_size

    def as_output(self, i: int, hidden: Tensor) -> Any:
        """Dress hidden states as layer i returns them."""
        dress = self.returns[i]
        if dress is None:
            return hidden
        container, length = dress
        return getattr(container, "_make", container)([hidden, *[None] * (length - 1)])


class _EarlyEndError(Exception):
    """Leaves a forward whose rest nobody needs."""


def count_field(text_config: Any) -> str:
    """Return the name of the config field that holds the number of decoder layers."""
    if hasattr(text_config, "decoder_layers"):  # beside an encoder of its own count
        return "decoder_layers"
    return text_config.attribute_map.get("num_hidden_layers", "num_hidden_layers")


def num_layers_of(config: Any) -> int:
    """Return the decoder's layer count as the config states it, whatever the family calls it."""
    text = config.get_text_config(decoder=True)
    count = getattr(text, count_field(text), None)
    if not isinstance(count, int):
        raise UserError(f"config of type '{config.model_type}' states no number of decoder layers - is it a decoder?")
    if not 0 < count <= MOST_LAYERS:
        raise UserError(f"config of type '{config.model_type}' states {count} layers - allowed: 1 to {MOST_LAYERS}")
    return count


def find_layer_list(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Find the one outermost ModuleList of config-many items: of one class, else of several decoder layer classes.

    Raises:
        UserError: none or several fit; the message lists every ModuleList there is.
    """
    count = num_layers_of(model.config)
    lists = [(name, item) for name, item in model.named_modules() if isinstance(item, nn.ModuleList) and len(item)]
    outermost = [(n, m) for n, m in lists if not any(n.startswith(f"{other}.") for other, _ in lists)]
    fitting = [(name, item) for name, item in outermost if len(item) == count]
    uniform = [(name, item) for name, item in fitting if len({type(layer) for layer in item}) == 1]
    for choice in (uniform, fitting):
        if len(choice) == 1:
            return choice[0]
    found = ", ".join(f"{n} ({len(m)} x {'/'.join(sorted({type(x).__name__ for x in m}))})" for n, m in lists)
    raise UserError(
        f"{'several' if fitting else 'no'} lists of {count} decoder layers in {type(model).__name__}"
        f" - found: {found or 'no ModuleList at all'} - this model cannot be cut"
    )


def find_layers(model: PreTrainedModel) -> Decoder:
    """Find the layers of a causal language model and learn by tiny forwards how they are called.

    One forward, up to the first layer of every class, shows what layers return. In two more all layers are bypassed and
    note their arguments at batch 2 and 3, which tells the arguments that grow with the batch from the broadcast ones.
    """
    path, layers = find_layer_list(model)
    refuse_shared_keys(model)
    returns, hidden_dims = _returns(model, layers)
    blind = Decoder(model, layers, path, returns, hidden_dims, frozenset(), frozenset())
    try:
        small, large = _arguments(blind, 2), _arguments(blind, 3)
    except REFUSALS as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(
            f"{type(model).__name__} does not run with its layers bypassed ({reason}) - this model cannot be cut"
        ) from error
    growing = {place for place, size in small.items() if size and 2 * large.get(place, 0) == 3 * size}
    return Decoder(model, layers, path, returns, hidden_dims, frozenset(growing), frozenset(small))


def refuse_shared_keys(model: PreTrainedModel) -> None:
    """Refuse a model whose layers read keys and values of layers that a cut may remove."""
    text = model.config.get_text_config(decoder=True)
    if getattr(text, "num_kv_shared_layers", 0) or "reuse" in (getattr(text, "kv_sharing_modes", None) or ()):
        raise UserError(
            f"layers of {type(model).__name__} read the keys and values of other layers - this model cannot be cut"
        )


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
            raise _EarlyEndError

    handles = [layer.register_forward_hook(look) for layer in first_of.values()]
    try:
        with torch.no_grad(), contextlib.suppress(_EarlyEndError):
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


def _require_streams(decoder: Decoder) -> None:
    if decoder.hidden_dims != 3:
        raise UserError(
            f"layers of {type(decoder.model).__name__} pass on {decoder.hidden_dims}-dimensional hidden states, not"
            " [B, T, D] - it can be cut at a given segment (scalpel cut), but not searched or healed"
        )


def _arguments(decoder: Decoder, batch: int) -> dict[tuple[Any, ...], int]:
    sizes: dict[tuple[Any, ...], int] = {}

    def note(hidden: Tensor, args: tuple, kwargs: dict) -> Tensor:
        for place, leaf in _leaves((args, kwargs)):
            sizes[place] = leaf.shape[0] if leaf.dim() else 0
        return hidden

    with torch.no_grad(), _swapped(decoder, dict.fromkeys(range(len(decoder)), note)):
        body_of(decoder.model)(input_ids=_probe_tokens(decoder.model, batch), use_cache=False)
    return sizes


def _leaves(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    if isinstance(value, Tensor):
        yield place, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, (*place, key))
    elif isinstance(value, (tuple, list)):
        for key, item in enumerate(value):
            yield from _leaves(item, (*place, key))


def _map_leaves(value: Any, change: Callable[[tuple, Tensor], Tensor], place: tuple[Any, ...] = ()) -> Any:
    if isinstance(value, Tensor):
        return change(place, value)
    if isinstance(value, dict):
        return {key: _map_leaves(item, change, (*place, key)) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_map_leaves(item, change, (*place, key)) for key, item in enumerate(value))
    return value


def device_of(model: nn.Module) -> torch.device:
    """Return the device that token ids must be on; where weights are left on disk, the one they are brought to."""
    hook = getattr(model, "_hf_hook", None)  # accelerate's
    device = next(model.parameters()).device
    return torch.device(hook.execution_device) if hook and device.type == "meta" else device


def body_of(model: PreTrainedModel) -> nn.Module:
    """Return the model without its head, where the family has such a part (else the model itself)."""
    return model.base_model


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
    _require_streams(decoder)

    def hook(i: int, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        hidden, rest_args, rest_kwargs = split_hidden(args, kwargs)
        visit(i, hidden, partial(_step, decoder, module, hidden.shape[0], (rest_args, rest_kwargs)))

    handles = [
        layer.register_forward_hook(partial(hook, i), with_kwargs=True) for i, layer in enumerate(decoder.layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _step(decoder: Decoder, layer: nn.Module, batch: int, rest: tuple[tuple, dict], streams: Tensor) -> Tensor:
    most = max(1, STACKED_TOKENS[streams.device.type] // (batch * streams.shape[1]))
    group = batch * (most if _stackable(decoder, batch, rest) else 1)
    if streams.shape[0] > group:
        return torch.cat([_step(decoder, layer, batch, rest, part) for part in streams.split(group)])
    repeats = streams.shape[0] // batch

    def tile(place: tuple, leaf: Tensor) -> Tensor:
        grows = place in decoder.per_row
        return leaf.repeat(repeats, *[1] * (leaf.dim() - 1)) if grows and repeats > 1 else leaf

    args, kwargs = _map_leaves(rest, tile)
    return hidden_in(layer.forward(streams, *args, **kwargs))


def _stackable(decoder: Decoder, batch: int, rest: tuple[tuple, dict]) -> bool:
    """Whether each tensor is broadcast, or grows with the batch as the probe saw; else streams go one at a time."""
    sizes = {place: leaf.shape[0] if leaf.dim() else 1 for place, leaf in _leaves(rest)}
    broadcast = {place for place, size in sizes.items() if size == 1 or (place in decoder.seen and size != batch)}
    return all(size % batch == 0 if place in decoder.per_row else place in broadcast for place, size in sizes.items())


@contextlib.contextmanager
def _swapped(decoder: Decoder, forwards: dict[int, Callable[[Tensor, tuple, dict], Tensor]]) -> Iterator[None]:
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


def bypass(decoder: Decoder, segment: Segment) -> contextlib.AbstractContextManager[None]:
    """Within, the layers of the segment are the identity."""
    return _swapped(decoder, {i: lambda hidden, _args, _kwargs: hidden for i in range(segment.start, segment.stop)})


@contextlib.contextmanager
def inject(decoder: Decoder, boundary: int, hidden: Tensor) -> Iterator[None]:
    """Within, a forward of the model starts at a boundary with given hidden states [B, T, D]; 0 <= boundary <= L.

    Call the model with token ids of shape [B, T] (their values do not matter where layers see hidden states only), so
    that it makes masks and rotary tables for that shape.
    """
    _require_streams(decoder)
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
    with _swapped(decoder, {i: lambda _hidden, _args, _kwargs: hidden for i in range(boundary)}):
        yield


def hidden_at(decoder: Decoder, tokens: Tensor, boundary: int) -> Tensor:
    """Return the hidden states [B, T, D] at a boundary (0..L) for token ids [B, T]; nothing after it is computed."""
    return _captured(decoder, tokens, boundary)


def resume_from(decoder: Decoder, tokens: Tensor, boundary: int, hidden: Tensor) -> Tensor:
    """Return the hidden states [B, T, D] at boundary L when `hidden` [B, T, D] enters at `boundary`."""
    if boundary == len(decoder):
        return hidden
    with inject(decoder, boundary, hidden):
        return _captured(decoder, tokens, len(decoder))


def _captured(decoder: Decoder, tokens: Tensor, boundary: int) -> Tensor:
    _require_streams(decoder)
    caught: list[Tensor] = []

    def before(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        caught.append(split_hidden(args, kwargs)[0])
        raise _EarlyEndError

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        caught.append(hidden_in(output))
        raise _EarlyEndError

    last = boundary == len(decoder)
    layer = decoder.layers[boundary - 1] if last else decoder.layers[boundary]
    handle = layer.register_forward_hook(after) if last else layer.register_forward_pre_hook(before, with_kwargs=True)
    try:
        with contextlib.suppress(_EarlyEndError):
            body_of(decoder.model)(input_ids=tokens, use_cache=False)
    finally:
        handle.remove()
    return caught[0]


def require_finite(boundary: int, hidden: Tensor) -> None:
    """Refuse a parent whose hidden states overflow: every score after that layer would be void."""
    if not torch.isfinite(hidden).all():
        where = f"layer {boundary - 1}'s output" if boundary else "the embedding"
        raise UserError(f"{where} is not finite (NaN or infinity) - try another --dtype, as bfloat16 for float16")


def head_logits(decoder: Decoder, hidden: Tensor) -> Tensor:
    """Return the logits [B, T, V] of hidden states [B, T, D] at boundary L, through the model's own norm and head."""
    tokens = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    with inject(decoder, len(decoder), hidden):
        return decoder.model(input_ids=tokens, use_cache=False).logits
