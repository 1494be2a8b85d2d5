"""Fit how long a generated token takes to how many layers there are: milliseconds = fixed + layer * layers.

The same model decodes at two depths, whole and with the last half of its layers bypassed, in interleaved rounds: a
machine that slows down slows both, and each round is solved for itself. The first layers are kept because caches tell
their length by them. A third depth, the last quarter bypassed, is timed to check the fit and does not enter it.

Source: this project, docs/methods.md#latency.

    latency = measure_latency(find_layers(model), BenchmarkSettings())
    layers_to_remove(latency, 20.0, num_layers=30)
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from layerscalpel.benchmark import Clock, conditions, median, time_once
from layerscalpel.errors import UserError, one_line
from layerscalpel.hooks import bypass
from layerscalpel.layers import REFUSALS, Decoder
from layerscalpel.losses import Measured
from layerscalpel.progress import track
from layerscalpel.segment import Segment
from layerscalpel.settings import BenchmarkSettings


@dataclass(frozen=True)
class Latency:
    """Milliseconds of a decoding step, which generates one token of each sequence, by number of layers."""

    fixed_ms: Measured
    """Of everything but the layers."""
    layer_ms: Measured
    """Of one layer, the mean of the last half of them."""
    covariance_ms2: float
    """Of the errors of the two: they come from the same times, so their sum is surer than either."""
    check: dict[str, Any]
    """A depth that was not fitted: num_layers, measured_ms, predicted_ms, error_fraction (predicted over measured)."""
    device: str
    dtype: str
    threads: int
    prompt_tokens: int
    new_tokens: int
    batch_size: int

    def of(self, num_layers: int) -> Measured:
        """Return the predicted milliseconds of a step through so many layers."""
        variance = self.fixed_ms.se**2 + (num_layers * self.layer_ms.se) ** 2 + 2 * num_layers * self.covariance_ms2
        value = self.fixed_ms.value + num_layers * self.layer_ms.value
        return Measured(value, math.sqrt(max(0.0, variance)), self.layer_ms.n)  # rounding may leave less than 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for results.json."""
        return asdict(self) | {"fixed_ms": self.fixed_ms.to_dict(), "layer_ms": self.layer_ms.to_dict()}


def measure_latency(
    decoder: Decoder, settings: BenchmarkSettings, *, seed: int = 0, clock: Clock = time.perf_counter
) -> Latency:
    """Time the model at three depths and fit the first two.

    Args:
        decoder: the parent, all of its weights in memory.
        settings: lengths, batch size and repeats; a warm-up round comes before them.
        seed: of the random prompt.
        clock: seconds that never go back; tests inject their own.

    Raises:
        UserError: fewer than 4 layers, weights that are elsewhere, or a family that cannot decode like this.
    """
    num_layers = len(decoder)
    if num_layers < 4:
        raise UserError(
            f"--target-latency-ms needs a model of 4 layers or more, this one has {num_layers} - use --layers"
        )
    if decoder.resident is not None:
        raise UserError("--target-latency-ms times a model that is in memory - leave out --offload, or give --layers")
    depths = (num_layers, num_layers // 2, num_layers - num_layers // 4)
    total, rounds = settings.repeats + 1, []
    for number in track(range(total), "latency", total):
        times = [_step_ms(decoder, depth, settings, seed, clock) for depth in depths]
        if number:  # round 0 warms up
            rounds.append(times)
    return _fit(depths, rounds, conditions(decoder.model, settings))


def _step_ms(decoder: Decoder, num_kept: int, settings: BenchmarkSettings, seed: int, clock: Clock) -> float:
    """Return the milliseconds of a decoding step through the first layers alone."""
    num_layers = len(decoder)
    is_whole = num_kept == num_layers
    shortened = contextlib.nullcontext() if is_whole else bypass(decoder, Segment(num_kept, num_layers, num_layers))
    try:
        with shortened:
            _, decode_s = time_once(decoder.model, settings, seed=seed, clock=clock)
    except (*REFUSALS, UserError) as error:
        reason = one_line(error).partition(" - ")[0]
        raise UserError(
            f"{type(decoder.model).__name__} does not decode token by token with {num_kept} of its {num_layers} layers"
            f" ({reason}) - --target-latency-ms does not work for it - give --layers or --rate"
        ) from error
    return 1000 * decode_s / (settings.new_tokens - 1)


def _fit(depths: Sequence[int], rounds: list[list[float]], conditions: dict[str, Any]) -> Latency:
    """Solve each round for the two coefficients and take the medians over the rounds."""
    whole, half, other = depths
    layer = [(long - short) / (whole - half) for long, short, _ in rounds]
    fixed = [times[0] - whole * slope for times, slope in zip(rounds, layer, strict=True)]
    measured = [times[2] for times in rounds]
    error = [(a + other * b) / c - 1 for a, b, c in zip(fixed, layer, measured, strict=True)]
    covariance = statistics.covariance(fixed, layer) / len(rounds)
    latency = Latency(median(fixed), median(layer), covariance, {}, **conditions)
    latency.check.update(
        num_layers=other,
        measured_ms=median(measured).to_dict(),
        predicted_ms=latency.of(other).to_dict(),
        error_fraction=median(error).to_dict(),
    )
    return latency


def layers_to_remove(latency: Latency, target_ms: float, num_layers: int) -> int:
    """Return the smallest n of which latency.of(L - n) is at most the target.

    Args:
        latency: fitted on the parent.
        target_ms: milliseconds that a decoding step may take.
        num_layers: L, of the parent.

    Raises:
        UserError: the parent is fast enough, 2 layers are too slow, or a layer takes no time that could be measured.
    """
    whole, least = latency.of(num_layers).value, latency.of(2).value
    if whole <= target_ms:
        raise UserError(
            f"the parent already needs {whole:.2f} ms a token, no more than the {target_ms:g} asked for"
            " - nothing to remove - give a smaller --target-latency-ms"
        )
    if latency.layer_ms.value <= 0:
        raise UserError(
            f"a layer's time, {latency.layer_ms.value:.4f} ± {latency.layer_ms.se:.4f} ms, drowns in noise - give"
            " --layers, or measure on a quiet machine with more rounds (--set benchmark.repeats=20)"
        )
    if least > target_ms:
        reachable = math.ceil(100 * least) / 100
        raise UserError(
            f"2 layers, the fewest that may stay, still need {least:.2f} ms a token of the parent's {whole:.2f}"
            f" - allowed: --target-latency-ms {reachable:.2f} or more"
        )
    return next(n for n in range(1, num_layers - 1) if latency.of(num_layers - n).value <= target_ms)
