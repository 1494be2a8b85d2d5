"""What a cut checkpoint tells of its parents: who they were, and which of their layers were removed.

It stands in PROVENANCE_FILE, a parent that was itself cut within it.

    parent_of(folder)     # ("/models/model", "13:19")
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from layerscalpel.errors import UserError
from layerscalpel.origin import Origin, checkpoint_folder
from layerscalpel.rundir import write_json
from layerscalpel.segment import Segment

PROVENANCE_FILE = "layerscalpel.json"
"""Beside a cut checkpoint: its parent and segment, and those of the parents before."""


def cut_history(origin: Origin, segment: Segment, folder: Path) -> dict[str, Any]:
    """Return {parent, segment, num_layers, before}: `before` is the parent's own history, if it was cut too.

    A local parent is named by its path from the new folder, so that nobody's home stands in a published model.

    Raises:
        UserError: the parent's own history is damaged.
    """
    local = origin.kind != "hub" and origin.name != "demo"
    parent = os.path.relpath(origin.place, folder.absolute()) if local else origin.name
    own = {"parent": parent, "segment": [segment.start, segment.stop], "num_layers": segment.num_layers}
    place = checkpoint_folder(origin) if origin.kind == "hub" else Path(origin.place)
    before = read_history(place) if place and place.is_dir() else None
    return own | ({"before": before} if before else {})


def read_history(folder: Path) -> dict[str, Any] | None:
    """Return the history of a cut checkpoint, checked; None if it was not cut by us.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / PROVENANCE_FILE
    if not path.is_file():
        return None
    try:
        step = history = json.loads(path.read_text(encoding="utf-8"))
        while step:
            start, stop = step["segment"]
            Segment(start, stop, step["num_layers"])
            if not isinstance(step["parent"], str):
                raise TypeError("parent is no text")
            step = step.get("before")
    except (ValueError, KeyError, TypeError, AttributeError, UserError) as error:
        raise UserError(f"{path} is damaged ({error}) - restore it, or remove it with its history") from error
    return history


def forget_parent(folder: Path) -> None:
    """Name no parent any more, where it was a step between two cuts that is not kept; what it was made of stays."""
    path = folder / PROVENANCE_FILE
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | {"parent": ""})


def parent_of(folder: Path) -> tuple[str, str]:
    """Return the parent of a cut checkpoint, as a model name, and its segment as START:STOP.

    Raises:
        UserError: it was not cut by us, or its history is damaged.
    """
    history = read_history(folder)
    if not history:
        raise UserError(f"{folder} has no {PROVENANCE_FILE} - it was not cut by scalpel")
    if not history["parent"]:
        raise UserError(f"{folder} was cut from a checkpoint that was not kept - heal its run directory instead")
    beside = folder / history["parent"]
    return str(beside.resolve()) if beside.exists() else history["parent"], ":".join(map(str, history["segment"]))
