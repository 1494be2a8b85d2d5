"""The stages of a run: load what each needs, call the plain function that does the work, write what it found.

Every stage has the form `(bench, ..., folder) -> plain values`; the workbench loads the parent and the token blocks
once, when the first stage asks for them. A stage that is switched off returns SKIPPED and leaves no trace in
results.json.
"""

from __future__ import annotations

import contextlib
import resource
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerscalpel import parallel
from layerscalpel.card import model_card
from layerscalpel.carried import carry_files
from layerscalpel.checkpoint import cut_checkpoint
from layerscalpel.config import to_dict
from layerscalpel.decoder import Loaded, choose_device, num_parameters, save_decoder, stored_bytes
from layerscalpel.errors import DivergedError
from layerscalpel.heal import heal_model
from layerscalpel.history import forget_parent
from layerscalpel.objectives import asks_parent
from layerscalpel.offload import LayerFeed
from layerscalpel.origin import DTYPES, Origin, checkpoint_folder, peek
from layerscalpel.places import spares_device
from layerscalpel.progress import say
from layerscalpel.rundir import SKIPPED
from layerscalpel.search import SEARCHES
from layerscalpel.segment import Segment, seams_of
from layerscalpel.shards import read_weights
from layerscalpel.stitch import stitch_model
from layerscalpel.store import StreamStore
from layerscalpel.targets import aim, best_of_rates, given_segment, surface
from layerscalpel.task import Pilots, Task, first_sound
from layerscalpel.tworuns import better_of_one_and_two
from layerscalpel.verdict import BEGUN_WITH, keep_better, keep_good, measured_before, save_healed
from layerscalpel.workbench import Workbench


def search(bench: Workbench, _folder: Path) -> dict[str, Any]:
    """Find the segments, or take the one given; describe the parent."""
    config, parent = bench.config, bench.parent
    described = {
        "name": config.model.name,
        "num_layers": len(bench.decoder),
        "parameters": num_parameters(parent.model),
        "bytes": stored_bytes(parent.model, parent.origin),
        "dtype": parent.origin.dtype,
    }
    if parent.origin.file_bytes:
        described["file_bytes"] = parent.origin.file_bytes
    given = given_segment(config.target, len(bench.decoder))
    if given:
        runs = [[given.start, given.stop]]
        return {"parent": described, "segment": runs[0], "segments": runs, **SKIPPED}
    blocks = bench.parts.calibration
    found = find_segments(bench, blocks.tokens)
    return {"parent": described, "data": {"calibration": blocks.summary()}} | found


def find_segments(bench: Workbench, tokens: Tensor) -> dict[str, Any]:
    """Return what the search of a run found, as plain values."""
    config = bench.config
    base = Task(bench.decoder, tokens, 0, config.search, config.seed, bench.why_not, bench.store, pilots=_pilots(bench))
    task, target = aim(base, config.target, config.benchmark)
    result = first_sound(SEARCHES[config.search.method].find(task), task)
    for start, reason in result.details.get("refused", {}).items():
        say(f"the window at {start} scores better, but cannot be cut: {reason}")
    if config.search.segments > 1:
        result = better_of_one_and_two(result, task)
    found = result.to_dict() | ({"target": target} if target else {})
    if task.raced:
        found |= {"surface": surface(task.raced), "rates": best_of_rates(task.raced)}
    if parallel.world() > 1:
        found["processes"] = parallel.world()
    if bench.decoder.resident is not None:
        found["offload"] = _offload_facts(bench)
    return found


def _pilots(bench: Workbench) -> Pilots | None:
    """Return what a search that heals its candidates needs."""
    parts = bench.parts
    if bench.config.search.method != "pilot" or parts.healing is None or parts.validation is None:
        return None
    return Pilots(parts.healing, parts.validation, bench.config.heal, bench.path / "search")


def _offload_facts(bench: Workbench) -> dict[str, Any]:
    """Return how an offloaded search went, as plain values."""
    feed, store, where = bench.decoder.resident, bench.store, bench.config.model.offload
    assert isinstance(feed, LayerFeed)
    assert isinstance(store, StreamStore)
    return {"keep": where, "passes": feed.num_passes, "pass_bytes": feed.num_bytes, "file_bytes": store.file_peak}


def cut(bench: Workbench, segments: Sequence[Segment], folder: Path) -> dict[str, Any]:
    """Remove the segments, one after the other, the last one first; save each checkpoint and prove it."""
    origin, steps = bench.origin, []
    loaded = bench.config.model.offload == "none" and not origin.quantised  # its proof asks the library's own forward
    for left in folder.glob("step-*"):  # by a call that was interrupted
        shutil.rmtree(left)
    for number, segment in enumerate(reversed(segments), start=1):
        last = number == len(segments)
        out = folder / ("model" if last else f"step-{number}")
        own = replace(segment, num_layers=origin.num_layers)
        steps.append(_cut_once(bench, origin, own, out, bench.parent if loaded and number == 1 else None))
        if not last:
            origin = peek(str(out), **bench.config.model.permissions())
    if len(steps) > 1:
        forget_parent(folder / "model")
    for passed in folder.glob("step-*"):
        shutil.rmtree(passed)
    return steps[-1] | ({"steps": steps} if len(steps) > 1 else {})


