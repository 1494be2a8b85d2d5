"""Find what layers write to the residual stream and how they read it, by trying what changes do; no name is known.

A module writes if a nudge of its output, with all that runs after it in the layer silent, arrives at the layer's end in
its own direction. A module reads if, with all writers silent, it is given the very tokens that enter the layer; mostly
that is a norm, and what takes in its output reads through it. Which parameters scale an output, and along which axis
they meet the stream, is found by calling the module alone (trials.py).

What is found may be incomplete where a family computes outside of its modules. So nothing is folded on this knowledge
before the fold has been proven (fold.py).

Source: this project, docs/methods.md#stitch.

Dimensions: B blocks, T tokens, D hidden size.

    anatomy = find_anatomy(decoder, first=12)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from layerscalpel.cut import proof_tokens
from layerscalpel.hooks import Step, head_logits, hidden_at, leaves, replay
from layerscalpel.layers import Decoder
from layerscalpel.trials import (
    CLOSE_IN_16_BIT,
    Call,
    alike,
    given_other,
    hooked,
    nothing,
    own_parameters,
    recall,
    recorded,
    scaling_of,
    tokens_among,
    turning_of,
)


@dataclass(frozen=True)
class Part:
    """A module that meets the residual stream; of a list of experts, all of them."""

    layer: int | None
    """The layer it lies in; None for what comes after the last one."""
    path: str
    """Its name within the layer, or else the model, with * for its place in a list."""
    kind: str
    """Its class."""
    axes: dict[str, int]
    """{parameter: axis along which it meets the stream}; empty where that was not found."""


@dataclass(frozen=True)
class Writer(Part):
    """What adds to the stream."""

    factor: float | None
    """What its output is multiplied with; None where that differs from token to token."""
    offsets: dict[str, float]
    """{parameter: offset} whose sums scale its output (a gain of 1 + weight has the offset 1); empty if not found."""


@dataclass(frozen=True)
class Norm(Part):
    """What reads the stream and is not linear in it, and what reads through it."""

    offsets: dict[str, float]
    """{gain: offset}; empty for a norm without a gain."""
    turns: bool
    """Whether, with a gain of 1, it does the same in every basis and at every scale."""
    readers: tuple[Part, ...]


AnyPart = TypeVar("AnyPart", bound=Part)


@dataclass(frozen=True)
class Anatomy:
    """What meets the stream in the layers from a given one on, in the order in which it runs, and at the head."""

    writers: tuple[Writer, ...]
    norms: tuple[Norm, ...]
    direct: tuple[Part, ...]
    """Linears that read the stream itself, through no norm."""

    def after(self, start: int) -> Anatomy:
        """Return what of it lies in layer `start` or after it."""

        def kept(parts: tuple[AnyPart, ...]) -> tuple[AnyPart, ...]:
            return tuple(part for part in parts if part.layer is None or part.layer >= start)

        return Anatomy(kept(self.writers), kept(self.norms), kept(self.direct))

    def parts(self) -> list[Part]:
        """Return all parts, those that read through a norm too."""
        return [*self.writers, *self.norms, *self.direct, *(part for norm in self.norms for part in norm.readers)]


def modules_of(decoder: Decoder, part: Part) -> list[nn.Module]:
    """Return the modules of a decoder that a part stands for."""
    root = decoder.model if part.layer is None else decoder.layers[part.layer]
    return [module for name, module in root.named_modules() if general(root, name) == part.path]


def general(root: nn.Module, name: str) -> str:
    """Return the name of a module with * for its place in a list, as of experts."""
    steps = name.split(".")
    listed = (isinstance(root.get_submodule(".".join(steps[:i])), nn.ModuleList) for i in range(len(steps)))
    return ".".join("*" if is_listed else step for step, is_listed in zip(steps, listed, strict=True))


@torch.no_grad()
def find_anatomy(decoder: Decoder, first: int) -> Anatomy:
    """Return what meets the stream in layer `first` and all after it, and at the head, by some tiny forwards."""
    writers: list[Writer] = []
    readers: list[Part] = []

    def visit(i: int, hidden_BTD: Tensor, step: Step) -> None:
        if i >= first:
            found = _Finder(i, decoder.layers[i], "", hidden_BTD, lambda: step(hidden_BTD))
            own = found.writers()
            writers.extend(own.values())
            readers.extend(found.readers(silent=own))

    with replay(decoder, visit):
        final_BTD = hidden_at(decoder, proof_tokens(decoder), len(decoder))
    head = _Finder(None, decoder.model, f"{decoder.path}.", final_BTD, lambda: head_logits(decoder, final_BTD))
    readers.extend(head.readers(silent=()))
    norms = tuple(part for part in readers if isinstance(part, Norm))
    return Anatomy(tuple(writers), norms, tuple(part for part in readers if not isinstance(part, Norm)))


class _Finder:
    """Tries the modules of one layer, or those after all layers, on the same hidden states again and again."""

    def __init__(
        self, layer: int | None, root: nn.Module, without: str, stream_BTD: Tensor, run: Callable[[], Tensor]
    ) -> None:
        modules = {n: m for n, m in root.named_modules() if n and not (without and n.startswith(without))}
        with_own = {name: module for name, module in modules.items() if own_parameters(module)}
        ends = {name: module for name, module in modules.items() if not any(module.children())}
        self.layer, self.root, self.stream_BTD, self.run = layer, root, stream_BTD, run
        self.modules, self.holders = with_own | ends, list(with_own)
        width, generator = stream_BTD.shape[-1], torch.Generator().manual_seed(0)
        random_DD = torch.randn(width, width, dtype=torch.float64, generator=generator)
        nudge_D = torch.randn(width, generator=generator) * stream_BTD.float().std().item()
        self.turn_DD = torch.linalg.qr(random_DD)[0].to(stream_BTD.dtype).to(stream_BTD.device)
        self.nudge_D = nudge_D.to(stream_BTD.dtype).to(stream_BTD.device)
        with recorded(self.modules) as self.calls:
            run()

    def writers(self) -> dict[str, Writer]:
        """Return {module: writer} in the order in which they run; of a list of experts, one."""
        able, found = [name for name, call in self.calls.items() if self._may_write(name, call)], {}
        for place, name in enumerate(able):
            if self._general(name) in map(self._general, found):
                continue
            module, call = self.modules[name], self.calls[name]
            share_BT = self._arrived(module, [self.modules[later] for later in able[place + 1 :]])
            if share_BT is not None:
                axes = turning_of(module, call, self.turn_DD, call.output @ self.turn_DD)
                offsets = scaling_of(module, call)
                steady = bool((share_BT - share_BT.mean()).abs().max() <= 0.01 * share_BT.abs().max())
                factor = share_BT.mean().item() if steady and self._general(name) == name else None
                found[name] = Writer(self.layer, self._general(name), type(module).__name__, axes, factor, offsets)
        return found

    def _general(self, name: str) -> str:
        return general(self.root, name)

    def _may_write(self, name: str, call: Call) -> bool:
        """Whether a module holds parameters, no module in it does, and what it returns could be added."""
        shaped = isinstance(call.output, Tensor) and call.output.shape[-1:] == self.nudge_D.shape
        return shaped and name in self.holders and self._is_end(name)

    def _is_end(self, name: str) -> bool:
        return not any(other.startswith(f"{name}.") for other in self.holders)

    def _arrived(self, module: nn.Module, later: Iterable[nn.Module]) -> Tensor | None:
        """Return how much of a nudge arrives at each token [B, T], if nothing else changes there."""
        silent = [(other, nothing) for other in later]
        with hooked(silent):
            before_BTD = self.run()
        with hooked([*silent, (module, lambda _module, _args, _kwargs, output: output + self.nudge_D)]):
            moved_BTD = (self.run() - before_BTD).cpu().double()
        nudge_D = self.nudge_D.cpu().double()
        share_BT = moved_BTD @ nudge_D / nudge_D.square().sum()
        other = (moved_BTD - share_BT[..., None] * nudge_D).abs().max()
        return share_BT if share_BT.abs().max() > 1e-3 and other <= CLOSE_IN_16_BIT * moved_BTD.abs().max() else None

    def readers(self, silent: Iterable[str]) -> list[Part]:
        """Return what reads the stream when the writers are silent; norms with what reads through them."""
        with hooked((self.modules[name], nothing) for name in silent), recorded(self.modules) as still:
            self.run()
        parts: list[Part] = []
        for name, call in still.items():
            if tokens_among(call, self.stream_BTD) and self._is_end(name):
                part = self._linear(name, call, self.stream_BTD) or self._norm(name)
                if name in self.holders or (isinstance(part, Norm) and part.turns):  # not a dropout
                    parts.append(part)
        return parts

    def _linear(self, name: str, call: Call, rows: Tensor, *, any_length: bool = False) -> Part | None:
        """Return a module that takes in the given tokens and, with its parameters turned as they are, does the same."""
        places = tokens_among(call, rows, any_length=any_length) if name in self.holders else set()
        if not places:
            return None
        turned = given_other(call, places, lambda leaf: leaf @ self.turn_DD)
        axes = turning_of(self.modules[name], turned, self.turn_DD, call.output)
        return Part(self.layer, self._general(name), type(self.modules[name]).__name__, axes) if axes else None

    def _norm(self, name: str) -> Norm:
        module, call = self.modules[name], self.calls[name]
        offsets = scaling_of(module, call) if isinstance(call.output, Tensor) else {}
        turns = offsets.keys() == own_parameters(module).keys() and self._turns(module, call, offsets)
        through: dict[str, Part] = {}
        for other, given in self.calls.items() if turns else ():
            part = None if self._general(other) in through else self._linear(other, given, call.output, any_length=True)
            through |= {part.path: part} if part else {}
        return Norm(self.layer, self._general(name), type(module).__name__, {}, offsets, turns, tuple(through.values()))

    def _turns(self, module: nn.Module, call: Call, offsets: dict[str, float]) -> bool:
        """Whether with a gain of 1 a turned input gives the turned output, and one of another length the same."""
        plain = {name: torch.ones_like(parameter) - offsets[name] for name, parameter in own_parameters(module).items()}
        width, given = self.stream_BTD.shape[-1:], leaves((call.args, call.kwargs))
        places = {place for place, leaf in given if leaf.is_floating_point() and leaf.shape[-1:] == width}
        straight = recall(module, call, plain)
        if not isinstance(straight, Tensor) or straight.shape[-1:] != width:
            return False
        turned = recall(module, given_other(call, places, lambda leaf: leaf @ self.turn_DD), plain)
        longer = recall(module, given_other(call, places, lambda leaf: 2 * leaf), plain)
        return alike(turned, straight @ self.turn_DD) and alike(longer, straight)
