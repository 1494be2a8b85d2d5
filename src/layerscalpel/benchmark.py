"""Time parent and result in turns: prefill latency and decoding speed.

The rounds are interleaved (parent, result, parent, result, ...), so that a machine that slows down slows both; ratios
are taken within a round and carry the standard error over rounds. Plain eager decoding with a growing cache.

    speeds = benchmark({"parent": parent, "healed": healed}, BenchmarkSettings())
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from layerscalpel.errors import UserError
from layerscalpel.layers import device_of
from layerscalpel.losses import Measured
from layerscalpel.progress import track
from layerscalpel.settings import BenchmarkSettings

Clock = Callable[[], float]


def benchmark(
    models: Mapping[str, nn.Module], settings: BenchmarkSettings, *, seed: int = 0, clock: Clock = time.perf_counter
) -> dict[str, Any]:
    """Return prefill seconds and decoded tokens per second of each model, and the speed-up over the first.

    Args:
        models: {name: model}; the first is what the others are compared with.
        settings: lengths, batch size and repeats.
        seed: of the random prompt.
        clock: seconds that never go back; tests inject their own.
    """
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    total = settings.repeats + 1
    for number in track(range(total), "benchmark", total):
        for name, model in models.items():
            times = time_once(model, settings, seed=seed, clock=clock)
            if number:  # round 0 warms up
                rounds[name].append(times)
    first = next(iter(models))
    result: dict[str, Any] = {"mode": "eager, growing cache", **conditions(models[first], settings)}
    decoded = settings.batch_size * (settings.new_tokens - 1)
    for name, times in rounds.items():
        result[name] = {
            "prefill_s": median([prefill for prefill, _ in times]).to_dict(),
            "decode_tokens_per_s": median([decoded / decode for _, decode in times]).to_dict(),
        }
    if len(models) > 1:
        last = list(models)[-1]
        pairs = list(zip(rounds[first], rounds[last], strict=True))
        result["speedup"] = {
            "of": last,
            "prefill": median([before[0] / after[0] for before, after in pairs]).to_dict(),
            "decode": median([before[1] / after[1] for before, after in pairs]).to_dict(),
        }
    return result


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


@torch.no_grad()
def time_once(model: Any, settings: BenchmarkSettings, *, seed: int, clock: Clock) -> tuple[float, float]:
    """Return (seconds of the prefill, seconds of the new_tokens - 1 decoding steps after it)."""
    device = device_of(model)
    vocab = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(seed)
    shape = (settings.batch_size, settings.prompt_tokens)
    ids = torch.randint(vocab, shape, generator=generator).to(device)
    synchronise(device)
    began = clock()
    output = model(input_ids=ids, use_cache=True)
    if getattr(output, "past_key_values", None) is None:
        raise UserError(
            f"{type(model).__name__} keeps no keys and values, which decoding is timed with"
            " - leave the benchmark out (--set benchmark.enabled=false)"
        )
    token = output.logits[:, -1:].argmax(-1)
    synchronise(device)
    prefilled = clock()
    for _ in range(settings.new_tokens - 1):
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
    synchronise(device)
    return prefilled - began, clock() - prefilled


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def median(values: list[float]) -> Measured:
    """Return the median and the standard error of a mean of as many values, a little below the median's own."""
    return Measured(statistics.median(values), statistics.stdev(values) / math.sqrt(len(values)), len(values))