def _cut_once(bench: Workbench, origin: Origin, segment: Segment, out: Path, parent: Loaded | None) -> dict[str, Any]:
    model, settings = bench.config.model, bench.config.cut
    return cut_checkpoint(
        origin,
        segment,
        out,
        parent=parent,
        device=model.device,
        dtype=model.dtype,
        proof=settings.proof,
        minutes=settings.proof_minutes,
    )


def _save(model: Any, parent: Loaded, folder: Path) -> dict[str, int]:
    save_decoder(model, parent.tokenizer, folder, dtype=parent.origin.dtype)
    if source := checkpoint_folder(parent.origin):
        carry_files(source, folder)
    return _sizes(model, parent)


def _sizes(model: Any, parent: Loaded) -> dict[str, int]:
    return {"parameters": num_parameters(model), "bytes": stored_bytes(model, parent.origin)}


def stitch(bench: Workbench, segments: Sequence[Segment], folder: Path) -> dict[str, Any]:
    """Repair the seam without training, if that lowers the held-out KL."""
    if bench.config.stitch.method == "none":
        return SKIPPED
    child, (segment,) = bench.child("cut"), segments
    calibration, stored = bench.parts.calibration, DTYPES[bench.parent.origin.dtype]
    result = stitch_model(child, bench.decoder, segment, calibration, bench.config.stitch, stored)
    return result | _save(child.model, bench.parent, folder / "model")


def heal(bench: Workbench, segments: Sequence[Segment], folder: Path) -> dict[str, Any]:
    """Train the layers at the seams and save the best state; of several processes that train, rank 0 saves it."""
    if bench.config.heal.method == "none":
        return SKIPPED
    settings, parts = bench.config.heal, bench.parts
    if parts.healing is None or parts.validation is None:
        raise AssertionError("healing blocks are prepared whenever something is healed")
    team = parallel.team() if bench.together else parallel.ALONE
    parent, spares = bench.decoder if asks_parent(settings) else None, spares_device(settings)
    judge = None if team.rank else bench.judge()
    with bench.parent_aside() if spares else contextlib.nullcontext():
        child = bench.child(*BEGUN_WITH, in_host_memory=spares)
        before = measured_before(bench, judge, child) if judge else {}
        how = {"seed": bench.config.seed, "scratch": folder, "team": team}
        try:
            given = (child, parent, seams_of(segments), parts.healing, parts.validation, settings)
            result = heal_model(*given, **how, device=choose_device(bench.config.model.device))
        except DivergedError as error:
            raise (keep_good(bench, child, error) if judge else error) from error
        bench.together = False
        if judge is None:
            return {}
        save_healed(bench, result, child, folder / "model")
        sizes = _sizes(child.model, bench.parent)
        del child  # another of its size is loaded
        verdict = keep_better(bench, judge, result, before, folder / "model")
        if bench.origin.quantised:
            sizes["bytes"] = read_weights(folder / "model").num_bytes()
    summaries = {"healing": parts.healing.summary(), "validation": parts.validation.summary()}
    found = result.to_dict() | verdict | {"data": summaries} | sizes
    return found | ({"processes": team.size} if team.size > 1 else {})


def report(bench: Workbench, results: dict[str, Any], origin: dict[str, Any], _folder: Path) -> dict[str, Any]:
    """Write report.html, and the model card beside the run and in the final checkpoint."""
    from layerscalpel.report import render_report  # plotting is slow to import

    settings = to_dict(bench.config)
    card = model_card(results, settings, origin)
    (bench.path / "report.html").write_text(render_report(results, settings, origin), encoding="utf-8")
    (bench.path / "README.md").write_text(card, encoding="utf-8")
    (bench.child_folder("quantize", "heal", "stitch", "cut") / "README.md").write_text(card, encoding="utf-8")
    return {}


def peak_memory(earlier: dict[str, Any]) -> dict[str, int]:
    """Return the most memory this process, a child of it, or an earlier call held, and the device's if there is one."""
    unit = 1 if sys.platform == "darwin" else 1024
    usage = [resource.getrusage(who).ru_maxrss * unit for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    found = {"peak_memory_bytes": max(usage)}
    if torch.cuda.is_available():
        found["peak_device_memory_bytes"] = torch.cuda.max_memory_allocated()
    return {name: max(value, earlier.get(name, 0)) for name, value in found.items()}
