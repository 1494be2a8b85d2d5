"""All that a benchmark finds: times in turns, sizes on disk, milliseconds by depth, other engines.

found = measure_speed({"parent": parent, "healed": healed}, BenchmarkSettings())
found["healed"]["disk_bytes"], found["speedup"]["decode"]
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from layerscalpel.benchmark import benchmark, jobs_of, longest_text
from layerscalpel.decoder import Loaded, stored_bytes
from layerscalpel.engines import measure_engines
from layerscalpel.errors import UserError
from layerscalpel.footprint import bytes_on_disk
from layerscalpel.latency import measure_latency, off_text
from layerscalpel.origin import Origin
from layerscalpel.probe import find_layers
from layerscalpel.progress import say
from layerscalpel.settings import BenchmarkSettings
from layerscalpel.shards import INDEX, SINGLE
from layerscalpel.turns import random_prompt


def measure_speed(models: Mapping[str, Loaded], settings: BenchmarkSettings, *, seed: int = 0) -> dict[str, Any]:
    """Return what a benchmark of these models finds, for results.json.

    Args:
        models: {name: model}; the first is what the others are compared with.
        settings: what is measured.
        seed: of the random prompt.

    Raises:
        UserError: a text that is longer than a model's context, or models whose tokens do not compare.
    """
    for loaded in models.values():
        require_context(settings, loaded.origin.max_tokens)
    found = benchmark({name: loaded.model for name, loaded in models.items()}, settings, seed=seed)
    places = {name: _place(loaded.origin) for name, loaded in models.items()}
    for name, loaded in models.items():
        found[name] |= {"bytes": stored_bytes(loaded.model, loaded.origin)}
        found[name] |= {"disk_bytes": bytes_on_disk(places[name])}
    first = next(iter(models.values()))
    if settings.latency:
        found["latency"] = _latency(first, settings, seed)
    if settings.engines:
        job = jobs_of(settings)[0]
        prompt_BT = random_prompt(first.model, job, seed)
        how = {"repeats": settings.repeats, "python": settings.engine_python or sys.executable}
        found["engines"] = measure_engines(settings.engines, places, prompt_BT, job, **how)
    return found


def require_context(settings: BenchmarkSettings, most: int | None) -> None:
    """Refuse texts that are longer than a model's context.

    Raises:
        UserError: prompt and new tokens are too many.
    """
    length = longest_text(settings)
    if most and length > most:
        named = "benchmark.prompt_lengths" if settings.prompt_lengths else "benchmark.prompt_tokens"
        raise UserError(
            f"{length} tokens of prompt and answer are longer than the model's context of {most}"
            f" - lower {named} or benchmark.new_tokens"
        )


def _place(origin: Origin) -> Path:
    """Return a model's folder or file; one of the hub has been fetched."""
    if origin.kind != "hub":
        return Path(origin.place)
    names = (SINGLE, INDEX, "config.json")
    files = (cached_file(origin.place, name, _raise_exceptions_for_missing_entries=False) for name in names)
    return Path(next(file for file in files if file)).parent


def _latency(loaded: Loaded, settings: BenchmarkSettings, seed: int) -> dict[str, Any]:
    """Return the fit of the first model's depth, or why there is none: what was timed before is not lost for it."""
    try:
        latency = measure_latency(find_layers(loaded.model), settings, seed=seed)
    except UserError as error:
        say(f"the time of a layer was not measured: {error}")
        return {"refused": str(error)}
    if not latency.check["kept"]:
        say(off_text(latency.check))
    return latency.to_dict()
