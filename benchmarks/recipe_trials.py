"""The recipes that benchmarks/recipes.py tries, the most telling first, and how long each should take.

Each changes some settings of COMMON. Sources of healing data are named alpaca, c4 and passages, with weights as in
`data.healing`. What is asked of the list:

A  endpoint tuning alone, n = 6: 97 % of the parent's accuracy above chance; the paper's recipe has 93
B  any method: 100 % at n = 6, 94 % at n = 9
C  any method, n = 6: perplexity of WikiText-2 at most 1.25 times the parent's
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from layerscalpel.config import build_config
from layerscalpel.records import sources_in
from layerscalpel.settings import Config

SEGMENTS = {6: (13, 19), 9: (12, 21)}
"""{layers removed: the segment that `clp` chooses}."""
COMMON: dict[str, Any] = {
    "search.num_blocks": 64,
    "heal.batch_size": 16,
    "heal.micro_batch_size": 16,
    "heal.validations": 3,
}
STEPS = {"alpaca": 226, "c4": 132, "passages": 54}
"""Batches of 16 blocks of 512 tokens that each source gives."""
STEP_S = {"endpoint": 0.10, "lora": 0.20, "last": 0.10, "all": 0.18, "none": 0.0}
"""Seconds of a step on one H200 that nobody shares: 50 s for the paper's 476 steps [measured], the others in
proportion to the layers that they go forward and backward through."""
KL_TIMES = 1.3
"""What the parent's head adds."""
SOURCES_OF_NOTHING = dict.fromkeys(STEPS, "c4")
"""For settings that are looked at without their text."""
AROUND_S = 25.0
"""Data, caches, validation, and the measures that recipes are chosen by."""


@dataclass(frozen=True)
class Trial:
    """A recipe."""

    name: str
    n: int
    mix: str
    """Sources of healing data with weights."""
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def answers(self) -> str:
        """Who answers the prompts."""
        return self.settings.get("data.answers", "given")

    def config(self, sources: dict[str, str], *more: dict[str, Any]) -> Config:
        """Return its settings; `sources` has the file of each source of the mix."""
        mix = ",".join(f"{sources[name]}={weight:g}" for name, weight in sources_in(self.mix))
        return build_config([COMMON, {"data.healing": mix}, self.settings, *more])

    def estimate_s(self) -> float:
        """Return the seconds that it should take on one H200."""
        heal = self.config(SOURCES_OF_NOTHING).heal
        asks = KL_TIMES if heal.objective != "ce" else 1.0
        steps = heal.epochs * STEP_S[heal.method]
        if heal.second != "none":
            steps += heal.second_epochs * STEP_S[heal.second]
        return AROUND_S + steps * steps_of(self.mix) * asks * 16 / heal.batch_size


def steps_of(mix: str) -> float:
    """Return the steps of an epoch: the source that ends first ends it."""
    parts = sources_in(mix)
    return min(STEPS[name] / weight for name, weight in parts) * sum(weight for _, weight in parts)


def _endpoint(name: str, mix: str = "alpaca", n: int = 6, **heal: Any) -> Trial:
    return _trial(name, n, mix, {"method": "endpoint", "objective": "both", "lr": 1e-3, "epochs": 3} | heal)


def _all(name: str, mix: str = "alpaca=2,c4=1", n: int = 6, **heal: Any) -> Trial:
    return _trial(name, n, mix, {"method": "all", "objective": "both", "lr": 3e-4, "epochs": 2} | heal)


def _trial(name: str, n: int, mix: str, heal: dict[str, Any]) -> Trial:
    """Keys with a dot are whole, those without are of the section heal."""
    return Trial(name, n, mix, {key if "." in key else f"heal.{key}": value for key, value in heal.items()})


GREEDY, SAMPLED = {"data.answers": "greedy"}, {"data.answers": "sampled"}
AUTO = {"stitch.method": "auto"}
RIDGE = {"stitch.method": "ridge", "search.num_blocks": 256}
"""What `auto` chooses at n = 6 from 96 blocks. Held-out KL in nats: none 0.66, scalar 0.62, linear 0.44, ridge 0.40,
rotation 0.43 and 28 million parameters more [measured on a CPU]."""
TRIALS = [
    _endpoint("paper", objective="ce", lr=5e-4, epochs=2),
    _endpoint("end-both"),
    _all("all-both", lr=2e-4, **{"stitch.method": "linear"}),
    _endpoint("end-both-c4", mix="alpaca=4,c4=1", **RIDGE),
    _endpoint("end-greedy", **GREEDY),
    _all("all-ridge", **RIDGE),
    _all("all-greedy", **GREEDY, **RIDGE),
    _all("all-both-9", n=9, epochs=3),
    _all("all-kl-text", mix="alpaca=1,c4=2", objective="kl", lr=6e-4, epochs=4, **RIDGE),
    _endpoint("end-ce-fast", objective="ce", lr=1e-3, epochs=2),
    _all("all-long", lr=6e-4, epochs=4, **RIDGE),
    _endpoint("end-width-2", width=2, lr=5e-4),
    _endpoint("end-ridge", **RIDGE),
    _all("all-greedy-9", n=9, epochs=3, **GREEDY, **RIDGE),
    _endpoint("end-then-all", mix="alpaca=2,c4=1", epochs=1, second="all", second_lr=3e-4, second_epochs=2),
    _endpoint("end-expand", lr=5e-4, expand=1),
    _endpoint("end-seam-states", seam_weight=1.0),
    _endpoint("end-last-states", end_weight=1.0),
    _trial("stitch", 6, "alpaca", {"method": "none", **RIDGE}),
    _trial("cut", 6, "alpaca", {"method": "none"}),
    _endpoint("end-long", epochs=6),
    _all("all-low-kl", kl_weight=0.3),
    _all("all-sampled", **SAMPLED, **RIDGE),
    _all("all-alpaca", mix="alpaca"),
    _all("all-kl-fast", mix="alpaca=1,c4=2", objective="kl", lr=1.2e-3, epochs=4, **RIDGE),
    _all("all-long-9", n=9, lr=6e-4, epochs=5, **RIDGE),
    _endpoint("end-batch-8", batch_size=8, lr=7e-4),
    _all("all-passages", mix="alpaca=1,c4=2,passages=1", objective="kl", lr=6e-4, epochs=4, **RIDGE),
    _endpoint("end-width-4", width=4, lr=5e-4),
    _endpoint("end-warm", warmup_fraction=0.2, weight_decay=0.1),
    _endpoint("end-low-kl", kl_weight=0.3),
    _all("lora", mix="alpaca", method="lora", objective="ce", lr=5e-4),
    _endpoint("end-width-3-9", n=9, width=3, lr=5e-4),
    _trial("stitch-auto", 6, "alpaca", {"method": "none", **AUTO}),
    _trial("stitch-auto-9", 9, "alpaca", {"method": "none", **AUTO}),
    _trial("cut-9", 9, "alpaca", {"method": "none"}),
    _endpoint("end-mix", mix="alpaca=2,c4=1", **RIDGE),
    _endpoint("ridge-then-all", mix="alpaca=2,c4=1", epochs=1, second="all", second_lr=3e-4, second_epochs=2, **RIDGE),
    _endpoint("nine-then-all", "alpaca=2,c4=1", 9, epochs=1, second="all", second_lr=5e-4, second_epochs=3, **RIDGE),
    _all("nine-fast", n=9, lr=6e-4, epochs=4, **RIDGE),
    _all("nine-kl", "alpaca=1,c4=1", n=9, lr=6e-4, epochs=3, kl_weight=2.0, **RIDGE),
]
