"""Choose the segment: one table of methods with one signature.

result = SEARCHES["clp"].find(Task(decoder, blocks.tokens, num_removed=6))
result.segment  # layers 13..18 (segment [13, 19), 6 of 30)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from layerscalpel.baselines import find_angular, find_influence, find_last, find_random
from layerscalpel.clp import find_clp, find_exact, find_gate
from layerscalpel.pilot import find_pilot
from layerscalpel.settings import SearchName
from layerscalpel.task import SearchResult, Task


@dataclass(frozen=True)
class Search:
    """A row of the table of methods."""

    find: Callable[[Task], SearchResult]
    sentence: str
    paper: str


def uses_gate(method: SearchName) -> bool:
    """Tell whether a method learns a gate and so needs its blocks."""
    return method in ("clp", "gate", "pilot")


SEARCHES: dict[SearchName, Search] = {
    "clp": Search(find_clp, "gate, then the exact scores of all windows as its certificate (default)", "2510.23652"),
    "gate": Search(find_gate, "differentiable concave gate, start index learned by KL to the parent", "2510.23652"),
    "exact": Search(find_exact, "KL to the parent of every window, raced in shared forward passes", "this project"),
    "pilot": Search(find_pilot, "a short healing of each local minimum of the exact scores", "this project"),
    "angular": Search(find_angular, "smallest angle between the two ends of the window, last token", "2403.17887"),
    "influence": Search(find_influence, "smallest sum of block influences, made contiguous", "2403.03853"),
    "last": Search(find_last, "the last n layers", "2411.15558"),
    "random": Search(find_random, "a window by lot", "none, a floor"),
}
