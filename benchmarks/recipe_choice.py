"""Which trials become final: the rules were written down before any trial was measured.

Each question is answered by the trial that is best by what trials are chosen by; nothing that is reported is looked at.
The paper's recipe is always among them.
"""

from __future__ import annotations

from collections.abc import Callable

from measuring import Row, has
from recipe_bench import BY_NAME
from recipe_trials import SOURCES_OF_NOTHING, Trial
from tasks import retention

ALWAYS = "paper"
Suits = Callable[[Trial], bool]


def endpoint_alone(trial: Trial) -> bool:
    """Tell whether a recipe trains nothing but the two layers at the seam of six removed ones."""
    heal = trial.config(SOURCES_OF_NOTHING).heal
    return trial.n == 6 and heal.method == "endpoint" and heal.width == 1 and heal.second == "none"


def retained(row: Row, parent: Row) -> float:
    """Return the chance-adjusted retention on the tasks that choose; the larger the better."""
    found = retention(parent["selection"]["tasks"], row["selection"]["tasks"])
    return found["value"] if found else float("-inf")


def fluent(row: Row, _parent: Row) -> float:
    """Return how little more perplex than the parent a child is on C4; the larger the better."""
    return -row["selection"]["c4"]["ppl_ratio"]["value"]


RULES: dict[str, tuple[Suits, Callable[[Row, Row], float]]] = {
    "endpoint tuning alone, n = 6": (endpoint_alone, retained),
    "any method, n = 6": (lambda trial: trial.n == 6, retained),
    "any method, n = 9": (lambda trial: trial.n == 9, retained),
    "lowest perplexity, n = 6": (lambda trial: trial.n == 6, fluent),
}
"""{question: (which trials it is about, what they are ranked by)}."""


def chosen(rows: list[Row]) -> dict[str, str]:
    """Return {question: the trial that answers it} from rows of trials and of the parent."""
    parent = next((row for row in rows if has(row, {"part": "parent"}) and "failed" not in row), None)
    trials = [row for row in rows if has(row, {"part": "trial"}) and "failed" not in row]
    found = {}
    for question, (suits, rank) in RULES.items():
        own = [row for row in trials if suits(BY_NAME[row["name"]])]
        if parent and own:
            found[question] = max(own, key=lambda row: rank(row, parent))["name"]
    return found
