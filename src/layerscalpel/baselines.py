"""Published searches that read hidden states only, and two floors.

Sources: angular distance arXiv:2403.17887, block influence arXiv:2403.03853, last layers arXiv:2411.15558.

    find_angular(Task(decoder, blocks.tokens, 6)).segment
"""

from __future__ import annotations

import random

from layerscalpel.similarity import Similarity, boundary_cosines
from layerscalpel.task import SearchResult, Task


def _similarity(task: Task) -> Similarity:
    settings = task.settings
    tokens = task.tokens[: settings.num_blocks]
    return boundary_cosines(task.decoder, tokens, batch_size=settings.batch_size, store=task.store)


def find_angular(task: Task) -> SearchResult:
    """Take the window whose two ends differ by the smallest angle."""
    similarity = _similarity(task)
    distance = {s: similarity.angular_distance(s, task.num_removed) for s in range(task.last_start() + 1)}
    best = min(distance, key=lambda start: distance[start].value)
    scores = {str(s): {"angular_distance": item.value, "se": item.to_dict()["se"]} for s, item in distance.items()}
    details = {"similarity": similarity.heat_map()}
    return SearchResult("angular", (task.segment(best),), scores, details)


def find_influence(task: Task) -> SearchResult:
    """Take the contiguous window with the smallest sum of block influences.

    The paper removes the n layers of lowest influence wherever they stand; they are reported beside the window.
    """
    similarity, n = _similarity(task), task.num_removed
    influence = [similarity.block_influence(i).value for i in range(len(task.decoder))]
    sums = {start: sum(influence[start : start + n]) for start in range(task.last_start() + 1)}
    details = {
        "layers": similarity.influences(),
        "paper_layers": sorted(sorted(range(len(influence)), key=lambda i: influence[i])[:n]),
        "similarity": similarity.heat_map(),
    }
    best = min(sums, key=lambda start: sums[start])
    scores = {str(start): {"block_influence": value} for start, value in sums.items()}
    return SearchResult("influence", (task.segment(best),), scores, details)


def find_last(task: Task) -> SearchResult:
    """Take the last n layers; no data is read."""
    return SearchResult("last", (task.segment(task.last_start()),), {})


def find_random(task: Task) -> SearchResult:
    """Take a window by lot; the floor that every method must beat."""
    return SearchResult("random", (task.segment(random.Random(task.seed).randint(0, task.last_start())),), {})
