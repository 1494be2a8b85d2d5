"""What a search is given, what it finds, and the race over candidate cuts that most methods share.

task = Task(decoder, blocks.tokens, num_removed=6)
race_windows(task, [6])[6].scores.best()
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from layerscalpel.data import TokenBlocks
from layerscalpel.errors import UserError
from layerscalpel.exact import WindowScores, score
from layerscalpel.layers import Decoder
from layerscalpel.passes import VisitOf, nobody
from layerscalpel.race import RaceResult, race
from layerscalpel.segment import Segment
from layerscalpel.settings import HealSettings, SearchSettings
from layerscalpel.similarity import FEW_POSITIONS, BoundaryWatch, Similarity
from layerscalpel.streams import Removal, window

Sound = Callable[[Removal], str | None]
"""Why a cut is refused, or None."""


class UncuttableError(UserError):
    """None of the windows that were raced can be cut; says why the best one cannot."""


def any_cut(_removal: Removal) -> str | None:
    """Allow every cut."""
    return None


@dataclass(frozen=True)
class Pilots:
    """What a search that heals its candidates needs."""

    healing: TokenBlocks
    validation: TokenBlocks
    settings: HealSettings
    scratch: Path


@dataclass(frozen=True)
class Raced:
    """The windows of one length after their race."""

    scores: WindowScores
    winner: int
    """Start of the best window that may be cut."""
    race: dict[str, Any]
    """How it went, for results.json."""
    refused: dict[str, str]
    """Better windows that cannot be cut, by start, with the reason."""
    similarity: Similarity
    """Of the blocks of the first look."""


@dataclass(frozen=True)
class Task:
    """A search."""

    decoder: Decoder
    tokens: Tensor
    """[N, T] calibration token ids."""
    num_removed: int
    settings: SearchSettings = field(default_factory=SearchSettings)
    seed: int = 0
    sound: Sound = any_cut
    store: MutableMapping[Hashable, Tensor] = field(default_factory=dict)
    """Where hidden states wait while layers come in one by one."""
    raced: Mapping[int, Raced] = field(default_factory=dict)
    """Races that were held already, by length."""
    pilots: Pilots | None = None

    def segment(self, start: int) -> Segment:
        """Return the window that begins at a layer."""
        return Segment(start, start + self.num_removed, len(self.decoder))

    def last_start(self) -> int:
        """Return the last start a window may have."""
        return len(self.decoder) - self.num_removed


@dataclass(frozen=True)
class SearchResult:
    """The segments that a method chose and what it saw."""

    method: str
    segments: tuple[Segment, ...]
    """One run of layers, or two."""
    scores: Mapping[str, Mapping[str, float | int | None]]
    """{start: {kl_nats, se, num_blocks}}, or the method's own measure in place of kl_nats."""
    details: dict[str, Any] = field(default_factory=dict)
    """What the method adds: gate (paths and ends), certificate, race, similarity."""

    @property
    def segment(self) -> Segment:
        """The only segment, or the first of two."""
        return self.segments[0]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for results.json."""
        runs = [[segment.start, segment.stop] for segment in self.segments]
        head = {"method": self.method, "segment": runs[0], "segments": runs}
        return head | {"scores": self.scores} | self.details


def first_sound(result: SearchResult, task: Task) -> SearchResult:
    """Return the result with the best window that can be cut; what is passed over is named under `refused`.

    Args:
        result: of any method; less is better in all of their measures.
        task: its search.

    Raises:
        UserError: no window that the method scored can be cut; the reason is the chosen one's.
    """
    chosen = result.segment.start
    measured = {int(start): float(next(iter(score.values())) or 0.0) for start, score in result.scores.items()}
    others = sorted((start for start in measured if start != chosen), key=lambda start: measured[start])
    refused: dict[str, str] = {}
    for start in [chosen, *others]:
        reason = task.sound(window(start, task.num_removed))
        if reason is None:
            details = result.details | ({"refused": refused} if refused else {})
            return replace(result, segments=(task.segment(start),), details=details)
        refused[str(start)] = reason
    raise UserError(refused[str(chosen)])


def raced_windows(task: Task) -> Raced:
    """Return the race of the task's own windows, held now if it was not before."""
    n = task.num_removed
    return task.raced[n] if n in task.raced else race_windows(task, [n])[n]


def race_windows(task: Task, lengths: Sequence[int]) -> dict[int, Raced]:
    """Race the windows of each length among themselves, all in shared passes.

    Returns:
        {length: race}, without lengths of which no window can be cut.

    Raises:
        UncuttableError: no window of any length can be cut.
    """
    depth = len(task.decoder)
    removals = [window(start, n) for n in lengths for start in range(depth - n + 1)]
    names = [removal[0] for removal in removals]
    result, watch = race_removals(task, removals, [len(removal) for removal in removals])
    similarity, found = watch.similarity(), {}
    for n in lengths:
        rows = [i for i, removal in enumerate(removals) if len(removal) == n]
        starts = tuple(removals[i][0] for i in rows)
        refused = {str(removals[i][0]): result.refused[i] for i in rows if i in result.refused}
        scores = WindowScores(starts, n, result.kl_CN[rows], task.tokens.shape[1])
        if result.left(n):
            winner = removals[result.winner(n)][0]
            found[n] = Raced(scores, winner, result.to_dict(n, names), refused, similarity)
    if not found:
        raise UncuttableError(next(iter(result.refused.values())))
    return found


def race_removals(
    task: Task, removals: Sequence[Removal], groups: Sequence[Hashable]
) -> tuple[RaceResult, BoundaryWatch]:
    """Race candidate cuts; the watch has seen the parent's hidden states at the first look."""
    settings = task.settings
    tokens = task.tokens[: settings.num_blocks]
    watch = BoundaryWatch(task.decoder, FEW_POSITIONS)

    def measured(blocks: slice, candidates: list[int]) -> Tensor:
        see: VisitOf = nobody if blocks.start else watch.visit_of
        chosen = [removals[i] for i in candidates]
        return score(task.decoder, tokens[blocks], chosen, batch_size=settings.batch_size, store=task.store, watch=see)

    result = race(
        measured,
        groups,
        len(tokens),
        confidence=settings.confidence,
        first_blocks=settings.first_blocks,
        sound=lambda candidate: task.sound(removals[candidate]),
    )
    return result, watch
