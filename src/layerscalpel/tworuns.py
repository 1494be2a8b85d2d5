"""Two runs of layers instead of one, chosen greedily by the same exact scores.

For every way to part n = p + q, the best run of p layers goes first; then every run of q layers that does not touch it
is tried in its company. All pairs race one another and the single run of n layers, on the same blocks. The race's
confidence does not cover that the same text had picked the first runs.

Source: this project, docs/methods.md#two-runs.

    better_of_one_and_two(find_exact(task), task)
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

from layerscalpel.segment import segments_of
from layerscalpel.streams import Removal, window
from layerscalpel.task import SearchResult, Task, UncuttableError, race_removals, race_windows


def better_of_one_and_two(result: SearchResult, task: Task) -> SearchResult:
    """Return the result with two segments if a pair of runs costs less than the one run found, paired over blocks.

    Details get `two_runs`: segments, their KL, and the difference to the single run in nats.
    """
    single = window(result.segment.start, task.num_removed)
    pairs = _pairs(task)
    if not pairs:
        return result
    candidates = [single, *pairs]
    raced, _ = race_removals(task, candidates, ["runs"] * len(candidates))
    winner = raced.winner("runs")
    nearest = sorted(range(1, len(candidates)), key=lambda c: raced.difference(c, 0).value)
    chosen = winner or next((c for c in nearest if task.sound(candidates[c]) is None), None)
    if chosen is None:  # no pair can be cut
        return result
    difference = raced.difference(0, chosen)
    runs = segments_of(candidates[chosen], len(task.decoder))
    found: dict[str, Any] = {
        "segments": [[run.start, run.stop] for run in runs],
        "kl_nats": raced.mean(chosen).to_dict(),
        "single": [result.segment.start, result.segment.stop],
        "single_kl_nats": raced.mean(0).to_dict(),
        "single_less_two_kl_nats": difference.to_dict(),
        "num_pairs": len(pairs),
        "wins": bool(winner),
        "race": raced.to_dict("runs", [_name(removal, len(task.decoder)) for removal in candidates]),
    }
    details = result.details | {"two_runs": found}
    return replace(result, segments=tuple(runs) if winner else result.segments, details=details)


def _pairs(task: Task) -> list[Removal]:
    """Return the removals of two runs that are tried, each once."""
    n, depth = task.num_removed, len(task.decoder)
    lengths, raced = [p for p in range(1, n) if p not in task.raced], dict(task.raced)
    if lengths:
        with contextlib.suppress(UncuttableError):  # no run shorter than the single one: then there are no pairs
            raced |= race_windows(task, lengths)
    found: dict[Removal, None] = {}
    for p in range(1, n):
        if p not in raced:  # no run of that length can be cut
            continue
        first, q = raced[p].winner, n - p
        apart = [start for start in range(depth - q + 1) if start + q < first or start > first + p]
        found |= {tuple(sorted((*window(first, p), *window(start, q)))): None for start in apart}
    return list(found)


def _name(removal: Removal, num_layers: int) -> str:
    return "+".join(f"{run.start}:{run.stop}" for run in segments_of(removal, num_layers))
