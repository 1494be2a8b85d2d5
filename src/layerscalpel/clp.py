"""The paper's search and what we add to it: the gate, the exact scores, and the first certified by the second.

Source: gate arXiv:2510.23652; exact scores and certificate this project, docs/methods.md#clp-default.

    find_clp(Task(decoder, blocks.tokens, num_removed=6)).details["certificate"]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from layerscalpel import parallel
from layerscalpel.exact import WindowScores, score_windows
from layerscalpel.gate import GatePath, learn_starts, spread_starts
from layerscalpel.task import Raced, SearchResult, Task, first_sound, raced_windows


def learned(task: Task) -> GatePath:
    """Learn the task's starts, each process its share of them."""
    settings = task.settings
    initial = spread_starts(settings.num_starts, task.last_start(), settings.initial_start)
    path = learn_starts(
        task.decoder,
        task.tokens[: settings.gate_blocks],
        num_removed=task.num_removed,
        initial=initial[parallel.rank() :: parallel.world()],
        steepness=(settings.initial_steepness, settings.steepness),
        lr=settings.gate_lr,
        patience=settings.gate_patience,
        checkpointing=settings.gate_checkpointing,
    )
    return GatePath.merged(parallel.gather(path))


def by_products(raced: Raced) -> dict[str, Any]:
    """Return what a race tells beside the scores: how it went, and how alike hidden states are."""
    n = raced.scores.num_removed
    alike = raced.similarity
    found = {
        "race": raced.race,
        "similarity": alike.heat_map(),
        "layers": alike.influences(),
        "angles": alike.angles(n),
    }
    return found | ({"refused": raced.refused} if raced.refused else {})


def find_exact(task: Task) -> SearchResult:
    """Race all windows on their exact scores and take the winner."""
    raced = raced_windows(task)
    return SearchResult("exact", (task.segment(raced.winner),), raced.scores.to_dict(), by_products(raced))


def find_gate(task: Task) -> SearchResult:
    """Learn the starts and take, of the whole starts beside each, the one with the lowest KL of the real cut."""
    path = learned(task)
    beside = path.neighbours(task.last_start())
    scores = score_windows(
        task.decoder,
        task.tokens[: task.settings.num_blocks],
        num_removed=task.num_removed,
        batch_size=task.settings.batch_size,
        starts=sorted({start for pair in beside for start in pair}),
    )
    details = {"gate": {**asdict(path), "ends": better_neighbours(scores, beside)}}
    return first_sound(SearchResult("gate", (task.segment(scores.best()),), scores.to_dict(), details), task)


def find_clp(task: Task) -> SearchResult:
    """Learn the gate, then race all windows as its certificate; go on with the better of the two."""
    path, raced = learned(task), raced_windows(task)
    ends = better_neighbours(raced.scores, path.neighbours(task.last_start()))
    details = {"gate": {**asdict(path), "ends": ends}, "certificate": certificate(raced, ends), **by_products(raced)}
    return SearchResult("clp", (task.segment(raced.winner),), raced.scores.to_dict(), details)


def better_neighbours(scores: WindowScores, pairs: Sequence[tuple[int, int]]) -> list[int]:
    """Return of each pair of starts the one with the lower mean KL, paired over the blocks that both saw."""
    return [pair[1] if scores.margin(*pair).value < 0 else pair[0] for pair in pairs]


def certificate(raced: Raced, ends: list[int]) -> dict[str, Any]:
    """State what the gate chose, the exact optimum, and the difference in nats, paired over blocks.

    A window that was refused in the race is the gate's choice only if all of its ends were.
    """
    scores, best = raced.scores, raced.winner
    allowed = [start for start in ends if str(start) not in raced.refused] or ends
    gate_choice = min(allowed, key=lambda start: scores.margin(best, start).value)
    return {
        "gate_start": gate_choice,
        "exact_start": best,
        "difference_kl_nats": scores.margin(best, gate_choice).to_dict(),
        "num_starts_at_optimum": ends.count(best),
        "num_starts": len(ends),
    }
