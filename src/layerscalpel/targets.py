"""How many layers to remove: as many as named, or as a target allows.

task, facts = aim(Task(decoder, blocks.tokens, num_removed=0), TargetSettings(max_kl=0.5), BenchmarkSettings())
task.num_removed
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from layerscalpel import parallel
from layerscalpel.decoder import num_parameters
from layerscalpel.errors import UserError
from layerscalpel.exact import score
from layerscalpel.latency import Latency, layers_to_remove, measure_latency
from layerscalpel.losses import Measured, block_mean
from layerscalpel.segment import Segment, parse_segment
from layerscalpel.settings import BenchmarkSettings, TargetSettings
from layerscalpel.sizes import layer_parameters, parse_count, windows_within
from layerscalpel.streams import Removal, window
from layerscalpel.task import Raced, Task, UncuttableError, race_windows

Aimed = tuple[Task, dict[str, Any]]


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


def require_target(target: TargetSettings, num_layers: int) -> None:
    """Refuse a target that makes no sense for a model of so many layers, before it is loaded.

    Raises:
        UserError: a segment or count that does not fit, a number of parameters that cannot be read.
    """
    if target.params is not None:
        parse_count(target.params)
    elif target.max_kl is None and target.latency_ms is None and not given_segment(target, num_layers):
        num_removed_of(target, num_layers)


def aim(task: Task, target: TargetSettings, benchmark: BenchmarkSettings) -> Aimed:
    """Return the task with its number of layers, and how that was found (for results.json; empty where it was named).

    Args:
        task: its num_removed does not matter.
        target: what the user wants.
        benchmark: lengths at which latency is measured.

    Raises:
        UserError: the target cannot be reached, or is reached already.
    """
    if task.settings.all_rates or target.max_kl is not None:
        task = replace(task, raced=_raced_lengths(task, needed=target.max_kl is not None))
    if target.max_kl is not None:
        return _for_kl(task, target.max_kl)
    if target.params is not None:
        return _for_parameters(task, parse_count(target.params))
    if target.latency_ms is not None:
        return _for_latency(task, target.latency_ms, benchmark)
    return replace(task, num_removed=num_removed_of(target, len(task.decoder))), {}


def _raced_lengths(task: Task, *, needed: bool) -> dict[int, Raced]:
    try:
        return race_windows(task, range(1, min(len(task.decoder) // 2, len(task.decoder) - 2) + 1))
    except UncuttableError:  # a longer run may still be cut
        if needed:
            raise
        return {}


def _for_kl(task: Task, most: float) -> Aimed:
    means = _winners_on_all_blocks(task)
    within = [n for n, mean in means.items() if mean.value <= most]
    if not within:
        least = min(means, key=lambda n: means[n].value)
        raise UserError(
            f"no cut stays within {most:g} nats: the best, of n = {least}, costs {means[least].value:.3f}"
            " - give a larger --max-kl"
        )
    n = max(within)
    facts = {"kind": "max_kl", "asked_kl_nats": most, "num_removed": n, "kl_nats": means[n].to_dict()}
    return replace(task, num_removed=n), facts | {"most_layers_tried": max(means)}


def _winners_on_all_blocks(task: Task) -> dict[int, Measured]:
    """Return the mean KL of the best window of each length; a race may have ended on few blocks, this is on all."""
    tokens, lengths = task.tokens[: task.settings.num_blocks], list(task.raced)
    removals = [window(task.raced[n].winner, n) for n in lengths]
    kl_RN = score(task.decoder, tokens, removals, batch_size=task.settings.batch_size, store=task.store)
    counts = torch.full((len(tokens),), tokens.shape[1])
    return {n: block_mean(row, counts) for n, row in zip(lengths, kl_RN, strict=True)}


def _for_parameters(task: Task, most: int) -> Aimed:
    whole, per_layer = num_parameters(task.decoder.model), layer_parameters(task.decoder)
    n, starts = windows_within(whole, per_layer, most)
    while all(task.sound(window(start, n)) for start in starts) and n < len(per_layer) - 2:
        n, starts = windows_within(whole, per_layer, most, least=n + 1)  # none of them can be cut
    reason = f"leaves more than the {most:,} parameters of --target-params"
    facts = {"kind": "params", "asked_parameters": most, "num_removed": n, "starts": starts}

    def sound(removal: Removal) -> str | None:
        is_part = len(removal) < n  # one of two runs
        return task.sound(removal) if is_part or whole - sum(per_layer[i] for i in removal) <= most else reason

    before = {length: raced for length, raced in task.raced.items() if length != n}  # its race had another judge
    return replace(task, num_removed=n, sound=sound, raced=before), facts


def _for_latency(task: Task, most: float, benchmark: BenchmarkSettings) -> Aimed:
    latency = _latency(task, benchmark)
    n = layers_to_remove(latency, most, len(task.decoder))
    predicted = latency.of(len(task.decoder) - n).to_dict()
    facts = {"kind": "latency_ms", "asked_ms": most, "num_removed": n, "predicted_ms": predicted}
    return replace(task, num_removed=n), facts | {"latency": latency.to_dict()}


def _latency(task: Task, benchmark: BenchmarkSettings) -> Latency:
    """Measure in one process, whose clock the others would disturb, and tell them; what it refuses all refuse."""
    own: Latency | UserError | None = None
    if parallel.rank() == 0:
        try:
            own = measure_latency(task.decoder, benchmark, seed=task.seed)
        except UserError as error:
            own = error
    said = parallel.first_says(own)
    if isinstance(said, UserError):
        raise said
    return said


def surface(raced: Mapping[int, Raced]) -> dict[str, Any]:
    """Return the scores of the windows of every length, {n: {start: {kl_nats, se, num_blocks}}}, for results.json."""
    return {str(n): item.scores.to_dict() for n, item in raced.items()}


def best_of_rates(raced: Mapping[int, Raced]) -> dict[str, Any]:
    """Return {n: {start, kl_nats, se, num_blocks, race}} of the winner of every length, for results.json."""
    found = {}
    for n, item in raced.items():
        found[str(n)] = {"start": item.winner, **item.scores.to_dict()[str(item.winner)], "race": item.race}
    return found
