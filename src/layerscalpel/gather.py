"""Run directories as they are compared: read, refused where there is nothing to compare, and grouped over seeds.

groups, notes = grouped([read_run("runs/a"), read_run("runs/b")])
groups[0].runs  # {seed: Run}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerscalpel.byblock import BlockResult, blocks_file, load_blocks
from layerscalpel.config import to_dict
from layerscalpel.errors import UserError
from layerscalpel.fingerprint import ELSEWHERE, made_with
from layerscalpel.items import TaskResult, items_file, load_items
from layerscalpel.rundir import read_json
from layerscalpel.summary import Results, removed_segments

BASELINE = "baseline"
"""Name of a model that was not cut, among those of a run."""
STAGE_OF = {"cut": "cut", "stitched": "stitch", "healed": "heal", "quantized": "quantize", BASELINE: "model"}
"""{model: the part of the results that tells its size}, in the order of rows."""
TEXT_SETTINGS = ("evaluation", "block_tokens", "evaluation_blocks")
"""Settings of the section data that held-out text depends on, beside the seed."""


@dataclass(frozen=True)
class Run:
    """One run directory."""

    path: Path
    results: Results
    settings: Mapping[str, Any]
    """Of every section, as config.yaml and the defaults have them."""
    read: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    """What has been read of its files."""

    @property
    def seed(self) -> int:
        """The seed."""
        return self.settings.get("seed", 0)

    @property
    def text(self) -> str | None:
        """Hash of the held-out tokens."""
        return self.results.get("data", {}).get("evaluation", {}).get("sha256")

    @property
    def parent(self) -> tuple[str, int, int]:
        """What tells the parent from others: where it is, its layers, its parameters."""
        found = self.results["parent"]
        place = Path(found["name"]).expanduser()
        return str(place.resolve()) if place.exists() else found["name"], found["num_layers"], found["parameters"]

    @property
    def models(self) -> list[str]:
        """Those that were made of the parent and measured."""
        return [name for name in STAGE_OF if name in self.results["evaluate"]]

    @property
    def segment(self) -> str:
        """The layers that were removed, in words."""
        return " + ".join(f"[{run.start}, {run.stop})" for run in removed_segments(self.results))

    def blocks(self, model: str) -> BlockResult | None:
        """Return a model's figures by block, or None where an older version kept none."""
        return self._kept(blocks_file, load_blocks, model)

    def items(self, model: str) -> dict[str, TaskResult] | None:
        """Return a model's results by item, or None where no task was measured."""
        return self._kept(items_file, load_items, model)

    def _kept(self, file: Callable[[Path, str], Path], load: Callable[[Path, str], Any], model: str) -> Any:
        key, folder = (load, model), self.path / "evaluate"
        if key not in self.read:
            self.read[key] = load(folder, model) if file(folder, model).exists() else None
        return self.read[key]


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone."""

    name: str
    method: str
    runs: dict[int, Run]
    """{seed: run}"""

    @property
    def first(self) -> Run:
        """Any of them."""
        return next(iter(self.runs.values()))


def read_run(path: str | Path) -> Run:
    """Read a run directory whose models were evaluated.

    Raises:
        UserError: it is none, it holds no models, they were not evaluated, or its settings cannot be read.
    """
    path = Path(path).expanduser()
    results = read_json(path / "results.json")
    if "parent" not in results:
        raise UserError(
            f"{path} holds the results of one model alone - allowed: run directories - name the model with --baseline"
        )
    if "cut" not in results:
        raise UserError(
            f"run directory {path} holds no models yet, so there is nothing to compare"
            f" - finish it first: scalpel run MODEL --until evaluate --out {path}"
        )
    if not set(STAGE_OF) & set(results.get("evaluate", {})):
        raise UserError(f"the models in {path} were not evaluated - do it first: scalpel evaluate {path}")
    return Run(path, results, to_dict(made_with(path)))


def grouped(runs: Iterable[Run]) -> tuple[list[Group], list[str]]:
    """Return the runs, those together that differ in the seed alone, and what was left out."""
    found: dict[str, dict[int, Run]] = {}
    notes = []
    for run in runs:
        group = found.setdefault(_without_seed(run), {})
        if run.seed in group:
            same = run.path.resolve() == group[run.seed].path.resolve()
            why = "is named twice" if same else f"has the settings and the seed of {group[run.seed].path}"
            notes.append(f"{run.path} {why}: it counts once")
        else:
            group[run.seed] = run
    return [Group(_name(group), _method(group), group) for group in found.values()], notes


def _without_seed(run: Run) -> str:
    """Return the settings that decide a result, but for the seed."""
    kept: dict[str, Any] = {name: value for name, value in run.settings.items() if name != "seed"}
    for section, names in ELSEWHERE.items():
        kept[section] = {k: v for k, v in kept.get(section, {}).items() if k not in names}
    return json.dumps([run.parent[0], kept | {"model": {**kept["model"], "name": ""}}], sort_keys=True)


def _name(group: Mapping[int, Run]) -> str:
    first, *others = (str(run.path) for run in group.values())
    return f"{first} and {len(others)} more" if others else first


def _method(group: Mapping[int, Run]) -> str:
    return ", ".join(dict.fromkeys(run.results.get("search", {}).get("method", "given") for run in group.values()))
