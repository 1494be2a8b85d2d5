"""Time models in turns: prefill latency, time to the first token, decoding speed; and what they take beside time.

The rounds are interleaved (parent, result, parent, result, ...), so that a machine that slows down slows both; ratios
are taken within a round and carry the standard error over rounds. Plain decoding is timed everywhere; on a GPU decoding
by a CUDA graph too, which does not wait for the host's launches.

    found = benchmark({"parent": parent, "healed": healed}, BenchmarkSettings())
    found["speedup"]["decode"]
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from layerscalpel.decoder import num_parameters
from layerscalpel.errors import UserError
from layerscalpel.footprint import PEAKS, Peak, flops_per_token
from layerscalpel.graphs import NoGraphError, captured
from layerscalpel.layers import device_of
from layerscalpel.losses import Measured
from layerscalpel.progress import say, track
from layerscalpel.settings import BenchmarkSettings
from layerscalpel.speedwords import no_difference, tells
from layerscalpel.turns import GRAPH, GROWING, Clock, Decoding, Growing, Job, Turn, take_turn

Make = Callable[[nn.Module, Job], Decoding]
MAKERS: dict[str, Make] = {GROWING: lambda model, _: Growing(model), GRAPH: captured}
"""{way to decode: what prepares a model for it}."""
MEDIAN_ERROR = math.sqrt(math.pi / 2)
"""Standard error of a median over that of a mean, of many normal values; of few it is a little less."""
FLOPS = "one decoding step after the prompt, as torch counts the operations of its products"


def benchmark(
    models: Mapping[str, nn.Module], settings: BenchmarkSettings, *, seed: int = 0, clock: Clock = time.perf_counter
) -> dict[str, Any]:
    """Return times, sizes and memory of each model, and the speed-up of the last over the first.

    The figures of the first job stand in first place; `timings` has those of all jobs and ways to decode.

    Args:
        models: {name: model}; the first is what the others are compared with.
        settings: lengths, batch sizes and repeats.
        seed: of the random prompt.
        clock: seconds that never go back; tests inject their own.

    Raises:
        UserError: models of different vocabularies, whose tokens are not the same amount of text.
    """
    refuse_other_vocabularies(models)
    first, jobs = next(iter(models.values())), jobs_of(settings)
    timings = [row for job in jobs for row in _timings(models, job, settings, seed, clock)]
    ways = [row for row in timings if _job_of(row) == jobs[0]]
    head = ways[-1]
    result: dict[str, Any] = {"mode": head["mode"], **conditions(first, settings)}
    for name, model in models.items():
        sizes = {"parameters": num_parameters(model)}
        result[name] = head[name] | sizes | {"flops_per_token": flops_per_token(model, settings.prompt_tokens)}
    if "speedup" in head:
        result["speedup"] = head["speedup"]
    memory = PEAKS.get(device_of(first).type, PEAKS["cpu"])
    return result | {"timings": timings, "counted": {"peak_memory_bytes": memory, "flops_per_token": FLOPS}}


def jobs_of(settings: BenchmarkSettings) -> list[Job]:
    """Return every batch size with every prompt length, those of the first place first."""
    sizes = dict.fromkeys((settings.batch_size, *settings.batch_sizes))
    lengths = dict.fromkeys((settings.prompt_tokens, *settings.prompt_lengths))
    return [Job(size, length, settings.new_tokens) for size in sizes for length in lengths]


def longest_text(settings: BenchmarkSettings) -> int:
    """Return the most tokens that a timed text has."""
    return max(job.prompt_tokens + job.new_tokens for job in jobs_of(settings))


def _job_of(row: Mapping[str, Any]) -> Job:
    return Job(row["batch_size"], row["prompt_tokens"], row["new_tokens"])


def refuse_other_vocabularies(models: Mapping[str, Any]) -> None:
    """Refuse to compare models that read other tokens.

    Raises:
        UserError: their vocabularies have different sizes.
    """
    sizes = {name: model.config.get_text_config(decoder=True).vocab_size for name, model in models.items()}
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
        raise UserError(
            f"the models have different tokenizers ({found} tokens), so tokens per second do not compare"
            " - time each alone: scalpel benchmark MODEL"
        )


def _timings(
    models: Mapping[str, nn.Module], job: Job, settings: BenchmarkSettings, seed: int, clock: Clock
) -> list[dict[str, Any]]:
    """Return a row for each way to decode."""
    rows = [timing(models, job, GROWING, repeats=settings.repeats, seed=seed, clock=clock)]
    device = device_of(next(iter(models.values())))
    if settings.graphs and device.type == "cuda":
        try:
            rows.append(timing(models, job, GRAPH, repeats=settings.repeats, seed=seed, clock=clock))
        except NoGraphError as error:
            rows[0]["no_graph"] = str(error)
            say(f"batch {job.batch_size}, prompt {job.prompt_tokens}: decoded without a CUDA graph: {error}")
    return rows


def timing(
    models: Mapping[str, nn.Module],
    job: Job,
    mode: str,
    *,
    repeats: int,
    seed: int = 0,
    clock: Clock = time.perf_counter,
) -> dict[str, Any]:
    """Time models on one job in one way and return the row of `timings`.

    Raises:
        NoGraphError: one of them cannot be decoded in that way.
    """
    decodings, peaks = {}, {}
    for name, model in models.items():  # the warm-up round, which alone may be disturbed by looking at memory
        with Peak(model) as peak:
            decodings[name] = MAKERS[mode](model, job)
            take_turn(decodings[name], job, seed=seed, clock=clock)
        peaks[name] = peak.num_bytes
    rounds: dict[str, list[Turn]] = {name: [] for name in models}
    for _ in track(range(repeats), f"benchmark, batch {job.batch_size}, prompt {job.prompt_tokens}", repeats):
        for name, decoding in decodings.items():
            rounds[name].append(take_turn(decoding, job, seed=seed, clock=clock))
    row: dict[str, Any] = {"mode": mode, **vars(job)}
    if plain := {name: why for name, each in decodings.items() if (why := getattr(each, "plain_prefill", None))}:
        row["plain_prefill"] = plain
    for name, turns in rounds.items():
        row[name] = figures(turns, job) | {"peak_memory_bytes": peaks[name]}
    first, *others = rounds
    compared = {name: {"of": name} | speed_up(rounds[first], rounds[name]) for name in others}
    if others:
        row["speedup"] = compared[others[-1]]
    return row | ({"speedups": compared} if len(others) > 1 else {})


def figures(turns: Sequence[Turn], job: Job) -> dict[str, Any]:
    """Return the medians over rounds, for results.json."""
    return {
        "prefill_s": median([turn.prefill_s for turn in turns]).to_dict(),
        "first_token_s": median([turn.first_token_s for turn in turns]).to_dict(),
        "decode_tokens_per_s": median([job.decoded / turn.decode_s for turn in turns]).to_dict(),
    }


def speed_up(before: Sequence[Turn], after: Sequence[Turn]) -> dict[str, Any]:
    """Return the medians of the ratios within rounds; `undecided` has a sentence for each that tells nothing."""
    pairs = list(zip(before, after, strict=True))
    ratios = {
        "prefill": median([old.prefill_s / new.prefill_s for old, new in pairs]).to_dict(),
        "decode": median([old.decode_s / new.decode_s for old, new in pairs]).to_dict(),
    }
    undecided = {kind: no_difference(ratio) for kind, ratio in ratios.items() if not tells(ratio)}
    return ratios | ({"undecided": undecided} if undecided else {})


def conditions(model: nn.Module, settings: BenchmarkSettings) -> dict[str, Any]:
    """Return what a time depends on beside the model, as plain values."""
    device = device_of(model)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "prompt_tokens": settings.prompt_tokens,
        "new_tokens": settings.new_tokens,
        "batch_size": settings.batch_size,
    }


def median(values: list[float]) -> Measured:
    """Return the median with its standard error."""
    error = MEDIAN_ERROR * statistics.stdev(values) / math.sqrt(len(values))
    return Measured(statistics.median(values), error, len(values))
