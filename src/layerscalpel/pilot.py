"""Heal a few candidates for a short while and take the one that heals best.

KL before healing does not decide what can be healed. So the distinct local minima of the exact KL curve, and the ends
of the gate, are each healed by the run's own recipe for a few equal steps, starting from their cached prefix. The one
with the lowest held-out loss wins; of those that are within a hundredth of a nat of it, the one that agrees most often
with the parent on text it was not healed on.

Source: this project, docs/methods.md#pilot.

    find_pilot(task).details["pilots"]
"""

from __future__ import annotations

import copy
import math
import shutil
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

from layerscalpel import parallel
from layerscalpel.clp import better_neighbours, by_products, certificate, learned
from layerscalpel.cut import cut_model
from layerscalpel.data import TokenBlocks
from layerscalpel.evaluate import Reference, evaluate, final_hidden
from layerscalpel.exact import WindowScores
from layerscalpel.heal import heal_model
from layerscalpel.layers import Decoder
from layerscalpel.objectives import asks_parent
from layerscalpel.probe import find_layers
from layerscalpel.progress import say
from layerscalpel.streams import window
from layerscalpel.task import Pilots, SearchResult, Task, raced_windows
from layerscalpel.trained import seam_layers

EQUAL_NATS = 0.01
"""Held-out losses this close count as equal."""


@dataclass(frozen=True)
class Pilot:
    """A candidate after its short healing."""

    start: int
    validation_loss_nats: float
    kl_nats: float
    """To the parent, on calibration text."""
    top1_agreement_fraction: float
    steps: int
    wall_s: float


def find_pilot(task: Task) -> SearchResult:
    """Heal the local minima of the exact scores and the gate's ends for a few steps each; take the best."""
    assert task.pilots is not None, "stages.py gives healing blocks to every search that heals"
    path, raced = learned(task), raced_windows(task)
    ends = better_neighbours(raced.scores, path.neighbours(task.last_start()))
    allowed = [start for start in raced.scores.starts if task.sound(window(start, task.num_removed)) is None]
    mine = [end for end in ends if end in allowed]
    starts = candidates(raced.scores.only(allowed), mine)[: task.settings.pilot_count]
    pilots = heal_all(task, task.pilots, starts)
    best = best_pilot(pilots)
    details: dict[str, Any] = {
        "gate": {**asdict(path), "ends": ends},
        "certificate": certificate(raced, ends),
        "pilots": [asdict(pilot) for pilot in pilots],
        **by_products(raced),
    }
    return SearchResult("pilot", (task.segment(best.start),), raced.scores.to_dict(), details)


def candidates(scores: WindowScores, ends: list[int]) -> list[int]:
    """Return the starts that are worth a pilot, the lowest KL first: the curve's local minima and the gate's ends.

    Args:
        scores: of all windows that can be cut; compared on the blocks that every window saw.
        ends: where the gate's starts ended.
    """
    together = scores.kl_WN[:, : min(scores.blocks(start) for start in scores.starts)].mean(1).tolist()
    steps = [i for i, kl in enumerate(together) if i == 0 or kl != together[i - 1]]  # a plateau is one place
    levels = [math.inf, *(together[i] for i in steps), math.inf]
    around = zip(steps, levels, levels[1:], levels[2:], strict=False)
    minima = [i for i, before, kl, after in around if kl < min(before, after)]
    places = {*minima, *(scores.starts.index(end) for end in ends)}
    return [scores.starts[i] for i in sorted(places, key=lambda i: (together[i], i))]


def heal_all(task: Task, given: Pilots, starts: list[int]) -> list[Pilot]:
    """Heal every candidate for the same number of steps, each process its share; in the order of their starts."""
    tokens = task.tokens[: task.settings.num_blocks]
    text = TokenBlocks(tokens, tokens >= 0, "calibration", len(tokens), {})
    text.labelled[:, 0] = False
    reference = Reference(task.decoder, final_hidden(task.decoder, tokens, batch_size=task.settings.batch_size))
    mine = [_heal(task, given, start, text, reference) for start in starts[parallel.rank() :: parallel.world()]]
    return sorted((pilot for part in parallel.gather(mine) for pilot in part), key=lambda pilot: pilot.start)


def _heal(task: Task, given: Pilots, start: int, text: TokenBlocks, reference: Reference) -> Pilot:
    began = time.monotonic()
    settings = replace(given.settings, method="endpoint", second="none", epochs=1, validations=2)
    settings = replace(settings, frozen="device", shard=False)  # by one process, beside a parent that stays
    blocks = given.healing.first(task.settings.pilot_steps * settings.batch_size)
    child = own_seam(task, start, settings.width)
    parent = task.decoder if asks_parent(settings) else None
    scratch = given.scratch / f"pilot-{start}"
    try:
        healed = heal_model(child, parent, [start], blocks, given.validation, settings, seed=task.seed, scratch=scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    found = evaluate(child, text, reference, batch_size=task.settings.batch_size, label=f"pilot at {start}")
    assert found.kl_nats is not None
    assert found.top1_agreement_fraction is not None
    loss = min(row["loss_nats" if "loss_nats" in row else "loss"] for row in healed.validation)
    say(f"pilot at {start}: held-out loss {loss:.3f}, KL {found.kl_nats.value:.3f} nats")
    agreement = found.top1_agreement_fraction.value
    return Pilot(start, loss, found.kl_nats.value, agreement, healed.steps, round(time.monotonic() - began, 2))


def own_seam(task: Task, start: int, width: int) -> Decoder:
    """Return the cut model, its layers at the seam copied, all other tensors shared with the parent."""
    model, _ = cut_model(task.decoder, task.segment(start))
    layers = find_layers(model).layers
    for i in seam_layers(len(layers), start, width):
        layers[i] = copy.deepcopy(layers[i])
    return find_layers(model)


def best_pilot(pilots: list[Pilot]) -> Pilot:
    """Return the pilot with the lowest held-out loss; of equal ones, the one that agrees most with the parent."""
    least = min(pilot.validation_loss_nats for pilot in pilots)
    equal = [pilot for pilot in pilots if pilot.validation_loss_nats <= least + EQUAL_NATS]
    return max(equal, key=lambda pilot: (pilot.top1_agreement_fraction, -pilot.start))
