"""The stage that quantises what a run has come to, and the same for one checkpoint without a run.

The text is the run's own: what the search read calibrates, and what healing was validated on judges. Where nothing was
healed the last quarter of the calibration text judges, and calibrates nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layerscalpel.data import TokenBlocks
from layerscalpel.footprint import bytes_on_disk, folder_bytes
from layerscalpel.quantize import quantize_checkpoint
from layerscalpel.quantproof import Computing
from layerscalpel.rundir import SKIPPED, write_json
from layerscalpel.segment import Segment, seams_of
from layerscalpel.workbench import Workbench

FINAL = ("heal", "stitch", "cut")
"""Stages by whose checkpoint quantising begins, the first that is there."""
MODULES = "modules.json"
"""Beside the checkpoint: every module with weights, quantised to how many bits, or why it was left."""


def quantize(bench: Workbench, segments: Sequence[Segment], folder: Path) -> dict[str, Any]:
    """Quantise the final model of a run, prove it, and say what it is beside the models before it."""
    settings, config = bench.config.quantize, bench.config
    if settings.method == "none":
        return SKIPPED
    source = bench.child_folder(*FINAL)
    given = {"seams": seams_of(segments), "seed": config.seed, "computing": Computing.of(config)}
    texts = texts_of(bench)
    with bench.parent_aside():
        found = quantize_checkpoint(source, folder / "model", *texts, settings, **given)
    scheme = found.scheme
    bits = {name: f"{scheme.bits_of(name)} bits" for name in scheme.converted}
    write_json(folder / MODULES, bits | dict(scheme.reasons))
    return {"of": source.parent.name} | found.to_dict() | {"folder_bytes": _folders(bench)}


def texts_of(bench: Workbench) -> tuple[TokenBlocks, TokenBlocks]:
    """Return the text that calibrates, and the text that judges."""
    return split(bench.parts.calibration, bench.parts.validation, bench.config.quantize.num_blocks)


def split(calibration: TokenBlocks, validation: TokenBlocks | None, most: int) -> tuple[TokenBlocks, TokenBlocks]:
    """Return the text that calibrates and, of at most so many blocks, the text that judges."""
    if validation is not None:
        return calibration, validation.first(most)
    held_out = max(1, len(calibration) // 4)
    return calibration.first(len(calibration) - held_out), calibration.last(held_out).first(most)


def _folders(bench: Workbench) -> dict[str, int]:
    """Return the bytes of the whole folder of each model before this one.

    The parent's own folder may hold what no one loads, and a GGUF is another form: its weights in its number format
    count, and what the cut model carries beside its own.
    """
    cut = bench.path / "cut" / "model"
    beside = folder_bytes(cut) - bytes_on_disk(cut)
    found = {"parent": bench.result_of("search")["parent"]["bytes"] + beside}
    for stage in reversed(FINAL):
        if (bench.path / stage / "model").is_dir():
            found[stage] = folder_bytes(bench.path / stage / "model")
    return found
