"""Race candidates: score all on few blocks, drop those that are surely worse, go on with the rest on more blocks.

All candidates of a group see the same blocks, so they are compared by paired differences: a block that is hard for
everybody hides nothing. The looks come after first_blocks, 2 first_blocks, 4 first_blocks, ... and all N blocks. At a
look, candidate c is dropped when for some rival r that is still in the race

    mean_n(KL_c - KL_r) > t * standard error of that mean,    P(T_{n-1} > t) = (1 - confidence) / ((C - 1) * looks).

Why the best one, b, is dropped with probability 1 - confidence at most: no rival is better in expectation, so for one
rival and one look, both fixed in advance, the event above has a probability of (1 - confidence) / ((C - 1) * looks) at
most. There are (C - 1) * looks such events and b cannot be dropped unless one of them happens, whichever rivals the
data makes leaders or leaves in the race. So the union bound covers the choice of the leader and the repeated looks. It
covers comparisons with every rival as well as those with the leader alone, and the former drop more: a close relative
of c shares its noise. The promise is for each group, and for the mean over all text, not for the best on these blocks.

Student's t is exact for normal differences and close for a mean over a block's tokens. It is not free of
assumptions: a rival whose loss sits in rare blocks looks better than it is until one of them has been seen.

Source: this project, docs/methods.md#exact.

Dimensions: C candidates, N blocks, n blocks seen.

    result = race(score, groups=[6] * 25, num_blocks=64, confidence=0.99)
    result.winner(6)  # 13
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from layerscalpel.errors import UserError
from layerscalpel.losses import Measured, block_mean
from layerscalpel.student import student_quantile

Score = Callable[[slice, list[int]], Tensor]
"""(blocks, candidates in ascending order) -> KL [candidates, blocks] in nats, float64 on the CPU, finite."""

Sound = Callable[[int], str | None]
"""candidate -> the reason why it may not win, or None."""


@dataclass(frozen=True)
class Margin:
    """How far the closest rival is behind the winner."""

    rival: int
    difference: Measured
    """Mean KL of the rival less that of the winner, in nats, paired over the n blocks that both saw."""

    @property
    def standard_errors(self) -> float:
        """The difference in units of its standard error: infinite where it has none, NaN where both are equal."""
        value, error = self.difference.value, self.difference.se
        return value / error if error else math.copysign(math.inf, value) if value else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Return the form of results.json; what is not finite is null."""
        errors = self.standard_errors
        return {
            "difference_kl_nats": self.difference.to_dict(),
            "standard_errors": errors if math.isfinite(errors) else None,
        }


@dataclass(frozen=True)
class RaceResult:
    """What every candidate scored and which of them are left."""

    kl_CN: Tensor
    """Mean KL over a block's tokens, in nats, float64, on the CPU; NaN where a candidate was not scored any more."""
    groups: tuple[Hashable, ...]
    """Of each candidate; candidates race within their group only."""
    looks: tuple[int, ...]
    """Blocks seen at each look at which something could be dropped; empty at confidence 0."""
    confidence: float
    dropped: frozenset[int]
    """Candidates that were worse than a rival."""
    refused: dict[int, str]
    """Candidates that led or were about to drop another, but may not win, with the reason."""

    def num_blocks(self, candidate: int) -> int:
        """Return the number of blocks that the candidate saw."""
        return int(self.kl_CN[candidate].isfinite().sum())

    def mean(self, candidate: int) -> Measured:
        """Return the mean KL of a candidate, in nats, over the blocks it saw."""
        seen_n = self.kl_CN[candidate, : self.num_blocks(candidate)]
        return block_mean(seen_n, torch.ones_like(seen_n))

    def left(self, group: Hashable) -> list[int]:
        """Return the candidates that were neither dropped nor refused."""
        return [c for c in self._members(group) if c not in self.dropped and c not in self.refused]

    def winner(self, group: Hashable) -> int:
        """Return the one of those left with the lowest mean, the smaller index of equals.

        Raises:
            UserError: every candidate of the group was refused; the reason is that of the first.
        """
        left = self.left(group)
        if not left:
            raise UserError(next(self.refused[c] for c in self.refused if self.groups[c] == group))
        return _ranked(self.kl_CN[:, : self.num_blocks(left[0])], left)[0]  # those left saw the same blocks

    def margin(self, group: Hashable) -> Margin | None:
        """Return the smallest paired difference of a rival to the winner; None without a rival.

        Where several are left the rival is one of them, else one of those dropped; then it can be negative, where
        another rival did the dropping, on blocks that did not favour the later winner.
        """
        winner = self.winner(group)
        others = [c for c in self._members(group) if c != winner and c not in self.refused]
        rivals = [c for c in others if c not in self.dropped] or others
        margins = [Margin(c, self.difference(c, winner)) for c in rivals]
        return min(margins, key=lambda margin: margin.difference.value, default=None)

    def to_dict(self, group: Hashable, names: Sequence[int | str]) -> dict[str, Any]:
        """Return plain values for results.json; names[c] stands for candidate c. Numbers count blocks."""
        num_blocks = max(self.num_blocks(c) for c in self._members(group))
        margin = self.margin(group)
        return {
            "confidence": self.confidence if self.looks else 0.0,  # where nothing can be dropped nothing is stated
            "first_blocks": self.looks[0] if self.looks else num_blocks,
            "num_blocks": num_blocks,
            "left": [names[c] for c in self.left(group)],
            "margin": None if margin is None else {"rival": names[margin.rival], **margin.to_dict()},
        }

    def _members(self, group: Hashable) -> list[int]:
        return [c for c, name in enumerate(self.groups) if name == group]

    def difference(self, candidate: int, other: int) -> Measured:
        """Return the mean of KL(candidate) - KL(other), in nats, paired over the blocks that both saw."""
        difference_N = self.kl_CN[candidate] - self.kl_CN[other]
        seen_n = difference_N[difference_N.isfinite()]
        return block_mean(seen_n, torch.ones_like(seen_n))


