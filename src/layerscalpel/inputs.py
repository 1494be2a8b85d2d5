"""The files that results depend on, and what tells one version of them from another; nothing heavy is imported.

file_identity("runs/model")          # its files, with sizes and times
task_identities("tasks/,piqa")       # a hash of every file that these tasks are read from, and the bare name
"""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from layerscalpel.tasknames import names_files
from layerscalpel.taskset import NAME_LINE

DEFINITIONS = (".yaml", ".yml")
FUNCTION = re.compile(r"!function[ \t]+([\w.]+)\.\w+")
"""Python code that a definition calls, in a file beside it."""
DATA = ("data_files", "data_dir")
"""What of a definition's dataset_kwargs names files."""


class _Loader(yaml.SafeLoader):
    """Reads the tags of the harness as nothing."""


_Loader.add_multi_constructor("!", lambda *_: None)


def file_identity(name: str) -> str:
    """Return what tells one version of an input file or checkpoint folder from another; a bare name stays a name."""
    path = Path(name).expanduser()
    if path.is_dir():
        parts = [f"{p.name}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in sorted(path.glob("*")) if p.is_file()]
        return f"{path.resolve()}|{'|'.join(parts)}"
    if path.is_file() and path.suffix == ".gguf":
        return f"{path.resolve()}:{path.stat().st_size}:{path.stat().st_mtime_ns}"
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return name


def task_identities(spec: str) -> list[str]:
    """Return what tells one version of the tasks of a --tasks from another: names, and hashes of the files they mean.

    Of definitions these are the files that they include, the code they call, the tasks of a group, and local data.
    """
    found = []
    for word in map(str.strip, spec.split(",")):
        path = Path(word).expanduser()
        files = sorted(_read_by(path)) if names_files(word) else []
        found += [f"{file.name}:{file_identity(str(file))}" for file in files] or [word]
    return found


def _read_by(path: Path) -> set[Path]:
    """Return the files that tasks of a folder, or of one definition, are read from."""
    found: set[Path] = set()
    pending = [path]
    while pending:
        file = pending.pop()
        if file.is_dir():
            pending += [part for part in file.rglob("*") if "__pycache__" not in part.parts and not part.is_dir()]
        elif file.is_file() and file not in found:
            found.add(file)
            pending += _named_in(file) if file.suffix in DEFINITIONS else ()
    return found


def _named_in(definition: Path) -> Iterator[Path]:
    """Yield the files that a definition names; of one that cannot be read none, which loading it will tell."""
    text = definition.read_text(encoding="utf-8", errors="replace")
    for module in FUNCTION.findall(text):
        yield definition.parent / f"{module.replace('.', '/')}.py"
    try:
        content = yaml.load(text, _Loader)
    except yaml.YAMLError:
        return
    if isinstance(content, dict):
        yield from (definition.parent / name for name in _texts(content.get("include")))
        yield from _named_by(content, definition.parent)


def _named_by(content: dict[str, Any], folder: Path) -> Iterator[Path]:
    """Yield the data of a task, or the files of a group's tasks."""
    options = content.get("dataset_kwargs")
    places = [content.get("dataset_path"), *(options.get(name) for name in DATA if isinstance(options, dict))]
    for text in _texts(places):
        yield from map(Path, glob.glob(str(Path(text).expanduser()), recursive=True))
    parts = content["task"] if isinstance(content.get("task"), list) else []
    for part in (part for part in parts if isinstance(part, dict)):
        yield from (folder / name for name in _texts(part.get("include")))
        yield from _named_by(part, folder)
    names = set(_texts([part.get("task") if isinstance(part, dict) else part for part in parts]))
    for file in folder.rglob("*.yaml") if names else ():
        match = NAME_LINE.search(file.read_text(encoding="utf-8", errors="replace"))
        if match and match[1] in names:
            yield file


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts in a value, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
