"""Other ways to a model as small: what a run's quantised model is compared with in size.

Each row is made as a run would make it, measured by the same code on the same text, and its weights are removed. So a
reader sees whether pruning and eight bits beat four bits alone, and what comes first.

    for row in rows_of(config.quantize):
        with make(bench, segments, row, folder) as (place, made):
            ...    # measure the checkpoint there
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from layerscalpel.checkpoint import cut_checkpoint
from layerscalpel.decoder import save_decoder
from layerscalpel.footprint import folder_bytes
from layerscalpel.inputs import file_identity
from layerscalpel.origin import checkpoint_folder, peek
from layerscalpel.progress import say
from layerscalpel.quantize import quantize_checkpoint
from layerscalpel.quantizing import FINAL, texts_of
from layerscalpel.quantproof import Computing
from layerscalpel.rundir import read_json, write_json
from layerscalpel.segment import Segment, seams_of
from layerscalpel.settings import QuantizeSettings
from layerscalpel.workbench import Workbench


class Row(NamedTuple):
    """One other way."""

    sentence: str
    of: str
    """What is quantised: parent or final, the model that the run quantises itself."""
    bits: Literal[4, 8] | None = None
    """None takes those of the run."""
    cut_after: bool = False


BESIDE = {
    "parent_same": Row("the parent, quantised in the same way, nothing removed", "parent"),
    "parent8": Row("the parent in 8 bits, nothing removed", "parent", 8),
    "parent4": Row("the parent in 4 bits, nothing removed", "parent", 4),
    "healed8": Row("the final model of the run in 8 bits", "final", 8),
    "quantized_first": Row("the parent quantised, then cut at the same place; not healed", "parent", cut_after=True),
}


PLAIN = "plain"
"""Folder of the parent as a plain checkpoint, where it comes from another form."""
Checkpoint = tuple[Path, dict[str, Any]]


def rows_of(settings: QuantizeSettings) -> list[str]:
    """Return the rows to make, each once; one that would be another one, or the run's own result, is left out."""
    made = {("final", settings.bits, False): "the result itself"} if settings.method != "none" else {}
    rows = []
    for name in settings.beside:
        row = BESIDE[name]
        same = made.setdefault((row.of, row.bits or settings.bits, row.cut_after), name)
        if same == name and name not in rows:
            rows.append(name)
        elif same != name:
            say(f"beside: {name} would be {same}, so it is made once")
    return rows


@contextlib.contextmanager
def make(
    bench: Workbench, segments: Sequence[Segment], row: str, folder: Path
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Give the checkpoint of a row and what is known of it; it is removed after, unless it is to be kept.

    One that an interrupted call made is taken as it is.
    """
    place, settings = folder / "beside" / row, bench.config.quantize
    source, note = _source(bench, row, folder), place / "made.json"
    how = asdict(settings) | {"beside": row, "keep_beside": None}
    asked = json.dumps([how, file_identity(str(source)), bench.parts.calibration.sha256])
    key = hashlib.sha256(asked.encode()).hexdigest()
    if not note.exists() or read_json(note)["key"] != key:
        shutil.rmtree(place, ignore_errors=True)
        say(f"beside: {BESIDE[row].sentence}")
        with bench.parent_aside():
            found = _made(bench, segments, row, source, place)
        write_json(note, {"key": key, "found": found})
    yield place / "model", read_json(note)["found"]
    if not settings.keep_beside:
        shutil.rmtree(place)


def tidy(folder: Path, *, keep: bool) -> None:
    """Remove what the rows were made from, and the folder of those that are not kept."""
    shutil.rmtree(folder / "beside" / PLAIN if keep else folder / "beside", ignore_errors=True)


def _source(bench: Workbench, row: str, folder: Path) -> Path:
    """Return the checkpoint that a row quantises."""
    if BESIDE[row].of == "final":
        return bench.child_folder(*FINAL)
    if own := checkpoint_folder(bench.origin):
        return own
    plain = folder / "beside" / PLAIN
    if not plain.is_dir():
        save_decoder(bench.parent.model, bench.parent.tokenizer, plain, dtype=bench.parent.origin.dtype)
    return plain


def _made(bench: Workbench, segments: Sequence[Segment], row: str, source: Path, place: Path) -> dict[str, Any]:
    """Write the checkpoint of a row to place/model, and return what it is."""
    how, config = BESIDE[row], bench.config
    settings = replace(config.quantize, bits=how.bits or config.quantize.bits)
    seams = seams_of(segments) if how.of == "final" else []
    place.mkdir(parents=True)
    whole = place / ("whole" if how.cut_after else "model")
    given = {"seams": seams, "seed": config.seed, "computing": Computing.of(config)}
    made = quantize_checkpoint(source, whole, *texts_of(bench), settings, **given)
    if how.cut_after:
        _cut(bench, segments, whole, place)
    facts = made.to_dict()
    kept = ("method", "bits", "group_size", "symmetric", "act_order", "damping", "converted", "left", "modules")
    found = {"how": how.sentence} | {name: facts[name] for name in kept if name in facts}
    return found | {"bytes": folder_bytes(place / "model")}


def _cut(bench: Workbench, segments: Sequence[Segment], whole: Path, place: Path) -> None:
    """Cut the segments out of a quantised checkpoint, the last one first; what is left is place/model."""
    model, settings, source = bench.config.model, bench.config.cut, whole
    for number, segment in enumerate(reversed(segments), start=1):
        out = place / ("model" if number == len(segments) else f"step-{number}")
        origin = peek(str(source), trust_remote_code=model.trust_remote_code, allow_quantised=True)
        own = replace(segment, num_layers=origin.num_layers)
        how: dict[str, Any] = {"device": model.device, "dtype": model.dtype, "minutes": settings.proof_minutes}
        cut_checkpoint(origin, own, out, proof=settings.proof, **how)
        shutil.rmtree(source)
        source = out
