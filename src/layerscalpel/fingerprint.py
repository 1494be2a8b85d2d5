"""What each stage's result depends on, as a hash; which setting it was where one differs. No torch is imported.

fingerprints(config)["heal"]  # of the settings it reads, its input files, and the fingerprints before it
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from layerscalpel.config import build_config, recipe, to_dict
from layerscalpel.errors import UserError, one_line
from layerscalpel.inputs import file_identity, task_identities
from layerscalpel.records import sources_in
from layerscalpel.settings import Config

STAGES: dict[str, tuple[str, ...]] = {
    "search": ("model", "target", "data", "search", "seed"),
    "cut": ("cut",),
    "stitch": ("stitch",),
    "heal": ("heal", "healing text"),
    "quantize": ("quantize",),
    "evaluate": ("evaluate", "beside"),
    "benchmark": ("benchmark",),
    "report": (),
}
"""Stages in order, and the settings that each adds to what the ones before it depend on."""
HEALING_TEXT = ("healing", "healing_blocks", "healing_block_tokens", "validation_fraction", "answers", "answer_tokens")
"""Settings of the section data that healing alone reads: its text is drawn after all other."""
ELSEWHERE = {"model": ("device", "offload"), "search": ("device_gib", "stream_gib"), "heal": ("shard",)}
"""Settings that say where a run computes; another machine may go on with it."""
MADE_TO_COMPARE = ("beside", "keep_beside")
"""Settings of the section quantize that the stage evaluate alone reads."""
PLACES = {"healing text": "data", "beside": "quantize"}
"""{name in STAGES that is no section: the section that its settings stand in}."""


def fingerprints(config: Config) -> dict[str, str]:
    """Return {stage: hash} of the settings and inputs that decide each stage's result."""
    settings, names = _by_section(config), [name for name, _ in sources_in(config.data.healing)]
    settings["healing text"]["files"] = [file_identity(name) for name in names]
    settings["evaluate"]["task files"] = task_identities(config.evaluate.tasks)
    held_out = [name for name, _ in sources_in(config.data.evaluation)]
    inputs = [file_identity(name) for name in (config.model.name, config.data.calibration, *held_out)]
    chain, result = json.dumps(inputs), {}
    for stage in STAGES:
        before = result["quantize"] if stage == "benchmark" else chain  # it does not depend on evaluate
        own = [settings[name] for name in _sections(stage, config)]
        chain = hashlib.sha256((before + json.dumps(own)).encode()).hexdigest()
        result[stage] = chain
    result["report"] = hashlib.sha256((result["evaluate"] + result["benchmark"]).encode()).hexdigest()
    return result


def _by_section(config: Config) -> dict[str, Any]:
    """Return the settings under the names that STAGES has, less those that say where a run computes."""
    settings = to_dict(config)
    for section, names in ELSEWHERE.items():
        settings[section] = {key: value for key, value in settings[section].items() if key not in names}
    settings["healing text"] = {name: settings["data"].pop(name) for name in HEALING_TEXT}
    settings["beside"] = {name: settings["quantize"].pop(name) for name in MADE_TO_COMPARE}
    return settings


def _sections(stage: str, config: Config) -> tuple[str, ...]:
    """Return the sections that a stage adds; some searches read those of later stages too."""
    if stage != "search" or config.target.segment is not None:
        return STAGES[stage]
    pilots, times = config.search.method == "pilot", config.target.latency_ms is not None
    return STAGES[stage] + (STAGES["heal"] if pilots else ()) + (("benchmark",) if times else ())


def changed_settings(stage: str, before: Config, after: Config) -> list[str]:
    """Return `key: old -> new` of the settings that a stage adds to what those before it depend on."""
    old, new = _by_section(before), _by_section(after)
    named = [(PLACES.get(name, name), name) for name in _sections(stage, after)]
    return [text for shown, name in named for text in _differences({shown: old[name]}, {shown: new[name]})]


def _differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    """Return `key: old -> new` of all values that differ."""
    found = []
    for key in dict.fromkeys([*before, *after]):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key}: {old} -> {new}")
    return found


def made_with(path: Path) -> Config:
    """Return the settings of a run directory.

    Raises:
        UserError: its config.yaml is not there, damaged, or of another version.
    """
    try:
        return build_config([recipe(path / "config.yaml")])
    except UserError as error:
        raise UserError(
            f"the settings in {path / 'config.yaml'} cannot be read ({one_line(error)}) - is {path} a run directory of"
            " this version? `scalpel run` makes one"
        ) from error
