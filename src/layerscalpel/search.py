"""Choose the segment: one table of methods, one signature, and the certificate that says how good the choice is.

result = SEARCHES["clp"].find(decoder, blocks.tokens, 6, SearchSettings(), seed=0)
result.segment  # layers 13..18 (segment [13, 19), 6 of 30)
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from layerscalpel.config import SearchName, SearchSettings, TargetSettings
from layerscalpel.errors import UserError
from layerscalpel.exact import WindowScores, score_windows
from layerscalpel.gate import GatePath, learn_starts, spread_starts
from layerscalpel.layers import Decoder
from layerscalpel.segment import Segment, parse_segment
from layerscalpel.similarity import boundary_cosines


@dataclass(frozen=True)
class SearchResult:
    """The segment that a method chose and what it saw."""

    method: str
    segment: Segment
    scores: dict[str, dict[str, float | None]]
    """{start: {kl_nats, se}}, or the method's own measure in place of kl_nats."""
    details: dict[str, Any] = field(default_factory=dict)
    """What the method adds: gate (paths and ends), certificate, similarity."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for results.json."""
        segment = [self.segment.start, self.segment.stop]
        return {"method": self.method, "segment": segment, "scores": self.scores, **self.details}


Find = Callable[[Decoder, Tensor, int, SearchSettings, int], SearchResult]


@dataclass(frozen=True)
class Search:
    """A row of the table of methods."""

    find: Find
    """(decoder, tokens [N, T], num_removed, settings, seed) -> result."""
    sentence: str
    paper: str


def first_sound(result: SearchResult, check: Callable[[Segment], object]) -> SearchResult:
    """Return the result with the best window that can be cut; what is passed over is named under `refused`.

    Args:
        result: of any method; less is better in all of their measures.
        check: raises UserError for a segment that cannot be cut.

    Raises:
        UserError: no window that the method scored can be cut; the reason is the chosen one's.
    """
    chosen = result.segment
    measured = {int(start): float(next(iter(score.values())) or 0.0) for start, score in result.scores.items()}
    others = [start for start in sorted(measured, key=lambda start: measured[start]) if start != chosen.start]
    refused: dict[str, str] = {}
    for start in [chosen.start, *others]:
        segment = Segment(start, start + len(chosen), chosen.num_layers)
        try:
            check(segment)
        except UserError as error:
            refused[str(start)] = str(error)
            continue
        details = result.details | ({"refused": refused} if refused else {})
        return replace(result, segment=segment, details=details)
    raise UserError(refused[str(chosen.start)])


def num_removed_of(target: TargetSettings, num_layers: int) -> int:
    """Return n = max(1, round(rate * L)), or the given number of layers.

    Raises:
        UserError: fewer than two layers would stay.
    """
    rate = 0.2 if target.rate is None else target.rate
    count = target.layers if target.layers is not None else max(1, round(rate * num_layers))
    if num_layers - count < 2:
        asked = f"--layers {target.layers}" if target.layers is not None else f"--rate {rate}"
        raise UserError(
            f"{asked} removes {count} of {num_layers} layers - at least 2 must stay, so remove at most {num_layers - 2}"
        )
    return count


def given_segment(target: TargetSettings, num_layers: int) -> Segment | None:
    """Return the segment the user named, if any."""
    return parse_segment(target.segment, num_layers) if target.segment else None


def uses_gate(method: SearchName) -> bool:
    """Tell whether a method learns a gate and so needs its blocks."""
    return method in ("clp", "gate")


def _window(decoder: Decoder, start: int, num_removed: int) -> Segment:
    return Segment(start, start + num_removed, len(decoder))


def _exact_scores(decoder: Decoder, tokens: Tensor, num_removed: int, settings: SearchSettings) -> WindowScores:
    return score_windows(
        decoder, tokens[: settings.num_blocks], num_removed=num_removed, batch_size=settings.batch_size
    )


def _learned(decoder: Decoder, tokens: Tensor, num_removed: int, settings: SearchSettings) -> GatePath:
    return learn_starts(
        decoder,
        tokens[: settings.gate_blocks],
        num_removed=num_removed,
        initial=spread_starts(settings.num_starts, len(decoder) - num_removed, settings.initial_start),
        steepness=(settings.initial_steepness, settings.steepness),
        lr=settings.gate_lr,
    )


def find_exact(decoder: Decoder, tokens: Tensor, num_removed: int, settings: SearchSettings, seed: int) -> SearchResult:
    """Score every window and take the best: the optimum over all windows on this data."""
    scores = _exact_scores(decoder, tokens, num_removed, settings)
    return SearchResult("exact", _window(decoder, scores.best(), num_removed), scores.to_dict())


