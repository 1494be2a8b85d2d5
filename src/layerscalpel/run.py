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

from layerscalpel import stages
from layerscalpel.config import Config
from layerscalpel.progress import say
from layerscalpel.rundir import RunDir, provenance, stages_until, write_json
from layerscalpel.segment import Segment


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
    stages.check_before_loading(config, wanted)
    folder = RunDir(out, config, redo=redo)
    bench = stages.Workbench(config, folder.path, wanted)
    try:
        found = folder.stage("search", partial(stages.search, bench))
        start, stop = found["segment"]
        segment = Segment(start, stop, found["parent"]["num_layers"])
        say(f"{'searched' if 'method' in found else 'given'}: {segment}")

        steps = {
            "cut": partial(stages.cut, bench, segment),
            "stitch": partial(stages.stitch, bench, segment),
            "heal": partial(stages.heal, bench, segment),
            "evaluate": partial(stages.evaluate, bench),
            "benchmark": partial(stages.benchmark, bench, segment),
        }
        for name in [stage for stage in wanted if stage in steps]:
            folder.stage(name, steps[name])
        origin = provenance(config, folder, began) | stages.peak_memory(folder.earlier())
        write_json(folder.path / "provenance.json", origin)
        if "report" in wanted:
            folder.stage("report", partial(stages.report, bench, folder.results(), origin))
        return folder.results()
    finally:
        folder.close()