def race(
    score: Score,
    groups: Sequence[Hashable],
    num_blocks: int,
    *,
    confidence: float,
    first_blocks: int = 8,
    sound: Sound | None = None,
) -> RaceResult:
    """Score candidates on more and more blocks; drop those that are worse than a rival of their group.

    Equal candidates never drop each other. A candidate that is worse by the same amount on every block is dropped at
    the first look: the difference has no standard error. A group that is decided is not scored any more.

    Args:
        score: called once for each look, with the blocks that are new and the candidates that still need them.
        groups: the group of each candidate.
        num_blocks: N, all the blocks there are.
        confidence: 0 <= confidence < 1, of keeping the best candidate of a group; 0 drops nothing and scores all
            candidates on all blocks in one call.
        first_blocks: blocks that every candidate sees before the first is dropped; with fewer nothing is dropped.
        sound: asked once for a candidate that leads its group, or is about to drop another, at a look. A refused one
            leaves the race and keeps its scores; it has dropped nobody.
    """
    assert 0 <= confidence < 1
    everything = confidence == 0 or num_blocks < max(2, first_blocks)  # one block has no standard error
    looks = (num_blocks,) if everything else _looks(first_blocks, num_blocks)
    racing: dict[Hashable, list[int]] = defaultdict(list)
    for candidate, group in enumerate(groups):
        racing[group].append(candidate)
    level = {group: (1 - confidence) / max(1, len(live) - 1) / len(looks) for group, live in racing.items()}
    kl_CN = torch.full((len(groups), num_blocks), math.nan, dtype=torch.float64)
    judge, seen = _Judge(sound), 0
    while racing and seen < num_blocks:
        stop = next(look for look in looks if look > seen)
        union = sorted(c for live in racing.values() for c in live)
        kl_LB = score(slice(seen, stop), union)
        assert kl_LB.shape == (len(union), stop - seen), f"score returned {list(kl_LB.shape)}"
        assert kl_LB.dtype == torch.float64, f"score returned {kl_LB.dtype}"
        assert bool(kl_LB.isfinite().all()), "score returned a value that is not finite"
        kl_CN[union, seen:stop] = kl_LB
        for group, live in list(racing.items()):
            bound = math.inf if everything else student_quantile(level[group], stop - 1)
            racing[group] = judge.look(kl_CN[:, :stop], live, bound)
        racing = {group: live for group, live in racing.items() if len(live) > 1}
        seen = stop
    passed = () if everything else tuple(look for look in looks if look <= seen)
    return RaceResult(kl_CN, tuple(groups), passed, confidence, frozenset(judge.dropped), judge.refused)


class _Judge:
    """Decides at the looks, and remembers who was dropped and who was refused."""

    def __init__(self, sound: Sound | None) -> None:
        self.sound = cache(sound) if sound else lambda candidate: None
        self.dropped: set[int] = set()
        self.refused: dict[int, str] = {}

    def look(self, kl_Cn: Tensor, live: list[int], bound: float) -> list[int]:
        """Return which of the live ones go on. From the best on, each drops those that are surely worse than it."""
        worse = _worse(kl_Cn, live, bound)
        left = _ranked(kl_Cn, live)
        place = 0
        while place < len(left):
            rival = left[place]
            beaten = worse[rival].intersection(left)
            reason = self.sound(rival) if place == 0 or beaten else None
            if reason is None:
                self.dropped |= beaten
                for candidate in beaten:
                    left.remove(candidate)
                place += 1
            else:  # it drops nobody
                self.refused[rival] = reason
                left.remove(rival)
        return sorted(left)


def _worse(kl_Cn: Tensor, live: list[int], bound: float) -> dict[int, set[int]]:
    """Return for each of the L live ones whose mean paired difference to it exceeds the bound."""
    kl_Ln, seen = kl_Cn[live], kl_Cn.shape[1]
    mean_L1 = kl_Ln.mean(dim=1, keepdim=True)
    own_Ln = kl_Ln - mean_L1  # the deviation of a difference is the distance of two rows without their means
    distance_LL = torch.cdist(own_Ln, own_Ln, compute_mode="donot_use_mm_for_euclid_dist")
    error_LL = distance_LL / math.sqrt(seen * max(1, seen - 1))
    worse: dict[int, set[int]] = defaultdict(set)
    for rival, candidate in (mean_L1.T - mean_L1 > bound * error_LL).nonzero().tolist():
        worse[live[rival]].add(live[candidate])
    return worse


def _ranked(kl_Cn: Tensor, candidates: list[int]) -> list[int]:
    """Return the candidates by their mean, the smaller index of equals first."""
    means = dict(zip(candidates, kl_Cn[candidates].mean(dim=1).tolist(), strict=True))
    return sorted(candidates, key=lambda c: (means[c], c))


def _looks(first_blocks: int, num_blocks: int) -> tuple[int, ...]:
    """Return the number of blocks seen at each look: doubled from one to the next, and all at the last."""
    looks, seen = [], max(2, first_blocks)
    while seen < num_blocks:
        looks.append(seen)
        seen *= 2
    return (*looks, num_blocks)
