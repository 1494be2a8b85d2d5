"""The whole path on one page: search, cut, stitch, heal, quantize, evaluate, benchmark, report.

Each line of `run` is one stage (stages.py, quantizing.py, measuring.py), done in its own folder of the run directory. A
finished stage is not run again; models pass between stages as checkpoints, so any stage can be redone alone.

Under a launcher all processes search and heal together; rank 0 alone does the rest, and writes.

    results = run(build_config([{"model.name": "demo"}]), "runs/demo")
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from layerscalpel import measuring, parallel, quantizing, stages
from layerscalpel.checks import check_before_loading
from layerscalpel.errors import UserError
from layerscalpel.progress import say, set_quiet
from layerscalpel.rundir import RunDir, provenance, stages_until, write_json
from layerscalpel.segment import Segment, spoken
from layerscalpel.settings import Config
from layerscalpel.workbench import Workbench


def run(
    config: Config, out: str | Path, *, until: str = "report", redo: str | None = None, known: Path | None = None
) -> dict[str, Any]:
    """Run the stages that are not finished yet, up to `until`, and return the contents of results.json.

    Args:
        config: all settings.
        out: the run directory.
        until: the last stage to run.
        redo: run this stage and all after it again.
        known: another run of the same parent, whose results of tasks on it are taken where all else is the same.

    Raises:
        UserError: a mistake the user can mend; what is finished stays.
    """
    began = time.time()
    wanted = stages_until(until)
    parallel.join(config.model.device)
    check_before_loading(config, wanted)
    bench = Workbench(config, Path(out), wanted, known)
    if parallel.rank():
        return help_along(bench)
    folder = open_for_all(bench, config, redo)
    try:
        found = folder.stage("search", together(bench, "search"))
        segments = [Segment(start, stop, found["parent"]["num_layers"]) for start, stop in found["segments"]]
        say(f"{'searched' if 'method' in found else 'given'}: {spoken(segments)}")

        steps = {
            "cut": partial(stages.cut, bench, segments),
            "stitch": partial(stages.stitch, bench, segments),
            "heal": together(bench, "heal", segments),
            "quantize": partial(quantizing.quantize, bench, segments),
            "evaluate": partial(measuring.evaluate, bench, segments),
            "benchmark": partial(measuring.benchmark, bench, segments),
        }
        for name in [stage for stage in wanted if stage in steps]:
            folder.stage(name, steps[name])
            if name == "heal":
                bench.let_go()
        origin = provenance(config, folder, began) | stages.peak_memory(folder.earlier())
        write_json(folder.path / "provenance.json", origin)
        if "report" in wanted:
            folder.stage("report", partial(stages.report, bench, folder.results(), origin))
        return folder.results()
    finally:
        bench.let_go()
        bench.close()
        folder.close()


def open_for_all(bench: Workbench, config: Config, redo: str | None) -> RunDir:
    """Open the run directory; if that is refused, the other processes end, too."""
    try:
        return RunDir(bench.path, config, redo=redo)
    except UserError:
        bench.let_go()
        raise


def together(bench: Workbench, name: str, *given: Any) -> Callable[[Path], dict[str, Any]]:
    """Return a stage that begins by calling the other processes, who do it, too."""

    def work(folder: Path) -> dict[str, Any]:
        bench.call(name, *given)
        found = getattr(stages, name)(bench, *given, folder)
        bench.together = False
        return found

    return work


def help_along(bench: Workbench) -> dict[str, Any]:
    """Do this process's share of what rank 0 calls for; it alone writes and goes on, so nothing is returned."""
    set_quiet(True)
    try:
        while (call := bench.called()) is not None:
            name, given = call
            getattr(stages, name)(bench, *given, bench.path / name)
            bench.together = False
    finally:
        bench.close()
    return {}
