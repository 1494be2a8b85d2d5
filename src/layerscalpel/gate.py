"""The paper's differentiable concave gate: learn where the segment starts by gradient descent.

Every layer's contribution is scaled, x + m_i (f_i(x) - x), by a valley of width n whose only parameter is its start a:

    m_i(a) = 1 - sigmoid(k (i - a + 1/2)) sigmoid(k (a + n - 1/2 - i))

Adam lowers the KL to the uncut parent; then a is rounded. The 1/2 centres the valley: at a whole a the layers
a .. a + n - 1 are off and both neighbours on, where without it the two edges stand at one half (our departure, as are
learning rate and annealing, which the paper leaves open). The gradient in a vanishes about 1.5 layers from the edges,
so one start is a local search; many starts are therefore learned at once, as streams that share the parent's pass.
The minima lie near half-open edges (two layers half removed cost less than one removed whole), so both whole neighbours
of a learned start are worth scoring, not the rounded one alone.

One step of all streams is in valley.py; a stream whose start has settled is not computed any more.

Source: arXiv:2510.23652; the many starts are this project's, docs/methods.md#gate.

Dimensions: S starts, B blocks, T tokens, L layers, N blocks.

    path = learn_starts(decoder, tokens, num_removed=6, initial=[0.0, 12.0, 24.0])
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from layerscalpel.layers import Decoder, device_of
from layerscalpel.progress import say, track
from layerscalpel.valley import backward_kl

Item = TypeVar("Item")
STILL = 0.05
"""A start that moves by less, in layers, has settled."""
NEARLY_STEEP = 0.2
"""No start settles before the steepness is this close to its last value: until then the loss itself changes."""


@dataclass(frozen=True)
class Learning:
    """How the start indices are learned."""

    steepness: tuple[float, float] = (1.0, 5.0)
    """k at the first and the last step, geometric between; equal values switch annealing off."""
    lr: float = 0.3
    """Adam's learning rate at the first step, in layers; it falls linearly to 0."""
    patience: int = 0
    """Steps without movement after which a start has settled; 0 learns to the end."""
    checkpointing: bool = False
    """Keep only what enters each layer and compute the rest again in the backward pass."""

    def steepness_at(self, share: float) -> float:
        """Return k when a share 0..1 of the steps is done."""
        first, last = self.steepness
        return first * (last / first) ** share


@dataclass(frozen=True)
class GatePath:
    """What the learning of the start indices left behind."""

    starts: list[list[float]]
    """[steps + 1][S] the start index a before the first and after each step; constant once it has settled."""
    losses: list[list[float | None]]
    """[steps][S] mean KL of the gated model in nats; None once the start has settled, since nothing is measured."""
    steepness: list[float]
    """[steps] k."""

    @classmethod
    def merged(cls, paths: Sequence[GatePath]) -> GatePath:
        """Join what several processes learned from the same blocks: path r of w learned the starts r, r + w, ...

        A path that ended earlier, because all of its starts had settled, is extended to the longest.
        """
        steepness = max((path.steepness for path in paths), key=len)
        whole = [path._extended(len(steepness)) for path in paths]
        starts = [_dealt(rows) for rows in zip(*(path.starts for path in whole), strict=True)]
        losses = [_dealt(rows) for rows in zip(*(path.losses for path in whole), strict=True)]
        return cls(starts, losses, steepness)

    def _extended(self, steps: int) -> GatePath:
        more = steps - len(self.losses)
        nothing: list[float | None] = [None] * len(self.starts[0])
        return GatePath(self.starts + self.starts[-1:] * more, self.losses + [nothing] * more, self.steepness)

    def ends(self, last_start: int) -> list[int]:
        """Return the rounded final start of each stream, kept within 0..last_start (the paper's choice)."""
        return [min(max(round(a), 0), last_start) for a in self.starts[-1]]

    def neighbours(self, last_start: int) -> list[tuple[int, int]]:
        """Return the whole starts on both sides of each stream's final start, kept within 0..last_start."""
        return [(max(0, math.floor(a)), min(math.ceil(a), last_start)) for a in self.starts[-1]]


def _dealt(rows: Sequence[list[Item]]) -> list[Item]:
    """Return the first item of each row, then the second of each, and so on."""
    turns = [divmod(turn, len(rows)) for turn in range(sum(map(len, rows)))]
    return [rows[rank][column] for column, rank in turns]


def spread_starts(num_starts: int, last_start: int, initial: float | None = None) -> list[float]:
    """Return evenly spaced starts over 0..last_start, or the given single one (None: the middle)."""
    if num_starts == 1:
        return [last_start / 2 if initial is None else min(initial, float(last_start))]
    return [last_start * i / (num_starts - 1) for i in range(num_starts)]


def learn_starts(
    decoder: Decoder, tokens: Tensor, *, num_removed: int, initial: Sequence[float], **learning: Any
) -> GatePath:
    """Learn start indices, one Adam step per block, one pass over the blocks.

    A start settles when it moved by less than 0.05 layers over the last `patience` steps and k is within 20 % of its
    last value; its stream then costs nothing. When all have settled, learning ends.

    Args:
        decoder: the parent; its weights are neither changed nor given gradients.
        tokens: [N, T] token ids.
        num_removed: n.
        initial: the S starts, 0 .. L - n; none is allowed.
        **learning: fields of `Learning`.

    Raises:
        UserError: the output of a layer or of a gated model, or its gradient, is not finite.
    """
    path, how = GatePath([[float(start) for start in initial]], [], []), Learning(**learning)
    label = f"gate n={num_removed}"
    if not initial:
        return path
    start_S = torch.tensor(path.starts[0], dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([start_S], lr=how.lr)
    moving_S = torch.ones(len(initial), dtype=torch.bool)
    with _frozen(decoder.model):
        for done, block in enumerate(track(tokens, label, len(tokens))):
            k = how.steepness_at(done / max(1, len(tokens) - 1))
            tokens_BT = block[None].to(device_of(decoder.model))
            adam.zero_grad()
            losses = iter(backward_kl(decoder, tokens_BT, start_S[moving_S], num_removed, k, how.checkpointing))
            adam.param_groups[0]["lr"] = how.lr * (1 - done / len(tokens))
            _move(adam, start_S, moving_S, len(decoder) - num_removed)
            path.losses.append([next(losses) if moves else None for moves in moving_S.tolist()])
            path.steepness.append(k)
            path.starts.append(start_S.tolist())
            moving_S = moving_S & ~_still(path, how)
            if not moving_S.any() and done + 1 < len(tokens):
                say(f"{label}: all starts have settled after {done + 1} of {len(tokens)} steps")
                break
    return path


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Within, no weight asks for a gradient."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


@torch.no_grad()
def _move(adam: torch.optim.Optimizer, start_S: Tensor, moving_S: Tensor, last_start: int) -> None:
    """Take one step with the moving starts; the others, which momentum would carry on, stay."""
    before_S = start_S.clone()
    adam.step()
    start_S.copy_(torch.where(moving_S, start_S.clamp(0, last_start), before_S))


def _still(path: GatePath, how: Learning) -> Tensor:
    """Tell which starts [S] have not moved for long enough."""
    recent = torch.tensor(path.starts[-how.patience - 1 :])
    far = abs(path.steepness[-1] - how.steepness[1]) > NEARLY_STEEP * how.steepness[1]
    if not how.patience or len(recent) <= how.patience or far:
        return torch.zeros(recent.shape[1], dtype=torch.bool)
    return recent.amax(0) - recent.amin(0) < STILL
