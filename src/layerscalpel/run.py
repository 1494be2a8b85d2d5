"""The whole path on one page: search, cut, stitch, heal, evaluate, benchmark, report.

Each line of `run` is one stage of stages.py, done in its own folder of the run directory. A finished stage is not run
again; models pass between stages as checkpoints, so any stage can be redone alone.

    results = run(build_config([{"model.name": "demo"}]), "runs/demo")
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

from layerscalpel import parallel, stages
from layerscalpel.errors import UserError
from layerscalpel.progress import say, set_quiet
from layerscalpel.rundir import RunDir, provenance, stages_until, write_json
from layerscalpel.segment import Segment, spoken
from layerscalpel.settings import Config
from layerscalpel.workbench import Workbench, check_before_loading


def run(config: Config, out: str | Path, *, until: str = "report", redo: str | None = None) -> dict[str, Any]:
    """Run the stages that are not finished yet, up to `until`, and return the contents of results.json.

    Args:
        config: all settings.
        out: the run directory.
        until: the last stage to run.
        redo: run this stage and all after it again.

    Raises:
        UserError: a mistake the user can mend; what is finished stays.
    """
    began = time.time()
    wanted = stages_until(until)
    parallel.join(config.model.device)
    check_before_loading(config, wanted)
    bench = Workbench(config, Path(out), wanted)
    if parallel.rank():
        return help_search(bench)
    folder = open_for_all(out, config, redo)
    try:
        bench.together = folder.done("search") is None
        found = folder.stage("search", partial(stages.search, bench))
        bench.together = False
        segments = [Segment(start, stop, found["parent"]["num_layers"]) for start, stop in found["segments"]]
        say(f"{'searched' if 'method' in found else 'given'}: {spoken(segments)}")

        steps = {
            "cut": partial(stages.cut, bench, segments),
            "stitch": partial(stages.stitch, bench, segments),
            "heal": partial(stages.heal, bench, segments),
            "evaluate": partial(stages.evaluate, bench),
            "benchmark": partial(stages.benchmark, bench, segments),
        }
        for name in [stage for stage in wanted if stage in steps]:
            folder.stage(name, steps[name])
        origin = provenance(config, folder, began) | stages.peak_memory(folder.earlier())
        write_json(folder.path / "provenance.json", origin)
        if "report" in wanted:
            folder.stage("report", partial(stages.report, bench, folder.results(), origin))
        return folder.results()
    finally:
        bench.close()
        folder.close()


def open_for_all(out: str | Path, config: Config, redo: str | None) -> RunDir:
    """Open the run directory, and tell the other processes whether there is a search to help with."""
    try:
        folder = RunDir(out, config, redo=redo)
    except UserError:
        parallel.first_says(False)  # else they would wait for one
        raise
    parallel.first_says(folder.done("search") is None)
    return folder


def help_search(bench: Workbench) -> dict[str, Any]:
    """Do this process's share of a search that rank 0 leads; it alone writes and goes on, so nothing is returned."""
    set_quiet(True)
    try:
        if parallel.first_says(None):
            bench.together = True
            stages.search(bench, bench.path)
    finally:
        bench.close()
    return {}
