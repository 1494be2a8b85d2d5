"""Fold a repair of the seam into weights that are there already, so that the checkpoint stays plain.

before  z = x + a change of what the last projection before the seam adds: its weight and bias are changed.
after   z = alpha x Q. The stream stays x. All that later layers add to it is divided by alpha and turned by Q^T; what
        they read is turned by Q, and a norm forgets alpha. A gain does not turn: it goes into the linears that read
        through the norm and becomes 1. The head reads too, so it is parted from the embedding. With Q = 1 nothing that
        reads changes, and tied embeddings stay tied.

Source: rotated streams arXiv:2401.15024 (SliceGPT), the rest this project, docs/methods.md#stitch.

Dimensions: D hidden size, F inputs of the projection, E = F and, where it has a bias, one more.

    with contextlib.ExitStack() as undo:  # at its end all is what it was
        fold(decoder, seam, Repair(alpha=1.1), Rewriter(undo))
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from layerscalpel.anatomy import Norm, Part, Writer, modules_of
from layerscalpel.errors import UserError
from layerscalpel.layers import Decoder
from layerscalpel.seam import Repair, Seam

Known = TypeVar("Known", int, float)
NUMBERS_AT_ONCE = 1 << 24
"""Numbers of a weight that are rewritten at once, in float64."""


@dataclass
class Rewriter:
    """Changes parameters in place and knows how to undo that; a shared one is changed once."""

    undo: contextlib.ExitStack
    """Gets what puts everything back, copies on the host among it."""
    stored: torch.dtype | None = None
    """The format in which weights are saved: they are rounded to it, so that what is measured is what is saved."""
    done: set[tuple[int, int]] = field(default_factory=set)

    @torch.no_grad()
    def __call__(self, parameter: Tensor, axis: int, change: Callable[..., Tensor], *beside: Tensor) -> None:
        """Replace the vectors of a parameter along an axis, as rows [.., K] in float64, by `change(rows, *beside)`."""
        if (id(parameter), axis) in self.done:
            return
        self.done.add((id(parameter), axis))
        self.undo.callback(parameter.data.copy_, parameter.detach().to("cpu", copy=True))
        rows = parameter.data.movedim(axis, -1)
        rows = rows if rows.dim() > 1 else rows[None]
        at_once = max(1, NUMBERS_AT_ONCE // rows[0].numel())
        for part, *others in zip(*(tensor.split(at_once) for tensor in (rows, *beside)), strict=True):
            wide = part.cpu() if part.device.type == "mps" else part  # which has no float64
            part.copy_(change(wide.double(), *others).to(self.stored or part.dtype))


def fold(decoder: Decoder, seam: Seam, repair: Repair, rewrite: Rewriter) -> None:
    """Fold a repair into a decoder's weights, in place.

    Raises:
        UserError: other weights than the head are tied, and a rotation cannot keep them so.
    """
    if repair.changes_projection:
        _change_projection(decoder, seam, repair, rewrite)
        return
    if repair.turn_DD is not None:
        for norm in seam.after.norms:
            _turn_behind(decoder, norm, repair.turn_DD, rewrite)
    turn_DD = torch.eye(decoder.hidden_size, dtype=torch.float64) if repair.turn_DD is None else repair.turn_DD
    _change_readers(decoder, seam.after.direct, repair.alpha * turn_DD, rewrite)
    for writer in seam.after.writers:
        _change_writer(decoder, writer, repair, rewrite)


def _change_projection(decoder: Decoder, seam: Seam, repair: Repair, rewrite: Rewriter) -> None:
    owned = _parameters(decoder, seam.last, seam.last.axes) if seam.last else []
    if repair.outputs_DD is not None:
        map_DD = repair.outputs_DD
        for parameter, axis in owned:
            rewrite(parameter, axis, lambda rows: rows + rows @ map_DD.to(rows.device))
    elif repair.inputs_ED is not None:
        sizes = [parameter.numel() // parameter.shape[axis] for parameter, axis in owned]  # F, and 1 for a bias
        for (parameter, axis), added in zip(owned, repair.inputs_ED.split_with_sizes(sizes), strict=True):
            rewrite(parameter, axis, lambda rows, part: rows + part.to(rows.device), added)


def _change_writer(decoder: Decoder, writer: Writer, repair: Repair, rewrite: Rewriter) -> None:
    """Have a part add to the stream what it does, over alpha and turned by Q^T."""
    alpha, turn_DD = repair.alpha, repair.turn_DD
    if turn_DD is None:
        for parameter, offset in _parameters(decoder, writer, writer.offsets):
            rewrite(parameter, -1, lambda rows, o=offset: (rows + o) / alpha - o)
        return
    for parameter, axis in _parameters(decoder, writer, writer.axes):
        rewrite(parameter, axis, lambda rows: rows @ (turn_DD.T / alpha).to(rows.device))


def _change_readers(decoder: Decoder, readers: Iterable[Part], matrix_DD: Tensor, rewrite: Rewriter) -> None:
    """Have linears meet what they read times a matrix, though it is not multiplied."""
    for part in readers:
        for module in modules_of(decoder, part):
            _untie(decoder.model, module, list(part.axes), rewrite.undo)
        for parameter, axis in _parameters(decoder, part, part.axes):
            rewrite(parameter, axis, lambda rows: rows @ matrix_DD.T.to(rows.device))


def _turn_behind(decoder: Decoder, norm: Norm, turn_DD: Tensor, rewrite: Rewriter) -> None:
    """Have what reads through a norm meet the stream turned; the norm's gain goes into it."""
    gains = _parameters(decoder, norm, norm.offsets)
    for parameter, offset in gains:
        turn_DD = turn_DD * (parameter.detach().cpu().double() + offset).to(turn_DD)
    _change_readers(decoder, norm.readers, turn_DD, rewrite)
    for parameter, offset in gains:
        rewrite(parameter, -1, lambda rows, o=offset: torch.full_like(rows, 1 - o))


