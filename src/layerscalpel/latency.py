"""Fit how long a generated token takes to how many layers there are: milliseconds = fixed + layer * layers.

The same model decodes at two depths, whole and with the last half of its layers bypassed, in interleaved rounds: a
machine that slows down slows both, and each round is solved for itself. The first layers are kept because caches tell
their length by them. A third depth, the last quarter bypassed, is timed to check the fit and does not enter it: where
the prediction is further off there than CHECK_FRACTION, all is timed once more with twice the rounds, and what then is
still off is said. Decoding is timed as the benchmark's first figures are: by a CUDA graph where that works.

Source: this project, docs/methods.md#latency.

    latency = measure_latency(find_layers(model), BenchmarkSettings())
    layers_to_remove(latency, 20.0, num_layers=30)
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from layerscalpel.benchmark import MAKERS, MEDIAN_ERROR, conditions, jobs_of, median
from layerscalpel.errors import UserError, one_line
from layerscalpel.graphs import NoGraphError
from layerscalpel.hooks import bypass
from layerscalpel.layers import REFUSALS, Decoder, device_of
from layerscalpel.losses import Measured
from layerscalpel.progress import say, track
from layerscalpel.segment import Segment
from layerscalpel.settings import BenchmarkSettings
from layerscalpel.turns import GRAPH, GROWING, Clock, Decoding, take_turn

CHECK_FRACTION = 0.05
"""A prediction that is further off at the depth that was not fitted is not relied on without a word."""


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
    """A depth that was not fitted: num_layers, measured_ms, predicted_ms, error_fraction (predicted over measured less
    1), tolerance_fraction, and whether the error is `kept` within that."""
    device: str
    dtype: str
    threads: int
    prompt_tokens: int
    new_tokens: int
    batch_size: int
    mode: str = GROWING
    """How it was decoded."""

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
    with_graphs = settings.graphs and device_of(decoder.model).type == "cuda"
    mode, times = GRAPH if with_graphs else GROWING, _Times(decoder, depths, settings, seed, clock)
    try:
        rounds = times.rounds(mode, settings.repeats)
    except NoGraphError as error:
        say(f"the latency is that of decoding without a CUDA graph: {error}")
        mode, rounds = GROWING, times.rounds(GROWING, settings.repeats)
    latency = _fit(depths, rounds, conditions(decoder.model, settings) | {"mode": mode})
    if not latency.check["kept"]:
        say(f"{off_text(latency.check)}; it is timed once more with twice the rounds")
        rounds = times.rounds(mode, 2 * settings.repeats)
        latency = _fit(depths, rounds, conditions(decoder.model, settings) | {"mode": mode})
    return latency


@dataclass(frozen=True)
class _Times:
    """Times one model at several depths."""

    decoder: Decoder
    depths: Sequence[int]
    settings: BenchmarkSettings
    seed: int
    clock: Clock

    def rounds(self, mode: str, repeats: int) -> list[list[float]]:
        """Return the milliseconds of a decoding step, [round][depth]; a warm-up round comes before them."""
        job = jobs_of(self.settings)[0]
        decodings = {}
        for depth in self.depths:
            with self._shortened(depth):
                decodings[depth] = MAKERS[mode](self.decoder.model, job)
            self._step_ms(decodings[depth], depth)
        return [
            [self._step_ms(decoding, depth) for depth, decoding in decodings.items()]
            for _ in track(range(repeats), "latency", repeats)
        ]

    def _step_ms(self, decoding: Decoding, depth: int) -> float:
        job = jobs_of(self.settings)[0]
        with self._shortened(depth):
            turn = take_turn(decoding, job, seed=self.seed, clock=self.clock)
        return 1000 * turn.decode_s / (job.new_tokens - 1)

    @contextlib.contextmanager
    def _shortened(self, num_kept: int) -> Iterator[None]:
        """Within, the model has its first layers alone; a family that cannot decode so is named."""
        decoder, num_layers = self.decoder, len(self.decoder)
        is_whole = num_kept == num_layers
        try:
            with contextlib.nullcontext() if is_whole else bypass(decoder, Segment(num_kept, num_layers, num_layers)):
                yield
        except (*REFUSALS, UserError) as error:
            reason = one_line(error).partition(" - ")[0]
            raise UserError(
                f"{type(decoder.model).__name__} does not decode token by token with {num_kept} of its {num_layers}"
                f" layers ({reason}) - --target-latency-ms does not work for it - give --layers or --rate"
            ) from error


def _fit(depths: Sequence[int], rounds: list[list[float]], conditions: dict[str, Any]) -> Latency:
    """Solve each round for the two coefficients and take the medians over the rounds."""
    whole, half, other = depths
    layer = [(long - short) / (whole - half) for long, short, _ in rounds]
    fixed = [times[0] - whole * slope for times, slope in zip(rounds, layer, strict=True)]
    measured = [times[2] for times in rounds]
    error = [(a + other * b) / c - 1 for a, b, c in zip(fixed, layer, measured, strict=True)]
    covariance = MEDIAN_ERROR**2 * statistics.covariance(fixed, layer) / len(rounds)
    latency = Latency(median(fixed), median(layer), covariance, {}, **conditions)
    off = median(error)
    latency.check.update(
        num_layers=other,
        measured_ms=median(measured).to_dict(),
        predicted_ms=latency.of(other).to_dict(),
        error_fraction=off.to_dict(),
        tolerance_fraction=CHECK_FRACTION,
        kept=abs(off.value) <= CHECK_FRACTION,
    )
    return latency


def off_text(check: dict[str, Any]) -> str:
    """Say how far the prediction is off at the depth that was not fitted."""
    off, error = (100 * check["error_fraction"][part] for part in ("value", "se"))
    return (
        f"at {check['num_layers']} layers, which were not fitted, the predicted time is {abs(off):.1f} ± {error:.1f} %"
        f" {'below' if off < 0 else 'above'} the measured one (allowed: {100 * CHECK_FRACTION:.0f} %)"
    )


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
    doubt = "" if latency.check["kept"] else f"; this is by a fit that is off: {off_text(latency.check)}"
    if whole <= target_ms:
        raise UserError(
            f"the parent already needs {whole:.2f} ms a token, no more than the {target_ms:g} asked for{doubt}"
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
            f"2 layers, the fewest that may stay, still need {least:.2f} ms a token of the parent's {whole:.2f}{doubt}"
            f" - allowed: --target-latency-ms {reachable:.2f} or more"
        )
    return next(n for n in range(1, num_layers - 1) if latency.of(num_layers - n).value <= target_ms)
