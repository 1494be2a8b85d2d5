"""Several searches on one parent with one budget, each choice cut, healed and measured alike, over several seeds.

Methods that choose the same layers share one run, and that run does not know which method chose: its text is the same.
Every folder is an ordinary run directory, and a finished one is not run again.

    DIR/searches/gate-seed0   DIR/segments/13-19-seed0

    groups, notes = sweep(configure, ["gate", "last"], [0, 1], Path("runs/compared"))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from layerscalpel.checks import check_before_loading
from layerscalpel.errors import UserError, suggest
from layerscalpel.fingerprint import STAGES
from layerscalpel.gather import Group, Run, read_run
from layerscalpel.progress import say
from layerscalpel.run import run
from layerscalpel.rundir import finished_results, stages_until
from layerscalpel.segment import Segment
from layerscalpel.settings import Config, SearchName, TargetSettings

Configure = Callable[[str, int], Config]
"""(method, seed) -> settings."""


def methods_in(text: str) -> list[str]:
    """Return the methods that commas separate.

    Raises:
        UserError: one is unknown, or named twice.
    """
    names = [name.strip() for name in text.split(",")]
    known = get_args(SearchName)
    for name in names:
        if name not in known:
            raise UserError(f"--methods: there is no search '{name}'{suggest(name, known)}")
        if names.count(name) > 1:
            raise UserError(f"--methods {text} names {name} twice - leave one out")
    return names


def seeds_in(text: str) -> list[int]:
    """Return the seeds that commas separate.

    Raises:
        UserError: one is no whole number of 0 or more, or named twice.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts) or len({int(part) for part in parts}) < len(parts):
        raise UserError(f"--seeds {text} is no list of seeds - write different whole numbers, as --seeds 0,1,2")
    return [int(part) for part in parts]


def sweep(
    configure: Configure, methods: Sequence[str], seeds: Sequence[int], out: Path
) -> tuple[list[Group], list[str]]:
    """Return a group of runs for each method, methods that chose alike as one, and what was shared.

    Args:
        configure: gives the settings of a method and a seed.
        methods: names of searches.
        seeds: of data, search and healing.
        out: the folder of all runs.

    Raises:
        UserError: the methods have no common budget, or as `run`.
    """
    configs = {(method, seed): configure(method, seed) for method in methods for seed in seeds}
    for config in configs.values():
        require_one_budget(config)
    check_before_loading(next(iter(configs.values())), stages_until("report"))
    chosen: dict[tuple[int, str], list[str]] = {}
    for (method, seed), config in configs.items():
        found = _finished_or_run(config, out / "searches" / f"{method}-seed{seed}", "search")
        start, stop = found["segment"]
        chosen.setdefault((seed, f"{start}:{stop}"), []).append(method)
    runs: dict[tuple[str, int], Run] = {}
    notes, known = [], None
    for (seed, segment), sharing in sorted(chosen.items()):
        folder = out / "segments" / f"{segment.replace(':', '-')}-seed{seed}"
        config = of_segment(configs[sharing[0], seed], segment)
        results = _finished_or_run(config, folder, "report", known)
        known = known or folder
        runs |= {(method, seed): read_run(folder) for method in sharing}
        if len(sharing) > 1:
            (start, stop), num_layers = results["segment"], results["parent"]["num_layers"]
            cut = Segment(start, stop, num_layers)
            names = f"{', '.join(sharing[:-1])} and {sharing[-1]}"
            notes.append(f"{names} chose the same with seed {seed}: {cut} cut and healed once")
    return _as_groups(methods, seeds, runs), notes


def require_one_budget(config: Config) -> None:
    """Refuse targets by which every method would remove another number of layers.

    Raises:
        UserError: such a target, or two runs of layers.
    """
    target = config.target
    if any(value is not None for value in (target.segment, target.max_kl, target.params, target.latency_ms)):
        raise UserError("methods are compared with one budget - allowed: --layers or --rate - leave out other targets")
    if config.search.segments > 1:
        raise UserError("methods are compared with one run of layers - leave out search.segments")


def of_segment(config: Config, segment: str) -> Config:
    """Return the settings of what is done after the search, the same for all methods.

    The search that is not done is named clp: it leaves as much calibration text aside as any, so that healing never
    reads what a method has read.
    """
    target = TargetSettings(segment=segment)
    return replace(config, target=target, search=replace(config.search, method="clp"))


def _finished_or_run(config: Config, folder: Path, until: str, known: Path | None = None) -> dict[str, Any]:
    if found := finished_results(folder, config, until, None):
        say(f"{folder} is finished")
        return found
    say(f"{folder}: {' '.join(stage for stage in STAGES if stage in stages_until(until))}")
    return run(config, folder, until=until, known=known)


def _as_groups(methods: Sequence[str], seeds: Sequence[int], runs: dict[tuple[str, int], Run]) -> list[Group]:
    """Return one group for all methods that chose alike with every seed."""
    sharing: dict[tuple[Path, ...], list[str]] = {}
    for method in methods:
        sharing.setdefault(tuple(runs[method, seed].path for seed in seeds), []).append(method)
    return [
        Group(", ".join(names), ", ".join(names), {seed: runs[names[0], seed] for seed in seeds})
        for names in sharing.values()
    ]