def find_gate(decoder: Decoder, tokens: Tensor, num_removed: int, settings: SearchSettings, seed: int) -> SearchResult:
    """Learn the starts and take, of the whole starts beside each, the one with the lowest KL of the real cut."""
    path = _learned(decoder, tokens, num_removed, settings)
    beside = path.neighbours(len(decoder) - num_removed)
    scores = score_windows(
        decoder,
        tokens[: settings.num_blocks],
        num_removed=num_removed,
        batch_size=settings.batch_size,
        starts=sorted({start for pair in beside for start in pair}),
    )
    details = {"gate": {**asdict(path), "ends": better_neighbours(scores, beside)}}
    return SearchResult("gate", _window(decoder, scores.best(), num_removed), scores.to_dict(), details)


def find_clp(decoder: Decoder, tokens: Tensor, num_removed: int, settings: SearchSettings, seed: int) -> SearchResult:
    """Learn the gate, then score every window as its certificate; go on with the better of the two."""
    path = _learned(decoder, tokens, num_removed, settings)
    scores = _exact_scores(decoder, tokens, num_removed, settings)
    ends = better_neighbours(scores, path.neighbours(len(decoder) - num_removed))
    gate_choice = min(ends, key=lambda start: scores.mean(start).value)
    details = {
        "gate": {**asdict(path), "ends": ends},
        "certificate": certificate(scores, gate_choice, ends),
    }
    return SearchResult("clp", _window(decoder, scores.best(), num_removed), scores.to_dict(), details)


def better_neighbours(scores: WindowScores, pairs: list[tuple[int, int]]) -> list[int]:
    """Return of each pair of starts the one with the lower mean KL."""
    return [min(pair, key=lambda start: scores.mean(start).value) for pair in pairs]


def certificate(scores: WindowScores, gate_choice: int, ends: list[int]) -> dict[str, Any]:
    """State what the gate chose, the exact optimum, and the difference in nats, paired over blocks."""
    best = scores.best()
    return {
        "gate_start": gate_choice,
        "exact_start": best,
        "difference_kl_nats": scores.margin(best, gate_choice).to_dict(),
        "num_starts_at_optimum": ends.count(best),
        "num_starts": len(ends),
    }


def find_angular(
    decoder: Decoder, tokens: Tensor, num_removed: int, settings: SearchSettings, seed: int
) -> SearchResult:
    """Take the window whose two ends differ by the smallest angle."""
    similarity = boundary_cosines(decoder, tokens[: settings.num_blocks], batch_size=settings.batch_size)
    distance = {s: similarity.angular_distance(s, num_removed) for s in range(len(decoder) - num_removed + 1)}
    best = min(distance, key=lambda start: distance[start].value)
    scores = {str(s): {"angular_distance": item.value, "se": item.to_dict()["se"]} for s, item in distance.items()}
    details = {"similarity": similarity.heat_map()}
    return SearchResult("angular", _window(decoder, best, num_removed), scores, details)


def find_influence(
    decoder: Decoder, tokens: Tensor, num_removed: int, settings: SearchSettings, seed: int
) -> SearchResult:
    """Take the contiguous window with the smallest sum of block influences.

    The paper removes the n layers of lowest influence wherever they stand; they are reported beside the window.
    """
    similarity = boundary_cosines(decoder, tokens[: settings.num_blocks], batch_size=settings.batch_size)
    influence = [similarity.block_influence(i) for i in range(len(decoder))]
    sums = {
        start: sum(item.value for item in influence[start : start + num_removed])
        for start in range(len(decoder) - num_removed + 1)
    }
    scores = {str(start): {"block_influence": value} for start, value in sums.items()}
    lowest = sorted(sorted(range(len(decoder)), key=lambda i: influence[i].value)[:num_removed])
    details = {
        "layers": {str(i): item.to_dict() for i, item in enumerate(influence)},
        "paper_layers": lowest,
        "similarity": similarity.heat_map(),
    }
    best = min(sums, key=lambda start: sums[start])
    return SearchResult("influence", _window(decoder, best, num_removed), scores, details)


def find_last(decoder: Decoder, tokens: Tensor, num_removed: int, settings: SearchSettings, seed: int) -> SearchResult:
    """Take the last n layers; no data is read."""
    return SearchResult("last", _window(decoder, len(decoder) - num_removed, num_removed), {})


def find_random(
    decoder: Decoder, tokens: Tensor, num_removed: int, settings: SearchSettings, seed: int
) -> SearchResult:
    """Take a window by lot; the floor that every method must beat."""
    start = random.Random(seed).randint(0, len(decoder) - num_removed)
    return SearchResult("random", _window(decoder, start, num_removed), {})


SEARCHES: dict[SearchName, Search] = {
    "clp": Search(find_clp, "gate, then the exact scores of all windows as its certificate (default)", "2510.23652"),
    "gate": Search(find_gate, "differentiable concave gate, start index learned by KL to the parent", "2510.23652"),
    "exact": Search(find_exact, "KL to the parent of every window, all in one parent forward", "this project"),
    "angular": Search(find_angular, "smallest angle between the two ends of the window, last token", "2403.17887"),
    "influence": Search(find_influence, "smallest sum of block influences, made contiguous", "2403.03853"),
    "last": Search(find_last, "the last n layers", "2411.15558"),
    "random": Search(find_random, "a window by lot", "none, a floor"),
}
