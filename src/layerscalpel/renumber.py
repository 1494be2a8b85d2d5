"""Layer numbers in the module names and patterns of a quantisation config, and what a cut makes of them.

Libraries list modules by name, by the end of a name, or by a regular expression (marked `re:` by compressed-tensors,
`-:` and `+:` by GPTQ). After a cut an entry must match the very modules that it matched before, under their new
numbers. Plain names get another number. A pattern is tried on the model's own names before and after the cut: it stays
if it fits, gets another number if that fits, or else spells out the layers that it matched. An entry that matched
removed layers alone is dropped.

    modules = Modules("model.layers", names, Segment(13, 19, 30))
    renumbered({"ignore": ["re:model.layers.27.*"]}, modules)  # {"ignore": ["re:model.layers.21.*"]}
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from layerscalpel.errors import UserError
from layerscalpel.segment import Segment

MARKERS = ("re:", "-:", "+:")
"""What begins an entry that is a regular expression."""
OWN_FILES = ("quantize_config.json", "quant_config.json", "quantization_config.json")
"""Settings of GPTQ's, AWQ's and other libraries, beside those in the config."""
BOUNDARY = r"(?:(?<=\.)|(?=\.|$))"
"""Where transformers has an unmarked entry end within a module's name."""
ELSEWHERE = "visi|visual|audio|image|connector|projector|encoder"
"""Words in the names of parts that have layers of their own."""
NUMBERED = re.compile(r"(?:^|[^a-z0-9_])(?:layers?|h|blocks?)\\?\.(\d+|[(\[])")
"""A layer's number in a name, or the beginning of a pattern of such numbers."""


@dataclass(frozen=True)
class Modules:
    """The modules of a model that is cut."""

    path: str
    """Dotted name of the list of layers."""
    names: tuple[str, ...]
    """All modules of the uncut model."""
    segment: Segment

    @classmethod
    def of(cls, model: nn.Module, path: str, segment: Segment) -> Modules:
        """Return those of a model that may be a skeleton."""
        return cls(path, tuple(name for name, _ in model.named_modules()), segment)

    @cached_property
    def after(self) -> tuple[str, ...]:
        """All modules of the cut model."""
        return tuple(new for name in self.names if (new := self.new(name)) is not None)

    def parts(self, name: str) -> tuple[int, str] | None:
        """Return the layer of a module and what follows its number; None for a module outside the layers."""
        found = re.fullmatch(rf"{re.escape(self.path)}\.(\d+)(.*)", name)
        return (int(found[1]), found[2]) if found else None

    def new(self, name: str) -> str | None:
        """Return a module's name after the cut; None if it is removed."""
        parts, kept = self.parts(name), self.segment.kept()
        if parts is None:
            return name
        return f"{self.path}.{kept.index(parts[0])}{parts[1]}" if parts[0] in kept else None

    def fits(self, entry: str, wanted: Sequence[str]) -> bool:
        """Tell whether an entry matches just these modules of the cut model."""
        return _matched(entry, self.after) == list(wanted)


def renumbered(value: Any, modules: Modules) -> Any:
    """Return a quantisation config, or a part of it, after a cut.

    Raises:
        UserError: a pattern that matches other modules in each layer.
    """
    if isinstance(value, dict):
        kept = {_renumber(str(key), modules): key for key in value}
        found = {new: renumbered(value[old], modules) for new, old in kept.items() if new is not None}
        return _without_empty_groups(value, found)
    if isinstance(value, (list, tuple)):
        entries = [_renumber(item, modules) if isinstance(item, str) else renumbered(item, modules) for item in value]
        return [item for item in entries if item is not None]
    return value


def renumber_files(folder: Path, modules: Modules) -> None:
    """Renumber layers in the settings that some libraries keep beside the config."""
    for path in (folder / name for name in OWN_FILES if (folder / name).is_file()):
        settings = renumbered(json.loads(path.read_text(encoding="utf-8")), modules)
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _without_empty_groups(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Drop the groups of compressed-tensors whose every target was in a removed layer."""
    groups = after.get("config_groups")
    if not isinstance(groups, dict):
        return after
    emptied = [name for name in groups if before["config_groups"][name].get("targets") and not groups[name]["targets"]]
    return {**after, "config_groups": {name: group for name, group in groups.items() if name not in emptied}}


def _renumber(entry: str, modules: Modules) -> str | None:
    """Return an entry after the cut; None if it named removed layers alone."""
    listed = NUMBERED.search(entry)
    number = listed[1] if listed and listed[1].isdecimal() else ""
    if re.search(ELSEWHERE, entry) or (not entry.startswith(MARKERS) and not re.search(r"[.*\\]", entry)):
        return entry
    if re.fullmatch(r"[\w.-]+", entry) and number:
        return _plainly(entry, modules.segment)
    before = _matched(entry, modules.names)
    wanted = [new for name in before if (new := modules.new(name)) is not None]
    if modules.fits(entry, wanted):
        return entry if wanted or not before else None
    if not wanted:
        return None
    for candidate in _candidates(entry, modules, wanted):
        if modules.fits(candidate, wanted):
            return candidate
    raise UserError(
        f"quantization_config names other modules in each layer by one pattern ({entry})"
        " - write the names out, then cut"
    )


def _matched(entry: str, names: Sequence[str]) -> list[str]:
    """Return the names that an entry matches, as the libraries would."""
    marked = entry.startswith(MARKERS)
    body = entry.partition(":")[2] if marked else entry
    try:
        pattern = re.compile(body if marked else f"(?:{body}){BOUNDARY}")
    except re.error:  # shell wildcards, as of Quark
        return fnmatch.filter(names, body)
    return [name for name in names if pattern.match(name) or (not marked and name.endswith(body))]


def _plainly(entry: str, segment: Segment) -> str | None:
    """Return an entry with its layer's new number; None if that layer is removed."""
    listed = NUMBERED.search(entry)
    if not listed or not listed[1].isdecimal():
        return entry
    old, kept = int(listed[1]), segment.kept()
    if old not in kept:
        return entry if old >= segment.num_layers else None
    return entry[: listed.start(1)] + str(kept.index(old)) + entry[listed.end(1) :]


def _candidates(entry: str, modules: Modules, wanted: Sequence[str]) -> Iterator[str]:
    """Yield other ways to write an entry: with another number, or with the layers spelt out."""
    if plain := _plainly(entry, modules.segment):
        yield plain
    rests: dict[int, set[str]] = defaultdict(set)
    outside = []
    for name in wanted:
        if parts := modules.parts(name):
            rests[parts[0]].add(parts[1])
        else:
            outside.append(name)
    if len({frozenset(found) for found in rests.values()}) == 1 and not outside:
        numbers = "|".join(map(str, sorted(rests)))
        ends = "|".join(sorted(map(re.escape, next(iter(rests.values())))))
        marker = entry[: len("re:")] if entry.startswith("re:") else entry[:2] if entry.startswith(MARKERS) else ""
        yield f"{marker}{re.escape(modules.path)}\\.(?:{numbers})(?:{ends})" + "$" * bool(marker)