def _parameters(decoder: Decoder, part: Part, what: Mapping[str, Known]) -> list[tuple[nn.Parameter, Known]]:
    """Return the parameters of a part, each with what is known of it."""
    return [(module.get_parameter(n), known) for module in modules_of(decoder, part) for n, known in what.items()]


def _untie(model: PreTrainedModel, module: nn.Module, names: list[str], undo: contextlib.ExitStack) -> None:
    """Give a module its own copy of parameters that it shares, as a head that is the embedding."""
    count = _names(model)
    shared = {name: module.get_parameter(name) for name in names if count[id(module.get_parameter(name))] > 1}
    if not shared:
        return
    for name, parameter in shared.items():
        module._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
        undo.callback(module._parameters.__setitem__, name, parameter)
    for config in _configs(model):
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
            undo.callback(setattr, config, "tie_word_embeddings", True)
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            undo.callback(setattr, part, "all_tied_weights_keys", part.all_tied_weights_keys)
            part.all_tied_weights_keys = part.get_expanded_tied_weights_keys(all_submodels=True)
    if max(_names(model).values()) > 1:
        raise UserError(f"other weights of {type(model).__name__} than its head are tied")


def _names(model: nn.Module) -> Counter[int]:
    """Count under how many names each parameter stands."""
    return Counter(id(parameter) for _name, parameter in model.named_parameters(remove_duplicate=False))


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Return the configs of a model and of all of its parts."""
    found: dict[int, PreTrainedConfig] = {}

    def add(value: Any) -> None:
        if isinstance(value, PreTrainedConfig) and id(value) not in found:
            found[id(value)] = value
            for inner in vars(value).values():
                add(inner)

    for module in model.modules():
        add(getattr(module, "config", None))
    return list(found.values())
